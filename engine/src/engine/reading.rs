//! The verbs that read: what exists, and opening and verifying it.
//!
//! Always holds: a step that was retired or never committed is not opened, whatever files are left
//! of it; what a writer replaced or removed meanwhile is looked up again before it is called
//! damaged.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::{Core, Engine};
use crate::config::{BestMode, Config};
use crate::format::manifest::Manifest;
use crate::load::{
    Checkpoint, ShardScope, VerifyObserver, VerifyReport, read_manifest, verify_step,
};
use crate::recovery::{StepState, Survey};
use crate::store::Store;
use crate::{EngineError, Result};

impl Engine {
    /// The committed steps, ascending.
    pub fn steps(&self) -> Result<Vec<u64>> {
        Ok(self.survey()?.committed_steps())
    }

    /// Everything that is in the store, and what it means.
    pub fn survey(&self) -> Result<Survey> {
        self.inner("listing checkpoints")?.core.survey()
    }

    /// What was attached to a committed step. No shard is opened.
    pub fn metadata(&self, step: u64) -> Result<BTreeMap<String, serde_json::Value>> {
        let inner = self.inner(&format!("reading the metadata of step {step}"))?;
        inner.check_exists(step)?;
        Ok(read_manifest(inner.core.store.as_ref(), step)?.metadata)
    }

    /// The committed steps whose metadata has a number called `metric`, the best first; of equal
    /// ones the newer.
    pub fn best_steps(&self, metric: &str, mode: BestMode) -> Result<Vec<u64>> {
        self.inner("comparing checkpoints")?.core.best_steps(metric, mode)
    }

    /// The manifest of `step`, checked; that of a retired checkpoint too. No shard is
    /// opened.
    pub fn manifest(&self, step: u64) -> Result<Manifest> {
        let inner = self.inner(&format!("reading the manifest of step {step}"))?;
        read_manifest(inner.core.store.as_ref(), step)
    }

    /// Opens this rank's shard of a committed step: manifest, footer, header and index are read and
    /// checked, chunks are not. If another number of ranks saved it, only replicated entries can
    /// be read ([`Checkpoint::is_replicated_only`]), and it is an error if that is nothing: what
    /// the ranks that are not there saved would be lost silently.
    pub fn checkpoint(&self, step: u64) -> Result<Checkpoint> {
        self.open_shard(step, None)
    }

    /// [`Engine::checkpoint`] of a rank that is named, whatever the number of ranks then and now.
    pub fn checkpoint_of_rank(&self, step: u64, rank: u32) -> Result<Checkpoint> {
        self.open_shard(step, Some(rank))
    }

    /// Opens the shard of a rank of the same checkpoint as `own`, for what is in that shard
    /// alone: storages of which it holds a part cannot be read. Nothing is listed: to open those of
    /// a thousand ranks costs what their own footers, headers and indexes take.
    pub fn shard_beside(&self, own: &Checkpoint, rank: u32) -> Result<Checkpoint> {
        self.open_beside(own, rank, ShardScope::ShardOnly)
    }

    /// [`Engine::shard_beside`], with the shards that hold the rest of its storages.
    pub fn checkpoint_beside(&self, own: &Checkpoint, rank: u32) -> Result<Checkpoint> {
        self.open_beside(own, rank, ShardScope::All)
    }

    fn open_beside(&self, own: &Checkpoint, rank: u32, scope: ShardScope) -> Result<Checkpoint> {
        let step = own.step();
        let inner = self.inner(&format!("opening what rank {rank} saved of step {step}"))?;
        let store = inner.core.store.as_ref();
        match Checkpoint::open(store, own.shared_manifest(), (rank, scope), inner.core.workers) {
            Err(error) if is_gone(&error) => Err(self.gone_beside(store, own, error)),
            opened => opened,
        }
    }

    /// Why a shard is missing that existed when the checkpoint was opened.
    fn gone_beside(&self, store: &dyn Store, own: &Checkpoint, error: EngineError) -> EngineError {
        let step = own.step();
        match read_manifest(store, step) {
            Ok(standing) if standing.attempt != own.manifest().attempt => EngineError::NotFound {
                what: format!("reading step {step}"),
                why: "another attempt has replaced it in the meantime".into(),
                hint: "load again".into(),
            },
            _ => self.judged(store, step, error),
        }
    }

    fn open_shard(&self, step: u64, named: Option<u32>) -> Result<Checkpoint> {
        let inner = self.inner(&format!("opening step {step}"))?;
        inner.check_exists(step)?;
        let store = inner.core.store.as_ref();
        let open = || {
            let manifest = read_manifest(store, step)?;
            let saved = manifest.world_size;
            let Config { rank, world_size, .. } = self.config;
            let (rank, scope) = match named {
                Some(named) => (named, ShardScope::All),
                None if saved == world_size => (rank, ShardScope::All),
                // Any will do.
                None => (rank % saved, ShardScope::ReplicatedOnly),
            };
            check_world_size(&manifest, scope, world_size)?;
            Checkpoint::open(store, Arc::new(manifest), (rank, scope), inner.core.workers)
        };
        match open() {
            // The writer replaced or removed it under our feet: what stands there now counts.
            Err(error) if is_gone(&error) => {
                open().map_err(|error| self.judged(store, step, error))
            }
            opened => opened,
        }
    }

    /// What is gone of a checkpoint that stands is damage, unless it may be elsewhere, or on its
    /// way.
    fn judged(&self, store: &dyn Store, step: u64, error: EngineError) -> EngineError {
        match error {
            EngineError::NotFound { what, why, .. }
                if self.config.own_share().is_none() && read_manifest(store, step).is_ok() =>
            {
                EngineError::Corrupt {
                    what,
                    why: format!("{why}, but the manifest of step {step} names it"),
                    hint: "restore another step, or recover the file from a copy of the store"
                        .into(),
                }
            }
            error => error,
        }
    }

    /// Reads and checks every chunk of every shard of a step.
    pub fn verify(&self, step: u64, observer: &dyn VerifyObserver) -> Result<VerifyReport> {
        let inner = self.inner(&format!("verifying step {step}"))?;
        inner.check_exists(step)?;
        let Core { store, workers, .. } = &*inner.core;
        verify_step(store.as_ref(), step, (*workers, self.config.own_share()), observer)
    }
}

/// Refuses another number of ranks where no entry is replicated.
fn check_world_size(manifest: &Manifest, scope: ShardScope, expected: u32) -> Result<()> {
    let has_replicated = manifest.shards.iter().any(|shard| !shard.replicated.is_empty());
    if scope != ShardScope::ReplicatedOnly || has_replicated {
        return Ok(());
    }
    let saved = manifest.world_size;
    Err(EngineError::invalid(
        format!("opening step {} among {expected} ranks", manifest.step),
        format!("{saved} ranks saved it, each with its own state"),
        "choose a rank: `load(from_rank=0)`, `restore(state, from_rank=0)`; sharded tensors are \
         still assembled from all ranks. Or load it with the same number of ranks. Entries that \
         are the same on all ranks can be saved with `replicated=[...]`; any number of ranks can \
         load those",
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
    pub(super) fn check_exists(&self, step: u64) -> Result<()> {
        let survey = self.survey()?;
        let why = match survey.step(step).map(|step| &step.state) {
            None => "there is no checkpoint of this step".into(),
            Some(StepState::Incomplete) => "an attempt was started but never committed".into(),
            Some(StepState::Retired { by }) => format!("it was retired by the rewind to step {by}"),
            Some(StepState::Committed | StepState::Damaged { .. } | StepState::Newer { .. }) => {
                return Ok(());
            }
        };
        let steps = survey.committed_steps();
        let hint = match (steps.first(), steps.last()) {
            (Some(first), Some(last)) if first == last => format!("step {first} is the only one"),
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
