//! The shard index: the tree, and where each storage, tensor and chunk lies.

use super::layout::ElementType;
use super::tree::Node;
use crate::codec::Codec;

/// Most tensors in one shard.
pub const TENSORS_MAX: usize = 1 << 22;
/// Most bytes of an index, encoded and before its compression.
pub const INDEX_BYTES_MAX: u64 = 1 << 30;

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
}

/// Where a storage lies in the raw layout.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StorageRecord {
    /// Bytes from the start of the raw layout; a multiple of 64.
    pub raw_offset: u64,
    /// Length.
    pub bytes: u64,
    /// What the bytes are.
    pub element: ElementType,
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

/// Where a slice stands in the tensor it was cut from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GlobalSlice {
    /// Shape of the whole tensor.
    pub shape: Vec<u64>,
    /// Position of the slice's first item, per dimension.
    pub offsets: Vec<u64>,
}

/// Where a chunk's stored bytes lie and how they are checked.
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
