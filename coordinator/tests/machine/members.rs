//! Who may join, who comes back, and what counts as a failure.

use coordinator::state::{Event, Policy, RefusalKind, Reply, State};
use dtr_proto::v1::{self, ChangeKind};

use crate::table::{Table, refused};

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
    // More than a heartbeat timeout later: another incident.
    table.pass(table.state.policy().heartbeat_timeout_ms + 1, &[&keeper, &again]);
    table.leave(&again, "third");
    let reason = table.job().abort_reason;
    assert!(reason.starts_with("2 failures since the last checkpoint, at most 1 are"), "{reason}");
    let Reply::Heartbeat(reply) = table.heartbeat(&keeper) else { panic!() };
    assert_eq!(reply.abort_reason, reason);
    assert_eq!(refused(table.try_register(1, 2, 5)).0, RefusalKind::JobAborted);
    // Once nobody lives, the job begins again.
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
    // A machine with three ranks is one, too.
    let keeper = v1::Identity { incarnation: 53, ..world[3].clone() };
    table.pass(4_000, &[&keeper]);
    assert_eq!((table.job().workers_alive, table.job().failures), (1, 1));
    assert_eq!(table.job().abort_reason, "");
}

/// One rank raises, and so do the others, whose connections to it are gone.
#[test]
fn workers_that_fail_together_fail_once_and_one_by_one_each_counts() {
    let mut table = Table::new();
    let world = table.world(8);
    let timeout_ms = table.state.policy().heartbeat_timeout_ms;
    for identity in &world[..7] {
        table.leave(identity, "connection closed by peer");
    }
    assert_eq!((table.job().workers_alive, table.job().failures), (1, 1));
    for (rank, failures) in [(0, 2), (1, 3)] {
        let again = table.register(rank, 8, 100 + u64::from(rank));
        table.pass(timeout_ms + 1, &[&world[7], &again]);
        table.leave(&again, "out of memory");
        assert_eq!(table.job().failures, failures);
    }
    assert!(table.job().abort_reason.starts_with("3 failures"), "{}", table.job().abort_reason);
}

#[test]
fn an_incident_that_was_none_hides_no_later_one() {
    let mut table = Table::new();
    let world = table.world(2);
    let timeout_ms = table.state.policy().heartbeat_timeout_ms;
    table.pass(timeout_ms + 1_000, &[&world[1]]);
    assert_eq!(table.job().failures, 1);
    let back = table.rejoin("w0", 0, 50, 10);
    assert!(matches!(back, Reply::Register(_)), "{back:?}");
    assert_eq!(table.job().failures, 0);
    table.leave(&world[1], "out of memory");
    assert_eq!(table.job().failures, 1);
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
