//! The life of a store: order of steps, retention, rewind, locks, damage, closing.

use std::time::Duration;

use dtr_engine::config::BestMode;
use dtr_engine::engine::GcOptions;
use dtr_engine::save::SaveRequest;
use dtr_engine::{Config, Engine, EngineError};

use super::support::{State, config, finish, scratch};

/// A writer goes on only where its lock is found: elsewhere another one may be at work.
#[test]
fn a_store_that_another_one_took_the_place_of_is_not_written_to() {
    let directory = scratch();
    let path = directory.path().join("store");
    let state = State::training(1, 0);
    let former = Engine::open(config(&path)).unwrap();
    state.save(&former, 1).unwrap();
    std::fs::rename(&path, directory.path().join("aside")).unwrap();
    let check_refused = || {
        let saved = state.save(&former, 9).map(drop);
        for result in [saved, former.delete(1).map(drop)] {
            let error = result.unwrap_err();
            assert!(matches!(error, EngineError::Closed { .. }), "{error}");
            assert!(error.to_string().contains("its writer lock no longer exists"), "{error}");
        }
    };
    for result in [state.save(&former, 9).map(drop), former.delete(1).map(drop)] {
        result.unwrap_err(); // there is nothing at all
    }
    let present = Engine::open(config(&path)).unwrap();
    state.save(&present, 1).unwrap();
    check_refused();
    assert_eq!(present.steps().unwrap(), [1]);
    drop(present);
    std::fs::remove_dir_all(&path).unwrap();
    std::fs::rename(directory.path().join("aside"), &path).unwrap();
    state.save(&former, 2).unwrap();
    assert_eq!(former.steps().unwrap(), [1, 2]);
    std::fs::remove_file(path.join("writer.lock")).unwrap();
    check_refused();
}

/// Where the staging arena is in memory, if it has room for this.
fn arena_of(engine: &Engine, bytes: u64) -> Option<usize> {
    engine.lend_staging(bytes, None).unwrap().map(|slab| slab.start() as usize)
}

#[test]
fn an_arena_is_taken_over_where_it_would_do() {
    let directory = scratch();
    let open = |name: &str| Engine::open(config(&directory.path().join(name))).unwrap();
    let state = State::training(1, 1);
    let [first, second, third] = ["a", "b", "c"].map(open);
    state.save(&first, 1).unwrap();
    let arena = arena_of(&first, 4 << 20).unwrap();

    second.take_staging_of(&first).unwrap();
    assert_eq!((arena_of(&first, 1), arena_of(&second, 4 << 20)), (None, Some(arena)));
    state.save(&second, 1).unwrap();
    state.assert_equals(&second.checkpoint(1).unwrap());
    state.save(&first, 2).unwrap();
    state.assert_equals(&first.checkpoint(2).unwrap());

    let own = arena_of(&first, 1);
    first.take_staging_of(&second).unwrap();
    assert_eq!(arena_of(&first, 1), own, "who has one keeps it");
    let small = Config { staging_bytes: Some(1 << 20), ..config(&directory.path().join("d")) };
    let coarse = Config { chunk_bytes: 128 << 10, ..config(&directory.path().join("e")) };
    for config in [small, coarse] {
        let other = Engine::open(config).unwrap();
        other.take_staging_of(&second).unwrap();
        assert_eq!(arena_of(&other, 1), None, "it has to be one that this engine might make");
    }
    let lent = second.lend_staging(1, None).unwrap();
    third.take_staging_of(&second).unwrap();
    assert_eq!(arena_of(&third, 1), None, "what is lent stays");
    drop(lent);
    second.take_staging_of(&second).unwrap();
    third.take_staging_of(&second).unwrap();
    second.close().unwrap();
    assert_eq!(arena_of(&third, 1), Some(arena));
}

#[test]
fn steps_only_go_forward_unless_rewound() {
    let directory = scratch();
    let engine = Engine::open(config(directory.path())).unwrap();
    let state = State::training(1, 0);
    for step in [10, 20, 30] {
        state.save(&engine, step).unwrap();
    }
    for step in [5, 20, 30] {
        let error = engine.save(state.request(step)).unwrap_err();
        assert!(matches!(error, EngineError::StepConflict { .. }), "{error}");
        assert!(error.to_string().contains("rewind"), "{error}");
    }
    let other = State::training(2, 0);
    let mut request = other.request(20);
    request.rewind = true;
    let info = finish(&engine.save(request).unwrap()).unwrap();
    assert_eq!(info.removed_steps, [30]);
    assert_eq!(engine.steps().unwrap(), [10, 20]);
    other.assert_equals(&engine.checkpoint(20).unwrap());
    state.save(&engine, 21).unwrap();
}

#[test]
fn retention_keeps_the_newest_the_multiples_and_the_step_restored_from() {
    let directory = scratch();
    let config = Config { keep_last_n: Some(2), keep_every: Some(100), ..config(directory.path()) };
    let engine = Engine::open(config).unwrap();
    let state = State::training(1, 0);
    state.save(&engine, 50).unwrap();
    engine.protect(50).unwrap();
    for step in [100, 150, 200, 250, 300] {
        state.save(&engine, step).unwrap();
    }
    assert_eq!(engine.steps().unwrap(), [50, 100, 200, 250, 300]);
}

#[test]
fn retention_keeps_the_best_by_a_metric_and_a_rewind_ends_those_too() {
    let directory = scratch();
    let config = Config {
        keep_last_n: Some(1),
        keep_best_n: Some(2),
        best_metric: Some("loss".into()),
        ..config(directory.path())
    };
    let state = State::training(1, 0);
    let save = |engine: &Engine, step, rewind, loss: Option<f64>| {
        let metadata = loss.into_iter().map(|loss| ("loss".into(), loss.into())).collect();
        finish(&engine.save(SaveRequest { metadata, rewind, ..state.request(step) }).unwrap())
            .unwrap()
            .removed_steps
    };
    let engine = Engine::open(config.clone()).unwrap();
    for (step, loss, removed) in
        [(1, Some(0.5), vec![]), (2, Some(0.1), vec![]), (3, Some(0.3), vec![1]), (4, None, vec![])]
    {
        assert_eq!(save(&engine, step, false, loss), removed, "step {step}");
    }
    engine.close().unwrap();
    let engine = Engine::open(config.clone()).unwrap();
    assert_eq!(save(&engine, 5, false, Some(0.2)), [3, 4], "known after reopening, too");
    assert_eq!(save(&engine, 6, false, Some(0.9)), [0; 0]);
    assert_eq!(engine.steps().unwrap(), [2, 5, 6]);
    assert_eq!(engine.best_steps("loss", BestMode::Min).unwrap(), [2, 5, 6]);
    assert_eq!(engine.best_steps("loss", BestMode::Max).unwrap(), [6, 5, 2]);
    assert_eq!(engine.best_steps("none of this name", BestMode::Min).unwrap(), [0; 0]);
    assert_eq!(engine.metadata(5).unwrap()["loss"], 0.2);
    let gone = engine.metadata(3).unwrap_err();
    assert!(matches!(gone, EngineError::NotFound { .. }), "{gone}");
    save(&engine, 3, true, Some(0.8));
    assert_eq!(engine.steps().unwrap(), [2, 3], "a rewind ends the best of what it leaves behind");
}

#[test]
fn a_second_writer_is_refused_and_a_reader_is_not() {
    let directory = scratch();
    let writer = Engine::open(config(directory.path())).unwrap();
    let error = Engine::open(config(directory.path())).unwrap_err();
    assert!(matches!(error, EngineError::StoreBusy { .. }), "{error}");
    let reader = Engine::open(Config { read_only: true, ..config(directory.path()) }).unwrap();
    let state = State::training(1, 1);
    // In the middle of a save the reader sees what is committed, and no more.
    let handle = writer.save(state.request(1)).unwrap();
    assert!(reader.steps().unwrap().len() <= 1);
    finish(&handle).unwrap();
    state.assert_equals(&reader.checkpoint(1).unwrap());
    assert!(matches!(reader.delete(1).unwrap_err(), EngineError::InvalidArgument { .. }));
    writer.close().unwrap();
    drop(Engine::open(config(directory.path())).unwrap());
}

#[test]
fn closing_waits_for_the_save_in_flight() {
    let directory = scratch();
    let engine = Engine::open(config(directory.path())).unwrap();
    let state = State::training(1, 2);
    let handle = engine.save(state.request(3)).unwrap();
    engine.close().unwrap();
    assert!(handle.is_done());
    assert!(matches!(engine.steps().unwrap_err(), EngineError::Closed { .. }));
    engine.close().unwrap();
    let engine = Engine::open(config(directory.path())).unwrap();
    state.assert_equals(&engine.checkpoint(3).unwrap());
}

#[test]
fn a_cancelled_save_leaves_nothing_and_its_error_is_not_swallowed() {
    let directory = scratch();
    let engine = Engine::open(config(directory.path())).unwrap();
    let state = State::training(1, 4);
    state.save(&engine, 1).unwrap();
    let handle = engine.save(state.request(2)).unwrap();
    handle.cancel("the test says so");
    handle.wait(None);
    // Cancelled in time or not, the store holds whole checkpoints only.
    let steps = engine.steps().unwrap();
    match engine.wait_until_finished(None) {
        Ok(_) => assert_eq!(steps, [1, 2]),
        Err(error) => {
            assert!(error.to_string().contains("the test says so"), "{error}");
            assert_eq!(steps, [1]);
        }
    }
    engine.wait_until_finished(None).unwrap();
}

#[test]
fn deleting_and_cleaning() {
    let directory = scratch();
    let engine = Engine::open(config(directory.path())).unwrap();
    let state = State::training(1, 0);
    for step in 1..=3 {
        state.save(&engine, step).unwrap();
    }
    assert!(engine.delete(2).unwrap() > 0);
    assert_eq!(engine.steps().unwrap(), [1, 3]);
    let error = engine.delete(2).unwrap_err();
    assert!(matches!(error, EngineError::NotFound { .. }), "{error}");

    let mut request = state.request(3);
    request.rewind = true;
    finish(&engine.save(request).unwrap()).unwrap();
    // The replaced attempt's shard is kept for readers until the grace period is over.
    let young = engine.gc(GcOptions::default()).unwrap();
    assert_eq!((young.removed.len(), young.kept.len()), (0, 1), "{young:?}");
    let dry = GcOptions { dry_run: true, grace: Some(Duration::ZERO) };
    assert_eq!(engine.gc(dry).unwrap().removed.len(), 1);
    let now = GcOptions { dry_run: false, grace: Some(Duration::ZERO) };
    let report = engine.gc(now).unwrap();
    assert_eq!(report.removed.len(), 1, "{report:?}");
    assert!(report.freed_bytes > 0);
    state.assert_equals(&engine.checkpoint(3).unwrap());
}

#[test]
fn a_full_store_is_noticed_before_anything_is_written() {
    let directory = scratch();
    let engine = Engine::open(config(directory.path())).unwrap();
    let empty = State(Vec::new());
    let mut request = empty.request(1);
    let source: Vec<u8> = Vec::new();
    request.storages = vec![dtr_engine::save::StorageInput {
        bytes: 1 << 50,
        element: dtr_engine::format::layout::ElementType::Bytes,
        source: &source,
    }];
    // Larger chunks, or the number of chunks is what is refused.
    let error = engine.save(request).unwrap_err();
    assert!(
        matches!(error, EngineError::NoSpace { .. } | EngineError::InvalidArgument { .. }),
        "{error}"
    );
    assert_eq!(engine.survey().unwrap().steps.len(), 0);
}

#[test]
fn shards_beside_one_are_of_its_attempt_until_they_are_cleaned_away() {
    let directory = scratch();
    let engine = Engine::open(config(directory.path())).unwrap();
    let (state, other) = (State::training(1, 0), State::training(2, 0));
    state.save(&engine, 1).unwrap();
    let own = engine.checkpoint(1).unwrap();
    let mut request = other.request(1);
    request.rewind = true;
    finish(&engine.save(request).unwrap()).unwrap();
    state.assert_equals(&engine.shard_beside(&own, 0).unwrap());
    let error = engine.shard_beside(&own, 1).unwrap_err();
    assert!(matches!(error, EngineError::InvalidArgument { .. }), "{error}");
    engine.gc(GcOptions { dry_run: false, grace: Some(Duration::ZERO) }).unwrap();
    let error = engine.shard_beside(&own, 0).unwrap_err();
    assert!(matches!(error, EngineError::NotFound { .. }), "{error}");
    assert!(error.to_string().contains("another attempt has replaced it"), "{error}");
    // Of one that stands, it is damage.
    let own = engine.checkpoint(1).unwrap();
    let file = &own.manifest().shards[0].file;
    std::fs::remove_file(directory.path().join("step-000000000001").join(file)).unwrap();
    let error = engine.shard_beside(&own, 0).unwrap_err();
    assert!(matches!(error, EngineError::Corrupt { .. }), "{error}");
}
