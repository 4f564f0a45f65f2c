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
use crate::store_copy::Overwrite;
use crate::{EngineError, Result};

/// What reading a step's manifest gave.
#[derive(Clone, Debug, PartialEq)]
pub enum ManifestState {
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
    /// Later checkpoints that manifests which stand say ceased to exist, whether they are seen here
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
    /// The attempt whose manifest lies there, if that decodes.
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
    /// It ceased to exist when the manifest of step `by` was published.
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

/// How a save at some step is to be published.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SavePlan {
    /// The attempt whose manifest stands there now and goes.
    pub replaces: Option<AttemptId>,
    /// Later checkpoints that cease to exist at that commit, or did before.
    pub retired: Vec<Retired>,
    /// The earliest that it may say it began: after whatever it takes the place of, whose clock may
    /// have been ahead. A copy of that is then never taken for the later one.
    pub not_before_unix_ms: u64,
}

/// Most checkpoints that are said to have ceased to exist though nothing is seen of them.
const UNSEEN_MAX: usize = 4096;

/// The part that a rank with a store of its own answers for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OwnShare {
    /// The rank.
    pub rank: u32,
    /// Among how many.
    pub world_size: u32,
}

impl OwnShare {
    /// Whether a shard of `manifest` may lie elsewhere.
    pub(crate) fn may_miss(self, manifest: &Manifest, rank: u32) -> bool {
        manifest.world_size == self.world_size && rank != self.rank
    }
}

/// Decides what exists. `manifests` were read after `listing` was taken; one that the listing does
/// not show yet is left for the next survey. `share` is of a rank with a store of its own.
pub fn survey(
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

/// Decides whether `step` may be saved and what its manifest must say. Without `rewind`, a step is
/// saved only after the newest that can be loaded; with it, every later checkpoint is retired at
/// the commit. Later ones that are damaged are retired either way: mended, they would be newest.
///
/// What ceased to exist before is said again, though nothing is seen of it: a copy may lie where
/// this store does not look now, and the manifest that said so may go.
pub fn check_save(survey: &Survey, step: u64, rewind: bool) -> Result<SavePlan> {
    if let Some(newest) = survey.newest_in_the_way().filter(|newest| step <= *newest && !rewind) {
        return Err(EngineError::StepConflict {
            what: format!("saving step {step}"),
            why: format!("step {newest} is committed, and a step is saved only after the newest"),
            hint: format!(
                "save after step {newest}, or say `rewind=True` if the training went back: steps \
                 after {step} then cease to exist when step {step} is committed"
            ),
        });
    }
    if let Some((newer, why)) = survey.newer().find(|(newer, _)| *newer >= step) {
        return Err(EngineError::UnsupportedFormat {
            what: format!("saving step {step}"),
            why: format!("step {newer} would have to go, and a newer version wrote it: {why}"),
            hint: format!(
                "upgrade dtruntime, or delete step {newer} with the version that wrote it"
            ),
        });
    }
    let replaces = survey.step(step).and_then(|survey| survey.attempt);
    let in_its_place = survey.steps.iter().filter(|other| other.step >= step);
    let created = in_its_place.map(|other| other.created_unix_ms).max();
    Ok(SavePlan {
        replaces,
        retired: retired_by(survey, step, rewind),
        not_before_unix_ms: created.map_or(0, |created| created.saturating_add(1)),
    })
}

/// Decides whether a checkpoint may be copied into a store that holds this. One that ceased to
/// exist there would be none; and unless it is said, a copy ends no checkpoint that exists there.
pub(crate) fn check_copy(survey: &Survey, copied: &Manifest, overwrite: Overwrite) -> Result<()> {
    let refused = |why: String, hint: &str| EngineError::StepConflict {
        what: format!("copying step {}", copied.step),
        why,
        hint: hint.into(),
    };
    let is_this = |ceased: &Retired| ceased.step == copied.step && ceased.attempt == copied.attempt;
    if survey.ceased.iter().any(is_this) {
        return Err(refused(
            "it ceased to exist there, when the training went back to an earlier step".into(),
            "copy it to another store",
        ));
    }
    let exists = |retired: &&Retired| {
        let there = survey.step(retired.step).filter(|there| there.state == StepState::Committed);
        there.and_then(|there| there.attempt).is_some_and(|id| id.to_string() == retired.attempt)
    };
    match copied.retired.iter().rfind(exists) {
        Some(ended) if overwrite == Overwrite::No => Err(refused(
            format!(
                "the training went back over step {} when it saved this one, and that step exists \
                 there",
                ended.step
            ),
            "copy with `--rewind`: what was gone back over then ceases to exist there, too; or \
             choose another store",
        )),
        _ => Ok(()),
    }
}

fn retired_by(survey: &Survey, step: u64, rewind: bool) -> Vec<Retired> {
    let goes = |later: &&StepSurvey| {
        later.step > step && (rewind || later.is_retired() || later.is_damaged())
    };
    let named = |later: &StepSurvey| {
        Some(Retired { attempt: later.attempt?.to_string(), step: later.step })
    };
    let seen: Vec<Retired> = survey.steps.iter().filter(goes).filter_map(named).collect();
    // Of too many, those that would be the newest.
    let unseen = survey.ceased.iter().rev().filter(|entry| entry.step > step).take(UNSEEN_MAX);
    in_order(seen.iter().chain(unseen))
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

    /// Whether a step ceased to exist, and its files are still there.
    pub(crate) fn is_retired(&self, step: u64) -> bool {
        self.step(step).is_some_and(StepSurvey::is_retired)
    }

    /// Steps that ceased to exist and whose files are still there, ascending.
    pub fn retired_steps(&self) -> Vec<u64> {
        self.steps_where(StepSurvey::is_retired).collect()
    }

    /// Steps whose manifests must stay until the [`Survey::retired_steps`] that they retire are
    /// deleted: without them those would exist again.
    pub fn retiring_steps(&self) -> BTreeSet<u64> {
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

/// Manifests that the listing shows, that decode, and that lie in their own step's directory.
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
                "the manifest is of step {}, and lies in the directory of step {}",
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
    // Where a manifest lies that cannot be read, any file may be one that it names.
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

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;
    use crate::format::manifest::{FORMAT_VERSION, ShardEntry};
    use crate::store::FileListing;

    const SHARD_BYTES: u64 = 8192;

    fn attempt(id: u8) -> AttemptId {
        AttemptId([id; 16])
    }

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
    }

    fn file(name: &str, bytes: u64, seconds: u64) -> FileListing {
        FileListing { name: name.into(), bytes, modified: at(seconds) }
    }

    fn manifest(step: u64, id: u8, retired: &[(u64, u8)]) -> Manifest {
        Manifest {
            attempt: attempt(id).to_string(),
            created_unix_ms: u64::from(id) * 1000,
            dataset_positions: BTreeMap::new(),
            engine_version: "0".into(),
            format_version: FORMAT_VERSION,
            job: "job".into(),
            metadata: BTreeMap::new(),
            retired: retired
                .iter()
                .map(|(step, id)| Retired { attempt: attempt(*id).to_string(), step: *step })
                .collect(),
            shards: vec![ShardEntry {
                bytes: SHARD_BYTES,
                file: names::shard_file_name(0, attempt(id)),
                footer_crc32c: "00000000".into(),
                rank: 0,
                raw_bytes: SHARD_BYTES,
                replicated: Vec::new(),
            }],
            step,
            world_size: 1,
        }
    }

    /// A store under construction.
    #[derive(Default)]
    struct Scene {
        listing: Vec<StepListing>,
        manifests: BTreeMap<u64, ManifestState>,
    }

    impl Scene {
        /// A complete checkpoint, whose manifest retires others.
        fn checkpoint(mut self, step: u64, id: u8, retired: &[(u64, u8)]) -> Self {
            let files = vec![
                file(names::MANIFEST_FILE, 100, 50),
                file(&names::shard_file_name(0, attempt(id)), SHARD_BYTES, 40),
            ];
            self.listing.push(StepListing { step, files, unlisted: None });
            let manifest = manifest(step, id, retired);
            self.manifests.insert(step, ManifestState::Valid(Arc::new(manifest)));
            self
        }

        fn with(mut self, step: u64, state: ManifestState) -> Self {
            if !self.listing.iter().any(|directory| directory.step == step) {
                let files = vec![file(names::MANIFEST_FILE, 100, 50)];
                self.listing.push(StepListing { step, files, unlisted: None });
            }
            self.manifests.insert(step, state);
            self
        }

        fn files(&mut self, step: u64) -> &mut Vec<FileListing> {
            let directory = self.listing.iter_mut().find(|directory| directory.step == step);
            &mut directory.unwrap().files
        }

        fn survey(&self) -> Survey {
            survey(&self.listing, &self.manifests, None)
        }

        fn state(&self, step: u64) -> StepState {
            self.survey().step(step).unwrap().state.clone()
        }
    }

    #[test]
    fn a_complete_checkpoint_exists() {
        let scene = Scene::default().checkpoint(20, 1, &[]).checkpoint(10, 2, &[]);
        let survey = scene.survey();
        assert_eq!(survey.committed_steps(), [10, 20]);
        assert_eq!(survey.newest(), Some(20));
        assert_eq!(survey.step(20).unwrap().attempt, Some(attempt(1)));
        assert_eq!(survey.step(20).unwrap().bytes, 100 + SHARD_BYTES);
        assert_eq!(survey.step(15), None);
        assert_eq!(Survey::default().newest(), None);
    }

    #[test]
    fn a_checkpoint_without_its_exact_shards_is_damaged() {
        let mut scene = Scene::default().checkpoint(10, 1, &[]);
        scene.files(10)[1].bytes -= 1;
        let expected = "has 8191 bytes, and its manifest says 8192";
        assert!(matches!(scene.state(10), StepState::Damaged { why } if why.contains(expected)));
        scene.files(10).pop();
        assert!(matches!(scene.state(10), StepState::Damaged { why } if why.contains("missing")));
        assert_eq!(scene.survey().newest(), None);
    }

    #[test]
    fn a_rank_with_a_store_of_its_own_answers_for_its_own_shard() {
        let mut both = manifest(10, 1, &[]);
        let other = ShardEntry {
            rank: 1,
            file: names::shard_file_name(1, attempt(1)),
            ..both.shards[0].clone()
        };
        both.shards.push(other);
        both.world_size = 2;
        let mut scene = Scene::default().checkpoint(10, 1, &[]);
        scene.manifests.insert(10, ManifestState::Valid(Arc::new(both)));
        let committed = |scene: &Scene, share: Option<(u32, u32)>| {
            let share = share.map(|(rank, world_size)| OwnShare { rank, world_size });
            survey(&scene.listing, &scene.manifests, share).committed_steps() == [10]
        };
        assert!(committed(&scene, Some((0, 2))));
        // It is its own that is missing; another world has no own; nobody in particular needs all.
        for share in [Some((1, 2)), Some((0, 3)), None] {
            assert!(!committed(&scene, share), "{share:?}");
        }
        scene.files(10)[1].bytes -= 1;
        assert!(!committed(&scene, Some((0, 2))));
    }

    #[test]
    fn a_manifest_that_cannot_be_read_says_why_and_keeps_every_file() {
        let shard = names::shard_file_name(0, attempt(1));
        let states = [
            (
                ManifestState::Damaged("bad crc".into()),
                StepState::Damaged { why: "bad crc".into() },
            ),
            (
                ManifestState::Newer("version 9".into()),
                StepState::Newer { why: "version 9".into() },
            ),
        ];
        for (read, expected) in states {
            let mut scene = Scene::default().with(10, read);
            scene.files(10).push(file(&shard, 1, 0));
            assert_eq!(scene.state(10), expected);
            assert_eq!(scene.survey().steps[0].orphans, []);
        }
        let moved = ManifestState::Valid(Arc::new(manifest(11, 1, &[])));
        let mut scene = Scene::default().with(10, moved);
        scene.files(10).push(file(&shard, SHARD_BYTES, 0));
        assert!(matches!(scene.state(10), StepState::Damaged { why } if why.contains("step 11")));
        assert_eq!(scene.survey().steps[0].orphans, []);
    }

    #[test]
    fn a_directory_without_a_manifest_never_existed() {
        let shard = names::shard_file_name(0, attempt(1));
        let files = vec![file(&shard, 5, 30)];
        let scene = Scene {
            listing: vec![StepListing { step: 1, files, unlisted: None }],
            ..Scene::default()
        };
        assert_eq!(scene.state(1), StepState::Incomplete);
        let orphan = OrphanFile { step: 1, file: shard, bytes: 5, idle_since: at(30) };
        assert_eq!(scene.survey().steps[0].orphans, [orphan]);
        // Published between the listing and the reading: not seen yet, and takes part in nothing.
        let later = ManifestState::Valid(Arc::new(manifest(1, 1, &[(2, 2)])));
        let scene = Scene { manifests: BTreeMap::from([(1, later)]), ..scene };
        let scene = scene.checkpoint(2, 2, &[]);
        assert_eq!(scene.state(1), StepState::Incomplete);
        assert_eq!(scene.state(2), StepState::Committed);
        // Deleted in between.
        let gone = Scene::default().with(3, ManifestState::Absent);
        assert_eq!(gone.state(3), StepState::Incomplete);
        assert_eq!(gone.survey().steps[0].orphans, []);
    }

    #[test]
    fn an_orphan_is_as_old_as_the_manifest_that_took_its_place() {
        let mut scene = Scene::default().checkpoint(10, 2, &[]);
        let replaced = names::shard_file_name(0, attempt(1));
        let temporary = names::manifest_temporary_name(attempt(3));
        scene.files(10).push(file(&replaced, 1, 10));
        scene.files(10).push(file(&temporary, 2, 90));
        let orphans = scene.survey().steps[0].orphans.clone();
        let ages: Vec<_> =
            orphans.iter().map(|orphan| (&*orphan.file, orphan.idle_since)).collect();
        assert_eq!(ages, [(&*replaced, at(50)), (&*temporary, at(90))]);
    }

    #[test]
    fn a_rewind_retires_exactly_the_attempts_that_it_names() {
        let scene = Scene::default()
            .checkpoint(10, 1, &[(10, 1), (20, 2), (30, 9), (5, 5)])
            .checkpoint(5, 5, &[])
            .checkpoint(20, 2, &[])
            .checkpoint(30, 3, &[]);
        assert_eq!(scene.state(5), StepState::Committed);
        assert_eq!(scene.state(10), StepState::Committed);
        assert_eq!(scene.state(20), StepState::Retired { by: 10 });
        assert_eq!(scene.state(30), StepState::Committed);
        assert_eq!(scene.survey().retired_steps(), [20]);
        assert_eq!(scene.survey().retiring_steps(), BTreeSet::from([10]));
    }

    #[test]
    fn what_is_retired_retires_nothing() {
        // 20 was rewound over 30; then 10 over 20 only: 30 stands again, as 20 never was.
        let scene = Scene::default()
            .checkpoint(10, 1, &[(20, 2)])
            .checkpoint(20, 2, &[(30, 3)])
            .checkpoint(30, 3, &[(40, 4)])
            .checkpoint(40, 4, &[]);
        assert_eq!(scene.state(20), StepState::Retired { by: 10 });
        assert_eq!(scene.state(30), StepState::Committed);
        assert_eq!(scene.state(40), StepState::Retired { by: 30 });
    }

    #[test]
    fn losing_a_shard_does_not_bring_back_what_it_retired() {
        let mut scene = Scene::default().checkpoint(10, 1, &[(20, 2)]).checkpoint(20, 2, &[]);
        scene.files(10).pop();
        assert!(matches!(scene.state(10), StepState::Damaged { .. }));
        assert_eq!(scene.state(20), StepState::Retired { by: 10 });
    }

    #[test]
    fn a_step_is_saved_after_the_newest_or_with_rewind() {
        let survey = Scene::default().checkpoint(10, 1, &[]).checkpoint(20, 2, &[]).survey();
        assert_eq!(check_save(&survey, 21, false).unwrap(), SavePlan::default());
        assert_eq!(check_save(&survey, 21, true).unwrap(), SavePlan::default());
        for step in [5, 10, 20] {
            let error = check_save(&survey, step, false).unwrap_err();
            assert!(matches!(error, EngineError::StepConflict { .. }), "{error}");
            assert!(error.to_string().contains("step 20"), "{error}");
            assert!(error.hint().contains("rewind=True"), "{error}");
        }
        let plan = check_save(&survey, 10, true).unwrap();
        assert_eq!(plan.replaces, Some(attempt(1)));
        // Later than what it takes the place of, whatever the clocks say.
        assert_eq!(plan.not_before_unix_ms, 2001);
        assert_eq!(plan.retired, [Retired { attempt: attempt(2).to_string(), step: 20 }]);
        let plan = check_save(&survey, 5, true).unwrap();
        assert_eq!((plan.replaces, plan.retired.len()), (None, 2));
    }

    #[test]
    fn a_copy_ends_nothing_unless_told_and_brings_nothing_back() {
        let mut scene = Scene::default()
            .checkpoint(10, 1, &[(20, 2)])
            .checkpoint(20, 3, &[])
            .checkpoint(30, 4, &[]);
        let check = |scene: &Scene, copied: &Manifest, overwrite| {
            check_copy(&scene.survey(), copied, overwrite).map_err(|error| error.to_string())
        };
        // It ceased to exist there: whatever is said, it would again.
        for overwrite in [Overwrite::No, Overwrite::Yes] {
            let why = check(&scene, &manifest(20, 2, &[]), overwrite).unwrap_err();
            assert!(why.contains("ceased to exist there"), "{why}");
        }
        assert_eq!(check(&scene, &manifest(20, 9, &[]), Overwrite::No), Ok(()));
        // It went back over what exists there, and over what does not.
        let rewound = manifest(15, 5, &[(20, 9), (30, 4), (40, 7)]);
        let why = check(&scene, &rewound, Overwrite::No).unwrap_err();
        assert!(why.contains("back over step 30"), "{why}");
        assert_eq!(check(&scene, &rewound, Overwrite::Yes), Ok(()));
        scene.files(30).pop();
        assert_eq!(check(&scene, &rewound, Overwrite::No), Ok(()));
    }

    #[test]
    fn what_does_not_exist_is_in_no_ones_way_and_stays_dead() {
        // 20 is retired and not deleted yet; 30 is damaged.
        let mut scene = Scene::default()
            .checkpoint(10, 1, &[(20, 2)])
            .checkpoint(20, 2, &[])
            .checkpoint(30, 3, &[]);
        scene.files(30).pop();
        let survey = scene.survey();
        let steps = |plan: &SavePlan| -> Vec<u64> {
            plan.retired.iter().map(|retired| retired.step).collect()
        };
        // Mended, 30 would be the newest, after what was saved without it.
        assert_eq!(steps(&check_save(&survey, 15, false).unwrap()), [20, 30]);
        let plan = check_save(&survey, 20, false).unwrap();
        assert_eq!((plan.replaces, steps(&plan)), (Some(attempt(2)), vec![30]));
        assert_eq!(steps(&check_save(&survey, 31, false).unwrap()), [0; 0]);
        // Replacing the manifest that retires 20 must go on retiring it.
        let plan = check_save(&survey, 10, true).unwrap();
        assert_eq!((plan.replaces, steps(&plan)), (Some(attempt(1)), vec![20, 30]));
    }

    #[test]
    fn what_ceased_to_exist_is_said_again_though_nothing_is_seen_of_it() {
        let retired = |plan: SavePlan| -> Vec<(u64, u8)> {
            let id = |entry: &Retired| AttemptId::parse(&entry.attempt).unwrap().0[0];
            plan.retired.iter().map(|entry| (entry.step, id(entry))).collect()
        };
        // 10 went back over 30 and 50, of which nothing is seen: copies may lie elsewhere.
        let survey = Scene::default().checkpoint(10, 1, &[(30, 3), (50, 5)]).survey();
        assert_eq!(retired(check_save(&survey, 20, false).unwrap()), [(30, 3), (50, 5)]);
        assert_eq!(retired(check_save(&survey, 30, false).unwrap()), [(50, 5)]);
        assert_eq!(retired(check_save(&survey, 60, false).unwrap()), [(0, 0); 0]);
        // Then 10 is gone, and 50 comes in sight: it does not stand again.
        let scene =
            Scene::default().checkpoint(20, 2, &[(30, 3), (50, 5)]).checkpoint(50, 5, &[(70, 7)]);
        assert_eq!(scene.state(50), StepState::Retired { by: 20 });
        assert_eq!(scene.survey().newest(), Some(20));
        // A rewind says again what those say that it retires; what was retired says nothing.
        let plan = check_save(&scene.survey(), 5, true).unwrap();
        assert_eq!(retired(plan), [(20, 2), (30, 3), (50, 5)]);
    }

    #[test]
    fn too_much_that_is_not_seen_is_cut_short_from_below() {
        let many: Vec<(u64, u8)> = (0..5000).map(|step| (100 + step, 1)).collect();
        let survey = Scene::default().checkpoint(10, 1, &many).checkpoint(100, 1, &[]).survey();
        let plan = check_save(&survey, 20, false).unwrap();
        let steps: Vec<u64> = plan.retired.iter().map(|retired| retired.step).collect();
        assert_eq!(steps.len(), UNSEEN_MAX + 1);
        // What is seen is said in any case.
        assert_eq!((steps[0], steps[1], steps[UNSEEN_MAX]), (100, 1004, 5099));
    }

    #[test]
    fn a_newer_version_is_never_overwritten() {
        let newer = ManifestState::Newer("version 9".into());
        let survey = Scene::default().checkpoint(10, 1, &[]).with(20, newer).survey();
        assert!(check_save(&survey, 21, false).is_ok());
        let error = check_save(&survey, 15, false).unwrap_err();
        assert!(matches!(error, EngineError::StepConflict { .. }), "{error}");
        for step in [10, 20] {
            let error = check_save(&survey, step, true).unwrap_err();
            assert!(matches!(error, EngineError::UnsupportedFormat { .. }), "{error}");
        }
    }

    proptest! {
        /// However a history of rewinds looks, carrying out a plan leaves the saved step newest.
        #[test]
        fn after_a_save_its_step_is_the_newest(
            steps in prop::collection::vec((0u64..12, any::<bool>(), any::<bool>()), 1..24),
        ) {
            let mut scene = Scene::default();
            for (id, (step, rewind, prune)) in (1u8..).zip(steps) {
                let survey = scene.survey();
                let Ok(plan) = check_save(&survey, step, rewind) else {
                    prop_assert!(survey.newest().is_some_and(|newest| newest >= step) && !rewind);
                    continue;
                };
                prop_assert_eq!(plan.replaces, survey.step(step).and_then(|step| step.attempt));
                let retired: Vec<(u64, u8)> = plan
                    .retired
                    .iter()
                    .map(|entry| (entry.step, AttemptId::parse(&entry.attempt).unwrap().0[0]))
                    .collect();
                scene.listing.retain(|directory| directory.step != step);
                scene = scene.checkpoint(step, id, &retired);
                let after = scene.survey();
                prop_assert_eq!(after.newest(), Some(step));
                let before: Vec<u64> =
                    survey.committed_steps().into_iter().filter(|old| *old < step).collect();
                prop_assert_eq!(&after.committed_steps()[..before.len()], &before[..]);
                if prune {
                    // Deleting what is retired changes nothing of what exists.
                    for retired in after.retired_steps() {
                        scene.listing.retain(|directory| directory.step != retired);
                        scene.manifests.remove(&retired);
                    }
                    prop_assert_eq!(scene.survey().committed_steps(), after.committed_steps());
                }
            }
        }
    }
}
