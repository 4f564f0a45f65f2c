//! Verification: reads every chunk of every shard and reports all damage, not only the first.
//!
//! Always holds: a report without damage means that every byte of every shard, padding included,
//! was read and matched the digest its parent holds.

use std::collections::{BTreeMap, HashMap};
use std::fmt::{self, Write as _};
use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use serde::Serialize;

use super::deliver::Ways;
use super::plan::ChunkJob;
use super::read::{ReadOptions, run};
use super::{Checkpoint, OnDamage, Shard, check_replicas, read_manifest};
use crate::format::index::{ShardIndex, StorageRecord};
use crate::format::manifest::Manifest;
use crate::format::names::shard_file_name;
use crate::format::tree::{TreePath, Value, Walk};
use crate::recovery::OwnShare;
use crate::store::Store;
use crate::sync::unpoisoned;
use crate::{EngineError, Result};

/// Most tensors that one damaged place names, and most bytes of each name: a checkpoint may have
/// millions, all in one chunk, under names as long as its index.
const TENSORS_NAMED_MAX: usize = 64;
const NAME_BYTES_MAX: usize = 1024;

/// What verification found.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct VerifyReport {
    /// The step.
    pub step: u64,
    /// Shards that were read.
    pub shards: u32,
    /// Chunks that were read.
    pub chunks: u64,
    /// Their raw bytes.
    pub raw_bytes: u64,
    /// Their stored bytes.
    pub stored_bytes: u64,
    /// Seconds it took.
    pub seconds: f64,
    /// Everything that is not as it was written; empty when all is well.
    pub damage: Vec<Damage>,
}

/// One damaged place.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Damage {
    /// The file's name in the step's directory.
    pub shard: String,
    /// The chunk; `None` where the manifest, header, footer or index is hit.
    pub chunk: Option<u64>,
    /// Expected against actual.
    pub why: String,
    /// Display paths of the tensors whose bytes the chunk holds: the first 64, each cut after 1024
    /// bytes.
    pub tensors: Vec<String>,
}

/// Receives the progress of a verification.
pub trait VerifyObserver: Sync {
    /// This many more stored bytes were read and checked.
    fn advanced(&self, stored_bytes: u64);
    /// So many bytes of a copy were given to the network, or are about to be: an observer that
    /// limits the rate returns when the next may go.
    fn sent(&self, _bytes: u64) {}
    /// Whether to stop before all is read; asked after each chunk.
    fn is_cancelled(&self) -> bool {
        false
    }
}

impl VerifyObserver for () {
    fn advanced(&self, _stored_bytes: u64) {}
}

/// Verifies all shards of `step`. Damage is in the report; an error means that nothing is known. A
/// shard of another rank that may be in a store of that rank's own is verified if it is found.
pub(crate) fn verify_step(
    store: &dyn Store,
    step: u64,
    (workers, own): (usize, Option<OwnShare>),
    observer: &dyn VerifyObserver,
) -> Result<VerifyReport> {
    let start = Instant::now();
    let mut report = VerifyReport { step, ..VerifyReport::default() };
    match read_manifest(store, step) {
        Ok(manifest) => {
            let mut has_replicated = false;
            for entry in &manifest.shards {
                match Shard::open(store, &manifest, entry.rank, OnDamage::Report) {
                    Ok(shard) => {
                        has_replicated |= shard.header.replicated;
                        verify_shard((&shard, &entry.file), workers, observer, &mut report)?;
                    }
                    Err(EngineError::NotFound { .. })
                        if own.is_some_and(|own| own.may_miss(&manifest, entry.rank)) => {}
                    Err(EngineError::NotFound { why, .. }) => {
                        let shard = entry.file.clone();
                        report.damage.push(Damage { shard, chunk: None, why, tensors: Vec::new() });
                    }
                    Err(error) => report.damage.push(whole_file(&entry.file, error)?),
                }
            }
            if !report.damage.is_empty() && !still_stands(store, &manifest) {
                return Err(deleted(step));
            }
            if has_replicated && report.damage.iter().all(|damage| damage.chunk.is_some()) {
                report.damage.extend(verify_replicas(store, &manifest)?);
            }
        }
        Err(error) => report.damage.push(whole_file("manifest.json", error)?),
    }
    report.damage.sort();
    report.seconds = start.elapsed().as_secs_f64();
    Ok(report)
}

/// Whether the shards, each sound in itself, are one checkpoint.
fn verify_replicas(store: &dyn Store, manifest: &Manifest) -> Result<Option<Damage>> {
    match check_replicas(store, manifest, 0) {
        Ok(()) => Ok(None),
        Err(EngineError::InvalidArgument { why, .. }) => {
            let shard = "manifest.json".into();
            Ok(Some(Damage { shard, chunk: None, why, tensors: Vec::new() }))
        }
        Err(error) => whole_file("manifest.json", error).map(Some),
    }
}

/// Whether what is verified is the checkpoint still. Of one that was deleted or replaced meanwhile,
/// missing and unreadable files are no damage. Asked once, after all: it may name thousands.
fn still_stands(store: &dyn Store, manifest: &Manifest) -> bool {
    match read_manifest(store, manifest.step) {
        Ok(now) => now.attempt == manifest.attempt,
        Err(error) => !matches!(error, EngineError::NotFound { .. }),
    }
}

fn deleted(step: u64) -> EngineError {
    EngineError::NotFound {
        what: format!("verifying step {step}"),
        why: "it was deleted or replaced meanwhile".into(),
        hint: "list the steps again: a running training prunes old ones".into(),
    }
}

/// Damage of a file as a whole; errors that say nothing about the data stay errors.
fn whole_file(file: &str, error: EngineError) -> Result<Damage> {
    match error {
        EngineError::Corrupt { why, .. } => {
            Ok(Damage { shard: file.into(), chunk: None, why, tensors: Vec::new() })
        }
        // What cannot be read cannot be restored.
        EngineError::Io { what, source, .. } => Ok(Damage {
            shard: file.into(),
            chunk: None,
            why: format!("{what}: {source}"),
            tensors: Vec::new(),
        }),
        other => Err(other),
    }
}

fn verify_shard(
    (shard, file): (&Shard, &str),
    workers: usize,
    observer: &dyn VerifyObserver,
    report: &mut VerifyReport,
) -> Result<()> {
    let mut order: Vec<usize> = (0..shard.index.chunks.len()).collect();
    order.sort_by_key(|&chunk| shard.record(chunk).offset);
    let job = |chunk| ChunkJob { shard, chunk, pieces: Vec::new() };
    let jobs = order.into_iter().map(job).collect();
    let damage = Mutex::new(Vec::new());
    let unavailable = Mutex::new(None);
    let cancelled = AtomicBool::new(false);
    let options = ReadOptions { copies: false, ..ReadOptions::default() };
    run(jobs, workers, options, &Ways::default(), &|shard, chunk, result| {
        observer.advanced(u64::from(shard.record(chunk).stored_bytes));
        if let Err(error) = result {
            if matches!(error, EngineError::Unavailable { .. }) {
                // It says nothing about the chunk.
                *unpoisoned(unavailable.lock()) = Some(error);
                return false;
            }
            let found = shard.damage_of(chunk, &error);
            unpoisoned(damage.lock()).push(found);
        }
        cancelled.store(observer.is_cancelled(), Ordering::Relaxed);
        !cancelled.load(Ordering::Relaxed)
    })?;
    if let Some(error) = unpoisoned(unavailable.into_inner()) {
        return Err(error);
    }
    if cancelled.into_inner() {
        return Err(EngineError::Closed {
            what: format!("verifying step {}", shard.header.step),
            why: "it was cancelled".into(),
            hint: "verify again for a complete report".into(),
        });
    }
    report.shards += 1;
    for record in &shard.index.chunks {
        report.chunks += 1;
        report.raw_bytes += u64::from(record.raw_bytes);
        report.stored_bytes += u64::from(record.stored_bytes);
    }
    report.damage.extend(unpoisoned(damage.into_inner()));
    if let Err(error) = shard.read_start() {
        report.damage.push(whole_file(file, error)?);
    }
    Ok(())
}

impl Shard {
    fn damage_of(&self, chunk: usize, error: &EngineError) -> Damage {
        let why = match error {
            EngineError::Corrupt { why, .. } => why.clone(),
            other => other.without_hint(),
        };
        Damage {
            shard: shard_file_name(self.header.rank, self.header.attempt),
            chunk: Some(chunk as u64),
            why,
            tensors: tensors_over(&self.index, &self.bytes_in(chunk)),
        }
    }

    /// By storage: its bytes that a chunk holds.
    fn bytes_in(&self, chunk: usize) -> BTreeMap<usize, Range<u64>> {
        let start = chunk as u64 * u64::from(self.header.chunk_bytes);
        let end = start + u64::from(self.record(chunk).raw_bytes);
        let storages = self.index.storages.iter().enumerate();
        let inside = storages.filter_map(|(number, storage)| {
            let (from, until) = (storage.raw_offset.max(start), storage.raw_end().min(end));
            let bytes = |raw: u64| storage.held().start + (raw - storage.raw_offset);
            (from < until).then(|| (number, bytes(from)..bytes(until)))
        });
        inside.collect()
    }
}

impl Checkpoint {
    /// Display paths of the first tensors with bytes in a chunk of one of its shards.
    pub(super) fn tensors_in(&self, shard: &Shard, chunk: usize) -> Vec<String> {
        let mut bytes = shard.bytes_in(chunk);
        if !std::ptr::eq(shard, &raw const self.own) {
            // Only the own tree is known: replicated storages have the same number in each shard.
            let number = |storage: &StorageRecord| storage.replica.map(|replica| replica.number);
            let own = self.own.index.storages.iter().enumerate();
            let own: HashMap<u32, usize> =
                own.filter_map(|(index, storage)| Some((number(storage)?, index))).collect();
            let of_own = |(there, bytes): (usize, Range<u64>)| {
                Some((*own.get(&number(&shard.index.storages[there])?)?, bytes))
            };
            bytes = bytes.into_iter().filter_map(of_own).collect();
        }
        tensors_over(&self.own.index, &bytes)
    }
}

/// Display paths of the first tensors that touch the given bytes of storages.
fn tensors_over(index: &ShardIndex, bytes: &BTreeMap<usize, Range<u64>>) -> Vec<String> {
    let mut walk = Walk::new(&index.nodes);
    let mut names = Vec::new();
    while let Some(node) = walk.advance()
        && names.len() < TENSORS_NAMED_MAX
    {
        if let Value::Tensor(tensor) = node.value
            && let record = &index.tensors[tensor as usize]
            && let Some(bytes) = bytes.get(&(record.storage as usize))
            && overlaps(&record.hull(), bytes)
        {
            names.push(name_of(walk.path()));
        }
    }
    names
}

/// A path as a message shows it: no longer than a message may be.
fn name_of(path: &TreePath<'_>) -> String {
    let mut name = Clipped(String::new());
    if write!(name, "{path}").is_err() {
        name.0.push_str("...");
    }
    name.0
}

/// Text that refuses to grow beyond [`NAME_BYTES_MAX`].
struct Clipped(String);

impl fmt::Write for Clipped {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let room = NAME_BYTES_MAX - self.0.len();
        if text.len() <= room {
            self.0.push_str(text);
            return Ok(());
        }
        self.0.push_str(&text[..text.floor_char_boundary(room)]);
        Err(fmt::Error)
    }
}

fn overlaps(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.start < b.end && b.start < a.end
}

/// Tensors that a message names.
const LISTED_MAX: usize = 10;

/// The first of these names, and whether there are more.
pub(super) fn listed(tensors: &[String]) -> String {
    let (named, more) = tensors.split_at(tensors.len().min(LISTED_MAX));
    let others = if more.is_empty() { "" } else { " and others" };
    format!("{}{others}", named.join(", "))
}
