//! A shard file's fixed blocks: header and footer.

use super::names::AttemptId;

/// Bytes of the header and of the footer.
pub const BLOCK_BYTES: usize = 4096;

/// The first block of a shard.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// Unique to this try.
    pub attempt: AttemptId,
    /// The checkpoint's step.
    pub step: u64,
    /// Who wrote it.
    pub rank: u32,
    /// Of how many.
    pub world_size: u32,
    /// Raw bytes per chunk.
    pub chunk_bytes: u32,
}

/// The last block of a shard.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Footer {
    /// Where the compressed index starts; a multiple of 4096.
    pub index_offset: u64,
    /// Compressed bytes of the index, without padding.
    pub index_stored_bytes: u64,
    /// Bytes of the index once decompressed.
    pub index_raw_bytes: u64,
    /// CRC-32C of the compressed index with its padding.
    pub index_crc32c: u32,
    /// CRC-32C of the header block.
    pub header_crc32c: u32,
    /// Length of the whole file, this block included.
    pub file_bytes: u64,
    /// Same as in the header.
    pub attempt: AttemptId,
}
