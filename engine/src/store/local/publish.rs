//! The commit: a manifest becomes visible, once, whole and for good.
//!
//! ```text
//! shards there? -> what stands? -> manifest.json.<attempt>.tmp -> sync -> rename -> sync directory
//!                                                                           ^
//!                                                         the checkpoint exists from here on
//! ```
//!
//! Always holds: `manifest.json` is whole whenever it is visible; one that makes a checkpoint is
//! replaced only by a publication that names its attempt; whatever the rename says, what stands
//! afterwards decides.

use std::io::ErrorKind;
use std::path::Path;
use std::sync::atomic::Ordering;

use super::{Shared, record, stat_file};
use crate::error::IoContext;
use crate::format::manifest::MANIFEST_BYTES_MAX;
use crate::format::names::{self, AttemptId};
use crate::io::EntryOp;
use crate::store::Publication;
use crate::store::publication::{Action, Standing, decide};
use crate::{EngineError, Result};

/// Publishes; see [`crate::store::Store::publish`].
pub(super) fn publish(shared: &Shared, publication: Publication<'_>) -> Result<()> {
    let Publication { step, attempt, .. } = publication;
    let _changes = shared.changes();
    check_shards(shared, publication)?;
    let directory = shared.step_directory(step);
    let manifest = directory.join(names::MANIFEST_FILE);
    let action = decide(&standing(shared, step, attempt)?, publication)?;
    if action != Action::Nothing {
        let temporary = directory.join(names::manifest_temporary_name_of(attempt, shared.rank));
        let outcome = record::write_new(&shared.io, &temporary, publication.manifest)
            .and_then(|()| rename(shared, publication, (&temporary, &manifest), action));
        if let Err(error) = outcome {
            discard(shared, &temporary);
            return Err(error);
        }
    }
    shared.io.entry(&EntryOp::SyncDir(directory)).map(drop).map_err(|source| {
        shared.settled.store(false, Ordering::Release);
        EngineError::Io {
            what: format!("syncing the directory of `{}`, just published", manifest.display()),
            source,
            hint: format!(
                "step {step} is visible, and may or may not survive a power loss: look at the \
                 kernel log (`dmesg`) and the device, then save a later step; earlier checkpoints \
                 are untouched"
            ),
        }
    })
}

/// Takes a manifest back; see [`crate::store::Store::unpublish`].
pub(super) fn unpublish(
    shared: &Shared,
    (step, attempt): (u64, AttemptId),
    replaced: Option<&[u8]>,
) -> Result<()> {
    let _changes = shared.changes();
    let directory = shared.step_directory(step);
    let manifest = directory.join(names::MANIFEST_FILE);
    // Another rank with the same directory may have been faster.
    let stands = match standing(shared, step, attempt)? {
        Standing::Ours => true,
        Standing::Nothing => false,
        Standing::Other(_) | Standing::Damaged(_) | Standing::Newer(_) => return Ok(()),
    };
    let operation = match replaced {
        Some(bytes) => {
            let from = directory.join(names::manifest_temporary_name_of(attempt, shared.rank));
            record::write_new(&shared.io, &from, bytes)?;
            if stands {
                EntryOp::RenameReplace { from, to: manifest.clone() }
            } else {
                EntryOp::RenameNew { from, to: manifest.clone() }
            }
        }
        None if stands => EntryOp::RemoveFile(manifest.clone()),
        None => return Ok(()),
    };
    match shared.io.entry(&operation) {
        Ok(_) => shared.sync_directory(&directory),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {
            if let EntryOp::RenameNew { from, .. } = &operation {
                discard(shared, from);
            }
            Ok(())
        }
        Err(error) => Err(EngineError::from_io("taking back", &manifest, error)),
    }
}

/// What stands at a step, as seen by `attempt`.
pub(super) fn standing(shared: &Shared, step: u64, attempt: AttemptId) -> Result<Standing> {
    let path = shared.step_directory(step).join(names::MANIFEST_FILE);
    let bytes = record::read(&shared.io, &path, MANIFEST_BYTES_MAX)?;
    Ok(Standing::of(bytes.as_deref(), step, attempt))
}

fn check_shards(shared: &Shared, publication: Publication<'_>) -> Result<()> {
    for (shard, expected_bytes) in publication.shards {
        let path = shared.shard_path(*shard);
        let Some(metadata) = stat_file(&*shared.io, &path)? else {
            let gone = std::io::Error::from(ErrorKind::NotFound);
            return Err(EngineError::from_io("publishing a manifest that names", &path, gone));
        };
        if metadata.len() != *expected_bytes {
            return Err(EngineError::corrupt(
                path.display(),
                format!(
                    "it has {} bytes just before it is published, but {expected_bytes} were \
                     written",
                    metadata.len()
                ),
            ));
        }
    }
    Ok(())
}

fn rename(
    shared: &Shared,
    publication: Publication<'_>,
    (temporary, manifest): (&Path, &Path),
    action: Action,
) -> Result<()> {
    let (from, to) = (temporary.into(), manifest.into());
    let operation = match action {
        Action::Nothing => return Ok(()),
        Action::New => EntryOp::RenameNew { from, to },
        Action::Replace => EntryOp::RenameReplace { from, to },
    };
    let Err(error) = shared.io.entry(&operation) else {
        return Ok(());
    };
    // The reply may be lost and the deed done, and another writer may have been faster.
    let after = standing(shared, publication.step, publication.attempt)?;
    if after == Standing::Ours {
        discard(shared, temporary);
        return Ok(());
    }
    if error.kind() == ErrorKind::AlreadyExists {
        decide(&after, publication)?;
    }
    Err(error).context("publishing", manifest)
}

/// Deletes the temporary manifest, if it is still there.
fn discard(shared: &Shared, temporary: &Path) {
    match shared.io.entry(&EntryOp::RemoveFile(temporary.into())) {
        Ok(_) => {}
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        Err(error) => {
            tracing::warn!(path = %temporary.display(), %error, "a temporary manifest stays \
                behind");
        }
    }
}
