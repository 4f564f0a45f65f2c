//! Chunks on their way to the memory of a device.
//!
//! ```text
//! worker: check, decode into a staging buffer ──► departures, one a piece ──► the device's memory
//!                                                       └── buffer: free when all of it are gone
//! ```
//!
//! Always holds: what leaves was checked before; a read returns only when nothing is on its way any
//! more, whether it failed or not.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use crate::io::buffer::Buffer;
use crate::io::pin::Pin;
use crate::sync::{Condvar, Mutex, MutexGuard, unpoisoned, wait_while};
use crate::{EngineError, Result};

/// Memory of a device that parts of storages are read into.
pub trait DeviceDestination: fmt::Debug + Sync {
    /// Begins to copy the departure's bytes to `at` bytes into the memory, and returns. Copies of
    /// one device are made in the order in which they were begun.
    fn begin(&self, at: u64, departure: Departure);

    /// Sees to it that what was begun on the same device leaves without waiting for more.
    fn flush(&self);

    /// The device's number: memory of one device shares a queue of copies.
    fn ordinal(&self) -> u32;

    /// What registers staging memory with the device's driver.
    fn pin(&self) -> &dyn Pin;
}

/// Memory of a device that a part of a storage is read into.
#[derive(Clone, Copy, Debug)]
pub struct DeviceTarget<'a> {
    /// Index into [`Checkpoint::storages`](super::Checkpoint::storages).
    pub storage: u32,
    /// Bytes from the storage's start.
    pub offset: u64,
    /// How many bytes are read.
    pub bytes: usize,
    /// Whose memory they are copied to.
    pub memory: &'a dyn DeviceDestination,
    /// Where in it they begin.
    pub at: u64,
}

/// Where bytes of a chunk go.
#[derive(Debug)]
pub(super) enum Destination<'a> {
    Host(&'a mut [u8]),
    Device { memory: &'a dyn DeviceDestination, at: u64, bytes: usize },
}

impl Destination<'_> {
    pub(super) fn len(&self) -> usize {
        match self {
            Self::Host(memory) => memory.len(),
            Self::Device { bytes, .. } => *bytes,
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub(super) fn is_device(&self) -> bool {
        matches!(self, Self::Device { .. })
    }

    /// The first `count` bytes of it, and the rest.
    pub(super) fn split_at(self, count: usize) -> (Self, Self) {
        match self {
            Self::Host(memory) => {
                let (first, rest) = memory.split_at_mut(count);
                (Self::Host(first), Self::Host(rest))
            }
            Self::Device { memory, at, bytes } => {
                assert!(count <= bytes, "{count} of {bytes} bytes");
                let rest = Self::Device { memory, at: at + count as u64, bytes: bytes - count };
                (Self::Device { memory, at, bytes: count }, rest)
            }
        }
    }
}

/// Bytes on their way to a device.
#[derive(Debug)]
pub struct Departure {
    buffer: Arc<Buffer>,
    range: Range<usize>,
    under_way: Arc<UnderWay>,
    is_told: bool,
}

impl Departure {
    /// Bytes `range` of `buffer`.
    pub(super) fn new(
        buffer: &Arc<Buffer>,
        range: Range<usize>,
        under_way: &Arc<UnderWay>,
    ) -> Self {
        under_way.lock().count += 1;
        Self { buffer: Arc::clone(buffer), range, under_way: Arc::clone(under_way), is_told: false }
    }

    /// The bytes to copy, all of them.
    pub fn memory(&self) -> &[u8] {
        &self.buffer[self.range.clone()]
    }

    /// The first `bytes` of them, and the rest: what two copies bring.
    ///
    /// # Panics
    ///
    /// Where there are fewer.
    #[must_use]
    pub fn split_at(mut self, bytes: usize) -> (Self, Self) {
        assert!(bytes <= self.range.len(), "{bytes} of {} bytes", self.range.len());
        let middle = self.range.start + bytes;
        let rest = Self::new(&self.buffer, middle..self.range.end, &self.under_way);
        self.range.end = middle;
        (self, rest)
    }

    /// They have arrived, or never will: the read fails then.
    pub fn arrived(mut self, outcome: Result<()>) {
        self.is_told = true;
        if let Err(error) = outcome {
            self.under_way.lock().failure.get_or_insert(error);
        }
    }
}

impl Drop for Departure {
    fn drop(&mut self) {
        let mut state = self.under_way.lock();
        if !self.is_told {
            let why = "a copy to the device was dropped without a result";
            let error = EngineError::internal("reading a checkpoint", why);
            state.failure.get_or_insert(error);
        }
        state.count -= 1;
        drop(state);
        self.under_way.changed.notify_all();
    }
}

/// What has not arrived yet, of one read.
#[derive(Debug, Default)]
pub(super) struct UnderWay {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    count: usize,
    failure: Option<EngineError>,
}

impl UnderWay {
    /// Waits until nothing is under way; the first failure.
    pub(super) fn wait(&self) -> Result<()> {
        let mut state = wait_while(&self.changed, self.lock(), None, |state| state.count > 0);
        state.failure.take().map_or(Ok(()), Err)
    }

    pub(super) fn has_failed(&self) -> bool {
        self.lock().failure.is_some()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        unpoisoned(self.state.lock())
    }
}
