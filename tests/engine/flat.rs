//! Hundreds of saves and loads, failed ones among them, leave nothing behind in the process: no
//! file descriptor, no thread, no memory.
//!
//! The counts are those of a whole process, which other tests share; so each test here runs itself
//! again as a process of its own and measures there.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use std::{fs, io};

use dtr_engine::clock::System;
use dtr_engine::config::{Compression, Config, DirectIo, IoBackend};
use dtr_engine::engine::Components;
use dtr_engine::io::sim::{FaultKind, Plan, Sim, Times, Trigger};
use dtr_engine::io::{EntryOp, EntryReply, File, Io, Length, OpenMode, Transfer, open_backend};
use dtr_engine::load::{ReadOptions, Target};
use dtr_engine::{Engine, EngineError};

use super::alone::alone;
use super::support::{State, config, scratch};

/// Saves, unless `DTR_TORTURE_STATES` asks for more.
const SAVES: u64 = 200;
/// By then every pool, cache and thread there will be is there.
const WARM: u64 = 50;
/// Each fifth save meets a fault.
const FAULT_EVERY: u64 = 5;
/// Operations of a save that get a fault in turn, about as many as there are.
const OPERATIONS: u64 = 40;
/// One huge page that a pool touches late, and what the allocator keeps for itself. A healthy
/// engine grows by less than a tenth of it; 25 KiB lost in each save is too much.
const GROWTH_BYTES_MAX: u64 = 3 << 20;

const EIO: i32 = 5;
const ENOSPC: i32 = 28;

#[test]
fn two_hundred_saves_leave_memory_descriptors_and_threads_flat_on_uring() {
    alone("flat::two_hundred_saves_leave_memory_descriptors_and_threads_flat_on_uring", || {
        saves_leave_the_process_flat(IoBackend::Uring);
    });
}

#[test]
fn two_hundred_saves_leave_memory_descriptors_and_threads_flat_on_threads() {
    alone("flat::two_hundred_saves_leave_memory_descriptors_and_threads_flat_on_threads", || {
        saves_leave_the_process_flat(IoBackend::Threads);
    });
}

fn saves_leave_the_process_flat(io_backend: IoBackend) {
    // What the first engine of a process leaves for the next ones is no leak.
    let Some(saves) = Saves::begin(io_backend) else { return };
    saves.finish();
    let before = Holdings::now();

    let mut saves = Saves::begin(io_backend).unwrap();
    let mut warm = (0, Holdings::default());
    let count = SAVES.max(asked("DTR_TORTURE_STATES").unwrap_or(0));
    for step in 1..=count {
        saves.save(step);
        if step.is_multiple_of(10) {
            saves.load();
        }
        match step {
            WARM => warm = (resident_bytes(), Holdings::now()),
            _ if step > WARM => warm.1.assert_reached(&format!("after save {step}")),
            _ => {}
        }
    }
    let grown_bytes = resident_bytes().saturating_sub(warm.0);
    println!(
        "{count} saves, {} of them failed, on {io_backend:?}: {} descriptors, {} threads, memory \
         grew by {} KiB from {} KiB after save {WARM}",
        saves.failed,
        warm.1.descriptors.len(),
        warm.1.threads,
        grown_bytes >> 10,
        warm.0 >> 10,
    );
    assert!(grown_bytes <= GROWTH_BYTES_MAX, "memory grew by {grown_bytes} bytes");
    assert!(saves.failed >= count / FAULT_EVERY / 2, "only {} saves failed", saves.failed);
    saves.finish();
    before.assert_reached("after closing");
    println!("torture: tried {count}, next {}", asked("DTR_TORTURE_FIRST").unwrap_or(0) + count);
}

/// A number that the environment gives.
fn asked(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name} = `{text}`: a whole number is expected")))
}

/// One engine that saves and loads over and over, on a device that fails now and then.
struct Saves {
    engine: Engine,
    device: Arc<Device>,
    state: State,
    failed: u64,
    /// The newest committed step.
    newest: u64,
    _directory: tempfile::TempDir,
}

impl Saves {
    fn begin(io_backend: IoBackend) -> Option<Self> {
        let healthy = match open_backend(io_backend, DirectIo::Auto) {
            Ok(healthy) => healthy,
            Err(error) => {
                println!("skipped: {io_backend:?}, because {error}");
                return None;
            }
        };
        let device = Arc::new(Device { healthy, faulty: Mutex::default() });
        let directory = scratch();
        let config = Config {
            chunk_bytes: 256 << 10,
            compression: Compression::Float,
            keep_last_n: Some(2),
            gc_grace_seconds: 0,
            ..config(directory.path())
        };
        let io = Arc::<Device>::clone(&device);
        let components = Components { io, environment: Arc::new(System::default()) };
        let engine = Engine::open_with(config, components).unwrap();
        let state = State::training(1, 1);
        Some(Self { engine, device, state, failed: 0, newest: 0, _directory: directory })
    }

    fn save(&mut self, step: u64) {
        if step.is_multiple_of(FAULT_EVERY) {
            self.device.fail(fault_of_save(step / FAULT_EVERY));
        }
        let outcome = self.state.save(&self.engine, step);
        self.device.heal();
        match outcome {
            Ok(_) => self.newest = step,
            Err(error) => {
                assert!(!matches!(error, EngineError::Internal { .. }), "{error}");
                self.failed += 1;
                // A commit whose reply was lost stands.
                self.newest = self.engine.steps().unwrap().pop().unwrap();
            }
        }
    }

    /// One load that is refused for wrong bits, and one that is not.
    fn load(&self) {
        let checkpoint = self.engine.checkpoint(self.newest).unwrap();
        let mut memory = vec![0; self.state.0[0].bytes.len()];
        let storage = checkpoint.index().tensors[0].storage;
        let target = Target { storage, offset: 0, memory: &mut memory };
        self.device.fail(Plan::single(
            Trigger::Matching(Box::new(|_| true)),
            Times::Forever,
            FaultKind::FlipBit,
        ));
        let error = checkpoint.read(vec![target], ReadOptions::default()).unwrap_err();
        assert!(matches!(error, EngineError::Corrupt { .. }), "{error}");
        self.device.heal();
        self.state.assert_equals(&checkpoint);
    }

    fn finish(self) {
        self.engine.wait_until_finished(None).unwrap();
        self.engine.close().unwrap();
    }
}

/// The operations of a save fail in turn, each in another way the next time round.
fn fault_of_save(turn: u64) -> Plan {
    let kinds = [
        FaultKind::Error(EIO),
        FaultKind::Error(ENOSPC),
        FaultKind::ErrorAfter(EIO),
        FaultKind::Tear,
    ];
    let kind = kinds[usize::try_from(turn + turn / OPERATIONS).unwrap() % kinds.len()];
    Plan::single(Trigger::Number(turn % OPERATIONS), Times::Forever, kind)
}

/// A device that can be made to fail. What a simulated one logs is gone when it is healed, or the
/// log would be what grows.
#[derive(Debug)]
struct Device {
    healthy: Arc<dyn Io>,
    faulty: Mutex<Option<Arc<dyn Io>>>,
}

impl Device {
    fn fail(&self, plan: Plan) {
        let sim = Sim::new(Arc::clone(&self.healthy), plan);
        *self.faulty.lock().unwrap() = Some(Arc::new(sim));
    }

    fn heal(&self) {
        *self.faulty.lock().unwrap() = None;
    }

    fn now(&self) -> Arc<dyn Io> {
        self.faulty.lock().unwrap().clone().unwrap_or_else(|| Arc::clone(&self.healthy))
    }
}

impl Io for Device {
    fn name(&self) -> &'static str {
        self.healthy.name()
    }

    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Arc<File>> {
        self.now().open(path, mode)
    }

    fn submit(&self, transfer: Transfer) {
        self.now().submit(transfer);
    }

    fn set_length(&self, file: &File, length: Length) -> io::Result<()> {
        self.now().set_length(file, length)
    }

    fn sync(&self, file: &File) -> io::Result<()> {
        self.now().sync(file)
    }

    fn entry(&self, operation: &EntryOp) -> io::Result<EntryReply> {
        self.now().entry(operation)
    }
}

/// What a process holds, besides memory.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Holdings {
    /// What each descriptor is open on.
    pub(crate) descriptors: BTreeMap<String, String>,
    threads: usize,
}

impl Holdings {
    pub(crate) fn now() -> Self {
        let descriptors = entries("/proc/self/fd").into_iter().filter_map(|number| {
            // The descriptor that listed them is gone.
            let target = fs::read_link(format!("/proc/self/fd/{number}")).ok()?;
            Some((number, target.display().to_string()))
        });
        Self { descriptors: descriptors.collect(), threads: entries("/proc/self/task").len() }
    }

    /// Waits for this many threads and descriptors: one that has been joined is listed for a moment
    /// still.
    fn assert_reached(&self, when: &str) {
        let end = Instant::now() + Duration::from_secs(10);
        loop {
            let now = Self::now();
            let counts = |holdings: &Self| (holdings.descriptors.len(), holdings.threads);
            if counts(&now) == counts(self) {
                return;
            }
            assert!(Instant::now() < end, "{when} there are {now:#?}\nexpected: {self:#?}");
            std::thread::yield_now();
        }
    }
}

fn entries(directory: &str) -> Vec<String> {
    let names = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name());
    names.map(|name| name.into_string().unwrap()).collect()
}

/// Memory that is not a file's: what the process itself takes.
fn resident_bytes() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
    let kib: u64 = line.trim().strip_suffix(" kB").unwrap().parse().unwrap();
    kib << 10
}
