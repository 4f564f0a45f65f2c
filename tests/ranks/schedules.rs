//! Whatever is lost, and whenever: a checkpoint is complete or not there, and success is true.
//!
//! `DTR_TORTURE_STATES` sets how many schedules are run instead of 8, `DTR_TORTURE_FIRST` the seed
//! of the first one.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use dtr_engine::error::CoordinationKind;
use dtr_engine::{EngineError, Result};
use fastrand::Rng;

use crate::budget::Budget;
use crate::world::{Between, Beyond, Call, Rank, World, state_of, together};

const RANKS: u32 = 3;
const STEPS: u64 = 6;

/// Loses requests and replies by chance.
#[derive(Debug)]
struct Lossy {
    random: Mutex<Rng>,
}

impl Lossy {
    fn chance(&self) -> u64 {
        self.random.lock().unwrap().u64(..100)
    }
}

impl Between for Lossy {
    fn pass<T>(&self, _: Call<'_>, go: impl FnOnce() -> Result<T>) -> Result<T> {
        match self.chance() {
            0..6 => Err(lost("there")),
            6..12 => go().and_then(|_| Err(lost("back"))),
            12..20 => {
                std::thread::sleep(Duration::from_millis(self.chance() / 4));
                go()
            }
            _ => go(),
        }
    }
}

fn lost(way: &str) -> EngineError {
    EngineError::Coordination {
        kind: CoordinationKind::Unavailable,
        what: "calling".into(),
        why: format!("the call was lost on its way {way}"),
        hint: "call again".into(),
    }
}

/// Saves a step; a rank that was not told how it ended gives the attempt up, as its process would
/// by ending.
fn save(rank: &Rank, step: u64) -> Result<()> {
    let saved = rank.save(step).map(drop);
    if saved.is_err() {
        rank.engine.decline(step, "its save failed")?;
    }
    saved
}

fn run(seed: u64) -> (u64, u64) {
    let world = World::new(RANKS);
    let open = |number| {
        world.rank_through(number, world.config(number), |ranks| {
            let random = Mutex::new(Rng::with_seed(seed * 1_000_003 + u64::from(number)));
            Arc::new(Beyond { between: Lossy { random }, ranks })
        })
    };
    let ranks: Vec<_> = (0..RANKS).map(open).collect();
    let (mut committed, mut failed) = (0, 0);
    for step in 1..=STEPS {
        let outcomes = together(&ranks, |rank| save(rank, step));
        let reader = world.reader(0);
        let exists = reader.steps().unwrap().contains(&step);
        for outcome in &outcomes {
            assert!(exists || outcome.is_err(), "seed {seed}, step {step}: {outcomes:?}");
        }
        if exists {
            committed += 1;
            for number in 0..RANKS {
                let checkpoint = reader.checkpoint_of_rank(step, number).unwrap();
                state_of(number, step).assert_equals(&checkpoint);
            }
        } else {
            failed += 1;
        }
    }
    (committed, failed)
}

#[test]
fn whatever_is_lost_a_checkpoint_is_complete_or_not_there() {
    let Budget { first, states } = Budget::of(8);
    let (mut committed, mut failed) = (0, 0);
    for seed in first..first + states {
        let (good, bad) = run(seed);
        committed += good;
        failed += bad;
    }
    println!("{committed} commits, {failed} failed saves");
    println!("torture: tried {states}, next {}", first + states);
    assert!(committed > 0 && failed > 0, "the schedules meet both");
}
