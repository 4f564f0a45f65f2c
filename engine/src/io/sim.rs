//! A backend that wraps another and does to it what disks, kernels and power cuts do.
//!
//! Fault model. Every operation (an open, one attempt at a transfer, a set length, a sync, an
//! operation on entries) gets the next number, from 0, and is logged. A plan's faults strike by
//! number or by what the operation is:
//!
//! | fault        | what happens                                                              |
//! |--------------|---------------------------------------------------------------------------|
//! | `Error`      | the operation is not performed and fails with an `errno`                  |
//! | `ErrorAfter` | the operation is performed, and fails all the same (a lost reply)         |
//! | `Short`      | a transfer moves about half of its bytes, and says so                     |
//! | `Nothing`    | a transfer moves no bytes, and says so                                    |
//! | `FlipBit`    | a read succeeds with one bit wrong                                        |
//! | `Cut`        | this operation and all later ones fail unperformed: the process is gone   |
//! | `Tear`       | as `Cut`, but this one, if a write, moves about half of its bytes first   |
//!
//! Faults that need a transfer leave other operations alone. Besides, completions can be delayed
//! and delivered in a seeded order. Not modelled: loss of bytes that were written and not synced
//! (the log shows a test which those are), misdirected transfers, and time.
//!
//! Always holds: the same plan and the same order of operations give the same faults; a delayed
//! completion is delivered at the latest when nothing else is in flight.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use fastrand::Rng;
use rustix::io::Errno;

use super::buffer::Buffer;
use super::{
    ALIGNMENT, Direction, Done, EntryOp, EntryReply, File, Io, Length, OpenMode, Transfer,
};
use crate::sync::unpoisoned;

/// What to do to whom.
#[derive(Debug, Default)]
pub struct Plan {
    /// The first that strikes an operation is the one that counts.
    pub faults: Vec<Fault>,
    /// Deliver completions in an order drawn from this seed.
    pub reorder_seed: Option<u64>,
}

impl Plan {
    /// A plan of one fault.
    pub fn single(trigger: Trigger, times: Times, kind: FaultKind) -> Self {
        Self { faults: vec![Fault { trigger, times, kind }], reorder_seed: None }
    }
}

/// One fault of a [`Plan`].
#[derive(Debug)]
pub struct Fault {
    /// Whom it strikes.
    pub trigger: Trigger,
    /// How often.
    pub times: Times,
    /// What it does.
    pub kind: FaultKind,
}

/// Whom a [`Fault`] strikes.
pub enum Trigger {
    /// The operation with this number or, forever, all from it on.
    Number(u64),
    /// Operations for which this holds.
    Matching(Box<dyn Fn(&LoggedOp) -> bool + Send + Sync>),
}

impl fmt::Debug for Trigger {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Number(number) => write!(formatter, "Number({number})"),
            Self::Matching(_) => write!(formatter, "Matching(..)"),
        }
    }
}

/// How often a [`Fault`] strikes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Times {
    /// The first time only.
    Once,
    /// Every time from then on.
    Forever,
}

/// What a [`Fault`] does; the file's opening has the meanings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultKind {
    /// Fails with an `errno`, unperformed.
    Error(i32),
    /// Fails with an `errno`, performed.
    ErrorAfter(i32),
    /// Moves about half.
    Short,
    /// Moves nothing.
    Nothing,
    /// Reads one bit wrongly.
    FlipBit,
    /// Nothing happens from here on.
    Cut,
    /// Half of this write happens and nothing from here on.
    Tear,
}

impl FaultKind {
    /// Whether the fault can strike such an operation at all.
    fn applies_to(self, operation: &OpKind) -> bool {
        match self {
            Self::Error(_) | Self::ErrorAfter(_) | Self::Cut | Self::Tear => true,
            Self::Short | Self::Nothing => matches!(operation, OpKind::Transfer(_)),
            Self::FlipBit => *operation == OpKind::Transfer(Direction::Read),
        }
    }
}

/// One operation that came by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoggedOp {
    /// Its number, from 0.
    pub number: u64,
    /// What it was.
    pub kind: OpKind,
    /// The file or directory; of a rename, the target.
    pub path: PathBuf,
    /// Of a transfer: bytes from the file's start.
    pub offset: u64,
    /// Of a transfer: bytes asked for. Of a length: the length.
    pub bytes: u64,
    /// What was done to it.
    pub fault: Option<FaultKind>,
}

/// What an operation was.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OpKind {
    /// [`Io::open`].
    Open(OpenMode),
    /// One attempt at a transfer.
    Transfer(Direction),
    /// [`Io::set_length`].
    SetLength(Length),
    /// [`Io::sync`].
    Sync,
    /// [`Io::entry`].
    Entry(EntryOp),
}

/// The wrapping backend.
#[derive(Debug)]
pub struct Sim {
    inner: Arc<dyn Io>,
    state: Arc<Mutex<State>>,
}

#[derive(Debug)]
struct State {
    plan: Plan,
    /// Whether the fault at the same place in the plan has struck.
    struck: Vec<bool>,
    cut: bool,
    log: Vec<LoggedOp>,
    delayed: Option<Delayed>,
}

impl Sim {
    /// Wraps `inner`.
    pub fn new(inner: Arc<dyn Io>, plan: Plan) -> Self {
        let state = State {
            struck: vec![false; plan.faults.len()],
            cut: false,
            log: Vec::new(),
            delayed: plan.reorder_seed.map(Delayed::new),
            plan,
        };
        Self { inner, state: Arc::new(Mutex::new(state)) }
    }

    /// Every operation so far, in order.
    pub fn log(&self) -> Vec<LoggedOp> {
        unpoisoned(self.state.lock()).log.clone()
    }

    /// Number of operations so far.
    pub fn operations(&self) -> u64 {
        unpoisoned(self.state.lock()).log.len() as u64
    }

    /// Whether any fault has struck: a test that fails operation 0, 1, 2, ... in turn is through
    /// when none does.
    pub fn has_struck(&self) -> bool {
        unpoisoned(self.state.lock()).struck.contains(&true)
    }

    /// Replaces the plan; numbers and the log go on.
    pub fn set_plan(&self, plan: Plan) {
        let mut state = unpoisoned(self.state.lock());
        state.struck = vec![false; plan.faults.len()];
        state.cut = false;
        state.plan = plan;
    }

    /// Logs an operation and says what to do to it.
    fn admit(&self, kind: OpKind, path: &Path, offset: u64, bytes: u64) -> Option<FaultKind> {
        let mut state = unpoisoned(self.state.lock());
        let number = state.log.len() as u64;
        let path = path.to_owned();
        let mut operation = LoggedOp { number, kind, path, offset, bytes, fault: None };
        operation.fault = state.strike(&operation);
        let fault = operation.fault;
        state.log.push(operation);
        fault
    }
}

impl State {
    fn strike(&mut self, operation: &LoggedOp) -> Option<FaultKind> {
        if self.cut {
            return Some(FaultKind::Cut);
        }
        let faults = self.plan.faults.iter().zip(&mut self.struck);
        for (fault, struck) in faults {
            let is_due = match (&fault.trigger, fault.times) {
                (Trigger::Number(number), Times::Once) => operation.number == *number,
                (Trigger::Number(number), Times::Forever) => operation.number >= *number,
                (Trigger::Matching(_), Times::Once) if *struck => false,
                (Trigger::Matching(matches), _) => matches(operation),
            };
            if is_due && fault.kind.applies_to(&operation.kind) {
                *struck = true;
                self.cut = matches!(fault.kind, FaultKind::Cut | FaultKind::Tear);
                return Some(fault.kind);
            }
        }
        None
    }
}

impl Io for Sim {
    fn name(&self) -> &'static str {
        "sim"
    }

    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Arc<File>> {
        let fault = self.admit(OpKind::Open(mode), path, 0, 0);
        perform(fault, || self.inner.open(path, mode))
    }

    fn submit(&self, transfer: Transfer) {
        let kind = OpKind::Transfer(transfer.direction);
        let bytes = transfer.range.len() as u64;
        let fault = self.admit(kind, &transfer.file.path, transfer.offset, bytes);
        let transfer = self.reordered(transfer);
        let Transfer { direction, .. } = transfer;
        match fault {
            None => self.inner.submit(transfer),
            Some(FaultKind::Error(errno)) => {
                (transfer.done)(Err(io::Error::from_raw_os_error(errno)), transfer.buffer);
            }
            Some(FaultKind::ErrorAfter(errno)) => {
                self.inner.submit(with_outcome(transfer, move |_, _| {
                    Err(io::Error::from_raw_os_error(errno))
                }));
            }
            Some(FaultKind::Short) => self.inner.submit(halved(transfer)),
            Some(FaultKind::Nothing) => (transfer.done)(Ok(0), transfer.buffer),
            Some(FaultKind::FlipBit) => self.inner.submit(with_flipped_bit(transfer)),
            Some(FaultKind::Tear) if direction == Direction::Write => {
                self.inner.submit(with_outcome(halved(transfer), |_, _| Err(cut())));
            }
            Some(FaultKind::Cut | FaultKind::Tear) => (transfer.done)(Err(cut()), transfer.buffer),
        }
    }

    fn set_length(&self, file: &File, length: Length) -> io::Result<()> {
        let (Length::Reserve(bytes) | Length::Exact(bytes)) = length;
        let fault = self.admit(OpKind::SetLength(length), &file.path, 0, bytes);
        perform(fault, || self.inner.set_length(file, length))
    }

    fn sync(&self, file: &File) -> io::Result<()> {
        let fault = self.admit(OpKind::Sync, &file.path, 0, 0);
        perform(fault, || self.inner.sync(file))
    }

    fn entry(&self, operation: &EntryOp) -> io::Result<EntryReply> {
        let fault = self.admit(OpKind::Entry(operation.clone()), path_of(operation), 0, 0);
        perform(fault, || self.inner.entry(operation))
    }
}

/// Performs an operation other than a transfer, as far as its fault allows.
fn perform<T>(fault: Option<FaultKind>, act: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    match fault {
        None => act(),
        Some(FaultKind::Error(errno)) => Err(io::Error::from_raw_os_error(errno)),
        Some(FaultKind::ErrorAfter(errno)) => {
            act()?;
            Err(io::Error::from_raw_os_error(errno))
        }
        Some(_) => Err(cut()),
    }
}

fn path_of(operation: &EntryOp) -> &Path {
    match operation {
        EntryOp::CreateDir(path)
        | EntryOp::SyncDir(path)
        | EntryOp::RemoveFile(path)
        | EntryOp::RemoveDir(path)
        | EntryOp::List(path)
        | EntryOp::Stat(path)
        | EntryOp::Space(path)
        | EntryOp::RenameNew { to: path, .. }
        | EntryOp::RenameReplace { to: path, .. } => path,
    }
}

fn cut() -> io::Error {
    io::Error::new(Errno::IO.kind(), "the simulated process was cut off")
}

/// The first half, at an aligned boundary for a direct file; whole where that would be nothing.
fn halved(mut transfer: Transfer) -> Transfer {
    let half_bytes = transfer.range.len() / 2;
    let remainder_bytes = if transfer.file.direct { half_bytes % ALIGNMENT } else { 0 };
    let part_bytes = half_bytes - remainder_bytes;
    if part_bytes > 0 {
        transfer.range.end = transfer.range.start + part_bytes;
    }
    transfer
}

fn with_flipped_bit(transfer: Transfer) -> Transfer {
    let start = transfer.range.start;
    with_outcome(transfer, move |outcome, buffer| {
        let moved_bytes = outcome?;
        if moved_bytes > 0 {
            buffer[start + moved_bytes / 2] ^= 0x10;
        }
        Ok(moved_bytes)
    })
}

fn with_outcome(
    mut transfer: Transfer,
    change: impl FnOnce(io::Result<usize>, &mut Buffer) -> io::Result<usize> + Send + 'static,
) -> Transfer {
    let done = transfer.done;
    transfer.done = Box::new(move |outcome, mut buffer| {
        let outcome = change(outcome, &mut buffer);
        done(outcome, buffer);
    });
    transfer
}

/// Most completions that wait for their turn.
const DELAYED_MAX: usize = 8;

/// Completions that wait for their turn.
struct Delayed {
    random: Rng,
    in_flight: usize,
    waiting: Vec<(Done, io::Result<usize>, Buffer)>,
}

impl Delayed {
    fn new(seed: u64) -> Self {
        Self { random: Rng::with_seed(seed), in_flight: 0, waiting: Vec::new() }
    }

    /// Takes the completions that are due now, in the order to deliver them.
    fn due(&mut self) -> Vec<(Done, io::Result<usize>, Buffer)> {
        let keep = if self.in_flight == 0 { 0 } else { DELAYED_MAX };
        let mut due = Vec::new();
        while self.waiting.len() > keep {
            let index = self.random.usize(..self.waiting.len());
            due.push(self.waiting.swap_remove(index));
        }
        due
    }
}

impl fmt::Debug for Delayed {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Delayed")
            .field("in_flight", &self.in_flight)
            .field("waiting", &self.waiting.len())
            .finish_non_exhaustive()
    }
}

impl Sim {
    /// Makes the transfer's completion wait for its turn, if the plan says so.
    fn reordered(&self, mut transfer: Transfer) -> Transfer {
        match &mut unpoisoned(self.state.lock()).delayed {
            Some(delayed) => delayed.in_flight += 1,
            None => return transfer,
        }
        let (state, done) = (Arc::clone(&self.state), transfer.done);
        transfer.done = Box::new(move |outcome, buffer| {
            let due = match &mut unpoisoned(state.lock()).delayed {
                Some(delayed) => {
                    delayed.in_flight -= 1;
                    delayed.waiting.push((done, outcome, buffer));
                    delayed.due()
                }
                None => vec![(done, outcome, buffer)],
            };
            due.into_iter().for_each(deliver);
        });
        transfer
    }
}

/// A panic in one callback must not swallow the others, which wait behind it.
fn deliver((done, outcome, buffer): (Done, io::Result<usize>, Buffer)) {
    let call = std::panic::AssertUnwindSafe(|| done(outcome, buffer));
    if std::panic::catch_unwind(call).is_err() {
        tracing::error!("the callback of a simulated transfer panicked");
    }
}

#[cfg(test)]
mod tests {
    use super::super::buffer::BufferPool;
    use super::super::threads::{Options, Threads};
    use super::super::transfer::{read_fully, write_fully};
    use super::*;

    const BYTES: usize = 8 * ALIGNMENT;

    struct Bench {
        sim: Arc<Sim>,
        io: Arc<dyn Io>,
        pool: Arc<BufferPool>,
        directory: tempfile::TempDir,
    }

    impl Bench {
        fn new(plan: Plan) -> Self {
            let inner =
                Arc::new(Threads::new(Options { threads: 2, ..Options::default() }).unwrap());
            let sim = Arc::new(Sim::new(inner, plan));
            Self {
                io: Arc::clone(&sim) as Arc<dyn Io>,
                sim,
                pool: BufferPool::new(BYTES, 2).unwrap(),
                directory: tempfile::tempdir().unwrap(),
            }
        }

        /// open, write, set length, sync, rename, open, read: seven operations without faults.
        fn round_trip(&self) -> io::Result<Buffer> {
            let from = self.directory.path().join("file.tmp");
            let to = self.directory.path().join("file");
            let file = self.io.open(&from, OpenMode::Create)?;
            let mut buffer = self.pool.take();
            buffer.fill(0x5a);
            write_fully(&self.io, &file, 0, buffer, 0..BYTES).0?;
            self.io.set_length(&file, Length::Exact(BYTES as u64))?;
            self.io.sync(&file)?;
            self.io.entry(&EntryOp::RenameNew { from, to: to.clone() })?;
            let file = self.io.open(&to, OpenMode::Read)?;
            let (outcome, buffer) = read_fully(&self.io, &file, 0, self.pool.take(), 0..BYTES);
            outcome.map(|()| buffer)
        }
    }

    #[test]
    fn each_operation_can_fail_once_or_for_ever() {
        let mut number = 0;
        loop {
            let kind = FaultKind::Error(Errno::IO.raw_os_error());
            for times in [Times::Once, Times::Forever] {
                let bench = Bench::new(Plan::single(Trigger::Number(number), times, kind));
                let outcome = bench.round_trip();
                if !bench.sim.has_struck() {
                    assert_eq!(number, 7, "the round trip has seven operations");
                    assert!(outcome.is_ok());
                    return;
                }
                let error = outcome.unwrap_err();
                assert_eq!(Errno::from_io_error(&error), Some(Errno::IO), "operation {number}");
                assert_eq!(bench.sim.operations(), number + 1);
                assert_eq!(bench.pool.free(), 2, "the buffer came back");
            }
            number += 1;
        }
    }

    #[test]
    fn short_transfers_are_continued_and_moving_nothing_is_an_error() {
        let is_transfer = || {
            let is = |operation: &LoggedOp| matches!(operation.kind, OpKind::Transfer(_));
            Trigger::Matching(Box::new(is))
        };
        let bench = Bench::new(Plan::single(is_transfer(), Times::Forever, FaultKind::Short));
        let buffer = bench.round_trip().unwrap();
        assert!(buffer.iter().all(|byte| *byte == 0x5a));
        let struck = bench.sim.log().iter().filter(|operation| operation.fault.is_some()).count();
        assert!(struck >= 4, "{struck} attempts were cut short");

        let bench = Bench::new(Plan::single(is_transfer(), Times::Once, FaultKind::Nothing));
        assert_eq!(bench.round_trip().unwrap_err().kind(), io::ErrorKind::WriteZero);
    }

    #[test]
    fn passing_errors_are_retried() {
        let kind = FaultKind::Error(Errno::AGAIN.raw_os_error());
        let bench = Bench::new(Plan::single(Trigger::Number(1), Times::Once, kind));
        bench.round_trip().unwrap();
        assert_eq!(bench.sim.operations(), 8);
    }

    #[test]
    fn a_flipped_bit_is_one_bit() {
        let is_read = |operation: &LoggedOp| operation.kind == OpKind::Transfer(Direction::Read);
        let trigger = Trigger::Matching(Box::new(is_read));
        let bench = Bench::new(Plan::single(trigger, Times::Once, FaultKind::FlipBit));
        let buffer = bench.round_trip().unwrap();
        let wrong_bits: u32 = buffer.iter().map(|byte| (byte ^ 0x5a).count_ones()).sum();
        assert_eq!(wrong_bits, 1);
    }

    #[test]
    fn after_a_cut_nothing_happens() {
        for (kind, bytes) in [(FaultKind::Cut, 0), (FaultKind::Tear, BYTES as u64 / 2)] {
            let bench = Bench::new(Plan::single(Trigger::Number(1), Times::Once, kind));
            bench.round_trip().unwrap_err();
            let path = bench.directory.path().join("file.tmp");
            assert!(bench.io.entry(&EntryOp::RemoveFile(path.clone())).is_err());
            assert_eq!(std::fs::metadata(path).unwrap().len(), bytes, "{kind:?}");
        }
    }

    #[test]
    fn a_lost_reply_leaves_the_work_done() {
        let kind = FaultKind::ErrorAfter(Errno::IO.raw_os_error());
        let bench = Bench::new(Plan::single(Trigger::Number(4), Times::Once, kind));
        bench.round_trip().unwrap_err();
        assert!(bench.directory.path().join("file").exists());
    }
}
