//! On how many threads a load decodes.
//!
//! Always holds: the count is that of threads that are at work at the same time, so the machine's
//! cores do not matter.

use std::collections::HashSet;
use std::sync::{Condvar, Mutex};
use std::thread::ThreadId;
use std::time::Duration;

use dtr_engine::io::pin::{Pin, Pinned};
use dtr_engine::load::{
    Checkpoint, Departure, DeviceDestination, DeviceTarget, ReadOptions, VerifyObserver,
};
use dtr_engine::{Config, Engine, Result};

use super::support::{State, config, scratch};

/// Memory of a device that keeps every thread until so many have come.
#[derive(Debug)]
struct Meeting {
    expected: usize,
    met: Mutex<HashSet<ThreadId>>,
    changed: Condvar,
}

impl Meeting {
    fn of(expected: usize) -> Self {
        Self { expected, met: Mutex::default(), changed: Condvar::new() }
    }

    fn meet(&self) {
        let mut met = self.met.lock().unwrap();
        met.insert(std::thread::current().id());
        self.changed.notify_all();
        let is_short = |met: &mut HashSet<ThreadId>| met.len() < self.expected;
        let waited = self.changed.wait_timeout_while(met, Duration::from_mins(1), is_short);
        assert!(!waited.unwrap().1.timed_out(), "fewer than {} threads", self.expected);
    }

    fn met(self) -> usize {
        self.met.into_inner().unwrap().len()
    }
}

#[derive(Debug)]
struct NotPinned;

impl Pinned for NotPinned {}

impl Pin for NotPinned {
    fn pin(&self, _: *mut u8, _: usize, _: usize) -> Result<Box<dyn Pinned>> {
        Ok(Box::new(Self))
    }
}

impl DeviceDestination for Meeting {
    fn begin(&self, _at: u64, departure: Departure) {
        self.meet();
        departure.arrived(Ok(()));
    }

    fn flush(&self) {}

    fn ordinal(&self) -> u32 {
        0
    }

    fn pin(&self) -> &dyn Pin {
        &NotPinned
    }
}

impl VerifyObserver for Meeting {
    fn advanced(&self, _stored_bytes: u64) {
        self.meet();
    }
}

/// Threads that decode a read of all storages.
fn threads_of_read(checkpoint: &Checkpoint, options: ReadOptions, expected: usize) -> usize {
    let meeting = Meeting::of(expected);
    let storages = (0..).zip(checkpoint.storages());
    let target = |(storage, record): (u32, &dtr_engine::format::index::StorageRecord)| {
        let bytes = usize::try_from(record.bytes).unwrap();
        DeviceTarget { storage, offset: 0, bytes, memory: &meeting, at: 0 }
    };
    checkpoint.read_to(Vec::new(), storages.map(target).collect(), options).unwrap();
    meeting.met()
}

#[test]
fn a_load_decodes_on_as_many_threads_as_were_asked_for() {
    let directory = scratch();
    for (step, workers) in [(1, 1), (2, 5)] {
        let config = Config { workers: Some(workers), ..config(directory.path()) };
        let engine = Engine::open(config).unwrap();
        State::training(1, 1).save(&engine, step).unwrap();
        let checkpoint = engine.checkpoint(step).unwrap();
        let expected = workers as usize;
        assert_eq!(threads_of_read(&checkpoint, ReadOptions::default(), expected), expected);
        let three = ReadOptions { workers: Some(3), ..ReadOptions::default() };
        assert_eq!(threads_of_read(&checkpoint, three, 3), 3);
    }
}

#[test]
fn verifying_takes_as_many_threads_as_were_asked_for() {
    let directory = scratch();
    let config = Config { workers: Some(5), ..config(directory.path()) };
    let engine = Engine::open(config).unwrap();
    State::training(1, 1).save(&engine, 1).unwrap();
    let meeting = Meeting::of(5);
    engine.verify(1, &meeting).unwrap();
    assert_eq!(meeting.met(), 5);
}
