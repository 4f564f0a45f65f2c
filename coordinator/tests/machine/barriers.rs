//! When barriers end, and what ranks agree on there.

use coordinator::state::{Event, RefusalKind, Reply};
use dtr_proto::v1::{self, wait_barrier_reply::Outcome};

use crate::table::{Table, outcome, refused};

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
    // A caller that lost the reply is answered the same.
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
