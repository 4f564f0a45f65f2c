//! Saves in which nobody is lost.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Barrier};

use dtr_engine::format::manifest::Manifest;
use dtr_engine::save::SaveInfo;
use dtr_engine::{Config, Engine, EngineError, Result};

use crate::support::finish;
use crate::world::{Between, Beyond, Call, World, refusals, save_all, state_of, together};

#[test]
fn one_manifest_names_the_shards_of_all_ranks_and_each_gets_its_own_back() {
    let world = World::new(4);
    let ranks = world.ranks();
    let infos: Vec<SaveInfo> = save_all(&ranks, 7);
    let reader = world.reader(0);
    let manifest: Manifest = reader.manifest(7).unwrap();
    assert_eq!((manifest.world_size, manifest.shards.len()), (4, 4));
    for (info, entry) in infos.iter().zip(&manifest.shards) {
        assert_eq!(info.attempt, manifest.attempt);
        assert_eq!(info.stored_bytes, entry.bytes);
    }
    for rank in 0..4 {
        let checkpoint = reader.checkpoint_of_rank(7, rank).unwrap();
        state_of(rank, 7).assert_equals(&checkpoint);
    }
    assert_eq!(reader.verify(7, &()).unwrap().damage, []);
    assert!(together(&ranks, |rank| rank.engine.close()).iter().all(Result::is_ok));
}

#[test]
fn rank_0_applies_retention_for_all() {
    let world = World::new(3);
    let open = |number| {
        let config = Config { keep_last_n: Some(2), ..world.config(number) };
        world.rank_through(number, config, |ranks| ranks)
    };
    let ranks: Vec<_> = (0..3).map(open).collect();
    for step in 1..=4 {
        let infos = save_all(&ranks, step);
        let removed: Vec<u64> = if step > 2 { vec![step - 2] } else { vec![] };
        assert_eq!(infos[0].removed_steps, removed);
        assert!(infos[1..].iter().all(|info| info.removed_steps.is_empty()));
    }
    for rank in &ranks {
        assert_eq!(rank.engine.steps().unwrap(), [3, 4]);
    }
}

/// They may share a filesystem: the space of all is back when one of them may save again.
#[test]
fn ranks_find_the_space_of_what_was_deleted() {
    let world = World::new(2);
    let open = |number| {
        let config = Config { keep_last_n: Some(1), ..world.config(number) };
        world.rank_through(number, config, |ranks| ranks)
    };
    let ranks: Vec<_> = (0..2).map(open).collect();
    for step in 1..=50 {
        save_all(&ranks, step);
        let descriptors = std::fs::read_dir("/proc/self/fd").unwrap();
        let names = descriptors.filter_map(|entry| std::fs::read_link(entry.unwrap().path()).ok());
        let names = names.map(|name| name.display().to_string());
        let old = format!("step-{:012}", step - 1);
        assert_eq!(names.filter(|name| name.contains(&old)).collect::<Vec<_>>(), [""; 0]);
    }
}

#[test]
fn a_rewind_retires_what_came_later_on_all_ranks() {
    let world = World::new(2);
    let ranks = world.ranks();
    for step in [10, 20, 30] {
        save_all(&ranks, step);
    }
    let refused = refusals(together(&ranks, |rank| rank.save(20)));
    assert!(refused.iter().all(|error| error.contains("step 30 is committed")), "{refused:?}");
    let rewound = together(&ranks, |rank| {
        let state = state_of(rank.number, 99);
        let mut request = state.request(20);
        request.rewind = true;
        finish(&rank.engine.save(request)?)
    });
    assert!(rewound.iter().all(Result::is_ok), "{rewound:?}");
    assert_eq!(world.reader(0).steps().unwrap(), [10, 20]);
    state_of(1, 99).assert_equals(&world.reader(1).checkpoint(20).unwrap());
}

#[test]
fn a_rank_that_cannot_save_fails_the_save_on_all_and_the_next_one_succeeds() {
    let world = World::new(3);
    let ranks = world.ranks();
    save_all(&ranks, 1);
    let outcomes = together(&ranks, |rank| {
        if rank.number == 1 {
            rank.engine.decline(2, "its state holds a lambda")?;
            return Err(EngineError::internal("saving", "it did not"));
        }
        rank.save(2)
    });
    for rank in [0, 2] {
        let error = outcomes[rank].as_ref().unwrap_err().to_string();
        assert!(error.contains("rank 1"), "{error}");
        assert!(error.contains("its state holds a lambda"), "{error}");
        assert!(error.contains("\nhint: training may go on"), "{error}");
    }
    assert_eq!(world.reader(0).steps().unwrap(), [1]);
    save_all(&ranks, 3);
    assert_eq!(world.reader(0).steps().unwrap(), [1, 3]);
    assert_eq!(shards_in(&world, 2), 0, "shards of a save that cannot be are deleted at once");
}

fn shards_in(world: &World, step: u64) -> usize {
    let survey = world.reader(0).survey().unwrap();
    survey.step(step).map_or(0, |step| step.orphans.len())
}

/// Holds a rank's first report back: `meet` is met when it is about to go, and before it goes.
#[derive(Debug)]
struct Held {
    is_armed: AtomicBool,
    meet: Arc<Barrier>,
}

impl Between for Held {
    fn pass<T>(&self, call: Call<'_>, go: impl FnOnce() -> Result<T>) -> Result<T> {
        if matches!(call, Call::Report(..)) && self.is_armed.swap(false, Ordering::Relaxed) {
            self.meet.wait();
            self.meet.wait();
        }
        go()
    }
}

#[test]
fn a_save_that_is_cancelled_on_one_rank_fails_on_all() {
    let world = World::new(2);
    let meet = Arc::new(Barrier::new(2));
    let held = world.rank_through(1, world.config(1), |ranks| {
        let between = Held { is_armed: AtomicBool::new(true), meet: Arc::clone(&meet) };
        Arc::new(Beyond { between, ranks })
    });
    let ranks = [world.rank(0), held];
    let outcomes = together(&ranks, |rank| {
        let state = state_of(rank.number, 5);
        let handle = rank.engine.save(state.request(5))?;
        if rank.number == 1 {
            return finish(&handle);
        }
        meet.wait();
        handle.cancel("the test wants it");
        // The other one has not reported: it cannot have been committed.
        let outcome = finish(&handle);
        meet.wait();
        outcome
    });
    let refusals = refusals(outcomes);
    assert!(refusals[1].contains("rank 0 (`worker-0`) failed: "), "{refusals:?}");
    // It depends on how far the save was by then.
    let told = ["the test wants it", "the save was cancelled"];
    let is_told = |refusal: &String| told.iter().any(|told| refusal.contains(told));
    assert!(refusals.iter().all(is_told), "{refusals:?}");
    assert_eq!(world.reader(0).steps().unwrap(), [0; 0]);
    save_all(&ranks, 6);
}

#[test]
fn ranks_without_a_coordinator_and_of_different_sizes_are_told() {
    let world = World::new(2);
    let error = Engine::open(world.config(0)).unwrap_err().to_string();
    assert!(error.contains("need a coordinator"), "{error}");
    let other = Config { world_size: 3, rank: 0, ..world.config(0) };
    let worker = world.register(0);
    let ranks = dtr_engine::ranks::Coordinated::new(worker, 3);
    let engine = Engine::open_among(other, Arc::new(ranks)).unwrap();
    let error = state_of(0, 1).save(&engine, 1).unwrap_err().to_string();
    assert!(error.contains("the job has 2 ranks"), "{error}");
}

#[test]
fn one_process_has_a_rank_of_a_store() {
    let world = World::new(2);
    let rank = world.rank(1);
    let ranks = dtr_engine::ranks::Coordinated::new(Arc::clone(&rank.worker), 2);
    let again = Engine::open_among(world.config(1), Arc::new(ranks)).unwrap_err();
    assert!(matches!(again, EngineError::StoreBusy { .. }), "{again}");
}
