//! Tests of the queue: what is done first, again, and not any more.

use super::*;

const SECOND: Duration = Duration::from_secs(1);

fn queue(waiting: &[u64]) -> Queue {
    Queue::new(waiting.iter().copied().collect(), BTreeSet::new())
}

fn away() -> Uncopied {
    let [what, why, hint] = ["copying", "it is away", "wait"].map(String::from);
    Uncopied::Elsewhere(EngineError::Unavailable { what, why, hint })
}

fn damaged() -> Uncopied {
    Uncopied::Source(EngineError::corrupt("a shard", "a bit is wrong"))
}

/// What is taken at `now`, and arrives or fails.
fn passes(queue: &mut Queue, now: Duration, failure: Option<Uncopied>) -> Option<u64> {
    let (step, _) = queue.take(now)?;
    queue.book(failure.map_or_else(|| Ok(Transferred::default()), Err), false, now);
    Some(step)
}

#[test]
fn what_stays_though_it_was_to_go_is_as_it_was() {
    let mut queue = queue(&[5, 6]);
    assert_eq!(passes(&mut queue, SECOND, Some(damaged())), Some(5));
    for step in [5, 6] {
        let state = queue.upload_state(step);
        queue.cancel(step);
        assert!(queue.may_remove(step));
        queue.put_back(step, state);
        assert!(!queue.may_remove(step));
    }
    assert!(!queue.is_waiting(5) && queue.is_waiting(6));
}

#[test]
fn what_stays_though_its_upload_was_cancelled_is_uploaded_anew() {
    let mut queue = queue(&[5]);
    let (step, task) = queue.take(SECOND).unwrap();
    let state = queue.upload_state(step);
    assert!(queue.cancel(step) && task.is_cancelled());
    queue.put_back(step, state);
    assert!(!queue.book(Ok(Transferred::default()), false, SECOND));
    assert!(queue.is_waiting(5) && queue.outcome(5).is_none());
    assert_eq!(passes(&mut queue, SECOND, None), Some(5));
    assert!(queue.outcome(5).is_some_and(|outcome| outcome.is_ok()) && !queue.is_waiting(5));
    // One that nobody cancelled is not begun twice.
    queue.add(6);
    queue.take(SECOND).unwrap();
    queue.put_back(6, queue.upload_state(6));
    queue.book(Ok(Transferred::default()), false, SECOND);
    assert!(!queue.is_waiting(6));
}

#[test]
fn what_is_later_than_the_last_commit_is_retired() {
    let mut queue = Queue::new(BTreeSet::new(), BTreeSet::new());
    assert!(!queue.is_retired(39), "nothing was committed yet");
    queue.add(5);
    assert!(queue.is_retired(39) && !queue.is_retired(5) && !queue.is_retired(4));
}

#[test]
fn a_step_that_cannot_be_read_holds_up_no_other() {
    let mut queue = queue(&[1, 2, 3]);
    let now = 100 * SECOND;
    assert_eq!(passes(&mut queue, now, Some(away())), Some(1));
    assert_eq!(passes(&mut queue, now, None), Some(2));
    assert_eq!(passes(&mut queue, now, None), Some(3));
    assert_eq!((passes(&mut queue, now, None), queue.pause(now)), (None, Some(SECOND)));
    // Its pauses grow; a new step comes between.
    let now = now + SECOND;
    assert_eq!(passes(&mut queue, now, Some(away())), Some(1));
    assert_eq!(queue.pause(now), Some(2 * SECOND));
    queue.add(4);
    assert_eq!(queue.pause(now), Some(Duration::ZERO));
    assert_eq!(passes(&mut queue, now, None), Some(4));
    assert!(!queue.may_remove(1) && queue.may_remove(2));
    assert_eq!(passes(&mut queue, now + 2 * SECOND, None), Some(1));
    assert_eq!(queue.pause(now), None);
}

#[test]
fn a_removal_that_fails_holds_up_no_other_and_no_upload() {
    let mut queue = queue(&[3]);
    let now = SECOND;
    queue.remove(Removal::Checkpoint(1));
    queue.remove(Removal::Checkpoint(2));
    for (step, pause) in [(1, 1), (2, 2), (1, 4)] {
        assert_eq!(queue.begin_removal(None), Some(Removal::Checkpoint(step)));
        queue.end_removal(&Removal::Checkpoint(step), false);
        assert_eq!(queue.put_removals_off(now), 2);
        assert_eq!(queue.removals_due.pause, pause * SECOND);
        assert!(!queue.removes(now) && queue.removes(now + pause * SECOND));
    }
    assert_eq!(queue.pause(now), Some(Duration::ZERO));
    assert_eq!(passes(&mut queue, now, None), Some(3));
    assert_eq!(queue.pause(now), Some(4 * SECOND));
}

#[test]
fn what_fails_in_a_drain_is_done_with_and_removals_come_back_after_it() {
    let mut queue = queue(&[3]);
    assert_eq!(passes(&mut queue, SECOND, Some(away())), Some(3));
    queue.remove(Removal::Checkpoint(2));
    queue.drain(SECOND);
    assert!(queue.removes(SECOND) && !queue.is_drained());
    queue.put_removals_off(SECOND);
    // Asked for while the drain goes on: one that waits for it, and one that does not.
    queue.remove(Removal::Checkpoint(1));
    queue.remove(Removal::Checkpoint(4));
    assert_eq!(queue.begin_removal(None), Some(Removal::Checkpoint(4)));
    queue.end_removal(&Removal::Checkpoint(4), true);
    assert_eq!(passes(&mut queue, SECOND, Some(away())), Some(3));
    assert!(queue.is_drained());
    assert!(matches!(queue.outcome(3), Some(Err(_))) && !queue.may_remove(3));
    assert!(queue.failed().is_some());
    queue.end_drain(SECOND);
    assert_eq!((queue.removals.len(), queue.removals.next()), (2, Some(&Removal::Checkpoint(2))));
    assert!(!queue.removes(SECOND) && queue.removes(2 * SECOND));
}

#[test]
fn what_was_under_way_when_a_drain_began_is_tried_once_more_too() {
    let mut queue = queue(&[3]);
    queue.take(SECOND).unwrap();
    queue.drain(SECOND);
    assert!(queue.book(Err(away()), false, SECOND));
    assert!(!queue.is_drained());
    assert_eq!(passes(&mut queue, SECOND, Some(away())), Some(3));
    assert!(queue.is_drained() && queue.failed().is_some());
}

#[test]
fn a_retired_step_does_not_overtake_the_one_that_retires_it() {
    let mut queue = queue(&[2, 5, 7]);
    let (step, task) = queue.take(SECOND).unwrap();
    assert_eq!(step, 2);
    queue.book(Err(away()), false, SECOND);
    assert!(!task.is_cancelled());
    let (step, task) = queue.take(SECOND).unwrap();
    assert_eq!(step, 5);
    // A rewind: neither 5, which is on its way, nor 7 goes on.
    queue.add(3);
    assert!(task.is_cancelled() && !queue.is_waiting(7));
    queue.book(Ok(Transferred::default()), false, SECOND);
    assert!(queue.outcome(5).is_none());
    assert_eq!(passes(&mut queue, SECOND, Some(away())), Some(3));
    assert_eq!(passes(&mut queue, SECOND, None), None);
}

#[test]
fn what_failed_for_good_is_kept_here() {
    let mut queue = Queue::new(BTreeSet::from([1, 2]), BTreeSet::from([9]));
    assert_eq!(passes(&mut queue, SECOND, Some(damaged())), Some(1));
    assert_eq!(passes(&mut queue, SECOND, None), Some(2));
    assert_eq!(queue.pause(SECOND), None);
    assert_eq!([1, 2, 9].map(|step| queue.may_remove(step)), [false, true, false]);
    assert!(queue.failed().is_some_and(|(step, _)| step == 1));
    // Saved again, it arrives.
    queue.add(1);
    assert_eq!(passes(&mut queue, SECOND, None), Some(1));
    assert!(queue.may_remove(1) && queue.failed().is_none());
}

#[test]
fn of_one_step_one_thing_is_done_at_a_time() {
    let mut queue = queue(&[]);
    queue.remove(Removal::Checkpoint(5));
    let removal = queue.begin_removal(None).unwrap();
    // It is committed again while the old one is being removed.
    queue.add(5);
    assert_eq!((queue.take(SECOND).map(drop), queue.pause(SECOND)), (None, None));
    queue.end_removal(&removal, true);
    assert!(queue.removals.is_empty());
    assert!(queue.take(SECOND).is_some());
    queue.cancel(5);
    queue.remove(Removal::Checkpoint(5));
    assert!(queue.is_removal_blocked(None));
    queue.book(Ok(Transferred::default()), false, SECOND);
    assert!(!queue.is_removal_blocked(None));
}

#[test]
fn what_this_rank_brought_is_looked_at_less_and_less_often() {
    let mut queue = queue(&[1]);
    queue.take(SECOND).unwrap();
    queue.book(Ok(Transferred::default()), true, SECOND);
    let mut now = SECOND;
    for pause in [250, 500, 1000] {
        assert_eq!(queue.looks(now), [1]);
        assert!(queue.looks(now).is_empty());
        queue.take_uploaded(1).unwrap();
        queue.book_missing(1, None);
        assert_eq!(queue.pause(now), Some(Duration::from_millis(pause)));
        now += Duration::from_millis(pause);
    }
    // Lost: uploaded once more, and not at once.
    queue.take_uploaded(1).unwrap();
    queue.book_lost(1, now);
    assert_eq!(queue.pause(now), Some(SECOND));
    assert!(queue.is_waiting(1));
}

#[test]
fn nobody_waits_for_a_thread_that_has_ended() {
    let mut queue = queue(&[1, 2]);
    queue.take(SECOND).unwrap();
    queue.drain(SECOND);
    queue.end();
    assert!(queue.is_drained() && queue.is_stopped() && !queue.cancel(1));
}
