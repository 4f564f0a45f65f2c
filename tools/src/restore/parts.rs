//! A tensor for a file, and the parts of it that ranks saved.
//!
//! ```text
//! rank 0's shard    rank 1's shard        file
//! |a: rows 0..2|    |a: rows 2..4|        |a: rows 0..4|
//! ```
//!
//! Always holds: the parts of a tensor are all of it, each item once but for parts that several
//! ranks saved as the same.

use dtr_engine::format::index::TensorRecord;
use dtr_engine::{EngineError, Result};

use super::header::file_dtype;
use super::selection::cannot;
use super::tiling::{self, Tile};
use crate::text;
use crate::view::View;

/// A tensor to write.
#[derive(Clone, Debug)]
pub(super) struct Tensor {
    pub(super) name: String,
    /// Where it stands in the state, for messages.
    pub(super) path: String,
    step: u64,
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

/// What was found of a tensor so far.
#[derive(Debug)]
pub(super) struct Found {
    path: String,
    dtype: String,
    item_bytes: u32,
    /// The shape of the whole tensor.
    shape: Vec<u64>,
    /// Where it comes among the others.
    order: (u32, u32, u64),
    slices: Vec<Slice>,
    last_rank: u32,
}

/// A tensor, or a slice of it; none is empty.
#[derive(Debug)]
struct Slice {
    rank: u32,
    source: View,
    offsets: Vec<u64>,
    sizes: Vec<u64>,
}

impl Found {
    /// The tensor at `path`, by what a rank saved of it.
    pub(super) fn new(path: String, rank: u32, record: &TensorRecord) -> Self {
        let mut found = Self {
            path,
            dtype: record.dtype.clone(),
            item_bytes: record.item_bytes,
            shape: whole_shape(record).to_vec(),
            order: (rank, record.storage, record.offset),
            slices: Vec::new(),
            last_rank: rank,
        };
        found.take(rank, record);
        found
    }

    /// Takes what another rank saved of it.
    pub(super) fn add(&mut self, rank: u32, record: &TensorRecord, step: u64) -> Result<()> {
        if self.last_rank == rank {
            return Err(cannot(&self.path, "two tensors are called this"));
        }
        let is_same = record.dtype == self.dtype && record.item_bytes == self.item_bytes;
        if !is_same || whole_shape(record) != self.shape {
            let why = format!(
                "rank {} saved it as `{}` of shape {:?}, rank {rank} as `{}` of shape {:?}",
                self.last_rank,
                self.dtype,
                self.shape,
                record.dtype,
                whole_shape(record)
            );
            return Err(no_tensor(&self.path, step, why));
        }
        self.last_rank = rank;
        self.take(rank, record);
        Ok(())
    }

    fn take(&mut self, rank: u32, record: &TensorRecord) {
        if record.shape.contains(&0) {
            return;
        }
        let offsets = record.slice.as_ref().map(|slice| slice.offsets.clone());
        self.slices.push(Slice {
            rank,
            source: View::of(record),
            offsets: offsets.unwrap_or_else(|| vec![0; record.shape.len()]),
            sizes: record.shape.clone(),
        });
    }

    /// As tensors are in shards, which are read in order.
    pub(super) fn order(&self) -> impl Ord + Copy + use<> {
        self.order
    }

    /// Checks that nothing is missing, and that the file format has its like.
    pub(super) fn put_together(mut self, name: String, step: u64) -> Result<Tensor> {
        self.slices.sort_by_key(|slice| slice.rank);
        let (dtype, shape) = self.in_file()?;
        let damage = |why| no_tensor(&self.path, step, why);
        let tiles: Vec<Tile<'_>> = self.slices.iter().map(Slice::tile).collect();
        let firsts = tiling::check(&self.shape, &tiles).map_err(damage)?;
        let mut counted = self.shape.iter();
        let bytes =
            counted.try_fold(u64::from(self.item_bytes), |all, size| all.checked_mul(*size));
        // Also of one without items, if a size of 0 comes too late: so do readers count.
        let bytes = bytes.ok_or_else(|| cannot(&self.path, "its items cannot be counted"))?;
        let targets: Vec<View> = tiles.iter().map(|tile| self.target(tile)).collect();
        let slices = self.slices.into_iter().zip(targets).zip(firsts);
        let parts = slices
            .map(|((Slice { rank, source, .. }, target), is_first)| Part {
                rank,
                source,
                target,
                is_again: !is_first,
            })
            .collect();
        let (path, item_bytes) = (self.path, self.item_bytes);
        Ok(Tensor { name, path, step, dtype, shape, item_bytes, bytes, parts })
    }

    /// Where a tile is in the tensor in row-major order. Of a tensor that tiles hold all of, the
    /// arithmetic cannot overflow.
    fn target(&self, tile: &Tile<'_>) -> View {
        let mut strides = vec![1; self.shape.len()];
        for dimension in (1..self.shape.len()).rev() {
            strides[dimension - 1] = strides[dimension] * self.shape[dimension];
        }
        let first = tile.offsets.iter().zip(&strides).map(|(offset, stride)| offset * stride).sum();
        View::strided(self.item_bytes, tile.sizes, &strides, first)
    }

    /// The dtype and the shape as the file has them.
    fn in_file(&self) -> Result<(&'static str, Vec<u64>)> {
        let known = file_dtype(&self.dtype).filter(|known| known.item_bytes == self.item_bytes);
        let Some(known) = known else {
            let why = format!("the file format has no dtype like `{}`", self.dtype);
            return Err(cannot(&self.path, &why));
        };
        let mut shape = self.shape.clone();
        if known.values_per_item > 1 {
            let why = "it packs two values into one and has no dimension for them";
            let last = shape.last_mut().ok_or_else(|| cannot(&self.path, why))?;
            *last = last.saturating_mul(known.values_per_item);
        }
        Ok((known.name, shape))
    }
}

impl Slice {
    fn tile(&self) -> Tile<'_> {
        Tile { offsets: &self.offsets, sizes: &self.sizes }
    }
}

/// The shape of the tensor that a record is of, or of a slice of.
fn whole_shape(record: &TensorRecord) -> &[u64] {
    record.slice.as_ref().map_or(&record.shape, |slice| &slice.shape)
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

/// Reports that a part of a tensor differs from what another rank saved of it.
pub(super) fn differ(tensor: &Tensor) -> EngineError {
    no_tensor(&tensor.path, tensor.step, "ranks saved different values under this name".into())
}
