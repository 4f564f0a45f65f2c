//! Where the bytes of replicated storages are: each rank's shard holds a part.
//!
//! Always holds: the shards agree on what is replicated, node by node; the parts of each storage
//! tile it. Shards that are not the reader's own are kept without their trees, so that memory does
//! not grow with ranks times state.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::{OnDamage, Shard};
use crate::format::index::{Difference, ShardIndex, StorageRecord, difference};
use crate::format::layout::{ElementType, Layout, StorageSpec};
use crate::format::manifest::Manifest;
use crate::store::Store;
use crate::sync::unpoisoned;
use crate::{EngineError, Result};

/// Shards that are opened at once.
const OPENING_MAX: usize = 16;

/// A part of a storage.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Part {
    /// 0 is the reader's own shard, others follow by rank.
    pub(super) shard: usize,
    /// The storage's index there.
    pub(super) storage: usize,
    /// Bytes of the storage.
    pub(super) held: Range<u64>,
}

/// What the reader's own shard does not hold.
#[derive(Debug, Default)]
pub(super) struct Parts {
    others: Vec<Shard>,
    /// By index of a storage in the reader's shard: its parts, in order. None for one that is
    /// there whole.
    of: BTreeMap<usize, Vec<Part>>,
    /// The storages in a raw layout of their own, if some have parts elsewhere.
    whole: Option<Vec<StorageRecord>>,
}

impl Parts {
    /// Opens the shards that hold the rest of what `own` names, if there is a rest.
    pub(super) fn open(store: &dyn Store, manifest: &Manifest, own: &Shard) -> Result<Self> {
        if own.index.storages.iter().all(|storage| storage.held() == (0..storage.bytes)) {
            return Ok(Self::default());
        }
        let opened = open_others(store, manifest, own, OnDamage::ReadCopy, |other| other)?;
        let mut others = Vec::with_capacity(opened.len());
        for (other, disagreement) in opened {
            if let Some(why) = disagreement {
                return Err(EngineError::corrupt(other.name(), why));
            }
            others.push(other);
        }
        let of = find_parts(own, others.iter().map(|other| &other.index))?;
        let whole = whole_storages(&own.index, own.header.chunk_bytes)
            .map_err(|error| EngineError::corrupt(own.name(), error.without_hint()))?;
        Ok(Self { others, of, whole: Some(whole) })
    }

    pub(super) fn storages<'a>(&'a self, own: &'a Shard) -> &'a [StorageRecord] {
        self.whole.as_deref().unwrap_or(&own.index.storages)
    }

    /// The parts of a storage; `None` if it is whole in the reader's own shard.
    pub(super) fn of(&self, storage: usize) -> Option<&[Part]> {
        self.of.get(&storage).map(Vec::as_slice)
    }

    /// The shard that a part names, none of them the reader's own.
    pub(super) fn other(&self, shard: usize) -> Option<&Shard> {
        shard.checked_sub(1).and_then(|other| self.others.get(other))
    }
}

/// Opens all shards but `own`, without their trees, which are compared with its own first: the
/// second value says where one differs. Of each shard only what `keep` takes stays.
fn open_others<T: Send>(
    store: &dyn Store,
    manifest: &Manifest,
    own: &Shard,
    on_damage: OnDamage,
    keep: impl Fn(Shard) -> T + Sync,
) -> Result<Vec<(T, Option<String>)>> {
    let ranks: Vec<u32> =
        (0..manifest.world_size).filter(|rank| *rank != own.header.rank).collect();
    let next = AtomicUsize::new(0);
    let opened = Mutex::new(Vec::with_capacity(ranks.len()));
    let open = || {
        while let Some(rank) = ranks.get(next.fetch_add(1, Ordering::Relaxed)) {
            let shard = Shard::open(store, manifest, *rank, on_damage).map(|mut shard| {
                let found = difference(&own.index, &shard.index);
                let disagreement = found.map(|found| disagreement(own, &shard, &found));
                let index = &mut shard.index;
                (index.nodes, index.tensors) = (Vec::new(), Vec::new());
                (keep(shard), disagreement)
            });
            let has_failed = shard.is_err();
            unpoisoned(opened.lock()).push((*rank, shard));
            if has_failed {
                next.store(ranks.len(), Ordering::Relaxed);
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..ranks.len().min(OPENING_MAX) {
            scope.spawn(open);
        }
        open();
    });
    let mut opened = unpoisoned(opened.into_inner());
    opened.sort_by_key(|(rank, _)| *rank);
    opened.into_iter().map(|(_, shard)| shard).collect()
}

/// By index of a storage in `own`: where its parts are, in order. They tile it.
fn find_parts<'a>(
    own: &'a Shard,
    others: impl Iterator<Item = &'a ShardIndex>,
) -> Result<BTreeMap<usize, Vec<Part>>> {
    let mut by_number: BTreeMap<u32, Vec<Part>> = BTreeMap::new();
    for (shard, index) in [&own.index].into_iter().chain(others).enumerate() {
        for (storage, record) in index.storages.iter().enumerate() {
            let held = record.held();
            if let Some(replica) = record.replica.filter(|_| !held.is_empty()) {
                let part = Part { shard, storage, held };
                by_number.entry(replica.number).or_default().push(part);
            }
        }
    }
    let mut found = BTreeMap::new();
    for (storage, record) in own.index.storages.iter().enumerate() {
        let Some(replica) = record.replica else { continue };
        let mut parts = by_number.remove(&replica.number).unwrap_or_default();
        parts.sort_by_key(|part| part.held.start);
        let tiled = parts.iter().try_fold(0, |end, part| {
            let follows = part.held.start == end;
            follows.then_some(part.held.end)
        });
        if tiled != Some(record.bytes) {
            let held: Vec<_> = parts.iter().map(|part| &part.held).collect();
            return Err(EngineError::corrupt(
                own.name(),
                format!(
                    "of the {} bytes of replicated storage {}, the shards hold {held:?}, expected \
                     each byte once",
                    record.bytes, replica.number
                ),
            ));
        }
        if record.held() != (0..record.bytes) {
            found.insert(storage, parts);
        }
    }
    Ok(found)
}

/// The storages of an index, each whole, in its order.
fn whole_storages(index: &ShardIndex, chunk_bytes: u32) -> Result<Vec<StorageRecord>> {
    // Of one type, so that their order stays: other writers may have another one.
    let element = ElementType::Bytes;
    let spec =
        |record: &StorageRecord| StorageSpec { bytes: record.bytes, element, on_device: false };
    let specs: Vec<StorageSpec> = index.storages.iter().map(spec).collect();
    let layout = Layout::plan(&specs, chunk_bytes)?;
    let whole = |storage| {
        let raw_offset = layout.raw_offset(storage);
        let StorageRecord { bytes, element, .. } = index.storages[storage];
        StorageRecord { raw_offset, bytes, element, replica: None }
    };
    Ok((0..index.storages.len()).map(whole).collect())
}

fn disagreement(own: &Shard, other: &Shard, found: &Difference) -> String {
    let absent = || "not replicated".to_owned();
    let (one, two) = (own.header.rank, other.header.rank);
    format!(
        "ranks {one} and {two} disagree on the replicated entries: `{}` is {} on rank {one} and {} \
         on rank {two}",
        found.path,
        found.left.clone().unwrap_or_else(absent),
        found.right.clone().unwrap_or_else(absent),
    )
}

/// Checks that the shards that a manifest names, published or not, agree on what is replicated and
/// hold all of it.
pub(crate) fn check_replicas(store: &dyn Store, manifest: &Manifest, rank: u32) -> Result<()> {
    let own = Shard::open(store, manifest, rank, OnDamage::Report)?;
    let mut others = Vec::new();
    // Their files are closed at once: there may be more ranks than a process may open files.
    let index_of = |other: Shard| other.index;
    for (other, disagreement) in open_others(store, manifest, &own, OnDamage::Report, index_of)? {
        if let Some(why) = disagreement {
            return Err(EngineError::invalid(
                format!("saving step {} with all ranks", manifest.step),
                why,
                "what `replicated` names must be the same on every rank, in the same order: name \
                 less, or give every rank the same",
            ));
        }
        others.push(other);
    }
    find_parts(&own, others.iter()).map(drop)
}
