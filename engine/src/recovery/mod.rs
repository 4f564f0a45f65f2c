//! What a listing means: which checkpoints exist, which are damaged, and which files nobody needs.
//!
//! Pure: from a listing and the manifests read after it to a [`Survey`]; it touches no store.
//!
//! ```text
//! a directory that cannot be listed ...................... Damaged
//! no manifest in the listing ............................. Incomplete   never existed
//! a manifest by a newer version .......................... Newer        exists, not for us
//! a manifest that does not decode, or of another step .... Damaged
//!   named in `retired` of an earlier step that stands .... Retired      existed, ceased to
//!     a shard missing or of another length ............... Damaged
//!       all there ........................................ Committed    exists
//! ```
//!
//! Always holds:
//! - A step is committed only if every shard that its manifest names is listed with its exact
//!   length, and no standing manifest retires that very attempt. To a rank with a store of its own,
//!   which need not hold the shards of others, its own shard is what counts.
//! - A manifest *stands* if it decodes, is of its directory's step, and is not itself retired.
//!   Only earlier steps retire later ones, so one ascending pass decides all chains. Losing a shard
//!   does not undo a retirement: what ceased to exist does not come back. Nor does losing the
//!   manifest that said so: each save says it again, until training has gone past the step.
//! - A file is an orphan only where it is known what the step's manifest names: a step whose
//!   manifest cannot be read has no orphans.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::SystemTime;

use crate::format::manifest::{Manifest, Retired, total_bytes};
use crate::format::names::{self, AttemptId};
use crate::store::StepListing;

mod rules;
#[cfg(test)]
mod tests;

pub(crate) use rules::{check_copy, check_save};

/// What reading a step's manifest gave.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum ManifestState {
    /// There is none.
    Absent,
    /// It decodes. Shared: it may name thousands of shards, and every look at a store passes it on.
    Valid(Arc<Manifest>),
    /// It does not, because of this.
    Damaged(String),
    /// It was written by a newer version that says this.
    Newer(String),
}

/// What exists in a store, as of one listing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Survey {
    /// Every step directory, by ascending step.
    pub steps: Vec<StepSurvey>,
    /// Later checkpoints that standing manifests list as discarded, whether they are seen here
    /// or not, by ascending step: each once.
    pub ceased: Vec<Retired>,
}

/// What a step directory holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StepSurvey {
    /// The step.
    pub step: u64,
    /// Whether a checkpoint exists there.
    pub state: StepState,
    /// The attempt whose manifest is there, if that decodes.
    pub attempt: Option<AttemptId>,
    /// When that attempt began, by its manifest; 0 if that does not decode.
    pub created_unix_ms: u64,
    /// Bytes of its files, orphans included.
    pub bytes: u64,
    /// Files that no manifest names.
    pub orphans: Vec<OrphanFile>,
}

/// Whether a checkpoint exists.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StepState {
    /// It exists: the manifest stands and its shards are complete.
    Committed,
    /// It was discarded when the manifest of step `by` was published.
    Retired {
        /// The earlier step that the training went back to.
        by: u64,
    },
    /// It was committed and cannot be restored now.
    Damaged {
        /// Expected against actual.
        why: String,
    },
    /// It was written by a newer version.
    Newer {
        /// What is not understood.
        why: String,
    },
    /// It was never committed: no manifest.
    Incomplete,
}

/// A file that no manifest names: of an attempt that died, was replaced, or still runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OrphanFile {
    /// The step.
    pub step: u64,
    /// Its name in the step's directory.
    pub file: String,
    /// Its length.
    pub bytes: u64,
    /// When it, or the manifest that took its place, was last written: its age counts from here.
    pub idle_since: SystemTime,
}

/// The part that a rank with a store of its own answers for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct OwnShare {
    /// The rank.
    pub(crate) rank: u32,
    /// Among how many.
    pub(crate) world_size: u32,
}

impl OwnShare {
    /// Whether a shard of `manifest` may be elsewhere.
    pub(crate) fn may_miss(self, manifest: &Manifest, rank: u32) -> bool {
        manifest.world_size == self.world_size && rank != self.rank
    }
}

/// Decides what exists. `manifests` were read after `listing` was taken; one that the listing does
/// not show yet is left for the next survey. `share` is of a rank with a store of its own.
pub(crate) fn survey(
    listing: &[StepListing],
    manifests: &BTreeMap<u64, ManifestState>,
    share: Option<OwnShare>,
) -> Survey {
    let standing = legible(listing, manifests);
    let retired = retirements(&standing);
    let mut steps: Vec<StepSurvey> = listing
        .iter()
        .map(|directory| {
            let manifest = standing.get(&directory.step).copied();
            let by = retired.get(&directory.step).copied();
            let read = manifests.get(&directory.step);
            let state = step_state(directory, (read, manifest), by, share);
            StepSurvey {
                step: directory.step,
                attempt: manifest.and_then(|manifest| manifest.attempt_id().ok()),
                created_unix_ms: manifest.map_or(0, |manifest| manifest.created_unix_ms),
                bytes: total_bytes(directory.files.iter().map(|file| file.bytes)),
                orphans: orphans(directory, manifest, &state),
                state,
            }
        })
        .collect();
    steps.sort_by_key(|step| step.step);
    let stands = |(step, _): &(&u64, &&Manifest)| !retired.contains_key(step);
    let said = standing
        .iter()
        .filter(stands)
        .flat_map(|(step, manifest)| manifest.retired.iter().filter(|entry| entry.step > *step));
    Survey { steps, ceased: in_order(said) }
}

/// Each once, by ascending step.
pub(crate) fn in_order<'a>(retired: impl Iterator<Item = &'a Retired>) -> Vec<Retired> {
    let once: BTreeSet<(u64, &str)> =
        retired.map(|entry| (entry.step, entry.attempt.as_str())).collect();
    once.into_iter().map(|(step, attempt)| Retired { attempt: attempt.into(), step }).collect()
}

impl Survey {
    /// Steps that exist, ascending.
    pub fn committed_steps(&self) -> Vec<u64> {
        self.steps_where(|step| step.state == StepState::Committed).collect()
    }

    /// The newest step that exists.
    pub fn newest(&self) -> Option<u64> {
        self.steps_where(|step| step.state == StepState::Committed).next_back()
    }

    /// What one step's directory holds; `None` if there is no such directory.
    pub fn step(&self, step: u64) -> Option<&StepSurvey> {
        let position = self.steps.binary_search_by_key(&step, |survey| survey.step).ok()?;
        self.steps.get(position)
    }

    /// Whether a step was discarded, and its files are still there.
    pub(crate) fn is_retired(&self, step: u64) -> bool {
        self.step(step).is_some_and(StepSurvey::is_retired)
    }

    /// Steps that were discarded and whose files are still there, ascending.
    pub(crate) fn retired_steps(&self) -> Vec<u64> {
        self.steps_where(StepSurvey::is_retired).collect()
    }

    /// Steps whose manifests must stay until the [`Survey::retired_steps`] that they retire are
    /// deleted: without them those would exist again.
    pub(crate) fn retiring_steps(&self) -> BTreeSet<u64> {
        self.steps
            .iter()
            .filter_map(|step| match step.state {
                StepState::Retired { by } => Some(by),
                _ => None,
            })
            .collect()
    }

    fn newest_in_the_way(&self) -> Option<u64> {
        let in_the_way =
            |state: &StepState| matches!(state, StepState::Committed | StepState::Newer { .. });
        self.steps_where(|step| in_the_way(&step.state)).next_back()
    }

    fn newer(&self) -> impl Iterator<Item = (u64, &str)> {
        self.steps.iter().filter_map(|step| match &step.state {
            StepState::Newer { why } => Some((step.step, why.as_str())),
            _ => None,
        })
    }

    fn steps_where(
        &self,
        mut keep: impl FnMut(&StepSurvey) -> bool,
    ) -> impl DoubleEndedIterator<Item = u64> {
        self.steps.iter().filter(move |step| keep(step)).map(|step| step.step)
    }
}

impl StepSurvey {
    pub(crate) fn is_retired(&self) -> bool {
        matches!(self.state, StepState::Retired { .. })
    }

    pub(crate) fn is_damaged(&self) -> bool {
        matches!(self.state, StepState::Damaged { .. })
    }
}

/// Manifests that the listing shows, that decode, and that are in their own step's directory.
fn legible<'a>(
    listing: &[StepListing],
    manifests: &'a BTreeMap<u64, ManifestState>,
) -> BTreeMap<u64, &'a Manifest> {
    listing
        .iter()
        .filter(|directory| has_manifest(directory))
        .filter_map(|directory| match manifests.get(&directory.step) {
            Some(ManifestState::Valid(manifest)) if manifest.step == directory.step => {
                Some((directory.step, manifest.as_ref()))
            }
            _ => None,
        })
        .collect()
}

/// Retired steps, each with the earliest step that retires it. Ascending, so when a step's turn
/// comes, everything that could retire it has been seen.
pub(crate) fn retirements(legible: &BTreeMap<u64, &Manifest>) -> BTreeMap<u64, u64> {
    let mut retired = BTreeMap::new();
    for (&step, manifest) in legible {
        if retired.contains_key(&step) {
            continue;
        }
        for entry in manifest.retired.iter().filter(|entry| entry.step > step) {
            if legible.get(&entry.step).is_some_and(|later| later.attempt == entry.attempt) {
                retired.entry(entry.step).or_insert(step);
            }
        }
    }
    retired
}

fn step_state(
    directory: &StepListing,
    (read, legible): (Option<&ManifestState>, Option<&Manifest>),
    retired_by: Option<u64>,
    share: Option<OwnShare>,
) -> StepState {
    if let Some(why) = &directory.unlisted {
        return StepState::Damaged { why: why.clone() };
    }
    if !has_manifest(directory) {
        return StepState::Incomplete;
    }
    if let Some(by) = retired_by {
        return StepState::Retired { by };
    }
    match (read, legible) {
        // It was deleted between the listing and the reading.
        (None | Some(ManifestState::Absent), _) => StepState::Incomplete,
        (Some(ManifestState::Newer(why)), _) => StepState::Newer { why: why.clone() },
        (Some(ManifestState::Damaged(why)), _) => StepState::Damaged { why: why.clone() },
        (Some(ManifestState::Valid(manifest)), None) => StepState::Damaged {
            why: format!(
                "the manifest is of step {}, but is in the directory of step {}",
                manifest.step, directory.step
            ),
        },
        (Some(ManifestState::Valid(_)), Some(manifest)) => {
            match missing_shard(directory, manifest, share) {
                Some(why) => StepState::Damaged { why },
                None => StepState::Committed,
            }
        }
    }
}

/// The first shard that is not there with its exact length.
fn missing_shard(
    directory: &StepListing,
    manifest: &Manifest,
    share: Option<OwnShare>,
) -> Option<String> {
    manifest.shards.iter().find_map(|shard| {
        match directory.files.iter().find(|file| file.name == shard.file) {
            None if share.is_some_and(|share| share.may_miss(manifest, shard.rank)) => None,
            None => Some(format!("shard `{}` is missing", shard.file)),
            Some(file) if file.bytes != shard.bytes => Some(format!(
                "shard `{}` has {} bytes, and its manifest says {}",
                shard.file, file.bytes, shard.bytes
            )),
            Some(_) => None,
        }
    })
}

fn orphans(
    directory: &StepListing,
    manifest: Option<&Manifest>,
    state: &StepState,
) -> Vec<OrphanFile> {
    // Where a manifest cannot be read, any file may be one that it names.
    if manifest.is_none() && has_manifest(directory) {
        debug_assert!(*state != StepState::Committed);
        return Vec::new();
    }
    let published = directory
        .files
        .iter()
        .find(|file| file.name == names::MANIFEST_FILE)
        .map(|file| file.modified);
    let named = |name: &str| {
        manifest.is_some_and(|manifest| manifest.shards.iter().any(|shard| shard.file == name))
    };
    directory
        .files
        .iter()
        .filter(|file| file.name != names::MANIFEST_FILE && !named(&file.name))
        .map(|file| OrphanFile {
            step: directory.step,
            file: file.name.clone(),
            bytes: file.bytes,
            idle_since: published.map_or(file.modified, |at| at.max(file.modified)),
        })
        .collect()
}

fn has_manifest(directory: &StepListing) -> bool {
    directory.files.iter().any(|file| file.name == names::MANIFEST_FILE)
}
