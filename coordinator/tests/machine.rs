//! The state machine, decision by decision: who may join, what counts as a failure, when barriers
//! and checkpoints end. Time is what the test says it is.
#![expect(clippy::unwrap_used, reason = "a test stops at its first surprise")]

use coordinator::state::{
    Change, Effects, Event, Key, Moment, Policy, RefusalKind, Reply, State, Ticket,
};
use dtr_proto::OPENING_BARRIER;
use dtr_proto::v1::{self, ChangeKind, wait_barrier_reply::Outcome};

/// One job, driven by hand.
struct Table {
    state: State,
    now_ms: u64,
    ticket: Ticket,
    /// How often whoever begins a step has begun it before.
    tries: u32,
    /// What each report says of what all ranks save alike.
    replicated_crc32c: Option<u32>,
    changes: Vec<Change>,
    notes: Vec<String>,
    late: Vec<(Ticket, Reply)>,
}

impl Table {
    fn new() -> Self {
        Self::with(Policy { heartbeat_timeout_ms: 3_000, ..Policy::default() })
    }

    fn with(policy: Policy) -> Self {
        let state = State::new(policy, 1);
        Self {
            state,
            now_ms: 0,
            ticket: 0,
            tries: 0,
            replicated_crc32c: None,
            changes: Vec::new(),
            notes: Vec::new(),
            late: Vec::new(),
        }
    }

    /// Lets an event happen; gives the reply to it, if there is one yet.
    fn ask(&mut self, event: Event) -> Option<Reply> {
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
    fn pass(&mut self, mut ms: u64, alive: &[&v1::Identity]) {
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

    fn try_register(&mut self, rank: u32, world_size: u32, incarnation: u64) -> Reply {
        self.register_as(&format!("w{rank}"), rank, world_size, incarnation)
    }

    fn register_as(&mut self, id: &str, rank: u32, world_size: u32, incarnation: u64) -> Reply {
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
    fn rejoin(&mut self, id: &str, rank: u32, incarnation: u64, rejoins: u64) -> Reply {
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

    fn register(&mut self, rank: u32, world_size: u32, incarnation: u64) -> v1::Identity {
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
    fn world(&mut self, world_size: u32) -> Vec<v1::Identity> {
        let identities = 0..world_size;
        identities.map(|rank| self.register(rank, world_size, u64::from(rank) + 10)).collect()
    }

    fn arrive(&mut self, identity: &v1::Identity, arrival: u64) -> Option<Reply> {
        self.ask(Event::WaitBarrier(v1::WaitBarrierRequest {
            identity: Some(identity.clone()),
            name: "b".into(),
            arrival,
            timeout_ms: 60_000,
            alike: String::new(),
        }))
    }

    fn arrive_with(&mut self, identity: &v1::Identity, arrival: u64, alike: &str) -> Option<Reply> {
        self.ask(Event::WaitBarrier(v1::WaitBarrierRequest {
            identity: Some(identity.clone()),
            name: "open".into(),
            arrival,
            timeout_ms: 60_000,
            alike: alike.into(),
        }))
    }

    fn arrive_at(&mut self, identity: &v1::Identity, name: &str, arrival: u64) -> Option<Reply> {
        self.ask(Event::WaitBarrier(v1::WaitBarrierRequest {
            identity: Some(identity.clone()),
            name: name.into(),
            arrival,
            timeout_ms: 1_000,
            alike: String::new(),
        }))
    }

    /// The one worker of a job of its own.
    fn register_in(&mut self, job: &str) -> Reply {
        self.ask(Event::Register(v1::RegisterRequest {
            job: job.into(),
            worker_id: "w".into(),
            incarnation: 5,
            world_size: 1,
            ..v1::RegisterRequest::default()
        }))
        .unwrap()
    }

    fn leave_job(&mut self, job: &str) {
        let identity =
            v1::Identity { job: job.into(), worker_id: "w".into(), incarnation: 5, epoch: 1 };
        let request = v1::LeaveRequest { identity: Some(identity), failure: String::new() };
        self.ask(Event::Leave(request));
    }

    fn jobs(&mut self) -> Vec<String> {
        match self.ask(Event::ListJobs) {
            Some(Reply::Jobs(reply)) => reply.jobs.into_iter().map(|job| job.job).collect(),
            other => panic!("{other:?}"),
        }
    }

    fn jobs_told(&mut self) -> usize {
        match self.ask(Event::Inspect) {
            Some(Reply::Summary(summary)) => summary.jobs.len(),
            other => panic!("{other:?}"),
        }
    }

    fn begin(&mut self, identity: &v1::Identity, step: u64, rewind: bool) -> Reply {
        self.begin_knowing(identity, step, rewind, identity.epoch)
    }

    /// The same of a call that was made for the first time when `known_epoch` was the newest.
    fn begin_knowing(
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

    fn attempt(&mut self, identity: &v1::Identity, step: u64) -> String {
        match self.begin(identity, step, false) {
            Reply::BeginCheckpoint(begun) => begun.attempt,
            other => panic!("{other:?}"),
        }
    }

    fn report(&mut self, identity: &v1::Identity, step: u64, attempt: &str) -> Option<Reply> {
        self.report_as(identity, (step, attempt), false, None)
    }

    /// The same of a rank with a store of its own.
    fn report_own(
        &mut self,
        identity: &v1::Identity,
        attempt: (u64, &str),
        published_crc32c: Option<u32>,
    ) -> Option<Reply> {
        self.report_as(identity, attempt, true, published_crc32c)
    }

    fn report_as(
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
            shard: Some(v1::Shard { rank, bytes: 10, ..v1::Shard::default() }),
            own_store,
            published_crc32c,
            replicated_crc32c: self.replicated_crc32c,
        }))
    }

    fn commit(&mut self, identity: &v1::Identity, step: u64, attempt: &str) -> Reply {
        self.ask(Event::CommitCheckpoint(v1::CommitCheckpointRequest {
            identity: Some(identity.clone()),
            step,
            attempt: attempt.into(),
            manifest_crc32c: 5,
        }))
        .unwrap()
    }

    fn leave(&mut self, identity: &v1::Identity, failure: &str) {
        let request =
            v1::LeaveRequest { identity: Some(identity.clone()), failure: failure.into() };
        self.ask(Event::Leave(request));
    }

    fn heartbeat(&mut self, identity: &v1::Identity) -> Reply {
        let identity = Some(identity.clone());
        self.ask(Event::Heartbeat(v1::HeartbeatRequest { identity, progress: 0 })).unwrap()
    }

    fn job(&mut self) -> v1::JobInfo {
        match self.ask(Event::ListJobs) {
            Some(Reply::Jobs(list)) => list.jobs[0].clone(),
            other => panic!("{other:?}"),
        }
    }

    fn take_late(&mut self) -> Vec<Reply> {
        std::mem::take(&mut self.late).into_iter().map(|(_, reply)| reply).collect()
    }
}

fn refused(reply: Reply) -> (RefusalKind, String) {
    match reply {
        Reply::Refused(refusal) => (refusal.kind, refusal.why),
        other => panic!("{other:?}"),
    }
}

fn outcome(reply: Option<Reply>) -> Outcome {
    match reply {
        Some(Reply::Barrier(reply)) => reply.outcome.unwrap(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_registration_sent_twice_is_one() {
    let mut table = Table::new();
    let first = table.register(0, 2, 7);
    assert_eq!(table.register(0, 2, 7).epoch, first.epoch);
    // A new process takes the place; the old one's registration, sent late, does not.
    let second = table.register(0, 2, 8);
    assert!(second.epoch > first.epoch);
    assert_eq!(refused(table.try_register(0, 2, 7)).0, RefusalKind::Fenced);
    assert_eq!(refused(table.heartbeat(&first)).0, RefusalKind::Fenced);
    assert!(matches!(table.heartbeat(&second), Reply::Heartbeat(_)));
}

#[test]
fn a_process_that_was_taken_for_dead_comes_back_while_its_rank_is_empty() {
    let policy =
        Policy { heartbeat_timeout_ms: 3_000, max_worker_failures: 9, ..Policy::default() };
    let mut table = Table::with(policy);
    let world = table.world(2);
    table.pass(4_000, &[&world[0]]);
    assert_eq!(refused(table.heartbeat(&world[1])).0, RefusalKind::Fenced);
    // Only the process that had the rank, and in its own place.
    for (id, rank, rejoins) in [("w1", 1, 99), ("w1", 0, 11), ("other", 1, 11)] {
        assert_eq!(refused(table.rejoin(id, rank, 50, rejoins)).0, RefusalKind::Fenced, "{id}");
    }
    let Reply::Register(back) = table.rejoin("w1", 1, 50, 11) else { panic!() };
    // Sent again, it is the same registration, and what the old incarnation says is not heard.
    assert!(matches!(table.rejoin("w1", 1, 50, 11), Reply::Register(again) if again == back));
    assert_eq!(refused(table.heartbeat(&world[1])).0, RefusalKind::Fenced);
    let identity = v1::Identity { incarnation: 50, epoch: back.epoch, ..world[1].clone() };
    table.attempt(&identity, 10);
    // With all of them gone, the run is still the same.
    table.pass(4_000, &[]);
    let Reply::Register(first) = table.rejoin("w0", 0, 60, 10) else { panic!() };
    let Reply::Register(second) = table.rejoin("w1", 1, 61, 50) else { panic!() };
    assert_eq!((first.run, second.run), (back.run, back.run));
}

#[test]
fn a_rank_that_is_lost_while_it_waits_is_told_so() {
    let mut table = Table::new();
    let world = table.world(2);
    let attempt = table.attempt(&world[0], 10);
    table.report(&world[1], 10, &attempt);
    table.pass(4_000, &[&world[0]]);
    // Else its call would wait for ever: it may come back, and ask again.
    let [Reply::Refused(refusal)] = &table.take_late()[..] else { panic!() };
    assert_eq!(refusal.kind, RefusalKind::Fenced);
    let Reply::Register(back) = table.rejoin("w1", 1, 50, 11) else { panic!() };
    let identity = v1::Identity { incarnation: 50, epoch: back.epoch, ..world[1].clone() };
    let Some(Reply::AttemptAborted(aborted)) = table.report(&identity, 10, &attempt) else {
        panic!()
    };
    assert!(aborted.reason.starts_with("rank 1 (`w1`) was lost"), "{aborted:?}");
}

/// Else it begins the next attempt alone, or is sent away from the one that the others wait in.
#[test]
fn who_was_lost_and_comes_back_is_late_with_an_old_call_and_not_with_a_new_one() {
    for (known_epoch, is_late) in [(2, true), (4, false)] {
        let mut table = Table::new();
        let world = table.world(2);
        let attempt = table.attempt(&world[0], 10);
        table.report(&world[0], 10, &attempt);
        table.pass(4_000, &[&world[0]]);
        let Reply::Register(back) = table.rejoin("w1", 1, 50, 11) else { panic!() };
        let identity = v1::Identity { incarnation: 50, epoch: back.epoch, ..world[1].clone() };
        let reply = table.begin_knowing(&identity, 10, false, known_epoch);
        let is_refused = matches!(reply, Reply::Refused(_));
        assert_eq!((back.epoch, is_refused), (4, is_late), "{reply:?}");
        // The others come again, whatever was first.
        table.tries = 1;
        let known = v1::Identity { epoch: back.epoch, ..world[0].clone() };
        let next = table.attempt(&known, 10);
        assert_eq!(table.attempt(&identity, 10), next);
    }
}

#[test]
fn who_comes_back_does_not_begin_alone_what_the_others_were_refused() {
    let mut table = Table::new();
    let world = table.world(2);
    table.pass(4_000, &[&world[0]]);
    let known = v1::Identity { epoch: 3, ..world[0].clone() };
    assert_eq!(refused(table.begin(&known, 10, false)).0, RefusalKind::AttemptAborted);
    let Reply::Register(back) = table.rejoin("w1", 1, 50, 11) else { panic!() };
    let identity = v1::Identity { incarnation: 50, epoch: back.epoch, ..world[1].clone() };
    // The call that it had made before it was lost; then the next of both.
    let (kind, why) = refused(table.begin_knowing(&identity, 10, false, 2));
    assert_eq!(kind, RefusalKind::AttemptAborted);
    assert!(why.contains("rank 1 (`w1`) is gone"), "{why}");
    table.tries = 1;
    let next = table.attempt(&identity, 10);
    assert_eq!(table.attempt(&known, 10), next);
}

#[test]
fn a_process_whose_place_was_taken_does_not_come_back() {
    let mut table = Table::new();
    let world = table.world(2);
    table.pass(4_000, &[&world[0]]);
    table.register(1, 2, 40);
    assert_eq!(refused(table.rejoin("w1", 1, 50, 11)).0, RefusalKind::Fenced);
    table.pass(9_000, &[&world[0]]);
    assert!(matches!(table.register_as("other", 1, 2, 41), Reply::Register(_)));
    assert_eq!(refused(table.rejoin("w1", 1, 51, 40)).0, RefusalKind::Fenced);
    // Nor after it left, or into a job that is aborted.
    table.leave(&world[0], "");
    assert_eq!(refused(table.rejoin("w0", 0, 52, 10)).0, RefusalKind::Fenced);
    let abort = v1::AbortJobRequest { job: "j".into(), reason: "enough".into() };
    table.ask(Event::AbortJob(abort));
    assert_eq!(refused(table.rejoin("w0", 0, 52, 10)).0, RefusalKind::JobAborted);
}

#[test]
fn ranks_that_save_other_things_alike_are_told_before_anything_is_published() {
    let mut table = Table::new();
    let world = table.world(3);
    let attempt = table.attempt(&world[0], 10);
    table.attempt(&world[1], 10);
    table.attempt(&world[2], 10);
    table.replicated_crc32c = Some(7);
    assert!(table.report_own(&world[2], (10, &attempt), None).is_none());
    table.replicated_crc32c = None;
    let reply = table.report_own(&world[1], (10, &attempt), None);
    let Some(Reply::AttemptAborted(aborted)) = reply else { panic!("{reply:?}") };
    assert!(aborted.reason.starts_with("ranks 1 and 2 differ in what they saved alike"));
    assert!(!aborted.may_be_published);
    assert!(matches!(table.late.pop(), Some((_, Reply::AttemptAborted(_)))));
}

#[test]
fn a_rank_has_one_holder() {
    let mut table = Table::new();
    let holder = table.register(0, 2, 7);
    let (kind, why) = refused(table.register_as("other", 0, 2, 9));
    assert_eq!(kind, RefusalKind::Conflict);
    assert!(why.contains("rank 0 of job `j` is held by `w0`"), "{why}");
    let other = table.register(1, 2, 10);
    // It dies: its rank is kept for a while, and then anybody's.
    table.pass(4_000, &[&other]);
    let (_, why) = refused(table.register_as("other", 0, 2, 9));
    assert!(why.contains("is kept for `w0` for another"), "{why}");
    table.pass(5_000, &[&other]);
    assert!(matches!(table.register_as("other", 0, 2, 9), Reply::Register(_)));
    assert_eq!(refused(table.heartbeat(&holder)).0, RefusalKind::Fenced);
}

#[test]
fn ranks_and_sizes_are_checked() {
    let mut table = Table::new();
    for (rank, world_size) in [(0, 0), (2, 2), (5, 1), (0, 1_000_000)] {
        assert_eq!(refused(table.try_register(rank, world_size, 1)).0, RefusalKind::Invalid);
    }
    // Nothing is left of a job that nobody entered.
    assert!(matches!(table.ask(Event::ListJobs), Some(Reply::Jobs(list)) if list.jobs.is_empty()));
}

#[test]
fn another_world_size_is_another_run() {
    let mut table = Table::new();
    let world = table.world(2);
    let (kind, why) = refused(table.try_register(2, 3, 30));
    assert_eq!(kind, RefusalKind::Conflict);
    assert!(why.contains("runs with world size 2 and has 2 living workers"), "{why}");
    // The same workers with a new size: the old run is over, and nobody failed.
    table.register(0, 3, 40);
    assert_eq!(refused(table.heartbeat(&world[1])).0, RefusalKind::Fenced);
    assert_eq!((table.job().failures, table.job().world_size), (0, 3));
    table.register(2, 3, 41);
}

#[test]
fn who_leaves_does_not_fail_and_who_fails_does() {
    let mut table = Table::new();
    let world = table.world(3);
    table.leave(&world[0], "");
    table.leave(&world[0], "");
    assert_eq!(table.job().failures, 0);
    table.leave(&world[1], "out of memory");
    assert_eq!(table.job().failures, 1);
    let Reply::Heartbeat(reply) = table.heartbeat(&world[2]) else { panic!() };
    let kinds: Vec<_> = reply.changes.iter().map(v1::MembershipChange::kind).collect();
    assert_eq!(kinds, [ChangeKind::Left, ChangeKind::Failed]);
    assert_eq!(reply.changes[1].reason, "out of memory");
}

#[test]
fn the_budget_aborts_and_a_commit_refills_it() {
    let mut table = Table::with(Policy { max_worker_failures: 2, ..Policy::default() });
    let keeper = table.register(0, 2, 1);
    let mut other = table.register(1, 2, 2);
    table.leave(&other, "first");
    other = table.register(1, 2, 3);
    let mut current = keeper.clone();
    current.epoch = other.epoch;
    let attempt = table.attempt(&current, 10);
    table.report(&current, 10, &attempt);
    assert!(matches!(table.report(&other, 10, &attempt), Some(Reply::Publish(_))));
    assert!(matches!(table.commit(&other, 10, &attempt), Reply::Committed(_)));
    assert_eq!(table.job().failures, 0);
    table.leave(&other, "second");
    assert_eq!(table.job().abort_reason, "");
    let again = table.register(1, 2, 4);
    table.leave(&again, "third");
    let reason = table.job().abort_reason;
    assert!(reason.starts_with("2 failures since the last checkpoint, at most 1 are"), "{reason}");
    let Reply::Heartbeat(reply) = table.heartbeat(&keeper) else { panic!() };
    assert_eq!(reply.abort_reason, reason);
    assert_eq!(refused(table.try_register(1, 2, 5)).0, RefusalKind::JobAborted);
    // Once nobody lives, the job begins anew.
    table.leave(&keeper, "");
    table.register(0, 2, 6);
    assert_eq!((table.job().failures, table.job().abort_reason), (0, String::new()));
}

#[test]
fn a_job_that_starts_over_fails_once() {
    let mut table = Table::new();
    table.world(8);
    for rank in 0..8 {
        table.register(rank, 8, 100 + u64::from(rank));
    }
    assert_eq!(table.job().failures, 1);
    assert_eq!(table.job().abort_reason, "");
}

/// A switch that is down for longer than a timeout is no reason to end a job of a thousand workers.
#[test]
fn workers_that_fall_silent_together_fail_once_and_who_comes_back_did_not_fail() {
    // The least that is allowed: three intervals.
    let policy = Policy { heartbeat_timeout_ms: 3_000, ..Policy::default() };
    let mut table = Table::with(policy);
    let world = table.world(4);
    // Their last heartbeats are not of the same moment.
    for (step, _) in world.iter().enumerate() {
        table.pass(250, &world[step..].iter().collect::<Vec<_>>());
    }
    table.pass(4_000, &[]);
    assert_eq!((table.job().workers_alive, table.job().failures), (0, 1));
    for rank in 0..4 {
        assert_eq!(table.job().failures, 1, "as long as one is missing");
        let id = format!("w{rank}");
        let back = table.rejoin(&id, rank, 50 + u64::from(rank), 10 + u64::from(rank));
        assert!(matches!(back, Reply::Register(_)), "{back:?}");
    }
    let job = table.job();
    assert_eq!((job.workers_alive, job.failures, job.abort_reason), (4, 0, String::new()));
    // Beside one that is heard, each is a failure of its own, taken back if it comes back.
    let keeper = v1::Identity { incarnation: 53, ..world[3].clone() };
    table.pass(4_000, &[&keeper]);
    assert_eq!((table.job().workers_alive, table.job().failures), (1, 3));
    assert!(table.job().abort_reason.starts_with("3 failures"), "{}", table.job().abort_reason);
}

#[test]
fn silence_kills_and_a_standstill_of_the_coordinator_does_not() {
    let mut table = Table::new();
    let world = table.world(2);
    table.pass(10_000, &[&world[0], &world[1]]);
    assert_eq!(table.job().workers_alive, 2);
    // The coordinator stood still for an hour.
    table.now_ms += 3_600_000;
    table.ask(Event::Tick);
    assert_eq!(table.job().workers_alive, 2);
    table.now_ms -= 1_800_000;
    table.ask(Event::Tick);
    table.pass(3_500, &[&world[0]]);
    assert_eq!((table.job().workers_alive, table.job().failures), (1, 1));
}

#[test]
fn a_restart_gives_everybody_a_timeout() {
    let mut table = Table::new();
    let world = table.world(2);
    table.pass(2_500, &[]);
    let kept: std::collections::BTreeMap<Vec<u8>, Vec<u8>> = table
        .changes
        .iter()
        .filter_map(|change| Some((change.key.encode(), change.value.clone()?)))
        .collect();
    let records = kept.iter().map(|(key, value)| (key.as_slice(), value.as_slice()));
    let policy = table.state.policy().clone();
    table.state = State::recover(policy, 2, 0, records).unwrap();
    table.now_ms = 0;
    table.pass(2_500, &[]);
    assert_eq!(table.job().workers_alive, 2);
    let Reply::Heartbeat(reply) = table.heartbeat(&world[1]) else { panic!() };
    assert_eq!((reply.epoch, reply.coordinator_incarnation), (2, 2));
    table.pass(1_000, &[]);
    assert_eq!(table.job().workers_alive, 1);
}

#[test]
fn a_barrier_waits_for_everybody_and_remembers_its_release() {
    let mut table = Table::new();
    let world = table.world(3);
    assert!(table.arrive(&world[0], 1).is_none());
    assert!(table.arrive(&world[1], 2).is_none());
    let released = outcome(table.arrive(&world[2], 3));
    assert_eq!(released, Outcome::Released(v1::BarrierReleased { generation: 0 }));
    assert_eq!(table.take_late().len(), 2);
    // Whose reply was lost asks again, and gets it, without waiting.
    assert_eq!(outcome(table.arrive(&world[0], 1)), released);
    assert!(table.arrive(&world[0], 4).is_none());
}

#[test]
fn a_loss_ends_waits_and_is_told_once() {
    let mut table = Table::new();
    let world = table.world(3);
    table.arrive(&world[0], 1);
    table.leave(&world[2], "");
    let late = table.take_late();
    let Outcome::EpochChanged(changed) = outcome(late.into_iter().next()) else { panic!() };
    assert_eq!(changed.reason, "`w2` (rank 2): it finished");
    let (kind, why) = refused(table.arrive(&world[1], 2).unwrap());
    assert_eq!(kind, RefusalKind::StaleEpoch);
    assert!(why.contains("`w2` (rank 2): it finished"), "{why}");
    // Who fills the place disturbs nobody.
    let told = v1::Identity { epoch: changed.epoch, ..world[1].clone() };
    assert!(table.arrive(&told, 2).is_none());
    table.register(2, 3, 99);
    assert!(table.take_late().is_empty());
}

#[test]
fn a_late_wait_names_who_is_missing() {
    let mut table = Table::new();
    let world = table.world(3);
    table.arrive(&world[0], 1);
    table.pass(61_000, &[&world[0], &world[1], &world[2]]);
    let Outcome::TimedOut(late) = outcome(table.take_late().into_iter().next()) else { panic!() };
    let missing: Vec<_> = late.missing.iter().map(|m| (m.rank, m.worker_id.as_str())).collect();
    assert_eq!(missing, [(1, "w1"), (2, "w2")]);
    // It does not count any more.
    assert!(table.arrive(&world[1], 2).is_none());
    assert!(table.arrive(&world[2], 3).is_none());
}

#[test]
fn ranks_agree_on_the_newest_common_step() {
    let mut table = Table::new();
    let world = table.world(3);
    let mut offer = |identity: &v1::Identity, steps: &[u64]| {
        table.ask(Event::AgreeStep(v1::AgreeStepRequest {
            identity: Some(identity.clone()),
            arrival: identity.incarnation,
            steps: steps.to_vec(),
            timeout_ms: 1_000,
            ..v1::AgreeStepRequest::default()
        }))
    };
    offer(&world[0], &[10, 20, 30]);
    offer(&world[1], &[30, 20]);
    let Some(Reply::AgreeStep(agreed)) = offer(&world[2], &[20, 10]) else { panic!() };
    assert_eq!(agreed.step, Some(20));
    let Some(Reply::AgreeStep(again)) = offer(&world[0], &[10]) else { panic!() };
    assert_eq!(again.step, Some(20));
}

#[test]
fn who_is_kept_from_loading_is_named_to_all_and_who_gives_up_first() {
    let mut table = Table::new();
    let world = table.world(3);
    let mut offer = |identity: &v1::Identity, hindrance: &str, gives_up| {
        table.ask(Event::AgreeStep(v1::AgreeStepRequest {
            identity: Some(identity.clone()),
            arrival: identity.incarnation,
            steps: if hindrance.is_empty() { vec![10] } else { vec![] },
            timeout_ms: 1_000,
            hindrance: hindrance.into(),
            gives_up,
            ..v1::AgreeStepRequest::default()
        }))
    };
    offer(&world[0], "", false);
    offer(&world[1], "step 10: a bit is wrong", false);
    let Some(Reply::AgreeStep(last)) = offer(&world[2], &"x".repeat(5_000), true) else { panic!() };
    let hindrance = last.hindrance.clone().unwrap();
    assert_eq!((last.step, last.offering), (None, 1));
    assert_eq!((hindrance.rank, hindrance.gave_up, hindrance.why.len()), (2, true, 1_000));
    // Whoever lost the reply hears the same.
    let Some(Reply::AgreeStep(again)) = offer(&world[0], "", false) else { panic!() };
    assert_eq!(again, last);
}

#[test]
fn the_same_step_of_different_attempts_is_not_common() {
    let mut table = Table::new();
    let world = table.world(2);
    let mut offer = |identity: &v1::Identity, attempts: [&str; 2]| {
        table.ask(Event::AgreeStep(v1::AgreeStepRequest {
            identity: Some(identity.clone()),
            arrival: identity.incarnation,
            steps: vec![10, 20],
            timeout_ms: 1_000,
            attempts: attempts.map(String::from).to_vec(),
            ..v1::AgreeStepRequest::default()
        }))
    };
    offer(&world[0], ["a", "b"]);
    let Some(Reply::AgreeStep(agreed)) = offer(&world[1], ["a", "stale"]) else { panic!() };
    assert_eq!(agreed.step, Some(10));
    let lacks = table.ask(Event::AgreeStep(v1::AgreeStepRequest {
        identity: Some(world[0].clone()),
        arrival: u64::MAX,
        steps: vec![10, 20],
        timeout_ms: 1_000,
        attempts: vec!["a".into()],
        ..v1::AgreeStepRequest::default()
    }));
    assert_eq!(refused(lacks.unwrap()).0, RefusalKind::Invalid);
}

/// Else who is told of the old attempt would go on, and an attempt that another rank begins now
/// would be what they are told of the next time, without end.
#[test]
fn ranks_that_try_a_step_again_are_not_late_for_the_attempt_before() {
    let mut table = Table::new();
    let world = table.world(3);
    let attempt = table.attempt(&world[2], 10);
    let give_up = |attempt: &str| {
        Event::AbortCheckpoint(v1::AbortCheckpointRequest {
            identity: Some(world[2].clone()),
            step: 10,
            attempt: attempt.into(),
            reason: "it took too long".into(),
            unpublished: true,
        })
    };
    table.ask(give_up(&attempt));
    for rank in [0, 1] {
        let (kind, why) = refused(table.begin(&world[rank], 10, false));
        assert_eq!(kind, RefusalKind::AttemptAborted, "rank {rank}: {why}");
    }
    // Rank 2 begins the next one alone: the others had gone on before it came.
    table.tries = 1;
    let alone = table.attempt(&world[2], 10);
    table.ask(give_up(&alone));
    table.tries = 2;
    let again: Vec<String> = world.iter().map(|member| table.attempt(member, 10)).collect();
    assert!(again.iter().all(|attempt| *attempt == again[0]), "{again:?}");
}

#[test]
fn ranks_with_stores_of_their_own_all_publish_before_the_commit() {
    let mut table = Table::new();
    let world = table.world(2);
    let attempt = table.attempt(&world[0], 10);
    let ours = (10, attempt.as_str());
    assert!(table.report_own(&world[0], ours, None).is_none());
    assert!(matches!(table.report_own(&world[1], ours, None), Some(Reply::Publish(_))));
    assert!(matches!(table.take_late()[..], [Reply::Publish(_)]));
    assert!(table.report_own(&world[1], ours, Some(7)).is_none());
    // A report that was lost on its way is answered again; one that waits is not asked twice.
    assert!(matches!(table.report_own(&world[0], ours, None), Some(Reply::Publish(_))));
    assert_eq!(table.take_late().len(), 0);
    assert_eq!(refused(table.commit(&world[0], 10, &attempt)).0, RefusalKind::Invalid);
    let Some(Reply::Committed(commit)) = table.report_own(&world[0], ours, Some(6)) else {
        panic!()
    };
    assert_eq!((commit.bytes, commit.world_size, commit.manifest_crc32c), (20, 2, 6));
    assert!(matches!(table.take_late()[..], [Reply::Committed(_)]));
    assert!(matches!(table.report_own(&world[1], ours, Some(7)), Some(Reply::Committed(_))));
}

#[test]
fn ranks_that_differ_in_whose_the_store_is_are_told() {
    let mut table = Table::new();
    let world = table.world(2);
    let attempt = table.attempt(&world[0], 10);
    assert!(table.report_own(&world[0], (10, &attempt), None).is_none());
    let (kind, why) = refused(table.report(&world[1], 10, &attempt).unwrap());
    assert_eq!(kind, RefusalKind::Invalid);
    assert!(why.contains("rank 1"), "{why}");
}

#[test]
fn a_rank_that_is_lost_before_all_published_in_their_own_stores_takes_the_attempt_with_it() {
    let mut table = Table::new();
    let world = table.world(2);
    let attempt = table.attempt(&world[0], 10);
    let ours = (10, attempt.as_str());
    table.report_own(&world[0], ours, None);
    table.report_own(&world[1], ours, None);
    table.take_late();
    assert!(table.report_own(&world[0], ours, Some(7)).is_none());
    table.pass(40_000, &[&world[0]]);
    let [Reply::AttemptAborted(aborted)] = &table.take_late()[..] else { panic!() };
    // What it published counts for nothing, and is taken back.
    assert_eq!((aborted.rank, aborted.may_be_published), (Some(1), false));
}

#[test]
fn a_checkpoint_is_complete_or_given_up() {
    let mut table = Table::new();
    let world = table.world(2);
    let attempt = table.attempt(&world[0], 10);
    assert_eq!(table.attempt(&world[1], 10), attempt);
    assert!(table.report(&world[0], 10, &attempt).is_none());
    assert_eq!(refused(table.commit(&world[0], 10, &attempt)).0, RefusalKind::Incomplete);
    let Some(Reply::Publish(shards)) = table.report(&world[1], 10, &attempt) else { panic!() };
    assert_eq!(shards.iter().map(|shard| shard.rank).collect::<Vec<_>>(), [0, 1]);
    let Reply::Committed(commit) = table.commit(&world[1], 10, &attempt) else { panic!() };
    assert_eq!((commit.step, commit.bytes, commit.world_size), (10, 20, 2));
    assert!(matches!(table.take_late()[..], [Reply::Committed(_)]));
    // Everything sent again has the same answer.
    assert!(matches!(table.report(&world[0], 10, &attempt), Some(Reply::Committed(_))));
    assert!(matches!(table.commit(&world[1], 10, &attempt), Reply::Committed(_)));
    assert_eq!(refused(table.begin(&world[0], 10, false)).0, RefusalKind::AlreadyCommitted);
    assert!(matches!(table.begin(&world[0], 5, true), Reply::BeginCheckpoint(_)));
}

#[test]
fn a_failed_rank_fails_the_save_on_all_and_late_ones_hear_of_it() {
    let mut table = Table::new();
    let world = table.world(3);
    let attempt = table.attempt(&world[0], 10);
    table.attempt(&world[1], 10);
    table.report(&world[0], 10, &attempt);
    table.ask(Event::AbortCheckpoint(v1::AbortCheckpointRequest {
        identity: Some(world[1].clone()),
        step: 10,
        attempt: attempt.clone(),
        reason: "no space".into(),
        unpublished: false,
    }));
    let Some(Reply::AttemptAborted(aborted)) = table.take_late().pop() else { panic!() };
    assert_eq!(aborted.rank, Some(1));
    assert_eq!(aborted.reason, "rank 1 (`w1`) failed: no space");
    let (kind, why) = refused(table.begin(&world[2], 10, false));
    assert_eq!(kind, RefusalKind::AttemptAborted);
    assert!(why.contains("no space"), "{why}");
    // A call that was sent twice begins nothing: its caller has heard already.
    for member in [&world[0], &world[2]] {
        assert_eq!(refused(table.begin(member, 10, false)).0, RefusalKind::AttemptAborted);
    }
    // All three know: the next attempt is theirs together.
    table.tries = 1;
    let next = table.attempt(&world[2], 10);
    assert_ne!(next, attempt);
    assert_eq!(table.attempt(&world[0], 10), next);
}

#[test]
fn a_rank_that_went_on_does_not_let_the_others_wait_for_an_earlier_step() {
    let mut table = Table::new();
    let world = table.world(2);
    let attempt = table.attempt(&world[0], 10);
    table.report(&world[0], 10, &attempt);
    // Rank 1 failed before it came to step 10, and saves the next one.
    table.attempt(&world[1], 20);
    let Some(Reply::AttemptAborted(aborted)) = table.take_late().pop() else { panic!() };
    assert_eq!(aborted.reason, "rank 1 (`w1`) went on to step 20 without reporting it");
}

/// The order of the same two calls, the other way round.
#[test]
fn a_step_that_another_rank_has_passed_is_not_begun() {
    let mut table = Table::new();
    let world = table.world(3);
    let attempt = table.attempt(&world[1], 20);
    let told = "rank 1 (`w1`) went on to step 20 without it";
    for late in [&world[0], &world[2]] {
        let (kind, why) = refused(table.begin(late, 10, false));
        assert!(kind == RefusalKind::AttemptAborted && why.contains(told), "{why}");
    }
    // All three save the later one, and may go back.
    for member in &world {
        assert_eq!(table.attempt(member, 20), attempt);
    }
    let back = table.begin(&world[1], 10, true);
    assert!(matches!(back, Reply::BeginCheckpoint(_)), "{back:?}");
}

#[test]
fn who_has_not_begun_a_save_is_named() {
    let mut table = Table::new();
    let world = table.world(2);
    table.attempt(&world[0], 10);
    let everybody: Vec<&v1::Identity> = world.iter().collect();
    table.pass(9_000, &everybody);
    assert!(table.notes.iter().all(|note| !note.contains("waits for")), "{:?}", table.notes);
    table.pass(60_000, &everybody);
    let waits = table.notes.iter().filter(|note| note.contains("waits for")).count();
    let told = "the save of step 10 waits for 1 of 2 ranks since 10 s: rank 1 (`w1`)\n\
                hint: every rank calls save for the same step, as with a collective; where one \
                rank saves alone, open its manager with `rank=0, world_size=1`";
    assert!(waits == 2 && table.notes.iter().any(|note| note == told), "{:?}", table.notes);
}

#[test]
fn a_new_process_begins_a_step_that_was_given_up_before_it_came() {
    let mut table = Table::new();
    let world = table.world(2);
    table.attempt(&world[0], 10);
    table.attempt(&world[1], 10);
    table.pass(4_000, &[&world[0]]);
    let first = table.register(1, 2, 40);
    let attempt = table.attempt(&first, 10);
    let known = v1::Identity { epoch: first.epoch, ..world[0].clone() };
    table.tries = 1;
    assert_eq!(table.attempt(&known, 10), attempt);
}

#[test]
fn a_lost_rank_gives_up_what_it_had_not_reported() {
    let mut table = Table::new();
    let world = table.world(2);
    let attempt = table.attempt(&world[0], 10);
    table.report(&world[0], 10, &attempt);
    table.pass(4_000, &[&world[0]]);
    let Some(Reply::AttemptAborted(aborted)) = table.take_late().pop() else { panic!() };
    assert!(aborted.reason.starts_with("rank 1 (`w1`) was lost: it was silent"), "{aborted:?}");
    assert!(!aborted.may_be_published, "nobody was asked: its shards may go");
    // Also to a rank that reports only now.
    let Some(Reply::AttemptAborted(late)) = table.report(&world[0], 10, &attempt) else { panic!() };
    assert_eq!(late, aborted);
    assert_eq!(table.job().latest_step, None);
}

#[test]
fn a_save_that_cannot_be_complete_is_refused_until_the_rank_is_there_again() {
    let mut table = Table::new();
    let world = table.world(2);
    table.pass(4_000, &[&world[0]]);
    // Told of the loss once, as at a barrier; then of what it means.
    assert_eq!(refused(table.begin(&world[0], 10, true)).0, RefusalKind::StaleEpoch);
    let knowing = v1::Identity { epoch: table.job().epoch, ..world[0].clone() };
    let (kind, why) = refused(table.begin(&knowing, 10, true));
    assert_eq!(kind, RefusalKind::AttemptAborted);
    assert!(why.contains("rank 1 (`w1`) is gone"), "{why}");
    let successor = table.register(1, 2, 99);
    assert!(matches!(table.begin(&successor, 10, true), Reply::BeginCheckpoint(_)));
}

#[test]
fn an_attempt_whose_publisher_was_asked_may_be_published() {
    let policy = Policy { checkpoint_timeout_ms: 10_000, ..Policy::default() };
    let mut table = Table::with(policy);
    let world = table.world(2);
    let attempt = table.attempt(&world[0], 10);
    table.report(&world[0], 10, &attempt);
    assert!(matches!(table.report(&world[1], 10, &attempt), Some(Reply::Publish(_))));
    table.pass(11_000, &[&world[0], &world[1]]);
    let Some(Reply::AttemptAborted(aborted)) = table.report(&world[1], 10, &attempt) else {
        panic!()
    };
    assert!(aborted.may_be_published, "{aborted:?}");
}

#[test]
fn a_publisher_that_refuses_to_publish_lets_the_shards_go() {
    let mut table = Table::new();
    let world = table.world(2);
    for (unpublished, step) in [(true, 10), (false, 20)] {
        let attempt = table.attempt(&world[0], step);
        table.report(&world[0], step, &attempt);
        assert!(matches!(table.report(&world[1], step, &attempt), Some(Reply::Publish(_))));
        table.ask(Event::AbortCheckpoint(v1::AbortCheckpointRequest {
            identity: Some(world[1].clone()),
            step,
            attempt,
            reason: "the ranks disagree".into(),
            unpublished,
        }));
        let Some(Reply::AttemptAborted(aborted)) = table.take_late().pop() else { panic!() };
        assert_eq!(aborted.may_be_published, !unpublished, "{aborted:?}");
    }
}

#[test]
fn a_rank_that_opens_a_store_saves_nothing_that_others_wait_for() {
    let mut table = Table::new();
    let world = table.world(3);
    // What was begun before it came ends at once, for who has reported and for who writes still.
    let attempt = table.attempt(&world[0], 10);
    table.attempt(&world[1], 10);
    assert!(table.report(&world[0], 10, &attempt).is_none());
    assert!(table.arrive_at(&world[2], OPENING_BARRIER, 1).is_none());
    let Some(Reply::AttemptAborted(aborted)) = table.take_late().pop() else { panic!() };
    assert!(aborted.reason.starts_with("rank 2 (`w2`) has no checkpoint manager"), "{aborted:?}");
    assert!(aborted.reason.contains("start all ranks again"));
    assert_eq!((aborted.rank, aborted.may_be_published), (Some(2), false));
    let told = table.report(&world[1], 10, &attempt);
    assert!(matches!(told, Some(Reply::AttemptAborted(_))), "{told:?}");
    // And what is begun while it waits.
    for identity in &world[..2] {
        let (kind, why) = refused(table.begin(identity, 20, false));
        assert_eq!(kind, RefusalKind::AttemptAborted);
        assert!(why.contains("rank 2 (`w2`) has no checkpoint manager open"), "{why}");
    }
    // Once all have opened, all save; so does a job in which only some wait at another barrier.
    assert!(table.arrive_at(&world[0], OPENING_BARRIER, 2).is_none());
    assert!(table.arrive_at(&world[1], OPENING_BARRIER, 2).is_some());
    table.take_late();
    assert!(table.arrive_at(&world[2], "another", 3).is_none());
    table.attempt(&world[0], 30);
}

#[test]
fn a_rank_that_has_reported_may_open_the_next_store() {
    let mut table = Table::new();
    let world = table.world(2);
    let attempt = table.attempt(&world[0], 10);
    table.attempt(&world[1], 10);
    assert!(table.report(&world[0], 10, &attempt).is_none());
    assert!(table.arrive_at(&world[0], OPENING_BARRIER, 1).is_none());
    assert!(matches!(table.report(&world[1], 10, &attempt), Some(Reply::Publish(_))));
}

#[test]
fn a_lost_publisher_is_replaced() {
    let mut table = Table::new();
    let world = table.world(3);
    let attempt = table.attempt(&world[0], 10);
    for identity in &world[..2] {
        assert!(table.report(identity, 10, &attempt).is_none());
    }
    assert!(matches!(table.report(&world[2], 10, &attempt), Some(Reply::Publish(_))));
    table.pass(4_000, &[&world[0], &world[1]]);
    assert!(matches!(table.take_late()[..], [Reply::Publish(_)]));
    // The lost one comes back: it may not commit any more, and need not.
    assert_eq!(refused(table.commit(&world[2], 10, &attempt)).0, RefusalKind::Fenced);
    assert!(matches!(table.commit(&world[0], 10, &attempt), Reply::Committed(_)));
    assert!(matches!(table.take_late()[..], [Reply::Committed(_)]));
    assert_eq!(table.job().latest_step, Some(10));
}

#[test]
fn a_slow_attempt_ends() {
    let policy = Policy { checkpoint_timeout_ms: 10_000, ..Policy::default() };
    let mut table = Table::with(policy);
    let world = table.world(2);
    let attempt = table.attempt(&world[0], 10);
    table.report(&world[0], 10, &attempt);
    table.pass(11_000, &[&world[0], &world[1]]);
    let Some(Reply::AttemptAborted(aborted)) = table.take_late().pop() else { panic!() };
    assert_eq!(aborted.reason, "rank 1 did not report within 10000 ms");
}

/// The same coordinator, started again from what it kept.
fn restarted(table: &mut Table) {
    let mut disk = std::collections::BTreeMap::new();
    for change in &table.changes {
        match &change.value {
            Some(value) => drop(disk.insert(change.key.encode(), value.clone())),
            None => drop(disk.remove(&change.key.encode())),
        }
    }
    let kept = disk.iter().map(|(key, value)| (key.as_slice(), value.as_slice()));
    let policy = table.state.policy().clone();
    table.state = State::recover(policy, 2, table.now_ms, kept).unwrap();
}

#[test]
fn at_the_limit_the_job_that_is_longest_without_workers_is_forgotten() {
    let mut table = Table::with(Policy { jobs_max: 3, ..Policy::default() });
    for job in ["c", "a", "b"] {
        table.register_in(job);
    }
    let (kind, why) = refused(table.register_in("d"));
    assert_eq!((kind, why.contains("3 jobs have living workers")), (RefusalKind::Conflict, true));
    for job in ["b", "c"] {
        table.leave_job(job);
    }
    restarted(&mut table);
    assert!(matches!(table.register_in("d"), Reply::Register(_)));
    assert_eq!(table.jobs(), ["a", "c", "d"], "`b` ended before `c`, and `a` lives");
    assert!(matches!(table.register_in("e"), Reply::Register(_)));
    restarted(&mut table);
    assert_eq!(table.jobs(), ["a", "d", "e"], "nothing is left of what was forgotten");
    refused(table.register_in("c"));
}

#[test]
fn a_registration_that_is_refused_costs_no_other_job_its_place() {
    let mut table = Table::with(Policy { jobs_max: 1, ..Policy::default() });
    table.register_in("a");
    table.leave_job("a");
    let request = v1::RegisterRequest { job: "b".into(), rank: 7, ..Default::default() };
    refused(table.ask(Event::Register(request)).unwrap());
    assert_eq!(table.jobs(), ["a"]);
}

#[test]
fn an_ended_job_leaves_the_metrics_after_an_hour() {
    let mut table = Table::new();
    for job in ["a", "b"] {
        table.register_in(job);
    }
    table.leave_job("b");
    let alive = v1::Identity { job: "a".into(), worker_id: "w".into(), incarnation: 5, epoch: 1 };
    table.pass(3_599_000, &[&alive]);
    assert_eq!(table.jobs_told(), 2);
    table.pass(2_000, &[&alive]);
    assert_eq!((table.jobs_told(), table.jobs().len()), (1, 2));
}

#[test]
fn at_the_limit_the_barrier_that_was_released_the_longest_ago_is_forgotten() {
    let mut table = Table::with(Policy { barriers_max: 3, ..Policy::default() });
    let world = table.world(1);
    let worker = &world[0];
    let mut arrival = 0;
    let mut pass = |table: &mut Table, name: &str| {
        arrival += 1;
        table.arrive_at(worker, name, arrival);
        table.take_late();
        arrival
    };
    let first = pass(&mut table, "a");
    let again = pass(&mut table, "b");
    pass(&mut table, "c");
    pass(&mut table, "a");
    restarted(&mut table);
    // `b` goes, then `c`, then `a`.
    pass(&mut table, "d");
    let released = |generation| Outcome::Released(v1::BarrierReleased { generation });
    assert_eq!(outcome(table.arrive_at(worker, "a", 4)), released(1), "its record is kept");
    // A copy of what arrived at the one that was forgotten makes no new one.
    let late = outcome(table.arrive_at(worker, "b", again));
    assert!(matches!(late, Outcome::TimedOut(_)), "{late:?}");
    assert!(first < again);
    for name in ["e", "f"] {
        pass(&mut table, name);
    }
    let kept = |table: &Table| {
        let mut names: Vec<String> = Vec::new();
        for change in &table.changes {
            if let Key::Barrier { name, .. } = &change.key {
                names.retain(|known| known != name);
                names.extend(change.value.is_some().then(|| name.clone()));
            }
        }
        names.sort();
        names
    };
    assert_eq!(kept(&table), ["d", "e", "f"]);
}

#[test]
fn a_barrier_that_somebody_waits_at_is_never_forgotten() {
    let mut table = Table::with(Policy { barriers_max: 1, ..Policy::default() });
    let world = table.world(2);
    assert!(table.arrive_at(&world[0], "a", 1).is_none());
    let (kind, why) = refused(table.arrive_at(&world[0], "b", 2).unwrap());
    assert_eq!((kind, why.contains("somebody waits")), (RefusalKind::Conflict, true));
    let released = outcome(table.arrive_at(&world[1], "a", 1));
    assert_eq!(released, Outcome::Released(v1::BarrierReleased { generation: 0 }));
    assert_eq!(table.take_late().len(), 1, "who waited is released, too");
}

#[test]
fn ranks_that_differ_in_what_must_be_alike_are_refused_together() {
    let mut table = Table::new();
    let world = table.world(3);
    assert!(table.arrive_with(&world[0], 1, "`s3://bucket/a`").is_none());
    assert!(table.arrive_with(&world[1], 1, "").is_none(), "an older version says nothing");
    let last = table.arrive_with(&world[2], 1, "`s3://bucket/b`").unwrap();
    let (kind, why) = refused(last);
    assert_eq!(kind, RefusalKind::Invalid);
    assert!(why.contains("rank 0 brings `s3://bucket/a`, rank 2 `s3://bucket/b`"), "{why}");
    let others = table.take_late();
    assert_eq!(others.len(), 2);
    assert!(others.into_iter().all(|reply| refused(reply).0 == RefusalKind::Invalid));
    // A reply that was lost is given again; the next round is another one.
    assert_eq!(refused(table.arrive_with(&world[0], 1, "`s3://bucket/a`").unwrap()).1, why);
    for (identity, arrival) in world.iter().zip(2..) {
        table.arrive_with(identity, arrival, "`s3://bucket/a`");
    }
    assert_eq!(table.late.len(), 2);
}
