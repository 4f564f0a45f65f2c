//! From settings to an engine: which store, reached how, shared with whom.
//!
//! Always holds: settings are checked before anything is opened, and what cannot work together is
//! refused before a thread is started.

use std::mem::ManuallyDrop;
use std::sync::{Arc, Mutex, RwLock};

use super::{Components, Core, Engine, Inner};
use crate::clock::{Environment, System};
use crate::config::{Config, S3Address, S3Credentials};
use crate::io::{Io, open_backend};
use crate::ranks::Ranks;
use crate::save::commit::Committer;
use crate::save::encode::Workers;
use crate::store::local::LocalStore;
#[cfg(feature = "s3")]
use crate::store::s3::S3Store;
use crate::store::tiered::TieredStore;
use crate::store::{Access, Store};
use crate::{EngineError, Result};

impl Engine {
    /// Opens the store that `config` names, on this machine's devices and clocks.
    ///
    /// # Errors
    ///
    /// [`EngineError::InvalidArgument`] where a setting is out of range, does not go with another,
    /// or needs what this build lacks, or the path is a file; [`EngineError::NotFound`] where a
    /// store that is only read, or a bucket, is not there; [`EngineError::StoreBusy`] where another
    /// writer has the directory; [`EngineError::Io`], [`EngineError::NoSpace`] where the operating
    /// system refuses what opening takes; [`EngineError::Unavailable`] where S3 does not answer.
    pub fn open(config: Config) -> Result<Self> {
        config.validate()?;
        Self::open_any(config, None, None)
    }

    /// Opens the directory that `config` names, on the given parts.
    ///
    /// # Errors
    ///
    /// Those of [`Engine::open`].
    pub fn open_with(config: Config, components: Components) -> Result<Self> {
        config.validate()?;
        check_ranks(&config, false)?;
        let Components { io, environment } = components;
        Self::open_local(config, io, None, environment, None)
    }

    /// Opens the store that `config` names, to save and load together with the other ranks of its
    /// job.
    ///
    /// # Errors
    ///
    /// Those of [`Engine::open`], but that there is no coordinator.
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
        let local = LocalStore::open(&config.path, access, io, config.in_flight())?;
        let store = Self::tiered(&config, Arc::new(local), credentials, &environment)?;
        let engine = Self::open_store(config, store, environment, io_name, ranks)?;
        if engine.config.remote.is_some() && !engine.config.read_only {
            // Far manifests are read now, so that no save waits for the network.
            engine.survey()?;
        }
        Ok(engine)
    }

    /// Opens the store that `config` names, with these credentials for what of it is in S3, instead
    /// of those that the usual chain finds; together with other ranks, if they are given.
    ///
    /// # Errors
    ///
    /// Those of [`Engine::open`].
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

    /// The remote store of a tier, reached with `credentials` if they are given.
    #[cfg(feature = "s3")]
    fn open_remote(config: &Config, credentials: Option<S3Credentials>) -> Result<Arc<dyn Store>> {
        let address = config.remote_address()?;
        Ok(Arc::new(S3Store::open(&address, access_of(config), &config.s3, credentials)?))
    }

    #[cfg(not(feature = "s3"))]
    fn open_remote(config: &Config, _: Option<S3Credentials>) -> Result<Arc<dyn Store>> {
        Err(EngineError::invalid(
            format!("opening store `{}`", config.remote_address()?),
            "this build of the engine has no S3",
            "build it with the feature `s3`, or leave `remote` unset",
        ))
    }

    /// Puts the remote store behind the local one, if one is configured.
    fn tiered(
        config: &Config,
        local: Arc<dyn Store>,
        credentials: Option<S3Credentials>,
        environment: &Arc<dyn Environment>,
    ) -> Result<Arc<dyn Store>> {
        if config.remote.is_none() {
            return Ok(local);
        }
        let remote = Self::open_remote(config, credentials)?;
        Ok(Arc::new(match access_of(config) {
            Access::Read => TieredStore::reader(local, remote)?,
            Access::Write | Access::WriteBeside { .. } => {
                let (environment, rate) = (Arc::clone(environment), config.remote_bytes_per_second);
                TieredStore::writer(local, remote, environment, rate, config.own_share())?
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
            let workers = Workers::start(core.workers, &core.encode_pool, &core.environment)?;
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
        "start the ranks with `torchrun`, or open the manager after `init_process_group`; or name \
         one: `coordinator_url=`, or the environment's COORDINATOR_URL; or save from one rank \
         with `rank=0, world_size=1`",
    ))
}
