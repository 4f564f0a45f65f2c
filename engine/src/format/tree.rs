//! The state tree: nested containers with tensors at the leaves, as a flat list in preorder.
//!
//! Always holds after decoding: the list is exactly one tree, no deeper than [`DEPTH_MAX`]; every
//! child of a dict has a key, no other node has one; tensor indexes are in range.

/// Deepest nesting of containers.
pub const DEPTH_MAX: usize = 128;

/// One node. Children follow their parent directly, in order.
#[derive(Clone, Debug, PartialEq)]
pub struct Node {
    /// Key in the parent dict; `None` for children of lists and tuples, for the root, and for the
    /// metadata child of an ordered dict.
    pub key: Option<Key>,
    /// What stands here.
    pub value: Value,
}

/// A dict's key, typed: the integer 3 is not the string "3".
#[derive(Clone, Debug, PartialEq)]
pub enum Key {
    /// A string.
    Str(String),
    /// An integer that fits 64 bits.
    Int(i64),
    /// A larger integer: two's complement, little-endian, no redundant sign bytes.
    BigInt(Vec<u8>),
    /// A boolean.
    Bool(bool),
    /// A float, by its bits (-0.0 and NaN kept).
    Float(f64),
    /// Bytes.
    Bytes(Vec<u8>),
    /// Python's `None`.
    None,
}

/// What stands at a node. Containers carry their number of children.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// `None`.
    None,
    /// A boolean.
    Bool(bool),
    /// An integer that fits 64 bits.
    Int(i64),
    /// A larger integer: two's complement, little-endian, no redundant sign bytes.
    BigInt(Vec<u8>),
    /// A float, by its bits.
    Float(f64),
    /// A complex number, by its bits.
    Complex(f64, f64),
    /// A string.
    Str(String),
    /// Bytes.
    Bytes(Vec<u8>),
    /// Index into the shard's tensors; two nodes may name the same one.
    Tensor(u32),
    /// A numpy scalar: `dtype.str` and the item's bytes.
    NumpyScalar {
        /// numpy's `dtype.str`, for example `<f4`.
        dtype: String,
        /// The item's bytes.
        bytes: Vec<u8>,
    },
    /// `torch.dtype`, by name without `torch.`.
    TorchDtype(String),
    /// `torch.device`, as its string.
    TorchDevice(String),
    /// `torch.Size`.
    TorchSize(Vec<i64>),
    /// `numpy.dtype`, as its `str`.
    NumpyDtype(String),
    /// A dict with this many entries.
    Dict {
        /// Entries, not counting the metadata child.
        len: u32,
        /// An `OrderedDict`, as module state dicts are.
        ordered: bool,
        /// The first child, without a key, is the dict's `_metadata` attribute.
        metadata: bool,
    },
    /// A list.
    List {
        /// Items.
        len: u32,
    },
    /// A tuple.
    Tuple {
        /// Items.
        len: u32,
    },
}
