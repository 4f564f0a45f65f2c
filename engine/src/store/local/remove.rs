//! Deleting checkpoints and what dead attempts left.
//!
//! Always holds:
//! - Nothing goes before every manifest that can be seen is durable. A process that was killed may
//!   have renamed one and not synced it: what it retires or replaces goes because of it, and would
//!   be missed if the power failed and the manifest were not there after all.
//! - A checkpoint's manifest is gone, durably, before the first of its shards goes: none is ever
//!   seen with shards missing because it is being deleted.
//! - A shard goes only under its own lock, and an orphan only if no manifest that stands names it.
//! - A name is gone when this returns; its space, where it is asked for [`Space::Later`], is given
//!   back by [`reclaim`]: a filesystem does it when the last descriptor on the file, here that of
//!   its lock, is closed.
//! - Files with names of others stay, and so does the directory that holds them.

use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::path::Path;
use std::sync::atomic::Ordering;

use super::lock::{Lock, LockFile, lock_error};
use super::{Shared, is_directory, is_own_name, list_own_names, publish, stat_file};
use crate::format::names::{self, AttemptId};
use crate::io::EntryOp;
use crate::store::publication::Standing;
use crate::store::{ShardId, Space};
use crate::{EngineError, Result};

/// Most files without a name that wait for [`reclaim`]: each has a descriptor.
pub(super) const DELETED_MAX: usize = 64;

/// What waits for [`reclaim`].
#[derive(Debug, Default)]
pub(super) struct Deleted {
    /// Of files without a name that still take space.
    pub(super) locks: Vec<Lock>,
    /// Steps whose directory could not be deleted: NFS and FUSE keep a name for a file that is
    /// open.
    steps: BTreeSet<u64>,
}

/// Frees the space of what was deleted for [`Space::Later`].
pub(super) fn reclaim(shared: &Shared) {
    if !shared.locks.in_owner() {
        return;
    }
    let mut deleted = shared.deleted();
    deleted.locks.clear();
    for step in std::mem::take(&mut deleted.steps) {
        if let Err(error) = remove_empty_step(shared, step) {
            tracing::warn!(step, %error, "an empty step directory stays behind");
        }
    }
}

/// Deletes a step's directory if nothing is in it, now or when the space is freed.
fn remove_step(shared: &Shared, step: u64, space: Space) -> Result<()> {
    let is_gone = remove_empty_step(shared, step)?;
    if !is_gone && space == Space::Later {
        shared.deleted().steps.insert(step);
    }
    Ok(())
}

/// Deletes a checkpoint; see [`crate::store::Store::remove_checkpoint`].
pub(super) fn remove_checkpoint(
    shared: &Shared,
    step: u64,
    only: Option<AttemptId>,
    space: Space,
) -> Result<u64> {
    let directory = shared.step_directory(step);
    let Some(names) = list_own_names(&*shared.io, &directory)? else {
        return Ok(0);
    };
    settle(shared)?;
    let mut freed_bytes = {
        let _changes = shared.changes();
        if let Some(attempt) = only
            && publish::standing(shared, step, attempt)? != Standing::Ours
        {
            return Ok(0);
        }
        remove_file(shared, &directory.join(names::MANIFEST_FILE))?
    };
    // Even if there was none: the process that deleted it may have died before this.
    sync_if_there(shared, &directory)?;
    for name in names.iter().filter(|name| *name != names::MANIFEST_FILE) {
        // One that is locked belongs to an attempt that runs: it goes or is committed by itself.
        let freed = remove_unlocked(shared, (step, name), space, || Ok(true))?;
        freed_bytes += freed.unwrap_or(0);
    }
    remove_step(shared, step, space)?;
    Ok(freed_bytes)
}

/// Deletes a file that no manifest names; see [`crate::store::Store::remove_orphan`].
pub(super) fn remove_orphan(
    shared: &Shared,
    step: u64,
    file: &str,
    space: Space,
) -> Result<Option<u64>> {
    if !is_own_name(file) || file == names::MANIFEST_FILE {
        return Err(EngineError::invalid(
            format!("deleting file `{file}` of step {step}"),
            "it is neither a shard nor a temporary manifest by its name",
            "delete it manually if it is not needed",
        ));
    }
    let directory = shared.step_directory(step);
    if !is_directory(&*shared.io, &directory)? {
        return Ok(Some(0));
    }
    settle(shared)?;
    let freed_bytes = if let Some((_, attempt)) = names::parse_shard_file(file) {
        // Asked under the lock: an attempt publishes before it unlocks its shard.
        remove_unlocked(shared, (step, file), space, || {
            Ok(!publish::standing(shared, step, attempt)?.may_be_ours())
        })?
    } else {
        let _changes = shared.changes();
        Some(remove_file(shared, &directory.join(file))?)
    };
    if freed_bytes.is_some() {
        remove_step(shared, step, space)?;
    }
    Ok(freed_bytes)
}

/// Makes room for a shard that an earlier process may have begun to write and that no manifest
/// names.
pub(super) fn remove_begun(shared: &Shared, id: ShardId) -> Result<()> {
    let ShardId { step, rank, attempt } = id;
    if stat_file(&*shared.io, &shared.shard_path(id))?.is_none() {
        return Ok(());
    }
    let file = names::shard_file_name(rank, attempt);
    if remove_orphan(shared, step, &file, Space::Now)?.is_some() {
        return Ok(());
    }
    let what = format!("rewriting `{}`", shared.shard_path(id).display());
    if publish::standing(shared, step, attempt)? == Standing::Ours {
        return Err(EngineError::StepConflict {
            what,
            why: "the checkpoint exists there, but this file of it is damaged".into(),
            hint: "remove that file, then copy again: only what is missing is copied".into(),
        });
    }
    Err(EngineError::StoreBusy {
        what,
        why: "an earlier copy left it behind, and another process holds its lock or a manifest \
              beside it may name it"
            .into(),
        hint: format!(
            "wait for that process or stop it; if the manifest is damaged, delete step {step} \
             there, then copy again"
        ),
    })
}

/// Makes durable, once, what earlier processes published. Our own publications are durable unless
/// they failed, and then this is done again.
fn settle(shared: &Shared) -> Result<()> {
    if shared.settled.load(Ordering::Acquire) {
        return Ok(());
    }
    for step in shared.steps()? {
        let directory = shared.step_directory(step);
        if is_directory(&*shared.io, &directory)? {
            sync_if_there(shared, &directory)?;
        }
    }
    shared.settled.store(true, Ordering::Release);
    Ok(())
}

/// Makes a step's directory durable. Another rank that deletes the same checkpoint may have removed
/// it meanwhile, and then there is nothing to make durable.
fn sync_if_there(shared: &Shared, directory: &Path) -> Result<()> {
    match shared.sync_directory(directory) {
        Err(EngineError::Io { source, .. }) if source.kind() == ErrorKind::NotFound => Ok(()),
        synced => synced,
    }
}

/// Deletes a step's directory if nothing is in it. Returns whether it is gone.
pub(super) fn remove_empty_step(shared: &Shared, step: u64) -> Result<bool> {
    let directory = shared.step_directory(step);
    match shared.io.entry(&EntryOp::RemoveDir(directory.clone())) {
        Ok(_) => shared.sync_directory(&shared.path).map(|()| true),
        Err(error) => match error.kind() {
            // Busy: some network filesystems say so while a file in it is open.
            ErrorKind::DirectoryNotEmpty | ErrorKind::ResourceBusy => Ok(false),
            ErrorKind::NotFound => Ok(true),
            _ => Err(EngineError::from_io("deleting directory", &directory, error)),
        },
    }
}

/// Deletes a file if nobody holds its lock and, asked under the lock, `allowed` says so. Returns
/// the bytes freed; `None` if it stays.
fn remove_unlocked(
    shared: &Shared,
    (step, file): (u64, &str),
    space: Space,
    allowed: impl FnOnce() -> Result<bool>,
) -> Result<Option<u64>> {
    let path = &shared.step_directory(step).join(file);
    if stat_file(&*shared.io, path)?.is_none() {
        return Ok(Some(0));
    }
    let lock = {
        let _changes = shared.changes();
        match shared.locks.try_lock(path, LockFile::Existing) {
            Ok(Some(lock)) => lock,
            Ok(None) => return Ok(None),
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Some(0)),
            Err(error) => return Err(lock_error("locking", path, error)),
        }
    };
    if !allowed()? {
        return Ok(None);
    }
    let freed_bytes = remove_file(shared, path)?;
    if space == Space::Later {
        let mut deleted = shared.deleted();
        if deleted.locks.len() < DELETED_MAX {
            deleted.locks.push(lock);
        }
    }
    Ok(Some(freed_bytes))
}

/// Deletes a file of ours. Returns its bytes, 0 if it was not there.
fn remove_file(shared: &Shared, path: &Path) -> Result<u64> {
    let Some(metadata) = stat_file(&*shared.io, path)? else {
        return Ok(0);
    };
    match shared.io.entry(&EntryOp::RemoveFile(path.into())) {
        Ok(_) => Ok(metadata.len()),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(0),
        Err(error) => Err(EngineError::from_io("deleting", path, error)),
    }
}
