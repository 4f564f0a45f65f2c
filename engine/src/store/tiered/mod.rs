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
//! - A far store that cannot be reached holds up nothing but uploads and what reads from it: the
//!   writer knows its listing, and what retention lets go leaves the far store behind the training.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use super::flow::Flow;
use super::{
    FileListing, Publication, ShardId, ShardSink, ShardSize, ShardSource, StepListing, Store,
    UnfinishedUpload,
};
use crate::clock::Environment;
use crate::format::manifest::Manifest;
use crate::format::names::MANIFEST_FILE;
use crate::transfer::Transferred;
use crate::{EngineError, Result};

mod far;
mod near;
mod uploader;

use far::FarView;
use near::NearShard;
use uploader::{Removal, Uploader, Work};

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
        let view = FarView::open(far.as_ref())?;
        let waiting = not_uploaded((near.as_ref(), &near.list()?), (far.as_ref(), &view.list()))?;
        let work = Work::new((&near, &far), view, waiting, environment, bytes_per_second);
        let work = Arc::new(work);
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
fn not_uploaded(
    (near, near_listing): (&dyn Store, &[StepListing]),
    (far, far_listing): (&dyn Store, &[StepListing]),
) -> Result<BTreeSet<u64>> {
    let there = attempts(far, far_listing)?;
    let here = attempts(near, near_listing)?;
    let differs = |step: &u64| here.get(step) != there.get(step);
    Ok(here.keys().copied().filter(differs).collect())
}

/// The attempt of every checkpoint that can be read.
fn attempts(store: &dyn Store, listing: &[StepListing]) -> Result<BTreeMap<u64, String>> {
    let has_manifest =
        |step: &StepListing| step.files.iter().any(|file| file.name == MANIFEST_FILE);
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
        let far = self.uploads().map_or_else(|| self.far.list(), |work| Ok(work.view.list()))?;
        for step in far.into_iter().chain(self.near.list()?) {
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
            Ok(near) => Ok(Box::new(NearShard { near, far: Arc::clone(&self.far), shard })),
            Err(error) => Err(error),
        }
    }

    fn publish(&self, publication: Publication<'_>) -> Result<()> {
        self.near.publish(publication)?;
        if let Some(uploads) = self.uploads() {
            uploads.add(publication.step);
        }
        Ok(())
    }

    // A reader's near store refuses what follows, and says why.
    fn remove_checkpoint(&self, step: u64) -> Result<u64> {
        let Some(work) = self.uploads() else { return self.near.remove_checkpoint(step) };
        work.cancel_and_wait(step);
        let freed_bytes = self.near.remove_checkpoint(step)?;
        work.remove_behind(Removal::Checkpoint(step));
        Ok(freed_bytes + work.remove_now()?)
    }

    fn let_go(&self, step: u64) -> Result<()> {
        let Some(work) = self.uploads() else { return self.near.let_go(step) };
        // What is on its way arrives before it is removed: by the same thread.
        work.cancel(step);
        self.near.remove_checkpoint(step)?;
        work.remove_behind(Removal::Checkpoint(step));
        Ok(())
    }

    fn remove_orphan(&self, step: u64, file: &str) -> Result<Option<u64>> {
        let Some(work) = self.uploads() else { return self.near.remove_orphan(step, file) };
        let freed_bytes = self.near.remove_orphan(step, file)?;
        if freed_bytes.is_none() || !work.view.has(step, file) {
            return Ok(freed_bytes);
        }
        work.remove_behind(Removal::Orphan(step, file.into()));
        let far_bytes = work.remove_now()?;
        Ok(freed_bytes.map(|near_bytes| near_bytes + far_bytes))
    }

    fn let_go_orphan(&self, step: u64, file: &str) -> Result<bool> {
        let Some(work) = self.uploads() else { return self.near.let_go_orphan(step, file) };
        let is_gone = self.near.remove_orphan(step, file)?.is_some();
        if is_gone && work.view.has(step, file) {
            work.remove_behind(Removal::Orphan(step, file.into()));
        }
        Ok(is_gone)
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
