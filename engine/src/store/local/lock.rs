//! Who may change a store: one writer at a time, or one process for each rank, and no cleaner on a
//! file that is being written.
//!
//! Every lock is a `flock` on a descriptor of its own, opened for nothing else, and every such
//! descriptor is in one table, [`Locks`]: so a forked child can close them all without knowing who
//! holds them.
//!
//! Always holds:
//! - A lock ends when its holder drops it, or when the process ends, however it ends.
//! - In a forked child nothing is unlocked and no mutex is waited for. The child shares the
//!   parent's locks until it calls [`Locks::close_after_fork`], runs another program, or ends: so a
//!   child that does none of these outlives its parent with the locks in its hands.
//! - Lock files are never deleted while they might be held: the writer's never, a shard's by its
//!   holder only.

use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, SystemTime};

use rustix::fs::{FlockOperation, Mode, OFlags, Timespec, Timestamps, UTIME_NOW};

use crate::error::IoContext;
use crate::sync::unpoisoned;
use crate::{EngineError, Result};

/// The lock file, in the store's directory, of the one writer, or of a rank that writes beside
/// others.
pub(super) fn lock_file(rank: u32) -> String {
    match rank {
        0 => "writer.lock".into(),
        rank => format!("writer-{rank:05}.lock"),
    }
}

/// Whether a file is [`lock_file`] of a rank but 0.
pub(super) fn is_lock_of_another_rank(name: &str) -> bool {
    let rank = name.strip_prefix("writer-").and_then(|rest| rest.strip_suffix(".lock"));
    let rank = rank.and_then(|digits| digits.parse().ok());
    rank.is_some_and(|rank| rank > 0 && lock_file(rank) == name)
}

/// Most bytes of the lock file that are read for a message.
const HOLDER_BYTES_MAX: u64 = 1024;

/// The locks that this process holds in one store.
pub(super) struct Locks {
    /// The process that took them.
    process: u32,
    held: Mutex<BTreeMap<u64, Option<OwnedFd>>>,
    next_key: AtomicU64,
}

/// A lock held until dropped.
pub(super) struct Lock {
    locks: Arc<Locks>,
    key: u64,
}

/// Whether [`Locks::try_lock`] may create the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LockFile {
    /// It is created where it does not exist.
    Create,
    /// It must exist.
    Existing,
}

impl Locks {
    pub(super) fn new() -> Arc<Self> {
        Self::of_process(std::process::id())
    }

    pub(super) fn of_process(process: u32) -> Arc<Self> {
        Arc::new(Self { process, held: Mutex::default(), next_key: AtomicU64::new(0) })
    }

    /// The process that may use these locks.
    pub(super) fn process(&self) -> u32 {
        self.process
    }

    /// Whether this process is the one that took them, not a fork of it.
    pub(super) fn in_owner(&self) -> bool {
        std::process::id() == self.process
    }

    /// Locks a file; `None` if another descriptor, of this or another process, holds its lock.
    pub(super) fn try_lock(
        self: &Arc<Self>,
        path: &Path,
        file: LockFile,
    ) -> io::Result<Option<Lock>> {
        let creation = match file {
            LockFile::Create => OFlags::CREATE,
            LockFile::Existing => OFlags::empty(),
        };
        // Open for writing although nothing is written: NFS grants an exclusive lock only then.
        let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK | creation;
        let descriptor = rustix::fs::open(path, flags, Mode::from_raw_mode(0o666))?;
        match rustix::fs::flock(&descriptor, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => return Ok(None),
            Err(error) => return Err(error.into()),
        }
        let key = self.next_key.fetch_add(1, Ordering::Relaxed);
        self.lock_table().insert(key, Some(descriptor));
        Ok(Some(Lock { locks: Arc::clone(self), key }))
    }

    /// Closes, in a forked child, every lock that the parent held at the fork, so that the child
    /// does not keep them when the parent ends. Does nothing in the parent, and waits for nothing:
    /// in the rare case that another thread was just taking a lock at the fork, the child keeps
    /// them.
    pub(super) fn close_after_fork(&self) {
        if self.in_owner() {
            return;
        }
        if let Ok(mut held) = self.held.try_lock() {
            // Closing releases nothing of the parent's: a lock goes with its last descriptor. The
            // entries stay, because the allocator too may have been caught by the fork.
            for descriptor in held.values_mut() {
                drop(descriptor.take());
            }
        }
    }

    pub(super) fn lock_table(&self) -> MutexGuard<'_, BTreeMap<u64, Option<OwnedFd>>> {
        unpoisoned(self.held.lock())
    }
}

impl fmt::Debug for Locks {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        // No table: a debug print in a forked child must not wait for its mutex.
        formatter.debug_struct("Locks").field("process", &self.process).finish_non_exhaustive()
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        if !self.locks.in_owner() {
            return;
        }
        let descriptor = self.locks.lock_table().remove(&self.key).flatten();
        if let Some(descriptor) = descriptor {
            // Said aloud, because a forked child may still have the descriptor open. An error
            // leaves the lock to the closing that follows.
            let _ = rustix::fs::flock(&descriptor, FlockOperation::Unlock);
        }
    }
}

impl fmt::Debug for Lock {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Lock").field("key", &self.key).finish_non_exhaustive()
    }
}

/// The right to change a store.
#[derive(Debug)]
pub(super) struct WriterLock {
    lock: Lock,
    path: PathBuf,
}

impl WriterLock {
    /// Takes the store's writer lock, or reports its holder.
    pub(super) fn acquire(locks: &Arc<Locks>, store: &Path, file: &str) -> Result<Self> {
        let path = store.join(file);
        match locks.try_lock(&path, LockFile::Create) {
            Ok(Some(lock)) => {
                let writer = Self { lock, path };
                if let Err(error) = writer.sign() {
                    // It only names the holder in messages. On a full disk, a store must open, or
                    // nothing could be deleted.
                    tracing::debug!(path = %writer.path.display(), %error, "signing the writer \
                        lock failed");
                }
                Ok(writer)
            }
            Ok(None) => Err(busy(store, &path)),
            Err(error) if may_not_write(&error) => Err(EngineError::Io {
                what: format!("taking the writer lock `{}`", path.display()),
                source: error,
                hint: "a writer needs write permission here: check the owner, mode and mount of \
                       the store, or open it with `read_only=True`"
                    .into(),
            }),
            Err(error) => Err(lock_error("taking the writer lock", &path, error)),
        }
    }

    /// The present by the clock of the filesystem.
    pub(super) fn touch(&self) -> Result<SystemTime> {
        let now = Timespec { tv_sec: 0, tv_nsec: UTIME_NOW };
        let times = Timestamps { last_access: now, last_modification: now };
        self.with_descriptor(|descriptor| {
            rustix::fs::futimens(descriptor, &times)?;
            let stat = rustix::fs::fstat(descriptor)?;
            let seconds = u64::try_from(stat.st_mtime).unwrap_or(0);
            let nanoseconds = u32::try_from(stat.st_mtime_nsec).unwrap_or(0);
            Ok(SystemTime::UNIX_EPOCH + Duration::new(seconds, nanoseconds))
        })
        .context("asking the time of", &self.path)
    }

    /// Whether the file that is locked is the one that is found by its name: then every process
    /// that opens the store by that name now meets this lock.
    pub(super) fn is_in_place(&self) -> bool {
        let locked = self.with_descriptor(|descriptor| Ok(rustix::fs::fstat(descriptor)?));
        let found = rustix::fs::lstat(&self.path);
        let file = |stat: &rustix::fs::Stat| (stat.st_dev, stat.st_ino);
        matches!((locked, found), (Ok(locked), Ok(found)) if file(&locked) == file(&found))
    }

    /// Writes who holds the lock, for the message that the next writer gets.
    fn sign(&self) -> io::Result<()> {
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let holder = Holder {
            process: std::process::id(),
            host: host_name(),
            since_unix_seconds: since.as_secs(),
        };
        let text = holder.to_string();
        self.with_descriptor(|descriptor| {
            // In this order: the block that is there is written again, which a full disk allows.
            rustix::io::pwrite(descriptor, text.as_bytes(), 0)?;
            rustix::fs::ftruncate(descriptor, text.len() as u64)?;
            Ok(())
        })
    }

    fn with_descriptor<T>(&self, work: impl FnOnce(&OwnedFd) -> io::Result<T>) -> io::Result<T> {
        match self.lock.locks.lock_table().get(&self.lock.key) {
            Some(Some(descriptor)) => work(descriptor),
            None | Some(None) => {
                Err(io::Error::other("the writer lock was closed in this process"))
            }
        }
    }
}

/// An error of locking, with the hint for filesystems that have no locks.
pub(super) fn lock_error(operation: &str, path: &Path, error: io::Error) -> EngineError {
    let no_locks =
        [rustix::io::Errno::NOLCK, rustix::io::Errno::OPNOTSUPP, rustix::io::Errno::NOSYS];
    if no_locks.iter().any(|errno| error.raw_os_error() == Some(errno.raw_os_error())) {
        return EngineError::Io {
            what: format!("{operation} `{}`", path.display()),
            source: error,
            hint: "the filesystem refuses `flock`, without which two writers could interfere: \
                   mount it with locks, or choose another path"
                .into(),
        };
    }
    EngineError::from_io(operation, path, error)
}

fn may_not_write(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem)
}

fn busy(store: &Path, lock: &Path) -> EngineError {
    let holder = Holder::read(lock);
    let (why, go_on) = match holder {
        None => {
            ("another process holds its writer lock".to_owned(), "wait for that process or stop it")
        }
        Some(holder) if holder.is_this_process() => (
            "this process already has it open for writing".to_owned(),
            "close the other manager of this store first",
        ),
        Some(holder) if holder.is_gone() => (
            format!(
                "{holder_of}, which is gone, left its writer lock to a process that it had forked",
                holder_of = holder.describe()
            ),
            "stop that process",
        ),
        Some(holder) => (
            format!("{} holds its writer lock", holder.describe()),
            "if it is another rank of this job, open the manager after `init_process_group`, or \
             pass `rank=` and `world_size=`; else wait for that process or stop it",
        ),
    };
    EngineError::StoreBusy {
        what: format!("opening store `{}` for writing", store.display()),
        why,
        hint: format!(
            "{go_on} (`fuser -v '{}'` shows who has it), open the store with `read_only=True`, or \
             choose another path",
            lock.display()
        ),
    }
}

/// Who holds the writer lock.
#[derive(Debug, PartialEq, Eq)]
struct Holder {
    process: u32,
    host: String,
    since_unix_seconds: u64,
}

impl Holder {
    fn read(lock: &Path) -> Option<Self> {
        let mut text = String::new();
        std::fs::File::open(lock).ok()?.take(HOLDER_BYTES_MAX).read_to_string(&mut text).ok()?;
        Self::parse(&text)
    }

    fn parse(text: &str) -> Option<Self> {
        let field =
            |name: &str| text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        Some(Self {
            process: field("process")?.parse().ok()?,
            host: field("host")?.to_owned(),
            since_unix_seconds: field("since_unix_seconds")?.parse().ok()?,
        })
    }

    fn describe(&self) -> String {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let minutes = now.as_secs().saturating_sub(self.since_unix_seconds) / 60;
        let Self { process, host, .. } = self;
        format!("process {process} on host `{host}` (writer for {minutes} min)")
    }

    fn is_this_process(&self) -> bool {
        self.process == std::process::id() && self.host == host_name()
    }

    /// Whether the process is seen to be gone: only on this host can that be seen.
    fn is_gone(&self) -> bool {
        let processes = Path::new("/proc");
        self.host == host_name()
            && processes.join("self").exists()
            && !processes.join(self.process.to_string()).exists()
    }
}

impl fmt::Display for Holder {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(formatter, "process {}", self.process)?;
        writeln!(formatter, "host {}", self.host)?;
        writeln!(formatter, "since_unix_seconds {}", self.since_unix_seconds)
    }
}

fn host_name() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}
