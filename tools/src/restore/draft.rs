//! A file that is written under another name, until it is whole.
//!
//! Always holds: the file gets its name only when it is whole and durable; what fails leaves
//! nothing behind.

use std::fs::{File, TryLockError};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use dtr_engine::config::{DirectIo, IoBackend};
use dtr_engine::error::IoContext;
use dtr_engine::io::{EntryOp, open_backend};
use dtr_engine::{EngineError, Result};
use rustix::fs::{FallocateFlags, Mode, OFlags};

use crate::text;

/// A file under a name of its own, locked, and removed unless it is published. One that a process
/// left which was killed is written anew.
pub(super) struct Draft {
    file: File,
    path: PathBuf,
}

impl Draft {
    pub(super) fn create(output: &Path) -> Result<Self> {
        let name = output.file_name().unwrap_or_default().to_string_lossy();
        let path = output.with_file_name(format!(".{name}.tmp"));
        loop {
            let file = create_or_open(&path).context("creating", &path)?;
            file.try_lock().map_err(|error| busy(&path, error))?;
            // Whoever held the lock may have published the file, or removed it.
            if is_still(&file, &path).context("looking at", &path)? {
                file.set_len(0).context("emptying", &path)?;
                return Ok(Self { file, path });
            }
        }
    }

    /// Takes the room that is needed, where the file system can: a disk that is too small is told
    /// at once.
    pub(super) fn allocate(&self, bytes: u64) -> Result<()> {
        let allocate = || rustix::fs::fallocate(&self.file, FallocateFlags::empty(), 0, bytes);
        match rustix::io::retry_on_intr(allocate) {
            Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => Ok(()),
            done => {
                let done = done.map_err(io::Error::from).context("allocating room for", &self.path);
                done.map_err(|error| no_room(error, bytes))
            }
        }
    }

    pub(super) fn write(&self, at: u64, bytes: &[u8]) -> Result<()> {
        self.file.write_all_at(bytes, at).context("writing", &self.path)
    }

    pub(super) fn read(&self, at: u64, bytes: &mut [u8]) -> Result<()> {
        self.file.read_exact_at(bytes, at).context("reading back", &self.path)
    }

    /// Makes it durable and gives it its name.
    pub(super) fn publish(&self, output: &Path, replace: bool) -> Result<()> {
        self.file.sync_all().context("syncing", &self.path)?;
        let io = open_backend(IoBackend::Threads, DirectIo::Off)?;
        let (from, to) = (self.path.clone(), output.to_owned());
        let rename = if replace {
            EntryOp::RenameReplace { from, to }
        } else {
            EntryOp::RenameNew { from, to }
        };
        io.entry(&rename).context("renaming the finished file to", output)?;
        let parent = match output.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        io.entry(&EntryOp::SyncDir(parent.into())).context("syncing directory", parent)?;
        Ok(())
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        // Once published, there is nothing of this name.
        let _published = std::fs::remove_file(&self.path);
    }
}

/// The engine's advice is for stores; this is a file, of so many bytes.
fn no_room(error: EngineError, bytes: u64) -> EngineError {
    match error {
        EngineError::NoSpace { what, why, .. } => EngineError::NoSpace {
            what,
            why: format!("{why}, and it takes {}", text::bytes(bytes)),
            hint: "free space there, name a file on another disk, or choose fewer `--tensors`"
                .into(),
        },
        other => other,
    }
}

/// Through no link, and without waiting for whoever may read a pipe.
fn create_or_open(path: &Path) -> io::Result<File> {
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC;
    let careful = OFlags::NOFOLLOW | OFlags::NONBLOCK;
    Ok(rustix::fs::open(path, flags | careful, Mode::from_raw_mode(0o666))?.into())
}

/// Whether `path` names this file.
fn is_still(file: &File, path: &Path) -> io::Result<bool> {
    let ours = file.metadata()?;
    match std::fs::symlink_metadata(path) {
        Ok(there) => Ok((there.dev(), there.ino()) == (ours.dev(), ours.ino())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

fn busy(path: &Path, error: TryLockError) -> EngineError {
    match error {
        TryLockError::WouldBlock => EngineError::StoreBusy {
            what: format!("writing `{}`", path.display()),
            why: "another process writes it".into(),
            hint: "wait for that process or stop it, or choose another name".into(),
        },
        TryLockError::Error(error) => EngineError::from_io("locking", path, error),
    }
}
