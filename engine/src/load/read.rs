//! Reading chunks: many reads in flight, a worker per core that checks, decodes and delivers.
//!
//! Always holds: each byte of a target is written by exactly one chunk; a target is complete only
//! if [`Checkpoint::read`] returns `Ok`; after an error, targets hold unspecified bytes. Nothing is
//! on its way to a device when it returns.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use crossbeam_channel::{Receiver, Sender};

use super::device::{Departure, Destination, DeviceDestination, DeviceTarget, UnderWay};
use super::parts::Part;
use super::second::{is_damage, read_elsewhere};
use super::verify::listed;
use super::{Checkpoint, Shard, Whose, read_now};
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
    /// Index into [`Checkpoint::storages`].
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
        self.read_to(targets, Vec::new(), options)
    }

    /// Fills every target, in the host's memory and in devices', or fails.
    pub fn read_to(
        &self,
        targets: Vec<Target<'_>>,
        device_targets: Vec<DeviceTarget<'_>>,
        options: ReadOptions,
    ) -> Result<ReadStats> {
        let _span = tracing::trace_span!("load").entered();
        let start = Instant::now();
        let staging = self.staging_for(&device_targets, options)?;
        let jobs = plan(self, wanted(targets, device_targets))?;
        let mut stats = ReadStats { chunks: jobs.len() as u64, ..ReadStats::default() };
        for job in &jobs {
            stats.raw_bytes += u64::from(job.record().raw_bytes);
            stats.stored_bytes += u64::from(job.record().stored_bytes);
        }
        let outcome = Outcome::default();
        let under_way = Arc::new(UnderWay::default());
        let ways = Ways { staging, under_way: Arc::clone(&under_way) };
        let ran = run(jobs, options, &ways, &|shard, chunk, result| match result {
            Ok(()) => !under_way.has_failed(),
            Err(error) => {
                outcome.keep_first(self.name_tensors(shard, chunk, error));
                false
            }
        });
        // Also after a failure: the devices' memory is the caller's again when this returns.
        let arrived = under_way.wait();
        ran?;
        outcome.into_result()?;
        arrived?;
        stats.seconds = start.elapsed().as_secs_f64();
        Ok(stats)
    }

    /// Buffers that chunks for devices are decoded into, registered with the driver of the first.
    fn staging_for(
        &self,
        targets: &[DeviceTarget<'_>],
        options: ReadOptions,
    ) -> Result<Option<Arc<BufferPool>>> {
        let Some(first) = targets.first() else { return Ok(None) };
        if let Some(staging) = self.staging.get() {
            return Ok(Some(Arc::clone(staging)));
        }
        let shards = (0..).map_while(|number| match number {
            0 => Some(&self.own),
            number => self.parts.other(number),
        });
        let chunk_bytes = shards.map(|shard| shard.header.chunk_bytes).max().unwrap_or_default();
        // One being decoded into and one on its way, by each worker.
        let count = 2 * worker_count(options, usize::MAX) + 2;
        let staging = BufferPool::new(chunk_bytes as usize, count)
            .context("allocating buffers to read", self.shard_name())?;
        if let Err(error) = staging.pin(first.memory.pin()) {
            tracing::warn!(%error, "memory is not pinned: copies to devices are slow");
        }
        Ok(Some(Arc::clone(self.staging.get_or_init(|| staging))))
    }

    /// Refuses what belongs to another rank's state.
    pub(super) fn check_readable(&self, storage: u32) -> Result<()> {
        let Some(record) = self.own.index.storages.get(storage as usize) else { return Ok(()) };
        let is_readable = match self.whose {
            Whose::Asked => true,
            Whose::Another => record.replica.is_some(),
            Whose::Alone => record.held() == (0..record.bytes),
        };
        if is_readable {
            return Ok(());
        }
        if self.whose == Whose::Alone {
            return Err(EngineError::invalid(
                format!("reading storage {storage} of `{}`", self.shard_name()),
                "the shard holds a part of it, and was opened alone",
                "open it together with the shards that hold the rest",
            ));
        }
        Err(EngineError::invalid(
            format!("reading storage {storage} of `{}`", self.shard_name()),
            format!(
                "it is what rank {} alone saved, of {} ranks",
                self.own.header.rank, self.own.header.world_size
            ),
            "open what a rank that is named saved, or read replicated entries only",
        ))
    }

    fn shard(&self, number: usize) -> &Shard {
        self.parts.other(number).unwrap_or(&self.own)
    }

    /// Where `bytes` of a storage lie: shards, and the ranges of their raw layouts, in order.
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

    fn name_tensors(&self, shard: &Shard, chunk: usize, error: EngineError) -> EngineError {
        match error {
            EngineError::Corrupt { what, why, hint } => EngineError::Corrupt {
                what,
                why: format!("{why}; tensors hit: {}", listed(&self.tensors_in(shard, chunk))),
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
type Wanted<'a> = (u32, u64, Destination<'a>);

fn wanted<'a>(targets: Vec<Target<'a>>, device_targets: Vec<DeviceTarget<'a>>) -> Vec<Wanted<'a>> {
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

/// Cuts the targets at borders of parts and chunks.
fn plan<'c, 'a>(
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

/// Cuts memory for what lies from `raw_offset` of a shard's raw layout at borders of its chunks.
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

/// What [`run`] tells of each chunk; false stops the reading.
pub(super) type Report<'a> = &'a (dyn Fn(&Shard, usize, Result<()>) -> bool + Sync);

/// Reads, checks and delivers all `jobs`, in the order given.
pub(super) fn run(
    jobs: Vec<ChunkJob<'_, '_>>,
    options: ReadOptions,
    ways: &Ways,
    report: Report<'_>,
) -> Result<()> {
    let Some(first) = jobs.first() else { return Ok(()) };
    let name = first.shard.name();
    let workers = worker_count(options, jobs.len());
    let pool = read_pool(&name, &jobs, workers)?;
    let stopped = AtomicBool::new(false);
    // Reads complete on the store's threads, which know nothing of the targets' lifetimes: they
    // hand back a number, and the jobs wait here.
    let waiting: Vec<Waiting<'_, '_>> = jobs.into_iter().map(|job| Mutex::new(Some(job))).collect();
    let (arrived, arrivals) = crossbeam_channel::unbounded::<(usize, Result<()>, Buffer)>();
    std::thread::scope(|scope| {
        let handles: Vec<_> = (0..workers)
            .map(|_| {
                let arrivals = arrivals.clone();
                let (waiting, stopped) = (&waiting, &stopped);
                scope.spawn(move || {
                    let delivery = Delivery::new(options, ways.clone());
                    work(delivery, waiting, &arrivals, stopped, report);
                })
            })
            .collect();
        drop(arrivals);
        submit_all(&waiting, &pool, &arrived, &stopped);
        // Workers end when the last read has arrived.
        drop(arrived);
        let panicked = handles.into_iter().any(|handle| handle.join().is_err());
        if panicked {
            return Err(EngineError::internal(
                format!("reading `{name}`"),
                "a decoding thread panicked",
            ));
        }
        Ok(())
    })
}

/// A job whose read is on its way.
type Waiting<'c, 'a> = Mutex<Option<ChunkJob<'c, 'a>>>;

fn worker_count(options: ReadOptions, jobs: usize) -> usize {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let wanted = options.workers.map_or(cores, |workers| workers as usize);
    wanted.min(READ_WORKERS_MAX).min(jobs).max(1)
}

fn read_pool(name: &str, jobs: &[ChunkJob<'_, '_>], workers: usize) -> Result<Arc<BufferPool>> {
    let chunk_bytes = jobs.iter().map(|job| job.shard.header.chunk_bytes).max();
    let buffer_bytes = chunk_bytes.unwrap_or_default() as usize;
    let most = (READ_BUFFERS_BYTES / buffer_bytes).max(workers + 2);
    BufferPool::new(buffer_bytes, most.min(jobs.len())).context("allocating buffers to read", name)
}

/// Keeps as many reads in flight as there are buffers.
fn submit_all(
    waiting: &[Waiting<'_, '_>],
    pool: &Arc<BufferPool>,
    arrived: &Sender<(usize, Result<()>, Buffer)>,
    stopped: &AtomicBool,
) {
    for (number, job) in waiting.iter().enumerate() {
        let buffer = pool.take();
        if stopped.load(Ordering::Relaxed) {
            return;
        }
        let read = job
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .as_ref()
            .map(|job| (job.shard, *job.record()));
        let (shard, record) = read.expect("jobs are taken only after their read");
        let padded = padded_bytes(&record);
        let arrived = arrived.clone();
        let done = Box::new(move |result, buffer| {
            // Workers that stopped early need it no more.
            let _stopped = arrived.send((number, result, buffer));
        });
        shard.source.read(record.offset, buffer, padded, done);
    }
}

fn work(
    mut delivery: Delivery,
    waiting: &[Waiting<'_, '_>],
    arrivals: &Receiver<(usize, Result<()>, Buffer)>,
    stopped: &AtomicBool,
    report: Report<'_>,
) {
    // Buffers of stopped reads are still received, so that the submitter is never left waiting.
    while let Ok((number, result, buffer)) = arrivals.recv() {
        if stopped.load(Ordering::Relaxed) {
            continue;
        }
        let job = waiting[number].lock().unwrap_or_else(PoisonError::into_inner).take();
        let mut job = job.expect("each read arrives once");
        let delivered = match result.and_then(|()| delivery.deliver(&mut job, &buffer)) {
            Err(met) if delivery.options.copies && is_damage(&met) => {
                delivery.deliver_copy(&mut job, buffer, met)
            }
            delivered => delivered,
        };
        if !report(job.shard, job.chunk, delivered) {
            stopped.store(true, Ordering::Relaxed);
        }
    }
}

/// A chunk, for messages.
type At<'c> = (&'c Shard, usize);

/// How chunks get to devices.
#[derive(Clone, Debug, Default)]
pub(super) struct Ways {
    /// There where there is a device to read to.
    staging: Option<Arc<BufferPool>>,
    under_way: Arc<UnderWay>,
}

/// One worker's tools.
struct Delivery {
    options: ReadOptions,
    ways: Ways,
    decoder: Decoder,
    scratch: Vec<u8>,
}

impl Delivery {
    fn new(options: ReadOptions, ways: Ways) -> Self {
        Self { options, ways, decoder: Decoder::new(), scratch: Vec::new() }
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
            let (read, buffer) = read_now(way, record.offset, buffer, padded_bytes(&record))?;
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
        let padded = &buffer[..padded_bytes(&record)];
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
        // Whoever waits for a buffer may wait for this one.
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

/// Bytes of a chunk in the file, whole blocks.
fn padded_bytes(record: &ChunkRecord) -> usize {
    (record.stored_bytes as usize).next_multiple_of(ALIGNMENT)
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
