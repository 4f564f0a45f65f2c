//! Checkpoints in a directory of a local or network filesystem.
//!
//! ```text
//! <store>/writer.lock                          held by the one writer, or by rank 0
//! <store>/writer-00001.lock                    held by rank 1, where ranks save together, or by
//!                                              the one writer, if there is one
//! <store>/step-000000001000/manifest.json      its existence commits the checkpoint
//!                           rank-00000.<attempt>.shard
//!                           manifest.json.<attempt>.tmp    while it is being published
//! ```
//!
//! Always holds:
//! - Only names that our own rules make are listed, read, or deleted; a symbolic link in a place of
//!   ours is not followed.
//! - A reader creates, writes, locks and deletes nothing.
//! - A name is durable before anything relies on it: each directory created is synced in its
//!   parent, each shard in its step's directory, before the manifest that names it is published;
//!   and all that can be seen, whichever process published it, before anything is deleted.
//! - In a forked child every call that would change something, or wait for a transfer, is refused,
//!   and dropping anything leaves the files and locks of the parent as they are.
//!
//! `docs/durability.md` describes the protocol and every way in which it can be interrupted.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::SystemTime;

use rustix::io::Errno;

use super::flow::Flow;
use super::{
    Access, FileListing, Publication, ShardId, ShardSink, ShardSize, ShardSource, Space,
    StepListing, Store,
};
use crate::error::IoContext;
use crate::format::manifest::MANIFEST_BYTES_MAX;
use crate::format::names::{self, AttemptId};
use crate::io::{EntryOp, EntryReply, Io};
use crate::sync::unpoisoned;
use crate::{EngineError, Result};

mod early_sync;
mod flight;
mod lock;
mod map;
#[cfg(all(test, loom))]
mod models;
mod publish;
mod record;
mod remove;
mod root;
mod sink;
mod source;
#[cfg(test)]
pub(super) mod tests;

use lock::{Locks, WriterLock};
use remove::Deleted;

/// A store in a directory.
#[derive(Debug)]
pub(crate) struct LocalStore {
    shared: Arc<Shared>,
    /// Held by a writer.
    writer: Option<WriterLock>,
    /// Held by one that writes alone, so that no rank does: those that ever wrote here.
    _beside: Vec<WriterLock>,
}

/// What the store and its sinks have in common.
#[derive(Debug)]
struct Shared {
    /// Absolute, so that a later change of the working directory changes nothing.
    path: PathBuf,
    io: Arc<dyn Io>,
    /// The rank of a writer.
    rank: u32,
    in_flight_bytes_max: u64,
    locks: Arc<Locks>,
    /// Held while names are made and unmade, so that what was just looked up still is so: by a
    /// publication, and by a cleaner between taking a file's lock and trusting it.
    changes: Mutex<()>,
    /// Whether every name that can be seen is durable: nothing is deleted before.
    settled: AtomicBool,
    /// Held while space is freed, so that a caller who needs it can wait for that.
    deleted: Mutex<Deleted>,
}

impl LocalStore {
    /// Opens a store. A writer creates the directory, with its parents, and takes the writer lock;
    /// a reader needs the directory to be there.
    pub(crate) fn open(
        path: &Path,
        access: Access,
        io: Arc<dyn Io>,
        in_flight_bytes: u64,
    ) -> Result<Self> {
        let path = std::path::absolute(path).context("resolving", path)?;
        let locks = Locks::new();
        let writer = match access {
            Access::Read => {
                root::check_directory(&path)?;
                None
            }
            Access::Write => {
                root::create_directories(&*io, &path)?;
                let own = WriterLock::acquire(&locks, &path, &lock::lock_file(0))?;
                Some((own, lock_ranks(&*io, &locks, &path)?))
            }
            Access::WriteBeside { rank } => {
                root::create_directories(&*io, &path)?;
                let own = WriterLock::acquire(&locks, &path, &lock::lock_file(rank))?;
                Some((own, Vec::new()))
            }
        };
        let (writer, beside) = writer.unzip();
        let shared = Shared {
            path,
            io,
            rank: if let Access::WriteBeside { rank } = access { rank } else { 0 },
            in_flight_bytes_max: in_flight_bytes,
            locks,
            changes: Mutex::default(),
            settled: AtomicBool::new(false),
            deleted: Mutex::default(),
        };
        Ok(Self { shared: Arc::new(shared), writer, _beside: beside.unwrap_or_default() })
    }

    fn writer(&self, what: &str) -> Result<&WriterLock> {
        self.shared.check_process(what)?;
        let lock =
            self.writer.as_ref().ok_or_else(|| EngineError::read_only(what, self.location()))?;
        if lock.is_in_place() {
            return Ok(lock);
        }
        Err(EngineError::Closed {
            what: format!("{what} in store `{}`", self.location()),
            why: "its writer lock no longer exists: since the store was opened, its directory was \
                 removed, moved or replaced, or the lock file deleted, and another writer may \
                 hold it"
                .into(),
            hint: "make sure that nothing else writes to it, then open it again".into(),
        })
    }
}

impl Store for LocalStore {
    fn close_after_fork(&self) {
        self.shared.locks.close_after_fork();
    }

    fn location(&self) -> String {
        self.shared.path.display().to_string()
    }

    fn list(&self) -> Result<Vec<StepListing>> {
        let list = |step| match self.shared.list_step(step) {
            Err(error) if is_of_one_directory(&error) => {
                let unlisted = Some(error.to_string());
                Ok(Some(StepListing { step, files: Vec::new(), unlisted }))
            }
            listed => listed,
        };
        // A step that vanishes meanwhile is one that the writer deleted.
        self.shared.steps()?.into_iter().filter_map(|step| list(step).transpose()).collect()
    }

    fn list_step(&self, step: u64) -> Result<Option<StepListing>> {
        self.shared.list_step(step)
    }

    fn read_manifest(&self, step: u64) -> Result<Option<Vec<u8>>> {
        self.shared.check_process("reading a manifest")?;
        let directory = self.shared.step_directory(step);
        if !is_directory(&*self.shared.io, &directory)? {
            return Ok(None);
        }
        record::read(&self.shared.io, &directory.join(names::MANIFEST_FILE), MANIFEST_BYTES_MAX)
    }

    fn create_shard(
        &self,
        shard: ShardId,
        size: ShardSize,
        flow: &Arc<Flow>,
    ) -> Result<Box<dyn ShardSink>> {
        self.writer("creating a shard")?;
        remove::reclaim(&self.shared);
        let reserve_bytes = size.expected_bytes;
        Ok(Box::new(sink::LocalShardSink::create(&self.shared, shard, reserve_bytes, flow)?))
    }

    fn resume_shard(
        &self,
        shard: ShardId,
        size: ShardSize,
        flow: &Arc<Flow>,
    ) -> Result<Box<dyn ShardSink>> {
        self.writer("creating a shard")?;
        // Nothing shows how much of it is right: it is written again.
        remove::remove_begun(&self.shared, shard)?;
        self.create_shard(shard, size, flow)
    }

    fn open_shard(&self, shard: ShardId) -> Result<Box<dyn ShardSource>> {
        Ok(Box::new(source::LocalShardSource::open(&self.shared, shard)?))
    }

    fn publish(&self, publication: Publication<'_>) -> Result<()> {
        self.writer("publishing a checkpoint")?;
        publish::publish(&self.shared, publication)
    }

    fn unpublish(&self, step: u64, attempt: AttemptId, replaced: Option<&[u8]>) -> Result<()> {
        self.writer("taking back a checkpoint")?;
        publish::unpublish(&self.shared, (step, attempt), replaced)
    }

    fn remove_checkpoint(&self, step: u64, only: Option<AttemptId>, space: Space) -> Result<u64> {
        self.writer("deleting a checkpoint")?;
        remove::remove_checkpoint(&self.shared, step, only, space)
    }

    fn remove_orphan(&self, step: u64, file: &str, space: Space) -> Result<Option<u64>> {
        self.writer("deleting a file")?;
        remove::remove_orphan(&self.shared, step, file, space)
    }

    fn reclaim(&self) {
        remove::reclaim(&self.shared);
    }

    fn free_bytes(&self) -> Result<Option<u64>> {
        if self.writer.is_some() {
            // What a save asks first: nothing is begun where another store has taken the place of
            // this one.
            self.writer("looking for room")?;
        }
        let space = EntryOp::Space(self.shared.path.clone());
        match self.shared.io.entry(&space).context("asking the free space of", &self.shared.path)? {
            // A filesystem of no size at all does not count: ramfs, and some of FUSE.
            EntryReply::Space { total_bytes: 0, .. } => Ok(None),
            EntryReply::Space { free_bytes, .. } => Ok(Some(free_bytes)),
            reply => Err(unexpected_reply(&reply)),
        }
    }

    fn now(&self) -> Result<SystemTime> {
        match &self.writer {
            Some(writer) => {
                self.shared.check_process("asking the time")?;
                writer.touch()
            }
            None => Ok(SystemTime::now()),
        }
    }
}

/// Takes the locks of all ranks that ever wrote beside rank 0.
fn lock_ranks(io: &dyn Io, locks: &Arc<Locks>, path: &Path) -> Result<Vec<WriterLock>> {
    let listed = io.entry(&EntryOp::List(path.into())).context("listing", path)?;
    let names = names_in(listed)?;
    let of_ranks = names.iter().filter(|name| lock::is_lock_of_another_rank(name));
    of_ranks.map(|name| WriterLock::acquire(locks, path, name)).collect()
}

impl Shared {
    fn step_directory(&self, step: u64) -> PathBuf {
        self.path.join(names::step_dir_name(step))
    }

    fn shard_path(&self, shard: ShardId) -> PathBuf {
        self.step_directory(shard.step).join(names::shard_file_name(shard.rank, shard.attempt))
    }

    fn changes(&self) -> MutexGuard<'_, ()> {
        unpoisoned(self.changes.lock())
    }

    fn deleted(&self) -> MutexGuard<'_, Deleted> {
        unpoisoned(self.deleted.lock())
    }

    /// Refuses work in a fork of the process that opened the store.
    fn check_process(&self, what: &str) -> Result<()> {
        if self.locks.in_owner() {
            return Ok(());
        }
        Err(EngineError::forked(what, self.path.display(), self.locks.process()))
    }

    fn sync_directory(&self, path: &Path) -> Result<()> {
        self.io.entry(&EntryOp::SyncDir(path.into())).context("syncing directory", path)?;
        Ok(())
    }

    /// Steps that have a directory, or what looks like one, ascending.
    fn steps(&self) -> Result<Vec<u64>> {
        let names = match self.io.entry(&EntryOp::List(self.path.clone())) {
            Ok(reply) => names_in(reply)?,
            Err(error) if error.kind() == ErrorKind::NotFound => {
                return Err(root::missing_store(&self.path));
            }
            Err(error) => return Err(EngineError::from_io("listing", &self.path, error)),
        };
        let mut steps: Vec<u64> =
            names.iter().filter_map(|name| names::parse_step_dir(name)).collect();
        steps.sort_unstable();
        Ok(steps)
    }

    /// One step's files of ours; `None` if it is no directory, or is gone.
    fn list_step(&self, step: u64) -> Result<Option<StepListing>> {
        let directory = self.step_directory(step);
        let Some(names) = list_own_names(&*self.io, &directory)? else {
            return Ok(None);
        };
        let mut files = Vec::with_capacity(names.len());
        for name in names {
            if let Some(metadata) = stat_file(&*self.io, &directory.join(&name))? {
                let modified = metadata.modified().context("asking the age of", &directory)?;
                files.push(FileListing { name, bytes: metadata.len(), modified });
            }
        }
        files.sort_by(|one, other| one.name.cmp(&other.name));
        Ok(Some(StepListing { step, files, unlisted: None }))
    }
}

/// Whether an error says something of one directory, and nothing of the others in the store.
fn is_of_one_directory(error: &EngineError) -> bool {
    let EngineError::Io { source, .. } = error else { return false };
    let of_the_medium = [Errno::IO, Errno::UCLEAN, Errno::BADMSG, Errno::NODATA];
    source.kind() == ErrorKind::PermissionDenied
        || of_the_medium.iter().any(|errno| source.raw_os_error() == Some(errno.raw_os_error()))
}

/// Names of ours in a step's directory; `None` if it is no directory, or is gone.
fn list_own_names(io: &dyn Io, directory: &Path) -> Result<Option<Vec<String>>> {
    if !is_directory(io, directory)? {
        return Ok(None);
    }
    match io.entry(&EntryOp::List(directory.into())) {
        Ok(reply) => {
            let mut names = names_in(reply)?;
            names.retain(|name| is_own_name(name));
            Ok(Some(names))
        }
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(EngineError::from_io("listing", directory, error)),
    }
}

/// Whether a writer of ours gives files in a step's directory this name.
fn is_own_name(name: &str) -> bool {
    name == names::MANIFEST_FILE
        || names::parse_shard_file(name).is_some()
        || names::is_manifest_temporary(name)
}

/// Metadata of a regular file; `None` if there is none. Symbolic links are not followed.
fn stat_file(io: &dyn Io, path: &Path) -> Result<Option<std::fs::Metadata>> {
    Ok(stat(io, path)?.filter(std::fs::Metadata::is_file))
}

/// Whether this is a directory, and no symbolic link to one.
fn is_directory(io: &dyn Io, path: &Path) -> Result<bool> {
    Ok(stat(io, path)?.is_some_and(|metadata| metadata.is_dir()))
}

fn stat(io: &dyn Io, path: &Path) -> Result<Option<std::fs::Metadata>> {
    match io.entry(&EntryOp::Stat(path.into())) {
        Ok(EntryReply::Metadata(metadata)) => Ok(Some(metadata)),
        Ok(reply) => Err(unexpected_reply(&reply)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(EngineError::from_io("looking at", path, error)),
    }
}

/// Names that are text: others are none of ours.
fn names_in(reply: EntryReply) -> Result<Vec<String>> {
    match reply {
        EntryReply::Names(names) => {
            Ok(names.into_iter().filter_map(|name| name.into_string().ok()).collect())
        }
        reply => Err(unexpected_reply(&reply)),
    }
}

fn unexpected_reply(reply: &EntryReply) -> EngineError {
    EngineError::internal("an operation on directory entries", format!("it replied {reply:?}"))
}
