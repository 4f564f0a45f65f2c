//! Which step all ranks load.

use std::time::Duration;

use dtr_engine::ranks::{Agreed, Hindrance};
use dtr_engine::{Config, Engine, EngineError, Result};

use crate::world::{Rank, World, save_all, state_of, together};

const LONG: Duration = Duration::from_secs(20);

/// What the Python package does: offer, load, offer again what could be loaded.
fn load(rank: &Rank) -> Result<u64> {
    let mut failed = Vec::new();
    let mut done = None;
    loop {
        let mut offered = rank.engine.steps()?;
        offered.retain(|step| !failed.contains(step));
        let Agreed::Step(step) = rank.engine.agree(&offered, Hindrance::None, LONG)? else {
            panic!("there is a common step");
        };
        if done == Some(step) {
            return Ok(step);
        }
        let state = state_of(rank.number, step);
        let read = rank.engine.checkpoint(step).and_then(|read| state.try_assert_equals(&read));
        match read {
            Ok(()) => done = Some(step),
            Err(EngineError::Corrupt { .. }) => failed.push(step),
            Err(error) => return Err(error),
        }
    }
}

fn flip_a_byte(engine: &Engine, world: &World, step: u64, rank: usize) {
    let file = &engine.manifest(step).unwrap().shards[rank].file;
    let path = world.path().join(format!("step-{step:012}")).join(file);
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[5000] ^= 1;
    std::fs::write(&path, bytes).unwrap();
}

#[test]
fn one_bad_shard_on_one_rank_moves_all_to_the_newest_step_that_verifies_everywhere() {
    let world = World::new(3);
    let ranks = world.ranks();
    for step in [1, 2, 3, 4] {
        save_all(&ranks, step);
    }
    let reader = world.reader(0);
    flip_a_byte(&reader, &world, 4, 2);
    flip_a_byte(&reader, &world, 3, 1);
    let loaded: Vec<u64> = together(&ranks, load).into_iter().collect::<Result<_>>().unwrap();
    assert_eq!(loaded, [2, 2, 2]);
}

#[test]
fn ranks_that_see_different_steps_load_the_newest_common_one() {
    let world = World::new(2);
    let ranks = world.ranks();
    let steps: [&[u64]; 2] = [&[5, 10, 15], &[5, 10]];
    let agree = |rank: &Rank| rank.engine.agree(steps[rank.number as usize], Hindrance::None, LONG);
    let agreed = together(&ranks, agree);
    assert!(agreed.into_iter().all(|agreed| agreed.unwrap() == Agreed::Step(10)));
}

#[test]
fn ranks_without_a_common_step_are_told_the_same() {
    let world = World::new(3);
    let ranks = world.ranks();
    let told = |offers: [(&[u64], Hindrance<'static>); 3]| {
        let agree = |rank: &Rank| {
            let (steps, hindrance) = offers[rank.number as usize];
            rank.engine.agree(steps, hindrance, LONG)
        };
        let mut told: Vec<Agreed> =
            together(&ranks, agree).into_iter().collect::<Result<_>>().unwrap();
        told.dedup();
        assert_eq!(told.len(), 1, "{told:?}");
        told.remove(0)
    };
    let nothing = (&[][..], Hindrance::None);
    assert_eq!(told([nothing; 3]), Agreed::Nothing { offering: 0 });
    let some = [nothing, (&[5], Hindrance::None), (&[5, 10], Hindrance::None)];
    assert_eq!(told(some), Agreed::Nothing { offering: 2 });
    let damaged = [(&[5][..], Hindrance::None), (&[], Hindrance::Damage("step 5: a bit")), some[2]];
    let hindered = |rank, why: &str, gave_up| Agreed::Hindered { rank, why: why.into(), gave_up };
    assert_eq!(told(damaged), hindered(1, "step 5: a bit", false));
    let away = [damaged[0], damaged[1], (&[][..], Hindrance::GivesUp("the bucket is away"))];
    assert_eq!(told(away), hindered(2, "the bucket is away", true));
    // What is wrong counts only where no step is left.
    let enough = [(&[5][..], Hindrance::None), (&[5], Hindrance::Damage("step 9: a bit")), some[1]];
    assert_eq!(told(enough), Agreed::Step(5));
}

#[test]
fn who_does_not_come_is_named() {
    let world = World::new(2);
    let ranks = world.ranks();
    let agreed = ranks[0].engine.agree(&[1], Hindrance::None, Duration::from_millis(200));
    let error = agreed.unwrap_err().to_string();
    assert!(error.contains("rank 1 (`worker-1`)"), "{error}");
}

#[test]
fn another_number_of_ranks_loads_what_a_named_rank_saved_and_nothing_unasked() {
    let world = World::new(3);
    let ranks = world.ranks();
    save_all(&ranks, 1);
    for (rank, world_size) in [(0, 1), (1, 2), (0, 4), (3, 4)] {
        let config = Config { rank, world_size, read_only: true, ..world.config(0) };
        let engine = Engine::open(config).unwrap();
        let error = engine.checkpoint(1).unwrap_err();
        assert!(matches!(error, EngineError::InvalidArgument { .. }), "{error:?}");
        assert!(error.to_string().contains("3 ranks saved it"), "{error}");
        for saved in 0..3 {
            let read = engine.checkpoint_of_rank(1, saved).unwrap();
            state_of(saved, 1).try_assert_equals(&read).unwrap();
        }
        let error = engine.checkpoint_of_rank(1, 3).unwrap_err();
        assert!(error.to_string().contains("name a rank from 0 to 2"), "{error}");
    }
}
