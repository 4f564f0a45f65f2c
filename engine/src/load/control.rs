//! The parts of a shard that are not chunks: footer, header and index.
//!
//! Always holds: each is checked by the digest that its parent holds, from the manifest down; what
//! is read into memory is within the file. The zeros before the first chunk are not read here:
//! no tensor depends on them, and opening a shard need not wait for them.

use std::sync::Arc;

use super::{from_format, read_now};
use crate::error::IoContext;
use crate::format::FormatError;
use crate::format::checksum::crc32c;
use crate::format::index::{IndexContext, ShardIndex};
use crate::format::manifest::{Manifest, ShardEntry};
use crate::format::shard::{BLOCK_BYTES, Footer, Header, block_crc32c};
use crate::io::buffer::{BufferPool, CONTROL_BUFFER_BYTES};
use crate::store::ShardSource;
use crate::{EngineError, Result};

/// Header and index of a shard, checked from the manifest down.
pub(super) fn read_control(
    source: &dyn ShardSource,
    manifest: &Manifest,
    entry: &ShardEntry,
) -> Result<(Header, ShardIndex)> {
    let control = Control::new(source)?;
    let footer = control.footer(entry)?;
    let header = control.header(&footer)?;
    control.compare(&header, &footer, manifest, entry)?;
    let index = control.index(&footer, &header)?;
    control.compare_features(&header, &footer, &index)?;
    Ok((header, index))
}

/// Reads the parts of a shard that are not chunks.
struct Control<'a> {
    source: &'a dyn ShardSource,
    pool: Arc<BufferPool>,
}

impl<'a> Control<'a> {
    fn new(source: &'a dyn ShardSource) -> Result<Self> {
        let pool = BufferPool::new(CONTROL_BUFFER_BYTES, 2)
            .context("allocating a buffer to read", source.name())?;
        Ok(Self { source, pool })
    }

    fn footer(&self, entry: &ShardEntry) -> Result<Footer> {
        let file_bytes = self.source.file_bytes();
        if file_bytes != entry.bytes || file_bytes < 2 * BLOCK_BYTES as u64 {
            return Err(self.corrupt(format!(
                "the file has {file_bytes} bytes, its manifest says {}",
                entry.bytes
            )));
        }
        let block = self.block(file_bytes - BLOCK_BYTES as u64)?;
        let actual = format!("{:08x}", block_crc32c(&block));
        if actual != entry.footer_crc32c {
            return Err(self.corrupt(format!(
                "the footer's checksum is {actual}, the manifest says {}",
                entry.footer_crc32c
            )));
        }
        Footer::decode(&block, file_bytes).map_err(|error| self.format(error))
    }

    fn header(&self, footer: &Footer) -> Result<Header> {
        let block = self.block(0)?;
        let actual = block_crc32c(&block);
        if actual != footer.header_crc32c {
            return Err(self.corrupt(format!(
                "the header's checksum is {actual:08x}, the footer says {:08x}",
                footer.header_crc32c
            )));
        }
        Header::decode(&block).map_err(|error| self.format(error))
    }

    /// The identity that header, footer and manifest state must be one.
    fn compare(
        &self,
        header: &Header,
        footer: &Footer,
        manifest: &Manifest,
        entry: &ShardEntry,
    ) -> Result<()> {
        let stated = (header.attempt.to_string(), header.step, header.rank, header.world_size);
        let expected = (manifest.attempt.clone(), manifest.step, entry.rank, manifest.world_size);
        if stated == expected && footer.attempt == header.attempt {
            return Ok(());
        }
        Err(self.corrupt(format!(
            "the shard is of (attempt, step, rank, ranks) {stated:?}, the manifest says \
                {expected:?}"
        )))
    }

    /// A reader that does not know the feature must have been told at the first block.
    fn compare_features(&self, header: &Header, footer: &Footer, index: &ShardIndex) -> Result<()> {
        if header.chunks_offset != footer.chunks_offset {
            return Err(self.corrupt(format!(
                "the first chunk is at byte {} by the header, {} by the footer",
                header.chunks_offset, footer.chunks_offset
            )));
        }
        let has_replicated = !index.replicated.is_empty();
        if (header.replicated, footer.replicated) == (has_replicated, has_replicated) {
            return Ok(());
        }
        Err(self.corrupt(format!(
            "replicated entries: {} by the header, {} by the footer, {has_replicated} by the index",
            header.replicated, footer.replicated
        )))
    }

    fn index(&self, footer: &Footer, header: &Header) -> Result<ShardIndex> {
        let padded = footer.index_padded_bytes();
        let end = footer.index_offset.checked_add(padded);
        if end != Some(footer.file_bytes - BLOCK_BYTES as u64) {
            return Err(self.corrupt(format!(
                "an index of {} bytes at offset {} does not end where the footer begins",
                footer.index_stored_bytes, footer.index_offset
            )));
        }
        let stored = self.read(footer.index_offset, padded)?;
        let actual = crc32c(&stored);
        if actual != footer.index_crc32c {
            return Err(self.corrupt(format!(
                "the index's checksum is {actual:08x}, the footer says {:08x}",
                footer.index_crc32c
            )));
        }
        let context = IndexContext {
            file_bytes: footer.file_bytes,
            chunk_bytes: header.chunk_bytes,
            chunks_offset: footer.chunks_offset,
            index_offset: footer.index_offset,
        };
        let unpadded = usize::try_from(footer.index_stored_bytes).unwrap_or(usize::MAX);
        ShardIndex::decode(&stored[..unpadded], footer.index_raw_bytes, &context)
            .map_err(|error| self.format(error))
    }

    fn block(&self, offset: u64) -> Result<[u8; BLOCK_BYTES]> {
        let bytes = self.read(offset, BLOCK_BYTES as u64)?;
        Ok(bytes.try_into().expect("exactly one block was read"))
    }

    /// Reads whole blocks, buffer by buffer. The range is in the file, so the allocation is
    /// bounded by it.
    fn read(&self, offset: u64, bytes: u64) -> Result<Vec<u8>> {
        let mut collected = Vec::with_capacity(usize::try_from(bytes).unwrap_or(0));
        let mut at = offset;
        let end = offset + bytes;
        while at < end {
            let part = usize::try_from(end - at).unwrap_or(usize::MAX).min(CONTROL_BUFFER_BYTES);
            let (read, buffer) = read_now(self.source, at, self.pool.take(), part)?;
            read?;
            collected.extend_from_slice(&buffer[..part]);
            at += part as u64;
        }
        Ok(collected)
    }

    fn corrupt(&self, why: String) -> EngineError {
        EngineError::corrupt(self.source.name(), why)
    }

    fn format(&self, error: FormatError) -> EngineError {
        from_format(&self.source.name(), error)
    }
}
