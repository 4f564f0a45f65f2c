//! `ckpt-tool inspect`: what a checkpoint holds, without reading its chunks.
//!
//! Always holds: nothing in the store changes; all that is shown comes from one shard's header and
//! index, and the manifest; limits shorten the text, and never the JSON.

use std::collections::BTreeMap;
use std::io::Write;

use clap::Args;
use dtr_engine::format::index::{GlobalSlice, ShardIndex, TensorKind, TensorRecord};
use dtr_engine::format::manifest::Manifest;
use dtr_engine::format::tree::{Value, Walk, tensor_paths};
use dtr_engine::load::Checkpoint;
use serde::Serialize;

use crate::console::{Outcome, Verdict, write_json};
use crate::opened::{self, StoreArgument};
use crate::tree_text::{place, tensor_bytes};
use crate::values;
use crate::view::View;

mod report;

/// Arguments of `inspect`.
#[derive(Args, Debug)]
pub(crate) struct Options {
    #[command(flatten)]
    store: StoreArgument,
    /// The step to show [default: the newest]
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    step: Option<u64>,
    /// The rank whose part is shown, where several ranks saved the checkpoint.
    #[arg(long, value_name = "R", default_value_t = 0)]
    rank: u32,
    /// Show at most this many entries of each container and rows of each table; 0 shows all.
    #[arg(long, value_name = "N", default_value_t = 16)]
    limit: u64,
    /// Show the state tree only this deep.
    #[arg(long, value_name = "LEVELS")]
    depth: Option<usize>,
    /// Show every chunk: its position, encoding and checksums.
    #[arg(long)]
    chunks: bool,
    /// Print JSON, which is complete regardless of the limits.
    #[arg(long)]
    json: bool,
}

/// What is printed.
#[derive(Debug, Serialize)]
struct Inspected {
    manifest: Manifest,
    rank: u32,
    shard: String,
    disk_bytes: u64,
    chunk_bytes: u32,
    stored_bytes: u64,
    raw_bytes: u64,
    tree: Vec<TreeEntry>,
    tensors: Vec<Tensor>,
    storages: Vec<Storage>,
    codecs: Vec<CodecUse>,
    #[serde(skip_serializing_if = "Option::is_none")]
    chunks: Option<Vec<Chunk>>,
}

#[derive(Debug, Serialize)]
struct TreeEntry {
    path: String,
    r#type: &'static str,
    value: serde_json::Value,
    /// Index into `tensors`.
    #[serde(skip_serializing_if = "Option::is_none")]
    tensor: Option<u32>,
}

#[derive(Debug, Serialize)]
struct Tensor {
    /// Everywhere it stands in the tree.
    paths: Vec<String>,
    library: &'static str,
    dtype: String,
    shape: Vec<u64>,
    /// Of a slice: where it stands in the tensor it was cut from.
    #[serde(skip_serializing_if = "Option::is_none")]
    slice: Option<Slice>,
    /// The shape, and where a slice stands.
    #[serde(skip)]
    place: String,
    /// In items.
    strides: Vec<u64>,
    /// In items, from its storage's start.
    offset: u64,
    bytes: u64,
    storage: u32,
    contiguous: bool,
    requires_grad: bool,
}

#[derive(Debug, Serialize)]
struct Slice {
    /// Shape of the whole tensor.
    shape: Vec<u64>,
    /// Position of the slice's first item.
    offsets: Vec<u64>,
}

#[derive(Debug, Serialize)]
struct Storage {
    /// Where it lies in the shard's raw layout, or the part of it that the shard holds.
    raw_offset: u64,
    bytes: u64,
    /// What of it the shard holds, where all ranks saved it alike and each a part.
    #[serde(skip_serializing_if = "Option::is_none")]
    held: Option<Held>,
    /// Paths of the tensors that view it.
    tensors: Vec<String>,
}

/// A part of a replicated storage.
#[derive(Clone, Copy, Debug, Serialize)]
struct Held {
    start: u64,
    bytes: u64,
}

#[derive(Debug, Default, Serialize)]
struct CodecUse {
    codec: &'static str,
    chunks: u64,
    stored_bytes: u64,
    raw_bytes: u64,
}

#[derive(Debug, Serialize)]
struct Chunk {
    offset: u64,
    stored_bytes: u32,
    raw_bytes: u32,
    codec: &'static str,
    stored_crc32c: String,
    raw_crc32c: String,
}

pub(crate) fn run(options: &Options, out: &mut dyn Write) -> Outcome {
    let engine = options.store.open()?;
    let (step, rank) = (options.step, Some(options.rank));
    let checkpoint = opened::checkpoint(&engine, &options.store, step, rank, "inspecting")?;
    let inspected = inspect(&checkpoint, options.chunks);
    if options.json {
        write_json(out, &inspected)?;
    } else {
        report::write(out, &checkpoint, &inspected, options)?;
    }
    Ok(Verdict::Fine)
}

fn inspect(checkpoint: &Checkpoint, with_chunks: bool) -> Inspected {
    let index = checkpoint.index();
    let mut paths = vec![Vec::new(); index.tensors.len()];
    for (tensor, path) in tensor_paths(&index.nodes) {
        paths[tensor as usize].push(path.to_string());
    }
    let tensors: Vec<Tensor> =
        index.tensors.iter().zip(paths).map(|(record, paths)| tensor(record, paths)).collect();
    Inspected {
        manifest: checkpoint.manifest().clone(),
        rank: checkpoint.header().rank,
        shard: checkpoint.shard_name(),
        disk_bytes: checkpoint.file_bytes(),
        chunk_bytes: checkpoint.header().chunk_bytes,
        stored_bytes: index.chunks.iter().map(|chunk| u64::from(chunk.stored_bytes)).sum(),
        raw_bytes: index.raw_bytes(),
        tree: tree(index),
        storages: storages(index, &tensors),
        tensors,
        codecs: codecs(index),
        chunks: with_chunks.then(|| chunks(index)),
    }
}

fn tensor(record: &TensorRecord, paths: Vec<String>) -> Tensor {
    Tensor {
        paths,
        library: match record.kind {
            TensorKind::Torch => "torch",
            TensorKind::TorchParameter => "torch parameter",
            TensorKind::Numpy => "numpy",
        },
        dtype: record.dtype.clone(),
        shape: record.shape.clone(),
        slice: record.slice.clone().map(|GlobalSlice { shape, offsets }| Slice { shape, offsets }),
        place: place(record),
        strides: record.strides.clone(),
        offset: record.offset,
        bytes: tensor_bytes(record),
        storage: record.storage,
        contiguous: View::of(record).is_contiguous(),
        requires_grad: record.requires_grad,
    }
}

fn tree(index: &ShardIndex) -> Vec<TreeEntry> {
    let mut walk = Walk::new(&index.nodes);
    let mut entries = Vec::with_capacity(index.nodes.len());
    while let Some(node) = walk.advance() {
        entries.push(TreeEntry {
            path: walk.path().to_string(),
            r#type: values::type_name(&node.value),
            value: values::json(&node.value),
            tensor: match node.value {
                Value::Tensor(tensor) => Some(tensor),
                _ => None,
            },
        });
    }
    entries
}

fn storages(index: &ShardIndex, tensors: &[Tensor]) -> Vec<Storage> {
    let mut storages: Vec<Storage> = index
        .storages
        .iter()
        .map(|record| Storage {
            raw_offset: record.raw_offset,
            bytes: record.bytes,
            held: record.replica.map(|part| Held { start: part.start, bytes: part.bytes }),
            tensors: Vec::new(),
        })
        .collect();
    for tensor in tensors {
        storages[tensor.storage as usize].tensors.extend_from_slice(&tensor.paths);
    }
    storages
}

fn codecs(index: &ShardIndex) -> Vec<CodecUse> {
    let mut uses: BTreeMap<u8, CodecUse> = BTreeMap::new();
    for chunk in &index.chunks {
        let entry = uses.entry(chunk.codec.id()).or_default();
        entry.codec = chunk.codec.name();
        entry.chunks += 1;
        entry.stored_bytes += u64::from(chunk.stored_bytes);
        entry.raw_bytes += u64::from(chunk.raw_bytes);
    }
    uses.into_values().collect()
}

fn chunks(index: &ShardIndex) -> Vec<Chunk> {
    index
        .chunks
        .iter()
        .map(|chunk| Chunk {
            offset: chunk.offset,
            stored_bytes: chunk.stored_bytes,
            raw_bytes: chunk.raw_bytes,
            codec: chunk.codec.name(),
            stored_crc32c: format!("{:08x}", chunk.stored_crc32c),
            raw_crc32c: format!("{:08x}", chunk.raw_crc32c),
        })
        .collect()
}
