//! What a caller holds while its save goes on.
//!
//! Always holds: the outcome is set exactly once; it never changes; every reader gets it; an error
//! counts as seen once any reader took it.

use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;

use super::job::Job;
use crate::progress::{ProgressReading, SaveStats};
use crate::sync::atomic::{AtomicBool, Ordering};
use crate::sync::{Condvar, Mutex, MutexGuard, unpoisoned, wait_while};
use crate::{EngineError, Result};

/// A save in flight, or ended.
#[derive(Clone, Debug)]
pub struct SaveHandle {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    job: Arc<Job>,
    outcome: Mutex<Option<Result<SaveInfo>>>,
    ended: Condvar,
    error_seen: AtomicBool,
}

/// A durable, complete, published checkpoint.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct SaveInfo {
    /// Its step.
    pub step: u64,
    /// The attempt that wrote it, as hex.
    pub attempt: String,
    /// The store.
    pub location: String,
    /// Bytes of the raw layout.
    pub raw_bytes: u64,
    /// Bytes of the shard file.
    pub stored_bytes: u64,
    /// Steps that retention, or a rewind, removed after the commit. The space that they took in a
    /// directory is freed soon after, and before the next shard is written.
    pub removed_steps: Vec<u64>,
    /// Where the time went.
    pub stats: SaveStats,
}

impl SaveHandle {
    pub(crate) fn new(job: Arc<Job>) -> Self {
        let shared = Shared {
            job,
            outcome: Mutex::new(None),
            ended: Condvar::new(),
            error_seen: AtomicBool::new(false),
        };
        Self { shared: Arc::new(shared) }
    }

    /// The step being saved.
    pub fn step(&self) -> u64 {
        self.shared.job.step
    }

    /// Whether the save has ended, well or not.
    pub fn is_done(&self) -> bool {
        self.lock().is_some()
    }

    /// Waits for the end, at most `timeout`; true if it has come.
    pub fn wait(&self, timeout: Option<Duration>) -> bool {
        let guard = self.lock();
        let ended = &self.shared.ended;
        wait_while(ended, guard, timeout, |outcome| outcome.is_none()).is_some()
    }

    /// Waits, at most `timeout`, until every copy from a device was begun: what the device is told
    /// to do from then on can be told to wait for them. True if so.
    pub fn wait_begun(&self, timeout: Option<Duration>) -> bool {
        self.shared.job.arrivals.wait_begun(timeout)
    }

    /// Waits, at most `timeout`, until nobody reads the storages any more, whether the save has
    /// failed or not. True if so.
    pub fn wait_captured(&self, timeout: Option<Duration>) -> bool {
        self.shared.job.arrivals.wait_landed(timeout)
    }

    /// Whether it has ended, and not well. The error does not count as seen by that.
    pub fn has_failed(&self) -> bool {
        self.lock().as_ref().is_some_and(Result::is_err)
    }

    /// The outcome, or `None` if it has not come within `timeout`. An error counts as seen.
    pub fn result(&self, timeout: Option<Duration>) -> Option<Result<SaveInfo>> {
        self.wait(timeout);
        match self.lock().as_ref()? {
            Ok(info) => Some(Ok(info.clone())),
            Err(error) => {
                self.shared.error_seen.store(true, Ordering::Relaxed);
                Some(Err(error.duplicate()))
            }
        }
    }

    /// How far it is.
    pub fn progress(&self) -> ProgressReading {
        self.shared.job.progress.read()
    }

    /// Where the time went, so far.
    pub fn stats(&self) -> SaveStats {
        match self.lock().as_ref() {
            Some(Ok(info)) => info.stats.clone(),
            _ => self.shared.job.stats(),
        }
    }

    /// Gives the save up unless it is past its point of no return, the manifest. The handle then
    /// ends with [`EngineError::Closed`] that says `why`.
    pub fn cancel(&self, why: &str) {
        self.shared.job.fail(EngineError::Closed {
            what: format!("saving step {}", self.step()),
            why: why.into(),
            hint: "earlier checkpoints are untouched; save again when possible".into(),
        });
    }

    /// [`SaveHandle::cancel`], by a caller who has no use for the outcome: an error counts as seen,
    /// whenever it comes.
    pub fn abandon(&self, why: &str) {
        self.shared.error_seen.store(true, Ordering::Relaxed);
        self.cancel(why);
    }

    /// The error, if there is one that nobody has seen; it counts as seen from now on.
    pub(crate) fn take_unseen_error(&self) -> Option<EngineError> {
        match self.lock().as_ref() {
            Some(Err(error)) if !self.shared.error_seen.swap(true, Ordering::Relaxed) => {
                Some(error.duplicate())
            }
            _ => None,
        }
    }

    pub(crate) fn resolve(&self, result: Result<SaveInfo>) {
        let mut outcome = self.lock();
        assert!(outcome.is_none(), "a save ends once");
        *outcome = Some(result);
        self.shared.ended.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, Option<Result<SaveInfo>>> {
        unpoisoned(self.shared.outcome.lock())
    }
}
