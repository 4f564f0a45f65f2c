//! What a checkpoint holds, as text.

use std::io::Write;

use dtr_engine::load::Checkpoint;

use super::{Chunk, Inspected, Options, Storage, Tensor};
use crate::console::Failure;
use crate::table::Table;
use crate::text;
use crate::tree_text::{self, Extent};

/// Characters of a metadata entry that are shown.
const METADATA_CHARACTERS_MAX: usize = 100;
const INDENT: &str = "  ";

/// Writes it, within the limits that were asked for.
pub(super) fn write(
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
        ("ranks", ranks(inspected)),
        ("size", size),
        ("tensors", tensors),
    ];
    facts.extend(replicated(inspected).map(|text| ("alike", text)));
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

/// How many ranks saved it; of several, what all of them wrote, and whose part is shown.
fn ranks(inspected: &Inspected) -> String {
    let manifest = &inspected.manifest;
    if manifest.world_size == 1 {
        return "1".into();
    }
    let (disk_bytes, raw_bytes) = (manifest.stored_bytes(), manifest.raw_bytes());
    format!(
        "{}: {} on disk, {} raw; below is the part of rank {}, `--rank` shows another",
        manifest.world_size,
        text::bytes(disk_bytes),
        text::bytes(raw_bytes),
        inspected.rank
    )
}

/// The replicated entries, and how much of it is in this shard.
fn replicated(inspected: &Inspected) -> Option<String> {
    let shard = inspected.manifest.shards.get(inspected.rank as usize)?;
    let names = shard.replicated.iter().map(|name| text::path(name));
    let names: Vec<&str> = names.collect();
    let parts = inspected.storages.iter().filter_map(|storage| Some((storage, storage.held?)));
    let (held, whole) = parts
        .fold((0, 0), |(held, whole), (storage, part)| (held + part.bytes, whole + storage.bytes));
    let figures = || format!("{} of {} lie in this shard", text::bytes(held), text::bytes(whole));
    (!names.is_empty()).then(|| format!("{}: {}", names.join(", "), figures()))
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
            tensor.place.clone(),
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
