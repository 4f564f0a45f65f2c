//! The directory that a store is: found by a reader, made by a writer.
//!
//! Always holds: when a writer has opened it, it exists and its name is durable, and so are those
//! of the parents that were made for it.

use std::io::ErrorKind;
use std::path::Path;

use crate::error::IoContext;
use crate::io::{EntryOp, Io};
use crate::{EngineError, Result};

/// Creates a directory with its parents, each durable in its own parent.
pub(super) fn create_directories(io: &dyn Io, path: &Path) -> Result<()> {
    let mut missing: Vec<&Path> = Vec::new();
    for ancestor in path.ancestors() {
        match io.entry(&EntryOp::CreateDir(ancestor.into())) {
            Ok(_) => {
                sync_parent(io, ancestor)?;
                break;
            }
            Err(error) if error.kind() == ErrorKind::NotFound => missing.push(ancestor),
            Err(error) if is_there(ancestor, error.kind()) => {
                check_directory(ancestor)?;
                sync_parent_of_existing(io, ancestor)?;
                break;
            }
            Err(error) => return Err(EngineError::from_io("creating directory", ancestor, error)),
        }
    }
    for directory in missing.into_iter().rev() {
        match io.entry(&EntryOp::CreateDir(directory.into())) {
            Err(error) if error.kind() != ErrorKind::AlreadyExists => {
                return Err(EngineError::from_io("creating directory", directory, error));
            }
            _ => sync_parent(io, directory)?,
        }
    }
    Ok(())
}

/// Whether what could not be created exists. NFS may ask for the right to create in the parent
/// before it looks.
fn is_there(path: &Path, refusal: ErrorKind) -> bool {
    match refusal {
        ErrorKind::AlreadyExists => true,
        ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem => path.is_dir(),
        _ => false,
    }
}

fn sync_parent(io: &dyn Io, path: &Path) -> Result<()> {
    let Some(parent) = path.parent() else {
        return Ok(());
    };
    io.entry(&EntryOp::SyncDir(parent.into())).context("syncing directory", parent)?;
    Ok(())
}

/// The process that created the directory may have died before it was durable; of several that were
/// created one after the other, only the deepest can be such. Where the parent cannot be synced at
/// all, nobody can have created anything in it just now.
fn sync_parent_of_existing(io: &dyn Io, path: &Path) -> Result<()> {
    let Some(parent) = path.parent() else {
        return Ok(());
    };
    match io.entry(&EntryOp::SyncDir(parent.into())) {
        Ok(_) => Ok(()),
        Err(error) => match error.kind() {
            ErrorKind::PermissionDenied
            | ErrorKind::ReadOnlyFilesystem
            | ErrorKind::InvalidInput
            | ErrorKind::Unsupported => {
                tracing::debug!(path = %parent.display(), %error, "the store's parent is not \
                    synced");
                Ok(())
            }
            _ => Err(EngineError::from_io("syncing directory", parent, error)),
        },
    }
}

/// Checks that a store exists. Here, and only here, symbolic links are followed: the user chose the
/// path.
pub(super) fn check_directory(path: &Path) -> Result<()> {
    match std::fs::metadata(path) {
        Ok(metadata) if metadata.is_dir() => Ok(()),
        Ok(_) => Err(EngineError::invalid(
            format!("opening store `{}`", path.display()),
            "it is a file, but a store is a directory",
            "choose another path",
        )),
        Err(error) if error.kind() == ErrorKind::NotFound => Err(missing_store(path)),
        Err(error) => Err(EngineError::from_io("opening store", path, error)),
    }
}

pub(super) fn missing_store(path: &Path) -> EngineError {
    EngineError::NotFound {
        what: format!("opening store `{}`", path.display()),
        why: "there is no such directory".into(),
        hint: "check the path, or open it for writing once, which creates it".into(),
    }
}
