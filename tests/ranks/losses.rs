//! Ranks, publishers and coordinators that are lost in the middle of a save.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use dtr_engine::error::CoordinationKind;
use dtr_engine::{EngineError, Result};

use crate::support::finish;
use crate::world::{
    Between, Beyond, Call, TIMEOUT, World, is_aborted, save_all, state_of, together,
};

/// Fails one call of a rank, before or after it had its effect.
#[derive(Debug)]
struct Flaw {
    armed: AtomicBool,
    place: Place,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    BeforeCommit,
    AfterCommit,
    AfterReport,
}

impl Flaw {
    fn strikes(&self, place: Place) -> bool {
        self.place == place && self.armed.swap(false, Ordering::Relaxed)
    }
}

fn gone() -> EngineError {
    EngineError::Coordination {
        kind: CoordinationKind::Unavailable,
        what: "calling".into(),
        why: "the coordinator does not answer".into(),
        hint: "start it".into(),
    }
}

impl Between for Flaw {
    fn pass<T>(&self, call: Call<'_>, go: impl FnOnce() -> Result<T>) -> Result<T> {
        if call == Call::Commit && self.strikes(Place::BeforeCommit) {
            return Err(gone());
        }
        let outcome = go();
        let is_lost = match call {
            Call::Begin => false,
            Call::Report(..) => self.strikes(Place::AfterReport),
            Call::Commit => self.strikes(Place::AfterCommit),
        };
        if is_lost { Err(gone()) } else { outcome }
    }
}

#[test]
fn a_publisher_whose_calls_are_lost_has_published_all_the_same() {
    for place in [Place::BeforeCommit, Place::AfterCommit, Place::AfterReport] {
        let world = World::new(3);
        let open = |number| {
            world.rank_through(number, world.config(number), |ranks| {
                let between = Flaw { armed: AtomicBool::new(true), place };
                Arc::new(Beyond { between, ranks })
            })
        };
        let ranks: Vec<_> = (0..3).map(open).collect();
        let outcomes = together(&ranks, |rank| rank.save(1));
        let exists = world.reader(0).steps().unwrap() == [1];
        for outcome in &outcomes {
            // Who heard of success finds the checkpoint; who did not may find it too.
            assert!(exists || outcome.is_err(), "{place:?}: {outcomes:?}");
        }
        if place != Place::AfterReport {
            assert!(exists && outcomes.iter().all(Result::is_ok), "{place:?}: {outcomes:?}");
        }
        save_all(&ranks, 2);
    }
}

/// What it reports is lost on the way, once: its save ends, and the attempt goes on without it.
#[derive(Debug)]
struct LostReport(AtomicBool);

impl Between for LostReport {
    fn pass<T>(&self, call: Call<'_>, go: impl FnOnce() -> Result<T>) -> Result<T> {
        let is_lost = matches!(call, Call::Report(..)) && self.0.swap(false, Ordering::Relaxed);
        if is_lost { Err(gone()) } else { go() }
    }
}

#[test]
fn an_attempt_that_a_rank_has_seen_end_is_not_joined_again() {
    let world = World::new(2);
    let first = world.rank_through(0, world.config(0), |ranks| {
        Arc::new(Beyond { between: LostReport(AtomicBool::new(true)), ranks })
    });
    let ranks = [first, world.rank(1)];
    std::thread::scope(|scope| {
        // It waits in the first attempt, which is given up, and comes again.
        let waits = scope.spawn(|| ranks[1].save(1).unwrap_err());
        assert!(is_aborted(&ranks[0].save(1).unwrap_err()));
        let again = scope.spawn(|| ranks[0].save(1));
        let why = waits.join().unwrap().to_string();
        // It waits, or comes to report, after the next attempt has begun.
        let told = ["has seen it end and starts over", "is over"];
        assert!(told.iter().any(|told| why.contains(told)), "{why}");
        ranks[1].save(1).unwrap();
        again.join().unwrap().unwrap();
    });
    assert_eq!(world.reader(0).steps().unwrap(), [1]);
    assert!(world.reader(1).verify(1, &()).unwrap().damage.is_empty());
}

#[test]
fn a_lost_rank_fails_the_save_on_all_and_its_successor_saves_with_them() {
    let world = World::new(3);
    let mut ranks = world.ranks();
    save_all(&ranks, 1);
    let lost = ranks.pop().unwrap();
    let start = Instant::now();
    let outcomes = std::thread::scope(|scope| {
        let saving = scope.spawn(|| together(&ranks, |rank| rank.save(2)));
        lost.die();
        saving.join().unwrap()
    });
    assert!(start.elapsed() < TIMEOUT * 20, "{:?}", start.elapsed());
    for outcome in outcomes {
        let error = outcome.unwrap_err().to_string();
        assert!(error.contains("rank 2") && error.contains("worker-2"), "{error}");
    }
    // Nobody waits for a rank that is gone.
    for outcome in together(&ranks, |rank| rank.save(3)) {
        let error = outcome.unwrap_err().to_string();
        assert!(error.contains("rank 2 (`worker-2`) is gone"), "{error}");
    }
    assert_eq!(world.reader(0).steps().unwrap(), [1]);
    ranks.push(world.rank(2));
    save_all(&ranks, 4);
    assert_eq!(world.reader(0).steps().unwrap(), [1, 4]);
}

#[test]
fn a_coordinator_that_ends_fails_the_save_and_loses_no_checkpoint() {
    let mut world = World::new(2);
    let ranks = world.ranks();
    save_all(&ranks, 1);
    let state = state_of(0, 2);
    let handle = ranks[0].engine.save(state.request(2)).unwrap();
    // Rank 1 never comes, and then there is nobody to tell.
    let other = coordinator::embedded::Embedded::start("127.0.0.1").unwrap();
    drop(std::mem::replace(&mut world.coordinator, other));
    handle.cancel("the coordinator is gone");
    let error = finish(&handle).unwrap_err();
    assert!(!error.to_string().is_empty());
    assert_eq!(world.reader(0).steps().unwrap(), [1]);
}
