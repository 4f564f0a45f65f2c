//! Two stores as one: checkpoints are committed to the local one and uploaded to the remote one
//! behind the training.
//!
//! ```text
//! save --> local store, committed --> resolves
//!               |
//!               +--> queue --> uploader, one thread --> remote store, committed --> uploaded
//! load <-- local store, else remote store
//! ```
//!
//! Always holds:
//! - The local store decides: what it committed exists; the remote one has copies, byte for byte,
//!   each of them whole or not there. Only where the remote one has an attempt of a step that began
//!   later, by a writer on another machine, does that count: then the local one is out of date.
//! - Several ranks may each have a local store of their own, before one remote store: a step exists
//!   once all local stores have its manifest, and in the remote one once all have uploaded their
//!   shards.
//! - Retention keeps a checkpoint that waits for its upload; and one whose upload failed for good,
//!   or of which it is not known whether the remote store has it.
//! - A manifest that cannot be read hides no other checkpoint. Of one that is damaged locally, the
//!   remote copy counts, as of a shard: else it would come to be the newest there, once it was
//!   passed.
//! - What was not uploaded when the process ended is uploaded by the next writer; parts that
//!   arrived are not sent again.
//! - A remote store that cannot be reached holds up nothing but uploads and what reads from it: the
//!   writer knows its listing, and what retention deletes is removed from the remote store
//!   behind the training.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::SystemTime;

use super::flow::Flow;
use super::{
    FileListing, Publication, ShardId, ShardSink, ShardSize, ShardSource, Space, StepListing,
    Store, UnfinishedUpload, Uploads,
};
use crate::clock::Environment;
use crate::format::manifest::Manifest;
use crate::format::names::{AttemptId, parse_shard_file};
use crate::recovery::OwnShare;
use crate::store_copy::standing;
use crate::sync::unpoisoned;
use crate::{EngineError, Result};

mod differences;
mod local_shard;
mod pacer;
mod queue;
mod remote_removals;
mod remote_view;
mod removals;
#[cfg(test)]
mod tests;
mod uploader;
mod work;

use differences::{Contents, Differences, differences, is_damaged};
use local_shard::LocalShard;
use remote_view::RemoteView;
use uploader::Uploader;
use work::{Work, WorkParts};

/// A local store and a remote one.
pub(crate) struct TieredStore {
    local: Arc<dyn Store>,
    remote: Arc<dyn Store>,
    /// Of a writer.
    uploader: Option<Uploader>,
    outdated: Mutex<Outdated>,
    unanswered: Mutex<BTreeSet<u64>>,
}

/// Steps whose local checkpoint another machine's writer has replaced.
#[derive(Debug, Default)]
struct Outdated {
    steps: BTreeSet<u64>,
    /// Those that a save of this process has replaced in turn, until it is known whether the
    /// replacement stays.
    passed: BTreeSet<u64>,
}

impl TieredStore {
    /// For reading both.
    pub(crate) fn reader(local: Arc<dyn Store>, remote: Arc<dyn Store>) -> Result<Self> {
        let here = Contents::read(local.as_ref(), &local.list()?, None)?;
        let there = Contents::read(remote.as_ref(), &remote.list()?, None)?;
        let steps = differences(&here, &there).outdated;
        let outdated = Mutex::new(Outdated { steps, ..Outdated::default() });
        Ok(Self { local, remote, uploader: None, outdated, unanswered: Mutex::default() })
    }

    /// Looks again, for a reader, which of the outdated steps still are: the local store's writer
    /// may have saved them once more.
    fn recheck_outdated(&self, local: &[StepListing], remote: &[StepListing]) -> Result<()> {
        let steps = self.outdated().steps.clone();
        if self.uploader.is_some() || steps.is_empty() {
            return Ok(());
        }
        let of = |listing: &[StepListing]| -> Vec<StepListing> {
            listing.iter().filter(|step| steps.contains(&step.step)).cloned().collect()
        };
        let here = Contents::read(self.local.as_ref(), &of(local), None)?;
        let there = Contents::read(self.remote.as_ref(), &of(remote), None)?;
        let Differences { outdated, unsure, .. } = differences(&here, &there);
        self.outdated().steps = &outdated | &(&steps & &unsure);
        Ok(())
    }

    /// For writing: starts the uploader, with what earlier processes left to do. `share` is of a
    /// rank whose local store is its own.
    pub(crate) fn writer(
        local: Arc<dyn Store>,
        remote: Arc<dyn Store>,
        environment: Arc<dyn Environment>,
        bytes_per_second: Option<u64>,
        share: Option<OwnShare>,
    ) -> Result<Self> {
        let view = RemoteView::open(remote.as_ref())?;
        let here = Contents::read(local.as_ref(), &local.list()?, share)?;
        let there = Contents::read(remote.as_ref(), &view.list(), share)?;
        let Differences { waiting, outdated, unsure } = differences(&here, &there);
        if !outdated.is_empty() {
            tracing::warn!(
                near = local.location(),
                far = remote.location(),
                steps = ?outdated,
                "another machine saved these steps again, later: its checkpoints count"
            );
        }
        let work = Arc::new(Work::new(WorkParts {
            local: Arc::clone(&local),
            remote: Arc::clone(&remote),
            view,
            environment,
            bytes_per_second,
            share,
            waiting,
            unsure,
        }));
        let outdated = Mutex::new(Outdated { steps: outdated, ..Outdated::default() });
        let uploader = Some(Uploader::start(work)?);
        Ok(Self { local, remote, uploader, outdated, unanswered: Mutex::default() })
    }

    /// Whether the remote store's checkpoint of the step counts, though the local one has one, too.
    fn is_outdated(&self, step: u64) -> bool {
        self.outdated().steps.contains(&step)
    }

    fn outdated(&self) -> MutexGuard<'_, Outdated> {
        // Every critical section is a call or two of a set's.
        unpoisoned(self.outdated.lock())
    }

    /// Steps whose manifests the remote store was asked for to no avail, because it was away.
    fn unanswered(&self) -> MutexGuard<'_, BTreeSet<u64>> {
        // Every critical section is one call of a set's.
        unpoisoned(self.unanswered.lock())
    }

    /// What the remote store has of a manifest that is damaged locally, or cannot be read there, if
    /// it is certain that it is the same: the local shards show of which attempt it was.
    ///
    /// # Errors
    ///
    /// [`EngineError::Unavailable`]: the remote store may have it, and cannot be asked.
    fn repaired(&self, step: u64) -> Result<Option<Vec<u8>>> {
        let remote = match self.remote.read_manifest(step) {
            Ok(Some(remote)) => remote,
            Err(EngineError::Unavailable { what, why, hint }) => {
                let local = self.local.location();
                let why = format!("{why}; it was asked because the one in `{local}` is damaged");
                return Err(EngineError::Unavailable { what, why, hint });
            }
            Ok(None) | Err(_) => return Ok(None),
        };
        let attempt = Manifest::decode(&remote).ok().and_then(|remote| remote.attempt_id().ok());
        let listing = self.local.list_step(step).ok().flatten();
        let files = listing.map(|listing| listing.files).unwrap_or_default();
        let mut shards = files.iter().filter_map(|file| parse_shard_file(&file.name)).peekable();
        if shards.peek().is_none() || !shards.all(|(_, shard)| Some(shard) == attempt) {
            return Ok(None);
        }
        self.unanswered().remove(&step);
        tracing::warn!(
            near = self.local.location(),
            far = self.remote.location(),
            step,
            "a manifest is damaged, and taken from the far store"
        );
        Ok(Some(remote))
    }

    /// Whether the step is the attempt's as far as is known: without the remote store where that is
    /// not waited for.
    fn may_stand(&self, step: u64, attempt: Option<AttemptId>, space: Space) -> Result<bool> {
        match space {
            Space::Now => Ok(standing(self, step)? == attempt),
            Space::Later if self.is_outdated(step) => Ok(true),
            Space::Later => {
                Ok(standing(&*self.local, step)?.is_none_or(|local| Some(local) == attempt))
            }
        }
    }

    fn work(&self) -> Option<&Work> {
        self.uploader.as_ref().map(|uploader| uploader.work.as_ref())
    }
}

impl fmt::Debug for TieredStore {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("TieredStore")
            .field("local", &self.local.location())
            .field("remote", &self.remote.location())
            .finish_non_exhaustive()
    }
}

impl Store for TieredStore {
    fn location(&self) -> String {
        self.local.location()
    }

    fn list(&self) -> Result<Vec<StepListing>> {
        let mut steps: BTreeMap<u64, BTreeMap<String, FileListing>> = BTreeMap::new();
        let mut unlisted = BTreeMap::new();
        // Of what is in both, the local one's counts.
        let remote = self.work().map_or_else(|| self.remote.list(), |work| Ok(work.view.list()))?;
        let mut local = self.local.list()?;
        self.recheck_outdated(&local, &remote)?;
        local.retain(|step| !self.is_outdated(step.step));
        for step in remote.into_iter().chain(local) {
            let files = steps.entry(step.step).or_default();
            files.extend(step.files.into_iter().map(|file| (file.name.clone(), file)));
            unlisted.extend(step.unlisted.map(|why| (step.step, why)));
        }
        let listing = |(step, files): (u64, BTreeMap<String, FileListing>)| StepListing {
            step,
            // What the remote store has exists all the same.
            unlisted: unlisted.remove(&step).filter(|_| files.is_empty()),
            files: files.into_values().collect(),
        };
        Ok(steps.into_iter().map(listing).collect())
    }

    fn read_manifest(&self, step: u64) -> Result<Option<Vec<u8>>> {
        if self.is_outdated(step) {
            return self.remote.read_manifest(step);
        }
        match self.local.read_manifest(step) {
            Ok(None) => self.remote.read_manifest(step),
            Ok(Some(local)) if is_damaged(&local) => {
                Ok(Some(self.repaired(step)?.unwrap_or(local)))
            }
            Err(error @ EngineError::Io { .. }) => self.repaired(step)?.map(Some).ok_or(error),
            local => local,
        }
    }

    fn read_local_manifest(&self, step: u64) -> Result<Option<Vec<u8>>> {
        self.local.read_manifest(step)
    }

    fn read_manifests(&self, steps: &[u64]) -> Vec<Result<Option<Vec<u8>>>> {
        let mut read = self.local.read_manifests(steps);
        let is_missing = |place: &usize| {
            matches!(read.get(*place), Some(Ok(None))) || self.is_outdated(steps[*place])
        };
        let missing: Vec<usize> = (0..steps.len()).filter(is_missing).collect();
        let asked: Vec<u64> = missing.iter().map(|place| steps[*place]).collect();
        for (place, manifest) in missing.iter().zip(self.remote.read_manifests(&asked)) {
            read[*place] = manifest;
        }
        for place in (0..steps.len()).filter(|place| !missing.contains(place)) {
            let is_unusable = match &read[place] {
                Ok(local) => local.as_deref().is_some_and(is_damaged),
                Err(error) => matches!(error, EngineError::Io { .. }),
            } && !self.unanswered().contains(&steps[place]);
            match is_unusable.then(|| self.repaired(steps[place])) {
                Some(Ok(Some(remote))) => read[place] = Ok(Some(remote)),
                // It hides no other step, and a remote store that is away holds up no listing
                // twice: a load of the step asks again.
                Some(Err(_)) => drop(self.unanswered().insert(steps[place])),
                Some(Ok(None)) | None => {}
            }
        }
        read
    }

    fn create_shard(
        &self,
        shard: ShardId,
        size: ShardSize,
        flow: &Arc<Flow>,
    ) -> Result<Box<dyn ShardSink>> {
        self.local.create_shard(shard, size, flow)
    }

    fn open_shard(&self, shard: ShardId) -> Result<Box<dyn ShardSource>> {
        match self.local.open_shard(shard) {
            Err(EngineError::NotFound { .. }) => self.remote.open_shard(shard),
            Ok(local) => {
                Ok(Box::new(LocalShard { local, remote: Arc::clone(&self.remote), shard }))
            }
            Err(error) => Err(error),
        }
    }

    fn publish(&self, publication: Publication<'_>) -> Result<()> {
        // Whether a save of the step may replace another was decided by what both stores hold; what
        // is here may be out of date, or not be there.
        let replaces = match publication.replaces {
            Some(_) => standing(&*self.local, publication.step)?,
            None => None,
        };
        self.local.publish(Publication { replaces, ..publication })?;
        let mut outdated = self.outdated();
        if outdated.steps.remove(&publication.step) {
            outdated.passed.insert(publication.step);
        } else {
            outdated.passed.remove(&publication.step);
        }
        Ok(())
    }

    fn unpublish(&self, step: u64, attempt: AttemptId, replaced: Option<&[u8]>) -> Result<()> {
        self.local.unpublish(step, attempt, replaced)?;
        let mut outdated = self.outdated();
        if outdated.passed.remove(&step) {
            outdated.steps.insert(step);
        }
        Ok(())
    }

    // A reader's local store refuses what follows, and says why.
    fn remove_checkpoint(&self, step: u64, only: Option<AttemptId>, space: Space) -> Result<u64> {
        let Some(work) = self.work() else {
            return self.local.remove_checkpoint(step, only, space);
        };
        if only.is_some() && !self.may_stand(step, only, space)? {
            return Ok(0);
        }
        let state = work.upload_state(step);
        match space {
            Space::Now => work.cancel_and_wait(step),
            // What is on its way arrives before it is removed: by the same thread.
            Space::Later => work.cancel(step),
        }
        let attempt = work.to_take_back(step);
        // What stands behind the one that counts goes with it, or it would count.
        let removed = self.local.remove_checkpoint(step, None, space);
        let freed_bytes = removed.inspect_err(|_| work.put_back(step, state))?;
        let remote_bytes = work.follow(work.remove_behind(step, attempt), space)?;
        Ok(freed_bytes + remote_bytes)
    }

    fn remove_orphan(&self, step: u64, file: &str, space: Space) -> Result<Option<u64>> {
        let Some(work) = self.work() else { return self.local.remove_orphan(step, file, space) };
        let freed_bytes = self.local.remove_orphan(step, file, space)?;
        if freed_bytes.is_none() || !work.view.has(step, file) {
            return Ok(freed_bytes);
        }
        let remote_bytes = work.follow(work.remove_orphan_behind(step, file), space)?;
        Ok(freed_bytes.map(|local_bytes| local_bytes + remote_bytes))
    }

    fn reclaim(&self) {
        self.local.reclaim();
    }

    fn unfinished_uploads(&self, step: Option<u64>) -> Result<Vec<UnfinishedUpload>> {
        self.remote.unfinished_uploads(step)
    }

    fn abort_upload(&self, upload: &UnfinishedUpload) -> Result<bool> {
        if self.work().is_some_and(|work| work.is_waiting(upload.step)) {
            return Ok(false);
        }
        self.remote.abort_upload(upload)
    }

    fn uploads(&self) -> Option<&dyn Uploads> {
        self.work().map(|work| work as &dyn Uploads)
    }

    fn free_bytes(&self) -> Result<Option<u64>> {
        self.local.free_bytes()
    }

    fn close_after_fork(&self) {
        self.local.close_after_fork();
        self.remote.close_after_fork();
    }

    fn now(&self) -> Result<SystemTime> {
        self.local.now()
    }
}
