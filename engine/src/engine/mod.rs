//! The public verbs: open, save, load, list, verify, delete, clean up.
//!
//! Always holds:
//! - Opening deletes nothing. A writing engine holds the store's lock for its life; a read-only one
//!   creates, writes and locks nothing.
//! - One save is in flight; the next one waits for it. An error that nobody looked at is raised by
//!   the next call that can raise it.
//! - A process forked from the one that opened the engine gets [`EngineError::Closed`] from every
//!   verb, and dropping the engine there touches nothing of the parent's.

use std::collections::BTreeMap;
use std::mem::ManuallyDrop;
use std::sync::{Arc, Mutex, PoisonError, RwLock, Weak};
use std::time::Duration;

use crate::clock::{Environment, System, elapsed};
use crate::config::{BestMode, Config, S3Address, S3Credentials};
use crate::format::manifest::Manifest;
use crate::io::buffer::{BufferPool, Slab};
use crate::io::pin::Pin;
use crate::io::{Io, open_backend};
use crate::load::{
    Checkpoint, ReadOptions, VerifyObserver, VerifyReport, Whose, read_manifest, verify_step,
};
use crate::ranks::Ranks;
use crate::recovery::{StepState, Survey, check_copy};
use crate::save::capture::Until;
use crate::save::commit::Committer;
use crate::save::encode::Workers;
use crate::save::{SaveHandle, SaveRequest};
use crate::store::local::LocalStore;
#[cfg(feature = "s3")]
use crate::store::s3::S3Store;
use crate::store::tiered::TieredStore;
use crate::store::{Access, PendingUpload, Store};
use crate::transfer::{Overwrite, Transferred, transfer};
use crate::{EngineError, Result};

mod clean;
mod core;
mod memory;
mod save;

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
    /// Opens the store that `config` names, on this machine's devices and clocks.
    pub fn open(config: Config) -> Result<Self> {
        config.validate()?;
        Self::open_any(config, None, None)
    }

    /// Opens the directory that `config` names, on the given parts.
    pub fn open_with(config: Config, components: Components) -> Result<Self> {
        config.validate()?;
        check_ranks(&config, false)?;
        let Components { io, environment } = components;
        Self::open_local(config, io, None, environment, None)
    }

    /// Opens the store that `config` names, to save and load together with the other ranks of its
    /// job.
    pub fn open_among(config: Config, ranks: Arc<dyn Ranks>) -> Result<Self> {
        config.validate()?;
        Self::open_any(config, None, Some(ranks))
    }

    fn open_any(
        config: Config,
        credentials: Option<S3Credentials>,
        ranks: Option<Arc<dyn Ranks>>,
    ) -> Result<Self> {
        check_ranks(&config, ranks.is_some())?;
        let environment = Arc::new(System::default());
        if let Some(address) = config.s3_address()? {
            return Self::open_s3(config, &address, credentials, environment, ranks);
        }
        let io = open_backend(config.io_backend, config.direct_io)?;
        Self::open_local(config, io, credentials, environment, ranks)
    }

    fn open_local(
        config: Config,
        io: Arc<dyn Io>,
        credentials: Option<S3Credentials>,
        environment: Arc<dyn Environment>,
        ranks: Option<Arc<dyn Ranks>>,
    ) -> Result<Self> {
        let io_name = io.name();
        let access = access_of(&config);
        let near = LocalStore::open(&config.path, access, io, config.in_flight_bytes)?;
        let store = Self::tiered(&config, Arc::new(near), credentials, &environment)?;
        let engine = Self::open_store(config, store, environment, io_name, ranks)?;
        if engine.config.remote.is_some() && !engine.config.read_only {
            // Far manifests are read now, so that no save waits for the network.
            engine.survey()?;
        }
        Ok(engine)
    }

    /// Opens the store that `config` names, with these credentials for what of it is in S3, instead
    /// of those that the usual chain finds; together with other ranks, if they are given.
    #[cfg(feature = "s3")]
    pub fn open_as(
        config: Config,
        credentials: S3Credentials,
        ranks: Option<Arc<dyn Ranks>>,
    ) -> Result<Self> {
        config.validate()?;
        Self::open_any(config, Some(credentials), ranks)
    }

    #[cfg(feature = "s3")]
    fn open_s3(
        config: Config,
        address: &S3Address,
        credentials: Option<S3Credentials>,
        environment: Arc<dyn Environment>,
        ranks: Option<Arc<dyn Ranks>>,
    ) -> Result<Self> {
        let store = S3Store::open(address, access_of(&config), &config.s3, credentials)?;
        Self::open_store(config, Arc::new(store), environment, "s3", ranks)
    }

    #[cfg(not(feature = "s3"))]
    fn open_s3(
        _: Config,
        address: &S3Address,
        _: Option<S3Credentials>,
        _: Arc<dyn Environment>,
        _: Option<Arc<dyn Ranks>>,
    ) -> Result<Self> {
        Err(EngineError::invalid(
            format!("opening store `{address}`"),
            "this build of the engine has no S3",
            "build it with the feature `s3`, or name a directory",
        ))
    }

    /// The far store of a tier, reached with `credentials` if they are given.
    #[cfg(feature = "s3")]
    fn open_far(config: &Config, credentials: Option<S3Credentials>) -> Result<Arc<dyn Store>> {
        let address = config.remote_address()?;
        Ok(Arc::new(S3Store::open(&address, access_of(config), &config.s3, credentials)?))
    }

    #[cfg(not(feature = "s3"))]
    fn open_far(config: &Config, _: Option<S3Credentials>) -> Result<Arc<dyn Store>> {
        Err(EngineError::invalid(
            format!("opening store `{}`", config.remote_address()?),
            "this build of the engine has no S3",
            "build it with the feature `s3`, or leave `remote` unset",
        ))
    }

    /// Puts the far store behind the near one, if one is configured.
    fn tiered(
        config: &Config,
        near: Arc<dyn Store>,
        credentials: Option<S3Credentials>,
        environment: &Arc<dyn Environment>,
    ) -> Result<Arc<dyn Store>> {
        if config.remote.is_none() {
            return Ok(near);
        }
        let far = Self::open_far(config, credentials)?;
        Ok(Arc::new(match access_of(config) {
            Access::Read => TieredStore::reader(near, far)?,
            Access::Write | Access::WriteBeside { .. } => {
                let (environment, rate) = (Arc::clone(environment), config.remote_bytes_per_second);
                TieredStore::writer(near, far, environment, rate, config.own_share())?
            }
        }))
    }

    fn open_store(
        config: Config,
        store: Arc<dyn Store>,
        environment: Arc<dyn Environment>,
        io_name: &'static str,
        ranks: Option<Arc<dyn Ranks>>,
    ) -> Result<Self> {
        let core = Arc::new(Core::new(config.clone(), store, environment, io_name, ranks)?);
        let (workers, committer) = if config.read_only {
            (None, None)
        } else {
            let count = memory::worker_count(config.workers);
            let workers = Workers::start(count, &core.encode_pool, &core.environment)?;
            (Some(workers), Some(Committer::start(&core)?))
        };
        let store = Arc::downgrade(&core.store);
        let inner =
            Inner { committer, workers, saving: Mutex::default(), last: Mutex::default(), core };
        Ok(Self {
            config,
            pid: std::process::id(),
            io_name,
            store,
            inner: ManuallyDrop::new(RwLock::new(Some(Arc::new(inner)))),
        })
    }

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
    pub fn save(&self, request: SaveRequest<'_>) -> Result<SaveHandle> {
        self.save_until(request, Until::Landed)
    }

    /// [`Engine::save`], but copies from devices go on behind the caller: what they read stays
    /// valid and unchanged until [`SaveHandle::wait_captured`], also if the save fails.
    pub fn save_behind(&self, request: SaveRequest<'_>) -> Result<SaveHandle> {
        self.save_until(request, Until::Begun)
    }

    fn save_until(&self, request: SaveRequest<'_>, until: Until) -> Result<SaveHandle> {
        let what = format!("saving step {}", request.step);
        let inner = self.writer(&what)?;
        let decline = |error: &EngineError| inner.core.decline(request.step, &error.to_string());
        inner.core.check_healthy(&what).inspect_err(decline)?;
        inner.save(request, until)
    }

    /// Has the staging arena registered with a device's driver, as it is and as it will be. Where
    /// that is refused, copies from devices are slow, which is logged.
    pub fn pin_staging(&self, pin: &Arc<dyn Pin>) -> Result<()> {
        self.writer("pinning the staging arena")?.pin(pin);
        Ok(())
    }

    /// Allocates and populates the staging arena for a state of `raw_bytes`, ahead of the first
    /// save, whose stall then is that of any other.
    pub fn prewarm(&self, raw_bytes: u64) -> Result<()> {
        self.writer("prewarming the staging arena")?.prewarm(raw_bytes)
    }

    /// Lends the staging arena to whoever has to hold so many bytes of a checkpoint for a moment:
    /// memory that is there already costs no page faults, and the next save finds it there.
    ///
    /// The arena as it is, or, with `grows_to`, as it will be for a state of so many raw bytes.
    /// `None` where that is too small for `bytes`, a save is in flight, or the engine cannot save.
    /// A save that begins before the memory comes back takes an arena of its own.
    pub fn lend_staging(&self, bytes: u64, grows_to: Option<u64>) -> Result<Option<Slab>> {
        if self.config.read_only {
            return Ok(None);
        }
        self.writer("lending the staging arena")?.lend(bytes, grows_to)
    }

    /// The committed steps, ascending.
    pub fn steps(&self) -> Result<Vec<u64>> {
        Ok(self.survey()?.committed_steps())
    }

    /// Everything that lies in the store, and what it means.
    pub fn survey(&self) -> Result<Survey> {
        self.inner("listing checkpoints")?.core.survey()
    }

    /// What was attached to a committed step. No shard is opened.
    pub fn metadata(&self, step: u64) -> Result<BTreeMap<String, serde_json::Value>> {
        let inner = self.inner(&format!("reading the metadata of step {step}"))?;
        inner.core.check_exists(step)?;
        Ok(read_manifest(inner.core.store.as_ref(), step)?.metadata)
    }

    /// The committed steps whose metadata has a number called `metric`, the best first; of equal
    /// ones the newer.
    pub fn best_steps(&self, metric: &str, mode: BestMode) -> Result<Vec<u64>> {
        self.inner("comparing checkpoints")?.core.best_steps(metric, mode)
    }

    /// The manifest that lies at `step`, checked; that of a retired checkpoint too. No shard is
    /// opened.
    pub fn manifest(&self, step: u64) -> Result<Manifest> {
        let inner = self.inner(&format!("reading the manifest of step {step}"))?;
        read_manifest(inner.core.store.as_ref(), step)
    }

    /// Opens this rank's shard of a committed step: manifest, footer, header and index are read and
    /// checked, chunks are not. If another number of ranks saved it, only what they saved alike can
    /// be read ([`Checkpoint::is_replicated_only`]), and it is an error if that is nothing: what
    /// the ranks that are not there saved would be lost without a word.
    pub fn checkpoint(&self, step: u64) -> Result<Checkpoint> {
        self.open_shard(step, None)
    }

    /// [`Engine::checkpoint`] of a rank that is named, whatever the number of ranks then and now.
    pub fn checkpoint_of_rank(&self, step: u64, rank: u32) -> Result<Checkpoint> {
        self.open_shard(step, Some((rank, Whose::Asked)))
    }

    /// [`Engine::checkpoint_of_rank`], for what lies in that shard alone: no other one is opened,
    /// and storages of which it holds a part cannot be read.
    pub fn shard_of_rank(&self, step: u64, rank: u32) -> Result<Checkpoint> {
        self.open_shard(step, Some((rank, Whose::Alone)))
    }

    fn open_shard(&self, step: u64, asked: Option<(u32, Whose)>) -> Result<Checkpoint> {
        let inner = self.inner(&format!("opening step {step}"))?;
        inner.core.check_exists(step)?;
        let store = inner.core.store.as_ref();
        let open = || {
            let manifest = read_manifest(store, step)?;
            let saved = manifest.world_size;
            let Config { rank, world_size, .. } = self.config;
            let (rank, whose) = match asked {
                Some(asked) => asked,
                None if saved == world_size => (rank, Whose::Asked),
                // Any will do.
                None => (rank % saved, Whose::Another),
            };
            check_world_size(&manifest, whose, world_size)?;
            Checkpoint::open(store, manifest, rank, whose)
        };
        match open() {
            // The writer replaced or removed it under our feet: what stands there now counts.
            Err(error) if is_gone(&error) => {
                open().map_err(|error| self.judged(store, step, error))
            }
            opened => opened,
        }
    }

    /// What is gone of a checkpoint that stands is damage, unless it may lie, or be on its way,
    /// elsewhere.
    fn judged(&self, store: &dyn Store, step: u64, error: EngineError) -> EngineError {
        match error {
            EngineError::NotFound { what, why, .. }
                if self.config.own_share().is_none() && read_manifest(store, step).is_ok() =>
            {
                EngineError::Corrupt {
                    what,
                    why: format!("{why}, and the manifest of step {step} names it"),
                    hint: "restore another step, or bring the file back from a copy of the store"
                        .into(),
                }
            }
            error => error,
        }
    }

    /// Reads and checks every chunk of every shard of a step.
    pub fn verify(&self, step: u64, observer: &dyn VerifyObserver) -> Result<VerifyReport> {
        let inner = self.inner(&format!("verifying step {step}"))?;
        inner.core.check_exists(step)?;
        let options = ReadOptions { workers: self.config.workers, ..ReadOptions::default() };
        let share = self.config.own_share();
        verify_step(inner.core.store.as_ref(), step, (options, share), observer)
    }

    /// What came of bringing a step to the far store, or `None` if it has not ended within
    /// `timeout` or there is no far store. An error is of that upload; the checkpoint in the near
    /// store stands.
    pub fn uploaded(
        &self,
        step: u64,
        timeout: Option<Duration>,
    ) -> Result<Option<Result<Transferred>>> {
        let inner = self.inner(&format!("waiting for the upload of step {step}"))?;
        Ok(inner.core.store.uploaded(step, timeout))
    }

    /// Copies a checkpoint to another store, byte for byte and with its attempt; every byte is
    /// checked on its way. Of one that is there already, what is missing is brought. Of a copy that
    /// was interrupted, parts of an upload are not sent again.
    ///
    /// What ceased to exist there when the training went back cannot be copied there.
    pub fn copy_to(
        &self,
        destination: &Self,
        step: u64,
        overwrite: Overwrite,
        observer: &dyn VerifyObserver,
    ) -> Result<Transferred> {
        let what = format!("copying step {step}");
        let (from, to) = (self.inner(&what)?, destination.writer(&what)?);
        to.wait_for_last(None)?;
        from.core.check_exists(step)?;
        let (source, target) = (from.core.store.as_ref(), to.core.store.as_ref());
        check_copy(&to.core.known_survey()?, &read_manifest(source, step)?, overwrite)?;
        let copied = transfer(source, target, step, overwrite, &to.core.environment, observer);
        // Of many that are there already, the first has the store listed, and no other.
        if !copied.as_ref().is_ok_and(|copied| copied.was_there) {
            to.core.note_saved(step);
        }
        Ok(copied?)
    }

    /// Deletes a checkpoint, manifest first. Returns the bytes freed.
    pub fn delete(&self, step: u64) -> Result<u64> {
        let inner = self.writer(&format!("deleting step {step}"))?;
        inner.wait_for_last(None)?;
        inner.core.delete(step)
    }

    /// Deletes what no checkpoint needs: files of abandoned attempts whose lock is free and which
    /// are older than the grace period, and retired checkpoints.
    pub fn gc(&self, options: GcOptions) -> Result<GcReport> {
        let what = "cleaning up";
        let inner = if options.dry_run { self.inner(what)? } else { self.writer(what)? };
        inner.wait_for_last(None)?;
        inner.core.gc(options)
    }

    /// Keeps a step from retention: the one that the training was restored from.
    pub fn protect(&self, step: u64) -> Result<()> {
        self.inner("protecting a step")?.core.protect(step);
        Ok(())
    }

    /// Tells the other ranks that this one does not save `step`: their saves of it fail, with this
    /// reason, instead of waiting for it. Does nothing where one rank saves.
    pub fn decline(&self, step: u64, reason: &str) -> Result<()> {
        self.inner(&format!("giving up the save of step {step}"))?.core.decline(step, reason);
        Ok(())
    }

    /// Waits, at most `timeout`, until every rank has said which steps it can load, and gives the
    /// newest that all can; where one rank saves, its own newest.
    pub fn agree(&self, steps: &[u64], timeout: Duration) -> Result<Option<u64>> {
        let inner = self.inner("agreeing with all ranks on the step to load")?;
        let Some(ranks) = &inner.core.ranks else { return Ok(steps.iter().max().copied()) };
        let agreed = ranks.agree(&inner.core.offers(steps)?, timeout)?;
        inner.core.note_agreed(agreed);
        Ok(agreed)
    }

    /// Waits for the save in flight, at most `timeout`; true if none is left. Raises the error of a
    /// save that nobody looked at.
    pub fn wait_until_finished(&self, timeout: Option<Duration>) -> Result<bool> {
        self.inner("waiting for the save in flight")?.wait_for_last(timeout)
    }

    /// Checkpoints that are not in the far store yet, by ascending step. None without a far store.
    pub fn pending_uploads(&self) -> Result<Vec<PendingUpload>> {
        Ok(self.inner("listing pending uploads")?.core.store.pending_uploads())
    }

    /// Begins no upload any more, and ends what is under way: the next writer goes on with it.
    pub fn leave_uploads(&self) -> Result<()> {
        self.inner("leaving uploads")?.core.store.leave_uploads();
        Ok(())
    }

    /// Waits, at most `timeout`, until every checkpoint was brought to the far store, or has failed
    /// once more; true if so. From the first call on nothing is tried more than once, until one has
    /// seen the end.
    pub fn drain(&self, timeout: Option<Duration>) -> Result<bool> {
        let inner = self.inner("waiting for uploads")?;
        let environment = &*inner.core.environment;
        let start = environment.monotonic();
        if inner.last().is_some_and(|last| !last.wait(timeout)) {
            return Ok(false);
        }
        let left = timeout.map(|timeout| timeout.saturating_sub(elapsed(environment, start)));
        Ok(inner.core.store.drain(left))
    }

    /// Finishes the save in flight and the uploads, each of which is tried once more at most; then
    /// gives back threads, memory and the store's lock. Raises the error of a save that nobody
    /// looked at. Closing twice is fine.
    pub fn close(&self) -> Result<()> {
        if self.is_forked() {
            return Ok(());
        }
        let inner = self.inner.write().unwrap_or_else(PoisonError::into_inner).take();
        let Some(inner) = inner else { return Ok(()) };
        let ended = inner.wait_for_last(None).map(|_| ());
        inner.core.store.drain(None);
        ended
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
            return Err(EngineError::Closed {
                what: what.into(),
                why: "this process was forked from the one that opened the store".into(),
                hint: "open the store again in this process, with `read_only=True` while the \
                       parent saves"
                    .into(),
            });
        }
        let inner = self.inner.read().unwrap_or_else(PoisonError::into_inner);
        inner.clone().ok_or_else(|| EngineError::Closed {
            what: what.into(),
            why: "the store was closed".into(),
            hint: "open it again".into(),
        })
    }

    fn writer(&self, what: &str) -> Result<Arc<Inner>> {
        if self.config.read_only {
            return Err(EngineError::invalid(
                format!("{what} in `{}`", self.config.path.display()),
                "the store was opened read-only",
                "open it without `read_only=True`",
            ));
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
        drop(self.inner.write().unwrap_or_else(PoisonError::into_inner).take());
    }
}

impl Inner {
    fn last(&self) -> Option<SaveHandle> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner).clone()
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

fn access_of(config: &Config) -> Access {
    match config.world_size {
        _ if config.read_only => Access::Read,
        1 => Access::Write,
        _ => Access::WriteBeside { rank: config.rank },
    }
}

fn check_ranks(config: &Config, has_coordinator: bool) -> Result<()> {
    if config.world_size == 1 || config.read_only || has_coordinator {
        return Ok(());
    }
    Err(EngineError::invalid(
        format!("setting `world_size` = {}", config.world_size),
        "ranks that save one checkpoint together need a coordinator, and none is configured",
        "name one: `coordinator_url=`, or the environment's COORDINATOR_URL; or save from one rank \
         with `rank=0, world_size=1`",
    ))
}

/// Refuses another number of ranks where no entry was saved alike by all of them.
fn check_world_size(manifest: &Manifest, whose: Whose, expected: u32) -> Result<()> {
    let has_replicated = manifest.shards.iter().any(|shard| !shard.replicated.is_empty());
    if whose != Whose::Another || has_replicated {
        return Ok(());
    }
    let saved = manifest.world_size;
    Err(EngineError::invalid(
        format!("opening step {} among {expected} ranks", manifest.step),
        format!("{saved} ranks saved it, each its own state"),
        "load what one of them saved: `load(from_rank=0)`, `restore(state, from_rank=0)`; or load \
         it with as many ranks. What all ranks hold alike can be saved as `replicated=[...]`, \
         which any number of ranks loads",
    ))
}

/// Whether an error says that a file vanished.
fn is_gone(error: &EngineError) -> bool {
    match error {
        EngineError::NotFound { .. } => true,
        // The second: removed by another machine while it was open here, on NFS.
        EngineError::Io { source, .. } => matches!(
            source.kind(),
            std::io::ErrorKind::NotFound | std::io::ErrorKind::StaleNetworkFileHandle
        ),
        _ => false,
    }
}

impl Core {
    /// A step that a rewind retired, or that was never committed, cannot be opened, whatever files
    /// are left of it.
    fn check_exists(&self, step: u64) -> Result<()> {
        let survey = self.survey()?;
        let why = match survey.step(step).map(|step| &step.state) {
            None => "there is no checkpoint of this step".into(),
            Some(StepState::Incomplete) => "an attempt was begun and never committed".into(),
            Some(StepState::Retired { by }) => format!("it was retired by the rewind to step {by}"),
            Some(StepState::Committed | StepState::Damaged { .. } | StepState::Newer { .. }) => {
                return Ok(());
            }
        };
        let steps = survey.committed_steps();
        let hint = match (steps.first(), steps.last()) {
            (Some(first), Some(last)) => {
                format!("{} checkpoints exist, from step {first} to step {last}", steps.len())
            }
            _ => "no checkpoint exists in this store".into(),
        };
        Err(EngineError::NotFound {
            what: format!("opening step {step} in `{}`", self.store.location()),
            why,
            hint,
        })
    }
}
