//! Which chunks a request touches, and where each byte of them goes.
//!
//! Always holds: pure; every byte of a target is in exactly one piece; what belongs to another
//! rank's state, or is outside a storage, is refused.

use std::collections::BTreeMap;
use std::ops::Range;

use super::device::{Destination, DeviceTarget};
use super::parts::Part;
use super::read::Target;
use super::{Checkpoint, Shard, ShardScope};
use crate::format::index::ChunkRecord;
use crate::{EngineError, Result};

/// One chunk to read and where its bytes go.
#[derive(Debug)]
pub(super) struct ChunkJob<'c, 'a> {
    pub(super) shard: &'c Shard,
    pub(super) chunk: usize,
    /// Bytes from the chunk's raw start, and the memory for what stands there.
    pub(super) pieces: Vec<(usize, Destination<'a>)>,
}

impl ChunkJob<'_, '_> {
    pub(super) fn record(&self) -> &ChunkRecord {
        self.shard.record(self.chunk)
    }
}

/// By shard and chunk: pieces of the chunk.
type Pieces<'a> = BTreeMap<(usize, usize), Vec<(usize, Destination<'a>)>>;

/// A part of a storage, and where it goes.
pub(super) type Wanted<'a> = (u32, u64, Destination<'a>);

pub(super) fn wanted<'a>(
    targets: Vec<Target<'a>>,
    device_targets: Vec<DeviceTarget<'a>>,
) -> Vec<Wanted<'a>> {
    let host = targets.into_iter().map(|target| {
        let Target { storage, offset, memory } = target;
        (storage, offset, Destination::Host(memory))
    });
    let devices = device_targets.into_iter().map(|target| {
        let DeviceTarget { storage, offset, bytes, memory, at } = target;
        (storage, offset, Destination::Device { memory, at, bytes })
    });
    host.chain(devices).collect()
}

/// Cuts the targets at borders of parts and chunks; the jobs follow the files.
pub(super) fn plan<'c, 'a>(
    checkpoint: &'c Checkpoint,
    targets: Vec<Wanted<'a>>,
) -> Result<Vec<ChunkJob<'c, 'a>>> {
    let mut pieces = Pieces::new();
    for (storage, offset, mut memory) in targets {
        let end = offset.saturating_add(memory.len() as u64);
        for (shard, raw) in checkpoint.locate(storage, offset..end)? {
            let bytes = usize::try_from(raw.end - raw.start).unwrap_or(usize::MAX);
            let (part, after) = memory.split_at(bytes);
            let chunk_bytes = checkpoint.shard(shard).header.chunk_bytes;
            cut(&mut pieces, (shard, chunk_bytes.into()), raw.start, part);
            memory = after;
        }
    }
    let job = |((shard, chunk), pieces)| ChunkJob { shard: checkpoint.shard(shard), chunk, pieces };
    let mut jobs: Vec<_> = pieces.into_iter().map(job).collect();
    jobs.sort_by_key(|job| (job.shard.header.rank, job.record().offset));
    Ok(jobs)
}

/// Cuts memory for what is from `raw_offset` of a shard's raw layout at borders of its chunks.
fn cut<'a>(
    pieces: &mut Pieces<'a>,
    (shard, chunk_bytes): (usize, u64),
    mut raw_offset: u64,
    mut rest: Destination<'a>,
) {
    while !rest.is_empty() {
        let chunk = usize::try_from(raw_offset / chunk_bytes).unwrap_or(usize::MAX);
        let start = usize::try_from(raw_offset % chunk_bytes).unwrap_or(usize::MAX);
        let room = usize::try_from(chunk_bytes).unwrap_or(usize::MAX) - start;
        let count = room.min(rest.len());
        let (piece, after) = rest.split_at(count);
        raw_offset += piece.len() as u64;
        pieces.entry((shard, chunk)).or_default().push((start, piece));
        rest = after;
    }
}

impl Checkpoint {
    /// Refuses what belongs to another rank's state.
    pub(super) fn check_readable(&self, storage: u32) -> Result<()> {
        let Some(record) = self.own.index.storages.get(storage as usize) else { return Ok(()) };
        let is_readable = match self.scope {
            ShardScope::All => true,
            ShardScope::ReplicatedOnly => record.replica.is_some(),
            ShardScope::ShardOnly => record.held() == (0..record.bytes),
        };
        if is_readable {
            return Ok(());
        }
        if self.scope == ShardScope::ShardOnly {
            return Err(EngineError::invalid(
                format!("reading storage {storage} of `{}`", self.shard_name()),
                "the shard holds only a part of it and was opened alone",
                "open it together with the shards that hold the rest",
            ));
        }
        Err(EngineError::invalid(
            format!("reading storage {storage} of `{}`", self.shard_name()),
            format!(
                "only rank {} saved it, of {} ranks",
                self.own.header.rank, self.own.header.world_size
            ),
            "open the checkpoint of a named rank, or read replicated entries only",
        ))
    }

    fn shard(&self, number: usize) -> &Shard {
        self.parts.other(number).unwrap_or(&self.own)
    }

    /// Where `bytes` of a storage are: shards, and the ranges of their raw layouts, in order.
    fn locate(&self, storage: u32, bytes: Range<u64>) -> Result<Vec<(usize, Range<u64>)>> {
        self.check_readable(storage)?;
        let record = self.own.index.storages.get(storage as usize);
        let Some(record) = record.filter(|record| bytes.end <= record.bytes) else {
            return Err(EngineError::invalid(
                format!("reading storage {storage} of `{}`", self.shard_name()),
                format!("bytes {} to {} are outside it", bytes.start, bytes.end),
                "ask for ranges within the storages that the index lists",
            ));
        };
        let raw = |start: u64, range: Range<u64>| start + range.start..start + range.end;
        let Some(parts) = self.parts.of(storage as usize) else {
            return Ok(vec![(0, raw(record.raw_offset, bytes))]);
        };
        let overlap = |part: &Part| {
            let (start, end) = (part.held.start.max(bytes.start), part.held.end.min(bytes.end));
            let there = &self.shard(part.shard).index.storages[part.storage];
            let within = start.checked_sub(part.held.start)?..end.checked_sub(part.held.start)?;
            (start < end).then(|| (part.shard, raw(there.raw_offset, within)))
        };
        Ok(parts.iter().filter_map(overlap).collect())
    }
}
