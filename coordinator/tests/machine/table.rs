//! One job and one machine, driven by hand: each method is one event.
//!
//! Always holds: time passes when a test says so; every change, note and late reply is kept for the
//! test to look at.

use coordinator::state::{
    Change, Effects, Event, Moment, Policy, RefusalKind, Reply, State, Ticket,
};
use dtr_proto::v1::{self, wait_barrier_reply::Outcome};

/// One job, driven by hand.
pub(crate) struct Table {
    pub(crate) state: State,
    pub(crate) now_ms: u64,
    pub(crate) ticket: Ticket,
    /// How often the rank that begins a step has begun it before.
    pub(crate) tries: u32,
    /// What each report says of the replicated entries.
    pub(crate) replicated_crc32c: Option<u32>,
    /// What ranks report of their shards.
    pub(crate) shard_bytes: u64,
    pub(crate) changes: Vec<Change>,
    pub(crate) notes: Vec<String>,
    pub(crate) late: Vec<(Ticket, Reply)>,
}

impl Table {
    pub(crate) fn new() -> Self {
        Self::with(Policy { heartbeat_timeout_ms: 3_000, ..Policy::default() })
    }

    pub(crate) fn with(policy: Policy) -> Self {
        let state = State::new(policy, 1);
        Self {
            state,
            now_ms: 0,
            ticket: 0,
            tries: 0,
            replicated_crc32c: None,
            shard_bytes: 10,
            changes: Vec::new(),
            notes: Vec::new(),
            late: Vec::new(),
        }
    }

    /// Lets an event happen; gives the reply to it, if there is one yet.
    pub(crate) fn ask(&mut self, event: Event) -> Option<Reply> {
        self.ticket += 1;
        let ticket = self.ticket;
        let at = Moment { now_ms: self.now_ms, wall_ms: 1_000_000, random: u128::from(ticket) };
        let mut effects = Effects::default();
        self.state.apply(at, ticket, event, &mut effects);
        self.changes.extend(effects.changes);
        self.notes.extend(effects.notes.into_iter().map(|note| note.text));
        let (own, late): (Vec<_>, Vec<_>) =
            effects.replies.into_iter().partition(|(to, _)| *to == ticket);
        self.late.extend(late);
        own.into_iter().next().map(|(_, reply)| reply)
    }

    /// Lets time pass; the named workers send heartbeats.
    pub(crate) fn pass(&mut self, mut ms: u64, alive: &[&v1::Identity]) {
        while ms > 0 {
            let step_ms = ms.min(500);
            ms -= step_ms;
            self.now_ms += step_ms;
            for identity in alive {
                let identity = Some((*identity).clone());
                self.ask(Event::Heartbeat(v1::HeartbeatRequest { identity, progress: 0 }));
            }
            self.ask(Event::Tick);
        }
    }

    pub(crate) fn try_register(&mut self, rank: u32, world_size: u32, incarnation: u64) -> Reply {
        self.register_as(&format!("w{rank}"), rank, world_size, incarnation)
    }

    pub(crate) fn register_as(
        &mut self,
        id: &str,
        rank: u32,
        world_size: u32,
        incarnation: u64,
    ) -> Reply {
        let request = v1::RegisterRequest {
            job: "j".into(),
            worker_id: id.into(),
            incarnation,
            rank,
            world_size,
            ..v1::RegisterRequest::default()
        };
        self.ask(Event::Register(request)).unwrap()
    }

    /// A process that was taken for dead comes back.
    pub(crate) fn rejoin(&mut self, id: &str, rank: u32, incarnation: u64, rejoins: u64) -> Reply {
        let world_size = self.job().world_size;
        let request = v1::RegisterRequest {
            job: "j".into(),
            worker_id: id.into(),
            incarnation,
            rank,
            world_size,
            rejoins,
            ..v1::RegisterRequest::default()
        };
        self.ask(Event::Register(request)).unwrap()
    }

    pub(crate) fn register(
        &mut self,
        rank: u32,
        world_size: u32,
        incarnation: u64,
    ) -> v1::Identity {
        match self.try_register(rank, world_size, incarnation) {
            Reply::Register(reply) => v1::Identity {
                job: "j".into(),
                worker_id: format!("w{rank}"),
                incarnation,
                epoch: reply.epoch,
            },
            other => panic!("{other:?}"),
        }
    }

    /// All workers of a job, who know each other.
    pub(crate) fn world(&mut self, world_size: u32) -> Vec<v1::Identity> {
        let identities = 0..world_size;
        identities.map(|rank| self.register(rank, world_size, u64::from(rank) + 10)).collect()
    }

    pub(crate) fn arrive(&mut self, identity: &v1::Identity, arrival: u64) -> Option<Reply> {
        self.ask(Event::WaitBarrier(v1::WaitBarrierRequest {
            identity: Some(identity.clone()),
            name: "b".into(),
            arrival,
            timeout_ms: 60_000,
            alike: String::new(),
        }))
    }

    pub(crate) fn arrive_with(
        &mut self,
        identity: &v1::Identity,
        arrival: u64,
        alike: &str,
    ) -> Option<Reply> {
        self.ask(Event::WaitBarrier(v1::WaitBarrierRequest {
            identity: Some(identity.clone()),
            name: "open".into(),
            arrival,
            timeout_ms: 60_000,
            alike: alike.into(),
        }))
    }

    pub(crate) fn arrive_at(
        &mut self,
        identity: &v1::Identity,
        name: &str,
        arrival: u64,
    ) -> Option<Reply> {
        self.ask(Event::WaitBarrier(v1::WaitBarrierRequest {
            identity: Some(identity.clone()),
            name: name.into(),
            arrival,
            timeout_ms: 1_000,
            alike: String::new(),
        }))
    }

    /// The one worker of a job of its own.
    pub(crate) fn register_in(&mut self, job: &str) -> Reply {
        self.ask(Event::Register(v1::RegisterRequest {
            job: job.into(),
            worker_id: "w".into(),
            incarnation: 5,
            world_size: 1,
            ..v1::RegisterRequest::default()
        }))
        .unwrap()
    }

    pub(crate) fn leave_job(&mut self, job: &str) {
        let identity =
            v1::Identity { job: job.into(), worker_id: "w".into(), incarnation: 5, epoch: 1 };
        let request = v1::LeaveRequest { identity: Some(identity), failure: String::new() };
        self.ask(Event::Leave(request));
    }

    pub(crate) fn jobs(&mut self) -> Vec<String> {
        match self.ask(Event::ListJobs) {
            Some(Reply::Jobs(reply)) => reply.jobs.into_iter().map(|job| job.job).collect(),
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn jobs_told(&mut self) -> usize {
        match self.ask(Event::Inspect) {
            Some(Reply::Summary(summary)) => summary.jobs.len(),
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn begin(&mut self, identity: &v1::Identity, step: u64, rewind: bool) -> Reply {
        self.begin_knowing(identity, step, rewind, identity.epoch)
    }

    /// The same of a call that was made for the first time when `known_epoch` was the newest.
    pub(crate) fn begin_knowing(
        &mut self,
        identity: &v1::Identity,
        step: u64,
        rewind: bool,
        known_epoch: u64,
    ) -> Reply {
        let identity = Some(identity.clone());
        let tries = self.tries;
        self.ask(Event::BeginCheckpoint(v1::BeginCheckpointRequest {
            identity,
            step,
            rewind,
            tries,
            known_epoch,
        }))
        .unwrap()
    }

    pub(crate) fn attempt(&mut self, identity: &v1::Identity, step: u64) -> String {
        match self.begin(identity, step, false) {
            Reply::BeginCheckpoint(begun) => begun.attempt,
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn report(
        &mut self,
        identity: &v1::Identity,
        step: u64,
        attempt: &str,
    ) -> Option<Reply> {
        self.report_as(identity, (step, attempt), false, None)
    }

    /// The same of a rank with a store of its own.
    pub(crate) fn report_own(
        &mut self,
        identity: &v1::Identity,
        attempt: (u64, &str),
        published_crc32c: Option<u32>,
    ) -> Option<Reply> {
        self.report_as(identity, attempt, true, published_crc32c)
    }

    pub(crate) fn report_as(
        &mut self,
        identity: &v1::Identity,
        (step, attempt): (u64, &str),
        own_store: bool,
        published_crc32c: Option<u32>,
    ) -> Option<Reply> {
        let rank = identity.worker_id[1..].parse().unwrap();
        self.ask(Event::ReportShard(v1::ReportShardRequest {
            identity: Some(identity.clone()),
            step,
            attempt: attempt.into(),
            shard: Some(v1::Shard { rank, bytes: self.shard_bytes, ..v1::Shard::default() }),
            own_store,
            published_crc32c,
            replicated_crc32c: self.replicated_crc32c,
        }))
    }

    pub(crate) fn commit(&mut self, identity: &v1::Identity, step: u64, attempt: &str) -> Reply {
        self.ask(Event::CommitCheckpoint(v1::CommitCheckpointRequest {
            identity: Some(identity.clone()),
            step,
            attempt: attempt.into(),
            manifest_crc32c: 5,
        }))
        .unwrap()
    }

    pub(crate) fn leave(&mut self, identity: &v1::Identity, failure: &str) {
        let request =
            v1::LeaveRequest { identity: Some(identity.clone()), failure: failure.into() };
        self.ask(Event::Leave(request));
    }

    pub(crate) fn heartbeat(&mut self, identity: &v1::Identity) -> Reply {
        let identity = Some(identity.clone());
        self.ask(Event::Heartbeat(v1::HeartbeatRequest { identity, progress: 0 })).unwrap()
    }

    pub(crate) fn job(&mut self) -> v1::JobInfo {
        match self.ask(Event::ListJobs) {
            Some(Reply::Jobs(list)) => list.jobs[0].clone(),
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn take_late(&mut self) -> Vec<Reply> {
        std::mem::take(&mut self.late).into_iter().map(|(_, reply)| reply).collect()
    }
}

pub(crate) fn refused(reply: Reply) -> (RefusalKind, String) {
    match reply {
        Reply::Refused(refusal) => (refusal.kind, refusal.why),
        other => panic!("{other:?}"),
    }
}

pub(crate) fn outcome(reply: Option<Reply>) -> Outcome {
    match reply {
        Some(Reply::Barrier(reply)) => reply.outcome.unwrap(),
        other => panic!("{other:?}"),
    }
}
