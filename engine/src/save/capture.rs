//! Capture: a consistent copy of every storage into the staging arena.
//!
//! ```text
//! the host's memory   several threads copy, the caller's is one of them
//! a device's memory   copies are begun in order; each chunk goes on when its last byte has landed
//! ```
//!
//! Always holds: when [`capture`] returns `Ok`, every chunk was handed to the workers and no source
//! is read again, but by copies that were left to go on behind the caller ([`Until::Begun`]). If
//! the state fits the arena, workers get their first chunk of the host's memory only after the last
//! byte of it was copied, so that the copy has the memory bandwidth to itself; if not, they get
//! each chunk at once, because their buffers are needed again. Nobody waits for a buffer while
//! copies that could give one back wait for more of their kind.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crossbeam_channel::Sender;

use super::arrivals::{Gap, hand_on};
use super::encode::EncodeTask;
use super::job::Job;
use super::{DeviceSource, StorageSource};
use crate::error::IoContext;
use crate::format::layout::Piece;
use crate::io::buffer::{Buffer, BufferPool};
use crate::io::lent::lend;
use crate::threads::{cores, thread_count};
use crate::{EngineError, Result};

/// Most threads that copy: two saturate the memory of a small machine, four that of a socket.
const CAPTURE_THREADS_MAX: usize = 4;

/// Where a storage of the layout is copied from: `start` bytes into a source.
#[derive(Clone)]
pub(crate) struct Origin<'a> {
    pub(crate) source: &'a dyn StorageSource,
    pub(crate) device: Option<Arc<dyn DeviceSource>>,
    pub(crate) start: u64,
}

/// What the caller waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Until {
    /// Every byte was copied.
    Landed,
    /// Every byte of the host's memory was; a device's are copied behind.
    Begun,
}

/// Copies all chunks of `job` from `storages` and hands them to `workers`.
pub(crate) fn capture(
    job: &Arc<Job>,
    storages: &[Origin<'_>],
    arena: &Arc<BufferPool>,
    workers: &Sender<EncodeTask>,
    until: Until,
) -> Result<()> {
    let _span = tracing::trace_span!("capture").entered();
    let devices = Devices::of(job, storages, arena, workers);
    let chunks = Chunks::of(job, storages, until);
    let mut captured = capture_here(job, storages, &devices, chunks.here);
    let devices = Arc::new(devices);
    if captured.is_ok() && !chunks.behind.is_empty() {
        captured = begin_behind(&devices, chunks.behind);
        if captured.is_ok() {
            return Ok(());
        }
    }
    devices.flush();
    job.arrivals.all_begun();
    // Also after a failure: the caller's memory is its own again when this returns.
    job.arrivals.wait_landed(None);
    captured?;
    job.failure().map_or(Ok(()), Err)
}

/// Whether the whole state has room in the arena at once.
pub(crate) fn fits(job: &Job, arena: &BufferPool) -> bool {
    job.layout.chunk_count() <= arena.count()
}

/// Which chunks are captured by the caller, and which behind it. Chunks of the host's memory come
/// before those of a device's.
struct Chunks {
    here: Range<usize>,
    behind: Range<usize>,
}

impl Chunks {
    fn of(job: &Job, storages: &[Origin<'_>], until: Until) -> Self {
        let count = job.layout.chunk_count();
        let host = storages.iter().enumerate().filter(|(_, origin)| origin.device.is_none());
        let ends = host.map(|(storage, _)| {
            let record = job.layout.record(storage);
            if record.bytes == 0 { 0 } else { record.raw_end() }
        });
        let host_end = match until {
            Until::Landed => count,
            Until::Begun => job.layout.chunks_of(0..ends.max().unwrap_or(0)).end,
        };
        Self { here: 0..host_end, behind: host_end..count }
    }
}

fn capture_here(
    job: &Arc<Job>,
    storages: &[Origin<'_>],
    devices: &Devices,
    chunks: Range<usize>,
) -> Result<()> {
    let streamed = !fits(job, &devices.arena);
    let threads = thread_count(None, cores(), CAPTURE_THREADS_MAX, chunks.len());
    let next_chunk = AtomicUsize::new(chunks.start);
    let capture = Capture { job, storages, devices, next_chunk, end: chunks.end };
    let captured = std::thread::scope(|scope| {
        let copiers: Vec<_> =
            (1..threads).map(|_| scope.spawn(|| capture.copy_chunks(streamed))).collect();
        // The caller's own thread is one of the copiers.
        let mut results = vec![capture.copy_chunks(streamed)];
        for copier in copiers {
            results.push(copier.join().unwrap_or_else(|_| Err(copier_panicked())));
        }
        results
    });
    // In their order, whichever copier held them back: a store in parts is then given one part
    // after the other, and does not hold the beginnings of all.
    let mut tasks = Vec::with_capacity(chunks.len());
    for held_back in captured {
        tasks.extend(held_back?);
    }
    tasks.sort_unstable_by_key(|task| task.index);
    tasks.into_iter().try_for_each(|task| devices.send(task))
}

struct Capture<'a> {
    job: &'a Arc<Job>,
    storages: &'a [Origin<'a>],
    devices: &'a Devices,
    next_chunk: AtomicUsize,
    end: usize,
}

impl Capture<'_> {
    /// One copier: takes the next chunk until none is left. Returns the tasks held back.
    fn copy_chunks(&self, streamed: bool) -> Result<Vec<EncodeTask>> {
        let mut held_back = Vec::new();
        while !self.job.has_failed() {
            let index = self.next_chunk.fetch_add(1, Ordering::Relaxed);
            if index >= self.end {
                break;
            }
            match self.copy_chunk(index) {
                Ok(None) => {}
                Ok(Some(task)) if streamed => self.devices.send(task)?,
                Ok(Some(task)) => held_back.push(task),
                Err(error) => {
                    // Stops the other copiers too.
                    self.job.fail(error.duplicate());
                    return Err(error);
                }
            }
        }
        // Another copier may wait for a buffer that only what was begun here returns.
        self.devices.flush();
        Ok(held_back)
    }

    /// Copies a chunk; `None` for one with bytes of a device, which goes on by itself.
    fn copy_chunk(&self, index: usize) -> Result<Option<EncodeTask>> {
        let _span = tracing::trace_span!("copy").entered();
        let mut buffer = self.devices.take_buffer();
        for piece in self.job.layout.pieces(index) {
            self.copy_piece(piece, &mut buffer)?;
        }
        if self.devices.begins(index) {
            self.devices.begin(index, buffer);
            return Ok(None);
        }
        let raw_bytes = self.job.layout.chunk_raw_bytes(index);
        self.job.progress.add_captured(raw_bytes as u64);
        Ok(Some(EncodeTask { job: Arc::clone(self.job), index, buffer }))
    }

    fn copy_piece(&self, piece: Piece, buffer: &mut Buffer) -> Result<()> {
        let destination = &mut buffer[piece.chunk_offset..piece.chunk_offset + piece.length];
        match piece.storage.map(|storage| &self.storages[storage]) {
            Some(Origin { device: Some(_), .. }) => {}
            Some(Origin { source, start, .. }) => {
                source.read(start + piece.storage_offset, destination)?;
            }
            // Whatever the buffer held before.
            None => destination.fill(0),
        }
        Ok(())
    }
}

/// What begins copies from devices, on whatever thread.
struct Devices {
    job: Arc<Job>,
    arena: Arc<BufferPool>,
    workers: Sender<EncodeTask>,
    /// By storage of the layout: where those of devices are copied from.
    sources: BTreeMap<usize, (Arc<dyn DeviceSource>, u64)>,
    /// A source of each device.
    queues: Vec<Arc<dyn DeviceSource>>,
}

impl Devices {
    fn of(
        job: &Arc<Job>,
        storages: &[Origin<'_>],
        arena: &Arc<BufferPool>,
        workers: &Sender<EncodeTask>,
    ) -> Self {
        let mut sources = BTreeMap::new();
        let mut queues = BTreeMap::new();
        for (storage, origin) in storages.iter().enumerate() {
            if let Some(device) = &origin.device {
                queues.entry(device.ordinal()).or_insert_with(|| Arc::clone(device));
                sources.insert(storage, (Arc::clone(device), origin.start));
            }
        }
        Self {
            job: Arc::clone(job),
            arena: Arc::clone(arena),
            workers: workers.clone(),
            sources,
            queues: queues.into_values().collect(),
        }
    }

    /// A free buffer; whatever could give one back is on its way before it is waited for.
    fn take_buffer(&self) -> Buffer {
        self.arena.try_take().unwrap_or_else(|| {
            self.flush();
            self.arena.take()
        })
    }

    fn flush(&self) {
        for queue in &self.queues {
            queue.flush();
        }
    }

    fn device_pieces(&self, index: usize) -> impl Iterator<Item = (Piece, usize)> {
        let pieces = self.job.layout.pieces(index);
        pieces.filter_map(|piece| {
            let storage = piece.storage.filter(|storage| self.sources.contains_key(storage))?;
            Some((piece, storage))
        })
    }

    /// Whether a chunk has bytes of a device.
    fn begins(&self, index: usize) -> bool {
        !self.sources.is_empty() && self.device_pieces(index).next().is_some()
    }

    /// Begins to fill what is a device's of a chunk; it goes to the workers when that has landed.
    fn begin(&self, index: usize, buffer: Buffer) {
        let range = |piece: Piece| piece.chunk_offset..piece.chunk_offset + piece.length;
        let ranges: Vec<_> = self.device_pieces(index).map(|(piece, _)| range(piece)).collect();
        self.job.arrivals.chunk_begins();
        let (job, workers) = (Arc::clone(&self.job), self.workers.clone());
        let next = move |buffer| hand_on(EncodeTask { job, index, buffer }, &workers);
        let parts = lend(buffer, &ranges, next);
        for ((piece, storage), part) in self.device_pieces(index).zip(parts) {
            let (source, start) = &self.sources[&storage];
            source.begin(start + piece.storage_offset, Gap::new(part, &self.job));
        }
    }

    fn begin_all(&self, chunks: Range<usize>) {
        let _whatever_happens = AllBegun(&self.job);
        for index in chunks {
            if self.job.has_failed() {
                break;
            }
            let mut buffer = self.take_buffer();
            for piece in self.job.layout.pieces(index).filter(|piece| piece.storage.is_none()) {
                buffer[piece.chunk_offset..piece.chunk_offset + piece.length].fill(0);
            }
            self.begin(index, buffer);
        }
        self.flush();
    }

    fn send(&self, task: EncodeTask) -> Result<()> {
        self.workers.send(task).map_err(|_| {
            EngineError::internal("handing a chunk to the workers", "all workers have ended")
        })
    }
}

/// Begins `chunks`, all of devices, on a thread of its own: with a state that is larger than the
/// arena that takes as long as the medium does.
fn begin_behind(devices: &Arc<Devices>, chunks: Range<usize>) -> Result<()> {
    let devices = Arc::clone(devices);
    let thread = std::thread::Builder::new().name("dtr-capture".into());
    let started = thread.spawn(move || {
        devices.begin_all(chunks);
        devices.job.arrivals.wait_landed(None);
        devices.job.flow.captured();
    });
    started.context("starting a thread for", "capturing").map(drop)
}

/// Says that nothing more will be begun, even if the thread that should have panicked.
struct AllBegun<'a>(&'a Job);

impl Drop for AllBegun<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0
                .fail(EngineError::internal("capturing a storage", "the copying thread panicked"));
        }
        self.0.arrivals.all_begun();
    }
}

fn copier_panicked() -> EngineError {
    EngineError::internal("capturing a storage", "a copying thread panicked")
}
