//! What is in flight, and the early sync, in every order of their threads' steps: see
//! [`crate::sync`].
//!
//! Always holds here: a thread that waits forever ends the test.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use loom::thread;

use super::early_sync::sync_until_ended;
use super::flight::Flight;
use crate::EngineError;
use crate::clock::Manual;
use crate::io::{EntryOp, EntryReply, File, Io, Length, OpenMode, Transfer};
use crate::store::flow::Flow;
use crate::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

fn flight(bytes_max: u64) -> Arc<Flight> {
    let flow = Flow::new(Arc::new(Manual::default()), None);
    flow.captured();
    Arc::new(Flight::new(bytes_max, Arc::new(flow)))
}

fn failure() -> EngineError {
    EngineError::internal("writing", "the device is gone")
}

/// Writes `bytes`; at most `bytes_max` may then be under way.
fn write(flight: &Flight, under_way: &AtomicU64, bytes: u64, bytes_max: u64) {
    flight.start(bytes).unwrap();
    let before = under_way.fetch_add(bytes, Ordering::Relaxed);
    assert!(before + bytes <= bytes_max, "{before} + {bytes} bytes are in flight");
    under_way.fetch_sub(bytes, Ordering::Relaxed);
    flight.land(bytes, Ok(()));
}

#[track_caller]
fn check_writers(allowed_bytes: u64, writes: [u64; 3], bytes_max: u64) {
    loom::model(move || {
        let flight = flight(allowed_bytes);
        let under_way = Arc::new(AtomicU64::new(0));
        let [own, others @ ..] = writes;
        let others = others.map(|bytes| {
            let (flight, under_way) = (Arc::clone(&flight), Arc::clone(&under_way));
            thread::spawn(move || write(&flight, &under_way, bytes, bytes_max))
        });
        write(&flight, &under_way, own, bytes_max);
        others.into_iter().for_each(|other| other.join().unwrap());
        flight.check().unwrap();
    });
}

#[test]
fn no_more_is_in_flight_than_allowed_and_all_get_their_turn() {
    check_writers(2, [2, 1, 1], 2);
}

#[test]
fn a_write_larger_than_allowed_goes_alone() {
    check_writers(1, [2, 2, 2], 2);
}

#[test]
fn after_a_failure_nothing_starts_and_nobody_waits() {
    loom::model(|| {
        let flight = flight(2);
        flight.start(1).unwrap();
        let writer = thread::spawn({
            let flight = Arc::clone(&flight);
            move || flight.start(2).is_err()
        });
        let syncer = thread::spawn({
            let flight = Arc::clone(&flight);
            move || flight.wait_for_landed(9)
        });
        flight.land(1, Err(failure()));
        assert!(writer.join().unwrap());
        assert!(!syncer.join().unwrap(), "a sync after a failure could falsely succeed");
        assert!(flight.check().is_err());
    });
}

#[test]
fn the_end_waits_for_every_write() {
    loom::model(|| {
        let flight = flight(2);
        let landed = Arc::new(AtomicUsize::new(0));
        let devices = [(); 2].map(|()| {
            flight.start(1).unwrap();
            let (flight, landed) = (Arc::clone(&flight), Arc::clone(&landed));
            thread::spawn(move || {
                landed.fetch_add(1, Ordering::Relaxed);
                flight.land(1, Ok(()));
            })
        });
        flight.wait_until_landed();
        assert_eq!(landed.load(Ordering::Relaxed), 2);
        devices.into_iter().for_each(|device| device.join().unwrap());
    });
}

/// A device that only syncs, and may fail to.
#[derive(Debug)]
struct Device {
    fails: bool,
    syncs: AtomicUsize,
    /// Set when the sync thread is gone.
    finished: AtomicUsize,
}

impl Io for Device {
    fn name(&self) -> &'static str {
        "model"
    }

    fn open(&self, _: &Path, _: OpenMode) -> io::Result<Arc<File>> {
        unreachable!("the sync thread opens nothing")
    }

    fn submit(&self, _: Transfer) {
        unreachable!("the sync thread transfers nothing")
    }

    fn set_length(&self, _: &File, _: Length) -> io::Result<()> {
        unreachable!("the sync thread sets no length")
    }

    fn sync(&self, _: &File) -> io::Result<()> {
        assert_eq!(self.finished.load(Ordering::Relaxed), 0, "the shard is finished");
        self.syncs.fetch_add(1, Ordering::Relaxed);
        if self.fails { Err(io::Error::other("the device is gone")) } else { Ok(()) }
    }

    fn entry(&self, _: &EntryOp) -> io::Result<EntryReply> {
        unreachable!("the sync thread names nothing")
    }
}

/// A shard of four writes beside the early sync; returns what became of it.
fn write_beside_early_sync(fails: bool) -> (Arc<Device>, bool) {
    let flight = flight(2);
    let device =
        Arc::new(Device { fails, syncs: AtomicUsize::new(0), finished: AtomicUsize::new(0) });
    let descriptor = std::fs::File::open("/dev/null").unwrap().into();
    let file = File { descriptor, path: PathBuf::new(), direct: false };
    let syncer = thread::spawn({
        let (flight, device) = (Arc::clone(&flight), Arc::clone(&device));
        move || sync_until_ended(&*device, &file, &flight, 2)
    });
    for _ in 0..4 {
        if flight.start(1).is_ok() {
            flight.land(1, Ok(()));
        }
    }
    flight.wait_until_landed();
    flight.end();
    syncer.join().unwrap();
    device.finished.store(1, Ordering::Relaxed);
    (device, flight.check().is_ok())
}

#[test]
fn the_early_sync_ends_with_the_shard() {
    loom::model(|| {
        let (device, is_fine) = write_beside_early_sync(false);
        assert!(is_fine && device.syncs.load(Ordering::Relaxed) <= 2);
    });
}

#[test]
fn an_early_sync_that_fails_is_the_last_and_fails_the_shard() {
    loom::model(|| {
        let (device, is_fine) = write_beside_early_sync(true);
        let syncs = device.syncs.load(Ordering::Relaxed);
        assert!(syncs <= 1);
        assert_eq!(is_fine, syncs == 0);
    });
}
