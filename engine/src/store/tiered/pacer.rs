//! The rate that an upload is kept to.
//!
//! Always holds: what has gone is paid for, at the rate, before more goes; time in which nothing
//! went buys nothing. An upload that is not wanted any more waits for nothing.

use std::sync::Mutex;
use std::time::Duration;

use super::queue::UploadTask;
use super::work::Work;
use crate::load::VerifyObserver;
use crate::sync::unpoisoned;

/// Keeps an upload to its rate, and ends it when it is not wanted any more.
pub(super) struct Pacer<'a> {
    work: &'a Work,
    task: &'a UploadTask,
    /// When what has gone so far is paid for.
    due: Mutex<Duration>,
}

impl<'a> Pacer<'a> {
    pub(super) fn new(work: &'a Work, task: &'a UploadTask) -> Self {
        Self { work, task, due: Mutex::new(work.now()) }
    }
}

impl VerifyObserver for Pacer<'_> {
    fn advanced(&self, stored_bytes: u64) {
        self.task.pass(stored_bytes);
    }

    #[expect(clippy::cast_precision_loss, reason = "a pause")]
    fn sent(&self, bytes: u64) {
        let Some(rate) = self.work.bytes_per_second else { return };
        let now = self.work.now();
        let mut due = unpoisoned(self.due.lock());
        *due = (*due).max(now) + Duration::from_secs_f64(bytes as f64 / rate.max(1) as f64);
        let early = due.saturating_sub(now);
        drop(due);
        if !early.is_zero() {
            self.work.sleep(early, |_| self.is_cancelled());
        }
    }

    fn is_cancelled(&self) -> bool {
        self.task.is_cancelled()
    }
}
