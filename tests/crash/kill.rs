//! What was acknowledged survives `kill -9`, and nothing torn is visible.
//!
//! ```text
//! parent                                    child: saves, rewinds, deletes, forever
//!   reads  <----- "begin save 4" -----------  before each call
//!   notes  <----- "done" -------------------  once it has returned: acknowledged
//!   kills  <----- "at publishing, before" --  stands still there; or at a random time
//!   opens the store, compares, starts the next child
//! ```
//!
//! Always holds: the parent alone knows what was acknowledged, and by what the child said before it
//! was killed, with SIGKILL, from outside; a number decides what the children do and where the
//! first is killed. No process ends itself: aborts from within would be another test.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use dtr_engine::clock::System;
use dtr_engine::config::{Compression, DirectIo, IoBackend};
use dtr_engine::engine::{Components, GcOptions};
use dtr_engine::format::names::{MANIFEST_FILE, parse_shard_file, parse_step_dir};
use dtr_engine::io::sim::OpKind;
use dtr_engine::io::{Direction, EntryOp, Io, Length, OpenMode, open_backend};
use dtr_engine::{Config, Engine};
use fastrand::Rng;

use super::budget::{self, Budget};
use super::check::{Tools, check, view};
use super::history::{Range, View};
use super::process::{end_with_parent, rerun};
use super::state::{self, CHUNK_BYTES, State};
use super::tap::{Operation, Tap, Watcher};

/// Stories told when nobody asks for more. Two processes are killed in each.
const SHORT: u64 = 200;
/// The name of the test, for the child to run.
const NAME: &str = "kill::an_acknowledged_checkpoint_survives_kill_9";
/// Where the child's store is, and what it is to do there: see [`Orders`].
const STORE: &str = "DTR_TEST_KILL_STORE";
const ORDERS: &str = "DTR_TEST_KILL_ORDERS";
/// Retention keeps as many.
const KEPT: usize = 2;
/// How long a child may say nothing.
const SILENCE: Duration = Duration::from_secs(30);

/// Every place of the commit, of deletion and of looking, by name: see `durability.md`.
const POINTS: [&str; 18] = [
    "creating a directory",
    "syncing the store's directory",
    "creating a shard",
    "reserving space",
    "writing a shard",
    "setting a length",
    "syncing a shard",
    "syncing a step's directory",
    "creating a manifest",
    "writing a manifest",
    "syncing a manifest",
    "publishing",
    "publishing over another",
    "deleting a manifest",
    "deleting a shard",
    "deleting a directory",
    "reading",
    "looking",
];
const SIDES: [&str; 2] = ["before", "after"];

fn point_of(operation: &Operation) -> Option<&'static str> {
    let file = operation.path.file_name()?.to_str()?;
    let is_shard = parse_shard_file(file).is_some();
    let is_step = parse_step_dir(file).is_some();
    Some(match &operation.kind {
        OpKind::Open(OpenMode::Create) => "creating a shard",
        OpKind::Open(OpenMode::CreateSmall) => "creating a manifest",
        OpKind::Open(OpenMode::Read | OpenMode::ReadSmall) | OpKind::Transfer(Direction::Read) => {
            "reading"
        }
        OpKind::Transfer(Direction::Write) if is_shard => "writing a shard",
        OpKind::Transfer(Direction::Write) => "writing a manifest",
        OpKind::SetLength(Length::Reserve(_)) => "reserving space",
        OpKind::SetLength(Length::Exact(_)) => "setting a length",
        OpKind::Sync if is_shard => "syncing a shard",
        OpKind::Sync => "syncing a manifest",
        OpKind::Entry(EntryOp::CreateDir(_)) => "creating a directory",
        OpKind::Entry(EntryOp::SyncDir(_)) if is_step => "syncing a step's directory",
        OpKind::Entry(EntryOp::SyncDir(_)) => "syncing the store's directory",
        OpKind::Entry(EntryOp::RenameNew { .. }) => "publishing",
        OpKind::Entry(EntryOp::RenameReplace { .. }) => "publishing over another",
        OpKind::Entry(EntryOp::RemoveFile(_)) if file == MANIFEST_FILE => "deleting a manifest",
        OpKind::Entry(EntryOp::RemoveFile(_)) if is_shard => "deleting a shard",
        OpKind::Entry(EntryOp::RemoveFile(_)) => return None,
        OpKind::Entry(EntryOp::RemoveDir(_)) => "deleting a directory",
        OpKind::Entry(EntryOp::List(_) | EntryOp::Stat(_) | EntryOp::Space(_)) => "looking",
    })
}

/// Where a child stands still.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stop {
    point: &'static str,
    side: &'static str,
    /// The how manieth time, from 0.
    occurrence: u64,
}

/// What a child is to do.
#[derive(Clone, Copy, Debug)]
struct Orders {
    /// Of the story.
    number: u64,
    /// Saves made in this store by children before, which is the number of its first one.
    first_save: u64,
    stops: bool,
}

impl Orders {
    fn encode(self) -> String {
        format!("{} {} {}", self.number, self.first_save, u8::from(self.stops))
    }

    fn decode(text: &str) -> Self {
        let numbers: Vec<u64> = text.split(' ').map(|word| word.parse().unwrap()).collect();
        Self { number: numbers[0], first_save: numbers[1], stops: numbers[2] == 1 }
    }

    /// Every point and side in turn.
    fn stop(self, random: &mut Rng) -> Option<Stop> {
        let at = usize::try_from(self.number % (POINTS.len() * SIDES.len()) as u64).unwrap();
        let occurrence = random.u64(..3);
        let stop = Stop { point: POINTS[at / 2], side: SIDES[at % 2], occurrence };
        self.stops.then_some(stop)
    }
}

fn some_config(store: &Path, random: &mut Rng) -> Config {
    let codecs = [Compression::None, Compression::Zstd, Compression::Float];
    let compression = codecs[random.usize(..codecs.len())];
    let keep_last_n = Some(u32::try_from(KEPT).unwrap());
    Config { compression, keep_last_n, gc_grace_seconds: 0, ..state::config(store) }
}

fn some_backend(random: &mut Rng) -> Arc<dyn Io> {
    let direct_io = [DirectIo::Auto, DirectIo::Off][random.usize(..2)];
    // `Auto` is io_uring where the kernel has it.
    let backend = [IoBackend::Auto, IoBackend::Threads][random.usize(..2)];
    open_backend(backend, direct_io).unwrap()
}

/// A save of a story, the same for the process that makes it and the one that checks it.
fn state_of(number: u64, save: u64) -> State {
    let mut random = Rng::with_seed(number.wrapping_mul(1 << 20) ^ save);
    // One in eight is large enough to be synced also while it is written.
    let chunks = if random.usize(..8) == 0 { 20 } else { 2 };
    let sizes = [random.usize(..chunks * CHUNK_BYTES as usize), random.usize(..30_000)];
    State::new(random.u64(..), &sizes)
}

/// A line for the parent. Begins on a line of its own, whatever the test harness printed.
fn say(text: &str) {
    let mut output = std::io::stdout().lock();
    output.write_all(format!("\n> {text}\n").as_bytes()).unwrap();
    output.flush().unwrap();
}

/// Stands still at its stop, and from then on at everything else.
#[derive(Debug)]
struct Gate {
    stop: Option<Stop>,
    seen: AtomicU64,
    is_shut: AtomicBool,
}

impl Gate {
    fn meet(&self, operation: &Operation, side: &str) {
        let Some(stop) = self.stop else { return };
        if self.is_shut.load(Ordering::SeqCst) {
            stand_still();
        }
        if side == stop.side
            && point_of(operation) == Some(stop.point)
            && self.seen.fetch_add(1, Ordering::SeqCst) == stop.occurrence
        {
            self.is_shut.store(true, Ordering::SeqCst);
            say(&format!("at {}, {side}", stop.point));
            stand_still();
        }
    }
}

fn stand_still() -> ! {
    loop {
        std::thread::park();
    }
}

impl Watcher for Gate {
    fn before(&self, operation: &Operation) {
        self.meet(operation, SIDES[0]);
    }

    fn after(&self, operation: &Operation, _error: Option<&std::io::Error>) {
        self.meet(operation, SIDES[1]);
    }
}

/// The child's life.
fn work(store: &Path, orders: Orders) -> ! {
    end_with_parent();
    // The children of a story have a configuration and a backend in common.
    let mut random = Rng::with_seed(orders.number);
    let gate = Gate {
        stop: orders.stop(&mut random),
        seen: AtomicU64::new(0),
        is_shut: AtomicBool::new(false),
    };
    let io: Arc<dyn Io> = Tap::new(some_backend(&mut random), &Arc::new(gate));
    let config = some_config(store, &mut random);
    let components = Components { io, environment: Arc::new(System::default()) };
    let engine = Engine::open_with(config, components).unwrap();
    let mut random = Rng::with_seed(random.u64(..) ^ orders.first_save);
    let mut save = orders.first_save;
    loop {
        let steps = engine.steps().unwrap();
        match (random.usize(..8), steps.as_slice()) {
            (0, [oldest, _, ..]) => {
                say(&format!("begin delete {oldest}"));
                engine.delete(*oldest).unwrap();
            }
            (1, _) => {
                say("begin clean");
                let options = GcOptions { dry_run: false, grace: Some(Duration::ZERO) };
                engine.gc(options).unwrap();
            }
            (turn, steps) => {
                let newest = steps.last().copied().unwrap_or(0);
                // Over the newest, to before it, or on.
                let step =
                    if turn < 4 && newest > 1 { newest - random.u64(..2) } else { newest + 1 };
                say(&format!("begin save {step} {save}"));
                let state = state_of(orders.number, save);
                let mut request = state.request(step, usize::try_from(save).unwrap());
                request.rewind = step <= newest;
                engine.save(request).and_then(|handle| state::finish(&handle)).unwrap();
                save += 1;
            }
        }
        say("done");
    }
}

/// What the parent knows of a store: what was acknowledged, and what was begun and not.
#[derive(Debug)]
struct Record {
    number: u64,
    acknowledged: Range,
    /// What the call that was begun leaves; nothing else than that, or what stood before.
    in_flight: Option<Range>,
    states: Vec<Arc<State>>,
    /// Calls that were acknowledged.
    calls: u64,
}

impl Record {
    fn new(number: u64) -> Self {
        let acknowledged = Range::exactly(View::new());
        Self { number, acknowledged, in_flight: None, states: Vec::new(), calls: 0 }
    }

    /// Takes a line of a child's; returns where the child says that it stands.
    fn read(&mut self, line: &str) -> Option<String> {
        let words: Vec<&str> = line.split(' ').collect();
        match words.as_slice() {
            ["begin", "save", step, save] => {
                assert_eq!(save.parse(), Ok(self.states.len()), "saves are counted");
                self.begin_save(step.parse().unwrap());
            }
            ["begin", "delete", step] => {
                let step = step.parse().unwrap();
                self.in_flight = Some(self.acknowledged.without(step));
            }
            ["begin", "clean"] => self.in_flight = Some(self.acknowledged.clone()),
            ["done"] => {
                self.acknowledged = self.in_flight.take().expect("a call was begun");
                self.calls += 1;
            }
            ["at", ..] => return Some(line["at ".len()..].to_owned()),
            _ => panic!("a child said `{line}`"),
        }
        None
    }

    fn begin_save(&mut self, step: u64) {
        let save = self.states.len();
        self.states.push(Arc::new(state_of(self.number, save as u64)));
        let (least, most) = self.acknowledged.clone().into_views();
        let with = |view: View| {
            let mut view: View = view.into_iter().filter(|(other, _)| *other < step).collect();
            view.insert(step, save);
            view
        };
        let mut least = with(least);
        while least.len() > KEPT {
            least.pop_first();
        }
        // Retention may go on keeping what still retires something.
        self.in_flight = Some(Range::between(least, with(most)));
    }

    fn legal(&self) -> Vec<Range> {
        std::iter::once(&self.acknowledged).chain(&self.in_flight).cloned().collect()
    }

    /// What was found is what stands from now on.
    fn settle(&mut self, found: View) {
        self.acknowledged = Range::exactly(found);
        self.in_flight = None;
    }
}

/// A child and its words.
struct Talk {
    child: Child,
    lines: Receiver<String>,
}

impl Talk {
    fn start(store: &Path, orders: Orders) -> Self {
        let mut child = rerun(None, NAME)
            .env(STORE, store)
            .env(ORDERS, orders.encode())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in output.split(b'\n').map_while(Result::ok) {
                let line = String::from_utf8_lossy(&line).into_owned();
                // The kernel passes a short write whole or not at all: no line is cut short.
                if let Some(said) = line.strip_prefix("> ") {
                    let _ = sender.send(said.to_owned());
                }
            }
        });
        Self { child, lines }
    }

    /// Listens until `is_enough`; false if the child ended before.
    fn listen(
        &mut self,
        record: &mut Record,
        mut is_enough: impl FnMut(&Record, Option<&str>) -> bool,
    ) -> Result<(), String> {
        loop {
            match self.lines.recv_timeout(SILENCE) {
                Ok(line) => {
                    let stands = record.read(&line);
                    if is_enough(record, stands.as_deref()) {
                        return Ok(());
                    }
                }
                Err(RecvTimeoutError::Timeout) => {
                    self.child.kill().unwrap();
                    return Err(format!("a child said nothing for {SILENCE:?}"));
                }
                Err(RecvTimeoutError::Disconnected) => {
                    let mut text = String::new();
                    let mut errors = self.child.stderr.take().unwrap();
                    let _ = std::io::Read::read_to_string(&mut errors, &mut text);
                    return Err(format!("a child ended by itself: {text}"));
                }
            }
        }
    }

    /// Kills it with SIGKILL and hears out what it had said.
    fn kill(mut self, record: &mut Record) {
        self.child.kill().unwrap();
        let status = self.child.wait().unwrap();
        let signal = std::os::unix::process::ExitStatusExt::signal(&status);
        assert_eq!(signal, Some(9), "it was killed, and by us: {status}");
        while let Ok(line) = self.lines.recv() {
            record.read(&line);
        }
    }
}

/// What was done, over all stories.
#[derive(Debug, Default)]
struct Tally {
    at_points: BTreeMap<String, u64>,
    at_random: u64,
    acknowledged: u64,
}

fn tell(number: u64, store: &Path, tools: &Tools, tally: &Mutex<Tally>) -> Result<(), String> {
    let mut record = Record::new(number);
    let mut random = Rng::with_seed(number ^ 0x5eed);
    // A child stands at a point, and is killed there.
    let mut talk = Talk::start(store, Orders { number, first_save: 0, stops: true });
    let mut stood = None;
    talk.listen(&mut record, |_, stands| {
        stood = stands.map(ToOwned::to_owned);
        stood.is_some()
    })?;
    talk.kill(&mut record);
    let legal = record.legal();
    let found = seen(store, &record, tools)?;
    if !legal.iter().any(|range| range.holds(&found)) {
        return Err(format!("killed at {stood:?}: {found:?}, and legal is {legal:?}"));
    }
    record.settle(found);
    // The next one goes on in the same store, and is killed at a random time.
    let first_save = record.states.len() as u64;
    let mut talk = Talk::start(store, Orders { number, first_save, stops: false });
    let calls = record.calls + random.u64(..4);
    talk.listen(&mut record, |record, _| record.calls >= calls)?;
    std::thread::sleep(Duration::from_micros(random.u64(..5_000)));
    talk.kill(&mut record);
    let checked = check(store, true, &record.legal(), &record.states, tools);
    checked.map_err(|why| format!("killed at a random time: {why}"))?;
    let mut tally = tally.lock().unwrap();
    *tally.at_points.entry(stood.unwrap()).or_default() += 1;
    tally.at_random += 1;
    tally.acknowledged += record.calls;
    Ok(())
}

fn seen(store: &Path, record: &Record, tools: &Tools) -> Result<View, String> {
    let config = Config { read_only: true, ..state::config(store) };
    match state::open(config, &tools.io, &tools.ids) {
        Ok(reader) => view(&reader, &record.states),
        Err(dtr_engine::EngineError::NotFound { .. }) => Ok(View::new()),
        Err(error) => Err(format!("a reader cannot open it: {error}")),
    }
}

/// In memory, and one time in four on the disk that holds the build.
fn place_of(number: u64, memory: &Path, disk: &Path) -> PathBuf {
    let directory = if number % 4 == 3 { disk } else { memory };
    directory.join("store")
}

#[test]
fn an_acknowledged_checkpoint_survives_kill_9() {
    if let (Ok(orders), Some(store)) = (std::env::var(ORDERS), std::env::var_os(STORE)) {
        work(Path::new(&store), Orders::decode(&orders));
    }
    let tally = Mutex::new(Tally::default());
    let budget = Budget::of(SHORT);
    let start = |directory: &Path| {
        let disk = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        (directory.to_owned(), disk, Tools::new())
    };
    let outcome = budget::run(budget, u64::MAX, start, |(memory, disk, tools), number| {
        let store = place_of(number, memory, disk.path());
        let told = tell(number, &store, tools, &tally);
        if store.exists() {
            std::fs::remove_dir_all(&store).unwrap();
        }
        told.map(|()| true).map_err(|why| {
            format!(
                "story {number}: {why}\nagain with DTR_TORTURE_FIRST={number} \
                     DTR_TORTURE_STATES=1"
            )
        })
    });
    let Tally { at_points, at_random, acknowledged } = tally.into_inner().unwrap();
    println!(
        "{} processes killed at named points, {at_random} at random times, each with SIGKILL from \
         outside; {acknowledged} calls had been acknowledged; none ended itself; by point: \
         {at_points:?}",
        at_points.values().sum::<u64>(),
    );
    if outcome.tried >= SHORT {
        assert_eq!(at_points.len(), POINTS.len() * SIDES.len(), "every named point was reached");
    }
}
