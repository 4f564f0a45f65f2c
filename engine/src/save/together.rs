//! The last step of a save by several ranks: report, publish where asked, wait for the commit.
//!
//! Always holds: success is reported only when the manifest stands and is durable, in every store
//! where each rank has its own; what the coordinator does not say, a store that all share does; a
//! shard that a manifest may come to name is kept.

use std::collections::BTreeMap;

use dtr_proto::ANNOTATIONS_BYTES_MAX;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::job::Job;
use crate::config::Config;
use crate::engine::Core;
use crate::error::CoordinationKind;
use crate::format::checksum::crc32c;
use crate::format::manifest::{Manifest, Retired, ShardEntry};
use crate::format::names::{AttemptId, shard_file_name};
use crate::load::check_replicas;
use crate::ranks::{Attempt, Outcome, Ranks, Report};
use crate::recovery::in_order;
use crate::store::{Publication, ShardId};
use crate::{EngineError, Result};

/// One rank's part in an attempt.
pub(super) struct Together<'a> {
    pub(super) core: &'a Core,
    pub(super) ranks: &'a dyn Ranks,
    pub(super) job: &'a Job,
    pub(super) attempt: Attempt,
    /// This rank's shard, which is durable.
    pub(super) entry: ShardEntry,
    /// Checksum of the structure of the replicated entries.
    pub(super) replicated_crc32c: Option<u32>,
    /// Of rank 0 with a store of its own: its [`Annotations`], encoded; else empty.
    pub(super) annotations: Vec<u8>,
    pub(super) replaces: Option<AttemptId>,
}

/// Why there is no checkpoint.
pub(super) struct Failure {
    pub(super) error: EngineError,
    /// Whether there may come to be one all the same: the shard is kept for it, and cleaned away
    /// like any other that was abandoned.
    pub(super) may_be_published: bool,
}

impl From<EngineError> for Failure {
    fn from(error: EngineError) -> Self {
        Self { error, may_be_published: true }
    }
}

/// What the manifests of all ranks' own stores have in common, apart from the shards: what rank
/// 0's says.
/// Metadata need not be the same on every rank, and what is best must be.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Annotations {
    dataset_positions: BTreeMap<String, Value>,
    metadata: BTreeMap<String, Value>,
    retired: Vec<Retired>,
}

/// What a rank reports of its manifest.
pub(super) fn annotations_of(config: &Config, manifest: &Manifest) -> Result<Vec<u8>> {
    if !config.has_own_store() || config.rank != 0 {
        return Ok(Vec::new());
    }
    let what = format!("saving step {} with all ranks", manifest.step);
    let Manifest { dataset_positions, metadata, retired, .. } = manifest.clone();
    let annotations = Annotations { dataset_positions, metadata, retired };
    let bytes = serde_json::to_vec(&annotations)
        .map_err(|error| EngineError::internal(what.clone(), error.to_string()))?;
    if bytes.len() <= ANNOTATIONS_BYTES_MAX {
        return Ok(bytes);
    }
    Err(EngineError::invalid(
        what,
        format!(
            "its metadata, dataset positions and retired steps take {} bytes, and ranks with \
             their own stores exchange at most {ANNOTATIONS_BYTES_MAX}",
            bytes.len()
        ),
        "attach less `metadata`: large data belongs in the state",
    ))
}

/// The manifest that this rank publishes.
fn completed(manifest: &Manifest, shards: Vec<ShardEntry>, annotations: &[u8]) -> Result<Manifest> {
    let mut complete = Manifest { shards, ..manifest.clone() };
    if annotations.is_empty() {
        return Ok(complete);
    }
    let of_rank_0: Annotations = serde_json::from_slice(annotations).map_err(|error| {
        let what = format!("publishing step {}", manifest.step);
        EngineError::internal(what, format!("the annotations of rank 0 cannot be read: {error}"))
    })?;
    complete.dataset_positions = of_rank_0.dataset_positions;
    complete.metadata = of_rank_0.metadata;
    // What this rank alone has and goes back over ceases to exist, too.
    complete.retired.extend(of_rank_0.retired);
    complete.retired = in_order(complete.retired.iter());
    Ok(complete)
}

impl Together<'_> {
    /// Sees the attempt to its end. `manifest` is complete but for the shards.
    pub(super) fn commit(&self, manifest: &Manifest) -> std::result::Result<(), Failure> {
        if self.core.config.has_own_store() {
            return self.commit_in_own_store(manifest);
        }
        let mut has_published = false;
        loop {
            match self.report(None, &|| self.job.has_failed()) {
                Ok(Outcome::Committed) => return Ok(()),
                Ok(Outcome::Publish { shards, .. }) => {
                    let complete = Manifest { shards, ..manifest.clone() };
                    if let Err(error) = self.check_replicas(&complete) {
                        return self.refuse(error, has_published);
                    }
                    has_published = true;
                    self.publish(&complete)?;
                    if self.tell()? {
                        return Ok(());
                    }
                }
                Ok(Outcome::Aborted { why, may_be_published }) => {
                    if may_be_published && self.stands() {
                        return Ok(());
                    }
                    return Err(Failure { error: self.aborted(why), may_be_published });
                }
                Err(_) if self.stands() => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// The same where each rank has a store of its own: there is a checkpoint only once all have
    /// published, and what this one did counts for nothing before.
    fn commit_in_own_store(&self, manifest: &Manifest) -> std::result::Result<(), Failure> {
        let mut published_crc32c = None;
        loop {
            // A rank that has published waits for the outcome: cancelling is for what can be undone
            // alone.
            let is_cancelled = || published_crc32c.is_none() && self.job.has_failed();
            match self.report(published_crc32c, &is_cancelled)? {
                Outcome::Committed => return Ok(()),
                Outcome::Publish { shards, annotations } => {
                    let complete = completed(manifest, shards, &annotations);
                    // The replicated entries were compared by their checksums: the shards are
                    // elsewhere.
                    let published = complete.and_then(|complete| self.publish(&complete));
                    match published.and_then(|()| self.standing_crc32c()) {
                        Ok(crc32c) => published_crc32c = Some(crc32c),
                        Err(error) => return self.refuse(error, false),
                    }
                }
                Outcome::Aborted { why, may_be_published } => {
                    return Err(Failure { error: self.aborted(why), may_be_published });
                }
            }
        }
    }

    fn report(
        &self,
        published_crc32c: Option<u32>,
        is_cancelled: &dyn Fn() -> bool,
    ) -> Result<Outcome> {
        let own_store = self.core.config.has_own_store();
        let replicated_crc32c = self.replicated_crc32c.filter(|_| own_store);
        let report = Report {
            shard: &self.entry,
            own_store,
            published_crc32c,
            replicated_crc32c,
            annotations: &self.annotations,
        };
        self.ranks.report(self.attempt, report, is_cancelled)
    }

    /// Checksum of the manifest that stands, which may be that of another rank that was asked, too.
    fn standing_crc32c(&self) -> Result<u32> {
        let bytes = self.core.store.read_manifest(self.attempt.step)?;
        Ok(crc32c(&bytes.unwrap_or_default()))
    }

    /// Does not publish. Another rank may have been asked meanwhile: what becomes of the attempt is
    /// the coordinator's to say, and the store's.
    fn refuse(&self, error: EngineError, has_published: bool) -> std::result::Result<(), Failure> {
        let told = self.ranks.abort(self.attempt, &error.to_string(), !has_published);
        let outcome = told.and_then(|()| self.report(None, &|| false));
        let may_be_published = match outcome {
            Ok(Outcome::Committed) => return Ok(()),
            Ok(Outcome::Aborted { may_be_published, .. }) => may_be_published,
            Ok(Outcome::Publish { .. }) | Err(_) => true,
        };
        let is_shared = !self.core.config.has_own_store();
        if is_shared && may_be_published && self.stands() {
            return Ok(());
        }
        Err(Failure { error, may_be_published })
    }

    /// Whether the shards agree on the replicated entries.
    fn check_replicas(&self, manifest: &Manifest) -> Result<()> {
        let has_replicated = |entry: &ShardEntry| !entry.replicated.is_empty();
        if !manifest.shards.iter().chain([&self.entry]).any(has_replicated) {
            return Ok(());
        }
        check_replicas(self.core.store.as_ref(), manifest, self.entry.rank)
    }

    fn publish(&self, manifest: &Manifest) -> Result<()> {
        let what = || format!("publishing step {}", self.attempt.step);
        let _span = tracing::trace_span!("publish").entered();
        let mut shards = self.shards_of(manifest)?;
        if self.core.config.has_own_store() {
            // Those of the others need not be here.
            shards.retain(|(shard, _)| shard.rank == self.entry.rank);
        }
        let bytes =
            manifest.encode().map_err(|error| EngineError::internal(what(), error.to_string()))?;
        self.core.store.publish(Publication {
            step: self.attempt.step,
            attempt: self.attempt.id,
            manifest: &bytes,
            replaces: self.replaces,
            shards: &shards,
        })
    }

    /// The shards that a manifest names: one of each rank, all of this attempt.
    fn shards_of(&self, manifest: &Manifest) -> Result<Vec<(ShardId, u64)>> {
        let Attempt { step, id } = self.attempt;
        let shard = |(rank, entry): (u32, &ShardEntry)| {
            let is_sound = entry.rank == rank && entry.file == shard_file_name(rank, id);
            is_sound.then_some((ShardId { step, rank, attempt: id }, entry.bytes))
        };
        let shards: Option<Vec<_>> = (0..).zip(&manifest.shards).map(shard).collect();
        let is_complete = manifest.shards.len() == manifest.world_size as usize;
        shards.filter(|_| is_complete).ok_or_else(|| {
            EngineError::internal(
                format!("publishing step {step}"),
                "the reported shards are not one per rank of this attempt",
            )
        })
    }

    /// Reports the manifest that is published to the coordinator. False if the shard has to be
    /// reported again.
    fn tell(&self) -> Result<bool> {
        let step = self.attempt.step;
        match self.ranks.commit(self.attempt, self.standing_crc32c()?) {
            Ok(is_known) => Ok(is_known),
            Err(error) => {
                tracing::warn!(step, %error, "the checkpoint is committed, and the coordinator \
                    could not be told");
                Ok(true)
            }
        }
    }

    /// Whether this attempt's manifest stands; it is durable then.
    fn stands(&self) -> bool {
        let step = self.attempt.step;
        let store = self.core.store.as_ref();
        let Ok(Some(bytes)) = store.read_manifest(step) else { return false };
        let Ok(manifest) = Manifest::decode(&bytes) else { return false };
        let Ok(shards) = self.shards_of(&manifest) else { return false };
        let publication = Publication {
            step,
            attempt: self.attempt.id,
            manifest: &bytes,
            replaces: None,
            shards: &shards,
        };
        // Publishing it again changes nothing, and makes sure of it.
        manifest.attempt == self.attempt.id.to_string() && store.publish(publication).is_ok()
    }

    /// The manifest that a rewind replaces in this rank's own store.
    pub(super) fn replaced(&self) -> Result<Option<Vec<u8>>> {
        if self.replaces.is_none() || !self.core.config.has_own_store() {
            return Ok(None);
        }
        let Attempt { step, id } = self.attempt;
        let bytes = self.core.store.read_local_manifest(step)?;
        let is_ours = |bytes: &Vec<u8>| {
            Manifest::decode(bytes).is_ok_and(|manifest| manifest.attempt == id.to_string())
        };
        // Another rank with the same directory may have published already, and knows.
        Ok(bytes.filter(|bytes| !is_ours(bytes)))
    }

    /// Sees to it that no manifest names this rank's shard, after it is known that there will be no
    /// checkpoint. False if that cannot be said.
    pub(super) fn takes_back(&self, replaced: Option<&[u8]>) -> bool {
        if !self.core.config.has_own_store() {
            // Nobody published.
            return true;
        }
        let Attempt { step, id } = self.attempt;
        match self.core.store.unpublish(step, id, replaced) {
            Ok(()) => true,
            Err(error) => {
                tracing::warn!(step, %error, "a manifest stays that not all ranks have: no load \
                    will agree on it");
                false
            }
        }
    }

    fn aborted(&self, why: String) -> EngineError {
        EngineError::Coordination {
            kind: CoordinationKind::SaveAborted,
            what: format!("saving step {} with all ranks", self.attempt.step),
            why,
            hint: "training may go on: save a later step; earlier checkpoints are untouched".into(),
        }
    }
}
