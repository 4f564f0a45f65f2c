//! The draft that whoever writes an export holds locked, from the first byte to the last name.
//!
//! Always holds: two processes do not write exports of one name at a time; unless it was published,
//! it goes with the process, or is taken over from one that was killed.

use std::fs::{File, TryLockError};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use dtr_engine::error::IoContext;
use dtr_engine::{EngineError, Result};
use rustix::fs::OFlags;

use super::draft::open_carefully;

/// A locked file, removed unless it gets another name.
#[derive(Debug)]
pub(super) struct Lead {
    file: File,
    path: PathBuf,
    is_published: bool,
}

impl Lead {
    pub(super) fn create(path: PathBuf) -> Result<Self> {
        loop {
            let file = open_carefully(&path, OFlags::CREATE).context("creating", &path)?;
            file.try_lock().map_err(|error| busy(&path, error))?;
            // Whoever held the lock may have published the file, or removed it.
            if is_still(&file, &path).context("looking at", &path)? {
                file.set_len(0).context("emptying", &path)?;
                return Ok(Self { file, path, is_published: false });
            }
        }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Makes these bytes all it holds, durably.
    pub(super) fn fill(&self, bytes: &[u8]) -> Result<()> {
        self.file.write_all_at(bytes, 0).context("writing", &self.path)?;
        self.file.sync_all().context("syncing", &self.path)
    }

    /// It has its name: what is called as it was is another process's.
    pub(super) fn set_published(&mut self) {
        self.is_published = true;
    }
}

impl Drop for Lead {
    fn drop(&mut self) {
        if !self.is_published {
            // One that cannot be removed is taken over by the next process.
            let _left = std::fs::remove_file(&self.path);
        }
    }
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
