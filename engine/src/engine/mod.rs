//! The public verbs: open, save, load, list, verify, delete, clean up.
//!
//! Always holds:
//! - Opening deletes nothing. A writing engine holds the store's lock for its life; a read-only one
//!   creates, writes and locks nothing.
//! - One save is in flight; the next one waits for it. An error that nobody looked at is raised by
//!   the next call that can raise it.
//! - A process forked from the one that opened the engine gets [`EngineError::Closed`] from every
//!   verb, and dropping the engine there touches nothing of the parent's.

use std::mem::ManuallyDrop;
use std::sync::{Arc, Mutex, MutexGuard, RwLock, Weak};
use std::time::Duration;

use crate::clock::{Environment, elapsed};
use crate::config::Config;
use crate::io::Io;
use crate::io::buffer::{BufferPool, Slab};
use crate::io::pin::Pin;
use crate::load::{VerifyObserver, read_manifest};
use crate::ranks::{Agreed, Hindrance};
use crate::recovery::check_copy;
use crate::save::capture::Until;
use crate::save::commit::Committer;
use crate::save::encode::Workers;
use crate::save::{SaveHandle, SaveRequest};
use crate::store::{PendingUpload, Store, Uploads};
use crate::store_copy::{Between, Overwrite, Transferred, transfer};
use crate::sync::unpoisoned;
use crate::{EngineError, Result};

mod agreed;
mod arena;
mod clean;
mod core;
mod memory;
mod opening;
mod prune;
mod reading;
mod save;
mod survey;

pub use clean::{GcItem, GcOptions, GcReport};
pub(crate) use core::Core;

/// One store as one process sees it.
///
/// ```
/// use dtr_engine::save::{SaveRequest, StorageInput};
/// use dtr_engine::format::{layout::ElementType, tree::{Node, Value}};
/// use dtr_engine::{Config, Engine};
///
/// # fn main() -> dtr_engine::Result<()> {
/// let directory = tempfile::tempdir().expect("a scratch directory");
/// let engine = Engine::open(Config::new(directory.path()))?;
/// let weights = vec![7_u8; 1 << 20];
/// let handle = engine.save(SaveRequest {
///     step: 1000,
///     rewind: false,
///     nodes: vec![Node { key: None, value: Value::None }],
///     tensors: vec![],
///     storages: vec![StorageInput {
///         bytes: 1 << 20,
///         element: ElementType::Bytes,
///         source: &weights,
///     }],
///     replicated: vec![],
///     waited: Default::default(),
///     prepared: Default::default(),
///     metadata: Default::default(),
///     dataset_positions: Default::default(),
/// })?; // the weights may change from here on
/// let info = handle.result(None).expect("no time limit was set")?; // durable, or an error
/// assert_eq!((info.step, engine.steps()?), (1000, vec![1000]));
/// # Ok(())
/// # }
/// ```
///
/// # Errors
///
/// Of what every verb may answer: [`EngineError::Closed`] after [`Engine::close`] and in a forked
/// child; where it writes, [`EngineError::InvalidArgument`] if the engine was opened read-only;
/// where it asks the store, what that says: [`EngineError::Io`] of a directory, and
/// [`EngineError::Unavailable`] of S3, or [`EngineError::NotFound`] where the bucket is gone. What
/// a verb adds is said there.
#[derive(Debug)]
pub struct Engine {
    config: Config,
    pid: u32,
    io_name: &'static str,
    /// Reachable without a lock, for a forked child.
    store: Weak<dyn Store>,
    inner: ManuallyDrop<RwLock<Option<Arc<Inner>>>>,
}

/// What closing takes down: in this order, so that each part outlives those that use it.
#[derive(Debug)]
struct Inner {
    committer: Option<Committer>,
    workers: Option<Workers>,
    /// Held by a caller for as long as its snapshot takes.
    saving: Mutex<Saving>,
    /// The save in flight, or the one before; held for a moment only.
    last: Mutex<Option<SaveHandle>>,
    core: Arc<Core>,
}

/// What one save leaves for the next.
#[derive(Debug, Default)]
struct Saving {
    arena: Option<Arc<BufferPool>>,
    /// Registers the arena with a device's driver.
    pin: Option<Arc<dyn Pin>>,
    plan: Option<save::CachedPlan>,
}

/// Parts that are injected rather than configured.
#[derive(Clone, Debug)]
pub struct Components {
    /// The way to the device.
    pub io: Arc<dyn Io>,
    /// Clocks and randomness.
    pub environment: Arc<dyn Environment>,
}

impl Engine {
    /// The settings it was opened with.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The way to the device that was chosen: `uring` or `threads`; `s3` where it is no device.
    pub fn io_backend(&self) -> &'static str {
        self.io_name
    }

    /// Takes a snapshot of the request's storages and returns; the checkpoint is written behind.
    /// Waits for a save in flight first. Raises the error of an earlier save that nobody looked at.
    ///
    /// # Errors
    ///
    /// What an earlier save failed with that nobody looked at. [`EngineError::StepConflict`] where
    /// the step is not after the newest and nothing says `rewind`;
    /// [`EngineError::UnsupportedFormat`] where a checkpoint would have to go that a newer version
    /// wrote; [`EngineError::InvalidArgument`] where the state, what is attached to it, or what is
    /// named as replicated cannot be saved; [`EngineError::NoSpace`] where the store has too
    /// little; [`EngineError::Io`] where there is no memory for the arena;
    /// [`EngineError::Internal`] after a save that panicked. Whatever fails while the caller waits,
    /// its own [storages](crate::save::StorageSource::read) included. What fails later is the
    /// handle's to say.
    pub fn save(&self, request: SaveRequest<'_>) -> Result<SaveHandle> {
        self.save_until(request, Until::Landed)
    }

    /// [`Engine::save`], but copies from devices go on behind the caller: what they read stays
    /// valid and unchanged until [`SaveHandle::wait_captured`], also if the save fails.
    ///
    /// # Errors
    ///
    /// Those of [`Engine::save`]; of copies from devices, what fails later is the handle's to say.
    pub fn save_behind(&self, request: SaveRequest<'_>) -> Result<SaveHandle> {
        self.save_until(request, Until::Begun)
    }

    fn save_until(&self, request: SaveRequest<'_>, until: Until) -> Result<SaveHandle> {
        let what = format!("saving step {}", request.step);
        let inner = self.writer(&what)?;
        let decline = |error: &EngineError| inner.core.decline(request.step, &error.without_hint());
        inner.core.check_healthy(&what).inspect_err(decline)?;
        inner.save(request, until)
    }

    /// Has the staging arena registered with a device's driver, as it is and as it will be. Where
    /// that is refused, copies from devices are slow, which is logged.
    ///
    /// # Errors
    ///
    /// [`EngineError::Closed`], [`EngineError::InvalidArgument`], as of every verb that writes.
    pub fn pin_staging(&self, pin: &Arc<dyn Pin>) -> Result<()> {
        self.writer("pinning the staging arena")?.pin(pin);
        Ok(())
    }

    /// Allocates and populates the staging arena for a state of `raw_bytes`, ahead of the first
    /// save, whose stall then is that of any other.
    ///
    /// # Errors
    ///
    /// [`EngineError::Io`] where there is no memory for the arena.
    pub fn prewarm(&self, raw_bytes: u64) -> Result<()> {
        self.writer("prewarming the staging arena")?.prewarm(raw_bytes)
    }

    /// Takes over the staging arena of an engine that is about to be closed, so that the first save
    /// here finds its memory there: for callers that save to one store after the other. Nothing
    /// happens where this engine has an arena, the other one has none that would do here, or a save
    /// is in flight.
    ///
    /// # Errors
    ///
    /// [`EngineError::Closed`], [`EngineError::InvalidArgument`], as of every verb that writes.
    pub fn take_staging_of(&self, other: &Self) -> Result<()> {
        let what = "taking over a staging arena";
        self.writer(what)?.take_arena_of(&*other.writer(what)?);
        Ok(())
    }

    /// Lends the staging arena to a caller that has to hold so many bytes of a checkpoint for a
    /// moment: memory that exists already costs no page faults, and the next save uses it.
    ///
    /// The arena as it is, or, with `grows_to`, as it will be for a state of so many raw bytes.
    /// `None` where that is too small for `bytes`, a save is in flight, or the engine cannot save.
    /// A save that begins before the memory comes back takes an arena of its own.
    ///
    /// # Errors
    ///
    /// [`EngineError::Io`] where there is no memory for an arena that has to grow.
    pub fn lend_staging(&self, bytes: u64, grows_to: Option<u64>) -> Result<Option<Slab>> {
        if self.config.read_only {
            return Ok(None);
        }
        self.writer("lending the staging arena")?.lend(bytes, grows_to)
    }

    /// What came of uploading a step to the remote store, or `None` if it has not ended within
    /// `timeout` or there is no remote store. An error is of that upload; the checkpoint in the
    /// local store stands.
    ///
    /// # Errors
    ///
    /// [`EngineError::Closed`]; the inner error is the upload's.
    pub fn uploaded(
        &self,
        step: u64,
        timeout: Option<Duration>,
    ) -> Result<Option<Result<Transferred>>> {
        let inner = self.inner(&format!("waiting for the upload of step {step}"))?;
        Ok(inner.core.store.uploads().and_then(|uploads| uploads.wait_for(step, timeout)))
    }

    /// Copies a checkpoint to another store, byte for byte and with its attempt; every byte is
    /// checked on its way. If it exists already, only what is missing is copied. Parts of an
    /// upload that was interrupted are not sent again. A save to the destination that another
    /// thread begins in the meantime waits.
    ///
    /// What was discarded there when training went back cannot be copied there.
    ///
    /// # Errors
    ///
    /// What an earlier save to the destination failed with that nobody looked at.
    /// [`EngineError::NotFound`] where the step does not exist here; [`EngineError::StepConflict`]
    /// where it was discarded there, or what exists there is not to be overwritten;
    /// [`EngineError::Corrupt`], [`EngineError::UnsupportedFormat`] of what is to be copied;
    /// [`EngineError::NoSpace`] of the destination; [`EngineError::Unavailable`] where a shard that
    /// existed was deleted meanwhile; [`EngineError::Closed`] where the observer cancels it.
    pub fn copy_to(
        &self,
        destination: &Self,
        step: u64,
        overwrite: Overwrite,
        observer: &dyn VerifyObserver,
    ) -> Result<Transferred> {
        let what = format!("copying step {step}");
        let (from, to) = (self.inner(&what)?, destination.writer(&what)?);
        // The destination's alone: two engines that copy to each other do not wait for each other.
        let _turn = to.turn();
        to.wait_for_last(None)?;
        from.check_exists(step)?;
        let (source, target) = (from.core.store.as_ref(), to.core.store.as_ref());
        check_copy(&to.core.known_survey()?, &read_manifest(source, step)?, overwrite)?;
        let environment = &to.core.environment;
        let between = Between { source, destination: target, environment, observer };
        let copied = transfer(&between, step, overwrite);
        // Of many that exist already, the first has the store listed, and no other.
        if !copied.as_ref().is_ok_and(|copied| copied.was_there) {
            to.core.note_saved(step);
        }
        Ok(copied?)
    }

    /// Deletes a checkpoint, manifest first. Returns the bytes freed. A save that another thread
    /// begins waits.
    ///
    /// # Errors
    ///
    /// What an earlier save failed with that nobody looked at. [`EngineError::NotFound`] where the
    /// step does not exist; [`EngineError::UnsupportedFormat`] where a newer version wrote it.
    pub fn delete(&self, step: u64) -> Result<u64> {
        let inner = self.writer(&format!("deleting step {step}"))?;
        let _turn = inner.turn();
        inner.wait_for_last(None)?;
        inner.core.delete(step)
    }

    /// Deletes what no checkpoint needs: files of abandoned attempts whose lock is free and which
    /// are older than the grace period, and retired checkpoints. A save that another thread begins
    /// waits.
    ///
    /// # Errors
    ///
    /// What an earlier save failed with that nobody looked at. A dry run is no verb that writes.
    pub fn gc(&self, options: GcOptions) -> Result<GcReport> {
        let what = "cleaning up";
        let inner = if options.dry_run { self.inner(what)? } else { self.writer(what)? };
        let _turn = (!options.dry_run).then(|| inner.turn());
        inner.wait_for_last(None)?;
        inner.core.gc(options)
    }

    /// Keeps a step from retention: the one that the training was restored from.
    ///
    /// # Errors
    ///
    /// [`EngineError::Closed`].
    pub fn protect(&self, step: u64) -> Result<()> {
        self.inner("protecting a step")?.core.protect(step);
        Ok(())
    }

    /// Reports to the other ranks that this one does not save `step`: their saves of it fail, with
    /// this reason, instead of waiting for it. Does nothing where one rank saves.
    ///
    /// # Errors
    ///
    /// [`EngineError::Closed`]; that the others could not be told is logged.
    pub fn decline(&self, step: u64, reason: &str) -> Result<()> {
        self.inner(&format!("giving up the save of step {step}"))?.core.decline(step, reason);
        Ok(())
    }

    /// Waits, at most `timeout`, until every rank has said which steps it can load, and what keeps
    /// it from others; gives the newest that all can. Where one rank saves, its own newest.
    ///
    /// # Errors
    ///
    /// [`EngineError::Coordination`] where the ranks did not come together in time, or the
    /// coordinator cannot be asked or refuses; [`EngineError::InvalidArgument`] where it does not
    /// know what is asked of it.
    pub fn agree(
        &self,
        steps: &[u64],
        hindrance: Hindrance<'_>,
        timeout: Duration,
    ) -> Result<Agreed> {
        let what = "agreeing with all ranks on the step to load";
        let inner = self.inner(what)?;
        let Some(ranks) = inner.core.ranks.clone() else {
            let newest = steps.iter().max().copied();
            return Ok(newest.map_or(Agreed::Nothing { offering: 0 }, Agreed::Step));
        };
        // Who gives up has nothing to offer, and may not even reach the store.
        let offered = match hindrance {
            Hindrance::GivesUp(_) => Vec::new(),
            Hindrance::None | Hindrance::Damage(_) => {
                inner.core.offers(steps).inspect_err(|error| {
                    let why = error.to_string();
                    let _told = ranks.agree(&[], Hindrance::GivesUp(&why), timeout);
                })?
            }
        };
        // Nothing keeps the engine from being closed by a caller that waits no more.
        drop(inner);
        let agreed = ranks.agree(&offered, hindrance, timeout)?;
        // Without a common step, what a rank has may yet become whole: it is on its way, or its
        // machine comes back.
        let step = if let Agreed::Step(step) = agreed { Some(step) } else { None };
        self.inner(what)?.core.note_agreed(step);
        Ok(agreed)
    }

    /// Waits for the save in flight, at most `timeout`; true if none is left. Raises the error of a
    /// save that nobody looked at.
    ///
    /// # Errors
    ///
    /// What the save failed with, if nobody looked at it before.
    pub fn wait_until_finished(&self, timeout: Option<Duration>) -> Result<bool> {
        self.inner("waiting for the save in flight")?.wait_for_last(timeout)
    }

    /// Checkpoints that are not in the remote store yet, by ascending step. None without a remote
    /// store.
    ///
    /// # Errors
    ///
    /// [`EngineError::Closed`].
    pub fn pending_uploads(&self) -> Result<Vec<PendingUpload>> {
        let inner = self.inner("listing pending uploads")?;
        Ok(inner.core.store.uploads().map(Uploads::pending).unwrap_or_default())
    }

    /// Begins no upload any more, and ends what is under way: the next writer goes on with it.
    ///
    /// # Errors
    ///
    /// [`EngineError::Closed`].
    pub fn leave_uploads(&self) -> Result<()> {
        let inner = self.inner("leaving uploads")?;
        if let Some(uploads) = inner.core.store.uploads() {
            uploads.stop();
        }
        Ok(())
    }

    /// Waits, at most `timeout`, until every checkpoint was uploaded to the remote store, or has
    /// failed once more; true if so. From the first call on nothing is tried more than once, until
    /// one has seen the end.
    ///
    /// # Errors
    ///
    /// [`EngineError::Closed`]; [`Engine::uploaded`] returns what an upload failed with.
    pub fn drain(&self, timeout: Option<Duration>) -> Result<bool> {
        let inner = self.inner("waiting for uploads")?;
        let environment = &*inner.core.environment;
        let start = environment.monotonic();
        if inner.last().is_some_and(|last| !last.wait(timeout)) {
            return Ok(false);
        }
        let left = timeout.map(|timeout| timeout.saturating_sub(elapsed(environment, start)));
        Ok(inner.core.store.uploads().is_none_or(|uploads| uploads.drain(left)))
    }

    /// Finishes the save in flight and the uploads, each of which is tried once more at most; then
    /// releases threads, memory and the store's lock. Raises the error of a save that nobody
    /// looked at, else that of the newest upload which has failed, now or before, and is of a
    /// checkpoint that is still here. Closing twice is fine.
    ///
    /// # Errors
    ///
    /// What a save failed with that nobody looked at, else what came of the newest upload that has
    /// failed. The engine is closed all the same.
    pub fn close(&self) -> Result<()> {
        if self.is_forked() {
            return Ok(());
        }
        let inner = unpoisoned(self.inner.write()).take();
        let Some(inner) = inner else { return Ok(()) };
        let ended = inner.wait_for_last(None).map(|_| ());
        let Some(uploads) = inner.core.store.uploads() else { return ended };
        uploads.drain(None);
        // No later commit deletes what waited for its upload.
        if uploads.pending().is_empty() && inner.core.prune_again() {
            uploads.drain(None);
        }
        ended.and(uploads.failed().map_or(Ok(()), Err))
    }

    /// In a forked child: closes the descriptors that hold the parent's locks alive. Takes no lock
    /// of its own, so it may run right after `fork`.
    pub fn close_after_fork(&self) {
        if let Some(store) = self.store.upgrade().filter(|_| self.is_forked()) {
            store.close_after_fork();
            // Whether this is the last reference is the parent's business.
            std::mem::forget(store);
        }
    }

    fn is_forked(&self) -> bool {
        std::process::id() != self.pid
    }

    fn inner(&self, what: &str) -> Result<Arc<Inner>> {
        if self.is_forked() {
            return Err(EngineError::forked(what, self.config.path.display(), self.pid));
        }
        let inner = unpoisoned(self.inner.read());
        inner.clone().ok_or_else(|| EngineError::Closed {
            what: what.into(),
            why: "the store was closed".into(),
            hint: "open it again".into(),
        })
    }

    fn writer(&self, what: &str) -> Result<Arc<Inner>> {
        if self.config.read_only {
            return Err(EngineError::read_only(what, self.config.path.display()));
        }
        self.inner(what)
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        if self.is_forked() {
            // Threads do not survive a fork, and locks and memory are the parent's.
            return;
        }
        // What is left in the lock is `None`, which needs no drop.
        drop(unpoisoned(self.inner.write()).take());
    }
}

impl Inner {
    /// While this is held, no save begins. What is deleted by its step must stay what was looked
    /// at: a save could take its place.
    fn turn(&self) -> MutexGuard<'_, Saving> {
        unpoisoned(self.saving.lock())
    }

    fn last(&self) -> Option<SaveHandle> {
        unpoisoned(self.last.lock()).clone()
    }

    /// [`Core::check_exists`], which says so where the save of the step has not ended.
    fn check_exists(&self, step: u64) -> Result<()> {
        let is_in_flight = |last: &SaveHandle| last.step() == step && !last.is_done();
        let in_flight = self.last().filter(is_in_flight);
        self.core.check_exists(step).map_err(|error| match error {
            EngineError::NotFound { what, .. } if in_flight.is_some() => EngineError::NotFound {
                what,
                why: "its save has not ended".into(),
                hint: "wait for it first: `handle.result()`, or `wait_until_finished()`".into(),
            },
            error => error,
        })
    }

    /// Waits for the save in flight; true if it has ended. Raises its error if nobody has seen it.
    fn wait_for_last(&self, timeout: Option<Duration>) -> Result<bool> {
        let Some(last) = self.last() else { return Ok(true) };
        if !last.wait(timeout) {
            return Ok(false);
        }
        last.take_unseen_error().map_or(Ok(true), Err)
    }
}
