//! The file beside several safetensors files that says which of them holds which tensor, as Hugging
//! Face's loaders read it.
//!
//! Pure. Always holds: every tensor of every file is named once.

use std::collections::BTreeMap;

use dtr_engine::{EngineError, Result};
use serde::Serialize;

use super::export::Export;
use super::layout::Planned;

#[derive(Serialize)]
struct Index<'a> {
    metadata: Metadata,
    weight_map: BTreeMap<&'a str, &'a str>,
}

#[derive(Serialize)]
struct Metadata {
    /// Bytes of all tensors.
    total_size: u64,
}

/// The index of these files.
pub(super) fn encode(files: &[Planned<'_>], export: &Export) -> Result<Vec<u8>> {
    let names = (0..files.len())
        .map(|file| export.name(file, files.len()).into_string().map_err(|_| unnamed(export)))
        .collect::<Result<Vec<_>>>()?;
    let tensors = files.iter().zip(&names).flat_map(|(file, name)| {
        file.tensors.iter().map(|tensor| (tensor.name.as_str(), name.as_str()))
    });
    let total_size = files.iter().fold(0_u64, |sum, file| sum.saturating_add(file.raw_bytes()));
    let index = Index { metadata: Metadata { total_size }, weight_map: tensors.collect() };
    let mut bytes = serde_json::to_vec_pretty(&index)
        .map_err(|error| EngineError::internal("writing an index", error.to_string()))?;
    bytes.push(b'\n');
    Ok(bytes)
}

fn unnamed(export: &Export) -> EngineError {
    EngineError::invalid(
        format!("naming `{}` in an index", export.whole().display()),
        "the name is not UTF-8, but an index is JSON",
        "choose another name",
    )
}
