//! Capture: a consistent copy of every storage into the staging arena, by several threads.
//!
//! Always holds: when [`capture`] returns `Ok`, every chunk was handed to the workers and no source
//! is read again. If the state fits the arena, workers get their first chunk only after the last
//! byte was copied, so that the copy has the memory bandwidth to itself; if not, they get each
//! chunk at once, because their buffers are needed again.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crossbeam_channel::Sender;

use super::StorageSource;
use super::encode::EncodeTask;
use super::job::Job;
use crate::io::buffer::{Buffer, BufferPool};
use crate::{EngineError, Result};

/// Most threads that copy: two saturate the memory of a small machine, four that of a socket.
const CAPTURE_THREADS_MAX: usize = 4;

/// Where a storage of the layout is copied from: `start` bytes into a source.
#[derive(Clone, Copy)]
pub(crate) struct Origin<'a> {
    pub(crate) source: &'a dyn StorageSource,
    pub(crate) start: u64,
}

/// Copies all chunks of `job` from `storages` and hands them to `workers`.
pub(crate) fn capture(
    job: &Arc<Job>,
    storages: &[Origin<'_>],
    arena: &Arc<BufferPool>,
    workers: &Sender<EncodeTask>,
) -> Result<()> {
    let _span = tracing::trace_span!("capture").entered();
    let capture = Capture { job, storages, arena, next_chunk: AtomicUsize::new(0) };
    let streamed = !fits(job, arena);
    let threads = thread_count(job);
    let captured = std::thread::scope(|scope| {
        let copiers: Vec<_> =
            (1..threads).map(|_| scope.spawn(|| capture.copy_chunks(workers, streamed))).collect();
        // The caller's own thread is one of the copiers.
        let mut results = vec![capture.copy_chunks(workers, streamed)];
        for copier in copiers {
            results.push(copier.join().unwrap_or_else(|_| Err(copier_panicked())));
        }
        results
    });
    for held_back in captured {
        for task in held_back? {
            send(workers, task)?;
        }
    }
    job.failure().map_or(Ok(()), Err)
}

/// Whether the whole state has room in the arena at once.
pub(crate) fn fits(job: &Job, arena: &BufferPool) -> bool {
    job.layout.chunk_count() <= arena.count()
}

fn thread_count(job: &Job) -> usize {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    cores.min(CAPTURE_THREADS_MAX).min(job.layout.chunk_count()).max(1)
}

struct Capture<'a> {
    job: &'a Arc<Job>,
    storages: &'a [Origin<'a>],
    arena: &'a Arc<BufferPool>,
    next_chunk: AtomicUsize,
}

impl Capture<'_> {
    /// One copier: takes the next chunk until none is left. Returns the tasks held back.
    fn copy_chunks(&self, workers: &Sender<EncodeTask>, streamed: bool) -> Result<Vec<EncodeTask>> {
        let mut held_back = Vec::new();
        while !self.job.has_failed() {
            let index = self.next_chunk.fetch_add(1, Ordering::Relaxed);
            if index >= self.job.layout.chunk_count() {
                break;
            }
            let mut buffer = self.arena.take();
            if let Err(error) = self.copy_chunk(index, &mut buffer) {
                // Stops the other copiers too.
                self.job.fail(error.duplicate());
                return Err(error);
            }
            let raw_bytes = self.job.layout.chunk_raw_bytes(index);
            self.job.progress.add_captured(raw_bytes as u64);
            let task = EncodeTask { job: Arc::clone(self.job), index, buffer };
            if streamed {
                send(workers, task)?;
            } else {
                held_back.push(task);
            }
        }
        Ok(held_back)
    }

    fn copy_chunk(&self, index: usize, buffer: &mut Buffer) -> Result<()> {
        let _span = tracing::trace_span!("copy").entered();
        for piece in self.job.layout.pieces(index) {
            let destination = &mut buffer[piece.chunk_offset..piece.chunk_offset + piece.length];
            match piece.storage {
                Some(storage) => {
                    let Origin { source, start } = self.storages[storage];
                    source.read(start + piece.storage_offset, destination)?;
                }
                // Whatever the buffer held before.
                None => destination.fill(0),
            }
        }
        Ok(())
    }
}

fn send(workers: &Sender<EncodeTask>, task: EncodeTask) -> Result<()> {
    workers.send(task).map_err(|_| {
        EngineError::internal("handing a chunk to the workers", "all workers have ended")
    })
}

fn copier_panicked() -> EngineError {
    EngineError::internal("capturing a storage", "a copying thread panicked")
}
