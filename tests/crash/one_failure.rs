//! Any single failure of the device leaves the checkpoint before and gives a typed error: every
//! operation of every call fails, in eighteen ways, on both real backends.
//!
//! | failure      | what strikes                                                                |
//! |--------------|-----------------------------------------------------------------------------|
//! | six `errno`s | the operation is not performed                                              |
//! | short read   | a read, or a write, moves half and says so                                  |
//! | short write  |                                                                             |
//! | zero bytes   | a transfer moves nothing and says so                                        |
//!
//! Each strikes once, at the first operation from number k on that it can strike, or all of them
//! from k on. Always holds: whatever the call returns is true; an error has a hint and is no
//! `Internal`; nothing takes five seconds.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use dtr_engine::config::{DirectIo, IoBackend};
use dtr_engine::engine::GcOptions;
use dtr_engine::io::sim::{FaultKind, LoggedOp, OpKind, Plan, Sim, Times, Trigger};
use dtr_engine::io::{Direction, Io, open_backend};
use dtr_engine::{Config, Engine, EngineError, Result};

use super::budget::{self, Budget};
use super::check::{Tools, check, view};
use super::history::{Range, View};
use super::state::{self, CHUNK_BYTES, State};

const EINTR: i32 = 4;
const EIO: i32 = 5;
const EAGAIN: i32 = 11;
const ENOSPC: i32 = 28;
const EDQUOT: i32 = 122;
const ECANCELED: i32 = 125;

/// A call that takes longer hangs.
const HANG: Duration = Duration::from_secs(5);

/// What strikes.
#[derive(Clone, Copy, Debug)]
enum Failure {
    Error(i32),
    ShortRead,
    ShortWrite,
    ZeroBytes,
}

const FAILURES: [Failure; 9] = [
    Failure::Error(EIO),
    Failure::ShortWrite,
    Failure::Error(ENOSPC),
    Failure::Error(EAGAIN),
    Failure::ZeroBytes,
    Failure::Error(EDQUOT),
    Failure::Error(EINTR),
    Failure::ShortRead,
    Failure::Error(ECANCELED),
];
const TIMES: [Times; 2] = [Times::Once, Times::Forever];
const KINDS: u64 = (FAILURES.len() * TIMES.len()) as u64;

impl Failure {
    fn kind(self) -> FaultKind {
        match self {
            Self::Error(errno) => FaultKind::Error(errno),
            Self::ShortRead | Self::ShortWrite => FaultKind::Short,
            Self::ZeroBytes => FaultKind::Nothing,
        }
    }

    fn can_strike(self, operation: &OpKind) -> bool {
        match self {
            Self::Error(_) => true,
            Self::ShortRead => *operation == OpKind::Transfer(Direction::Read),
            Self::ShortWrite => *operation == OpKind::Transfer(Direction::Write),
            Self::ZeroBytes => matches!(operation, OpKind::Transfer(_)),
        }
    }

    /// Strikes from operation `number` on.
    fn from(self, number: u64, times: Times) -> Plan {
        let strikes = move |operation: &LoggedOp| {
            operation.number >= number && self.can_strike(&operation.kind)
        };
        Plan::single(Trigger::Matching(Box::new(strikes)), times, self.kind())
    }
}

/// A call that is struck, on a store of three checkpoints and some debris.
#[derive(Clone, Copy, Debug)]
enum Act {
    /// And listing, as below.
    OpenWriter,
    OpenReader,
    /// Of step 4, after which retention deletes steps 1 and 2.
    Save,
    /// Of step 2 once more, which retires step 3.
    Rewind,
    Load,
    Verify,
    Clean,
    Delete,
}

const ACTS: [Act; 8] = [
    Act::OpenWriter,
    Act::OpenReader,
    Act::Save,
    Act::Rewind,
    Act::Load,
    Act::Verify,
    Act::Clean,
    Act::Delete,
];

/// The save that a struck call makes.
const NEW: usize = 3;

impl Act {
    fn config(self, store: &Path) -> Config {
        let keep_last_n = matches!(self, Self::Save).then_some(2);
        let read_only = matches!(self, Self::OpenReader | Self::Load | Self::Verify);
        // Little in flight, so that a shard is synced also while it is written.
        let in_flight_bytes = Some(u64::from(CHUNK_BYTES));
        Config { keep_last_n, read_only, in_flight_bytes, ..state::config(store) }
    }

    fn opens(self) -> bool {
        matches!(self, Self::OpenWriter | Self::OpenReader)
    }

    /// What may be found after it succeeded.
    fn after(self) -> Range {
        let before = before();
        match self {
            Self::OpenWriter | Self::OpenReader | Self::Load | Self::Verify | Self::Clean => {
                Range::exactly(before)
            }
            Self::Save => {
                let most: View = before.into_iter().chain([(4, NEW)]).collect();
                Range::between(View::from([(3, 2), (4, NEW)]), most)
            }
            Self::Rewind => Range::exactly(View::from([(1, 0), (2, NEW)])),
            Self::Delete => Range::exactly(View::from([(2, 1), (3, 2)])),
        }
    }

    fn make(self, engine: &Engine, states: &[Arc<State>]) -> Result<()> {
        match self {
            Self::OpenWriter | Self::OpenReader => Ok(()),
            Self::Save | Self::Rewind => {
                let step = if matches!(self, Self::Save) { 4 } else { 2 };
                let mut request = states[NEW].request(step, NEW);
                request.rewind = matches!(self, Self::Rewind);
                engine.save(request).and_then(|handle| state::finish(&handle)).map(drop)
            }
            Self::Load => {
                let checkpoint = engine.checkpoint(3)?;
                assert!(states[2].is_in(&checkpoint)?, "wrong bytes were returned");
                Ok(())
            }
            Self::Verify => engine.verify(3, &()).map(drop),
            Self::Clean => {
                let options = GcOptions { dry_run: false, grace: Some(Duration::ZERO) };
                engine.gc(options).map(drop)
            }
            Self::Delete => engine.delete(1).map(drop),
        }
    }
}

/// What the store shows before any call.
fn before() -> View {
    View::from([(1, 0), (2, 1), (3, 2)])
}

fn states() -> Vec<Arc<State>> {
    let chunks = |save: usize| if save == NEW { 6 } else { 1 };
    let sizes = |save: usize| [chunks(save) * CHUNK_BYTES as usize - 999, 20_000 + 1_000 * save];
    (0..=NEW).map(|save| Arc::new(State::new(save as u64, &sizes(save)))).collect()
}

/// Makes the store that calls are struck on: three checkpoints, a retired one whose files stayed,
/// a file of a dead attempt and a dead temporary manifest.
fn prepare(store: &Path, states: &[Arc<State>], tools: &Tools) {
    let writer = state::open(state::config(store), &tools.io, &tools.ids).unwrap();
    let save = |step: u64, save: usize| {
        let mut request = states[save].request(step, save);
        request.rewind = true;
        state::finish(&writer.save(request).unwrap()).unwrap();
    };
    save(1, 0);
    save(5, NEW);
    let retired = store.join(dtr_engine::format::names::step_dir_name(5));
    let kept = store.with_extension("kept");
    copy(&retired, &kept);
    save(2, 1);
    copy(&kept, &retired);
    std::fs::remove_dir_all(kept).unwrap();
    save(3, 2);
    let attempt = "00112233445566778899aabbccddeeff";
    let directory = store.join(dtr_engine::format::names::step_dir_name(2));
    std::fs::write(directory.join(format!("rank-00000.{attempt}.shard")), [7; 5000]).unwrap();
    std::fs::write(directory.join(format!("manifest.json.{attempt}.tmp")), "{").unwrap();
}

/// Copies a directory whole.
fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy(&entry.path(), &target);
        } else {
            std::fs::copy(entry.path(), target).unwrap();
        }
    }
}

/// One place to strike.
#[derive(Clone, Copy, Debug)]
struct Place {
    act: Act,
    io_backend: IoBackend,
    operation: u64,
}

/// What a thread needs.
struct Bench {
    tools: Tools,
    states: Vec<Arc<State>>,
    template: PathBuf,
    store: PathBuf,
    backends: Vec<(IoBackend, Arc<dyn Io>)>,
    watchdog: Watchdog,
}

/// The real backends that this machine has.
fn backends() -> Vec<(IoBackend, Arc<dyn Io>)> {
    let mut backends = Vec::new();
    for io_backend in [IoBackend::Threads, IoBackend::Uring] {
        match open_backend(io_backend, DirectIo::Auto) {
            Ok(io) => backends.push((io_backend, io)),
            Err(error) => println!("left out: {io_backend:?}, because {error}"),
        }
    }
    backends
}

impl Bench {
    fn new(directory: &Path) -> Self {
        let tools = Tools::new();
        let states = states();
        let template = directory.join("template");
        prepare(&template, &states, &tools);
        let store = directory.join("store");
        let watchdog = Watchdog::start();
        Self { tools, states, template, store, backends: backends(), watchdog }
    }

    fn renew(&self) {
        if self.store.exists() {
            std::fs::remove_dir_all(&self.store).unwrap();
        }
        copy(&self.template, &self.store);
    }

    /// Opens the store and makes the call, with nothing failing before `operation` of the struck
    /// part; returns how many operations there were, what came of it, and the engine.
    fn act(
        &self,
        place: Place,
        plan: impl FnOnce(u64) -> Plan,
    ) -> (u64, Result<()>, Option<Engine>, Arc<Sim>) {
        let real = &self.backends.iter().find(|(name, _)| *name == place.io_backend).unwrap().1;
        let sim = Arc::new(Sim::new(Arc::clone(real), Plan::default()));
        let io: Arc<dyn Io> = Arc::<Sim>::clone(&sim);
        let config = place.act.config(&self.store);
        if place.act.opens() {
            sim.set_plan(plan(place.operation));
            return match state::open(config, &io, &self.tools.ids) {
                Ok(engine) => {
                    let listed = engine.survey().map(drop);
                    (sim.operations(), listed, Some(engine), sim)
                }
                Err(error) => (sim.operations(), Err(error), None, sim),
            };
        }
        let engine = state::open(config, &io, &self.tools.ids).unwrap();
        let first = sim.operations();
        sim.set_plan(plan(first + place.operation));
        let outcome = place.act.make(&engine, &self.states);
        (sim.operations() - first, outcome, Some(engine), sim)
    }

    /// Every place to strike.
    fn places(&self) -> Vec<Place> {
        let mut places = Vec::new();
        for act in ACTS {
            for (io_backend, _) in &self.backends {
                self.renew();
                let place = Place { act, io_backend: *io_backend, operation: 0 };
                let (operations, outcome, ..) = self.act(place, |_| Plan::default());
                outcome.unwrap_or_else(|error| panic!("{act:?} without a failure: {error}"));
                assert!(operations > 0, "{act:?} does something");
                places.extend((0..operations).map(|operation| Place { operation, ..place }));
            }
        }
        places
    }

    /// Strikes; false if there was nothing to strike.
    fn strike(
        &self,
        place: Place,
        failure: Failure,
        times: Times,
    ) -> std::result::Result<bool, String> {
        self.renew();
        let (_, outcome, engine, sim) = self.act(place, |number| failure.from(number, times));
        let has_struck = sim.has_struck();
        sim.set_plan(Plan::default());
        let mut legal = vec![place.act.after()];
        if let Err(error) = &outcome {
            check_error(error)?;
            legal.push(Range::exactly(before()));
        }
        if let Some(engine) = engine {
            let found = view(&engine, &self.states)?;
            if !legal.iter().any(|range| range.holds(&found)) {
                return Err(format!("the same engine shows {found:?}, and legal is {legal:?}"));
            }
            for step in found.keys() {
                let report = engine.verify(*step, &()).map_err(|error| error.to_string())?;
                if !report.damage.is_empty() {
                    return Err(format!("step {step} is damaged: {:?}", report.damage));
                }
            }
            engine.close().map_err(|error| format!("closing fails: {error}"))?;
        }
        check(&self.store, true, &legal, &self.states, &self.tools)?;
        Ok(has_struck)
    }
}

fn check_error(error: &EngineError) -> std::result::Result<(), String> {
    let text = error.to_string();
    if matches!(error, EngineError::Internal { .. }) || !text.contains("\nhint: ") {
        return Err(format!("the error is no help: {text}"));
    }
    Ok(())
}

/// Ends the process where a call hangs: a thread that does cannot be stopped.
struct Watchdog {
    beats: Mutex<Sender<Option<String>>>,
}

impl Watchdog {
    fn start() -> Self {
        let (beats, listener) = channel();
        std::thread::spawn(move || watch(&listener));
        Self { beats: Mutex::new(beats) }
    }

    /// Watches `work`.
    fn watch<T>(&self, what: String, work: impl FnOnce() -> T) -> T {
        let beats = self.beats.lock().unwrap();
        beats.send(Some(what)).unwrap();
        let result = work();
        beats.send(None).unwrap();
        result
    }
}

fn watch(beats: &Receiver<Option<String>>) {
    while let Ok(beat) = beats.recv() {
        let Some(what) = beat else { continue };
        match beats.recv_timeout(HANG) {
            Ok(_) => {}
            Err(RecvTimeoutError::Disconnected) => return,
            Err(RecvTimeoutError::Timeout) => {
                let text = format!("\nit hangs: {what} is not over after {HANG:?}\n");
                std::io::stderr().write_all(text.as_bytes()).unwrap();
                std::process::abort();
            }
        }
    }
}

#[test]
fn any_single_failure_leaves_the_checkpoint_before_and_is_typed() {
    let directory = budget::scratch();
    let places = Bench::new(directory.path()).places();
    let count = places.len() as u64;
    let all = count * KINDS;
    let outcome = budget::run(Budget::of(2 * count), all, Bench::new, |bench, number| {
        let at = number % count;
        let place = places[usize::try_from(at).unwrap()];
        // Each place meets every kind, and the first two rounds meet all kinds.
        let kind = usize::try_from((number / count + at) % KINDS).unwrap();
        let (failure, times) = (FAILURES[kind % FAILURES.len()], TIMES[kind / FAILURES.len()]);
        let what = format!("{failure:?} {times:?} from operation {place:?}, number {number}");
        let struck = bench.watchdog.watch(what.clone(), || bench.strike(place, failure, times));
        struck.map_err(|why| {
            format!("{what}: {why}\nagain with DTR_TORTURE_FIRST={number} DTR_TORTURE_STATES=1")
        })
    });
    println!(
        "{} failures at {count} operations ({} calls, every operation of each, on every backend), \
         of {KINDS} kinds; {} had nothing to strike",
        outcome.tried,
        ACTS.len(),
        outcome.alike
    );
}
