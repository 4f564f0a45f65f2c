//! What is to go from the remote store, and in which order.
//!
//! Always holds:
//! - A checkpoint goes after the later ones that were asked to go before it: they may be retired by
//!   it, and would stand again without it.
//! - One that cannot go holds up only those. It is tried again after all others, so that a failure
//!   of each is met once a pause, not once each.

use std::collections::VecDeque;

use crate::format::names::AttemptId;

/// Something that goes from the remote store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Removal {
    Checkpoint(u64),
    /// The step, if it is still this attempt's.
    Attempt(u64, AttemptId),
    Orphan(u64, String),
}

impl Removal {
    /// The step that nobody may upload meanwhile.
    pub(super) fn guarded_step(&self) -> Option<u64> {
        match self {
            Self::Checkpoint(step) | Self::Attempt(step, _) => Some(*step),
            Self::Orphan(..) => None,
        }
    }

    /// Whether one that was asked for later waits for this one.
    fn holds_up(&self, later: &Self) -> bool {
        later.guarded_step().is_some() && later.guarded_step() <= self.guarded_step()
    }
}

#[derive(Debug)]
struct Entry {
    removal: Removal,
    failures: u32,
}

/// Removals in the order in which they were asked for.
#[derive(Debug, Default)]
pub(super) struct Removals(VecDeque<Entry>);

impl Removals {
    pub(super) fn push(&mut self, removal: Removal) {
        self.0.push_back(Entry { removal, failures: 0 });
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    /// The one that is to be tried next: of those that wait for no other, one that has failed
    /// least, the first asked for.
    pub(super) fn next(&self) -> Option<&Removal> {
        let mut latest = None;
        let free = self.0.iter().filter(|entry| {
            let step = entry.removal.guarded_step();
            let is_free = step.is_none() || step > latest;
            latest = latest.max(step);
            is_free
        });
        free.min_by_key(|entry| entry.failures).map(|entry| &entry.removal)
    }

    /// The removal was tried and is still to be done.
    pub(super) fn note_failure(&mut self, removal: &Removal) {
        if let Some(entry) = self.0.iter_mut().find(|entry| entry.removal == *removal) {
            entry.failures += 1;
        }
    }

    /// The removal is done, or not wanted any more.
    pub(super) fn forget(&mut self, removal: &Removal) {
        self.0.retain(|entry| entry.removal != *removal);
    }

    /// The one that is to be tried next so that `wanted` can go: the first that it waits for, or
    /// itself; `None` if it is not asked for any more.
    pub(super) fn next_for(&self, wanted: &Removal) -> Option<&Removal> {
        let removals = || self.0.iter().map(|entry| &entry.removal);
        let is_asked = removals().any(|removal| removal == wanted);
        // Whatever holds up the first of these would be one of them.
        let mut needed =
            removals().filter(|removal| *removal == wanted || removal.holds_up(wanted));
        if is_asked { needed.next() } else { None }
    }

    /// Whether a removal that is asked for now waits for one of these.
    pub(super) fn hold_up(&self, removal: &Removal) -> bool {
        self.0.iter().any(|entry| entry.removal.holds_up(removal))
    }

    /// Adds those of `later`, which were asked for after these.
    pub(super) fn append(&mut self, later: &mut Self) {
        self.0.append(&mut later.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn removals(asked: &[Removal]) -> Removals {
        let mut removals = Removals::default();
        asked.iter().cloned().for_each(|removal| removals.push(removal));
        removals
    }

    /// What is removed, in order, if `stuck` fail each time and at most `tries` are made.
    fn removed(mut removals: Removals, stuck: &[Removal], tries: usize) -> Vec<Removal> {
        let mut removed = Vec::new();
        for _ in 0..tries {
            let Some(next) = removals.next().cloned() else { break };
            if stuck.contains(&next) {
                removals.note_failure(&next);
            } else {
                removals.forget(&next);
                removed.push(next);
            }
        }
        removed
    }

    #[test]
    fn without_failures_what_was_asked_first_goes_first() {
        let orphan = Removal::Orphan(9, "rank-00000".into());
        let asked = [7, 8, 3, 5].map(Removal::Checkpoint).into_iter().chain([orphan]);
        let asked: Vec<_> = asked.collect();
        assert_eq!(removed(removals(&asked), &[], 9), asked);
    }

    #[test]
    fn one_that_cannot_go_holds_up_only_what_may_have_retired_it() {
        let checkpoints = [1, 7, 2, 8, 9].map(Removal::Checkpoint);
        let goes = [1, 8, 9].map(Removal::Checkpoint);
        assert_eq!(removed(removals(&checkpoints), &[Removal::Checkpoint(7)], 20), goes);
        let goes = [7, 2, 8, 9].map(Removal::Checkpoint);
        assert_eq!(removed(removals(&checkpoints), &[Removal::Checkpoint(1)], 20), goes);
    }

    #[test]
    fn what_fails_is_tried_in_turn() {
        let mut removals = removals(&[1, 2, 3].map(Removal::Checkpoint));
        for step in [1, 2, 3, 1, 2, 3, 1] {
            let next = removals.next().cloned().unwrap();
            assert_eq!(next, Removal::Checkpoint(step));
            removals.note_failure(&next);
        }
    }

    #[test]
    fn one_that_is_wanted_waits_for_none_but_those_that_it_may_have_retired() {
        let mut removals = removals(&[1, 7, 2, 8, 3].map(Removal::Checkpoint));
        let wanted = Removal::Checkpoint(3);
        for step in [7, 8, 3] {
            let next = removals.next_for(&wanted).cloned();
            assert_eq!(next, Some(Removal::Checkpoint(step)));
            removals.forget(&Removal::Checkpoint(step));
        }
        assert_eq!(removals.next_for(&wanted), None);
        assert!(removals.hold_up(&Removal::Checkpoint(2)));
        assert!(!removals.hold_up(&Removal::Checkpoint(4)));
    }

    #[test]
    fn what_is_no_checkpoint_waits_for_none() {
        let orphan = Removal::Orphan(2, "rank-00000".into());
        let asked = [Removal::Checkpoint(7), orphan.clone(), Removal::Checkpoint(2)];
        assert_eq!(removed(removals(&asked), &[Removal::Checkpoint(7)], 9), [orphan]);
    }
}
