//! The load pipeline: from a committed checkpoint to memory.
//!
//! ```text
//! manifest -> footer -> header, index      each checked by the digest that its parent holds,
//!                          |               of this rank's shard, and of those that hold parts of
//!                          |               the replicated storages
//!   reads in flight at device depth
//!     -> workers: stored crc32c -> decode -> raw crc32c -> memory
//! ```
//!
//! Always holds: memory is `Ok` only if every chunk that touches it matched both its checksums; a
//! length read from the medium is bounded by the file before memory is allocated for it; only the
//! chunks that a request touches are read.

use std::sync::{Arc, OnceLock};

use crossbeam_channel::Receiver;

use crate::Result;
use crate::error::EngineError;
use crate::format::FormatError;
use crate::format::index::{ShardIndex, StorageRecord};
use crate::format::manifest::Manifest;
use crate::format::shard::Header;
use crate::io::buffer::{Buffer, BufferPool};
use crate::store::{ShardSource, Store};

// What a checkpoint is made of, checked from the manifest down.
mod control;
mod parts;
mod shard;

// Chunks to memory.
mod deliver;
mod device;
mod map;
mod plan;
mod read;

// Damage: another way to the bytes, and a report of all of it.
mod second;
mod verify;

pub use device::{Departure, DeviceDestination, DeviceTarget};
pub use map::MappedShard;
use parts::Parts;
pub(crate) use parts::check_replicas;
pub use read::{ReadOptions, ReadStats, Target};
pub(crate) use shard::{Extent, OnDamage, Shard};
pub use verify::{Damage, VerifyObserver, VerifyReport};

pub(crate) use verify::verify_step;

/// A committed checkpoint as one rank saved it: its own shard, and the parts of replicated entries
/// in the others'. Manifest and indexes were read and checked.
#[derive(Debug)]
pub struct Checkpoint {
    /// Shared by all that are opened of one checkpoint: it names every rank's shard.
    manifest: Arc<Manifest>,
    own: Shard,
    parts: Parts,
    scope: ShardScope,
    /// Threads that decode, unless a read asks for another number.
    workers: usize,
    /// Where chunks for devices are decoded, made when the first is.
    staging: OnceLock<Arc<BufferPool>>,
}

/// What of a shard its reader may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ShardScope {
    /// All, with the parts in other shards: it is the reader's own, or its rank was named.
    All,
    /// The replicated entries: another number of ranks saved it, and the rest means nothing to
    /// the reader.
    ReplicatedOnly,
    /// What is whole in it: its rank was named, and no other shard is opened for it.
    ShardOnly,
}

impl Checkpoint {
    /// Opens the shard of `rank` that `manifest` names, and those that hold the rest of what its
    /// index says. What is read of it is decoded by so many `workers`.
    pub(crate) fn open(
        store: &dyn Store,
        manifest: Arc<Manifest>,
        (rank, scope): (u32, ShardScope),
        workers: usize,
    ) -> Result<Self> {
        let own = Shard::open(store, &manifest, rank, OnDamage::ReadCopy)?;
        let parts = match scope {
            ShardScope::ShardOnly => Parts::default(),
            ShardScope::All | ShardScope::ReplicatedOnly => Parts::open(store, &manifest, &own)?,
        };
        Ok(Self { manifest, own, parts, scope, workers, staging: OnceLock::new() })
    }

    /// The training step.
    pub fn step(&self) -> u64 {
        self.manifest.step
    }

    /// The checkpoint's manifest.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The same, for others of the checkpoint.
    pub(crate) fn shared_manifest(&self) -> Arc<Manifest> {
        Arc::clone(&self.manifest)
    }

    /// The header of the rank's shard.
    pub fn header(&self) -> &Header {
        &self.own.header
    }

    /// The index of the rank's shard, which holds only a part of each replicated storage:
    /// [`Checkpoint::storages`] gives all parts.
    pub fn index(&self) -> &ShardIndex {
        &self.own.index
    }

    /// The storages that the index's tensors view, by ascending raw offset, each whole: where they
    /// would be in a raw layout that holds all of them. Without replicated ones, that is the
    /// shard's own.
    pub fn storages(&self) -> &[StorageRecord] {
        self.parts.storages(&self.own)
    }

    /// Bytes of that raw layout.
    pub fn raw_bytes(&self) -> u64 {
        self.storages().last().map_or(0, StorageRecord::raw_end)
    }

    /// Raw bytes that the rank's shard holds: what a save of the same state stages.
    pub fn held_bytes(&self) -> u64 {
        self.own.index.raw_bytes()
    }

    /// Whether only [replicated](ShardIndex::replicated) entries may be loaded, since another
    /// number of ranks saved the checkpoint: the rest of this shard is some other rank's state.
    pub fn is_replicated_only(&self) -> bool {
        self.scope == ShardScope::ReplicatedOnly
    }

    /// The shard's name, for messages.
    pub fn shard_name(&self) -> String {
        self.own.name()
    }

    /// Length of the shard.
    pub fn file_bytes(&self) -> u64 {
        self.own.file_bytes()
    }
}

pub(crate) fn read_manifest(store: &dyn Store, step: u64) -> Result<Manifest> {
    let what = format!("opening step {step} in `{}`", store.location());
    Ok(read_manifest_for(store, step, &what)?.0)
}

/// The manifest of a step, checked, and its bytes as they are; `what` it is read for is for
/// messages.
pub(crate) fn read_manifest_for(
    store: &dyn Store,
    step: u64,
    what: &str,
) -> Result<(Manifest, Vec<u8>)> {
    let file = format!("{}, manifest of step {step}", store.location());
    let bytes = store.read_manifest(step)?.ok_or_else(|| EngineError::NotFound {
        what: what.into(),
        why: "there is no committed checkpoint of this step".into(),
        hint: "`all_steps()` or `ckpt-tool ls` lists those that exist".into(),
    })?;
    let manifest = Manifest::decode(&bytes).map_err(|error| from_format(&file, error))?;
    if manifest.step == step {
        Ok((manifest, bytes))
    } else {
        Err(EngineError::corrupt(file, format!("it is the manifest of step {}", manifest.step)))
    }
}

/// Starts reading whole blocks; the outcome comes with the buffer.
fn start_reading(
    source: &dyn ShardSource,
    offset: u64,
    buffer: Buffer,
    bytes: usize,
) -> Receiver<(Result<()>, Buffer)> {
    let (sender, receiver) = crossbeam_channel::bounded(1);
    let done = Box::new(move |outcome, buffer| {
        // A receiver that is gone wants it no more.
        let _gone = sender.send((outcome, buffer));
    });
    source.read(offset, buffer, bytes, done);
    receiver
}

/// Reads whole blocks into a buffer and waits for them; the buffer comes back either way.
fn read_now(
    source: &dyn ShardSource,
    offset: u64,
    buffer: Buffer,
    bytes: usize,
) -> Result<(Result<()>, Buffer)> {
    start_reading(source, offset, buffer, bytes).recv().map_err(|_| {
        EngineError::internal(format!("reading `{}`", source.name()), "the store dropped a read")
    })
}

/// Gives a format error the name of the file that it was found in.
pub(crate) fn from_format(file: &str, error: FormatError) -> EngineError {
    match error {
        FormatError::Damaged(why) => EngineError::corrupt(file, why),
        FormatError::Newer(why) => EngineError::UnsupportedFormat {
            what: format!("reading `{file}`"),
            why,
            hint: "upgrade dtruntime to the version that wrote this checkpoint".into(),
        },
    }
}
