//! Where the pure machine meets clock, chance and disk: one thread decides, another makes durable.
//!
//! ```text
//! calls ──► [decide: State::apply] ──► [keep: one journal write for all that wait] ──► replies
//!                    └── nothing to keep, and nothing of this job still to be kept ──► reply
//! ```
//!
//! Always holds: a reply leaves only when every change that its job had made before it is durable,
//! so nobody ever learns of something that a crash could take back; if the journal fails, no reply
//! leaves any more.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc as blocking;
use std::time::{Duration, Instant, SystemTime};

use dtr_proto::span;
use tokio::runtime::Handle;
use tokio::sync::{mpsc, oneshot};
use tracing::{info, warn};

use crate::journal::{Journal, JournalError};
use crate::metrics::Histograms;
use crate::state::{Change, Effects, EndedAttempt, Event, Level, Moment, Reply, State, Ticket};

/// Calls that may wait to be decided; more are held back at their connections.
const QUEUE_CALLS: usize = 16_384;
/// How often time passes for the machine.
const TICK: Duration = Duration::from_millis(50);
/// After so many ticks, callers that hung up are forgotten.
const SWEEP_TICKS: u64 = 64;

/// Replies that a thread outside the runtime sends itself.
const SENT_FROM_OUTSIDE_MAX: usize = 256;

/// The way in: cheap to clone.
#[derive(Clone, Debug)]
pub struct Core {
    calls: mpsc::Sender<Call>,
    draining: Arc<AtomicBool>,
}

/// Nobody answers any more: the coordinator is ending.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("the coordinator is shutting down")]
pub struct Ending;

/// Time and chance for the machine.
pub type Clock = Box<dyn FnMut() -> Moment + Send>;

struct Call {
    event: Event,
    reply: Option<oneshot::Sender<Reply>>,
}

/// Replies with those who wait for them.
type Replies = Vec<(oneshot::Sender<Reply>, Reply)>;

/// What one decision, or several, want kept before they are answered.
#[derive(Default)]
struct Batch {
    changes: Vec<Change>,
    replies: Replies,
    sequence: u64,
}

impl Core {
    /// Starts deciding. `failed` is notified of a journal that cannot be written.
    pub fn start(
        state: State,
        journal: Journal,
        clock: Clock,
        histograms: Arc<Histograms>,
        failed: oneshot::Sender<JournalError>,
    ) -> std::io::Result<Self> {
        let (calls, incoming) = mpsc::channel(QUEUE_CALLS);
        let (batches, kept) = blocking::sync_channel(QUEUE_CALLS);
        let durable = Arc::new(AtomicU64::new(0));
        let draining = Arc::new(AtomicBool::new(false));
        let keeper = Arc::clone(&durable);
        let runtime = Handle::current();
        spawn("keep", move || {
            let _entered = runtime.enter();
            keep(&journal, &kept, &keeper, failed);
        })?;
        let decider = Decider {
            state,
            clock,
            histograms,
            batches,
            durable,
            draining: Arc::clone(&draining),
            waiting: HashMap::new(),
            last_ticket: 0,
            ticks: 0,
            sequence: 0,
            unkept: HashMap::new(),
        };
        spawn("decide", move || decider.run(incoming))?;
        let core = Self { calls, draining };
        tokio::spawn(core.clone().pass_time());
        Ok(core)
    }

    /// Lets an event happen and waits for its reply.
    pub async fn ask(&self, event: Event) -> Result<Reply, Ending> {
        if self.draining.load(Ordering::Acquire) {
            return Err(Ending);
        }
        let (reply, answered) = oneshot::channel();
        self.calls.send(Call { event, reply: Some(reply) }).await.map_err(|_| Ending)?;
        answered.await.map_err(|_| Ending)
    }

    /// Ends every wait; calls from now on are refused.
    pub async fn drain(&self) {
        self.draining.store(true, Ordering::Release);
        // The decider looks at the flag with its next call.
        let _ended = self.calls.send(Call { event: Event::Tick, reply: None }).await;
    }

    async fn pass_time(self) {
        let mut interval = tokio::time::interval(TICK);
        interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            interval.tick().await;
            if self.calls.send(Call { event: Event::Tick, reply: None }).await.is_err() {
                return;
            }
        }
    }
}

/// The machine's own thread.
struct Decider {
    state: State,
    clock: Clock,
    histograms: Arc<Histograms>,
    batches: blocking::SyncSender<Batch>,
    durable: Arc<AtomicU64>,
    draining: Arc<AtomicBool>,
    waiting: HashMap<Ticket, oneshot::Sender<Reply>>,
    last_ticket: Ticket,
    ticks: u64,
    sequence: u64,
    /// The last batch that keeps something of a job.
    unkept: HashMap<String, u64>,
}

impl Decider {
    fn run(mut self, mut incoming: mpsc::Receiver<Call>) {
        while let Some(call) = incoming.blocking_recv() {
            if self.draining.load(Ordering::Acquire) {
                self.waiting.clear();
                continue;
            }
            if !self.decide(call) {
                return; // the journal failed: nothing may be answered any more
            }
        }
    }

    /// False once nothing can be kept.
    fn decide(&mut self, call: Call) -> bool {
        self.last_ticket += 1;
        let ticket = self.last_ticket;
        if let Some(reply) = call.reply {
            self.waiting.insert(ticket, reply);
        }
        let job = call.event.job().to_owned();
        let is_tick = matches!(call.event, Event::Tick);
        let mut effects = Effects::default();
        self.state.apply((self.clock)(), ticket, call.event, &mut effects);
        self.report(&effects);
        if is_tick {
            self.sweep();
        }
        let replies = effects
            .replies
            .into_iter()
            .filter_map(|(ticket, reply)| Some((self.waiting.remove(&ticket)?, reply)));
        let replies: Vec<_> = replies.collect();
        let durable = self.durable.load(Ordering::Acquire);
        // What is of no job, such as time that passes, may answer callers of any.
        let unkept = if job.is_empty() {
            self.unkept.values().max().copied()
        } else {
            self.unkept.get(&job).copied()
        };
        let must_wait = !replies.is_empty() && unkept.is_some_and(|sequence| sequence > durable);
        if effects.changes.is_empty() && !must_wait {
            send(replies);
            return true;
        }
        self.sequence += 1;
        for change in &effects.changes {
            self.unkept.insert(change.key.job().to_owned(), self.sequence);
        }
        let batch = Batch { changes: effects.changes, replies, sequence: self.sequence };
        self.batches.send(batch).is_ok()
    }

    fn report(&self, effects: &Effects) {
        for note in &effects.notes {
            match note.level {
                Level::Info => info!(job = note.job, "{}", note.text),
                Level::Warn => warn!(job = note.job, "{}", note.text),
            }
            if let Some(ended) = &note.ended {
                if ended.error.is_empty() {
                    let took = Duration::from_millis(ended.ended_ms - ended.begun_ms);
                    self.histograms.checkpoint_write.observe(took);
                }
                trace(&note.job, ended);
            }
        }
    }

    /// Forgets calls that nobody waits for any more, and jobs with nothing left to keep.
    fn sweep(&mut self) {
        let durable = self.durable.load(Ordering::Acquire);
        self.unkept.retain(|_, sequence| *sequence > durable);
        self.ticks += 1;
        if self.ticks.is_multiple_of(SWEEP_TICKS) {
            self.waiting.retain(|_, reply| !reply.is_closed());
        }
    }
}

/// The journal's own thread: whatever waits goes into one write.
fn keep(
    journal: &Journal,
    batches: &blocking::Receiver<Batch>,
    durable: &AtomicU64,
    failed: oneshot::Sender<JournalError>,
) {
    while let Ok(first) = batches.recv() {
        let group: Vec<Batch> = std::iter::once(first).chain(batches.try_iter()).collect();
        let changes = || group.iter().flat_map(|batch| &batch.changes);
        if changes().next().is_some()
            && let Err(error) = journal.keep(changes())
        {
            // The owner may have gone already; then there is nobody left to notify.
            let _gone = failed.send(error);
            return;
        }
        durable.store(group.last().map_or(0, |batch| batch.sequence), Ordering::Release);
        for batch in group {
            send_from_outside(batch.replies);
        }
    }
}

fn send(replies: Replies) {
    for (caller, reply) in replies {
        // A caller that hung up gets it when it asks again.
        let _gone = caller.send(reply);
    }
}

/// The same from outside the runtime. Waking thousands of tasks from there is slow: it is left to
/// the runtime's own threads.
fn send_from_outside(mut replies: Replies) {
    while replies.len() > SENT_FROM_OUTSIDE_MAX {
        let some = replies.split_off(replies.len() - SENT_FROM_OUTSIDE_MAX);
        tokio::spawn(async move { send(some) });
    }
    send(replies);
}

fn spawn(name: &str, run: impl FnOnce() + Send + 'static) -> std::io::Result<()> {
    std::thread::Builder::new().name(format!("coord-{name}")).spawn(run).map(drop)
}

/// The machine's clock in production: monotonic since now.
pub fn system_clock() -> Clock {
    let started = Instant::now();
    Box::new(move || {
        let mut random = [0; 16];
        getrandom::fill(&mut random).expect("the system gives random bits");
        Moment {
            now_ms: millis(started.elapsed()),
            wall_ms: wall_ms(),
            random: u128::from_le_bytes(random),
        }
    })
}

/// Milliseconds since 1970 on the wall clock; 0 if it stands before that.
pub(crate) fn wall_ms() -> u64 {
    millis(SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default())
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// Says where the time of an attempt went, for traces, as [`span`] describes.
fn trace(job: &str, ended: &EndedAttempt) {
    let EndedAttempt { attempt, step, begun_ms, asked_ms, ended_ms, error } = ended;
    let tell = |name: &str, id: &str, parent: &str, start_ms: u64, end_ms: u64| {
        let (ago_us, took_us) =
            (1000 * ended_ms.saturating_sub(start_ms), 1000 * end_ms.saturating_sub(start_ms));
        tracing::trace!(
            target: span::TARGET,
            trace = attempt,
            span = name,
            id,
            parent,
            ago_us,
            took_us,
            job,
            step,
            error,
        );
    };
    tell("checkpoint", span::CHECKPOINT, "", *begun_ms, *ended_ms);
    let complete_ms = asked_ms.unwrap_or(*ended_ms);
    tell("all ranks write", "reports", span::CHECKPOINT, *begun_ms, complete_ms);
    if let Some(asked_ms) = asked_ms {
        tell("one rank publishes", "publish", span::CHECKPOINT, *asked_ms, *ended_ms);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::Policy;

    #[tokio::test]
    async fn a_panic_of_the_machine_is_no_end_that_somebody_asked_for() {
        let folder = tempfile::tempdir().expect("a scratch directory");
        let journal =
            Journal::open(&folder.path().join("journal.redb")).expect("it is new").journal;
        let (failed, failure) = oneshot::channel();
        let clock: Clock = Box::new(|| panic!("on purpose, by a test"));
        let state = State::new(Policy::default(), 1);
        let core = Core::start(state, journal, clock, Arc::default(), failed).expect("threads");
        failure.await.expect_err("no journal failed");
        core.ask(Event::Tick).await.expect_err("nobody answers any more");
    }
}
