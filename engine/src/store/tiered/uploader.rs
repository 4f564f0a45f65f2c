//! The thread that brings checkpoints to the far store, and lets go there of what retention let go.
//!
//! Always holds:
//! - Everything that is to be done survives a failure: it is tried again until the store is closed,
//!   and what is left then is found by the next writer, in the listings of both stores.
//! - Removals are carried out in the order in which they were asked for: a checkpoint that retires
//!   another goes after it.
//! - One thread at a time removes; a step that is committed again is not removed any more.
//! - Where several ranks save, each with a store of its own, each brings its own shard; whoever
//!   finds all of them there publishes, and the others wait to see it. Rank 0 alone removes; the
//!   others only take back what they published of steps that a rewind has retired.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use super::far::FarView;
use crate::clock::{Environment, elapsed};
use crate::error::IoContext;
use crate::format::names::{AttemptId, MANIFEST_FILE};
use crate::load::VerifyObserver;
use crate::recovery::OwnShare;
use crate::store::Store;
use crate::transfer::{
    Brought, Overwrite, Transferred, publish_whole, standing, transfer, transfer_share,
};
use crate::{EngineError, Result};

/// First and longest pause before something is tried again.
const PAUSES: (Duration, Duration) = (Duration::from_secs(1), Duration::from_mins(1));

/// First and longest pause before it is looked again whether all ranks have brought their shards.
const LOOKS: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(15));
/// How long a store that is closing waits for shards of others.
const FAREWELL: Duration = Duration::from_secs(10);

/// The thread that uploads.
pub(super) struct Uploader {
    pub(super) work: Arc<Work>,
    thread: Option<JoinHandle<()>>,
    process: u32,
}

impl Uploader {
    pub(super) fn start(work: Arc<Work>) -> Result<Self> {
        let own = Arc::clone(&work);
        let thread = std::thread::Builder::new()
            .name("dtr-upload".into())
            .spawn(move || own.run())
            .context("starting a thread for", "uploading")?;
        Ok(Self { work, thread: Some(thread), process: std::process::id() })
    }
}

impl Drop for Uploader {
    fn drop(&mut self) {
        // A forked child has no such thread.
        if self.process != std::process::id() {
            return;
        }
        self.work.stop();
        if let Some(thread) = self.thread.take() {
            // What it was at is resumed by the next process.
            let _panicked = thread.join();
        }
    }
}

/// What the uploader and those who wait for it share.
pub(super) struct Work {
    pub(super) near: Arc<dyn Store>,
    pub(super) far: Arc<dyn Store>,
    pub(super) view: FarView,
    environment: Arc<dyn Environment>,
    bytes_per_second: Option<u64>,
    /// Of a rank with a store of its own.
    share: Option<OwnShare>,
    queue: Mutex<Queue>,
    changed: Condvar,
    /// Held by whoever removes from the far store.
    removing: Mutex<()>,
}

/// Something that goes from the far store.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Removal {
    Checkpoint(u64),
    /// The step, if it is still this attempt's.
    Attempt(u64, AttemptId),
    Orphan(u64, String),
}

#[derive(Default)]
struct Queue {
    waiting: BTreeSet<u64>,
    current: Option<(u64, Arc<AtomicBool>)>,
    /// Steps whose own shard is in the far store, and which wait for those of other ranks.
    brought: BTreeMap<u64, Transferred>,
    outcomes: BTreeMap<u64, Result<Transferred>>,
    removals: VecDeque<Removal>,
    /// Steps whose manifest this process has put into the far store, or may have.
    published: BTreeSet<u64>,
    /// The step that was committed last: later ones were retired by a rewind.
    latest: Option<u64>,
    /// Everything is tried once more at most: since when.
    draining: Option<Duration>,
    stopped: bool,
}

impl Queue {
    /// Whether nothing is left to do but to wait for other ranks.
    fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.removals.is_empty()
    }

    fn is_done(&self) -> bool {
        self.is_idle() && self.brought.is_empty() && self.current.is_none()
    }

    /// Whether a step that a rewind retired may stand in the far store because of this process.
    fn may_have_published_retired(&self, step: u64) -> bool {
        self.latest.is_some_and(|latest| step > latest)
            && (self.published.contains(&step)
                || self.current.as_ref().is_some_and(|(at, _)| *at == step))
    }

    fn is_waiting(&self, step: u64) -> bool {
        self.waiting.contains(&step)
            || self.brought.contains_key(&step)
            || self.current.as_ref().is_some_and(|(at, _)| *at == step)
    }
}

impl Work {
    /// Work on `waiting` steps, which the far store does not have as they are.
    pub(super) fn new(
        (near, far): (&Arc<dyn Store>, &Arc<dyn Store>),
        view: FarView,
        waiting: BTreeSet<u64>,
        environment: Arc<dyn Environment>,
        (bytes_per_second, share): (Option<u64>, Option<OwnShare>),
    ) -> Self {
        Self {
            near: Arc::clone(near),
            far: Arc::clone(far),
            view,
            environment,
            bytes_per_second,
            share,
            queue: Mutex::new(Queue { waiting, ..Queue::default() }),
            changed: Condvar::new(),
            removing: Mutex::new(()),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        // Every critical section is a few assignments.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn add(&self, step: u64) {
        let mut queue = self.lock();
        // An upload of what this step was before is not needed any more.
        if let Some((_, cancelled)) = queue.current.as_ref().filter(|(at, _)| *at == step) {
            cancelled.store(true, Ordering::Relaxed);
        }
        queue.latest = Some(step);
        queue.outcomes.remove(&step);
        queue.brought.remove(&step);
        // The upload takes the place of what was to go.
        queue.removals.retain(|removal| *removal != Removal::Checkpoint(step));
        queue.waiting.insert(step);
        drop(queue);
        self.changed.notify_all();
    }

    /// The step is going: its upload is not begun any more, and ends soon if it was.
    pub(super) fn cancel(&self, step: u64) {
        self.cancel_in(&mut self.lock(), step);
    }

    /// The same; nobody uploads the step any more when this returns.
    pub(super) fn cancel_and_wait(&self, step: u64) {
        let mut queue = self.lock();
        while self.cancel_in(&mut queue, step) {
            queue = self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// True while the step is being uploaded.
    fn cancel_in(&self, queue: &mut Queue, step: u64) -> bool {
        queue.waiting.remove(&step);
        queue.brought.remove(&step);
        let current = queue.current.as_ref().filter(|(at, _)| *at == step);
        if let Some((_, cancelled)) = current {
            cancelled.store(true, Ordering::Relaxed);
        }
        let is_current = current.is_some();
        self.changed.notify_all();
        is_current
    }

    pub(super) fn is_waiting(&self, step: u64) -> bool {
        self.lock().is_waiting(step)
    }

    pub(super) fn wait_for(
        &self,
        step: u64,
        timeout: Option<Duration>,
    ) -> Option<Result<Transferred>> {
        let pending = |queue: &mut Queue| queue.is_waiting(step) && !queue.stopped;
        let queue = match timeout {
            None => self.changed.wait_while(self.lock(), pending),
            Some(timeout) => match self.changed.wait_timeout_while(self.lock(), timeout, pending) {
                Ok((queue, _)) => Ok(queue),
                Err(poisoned) => Ok(poisoned.into_inner().0),
            },
        };
        let queue = queue.unwrap_or_else(PoisonError::into_inner);
        if queue.is_waiting(step) && !queue.stopped {
            return None;
        }
        Some(match queue.outcomes.get(&step) {
            Some(Ok(transferred)) => Ok(transferred.clone()),
            Some(Err(error)) => Err(error.duplicate()),
            None => Err(self.not_uploaded(step)),
        })
    }

    fn not_uploaded(&self, step: u64) -> EngineError {
        EngineError::Closed {
            what: format!("uploading step {step} to `{}`", self.far.location()),
            why: "it was never committed, or was deleted, or the store closed before".into(),
            hint: "what is committed and left is uploaded when the store is opened for writing \
                   again"
                .into(),
        }
    }

    /// The attempt that stands near, if a rewind retired it and its manifest may have been put into
    /// the far store by this process, after rank 0 had been there: it would stand again once what
    /// retired it is gone. Any other step that comes late does no harm, and is rank 0's to remove,
    /// which alone knows that what it retired is gone.
    pub(super) fn to_take_back(&self, step: u64) -> Option<AttemptId> {
        let may_be = !self.removes_for_all() && self.lock().may_have_published_retired(step);
        may_be.then(|| standing(self.near.as_ref(), step).ok().flatten()).flatten()
    }

    /// Lets the far store go of a step, behind; `attempt` stood near and was [to be taken
    /// back][Self::to_take_back].
    pub(super) fn let_go_behind(&self, step: u64, attempt: Option<AttemptId>) {
        self.view.forget(step);
        let mut queue = self.lock();
        if self.removes_for_all() {
            queue.published.remove(&step);
            queue.removals.push_back(Removal::Checkpoint(step));
        } else if let Some(attempt) = attempt {
            queue.removals.push_back(Removal::Attempt(step, attempt));
        }
        drop(queue);
        self.changed.notify_all();
    }

    /// Lets the far store go of a file that no manifest names, behind.
    pub(super) fn remove_orphan_behind(&self, step: u64, file: &str) {
        self.view.forget_file(step, file);
        if self.removes_for_all() {
            self.lock().removals.push_back(Removal::Orphan(step, file.into()));
            self.changed.notify_all();
        }
    }

    fn removes_for_all(&self) -> bool {
        self.share.is_none_or(|share| share.rank == 0)
    }

    /// Carries out what removals wait, in their order, until one fails. Returns the bytes freed.
    pub(super) fn remove_now(&self) -> Result<u64> {
        let _turn = self.removing.lock().unwrap_or_else(PoisonError::into_inner);
        let mut freed_bytes = 0;
        loop {
            let Some(removal) = self.lock().removals.front().cloned() else {
                self.changed.notify_all();
                return Ok(freed_bytes);
            };
            freed_bytes += self.remove(&removal)?;
            // Unless a new commit of the step took it out meanwhile.
            let mut queue = self.lock();
            if queue.removals.front() == Some(&removal) {
                queue.removals.pop_front();
            }
        }
    }

    fn remove(&self, removal: &Removal) -> Result<u64> {
        match removal {
            Removal::Checkpoint(step) => {
                let freed_bytes = self.far.remove_checkpoint(*step, None)?;
                // What is left there is nobody's any more, and goes after the grace period; a
                // manifest that another rank put there since is taken back by that one.
                self.view.note(self.far.as_ref(), *step);
                self.view.forget_file(*step, MANIFEST_FILE);
                Ok(freed_bytes)
            }
            Removal::Attempt(step, attempt) => {
                let freed_bytes = self.far.remove_checkpoint(*step, Some(*attempt))?;
                self.lock().published.remove(step);
                Ok(freed_bytes)
            }
            Removal::Orphan(step, file) => Ok(self.far.remove_orphan(*step, file)?.unwrap_or(0)),
        }
    }

    /// Waits until everything is done, or failed once more.
    pub(super) fn drain(&self) {
        let mut queue = self.lock();
        queue.draining = Some(self.environment.monotonic());
        self.changed.notify_all();
        let queue = self.changed.wait_while(queue, |queue| !queue.is_done());
        queue.unwrap_or_else(PoisonError::into_inner).draining = None;
    }

    fn stop(&self) {
        let mut queue = self.lock();
        queue.stopped = true;
        if let Some((_, cancelled)) = &queue.current {
            cancelled.store(true, Ordering::Relaxed);
        }
        drop(queue);
        self.changed.notify_all();
    }

    fn run(&self) {
        let (mut pause, mut look) = (PAUSES.0, LOOKS.0);
        while self.waits_for_work() {
            let removed = self.removes_what_waits();
            let uploaded = self.uploads_the_next();
            let waits_for_others = self.publishes_what_is_whole();
            if removed && uploaded {
                pause = PAUSES.0;
                look = if waits_for_others { self.wait_for_others(look) } else { LOOKS.0 };
            } else {
                self.sleep(pause, |queue| queue.draining.is_some());
                pause = (pause * 2).min(PAUSES.1);
            }
        }
    }

    /// Pauses before the next look at what other ranks have brought; gives the pause after it.
    fn wait_for_others(&self, look: Duration) -> Duration {
        let queue = self.lock();
        let (is_draining, is_idle) = (queue.draining.is_some(), queue.is_idle());
        drop(queue);
        if !is_idle {
            return LOOKS.0;
        }
        let pause = if is_draining { LOOKS.0 } else { look };
        self.sleep(pause, |queue| !queue.is_idle() || queue.draining.is_some() != is_draining);
        (look * 2).min(LOOKS.1)
    }

    /// True when there is something to do; false when the store is closed.
    fn waits_for_work(&self) -> bool {
        let idle =
            |queue: &mut Queue| queue.is_idle() && queue.brought.is_empty() && !queue.stopped;
        let queue = self.changed.wait_while(self.lock(), idle);
        !queue.unwrap_or_else(PoisonError::into_inner).stopped
    }

    /// False if something is left to be tried again.
    fn removes_what_waits(&self) -> bool {
        let Err(error) = self.remove_now() else { return true };
        let mut queue = self.lock();
        let left = queue.removals.len();
        let tries_again = error.is_retryable() && queue.draining.is_none();
        if !tries_again {
            // The next writer's retention finds them in the listing.
            queue.removals.clear();
        }
        drop(queue);
        self.changed.notify_all();
        tracing::warn!(%error, left, tries_again, "removing from the far store failed");
        !tries_again
    }

    /// False if it failed and is tried again.
    fn uploads_the_next(&self) -> bool {
        let Some((step, cancelled)) = self.next() else { return true };
        let pacer = Pacer::new(self, &cancelled);
        let (near, far) = (self.near.as_ref(), self.far.as_ref());
        let outcome = match self.share {
            None => transfer(near, far, step, Overwrite::Yes, &self.environment, &pacer),
            Some(share) => transfer_share(near, far, (step, share), &self.environment, &pacer),
        };
        if outcome.is_ok() && self.share.is_none() {
            self.view.note(near, step);
        }
        !self.book(step, &cancelled, outcome)
    }

    /// Publishes steps of which every rank has brought its shard. True if some still lack one.
    fn publishes_what_is_whole(&self) -> bool {
        let brought: Vec<u64> = self.lock().brought.keys().copied().collect();
        for step in brought {
            let mut queue = self.lock();
            if queue.stopped || !queue.brought.contains_key(&step) {
                continue;
            }
            // Whoever cancels it waits for this.
            let cancelled = Arc::new(AtomicBool::new(false));
            queue.current = Some((step, Arc::clone(&cancelled)));
            drop(queue);
            let published = publish_whole(self.near.as_ref(), self.far.as_ref(), step);
            if matches!(published, Ok(Brought::All)) && !cancelled.load(Ordering::Relaxed) {
                self.view.note(self.far.as_ref(), step);
            }
            self.book_whole(step, published);
        }
        !self.lock().brought.is_empty()
    }

    /// Notes what came of waiting for the other ranks.
    fn book_whole(&self, step: u64, published: Result<Brought>) {
        // What is older than one that is whole is waited for no more: a rank was lost with it, or
        // it has been there, and retention took it.
        let newest = self.arrived().last().copied();
        let mut queue = self.lock();
        queue.current = None;
        if matches!(published, Ok(Brought::All) | Err(_)) {
            queue.published.insert(step);
        }
        let is_late =
            queue.draining.is_some_and(|since| elapsed(&*self.environment, since) >= FAREWELL);
        let is_past = newest.is_some_and(|newest| step < newest) || is_late;
        let outcome = match published {
            Ok(Brought::All) => Some(Ok(())),
            Ok(_) if is_past => Some(Err(self.lacks_others(step))),
            Ok(Brought::Some) => None,
            Ok(Brought::Nothing) => {
                // It is brought once more.
                if queue.brought.remove(&step).is_some() {
                    queue.waiting.insert(step);
                }
                None
            }
            Err(error) if error.is_retryable() && queue.draining.is_none() => None,
            Err(error) => Some(Err(error)),
        };
        if let Some(outcome) = outcome
            // It may have been cancelled meanwhile.
            && let Some(transferred) = queue.brought.remove(&step)
        {
            if let Err(error) = &outcome {
                tracing::warn!(step, %error, "not every rank's shard is in the far store");
            }
            queue.outcomes.insert(step, outcome.map(|()| transferred));
        }
        drop(queue);
        self.changed.notify_all();
    }

    /// Steps that are whole in the far store, ascending.
    pub(super) fn arrived(&self) -> Vec<u64> {
        let mut complete = self.view.committed();
        let queue = self.lock();
        complete.retain(|step| !queue.is_waiting(*step));
        complete
    }

    fn lacks_others(&self, step: u64) -> EngineError {
        EngineError::Closed {
            what: format!(
                "waiting for all ranks to bring step {step} to `{}`",
                self.far.location()
            ),
            why: "this rank's shard is there, and those of others are not yet".into(),
            hint: "the rank that brings the last one publishes it; if a rank was lost, what its \
                   store holds is uploaded when it is opened for writing again; a newer step that \
                   is whole there takes its place"
                .into(),
        }
    }

    /// The next step to upload.
    fn next(&self) -> Option<(u64, Arc<AtomicBool>)> {
        let mut queue = self.lock();
        if queue.stopped {
            return None;
        }
        let step = queue.waiting.pop_first()?;
        let cancelled = Arc::new(AtomicBool::new(false));
        queue.current = Some((step, Arc::clone(&cancelled)));
        Some((step, cancelled))
    }

    /// Notes what came of an upload; true if it is tried again.
    fn book(&self, step: u64, cancelled: &AtomicBool, outcome: Result<Transferred>) -> bool {
        let mut queue = self.lock();
        queue.current = None;
        let was_cancelled = cancelled.load(Ordering::Relaxed);
        let tries_again = match &outcome {
            Ok(_) => false,
            Err(error) => error.is_retryable() && queue.draining.is_none() && !was_cancelled,
        };
        if let Err(error) = &outcome {
            tracing::warn!(step, %error, tries_again, "an upload failed");
        }
        match outcome {
            _ if tries_again => drop(queue.waiting.insert(step)),
            _ if was_cancelled => {}
            Ok(transferred) if self.share.is_some() => {
                queue.brought.insert(step, transferred);
            }
            outcome => drop(queue.outcomes.insert(step, outcome)),
        }
        drop(queue);
        self.changed.notify_all();
        tries_again
    }

    /// Sleeps unless, or until, it is time to hurry.
    fn sleep(&self, pause: Duration, hurries: impl Fn(&Queue) -> bool) {
        let calm = |queue: &mut Queue| !queue.stopped && !hurries(queue);
        drop(self.changed.wait_timeout_while(self.lock(), pause, calm));
    }
}

/// Keeps an upload to its rate, and ends it when it is not wanted any more.
struct Pacer<'a> {
    work: &'a Work,
    cancelled: &'a AtomicBool,
    start: Duration,
    bytes: AtomicU64,
}

impl<'a> Pacer<'a> {
    fn new(work: &'a Work, cancelled: &'a AtomicBool) -> Self {
        let start = work.environment.monotonic();
        Self { work, cancelled, start, bytes: AtomicU64::new(0) }
    }
}

impl VerifyObserver for Pacer<'_> {
    #[expect(clippy::cast_precision_loss, reason = "a pause")]
    fn advanced(&self, stored_bytes: u64) {
        let bytes = self.bytes.fetch_add(stored_bytes, Ordering::Relaxed) + stored_bytes;
        let Some(rate) = self.work.bytes_per_second else { return };
        let due = Duration::from_secs_f64(bytes as f64 / rate.max(1) as f64);
        let early = due.saturating_sub(elapsed(&*self.work.environment, self.start));
        if !early.is_zero() {
            self.work.sleep(early, |_| self.is_cancelled());
        }
    }

    fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed)
    }
}
