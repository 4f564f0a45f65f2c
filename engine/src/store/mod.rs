//! Where checkpoints live: a directory now, an S3 prefix or a tier of both by the same trait.
//!
//! Always holds: a checkpoint exists exactly when its manifest does; opening a store deletes
//! nothing; what a listing *means* is decided in [`crate::recovery`], what may be deleted in
//! [`crate::retention`]; a store only lists, reads, writes and deletes what it is told.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use crate::Result;
use crate::format::names::AttemptId;
use crate::io::buffer::Buffer;

pub mod flow;
pub mod local;

use flow::Flow;

/// A place for checkpoints.
pub trait Store: Send + Sync + fmt::Debug {
    /// Where it is, for messages.
    fn location(&self) -> String;

    /// Every step directory with what lies in it, by ascending step. Foreign names are left out.
    fn list(&self) -> Result<Vec<StepListing>>;

    /// The manifest's bytes, or `None` where the step has none. At most `MANIFEST_BYTES_MAX`.
    fn read_manifest(&self, step: u64) -> Result<Option<Vec<u8>>>;

    /// Starts a shard file of an attempt, locked against cleaners for as long as the sink lives.
    /// `reserve_bytes` is the expected length.
    /// `flow` is told of every byte that the device is given and takes.
    fn create_shard(
        &self,
        shard: ShardId,
        reserve_bytes: u64,
        flow: &Arc<Flow>,
    ) -> Result<Box<dyn ShardSink>>;

    /// Opens a shard that a manifest names.
    fn open_shard(&self, shard: ShardId) -> Result<Box<dyn ShardSource>>;

    /// Makes a manifest visible, atomically and durably. `replaces` is the attempt whose manifest
    /// stands there now and goes; `None` if none does. Publishing the same attempt twice succeeds.
    fn publish(&self, publication: Publication<'_>) -> Result<()>;

    /// Deletes a checkpoint: the manifest first, then its directory. Returns the bytes freed.
    fn remove_checkpoint(&self, step: u64) -> Result<u64>;

    /// Deletes one file of a step that no manifest names, if no live attempt holds its lock, and
    /// the step's directory if that leaves it empty. Returns the bytes freed, `None` if it is
    /// locked.
    fn remove_orphan(&self, step: u64, file: &str) -> Result<Option<u64>>;

    /// Free bytes for this user; `None` where the store has no such bound.
    fn free_bytes(&self) -> Result<Option<u64>>;

    /// In a forked child: closes inherited descriptors that keep locks alive. Runs right after the
    /// fork, so it waits for no mutex.
    fn close_after_fork(&self);

    /// The present by the store's own clock, the one that stamps `FileListing::modified`.
    fn now(&self) -> Result<SystemTime>;
}

/// Names a shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ShardId {
    /// The step.
    pub step: u64,
    /// The rank.
    pub rank: u32,
    /// The attempt.
    pub attempt: AttemptId,
}

/// What [`Store::publish`] makes visible.
#[derive(Clone, Copy, Debug)]
pub struct Publication<'a> {
    /// The step.
    pub step: u64,
    /// The attempt that is being committed.
    pub attempt: AttemptId,
    /// The manifest's bytes.
    pub manifest: &'a [u8],
    /// Attempt of the manifest that is replaced.
    pub replaces: Option<AttemptId>,
    /// Shards whose presence and length are checked just before.
    pub shards: &'a [(ShardId, u64)],
}

/// A step directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StepListing {
    /// The step.
    pub step: u64,
    /// Its files, by name.
    pub files: Vec<FileListing>,
}

/// A file in a step directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileListing {
    /// Its name.
    pub name: String,
    /// Its length.
    pub bytes: u64,
    /// When it was last written, by the store's clock.
    pub modified: SystemTime,
}

/// Takes a shard's bytes, any order, and makes them durable.
pub trait ShardSink: Send + fmt::Debug {
    /// Starts writing the first `bytes` of `buffer` (a multiple of 4096) at `offset`. Waits while
    /// too much is in flight. Reports an earlier write's failure; after one, every call fails.
    fn write(&mut self, offset: u64, buffer: Buffer, bytes: usize) -> Result<()>;

    /// Waits for all writes, sets the file's exact length, makes file and directory durable.
    fn finish(&mut self, file_bytes: u64) -> Result<()>;

    /// Gives up: waits for what is in flight, then deletes the file. Failing to delete is logged.
    fn abandon(self: Box<Self>);
}

/// Reads a shard's bytes.
pub trait ShardSource: Send + Sync + fmt::Debug {
    /// Name for messages.
    fn name(&self) -> String;

    /// Length of the file.
    fn file_bytes(&self) -> u64;

    /// Starts reading `bytes` (a multiple of 4096, within the file) at `offset` into the start of
    /// `buffer`; `done` runs on a thread of the store's, once, and must be quick.
    fn read(&self, offset: u64, buffer: Buffer, bytes: usize, done: ReadDone);

    /// The file mapped into memory, private and copy-on-write, where the store can.
    fn map(&self) -> Result<memmap2::MmapMut>;
}

/// Receives the outcome of [`ShardSource::read`].
pub type ReadDone = Box<dyn FnOnce(Result<()>, Buffer) + Send>;

/// How long an unreferenced file must have been left alone before a cleaner may take it.
pub type Grace = Duration;
