//! A shard file's fixed blocks: header and footer.
//!
//! ```text
//! | preamble: magic, version, feature bits | fields | zeros ... | crc32c |
//! 0                                        32                    4092     4096
//! ```
//!
//! Always holds: a block that decodes has the right magic and checksum, a version and features that
//! this engine knows, and fields that agree with each other. Magic, version, feature bits and
//! checksum keep their places in every version, so an old reader can always say "newer".

use super::FormatError;
use super::checksum::crc32c;
use super::index::INDEX_BYTES_MAX;
use super::manifest::FORMAT_VERSION;
use super::names::AttemptId;
use crate::config::{CHUNK_BYTES_MAX, CHUNK_BYTES_MIN};

/// Bytes of the header and of the footer.
pub const BLOCK_BYTES: usize = 4096;
/// Every region of a shard starts at a multiple of this many bytes, and is zero-padded to one.
pub(crate) const REGION_ALIGNMENT: u64 = BLOCK_BYTES as u64;

/// Where the first chunk starts at the latest.
pub(crate) const CHUNKS_OFFSET_MAX: u32 = 1 << 20;
/// Where it starts unless the feature `ALIGNED` says otherwise: right after the header.
pub const CHUNKS_OFFSET_MIN: u32 = 4096;

/// A feature that a reader must know: the shard holds only a part of each replicated storage
/// ([`Replica`](super::index::Replica)).
const REPLICATED: u64 = 1;
/// Another one: there are zeros between the header and the first chunk, up to `chunks_offset`.
const ALIGNED: u64 = 2;
/// All of them.
const INCOMPATIBLE_KNOWN: u64 = REPLICATED | ALIGNED;

/// Bytes in the file of so many stored ones, with their zero padding.
pub(crate) fn padded_bytes(stored_bytes: u32) -> usize {
    (stored_bytes as usize).next_multiple_of(BLOCK_BYTES)
}

const HEADER_MAGIC: [u8; 8] = *b"DTRSHARD";
const FOOTER_MAGIC: [u8; 8] = *b"DTRSHEND";

// The preamble of both blocks. Each offset is the previous one and its width.
const MAGIC_AT: usize = 0;
const VERSION_AT: usize = MAGIC_AT + 8;
const VERSION_RESERVED_AT: usize = VERSION_AT + 4;
const COMPATIBLE_AT: usize = VERSION_RESERVED_AT + 4;
const INCOMPATIBLE_AT: usize = COMPATIBLE_AT + 8;
const PREAMBLE_END: usize = INCOMPATIBLE_AT + 8;

// The header's fields.
const HEADER_ATTEMPT_AT: usize = PREAMBLE_END;
const STEP_AT: usize = HEADER_ATTEMPT_AT + 16;
const RANK_AT: usize = STEP_AT + 8;
const WORLD_SIZE_AT: usize = RANK_AT + 4;
const CHUNK_BYTES_AT: usize = WORLD_SIZE_AT + 4;
const HEADER_CHUNKS_OFFSET_AT: usize = CHUNK_BYTES_AT + 4;
const HEADER_END: usize = HEADER_CHUNKS_OFFSET_AT + 4;

// The footer's fields.
const FOOTER_ATTEMPT_AT: usize = PREAMBLE_END;
const INDEX_OFFSET_AT: usize = FOOTER_ATTEMPT_AT + 16;
const INDEX_STORED_BYTES_AT: usize = INDEX_OFFSET_AT + 8;
const INDEX_RAW_BYTES_AT: usize = INDEX_STORED_BYTES_AT + 8;
const INDEX_CRC32C_AT: usize = INDEX_RAW_BYTES_AT + 8;
const HEADER_CRC32C_AT: usize = INDEX_CRC32C_AT + 4;
const FILE_BYTES_AT: usize = HEADER_CRC32C_AT + 4;
const FOOTER_CHUNKS_OFFSET_AT: usize = FILE_BYTES_AT + 8;
const FOOTER_END: usize = FOOTER_CHUNKS_OFFSET_AT + 4;

// The end of both blocks.
const BLOCK_CRC32C_AT: usize = BLOCK_BYTES - 4;

const _: () = assert!(CHUNKS_OFFSET_MIN as usize == BLOCK_BYTES);
const _: () = assert!(HEADER_END <= BLOCK_CRC32C_AT && FOOTER_END <= BLOCK_CRC32C_AT);

/// What the parent of a block holds of it: the CRC-32C of all but its own checksum field. With the
/// field included it would be the same number for every block, since a CRC over bytes that end
/// with their own CRC is a constant.
pub fn block_crc32c(block: &[u8; BLOCK_BYTES]) -> u32 {
    crc32c(&block[..BLOCK_CRC32C_AT])
}

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
    /// Where the first chunk starts; there are zeros between the header and it.
    pub chunks_offset: u32,
    /// Whether the index names replicated entries.
    pub replicated: bool,
}

impl Header {
    /// The block's bytes.
    pub fn encode(&self) -> [u8; BLOCK_BYTES] {
        let mut block = begin(HEADER_MAGIC, self.replicated, self.chunks_offset);
        put(&mut block, HEADER_CHUNKS_OFFSET_AT, chunks_offset_field(self.chunks_offset));
        put(&mut block, HEADER_ATTEMPT_AT, self.attempt.0);
        put(&mut block, STEP_AT, self.step.to_le_bytes());
        put(&mut block, RANK_AT, self.rank.to_le_bytes());
        put(&mut block, WORLD_SIZE_AT, self.world_size.to_le_bytes());
        put(&mut block, CHUNK_BYTES_AT, self.chunk_bytes.to_le_bytes());
        finish(block)
    }

    /// Reads a block, checking everything that can be checked without the rest of the file.
    pub fn decode(block: &[u8; BLOCK_BYTES]) -> Result<Self, FormatError> {
        let features = check(block, HEADER_MAGIC, "header")?;
        let header = Self {
            replicated: features & REPLICATED != 0,
            attempt: AttemptId(take(block, HEADER_ATTEMPT_AT)),
            step: u64::from_le_bytes(take(block, STEP_AT)),
            rank: u32::from_le_bytes(take(block, RANK_AT)),
            world_size: u32::from_le_bytes(take(block, WORLD_SIZE_AT)),
            chunk_bytes: u32::from_le_bytes(take(block, CHUNK_BYTES_AT)),
            chunks_offset: take_chunks_offset(
                block,
                (features, HEADER_CHUNKS_OFFSET_AT),
                "header",
            )?,
        };
        header.validate()?;
        Ok(header)
    }

    fn validate(&self) -> Result<(), FormatError> {
        let Self { rank, world_size, chunk_bytes, .. } = self;
        ensure!(
            rank < world_size,
            "the header names rank {rank}, expected one less than its world size {world_size}"
        );
        ensure!(
            chunk_bytes.is_power_of_two()
                && (CHUNK_BYTES_MIN..=CHUNK_BYTES_MAX).contains(chunk_bytes),
            "the header gives chunks of {chunk_bytes} bytes, expected a power of two from \
             {CHUNK_BYTES_MIN} to {CHUNK_BYTES_MAX}"
        );
        Ok(())
    }
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
    /// [`block_crc32c`] of the header.
    pub header_crc32c: u32,
    /// Length of the whole file, this block included.
    pub file_bytes: u64,
    /// Same as in the header.
    pub attempt: AttemptId,
    /// Same as in the header.
    pub chunks_offset: u32,
    /// Same as in the header.
    pub replicated: bool,
}

impl Footer {
    /// The block's bytes.
    pub fn encode(&self) -> [u8; BLOCK_BYTES] {
        let mut block = begin(FOOTER_MAGIC, self.replicated, self.chunks_offset);
        put(&mut block, FOOTER_CHUNKS_OFFSET_AT, chunks_offset_field(self.chunks_offset));
        put(&mut block, FOOTER_ATTEMPT_AT, self.attempt.0);
        put(&mut block, INDEX_OFFSET_AT, self.index_offset.to_le_bytes());
        put(&mut block, INDEX_STORED_BYTES_AT, self.index_stored_bytes.to_le_bytes());
        put(&mut block, INDEX_RAW_BYTES_AT, self.index_raw_bytes.to_le_bytes());
        put(&mut block, INDEX_CRC32C_AT, self.index_crc32c.to_le_bytes());
        put(&mut block, HEADER_CRC32C_AT, self.header_crc32c.to_le_bytes());
        put(&mut block, FILE_BYTES_AT, self.file_bytes.to_le_bytes());
        finish(block)
    }

    /// Reads the last block of a file that is `file_bytes` long.
    pub fn decode(block: &[u8; BLOCK_BYTES], file_bytes: u64) -> Result<Self, FormatError> {
        let features = check(block, FOOTER_MAGIC, "footer")?;
        let footer = Self {
            replicated: features & REPLICATED != 0,
            attempt: AttemptId(take(block, FOOTER_ATTEMPT_AT)),
            index_offset: u64::from_le_bytes(take(block, INDEX_OFFSET_AT)),
            index_stored_bytes: u64::from_le_bytes(take(block, INDEX_STORED_BYTES_AT)),
            index_raw_bytes: u64::from_le_bytes(take(block, INDEX_RAW_BYTES_AT)),
            index_crc32c: u32::from_le_bytes(take(block, INDEX_CRC32C_AT)),
            header_crc32c: u32::from_le_bytes(take(block, HEADER_CRC32C_AT)),
            file_bytes: u64::from_le_bytes(take(block, FILE_BYTES_AT)),
            chunks_offset: take_chunks_offset(
                block,
                (features, FOOTER_CHUNKS_OFFSET_AT),
                "footer",
            )?,
        };
        footer.validate(file_bytes)?;
        Ok(footer)
    }

    /// The index with its zero padding, in bytes: what [`Footer::index_crc32c`] covers.
    pub(crate) fn index_padded_bytes(&self) -> u64 {
        self.index_stored_bytes.next_multiple_of(REGION_ALIGNMENT)
    }

    /// Checks the lengths against each other and the true length: header, chunks, index and footer
    /// must tile the file. What is between header and index is for the index to say.
    fn validate(&self, file_bytes: u64) -> Result<(), FormatError> {
        ensure!(
            self.file_bytes == file_bytes,
            "the file is {file_bytes} bytes long, its footer says {}",
            self.file_bytes
        );
        ensure!(
            (1..=INDEX_BYTES_MAX).contains(&self.index_raw_bytes)
                && (1..=INDEX_BYTES_MAX).contains(&self.index_stored_bytes),
            "the index takes {} bytes, {} once decompressed; expected 1 to {INDEX_BYTES_MAX}",
            self.index_stored_bytes,
            self.index_raw_bytes
        );
        ensure!(
            self.index_offset >= u64::from(self.chunks_offset)
                && self.index_offset.is_multiple_of(REGION_ALIGNMENT),
            "the index starts at byte {}, expected a multiple of {REGION_ALIGNMENT} from {} on",
            self.index_offset,
            self.chunks_offset
        );
        let end = self
            .index_offset
            .checked_add(self.index_padded_bytes())
            .and_then(|end| end.checked_add(REGION_ALIGNMENT));
        ensure!(
            end == Some(file_bytes),
            "an index of {} bytes at byte {} and the footer do not end a file of {file_bytes} \
                bytes",
            self.index_stored_bytes,
            self.index_offset
        );
        Ok(())
    }
}

/// A block with its preamble.
fn begin(magic: [u8; 8], replicated: bool, chunks_offset: u32) -> [u8; BLOCK_BYTES] {
    let mut block = [0; BLOCK_BYTES];
    put(&mut block, MAGIC_AT, magic);
    put(&mut block, VERSION_AT, FORMAT_VERSION.to_le_bytes());
    let replicated = if replicated { REPLICATED } else { 0 };
    let aligned = if chunks_offset == CHUNKS_OFFSET_MIN { 0 } else { ALIGNED };
    let incompatible = replicated | aligned;
    put(&mut block, INCOMPATIBLE_AT, incompatible.to_le_bytes());
    block
}

/// Without the feature the field is zero, as in files that are older than it.
fn chunks_offset_field(chunks_offset: u32) -> [u8; 4] {
    if chunks_offset == CHUNKS_OFFSET_MIN { [0; 4] } else { chunks_offset.to_le_bytes() }
}

fn take_chunks_offset(
    block: &[u8; BLOCK_BYTES],
    (features, at): (u64, usize),
    name: &str,
) -> Result<u32, FormatError> {
    if features & ALIGNED == 0 {
        return Ok(CHUNKS_OFFSET_MIN);
    }
    let offset = u32::from_le_bytes(take(block, at));
    ensure!(
        offset > CHUNKS_OFFSET_MIN && offset <= CHUNKS_OFFSET_MAX && offset.is_power_of_two(),
        "the {name} puts the first chunk at byte {offset}, expected a power of two above \
         {CHUNKS_OFFSET_MIN}, at most {CHUNKS_OFFSET_MAX}"
    );
    Ok(offset)
}

/// The block with its checksum.
fn finish(mut block: [u8; BLOCK_BYTES]) -> [u8; BLOCK_BYTES] {
    let crc = block_crc32c(&block);
    put(&mut block, BLOCK_CRC32C_AT, crc.to_le_bytes());
    block
}

/// Checks magic, checksum, version and features: in this order, so that damage is never taken for
/// a newer version. Returns the features that a reader must know.
fn check(block: &[u8; BLOCK_BYTES], magic: [u8; 8], name: &str) -> Result<u64, FormatError> {
    let found: [u8; 8] = take(block, MAGIC_AT);
    ensure!(
        found == magic,
        "the {name} begins with `{}`, expected `{}`",
        found.escape_ascii(),
        magic.escape_ascii()
    );
    let expected = u32::from_le_bytes(take(block, BLOCK_CRC32C_AT));
    let actual = block_crc32c(block);
    ensure!(actual == expected, "the {name}'s checksum is {actual:08x}, expected {expected:08x}");
    let version = u32::from_le_bytes(take(block, VERSION_AT));
    check_version(version, name)?;
    let features = u64::from_le_bytes(take(block, INCOMPATIBLE_AT));
    let unknown = features & !INCOMPATIBLE_KNOWN;
    if unknown != 0 {
        return Err(FormatError::Newer(format!(
            "the {name}, of format version {version}, needs features {unknown:#x}, which this \
             engine of version {} does not know",
            env!("CARGO_PKG_VERSION")
        )));
    }
    Ok(features)
}

/// Refuses a version that this engine does not read.
pub(super) fn check_version(version: u32, name: &str) -> Result<(), FormatError> {
    ensure!(version != 0, "the {name} has format version 0, expected 1 to {FORMAT_VERSION}");
    if version > FORMAT_VERSION {
        return Err(FormatError::Newer(format!(
            "the {name} has format version {version}, and this engine of version {} reads up to \
             version {FORMAT_VERSION}",
            env!("CARGO_PKG_VERSION")
        )));
    }
    Ok(())
}

fn put<const N: usize>(block: &mut [u8; BLOCK_BYTES], at: usize, bytes: [u8; N]) {
    block[at..at + N].copy_from_slice(&bytes);
}

fn take<const N: usize>(block: &[u8; BLOCK_BYTES], at: usize) -> [u8; N] {
    std::array::from_fn(|i| block[at + i])
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn header() -> Header {
        Header {
            attempt: AttemptId([0xab; 16]),
            step: 1000,
            rank: 3,
            world_size: 8,
            chunk_bytes: 4 << 20,
            chunks_offset: CHUNKS_OFFSET_MIN,
            replicated: false,
        }
    }

    fn footer() -> Footer {
        Footer {
            index_offset: 8192,
            index_stored_bytes: 5000,
            index_raw_bytes: 20_000,
            index_crc32c: 0x0123_4567,
            header_crc32c: 0x89ab_cdef,
            file_bytes: 8192 + 8192 + 4096,
            attempt: AttemptId([0xab; 16]),
            chunks_offset: 8192,
            replicated: true,
        }
    }

    fn resealed(mut block: [u8; BLOCK_BYTES], at: usize, bytes: [u8; 4]) -> [u8; BLOCK_BYTES] {
        put(&mut block, at, bytes);
        finish(block)
    }

    #[test]
    fn every_flipped_bit_is_refused() {
        let (header, footer) = (header().encode(), footer().encode());
        let file_bytes = self::footer().file_bytes;
        for bit in 0..BLOCK_BYTES * 8 {
            let flip = |block: &[u8; BLOCK_BYTES]| {
                let mut block = *block;
                block[bit / 8] ^= 1 << (bit % 8);
                block
            };
            let refused = |result| matches!(result, Some(FormatError::Damaged(_)));
            assert!(refused(Header::decode(&flip(&header)).err()), "header, bit {bit}");
            assert!(refused(Footer::decode(&flip(&footer), file_bytes).err()), "footer, bit {bit}");
        }
    }

    #[test]
    fn a_block_is_not_taken_for_the_other() {
        assert!(Header::decode(&footer().encode()).is_err());
        assert!(Footer::decode(&header().encode(), footer().file_bytes).is_err());
    }

    #[test]
    fn newer_versions_and_features_say_so() {
        let newer = resealed(header().encode(), VERSION_AT, 2_u32.to_le_bytes());
        let FormatError::Newer(why) = Header::decode(&newer).unwrap_err() else {
            panic!("version 2 was taken for damage")
        };
        assert!(why.contains("format version 2") && why.contains("up to version 1"), "{why}");
        let feature = resealed(header().encode(), INCOMPATIBLE_AT, 8_u32.to_le_bytes());
        let FormatError::Newer(why) = Header::decode(&feature).unwrap_err() else {
            panic!("an unknown feature was taken for damage")
        };
        assert!(why.contains("features 0x8"), "{why}");
        let zero = resealed(header().encode(), VERSION_AT, 0_u32.to_le_bytes());
        assert!(matches!(Header::decode(&zero), Err(FormatError::Damaged(_))));
    }

    #[test]
    fn unknown_compatible_features_are_read() {
        let block = resealed(header().encode(), COMPATIBLE_AT, 0xff_u32.to_le_bytes());
        assert_eq!(Header::decode(&block), Ok(header()));
    }

    #[test]
    fn where_chunks_follow_the_header_nothing_is_said_of_it() {
        let (header, footer) = (header().encode(), footer().encode());
        let features = |block| u64::from_le_bytes(take(block, INCOMPATIBLE_AT));
        assert_eq!((features(&header), features(&footer)), (0, REPLICATED | ALIGNED));
        assert_eq!(take(&header, HEADER_CHUNKS_OFFSET_AT), [0; 4]);
        // Not even if the field is something else.
        let other = resealed(header, HEADER_CHUNKS_OFFSET_AT, 8192_u32.to_le_bytes());
        assert_eq!(Header::decode(&other).unwrap().chunks_offset, CHUNKS_OFFSET_MIN);
    }

    #[test]
    fn fields_that_disagree_are_refused() {
        for wrong in [
            Header { rank: 8, ..header() },
            Header { world_size: 0, rank: 0, ..header() },
            Header { chunk_bytes: 0, ..header() },
            Header { chunk_bytes: (4 << 20) + 1, ..header() },
            Header { chunk_bytes: 128 << 20, ..header() },
            Header { chunks_offset: 0, ..header() },
            Header { chunks_offset: 12_288, ..header() },
            Header { chunks_offset: 2 * CHUNKS_OFFSET_MAX, ..header() },
        ] {
            assert!(Header::decode(&wrong.encode()).is_err(), "{wrong:?}");
        }
        for wrong in [
            Footer { index_offset: 8191, ..footer() },
            Footer { index_offset: 0, ..footer() },
            Footer { chunks_offset: 2048, ..footer() },
            Footer { chunks_offset: 16_384, ..footer() },
            Footer { index_offset: u64::MAX - 4095, ..footer() },
            Footer { index_stored_bytes: 0, ..footer() },
            Footer { index_stored_bytes: 9000, ..footer() },
            Footer { index_stored_bytes: u64::MAX, ..footer() },
            Footer { index_raw_bytes: 0, ..footer() },
            Footer { index_raw_bytes: INDEX_BYTES_MAX + 1, ..footer() },
            Footer { file_bytes: 4096, ..footer() },
        ] {
            assert!(Footer::decode(&wrong.encode(), footer().file_bytes).is_err(), "{wrong:?}");
        }
        assert!(Footer::decode(&footer().encode(), footer().file_bytes - 4096).is_err());
    }

    proptest! {
        #[test]
        fn headers_round_trip(
            attempt: [u8; 16], step: u64, rank in 0..u32::MAX, more in 1..=u32::MAX, log in 16..=26,
            log_offset in 12..=20, replicated: bool,
        ) {
            let header = Header {
                attempt: AttemptId(attempt),
                step,
                rank,
                world_size: rank.saturating_add(more),
                chunk_bytes: 1_u32 << log,
                chunks_offset: 1_u32 << log_offset,
                replicated,
            };
            prop_assert_eq!(Header::decode(&header.encode()), Ok(header));
        }

        #[test]
        fn footers_round_trip(
            attempt: [u8; 16],
            log_offset in 12_u32..=20,
            pages in 0_u64..1 << 50,
            index_stored_bytes in 1..=INDEX_BYTES_MAX,
            index_raw_bytes in 1..=INDEX_BYTES_MAX,
            index_crc32c: u32,
            header_crc32c: u32,
            replicated: bool,
        ) {
            let mut footer = Footer {
                index_offset: (1 << log_offset) + pages * REGION_ALIGNMENT,
                index_stored_bytes,
                index_raw_bytes,
                index_crc32c,
                header_crc32c,
                file_bytes: 0,
                attempt: AttemptId(attempt),
                chunks_offset: 1_u32 << log_offset,
                replicated,
            };
            footer.file_bytes =
                footer.index_offset + footer.index_padded_bytes() + REGION_ALIGNMENT;
            prop_assert_eq!(Footer::decode(&footer.encode(), footer.file_bytes), Ok(footer));
        }

        #[test]
        fn garbage_is_refused(
            bytes in proptest::collection::vec(any::<u8>(), BLOCK_BYTES),
            file_bytes: u64,
        ) {
            let block = <[u8; BLOCK_BYTES]>::try_from(bytes).unwrap();
            prop_assert!(Header::decode(&block).is_err());
            prop_assert!(Footer::decode(&block, file_bytes).is_err());
            // The same with a right checksum: fields alone never panic.
            let _ = Header::decode(&resealed(finish(block), VERSION_AT, 1_u32.to_le_bytes()));
            let mut sealed = begin(FOOTER_MAGIC, true, 8192);
            sealed[PREAMBLE_END..].copy_from_slice(&block[PREAMBLE_END..]);
            prop_assert!(Footer::decode(&finish(sealed), file_bytes).is_err());
        }
    }
}
