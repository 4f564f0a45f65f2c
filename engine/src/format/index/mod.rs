//! The shard index: the tree, and where each storage, tensor and chunk is.
//!
//! ```text
//! encode: ShardIndex --check--> wire --zstd--> stored bytes
//! decode: stored bytes --zstd--> wire --check--> ShardIndex
//! ```
//!
//! Always holds: an index that was decoded describes its file exactly (header, chunks, index and
//! footer tile it; storages and tensors stay within what the chunks hold), so its users check
//! nothing again; decoding takes memory in proportion to the stored bytes, and never more than in
//! proportion to `INDEX_BYTES_MAX`, whatever the bytes claim.

use std::ops::Range;

use super::FormatError;
use super::layout::ElementType;
use super::shard::padded_bytes;
use super::tree::{self, Node};
use crate::codec::Codec;

mod check;
mod frame;
mod replicated;
mod wire;

pub use replicated::{Difference, difference};
pub(crate) use replicated::{number_replicas, structure_crc32c};

/// Most tensors in one shard.
pub(crate) const TENSORS_MAX: usize = 1 << 22;
/// Most storages in one shard: each holds a tensor.
pub(crate) const STORAGES_MAX: usize = TENSORS_MAX;
/// Most dimensions of a tensor: what torch and numpy allow.
pub(crate) const DIMENSIONS_MAX: usize = 64;
/// Most bytes of a tensor's dtype name.
pub(crate) const DTYPE_BYTES_MAX: usize = 255;
/// Most bytes of an index, encoded and before its compression.
pub(crate) const INDEX_BYTES_MAX: u64 = 1 << 30;

/// The level that indexes are compressed with: a few milliseconds per MiB, a tenth of the size.
const ZSTD_LEVEL: i32 = 3;
/// Memory that any index may take, and what it may take besides for each of its stored bytes, in
/// bytes: a few KiB of file must not unpack to gigabytes. An index that repeats itself so much that
/// it would be refused is stored as it is.
const MEMORY_FREE_BYTES: u64 = 16 << 20;
const MEMORY_PER_STORED_BYTE: u64 = 256;
/// What a node, storage or tensor takes in memory beside its wire bytes, about.
const RECORD_MEMORY_BYTES: u64 = 256;

/// Everything a shard says about its chunks.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ShardIndex {
    /// The state tree in preorder; never empty.
    pub nodes: Vec<Node>,
    /// Storages by ascending raw offset.
    pub storages: Vec<StorageRecord>,
    /// Tensors, in order of first appearance in the tree.
    pub tensors: Vec<TensorRecord>,
    /// Chunks, in order of raw offset.
    pub chunks: Vec<ChunkRecord>,
    /// Topmost nodes, ascending, of replicated entries: everything at and below them is the same on
    /// all ranks.
    pub replicated: Vec<u32>,
}

/// Where a storage is in the raw layout, or as much of it as the shard holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StorageRecord {
    /// Bytes from the start of the raw layout; a multiple of 64.
    pub raw_offset: u64,
    /// Length of the whole storage.
    pub bytes: u64,
    /// What the bytes are.
    pub element: ElementType,
    /// Set for a replicated storage, of which each rank saved a part.
    pub replica: Option<Replica>,
}

/// The part of a replicated storage that is in one shard. Those of all shards tile the storage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Replica {
    /// Which one: counted from 0 by first appearance below [`ShardIndex::replicated`], the same in
    /// every shard.
    pub number: u32,
    /// Bytes from the storage's start.
    pub start: u64,
    /// Length of the part; may be 0.
    pub bytes: u64,
}

impl StorageRecord {
    /// The bytes of the storage that are in this shard: all, unless it is replicated.
    pub fn held(&self) -> Range<u64> {
        match self.replica {
            None => 0..self.bytes,
            Some(part) => part.start..part.start + part.bytes,
        }
    }

    /// Where it ends in the raw layout.
    pub fn raw_end(&self) -> u64 {
        let held = self.held();
        self.raw_offset + (held.end - held.start)
    }
}

/// Which library a tensor belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TensorKind {
    /// `torch.Tensor`.
    Torch,
    /// `torch.nn.Parameter`.
    TorchParameter,
    /// `numpy.ndarray`.
    Numpy,
}

/// A view of a storage.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorRecord {
    /// Index into [`ShardIndex::storages`].
    pub storage: u32,
    /// Which library.
    pub kind: TensorKind,
    /// torch's dtype name without `torch.`, or numpy's `dtype.str`.
    pub dtype: String,
    /// Bytes of one item, at least 1.
    pub item_bytes: u32,
    /// Items per dimension.
    pub shape: Vec<u64>,
    /// Items to skip per dimension; as long as `shape`.
    pub strides: Vec<u64>,
    /// Items from the storage's start to the first one.
    pub offset: u64,
    /// `requires_grad`.
    pub requires_grad: bool,
    /// Set when this is a slice of a larger tensor.
    pub slice: Option<GlobalSlice>,
}

impl TensorRecord {
    /// The bytes of its storage from its first item to its last; empty for one without items. The
    /// numbers must be those of a checked index, or of a tensor that exists.
    pub(crate) fn hull(&self) -> Range<u64> {
        // One without items may be anywhere, beyond every number too.
        if self.shape.contains(&0) {
            return 0..0;
        }
        let item_bytes = u64::from(self.item_bytes);
        let start = self.offset * item_bytes;
        let steps = self.shape.iter().zip(&self.strides);
        let last: u64 = steps.map(|(items, stride)| (items - 1) * stride).sum();
        start..start + (last + 1) * item_bytes
    }

    /// Whether it has an item at each byte of its [hull](TensorRecord::hull), once.
    pub(crate) fn is_dense(&self) -> bool {
        let mut steps: Vec<(u64, u64)> =
            self.strides.iter().copied().zip(self.shape.clone()).collect();
        steps.retain(|(_, items)| *items != 1);
        steps.sort_unstable();
        let mut expected = 1_u64;
        steps.iter().all(|(stride, items)| {
            let is_next = *stride == expected;
            expected = expected.saturating_mul(*items);
            is_next
        })
    }
}

/// Where a slice stands in the tensor it was cut from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GlobalSlice {
    /// Shape of the whole tensor.
    pub shape: Vec<u64>,
    /// Position of the slice's first item, per dimension.
    pub offsets: Vec<u64>,
}

/// Where a chunk's stored bytes are and how they are checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChunkRecord {
    /// Bytes from the file's start; a multiple of 4096.
    pub offset: u64,
    /// Stored bytes without padding.
    pub stored_bytes: u32,
    /// Raw bytes: `chunk_bytes`, less for the last chunk.
    pub raw_bytes: u32,
    /// How the stored bytes were made.
    pub codec: Codec,
    /// CRC-32C of the stored bytes with their zero padding to 4096.
    pub stored_crc32c: u32,
    /// CRC-32C of the raw bytes.
    pub raw_crc32c: u32,
}

impl ChunkRecord {
    /// Stored bytes with their zero padding: what [`ChunkRecord::stored_crc32c`] covers.
    pub(crate) fn padded_bytes(&self) -> usize {
        padded_bytes(self.stored_bytes)
    }
}

/// An index as its shard stores it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EncodedIndex {
    /// One zstd frame, without padding.
    pub stored: Vec<u8>,
    /// Bytes once decompressed.
    pub raw_bytes: u64,
}

/// What the header and footer say about the file that an index is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IndexContext {
    /// Length of the file.
    pub file_bytes: u64,
    /// Raw bytes per chunk.
    pub chunk_bytes: u32,
    /// Where the first chunk starts.
    pub chunks_offset: u32,
    /// Where the index starts.
    pub index_offset: u64,
}

impl ShardIndex {
    /// The bytes to store. Fails on what [`ShardIndex::decode`] would refuse in any file.
    pub fn encode(&self) -> Result<EncodedIndex, FormatError> {
        self.validate()?;
        let raw = wire::encode(self);
        let raw_bytes = raw.len() as u64;
        ensure!(
            raw_bytes <= INDEX_BYTES_MAX,
            "the index takes {raw_bytes} bytes, at most {INDEX_BYTES_MAX}"
        );
        let mut stored = Vec::with_capacity(zstd_safe::compress_bound(raw.len()));
        zstd_safe::compress(&mut stored, &raw, ZSTD_LEVEL)
            .map_err(|code| zstd_error("compressing the index", code))?;
        if self.record_count() > records_max(stored.len(), raw_bytes) {
            stored = frame::uncompressed(&raw);
        }
        stored.shrink_to_fit();
        Ok(EncodedIndex { stored, raw_bytes })
    }

    /// Reads stored bytes, already checked against the footer's checksum, that are `raw_bytes` long
    /// once decompressed.
    pub fn decode(
        stored: &[u8],
        raw_bytes: u64,
        context: &IndexContext,
    ) -> Result<Self, FormatError> {
        let raw = decompress(stored, raw_bytes)?;
        // The file cannot hold more chunks than pages.
        let chunks_max = context.file_bytes / super::shard::REGION_ALIGNMENT;
        let index = wire::decode(&raw, records_max(stored.len(), raw_bytes), chunks_max)?;
        drop(raw);
        index.validate()?;
        check::chunk_lengths(&index.chunks, index.raw_bytes(), context.chunk_bytes)?;
        check::tiling(&index.chunks, stored.len() as u64, context)?;
        Ok(index)
    }

    /// Bytes of the raw layout: where its last storage ends.
    pub fn raw_bytes(&self) -> u64 {
        self.storages.last().map_or(0, StorageRecord::raw_end)
    }

    /// Checks, from the numbers of records and the bytes of plain values alone, that this can be
    /// stored and read back.
    pub(crate) fn check_size(&self) -> Result<(), FormatError> {
        for (what, count, most) in [
            ("nodes", self.nodes.len(), tree::NODES_MAX),
            ("storages", self.storages.len(), STORAGES_MAX),
            ("tensors", self.tensors.len(), TENSORS_MAX),
        ] {
            ensure!(count <= most, "the index has {count} {what}, at most {most}");
        }
        let value_bytes = tree::value_bytes(&self.nodes);
        ensure!(
            value_bytes <= INDEX_BYTES_MAX,
            "plain values take {value_bytes} bytes, at most {INDEX_BYTES_MAX}"
        );
        Ok(())
    }

    /// Everything but chunks, which the length of the file bounds.
    fn record_count(&self) -> u64 {
        (self.nodes.len() + self.storages.len() + self.tensors.len()) as u64
    }

    /// The nodes of each replicated entry, in order.
    pub fn replicated_nodes(&self) -> impl Iterator<Item = Range<usize>> {
        self.replicated.iter().map(|&top| {
            let top = top as usize;
            top..tree::subtree_end(&self.nodes, top)
        })
    }

    /// Checks everything that does not depend on the file.
    fn validate(&self) -> Result<(), FormatError> {
        tree::validate(&self.nodes, self.tensors.len())?;
        check::storages(&self.storages)?;
        check::tensors(&self.tensors, &self.storages)?;
        replicated::check(self)?;
        check::chunks(&self.chunks)
    }
}

/// Most memory that an index of this many stored bytes may take.
fn memory_max(stored_bytes: u64) -> u64 {
    stored_bytes.saturating_mul(MEMORY_PER_STORED_BYTE).saturating_add(MEMORY_FREE_BYTES)
}

/// Most records of an index whose wire takes `raw_bytes`.
fn records_max(stored_bytes: usize, raw_bytes: u64) -> u64 {
    memory_max(stored_bytes as u64).saturating_sub(raw_bytes) / RECORD_MEMORY_BYTES
}

/// Decompresses exactly one frame of exactly `raw_bytes`. The allocation is bounded by the limit
/// and by the memory that an index of this length may take.
fn decompress(stored: &[u8], raw_bytes: u64) -> Result<Vec<u8>, FormatError> {
    let stored_bytes = stored.len() as u64;
    ensure!(
        raw_bytes <= INDEX_BYTES_MAX && raw_bytes <= memory_max(stored_bytes),
        "an index of {stored_bytes} stored bytes claims {raw_bytes} once decompressed"
    );
    let frame_bytes = zstd_safe::find_frame_compressed_size(stored)
        .map_err(|code| zstd_error("finding the index's frame", code))?;
    ensure!(
        frame_bytes == stored.len(),
        "the index's frame ends after {frame_bytes} of {stored_bytes} bytes"
    );
    let capacity = usize::try_from(raw_bytes)
        .map_err(|_| FormatError::Damaged(format!("an index of {raw_bytes} bytes")))?;
    let mut raw = Vec::new();
    raw.try_reserve_exact(capacity)
        .map_err(|error| FormatError::Damaged(format!("an index of {raw_bytes} bytes: {error}")))?;
    let actual = zstd_safe::decompress(&mut raw, stored)
        .map_err(|code| zstd_error("decompressing the index", code))?;
    ensure!(
        actual == capacity,
        "the index has {actual} bytes once decompressed, expected {raw_bytes}"
    );
    Ok(raw)
}

fn zstd_error(what: &str, code: usize) -> FormatError {
    FormatError::Damaged(format!("{what}: {}", zstd_safe::get_error_name(code)))
}

#[cfg(test)]
mod tests;
