//! A clock that jumps deletes nothing that is young, and hides nothing that is committed.

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use dtr_engine::clock::Environment;
use dtr_engine::engine::{Components, GcOptions};
use dtr_engine::format::names::{AttemptId, shard_file_name, step_dir_name};
use dtr_engine::save::SaveRequest;
use dtr_engine::{Config, Engine, Result};

use super::budget::scratch;
use super::state::{self, Counter, State};

const DAY: Duration = Duration::from_hours(24);
const YEAR: Duration = Duration::from_hours(24 * 365);

/// A clock that is set by the test.
#[derive(Debug)]
struct Set {
    unix_ms: AtomicU64,
    ids: Arc<Counter>,
}

impl Environment for Set {
    fn monotonic(&self) -> Duration {
        Duration::ZERO
    }

    fn unix_ms(&self) -> u64 {
        self.unix_ms.load(Ordering::Relaxed)
    }

    fn thread_cpu(&self) -> Duration {
        Duration::ZERO
    }

    fn attempt_id(&self) -> Result<AttemptId> {
        self.ids.attempt_id()
    }
}

#[test]
fn a_clock_set_back_reorders_and_deletes_no_checkpoint() {
    let directory = scratch();
    let now_ms = 1_800_000_000_000;
    let year_ms = u64::try_from(YEAR.as_millis()).unwrap();
    let clock = Arc::new(Set { unix_ms: AtomicU64::new(now_ms), ids: Counter::starting_at(1) });
    let config = Config { keep_last_n: Some(2), ..state::config(directory.path()) };
    let environment: Arc<dyn Environment> = Arc::<Set>::clone(&clock);
    let engine =
        Engine::open_with(config, Components { io: state::backend(), environment }).unwrap();
    let state = State::new(1, &[5000]);
    for (step, unix_ms) in [(1, now_ms), (2, now_ms - year_ms), (3, 0), (4, now_ms + year_ms)] {
        clock.unix_ms.store(unix_ms, Ordering::Relaxed);
        state::finish(&engine.save(state.request(step, 0)).unwrap()).unwrap();
        // The newest by step, whatever its time says.
        assert_eq!(engine.steps().unwrap().last(), Some(&step));
        engine.gc(GcOptions::default()).unwrap();
    }
    engine.wait_until_finished(None).unwrap();
    assert_eq!(engine.steps().unwrap(), [3, 4]);
    for step in [3, 4] {
        assert!(state.is_in(&engine.checkpoint(step).unwrap()).unwrap());
    }
}

#[test]
fn what_takes_the_place_of_another_says_that_it_began_later() {
    let directory = scratch();
    let clock = Arc::new(Set { unix_ms: AtomicU64::new(5000), ids: Counter::starting_at(1) });
    let environment: Arc<dyn Environment> = Arc::<Set>::clone(&clock);
    let components = Components { io: state::backend(), environment };
    let engine = Engine::open_with(state::config(directory.path()), components).unwrap();
    let state = State::new(1, &[5000]);
    for (step, unix_ms, rewind, said) in
        [(1, 9000, false, 9000), (2, 8000, false, 8000), (3, 70, false, 70), (1, 60, true, 9001)]
    {
        clock.unix_ms.store(unix_ms, Ordering::Relaxed);
        let request = SaveRequest { rewind, ..state.request(step, 0) };
        state::finish(&engine.save(request).unwrap()).unwrap();
        assert_eq!(engine.manifest(step).unwrap().created_unix_ms, said, "step {step}");
    }
}

/// A shard of an attempt that was never committed, last written at `modified`.
fn orphan(store: &std::path::Path, rank: u32, modified: SystemTime) -> std::path::PathBuf {
    let path = store.join(step_dir_name(1)).join(shard_file_name(rank, AttemptId([9; 16])));
    let file = File::create(&path).unwrap();
    file.set_modified(modified).unwrap();
    path
}

#[test]
fn what_was_written_after_the_clock_was_set_back_is_young() {
    let directory = scratch();
    let ids = Counter::starting_at(1);
    let engine = state::open(state::config(directory.path()), &state::backend(), &ids).unwrap();
    let state = State::new(1, &[5000]);
    state::finish(&engine.save(state.request(1, 0)).unwrap()).unwrap();
    let now = SystemTime::now();
    // To a clock that was set back, these were written in the future.
    let young = [now + YEAR, now + DAY, now + Duration::from_mins(1), now - DAY / 2];
    let young: Vec<_> =
        (1..).zip(young).map(|(rank, at)| orphan(directory.path(), rank, at)).collect();
    let old = orphan(directory.path(), 9, now - 2 * DAY);
    let report = engine.gc(GcOptions { dry_run: false, grace: Some(DAY) }).unwrap();
    assert_eq!((report.removed.len(), report.kept.len()), (0, 5), "beside a young manifest");
    // The manifest that took their place is older than the grace period too.
    let manifest = directory.path().join(step_dir_name(1)).join("manifest.json");
    File::options().append(true).open(manifest).unwrap().set_modified(now - 3 * DAY).unwrap();
    let report = engine.gc(GcOptions { dry_run: false, grace: Some(DAY) }).unwrap();
    assert_eq!((report.removed.len(), report.kept.len()), (1, 4));
    assert!(!old.exists() && young.iter().all(|path| path.exists()));
    assert!(state.is_in(&engine.checkpoint(1).unwrap()).unwrap());
}
