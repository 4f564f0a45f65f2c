//! The life of a store in S3: retention, rewind, deleting, cleaning, many steps.

use std::sync::atomic::Ordering;
use std::time::Duration;

use dtr_engine::engine::GcOptions;
use dtr_engine::{Config, EngineError};

use crate::place::{Place, open};
use crate::support::{State, finish};

const NOW: GcOptions = GcOptions { dry_run: false, grace: Some(Duration::ZERO) };

#[test]
fn retention_and_rewind_and_deleting() {
    let place = Place::new();
    let engine = open(Config { keep_last_n: Some(2), keep_every: Some(100), ..place.config() });
    let state = State::training(1, 0);
    for step in [50, 100, 150, 200, 250] {
        state.save(&engine, step).unwrap();
    }
    assert_eq!(engine.steps().unwrap(), [100, 200, 250]);
    let error = engine.save(state.request(200)).unwrap_err();
    assert!(matches!(error, EngineError::StepConflict { .. }), "{error}");
    let other = State::training(2, 0);
    let mut request = other.request(200);
    request.rewind = true;
    let info = finish(&engine.save(request).unwrap()).unwrap();
    assert_eq!((info.removed_steps, engine.steps().unwrap()), (vec![250], vec![100, 200]));
    other.assert_equals(&engine.checkpoint(200).unwrap());
    // What it replaced is kept for readers until the grace period is over.
    let young = engine.gc(GcOptions::default()).unwrap();
    assert_eq!((young.removed.len(), young.kept.len()), (0, 1), "{young:?}");
    let report = engine.gc(NOW).unwrap();
    assert!(report.removed.len() == 1 && report.freed_bytes > 0, "{report:?}");
    assert!(engine.delete(100).unwrap() > 0);
    assert_eq!(engine.steps().unwrap(), [200]);
    other.assert_equals(&engine.checkpoint(200).unwrap());
    assert!(engine.gc(NOW).unwrap().removed.is_empty());
}

/// The service reports times to the second, and one manifest is as long as the other.
#[test]
fn a_step_that_is_saved_again_within_a_second_is_known_by_its_new_attempt() {
    let place = Place::new();
    let engine = open(place.config());
    let state = State::training(1, 0);
    state.save(&engine, 4).unwrap();
    for _ in 0..10 {
        let mut request = state.request(5);
        request.rewind = true;
        let saved = finish(&engine.save(request).unwrap()).unwrap();
        let known = engine.survey().unwrap().step(5).unwrap().attempt.unwrap();
        assert_eq!(known.to_string(), saved.attempt);
    }
}

#[test]
fn a_cancelled_save_gives_its_upload_up() {
    let place = Place::new();
    let engine = open(place.config());
    let state = State::training(1, 6);
    let handle = engine.save(state.request(1)).unwrap();
    handle.cancel("the test says so");
    let ended = finish(&handle);
    assert_eq!(place.unfinished(), 0);
    let report = engine.gc(NOW).unwrap();
    // Cancelled in time or not, nothing is half there.
    assert_eq!(ended.is_ok(), engine.steps().unwrap() == [1]);
    assert!(report.removed.is_empty(), "{report:?}");
}

#[test]
fn uploads_of_dead_processes_are_cleaned_after_the_grace_period() {
    let Some(place) = Place::own("it lets the service refuse to give uploads up") else { return };
    let engine = open(place.config());
    let state = State::training(1, 6);
    // Nobody can give an upload up: as if the process died.
    place.rules().refuses_aborts.store(true, Ordering::Relaxed);
    while place.unfinished() == 0 {
        let handle = engine.save(state.request(1)).unwrap();
        while place.unfinished() == 0 && !handle.is_done() {
            std::thread::yield_now();
        }
        handle.cancel("the test says so");
        if finish(&handle).is_ok() {
            engine.delete(1).unwrap();
        }
    }
    place.rules().refuses_aborts.store(false, Ordering::Relaxed);
    let report = engine.gc(GcOptions::default()).unwrap();
    assert_eq!((report.removed.len(), report.kept.len()), (0, 1), "{report:?}");
    let dry = engine.gc(GcOptions { dry_run: true, ..NOW }).unwrap();
    assert_eq!((dry.removed.len(), place.unfinished()), (1, 1), "{dry:?}");
    assert_eq!(engine.gc(NOW).unwrap().removed.len(), 1);
    assert_eq!(place.unfinished(), 0);
}

#[test]
fn thousands_of_steps_come_page_by_page_and_strangers_are_left_out() {
    let Some(place) = Place::own("it writes into the service and shortens its pages") else {
        return;
    };
    place.rules().page.store(100, Ordering::Relaxed);
    let config = place.config();
    let engine = open(config.clone());
    let state = State::training(1, 0);
    for step in [1, 5000, 1_000_000_000_000] {
        state.save(&engine, step).unwrap();
    }
    let store = place.objects(&config);
    let shard = "rank-00000.00112233445566778899aabbccddeeff.shard";
    for step in 10..2510 {
        let step = store.join(format!("step-{step:012}"));
        std::fs::create_dir(&step).unwrap();
        std::fs::write(step.join(shard), [0; 10]).unwrap();
    }
    for stranger in ["step-7/manifest.json", "step-000000000010/notes.txt", "other/x/y"] {
        let path = store.join(stranger);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, "not ours").unwrap();
    }
    let survey = engine.survey().unwrap();
    assert_eq!(survey.committed_steps(), [1, 5000, 1_000_000_000_000]);
    assert_eq!(survey.steps.len(), 2503);
    let report = engine.gc(NOW).unwrap();
    assert_eq!(report.removed.len(), 2500);
    assert!(store.join("step-000000000010/notes.txt").exists());
}
