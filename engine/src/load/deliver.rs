//! One chunk, from its stored bytes to the memory that asked for it.
//!
//! Always holds: unless the caller waived it, nothing is delivered unchecked, in memory of the host
//! or of a device; what is read from elsewhere, because it came damaged, is checked in any case.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::device::{Departure, Destination, DeviceDestination, UnderWay};
use super::plan::ChunkJob;
use super::read::ReadOptions;
use super::second::{is_damage, read_elsewhere};
use super::{Shard, read_now};
use crate::codec::{Codec, Decoder};
use crate::format::checksum::crc32c;
use crate::format::index::ChunkRecord;
use crate::io::buffer::{Buffer, BufferPool};
use crate::memcpy::{copy, copy_with_checksum};
use crate::{EngineError, Result};

/// A chunk, for messages.
type At<'c> = (&'c Shard, usize);

/// How chunks get to devices.
#[derive(Clone, Debug, Default)]
pub(super) struct Ways {
    /// There where there is a device to read to.
    pub(super) staging: Option<Arc<BufferPool>>,
    pub(super) under_way: Arc<UnderWay>,
}

/// One worker's tools.
pub(super) struct Delivery {
    options: ReadOptions,
    ways: Ways,
    decoder: Decoder,
    scratch: Vec<u8>,
}

impl Delivery {
    pub(super) fn new(options: ReadOptions, ways: Ways) -> Self {
        Self { options, ways, decoder: Decoder::new(), scratch: Vec::new() }
    }

    /// Delivers what came of a chunk's read; what is damaged, from elsewhere if it may.
    pub(super) fn take(
        &mut self,
        job: &mut ChunkJob<'_, '_>,
        read: Result<()>,
        buffer: Buffer,
    ) -> Result<()> {
        match read.and_then(|()| self.deliver(job, &buffer)) {
            Err(met) if self.options.copies && is_damage(&met) => {
                self.deliver_copy(job, buffer, met)
            }
            delivered => delivered,
        }
    }

    /// A chunk that came damaged, from elsewhere; checked whatever the options say.
    fn deliver_copy(
        &mut self,
        job: &mut ChunkJob<'_, '_>,
        buffer: Buffer,
        met: EngineError,
    ) -> Result<()> {
        let shard = job.shard;
        let Some(second) = shard.second(&met)? else { return Err(met) };
        let record = *job.record();
        let verify = std::mem::replace(&mut self.options.verify, true);
        let mut spare = Some(buffer);
        let delivered = read_elsewhere(second, met, |way| {
            let buffer = spare.take().expect("each read gives it back");
            let (read, buffer) = read_now(way, record.offset, buffer, record.padded_bytes())?;
            let delivered = read.and_then(|()| self.deliver(job, &buffer));
            spare = Some(buffer);
            delivered
        });
        self.options.verify = verify;
        delivered
    }

    fn deliver(&mut self, job: &mut ChunkJob<'_, '_>, buffer: &Buffer) -> Result<()> {
        let record = *job.record();
        let at = (job.shard, job.chunk);
        let stored_bytes = record.stored_bytes as usize;
        let padded = &buffer[..record.padded_bytes()];
        // Raw bytes in whole blocks have one checksum under two names: it is taken below.
        let one_checksum = record.codec == Codec::None && padded.len() == stored_bytes;
        if self.options.verify {
            if one_checksum {
                Self::expect(at, "stored", record.raw_crc32c, record.stored_crc32c)?;
            } else {
                Self::expect(at, "stored", checksum(padded), record.stored_crc32c)?;
            }
        }
        self.decode(&record, job, &padded[..stored_bytes])
    }

    fn decode(
        &mut self,
        record: &ChunkRecord,
        job: &mut ChunkJob<'_, '_>,
        stored: &[u8],
    ) -> Result<()> {
        let raw_bytes = record.raw_bytes as usize;
        let at = (job.shard, job.chunk);
        if job.pieces.iter().any(|(_, piece)| piece.is_device()) {
            return self.send_to_device(record, job, stored);
        }
        // The usual case of a large tensor: the chunk is decoded where it belongs.
        if let [(0, Destination::Host(memory))] = job.pieces.as_mut_slice()
            && memory.len() == raw_bytes
        {
            if record.codec == Codec::None && stored.len() == raw_bytes {
                return self.copy_checked(at, stored, memory, record);
            }
            self.decode_into(record, at, stored, memory)?;
            return self.check_raw(at, memory, record);
        }
        if record.codec == Codec::None {
            self.check_raw(at, stored, record)?;
            scatter(&mut job.pieces, stored);
            return Ok(());
        }
        let mut scratch = std::mem::take(&mut self.scratch);
        if scratch.len() < raw_bytes {
            // Not grown: memory that is new and zero is given only where the decoder writes.
            scratch = vec![0; raw_bytes];
        }
        let raw = &mut scratch[..raw_bytes];
        self.decode_into(record, at, stored, raw)?;
        self.check_raw(at, raw, record)?;
        scatter(&mut job.pieces, raw);
        self.scratch = scratch;
        Ok(())
    }

    /// A chunk of which some goes to a device: decoded and checked first, then on its way.
    fn send_to_device(
        &mut self,
        record: &ChunkRecord,
        job: &mut ChunkJob<'_, '_>,
        stored: &[u8],
    ) -> Result<()> {
        let at = (job.shard, job.chunk);
        let Some(staging) = &self.ways.staging else {
            return Err(EngineError::internal("reading to a device", "there is no staging memory"));
        };
        let mut buffer = staging.take();
        let raw = &mut buffer[..record.raw_bytes as usize];
        if record.codec == Codec::None && stored.len() == raw.len() {
            self.copy_checked(at, stored, raw, record)?;
        } else {
            self.decode_into(record, at, stored, raw)?;
            self.check_raw(at, raw, record)?;
        }
        scatter(&mut job.pieces, raw);
        let buffer = Arc::new(buffer);
        let mut devices = BTreeMap::new();
        for (start, piece) in &job.pieces {
            if let Destination::Device { memory, at, bytes } = piece {
                let range = *start..*start + *bytes;
                memory.begin(*at, Departure::new(&buffer, range, &self.ways.under_way));
                devices.insert(memory.ordinal(), *memory);
            }
        }
        // Another thread may wait for this buffer.
        devices.into_values().for_each(DeviceDestination::flush);
        Ok(())
    }

    /// A raw chunk to where it belongs, checked on the way.
    fn copy_checked(
        &self,
        at: At<'_>,
        stored: &[u8],
        memory: &mut [u8],
        record: &ChunkRecord,
    ) -> Result<()> {
        let _span = tracing::trace_span!("copy").entered();
        if !self.options.verify {
            copy(stored, memory);
            return Ok(());
        }
        Self::expect(at, "raw", copy_with_checksum(stored, memory), record.raw_crc32c)
    }

    fn decode_into(
        &mut self,
        record: &ChunkRecord,
        at: At<'_>,
        stored: &[u8],
        raw: &mut [u8],
    ) -> Result<()> {
        let _span = tracing::trace_span!("decode").entered();
        self.decoder.decode(record.codec, stored, raw).map_err(|error| {
            Self::damaged(at, &format!("its {} bytes do not decode: {error}", record.codec.name()))
        })
    }

    fn check_raw(&self, at: At<'_>, raw: &[u8], record: &ChunkRecord) -> Result<()> {
        if !self.options.verify {
            return Ok(());
        }
        Self::expect(at, "raw", checksum(raw), record.raw_crc32c)
    }

    fn expect(at: At<'_>, which: &str, actual: u32, expected: u32) -> Result<()> {
        if actual == expected {
            return Ok(());
        }
        Err(Self::damaged(
            at,
            &format!("its {which} bytes have checksum {actual:08x}, the index says {expected:08x}"),
        ))
    }

    fn damaged((shard, chunk): At<'_>, why: &str) -> EngineError {
        let record = shard.record(chunk);
        EngineError::corrupt(
            shard.name(),
            format!("chunk {chunk} at offset {}: {why}", record.offset),
        )
    }
}

fn checksum(bytes: &[u8]) -> u32 {
    tracing::trace_span!("checksum").in_scope(|| crc32c(bytes))
}

/// Copies what of a chunk goes to the host's memory.
fn scatter(pieces: &mut [(usize, Destination<'_>)], raw: &[u8]) {
    let _span = tracing::trace_span!("scatter").entered();
    for (start, piece) in pieces {
        if let Destination::Host(memory) = piece {
            copy(&raw[*start..*start + memory.len()], memory);
        }
    }
}
