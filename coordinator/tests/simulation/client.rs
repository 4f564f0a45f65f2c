//! The workers' program: register, meet at a barrier, save a step together, go round.
//!
//! Always holds: a worker waits for one call at a time, heartbeats aside, and sends it again as it
//! was.

use coordinator::state::{Event, RefusalKind, Reply};
use dtr_proto::v1::{self, wait_barrier_reply::Outcome};

use crate::world::{Action, NO_CALL, World};
use crate::{BARRIER_MS, JOB, REPORT_MS, WORLD_SIZE, rank};

/// Where a worker's program stands.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Phase {
    Down,
    Registering,
    Barrier,
    Asking,
    Beginning { step: u64 },
    Reporting { step: u64, attempt: String },
    Committing { step: u64, attempt: String },
    GivingUp,
}

pub(crate) struct Worker {
    pub(crate) phase: Phase,
    pub(crate) incarnation: u64,
    pub(crate) epoch: u64,
    pub(crate) joined_epoch: u64,
    pub(crate) arrivals: u64,
    /// The step that it began last, and how often.
    pub(crate) tries: (u64, u32),
    /// The call that it waits for, with what to send again.
    pub(crate) call: u64,
    pub(crate) event: Option<Event>,
    pub(crate) since_ms: u64,
    pub(crate) is_paused: bool,
    pub(crate) is_cut_off: bool,
}

impl Worker {
    /// How often it has begun the step before this time.
    fn next_try(&mut self, step: u64) -> u32 {
        self.tries = if self.tries.0 == step { (step, self.tries.1 + 1) } else { (step, 0) };
        self.tries.1
    }
}

impl World {
    fn identity(&self, worker: usize) -> v1::Identity {
        let Worker { incarnation, epoch, .. } = self.workers[worker];
        v1::Identity { job: JOB.into(), worker_id: name(worker), incarnation, epoch }
    }

    pub(crate) fn start(&mut self, worker: usize) {
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

    pub(crate) fn leave(&mut self, worker: usize, pause_ms: u64) {
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

    pub(crate) fn beat(&mut self, worker: usize, incarnation: u64) {
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

    pub(crate) fn answer(&mut self, worker: usize, call: u64, reply: Reply) {
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
            // Who registers tries again; of a call sent twice the first copy is dropped.
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
                // As a manager does: the store says what exists, too.
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

    pub(crate) fn give_up(&mut self, worker: usize, call: u64) {
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
}

fn name(worker: usize) -> String {
    format!("worker-{worker}")
}
