//! The state machine under a network and a clock that misbehave, checked against a model.
//!
//! Four simulated workers register, meet at a barrier, save a step together and go round. A seed
//! draws everything: delays, losses, duplicates (and so reordering), partitions, paused and killed
//! workers, jobs that end as a whole, coordinators that end before or after they kept something,
//! clocks that jump; and whether workers share a store or have one each. Beside it other jobs come
//! and go, more than the coordinator keeps. Then the world calms down, and the job must move on.
//!
//! What is checked, at every event:
//! - epochs never go back, not even over a restart;
//! - a barrier is released with one arrival of every rank, each really sent, none used twice;
//! - a step has one commit, of an attempt whose shards were all written, and it is the store's, or
//!   lies in every worker's own store and is never taken back there;
//! - a process that was replaced, declared dead or left changes nothing;
//! - no more jobs and barriers are kept than allowed, and no job is forgotten that has a living
//!   worker or an open attempt;
//! - nobody is declared dead that was heard of within the timeout, whatever clock and restarts do;
//! - every call ends, and a calm job commits.
//!
//! `DTR_TORTURE_STATES=10000` runs more, and `DTR_TORTURE_FIRST=17` begins with that seed. The same
//! seed gives the same history.

#[path = "support/budget.rs"]
mod budget;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap, HashMap, HashSet};
use std::hash::{DefaultHasher, Hash, Hasher};

use coordinator::state::{
    Change, Effects, Event, Key, Moment, Policy, RefusalKind, Reply, State, Ticket,
};
use dtr_proto::v1::{self, WorkerState, wait_barrier_reply::Outcome};
use fastrand::Rng;
use prost::Message;

const WORLD_SIZE: u32 = 4;
const JOB: &str = "sim";
const TIMEOUT_MS: u64 = 5_000;
const BARRIER_MS: u64 = 20_000;
const REPORT_MS: u64 = 15_000;
const RESEND_MS: u64 = 700;
/// When faults end, and when the simulation does.
const CALM_MS: u64 = 60_000;
const END_MS: u64 = 150_000;
/// What the coordinator's clock says at the beginning: far from both ends.
const CLOCK_MS: i64 = 1 << 40;
/// Jobs that are kept, and barriers of each.
const JOBS_MAX: usize = 2;
const BARRIERS_MAX: usize = 2;
/// Whoever asks with it is no worker of the job.
const NO_TICKET: Ticket = 0;
/// A call that nobody waits for.
const NO_CALL: u64 = u64::MAX - 1;

#[test]
fn seeds() {
    let seeds = budget::budget(200);
    let mut commits = 0;
    for seed in seeds.clone() {
        commits += World::new(seed).run().commits.len();
    }
    assert!(commits > 0, "a simulation that commits nothing shows nothing");
    budget::tell(&seeds);
}

#[test]
fn the_same_seed_is_the_same_history() {
    for seed in [1, 2, 3] {
        let hash = |seed| World::new(seed).run().trace.finish();
        assert_eq!(hash(seed), hash(seed), "seed {seed}");
    }
}

/// What happens next, and when.
enum Action {
    Deliver { worker: usize, call: u64, event: Event },
    Answer { worker: usize, call: u64, reply: Reply },
    Resend { worker: usize, call: u64 },
    Beat { worker: usize, incarnation: u64 },
    GiveUp { worker: usize, call: u64 },
    Tick,
    Fault,
    Start { worker: usize },
    Resume { worker: usize },
    Heal { worker: usize },
    Visit,
}

/// Where a worker's program stands.
#[derive(Clone, Debug, PartialEq)]
enum Phase {
    Down,
    Registering,
    Barrier,
    Asking,
    Beginning { step: u64 },
    Reporting { step: u64, attempt: String },
    Committing { step: u64, attempt: String },
    GivingUp,
}

struct Worker {
    phase: Phase,
    incarnation: u64,
    epoch: u64,
    joined_epoch: u64,
    arrivals: u64,
    /// The step that it began last, and how often.
    tries: (u64, u32),
    /// The call that it waits for, with what to send again.
    call: u64,
    event: Option<Event>,
    since_ms: u64,
    is_paused: bool,
    is_cut_off: bool,
}

impl Worker {
    /// How often it has begun the step before this time.
    fn next_try(&mut self, step: u64) -> u32 {
        self.tries = if self.tries.0 == step { (step, self.tries.1 + 1) } else { (step, 0) };
        self.tries.1
    }
}

/// What one event led to, before it is kept: changes, and the replies that wait for them.
type Decision = (Vec<Change>, Vec<(Ticket, Reply)>);

struct World {
    chance: Rng,
    now_ms: u64,
    /// How far the coordinator's clock is off.
    clock_ms: i64,
    jumps_ms: Vec<u64>,
    sequence: u64,
    actions: BTreeMap<u64, Action>,
    queue: BinaryHeap<Reverse<(u64, u64)>>,
    workers: Vec<Worker>,
    state: State,
    incarnation: u64,
    started_ms: u64,
    tickets: HashMap<Ticket, (usize, u64)>,
    last_ticket: Ticket,
    visits: u64,
    /// What the disk has, and what was decided but not yet kept.
    disk: BTreeMap<Vec<u8>, Vec<u8>>,
    unkept: Vec<Decision>,
    model: Model,
    failures_max: u32,
    has_own_stores: bool,
}

/// What must be true.
struct Model {
    seed: u64,
    epoch_told: u64,
    arrivals: BTreeMap<u32, BTreeSet<u64>>,
    arrivals_used: HashSet<u64>,
    generation: Option<u64>,
    shards: HashSet<(String, u32)>,
    manifests: BTreeMap<u64, String>,
    /// Of each rank, where each has a store of its own.
    own_manifests: Option<Vec<BTreeMap<u64, String>>>,
    commits: BTreeMap<u64, String>,
    commits_when_calm: Option<usize>,
    members: BTreeMap<String, v1::WorkerRecord>,
    /// Steps whose attempts are in flight.
    open: BTreeSet<u64>,
    /// The worker whose registration is being decided.
    registering: Option<String>,
    heard_ms: HashMap<u64, u64>,
    trace: DefaultHasher,
}

impl World {
    fn new(seed: u64) -> Self {
        let mut chance = Rng::with_seed(seed);
        let failures_max = if chance.u32(..100) < 20 { 3 } else { 1_000_000 };
        let has_own_stores = chance.u32(..100) < 40;
        let worker = || Worker {
            phase: Phase::Down,
            incarnation: 0,
            epoch: 0,
            joined_epoch: 0,
            arrivals: 0,
            tries: (0, 0),
            call: 0,
            event: None,
            since_ms: 0,
            is_paused: false,
            is_cut_off: false,
        };
        let mut world = Self {
            chance,
            now_ms: 0,
            clock_ms: CLOCK_MS,
            jumps_ms: Vec::new(),
            sequence: 0,
            actions: BTreeMap::new(),
            queue: BinaryHeap::new(),
            workers: (0..WORLD_SIZE).map(|_| worker()).collect(),
            state: first_state(failures_max),
            incarnation: 1,
            started_ms: 0,
            tickets: HashMap::new(),
            last_ticket: 0,
            visits: 0,
            disk: BTreeMap::new(),
            unkept: Vec::new(),
            model: Model::new(seed, has_own_stores),
            failures_max,
            has_own_stores,
        };
        world.after(50, Action::Tick);
        world.after(3_000, Action::Fault);
        world.after(1_000, Action::Visit);
        for worker in 0..world.workers.len() {
            let delay_ms = world.chance.u64(..2_000);
            world.after(delay_ms, Action::Start { worker });
        }
        world
    }

    fn run(mut self) -> Model {
        while let Some(Reverse((at_ms, sequence))) = self.queue.pop() {
            if at_ms > END_MS {
                break;
            }
            self.now_ms = at_ms;
            if self.is_calm() && self.model.commits_when_calm.is_none() {
                self.calm_down();
            }
            let action = self.actions.remove(&sequence).expect("each is there once");
            self.act(action);
        }
        self.check_liveness();
        self.model
    }

    fn is_calm(&self) -> bool {
        self.now_ms >= CALM_MS
    }

    fn after(&mut self, delay_ms: u64, action: Action) {
        self.sequence += 1;
        self.actions.insert(self.sequence, action);
        self.queue.push(Reverse((self.now_ms + delay_ms, self.sequence)));
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::Tick => {
                self.keep_some();
                self.coordinate(NO_TICKET, Event::Tick);
                self.keep_some();
                self.after(50, Action::Tick);
            }
            Action::Fault => self.fault(),
            Action::Deliver { worker, call, event } => {
                self.last_ticket += 1;
                let ticket = self.last_ticket;
                self.tickets.insert(ticket, (worker, call));
                self.coordinate(ticket, event);
                self.keep_some();
            }
            Action::Answer { worker, call, reply } => self.answer(worker, call, reply),
            Action::Resend { worker, call } => self.resend(worker, call),
            Action::Beat { worker, incarnation } => self.beat(worker, incarnation),
            Action::GiveUp { worker, call } => self.give_up(worker, call),
            Action::Start { worker } => self.start(worker),
            Action::Resume { worker } => self.workers[worker].is_paused = false,
            Action::Heal { worker } => self.workers[worker].is_cut_off = false,
            Action::Visit => self.visit(),
        }
    }

    /// Another job runs, with more barriers than are kept, and ends.
    fn visit(&mut self) {
        self.visits += 1;
        let job = format!("visitor-{}", self.visits);
        let worker_id = "visitor".to_owned();
        let identity = v1::Identity { job, worker_id, incarnation: self.visits, epoch: 1 };
        self.coordinate(
            NO_TICKET,
            Event::Register(v1::RegisterRequest {
                job: identity.job.clone(),
                worker_id: identity.worker_id.clone(),
                incarnation: identity.incarnation,
                world_size: 1,
                ..v1::RegisterRequest::default()
            }),
        );
        for arrival in 1..=BARRIERS_MAX + 2 {
            self.coordinate(
                NO_TICKET,
                Event::WaitBarrier(v1::WaitBarrierRequest {
                    identity: Some(identity.clone()),
                    name: format!("round {arrival}"),
                    arrival: u64::try_from(arrival).expect("few"),
                    timeout_ms: BARRIER_MS,
                    alike: String::new(),
                }),
            );
        }
        let identity = Some(identity);
        self.coordinate(
            NO_TICKET,
            Event::Leave(v1::LeaveRequest { identity, failure: String::new() }),
        );
        self.keep_some();
        let pause_ms = 500 + self.chance.u64(..4_000);
        self.after(pause_ms, Action::Visit);
    }

    // The network.

    /// Sends something one way: late, twice, or never.
    fn send(&mut self, worker: usize, make: impl Fn() -> Action) {
        let is_lost =
            self.workers[worker].is_cut_off || (!self.is_calm() && self.chance.u32(..100) < 8);
        if is_lost {
            return;
        }
        let slow = if !self.is_calm() && self.chance.u32(..100) < 5 { 2_000 } else { 40 };
        let delay_ms = 1 + self.chance.u64(..slow);
        self.after(delay_ms, make());
        if !self.is_calm() && self.chance.u32(..100) < 8 {
            let delay_ms = 1 + self.chance.u64(..3_000);
            self.after(delay_ms, make());
        }
    }

    fn call(&mut self, worker: usize, phase: Phase, event: Event) {
        self.sequence += 1;
        let call = self.sequence;
        let place = &mut self.workers[worker];
        place.phase = phase;
        place.call = call;
        place.event = Some(event);
        place.since_ms = self.now_ms;
        self.transmit(worker, call);
    }

    fn transmit(&mut self, worker: usize, call: u64) {
        let Some(event) = self.workers[worker].event.clone() else { return };
        self.send(worker, || Action::Deliver { worker, call, event: event.clone() });
        self.after(RESEND_MS, Action::Resend { worker, call });
    }

    fn resend(&mut self, worker: usize, call: u64) {
        if self.workers[worker].is_paused {
            self.after(RESEND_MS, Action::Resend { worker, call });
        } else if self.workers[worker].call == call {
            self.transmit(worker, call);
        }
    }

    // The coordinator.

    fn coordinate(&mut self, ticket: Ticket, event: Event) {
        let random = self.chance.u128(..);
        let clock = i64::try_from(self.now_ms).expect("short") + self.clock_ms;
        let at = Moment { now_ms: u64::try_from(clock).unwrap_or(0), wall_ms: self.now_ms, random };
        let is_stale = self.model.is_stale(&event);
        let is_leave = matches!(event, Event::Leave(_));
        if let Event::Heartbeat(request) = &event
            && let Some(identity) = &request.identity
        {
            self.model.heard_ms.insert(identity.incarnation, self.now_ms);
        }
        let mut registering = None;
        if let Event::Register(request) = &event {
            self.model.heard_ms.insert(request.incarnation, self.now_ms);
            registering = Some(request.worker_id.clone());
        }
        let mut effects = Effects::default();
        self.state.apply(at, ticket, event, &mut effects);
        if is_stale {
            let harmless = effects.changes.is_empty() && effects.replies.len() <= 1;
            self.model.assert(harmless, "a process that is no member changed something");
            let refused = effects.replies.iter().all(|(_, reply)| {
                matches!(reply, Reply::Refused(refusal) if refusal.kind == RefusalKind::Fenced)
            });
            self.model.assert(refused || is_leave, "a process that is no member was served");
        }
        let grace_ms = self.now_ms - self.started_ms;
        let slack_ms = self.jump_slack_ms();
        self.model.registering = registering;
        for change in &effects.changes {
            self.model.see_member(change, self.now_ms, grace_ms, slack_ms);
        }
        self.unkept.push((effects.changes, effects.replies));
    }

    /// Each jump of the clock may count as so much time.
    fn jump_slack_ms(&self) -> u64 {
        let recent = |at_ms: &&u64| **at_ms + 2 * TIMEOUT_MS > self.now_ms;
        let count = self.jumps_ms.iter().filter(recent).count();
        500 + 2_000 * u64::try_from(count).expect("few")
    }

    /// The journal writes; sometimes later than the next decision.
    fn keep_some(&mut self) {
        if !self.is_calm() && self.chance.u32(..100) < 15 {
            return;
        }
        for (changes, replies) in std::mem::take(&mut self.unkept) {
            for change in changes {
                self.model.take_in(&change);
                match change.value {
                    Some(value) => drop(self.disk.insert(change.key.encode(), value)),
                    None => drop(self.disk.remove(&change.key.encode())),
                }
            }
            for (ticket, reply) in replies {
                if ticket != NO_TICKET {
                    self.model.reply_leaves(&reply);
                }
                if let Some((worker, call)) = self.tickets.remove(&ticket) {
                    self.send(worker, || Action::Answer { worker, call, reply: reply.clone() });
                }
            }
        }
    }

    /// Ends and starts again: what was not kept never happened.
    fn restart(&mut self) {
        let keeps_last = self.chance.u32(..100) < 50;
        if keeps_last {
            self.keep_some();
        }
        self.unkept.clear();
        self.tickets.clear();
        self.incarnation += 1;
        self.started_ms = self.now_ms;
        let clock = i64::try_from(self.now_ms).expect("short") + self.clock_ms;
        let now_ms = u64::try_from(clock).unwrap_or(0);
        let kept = self.disk.iter().map(|(key, value)| (key.as_slice(), value.as_slice()));
        let state = State::recover(policy(self.failures_max), self.incarnation, now_ms, kept);
        self.state = state.expect("what was kept can be read");
        self.model.recover(&self.disk);
    }

    fn fault(&mut self) {
        if self.is_calm() {
            return;
        }
        let worker = self.chance.usize(..self.workers.len());
        let long_ms = 500 + self.chance.u64(..12_000);
        match self.chance.u64(..9) {
            0 | 1 => self.restart(),
            2 => {
                let jump = self.chance.i64(0..7_200_000);
                self.jumps_ms.push(self.now_ms);
                self.clock_ms += if self.chance.u32(..100) < 70 { jump } else { -jump };
            }
            3 | 4 => {
                self.workers[worker].is_cut_off = true;
                self.after(long_ms, Action::Heal { worker });
            }
            5 => {
                self.workers[worker].is_paused = true;
                self.after(long_ms, Action::Resume { worker });
            }
            6 => {
                self.workers[worker].phase = Phase::Down;
                self.workers[worker].call = 0;
                self.after(long_ms, Action::Start { worker });
            }
            7 => self.leave(worker, long_ms),
            _ => (0..self.workers.len()).for_each(|worker| self.leave(worker, long_ms)),
        }
        let pause_ms = 500 + self.chance.u64(..8_000);
        self.after(pause_ms, Action::Fault);
    }

    fn calm_down(&mut self) {
        self.model.commits_when_calm = Some(self.model.commits.len());
        for worker in 0..self.workers.len() {
            self.workers[worker].is_cut_off = false;
            self.workers[worker].is_paused = false;
            if self.workers[worker].phase == Phase::Down {
                self.after(1, Action::Start { worker });
            }
        }
    }

    // The workers' program.

    fn identity(&self, worker: usize) -> v1::Identity {
        let Worker { incarnation, epoch, .. } = self.workers[worker];
        v1::Identity { job: JOB.into(), worker_id: name(worker), incarnation, epoch }
    }

    fn start(&mut self, worker: usize) {
        if self.workers[worker].phase != Phase::Down {
            return;
        }
        self.register(worker);
    }

    fn register(&mut self, worker: usize) {
        self.register_anew(worker, 0);
    }

    /// Registers a new process, or one that had the incarnation `rejoins`.
    fn register_anew(&mut self, worker: usize, rejoins: u64) {
        let incarnation = self.chance.u64(..);
        self.workers[worker].incarnation = incarnation;
        let request = v1::RegisterRequest {
            rejoins,
            job: JOB.into(),
            worker_id: name(worker),
            incarnation,
            rank: rank(worker),
            world_size: WORLD_SIZE,
            ..v1::RegisterRequest::default()
        };
        self.call(worker, Phase::Registering, Event::Register(request));
    }

    fn leave(&mut self, worker: usize, pause_ms: u64) {
        if self.workers[worker].phase == Phase::Down {
            return;
        }
        let identity = Some(self.identity(worker));
        let event = Event::Leave(v1::LeaveRequest { identity, failure: String::new() });
        self.send(worker, || Action::Deliver { worker, call: NO_CALL, event: event.clone() });
        self.workers[worker].phase = Phase::Down;
        self.workers[worker].call = 0;
        self.after(pause_ms, Action::Start { worker });
    }

    fn beat(&mut self, worker: usize, incarnation: u64) {
        if self.workers[worker].incarnation != incarnation
            || matches!(self.workers[worker].phase, Phase::Down | Phase::Registering)
        {
            return;
        }
        if !self.workers[worker].is_paused {
            let identity = Some(self.identity(worker));
            let event = Event::Heartbeat(v1::HeartbeatRequest { identity, progress: 0 });
            self.send(worker, || Action::Deliver { worker, call: u64::MAX, event: event.clone() });
        }
        self.after(1_000, Action::Beat { worker, incarnation });
    }

    fn meet(&mut self, worker: usize) {
        self.workers[worker].arrivals += 1;
        let arrival = (self.workers[worker].joined_epoch << 32) + self.workers[worker].arrivals;
        self.model.arrivals.entry(rank(worker)).or_default().insert(arrival);
        let request = v1::WaitBarrierRequest {
            identity: Some(self.identity(worker)),
            name: "round".into(),
            arrival,
            timeout_ms: BARRIER_MS,
            alike: String::new(),
        };
        self.call(worker, Phase::Barrier, Event::WaitBarrier(request));
    }

    fn answer(&mut self, worker: usize, call: u64, reply: Reply) {
        if self.workers[worker].is_paused {
            self.after(300, Action::Answer { worker, call, reply });
            return;
        }
        if call == u64::MAX {
            self.take_heartbeat(worker, &reply);
            return;
        }
        if self.workers[worker].call != call {
            return;
        }
        if let Reply::Refused(refusal) = &reply {
            let kind = refusal.kind;
            self.refused(worker, kind);
            return;
        }
        self.go_on(worker, reply);
    }

    fn take_heartbeat(&mut self, worker: usize, reply: &Reply) {
        if let Reply::Heartbeat(reply) = reply
            && reply.fence <= self.workers[worker].epoch
        {
            self.workers[worker].epoch = self.workers[worker].epoch.max(reply.epoch);
        }
        // A fenced worker learns it from its next call, as one whose heartbeats are lost would.
    }

    fn refused(&mut self, worker: usize, kind: RefusalKind) {
        match kind {
            RefusalKind::Fenced
                if self.workers[worker].phase != Phase::Registering
                    && self.chance.u32(..100) < 50 =>
            {
                // The process lives, with what it knows of its tries and arrivals.
                let former = self.workers[worker].incarnation;
                self.register_anew(worker, former);
            }
            RefusalKind::Fenced | RefusalKind::JobAborted => self.restart_worker(worker),
            // Who registers tries again; of a call sent twice the first copy is let go.
            RefusalKind::Conflict => {}
            RefusalKind::StaleEpoch => {
                // As the client does: it asks which epoch it is, and goes on.
                self.workers[worker].epoch = self.model.epoch_told;
                self.meet(worker);
            }
            _ => self.meet(worker),
        }
    }

    fn restart_worker(&mut self, worker: usize) {
        self.workers[worker].phase = Phase::Down;
        self.workers[worker].tries = (0, 0);
        self.workers[worker].call = 0;
        self.after(200, Action::Start { worker });
    }

    fn go_on(&mut self, worker: usize, reply: Reply) {
        let phase = self.workers[worker].phase.clone();
        match (phase, reply) {
            (Phase::Registering, Reply::Register(reply)) => {
                self.workers[worker].epoch = reply.epoch;
                self.workers[worker].joined_epoch = reply.epoch;
                let incarnation = self.workers[worker].incarnation;
                self.workers[worker].phase = Phase::Asking;
                self.after(0, Action::Beat { worker, incarnation });
                self.meet(worker);
            }
            (Phase::Barrier, Reply::Barrier(reply)) => match reply.outcome.expect("there is one") {
                Outcome::Released(_) => {
                    let request = v1::ListCheckpointsRequest { job: JOB.into(), limit: 1 };
                    self.call(worker, Phase::Asking, Event::ListCheckpoints(request));
                }
                Outcome::EpochChanged(changed) => {
                    self.workers[worker].epoch = self.workers[worker].epoch.max(changed.epoch);
                    self.meet(worker);
                }
                Outcome::TimedOut(late) => {
                    self.model.assert(late.missing_count > 0, "a time-out names nobody");
                    self.meet(worker);
                }
                Outcome::Aborted(_) => self.restart_worker(worker),
            },
            (Phase::Asking, Reply::Checkpoints(list)) => {
                // As a manager does: the store says what is there, too.
                let stored = self.model.newest_stored();
                let step = list.commits.first().map_or(0, |commit| commit.step).max(stored) + 1;
                let identity = Some(self.identity(worker));
                let tries = self.workers[worker].next_try(step);
                let request = v1::BeginCheckpointRequest {
                    identity,
                    step,
                    rewind: false,
                    tries,
                    known_epoch: self.workers[worker].epoch,
                };
                self.call(worker, Phase::Beginning { step }, Event::BeginCheckpoint(request));
            }
            (Phase::Beginning { step }, Reply::BeginCheckpoint(begun)) => {
                self.write_and_report(worker, step, begun.attempt);
            }
            (Phase::Reporting { step, attempt }, Reply::Publish(shards)) => {
                if self.has_own_stores {
                    self.publish_here(worker, step, attempt, &shards);
                } else {
                    self.publish(worker, step, attempt, &shards);
                }
            }
            (Phase::Reporting { step, attempt }, Reply::AttemptAborted(aborted)) => {
                if !aborted.may_be_published {
                    self.model.take_back(worker, step, &attempt);
                }
                self.meet(worker);
            }
            (_, Reply::Committed(_) | Reply::AttemptAborted(_) | Reply::Done) => self.meet(worker),
            (phase, reply) => panic!("seed {}: {phase:?} got {reply:?}", self.model.seed),
        }
    }

    fn write_and_report(&mut self, worker: usize, step: u64, attempt: String) {
        self.model.shards.insert((attempt.clone(), rank(worker)));
        self.report(worker, step, attempt, None);
    }

    fn report(&mut self, worker: usize, step: u64, attempt: String, published: Option<u32>) {
        let request = v1::ReportShardRequest {
            identity: Some(self.identity(worker)),
            step,
            attempt: attempt.clone(),
            shard: Some(v1::Shard { rank: rank(worker), bytes: step, ..v1::Shard::default() }),
            own_store: self.has_own_stores,
            published_crc32c: published,
            replicated_crc32c: None,
        };
        self.call(worker, Phase::Reporting { step, attempt }, Event::ReportShard(request));
        let call = self.workers[worker].call;
        self.after(REPORT_MS, Action::GiveUp { worker, call });
    }

    /// A worker's own store takes the first manifest of a step, too.
    fn publish_here(&mut self, worker: usize, step: u64, attempt: String, shards: &[v1::Shard]) {
        self.model.check_list(shards);
        let own = self.model.own_manifests.as_mut().expect("each has a store");
        let stands = own[worker].entry(step).or_insert_with(|| attempt.clone());
        if *stands == attempt {
            self.report(worker, step, attempt, Some(7));
        } else {
            self.meet(worker);
        }
    }

    /// The store takes the first manifest of a step.
    fn publish(&mut self, worker: usize, step: u64, attempt: String, shards: &[v1::Shard]) {
        self.model.check_list(shards);
        let winner = self.model.manifests.entry(step).or_insert_with(|| attempt.clone());
        if *winner != attempt {
            self.meet(worker);
            return;
        }
        let request = v1::CommitCheckpointRequest {
            identity: Some(self.identity(worker)),
            step,
            attempt: attempt.clone(),
            manifest_crc32c: 7,
        };
        self.call(worker, Phase::Committing { step, attempt }, Event::CommitCheckpoint(request));
    }

    fn give_up(&mut self, worker: usize, call: u64) {
        let Worker { phase, call: current, is_paused, .. } = &self.workers[worker];
        let Phase::Reporting { step, attempt } = phase.clone() else { return };
        if *current != call {
            return;
        }
        if *is_paused {
            self.after(500, Action::GiveUp { worker, call });
            return;
        }
        let request = v1::AbortCheckpointRequest {
            identity: Some(self.identity(worker)),
            step,
            attempt,
            reason: "it took too long".into(),
            unpublished: false,
        };
        self.call(worker, Phase::GivingUp, Event::AbortCheckpoint(request));
    }

    fn check_liveness(&self) {
        let before = self.model.commits_when_calm.expect("it calmed down");
        self.model.assert(self.model.commits.len() > before, "a calm job commits nothing");
        for (index, worker) in self.workers.iter().enumerate() {
            let waited_ms = self.now_ms - worker.since_ms;
            let text = format!("worker {index} waits for {waited_ms} ms: {:?}", worker.phase);
            self.model.assert(waited_ms < 2 * BARRIER_MS + REPORT_MS, &text);
        }
    }
}

impl Model {
    fn new(seed: u64, has_own_stores: bool) -> Self {
        let own_manifests =
            has_own_stores.then(|| (0..WORLD_SIZE).map(|_| BTreeMap::new()).collect());
        Self {
            seed,
            own_manifests,
            epoch_told: 0,
            arrivals: BTreeMap::new(),
            arrivals_used: HashSet::new(),
            generation: None,
            shards: HashSet::new(),
            manifests: BTreeMap::new(),
            commits: BTreeMap::new(),
            commits_when_calm: None,
            members: BTreeMap::new(),
            open: BTreeSet::new(),
            registering: None,
            heard_ms: HashMap::new(),
            trace: DefaultHasher::new(),
        }
    }

    /// What lies in the store that all share, or in each one's own.
    fn stores(&self) -> &[BTreeMap<u64, String>] {
        self.own_manifests.as_deref().unwrap_or(std::slice::from_ref(&self.manifests))
    }

    fn newest_stored(&self) -> u64 {
        let newest = self.stores().iter().filter_map(|store| store.keys().next_back().copied());
        newest.max().unwrap_or(0)
    }

    fn check_list(&self, shards: &[v1::Shard]) {
        let ranks: Vec<u32> = shards.iter().map(|shard| shard.rank).collect();
        let everybody: Vec<u32> = (0..WORLD_SIZE).collect();
        self.assert(ranks == everybody, "the list of shards is not of every rank");
    }

    /// A worker is told that an attempt is no checkpoint, and never will be.
    fn take_back(&mut self, worker: usize, step: u64, attempt: &String) {
        let is_committed = self.commits.get(&step) == Some(attempt);
        self.assert(!is_committed, "a committed step is taken back");
        let Some(own) = &mut self.own_manifests else { return };
        if own[worker].get(&step) == Some(attempt) {
            own[worker].remove(&step);
        }
    }

    fn assert(&self, holds: bool, what: &str) {
        assert!(holds, "seed {}: {what}", self.seed);
    }

    /// Whether the event is of a process that is no member.
    fn is_stale(&self, event: &Event) -> bool {
        let identity = match event {
            Event::Heartbeat(request) => &request.identity,
            Event::Leave(request) => &request.identity,
            Event::WaitBarrier(request) => &request.identity,
            Event::BeginCheckpoint(request) => &request.identity,
            Event::ReportShard(request) => &request.identity,
            Event::CommitCheckpoint(request) => &request.identity,
            Event::AbortCheckpoint(request) => &request.identity,
            _ => return false,
        };
        let identity = identity.as_ref().expect("workers say who they are");
        if identity.job != JOB {
            return false;
        }
        self.members.get(&identity.worker_id).is_none_or(|record| {
            record.incarnation != identity.incarnation || record.state() != WorkerState::Alive
        })
    }

    /// What was decided about who is a member, and about what must not be forgotten.
    fn see_member(&mut self, change: &Change, now_ms: u64, grace_ms: u64, slack_ms: u64) {
        if change.key.job() != JOB {
            return;
        }
        match (&change.key, &change.value) {
            (Key::Worker { worker_id, .. }, Some(value)) => {
                let record = decode::<v1::WorkerRecord>(value);
                if self.registering.as_ref() != Some(worker_id) {
                    self.check_death(&record, now_ms, grace_ms, slack_ms);
                }
                self.members.insert(worker_id.clone(), record);
            }
            (Key::Worker { worker_id, .. }, None) => {
                let gone = self.members.remove(worker_id);
                let lives = gone.is_some_and(|gone| gone.state() == WorkerState::Alive);
                self.assert(!lives, "a worker that lives is forgotten");
            }
            (Key::Attempt { step, .. }, Some(_)) => drop(self.open.insert(*step)),
            (Key::Attempt { step, .. }, None) => drop(self.open.remove(step)),
            (Key::Job { .. }, None) => {
                self.assert(self.open.is_empty(), "a job with an open attempt is forgotten");
            }
            _ => {}
        }
    }

    /// What was kept.
    fn take_in(&mut self, change: &Change) {
        change.key.encode().hash(&mut self.trace);
        change.value.hash(&mut self.trace);
        if change.key.job() != JOB {
            return;
        }
        match (&change.key, &change.value) {
            (Key::Barrier { .. }, Some(value)) => self.check_release(&decode(value)),
            (Key::Barrier { .. }, None) => self.generation = None,
            (Key::Commit { step, .. }, Some(value)) => self.check_commit(*step, &decode(value)),
            // It was forgotten: what comes under its name is another one.
            (Key::Job { .. }, None) => {
                self.epoch_told = 0;
                self.arrivals_used.clear();
            }
            _ => {}
        }
    }

    /// A timeout of silence came before.
    fn check_death(&self, record: &v1::WorkerRecord, now_ms: u64, grace_ms: u64, slack_ms: u64) {
        let known = self.members.values().find(|known| known.incarnation == record.incarnation);
        let was_alive = known.is_some_and(|known| known.state() == WorkerState::Alive);
        if record.state() != WorkerState::Dead || !was_alive {
            return;
        }
        let heard_ms = self.heard_ms.get(&record.incarnation).copied().unwrap_or(0);
        let silent_ms = (now_ms - heard_ms).min(grace_ms);
        let text = format!("dead after {silent_ms} ms");
        self.assert(silent_ms + slack_ms > TIMEOUT_MS, &text);
    }

    fn check_release(&mut self, record: &v1::BarrierRecord) {
        let ranks = u32::try_from(record.arrivals.len()).expect("few");
        self.assert(ranks == WORLD_SIZE, "a barrier was released early");
        for (rank, arrival) in (0..).zip(&record.arrivals) {
            let sent = self.arrivals.get(&rank).is_some_and(|sent| sent.contains(arrival));
            self.assert(sent, "a barrier was released with an arrival that nobody sent");
            let is_new = self.arrivals_used.insert(*arrival);
            self.assert(is_new, "an arrival released a barrier twice");
        }
        let follows =
            self.generation.map_or(record.generation == 0, |last| record.generation == last + 1);
        self.assert(follows, "a barrier's generation jumped");
        self.generation = Some(record.generation);
    }

    fn check_commit(&mut self, step: u64, commit: &v1::Commit) {
        for rank in 0..WORLD_SIZE {
            let written = self.shards.contains(&(commit.attempt.clone(), rank));
            self.assert(written, "a commit names a shard that was not written");
        }
        let has_it = |store: &BTreeMap<_, _>| store.get(&step) == Some(&commit.attempt);
        let stands = self.stores().iter().all(has_it);
        self.assert(stands, "a commit is not the store's manifest");
        let earlier = self.commits.insert(step, commit.attempt.clone());
        let is_one = earlier.is_none_or(|earlier| earlier == commit.attempt);
        self.assert(is_one, "a step was committed twice");
    }

    /// A reply that is sent must tell of nothing that a crash could take back.
    fn reply_leaves(&mut self, reply: &Reply) {
        let epoch = match reply {
            Reply::Register(reply) => reply.epoch,
            Reply::Heartbeat(reply) => {
                self.assert(reply.epoch >= self.epoch_told, "an epoch went back");
                reply.epoch
            }
            _ => return,
        };
        self.epoch_told = self.epoch_told.max(epoch);
    }

    /// What a coordinator that starts again knows is what was kept.
    fn recover(&mut self, disk: &BTreeMap<Vec<u8>, Vec<u8>>) {
        self.members.clear();
        self.open.clear();
        self.generation = None;
        self.check_limits(disk);
        let mut epoch = 0;
        for (key, value) in disk {
            let key = Key::decode(key).expect("it was encoded");
            if key.job() != JOB {
                continue;
            }
            match key {
                Key::Attempt { step, .. } => drop(self.open.insert(step)),
                Key::Worker { worker_id, .. } => {
                    self.members.insert(worker_id, decode(value));
                }
                Key::Barrier { .. } => {
                    self.generation = Some(decode::<v1::BarrierRecord>(value).generation);
                }
                Key::Job { .. } => epoch = decode::<v1::JobRecord>(value).epoch,
                _ => {}
            }
        }
        self.assert(epoch >= self.epoch_told, "a restart lost an epoch that was told");
    }
}

/// No more than so many, whoever comes and goes.
fn check_count(model: &Model, what: &str, count: usize, count_max: usize) {
    model.assert(count <= count_max, &format!("{count} {what} are kept"));
}

impl Model {
    /// What is kept is within its limits, and nothing is left of what was forgotten.
    fn check_limits(&self, disk: &BTreeMap<Vec<u8>, Vec<u8>>) {
        let keys = disk.keys().map(|key| Key::decode(key).expect("it was encoded"));
        let mut jobs = BTreeSet::new();
        let mut barriers = BTreeMap::new();
        for key in keys {
            jobs.insert(key.job().to_owned());
            if let Key::Barrier { job, .. } = key {
                *barriers.entry(job).or_insert(0) += 1;
            }
        }
        check_count(self, "jobs", jobs.len(), JOBS_MAX);
        for count in barriers.into_values() {
            check_count(self, "barriers", count, BARRIERS_MAX);
        }
    }
}

fn decode<M: Message + Default>(value: &[u8]) -> M {
    M::decode(value).expect("the machine encoded it")
}

fn first_state(failures_max: u32) -> State {
    let now_ms = u64::try_from(CLOCK_MS).expect("it is positive");
    State::recover(policy(failures_max), 1, now_ms, []).expect("nothing can always be read")
}

fn policy(max_worker_failures: u32) -> Policy {
    Policy {
        heartbeat_interval_ms: 1_000,
        heartbeat_timeout_ms: TIMEOUT_MS,
        max_worker_failures,
        failure_backoff_ms: 1_000,
        jobs_max: JOBS_MAX,
        barriers_max: BARRIERS_MAX,
        ..Policy::default()
    }
}

fn name(worker: usize) -> String {
    format!("worker-{worker}")
}

fn rank(worker: usize) -> u32 {
    u32::try_from(worker).expect("few workers")
}
