//! Reading chunks: many reads in flight, workers that check, decode and deliver.
//!
//! Always holds: each byte of a target is written by exactly one chunk; a target is complete only
//! if [`Checkpoint::read`] returns `Ok`; after an error, targets hold unspecified bytes. Nothing is
//! on its way to a device when it returns.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use crossbeam_channel::{Receiver, Sender};

use super::deliver::{Delivery, Ways};
use super::device::{DeviceTarget, UnderWay};
use super::plan::{ChunkJob, plan, wanted};
use super::verify::listed;
use super::{Checkpoint, Shard};
use crate::error::IoContext;
use crate::io::buffer::{Buffer, BufferPool};
use crate::sync::unpoisoned;
use crate::threads::thread_count;
use crate::{EngineError, Result};

/// Bytes of reads in flight and decoded at a time.
const READ_BUFFERS_BYTES: usize = 48 << 20;

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
    /// Threads that decode. Default: as many as the engine that opened the checkpoint encodes with.
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
        let ran = run(jobs, self.workers_for(options), options, &ways, &|shard, chunk, result| {
            match result {
                Ok(()) => !under_way.has_failed(),
                Err(error) => {
                    outcome.keep_first(self.name_tensors(shard, chunk, error));
                    false
                }
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

    /// Threads that decode, if there are chunks enough.
    fn workers_for(&self, options: ReadOptions) -> usize {
        thread_count(options.workers, self.workers, usize::MAX, usize::MAX)
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
        let shards = || {
            (0..).map_while(|number| match number {
                0 => Some(&self.own),
                number => self.parts.other(number),
            })
        };
        let chunk_bytes = shards().map(|shard| shard.header.chunk_bytes).max().unwrap_or_default();
        let chunks: usize = shards().map(|shard| shard.index.chunks.len()).sum();
        let workers = self.workers_for(options);
        // One being decoded into and one on its way, by each worker.
        let count = (2 * workers + 2).min(chunks.max(1));
        let staging = BufferPool::new(chunk_bytes as usize, count)
            .context("allocating buffers to read", self.shard_name())?;
        // By all workers: the driver would fetch the memory page after page by one thread.
        if let Err(error) = staging.prewarm(workers) {
            tracing::warn!(%error, "memory was not populated before it is pinned");
        }
        if let Err(error) = staging.pin(first.memory.pin()) {
            tracing::warn!(%error, "memory is not pinned: copies to devices are slow");
        }
        Ok(Some(Arc::clone(self.staging.get_or_init(|| staging))))
    }

    fn name_tensors(&self, shard: &Shard, chunk: usize, error: EngineError) -> EngineError {
        match error {
            EngineError::Corrupt { what, why, hint } => EngineError::Corrupt {
                what,
                why: format!("{why}; affected tensors: {}", listed(&self.tensors_in(shard, chunk))),
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
        unpoisoned(self.0.lock()).get_or_insert(error);
    }

    fn into_result(self) -> Result<()> {
        unpoisoned(self.0.into_inner()).map_or(Ok(()), Err)
    }
}

/// What [`run`] reports of each chunk; false stops the reading.
pub(super) type Report<'a> = &'a (dyn Fn(&Shard, usize, Result<()>) -> bool + Sync);

/// Reads, checks and delivers all `jobs`, in the order given, on so many threads at most.
pub(super) fn run(
    jobs: Vec<ChunkJob<'_, '_>>,
    workers: usize,
    options: ReadOptions,
    ways: &Ways,
    report: Report<'_>,
) -> Result<()> {
    let Some(first) = jobs.first() else { return Ok(()) };
    let name = first.shard.name();
    let workers = workers.min(jobs.len());
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
        let is_left = |job: &Waiting<'_, '_>| unpoisoned(job.lock()).is_some();
        if !stopped.load(Ordering::Relaxed) && waiting.iter().any(is_left) {
            return Err(EngineError::internal(
                format!("reading `{name}`"),
                "a read was dropped without a result",
            ));
        }
        Ok(())
    })
}

/// A job whose read is on its way.
type Waiting<'c, 'a> = Mutex<Option<ChunkJob<'c, 'a>>>;

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
        let read = unpoisoned(job.lock()).as_ref().map(|job| (job.shard, *job.record()));
        let (shard, record) = read.expect("jobs are taken only after their read");
        let padded = record.padded_bytes();
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
        let job = unpoisoned(waiting[number].lock()).take();
        let mut job = job.expect("each read arrives once");
        let delivered = delivery.take(&mut job, result, buffer);
        if !report(job.shard, job.chunk, delivered) {
            stopped.store(true, Ordering::Relaxed);
        }
    }
}
