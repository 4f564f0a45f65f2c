//! Deleting checkpoints and what dead attempts left.
//!
//! Always holds:
//! - A checkpoint's manifest is gone before the first of its shards goes: none is ever seen with
//!   shards missing because it is being deleted.
//! - A checkpoint goes with the shards that its manifest names; other shards of its step may be
//!   another writer's, and are orphans to those who clean.
//! - A shard that this process is writing stays, and so does one that a manifest may name.

use super::{Shared, is_own_name, publish};
use crate::format::manifest::Manifest;
use crate::format::names;
use crate::{EngineError, Result};

/// Deletes a checkpoint; see [`crate::store::Store::remove_checkpoint`].
pub(super) fn remove_checkpoint(shared: &Shared, step: u64) -> Result<u64> {
    let what = format!("deleting step {step} of `{}`", shared.address);
    let prefix = shared.file_key(step, "");
    let objects = shared.ask(&what, shared.list_objects(&prefix, None))?;
    let files: Vec<(String, u64)> = objects
        .into_iter()
        .filter_map(|object| Some((shared.parse_key(&object.key)?.1, object.bytes)))
        .collect();
    let Some(object) = shared.ask(&what, shared.get_manifest(step))? else {
        // No checkpoint: other ranks may be bringing shards of one, and what is left of none is an
        // orphan, which goes after the grace period.
        return Ok(0);
    };
    let manifest = Manifest::decode(&object.bytes).ok();
    let goes = |file: &str| match &manifest {
        Some(manifest) => manifest.shards.iter().any(|shard| shard.file == file),
        // What it named is not known: all that nobody is at.
        None => !shared.own().live.contains(&(step, file.to_owned())),
    };
    let manifest_first = files
        .iter()
        .filter(|(file, _)| file == names::MANIFEST_FILE)
        .chain(files.iter().filter(|(file, _)| file != names::MANIFEST_FILE && goes(file)));
    let mut freed_bytes = 0;
    for (file, bytes) in manifest_first {
        delete(shared, step, file)?;
        freed_bytes += bytes;
    }
    Ok(freed_bytes)
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
