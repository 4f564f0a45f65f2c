//! Writes of one shard that are on their way, and the first failure.
//!
//! Always holds: no more is in flight than was allowed, but for a single write; after a failure
//! nothing more is started.

use std::sync::Arc;

use crate::store::flow::Flow;
use crate::sync::{Condvar, Mutex, MutexGuard, unpoisoned, wait_while};
use crate::{EngineError, Result};

/// Counts a shard's writes. Shared by the sink, the threads that writes end on, and the early sync.
#[derive(Debug)]
pub(super) struct Flight {
    bytes_max: u64,
    flow: Arc<Flow>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    bytes: u64,
    /// Landed since it was last asked for.
    landed_bytes: u64,
    /// Nothing more will be written.
    ended: bool,
    failure: Option<EngineError>,
}

impl Flight {
    /// With at most `bytes_max` bytes on their way.
    pub(super) fn new(bytes_max: u64, flow: Arc<Flow>) -> Self {
        Self { bytes_max, flow, state: Mutex::default(), changed: Condvar::new() }
    }

    /// Most bytes that are on their way at a time.
    pub(super) fn bytes_max(&self) -> u64 {
        self.bytes_max
    }

    /// What counts every byte.
    pub(super) fn flow(&self) -> &Flow {
        &self.flow
    }

    /// Waits until `bytes` more may be on their way. One write always may.
    pub(super) fn start(&self, bytes: u64) -> Result<()> {
        let full = |state: &mut State| {
            state.failure.is_none()
                && state.bytes > 0
                && state.bytes.saturating_add(bytes) > self.bytes_max
        };
        let mut state = self.wait_while(full);
        if let Some(failure) = &state.failure {
            return Err(failure.duplicate());
        }
        state.bytes += bytes;
        self.flow.accept(bytes);
        Ok(())
    }

    /// A write of `bytes` has ended.
    pub(super) fn land(&self, bytes: u64, outcome: Result<()>) {
        let mut state = self.lock();
        state.bytes -= bytes;
        state.landed_bytes += bytes;
        self.flow.land(bytes);
        if let Err(error) = outcome {
            state.failure.get_or_insert(error);
        }
        drop(state);
        self.changed.notify_all();
    }

    /// Keeps `error`, unless something failed before.
    pub(super) fn fail(&self, error: EngineError) {
        self.lock().failure.get_or_insert(error);
        self.changed.notify_all();
    }

    /// The first failure, if there was one.
    pub(super) fn check(&self) -> Result<()> {
        match &self.lock().failure {
            Some(failure) => Err(failure.duplicate()),
            None => Ok(()),
        }
    }

    /// Waits until nothing is on its way.
    pub(super) fn wait_until_landed(&self) {
        drop(self.wait_while(|state| state.bytes > 0));
    }

    /// Nothing more will be written.
    pub(super) fn end(&self) {
        self.lock().ended = true;
        self.changed.notify_all();
    }

    /// Waits until the training waits for nothing any more and `bytes` have landed since the last
    /// call; false where that will not be, or is not worth waiting for: writing has ended, or
    /// failed.
    pub(super) fn wait_for_landed(&self, bytes: u64) -> bool {
        let going_on = |state: &State| !state.ended && state.failure.is_none();
        let is_due = |state: &State| state.landed_bytes >= bytes && self.flow.is_captured();
        let mut state = self.wait_while(|state| going_on(state) && !is_due(state));
        state.landed_bytes = 0;
        going_on(&state)
    }

    fn wait_while(&self, condition: impl FnMut(&mut State) -> bool) -> MutexGuard<'_, State> {
        wait_while(&self.changed, self.lock(), None, condition)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        unpoisoned(self.state.lock())
    }
}
