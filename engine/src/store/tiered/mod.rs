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
//!   of them whole or not there. Only where the far one has an attempt of a step that began later,
//!   by a writer on another machine, does that count: then the near one is out of date.
//! - Several ranks may each have a near store of their own, before one far store: a step exists
//!   once all near stores have its manifest, and in the far one once all have brought their shards.
//! - A checkpoint that waits for its upload is told to retention, which leaves it alone; so is one
//!   whose upload failed for good, or of which it cannot be told whether the far store has it.
//! - A manifest that cannot be read hides no other checkpoint. Of one that is damaged near, the far
//!   copy counts, as of a shard: else it would come to be the newest there, once it was passed.
//! - What was not uploaded when the process ended is uploaded by the next writer; parts that
//!   arrived are not sent again.
//! - A far store that cannot be reached holds up nothing but uploads and what reads from it: the
//!   writer knows its listing, and what retention lets go leaves the far store behind the training.

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
mod far;
mod far_removals;
mod near;
mod pacer;
mod queue;
mod removals;
#[cfg(test)]
mod tests;
mod uploader;
mod work;

use differences::{Contents, Differences, differences, is_damaged};
use far::FarView;
use near::NearShard;
use uploader::Uploader;
use work::{Work, WorkParts};

/// A near store and a far one.
pub(crate) struct TieredStore {
    near: Arc<dyn Store>,
    far: Arc<dyn Store>,
    /// Of a writer.
    uploader: Option<Uploader>,
    outdated: Mutex<Outdated>,
    unanswered: Mutex<BTreeSet<u64>>,
}

/// Steps whose near checkpoint another machine's writer has replaced.
#[derive(Debug, Default)]
struct Outdated {
    steps: BTreeSet<u64>,
    /// Those that a save of this process has replaced in turn, until it is known whether the
    /// replacement stays.
    passed: BTreeSet<u64>,
}

impl TieredStore {
    /// For reading both.
    pub(crate) fn reader(near: Arc<dyn Store>, far: Arc<dyn Store>) -> Result<Self> {
        let here = Contents::read(near.as_ref(), &near.list()?, None)?;
        let there = Contents::read(far.as_ref(), &far.list()?, None)?;
        let steps = differences(&here, &there).outdated;
        let outdated = Mutex::new(Outdated { steps, ..Outdated::default() });
        Ok(Self { near, far, uploader: None, outdated, unanswered: Mutex::default() })
    }

    /// Looks again, for a reader, which of the outdated steps still are: the near store's writer
    /// may have saved them once more.
    fn recheck_outdated(&self, near: &[StepListing], far: &[StepListing]) -> Result<()> {
        let steps = self.outdated().steps.clone();
        if self.uploader.is_some() || steps.is_empty() {
            return Ok(());
        }
        let of = |listing: &[StepListing]| -> Vec<StepListing> {
            listing.iter().filter(|step| steps.contains(&step.step)).cloned().collect()
        };
        let here = Contents::read(self.near.as_ref(), &of(near), None)?;
        let there = Contents::read(self.far.as_ref(), &of(far), None)?;
        let Differences { outdated, unsure, .. } = differences(&here, &there);
        self.outdated().steps = &outdated | &(&steps & &unsure);
        Ok(())
    }

    /// For writing: starts the uploader, with what earlier processes left to do. `share` is of a
    /// rank whose near store is its own.
    pub(crate) fn writer(
        near: Arc<dyn Store>,
        far: Arc<dyn Store>,
        environment: Arc<dyn Environment>,
        bytes_per_second: Option<u64>,
        share: Option<OwnShare>,
    ) -> Result<Self> {
        let view = FarView::open(far.as_ref())?;
        let here = Contents::read(near.as_ref(), &near.list()?, share)?;
        let there = Contents::read(far.as_ref(), &view.list(), share)?;
        let Differences { waiting, outdated, unsure } = differences(&here, &there);
        if !outdated.is_empty() {
            tracing::warn!(
                near = near.location(),
                far = far.location(),
                steps = ?outdated,
                "another machine saved these steps again, later: its checkpoints count"
            );
        }
        let work = Arc::new(Work::new(WorkParts {
            near: Arc::clone(&near),
            far: Arc::clone(&far),
            view,
            environment,
            bytes_per_second,
            share,
            waiting,
            unsure,
        }));
        let outdated = Mutex::new(Outdated { steps: outdated, ..Outdated::default() });
        let uploader = Some(Uploader::start(work)?);
        Ok(Self { near, far, uploader, outdated, unanswered: Mutex::default() })
    }

    /// Whether the far store's checkpoint of the step counts, though the near one has one, too.
    fn is_outdated(&self, step: u64) -> bool {
        self.outdated().steps.contains(&step)
    }

    fn outdated(&self) -> MutexGuard<'_, Outdated> {
        // Every critical section is a call or two of a set's.
        unpoisoned(self.outdated.lock())
    }

    /// Steps whose manifests the far store was asked for to no avail, because it was away.
    fn unanswered(&self) -> MutexGuard<'_, BTreeSet<u64>> {
        // Every critical section is one call of a set's.
        unpoisoned(self.unanswered.lock())
    }

    /// What the far store has of a manifest that is damaged near, or cannot be read there, if it is
    /// certain that it is the same: the shards that lie near tell of which attempt it was.
    ///
    /// # Errors
    ///
    /// [`EngineError::Unavailable`]: the far store may have it, and cannot be asked.
    fn repaired(&self, step: u64) -> Result<Option<Vec<u8>>> {
        let far = match self.far.read_manifest(step) {
            Ok(Some(far)) => far,
            Err(EngineError::Unavailable { what, why, hint }) => {
                let near = self.near.location();
                let why = format!("{why}; it was asked because the one in `{near}` is damaged");
                return Err(EngineError::Unavailable { what, why, hint });
            }
            Ok(None) | Err(_) => return Ok(None),
        };
        let attempt = Manifest::decode(&far).ok().and_then(|far| far.attempt_id().ok());
        let listing = self.near.list_step(step).ok().flatten();
        let files = listing.map(|listing| listing.files).unwrap_or_default();
        let mut shards = files.iter().filter_map(|file| parse_shard_file(&file.name)).peekable();
        if shards.peek().is_none() || !shards.all(|(_, shard)| Some(shard) == attempt) {
            return Ok(None);
        }
        self.unanswered().remove(&step);
        tracing::warn!(
            near = self.near.location(),
            far = self.far.location(),
            step,
            "a manifest is damaged, and taken from the far store"
        );
        Ok(Some(far))
    }

    /// Whether the step is the attempt's as far as is known: without the far store where that is
    /// not waited for.
    fn may_stand(&self, step: u64, attempt: Option<AttemptId>, space: Space) -> Result<bool> {
        match space {
            Space::Now => Ok(standing(self, step)? == attempt),
            Space::Later if self.is_outdated(step) => Ok(true),
            Space::Later => {
                Ok(standing(&*self.near, step)?.is_none_or(|near| Some(near) == attempt))
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
            .field("near", &self.near.location())
            .field("far", &self.far.location())
            .finish_non_exhaustive()
    }
}

impl Store for TieredStore {
    fn location(&self) -> String {
        self.near.location()
    }

    fn list(&self) -> Result<Vec<StepListing>> {
        let mut steps: BTreeMap<u64, BTreeMap<String, FileListing>> = BTreeMap::new();
        let mut unlisted = BTreeMap::new();
        // Of what is in both, the near one's counts.
        let far = self.work().map_or_else(|| self.far.list(), |work| Ok(work.view.list()))?;
        let mut near = self.near.list()?;
        self.recheck_outdated(&near, &far)?;
        near.retain(|step| !self.is_outdated(step.step));
        for step in far.into_iter().chain(near) {
            let files = steps.entry(step.step).or_default();
            files.extend(step.files.into_iter().map(|file| (file.name.clone(), file)));
            unlisted.extend(step.unlisted.map(|why| (step.step, why)));
        }
        let listing = |(step, files): (u64, BTreeMap<String, FileListing>)| StepListing {
            step,
            // What lies far is there all the same.
            unlisted: unlisted.remove(&step).filter(|_| files.is_empty()),
            files: files.into_values().collect(),
        };
        Ok(steps.into_iter().map(listing).collect())
    }

    fn read_manifest(&self, step: u64) -> Result<Option<Vec<u8>>> {
        if self.is_outdated(step) {
            return self.far.read_manifest(step);
        }
        match self.near.read_manifest(step) {
            Ok(None) => self.far.read_manifest(step),
            Ok(Some(near)) if is_damaged(&near) => Ok(Some(self.repaired(step)?.unwrap_or(near))),
            Err(error @ EngineError::Io { .. }) => self.repaired(step)?.map(Some).ok_or(error),
            near => near,
        }
    }

    fn read_local_manifest(&self, step: u64) -> Result<Option<Vec<u8>>> {
        self.near.read_manifest(step)
    }

    fn read_manifests(&self, steps: &[u64]) -> Vec<Result<Option<Vec<u8>>>> {
        let mut read = self.near.read_manifests(steps);
        let is_missing = |place: &usize| {
            matches!(read.get(*place), Some(Ok(None))) || self.is_outdated(steps[*place])
        };
        let missing: Vec<usize> = (0..steps.len()).filter(is_missing).collect();
        let asked: Vec<u64> = missing.iter().map(|place| steps[*place]).collect();
        for (place, manifest) in missing.iter().zip(self.far.read_manifests(&asked)) {
            read[*place] = manifest;
        }
        for place in (0..steps.len()).filter(|place| !missing.contains(place)) {
            let is_unusable = match &read[place] {
                Ok(near) => near.as_deref().is_some_and(is_damaged),
                Err(error) => matches!(error, EngineError::Io { .. }),
            } && !self.unanswered().contains(&steps[place]);
            match is_unusable.then(|| self.repaired(steps[place])) {
                Some(Ok(Some(far))) => read[place] = Ok(Some(far)),
                // It hides no other step, and a far store that is away holds up no listing twice:
                // whoever loads the step asks again.
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
        self.near.create_shard(shard, size, flow)
    }

    fn open_shard(&self, shard: ShardId) -> Result<Box<dyn ShardSource>> {
        match self.near.open_shard(shard) {
            Err(EngineError::NotFound { .. }) => self.far.open_shard(shard),
            Ok(near) => Ok(Box::new(NearShard { near, far: Arc::clone(&self.far), shard })),
            Err(error) => Err(error),
        }
    }

    fn publish(&self, publication: Publication<'_>) -> Result<()> {
        // Whether a save of the step may replace another was decided by what both stores hold; what
        // lies here may be out of date, or not be there.
        let replaces = match publication.replaces {
            Some(_) => standing(&*self.near, publication.step)?,
            None => None,
        };
        self.near.publish(Publication { replaces, ..publication })?;
        let mut outdated = self.outdated();
        if outdated.steps.remove(&publication.step) {
            outdated.passed.insert(publication.step);
        } else {
            outdated.passed.remove(&publication.step);
        }
        Ok(())
    }

    fn unpublish(&self, step: u64, attempt: AttemptId, replaced: Option<&[u8]>) -> Result<()> {
        self.near.unpublish(step, attempt, replaced)?;
        let mut outdated = self.outdated();
        if outdated.passed.remove(&step) {
            outdated.steps.insert(step);
        }
        Ok(())
    }

    // A reader's near store refuses what follows, and says why.
    fn remove_checkpoint(&self, step: u64, only: Option<AttemptId>, space: Space) -> Result<u64> {
        let Some(work) = self.work() else {
            return self.near.remove_checkpoint(step, only, space);
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
        let removed = self.near.remove_checkpoint(step, None, space);
        let freed_bytes = removed.inspect_err(|_| work.put_back(step, state))?;
        let far_bytes = work.follow(work.let_go_behind(step, attempt), space)?;
        Ok(freed_bytes + far_bytes)
    }

    fn remove_orphan(&self, step: u64, file: &str, space: Space) -> Result<Option<u64>> {
        let Some(work) = self.work() else { return self.near.remove_orphan(step, file, space) };
        let freed_bytes = self.near.remove_orphan(step, file, space)?;
        if freed_bytes.is_none() || !work.view.has(step, file) {
            return Ok(freed_bytes);
        }
        let far_bytes = work.follow(work.remove_orphan_behind(step, file), space)?;
        Ok(freed_bytes.map(|near_bytes| near_bytes + far_bytes))
    }

    fn reclaim(&self) {
        self.near.reclaim();
    }

    fn unfinished_uploads(&self, step: Option<u64>) -> Result<Vec<UnfinishedUpload>> {
        self.far.unfinished_uploads(step)
    }

    fn abort_upload(&self, upload: &UnfinishedUpload) -> Result<bool> {
        if self.work().is_some_and(|work| work.is_waiting(upload.step)) {
            return Ok(false);
        }
        self.far.abort_upload(upload)
    }

    fn uploads(&self) -> Option<&dyn Uploads> {
        self.work().map(|work| work as &dyn Uploads)
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
