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
use crate::format::FormatError;
use crate::format::manifest::{MANIFEST_BYTES_MAX, Manifest};
use crate::format::names::{self, AttemptId};
use crate::io::EntryOp;
use crate::store::Publication;
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
        let temporary = directory.join(names::manifest_temporary_name(attempt));
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

/// What a publication finds in its place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Standing {
    /// Nothing.
    Nothing,
    /// A manifest of the attempt that asks.
    Ours,
    /// A manifest of another attempt.
    Other(String),
    /// A manifest that does not decode, or of another step: no checkpoint.
    Damaged(String),
    /// A manifest by a newer version.
    Newer(String),
}

impl Standing {
    /// Whether it may name the files of the attempt that asked.
    pub(super) fn may_be_ours(&self) -> bool {
        match self {
            Self::Nothing | Self::Other(_) => false,
            Self::Ours | Self::Damaged(_) | Self::Newer(_) => true,
        }
    }
}

/// What stands at a step, as seen by `attempt`.
pub(super) fn standing(shared: &Shared, step: u64, attempt: AttemptId) -> Result<Standing> {
    let path = shared.step_directory(step).join(names::MANIFEST_FILE);
    let Some(bytes) = record::read(&shared.io, &path, MANIFEST_BYTES_MAX)? else {
        return Ok(Standing::Nothing);
    };
    Ok(match Manifest::decode(&bytes) {
        Ok(manifest) if manifest.step != step => {
            Standing::Damaged(format!("it is the manifest of step {}", manifest.step))
        }
        Ok(manifest) if manifest.attempt == attempt.to_string() => Standing::Ours,
        Ok(manifest) => Standing::Other(manifest.attempt),
        Err(FormatError::Damaged(why)) => Standing::Damaged(why),
        Err(FormatError::Newer(why)) => Standing::Newer(why),
    })
}

/// How a manifest takes its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Action {
    /// It stands already.
    Nothing,
    /// In an empty place, only.
    New,
    /// In the place of another.
    Replace,
}

fn decide(standing: &Standing, publication: Publication<'_>) -> Result<Action> {
    let Publication { step, replaces, .. } = publication;
    match (standing, replaces) {
        (Standing::Ours, _) => Ok(Action::Nothing),
        (Standing::Nothing, None) => Ok(Action::New),
        (Standing::Other(other), Some(replaces)) if *other == replaces.to_string() => {
            Ok(Action::Replace)
        }
        // It makes no checkpoint, so nothing that exists is lost.
        (Standing::Damaged(why), _) => {
            tracing::warn!(step, why, "a damaged manifest is replaced");
            Ok(Action::Replace)
        }
        (Standing::Nothing, Some(replaces)) => {
            Err(conflict(step, format!("attempt {replaces}, which it was to replace, is gone")))
        }
        (Standing::Other(other), _) => {
            Err(conflict(step, format!("attempt {other} committed it first")))
        }
        (Standing::Newer(why), _) => Err(EngineError::UnsupportedFormat {
            what: format!("publishing step {step}"),
            why: format!("a newer version committed it: {why}"),
            hint: "save another step, or upgrade dtruntime".into(),
        }),
    }
}

fn conflict(step: u64, why: String) -> EngineError {
    EngineError::StepConflict {
        what: format!("publishing step {step}"),
        why,
        hint: "list the store again, then save a later step, or this one with `rewind=True`".into(),
    }
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
                    "it has {} bytes just before it is published, and {expected_bytes} were \
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
