//! Two stores as one: checkpoints are committed to the near one and brought to the far one behind
//! the training.
//!
//! ```text
//! save --> near store, committed --> resolves
//!               |
//!               +--> queue --> uploader, one thread --> far store, committed --> uploaded
//! load <-- near store, else far store
//! ```
//!
//! Always holds:
//! - The near store decides: what it committed exists; the far one has copies, byte for byte, each
//!   of them whole or not there.
//! - A checkpoint that waits for its upload is told to retention, which leaves it alone.
//! - What was not uploaded when the process ended is uploaded by the next writer; parts that
//!   arrived are not sent again.
//! - A far store that cannot be reached holds up nothing but uploads: they are tried again until
//!   the store is closed.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime};

use super::flow::Flow;
use super::{
    FileListing, Publication, ShardId, ShardSink, ShardSize, ShardSource, StepListing, Store,
    UnfinishedUpload,
};
use crate::clock::{Environment, elapsed};
use crate::error::IoContext;
use crate::format::manifest::Manifest;
use crate::format::names::MANIFEST_FILE;
use crate::load::VerifyObserver;
use crate::transfer::{Overwrite, Transferred, transfer};
use crate::{EngineError, Result};

/// First and longest pause before an upload is tried again.
const PAUSES: (Duration, Duration) = (Duration::from_secs(1), Duration::from_mins(1));

/// A near store and a far one.
pub struct TieredStore {
    near: Arc<dyn Store>,
    far: Arc<dyn Store>,
    /// Of a writer.
    uploader: Option<Uploader>,
}

impl TieredStore {
    /// For reading both.
    pub fn reader(near: Arc<dyn Store>, far: Arc<dyn Store>) -> Self {
        Self { near, far, uploader: None }
    }

    /// For writing: starts the uploader, with what earlier processes left to do.
    pub fn writer(
        near: Arc<dyn Store>,
        far: Arc<dyn Store>,
        environment: Arc<dyn Environment>,
        bytes_per_second: Option<u64>,
    ) -> Result<Self> {
        let waiting = not_uploaded(near.as_ref(), far.as_ref())?;
        let work = Arc::new(Work {
            near: Arc::clone(&near),
            far: Arc::clone(&far),
            environment,
            bytes_per_second,
            queue: Mutex::new(Queue { waiting, ..Queue::default() }),
            changed: Condvar::new(),
        });
        Ok(Self { near, far, uploader: Some(Uploader::start(work)?) })
    }

    fn uploads(&self) -> Option<&Work> {
        self.uploader.as_ref().map(|uploader| uploader.work.as_ref())
    }
}

impl fmt::Debug for TieredStore {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("TieredStore")
            .field("near", &self.near.location())
            .field("far", &self.far.location())
            .finish_non_exhaustive()
    }
}

/// Steps that the near store committed and the far one does not have as they are.
fn not_uploaded(near: &dyn Store, far: &dyn Store) -> Result<BTreeSet<u64>> {
    let there = attempts(far)?;
    let here = attempts(near)?;
    let differs = |step: &u64| here.get(step) != there.get(step);
    Ok(here.keys().copied().filter(differs).collect())
}

/// The attempt of every checkpoint that can be read.
fn attempts(store: &dyn Store) -> Result<BTreeMap<u64, String>> {
    let has_manifest =
        |step: &StepListing| step.files.iter().any(|file| file.name == MANIFEST_FILE);
    let listing = store.list()?;
    let steps: Vec<u64> =
        listing.iter().filter(|step| has_manifest(step)).map(|step| step.step).collect();
    let mut attempts = BTreeMap::new();
    for (step, manifest) in steps.iter().zip(store.read_manifests(&steps)) {
        let manifest = manifest?.and_then(|bytes| Manifest::decode(&bytes).ok());
        attempts.extend(manifest.map(|manifest| (*step, manifest.attempt)));
    }
    Ok(attempts)
}

impl Store for TieredStore {
    fn location(&self) -> String {
        self.near.location()
    }

    fn list(&self) -> Result<Vec<StepListing>> {
        let mut steps: BTreeMap<u64, BTreeMap<String, FileListing>> = BTreeMap::new();
        // Of what is in both, the near one's counts.
        for step in self.far.list()?.into_iter().chain(self.near.list()?) {
            let files = steps.entry(step.step).or_default();
            files.extend(step.files.into_iter().map(|file| (file.name.clone(), file)));
        }
        let listing = |(step, files): (u64, BTreeMap<String, FileListing>)| StepListing {
            step,
            files: files.into_values().collect(),
        };
        Ok(steps.into_iter().map(listing).collect())
    }

    fn read_manifest(&self, step: u64) -> Result<Option<Vec<u8>>> {
        match self.near.read_manifest(step)? {
            Some(manifest) => Ok(Some(manifest)),
            None => self.far.read_manifest(step),
        }
    }

    fn read_manifests(&self, steps: &[u64]) -> Vec<Result<Option<Vec<u8>>>> {
        let mut read = self.near.read_manifests(steps);
        let is_missing = |place: &usize| matches!(read.get(*place), Some(Ok(None)));
        let missing: Vec<usize> = (0..steps.len()).filter(is_missing).collect();
        let asked: Vec<u64> = missing.iter().map(|place| steps[*place]).collect();
        for (place, manifest) in missing.into_iter().zip(self.far.read_manifests(&asked)) {
            read[place] = manifest;
        }
        read
    }

    fn create_shard(
        &self,
        shard: ShardId,
        size: ShardSize,
        flow: &Arc<Flow>,
    ) -> Result<Box<dyn ShardSink>> {
        self.near.create_shard(shard, size, flow)
    }

    fn open_shard(&self, shard: ShardId) -> Result<Box<dyn ShardSource>> {
        match self.near.open_shard(shard) {
            Err(EngineError::NotFound { .. }) => self.far.open_shard(shard),
            opened => opened,
        }
    }

    fn publish(&self, publication: Publication<'_>) -> Result<()> {
        self.near.publish(publication)?;
        if let Some(uploads) = self.uploads() {
            uploads.add(publication.step);
        }
        Ok(())
    }

    fn remove_checkpoint(&self, step: u64) -> Result<u64> {
        if let Some(uploads) = self.uploads() {
            uploads.forget(step);
        }
        let freed_bytes = self.near.remove_checkpoint(step)?;
        Ok(freed_bytes + self.far.remove_checkpoint(step)?)
    }

    fn remove_orphan(&self, step: u64, file: &str) -> Result<Option<u64>> {
        let Some(near) = self.near.remove_orphan(step, file)? else { return Ok(None) };
        // There it may be part of the checkpoint that the next upload replaces.
        Ok(Some(near + self.far.remove_orphan(step, file)?.unwrap_or(0)))
    }

    fn unfinished_uploads(&self) -> Result<Vec<UnfinishedUpload>> {
        self.far.unfinished_uploads()
    }

    fn abort_upload(&self, upload: &UnfinishedUpload) -> Result<bool> {
        if self.uploads().is_some_and(|uploads| uploads.is_waiting(upload.step)) {
            return Ok(false);
        }
        self.far.abort_upload(upload)
    }

    fn may_remove(&self, step: u64) -> bool {
        !self.uploads().is_some_and(|uploads| uploads.is_waiting(step))
    }

    fn uploaded(&self, step: u64, timeout: Option<Duration>) -> Option<Result<Transferred>> {
        self.uploads()?.wait_for(step, timeout)
    }

    fn drain(&self) {
        if let Some(uploads) = self.uploads() {
            uploads.drain();
        }
    }

    fn free_bytes(&self) -> Result<Option<u64>> {
        self.near.free_bytes()
    }

    fn close_after_fork(&self) {
        self.near.close_after_fork();
        self.far.close_after_fork();
    }

    fn now(&self) -> Result<SystemTime> {
        self.near.now()
    }
}

/// The thread that uploads.
struct Uploader {
    work: Arc<Work>,
    thread: Option<JoinHandle<()>>,
    process: u32,
}

impl Uploader {
    fn start(work: Arc<Work>) -> Result<Self> {
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
struct Work {
    near: Arc<dyn Store>,
    far: Arc<dyn Store>,
    environment: Arc<dyn Environment>,
    bytes_per_second: Option<u64>,
    queue: Mutex<Queue>,
    changed: Condvar,
}

#[derive(Default)]
struct Queue {
    waiting: BTreeSet<u64>,
    current: Option<(u64, Arc<AtomicBool>)>,
    outcomes: BTreeMap<u64, Result<Transferred>>,
    /// Each upload is tried once more at most.
    draining: bool,
    stopped: bool,
}

impl Queue {
    fn is_waiting(&self, step: u64) -> bool {
        self.waiting.contains(&step) || self.current.as_ref().is_some_and(|(at, _)| *at == step)
    }
}

impl Work {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        // Every critical section is a few assignments.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, step: u64) {
        let mut queue = self.lock();
        // An upload of what this step was before is not needed any more.
        if let Some((_, cancelled)) = queue.current.as_ref().filter(|(at, _)| *at == step) {
            cancelled.store(true, Ordering::Relaxed);
        }
        queue.outcomes.remove(&step);
        queue.waiting.insert(step);
        drop(queue);
        self.changed.notify_all();
    }

    /// The step is going: nobody uploads it any more when this returns.
    fn forget(&self, step: u64) {
        let mut queue = self.lock();
        queue.waiting.remove(&step);
        while let Some((_, cancelled)) = queue.current.as_ref().filter(|(at, _)| *at == step) {
            cancelled.store(true, Ordering::Relaxed);
            self.changed.notify_all();
            queue = self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
            queue.waiting.remove(&step);
        }
        drop(queue);
        self.changed.notify_all();
    }

    fn is_waiting(&self, step: u64) -> bool {
        self.lock().is_waiting(step)
    }

    fn wait_for(&self, step: u64, timeout: Option<Duration>) -> Option<Result<Transferred>> {
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

    /// Waits until everything is uploaded, or failed once more.
    fn drain(&self) {
        let mut queue = self.lock();
        queue.draining = true;
        self.changed.notify_all();
        let busy = |queue: &mut Queue| !queue.waiting.is_empty() || queue.current.is_some();
        let queue = self.changed.wait_while(queue, busy);
        queue.unwrap_or_else(PoisonError::into_inner).draining = false;
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
        let mut pause = PAUSES.0;
        while let Some((step, cancelled)) = self.next() {
            let pacer = Pacer::new(self, &cancelled);
            let (near, far) = (self.near.as_ref(), self.far.as_ref());
            let outcome = transfer(near, far, step, Overwrite::Yes, &self.environment, &pacer);
            let tries_again = self.book(step, &cancelled, outcome);
            if tries_again {
                self.sleep(pause, |queue| queue.draining);
                pause = (pause * 2).min(PAUSES.1);
            } else {
                pause = PAUSES.0;
            }
        }
    }

    /// The next step to upload; `None` when the store is closed.
    fn next(&self) -> Option<(u64, Arc<AtomicBool>)> {
        let idle = |queue: &mut Queue| queue.waiting.is_empty() && !queue.stopped;
        let mut queue =
            self.changed.wait_while(self.lock(), idle).unwrap_or_else(PoisonError::into_inner);
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
            Err(error) => error.is_retryable() && !queue.draining && !was_cancelled,
        };
        if let Err(error) = &outcome {
            tracing::warn!(step, %error, tries_again, "an upload failed");
        }
        if tries_again {
            queue.waiting.insert(step);
        } else if !was_cancelled {
            queue.outcomes.insert(step, outcome);
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
