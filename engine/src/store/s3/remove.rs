//! Deleting checkpoints and what dead attempts left.
//!
//! Always holds:
//! - A checkpoint's manifest is gone before the first of its shards goes: none is ever seen with
//!   shards missing because it is being deleted, unless another rank publishes it at that moment,
//!   and then it is gone again when the deletion ends.
//! - A manifest goes only as the version that was looked at, where the service knows conditions on
//!   deletions.
//! - A checkpoint goes with the shards that its manifest names; other shards of its step may be
//!   another writer's, and are orphans to those who clean.
//! - A shard that this process is writing stays, and so does one that a manifest may name.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::objects::Object;
use super::{Shared, is_own_name, publish};
use crate::format::manifest::{Manifest, total_bytes};
use crate::format::names::{self, AttemptId};
use crate::{EngineError, Result};

/// How often a manifest that another writer replaces between the look and the deletion is looked at
/// again.
const LOOKS_MAX: u32 = 3;

/// Deletes a checkpoint; see [`crate::store::Store::remove_checkpoint`]. Without a manifest there
/// is none: other ranks may be uploading shards of one, and what is left of none are orphans, which
/// go after the grace period. With `only`, the checkpoint of another attempt stays.
pub(super) fn remove_checkpoint(
    shared: &Arc<Shared>,
    step: u64,
    only: Option<AttemptId>,
) -> Result<u64> {
    let what = format!("deleting step {step} of `{}`", shared.address);
    let mut looked_at = BTreeMap::new();
    for _ in 0..LOOKS_MAX {
        let Some(object) = shared.ask(&what, shared.get_manifest(step))? else {
            // Gone since, perhaps by the deletion that was said to have met another version.
            return delete_shards(shared, step, looked_at);
        };
        let manifest = Manifest::decode(&object.bytes).ok();
        let attempt = manifest.as_ref().and_then(|manifest| manifest.attempt_id().ok());
        if only.is_some() && only != attempt {
            return Ok(0);
        }
        let goes = shards_that_go(shared, &what, step, manifest)?;
        if !delete_manifest(shared, step, &object)? {
            looked_at = goes;
            continue;
        }
        let deleted = delete_shards(shared, step, goes);
        if let Some(attempt) = attempt {
            // Somebody may have put it again while its shards went, having seen them all. Whoever
            // puts it later sees them missing.
            take_back(shared, step, attempt)?;
        }
        return Ok(object.bytes.len() as u64 + deleted?);
    }
    Err(contended(what))
}

/// The shards that go with a manifest, and their bytes.
fn shards_that_go(
    shared: &Shared,
    what: &str,
    step: u64,
    manifest: Option<Manifest>,
) -> Result<BTreeMap<String, u64>> {
    if let Some(manifest) = manifest {
        return Ok(manifest.shards.into_iter().map(|shard| (shard.file, shard.bytes)).collect());
    }
    // What it named is not known: all that nobody is at.
    let mut shards = shards_there(shared, what, step)?;
    let own = shared.own();
    shards.retain(|file, _| !own.live.contains(&(step, file.clone())));
    Ok(shards)
}

/// Deletes shards, many at a time. Returns the bytes freed, or the first failure once all were
/// tried: no later call knows of them, for the manifest that named them is gone.
fn delete_shards(shared: &Arc<Shared>, step: u64, shards: BTreeMap<String, u64>) -> Result<u64> {
    let keys: Vec<String> = shards.keys().map(|file| shared.file_key(step, file)).collect();
    let each = Arc::clone(shared);
    let deleted = shared.at_once(keys.clone(), move |key| {
        let shared = Arc::clone(&each);
        async move { shared.delete(&key).await }
    });
    for (key, outcome) in keys.iter().zip(deleted) {
        outcome.map_err(|failure| shared.refused(&shared.naming("deleting", key), failure))?;
    }
    Ok(total_bytes(shards.into_values()))
}

/// Deletes the manifest of an attempt, if it stands there, and no shard.
pub(super) fn take_back(shared: &Shared, step: u64, attempt: AttemptId) -> Result<()> {
    let what = format!("taking back step {step} of `{}`", shared.address);
    for _ in 0..LOOKS_MAX {
        let Some(object) = shared.ask(&what, shared.get_manifest(step))? else { return Ok(()) };
        let stands = Manifest::decode(&object.bytes).ok();
        let is_its = stands.and_then(|manifest| manifest.attempt_id().ok()) == Some(attempt);
        if !is_its || delete_manifest(shared, step, &object)? {
            return Ok(());
        }
    }
    Err(contended(what))
}

/// Deletes the manifest that was read; false if another one stands there by now.
fn delete_manifest(shared: &Shared, step: u64, object: &Object) -> Result<bool> {
    let key = shared.file_key(step, names::MANIFEST_FILE);
    shared.ask(&shared.naming("deleting", &key), shared.delete_version(&key, &object.tag))
}

fn contended(what: String) -> EngineError {
    EngineError::StepConflict {
        what,
        why: format!("another writer replaced its manifest {LOOKS_MAX} times meanwhile"),
        hint: "delete it when nobody saves this step".into(),
    }
}

/// Names and bytes of a step's shards, by whatever writer.
pub(super) fn shards_there(
    shared: &Shared,
    what: &str,
    step: u64,
) -> Result<BTreeMap<String, u64>> {
    let prefix = shared.file_key(step, "");
    let objects = shared.ask(what, shared.list_objects(&prefix))?;
    let files = objects.into_iter().filter_map(|object| {
        let (_, file) = shared.parse_key(&object.key)?;
        Some((file, object.bytes))
    });
    Ok(files.filter(|(file, _)| names::parse_shard_file(file).is_some()).collect())
}

/// Deletes an object that no manifest names; see [`crate::store::Store::remove_orphan`].
pub(super) fn remove_orphan(shared: &Shared, step: u64, file: &str) -> Result<Option<u64>> {
    if names::parse_manifest_temporary(file).is_some() {
        // Here a manifest is put in one piece: there are none.
        return Ok(Some(0));
    }
    let attempt = names::parse_shard_file(file).map(|(_, attempt)| attempt);
    let Some(attempt) = attempt.filter(|_| is_own_name(file)) else {
        return Err(EngineError::invalid(
            format!("deleting `{file}` of step {step}"),
            "it is no shard by its name",
            "delete it by hand if it is not needed",
        ));
    };
    let key = shared.file_key(step, file);
    let what = shared.naming("looking at", &key);
    let Some(bytes) = shared.ask(&what, shared.length(&key))? else {
        return Ok(Some(0));
    };
    let is_live = shared.own().live.contains(&(step, file.to_owned()));
    // Its own doubt ends with the grace period, which is over.
    shared.own().uncertain.remove(&attempt);
    if is_live || publish::may_be_published(shared, step, attempt) {
        return Ok(None);
    }
    delete(shared, step, file)?;
    Ok(Some(bytes))
}

fn delete(shared: &Shared, step: u64, file: &str) -> Result<()> {
    let key = shared.file_key(step, file);
    let what = shared.naming("deleting", &key);
    shared.ask(&what, shared.delete(&key))
}
