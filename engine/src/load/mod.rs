//! The load pipeline: from a committed checkpoint to memory.
//!
//! ```text
//! manifest -> footer -> header, index      each checked by the digest that its parent holds
//!                          |
//!   reads in flight at device depth
//!     -> worker per core: stored crc32c -> decode -> raw crc32c -> memory
//! ```
//!
//! Always holds: memory is `Ok` only if every chunk that touches it matched both its checksums; a
//! length read from the medium is bounded by the file before memory is allocated for it; only the
//! chunks that a request touches are read.

use std::ops::Range;
use std::sync::{Arc, OnceLock};

use crossbeam_channel::Receiver;

use crate::error::EngineError;
use crate::format::FormatError;
use crate::format::checksum::crc32c;
use crate::format::index::{IndexContext, ShardIndex};
use crate::format::layout::chunks_of;
use crate::format::manifest::{Manifest, ShardEntry};
use crate::format::names::parse_shard_file;
use crate::format::shard::{BLOCK_BYTES, Footer, Header, block_crc32c};
use crate::io::ALIGNMENT;
use crate::io::buffer::{Buffer, BufferPool};
use crate::store::{ShardId, ShardSource, Store};
use crate::{Result, error::IoContext};

mod map;
mod read;
mod second;
mod verify;

pub use map::MappedShard;
pub use read::{ReadOptions, ReadStats, Target};
use second::{is_damage, open_second, read_elsewhere};
pub use verify::{Damage, VerifyObserver, VerifyReport};

pub(crate) use verify::verify_step;

/// Bytes of a buffer for reading footer, header and index.
const CONTROL_BUFFER_BYTES: usize = 1 << 20;

/// One rank's shard of a committed checkpoint, its manifest and index read and checked.
#[derive(Debug)]
pub struct Checkpoint {
    manifest: Arc<Manifest>,
    header: Header,
    index: ShardIndex,
    source: Box<dyn ShardSource>,
    /// Opened when damage is met.
    second: OnceLock<Option<Box<dyn ShardSource>>>,
}

/// What is done about damage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Damaged {
    /// The same bytes are looked for elsewhere ([`ShardSource::second`]).
    ReadElsewhere,
    /// It is told: what lies here is what is asked about.
    Told,
}

impl Checkpoint {
    /// Reads and checks footer, header and index of the shard of `rank` that `manifest` names.
    pub(crate) fn open_shard(
        store: &dyn Store,
        manifest: &Arc<Manifest>,
        rank: u32,
        damaged: Damaged,
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
            EngineError::corrupt(store.location(), format!("`{}` is no shard's name", entry.file))
        })?;
        let source = store.open_shard(ShardId { step: manifest.step, rank, attempt })?;
        let (control, mut second) = match read_control(source.as_ref(), manifest, entry) {
            Ok(control) => (control, OnceLock::new()),
            Err(met) if damaged == Damaged::ReadElsewhere && is_damage(&met) => {
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
        Ok(Self { manifest: Arc::clone(manifest), header, index, source, second })
    }

    /// Where else the shard's bytes are, for one who met damage.
    fn second(&self, met: &EngineError) -> Result<Option<&dyn ShardSource>> {
        if let Some(second) = self.second.get() {
            return Ok(second.as_deref());
        }
        // A service that does not answer now is asked again for the next chunk.
        let second = open_second(self.source.as_ref(), met)?;
        Ok(self.second.get_or_init(|| second).as_deref())
    }

    /// The training step.
    pub fn step(&self) -> u64 {
        self.manifest.step
    }

    /// The checkpoint's manifest.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The shard's header.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// The shard's index.
    pub fn index(&self) -> &ShardIndex {
        &self.index
    }

    /// The shard's name, for messages.
    pub fn shard_name(&self) -> String {
        self.source.name()
    }

    /// Length of the shard.
    pub fn file_bytes(&self) -> u64 {
        self.source.file_bytes()
    }

    /// The file, in pieces of whole blocks by offset: header, chunks, index and footer.
    pub(crate) fn extents(&self) -> Vec<Extent> {
        let mut extents = vec![Extent { offset: 0, bytes: BLOCK_BYTES, crc32c: None }];
        extents.extend(self.index.chunks.iter().map(|chunk| Extent {
            offset: chunk.offset,
            bytes: (chunk.stored_bytes as usize).next_multiple_of(ALIGNMENT),
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

    /// The chunks that hold `bytes` bytes from `raw_offset` of the raw layout.
    fn chunks_of(&self, raw_offset: u64, bytes: u64) -> Range<usize> {
        chunks_of(raw_offset..raw_offset + bytes, self.header.chunk_bytes)
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

pub(crate) fn read_manifest(store: &dyn Store, step: u64) -> Result<Manifest> {
    let file = format!("{}, manifest of step {step}", store.location());
    let bytes = store.read_manifest(step)?.ok_or_else(|| EngineError::NotFound {
        what: format!("opening step {step} in `{}`", store.location()),
        why: "there is no committed checkpoint of this step".into(),
        hint: "`all_steps()` or `ckpt-tool ls` lists those that exist".into(),
    })?;
    let manifest = Manifest::decode(&bytes).map_err(|error| from_format(&file, error))?;
    if manifest.step == step {
        Ok(manifest)
    } else {
        Err(EngineError::corrupt(file, format!("it is the manifest of step {}", manifest.step)))
    }
}

/// Header and index of a shard, checked from the manifest down.
fn read_control(
    source: &dyn ShardSource,
    manifest: &Manifest,
    entry: &ShardEntry,
) -> Result<(Header, ShardIndex)> {
    let control = Control::new(source)?;
    let footer = control.footer(entry)?;
    let header = control.header(&footer)?;
    control.compare(&header, &footer, manifest, entry)?;
    let index = control.index(&footer, &header)?;
    Ok((header, index))
}

/// Starts reading whole blocks; the outcome comes with the buffer.
fn start_reading(
    source: &dyn ShardSource,
    offset: u64,
    buffer: Buffer,
    bytes: usize,
) -> Receiver<(Result<()>, Buffer)> {
    let (sender, receiver) = crossbeam_channel::bounded(1);
    let done = Box::new(move |outcome, buffer| {
        // A receiver that is gone wants it no more.
        let _gone = sender.send((outcome, buffer));
    });
    source.read(offset, buffer, bytes, done);
    receiver
}

/// Reads whole blocks into a buffer and waits for them; the buffer comes back either way.
fn read_now(
    source: &dyn ShardSource,
    offset: u64,
    buffer: Buffer,
    bytes: usize,
) -> Result<(Result<()>, Buffer)> {
    start_reading(source, offset, buffer, bytes).recv().map_err(|_| {
        EngineError::internal(format!("reading `{}`", source.name()), "the store dropped a read")
    })
}

/// Gives a format error the name of the file that it was found in.
pub(crate) fn from_format(file: &str, error: FormatError) -> EngineError {
    match error {
        FormatError::Damaged(why) => EngineError::corrupt(file, why),
        FormatError::Newer(why) => EngineError::UnsupportedFormat {
            what: format!("reading `{file}`"),
            why,
            hint: "upgrade dtruntime to the version that wrote this checkpoint".into(),
        },
    }
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

    fn index(&self, footer: &Footer, header: &Header) -> Result<ShardIndex> {
        let padded = footer.index_stored_bytes.next_multiple_of(ALIGNMENT as u64);
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

    /// Reads whole blocks, buffer by buffer. The range lies in the file, so the allocation is
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
