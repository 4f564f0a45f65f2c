//! One shard's file.
//!
//! Always holds: header and index were checked from the manifest down; chunks were not.

use std::ops::Range;
use std::sync::OnceLock;

use crossbeam_channel::Receiver;

use super::control::read_control;
use super::second::{is_damage, open_second, read_elsewhere};
use super::{read_now, start_reading};
use crate::error::IoContext;
use crate::format::index::{ChunkRecord, ShardIndex};
use crate::format::layout::chunks_of;
use crate::format::manifest::Manifest;
use crate::format::names::parse_shard_file;
use crate::format::shard::{BLOCK_BYTES, Header};
use crate::io::buffer::{Buffer, BufferPool, CONTROL_BUFFER_BYTES};
use crate::store::{ShardId, ShardSource, Store};
use crate::{EngineError, Result};

/// What one rank wrote.
#[derive(Debug)]
pub(crate) struct Shard {
    pub(super) header: Header,
    pub(super) index: ShardIndex,
    pub(super) source: Box<dyn ShardSource>,
    /// Opened when damage is met.
    second: OnceLock<Option<Box<dyn ShardSource>>>,
}

/// What is done about damage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum OnDamage {
    /// The same bytes are looked for in the copy ([`ShardSource::second`]), if there is one.
    ReadCopy,
    /// It is the answer: what is here is what is asked about.
    Report,
}

impl Shard {
    /// Reads and checks footer, header and index of the shard of `rank` that `manifest` names.
    pub(crate) fn open(
        store: &dyn Store,
        manifest: &Manifest,
        rank: u32,
        on_damage: OnDamage,
    ) -> Result<Self> {
        // A manifest that was decoded has one entry for each rank, in order.
        let entry = manifest.shards.get(rank as usize).ok_or_else(|| {
            EngineError::invalid(
                format!("opening what rank {rank} saved of step {}", manifest.step),
                format!("no rank {rank} saved it: world size was {}", manifest.world_size),
                format!("name a rank from 0 to {}", manifest.world_size.saturating_sub(1)),
            )
        })?;
        let (_, attempt) = parse_shard_file(&entry.file).ok_or_else(|| {
            EngineError::corrupt(
                store.location(),
                format!("`{}` is not the name of a shard", entry.file),
            )
        })?;
        let source = store.open_shard(ShardId { step: manifest.step, rank, attempt })?;
        let (control, mut second) = match read_control(source.as_ref(), manifest, entry) {
            Ok(control) => (control, OnceLock::new()),
            Err(met) if on_damage == OnDamage::ReadCopy && is_damage(&met) => {
                let Some(second) = open_second(source.as_ref(), &met)? else { return Err(met) };
                let read = |way: &dyn ShardSource| read_control(way, manifest, entry);
                let control = read_elsewhere(second.as_ref(), met, read)?;
                (control, OnceLock::from(Some(second)))
            }
            Err(error) => return Err(error),
        };
        // Chunks that are whole here are read here; in a file of another length nothing is known.
        let source = if source.file_bytes() == entry.bytes {
            source
        } else {
            second.take().flatten().unwrap_or(source)
        };
        let (header, index) = control;
        Ok(Self { header, index, source, second })
    }

    /// Where else the shard's bytes are, for one who met damage.
    pub(super) fn second(&self, met: &EngineError) -> Result<Option<&dyn ShardSource>> {
        if let Some(second) = self.second.get() {
            return Ok(second.as_deref());
        }
        // A service that does not answer now is asked again for the next chunk.
        let second = open_second(self.source.as_ref(), met)?;
        Ok(self.second.get_or_init(|| second).as_deref())
    }

    /// The name, for messages.
    pub(crate) fn name(&self) -> String {
        self.source.name()
    }

    /// Length of the file.
    pub(crate) fn file_bytes(&self) -> u64 {
        self.source.file_bytes()
    }

    pub(super) fn record(&self, chunk: usize) -> &ChunkRecord {
        &self.index.chunks[chunk]
    }

    /// Checks that nothing but zeros is between the header and the first chunk, in what the file
    /// begins with: all up to there.
    pub(crate) fn check_start(&self, start: &[u8]) -> Result<()> {
        let gap = start.get(BLOCK_BYTES..).unwrap_or_default();
        let Some(at) = gap.iter().position(|byte| *byte != 0) else { return Ok(()) };
        Err(EngineError::corrupt(
            self.name(),
            format!(
                "byte {} between the header and the first chunk is {:#04x}, expected zero",
                BLOCK_BYTES + at,
                gap[at]
            ),
        ))
    }

    /// [`Shard::check_start`] of the file as it is.
    pub(super) fn read_start(&self) -> Result<()> {
        let bytes = self.header.chunks_offset as usize;
        if bytes == BLOCK_BYTES {
            return Ok(());
        }
        let pool = BufferPool::new(bytes, 1).context("allocating a buffer to read", self.name())?;
        let (read, buffer) = read_now(self.source.as_ref(), 0, pool.take(), bytes)?;
        read?;
        self.check_start(&buffer[..bytes])
    }

    /// The file, in pieces of whole blocks by offset: header with zeros, chunks, index and footer.
    pub(crate) fn extents(&self) -> Vec<Extent> {
        let bytes = self.header.chunks_offset as usize;
        let mut extents = vec![Extent { offset: 0, bytes, crc32c: None }];
        extents.extend(self.index.chunks.iter().map(|chunk| Extent {
            offset: chunk.offset,
            bytes: chunk.padded_bytes(),
            crc32c: Some(chunk.stored_crc32c),
        }));
        extents.sort_by_key(|extent| extent.offset);
        let ends = extents.iter().map(|extent| extent.offset + extent.bytes as u64);
        let mut offset = ends.max().unwrap_or(0);
        while offset < self.file_bytes() {
            let left = usize::try_from(self.file_bytes() - offset).unwrap_or(usize::MAX);
            let bytes = left.min(CONTROL_BUFFER_BYTES);
            extents.push(Extent { offset, bytes, crc32c: None });
            offset += bytes as u64;
        }
        extents
    }

    /// Starts reading an extent; the outcome comes with the buffer.
    pub(crate) fn start_reading(
        &self,
        extent: Extent,
        buffer: Buffer,
    ) -> Receiver<(Result<()>, Buffer)> {
        start_reading(self.source.as_ref(), extent.offset, buffer, extent.bytes)
    }

    /// The chunks that hold a range of the raw layout.
    pub(super) fn chunks_of(&self, raw: Range<u64>) -> Range<usize> {
        chunks_of(raw, self.header.chunk_bytes)
    }
}

/// A piece of a shard's file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Extent {
    pub(crate) offset: u64,
    pub(crate) bytes: usize,
    /// Of a chunk, by the index.
    pub(crate) crc32c: Option<u32>,
}
