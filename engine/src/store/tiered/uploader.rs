//! The thread that brings checkpoints to the far store, and lets go there of what retention let go.
//!
//! Always holds:
//! - Everything that is to be done survives a failure: it is tried again until the store is closed,
//!   and what is left then is found by the next writer, in the listings of both stores. A step that
//!   cannot be uploaded holds up no other, and no removal does ([`super::queue`]).
//! - A checkpoint that retires another is removed after it ([`super::removals`]).
//! - One thread at a time removes; a step that is committed again is not removed any more.
//! - Where several ranks save, each with a store of its own, each brings its own shard; whoever
//!   finds all of them there publishes, and the others wait to see it. Rank 0 alone removes; the
//!   others only take back what they published of steps that a rewind has retired.
//! - A panic ends what it happened in, and nobody waits for a thread that has ended.

use std::collections::BTreeSet;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use super::far::FarView;
use super::queue::{Care, Queue, Turn};
use super::removals::Removal;
use crate::clock::{Environment, elapsed};
use crate::error::IoContext;
use crate::format::manifest::Manifest;
use crate::format::names::{AttemptId, MANIFEST_FILE, parse_shard_file};
use crate::load::VerifyObserver;
use crate::recovery::OwnShare;
use crate::store::{PendingUpload, Store, UnfinishedUpload};
use crate::transfer::{
    Brought, Copied, Overwrite, Transferred, publish_whole, standing, transfer, transfer_share,
};
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
        self.work.stop();
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

/// What the uploader and those who wait for it share.
pub(super) struct Work {
    pub(super) near: Arc<dyn Store>,
    pub(super) far: Arc<dyn Store>,
    pub(super) view: FarView,
    environment: Arc<dyn Environment>,
    bytes_per_second: Option<u64>,
    /// Of a rank with a store of its own.
    share: Option<OwnShare>,
    queue: Mutex<Queue>,
    changed: Condvar,
    /// Held by whoever removes from the far store.
    removing: Mutex<()>,
}

impl Work {
    /// Work on `waiting` steps, which the far store does not have as they are; of those that are
    /// `unsure` that is not known.
    pub(super) fn new(
        (near, far): (&Arc<dyn Store>, &Arc<dyn Store>),
        view: FarView,
        (waiting, unsure): (BTreeSet<u64>, BTreeSet<u64>),
        environment: Arc<dyn Environment>,
        (bytes_per_second, share): (Option<u64>, Option<OwnShare>),
    ) -> Self {
        Self {
            near: Arc::clone(near),
            far: Arc::clone(far),
            view,
            environment,
            bytes_per_second,
            share,
            queue: Mutex::new(Queue::new(waiting, unsure)),
            changed: Condvar::new(),
            removing: Mutex::new(()),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        // Every critical section is a few assignments.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the queue, which those who wait hear of.
    fn change<T>(&self, change: impl FnOnce(&mut Queue) -> T) -> T {
        let changed = change(&mut self.lock());
        self.changed.notify_all();
        changed
    }

    fn now(&self) -> Duration {
        self.environment.monotonic()
    }

    pub(super) fn add(&self, step: u64) {
        self.change(|queue| queue.add(step));
    }

    /// What is known of a step that is to go, in case that it stays.
    pub(super) fn care_for(&self, step: u64) -> Care {
        self.lock().care_for(step)
    }

    /// The step stays, though it was to go.
    pub(super) fn put_back(&self, step: u64, care: Care) {
        self.change(|queue| queue.put_back(step, care));
    }

    /// The step is going: its upload is not begun any more, and ends soon if it was.
    pub(super) fn cancel(&self, step: u64) {
        self.change(|queue| queue.cancel(step));
    }

    /// The same; nobody uploads the step any more when this returns.
    pub(super) fn cancel_and_wait(&self, step: u64) {
        let mut queue = self.lock();
        while queue.cancel(step) {
            self.changed.notify_all();
            queue = self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
        drop(queue);
        self.changed.notify_all();
    }

    pub(super) fn is_waiting(&self, step: u64) -> bool {
        self.lock().is_waiting(step)
    }

    pub(super) fn may_remove(&self, step: u64) -> bool {
        self.lock().may_remove(step)
    }

    pub(super) fn wait_for(
        &self,
        step: u64,
        timeout: Option<Duration>,
    ) -> Option<Result<Transferred>> {
        let pending = |queue: &mut Queue| queue.is_waiting(step) && !queue.is_stopped();
        let queue = match timeout {
            None => self.changed.wait_while(self.lock(), pending),
            Some(timeout) => match self.changed.wait_timeout_while(self.lock(), timeout, pending) {
                Ok((queue, _)) => Ok(queue),
                Err(poisoned) => Ok(poisoned.into_inner().0),
            },
        };
        let queue = queue.unwrap_or_else(PoisonError::into_inner);
        if queue.is_waiting(step) && !queue.is_stopped() {
            return None;
        }
        Some(queue.outcome(step).unwrap_or_else(|| Err(self.not_uploaded(step))))
    }

    fn not_uploaded(&self, step: u64) -> EngineError {
        EngineError::Closed {
            what: format!("uploading step {step} to `{}`", self.far.location()),
            why: "it was never committed, or was deleted, or the store closed before".into(),
            hint: "what is committed and left is uploaded when the store is opened for writing \
                   again"
                .into(),
        }
    }

    /// The attempt that stands near, if a rewind retired it and its manifest may have been put into
    /// the far store by this process, after rank 0 had been there: it would stand again once what
    /// retired it is gone. Any other step that comes late does no harm, and is rank 0's to remove,
    /// which alone knows that what it retired is gone.
    pub(super) fn to_take_back(&self, step: u64) -> Option<AttemptId> {
        let may_be = !self.removes_for_all() && self.lock().may_have_published_retired(step);
        may_be.then(|| standing(self.near.as_ref(), step).ok().flatten()).flatten()
    }

    /// Lets the far store go of a step, behind; `attempt` stood near and was [to be taken
    /// back][Self::to_take_back]. Gives what is to be done for that, if anything.
    pub(super) fn let_go_behind(&self, step: u64, attempt: Option<AttemptId>) -> Option<Removal> {
        self.view.forget(step);
        let removal = if self.removes_for_all() {
            Some(Removal::Checkpoint(step))
        } else {
            attempt.map(|attempt| Removal::Attempt(step, attempt))
        };
        self.asked(removal)
    }

    fn asked(&self, removal: Option<Removal>) -> Option<Removal> {
        if let Some(removal) = &removal {
            self.change(|queue| queue.remove(removal.clone()));
        }
        removal
    }

    /// Lets the far store go of a file that no manifest names, behind. Gives what is to be done for
    /// that, if anything.
    pub(super) fn remove_orphan_behind(&self, step: u64, file: &str) -> Option<Removal> {
        self.view.forget_file(step, file);
        self.asked(self.removes_for_all().then(|| Removal::Orphan(step, file.into())))
    }

    fn removes_for_all(&self) -> bool {
        self.share.is_none_or(|share| share.rank == 0)
    }

    /// Carries a removal out that waits, and those before it that it waits for. Returns the bytes
    /// freed.
    pub(super) fn remove_now(&self, wanted: &Removal) -> Result<u64> {
        let _turn = self.removing.lock().unwrap_or_else(PoisonError::into_inner);
        let mut freed_bytes = 0;
        while let Some(removed) = self.remove_next(Some(wanted)) {
            freed_bytes += removed?;
        }
        if self.lock().is_set_aside(wanted) {
            return Err(EngineError::Unavailable {
                what: format!("removing what was let go from `{}`", self.far.location()),
                why: "a removal that has to come first has failed".into(),
                hint: "it is tried again behind the training, and by whoever opens the store next"
                    .into(),
            });
        }
        // Or another thread carried it out.
        Ok(freed_bytes)
    }

    /// Tries the removal whose turn it is, or that has to be done next for `wanted`.
    fn remove_next(&self, wanted: Option<&Removal>) -> Option<Result<u64>> {
        let removal = self.begin_removal(wanted)?;
        let removed = caught("removing a checkpoint", || self.remove(&removal));
        self.change(|queue| queue.end_removal(&removal, removed.is_ok()));
        Some(removed)
    }

    fn begin_removal(&self, wanted: Option<&Removal>) -> Option<Removal> {
        // What is on its way has arrived by then, or was given up.
        let is_blocked = |queue: &mut Queue| queue.is_removal_blocked(wanted);
        let queue = self.changed.wait_while(self.lock(), is_blocked);
        queue.unwrap_or_else(PoisonError::into_inner).begin_removal(wanted)
    }

    fn remove(&self, removal: &Removal) -> Result<u64> {
        if let Some(step) = removal.guarded_step()
            && self.change(|queue| queue.take_unfinished(step))
        {
            self.give_up_uploads(step);
        }
        match removal {
            Removal::Checkpoint(step) => {
                // Whatever stands there: this process puts nothing in its place meanwhile.
                let freed_bytes = self.far.remove_checkpoint(*step, None)?;
                // What is left there is nobody's any more, and goes after the grace period; a
                // manifest that another rank put there since is taken back by that one.
                self.view.note(self.far.as_ref(), *step);
                self.view.forget_file(*step, MANIFEST_FILE);
                Ok(freed_bytes)
            }
            Removal::Attempt(step, attempt) => self.far.remove_checkpoint(*step, Some(*attempt)),
            Removal::Orphan(step, file) => Ok(self.far.remove_orphan(*step, file)?.unwrap_or(0)),
        }
    }

    /// Gives up what this process began to upload of a step that is not wanted any more: nobody
    /// goes on with it, and the parts that arrived take space that no listing shows.
    fn give_up_uploads(&self, step: u64) {
        let is_own = |file: &str| {
            let rank = parse_shard_file(file).map(|(rank, _)| rank);
            self.share.is_none_or(|share| rank == Some(share.rank))
        };
        let given_up = self.far.unfinished_uploads().and_then(|uploads| {
            let of_step = |upload: &&UnfinishedUpload| upload.step == step && is_own(&upload.file);
            uploads
                .iter()
                .filter(of_step)
                .try_for_each(|upload| self.far.abort_upload(upload).map(drop))
        });
        if let Err(error) = given_up {
            tracing::info!(step, %error, "an upload that is not wanted any more may be left");
            self.change(|queue| queue.note_unfinished(step));
        }
    }

    /// What is not in the far store yet.
    pub(super) fn pending(&self) -> Vec<PendingUpload> {
        let pending = self.lock().pending();
        let upload = |(step, passed): (u64, Option<u64>)| {
            let total_bytes = self.bytes_of(step);
            // Footer, header and index count, too, and are read apart.
            let uploaded_bytes = passed.unwrap_or(total_bytes).min(total_bytes);
            PendingUpload { step, uploaded_bytes, total_bytes }
        };
        pending.into_iter().map(upload).collect()
    }

    /// Why the newest step is not in the far store of those that have failed.
    pub(super) fn failed(&self) -> Option<EngineError> {
        let (step, error) = self.lock().failed()?;
        Some(match error {
            EngineError::Unavailable { what, why, hint } => EngineError::Unavailable {
                what: format!("uploading step {step} to `{}`", self.far.location()),
                why: format!("{what}: {why}"),
                hint,
            },
            error => error,
        })
    }

    /// Bytes of the shards that this process brings of a step; 0 where that cannot be read.
    fn bytes_of(&self, step: u64) -> u64 {
        let manifest = self.near.read_manifest(step).ok().flatten();
        let manifest = manifest.and_then(|bytes| Manifest::decode(&bytes).ok());
        let is_own = |manifest: &Manifest, rank| {
            self.share.is_none_or(|share| !share.may_miss(manifest, rank))
        };
        manifest.map_or(0, |manifest| {
            let own = manifest.shards.iter().filter(|shard| is_own(&manifest, shard.rank));
            own.map(|shard| shard.bytes).sum()
        })
    }

    /// Waits, at most so long, until everything is done, or failed once more; true if it is.
    pub(super) fn drain(&self, timeout: Option<Duration>) -> bool {
        let now = self.now();
        self.change(|queue| queue.drain(now));
        let is_under_way = |queue: &mut Queue| !queue.is_drained();
        let mut queue = match timeout {
            None => self.changed.wait_while(self.lock(), is_under_way),
            Some(timeout) => {
                let waited = self.changed.wait_timeout_while(self.lock(), timeout, is_under_way);
                waited
                    .map(|(queue, _)| queue)
                    .map_err(|poisoned| PoisonError::new(poisoned.into_inner().0))
            }
        }
        .unwrap_or_else(PoisonError::into_inner);
        let is_drained = queue.is_drained();
        if is_drained {
            queue.end_drain(self.now());
        }
        drop(queue);
        self.changed.notify_all();
        is_drained
    }

    pub(super) fn stop(&self) {
        self.change(Queue::stop);
    }

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
                Some(pause) => match self.changed.wait_timeout(queue, pause) {
                    Ok((queue, _)) => queue,
                    Err(poisoned) => poisoned.into_inner().0,
                },
                None => self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner),
            };
        }
        false
    }

    fn removes_what_waits(&self) {
        if !self.lock().removes(self.now()) {
            return;
        }
        let _turn = self.removing.lock().unwrap_or_else(PoisonError::into_inner);
        while let Some(removed) = self.remove_next(None) {
            let Err(error) = removed else { continue };
            let left = self.change(|queue| queue.put_removals_off(self.now()));
            tracing::warn!(%error, left, "removing from the far store failed, to be tried again");
            return;
        }
    }

    fn uploads_the_next(&self) {
        let Some((step, turn)) = self.lock().take(self.now()) else { return };
        let outcome = caught(&format!("uploading step {step}"), || self.upload(step, &turn));
        let error = outcome.as_ref().err().map(ToString::to_string);
        let share = self.share.is_some();
        let tries_again = self.change(|queue| queue.book(outcome, share, self.now()));
        let Some(error) = error else { return };
        if turn.is_cancelled() && !self.lock().is_stopped() {
            self.give_up_uploads(step);
        } else {
            tracing::warn!(step, error, tries_again, "an upload failed");
        }
    }

    fn upload(&self, step: u64, turn: &Turn) -> Copied<Transferred> {
        let pacer = Pacer::new(self, turn);
        let (near, far) = (self.near.as_ref(), self.far.as_ref());
        if let Some(share) = self.share {
            return transfer_share(near, far, (step, share), &self.environment, &pacer);
        }
        let transferred = transfer(near, far, step, Overwrite::Yes, &self.environment, &pacer)?;
        self.view.note(near, step);
        Ok(transferred)
    }

    /// Publishes steps of which every rank has brought its shard.
    fn publishes_what_is_whole(&self) {
        let Some(share) = self.share else { return };
        let brought = self.lock().looks(self.now());
        for step in brought {
            // Whoever cancels it waits for this.
            let Some(turn) = self.lock().take_brought(step) else { continue };
            let may_be_ours = self.lock().may_have_published(step);
            let published = caught(&format!("publishing step {step}"), || {
                publish_whole(self.near.as_ref(), self.far.as_ref(), (step, share), may_be_ours)
            });
            if matches!(published, Ok(Brought::All)) && !turn.is_cancelled() {
                self.view.note(self.far.as_ref(), step);
            }
            self.book_whole(step, published);
        }
    }

    /// Notes what came of waiting for the other ranks.
    fn book_whole(&self, step: u64, published: Copied<Brought>) {
        let given_up = self.is_past(step).then(|| self.lacks_others(step));
        self.change(|queue| {
            if matches!(published, Ok(Brought::All) | Err(_)) {
                queue.note_published(step);
            }
            match published {
                Ok(Brought::All) => queue.book_whole(step),
                Ok(Brought::Less) if given_up.is_none() => queue.book_lost(step, self.now()),
                Ok(Brought::Some | Brought::Less) => {
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

    /// Steps that are whole in the far store, ascending.
    pub(super) fn arrived(&self) -> Vec<u64> {
        let mut complete = self.view.committed();
        let queue = self.lock();
        complete.retain(|step| !queue.is_waiting(*step));
        complete
    }

    fn lacks_others(&self, step: u64) -> EngineError {
        EngineError::Closed {
            what: format!(
                "waiting for all ranks to bring step {step} to `{}`",
                self.far.location()
            ),
            why: "this rank's shard is there, and those of others are not yet".into(),
            hint: "the rank that brings the last one publishes it; if a rank was lost, what its \
                   store holds is uploaded when it is opened for writing again; a newer step that \
                   is whole there takes its place"
                .into(),
        }
    }

    /// Sleeps unless, or until, it is time to hurry.
    fn sleep(&self, pause: Duration, hurries: impl Fn(&Queue) -> bool) {
        let calm = |queue: &mut Queue| !queue.is_stopped() && !hurries(queue);
        drop(self.changed.wait_timeout_while(self.lock(), pause, calm));
    }
}

/// A panic is an error like others, which says so.
fn caught<T, E: From<EngineError>>(
    what: &str,
    act: impl FnOnce() -> std::result::Result<T, E>,
) -> std::result::Result<T, E> {
    catch_unwind(AssertUnwindSafe(act)).unwrap_or_else(|_panic| {
        Err(EngineError::internal(what, "the thread that uploads panicked").into())
    })
}

fn warn_of(step: u64, error: &dyn fmt::Display) {
    tracing::warn!(step, %error, "not every rank's shard is in the far store");
}

/// Keeps an upload to its rate, and ends it when it is not wanted any more.
struct Pacer<'a> {
    work: &'a Work,
    turn: &'a Turn,
    /// When what has gone so far is paid for. Time in which nothing went buys nothing.
    due: Mutex<Duration>,
}

impl<'a> Pacer<'a> {
    fn new(work: &'a Work, turn: &'a Turn) -> Self {
        Self { work, turn, due: Mutex::new(work.now()) }
    }
}

impl VerifyObserver for Pacer<'_> {
    fn advanced(&self, stored_bytes: u64) {
        self.turn.pass(stored_bytes);
    }

    #[expect(clippy::cast_precision_loss, reason = "a pause")]
    fn sent(&self, bytes: u64) {
        let Some(rate) = self.work.bytes_per_second else { return };
        let now = self.work.now();
        let mut due = self.due.lock().unwrap_or_else(PoisonError::into_inner);
        *due = (*due).max(now) + Duration::from_secs_f64(bytes as f64 / rate.max(1) as f64);
        let early = due.saturating_sub(now);
        drop(due);
        if !early.is_zero() {
            self.work.sleep(early, |_| self.is_cancelled());
        }
    }

    fn is_cancelled(&self) -> bool {
        self.turn.is_cancelled()
    }
}
