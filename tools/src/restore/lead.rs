//! The draft that the process that writes an export holds locked, from the first byte to the last
//! name.
//!
//! Always holds: two processes do not write exports of one name at a time; it goes with the process
//! that made it, or is taken over from one that was killed; nothing is ever written to it.

use std::fs::{File, TryLockError};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use dtr_engine::error::IoContext;
use dtr_engine::{EngineError, Result};
use rustix::fs::OFlags;

use super::draft::open_hidden;

/// A locked file, removed before it is unlocked.
#[derive(Debug)]
pub(super) struct Lead {
    _locked: File,
    path: PathBuf,
}

impl Lead {
    pub(super) fn create(path: PathBuf) -> Result<Self> {
        loop {
            let file = open_hidden(&path, OFlags::CREATE)?;
            file.try_lock().map_err(|error| busy(&path, error))?;
            // The process that held the lock may have removed the file.
            if is_still(&file, &path).context("looking at", &path)? {
                return Ok(Self { _locked: file, path });
            }
        }
    }
}

impl Drop for Lead {
    fn drop(&mut self) {
        // One that cannot be removed is taken over by the next process.
        let _left = std::fs::remove_file(&self.path);
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
