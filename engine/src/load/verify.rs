//! Verification: reads every chunk of every shard and reports all damage, not only the first.
//!
//! Always holds: a report without damage means that every byte of every shard, padding included,
//! was read and matched the digest its parent holds.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use serde::Serialize;

use super::read::{ChunkJob, ReadOptions, run};
use super::{Checkpoint, read_manifest};
use crate::format::manifest::Manifest;
use crate::format::names::shard_file_name;
use crate::format::tree;
use crate::store::Store;
use crate::{EngineError, Result};

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
    /// Display paths of the tensors whose bytes the chunk holds.
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
    match read_manifest(store, step) {
        Ok(manifest) => {
            for entry in &manifest.shards {
                match Checkpoint::open_shard(store, manifest.clone(), entry.rank) {
                    Ok(checkpoint) => verify_shard(&checkpoint, options, observer, &mut report)?,
                    Err(error) => {
                        report.damage.push(whole_shard(store, &manifest, &entry.file, error)?);
                    }
                }
            }
        }
        Err(error) => report.damage.push(whole_file("manifest.json", error)?),
    }
    report.damage.sort();
    report.seconds = start.elapsed().as_secs_f64();
    Ok(report)
}

/// Damage of a shard as a whole. One that is gone is damage while the manifest still names it; else
/// the checkpoint was deleted meanwhile, and that is no damage.
fn whole_shard(
    store: &dyn Store,
    manifest: &Manifest,
    file: &str,
    error: EngineError,
) -> Result<Damage> {
    match error {
        EngineError::NotFound { why, .. }
            if read_manifest(store, manifest.step)
                .is_ok_and(|now| now.attempt == manifest.attempt) =>
        {
            Ok(Damage { shard: file.into(), chunk: None, why, tensors: Vec::new() })
        }
        other => whole_file(file, other),
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
    let cancelled = AtomicBool::new(false);
    run(checkpoint, jobs, ReadOptions { verify: true, ..options }, &|chunk, result| {
        observer.advanced(u64::from(checkpoint.record(chunk).stored_bytes));
        if let Err(error) = result {
            let found = checkpoint.damage_of(chunk, &error);
            damage.lock().unwrap_or_else(PoisonError::into_inner).push(found);
        }
        cancelled.store(observer.is_cancelled(), Ordering::Relaxed);
        !cancelled.load(Ordering::Relaxed)
    })?;
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

    /// Display paths of the tensors with bytes in a chunk.
    pub(super) fn tensors_in(&self, chunk: usize) -> Vec<String> {
        let start = chunk as u64 * u64::from(self.header.chunk_bytes);
        let raw = start..start + u64::from(self.index.chunks[chunk].raw_bytes);
        tree::tensor_paths(&self.index.nodes)
            .filter(|(tensor, _)| overlaps(&self.tensor_range(*tensor), &raw))
            .map(|(_, path)| path.to_string())
            .collect()
    }

    /// The part of the raw layout that a tensor's items lie in.
    fn tensor_range(&self, tensor: u32) -> Range<u64> {
        let tensor = &self.index.tensors[tensor as usize];
        let storage = &self.index.storages[tensor.storage as usize];
        let item_bytes = u64::from(tensor.item_bytes);
        let start = storage.raw_offset + tensor.offset * item_bytes;
        if tensor.shape.contains(&0) {
            return start..start;
        }
        let last: u64 = tensor
            .shape
            .iter()
            .zip(&tensor.strides)
            .map(|(items, stride)| (items - 1) * stride)
            .sum();
        start..start + (last + 1) * item_bytes
    }
}

fn overlaps(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.start < b.end && b.start < a.end
}
