//! When a checkpoint of many ranks is committed, and when it is given up and who is notified.

use coordinator::state::{Event, Policy, RefusalKind, Reply};
use dtr_proto::OPENING_BARRIER;
use dtr_proto::v1;

use crate::table::{Table, refused};

#[test]
fn a_rank_that_is_lost_while_it_waits_is_told_so() {
    let mut table = Table::new();
    let world = table.world(2);
    let attempt = table.attempt(&world[0], 10);
    table.report(&world[1], 10, &attempt);
    table.pass(4_000, &[&world[0]]);
    // Else its call would wait forever: it may come back, and ask again.
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
fn bytes_that_no_disk_has_end_nobody() {
    let mut table = Table::new();
    let world = table.world(2);
    let attempt = table.attempt(&world[0], 10);
    table.attempt(&world[1], 10);
    table.shard_bytes = u64::MAX;
    table.report(&world[0], 10, &attempt);
    table.report(&world[1], 10, &attempt);
    let Reply::Committed(commit) = table.commit(&world[1], 10, &attempt) else { panic!() };
    assert_eq!(commit.bytes, u64::MAX);
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
    assert!(aborted.reason.starts_with("ranks 1 and 2 disagree on the replicated entries"));
    assert!(!aborted.may_be_published);
    assert!(matches!(table.late.pop(), Some((_, Reply::AttemptAborted(_)))));
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
    // The engine always says that it may go back: what a step replaces is decided by the store.
    for (late, rewind) in [(&world[0], false), (&world[2], true)] {
        let (kind, why) = refused(table.begin(late, 10, rewind));
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
    assert!(table.notes.iter().all(|note| !note.contains("has waited")), "{:?}", table.notes);
    table.pass(60_000, &everybody);
    let waits = table.notes.iter().filter(|note| note.contains("has waited")).count();
    let told = "the save of step 10 has waited 10 s for 1 of 2 ranks: rank 1 (`w1`)\n\
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
