//! A directory that drains into S3: commit locally, upload behind, read from where it is.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use dtr_engine::config::{Compression, S3Settings};
use dtr_engine::engine::GcOptions;
use dtr_engine::format::manifest::Manifest;
use dtr_engine::recovery::StepState;
use dtr_engine::{Config, Engine, EngineError};
use tempfile::TempDir;

use crate::faults::through;
use crate::place::{LONG, PART_BYTES, Place, config_at, open, until};
use crate::proxy::{Fault, Proxy};
use crate::support::{State, config, finish, scratch};

/// A directory in front of a store that nobody used before, and that store by itself.
fn tier(place: &Place) -> (TempDir, Config, Config) {
    let directory = scratch();
    let remote = place.config();
    let local = Config {
        s3: remote.s3.clone(),
        remote: Some(remote.path.to_str().unwrap().into()),
        compression: Compression::None,
        ..config(directory.path())
    };
    (directory, local, remote)
}

fn local_only(config: &Config) -> Config {
    Config { remote: None, ..config.clone() }
}

#[test]
fn what_is_committed_locally_is_uploaded_byte_for_byte() {
    let place = Place::new();
    let (_directory, local, remote) = tier(&place);
    let engine = open(local);
    for (step, scale) in [(1, 0), (2, 4), (3, 1)] {
        let state = State::training(step, scale);
        let info = state.save(&engine, step).unwrap();
        let uploaded = engine.uploaded(step, None).unwrap().unwrap().unwrap();
        assert_eq!(uploaded.bytes, info.stored_bytes);
        assert_eq!(uploaded.parts, info.stored_bytes.div_ceil(PART_BYTES));
        let remote = open(Config { read_only: true, ..remote.clone() });
        assert_eq!(remote.manifest(step).unwrap(), engine.manifest(step).unwrap());
        state.assert_equals(&remote.checkpoint(step).unwrap());
    }
}

#[test]
fn what_is_missing_locally_is_read_from_the_remote_store() {
    let place = Place::new();
    let (directory, local, _) = tier(&place);
    let state = State::training(1, 1);
    let engine = open(local.clone());
    state.save(&engine, 5).unwrap();
    engine.close().unwrap();
    for step in std::fs::read_dir(directory.path()).unwrap() {
        let path = step.unwrap().path();
        if path.is_dir() {
            std::fs::remove_dir_all(path).unwrap();
        }
    }
    let engine = open(local.clone());
    assert_eq!(engine.steps().unwrap(), [5]);
    state.assert_equals(&engine.checkpoint(5).unwrap());
    drop(engine);
    let reader = open(Config { read_only: true, ..local });
    state.assert_equals(&reader.checkpoint(5).unwrap());
}

/// Flips a bit of the shard that is in `directory`, at an offset from its start or its end.
fn damage(directory: &Path, offset: i64) {
    let step = directory.join("step-000000000005");
    let mut files = std::fs::read_dir(step).unwrap().map(|entry| entry.unwrap().path());
    let path = files.find(|path| path.extension().is_some_and(|end| end == "shard")).unwrap();
    let mut bytes = std::fs::read(&path).unwrap();
    let start = if offset < 0 { i64::try_from(bytes.len()).unwrap() } else { 0 };
    bytes[usize::try_from(start + offset).unwrap()] ^= 4;
    std::fs::write(path, bytes).unwrap();
}

#[test]
fn what_is_damaged_locally_is_read_from_the_remote_store() {
    let place = Place::new();
    // A chunk; then also the header, the index, the footer.
    for (offsets, compression) in [
        (&[9_000, 70_000][..], Compression::None),
        (&[9_000, 70_000], Compression::Float),
        (&[9_000, 8], Compression::None),
        (&[-5_000], Compression::None),
        (&[-4_000], Compression::None),
    ] {
        let (directory, mut local, remote) = tier(&place);
        local.compression = compression;
        let state = State::training(1, 1);
        let engine = open(local.clone());
        state.save(&engine, 5).unwrap();
        engine.uploaded(5, None).unwrap().unwrap().unwrap();
        engine.close().unwrap();
        for offset in offsets {
            damage(directory.path(), *offset);
        }
        let alone = open(Config { read_only: true, ..local_only(&local) });
        let error = alone.checkpoint(5).and_then(|read| state.try_assert_equals(&read));
        assert!(matches!(error, Err(EngineError::Corrupt { .. })), "{offsets:?}: {error:?}");
        for read_only in [true, false] {
            let engine = open(Config { read_only, ..local.clone() });
            let checkpoint = engine.checkpoint(5).unwrap();
            state.assert_equals(&checkpoint);
            let storages: Vec<u32> = (0..).take(checkpoint.index().storages.len()).collect();
            let mapped = checkpoint.map(&storages, true).unwrap();
            let is_left_out = storages.iter().any(|storage| mapped.range_of(*storage).is_none());
            assert_eq!(is_left_out, offsets[0] == 9_000, "what is whole here is mapped");
            let report = engine.verify(5, &()).unwrap();
            assert!(!report.damage.is_empty(), "verify tells of what is local: {offsets:?}");
        }
        let remote = open(remote);
        remote.delete(5).unwrap();
        let reader = open(Config { read_only: true, ..local });
        let error = reader.checkpoint(5).and_then(|read| state.try_assert_equals(&read));
        assert!(matches!(error, Err(EngineError::Corrupt { .. })), "{offsets:?}: {error:?}");
    }
}

#[test]
fn what_is_damaged_in_both_is_never_returned_and_the_step_before_is_there() {
    let Some(place) = Place::own("it damages objects") else { return };
    for (local_offset, remote_offset) in [(9_000, 9_001), (-4_000, -4_001), (8, 9)] {
        let (directory, local, remote) = tier(&place);
        let (before, state) = (State::training(4, 1), State::training(5, 1));
        let engine = open(local.clone());
        before.save(&engine, 4).unwrap();
        state.save(&engine, 5).unwrap();
        engine.close().unwrap();
        damage(directory.path(), local_offset);
        damage(&place.objects(&remote), remote_offset);
        for read_only in [true, false] {
            let engine = open(Config { read_only, ..local.clone() });
            let error = engine.checkpoint(5).and_then(|read| state.try_assert_equals(&read));
            assert!(
                matches!(error, Err(EngineError::Corrupt { .. })),
                "{remote_offset}: {error:?}"
            );
            before.assert_equals(&engine.checkpoint(4).unwrap());
        }
    }
}

/// A proxy before the service that refuses every request while the flag is set, and the settings of
/// a client of it.
fn proxy_that_can_be_away(
    place: &Place,
    remote: &Config,
    is_away: &Arc<AtomicBool>,
) -> (Proxy, S3Settings) {
    let is_away = Arc::clone(is_away);
    let plan = move |_| {
        let is_away = is_away.load(Ordering::SeqCst);
        if is_away { Fault::Answer(503, "SlowDown") } else { Fault::None }
    };
    let proxy = Proxy::start(place.address(), Arc::new(plan));
    let s3 = through(&proxy, remote).s3;
    (proxy, s3)
}

#[test]
fn a_remote_store_that_is_away_is_no_reason_to_go_back_a_step() {
    let place = Place::new();
    let (directory, local, remote) = tier(&place);
    let state = State::training(1, 1);
    let engine = open(local.clone());
    state.save(&engine, 5).unwrap();
    engine.close().unwrap();
    damage(directory.path(), 9_000);
    let is_away = Arc::new(AtomicBool::new(false));
    let (_proxy, s3) = proxy_that_can_be_away(&place, &remote, &is_away);
    let reader = open(Config { read_only: true, s3, ..local });
    let checkpoint = reader.checkpoint(5).unwrap();
    is_away.store(true, Ordering::SeqCst);
    let error = state.try_assert_equals(&checkpoint).unwrap_err();
    assert!(matches!(error, EngineError::Unavailable { .. }), "{error:?}");
    assert!(error.to_string().contains("chunk"), "says what was damaged: {error}");
    is_away.store(false, Ordering::SeqCst);
    state.assert_equals(&checkpoint);
}

#[test]
fn a_rewind_waits_for_the_remote_store_where_only_that_can_say_what_is_discarded() {
    let place = Place::new();
    let (directory, local, remote) = tier(&place);
    let is_away = Arc::new(AtomicBool::new(false));
    let (proxy, s3) = proxy_that_can_be_away(&place, &remote, &is_away);
    let local = Config { s3, ..local };
    let engine = open(local.clone());
    for step in 1..=2 {
        State::training(step, 0).save(&engine, step).unwrap();
        engine.uploaded(step, None).unwrap().unwrap().unwrap();
    }
    let manifest = directory.path().join("step-000000000002/manifest.json");
    std::fs::write(&manifest, b"not a manifest").unwrap();
    is_away.store(true, Ordering::SeqCst);
    let state = State::training(9, 0);
    let mut request = state.request(1);
    request.rewind = true;
    // Step 2 is whole in the remote store: unless the new step 1 retires it, it would come back.
    let error = engine.save(request).unwrap_err();
    assert!(matches!(error, EngineError::Unavailable { .. }), "{error:?}");
    is_away.store(false, Ordering::SeqCst);
    rewind(&engine, 9, 1);
    assert_eq!(engine.steps().unwrap(), [1]);
    engine.close().unwrap();
    drop(proxy);
    let local = Config { s3: remote.s3.clone(), ..local };
    assert_eq!(open(local).steps().unwrap(), [1]);
}

#[test]
fn what_a_process_left_is_uploaded_by_the_next_and_no_part_twice() {
    let Some(place) = Place::own("it waits until parts have arrived at the service") else {
        return;
    };
    let (_directory, local, remote) = tier(&place);
    let state = State::training(1, 6);
    // Slow enough to be caught in the act.
    let engine = open(Config { remote_bytes_per_second: Some(12 << 20), ..local.clone() });
    let info = state.save(&engine, 1).unwrap();
    assert!(engine.uploaded(1, Some(Duration::ZERO)).unwrap().is_none());
    until("an upload of two parts", || place.rules().arrived_parts() >= 2);
    // As a process that ends without closing.
    drop(engine);
    assert!(open(remote.clone()).steps().unwrap().is_empty());
    let engine = open(local);
    let uploaded = engine.uploaded(1, None).unwrap().unwrap().unwrap();
    assert_eq!(uploaded.parts, info.stored_bytes.div_ceil(PART_BYTES));
    assert!(uploaded.resumed_parts >= 2, "{uploaded:?}");
    state.assert_equals(&open(remote).checkpoint(1).unwrap());
    assert_eq!(place.unfinished(), 0);
}

#[test]
fn an_upload_that_is_not_wanted_any_more_leaves_no_parts() {
    let Some(place) = Place::own("it waits until parts have arrived at the service") else {
        return;
    };
    for dies_before in [false, true] {
        let (_directory, local, remote) = tier(&place);
        // Slow enough to be caught in the act.
        let slow = Config { remote_bytes_per_second: Some(12 << 20), ..local.clone() };
        let mut engine = open(slow);
        State::training(1, 6).save(&engine, 1).unwrap();
        until("an upload of a part", || place.rules().arrived_parts() >= 1);
        if dies_before {
            drop(engine);
            // Hours: it is at nothing when the step goes.
            engine = open(Config { remote_bytes_per_second: Some(1), ..local });
        }
        assert_eq!(place.unfinished(), 1);
        engine.delete(1).unwrap();
        engine.close().unwrap();
        assert_eq!(place.unfinished(), 0, "{dies_before}");
        assert!(open(remote).steps().unwrap().is_empty());
    }
}

#[test]
fn retention_waits_for_the_upload_unless_told_otherwise() {
    for remove_before_upload in [false, true] {
        let place = Place::new();
        let (directory, local, _) = tier(&place);
        // Hours: nothing arrives while the test looks.
        let engine = open(Config {
            keep_last_n: Some(1),
            remote_bytes_per_second: Some(1),
            remove_before_upload,
            ..local.clone()
        });
        let state = State::training(1, 0);
        for step in 1..=3 {
            state.save(&engine, step).unwrap();
        }
        let expected: &[u64] = if remove_before_upload { &[3] } else { &[1, 2, 3] };
        assert_eq!(engine.steps().unwrap(), expected);
        drop(engine);
        let local_alone = Engine::open(local_only(&local)).unwrap();
        assert_eq!(local_alone.steps().unwrap(), expected, "{}", directory.path().display());
    }
}

#[test]
fn what_retention_deletes_locally_is_deleted_from_the_remote_store_too() {
    let place = Place::new();
    let (_directory, local, remote) = tier(&place);
    let engine = open(Config { keep_last_n: Some(1), ..local });
    for step in 1..=3 {
        State::training(step, 0).save(&engine, step).unwrap();
        engine.uploaded(step, None).unwrap().unwrap().unwrap();
    }
    // When step 3 was committed, step 2 was the newest that had arrived.
    assert_eq!(engine.steps().unwrap(), [2, 3]);
    engine.drain(None).unwrap();
    assert_eq!(open(remote.clone()).steps().unwrap(), [2, 3]);
    // On request, they are gone from both when the call returns.
    assert!(engine.delete(3).unwrap() > 0);
    assert!(engine.delete(2).unwrap() > 0);
    assert!(open(remote).steps().unwrap().is_empty());
}

/// Another rank may be uploading a shard of the checkpoint that takes its place.
#[test]
fn a_step_that_never_arrived_takes_no_shard_of_another_rank_with_it() {
    let Some(place) = Place::own("it looks at the objects") else { return };
    let (_directory, local, remote) = tier(&place);
    let step = place.objects(&remote).join("step-000000000001");
    let others = step.join(format!("rank-00001.{}.shard", "5".repeat(32)));
    // Hours: nothing arrives while the test looks.
    let engine = open(Config { remote_bytes_per_second: Some(1), ..local });
    State::training(1, 0).save(&engine, 1).unwrap();
    std::fs::create_dir_all(&step).unwrap();
    std::fs::write(&others, b"fresh").unwrap();
    engine.delete(1).unwrap();
    assert!(others.exists());
    let report = open(remote).gc(GcOptions { dry_run: true, grace: Some(Duration::ZERO) }).unwrap();
    assert_eq!(report.removed.len(), 1, "{report:?}");
}

#[test]
fn a_rewind_and_an_overwritten_step_reach_the_remote_store() {
    let place = Place::new();
    let (_directory, local, remote) = tier(&place);
    let engine = open(local);
    for step in 1..=3 {
        State::training(step, 0).save(&engine, step).unwrap();
    }
    engine.drain(None).unwrap();
    assert_eq!(open(remote.clone()).steps().unwrap(), [1, 2, 3]);
    let other = State::training(9, 0);
    let mut request = other.request(2);
    request.rewind = true;
    assert_eq!(finish(&engine.save(request).unwrap()).unwrap().removed_steps, [3]);
    engine.close().unwrap();
    let remote = open(remote);
    assert_eq!(remote.steps().unwrap(), [1, 2]);
    other.assert_equals(&remote.checkpoint(2).unwrap());
}

fn rewind(engine: &Engine, seed: u64, step: u64) {
    let state = State::training(seed, 0);
    let mut request = state.request(step);
    request.rewind = true;
    finish(&engine.save(request).unwrap()).unwrap();
}

/// Says of a checkpoint in a directory that it began when the clock was an hour ahead.
fn begin_later(directory: &Path, step: u64) {
    let path = directory.join(format!("step-{step:012}/manifest.json"));
    let mut manifest = Manifest::decode(&std::fs::read(&path).unwrap()).unwrap();
    manifest.created_unix_ms += 60 * 60 * 1000;
    std::fs::write(&path, manifest.encode().unwrap()).unwrap();
}

#[test]
fn a_clock_that_was_ahead_makes_no_copy_the_later_one() {
    let place = Place::new();
    let (directory, local, remote) = tier(&place);
    let engine = open(local_only(&local));
    for step in 1..=3 {
        State::training(step, 0).save(&engine, step).unwrap();
        begin_later(directory.path(), step);
    }
    engine.close().unwrap();
    open(local.clone()).close().unwrap();
    assert_eq!(open(remote.clone()).steps().unwrap(), [1, 2, 3]);
    // The clock is right again, and the process dies before this is uploaded.
    let engine = open(Config { remote_bytes_per_second: Some(1), ..local.clone() });
    rewind(&engine, 9, 2);
    drop(engine);
    let engine = open(local);
    assert_eq!(engine.steps().unwrap(), [1, 2]);
    State::training(9, 0).assert_equals(&engine.checkpoint(2).unwrap());
    engine.close().unwrap();
    let remote = open(remote);
    assert_eq!(remote.steps().unwrap(), [1, 2]);
    State::training(9, 0).assert_equals(&remote.checkpoint(2).unwrap());
}

#[test]
fn a_manifest_that_is_damaged_locally_is_taken_from_the_remote_store_if_it_is_the_same() {
    let place = Place::new();
    let (directory, local, remote) = tier(&place);
    let engine = open(local.clone());
    for step in 1..=2 {
        State::training(step, 0).save(&engine, step).unwrap();
    }
    engine.close().unwrap();
    let step = directory.path().join("step-000000000002");
    let spoil = || {
        let manifest = step.join("manifest.json");
        let mut bytes = std::fs::read(&manifest).unwrap();
        bytes[100] ^= 1;
        std::fs::write(&manifest, bytes).unwrap();
    };
    spoil();
    for read_only in [true, false] {
        let engine = open(Config { read_only, ..local.clone() });
        assert_eq!(engine.steps().unwrap(), [1, 2]);
        State::training(2, 0).assert_equals(&engine.checkpoint(2).unwrap());
    }
    let engine = open(local.clone());
    State::training(3, 0).save(&engine, 3).unwrap();
    engine.close().unwrap();
    assert_eq!(open(remote.clone()).steps().unwrap(), [1, 2, 3]);
    // Another attempt of the step, which never arrived, may be the one that is damaged.
    let engine = open(Config { remote_bytes_per_second: Some(1), ..local.clone() });
    rewind(&engine, 9, 2);
    drop(engine);
    spoil();
    let engine = open(Config { read_only: true, ..local });
    assert!(matches!(engine.checkpoint(2).unwrap_err(), EngineError::Corrupt { .. }));
}

#[test]
fn a_shard_that_is_missing_remotely_is_uploaded_again() {
    let Some(place) = Place::own("it looks at the objects") else { return };
    let (_directory, local, remote) = tier(&place);
    let engine = open(local.clone());
    for step in 1..=2 {
        State::training(step, 0).save(&engine, step).unwrap();
    }
    engine.close().unwrap();
    let step = place.objects(&remote).join("step-000000000001");
    let shard = std::fs::read_dir(step).unwrap().map(|entry| entry.unwrap().path());
    let shard = shard.filter(|path| path.extension().is_some_and(|end| end == "shard"));
    std::fs::remove_file(shard.last().unwrap()).unwrap();
    let engine = open(local);
    let brought = engine.uploaded(1, None).unwrap().unwrap().unwrap();
    assert!(!brought.was_there);
    engine.close().unwrap();
    State::training(1, 0).assert_equals(&open(remote).checkpoint(1).unwrap());
}

/// What said that it was retired is gone from the directory by then.
#[test]
fn what_was_retired_while_the_remote_store_was_not_named_does_not_stand_again() {
    let place = Place::new();
    let (_directory, local, remote) = tier(&place);
    let engine = open(local.clone());
    for step in [1, 2, 5] {
        State::training(step, 0).save(&engine, step).unwrap();
    }
    engine.close().unwrap();
    let alone = Engine::open(Config { keep_last_n: Some(1), ..local_only(&local) }).unwrap();
    rewind(&alone, 8, 1);
    State::training(9, 0).save(&alone, 2).unwrap();
    assert_eq!(alone.steps().unwrap(), [2]);
    drop(alone);
    let engine = open(local);
    let survey = engine.survey().unwrap();
    assert_eq!(survey.newest(), Some(2));
    assert_eq!(survey.step(5).unwrap().state, StepState::Retired { by: 2 });
    State::training(9, 0).assert_equals(&engine.checkpoint(2).unwrap());
    State::training(3, 0).save(&engine, 3).unwrap();
    engine.close().unwrap();
    let steps = open(remote).steps().unwrap();
    assert!(steps.ends_with(&[2, 3]), "{steps:?}");
}

#[test]
fn a_removal_that_fails_while_all_is_drained_is_carried_out_later() {
    let Some(place) = Place::own("it lets the service refuse writes") else { return };
    let (_directory, local, remote) = tier(&place);
    let engine = open(local);
    for step in 1..=3 {
        State::training(step, 0).save(&engine, step).unwrap();
    }
    engine.drain(None).unwrap();
    place.rules().refuses_writes.store(true, Ordering::Relaxed);
    rewind(&engine, 9, 2);
    engine.drain(None).unwrap();
    let reader = open(Config { read_only: true, ..remote });
    assert_eq!(reader.steps().unwrap(), [1, 2, 3]);
    place.rules().refuses_writes.store(false, Ordering::Relaxed);
    engine.drain(None).unwrap();
    assert_eq!(reader.steps().unwrap(), [1, 2]);
}

#[test]
fn a_remote_store_that_fails_holds_up_nothing_but_uploads() {
    let Some(place) = Place::own("it lets the service refuse writes") else { return };
    let (_directory, local, remote) = tier(&place);
    let engine = open(local.clone());
    place.rules().refuses_writes.store(true, Ordering::Relaxed);
    let state = State::training(1, 0);
    for step in 1..=2 {
        state.save(&engine, step).unwrap();
    }
    state.assert_equals(&engine.checkpoint(2).unwrap());
    // Each is tried once more, and its outcome is reported.
    engine.drain(None).unwrap();
    let failed = engine.uploaded(1, None).unwrap().unwrap().unwrap_err();
    assert!(failed.to_string().contains("AccessDenied"), "{failed}");
    let left = engine.close().unwrap_err().to_string();
    assert!(left.starts_with("uploading step 2 to"), "{left}");
    assert!(left.contains("AccessDenied"), "{left}");
    engine.close().unwrap();
    place.rules().refuses_writes.store(false, Ordering::Relaxed);
    open(local).close().unwrap();
    let remote = open(config_at(&place.url(), remote.path.to_str().unwrap()));
    assert_eq!(remote.steps().unwrap(), [1, 2]);
}

#[test]
fn whoever_leaves_uploads_does_not_wait_for_a_service_that_stands_still() {
    let place = Place::new();
    let (_directory, local, remote) = tier(&place);
    let [stands_still, asked] = [(); 2].map(|()| Arc::new(AtomicBool::new(false)));
    let (stalls, is_asked) = (Arc::clone(&stands_still), Arc::clone(&asked));
    let plan = move |_| {
        let stalls = stalls.load(Ordering::SeqCst);
        is_asked.fetch_or(stalls, Ordering::SeqCst);
        if stalls { Fault::Stalled } else { Fault::None }
    };
    let proxy = Proxy::start(place.address(), Arc::new(plan));
    let mut s3 = through(&proxy, &remote).s3;
    // Longer than the test may take.
    s3.request_timeout_ms = 3_600_000;
    let engine = open(Config { s3, ..local.clone() });
    stands_still.store(true, Ordering::SeqCst);
    let state = State::training(1, 2);
    state.save(&engine, 1).unwrap();
    until("a request that stands still", || asked.load(Ordering::SeqCst));
    let start = Instant::now();
    engine.leave_uploads().unwrap();
    engine.close().unwrap();
    drop(engine);
    assert!(start.elapsed() < LONG);
    // The directory is free, and what is left to do is done.
    open(local).close().unwrap();
    state.assert_equals(&open(remote).checkpoint(1).unwrap());
}

#[test]
fn retention_catches_up_when_the_last_upload_has_ended() {
    let Some(place) = Place::own("it lets the service refuse writes") else { return };
    let (_directory, local, remote) = tier(&place);
    let engine = open(Config { keep_last_n: Some(2), ..local.clone() });
    place.rules().refuses_writes.store(true, Ordering::Relaxed);
    for step in 1..=5 {
        State::training(step, 0).save(&engine, step).unwrap();
    }
    assert_eq!(engine.steps().unwrap(), [1, 2, 3, 4, 5], "none is anywhere else");
    place.rules().refuses_writes.store(false, Ordering::Relaxed);
    engine.close().unwrap();
    assert_eq!(Engine::open(local_only(&local)).unwrap().steps().unwrap(), [4, 5]);
    assert_eq!(open(remote).steps().unwrap(), [4, 5]);
}
