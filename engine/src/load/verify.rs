//! Verification: reads every chunk of every shard and reports all damage, not only the first.
//!
//! Always holds: a report without damage means that every byte of every shard, padding included,
//! was read and matched the digest its parent holds.

use std::fmt::{self, Write as _};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use serde::Serialize;

use super::read::{ChunkJob, ReadOptions, run};
use super::{Checkpoint, Damaged, read_manifest};
use crate::format::manifest::Manifest;
use crate::format::names::shard_file_name;
use crate::format::tree::{TreePath, Value, Walk};
use crate::store::Store;
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

/// Told how verification advances.
pub trait VerifyObserver: Sync {
    /// This many more stored bytes were read and checked.
    fn advanced(&self, stored_bytes: u64);
    /// Whether to stop before all is read; asked after each chunk.
    fn is_cancelled(&self) -> bool {
        false
    }
}

impl VerifyObserver for () {
    fn advanced(&self, _stored_bytes: u64) {}
}

/// Verifies all shards of `step`. Damage is in the report; an error means that nothing is known.
pub(crate) fn verify_step(
    store: &dyn Store,
    step: u64,
    options: ReadOptions,
    observer: &dyn VerifyObserver,
) -> Result<VerifyReport> {
    let start = Instant::now();
    let mut report = VerifyReport { step, ..VerifyReport::default() };
    match read_manifest(store, step).map(Arc::new) {
        Ok(manifest) => {
            let mut missing = Missing::default();
            for entry in &manifest.shards {
                match Checkpoint::open_shard(store, &manifest, entry.rank, Damaged::Told) {
                    Ok(checkpoint) => verify_shard(&checkpoint, options, observer, &mut report)?,
                    Err(error @ EngineError::NotFound { .. }) => missing.add(&entry.file, error),
                    Err(error) => report.damage.push(whole_file(&entry.file, error)?),
                }
            }
            report.damage.extend(missing.judge(store, &manifest)?);
        }
        Err(error) => report.damage.push(whole_file("manifest.json", error)?),
    }
    report.damage.sort();
    report.seconds = start.elapsed().as_secs_f64();
    Ok(report)
}

/// Shards that are gone. That is damage while the manifest still names them; else the checkpoint
/// was deleted meanwhile, and it is none. Asked once, after all: a manifest may name thousands.
#[derive(Debug, Default)]
struct Missing {
    damage: Vec<Damage>,
    first: Option<EngineError>,
}

impl Missing {
    fn add(&mut self, file: &str, error: EngineError) {
        let EngineError::NotFound { why, .. } = &error else { return };
        let (shard, why) = (file.to_owned(), why.clone());
        self.damage.push(Damage { shard, chunk: None, why, tensors: Vec::new() });
        self.first.get_or_insert(error);
    }

    fn judge(self, store: &dyn Store, manifest: &Manifest) -> Result<Vec<Damage>> {
        let stands = |step| read_manifest(store, step).map(|now| now.attempt == manifest.attempt);
        match self.first {
            Some(error) if !stands(manifest.step).unwrap_or(false) => Err(error),
            _ => Ok(self.damage),
        }
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
    checkpoint: &Checkpoint,
    options: ReadOptions,
    observer: &dyn VerifyObserver,
    report: &mut VerifyReport,
) -> Result<()> {
    let mut order: Vec<usize> = (0..checkpoint.index.chunks.len()).collect();
    order.sort_by_key(|&chunk| checkpoint.record(chunk).offset);
    let jobs = order.into_iter().map(|chunk| ChunkJob { chunk, pieces: Vec::new() }).collect();
    let damage = Mutex::new(Vec::new());
    let unavailable = Mutex::new(None);
    let cancelled = AtomicBool::new(false);
    let options = ReadOptions { verify: true, copies: false, ..options };
    run(checkpoint, jobs, options, &|chunk, result| {
        observer.advanced(u64::from(checkpoint.record(chunk).stored_bytes));
        if let Err(error) = result {
            if matches!(error, EngineError::Unavailable { .. }) {
                // It says nothing about the chunk.
                *unavailable.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
                return false;
            }
            let found = checkpoint.damage_of(chunk, &error);
            damage.lock().unwrap_or_else(PoisonError::into_inner).push(found);
        }
        cancelled.store(observer.is_cancelled(), Ordering::Relaxed);
        !cancelled.load(Ordering::Relaxed)
    })?;
    if let Some(error) = unavailable.into_inner().unwrap_or_else(PoisonError::into_inner) {
        return Err(error);
    }
    if cancelled.into_inner() {
        return Err(EngineError::Closed {
            what: format!("verifying step {}", checkpoint.step()),
            why: "it was cancelled".into(),
            hint: "verify again for a complete report".into(),
        });
    }
    report.shards += 1;
    for record in &checkpoint.index.chunks {
        report.chunks += 1;
        report.raw_bytes += u64::from(record.raw_bytes);
        report.stored_bytes += u64::from(record.stored_bytes);
    }
    report.damage.extend(damage.into_inner().unwrap_or_else(PoisonError::into_inner));
    Ok(())
}

impl Checkpoint {
    fn damage_of(&self, chunk: usize, error: &EngineError) -> Damage {
        let why = match error {
            EngineError::Corrupt { why, .. } => why.clone(),
            other => other.to_string(),
        };
        Damage {
            shard: shard_file_name(self.header.rank, self.header.attempt),
            chunk: Some(chunk as u64),
            why,
            tensors: self.tensors_in(chunk),
        }
    }

    /// Display paths of the first tensors with bytes in a chunk.
    pub(super) fn tensors_in(&self, chunk: usize) -> Vec<String> {
        let start = chunk as u64 * u64::from(self.header.chunk_bytes);
        let raw = start..start + u64::from(self.index.chunks[chunk].raw_bytes);
        let mut walk = Walk::new(&self.index.nodes);
        let mut names = Vec::new();
        while let Some(node) = walk.advance()
            && names.len() < TENSORS_NAMED_MAX
        {
            if let Value::Tensor(tensor) = node.value
                && overlaps(&self.tensor_range(tensor), &raw)
            {
                names.push(name_of(walk.path()));
            }
        }
        names
    }

    /// The part of the raw layout that a tensor's items lie in.
    fn tensor_range(&self, tensor: u32) -> Range<u64> {
        let tensor = &self.index.tensors[tensor as usize];
        let storage = &self.index.storages[tensor.storage as usize];
        // One without items may be anywhere, beyond every number too.
        if tensor.shape.contains(&0) {
            return storage.raw_offset..storage.raw_offset;
        }
        let item_bytes = u64::from(tensor.item_bytes);
        let start = storage.raw_offset + tensor.offset * item_bytes;
        let last: u64 = tensor
            .shape
            .iter()
            .zip(&tensor.strides)
            .map(|(items, stride)| (items - 1) * stride)
            .sum();
        start..start + (last + 1) * item_bytes
    }
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
