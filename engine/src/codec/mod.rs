//! Chunk bytes <-> stored bytes, pure.
//!
//! Always holds: decoding what was encoded gives the same bytes; encoding never grows a chunk (one
//! that does not shrink below [`STORED_FRACTION_MAX`] is left raw); a decoder given any bytes at
//! all returns an error or exactly the expected number of bytes, and allocates nothing whose size
//! those bytes choose.

/// How a chunk's raw bytes become its stored bytes. The discriminants are persisted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Codec {
    /// Raw bytes.
    None = 0,
    /// Byte planes with Huffman coding.
    Float = 1,
    /// One zstd frame.
    Zstd = 2,
    /// One gzip member.
    Gzip = 3,
}
