//! The save pipeline: from live storages to a committed checkpoint.
//!
//! ```text
//!  caller's thread        worker per core           committer (one thread)
//!  capture ----chunk----> crc32c, encode, ----------> sink.write -> index, footer
//!  (staging arena)        pad, crc32c       encoded   sink.finish -> publish -> handle
//!        ^                     |                          |
//!        +---- buffers come back as chunks are encoded or written ----+
//! ```
//!
//! Always holds:
//! - [`crate::Engine::save`] returns only after every byte was copied: what the caller does to its
//!   storages afterwards cannot change the checkpoint. [`crate::Engine::save_behind`] does so for
//!   the host's memory, and copies a device's behind the caller.
//! - Memory is bounded by the arena and the encode pool; each stage waits only for stages after it,
//!   so nothing deadlocks.
//! - Workers start when the capture is complete, unless the state is larger than the arena: while
//!   the training loop waits, both cores copy.
//! - The handle resolves with success only after the manifest is durable and was read back; any
//!   failure before that abandons the attempt and leaves earlier checkpoints untouched.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::Result;
use crate::format::index::TensorRecord;
use crate::format::layout::ElementType;
use crate::format::tree::Node;

// Planned before the first byte is copied.
pub(crate) mod share;

// The caller's thread.
pub(crate) mod arrivals;
pub(crate) mod capture;

// The workers.
pub(crate) mod adapt;
pub(crate) mod encode;

// The committer.
pub(crate) mod commit;
mod together;
pub(crate) mod write;

// What they share, and what the caller keeps of it.
mod handle;
pub(crate) mod job;

#[cfg(all(test, loom))]
mod models;

pub use crate::progress::{ProgressReading, SaveStats};
pub use arrivals::Gap;
pub use handle::{SaveHandle, SaveInfo};
pub use share::share_of;

/// What to save.
#[derive(Debug)]
pub struct SaveRequest<'a> {
    /// The training step.
    pub step: u64,
    /// Allows a step at or below the newest committed one; later checkpoints are retired.
    pub rewind: bool,
    /// The state tree, in preorder.
    pub nodes: Vec<Node>,
    /// Views of `storages`, whose order `TensorRecord::storage` refers to.
    pub tensors: Vec<TensorRecord>,
    /// The memory to save, each storage once.
    pub storages: Vec<StorageInput<'a>>,
    /// Topmost nodes, ascending, of replicated entries, the same on every rank: each writes a part
    /// of their bytes ([`share_of`]), and any number of ranks can load them.
    pub replicated: Vec<u32>,
    /// How long the caller waited for the save before, before it made this request.
    pub waited: Duration,
    /// What making this request took the caller, flattening and copies from a device included: the
    /// training loop lost it too.
    pub prepared: Duration,
    /// Attached to the manifest.
    pub metadata: BTreeMap<String, serde_json::Value>,
    /// Positions of datasets, attached to the manifest.
    pub dataset_positions: BTreeMap<String, serde_json::Value>,
}

/// One storage to save.
#[derive(Clone, Copy)]
pub struct StorageInput<'a> {
    /// Its length.
    pub bytes: u64,
    /// What its bytes are.
    pub element: ElementType,
    /// Where they come from.
    pub source: &'a dyn StorageSource,
}

impl fmt::Debug for StorageInput<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("StorageInput")
            .field("bytes", &self.bytes)
            .field("element", &self.element)
            .finish_non_exhaustive()
    }
}

/// Gives the bytes of one storage. Called from several threads at once, only while
/// [`crate::Engine::save`] runs.
pub trait StorageSource: Sync {
    /// Fills `destination` from `offset` bytes into the storage.
    fn read(&self, offset: u64, destination: &mut [u8]) -> Result<()>;

    /// Where the storage is in the memory of a device: what copies out of it, in the place of
    /// [`StorageSource::read`].
    fn device(&self) -> Option<Arc<dyn DeviceSource>> {
        None
    }
}

/// Memory of a device, whose bytes arrive some time after they were asked for.
pub trait DeviceSource: fmt::Debug + Send + Sync {
    /// Begins to fill `gap` from `offset` bytes into the storage, and returns. The bytes are those
    /// of the moment that the device was told of by the caller; copies of one device are made in
    /// the order in which they were begun.
    fn begin(&self, offset: u64, gap: Gap);

    /// Sees to it that what was begun on the same device arrives without waiting for more.
    fn flush(&self);

    /// The device's number: sources of one device share a queue of copies.
    fn ordinal(&self) -> u32;
}

/// Memory that is at hand already.
impl StorageSource for [u8] {
    fn read(&self, offset: u64, destination: &mut [u8]) -> Result<()> {
        let bytes = usize::try_from(offset)
            .ok()
            .and_then(|start| self.get(start..)?.get(..destination.len()))
            .ok_or_else(|| {
                crate::EngineError::internal(
                    format!("capturing {} bytes at offset {offset}", destination.len()),
                    format!("the storage has {} bytes", self.len()),
                )
            })?;
        crate::memcpy::copy(bytes, destination);
        Ok(())
    }
}

impl StorageSource for Vec<u8> {
    fn read(&self, offset: u64, destination: &mut [u8]) -> Result<()> {
        self.as_slice().read(offset, destination)
    }
}
