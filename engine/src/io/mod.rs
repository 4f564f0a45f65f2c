//! Bytes <-> device: the one seam below which every system call on the store lives.
//!
//! ```text
//! sink / source --Transfer--> Io::submit --> kernel
//!       ^                                      |
//!       +------- Transfer::done(outcome) <-----+     the buffer comes back with every outcome
//! ```
//!
//! Always holds:
//! - A buffer given to [`Io::submit`] is owned by the operation until `done` is called, exactly
//!   once, whatever happens to the submitter.
//! - One `submit` is one attempt: it may move fewer bytes than asked. `transfer` continues short
//!   ones, so a fault-injecting implementation sees (and can fail) every attempt.
//! - Nothing here retries a failed sync.

use std::fmt;
use std::fs::Metadata;
use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

mod backend;
pub(crate) mod buffer;
#[cfg(test)]
mod conformance;
mod files;
mod inbox;
pub(crate) mod lent;
mod mapping;
#[cfg(all(test, loom))]
mod models;
pub mod pin;
pub mod probe;
#[cfg(any(test, feature = "sim"))]
pub mod sim;
pub(crate) mod threads;
pub(crate) mod transfer;
pub(crate) mod uring;

pub use backend::open_backend;
pub use buffer::{Buffer, Slab};

/// Alignment, in bytes, of memory, offset and length that every direct transfer obeys, and to
/// which every region of a shard is padded.
pub const ALIGNMENT: usize = 4096;

/// A way to the device. Implementations: `uring`, `threads`, and `sim`, which wraps either and
/// injects faults. At most six methods.
pub trait Io: Send + Sync + fmt::Debug {
    /// `uring`, `threads` or `sim`: for logs and statistics.
    fn name(&self) -> &'static str;

    /// Opens a file. With [`OpenMode::Create`] the file must not exist. Whether the result is
    /// direct follows the configured rule and what the filesystem takes.
    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Arc<File>>;

    /// Starts one transfer and returns; `transfer.done` runs later on a thread of the
    /// implementation (or, on early failure, on this one) and must be quick.
    fn submit(&self, transfer: Transfer);

    /// Reserves space for, or sets, the file's length.
    fn set_length(&self, file: &File, length: Length) -> io::Result<()>;

    /// Makes the file's data and length durable (`fdatasync`). After an error the file must be
    /// abandoned: calling this again on it could falsely succeed.
    fn sync(&self, file: &File) -> io::Result<()>;

    /// Performs one operation on directory entries.
    fn entry(&self, operation: &EntryOp) -> io::Result<EntryReply>;
}

/// How [`Io::open`] opens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OpenMode {
    /// For reading, bulk: direct where possible.
    Read,
    /// For reading small records (manifests): always buffered, any alignment.
    ReadSmall,
    /// A new file for writing and reading back, bulk: direct where possible.
    Create,
    /// A new file for writing small records: always buffered, any alignment.
    CreateSmall,
}

/// An open file. Closing is checked where the platform reports loss on close.
#[derive(Debug)]
pub struct File {
    /// The descriptor.
    pub descriptor: OwnedFd,
    /// Where it was opened, for messages.
    pub path: PathBuf,
    /// Whether transfers bypass the page cache and so must be aligned to [`ALIGNMENT`].
    pub direct: bool,
}

/// What [`Io::set_length`] does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Length {
    /// Allocates blocks up to this many bytes (`fallocate`); a filesystem that cannot is no error.
    Reserve(u64),
    /// Sets the exact length (`ftruncate`).
    Exact(u64),
}

/// Direction of a transfer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// Device to buffer.
    Read,
    /// Buffer to device.
    Write,
}

/// One attempt to move `buffer[range]` to or from `file` at `offset`.
pub struct Transfer {
    /// The file.
    pub file: Arc<File>,
    /// Bytes from the file's start.
    pub offset: u64,
    /// Owned by the operation until `done` runs.
    pub buffer: Buffer,
    /// The part of the buffer to move.
    pub range: Range<usize>,
    /// Which way.
    pub direction: Direction,
    /// Called exactly once with the bytes moved (may be fewer than asked; 0 on a read means end of
    /// file) or the error, and the buffer.
    pub done: Done,
}

/// Receives the outcome of a [`Transfer`] attempt.
pub type Done = Box<dyn FnOnce(io::Result<usize>, Buffer) + Send>;

impl fmt::Debug for Transfer {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Transfer")
            .field("file", &self.file.path)
            .field("offset", &self.offset)
            .field("range", &self.range)
            .field("direction", &self.direction)
            .finish_non_exhaustive()
    }
}

/// An operation on directory entries: small, synchronous, each one a point where a crash or fault
/// can strike.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EntryOp {
    /// Creates one directory; existing is an error.
    CreateDir(PathBuf),
    /// Makes a directory's entries durable (`fsync`).
    SyncDir(PathBuf),
    /// Renames; fails with `AlreadyExists` if the target exists (`renameat2(RENAME_NOREPLACE)`, or
    /// `link` where that is refused).
    RenameNew {
        /// Existing name.
        from: PathBuf,
        /// New name.
        to: PathBuf,
    },
    /// Renames, replacing the target atomically.
    RenameReplace {
        /// Existing name.
        from: PathBuf,
        /// New name.
        to: PathBuf,
    },
    /// Removes a file.
    RemoveFile(PathBuf),
    /// Removes an empty directory.
    RemoveDir(PathBuf),
    /// Lists a directory.
    List(PathBuf),
    /// Metadata of a path, symbolic links not followed.
    Stat(PathBuf),
    /// Free and total bytes of the filesystem that holds a path.
    Space(PathBuf),
}

/// The reply to an [`EntryOp`].
#[derive(Debug)]
pub enum EntryReply {
    /// Nothing to return.
    Done,
    /// Names in a directory, unordered, without `.` and `..`.
    Names(Vec<std::ffi::OsString>),
    /// Metadata of a path.
    Metadata(Metadata),
    /// Free (for this user) and total bytes.
    Space {
        /// Bytes this user may still write.
        free_bytes: u64,
        /// Size of the filesystem.
        total_bytes: u64,
    },
}
