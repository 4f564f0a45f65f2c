//! `ckpt-tool inspect`: what a checkpoint holds, without reading its chunks.

use std::collections::BTreeMap;
use std::io::Write;

use clap::Args;
use dtr_engine::format::index::{ShardIndex, TensorKind, TensorRecord};
use dtr_engine::format::manifest::Manifest;
use dtr_engine::format::tree::{Value, Walk, tensor_paths};
use dtr_engine::load::Checkpoint;
use serde::Serialize;

use crate::console::{Failure, Outcome, Verdict, write_json};
use crate::opened::{self, StoreArgument};
use crate::table::Table;
use crate::tree_text::{self, Extent, tensor_bytes};
use crate::view::View;
use crate::{text, values};

/// Characters of a metadata entry that are shown.
const METADATA_CHARACTERS_MAX: usize = 100;
const INDENT: &str = "  ";

/// Arguments of `inspect`.
#[derive(Args, Debug)]
pub(crate) struct Options {
    #[command(flatten)]
    store: StoreArgument,
    /// The step to show [default: the newest]
    #[arg(long, value_name = "N")]
    step: Option<u64>,
    /// Show at most this many entries of each container and rows of each table; 0 shows all.
    #[arg(long, value_name = "N", default_value_t = 16)]
    limit: u64,
    /// Show the state tree only this deep.
    #[arg(long, value_name = "LEVELS")]
    depth: Option<usize>,
    /// Show every chunk: where it lies, how it is stored, its checksums.
    #[arg(long)]
    chunks: bool,
    /// Print JSON; it is complete, whatever the limits.
    #[arg(long)]
    json: bool,
}

/// What is printed.
#[derive(Debug, Serialize)]
struct Inspected {
    manifest: Manifest,
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
struct Storage {
    raw_offset: u64,
    bytes: u64,
    /// Paths of the tensors that view it.
    tensors: Vec<String>,
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
    let checkpoint = opened::checkpoint(&engine, &options.store, options.step, "inspecting")?;
    let inspected = inspect(&checkpoint, options.chunks);
    if options.json {
        write_json(out, &inspected)?;
    } else {
        write_text(out, &checkpoint, &inspected, options)?;
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

fn write_text(
    out: &mut dyn Write,
    checkpoint: &Checkpoint,
    inspected: &Inspected,
    options: &Options,
) -> Result<(), Failure> {
    let limit = if options.limit == 0 { u64::MAX } else { options.limit };
    writeln!(out, "step {} of {}", inspected.manifest.step, options.store.display())?;
    for (name, value) in facts(inspected) {
        writeln!(out, "{INDENT}{name:<10}{}", text::one_line(&value))?;
    }
    writeln!(out, "\ntree")?;
    let extent = Extent { limit, depth: options.depth };
    tree_text::write(out, INDENT, checkpoint.index(), extent)?;
    write_tensors(out, &inspected.tensors, limit)?;
    write_tied(out, &inspected.storages, limit)?;
    write_codecs(out, inspected)?;
    if let Some(chunks) = &inspected.chunks {
        write_chunks(out, chunks)?;
    }
    Ok(())
}

fn facts(inspected: &Inspected) -> Vec<(&'static str, String)> {
    let manifest = &inspected.manifest;
    let saved = text::utc(manifest.created_unix_ms);
    let version =
        format!("dtruntime {}, format {}", manifest.engine_version, manifest.format_version);
    let size = format!(
        "{} on disk, {} raw (ratio {})",
        text::bytes(inspected.disk_bytes),
        text::bytes(inspected.raw_bytes),
        text::ratio(inspected.disk_bytes, inspected.raw_bytes)
    );
    let tensors = format!(
        "{} in {}",
        text::count(inspected.tensors.len(), "tensor"),
        text::count(inspected.storages.len(), "storage")
    );
    let mut facts = vec![
        ("job", manifest.job.clone()),
        ("attempt", manifest.attempt.clone()),
        ("saved", format!("{saved} UTC")),
        ("by", version),
        ("ranks", manifest.world_size.to_string()),
        ("size", size),
        ("tensors", tensors),
    ];
    if !manifest.retired.is_empty() {
        let steps: Vec<String> =
            manifest.retired.iter().map(|retired| retired.step.to_string()).collect();
        facts.push(("retires", format!("steps {}", steps.join(", "))));
    }
    for (title, entries) in
        [("metadata", &manifest.metadata), ("dataset", &manifest.dataset_positions)]
    {
        facts.extend(entries.iter().map(|(name, value)| {
            let value = value.to_string();
            (title, format!("{name} = {}", text::cut(&value, METADATA_CHARACTERS_MAX)))
        }));
    }
    facts
}

/// The largest first: what a person looks for.
fn write_tensors(out: &mut dyn Write, tensors: &[Tensor], limit: u64) -> std::io::Result<()> {
    if tensors.is_empty() {
        return Ok(());
    }
    writeln!(out, "\ntensors, the largest first")?;
    let mut order: Vec<&Tensor> = tensors.iter().collect();
    order.sort_by(|a, b| b.bytes.cmp(&a.bytes).then_with(|| a.paths.cmp(&b.paths)));
    let mut table =
        Table::new().words("PATH").words("DTYPE").words("SHAPE").numbers("SIZE").words("NOTES");
    let shown = usize::try_from(limit).unwrap_or(usize::MAX);
    for tensor in order.iter().take(shown) {
        table.row([
            tensor.paths.first().map_or("", |path| text::path(path)).into(),
            tensor.dtype.clone(),
            text::shape(&tensor.shape),
            text::bytes(tensor.bytes),
            notes(tensor),
        ]);
    }
    table.write(out, INDENT)?;
    write_more(out, order.len(), shown)
}

fn notes(tensor: &Tensor) -> String {
    let mut notes = Vec::new();
    if tensor.library != "torch" {
        notes.push(tensor.library.to_owned());
    }
    if tensor.requires_grad {
        notes.push("requires grad".into());
    }
    if !tensor.contiguous {
        notes.push(format!("strides {:?}", tensor.strides));
    }
    if tensor.paths.len() > 1 {
        notes.push(format!("in {} places", tensor.paths.len()));
    }
    notes.join(", ")
}

fn write_tied(out: &mut dyn Write, storages: &[Storage], limit: u64) -> std::io::Result<()> {
    let tied: Vec<&Storage> = storages.iter().filter(|storage| storage.tensors.len() > 1).collect();
    if tied.is_empty() {
        return Ok(());
    }
    writeln!(out, "\ntied: tensors that share a storage, which is saved once")?;
    let shown = usize::try_from(limit).unwrap_or(usize::MAX);
    for storage in tied.iter().take(shown) {
        let mut names: Vec<&str> =
            storage.tensors.iter().take(shown).map(|path| text::path(path)).collect();
        let more = format!("{} more", storage.tensors.len() - names.len());
        if storage.tensors.len() > names.len() {
            names.push(&more);
        }
        let names = names.join(", ");
        writeln!(out, "{INDENT}{}: {}", text::bytes(storage.bytes), text::one_line(&names))?;
    }
    write_more(out, tied.len(), shown)
}

fn write_codecs(out: &mut dyn Write, inspected: &Inspected) -> std::io::Result<()> {
    let total: u64 = inspected.codecs.iter().map(|used| used.chunks).sum();
    let each = text::binary_bytes(u64::from(inspected.chunk_bytes));
    writeln!(out, "\n{} of {each}", text::count(total, "chunk"))?;
    if total == 0 {
        return Ok(());
    }
    let mut table = Table::new()
        .words("CODEC")
        .numbers("CHUNKS")
        .numbers("STORED")
        .numbers("RAW")
        .numbers("RATIO");
    for used in &inspected.codecs {
        table.row([
            used.codec.into(),
            used.chunks.to_string(),
            text::bytes(used.stored_bytes),
            text::bytes(used.raw_bytes),
            text::ratio(used.stored_bytes, used.raw_bytes),
        ]);
    }
    table.write(out, INDENT)
}

fn write_chunks(out: &mut dyn Write, chunks: &[Chunk]) -> std::io::Result<()> {
    writeln!(out, "\nall chunks, in raw order")?;
    let mut table = Table::new()
        .numbers("CHUNK")
        .numbers("OFFSET")
        .numbers("STORED")
        .numbers("RAW")
        .numbers("RATIO")
        .words("CODEC")
        .words("STORED CRC")
        .words("RAW CRC");
    for (number, chunk) in chunks.iter().enumerate() {
        table.row([
            number.to_string(),
            chunk.offset.to_string(),
            chunk.stored_bytes.to_string(),
            chunk.raw_bytes.to_string(),
            text::ratio(chunk.stored_bytes.into(), chunk.raw_bytes.into()),
            chunk.codec.into(),
            chunk.stored_crc32c.clone(),
            chunk.raw_crc32c.clone(),
        ]);
    }
    table.write(out, INDENT)
}

fn write_more(out: &mut dyn Write, all: usize, shown: usize) -> std::io::Result<()> {
    match all.saturating_sub(shown) {
        0 => Ok(()),
        more => writeln!(out, "{INDENT}… {more} more; `--limit 0` shows all"),
    }
}
