//! Writing a shard.
//!
//! ```text
//! create ----> Writing --finish--> Finished --drop--> the file stays
//!                 |                    |
//!                 |                    +--abandon--> deleted, unless a manifest names it
//!                 +--abandon, drop--> deleted
//! ```
//!
//! Always holds:
//! - The file's lock is held from its creation until the sink is gone: no cleaner takes the file.
//! - Buffers go back as their writes end, whatever becomes of the sink; the sink ends only when
//!   nothing is in flight, so nothing writes to a file that it has deleted.
//! - The first failure, be it of a write or of a sync, is kept and is the answer to every later
//!   call. After one the file is never synced again: a second sync could falsely succeed.
//! - What makes the file durable is the sync in `finish`, after everything was written; those
//!   before it ([`super::early_sync`]) only leave it less to do.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::early_sync::EarlySync;
use super::flight::Flight;
use super::lock::{Lock, LockFile, lock_error};
use super::{Shared, publish, remove};
use crate::error::IoContext;
use crate::io::{Direction, EntryOp, File, Length, OpenMode, Transfer, transfer};
use crate::store::flow::Flow;
use crate::store::{Piece, ShardId, ShardSink};
use crate::{EngineError, Result};

/// How often a step's directory may vanish under a new shard before we say so: a cleaner deletes it
/// when it is empty.
const CREATE_ATTEMPTS_MAX: u32 = 8;

/// A shard that is being written.
#[derive(Debug)]
pub(super) struct LocalShardSink {
    shared: Arc<Shared>,
    id: ShardId,
    path: PathBuf,
    file: Arc<File>,
    flight: Arc<Flight>,
    /// Runs until nothing more is written.
    early_sync: Option<EarlySync>,
    phase: Phase,
    /// Released last, when the fate of the file is settled.
    _lock: Lock,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Bytes are accepted; the file is nobody's but ours.
    Writing,
    /// The file is durable; a manifest may name it.
    Finished,
    /// The file is deleted, or left for good.
    Settled,
}

impl LocalShardSink {
    pub(super) fn create(
        shared: &Arc<Shared>,
        id: ShardId,
        reserve_bytes: u64,
        flow: &Arc<Flow>,
    ) -> Result<Self> {
        let path = shared.shard_path(id);
        let (file, lock) = create_locked(shared, id.step, &path)?;
        let mut sink = Self {
            shared: Arc::clone(shared),
            id,
            path,
            file,
            flight: Arc::new(Flight::new(shared.in_flight_bytes_max, Arc::clone(flow))),
            early_sync: None,
            phase: Phase::Writing,
            _lock: lock,
        };
        // An error drops the sink, and that deletes the file.
        sink.reserve(reserve_bytes)?;
        sink.early_sync = EarlySync::start(&shared.io, &sink.file, &sink.flight, reserve_bytes)?;
        Ok(sink)
    }

    fn reserve(&self, reserve_bytes: u64) -> Result<()> {
        let Err(error) = self.shared.io.set_length(&self.file, Length::Reserve(reserve_bytes))
        else {
            return Ok(());
        };
        let free_bytes = match self.shared.io.entry(&EntryOp::Space(self.shared.path.clone())) {
            Ok(crate::io::EntryReply::Space { free_bytes, .. }) => Some(free_bytes),
            _ => None,
        };
        match (EngineError::from_io("reserving space for", &self.path, error), free_bytes) {
            (EngineError::NoSpace { what, why, hint }, Some(free_bytes)) => {
                Err(EngineError::NoSpace {
                    what,
                    why: format!(
                        "{reserve_bytes} bytes are needed, and {free_bytes} are free: {why}"
                    ),
                    hint,
                })
            }
            (error, _) => Err(error),
        }
    }

    /// Waits for everything that was started.
    fn settle(&mut self) {
        self.flight.wait_until_landed();
        if let Some(early_sync) = self.early_sync.take() {
            early_sync.end(&self.flight);
        }
    }

    fn make_durable(&self, file_bytes: u64) -> Result<()> {
        self.shared
            .io
            .set_length(&self.file, Length::Exact(file_bytes))
            .context("setting the length of", &self.path)?;
        self.flight
            .flow()
            .time_sync(|| self.shared.io.sync(&self.file))
            .context("syncing", &self.path)?;
        self.shared.sync_directory(&self.shared.step_directory(self.id.step))
    }

    /// Deletes the file, and the step's directory if that leaves it empty.
    fn discard(&mut self) {
        self.settle();
        self.phase = Phase::Settled;
        match self.shared.io.entry(&EntryOp::RemoveFile(self.path.clone())) {
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => {
                tracing::warn!(path = %self.path.display(), %error, "an abandoned shard stays \
                    behind");
                return;
            }
        }
        if let Err(error) = remove::remove_empty_step(&self.shared, self.id.step) {
            tracing::warn!(step = self.id.step, %error, "an empty step directory stays behind");
        }
    }

    /// Whether a published manifest may name this file: a publication can fail after its manifest
    /// became visible, and then the file is part of a checkpoint.
    fn may_be_published(&self) -> bool {
        match publish::standing(&self.shared, self.id.step, self.id.attempt) {
            Ok(standing) => standing.may_be_ours(),
            Err(_) => true,
        }
    }
}

impl ShardSink for LocalShardSink {
    fn write(&mut self, offset: u64, piece: Piece) -> Result<()> {
        let Piece { buffer, bytes, .. } = piece;
        self.shared.check_process("writing a shard")?;
        if self.phase != Phase::Writing {
            return Err(EngineError::internal("writing a shard", "it is finished already"));
        }
        let in_flight_bytes = bytes as u64;
        self.flight.start(in_flight_bytes)?;
        let flight = Arc::clone(&self.flight);
        let path = self.path.clone();
        transfer::transfer_fully(
            &self.shared.io,
            Transfer {
                file: Arc::clone(&self.file),
                offset,
                buffer,
                range: 0..bytes,
                direction: Direction::Write,
                done: Box::new(move |outcome, buffer| {
                    // The buffer first: a thread that waits for memory need not wait for the
                    // bookkeeping.
                    drop(buffer);
                    let outcome = outcome.map(drop).map_err(|error| {
                        let operation = format!("writing {bytes} bytes at offset {offset} of");
                        EngineError::from_io(&operation, &path, error)
                    });
                    flight.land(in_flight_bytes, outcome);
                }),
            },
        );
        Ok(())
    }

    fn finish(&mut self, file_bytes: u64) -> Result<()> {
        self.shared.check_process("finishing a shard")?;
        if self.phase != Phase::Writing {
            return Err(EngineError::internal("finishing a shard", "it is finished already"));
        }
        self.settle();
        self.flight.check()?;
        if let Err(error) = self.make_durable(file_bytes) {
            self.flight.fail(error.duplicate());
            return Err(error);
        }
        self.phase = Phase::Finished;
        Ok(())
    }

    fn abandon(mut self: Box<Self>) {
        if !self.shared.locks.in_owner() {
            // Dropping it does what a child may do: nothing.
            return;
        }
        if self.phase == Phase::Finished && self.may_be_published() {
            tracing::warn!(path = %self.path.display(), "an abandoned shard stays: a manifest \
                may name it");
            self.phase = Phase::Settled;
            return;
        }
        self.discard();
    }
}

impl Drop for LocalShardSink {
    fn drop(&mut self) {
        // A forked child has neither the file's fate nor the threads that its writes end on.
        if !self.shared.locks.in_owner() {
            if let Some(early_sync) = self.early_sync.take() {
                early_sync.forget();
            }
        } else if self.phase == Phase::Writing {
            self.discard();
        }
    }
}

/// Creates the step's directory, durable, and in it a new file with its lock.
fn create_locked(shared: &Shared, step: u64, path: &Path) -> Result<(Arc<File>, Lock)> {
    let directory = shared.step_directory(step);
    for _ in 0..CREATE_ATTEMPTS_MAX {
        create_step_directory(shared, &directory)?;
        // A cleaner takes locks under this mutex, so it meets no file that is not locked yet.
        let _changes = shared.changes();
        match shared.io.open(path, OpenMode::Create) {
            Ok(file) => return Ok((file, lock_new(shared, path)?)),
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(EngineError::from_io("creating shard", path, error)),
        }
    }
    let gone = std::io::Error::from(ErrorKind::NotFound);
    Err(EngineError::from_io("creating shard", path, gone))
}

fn create_step_directory(shared: &Shared, directory: &Path) -> Result<()> {
    match shared.io.entry(&EntryOp::CreateDir(directory.into())) {
        Ok(_) => {}
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {
            // Gone again if another rank has just removed it: opening the file finds that out.
            let found = super::stat(&*shared.io, directory)?;
            if found.is_some_and(|metadata| !metadata.is_dir()) {
                return Err(EngineError::from_io(
                    "creating directory",
                    directory,
                    ErrorKind::NotADirectory.into(),
                ));
            }
        }
        Err(error) => return Err(EngineError::from_io("creating directory", directory, error)),
    }
    // Also where it existed: the process that created it may have died before this.
    shared.sync_directory(&shared.path)
}

fn lock_new(shared: &Shared, path: &Path) -> Result<Lock> {
    let error = match shared.locks.try_lock(path, LockFile::Existing) {
        Ok(Some(lock)) => return Ok(lock),
        Ok(None) => ErrorKind::WouldBlock.into(),
        Err(error) => error,
    };
    if let Err(error) = shared.io.entry(&EntryOp::RemoveFile(path.into())) {
        tracing::warn!(path = %path.display(), %error, "a shard that could not be locked stays \
            behind");
    }
    Err(lock_error("locking shard", path, error))
}
