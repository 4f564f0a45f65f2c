//! The space of what retention deleted is free before it is needed.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use dtr_engine::clock::System;
use dtr_engine::config::{Config, DirectIo, IoBackend};
use dtr_engine::engine::Components;
use dtr_engine::io::{EntryOp, EntryReply, File, Io, Length, OpenMode, Transfer, open_backend};
use dtr_engine::{Engine, EngineError};

use super::flat::Holdings;
use super::support::{State, config, scratch};

/// Says of a filesystem, as often as it is told to, that nothing is free.
#[derive(Debug)]
struct Scarce {
    inner: Arc<dyn Io>,
    full: AtomicU32,
}

impl Io for Scarce {
    fn name(&self) -> &'static str {
        self.inner.name()
    }

    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Arc<File>> {
        self.inner.open(path, mode)
    }

    fn submit(&self, transfer: Transfer) {
        self.inner.submit(transfer);
    }

    fn set_length(&self, file: &File, length: Length) -> io::Result<()> {
        self.inner.set_length(file, length)
    }

    fn sync(&self, file: &File) -> io::Result<()> {
        self.inner.sync(file)
    }

    fn entry(&self, operation: &EntryOp) -> io::Result<EntryReply> {
        let reply = self.inner.entry(operation)?;
        let EntryReply::Space { total_bytes, .. } = reply else { return Ok(reply) };
        let one_less = |full: u32| full.checked_sub(1);
        match self.full.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_less) {
            Ok(_) => Ok(EntryReply::Space { total_bytes, free_bytes: 0 }),
            Err(_) => Ok(reply),
        }
    }
}

#[test]
fn a_save_that_finds_too_little_room_asks_again() {
    let directory = scratch();
    let inner = open_backend(IoBackend::Threads, DirectIo::Auto).unwrap();
    let scarce = Arc::new(Scarce { inner, full: AtomicU32::new(0) });
    let io: Arc<dyn Io> = Arc::<Scarce>::clone(&scarce);
    let config = Config { keep_last_n: Some(1), ..config(directory.path()) };
    let environment = Arc::new(System::default());
    let engine = Engine::open_with(config, Components { io, environment }).unwrap();
    let state = State::training(1, 0);
    state.save(&engine, 1).unwrap();
    scarce.full.store(1, Ordering::Relaxed);
    state.save(&engine, 2).unwrap();
    assert_eq!(scarce.full.load(Ordering::Relaxed), 0);
    scarce.full.store(2, Ordering::Relaxed);
    let error = state.save(&engine, 3).unwrap_err();
    assert!(matches!(error, EngineError::NoSpace { .. }), "{error}");
    state.save(&engine, 4).unwrap();
    assert_eq!(engine.steps().unwrap(), [4]);
}

#[test]
fn an_engine_that_saves_no_more_holds_nothing_that_was_deleted() {
    let directory = scratch();
    let config = Config { keep_last_n: Some(1), ..config(directory.path()) };
    let engine = Engine::open(config).unwrap();
    for step in 1..=3 {
        assert_eq!(State::training(1, 0).save(&engine, step).unwrap().step, step);
    }
    let end = Instant::now() + Duration::from_secs(10);
    while deleted_under(directory.path()) > 0 {
        assert!(Instant::now() < end, "a deleted shard is open still");
        std::thread::yield_now();
    }
    assert_eq!(engine.steps().unwrap(), [3]);
}

/// Descriptors of this process on files below `path` that have no name any more.
fn deleted_under(path: &Path) -> usize {
    let path = path.canonicalize().unwrap().display().to_string();
    let targets = Holdings::now().descriptors.into_values();
    targets.filter(|target| target.starts_with(&path) && target.ends_with(" (deleted)")).count()
}
