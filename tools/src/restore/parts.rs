//! What goes into a file: tensors, each with the parts that ranks saved of it.
//!
//! ```text
//! rank 0's shard    rank 1's shard        file
//! |a: rows 0..2|    |a: rows 2..4|        |a: rows 0..4|
//! ```
//!
//! Always holds: the parts of a tensor are all of it, each item once but for parts that several
//! ranks saved alike; names are unique, and everything that is gathered can be written.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use dtr_engine::format::index::{GlobalSlice, TensorRecord};
use dtr_engine::format::tree::{TreePath, tensor_paths};
use dtr_engine::load::Checkpoint;
use dtr_engine::{Engine, EngineError, Result};

use super::header::file_dtype;
use super::selection::{Selection, cannot};
use super::tiling::{self, Tile};
use crate::text;
use crate::view::View;

/// A tensor to write.
#[derive(Clone, Debug)]
pub(super) struct Tensor {
    pub(super) name: String,
    /// Where it stands in the state, for messages.
    pub(super) path: String,
    /// As the file calls it.
    pub(super) dtype: &'static str,
    /// As the file counts it.
    pub(super) shape: Vec<u64>,
    pub(super) item_bytes: u32,
    pub(super) bytes: u64,
    /// By ascending rank; none is empty.
    pub(super) parts: Vec<Part>,
}

/// A tensor, or a slice of it, as a rank saved it.
#[derive(Clone, Debug)]
pub(super) struct Part {
    pub(super) rank: u32,
    /// In the rank's shard.
    pub(super) source: View,
    /// In the tensor as the file holds it.
    pub(super) target: View,
    /// Whether a rank before this one saved the same part.
    pub(super) is_again: bool,
}

/// Whose tensors are wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Whose {
    /// All that the rank of the checkpoint has, those of which it holds slices whole.
    OfRank,
    /// What is no rank's alone: what all saved alike, and of what they hold slices.
    OfAll,
}

/// The tensors, and what was left out.
#[derive(Debug)]
pub(super) struct Gathered {
    pub(super) tensors: Vec<Tensor>,
    /// Tensors that were asked for and are a rank's alone.
    pub(super) alone: u64,
}

/// Finds what of the tensors of a checkpoint goes into a file: by falling item size, so that each
/// starts aligned, then as they lie in the checkpoint.
pub(super) fn gather(
    engine: &Engine,
    own: &Checkpoint,
    selection: &Selection<'_>,
    whose: Whose,
) -> Result<Gathered> {
    let mut gathering = Gathering { selection, whose, found: BTreeMap::new(), alone: 0 };
    gathering.add_own(own)?;
    if whose == Whose::OfAll || gathering.found.values().any(Found::is_in_slices) {
        for rank in (0..own.manifest().world_size).filter(|rank| *rank != own.header().rank) {
            gathering.add_others(&open_shard(engine, own, rank)?)?;
        }
    }
    let Gathering { found, alone, .. } = gathering;
    if found.is_empty() && alone == 0 {
        let paths: Vec<_> = tensor_paths(&own.index().nodes).map(|(_, path)| path).collect();
        let paths: Vec<String> = paths.iter().map(ToString::to_string).collect();
        return Err(selection.none_of(paths.iter().map(String::as_str)));
    }
    let step = own.step();
    let mut ordered = found
        .into_iter()
        .map(|(name, found)| Ok((found.order(), found.put_together(name, step)?)))
        .collect::<Result<Vec<_>>>()?;
    ordered.sort_by_key(|(order, _)| *order);
    Ok(Gathered { tensors: ordered.into_iter().map(|(_, tensor)| tensor).collect(), alone })
}

/// Opens what a rank saved of the same checkpoint as `own`.
pub(super) fn open_shard(engine: &Engine, own: &Checkpoint, rank: u32) -> Result<Checkpoint> {
    let shard = engine.shard_of_rank(own.step(), rank)?;
    if shard.manifest().attempt == own.manifest().attempt {
        return Ok(shard);
    }
    Err(EngineError::NotFound {
        what: format!("restoring step {}", own.step()),
        why: "another attempt at this step took its place meanwhile".into(),
        hint: "restore again".into(),
    })
}

struct Gathering<'s, 'o> {
    selection: &'s Selection<'o>,
    whose: Whose,
    /// By name in the file.
    found: BTreeMap<String, Found>,
    alone: u64,
}

/// What was found of a tensor so far.
struct Found {
    path: String,
    /// The path with the types of its keys, which may differ where it reads the same.
    typed: String,
    /// By ascending rank.
    records: Vec<(u32, TensorRecord)>,
}

impl Gathering<'_, '_> {
    fn add_own(&mut self, own: &Checkpoint) -> Result<()> {
        let index = own.index();
        for (number, path) in tensor_paths(&index.nodes) {
            let record = &index.tensors[number as usize];
            let is_alike = index.storages[record.storage as usize].replica.is_some();
            if self.whose == Whose::OfRank || is_alike || record.slice.is_some() {
                self.add(own.header().rank, &path, record)?;
            } else {
                self.count_alone(&path);
            }
        }
        Ok(())
    }

    fn add_others(&mut self, other: &Checkpoint) -> Result<()> {
        let index = other.index();
        for (number, path) in tensor_paths(&index.nodes) {
            let record = &index.tensors[number as usize];
            let is_alike = index.storages[record.storage as usize].replica.is_some();
            if record.slice.is_some() && self.is_wanted(&path)? {
                self.add(other.header().rank, &path, record)?;
            } else if record.slice.is_none() && !is_alike {
                self.count_alone(&path);
            }
        }
        Ok(())
    }

    fn count_alone(&mut self, path: &TreePath<'_>) {
        if self.whose == Whose::OfAll && self.selection.fits(&path.to_string()) {
            self.alone += 1;
        }
    }

    /// Takes a tensor, or a slice of one.
    fn add(&mut self, rank: u32, path: &TreePath<'_>, record: &TensorRecord) -> Result<()> {
        let shown = path.to_string();
        let Some(name) = self.selection.name(&shown)? else { return Ok(()) };
        let typed = format!("{path:?}");
        match self.found.get_mut(&name) {
            Some(found) if found.typed != typed || found.is_of(rank) => {
                let why = "two tensors are called this, as integer and string keys can be";
                return Err(cannot(&shown, why));
            }
            Some(found) => found.records.push((rank, record.clone())),
            None => {
                let records = vec![(rank, record.clone())];
                self.found.insert(name, Found { path: shown, typed, records });
            }
        }
        Ok(())
    }

    /// Whether another rank's slice belongs to a tensor that is wanted.
    fn is_wanted(&self, path: &TreePath<'_>) -> Result<bool> {
        if self.whose == Whose::OfAll {
            return Ok(true);
        }
        let name = self.selection.name(&path.to_string())?;
        let found = name.and_then(|name| self.found.get(&name));
        Ok(found.is_some_and(Found::is_in_slices))
    }
}

impl Found {
    /// Whether something of this rank, which came last, is there.
    fn is_of(&self, rank: u32) -> bool {
        self.records.last().is_some_and(|(last, _)| *last == rank)
    }

    fn is_in_slices(&self) -> bool {
        self.records.iter().any(|(_, record)| record.slice.is_some())
    }

    fn order(&self) -> (Reverse<u32>, u32, u32, u64) {
        let (rank, record) = &self.records[0];
        (Reverse(record.item_bytes), *rank, record.storage, record.offset)
    }

    fn put_together(mut self, name: String, step: u64) -> Result<Tensor> {
        self.records.sort_unstable_by_key(|(rank, _)| *rank);
        let (_, first) = &self.records[0];
        let (whole, item_bytes) = (whole_shape(first), first.item_bytes);
        let damage = |why| no_tensor(&self.path, step, why);
        for (rank, other) in &self.records {
            let is_same = (whole_shape(other), &other.dtype) == (whole, &first.dtype);
            if !is_same || other.item_bytes != item_bytes {
                let is = |record: &TensorRecord| {
                    format!("`{}` of shape {:?}", record.dtype, whole_shape(record))
                };
                let (here, there) = (is(first), is(other));
                return Err(damage(format!("it is {here}, and {there} on rank {rank}")));
            }
        }
        let (dtype, shape) = in_file(&self.path, first, whole)?;
        let origin = vec![0; whole.len()];
        let held: Vec<_> = self.records.iter().filter(|(_, it)| !it.shape.contains(&0)).collect();
        let tiles: Vec<Tile<'_>> = held.iter().map(|(_, record)| tile(record, &origin)).collect();
        let firsts = tiling::check(whole, &tiles).map_err(damage)?;
        let bytes = whole.iter().try_fold(u64::from(item_bytes), |all, it| all.checked_mul(*it));
        let bytes = bytes.ok_or_else(|| damage(format!("its shape {whole:?} is too large")))?;
        let parts =
            held.iter().zip(&tiles).zip(firsts).map(|(((rank, record), tile), is_first)| {
                let target = View::of(&within(whole, tile, record));
                Part { rank: *rank, source: View::of(record), target, is_again: !is_first }
            });
        let parts = parts.collect();
        Ok(Tensor { name, path: self.path.clone(), dtype, shape, item_bytes, bytes, parts })
    }
}

/// What ranks saved under one name is not one tensor.
fn no_tensor(path: &str, step: u64, why: String) -> EngineError {
    EngineError::Corrupt {
        what: format!("putting `{}` together, of step {step}", text::one_line(path)),
        why,
        hint: "restore another step; leave it out with `--exclude`; save it so that its parts on \
               all ranks are those of one tensor"
            .into(),
    }
}

/// Tells that a part of a tensor is not what another rank saved of it, too.
pub(super) fn differ(tensor: &Tensor, step: u64) -> EngineError {
    no_tensor(&tensor.path, step, "ranks saved different values under this name".into())
}

/// The shape of the tensor that a record is of, or of a slice of.
fn whole_shape(record: &TensorRecord) -> &[u64] {
    record.slice.as_ref().map_or(&record.shape, |slice| &slice.shape)
}

fn tile<'a>(record: &'a TensorRecord, origin: &'a [u64]) -> Tile<'a> {
    let offsets = match &record.slice {
        None => origin,
        Some(GlobalSlice { offsets, .. }) => offsets,
    };
    Tile { offsets, sizes: &record.shape }
}

/// A tile of a tensor that lies in row-major order.
fn within(whole: &[u64], tile: &Tile<'_>, record: &TensorRecord) -> TensorRecord {
    let mut strides = vec![1; whole.len()];
    for dimension in (1..whole.len()).rev() {
        strides[dimension - 1] = strides[dimension] * whole[dimension];
    }
    let offset = tile.offsets.iter().zip(&strides).map(|(offset, stride)| offset * stride).sum();
    TensorRecord { storage: 0, strides, offset, slice: None, ..record.clone() }
}

/// A tensor's dtype and shape as the file has them.
fn in_file(path: &str, record: &TensorRecord, whole: &[u64]) -> Result<(&'static str, Vec<u64>)> {
    let known = file_dtype(&record.dtype).filter(|known| known.item_bytes == record.item_bytes);
    let Some(known) = known else {
        let why = format!("the file format has no dtype like `{}`", record.dtype);
        return Err(cannot(path, &why));
    };
    let mut shape = whole.to_vec();
    if known.values_per_item > 1 {
        let Some(last) = shape.last_mut() else {
            return Err(cannot(path, "it packs two values into one and has no dimension for them"));
        };
        *last = last.saturating_mul(known.values_per_item);
    }
    Ok((known.name, shape))
}
