//! What several ranks, each with a store of its own, copy of one checkpoint.
//!
//! Always holds: what a rank copies is no checkpoint until every rank's shard is at the
//! destination; the rank that finds them all there publishes, and looks back: a manifest whose
//! shards went meanwhile is taken back.

use super::stream::Stream;
use super::{Between, Copied, Original, Transferred, is_whole, naming, read_back, standing};
use crate::Result;
use crate::clock::elapsed;
use crate::format::manifest::{Manifest, ShardEntry};
use crate::format::names::AttemptId;
use crate::recovery::OwnShare;
use crate::store::{FileListing, Publication, Store};

/// Copies what one rank has of `step`: its own shard, or, if that is not in its store because ranks
/// have moved since, whatever is. The copy is no checkpoint before [`publish_whole`].
pub(crate) fn transfer_share(
    between: &Between<'_>,
    (step, share): (u64, OwnShare),
) -> Copied<Transferred> {
    let Between { source, destination, environment, .. } = *between;
    let start = environment.monotonic();
    let what = naming(step, destination);
    let Original { manifest, .. } = Original::read(source, step, &what)?;
    let mut transferred = Transferred { step, was_there: true, ..Transferred::default() };
    let part = part_of(source, &manifest, share)?;
    let stream = Stream { between, manifest: &manifest, what };
    for entry in part {
        if is_whole(destination, &manifest, entry)? {
            continue;
        }
        transferred.was_there = false;
        // Nothing to copy, and it does not exist: that is reported of the source.
        let (_, sink) = stream.shard(entry)?;
        read_back(destination, &manifest, entry)?;
        transferred.count(entry, sink.as_ref());
    }
    transferred.seconds = elapsed(&**environment, start).as_secs_f64();
    Ok(transferred)
}

/// The shards that one rank has to copy: its own, or, if that is not in its store because ranks
/// have moved since, whatever is. If nothing is, its own all the same: somebody may have them.
fn part_of<'a>(
    source: &dyn Store,
    manifest: &'a Manifest,
    share: OwnShare,
) -> Result<Vec<&'a ShardEntry>> {
    let files = source.list_step(manifest.step)?.map(|listing| listing.files).unwrap_or_default();
    let lies_here = |entry: &&ShardEntry| files.iter().any(|file| file.name == entry.file);
    let is_own = |entry: &&ShardEntry| !share.may_miss(manifest, entry.rank);
    let here: Vec<&ShardEntry> = manifest.shards.iter().filter(lies_here).collect();
    let own_here: Vec<&ShardEntry> = here.iter().copied().filter(is_own).collect();
    Ok(match (own_here.is_empty(), here.is_empty()) {
        (false, _) => own_here,
        (true, false) => here,
        (true, true) => manifest.shards.iter().filter(is_own).collect(),
    })
}

/// What of a step that several ranks copy is at the destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Presence {
    /// The checkpoint.
    All,
    /// Shards of other ranks are still missing.
    Some,
    /// Not what this rank has copied: somebody removed it.
    Less,
}

/// Publishes `step` at the destination, once every rank has copied its shard there. Any rank may,
/// and several at once. `may_be_ours` says whether this process may have done so before.
pub(crate) fn publish_whole(
    source: &dyn Store,
    destination: &dyn Store,
    (step, share): (u64, OwnShare),
    may_be_ours: bool,
) -> Copied<Presence> {
    let what = naming(step, destination);
    let Original { manifest, bytes, attempt } = Original::read(source, step, &what)?;
    let standing = standing(destination, step)?;
    if standing == Some(attempt) {
        // The process that put it looked again, unless that was this one and it could not.
        return if may_be_ours {
            look_back(destination, &manifest, attempt)
        } else {
            Ok(Presence::All)
        };
    }
    let there = There::list(destination, step)?;
    if !part_of(source, &manifest, share)?.into_iter().all(|entry| there.has(entry)) {
        return Ok(Presence::Less);
    }
    if !manifest.shards.iter().all(|entry| there.has(entry)) {
        return Ok(Presence::Some);
    }
    destination.publish(Publication {
        step,
        attempt,
        manifest: &bytes,
        replaces: standing,
        // They were just listed, each read back by the rank that copied it.
        shards: &[],
    })?;
    look_back(destination, &manifest, attempt)
}

/// Looks, now that the manifest is visible, whether its shards still are, and takes it back if not:
/// meanwhile another process let the step go, which sees what it deletes, or this one does.
pub(super) fn look_back(
    destination: &dyn Store,
    manifest: &Manifest,
    attempt: AttemptId,
) -> Copied<Presence> {
    let there = There::list(destination, manifest.step)?;
    if manifest.shards.iter().all(|entry| there.has(entry)) {
        return Ok(Presence::All);
    }
    destination.unpublish(manifest.step, attempt, None)?;
    Ok(Presence::Less)
}

/// The files of a step that are in a store.
struct There(Vec<FileListing>);

impl There {
    fn list(store: &dyn Store, step: u64) -> Result<Self> {
        Ok(Self(store.list_step(step)?.map(|listing| listing.files).unwrap_or_default()))
    }

    fn has(&self, entry: &ShardEntry) -> bool {
        self.0.iter().any(|file| file.name == entry.file && file.bytes == entry.bytes)
    }
}
