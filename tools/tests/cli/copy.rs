//! Checkpoints from one store to another: what is copied, what is not, and what is said of it.
//!
//! Always holds here: the source is a directory, and so is the destination.

use std::fs::{self, OpenOptions};
use std::path::PathBuf;

use dtr_engine::config::Compression;
use dtr_engine::{Config, Engine};

use crate::state::{State, Store};
use crate::tool::{self, Run};

/// A store, and another one that it is copied to.
struct Pair {
    store: Store,
    copy: PathBuf,
}

impl Pair {
    fn of(store: Store) -> Self {
        let copy = store.beside("copy");
        Self { store, copy }
    }

    fn copied(store: Store) -> Self {
        let pair = Self::of(store);
        pair.copy_all(&[], 0);
        pair
    }

    /// Copies every step.
    #[track_caller]
    fn copy_all(&self, more: &[&str], status: i32) -> Run {
        let run = self.store.run("copy", &[&[self.to(), "--all"], more].concat());
        assert_eq!(run.status, status, "{run:?}");
        run
    }

    fn to(&self) -> &str {
        self.copy.to_str().unwrap()
    }

    /// The shard of a step in the copy.
    fn shard(&self, step: u64) -> PathBuf {
        let name = self.store.file(step, ".shard").file_name().unwrap().to_owned();
        self.copy.join(format!("step-{step:012}")).join(name)
    }

    /// The committed steps of the copy.
    fn steps(&self) -> Vec<u64> {
        let engine = Engine::open(Config { read_only: true, ..Config::new(&self.copy) }).unwrap();
        engine.steps().unwrap()
    }
}

/// Goes back and saves these steps, with attempts of their own.
fn go_back(store: &Store, steps: &[u64]) {
    let config = Config { compression: Compression::None, ..Config::new(store.path()) };
    let engine = Engine::open(config).unwrap();
    for step in steps {
        let state = State::at(*step);
        let mut request = state.request();
        request.rewind = true;
        engine.save(request).unwrap().result(None).unwrap().unwrap();
    }
    engine.close().unwrap();
}

#[test]
fn what_is_missing_in_a_copy_is_brought() {
    let pair = Pair::copied(Store::trained());
    let again = pair.copy_all(&[], 0);
    assert_eq!(again.stdout, "step 10: there already\nstep 20: there already\n");
    fs::remove_file(pair.shard(20)).unwrap();
    assert_eq!(pair.steps(), [10]);
    let mended = pair.copy_all(&["--json"], 0).json();
    assert_eq!((&mended[0]["was_there"], &mended[1]["was_there"]), (&true.into(), &false.into()));
    assert_eq!(tool::run(["verify", pair.to(), "--all"]).status, 0);
    assert_eq!(pair.steps(), [10, 20]);
}

#[test]
fn a_damaged_copy_is_not_there() {
    let pair = Pair::copied(Store::trained());
    let shard = pair.shard(10);
    let file = OpenOptions::new().write(true).open(&shard).unwrap();
    file.set_len(file.metadata().unwrap().len() - 4096).unwrap();
    let run = pair.store.run("copy", &[pair.to(), "--step", "10"]);
    run.assert_error(1);
    assert!(run.stderr.contains("this file of it is damaged"), "{run:?}");
    let run = pair.copy_all(&[], 1);
    assert!(run.stdout.contains("step 10: NOT COPIED: "), "{run:?}");
    assert!(run.stdout.ends_with("step 20: there already\n"), "{run:?}");
    fs::remove_file(&shard).unwrap();
    pair.copy_all(&[], 0);
    assert_eq!(tool::run(["verify", pair.to(), "--all"]).status, 0);
}

#[test]
fn no_step_is_passed_over_in_silence() {
    let pair = Pair::of(Store::trained());
    fs::remove_file(pair.store.file(20, ".shard")).unwrap();
    let run = pair.store.run("copy", &[pair.to()]);
    run.assert_error(1);
    let run = pair.copy_all(&[], 1);
    assert!(run.stdout.starts_with("step 10: "), "{run:?}");
    assert!(run.stdout.contains("\nstep 20: NOT COPIED: "), "{run:?}");
    let json = pair.copy_all(&["--json"], 1).json();
    assert!(json[0]["error"].is_null() && json[1]["error"].is_string(), "{json}");
    assert_eq!(pair.steps(), [10]);
}

#[test]
fn what_a_training_went_back_over_ends_in_a_copy_only_if_told() {
    let pair = Pair::copied(Store::trained());
    go_back(&pair.store, &[15, 20]);
    let run = pair.copy_all(&[], 1);
    let told = "step 15: NOT COPIED: copying step 15: this checkpoint was saved by a rewind that \
                discarded step 20";
    assert!(run.stdout.contains(told), "{run:?}");
    assert!(run.stdout.contains("step 20: NOT COPIED: "), "{run:?}");
    assert_eq!(pair.steps(), [10, 20]);
    pair.copy_all(&["--rewind"], 0);
    assert_eq!(pair.steps(), [10, 15, 20]);
    assert_eq!(tool::run(["verify", pair.to(), "--all"]).status, 0);
}

#[test]
fn what_ceased_to_exist_is_not_copied_back() {
    let pair = Pair::copied(Store::trained());
    go_back(&pair.store, &[15]);
    let store = pair.store.path();
    for more in [&[][..], &["--rewind"]] {
        let arguments = [&["copy", pair.to(), store.to_str().unwrap(), "--step", "20"], more];
        let run = tool::run(arguments.concat());
        run.assert_error(1);
        assert!(run.stderr.contains("it was discarded there"), "{run:?}");
    }
}

#[test]
fn restoring_into_a_store_ends_no_later_step_that_is_damaged() {
    let pair = Pair::copied(Store::trained());
    let shard = pair.shard(20);
    let aside = pair.store.beside("aside");
    fs::rename(&shard, &aside).unwrap();
    let run = pair.store.run("restore", &["--step", "10", "-o", pair.to()]);
    run.assert_error(1);
    assert!(run.stderr.contains("step 20 there is damaged"), "{run:?}");
    fs::rename(&aside, &shard).unwrap();
    assert_eq!(pair.steps(), [10, 20]);
}
