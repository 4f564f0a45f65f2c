//! Checkpoints from one store to another, byte for byte, and on from where a copy broke off.

use std::sync::atomic::{AtomicU64, Ordering};

use dtr_engine::config::Compression;
use dtr_engine::load::VerifyObserver;
use dtr_engine::store_copy::Overwrite;
use dtr_engine::{Config, Engine, EngineError};

use crate::place::{PART_BYTES, Place, open};
use crate::support::{State, config, scratch};

/// Counts what is sent.
#[derive(Default)]
struct Sent(AtomicU64);

impl VerifyObserver for Sent {
    fn advanced(&self, _stored_bytes: u64) {}

    fn sent(&self, bytes: u64) {
        self.0.fetch_add(bytes, Ordering::Relaxed);
    }
}

/// Cancels once so many bytes were passed on.
struct Until(u64, AtomicU64);

impl VerifyObserver for Until {
    fn advanced(&self, stored_bytes: u64) {
        self.1.fetch_add(stored_bytes, Ordering::Relaxed);
    }

    fn is_cancelled(&self) -> bool {
        self.1.load(Ordering::Relaxed) > self.0
    }
}

#[test]
fn a_copy_has_the_same_bytes_there_and_back() {
    let place = Place::new();
    let (first, last) = (scratch(), scratch());
    let local = Engine::open(config(first.path())).unwrap();
    let back = Engine::open(config(last.path())).unwrap();
    let remote = open(place.config());
    for (step, scale) in [(1, 0), (2, 4)] {
        let state = State::training(step, scale);
        let info = state.save(&local, step).unwrap();
        let up = local.copy_to(&remote, step, Overwrite::No, &()).unwrap();
        let parts = info.stored_bytes.div_ceil(PART_BYTES);
        assert_eq!((up.bytes, up.parts, up.resumed_parts), (info.stored_bytes, parts, 0));
        let down = remote.copy_to(&back, step, Overwrite::No, &()).unwrap();
        assert_eq!((down.bytes, down.parts), (info.stored_bytes, 0));
        assert!(remote.copy_to(&back, step, Overwrite::No, &()).unwrap().was_there);
        assert_eq!(remote.manifest(step).unwrap(), local.manifest(step).unwrap());
        assert_eq!(back.manifest(step).unwrap(), local.manifest(step).unwrap());
        state.assert_equals(&remote.checkpoint(step).unwrap());
        assert!(back.verify(step, &()).unwrap().damage.is_empty());
    }
    // Another checkpoint of the same step is not overwritten.
    let other = open(place.config());
    State::training(9, 0).save(&other, 1).unwrap();
    let error = local.copy_to(&other, 1, Overwrite::No, &()).unwrap_err();
    assert!(matches!(error, EngineError::StepConflict { .. }), "{error}");
}

#[test]
fn a_copy_that_broke_off_is_resumed_and_sends_no_part_twice() {
    let place = Place::new();
    let directory = scratch();
    let settings = config(directory.path());
    let local = Engine::open(Config { compression: Compression::None, ..settings }).unwrap();
    let state = State::training(1, 6);
    let info = state.save(&local, 1).unwrap();
    let store = place.config();
    let broken = {
        let remote = open(store.clone());
        let until = Until(3 * PART_BYTES + PART_BYTES / 2, AtomicU64::new(0));
        local.copy_to(&remote, 1, Overwrite::No, &until).unwrap_err()
    };
    assert!(matches!(broken, EngineError::Closed { .. }), "{broken}");
    assert_eq!(place.unfinished(), 1);
    let remote = open(store);
    assert!(remote.steps().unwrap().is_empty());
    let sent = Sent::default();
    let copied = local.copy_to(&remote, 1, Overwrite::No, &sent).unwrap();
    assert_eq!(copied.parts, info.stored_bytes.div_ceil(PART_BYTES));
    // A limit of the rate counts what goes, not what was there.
    let resumed_bytes = copied.resumed_parts * PART_BYTES;
    assert_eq!(sent.0.into_inner(), info.stored_bytes - resumed_bytes);
    // Those that were under way when it broke off may or may not have arrived.
    assert!((1..=3).contains(&copied.resumed_parts), "{copied:?}");
    assert_eq!(place.unfinished(), 0);
    assert!(remote.verify(1, &()).unwrap().damage.is_empty());
    state.assert_equals(&remote.checkpoint(1).unwrap());
}

#[test]
fn a_shard_that_arrived_of_a_copy_that_was_not_published_is_not_sent_again() {
    let Some(place) = Place::own("it takes a manifest away") else { return };
    let directory = scratch();
    let local = Engine::open(config(directory.path())).unwrap();
    let state = State::training(1, 1);
    let info = state.save(&local, 1).unwrap();
    let store = place.config();
    let remote = open(store.clone());
    assert_eq!(local.copy_to(&remote, 1, Overwrite::No, &()).unwrap().bytes, info.stored_bytes);
    let step = place.objects(&store).join("step-000000000001");
    std::fs::remove_file(step.join("manifest.json")).unwrap();
    assert!(remote.steps().unwrap().is_empty());
    let again = local.copy_to(&remote, 1, Overwrite::No, &()).unwrap();
    assert_eq!((again.bytes, again.was_there), (0, false));
    state.assert_equals(&remote.checkpoint(1).unwrap());
    // What is there in part is.
    std::fs::remove_file(step.join("manifest.json")).unwrap();
    let shard = step.join(&local.manifest(1).unwrap().shards[0].file);
    let bytes = std::fs::read(&shard).unwrap();
    std::fs::write(&shard, &bytes[..bytes.len() - 4096]).unwrap();
    let again = local.copy_to(&remote, 1, Overwrite::No, &()).unwrap();
    assert_eq!((again.bytes, again.was_there), (info.stored_bytes, false));
    state.assert_equals(&remote.checkpoint(1).unwrap());
}

#[test]
fn a_copy_into_a_directory_that_was_killed_is_done_again() {
    let place = Place::new();
    let directory = scratch();
    let remote = open(place.config());
    let state = State::training(1, 1);
    state.save(&remote, 1).unwrap();
    let local = Engine::open(config(directory.path())).unwrap();
    // What a process leaves that did not come to its end.
    let shard = &remote.manifest(1).unwrap().shards[0];
    let step = directory.path().join("step-000000000001");
    std::fs::create_dir(&step).unwrap();
    std::fs::write(step.join(&shard.file), vec![1; 9000]).unwrap();
    remote.copy_to(&local, 1, Overwrite::No, &()).unwrap();
    assert!(local.verify(1, &()).unwrap().damage.is_empty());
    state.assert_equals(&local.checkpoint(1).unwrap());
}

#[test]
fn damage_is_not_copied() {
    let place = Place::new();
    let directory = scratch();
    let local = Engine::open(config(directory.path())).unwrap();
    State::training(1, 1).save(&local, 1).unwrap();
    let shard = std::fs::read_dir(directory.path().join("step-000000000001")).unwrap();
    let is_shard = |path: &std::path::PathBuf| path.extension().is_some_and(|end| end == "shard");
    let shard = shard.map(|entry| entry.unwrap().path()).find(is_shard).unwrap();
    let mut bytes = std::fs::read(&shard).unwrap();
    bytes[100_000] ^= 1;
    std::fs::write(&shard, bytes).unwrap();
    let remote = open(place.config());
    let error = local.copy_to(&remote, 1, Overwrite::No, &()).unwrap_err();
    assert!(matches!(error, EngineError::Corrupt { .. }), "{error}");
    assert!(remote.steps().unwrap().is_empty());
}
