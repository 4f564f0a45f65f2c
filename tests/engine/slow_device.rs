//! `auto` where the device, not the processor, is what a save waits for.
//!
//! Always holds: the device below takes bytes at an exact rate; what it has taken is real.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use dtr_engine::clock::{Environment, System};
use dtr_engine::config::{Compression, DirectIo, IoBackend};
use dtr_engine::engine::Components;
use dtr_engine::format::names::AttemptId;
use dtr_engine::io::{
    Direction, EntryOp, EntryReply, File, Io, Length, OpenMode, Transfer, open_backend,
};
use dtr_engine::{Config, Engine, Result};

use super::support::{State, config, scratch};

/// Far below what one core encodes, even without optimisation.
const BYTES_PER_SECOND: u32 = 20 << 20;

/// A device that takes one write after the other, each in its time.
#[derive(Debug)]
struct Slow {
    inner: Arc<dyn Io>,
    writes: std::sync::mpsc::Sender<Transfer>,
}

impl Slow {
    fn new(inner: Arc<dyn Io>) -> Self {
        let (writes, queue) = std::sync::mpsc::channel::<Transfer>();
        let device = Arc::clone(&inner);
        std::thread::spawn(move || {
            for write in queue {
                let bytes = u32::try_from(write.range.len()).unwrap();
                std::thread::sleep(Duration::from_secs(1) * bytes / BYTES_PER_SECOND);
                device.submit(write);
            }
        });
        Self { inner, writes }
    }
}

impl Io for Slow {
    fn name(&self) -> &'static str {
        "slow"
    }

    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Arc<File>> {
        self.inner.open(path, mode)
    }

    fn submit(&self, transfer: Transfer) {
        match transfer.direction {
            Direction::Read => self.inner.submit(transfer),
            Direction::Write => self.writes.send(transfer).unwrap(),
        }
    }

    fn set_length(&self, file: &File, length: Length) -> io::Result<()> {
        self.inner.set_length(file, length)
    }

    fn sync(&self, file: &File) -> io::Result<()> {
        self.inner.sync(file)
    }

    fn entry(&self, operation: &EntryOp) -> io::Result<EntryReply> {
        self.inner.entry(operation)
    }
}

/// Threads that seem to have had a core whenever they wanted it.
#[derive(Debug)]
struct Unhurried(System);

impl Environment for Unhurried {
    fn monotonic(&self) -> Duration {
        self.0.monotonic()
    }

    fn unix_ms(&self) -> u64 {
        self.0.unix_ms()
    }

    fn thread_cpu(&self) -> Duration {
        self.0.monotonic()
    }

    fn attempt_id(&self) -> Result<AttemptId> {
        self.0.attempt_id()
    }
}

#[test]
fn auto_encodes_nearly_everything_for_a_slow_device() {
    let directory = scratch();
    let config =
        Config { compression: Compression::Auto, ..config(&directory.path().join("store")) };
    let io = Arc::new(Slow::new(open_backend(IoBackend::Threads, DirectIo::Auto).unwrap()));
    // Other tests take the cores meanwhile, for which a save would step back.
    let environment = Arc::new(Unhurried(System::default()));
    let engine = Engine::open_with(config, Components { io, environment }).unwrap();
    let state = State::training(5, 2);
    for step in 1..=2 {
        let figures = state.save(&engine, step).unwrap().stats;
        println!("step {step}: {} of {} chunks encoded", figures.chunks_encoded, figures.chunks);
        // A tenth are bytes that are no numbers; the first chunks tell how fast everything is.
        assert!(figures.chunks_encoded >= figures.chunks * 8 / 10, "step {step}: {figures:?}");
        state.assert_equals(&engine.checkpoint(step).unwrap());
    }
}
