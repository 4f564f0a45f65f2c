//! Tests of what a listing means, and of what may be saved or copied by it.

use std::time::Duration;

use proptest::prelude::*;

use super::rules::{SavePlan, UNSEEN_MAX};
use super::*;
use crate::EngineError;
use crate::format::manifest::{FORMAT_VERSION, ShardEntry};
use crate::store::FileListing;
use crate::store_copy::Overwrite;

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
        (ManifestState::Damaged("bad crc".into()), StepState::Damaged { why: "bad crc".into() }),
        (ManifestState::Newer("version 9".into()), StepState::Newer { why: "version 9".into() }),
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
    let scene =
        Scene { listing: vec![StepListing { step: 1, files, unlisted: None }], ..Scene::default() };
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
    let ages: Vec<_> = orphans.iter().map(|orphan| (&*orphan.file, orphan.idle_since)).collect();
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
        assert!(why.contains("was discarded there"), "{why}");
    }
    assert_eq!(check(&scene, &manifest(20, 9, &[]), Overwrite::No), Ok(()));
    // It went back over what exists there, and over what does not.
    let rewound = manifest(15, 5, &[(20, 9), (30, 4), (40, 7)]);
    let why = check(&scene, &rewound, Overwrite::No).unwrap_err();
    assert!(why.contains("discarded step 30"), "{why}");
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
    let steps =
        |plan: &SavePlan| -> Vec<u64> { plan.retired.iter().map(|retired| retired.step).collect() };
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
    // 10 went back over 30 and 50, of which nothing is seen: copies may be elsewhere.
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
