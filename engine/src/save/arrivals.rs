//! Chunks whose bytes are on their way from a device.
//!
//! ```text
//! capture: begin, begin, begin ... ──► all begun      the training can be told to wait for them
//! device:        landed, landed ...  ──► all landed    nobody reads the tensors any more
//! ```
//!
//! Always holds: a chunk goes to the workers only if every gap in it was filled, or the save has
//! failed; a caller of [`Arrivals::wait_landed`] knows that no copy is under way.

use std::sync::Arc;
use std::time::Duration;

use crossbeam_channel::Sender;

use super::encode::EncodeTask;
use super::job::Job;
use crate::EngineError;
use crate::io::lent::Part;
use crate::sync::{Condvar, Mutex, MutexGuard, unpoisoned, wait_while};

/// How far the copies of one save are.
#[derive(Debug)]
pub(crate) struct Arrivals {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// Nothing will be begun any more.
    all_begun: bool,
    /// Chunks begun and not landed.
    on_their_way: usize,
}

impl Arrivals {
    pub(crate) fn new() -> Self {
        Self { state: Mutex::new(State::default()), changed: Condvar::new() }
    }

    pub(crate) fn chunk_begins(&self) {
        self.lock().on_their_way += 1;
    }

    fn chunk_lands(&self) {
        self.lock().on_their_way -= 1;
        self.changed.notify_all();
    }

    pub(crate) fn all_begun(&self) {
        self.lock().all_begun = true;
        self.changed.notify_all();
    }

    /// Waits, at most `timeout`, until every copy was begun; true if so.
    pub(crate) fn wait_begun(&self, timeout: Option<Duration>) -> bool {
        self.wait(timeout, |state| state.all_begun)
    }

    /// Waits, at most `timeout`, until every copy was begun and is over; true if so.
    pub(crate) fn wait_landed(&self, timeout: Option<Duration>) -> bool {
        self.wait(timeout, |state| state.all_begun && state.on_their_way == 0)
    }

    fn wait(&self, timeout: Option<Duration>, holds: impl Fn(&State) -> bool) -> bool {
        holds(&wait_while(&self.changed, self.lock(), timeout, |state| !holds(state)))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        unpoisoned(self.state.lock())
    }
}

/// A part of a chunk that a device fills.
#[derive(Debug)]
pub struct Gap {
    part: Part,
    job: Arc<Job>,
    is_told: bool,
}

impl Gap {
    pub(crate) fn new(part: Part, job: &Arc<Job>) -> Self {
        Self { part, job: Arc::clone(job), is_told: false }
    }

    /// The memory to fill, all of it. It is in one buffer of the staging arena.
    pub fn memory(&mut self) -> &mut [u8] {
        self.part.memory()
    }

    /// How many bytes it has.
    pub fn len(&self) -> usize {
        self.part.len()
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.part.is_empty()
    }

    /// The first `bytes` of it, and the rest: what two copies fill.
    ///
    /// # Panics
    ///
    /// Where it has fewer.
    #[must_use]
    pub fn split_at(mut self, bytes: usize) -> (Self, Self) {
        self.is_told = true;
        let job = Arc::clone(&self.job);
        let rest = std::mem::replace(&mut self.part, Part::none());
        let (first, second) = rest.split_at(bytes);
        (Self::new(first, &job), Self::new(second, &job))
    }

    /// It holds the device's bytes, or will never: the save fails then.
    pub fn filled(mut self, outcome: crate::Result<()>) {
        self.is_told = true;
        if let Err(error) = outcome {
            self.job.fail(error);
        }
    }
}

impl Drop for Gap {
    fn drop(&mut self) {
        if !self.is_told {
            let why = "a copy from the device was dropped without a result";
            self.job.fail(EngineError::internal("capturing a storage", why));
        }
    }
}

/// What becomes of a chunk when all its gaps are closed.
pub(crate) fn hand_on(task: EncodeTask, workers: &Sender<EncodeTask>) {
    let job = Arc::clone(&task.job);
    if job.has_failed() {
        // Its buffer is back before anybody is notified.
        drop(task);
    } else {
        job.progress.add_captured(job.layout.chunk_raw_bytes(task.index) as u64);
        // Workers that have ended want nothing any more: the engine is closed.
        let _closed = workers.send(task);
    }
    job.arrivals.chunk_lands();
}
