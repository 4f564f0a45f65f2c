//! Tensors to safetensors files.
//!
//! ```text
//! shard after shard -> windows -> pieces (this thread) -> each to its place (a thread)
//!                                                      -> drafts -> the files' names
//! ```
//!
//! Always holds: what is read of a shard is read in order, and in bounded memory; what several
//! ranks saved of a tensor is written once, and compared.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Instant;

use dtr_engine::format::tree::Value;
use dtr_engine::load::Checkpoint;
use dtr_engine::{Engine, EngineError, Result};

use super::draft::{self, Drafts};
use super::export::Export;
use super::gather::{self, Gathered, Whose};
use super::layout::Layout;
use super::parts::{self, Part, Tensor};
use super::publish::{Plan, publish};
use super::selection::{Selection, listed};
use super::{DOING, Options, Restored, output};
use crate::console::note;
use crate::progress::Bar;
use crate::stream::{self, PART_BYTES, Segment};
use crate::view::View;
use crate::windows::Windows;
use crate::{opened, text};

/// Pieces in memory: one being read, one being written.
const PIECES: usize = 2;

/// Writes the selected tensors.
pub(super) fn restore(
    engine: &Engine,
    checkpoint: &Checkpoint,
    options: &Options,
    export: &Export,
) -> Result<Restored> {
    let start = Instant::now();
    let ranks = checkpoint.manifest().world_size;
    let is_of_all = options.rank.is_none() && ranks > 1;
    let whose = if is_of_all { Whose::OfAll } else { Whose::OfRank };
    let selection = Selection::of(options);
    let gathered = gather::gather(engine, checkpoint, &selection, whose)?;
    let Gathered { tensors, alone } = &gathered;
    if !alone.is_empty() && selection.is_explicit() {
        return Err(selection.whose(alone, ranks));
    }
    if tensors.is_empty() {
        return Err(opened::which_rank(DOING, &options.store, checkpoint));
    }
    let bytes_max = options.max_shard_size.unwrap_or(u64::MAX);
    let layout = Layout::of(tensors, bytes_max, export, checkpoint.step())?;

    let (mut drafts, plan) = begin(&layout, export, options)?;
    write_tensors(engine, checkpoint, &place(&layout), &mut drafts)?;
    publish(drafts, &plan)?;
    let Plan { files, earlier: removed, .. } = plan;
    if !removed.is_empty() {
        note(&format!("replaced an export of {}", text::count(removed.len(), "file")));
    }
    say_what_is_missing(checkpoint, &gathered);
    Ok(Restored {
        step: checkpoint.step(),
        rank: (!is_of_all).then_some(checkpoint.header().rank),
        output: options.output.clone(),
        kind: if files.len() == 1 { "file" } else { "files" },
        files,
        removed,
        tensors: tensors.len() as u64,
        left_out: alone.len() as u64,
        raw_bytes: layout.raw_bytes(),
        disk_bytes: layout.disk_bytes(),
        seconds: start.elapsed().as_secs_f64(),
    })
}

/// Room for all files, and how they get their names.
fn begin<'l>(
    layout: &'l Layout<'_>,
    export: &'l Export,
    options: &Options,
) -> Result<(Drafts<'l>, Plan)> {
    if options.max_shard_size.is_some() {
        draft::make_directory(export.directory())?;
    }
    let mut drafts = Drafts::create(export, layout.disk_bytes())?;
    // The process that held the name before may have published since it was looked at.
    let earlier = output::check_export(options, export)?;
    let plan = Plan::of(export, layout.files.len(), &earlier);
    plan.check()?;
    for file in &layout.files {
        drafts.add(&file.header, file.disk_bytes())?;
    }
    if let Some(index) = &layout.index {
        drafts.add(index, index.len() as u64)?;
    }
    Ok((drafts, plan))
}

/// Writes shard after shard.
fn write_tensors(
    engine: &Engine,
    own: &Checkpoint,
    placed: &BTreeMap<u32, Vec<Placed<'_>>>,
    drafts: &mut Drafts<'_>,
) -> Result<()> {
    let parts = placed.values().flatten();
    let bytes = parts.fold(0_u64, |bytes, part| bytes.saturating_add(part.source.bytes()));
    let bar = Bar::new(bytes, "restoring");
    for (rank, parts) in placed {
        if *rank == own.header().rank {
            write_parts(own, parts, drafts, &bar)?;
        } else {
            write_parts(&open(engine, own, *rank, parts)?, parts, drafts, &bar)?;
        }
    }
    Ok(())
}

/// A part of a tensor, and where it goes.
struct Placed<'t> {
    tensor: &'t Tensor,
    source: &'t View,
    target: &'t View,
    is_again: bool,
    /// The number of the file.
    file: usize,
    /// Where the tensor begins in the file.
    at: u64,
}

/// By rank: parts, as they are in its shard.
fn place<'t>(layout: &Layout<'t>) -> BTreeMap<u32, Vec<Placed<'t>>> {
    let mut placed = BTreeMap::<u32, Vec<Placed<'t>>>::new();
    for (file, planned) in layout.files.iter().enumerate() {
        let mut at = planned.header.len() as u64;
        for tensor in &planned.tensors {
            for Part { rank, source, target, is_again } in &tensor.parts {
                let part = Placed { tensor, source, target, is_again: *is_again, file, at };
                placed.entry(*rank).or_default().push(part);
            }
            at += tensor.bytes;
        }
    }
    for parts in placed.values_mut() {
        parts.sort_by_key(|part| (part.source.storage, part.source.run_at(0).0));
    }
    placed
}

/// Opens another rank's shard, together with those that hold the rest of memory that it shares.
fn open(engine: &Engine, own: &Checkpoint, rank: u32, parts: &[Placed<'_>]) -> Result<Checkpoint> {
    let shard = engine.shard_beside(own, rank)?;
    let is_there = |part: &Placed<'_>| {
        let storage = shard.index().storages[part.source.storage as usize];
        storage.held() == (0..storage.bytes)
    };
    if parts.iter().all(is_there) {
        return Ok(shard);
    }
    engine.checkpoint_beside(own, rank)
}

/// Reads piece after piece of one shard, while another thread writes the one before.
fn write_parts(
    shard: &Checkpoint,
    parts: &[Placed<'_>],
    drafts: &mut Drafts<'_>,
    bar: &Bar,
) -> Result<()> {
    let views: Vec<View> = parts.iter().map(|part| part.source.clone()).collect();
    let wanted: BTreeSet<u32> = views.iter().map(|view| view.storage).collect();
    let windows = Windows::new(shard, |storage| wanted.contains(&storage));
    let lengths = parts.iter().map(|part| (part.source.bytes(), part.tensor.item_bytes));
    let (to_writer, filled) = sync_channel::<(Vec<Segment>, Vec<u8>)>(PIECES);
    let (to_reader, empty) = sync_channel::<Vec<u8>>(PIECES);
    std::thread::scope(|scope| {
        let writer = scope.spawn(move || write_pieces(parts, drafts, filled, &to_reader, bar));
        let memories = (0..PIECES).map(|_| Vec::new()).chain(empty.iter());
        let pieces = stream::plan(lengths, PART_BYTES).zip(memories);
        let result = read_pieces(&windows, &views, pieces, &to_writer);
        drop(to_writer);
        drop(empty);
        let written = writer.join().unwrap_or_else(|_| {
            Err(EngineError::internal("writing a safetensors file", "the writing thread panicked"))
        });
        // If writing failed, reading merely stopped.
        written.and(result)
    })
}

fn read_pieces(
    windows: &Windows<'_>,
    views: &[View],
    pieces: impl Iterator<Item = (Vec<Segment>, Vec<u8>)>,
    to_writer: &SyncSender<(Vec<Segment>, Vec<u8>)>,
) -> Result<()> {
    for (piece, mut memory) in pieces {
        memory.resize(stream::part_bytes(&piece), 0);
        stream::read(windows, views, &piece, &mut memory)?;
        if to_writer.send((piece, memory)).is_err() {
            break;
        }
    }
    Ok(())
}

fn write_pieces(
    parts: &[Placed<'_>],
    drafts: &mut Drafts<'_>,
    filled: Receiver<(Vec<Segment>, Vec<u8>)>,
    to_reader: &SyncSender<Vec<u8>>,
    bar: &Bar,
) -> Result<()> {
    let mut there = Vec::new();
    for (piece, memory) in filled {
        for segment in &piece {
            let bytes = &memory[segment.place()];
            write_segment(&parts[segment.tensor], segment.range.start, bytes, drafts, &mut there)?;
        }
        bar.advance(memory.len() as u64);
        // The reader may have read all there is.
        let _finished = to_reader.send(memory);
    }
    Ok(())
}

/// Writes a part's row-major bytes from `position` on to where they are in the tensor; those that
/// another rank saved, too, are compared with what is `there`.
fn write_segment(
    part: &Placed<'_>,
    mut position: u64,
    mut bytes: &[u8],
    drafts: &mut Drafts<'_>,
    there: &mut Vec<u8>,
) -> Result<()> {
    while !bytes.is_empty() {
        let (start, length) = part.target.run_at(position);
        let length = usize::try_from(length).map_or(bytes.len(), |length| length.min(bytes.len()));
        let (run, rest) = bytes.split_at(length);
        if part.is_again {
            there.resize(length, 0);
            drafts.read(part.file, part.at + start, there)?;
            if there != run {
                return Err(parts::differ(part.tensor));
            }
        } else {
            drafts.write(part.file, part.at + start, run)?;
        }
        position += length as u64;
        bytes = rest;
    }
    Ok(())
}

/// A reader of the files must not take them for the whole state.
fn say_what_is_missing(checkpoint: &Checkpoint, gathered: &Gathered) {
    let tensors = &gathered.tensors;
    let firsts = tensors.iter().filter_map(|tensor| tensor.parts.first());
    let held = firsts.clone().count();
    let storages = firsts.map(|part| (part.rank, part.source.storage)).collect::<BTreeSet<_>>();
    if storages.len() < held {
        note(&format!(
            "tensors that share memory in the checkpoint are written once per name: {} for {}",
            text::count(tensors.len(), "tensor"),
            text::count(storages.len(), "storage")
        ));
    }
    if let Some(first) = gathered.alone.first() {
        note(&format!(
            "not written, since each rank has its own: {}, like {}; `--rank R` writes those of \
             rank R, too",
            text::count(gathered.alone.len(), "tensor"),
            listed(std::slice::from_ref(first))
        ));
    }
    let is_plain = |value: &Value| !value.is_container() && !matches!(value, Value::Tensor(_));
    let nodes = &checkpoint.index().nodes;
    let plain = nodes.iter().filter(|node| is_plain(&node.value)).count();
    if plain > 0 {
        note(&format!(
            "{} of the state {} not written: safetensors files hold tensors only",
            text::count(plain, "plain value"),
            if plain == 1 { "is" } else { "are" }
        ));
    }
}
