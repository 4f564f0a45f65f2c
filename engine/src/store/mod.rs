//! Where checkpoints live: a directory or an S3 prefix, by the same trait.
//!
//! Always holds: a checkpoint exists exactly when its manifest does; opening a store deletes
//! nothing; what a listing *means* is decided in [`crate::recovery`], what may be deleted in
//! `retention`; a store only lists, reads, writes and deletes what it is told.

use std::fmt;
use std::sync::Arc;
use std::time::SystemTime;

use crate::format::names::AttemptId;
use crate::io::buffer::Buffer;
use crate::{EngineError, Result};

pub(crate) mod flow;
pub(crate) mod local;
mod publication;
#[cfg(feature = "s3")]
pub(crate) mod s3;
pub(crate) mod tiered;
mod uploads;

use flow::Flow;
pub use uploads::PendingUpload;
pub(crate) use uploads::Uploads;

/// A place for checkpoints.
pub(crate) trait Store: Send + Sync + fmt::Debug {
    /// Where it is, for messages.
    fn location(&self) -> String;

    /// Every step directory with what is in it, by ascending step. Foreign names are left out.
    fn list(&self) -> Result<Vec<StepListing>>;

    /// The same of one step; `None` if nothing of it exists.
    fn list_step(&self, step: u64) -> Result<Option<StepListing>> {
        Ok(self.list()?.into_iter().find(|listing| listing.step == step))
    }

    /// The manifest's bytes, or `None` where the step has none. At most `MANIFEST_BYTES_MAX`.
    fn read_manifest(&self, step: u64) -> Result<Option<Vec<u8>>>;

    /// The manifest that [`Store::publish`] would replace: of a store with a remote copy, the local
    /// one. Never waits for a network that publishing does not need.
    fn read_local_manifest(&self, step: u64) -> Result<Option<Vec<u8>>> {
        self.read_manifest(step)
    }

    /// The manifests of several steps, in their order; as [`Store::read_manifest`] gives each.
    fn read_manifests(&self, steps: &[u64]) -> Vec<Result<Option<Vec<u8>>>> {
        steps.iter().map(|step| self.read_manifest(*step)).collect()
    }

    /// Starts a shard file of an attempt, safe from cleaners for as long as the sink lives.
    /// `flow` counts every byte that the device is given and takes.
    fn create_shard(
        &self,
        shard: ShardId,
        size: ShardSize,
        flow: &Arc<Flow>,
    ) -> Result<Box<dyn ShardSink>>;

    /// The same for a shard that an earlier process may have begun to write, with the same bytes:
    /// what it transferred is not sent again where the store can recognise it, and is kept for the
    /// next try if this one fails too.
    fn resume_shard(
        &self,
        shard: ShardId,
        size: ShardSize,
        flow: &Arc<Flow>,
    ) -> Result<Box<dyn ShardSink>> {
        self.create_shard(shard, size, flow)
    }

    /// Whether a shard that is here whole, of a copy that never came about, is as good as one
    /// that was just uploaded: durable, and checked when it came.
    fn keeps_what_arrived(&self) -> bool {
        false
    }

    /// Opens a shard that a manifest names.
    fn open_shard(&self, shard: ShardId) -> Result<Box<dyn ShardSource>>;

    /// Makes a manifest visible, atomically and durably. `replaces` is the attempt whose manifest
    /// stands there now and goes; `None` if none does. Publishing the same attempt twice succeeds.
    fn publish(&self, publication: Publication<'_>) -> Result<()>;

    /// Takes back a manifest of this attempt, if it stands there: the ranks, each with a store of
    /// its own, did not all publish it, or its shards are going. Puts the manifest back that it
    /// replaced. Shards stay.
    fn unpublish(&self, step: u64, attempt: AttemptId, replaced: Option<&[u8]>) -> Result<()>;

    /// Deletes a checkpoint: the manifest first, then its directory. With `only`, the checkpoint of
    /// another attempt stays: it was saved after the caller had looked. Returns the bytes freed, or
    /// that will be.
    fn remove_checkpoint(&self, step: u64, only: Option<AttemptId>, space: Space) -> Result<u64>;

    /// Deletes one file of a step that no manifest names, if no live attempt holds its lock, and
    /// the step's directory if that leaves it empty. Returns the bytes freed, or that will be;
    /// `None` if it is locked.
    fn remove_orphan(&self, step: u64, file: &str, space: Space) -> Result<Option<u64>>;

    /// Frees the space of what was removed for [`Space::Later`], and returns when that is
    /// done: a filesystem may take seconds for it.
    fn reclaim(&self) {}

    /// Uploads that were begun, never finished and never given up, by whichever process: the parts
    /// that arrived take space though no listing shows them. Of one step, or of all. Only where a
    /// store has such.
    fn unfinished_uploads(&self, _step: Option<u64>) -> Result<Vec<UnfinishedUpload>> {
        Ok(Vec::new())
    }

    /// Gives up an upload that [`Store::unfinished_uploads`] listed, unless this process is at it:
    /// false then.
    fn abort_upload(&self, upload: &UnfinishedUpload) -> Result<bool> {
        Err(EngineError::internal(
            format!("giving up the upload of `{}` of step {}", upload.file, upload.step),
            "this store has no uploads",
        ))
    }

    /// What uploads checkpoints from here to a remote store; `None` where nothing does.
    fn uploads(&self) -> Option<&dyn Uploads> {
        None
    }

    /// Free bytes for this user; `None` where the store has no such bound.
    fn free_bytes(&self) -> Result<Option<u64>>;

    /// In a forked child: closes inherited descriptors that keep locks alive. Runs right after the
    /// fork, so it waits for no mutex.
    fn close_after_fork(&self);

    /// Ends what waits for a network, now and from now on, with an error: the process is about to
    /// end, and the next one goes on.
    fn interrupt(&self) {}

    /// The present by the store's own clock, the one that stamps `FileListing::modified`.
    fn now(&self) -> Result<SystemTime>;
}

/// What a process may do with a store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    /// List and read.
    Read,
    /// Everything; one process at a time, and no rank beside it.
    Write,
    /// A rank that writes beside others: one process at a time has this rank.
    WriteBeside {
        /// The rank.
        rank: u32,
    },
}

/// When the space of what is deleted is freed. Its names are gone when a deletion returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Space {
    /// Before the deletion returns, in a remote store, too.
    Now,
    /// By [`Store::reclaim`], or when the process ends; a remote store follows behind the caller.
    /// It may take a second for a gigabyte (ext4 with `discard`).
    Later,
}

/// Names a shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ShardId {
    /// The step.
    pub(crate) step: u64,
    /// The rank.
    pub(crate) rank: u32,
    /// The attempt.
    pub(crate) attempt: AttemptId,
}

/// How long a shard will be, as far as is known when it is begun.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ShardSize {
    /// Bytes to reserve: an estimate.
    pub(crate) expected_bytes: u64,
    /// Bytes of its chunks at most: what comes on top are header, index, footer and padding.
    pub(crate) most_bytes: u64,
}

/// What [`Store::unfinished_uploads`] lists.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct UnfinishedUpload {
    /// The step.
    pub(crate) step: u64,
    /// The shard that it was to be.
    pub(crate) file: String,
    /// The service's name for it.
    pub(crate) id: String,
    /// Bytes of the parts that arrived.
    pub(crate) bytes: u64,
    /// When something of it arrived last, or it was begun, by the store's clock.
    pub(crate) last_active: SystemTime,
}

/// What [`Store::publish`] makes visible.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Publication<'a> {
    /// The step.
    pub(crate) step: u64,
    /// The attempt that is being committed.
    pub(crate) attempt: AttemptId,
    /// The manifest's bytes.
    pub(crate) manifest: &'a [u8],
    /// Attempt of the manifest that is replaced.
    pub(crate) replaces: Option<AttemptId>,
    /// Shards whose presence and length are checked just before.
    pub(crate) shards: &'a [(ShardId, u64)],
}

/// A step directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct StepListing {
    /// The step.
    pub(crate) step: u64,
    /// Its files, by name.
    pub(crate) files: Vec<FileListing>,
    /// Why its files could not be listed, if they could not.
    pub(crate) unlisted: Option<String>,
}

/// A file in a step directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct FileListing {
    /// Its name.
    pub(crate) name: String,
    /// Its length.
    pub(crate) bytes: u64,
    /// When it was last written, by the store's clock.
    pub(crate) modified: SystemTime,
}

/// Takes a shard's bytes, any order, and makes them durable.
pub(crate) trait ShardSink: Send + fmt::Debug {
    /// Starts writing a piece at `offset`. Waits while too much is in flight. Reports an earlier
    /// write's failure; after one, every call fails. Pieces overlap nowhere.
    fn write(&mut self, offset: u64, piece: Piece) -> Result<()>;

    /// Waits for all writes, which must leave no hole, sets the file's exact length, makes file and
    /// directory durable.
    fn finish(&mut self, file_bytes: u64) -> Result<()>;

    /// How it went so far.
    fn figures(&self) -> TransferFigures {
        TransferFigures::default()
    }

    /// Gives up: waits for what is in flight, then deletes the file. Failing to delete is logged.
    fn abandon(self: Box<Self>);
}

/// How the transfer of a shard to a service went; all zero where there is none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct TransferFigures {
    /// Parts that arrived; 1 if the shard went in one piece.
    pub(crate) parts: u64,
    /// Of these, parts that were there already.
    pub(crate) resumed_parts: u64,
    /// Bytes of parts that were handed to the network.
    pub(crate) sent_bytes: u64,
    /// Bytes of parts that were there already.
    pub(crate) resumed_bytes: u64,
    /// Requests that were repeated.
    pub(crate) retries: u64,
}

/// Bytes on their way to a [`ShardSink`].
#[derive(Debug)]
pub(crate) struct Piece {
    /// Holds them at its start.
    pub(crate) buffer: Buffer,
    /// How many: a multiple of 4096.
    pub(crate) bytes: usize,
    /// Their checksum, so that no store hashes them again.
    pub(crate) crc32c: u32,
}

/// Reads a shard's bytes.
pub(crate) trait ShardSource: Send + Sync + fmt::Debug {
    /// Name for messages.
    fn name(&self) -> String;

    /// Length of the file.
    fn file_bytes(&self) -> u64;

    /// Starts reading `bytes` (a multiple of 4096, within the file) at `offset` into the start of
    /// `buffer`; `done` runs on a thread of the store's, once, and must be quick.
    fn read(&self, offset: u64, buffer: Buffer, bytes: usize, done: ReadDone);

    /// The file mapped into memory, private and copy-on-write, where the store can.
    fn map(&self) -> Result<memmap2::MmapMut>;

    /// Another way to the same bytes, for when what came is damaged: a remote store's copy, or the
    /// same object once more where a network is between. `None` where there is none.
    fn second(&self) -> Result<Option<Box<dyn ShardSource>>> {
        Ok(None)
    }
}

/// Receives the outcome of [`ShardSource::read`].
pub(crate) type ReadDone = Box<dyn FnOnce(Result<()>, Buffer) + Send>;
