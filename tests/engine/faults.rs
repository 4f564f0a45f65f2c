//! Every single operation of a save, or of a load, fails: once and forever, in several ways, on
//! every backend. The previous checkpoint stays, the error is typed, nothing half-made is visible,
//! and the next save on a healthy device succeeds.

use std::path::Path;
use std::sync::Arc;

use dtr_engine::clock::System;
use dtr_engine::config::{Config, DirectIo, IoBackend};
use dtr_engine::engine::Components;
use dtr_engine::io::open_backend;
use dtr_engine::io::sim::{FaultKind, OpKind, Plan, Sim, Times, Trigger};
use dtr_engine::load::{ReadOptions, Target};
use dtr_engine::{Engine, EngineError};

use super::support::{State, config, finish, scratch};

const EIO: i32 = 5;
const EAGAIN: i32 = 11;
const EDQUOT: i32 = 122;
const ENOSPC: i32 = 28;

const FAULTS: [FaultKind; 8] = [
    FaultKind::Error(EIO),
    FaultKind::Error(ENOSPC),
    FaultKind::Error(EDQUOT),
    FaultKind::Error(EAGAIN),
    FaultKind::ErrorAfter(EIO),
    FaultKind::Short,
    FaultKind::Nothing,
    FaultKind::Tear,
];

/// A simulated device over a real one.
fn device(io_backend: IoBackend, plan: Plan) -> Option<Arc<Sim>> {
    match open_backend(io_backend, DirectIo::Auto) {
        Ok(inner) => Some(Arc::new(Sim::new(inner, plan))),
        Err(error) => {
            println!("skipped: {io_backend:?}, because {error}");
            None
        }
    }
}

fn open(config: Config, sim: &Arc<Sim>) -> dtr_engine::Result<Engine> {
    let io = Arc::<Sim>::clone(sim);
    Engine::open_with(config, Components { io, environment: Arc::new(System::default()) })
}

/// The store as somebody finds it who knows nothing of the fault.
fn check_survivors(path: &Path, before: &State, during: &State, context: &str) -> Vec<u64> {
    let engine = Engine::open(config(path)).unwrap();
    let steps = engine.steps().unwrap();
    assert!(steps.starts_with(&[1]), "{context}: step 1 is gone, {steps:?} are left");
    before.assert_equals(&engine.checkpoint(1).unwrap());
    if steps.contains(&2) {
        during.assert_equals(&engine.checkpoint(2).unwrap());
    }
    for step in &steps {
        assert_eq!(engine.verify(*step, &()).unwrap().damage, [], "{context}");
    }
    before.save(&engine, 3).unwrap();
    steps
}

/// One save of step 2 with a fault; what the caller was returned must be true. False when the save
/// is over before its operation `number`.
fn save_with_fault(io_backend: IoBackend, fault: FaultKind, times: Times, number: u64) -> bool {
    let context = format!("{fault:?} {times:?} at operation {number} on {io_backend:?}");
    let directory = scratch();
    let (before, during) = (State::training(1, 0), State::training(2, 0));
    let Some(sim) = device(io_backend, Plan::default()) else { return false };
    let engine = open(config(directory.path()), &sim).unwrap();
    before.save(&engine, 1).unwrap();
    let first = sim.operations();
    sim.set_plan(Plan::single(Trigger::Number(first + number), times, fault));
    let outcome = engine.save(during.request(2)).and_then(|handle| finish(&handle));
    let reached = sim.operations() > first + number;
    sim.set_plan(Plan::default());
    let committed = match &outcome {
        Ok(_) => true,
        Err(error) => {
            assert!(error.to_string().contains("\nhint: "), "{context}: {error}");
            assert!(!matches!(error, EngineError::Internal { .. }), "{context}: {error}");
            false
        }
    };
    let _told_already = engine.close();
    drop(engine);
    let steps = check_survivors(directory.path(), &before, &during, &context);
    if committed {
        assert!(steps.contains(&2), "{context}: acknowledged and not there");
    }
    reached
}

fn every_operation(io_backend: IoBackend) {
    let mut cases = 0;
    for fault in FAULTS {
        for times in [Times::Once, Times::Forever] {
            let mut number = 0;
            while save_with_fault(io_backend, fault, times, number) {
                number += 1;
                cases += 1;
            }
        }
    }
    println!("{cases} faults injected on {io_backend:?}");
}

#[test]
fn every_operation_of_a_save_may_fail_on_threads() {
    every_operation(IoBackend::Threads);
}

#[test]
fn every_operation_of_a_save_may_fail_on_uring() {
    every_operation(IoBackend::Uring);
}

#[test]
fn a_failed_sync_is_never_repeated_on_its_file() {
    let directory = scratch();
    let Some(sim) = device(IoBackend::Threads, Plan::default()) else { return };
    let engine = open(config(directory.path()), &sim).unwrap();
    let is_sync =
        |operation: &dtr_engine::io::sim::LoggedOp| matches!(operation.kind, OpKind::Sync);
    let trigger = Trigger::Matching(Box::new(is_sync));
    sim.set_plan(Plan::single(trigger, Times::Once, FaultKind::Error(EIO)));
    let state = State::training(1, 0);
    let error = state.save(&engine, 1).unwrap_err();
    assert!(matches!(error, EngineError::Io { .. }), "{error}");
    sim.set_plan(Plan::default());
    state.save(&engine, 1).unwrap();
    let mut synced: Vec<_> = sim
        .log()
        .iter()
        .filter(|operation| is_sync(operation))
        .map(|operation| operation.path.clone())
        .collect();
    let all = synced.len();
    synced.sort();
    synced.dedup();
    assert_eq!(synced.len(), all, "a file was synced twice: {synced:?}");
    assert!(all >= 3, "the failed shard, the shard and the manifest: {synced:?}");
}

#[test]
fn every_read_of_a_load_may_fail_or_lie() {
    let directory = scratch();
    let state = State::training(3, 0);
    let Some(sim) = device(IoBackend::Threads, Plan::default()) else { return };
    let engine = open(config(directory.path()), &sim).unwrap();
    state.save(&engine, 1).unwrap();
    let mut refused = 0;
    for fault in [FaultKind::Error(EIO), FaultKind::FlipBit, FaultKind::Nothing, FaultKind::Short] {
        for number in 0.. {
            let at = sim.operations() + number;
            sim.set_plan(Plan::single(Trigger::Number(at), Times::Once, fault));
            // Wrong bytes are never returned: `assert_equals` fails on them.
            let loaded = engine.checkpoint(1).and_then(|checkpoint| {
                let mut memory = vec![0; state.0[1].bytes.len()];
                let storage = checkpoint.index().tensors[1].storage;
                let target = Target { storage, offset: 0, memory: &mut memory };
                checkpoint.read(vec![target], ReadOptions::default())?;
                assert!(memory == state.0[1].bytes, "{fault:?} at {number}: wrong bytes returned");
                Ok(())
            });
            let reached = sim.operations() > at;
            sim.set_plan(Plan::default());
            if let Err(error) = loaded {
                assert!(!matches!(error, EngineError::Internal { .. }), "{error}");
                refused += 1;
            }
            if !reached {
                break;
            }
        }
    }
    assert!(refused > 10, "only {refused} faults were noticed");
    state.assert_equals(&engine.checkpoint(1).unwrap());
}
