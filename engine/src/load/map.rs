//! Mapping a shard: storages that are stored raw are used where they are, without a copy.
//!
//! Always holds: a range is given out only for a storage whose chunks are all uncompressed and are
//! one after the other in the file, and, unless the caller waived it, only after their checksums
//! matched in the mapping itself. The mapping is private: writing to it changes no file.

use std::collections::BTreeMap;
use std::ops::Range;

use memmap2::MmapMut;

use super::Checkpoint;
use super::verify::listed;
use crate::codec::Codec;
use crate::format::checksum::crc32c;
use crate::{EngineError, Result};

/// A shard in memory, with the ranges of the storages that can be used in place.
#[derive(Debug)]
pub struct MappedShard {
    map: MmapMut,
    ranges: BTreeMap<u32, Range<usize>>,
}

impl Checkpoint {
    /// Maps the shard and finds the ranges of `storages`; see [`MappedShard::range_of`].
    pub fn map(&self, storages: &[u32], verify: bool) -> Result<MappedShard> {
        let map = self.own.source.map()?;
        if map.len() as u64 != self.file_bytes() {
            return Err(EngineError::corrupt(
                self.shard_name(),
                format!("it has {} bytes now, it had {}", map.len(), self.file_bytes()),
            ));
        }
        let mut checked = vec![!verify; self.own.index.chunks.len()];
        let mut ranges = BTreeMap::new();
        for &storage in storages {
            let Some(range) = self.contiguous(storage)? else { continue };
            let record = self.own.index.storages[storage as usize];
            let chunks = self.own.chunks_of(record.raw_offset..record.raw_end());
            match self.check_all_mapped(chunks, &map, &mut checked) {
                Ok(()) => drop(ranges.insert(storage, range)),
                // Left out, it is read instead, and what is damaged here comes from there.
                Err(error) if self.own.second(&error)?.is_some() => {}
                Err(error) => return Err(error),
            }
        }
        Ok(MappedShard { map, ranges })
    }

    /// Checks the chunks that were not yet.
    fn check_all_mapped(
        &self,
        chunks: Range<usize>,
        map: &MmapMut,
        checked: &mut [bool],
    ) -> Result<()> {
        for chunk in chunks {
            if !checked[chunk] {
                self.check_mapped(chunk, map)?;
                checked[chunk] = true;
            }
        }
        Ok(())
    }

    /// Where a storage is in the file if it is there in one raw piece.
    fn contiguous(&self, storage: u32) -> Result<Option<Range<usize>>> {
        self.check_readable(storage)?;
        let record = *self.own.index.storages.get(storage as usize).ok_or_else(|| {
            EngineError::invalid(
                format!("mapping storage {storage} of `{}`", self.shard_name()),
                format!("the shard has {}", self.own.index.storages.len()),
                "ask for storages that the index lists",
            )
        })?;
        if self.parts.of(storage as usize).is_some() {
            return Ok(None);
        }
        let chunks = self.own.chunks_of(record.raw_offset..record.raw_end());
        let Some(first) = self.own.index.chunks.get(chunks.start).filter(|_| !chunks.is_empty())
        else {
            return Ok(Some(0..0));
        };
        let mut expected = first.offset;
        for chunk in &self.own.index.chunks[chunks] {
            if chunk.codec != Codec::None || chunk.offset != expected {
                return Ok(None);
            }
            expected += u64::from(chunk.stored_bytes);
        }
        let start = first.offset + record.raw_offset % u64::from(self.own.header.chunk_bytes);
        let in_memory = |offset: u64| usize::try_from(offset).unwrap_or(usize::MAX);
        Ok(Some(in_memory(start)..in_memory(start + record.bytes)))
    }

    fn check_mapped(&self, chunk: usize, map: &MmapMut) -> Result<()> {
        let record = self.own.record(chunk);
        let start = usize::try_from(record.offset).unwrap_or(usize::MAX);
        let raw = &map[start..start + record.raw_bytes as usize];
        let whole = &map[start..start + record.padded_bytes()];
        if crc32c(raw) == record.raw_crc32c && crc32c(whole) == record.stored_crc32c {
            return Ok(());
        }
        Err(EngineError::corrupt(
            self.shard_name(),
            format!(
                "chunk {chunk} at offset {}: its checksum is not the index's; affected tensors: {}",
                record.offset,
                listed(&self.tensors_in(&self.own, chunk))
            ),
        ))
    }
}

impl MappedShard {
    /// Where a storage is in [`MappedShard::bytes`]; `None` if it must be read instead.
    pub fn range_of(&self, storage: u32) -> Option<Range<usize>> {
        self.ranges.get(&storage).cloned()
    }

    /// The whole file.
    pub fn bytes(&self) -> &[u8] {
        &self.map
    }

    /// The whole file; writes stay in this process.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.map
    }
}
