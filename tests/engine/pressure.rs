//! Stages that wait for each other: a slow directory, many workers, a device that comes back.

use std::io;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use dtr_engine::clock::System;
use dtr_engine::config::{Compression, Config, DirectIo, IoBackend};
use dtr_engine::engine::Components;
use dtr_engine::io::sim::{FaultKind, LoggedOp, OpKind, Plan, Sim, Times, Trigger};
use dtr_engine::io::{EntryOp, Io, open_backend};
use dtr_engine::store_copy::Overwrite;
use dtr_engine::{Engine, EngineError};

use super::support::{State, config, finish, scratch};
use super::tap::{Operation, Tap, Watcher};

fn backend() -> Arc<dyn Io> {
    open_backend(IoBackend::Threads, DirectIo::Auto).unwrap()
}

fn open(config: Config, io: Arc<dyn Io>) -> Engine {
    Engine::open_with(config, Components { io, environment: Arc::new(System::default()) }).unwrap()
}

/// Leaves a store with these steps, which nobody has open.
fn save_steps(store: &Path, state: &State, steps: &[u64]) {
    let engine = open(config(store), backend());
    for step in steps {
        state.save(&engine, *step).unwrap();
    }
}

/// Holds what it is about back until it is released.
#[derive(Debug)]
struct Gate {
    is_held: fn(&OpKind) -> bool,
    state: Mutex<GateState>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct GateState {
    is_open: bool,
    is_reached: bool,
}

impl Gate {
    fn at(is_held: fn(&OpKind) -> bool) -> Arc<Self> {
        Arc::new(Self { is_held, state: Mutex::default(), changed: Condvar::new() })
    }

    fn open(&self) {
        self.state.lock().unwrap().is_open = true;
        self.changed.notify_all();
    }

    /// Waits until something is held back.
    fn wait(&self) {
        let state = self.state.lock().unwrap();
        drop(self.changed.wait_while(state, |state| !state.is_reached).unwrap());
    }
}

fn makes_step_directory(kind: &OpKind) -> bool {
    let OpKind::Entry(EntryOp::CreateDir(path)) = kind else { return false };
    path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("step-"))
}

impl Watcher for Gate {
    fn before(&self, operation: &Operation) {
        if (self.is_held)(&operation.kind) {
            let mut state = self.state.lock().unwrap();
            state.is_reached = true;
            self.changed.notify_all();
            drop(self.changed.wait_while(state, |state| !state.is_open).unwrap());
        }
    }

    fn after(&self, _operation: &Operation, _error: Option<&io::Error>) {}
}

#[test]
fn many_workers_cannot_starve_the_committer() {
    const WORKERS: u32 = 16;
    let directory = scratch();
    let gate = Gate::at(makes_step_directory);
    let config = Config {
        compression: Compression::Float,
        workers: Some(WORKERS),
        ..config(directory.path())
    };
    let chunk_bytes = u64::from(config.chunk_bytes);
    let engine = open(config, Tap::new(backend(), &gate));
    let state = State::training(1, 3);
    let handle = engine.save(state.request(1)).unwrap();
    // The queue towards the committer is full, and the workers hold what they encoded besides.
    while handle.progress().encoded_bytes < u64::from(2 * WORKERS) * chunk_bytes {
        std::thread::yield_now();
    }
    gate.open();
    assert!(handle.wait(Some(Duration::from_mins(2))), "the save hangs");
    finish(&handle).unwrap();
    state.assert_equals(&engine.checkpoint(1).unwrap());
}

#[test]
fn a_manifest_that_could_not_be_read_for_a_moment_is_retired_by_a_rewind_all_the_same() {
    let directory = scratch();
    let state = State::training(1, 0);
    save_steps(directory.path(), &state, &[10, 20]);

    let sim = Arc::new(Sim::new(backend(), Plan::default()));
    let engine = open(config(directory.path()), Arc::<Sim>::clone(&sim));
    let is_manifest_of_20 = |operation: &LoggedOp| {
        matches!(operation.kind, OpKind::Open(_))
            && operation.path.ends_with("step-000000000020/manifest.json")
    };
    let fail = |times| {
        let trigger = Trigger::Matching(Box::new(is_manifest_of_20));
        sim.set_plan(Plan::single(trigger, times, FaultKind::Error(5)));
    };
    fail(Times::Once);
    assert_eq!(engine.steps().unwrap(), [10], "the others can be listed");
    fail(Times::Forever);
    let mut request = state.request(15);
    request.rewind = true;
    let error = engine.save(request).unwrap_err();
    assert!(matches!(error, EngineError::Io { .. }), "{error}");
    sim.set_plan(Plan::default());
    assert_eq!(engine.steps().unwrap(), [10, 20], "it was never damaged");
    let mut request = state.request(15);
    request.rewind = true;
    finish(&engine.save(request).unwrap()).unwrap();
    assert_eq!(engine.steps().unwrap(), [10, 15]);
}

#[test]
fn a_save_does_not_go_past_a_later_step_that_cannot_be_read_for_a_moment() {
    let directory = scratch();
    let state = State::training(1, 0);
    save_steps(directory.path(), &state, &[10, 20]);

    let sim = Arc::new(Sim::new(backend(), Plan::default()));
    let engine = open(config(directory.path()), Arc::<Sim>::clone(&sim));
    let is_manifest_of_20 = |operation: &LoggedOp| {
        matches!(operation.kind, OpKind::Open(_))
            && operation.path.ends_with("step-000000000020/manifest.json")
    };
    let trigger = Trigger::Matching(Box::new(is_manifest_of_20));
    sim.set_plan(Plan::single(trigger, Times::Forever, FaultKind::Error(5)));
    assert_eq!(engine.steps().unwrap(), [10], "the others can be listed");
    let error = engine.save(state.request(15)).unwrap_err();
    assert!(matches!(error, EngineError::Io { .. }), "{error}");
    sim.set_plan(Plan::default());
    let error = engine.save(state.request(15)).unwrap_err();
    assert!(matches!(error, EngineError::StepConflict { .. }), "{error}");
    state.save(&engine, 25).unwrap();
    assert_eq!(engine.steps().unwrap(), [10, 20, 25]);
}

#[test]
fn a_directory_that_cannot_be_listed_hides_no_other() {
    let directory = scratch();
    let state = State::training(1, 0);
    save_steps(directory.path(), &state, &[10, 20, 30]);

    let sim = Arc::new(Sim::new(backend(), Plan::default()));
    let engine = open(config(directory.path()), Arc::<Sim>::clone(&sim));
    let is_listing_of_20 = |operation: &LoggedOp| {
        matches!(operation.kind, OpKind::Entry(EntryOp::List(_)))
            && operation.path.ends_with("step-000000000020")
    };
    let fail = |errno| {
        let trigger = Trigger::Matching(Box::new(is_listing_of_20));
        sim.set_plan(Plan::single(trigger, Times::Forever, FaultKind::Error(errno)));
    };
    for errno in [5, 13] {
        fail(errno);
        assert_eq!(engine.steps().unwrap(), [10, 30]);
        for step in [20, 30] {
            state.assert_equals(&engine.checkpoint(step).unwrap()); // by name nothing is listed
        }
    }
    state.save(&engine, 40).unwrap();
    for rewind in [false, true] {
        let mut request = state.request(15);
        request.rewind = rewind;
        let error = engine.save(request).unwrap_err();
        assert!(matches!(error, EngineError::Io { .. }), "it could not be retired: {error}");
    }
    fail(24);
    let error = engine.steps().unwrap_err();
    assert!(matches!(error, EngineError::Io { .. }), "of this process, not of a step: {error}");
    sim.set_plan(Plan::default());
    assert_eq!(engine.steps().unwrap(), [10, 20, 30, 40]);
}

#[test]
fn a_damaged_step_that_a_save_leaves_behind_does_not_come_back_as_the_newest() {
    let directory = scratch();
    let state = State::training(1, 0);
    save_steps(directory.path(), &state, &[10, 20]);
    // Not there for a while, as on a filesystem of another machine.
    let (step, aside) = (directory.path().join("step-000000000020"), directory.path().join("20"));
    std::fs::create_dir(&aside).unwrap();
    for file in std::fs::read_dir(&step).unwrap().map(Result::unwrap) {
        std::fs::copy(file.path(), aside.join(file.file_name())).unwrap();
        if file.path().extension().is_some_and(|end| end == "shard") {
            std::fs::remove_file(file.path()).unwrap();
        }
    }
    let engine = open(config(directory.path()), backend());
    assert_eq!(engine.steps().unwrap(), [10]);
    state.save(&engine, 15).unwrap();
    drop(engine);
    let _gone = std::fs::remove_dir_all(&step);
    std::fs::rename(&aside, &step).unwrap();
    let engine = open(config(directory.path()), backend());
    assert_eq!(engine.steps().unwrap(), [10, 15]);
}

#[test]
fn a_step_that_cannot_be_removed_holds_up_no_other() {
    let directory = scratch();
    let state = State::training(1, 0);
    save_steps(directory.path(), &state, &[10, 20, 30]);

    let sim = Arc::new(Sim::new(backend(), Plan::default()));
    let settings = Config { keep_last_n: Some(1), ..config(directory.path()) };
    let engine = open(settings, Arc::<Sim>::clone(&sim));
    let is_removal_of_10 = |operation: &LoggedOp| {
        matches!(operation.kind, OpKind::Entry(EntryOp::RemoveFile(_)))
            && operation.path.ends_with("step-000000000010/manifest.json")
    };
    let trigger = Trigger::Matching(Box::new(is_removal_of_10));
    sim.set_plan(Plan::single(trigger, Times::Forever, FaultKind::Error(5)));
    assert_eq!(state.save(&engine, 40).unwrap().removed_steps, [20, 30]);
    assert_eq!(engine.steps().unwrap(), [10, 40]);
    sim.set_plan(Plan::default());
    assert_eq!(state.save(&engine, 50).unwrap().removed_steps, [10, 40]);
}

#[test]
fn what_a_deletion_left_undone_is_not_taken_for_what_was_there_before() {
    let directory = scratch();
    let state = State::training(1, 0);
    let sim = Arc::new(Sim::new(backend(), Plan::default()));
    let engine = open(config(directory.path()), Arc::<Sim>::clone(&sim));
    state.save(&engine, 1).unwrap();
    let is_shard_removed = |operation: &LoggedOp| {
        matches!(operation.kind, OpKind::Entry(EntryOp::RemoveFile(_)))
            && operation.path.extension().is_some_and(|end| end == "shard")
    };
    let trigger = Trigger::Matching(Box::new(is_shard_removed));
    sim.set_plan(Plan::single(trigger, Times::Once, FaultKind::Error(5)));
    assert!(matches!(engine.delete(1).unwrap_err(), EngineError::Io { .. }));
    // Its manifest is gone, so nothing is in the way.
    state.save(&engine, 1).unwrap();
    state.assert_equals(&engine.checkpoint(1).unwrap());
}

/// Else it could take the place of what was looked at, and be deleted in its place.
#[test]
fn no_save_begins_while_a_checkpoint_is_deleted() {
    let directory = scratch();
    let gate = Gate::at(|kind| matches!(kind, OpKind::Entry(EntryOp::RemoveFile(_))));
    let engine = open(config(directory.path()), Tap::new(backend(), &gate));
    let state = State::training(1, 0);
    state.save(&engine, 1).unwrap();
    // A save takes its turn for the arena.
    let may_save = || engine.lend_staging(1, None).unwrap().is_some();
    assert!(may_save());
    std::thread::scope(|scope| {
        let deleter = scope.spawn(|| engine.delete(1));
        gate.wait();
        let could_save = may_save();
        gate.open();
        deleter.join().unwrap().unwrap();
        assert!(!could_save);
    });
    state.save(&engine, 1).unwrap();
    state.assert_equals(&engine.checkpoint(1).unwrap());
}

/// Else both would publish the step, and one of them over what the other one had looked at.
#[test]
fn no_save_begins_where_a_checkpoint_is_copied_to() {
    let (here, there) = (scratch(), scratch());
    let gate = Gate::at(makes_step_directory);
    let source = open(config(here.path()), backend());
    let destination = open(config(there.path()), Tap::new(backend(), &gate));
    let state = State::training(1, 0);
    state.save(&source, 1).unwrap();
    destination.prewarm(1 << 20).unwrap();
    // A save takes its turn for the arena.
    let may_save = |engine: &Engine| engine.lend_staging(1, None).unwrap().is_some();
    assert!(may_save(&destination));
    std::thread::scope(|scope| {
        let copier = scope.spawn(|| source.copy_to(&destination, 1, Overwrite::No, &()));
        gate.wait();
        let could_save = [&source, &destination].map(may_save);
        gate.open();
        copier.join().unwrap().unwrap();
        assert_eq!(could_save, [true, false]);
    });
    state.save(&destination, 2).unwrap();
    state.assert_equals(&destination.checkpoint(1).unwrap());
}

#[test]
fn a_copy_to_where_it_is_ends() {
    let directory = scratch();
    let engine = open(config(directory.path()), backend());
    let state = State::training(1, 0);
    state.save(&engine, 1).unwrap();
    assert!(engine.copy_to(&engine, 1, Overwrite::No, &()).unwrap().was_there);
    state.assert_equals(&engine.checkpoint(1).unwrap());
}

#[test]
fn a_wait_with_a_time_limit_ends_while_another_thread_saves() {
    let directory = scratch();
    let gate = Gate::at(makes_step_directory);
    let small = Config { staging_bytes: Some(4 << 16), ..config(directory.path()) };
    let engine = open(small, Tap::new(backend(), &gate));
    let state = State::training(1, 1);
    std::thread::scope(|scope| {
        let saver = scope.spawn(|| state.save(&engine, 1));
        // The snapshot cannot end before the gate opens: it is larger than the arena.
        while engine.wait_until_finished(Some(Duration::from_millis(1))).unwrap() {
            std::thread::yield_now();
        }
        gate.open();
        saver.join().unwrap().unwrap();
    });
    assert_eq!(engine.steps().unwrap(), [1]);
}
