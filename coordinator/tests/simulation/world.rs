//! The simulated world: a network and a clock that misbehave, a coordinator that is started again,
//! other jobs that come and go.
//!
//! Always holds: all that happens follows from the seed; a reply leaves once what it reports is on
//! the simulated disk; faults end when the world calms down.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, HashMap};

use coordinator::state::{
    Change, Effects, Event, Moment, Policy, RefusalKind, Reply, State, Ticket,
};
use dtr_proto::v1;
use fastrand::Rng;

use crate::client::{Phase, Worker};
use crate::model::Model;
use crate::{BARRIER_MS, BARRIERS_MAX, JOBS_MAX, REPORT_MS, TIMEOUT_MS, WORLD_SIZE};

const RESEND_MS: u64 = 700;
/// When faults end, and when the simulation does.
const CALM_MS: u64 = 60_000;
const END_MS: u64 = 150_000;
/// What the coordinator's clock says at the beginning: far from both ends.
const CLOCK_MS: i64 = 1 << 40;
/// A caller that asks with it is no worker of the job.
const NO_TICKET: Ticket = 0;
/// A call that nobody waits for.
pub(crate) const NO_CALL: u64 = u64::MAX - 1;
/// What happens next, and when.
pub(crate) enum Action {
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

/// What one event led to, before it is kept: changes, and the replies that wait for them.
pub(crate) type Decision = (Vec<Change>, Vec<(Ticket, Reply)>);

pub(crate) struct World {
    pub(crate) chance: Rng,
    pub(crate) now_ms: u64,
    /// How far the coordinator's clock is off.
    pub(crate) clock_ms: i64,
    pub(crate) jumps_ms: Vec<u64>,
    pub(crate) sequence: u64,
    pub(crate) actions: BTreeMap<u64, Action>,
    pub(crate) queue: BinaryHeap<Reverse<(u64, u64)>>,
    pub(crate) workers: Vec<Worker>,
    pub(crate) state: State,
    pub(crate) incarnation: u64,
    pub(crate) started_ms: u64,
    pub(crate) tickets: HashMap<Ticket, (usize, u64)>,
    pub(crate) last_ticket: Ticket,
    pub(crate) visits: u64,
    /// What the disk has, and what was decided but not yet kept.
    pub(crate) disk: BTreeMap<Vec<u8>, Vec<u8>>,
    pub(crate) unkept: Vec<Decision>,
    pub(crate) model: Model,
    pub(crate) failures_max: u32,
    pub(crate) has_own_stores: bool,
}

impl World {
    pub(crate) fn new(seed: u64) -> Self {
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

    pub(crate) fn run(mut self) -> Model {
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

    pub(crate) fn is_calm(&self) -> bool {
        self.now_ms >= CALM_MS
    }

    pub(crate) fn after(&mut self, delay_ms: u64, action: Action) {
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
    pub(crate) fn send(&mut self, worker: usize, make: impl Fn() -> Action) {
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

    pub(crate) fn call(&mut self, worker: usize, phase: Phase, event: Event) {
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
