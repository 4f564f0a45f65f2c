//! Writing one shard: places chunks in the file, remembers where, then closes it with index and
//! footer.
//!
//! Always holds: header, zeros, chunks, index and footer tile the file exactly; with codec `none`
//! chunk `i` is at `chunks_offset + i * chunk_bytes`, so that a tensor is contiguous in the file.

use std::sync::Arc;

use super::SaveRequest;
use super::job::{EncodedChunk, Job, Message};
use super::share::Share;
use crate::codec::Codec;
use crate::format::FormatError;
use crate::format::checksum::{combine, crc32c};
use crate::format::index::{ChunkRecord, ShardIndex, StorageRecord, structure_crc32c};
use crate::format::layout::Layout;
use crate::format::names::AttemptId;
use crate::format::shard::{
    BLOCK_BYTES, CHUNKS_OFFSET_MAX, CHUNKS_OFFSET_MIN, Footer, Header, block_crc32c,
};
use crate::io::ALIGNMENT;
use crate::io::buffer::BufferPool;
use crate::store::{Piece, ShardSink};
use crate::{EngineError, Result};

/// What the manifest says of a shard that was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct WrittenShard {
    pub(crate) file_bytes: u64,
    pub(crate) footer_crc32c: u32,
    /// Checksum of the structure of the replicated entries.
    pub(crate) replicated_crc32c: Option<u32>,
}

/// What is known of a shard's index before its chunks are: all but those. Storages of a request are
/// in the caller's order; an index has them by raw offset. `layout` is of the parts in `share`.
pub(crate) fn draft_index(
    layout: &Layout,
    share: &Share,
    request: SaveRequest<'_>,
) -> Result<ShardIndex> {
    let SaveRequest { step, nodes, mut tensors, replicated, storages: inputs, .. } = request;
    let mut storages: Vec<StorageRecord> = layout.records().collect();
    for (storage, input) in inputs.iter().enumerate() {
        let record = &mut storages[layout.record_index(storage)];
        (record.bytes, record.replica) = (input.bytes, share.replicas[storage]);
    }
    for tensor in &mut tensors {
        let named = tensor.storage as usize;
        if named >= storages.len() {
            return Err(EngineError::internal(
                "planning a save",
                format!("a tensor names storage {named} of {}", storages.len()),
            ));
        }
        let position = layout.record_index(named);
        tensor.storage = u32::try_from(position).expect("STORAGES_MAX fits 32 bits");
    }
    let index = ShardIndex { nodes, storages, tensors, chunks: Vec::new(), replicated };
    // Before anything is written: with the chunks, all of it is checked once more.
    index.check_size().map_err(|error| unstorable(step, &error))?;
    Ok(index)
}

/// The error of an index that is too large for its file.
fn unstorable(step: u64, error: &FormatError) -> EngineError {
    EngineError::invalid(
        format!("writing the index of step {step}"),
        error.to_string(),
        "save fewer or smaller plain values: large data belongs in tensors or arrays",
    )
}

/// Where the first chunk goes. Chunks that are stored as they are start at multiples of it: storage
/// is faster at writes that start where its own units do (pages of the host under a virtual disk,
/// stripes of a RAID or of a parallel filesystem, records of ZFS). The zeros before the first chunk
/// are less than a thousandth of the state. Encoded chunks have any length, and start anywhere.
pub(crate) fn chunks_offset(raw_bytes: u64, chunk_bytes: u32, codec: Option<Codec>) -> u32 {
    if codec != Some(Codec::None) {
        return CHUNKS_OFFSET_MIN;
    }
    let most = u32::try_from(raw_bytes / 1024).unwrap_or(u32::MAX).max(1);
    (1 << most.ilog2()).min(chunk_bytes).clamp(CHUNKS_OFFSET_MIN, CHUNKS_OFFSET_MAX)
}

/// Writes the shard of `job` through `sink` and makes it durable.
pub(crate) fn write_shard(
    job: &Arc<Job>,
    mut index: ShardIndex,
    header: &Header,
    encoded: &crossbeam_channel::Receiver<Message>,
    sink: &mut dyn ShardSink,
    pool: &Arc<BufferPool>,
) -> Result<WrittenShard> {
    let &Header { attempt, chunks_offset, .. } = header;
    let block = header.encode();
    let mut start = block.to_vec();
    start.resize(chunks_offset as usize, 0);
    let next_offset = chunks_offset.into();
    let mut writer = ShardWriter { job, attempt, sink, pool, chunks_offset, next_offset };
    writer.write_at(0, &start)?;
    index.chunks = writer.write_chunks(encoded)?;
    writer.close(&index, block_crc32c(&block))
}

struct ShardWriter<'a> {
    job: &'a Arc<Job>,
    attempt: AttemptId,
    sink: &'a mut dyn ShardSink,
    pool: &'a Arc<BufferPool>,
    chunks_offset: u32,
    next_offset: u64,
}

impl ShardWriter<'_> {
    fn write_chunks(
        &mut self,
        encoded: &crossbeam_channel::Receiver<Message>,
    ) -> Result<Vec<ChunkRecord>> {
        let mut records = vec![None; self.job.layout.chunk_count()];
        let mut missing = records.len();
        while missing > 0 {
            let message = encoded.recv().map_err(|_| {
                EngineError::internal("writing a shard", "the workers ended before the last chunk")
            })?;
            if let Some(error) = self.job.failure() {
                return Err(error);
            }
            let Message::Chunk(chunk) = message else { continue };
            let slot = &mut records[chunk.index];
            assert!(slot.is_none(), "a chunk is encoded once");
            *slot = Some(self.write_chunk(chunk)?);
            missing -= 1;
        }
        Ok(records.into_iter().flatten().collect())
    }

    fn write_chunk(&mut self, chunk: EncodedChunk) -> Result<ChunkRecord> {
        let padded = chunk.padded_bytes();
        let offset = self.place(chunk.index, padded as u64);
        let record = ChunkRecord {
            offset,
            stored_bytes: chunk.stored_bytes,
            raw_bytes: chunk.raw_bytes,
            codec: chunk.codec,
            stored_crc32c: chunk.stored_crc32c,
            raw_crc32c: chunk.raw_crc32c,
        };
        let _span = tracing::trace_span!("write").entered();
        let crc32c = chunk.stored_crc32c;
        self.sink.write(offset, Piece { buffer: chunk.buffer, bytes: padded, crc32c })?;
        self.job.flow.arrive(padded as u64);
        self.job.progress.add_written(padded as u64);
        Ok(record)
    }

    /// Where a chunk goes: its raw place if no chunk of this save is encoded, else the next free.
    fn place(&mut self, index: usize, padded_bytes: u64) -> u64 {
        let offset = if self.job.compression.fixed_codec() == Some(Codec::None) {
            let raw_offset = index as u64 * u64::from(self.job.layout.chunk_bytes());
            u64::from(self.chunks_offset) + raw_offset
        } else {
            self.next_offset
        };
        self.next_offset = self.next_offset.max(offset + padded_bytes);
        offset
    }

    /// Index, footer, durability.
    fn close(mut self, index: &ShardIndex, header_crc32c: u32) -> Result<WrittenShard> {
        let span = tracing::trace_span!("index").entered();
        let encoded = index.encode().map_err(|error| unstorable(self.job.step, &error))?;
        let mut stored = encoded.stored;
        let index_stored_bytes = stored.len() as u64;
        stored.resize(stored.len().next_multiple_of(ALIGNMENT), 0);
        let index_offset = self.next_offset;
        let index_crc32c = self.write_at(index_offset, &stored)?;
        let footer_offset = index_offset + stored.len() as u64;
        let footer = Footer {
            index_offset,
            index_stored_bytes,
            index_raw_bytes: encoded.raw_bytes,
            index_crc32c,
            header_crc32c,
            file_bytes: footer_offset + BLOCK_BYTES as u64,
            attempt: self.attempt,
            chunks_offset: self.chunks_offset,
            replicated: !index.replicated.is_empty(),
        };
        let block = footer.encode();
        self.write_at(footer_offset, &block)?;
        drop(span);
        tracing::trace_span!("sync").in_scope(|| self.sink.finish(footer.file_bytes))?;
        Ok(WrittenShard {
            file_bytes: footer.file_bytes,
            footer_crc32c: block_crc32c(&block),
            replicated_crc32c: structure_crc32c(index),
        })
    }

    /// Writes whole blocks from memory that is not a pool's, buffer by buffer. Returns the checksum
    /// of all of them.
    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> Result<u32> {
        let mut at = offset;
        let mut whole = crc32c(&[]);
        for part in bytes.chunks(self.pool.buffer_bytes()) {
            let crc32c = crc32c(part);
            whole = combine(whole, crc32c, part.len());
            let mut buffer = self.pool.take();
            buffer[..part.len()].copy_from_slice(part);
            self.sink.write(at, Piece { buffer, bytes: part.len(), crc32c })?;
            at += part.len() as u64;
        }
        Ok(whole)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_stored_as_they_are_start_where_storage_likes_it() {
        let offset = |raw_bytes| chunks_offset(raw_bytes, 4 << 20, Some(Codec::None));
        for (raw_bytes, expected) in [
            (0, 4096),
            (1, 4096),
            ((8 << 20) - 1, 4096),
            (8 << 20, 8192),
            ((64 << 20) + 1, 64 << 10),
            (1 << 30, 1 << 20),
            (1 << 40, 1 << 20),
            (u64::MAX, 1 << 20),
        ] {
            assert_eq!(offset(raw_bytes), expected, "{raw_bytes}");
        }
        for codec in [None, Some(Codec::Float), Some(Codec::Zstd)] {
            assert_eq!(chunks_offset(1 << 30, 4 << 20, codec), 4096);
        }
        let small_chunks = chunks_offset(1 << 30, 64 << 10, Some(Codec::None));
        assert_eq!(small_chunks, 64 << 10, "more would be no multiple for the chunks after it");
    }
}
