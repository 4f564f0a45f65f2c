//! What a publication finds in its place, and what it may do there: pure, the same for every store.
//!
//! Always holds: a manifest that makes a checkpoint is replaced only by a publication that names
//! its attempt; one by a newer version never.

use super::Publication;
use crate::format::FormatError;
use crate::format::manifest::Manifest;
use crate::format::names::AttemptId;
use crate::{EngineError, Result};

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
    /// What a manifest at `step` is to `attempt`.
    pub(super) fn of(manifest: Option<&[u8]>, step: u64, attempt: AttemptId) -> Self {
        let Some(bytes) = manifest else { return Self::Nothing };
        match Manifest::decode(bytes) {
            Ok(manifest) if manifest.step != step => {
                Self::Damaged(format!("it is the manifest of step {}", manifest.step))
            }
            Ok(manifest) if manifest.attempt == attempt.to_string() => Self::Ours,
            Ok(manifest) => Self::Other(manifest.attempt),
            Err(FormatError::Damaged(why)) => Self::Damaged(why),
            Err(FormatError::Newer(why)) => Self::Newer(why),
        }
    }

    /// Whether it may name the files of the attempt that asked.
    pub(super) fn may_be_ours(&self) -> bool {
        match self {
            Self::Nothing | Self::Other(_) => false,
            Self::Ours | Self::Damaged(_) | Self::Newer(_) => true,
        }
    }
}

/// How a manifest takes its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Action {
    /// It stands already.
    Nothing,
    /// In an empty place, only.
    New,
    /// In the place of another.
    Replace,
}

/// What to do, or why not.
pub(super) fn decide(standing: &Standing, publication: Publication<'_>) -> Result<Action> {
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
