//! What every backend does the same way: opening, lengths, syncs and directory entries, each one
//! system call on the caller's thread.
//!
//! Always holds:
//! - Whether a file is direct is decided once, when it is opened, by [`DirectIo`] and by what the
//!   filesystem says or shows. `File::direct` is what the descriptor's flags are.
//! - A symbolic link is never followed at the last component, and only regular files are opened.
//! - A failed sync is never tried again: after one the kernel calls pages clean that it could not
//!   write, so a second sync would succeed without the data ("Can Applications Recover from fsync
//!   Failures?", ATC 2020). An interrupted one counts as failed.

use std::fs::Metadata;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{
    Advice, AtFlags, CWD, FallocateFlags, FileType, Mode, OFlags, RenameFlags, StatxFlags,
};
use rustix::io::{Errno, retry_on_intr};

use super::{ALIGNMENT, Direction, EntryOp, EntryReply, File, Length, OpenMode, Transfer};
use crate::config::DirectIo;

/// Most bytes that one attempt moves: what the kernel takes in one call is just below 2 GiB.
const ATTEMPT_BYTES_MAX: usize = 1 << 30;
/// Smaller buffered transfers get no special treatment.
pub(super) const BULK_BYTES_MIN: usize = 256 << 10;
/// How far behind a buffered write pages are dropped: long enough for the device to have them.
const WRITE_BEHIND_LAG_BYTES: u64 = 64 << 20;

/// Opens a file by the rule.
pub(super) fn open(path: &Path, mode: OpenMode, rule: DirectIo) -> io::Result<Arc<File>> {
    let creates = matches!(mode, OpenMode::Create | OpenMode::CreateSmall);
    let descriptor = open_descriptor(path, creates)?;
    match finish_open(&descriptor, path, mode, rule) {
        Ok(direct) => Ok(Arc::new(File { descriptor, path: path.to_owned(), direct })),
        Err(error) => {
            if creates {
                // Ours and empty. If it cannot be removed, the error to report is the first one.
                let _ = rustix::fs::unlink(path);
            }
            Err(error)
        }
    }
}

fn open_descriptor(path: &Path, creates: bool) -> io::Result<OwnedFd> {
    // Non-blocking so that a FIFO under a file's name cannot hang us; cleared by `finish_open`.
    let common = OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let flags = if creates {
        common | OFlags::RDWR | OFlags::CREATE | OFlags::EXCL
    } else {
        common | OFlags::RDONLY
    };
    let permissions = Mode::RUSR | Mode::WUSR | Mode::RGRP | Mode::ROTH;
    Ok(retry_on_intr(|| rustix::fs::openat(CWD, path, flags, permissions))?)
}

/// Checks the kind of the file and sets its final flags; returns whether it is direct.
fn finish_open(
    descriptor: &OwnedFd,
    path: &Path,
    mode: OpenMode,
    rule: DirectIo,
) -> io::Result<bool> {
    let kind = FileType::from_raw_mode(rustix::fs::fstat(descriptor)?.st_mode);
    if kind != FileType::RegularFile {
        let why = format!("`{}` is not a regular file", path.display());
        return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
    }
    let small = matches!(mode, OpenMode::ReadSmall | OpenMode::CreateSmall);
    if !small && rule != DirectIo::Off && becomes_direct(descriptor.as_fd(), mode)? {
        return Ok(true);
    }
    if !small && rule == DirectIo::On {
        return Err(direct_is_refused(descriptor.as_fd(), path));
    }
    rustix::fs::fcntl_setfl(descriptor, OFlags::empty())?;
    Ok(false)
}

/// What a filesystem says about direct I/O on one file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum DirectSupport {
    /// Takes it, at these alignments in bytes.
    Aligned {
        /// Of memory.
        memory: u32,
        /// Of offset and length.
        offset: u32,
    },
    /// Says that it does not.
    Refused,
    /// Does not say: kernels before 6.1, tmpfs and others.
    Unknown,
}

/// Asks the filesystem (`statx`).
pub(super) fn direct_support(descriptor: BorrowedFd<'_>) -> DirectSupport {
    let wanted = StatxFlags::DIOALIGN;
    let Ok(found) = rustix::fs::statx(descriptor, "", AtFlags::EMPTY_PATH, wanted) else {
        return DirectSupport::Unknown;
    };
    if found.stx_mask & wanted.bits() == 0 {
        return DirectSupport::Unknown;
    }
    match (found.stx_dio_mem_align, found.stx_dio_offset_align) {
        (0, _) | (_, 0) => DirectSupport::Refused,
        (memory, offset) => DirectSupport::Aligned { memory, offset },
    }
}

fn becomes_direct(descriptor: BorrowedFd<'_>, mode: OpenMode) -> io::Result<bool> {
    let fits =
        |bytes: u32| usize::try_from(bytes).is_ok_and(|bytes| ALIGNMENT.is_multiple_of(bytes));
    let must_probe = match direct_support(descriptor) {
        DirectSupport::Aligned { memory, offset } if fits(memory) && fits(offset) => false,
        DirectSupport::Aligned { .. } | DirectSupport::Refused => return Ok(false),
        DirectSupport::Unknown => true,
    };
    match rustix::fs::fcntl_setfl(descriptor, OFlags::DIRECT) {
        Ok(()) if !must_probe => Ok(true),
        Ok(()) => probe_direct(descriptor, mode),
        Err(Errno::INVAL) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// One aligned block, on the stack.
#[repr(align(4096))]
struct Block([u8; ALIGNMENT]);

/// Tries one direct transfer: some filesystems accept the flag and refuse what it asks for.
fn probe_direct(descriptor: BorrowedFd<'_>, mode: OpenMode) -> io::Result<bool> {
    let mut block = Block([0; ALIGNMENT]);
    let outcome = match mode {
        OpenMode::Read | OpenMode::ReadSmall => {
            retry_on_intr(|| rustix::io::pread(descriptor, &mut block.0, 0)).map(|_| ())
        }
        // The file is new and empty: what is written here is cut off again.
        OpenMode::Create | OpenMode::CreateSmall => {
            retry_on_intr(|| rustix::io::pwrite(descriptor, &block.0, 0))
                .and_then(|_| retry_on_intr(|| rustix::fs::ftruncate(descriptor, 0)))
        }
    };
    match outcome {
        Ok(()) => Ok(true),
        Err(Errno::INVAL | Errno::OPNOTSUPP) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

fn direct_is_refused(descriptor: BorrowedFd<'_>, path: &Path) -> io::Error {
    let filesystem = rustix::fs::fstatfs(descriptor)
        .map_or_else(|_| "its filesystem".into(), |found| filesystem_name(&found));
    io::Error::new(
        io::ErrorKind::Unsupported,
        format!(
            "`direct_io` is `on`, and {filesystem} refuses direct I/O on `{}`: set it to `auto`",
            path.display()
        ),
    )
}

/// The usual name of a filesystem, by its magic number.
pub(super) fn filesystem_name(found: &rustix::fs::StatFs) -> String {
    // The kernel's type is an `i64` here and an `i32` there; magic numbers have 32 bits.
    let magic = found.f_type & 0xffff_ffff;
    let name = match magic {
        0xef53 => "ext4",
        0x5846_5342 => "xfs",
        0x9123_683e => "btrfs",
        0x0102_1994 => "tmpfs",
        0x8584_58f6 => "ramfs",
        0x794c_7630 => "overlayfs",
        0x6969 => "nfs",
        0x6573_5546 => "fuse",
        0x2fc1_2fc1 => "zfs",
        0xf2f5_2010 => "f2fs",
        0x0bd0_0bd0 => "lustre",
        0x00c3_6400 => "ceph",
        0x4750_4653 => "gpfs",
        0xff53_4d42 => "cifs",
        0xfe53_4d42 => "smb3",
        0x0102_1997 => "9p",
        _ => return format!("filesystem {magic:#x}"),
    };
    name.into()
}

/// Reserves or sets a length.
pub(super) fn set_length(file: &File, length: Length) -> io::Result<()> {
    let descriptor = file.descriptor.as_fd();
    let outcome = match length {
        // The system call refuses a length of zero.
        Length::Reserve(0) => Ok(()),
        // The length grows too: writes beyond the end would each take the inode's lock.
        Length::Reserve(bytes) => {
            match retry_on_intr(|| {
                rustix::fs::fallocate(descriptor, FallocateFlags::empty(), 0, bytes)
            }) {
                Err(Errno::OPNOTSUPP | Errno::NOSYS) => Ok(()),
                outcome => outcome,
            }
        }
        Length::Exact(bytes) => retry_on_intr(|| rustix::fs::ftruncate(descriptor, bytes)),
    };
    Ok(outcome?)
}

/// `fdatasync`, once.
pub(super) fn sync(file: &File) -> io::Result<()> {
    Ok(rustix::fs::fdatasync(&file.descriptor)?)
}

/// Performs an operation on directory entries.
pub(super) fn entry(operation: &EntryOp) -> io::Result<EntryReply> {
    match operation {
        EntryOp::CreateDir(path) => retry_on_intr(|| rustix::fs::mkdir(path, DIRECTORY_MODE))?,
        EntryOp::SyncDir(path) => sync_directory(path)?,
        EntryOp::RenameNew { from, to } => rename_new(from, to)?,
        EntryOp::RenameReplace { from, to } => retry_on_intr(|| rustix::fs::rename(from, to))?,
        EntryOp::RemoveFile(path) => retry_on_intr(|| rustix::fs::unlink(path))?,
        EntryOp::RemoveDir(path) => retry_on_intr(|| rustix::fs::rmdir(path))?,
        EntryOp::List(path) => return list(path),
        EntryOp::Stat(path) => return Ok(EntryReply::Metadata(std::fs::symlink_metadata(path)?)),
        EntryOp::Space(path) => return space(path),
    }
    Ok(EntryReply::Done)
}

/// Owner may do all, others may read.
const DIRECTORY_MODE: Mode = Mode::from_raw_mode(0o755);

fn sync_directory(path: &Path) -> io::Result<()> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory = retry_on_intr(|| rustix::fs::openat(CWD, path, flags, Mode::empty()))?;
    Ok(rustix::fs::fsync(directory)?)
}

fn rename_new(from: &Path, to: &Path) -> io::Result<()> {
    match retry_on_intr(|| rustix::fs::renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE)) {
        // NFS and some FUSE filesystems; kernels before 3.15.
        Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => rename_new_by_link(from, to),
        outcome => Ok(outcome?),
    }
}

/// `link` fails where the target exists, as wanted, and then the old name goes.
fn rename_new_by_link(from: &Path, to: &Path) -> io::Result<()> {
    if let Err(error) = retry_on_intr(|| rustix::fs::link(from, to)) {
        // A network filesystem may do the work, lose the reply, and find the target on its own
        // second try: only the files show it.
        if !is_same_file(from, to) {
            return Err(error.into());
        }
    }
    // The new name stands, which is what was asked. An old name that stays is for the cleaner.
    if let Err(error) = retry_on_intr(|| rustix::fs::unlink(from)) {
        tracing::warn!(path = %from.display(), %error, "a temporary name could not be removed");
    }
    Ok(())
}

fn is_same_file(from: &Path, to: &Path) -> bool {
    let identity = |metadata: Metadata| (metadata.dev(), metadata.ino());
    match (std::fs::symlink_metadata(from), std::fs::symlink_metadata(to)) {
        (Ok(from), Ok(to)) => from.nlink() >= 2 && identity(from) == identity(to),
        _ => false,
    }
}

fn list(path: &Path) -> io::Result<EntryReply> {
    let names = std::fs::read_dir(path)?.map(|entry| entry.map(|entry| entry.file_name()));
    Ok(EntryReply::Names(names.collect::<io::Result<_>>()?))
}

fn space(path: &PathBuf) -> io::Result<EntryReply> {
    let found = retry_on_intr(|| rustix::fs::statvfs(path))?;
    Ok(EntryReply::Space {
        free_bytes: found.f_bavail.saturating_mul(found.f_frsize),
        total_bytes: found.f_blocks.saturating_mul(found.f_frsize),
    })
}

/// One attempt at a transfer, on this thread. A signal does not count as an attempt.
pub(super) fn attempt(transfer: &mut Transfer) -> io::Result<usize> {
    let range = attempt_range(transfer);
    let (descriptor, offset) = (&transfer.file.descriptor, transfer.offset);
    let bytes = &mut transfer.buffer[range];
    let moved = match transfer.direction {
        Direction::Read => retry_on_intr(|| rustix::io::pread(descriptor, &mut *bytes, offset))?,
        Direction::Write => retry_on_intr(|| rustix::io::pwrite(descriptor, &*bytes, offset))?,
    };
    Ok(moved)
}

/// The part of the buffer that one attempt moves.
pub(super) fn attempt_range(transfer: &Transfer) -> std::ops::Range<usize> {
    let start = transfer.range.start;
    start..transfer.range.end.min(start.saturating_add(ATTEMPT_BYTES_MAX))
}

/// The advice to give after `moved_bytes` of `transfer` were moved, as (offset, length) pairs:
/// keeps buffered bulk writes flowing to the device, so that the final sync is short, and keeps
/// them from filling the page cache. `DONTNEED` begins writing what is dirty and drops what is
/// clean.
pub(super) fn write_behind(transfer: &Transfer, moved_bytes: usize) -> Vec<(u64, u64)> {
    let is_bulk = moved_bytes >= BULK_BYTES_MIN;
    if transfer.file.direct || transfer.direction == Direction::Read || !is_bulk {
        return Vec::new();
    }
    let length = moved_bytes as u64;
    let begin_writing = (transfer.offset, length);
    match transfer.offset.checked_sub(WRITE_BEHIND_LAG_BYTES) {
        Some(behind) => vec![begin_writing, (behind, length)],
        None => vec![begin_writing],
    }
}

/// Gives the advice of [`write_behind`] on this thread.
pub(super) fn advise_write_behind(file: &File, advice: &[(u64, u64)]) {
    for &(offset, length) in advice {
        let length = std::num::NonZeroU64::new(length);
        // Advice only: a filesystem without it is slower at the final sync.
        let _ = rustix::fs::fadvise(&file.descriptor, offset, length, Advice::DontNeed);
    }
}

/// Drops what the page cache holds of a synced file, so that reading it meets the device.
pub(super) fn drop_cached(file: &File) {
    // Advice only, as above. No length: to the end.
    let _ = rustix::fs::fadvise(&file.descriptor, 0, None, Advice::DontNeed);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn linking_takes_the_place_of_renaming_where_that_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let (from, to) = (directory.path().join("a.tmp"), directory.path().join("a"));
        std::fs::write(&from, b"new").unwrap();
        rename_new_by_link(&from, &to).unwrap();
        assert_eq!(std::fs::read(&to).unwrap(), b"new");
        assert!(!from.exists());

        std::fs::write(&from, b"other").unwrap();
        let error = rename_new_by_link(&from, &to).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(std::fs::read(&to).unwrap(), b"new", "the target is untouched");
        assert!(from.exists(), "and so is the source");
    }

    #[test]
    fn a_link_whose_reply_was_lost_counts_as_done() {
        let directory = tempfile::tempdir().unwrap();
        let (from, to) = (directory.path().join("a.tmp"), directory.path().join("a"));
        std::fs::write(&from, b"new").unwrap();
        std::fs::hard_link(&from, &to).unwrap();
        rename_new_by_link(&from, &to).unwrap();
        assert!(to.exists() && !from.exists());
    }

    #[test]
    fn only_regular_files_open_and_links_are_not_followed() {
        let directory = tempfile::tempdir().unwrap();
        let fifo = directory.path().join("fifo");
        rustix::fs::mknodat(CWD, &fifo, FileType::Fifo, Mode::RUSR, 0).unwrap();
        let error = open(&fifo, OpenMode::Read, DirectIo::Auto).unwrap_err();
        assert!(error.to_string().contains("not a regular file"), "{error}");

        let link = directory.path().join("link");
        std::os::unix::fs::symlink(directory.path().join("target"), &link).unwrap();
        for mode in [OpenMode::Read, OpenMode::Create, OpenMode::CreateSmall] {
            assert!(open(&link, mode, DirectIo::Off).is_err(), "{mode:?}");
        }
    }

    #[test]
    fn small_files_are_never_direct() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("small");
        assert!(!open(&path, OpenMode::CreateSmall, DirectIo::On).unwrap().direct);
        assert!(!open(&path, OpenMode::ReadSmall, DirectIo::On).unwrap().direct);
    }
}
