//! How the two stores differ when they are opened.
//!
//! Always holds: what cannot be read hides nothing else, and is compared with nothing; of two
//! attempts of a step the one that began later counts; what a rewind retired waits for no upload.

use std::collections::{BTreeMap, BTreeSet};

use crate::format::FormatError;
use crate::format::manifest::{Manifest, ShardEntry};
use crate::format::names::MANIFEST_FILE;
use crate::recovery::{OwnShare, retirements};
use crate::store::{StepListing, Store};
use crate::{EngineError, Result};

/// The checkpoints of a store, as far as they can be read when it is opened.
#[derive(Debug, Default)]
pub(super) struct Contents {
    /// Manifests by step.
    manifests: BTreeMap<u64, Manifest>,
    /// Steps whose manifest cannot be read now: whatever they are, they hide no other.
    unread: BTreeSet<u64>,
    /// Steps of which a shard is not listed that this rank can upload.
    lacking: BTreeSet<u64>,
}

impl Contents {
    pub(super) fn read(
        store: &dyn Store,
        listing: &[StepListing],
        share: Option<OwnShare>,
    ) -> Result<Self> {
        let has_manifest =
            |step: &StepListing| step.files.iter().any(|file| file.name == MANIFEST_FILE);
        let steps: Vec<u64> =
            listing.iter().filter(|step| has_manifest(step)).map(|step| step.step).collect();
        let mut contents = Self::default();
        for (step, read) in steps.iter().zip(store.read_manifests(&steps)) {
            match read {
                Ok(bytes) => contents.manifests.extend(
                    bytes
                        .and_then(|bytes| Manifest::decode(&bytes).ok())
                        .filter(|manifest| manifest.step == *step)
                        .map(|manifest| (*step, manifest)),
                ),
                Err(error @ (EngineError::Io { .. } | EngineError::Corrupt { .. })) => {
                    let store = store.location();
                    tracing::warn!(store, step, %error, "a manifest cannot be read, and is left");
                    contents.unread.insert(*step);
                }
                // Nothing is known of any.
                Err(error) => return Err(error),
            }
        }
        for directory in listing {
            let Some(manifest) = contents.manifests.get(&directory.step) else { continue };
            let is_listed = |shard: &ShardEntry| {
                directory.files.iter().any(|f| f.name == shard.file && f.bytes == shard.bytes)
            };
            let is_ours = |shard: &&ShardEntry| {
                share.is_none_or(|share| !share.may_miss(manifest, shard.rank))
            };
            if !manifest.shards.iter().filter(is_ours).all(is_listed) {
                contents.lacking.insert(directory.step);
            }
        }
        Ok(contents)
    }
}

/// How the two stores differ when they are opened.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Differences {
    /// Steps that the local store committed and the remote one does not have, or not whole.
    pub(super) waiting: BTreeSet<u64>,
    /// Steps of which the remote store has an attempt that began later.
    pub(super) outdated: BTreeSet<u64>,
    /// Steps that cannot be compared.
    pub(super) unsure: BTreeSet<u64>,
}

pub(super) fn differences(here: &Contents, there: &Contents) -> Differences {
    let unsure = here.unread.union(&there.unread).copied().collect();
    let mut differences = Differences { unsure, ..Differences::default() };
    for (step, local) in &here.manifests {
        match there.manifests.get(step) {
            _ if differences.unsure.contains(step) => {}
            Some(remote) if remote.attempt == local.attempt => {
                if there.lacking.contains(step) {
                    differences.waiting.insert(*step);
                }
            }
            Some(remote) if remote.created_unix_ms > local.created_unix_ms => {
                differences.outdated.insert(*step);
            }
            _ => drop(differences.waiting.insert(*step)),
        }
    }
    // What a rewind has retired is wanted nowhere.
    let retired = retired_in(here, there, &differences.outdated);
    differences.waiting.retain(|step| !retired.contains(step));
    differences
}

/// Steps that checkpoints of either store retire, where those that count are looked at.
fn retired_in(here: &Contents, there: &Contents, outdated: &BTreeSet<u64>) -> BTreeSet<u64> {
    let mut counts: BTreeMap<u64, &Manifest> =
        there.manifests.iter().map(|(step, manifest)| (*step, manifest)).collect();
    let local = here.manifests.iter().filter(|(step, _)| !outdated.contains(step));
    counts.extend(local.map(|(step, manifest)| (*step, manifest)));
    retirements(&counts).into_keys().collect()
}

/// Whether a manifest's bytes are not what was written. What a newer version wrote is sound.
pub(super) fn is_damaged(manifest: &[u8]) -> bool {
    matches!(Manifest::decode(manifest), Err(FormatError::Damaged(_)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::manifest::Retired;
    use crate::format::names::AttemptId;

    fn manifest(step: u64, begun: u64, attempt: u8, retired: &[(u64, u8)]) -> Manifest {
        let name = |attempt: u8| AttemptId([attempt; 16]).to_string();
        let entry = |(step, attempt): &(u64, u8)| Retired { attempt: name(*attempt), step: *step };
        Manifest {
            attempt: name(attempt),
            created_unix_ms: begun,
            dataset_positions: BTreeMap::new(),
            engine_version: "0".into(),
            format_version: 1,
            job: "job".into(),
            metadata: BTreeMap::new(),
            retired: retired.iter().map(entry).collect(),
            shards: Vec::new(),
            step,
            world_size: 0,
        }
    }

    /// Steps, when they were begun, and by which attempt.
    fn contents(attempts: &[(u64, u64, u8)]) -> Contents {
        let manifest = |(step, begun, attempt): &(u64, u64, u8)| {
            (*step, manifest(*step, *begun, *attempt, &[]))
        };
        Contents { manifests: attempts.iter().map(manifest).collect(), ..Contents::default() }
    }

    #[test]
    fn of_two_attempts_the_one_begun_later_counts() {
        let here = contents(&[(1, 10, 1), (2, 20, 2), (3, 30, 3), (4, 40, 4), (5, 50, 5)]);
        let there = contents(&[(1, 10, 1), (2, 21, 12), (3, 29, 13), (4, 40, 14), (9, 1, 19)]);
        let Differences { waiting, outdated, unsure } = differences(&here, &there);
        assert_eq!(waiting, BTreeSet::from([3, 4, 5]));
        assert_eq!(outdated, BTreeSet::from([2]));
        assert_eq!(unsure, BTreeSet::new());
    }

    #[test]
    fn what_cannot_be_read_or_was_retired_waits_for_no_upload() {
        let mut here = contents(&[(1, 10, 1), (2, 20, 2), (3, 30, 3), (4, 40, 4)]);
        let mut there = contents(&[(3, 31, 13)]);
        here.unread.insert(9);
        there.unread.insert(1);
        there.manifests.insert(3, manifest(3, 31, 13, &[(4, 4)]));
        let found = differences(&here, &there);
        assert_eq!(found.unsure, BTreeSet::from([1, 9]));
        assert_eq!(found.outdated, BTreeSet::from([3]));
        assert_eq!(found.waiting, BTreeSet::from([2]));
        // What does not count retires nothing.
        there.manifests.insert(3, manifest(3, 29, 13, &[(4, 4)]));
        assert_eq!(differences(&here, &there).waiting, BTreeSet::from([2, 3, 4]));
    }
}
