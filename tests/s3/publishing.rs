//! Several writers at one step: one wins, and the others get an error.

use std::sync::Barrier;
use std::sync::atomic::Ordering;

use dtr_engine::{Engine, EngineError};

use crate::place::{Place, open};
use crate::support::State;

/// Saves `step` by all engines at once; gives the place of the one that won.
fn race(engines: &[Engine], states: &[State], step: u64) -> usize {
    let start = Barrier::new(engines.len());
    let outcomes: Vec<_> = std::thread::scope(|scope| {
        let save = |(engine, state): (&'_ Engine, &'_ State)| {
            start.wait();
            state.save(engine, step)
        };
        let threads: Vec<_> =
            engines.iter().zip(states).map(|pair| scope.spawn(move || save(pair))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    let won: Vec<usize> = (0..outcomes.len()).filter(|place| outcomes[*place].is_ok()).collect();
    for error in outcomes.into_iter().filter_map(Result::err) {
        assert!(matches!(error, EngineError::StepConflict { .. }), "{error}");
    }
    assert_eq!(won.len(), 1, "step {step}");
    won[0]
}

#[test]
fn one_of_several_writers_wins_and_its_checkpoint_is_the_one() {
    let Some(place) = Place::own("it needs conditions that are honoured") else { return };
    let config = place.config();
    let engines: Vec<Engine> = (0..3).map(|_| open(config.clone())).collect();
    let states: Vec<State> = (0..3).map(|seed| State::training(seed, 0)).collect();
    for step in 1..=20 {
        let winner = race(&engines, &states, step);
        states[winner].assert_equals(&engines[winner].checkpoint(step).unwrap());
    }
    assert_eq!(engines[0].steps().unwrap().len(), 20);
}

#[test]
fn where_conditions_are_ignored_a_later_writer_is_refused_all_the_same() {
    let place = Place::new();
    if place.is_own() {
        place.rules().ignores_conditions.store(true, Ordering::Relaxed);
    }
    let config = place.config();
    let (first, second) = (open(config.clone()), open(config));
    let (one, other) = (State::training(1, 0), State::training(2, 0));
    // Both list the store before anything exists.
    assert!(first.steps().unwrap().is_empty() && second.steps().unwrap().is_empty());
    one.save(&first, 1).unwrap();
    let error = other.save(&second, 1).unwrap_err();
    assert!(matches!(error, EngineError::StepConflict { .. }), "{error}");
    one.assert_equals(&second.checkpoint(1).unwrap());
}

#[test]
fn a_manifest_that_another_writer_has_replaced_is_looked_at_again_and_not_deleted_unseen() {
    let Some(place) = Place::own("it says that conditions do not hold") else { return };
    let engine = open(place.config());
    let state = State::training(1, 0);
    for (refused, is_deleted) in [(2, true), (3, false)] {
        state.save(&engine, 1).unwrap();
        place.rules().refused_deletions.store(refused, Ordering::Relaxed);
        match engine.delete(1) {
            Ok(freed_bytes) => assert!(is_deleted && freed_bytes > 0),
            Err(error) => {
                assert!(matches!(error, EngineError::StepConflict { .. }), "{error}");
                assert!(!is_deleted && error.to_string().contains("another writer"), "{error}");
                state.assert_equals(&engine.checkpoint(1).unwrap());
            }
        }
    }
}
