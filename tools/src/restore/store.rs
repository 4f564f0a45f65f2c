//! A checkpoint to a store, written again.
//!
//! Always holds: tree, tensors, storages, metadata and dataset positions come out as they were; the
//! attempt and its time are new; nothing at the destination goes, be it damaged. The copy is cut
//! into chunks of the same size, so each window is decoded once.

use std::path::Path;
use std::time::Instant;

use dtr_engine::config::S3Settings;
use dtr_engine::format::index::TensorRecord;
use dtr_engine::format::tree::tensor_paths;
use dtr_engine::load::Checkpoint;
use dtr_engine::recovery::{StepState, StepSurvey, Survey};
use dtr_engine::save::{SaveRequest, StorageInput, StorageSource};
use dtr_engine::{Config, Engine, EngineError, Result};

use super::Restored;
use crate::progress::Bar;
use crate::text;
use crate::tree_text::place;
use crate::windows::Windows;

/// Bytes of the staging arena, unless four chunks are more: the copy streams through it.
const STAGING_BYTES: u64 = 128 << 20;

/// Copies the checkpoint into the store at `output`.
pub(super) fn restore(checkpoint: &Checkpoint, output: &Path, s3: S3Settings) -> Result<Restored> {
    let start = Instant::now();
    let index = checkpoint.index();
    let is_slice = |number: u32| index.tensors[number as usize].slice.is_some();
    if let Some((number, path)) = tensor_paths(&index.nodes).find(|(number, _)| is_slice(*number)) {
        return Err(sliced(&path.to_string(), &index.tensors[number as usize]));
    }
    let manifest = checkpoint.manifest();
    let chunk_bytes = checkpoint.header().chunk_bytes;
    let engine = Engine::open(Config {
        job: manifest.job.clone(),
        chunk_bytes,
        staging_bytes: Some(STAGING_BYTES.max(4 * u64::from(chunk_bytes))),
        s3,
        ..Config::new(output)
    })?;
    check_later(&engine.survey()?, checkpoint.step(), output)?;
    let windows = Windows::new(checkpoint, |_| true);
    let bar = Bar::new(checkpoint.raw_bytes(), "copying");
    let sources: Vec<Source<'_>> = checkpoint
        .storages()
        .iter()
        .map(|record| Source { windows: &windows, raw_offset: record.raw_offset, bar: &bar })
        .collect();
    let storages = checkpoint.storages().iter().zip(&sources).map(|(record, source)| {
        StorageInput { bytes: record.bytes, element: record.element, source }
    });
    let handle = engine.save(SaveRequest {
        step: checkpoint.step(),
        rewind: false,
        nodes: index.nodes.clone(),
        tensors: index.tensors.clone(),
        storages: storages.collect(),
        replicated: index.replicated.clone(),
        waited: std::time::Duration::ZERO,
        prepared: std::time::Duration::ZERO,
        metadata: manifest.metadata.clone(),
        dataset_positions: manifest.dataset_positions.clone(),
    });
    let handle = handle.map_err(|error| explain(error, output))?;
    let info = handle.result(None).ok_or_else(|| {
        EngineError::internal("waiting for the copy", "no time limit was set, and it ran out")
    })??;
    engine.close()?;
    Ok(Restored {
        step: info.step,
        rank: Some(checkpoint.header().rank),
        output: output.to_owned(),
        kind: "store",
        files: Vec::new(),
        removed: Vec::new(),
        tensors: index.tensors.len() as u64,
        left_out: 0,
        raw_bytes: info.raw_bytes,
        disk_bytes: info.stored_bytes,
        seconds: start.elapsed().as_secs_f64(),
    })
}

/// A save retires later checkpoints that are damaged, for repaired they would be the newest. A copy
/// is no training that goes on: they may be about to be repaired.
fn check_later(survey: &Survey, step: u64, output: &Path) -> Result<()> {
    let is_in_danger =
        |later: &&StepSurvey| later.step > step && matches!(later.state, StepState::Damaged { .. });
    let Some(later) = survey.steps.iter().find(is_in_danger) else { return Ok(()) };
    Err(EngineError::StepConflict {
        what: format!("restoring step {step} to `{}`", output.display()),
        why: format!("step {} there is damaged, and would be discarded", later.step),
        hint: "restore to another store, or repair or delete that step first".into(),
    })
}

/// Refuses to pass a part of a tensor off as the tensor.
fn sliced(name: &str, record: &TensorRecord) -> EngineError {
    EngineError::invalid(
        format!("restoring tensor `{}`", text::one_line(name)),
        format!("the shard holds a slice of it, {}; other ranks hold the rest", place(record)),
        "copy the whole checkpoint with `ckpt-tool copy`, or restore to a file \
         `NAME.safetensors`, where slices are put together",
    )
}

/// The engine's advice is for training; this is a copy.
fn explain(error: EngineError, output: &Path) -> EngineError {
    match error {
        EngineError::StepConflict { what, why, .. } => EngineError::StepConflict {
            what: format!("{what} to `{}`", output.display()),
            why,
            hint: "restore to another store: checkpoints are copied in ascending order".into(),
        },
        other => other,
    }
}

/// One storage of the checkpoint.
struct Source<'c> {
    windows: &'c Windows<'c>,
    raw_offset: u64,
    bar: &'c Bar,
}

impl StorageSource for Source<'_> {
    fn read(&self, offset: u64, destination: &mut [u8]) -> Result<()> {
        if destination.is_empty() {
            return Ok(());
        }
        let start = self.raw_offset + offset;
        let end = start + destination.len() as u64;
        self.windows.visit(start, end, |window_start, window| {
            let from = start.max(window_start);
            let until = end.min(window_start + window.len() as u64);
            let place =
                |position, base| usize::try_from(position - base).expect("positions in memory fit");
            destination[place(from, start)..place(until, start)]
                .copy_from_slice(&window[place(from, window_start)..place(until, window_start)]);
        })?;
        self.bar.advance(destination.len() as u64);
        Ok(())
    }
}
