//! The thread that uploads checkpoints to the remote store, and removes there what retention
//! deleted ([`super::remote_removals`]).
//!
//! Always holds:
//! - Everything that is to be done survives a failure: it is tried again until the store is closed,
//!   and what is left then is found by the next writer, in the listings of both stores. A step that
//!   cannot be uploaded holds up no other, and no removal does ([`super::queue`]).
//! - Where several ranks save, each with a store of its own, each uploads its own shard; the
//!   rank that finds all of them there publishes, and the others wait to see it.
//! - A panic ends what it happened in, and nobody waits for a thread that has ended.

use std::fmt;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use super::pacer::Pacer;
use super::queue::{Queue, UploadTask};
use super::work::Work;
use crate::clock::elapsed;
use crate::error::{self, IoContext};
use crate::store::Uploads;
use crate::store_copy::{
    Between, Copied, Overwrite, Presence, Transferred, publish_whole, transfer, transfer_share,
};
use crate::sync::unpoisoned;
use crate::{EngineError, Result};

/// How long a store that is closing waits for shards of others.
const FAREWELL: Duration = Duration::from_secs(10);

/// The thread that uploads.
pub(super) struct Uploader {
    pub(super) work: Arc<Work>,
    thread: Option<JoinHandle<()>>,
    process: u32,
}

impl Uploader {
    pub(super) fn start(work: Arc<Work>) -> Result<Self> {
        let own = EndsWaits(Arc::clone(&work));
        let thread = std::thread::Builder::new()
            .name("dtr-upload".into())
            .spawn(move || own.run())
            .context("starting a thread for", "uploading")?;
        Ok(Self { work, thread: Some(thread), process: std::process::id() })
    }
}

impl Drop for Uploader {
    fn drop(&mut self) {
        // A forked child has no such thread.
        if self.process != std::process::id() {
            return;
        }
        self.work.change(Queue::stop);
        if let Some(thread) = self.thread.take() {
            // What it was at is resumed by the next process.
            let _panicked = thread.join();
        }
    }
}

/// However the thread ends, nobody waits for it any more.
struct EndsWaits(Arc<Work>);

impl EndsWaits {
    fn run(&self) {
        self.0.run();
    }
}

impl Drop for EndsWaits {
    fn drop(&mut self) {
        self.0.change(Queue::end);
    }
}

impl Work {
    fn run(&self) {
        while self.waits_for_work() {
            self.removes_what_waits();
            self.uploads_the_next();
            self.publishes_what_is_whole();
        }
    }

    /// True when there is something to do; false when the store is closed.
    fn waits_for_work(&self) -> bool {
        let mut queue = self.lock();
        while !queue.is_stopped() {
            queue = match queue.pause(self.now()) {
                Some(Duration::ZERO) => return true,
                Some(pause) => unpoisoned(self.changed.wait_timeout(queue, pause)).0,
                None => unpoisoned(self.changed.wait(queue)),
            };
        }
        false
    }

    fn uploads_the_next(&self) {
        let Some((step, task)) = self.lock().take(self.now()) else { return };
        let outcome = caught(&format!("uploading step {step}"), || self.upload(step, &task));
        let error = outcome.as_ref().err().map(ToString::to_string);
        let share = self.share.is_some();
        let tries_again = self.change(|queue| queue.book(outcome, share, self.now()));
        let Some(error) = error else { return };
        if task.is_cancelled() && !self.lock().is_stopped() {
            self.give_up_uploads(step);
        } else {
            tracing::warn!(step, error, tries_again, "an upload failed");
        }
    }

    fn upload(&self, step: u64, task: &UploadTask) -> Copied<Transferred> {
        let pacer = Pacer::new(self, task);
        let (local, remote) = (self.local.as_ref(), self.remote.as_ref());
        let environment = &self.environment;
        let between = Between { source: local, destination: remote, environment, observer: &pacer };
        if let Some(share) = self.share {
            return transfer_share(&between, (step, share));
        }
        let transferred = transfer(&between, step, Overwrite::Yes)?;
        // Not as it is in the local store: a shard that another rank uploaded is in the remote one
        // alone.
        self.view.note(remote, step);
        Ok(transferred)
    }

    /// Publishes steps of which every rank has uploaded its shard.
    fn publishes_what_is_whole(&self) {
        let Some(share) = self.share else { return };
        let uploaded = self.lock().looks(self.now());
        for step in uploaded {
            // The thread that cancels it waits for this.
            let Some(task) = self.lock().take_uploaded(step) else { continue };
            let may_be_ours = self.lock().may_have_published(step);
            let published = caught(&format!("publishing step {step}"), || {
                publish_whole(self.local.as_ref(), self.remote.as_ref(), (step, share), may_be_ours)
            });
            if matches!(published, Ok(Presence::All)) && !task.is_cancelled() {
                self.view.note(self.remote.as_ref(), step);
            }
            self.book_whole(step, published);
        }
    }

    /// Notes what came of waiting for the other ranks.
    fn book_whole(&self, step: u64, published: Copied<Presence>) {
        let given_up = self.is_past(step).then(|| self.lacks_others(step));
        self.change(|queue| {
            if matches!(published, Ok(Presence::All) | Err(_)) {
                queue.note_published(step);
            }
            match published {
                Ok(Presence::All) => queue.book_whole(step),
                Ok(Presence::Less) if given_up.is_none() => queue.book_lost(step, self.now()),
                Ok(Presence::Some | Presence::Less) => {
                    if let Some(error) = &given_up {
                        warn_of(step, error);
                    }
                    queue.book_missing(step, given_up);
                }
                Err(uncopied) => {
                    warn_of(step, &uncopied);
                    queue.book_unseen(step, uncopied);
                }
            }
        });
    }

    /// Whether the other ranks' shards are waited for no more. What is older than one that is whole
    /// is not: a rank was lost with it, or it has been there, and retention took it.
    fn is_past(&self, step: u64) -> bool {
        let arrived = self.arrived();
        let queue = self.lock();
        // Later ones that are listed still are retired by what this process committed last.
        let newest = arrived.into_iter().rfind(|arrived| !queue.is_retired(*arrived));
        let draining = queue.draining();
        drop(queue);
        let is_late = draining.is_some_and(|since| elapsed(&*self.environment, since) >= FAREWELL);
        newest.is_some_and(|newest| step < newest) || is_late
    }

    fn lacks_others(&self, step: u64) -> EngineError {
        EngineError::Closed {
            what: format!(
                "waiting for all ranks to bring step {step} to `{}`",
                self.remote.location()
            ),
            why: "this rank's shard is there, and those of others are not yet".into(),
            hint: "the rank that brings the last one publishes it; if a rank was lost, what its \
                   store holds is uploaded when it is opened for writing again; a newer step that \
                   is whole there takes its place"
                .into(),
        }
    }
}

/// A panic is an error like others, which says so.
pub(super) fn caught<T, E: From<EngineError>>(
    what: &str,
    act: impl FnOnce() -> std::result::Result<T, E>,
) -> std::result::Result<T, E> {
    error::caught(act, || EngineError::internal(what, "the thread that uploads panicked").into())
}

fn warn_of(step: u64, error: &dyn fmt::Display) {
    tracing::warn!(step, %error, "not every rank's shard is in the far store");
}
