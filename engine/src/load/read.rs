//! Reading chunks: many reads in flight, a worker per core that checks, decodes and delivers.
//!
//! Always holds: each byte of a target is written by exactly one chunk; a target is complete only
//! if [`Checkpoint::read`] returns `Ok`; after an error, targets hold unspecified bytes.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use crossbeam_channel::{Receiver, Sender};

use super::second::{is_damage, read_elsewhere};
use super::{Checkpoint, read_now};
use crate::codec::{Codec, Decoder};
use crate::copy::{copy, copy_with_checksum};
use crate::error::IoContext;
use crate::format::checksum::crc32c;
use crate::format::index::ChunkRecord;
use crate::io::ALIGNMENT;
use crate::io::buffer::{Buffer, BufferPool};
use crate::{EngineError, Result};

/// Bytes of reads in flight and decoded at a time.
const READ_BUFFERS_BYTES: usize = 48 << 20;
/// Most threads that decode.
const READ_WORKERS_MAX: usize = 16;

/// Memory that a part of a storage is read into.
#[derive(Debug)]
pub struct Target<'a> {
    /// Index into the shard's storages.
    pub storage: u32,
    /// Bytes from the storage's start.
    pub offset: u64,
    /// Filled entirely.
    pub memory: &'a mut [u8],
}

/// How [`Checkpoint::read`] reads.
#[derive(Clone, Copy, Debug)]
pub struct ReadOptions {
    /// Check both checksums of every chunk. Default true.
    pub verify: bool,
    /// Threads that decode. Default: one per core, at most 16.
    pub workers: Option<u32>,
    /// Read a chunk that is damaged here from the store's other copy, if it has one. Default true.
    pub copies: bool,
}

impl Default for ReadOptions {
    fn default() -> Self {
        Self { verify: true, workers: None, copies: true }
    }
}

/// Figures of one read.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct ReadStats {
    /// Raw bytes of the chunks that were read.
    pub raw_bytes: u64,
    /// Stored bytes of the chunks that were read.
    pub stored_bytes: u64,
    /// Chunks read.
    pub chunks: u64,
    /// Seconds it took.
    pub seconds: f64,
}

impl Checkpoint {
    /// Fills every target, or fails.
    pub fn read(&self, targets: Vec<Target<'_>>, options: ReadOptions) -> Result<ReadStats> {
        let _span = tracing::trace_span!("load").entered();
        let start = Instant::now();
        let jobs = plan(self, targets)?;
        let mut stats = ReadStats { chunks: jobs.len() as u64, ..ReadStats::default() };
        for job in &jobs {
            stats.raw_bytes += u64::from(self.record(job.chunk).raw_bytes);
            stats.stored_bytes += u64::from(self.record(job.chunk).stored_bytes);
        }
        let outcome = Outcome::default();
        run(self, jobs, options, &|chunk, result| match result {
            Ok(()) => true,
            Err(error) => {
                outcome.keep_first(self.name_tensors(chunk, error));
                false
            }
        })?;
        outcome.into_result()?;
        stats.seconds = start.elapsed().as_secs_f64();
        Ok(stats)
    }

    pub(super) fn record(&self, chunk: usize) -> &ChunkRecord {
        &self.index.chunks[chunk]
    }

    fn name_tensors(&self, chunk: usize, error: EngineError) -> EngineError {
        match error {
            EngineError::Corrupt { what, why, hint } => EngineError::Corrupt {
                what,
                why: format!("{why}; tensors hit: {}", self.tensors_in(chunk).join(", ")),
                hint,
            },
            other => other,
        }
    }
}

#[derive(Debug, Default)]
struct Outcome(Mutex<Option<EngineError>>);

impl Outcome {
    fn keep_first(&self, error: EngineError) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
    }

    fn into_result(self) -> Result<()> {
        self.0.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
    }
}

/// One chunk to read and where its bytes go.
#[derive(Debug)]
pub(super) struct ChunkJob<'a> {
    pub(super) chunk: usize,
    /// Bytes from the chunk's raw start, and the memory for what stands there.
    pub(super) pieces: Vec<(usize, &'a mut [u8])>,
}

/// Cuts the targets at chunk borders.
fn plan<'a>(checkpoint: &Checkpoint, targets: Vec<Target<'a>>) -> Result<Vec<ChunkJob<'a>>> {
    let chunk_bytes = u64::from(checkpoint.header.chunk_bytes);
    let mut pieces: BTreeMap<usize, Vec<(usize, &'a mut [u8])>> = BTreeMap::new();
    for target in targets {
        let mut raw_offset = locate(checkpoint, &target)?;
        let mut rest = target.memory;
        while !rest.is_empty() {
            let chunk = usize::try_from(raw_offset / chunk_bytes).unwrap_or(usize::MAX);
            let start = usize::try_from(raw_offset % chunk_bytes).unwrap_or(usize::MAX);
            let room = usize::try_from(chunk_bytes).unwrap_or(usize::MAX) - start;
            let (piece, after) = rest.split_at_mut(room.min(rest.len()));
            raw_offset += piece.len() as u64;
            pieces.entry(chunk).or_default().push((start, piece));
            rest = after;
        }
    }
    let mut jobs: Vec<_> =
        pieces.into_iter().map(|(chunk, pieces)| ChunkJob { chunk, pieces }).collect();
    jobs.sort_by_key(|job| checkpoint.record(job.chunk).offset);
    Ok(jobs)
}

/// Where a target starts in the raw layout.
fn locate(checkpoint: &Checkpoint, target: &Target<'_>) -> Result<u64> {
    let storage = checkpoint.index.storages.get(target.storage as usize);
    let inside = storage.and_then(|storage| {
        let end = target.offset.checked_add(target.memory.len() as u64)?;
        (end <= storage.bytes).then_some(storage.raw_offset + target.offset)
    });
    inside.ok_or_else(|| {
        EngineError::invalid(
            format!("reading storage {} of `{}`", target.storage, checkpoint.shard_name()),
            format!("{} bytes at offset {} are outside it", target.memory.len(), target.offset),
            "ask for ranges within the storages that the index lists",
        )
    })
}

/// What [`run`] tells of each chunk; false stops the reading.
pub(super) type Report<'a> = &'a (dyn Fn(usize, Result<()>) -> bool + Sync);

/// Reads, checks and delivers all `jobs`, in the order given.
pub(super) fn run(
    checkpoint: &Checkpoint,
    jobs: Vec<ChunkJob<'_>>,
    options: ReadOptions,
    report: Report<'_>,
) -> Result<()> {
    if jobs.is_empty() {
        return Ok(());
    }
    let workers = worker_count(options, jobs.len());
    let pool = read_pool(checkpoint, jobs.len(), workers)?;
    let stopped = AtomicBool::new(false);
    // Reads complete on the store's threads, which know nothing of the targets' lifetimes: they
    // hand back a number, and the jobs wait here.
    let waiting: Vec<Mutex<Option<ChunkJob<'_>>>> =
        jobs.into_iter().map(|job| Mutex::new(Some(job))).collect();
    let (arrived, arrivals) = crossbeam_channel::unbounded::<(usize, Result<()>, Buffer)>();
    std::thread::scope(|scope| {
        let handles: Vec<_> = (0..workers)
            .map(|_| {
                let arrivals = arrivals.clone();
                let (waiting, stopped) = (&waiting, &stopped);
                scope.spawn(move || {
                    work(checkpoint, options, waiting, &arrivals, stopped, report);
                })
            })
            .collect();
        drop(arrivals);
        submit_all(checkpoint, &waiting, &pool, &arrived, &stopped);
        // Workers end when the last read has arrived.
        drop(arrived);
        let panicked = handles.into_iter().any(|handle| handle.join().is_err());
        if panicked {
            return Err(EngineError::internal(
                format!("reading `{}`", checkpoint.shard_name()),
                "a decoding thread panicked",
            ));
        }
        Ok(())
    })
}

fn worker_count(options: ReadOptions, jobs: usize) -> usize {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let wanted = options.workers.map_or(cores, |workers| workers as usize);
    wanted.min(READ_WORKERS_MAX).min(jobs).max(1)
}

fn read_pool(checkpoint: &Checkpoint, jobs: usize, workers: usize) -> Result<Arc<BufferPool>> {
    let buffer_bytes = checkpoint.header.chunk_bytes as usize;
    let most = (READ_BUFFERS_BYTES / buffer_bytes).max(workers + 2);
    BufferPool::new(buffer_bytes, most.min(jobs))
        .context("allocating buffers to read", checkpoint.shard_name())
}

/// Keeps as many reads in flight as there are buffers.
fn submit_all(
    checkpoint: &Checkpoint,
    waiting: &[Mutex<Option<ChunkJob<'_>>>],
    pool: &Arc<BufferPool>,
    arrived: &Sender<(usize, Result<()>, Buffer)>,
    stopped: &AtomicBool,
) {
    for (number, job) in waiting.iter().enumerate() {
        let buffer = pool.take();
        if stopped.load(Ordering::Relaxed) {
            return;
        }
        let chunk =
            job.lock().unwrap_or_else(PoisonError::into_inner).as_ref().map(|job| job.chunk);
        let record = checkpoint.record(chunk.expect("jobs are taken only after their read"));
        let padded = padded_bytes(record);
        let arrived = arrived.clone();
        let done = Box::new(move |result, buffer| {
            // Workers that stopped early need it no more.
            let _stopped = arrived.send((number, result, buffer));
        });
        checkpoint.source.read(record.offset, buffer, padded, done);
    }
}

fn work(
    checkpoint: &Checkpoint,
    options: ReadOptions,
    waiting: &[Mutex<Option<ChunkJob<'_>>>],
    arrivals: &Receiver<(usize, Result<()>, Buffer)>,
    stopped: &AtomicBool,
    report: Report<'_>,
) {
    let mut delivery =
        Delivery { checkpoint, options, decoder: Decoder::new(), scratch: Vec::new() };
    // Buffers of stopped reads are still received, so that the submitter is never left waiting.
    while let Ok((number, result, buffer)) = arrivals.recv() {
        if stopped.load(Ordering::Relaxed) {
            continue;
        }
        let job = waiting[number].lock().unwrap_or_else(PoisonError::into_inner).take();
        let mut job = job.expect("each read arrives once");
        let delivered = match result.and_then(|()| delivery.deliver(&mut job, &buffer)) {
            Err(met) if options.copies && is_damage(&met) => {
                delivery.deliver_copy(&mut job, buffer, met)
            }
            delivered => delivered,
        };
        if !report(job.chunk, delivered) {
            stopped.store(true, Ordering::Relaxed);
        }
    }
}

/// One worker's tools.
struct Delivery<'c> {
    checkpoint: &'c Checkpoint,
    options: ReadOptions,
    decoder: Decoder,
    scratch: Vec<u8>,
}

impl Delivery<'_> {
    /// A chunk that came damaged, from elsewhere; checked whatever the options say.
    fn deliver_copy(
        &mut self,
        job: &mut ChunkJob<'_>,
        buffer: Buffer,
        met: EngineError,
    ) -> Result<()> {
        let checkpoint = self.checkpoint;
        let Some(second) = checkpoint.second(&met)? else { return Err(met) };
        let record = *checkpoint.record(job.chunk);
        let verify = std::mem::replace(&mut self.options.verify, true);
        let mut spare = Some(buffer);
        let delivered = read_elsewhere(second, met, |way| {
            let buffer = spare.take().expect("each read gives it back");
            let (read, buffer) = read_now(way, record.offset, buffer, padded_bytes(&record))?;
            let delivered = read.and_then(|()| self.deliver(job, &buffer));
            spare = Some(buffer);
            delivered
        });
        self.options.verify = verify;
        delivered
    }

    fn deliver(&mut self, job: &mut ChunkJob<'_>, buffer: &Buffer) -> Result<()> {
        let record = *self.checkpoint.record(job.chunk);
        let stored_bytes = record.stored_bytes as usize;
        let padded = &buffer[..padded_bytes(&record)];
        // Raw bytes in whole blocks have one checksum under two names: it is taken below.
        let one_checksum = record.codec == Codec::None && padded.len() == stored_bytes;
        if self.options.verify {
            if one_checksum {
                self.expect(job.chunk, "stored", record.raw_crc32c, record.stored_crc32c)?;
            } else {
                self.expect(job.chunk, "stored", checksum(padded), record.stored_crc32c)?;
            }
        }
        self.decode(&record, job, &padded[..stored_bytes])
    }

    fn decode(
        &mut self,
        record: &ChunkRecord,
        job: &mut ChunkJob<'_>,
        stored: &[u8],
    ) -> Result<()> {
        let raw_bytes = record.raw_bytes as usize;
        let chunk = job.chunk;
        // The usual case of a large tensor: the chunk is decoded where it belongs.
        if let [(0, memory)] = job.pieces.as_mut_slice()
            && memory.len() == raw_bytes
        {
            if record.codec == Codec::None && stored.len() == raw_bytes {
                return self.copy_checked(chunk, stored, memory, record);
            }
            self.decode_into(record, chunk, stored, memory)?;
            return self.check_raw(chunk, memory, record);
        }
        if record.codec == Codec::None {
            self.check_raw(chunk, stored, record)?;
            scatter(&mut job.pieces, stored);
            return Ok(());
        }
        let mut scratch = std::mem::take(&mut self.scratch);
        if scratch.len() < raw_bytes {
            // Not grown: memory that is new and zero is given only where the decoder writes.
            scratch = vec![0; raw_bytes];
        }
        let raw = &mut scratch[..raw_bytes];
        self.decode_into(record, chunk, stored, raw)?;
        self.check_raw(chunk, raw, record)?;
        scatter(&mut job.pieces, raw);
        self.scratch = scratch;
        Ok(())
    }

    /// A raw chunk to where it belongs, checked on the way.
    fn copy_checked(
        &self,
        chunk: usize,
        stored: &[u8],
        memory: &mut [u8],
        record: &ChunkRecord,
    ) -> Result<()> {
        let _span = tracing::trace_span!("copy").entered();
        if !self.options.verify {
            copy(stored, memory);
            return Ok(());
        }
        self.expect(chunk, "raw", copy_with_checksum(stored, memory), record.raw_crc32c)
    }

    fn decode_into(
        &mut self,
        record: &ChunkRecord,
        chunk: usize,
        stored: &[u8],
        raw: &mut [u8],
    ) -> Result<()> {
        let _span = tracing::trace_span!("decode").entered();
        self.decoder.decode(record.codec, stored, raw).map_err(|error| {
            self.damaged(
                chunk,
                &format!("its {} bytes do not decode: {error}", record.codec.name()),
            )
        })
    }

    fn check_raw(&self, chunk: usize, raw: &[u8], record: &ChunkRecord) -> Result<()> {
        if !self.options.verify {
            return Ok(());
        }
        self.expect(chunk, "raw", checksum(raw), record.raw_crc32c)
    }

    fn expect(&self, chunk: usize, which: &str, actual: u32, expected: u32) -> Result<()> {
        if actual == expected {
            return Ok(());
        }
        Err(self.damaged(
            chunk,
            &format!("its {which} bytes have checksum {actual:08x}, the index says {expected:08x}"),
        ))
    }

    fn damaged(&self, chunk: usize, why: &str) -> EngineError {
        let record = self.checkpoint.record(chunk);
        EngineError::corrupt(
            self.checkpoint.shard_name(),
            format!("chunk {chunk} at offset {}: {why}", record.offset),
        )
    }
}

/// Bytes of a chunk in the file, whole blocks.
fn padded_bytes(record: &ChunkRecord) -> usize {
    (record.stored_bytes as usize).next_multiple_of(ALIGNMENT)
}

fn checksum(bytes: &[u8]) -> u32 {
    tracing::trace_span!("checksum").in_scope(|| crc32c(bytes))
}

fn scatter(pieces: &mut [(usize, &mut [u8])], raw: &[u8]) {
    let _span = tracing::trace_span!("scatter").entered();
    for (start, memory) in pieces {
        copy(&raw[*start..*start + memory.len()], memory);
    }
}
