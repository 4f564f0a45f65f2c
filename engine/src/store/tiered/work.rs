//! What the thread that uploads and those who wait for it share.
//!
//! Always holds: every change of the queue wakes those who wait for it; its lock is held for a few
//! assignments, never while a store is asked.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use super::queue::{Queue, UploadState};
use super::remote_view::RemoteView;
use crate::clock::Environment;
use crate::format::manifest::{Manifest, total_bytes};
use crate::recovery::OwnShare;
use crate::store::{PendingUpload, Store, Uploads};
use crate::store_copy::Transferred;
use crate::sync::{Condvar, Mutex, MutexGuard, unpoisoned, wait_while};
use crate::{EngineError, Result};

/// What the uploader and those who wait for it share.
pub(super) struct Work {
    pub(super) local: Arc<dyn Store>,
    pub(super) remote: Arc<dyn Store>,
    pub(super) view: RemoteView,
    pub(super) environment: Arc<dyn Environment>,
    pub(super) bytes_per_second: Option<u64>,
    /// Of a rank with a store of its own.
    pub(super) share: Option<OwnShare>,
    queue: Mutex<Queue>,
    pub(super) changed: Condvar,
    /// Held by the thread that removes from the remote store.
    pub(super) removing: Mutex<()>,
}

/// What [`Work`] is made of.
pub(super) struct WorkParts {
    pub(super) local: Arc<dyn Store>,
    pub(super) remote: Arc<dyn Store>,
    pub(super) view: RemoteView,
    pub(super) environment: Arc<dyn Environment>,
    pub(super) bytes_per_second: Option<u64>,
    pub(super) share: Option<OwnShare>,
    /// Steps that the remote store does not have as they are.
    pub(super) waiting: BTreeSet<u64>,
    /// Steps of which that is not known.
    pub(super) unsure: BTreeSet<u64>,
}

impl Work {
    pub(super) fn new(parts: WorkParts) -> Self {
        let WorkParts {
            local,
            remote,
            view,
            environment,
            bytes_per_second,
            share,
            waiting,
            unsure,
        } = parts;
        Self {
            local,
            remote,
            view,
            environment,
            bytes_per_second,
            share,
            queue: Mutex::new(Queue::new(waiting, unsure)),
            changed: Condvar::new(),
            removing: Mutex::new(()),
        }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Queue> {
        unpoisoned(self.queue.lock())
    }

    /// Changes the queue and wakes those who wait.
    pub(super) fn change<T>(&self, change: impl FnOnce(&mut Queue) -> T) -> T {
        let changed = change(&mut self.lock());
        self.changed.notify_all();
        changed
    }

    pub(super) fn now(&self) -> Duration {
        self.environment.monotonic()
    }

    /// What is known of a step that is to go, in case that it stays.
    pub(super) fn upload_state(&self, step: u64) -> UploadState {
        self.lock().upload_state(step)
    }

    /// The step stays, though it was to go.
    pub(super) fn put_back(&self, step: u64, state: UploadState) {
        self.change(|queue| queue.put_back(step, state));
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
            queue = unpoisoned(self.changed.wait(queue));
        }
        drop(queue);
        self.changed.notify_all();
    }

    pub(super) fn is_waiting(&self, step: u64) -> bool {
        self.lock().is_waiting(step)
    }

    fn not_uploaded(&self, step: u64) -> EngineError {
        EngineError::Closed {
            what: format!("uploading step {step} to `{}`", self.remote.location()),
            why: "it was never committed, or was deleted, or the store closed before".into(),
            hint: "what is committed and left is uploaded when the store is opened for writing \
                   again"
                .into(),
        }
    }

    /// Bytes of the shards that this process uploads of a step; 0 where that cannot be read.
    fn bytes_of(&self, step: u64) -> u64 {
        let manifest = self.local.read_manifest(step).ok().flatten();
        let manifest = manifest.and_then(|bytes| Manifest::decode(&bytes).ok());
        let is_own = |manifest: &Manifest, rank| {
            self.share.is_none_or(|share| !share.may_miss(manifest, rank))
        };
        manifest.map_or(0, |manifest| {
            let own = manifest.shards.iter().filter(|shard| is_own(&manifest, shard.rank));
            total_bytes(own.map(|shard| shard.bytes))
        })
    }

    /// Whether this rank removes for all that share the remote store.
    pub(super) fn removes_for_all(&self) -> bool {
        self.share.is_none_or(|share| share.rank == 0)
    }

    /// Sleeps unless, or until, it is time to hurry.
    pub(super) fn sleep(&self, pause: Duration, hurries: impl Fn(&Queue) -> bool) {
        let calm = |queue: &mut Queue| !queue.is_stopped() && !hurries(queue);
        drop(wait_while(&self.changed, self.lock(), Some(pause), calm));
    }
}

impl Uploads for Work {
    fn add(&self, step: u64) {
        self.change(|queue| queue.add(step));
    }

    fn may_remove(&self, step: u64) -> bool {
        self.lock().may_remove(step)
    }

    fn arrived(&self) -> Vec<u64> {
        let mut complete = self.view.committed();
        let queue = self.lock();
        complete.retain(|step| !queue.is_waiting(*step));
        complete
    }

    fn wait_for(&self, step: u64, timeout: Option<Duration>) -> Option<Result<Transferred>> {
        let pending = |queue: &mut Queue| queue.is_waiting(step) && !queue.is_stopped();
        let queue = wait_while(&self.changed, self.lock(), timeout, pending);
        if queue.is_waiting(step) && !queue.is_stopped() {
            return None;
        }
        Some(queue.outcome(step).unwrap_or_else(|| Err(self.not_uploaded(step))))
    }

    fn pending(&self) -> Vec<PendingUpload> {
        let pending = self.lock().pending();
        let upload = |(step, passed): (u64, Option<u64>)| {
            let total_bytes = self.bytes_of(step);
            // Footer, header and index count, too, and are read apart.
            let uploaded_bytes = passed.unwrap_or(total_bytes).min(total_bytes);
            PendingUpload { step, uploaded_bytes, total_bytes }
        };
        pending.into_iter().map(upload).collect()
    }

    fn failed(&self) -> Option<EngineError> {
        let (step, error) = self.lock().failed()?;
        Some(match error {
            EngineError::Unavailable { what, why, hint } => EngineError::Unavailable {
                what: format!("uploading step {step} to `{}`", self.remote.location()),
                why: format!("{what}: {why}"),
                hint,
            },
            error => error,
        })
    }

    fn drain(&self, timeout: Option<Duration>) -> bool {
        let now = self.now();
        self.change(|queue| queue.drain(now));
        let is_under_way = |queue: &mut Queue| !queue.is_drained();
        let mut queue = wait_while(&self.changed, self.lock(), timeout, is_under_way);
        let is_drained = queue.is_drained();
        if is_drained {
            queue.end_drain(self.now());
        }
        drop(queue);
        self.changed.notify_all();
        is_drained
    }

    fn stop(&self) {
        self.change(Queue::stop);
        self.remote.interrupt();
    }
}
