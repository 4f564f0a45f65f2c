//! What the uploader has to do, in which order and when: decided from what is queued and the time.
//!
//! ```text
//!            add                take          book           book_whole
//! committed -----> waiting at a time ---> current --> uploaded ---> outcome
//!                     ^                      |  (own stores)  |
//!                     +--- failed, later ----+--- was lost ---+
//! ```
//!
//! Always holds:
//! - A step that failed has a time of its own to be tried again, so that it holds up no other; of
//!   those whose time has come the smallest is taken. Removals have a pause of their own, and an
//!   order ([`super::removals`]).
//! - What ended for good, but for damage here, is kept here: nobody knows of another copy.
//! - Of one step, one thing is done at a time: it is not taken while it is removed, nor removed
//!   while it is current.
//! - While all is drained, everything is tried once more and then done with: steps have failed, and
//!   removals are set aside until the drain is over.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use super::removals::{Removal, Removals};
use crate::store_copy::{Copied, Transferred, Uncopied};
use crate::{EngineError, Result};

#[cfg(test)]
mod tests;

/// First and longest pause before something is tried again.
const PAUSES: (Duration, Duration) = (Duration::from_secs(1), Duration::from_mins(1));
/// First and longest pause before it is looked again whether all ranks have uploaded their shards.
const LOOKS: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(15));

/// When something is to be done, by the monotonic clock, and how long it was waited for that. At
/// once by default.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Due {
    at: Duration,
    pause: Duration,
}

impl Due {
    fn again(self, now: Duration, (first, longest): (Duration, Duration)) -> Self {
        let pause = (self.pause * 2).clamp(first, longest);
        Self { at: now + pause, pause }
    }
}

/// The step that is at work.
#[derive(Debug)]
struct Current {
    step: u64,
    due: Due,
    task: Arc<UploadTask>,
    /// It was under way already when the drain began: it is not the try that the drain grants.
    precedes_drain: bool,
}

/// The work on one step, as the thread that is at it and those who look on share it: whether it is
/// still wanted, and how far it is.
#[derive(Debug, Default)]
pub(super) struct UploadTask {
    cancelled: AtomicBool,
    passed_bytes: AtomicU64,
}

impl UploadTask {
    fn cancel(&self) {
        self.cancelled.store(true, Ordering::Relaxed);
    }

    /// Whether the step is not wanted any more.
    pub(super) fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed)
    }

    /// So many bytes more were passed on, or were there already.
    pub(super) fn pass(&self, bytes: u64) {
        self.passed_bytes.fetch_add(bytes, Ordering::Relaxed);
    }
}

/// Whether a step waits for its upload, or may never have arrived: why its local copy stays.
#[derive(Clone, Copy, Debug)]
pub(super) struct UploadState {
    waits: bool,
    is_unsure: bool,
}

/// What is to be done of each step, and what came of it; see the picture above.
#[derive(Debug, Default)]
pub(super) struct Queue {
    waiting: BTreeMap<u64, Due>,
    current: Option<Current>,
    /// Steps whose own shard is in the remote store, and which wait for those of other ranks.
    uploaded: BTreeMap<u64, Transferred>,
    look: Due,
    outcomes: BTreeMap<u64, Result<Transferred>>,
    /// Steps of which it is not known that the remote store has them, though nothing waits for
    /// them: whose upload has failed, or whose manifest could not be read.
    unsure: BTreeSet<u64>,
    removals: Removals,
    removals_due: Due,
    /// Removals that wait until this drain is over, since one has failed in it.
    set_aside: Removals,
    /// The step whose removal is being carried out.
    removing: Option<u64>,
    /// Steps whose manifest this process has put into the remote store, or may have.
    published: BTreeSet<u64>,
    /// Steps of which an upload may have been begun and not ended, by this process or one before.
    unfinished: BTreeSet<u64>,
    /// The step that was committed last: later ones were retired by a rewind.
    latest: Option<u64>,
    /// Everything is tried once more at most: since when.
    draining: Option<Duration>,
    stopped: bool,
}

impl Queue {
    pub(super) fn new(waiting: BTreeSet<u64>, unsure: BTreeSet<u64>) -> Self {
        let unfinished = waiting.clone();
        let waiting = waiting.into_iter().map(|step| (step, Due::default())).collect();
        Self { waiting, unsure, unfinished, ..Self::default() }
    }

    /// The step is committed. Later ones, if there are any, are retired by it: they go no further,
    /// or they would stand in the remote store before what retires them.
    pub(super) fn add(&mut self, step: u64) {
        let later: Vec<u64> = self.waiting.keys().chain(self.uploaded.keys()).copied().collect();
        let current = self.current.as_ref().map(|current| current.step);
        for retired in later.into_iter().chain(current).filter(|later| *later > step) {
            self.cancel(retired);
        }
        // An upload of what this step was before is not needed any more.
        self.cancel(step);
        self.latest = Some(step);
        self.outcomes.remove(&step);
        // The upload takes the place of what was to go.
        self.removals.forget(&Removal::Checkpoint(step));
        self.set_aside.forget(&Removal::Checkpoint(step));
        self.waiting.insert(step, Due::default());
    }

    /// What [`Queue::cancel`] forgets of a step.
    pub(super) fn upload_state(&self, step: u64) -> UploadState {
        UploadState { waits: self.is_waiting(step), is_unsure: self.unsure.contains(&step) }
    }

    /// The step is as it was before it was cancelled, unless it was committed again meanwhile.
    pub(super) fn put_back(&mut self, step: u64, state: UploadState) {
        let is_queued = self.waiting.contains_key(&step) || self.uploaded.contains_key(&step);
        let current = self.current.as_ref().filter(|current| current.step == step);
        // An upload that was cancelled ends without an outcome, and is to be had all the same.
        let is_under_way = current.is_some_and(|current| !current.task.is_cancelled());
        if state.waits && !is_queued && !is_under_way {
            self.waiting.insert(step, Due::default());
        }
        if state.is_unsure {
            self.unsure.insert(step);
        }
    }

    /// An upload of the step may have been begun and not ended.
    pub(super) fn note_unfinished(&mut self, step: u64) {
        self.unfinished.insert(step);
    }

    /// Whether an upload of the step may have been begun and not ended; asked once.
    pub(super) fn take_unfinished(&mut self, step: u64) -> bool {
        self.unfinished.remove(&step)
    }

    /// The step's upload is not begun any more, and ends soon if it was: true until it has.
    pub(super) fn cancel(&mut self, step: u64) -> bool {
        self.waiting.remove(&step);
        self.uploaded.remove(&step);
        self.unsure.remove(&step);
        let current = self.current.as_ref().filter(|current| current.step == step);
        if let Some(current) = current {
            current.task.cancel();
        }
        current.is_some()
    }

    pub(super) fn remove(&mut self, removal: Removal) {
        if let Removal::Checkpoint(step) = removal {
            self.published.remove(&step);
        }
        if self.set_aside.hold_up(&removal) {
            self.set_aside.push(removal);
        } else {
            self.removals.push(removal);
        }
    }

    pub(super) fn is_waiting(&self, step: u64) -> bool {
        self.waiting.contains_key(&step) || self.uploaded.contains_key(&step) || self.is_at(step)
    }

    fn is_at(&self, step: u64) -> bool {
        self.current.as_ref().is_some_and(|current| current.step == step)
    }

    /// Whether the local copy may be deleted.
    pub(super) fn may_remove(&self, step: u64) -> bool {
        !self.is_waiting(step) && !self.unsure.contains(&step)
    }

    /// Whether what this process committed last retires a step, whatever is there of it.
    pub(super) fn is_retired(&self, step: u64) -> bool {
        self.latest.is_some_and(|latest| step > latest)
    }

    /// Whether this process may have put the step's manifest into the remote store.
    pub(super) fn may_have_published(&self, step: u64) -> bool {
        self.published.contains(&step)
    }

    /// Whether a step that a rewind retired may stand in the remote store because of this process.
    pub(super) fn may_have_published_retired(&self, step: u64) -> bool {
        self.is_retired(step) && (self.published.contains(&step) || self.is_at(step))
    }

    pub(super) fn is_stopped(&self) -> bool {
        self.stopped
    }

    /// Nothing is begun any more.
    pub(super) fn stop(&mut self) {
        self.stopped = true;
        if let Some(current) = &self.current {
            current.task.cancel();
        }
    }

    /// The thread has ended: nothing is at work either.
    pub(super) fn end(&mut self) {
        self.stop();
        self.current = None;
    }

    /// Since when everything is tried once more at most.
    pub(super) fn draining(&self) -> Option<Duration> {
        self.draining
    }

    pub(super) fn drain(&mut self, now: Duration) {
        if self.draining.is_none() {
            self.draining = Some(now);
            self.look = Due::default();
            if let Some(current) = &mut self.current {
                current.precedes_drain = true;
            }
        }
    }

    /// Whether there is nothing left to wait for.
    pub(super) fn is_drained(&self) -> bool {
        let is_done = self.waiting.is_empty()
            && self.removals.is_empty()
            && self.uploaded.is_empty()
            && self.current.is_none();
        is_done || self.stopped
    }

    pub(super) fn end_drain(&mut self, now: Duration) {
        self.draining = None;
        if self.set_aside.is_empty() {
            return;
        }
        self.set_aside.append(&mut self.removals);
        std::mem::swap(&mut self.set_aside, &mut self.removals);
        self.removals_due = self.removals_due.again(now, PAUSES);
    }

    /// How long it is until something is to be done; `None` where nothing is.
    pub(super) fn pause(&self, now: Duration) -> Option<Duration> {
        let free = self.waiting.iter().filter(|(step, _)| self.removing != Some(**step));
        let uploads = free.map(|(_, due)| self.left(due, now));
        let removals = (!self.removals.is_empty()).then(|| self.left(&self.removals_due, now));
        let look = (!self.uploaded.is_empty()).then(|| self.look.at.saturating_sub(now));
        uploads.chain(removals).chain(look).min()
    }

    /// A drain waits for nothing that has failed before.
    fn left(&self, due: &Due, now: Duration) -> Duration {
        if self.draining.is_some() { Duration::ZERO } else { due.at.saturating_sub(now) }
    }

    /// The next step to upload, which is current from now on.
    pub(super) fn take(&mut self, now: Duration) -> Option<(u64, Arc<UploadTask>)> {
        let is_due = |(step, due): &(&u64, &Due)| {
            self.removing != Some(**step) && self.left(due, now).is_zero()
        };
        let (step, due) = self.waiting.iter().find(is_due).map(|(step, due)| (*step, *due))?;
        if self.stopped {
            return None;
        }
        self.waiting.remove(&step);
        self.unfinished.insert(step);
        Some((step, self.begin(step, due)))
    }

    fn begin(&mut self, step: u64, due: Due) -> Arc<UploadTask> {
        let task = Arc::new(UploadTask::default());
        let current = Current { step, due, task: Arc::clone(&task), precedes_drain: false };
        self.current = Some(current);
        task
    }

    /// Steps that are not in the remote store yet, ascending, with the bytes that have gone so far;
    /// of those whose own shard is there, and that wait for other ranks', `None`.
    pub(super) fn pending(&self) -> BTreeMap<u64, Option<u64>> {
        let waiting = self.waiting.keys().map(|step| (*step, Some(0)));
        let current = self
            .current
            .as_ref()
            .map(|current| (current.step, Some(current.task.passed_bytes.load(Ordering::Relaxed))));
        let uploaded = self.uploaded.keys().map(|step| (*step, None));
        // A step that was uploaded is current while it is looked at.
        waiting.chain(current).chain(uploaded).collect()
    }

    /// Notes what came of the current upload; `share` if other ranks upload shards, too. True if it
    /// is tried again.
    pub(super) fn book(
        &mut self,
        outcome: Copied<Transferred>,
        share: bool,
        now: Duration,
    ) -> bool {
        let Some(Current { step, due, task, precedes_drain }) = self.current.take() else {
            return false;
        };
        if outcome.is_ok() {
            self.unfinished.remove(&step);
        }
        if task.is_cancelled() {
            return false;
        }
        match outcome {
            Err(uncopied) if self.tries_again(&uncopied, precedes_drain) => {
                self.waiting.insert(step, due.again(now, PAUSES));
                return true;
            }
            Err(uncopied) => self.fail(step, uncopied.into()),
            Ok(transferred) if share => {
                self.uploaded.insert(step, transferred);
                self.look = Due::default();
            }
            Ok(transferred) => drop(self.outcomes.insert(step, Ok(transferred))),
        }
        false
    }

    fn tries_again(&self, uncopied: &Uncopied, precedes_drain: bool) -> bool {
        uncopied.may_pass() && (self.draining.is_none() || precedes_drain)
    }

    fn fail(&mut self, step: u64, error: EngineError) {
        self.unsure.insert(step);
        self.outcomes.insert(step, Err(error));
    }

    /// Steps to look at, if it is time: whether every rank has uploaded its shard.
    pub(super) fn looks(&mut self, now: Duration) -> Vec<u64> {
        if self.uploaded.is_empty() || self.look.at > now {
            return Vec::new();
        }
        let longest = if self.draining.is_some() { LOOKS.0 } else { LOOKS.1 };
        self.look = self.look.again(now, (LOOKS.0, longest));
        self.uploaded.keys().copied().collect()
    }

    /// Makes one of these current, unless it is wanted no more.
    pub(super) fn take_uploaded(&mut self, step: u64) -> Option<Arc<UploadTask>> {
        let is_wanted = self.uploaded.contains_key(&step) && self.removing != Some(step);
        (is_wanted && !self.stopped).then(|| self.begin(step, Due::default()))
    }

    /// The current step may have its manifest in the remote store from now on.
    pub(super) fn note_published(&mut self, step: u64) {
        self.published.insert(step);
    }

    /// The current step is whole in the remote store.
    pub(super) fn book_whole(&mut self, step: u64) {
        self.current = None;
        if let Some(transferred) = self.uploaded.remove(&step) {
            self.outcomes.insert(step, Ok(transferred));
        }
    }

    /// The current step lacks shards of other ranks; with `given_up`, they are waited for no more.
    pub(super) fn book_missing(&mut self, step: u64, given_up: Option<EngineError>) {
        self.current = None;
        if let Some(error) = given_up
            && self.uploaded.remove(&step).is_some()
        {
            // A newer one is there, or this process ends: what is here is as good as any.
            self.outcomes.insert(step, Err(error));
        }
    }

    /// What this rank uploaded of the current step is not there any more: it is uploaded once more.
    pub(super) fn book_lost(&mut self, step: u64, now: Duration) {
        self.current = None;
        if self.uploaded.remove(&step).is_some() {
            self.waiting.insert(step, Due::default().again(now, PAUSES));
        }
    }

    /// It could not be told whether the current step is whole: it is looked at again, if that may
    /// change.
    pub(super) fn book_unseen(&mut self, step: u64, uncopied: Uncopied) {
        let precedes_drain = self.current.take().is_some_and(|current| current.precedes_drain);
        if !self.tries_again(&uncopied, precedes_drain) && self.uploaded.remove(&step).is_some() {
            self.fail(step, uncopied.into());
        }
    }

    pub(super) fn outcome(&self, step: u64) -> Option<Result<Transferred>> {
        self.outcomes.get(&step).map(|outcome| match outcome {
            Ok(transferred) => Ok(transferred.clone()),
            Err(error) => Err(error.duplicate()),
        })
    }

    /// The newest step that has failed and is still here, and why.
    pub(super) fn failed(&self) -> Option<(u64, EngineError)> {
        let failures = self.outcomes.iter().filter(|(step, _)| self.unsure.contains(*step));
        let mut errors =
            failures.filter_map(|(step, outcome)| Some((*step, outcome.as_ref().err()?)));
        errors.next_back().map(|(step, error)| (step, error.duplicate()))
    }

    /// Whether it is time to remove something.
    pub(super) fn removes(&self, now: Duration) -> bool {
        !self.removals.is_empty() && self.left(&self.removals_due, now).is_zero()
    }

    /// Whether the next removal has to wait until the step has arrived or was given up.
    pub(super) fn is_removal_blocked(&self, wanted: Option<&Removal>) -> bool {
        let step = self.next_removal(wanted).and_then(Removal::guarded_step);
        step.is_some_and(|step| self.is_at(step))
    }

    /// The next removal, or the next that has to be done for `wanted`.
    fn next_removal(&self, wanted: Option<&Removal>) -> Option<&Removal> {
        wanted.map_or_else(|| self.removals.next(), |wanted| self.removals.next_for(wanted))
    }

    /// Whether a removal waits until a drain is over.
    pub(super) fn is_set_aside(&self, removal: &Removal) -> bool {
        self.set_aside.next_for(removal).is_some()
    }

    pub(super) fn begin_removal(&mut self, wanted: Option<&Removal>) -> Option<Removal> {
        let removal = self.next_removal(wanted).cloned()?;
        self.removing = removal.guarded_step();
        Some(removal)
    }

    /// Notes what came of a removal that was begun.
    pub(super) fn end_removal(&mut self, removal: &Removal, is_done: bool) {
        self.removing = None;
        if !is_done {
            self.removals.note_failure(removal);
            return;
        }
        self.removals_due = Due::default();
        if let Removal::Attempt(step, _) = removal {
            self.published.remove(step);
        }
        // A new commit of the step may have taken it out meanwhile.
        self.removals.forget(removal);
    }

    /// A removal failed: it and the rest are gone on with later; in a drain, once that is over, so
    /// that closing does not wait for each of many to no avail. Gives how many are left.
    pub(super) fn put_removals_off(&mut self, now: Duration) -> usize {
        if self.draining.is_some() {
            self.set_aside.append(&mut self.removals);
        } else {
            self.removals_due = self.removals_due.again(now, PAUSES);
        }
        self.removals.len() + self.set_aside.len()
    }
}
