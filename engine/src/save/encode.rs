//! Workers: checksum, encode, pad, checksum again; one thread per core, kept for the engine's life.
//!
//! Always holds: a chunk's raw checksum is taken from the arena before anything else touches the
//! bytes; its stored checksum covers exactly what the device is given, padding included; a worker
//! outlives any panic of a single chunk, which fails that save alone. Workers run at a lower
//! priority than the threads of the training.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender};

use super::adapt::Observation;
use super::job::{EncodedChunk, Job, Message};
use crate::clock::{Environment, elapsed};
use crate::codec::{Codec, Encoded, Encoder};
use crate::error::{IoContext, caught};
use crate::format::checksum::crc32c;
use crate::io::buffer::{Buffer, BufferPool};
use crate::{EngineError, Result};

/// What the scheduler is told of the workers: about a tenth of a core each while training threads
/// want all cores, and all of it otherwise.
const NICENESS: i32 = 10;

/// A captured chunk.
#[derive(Debug)]
pub(crate) struct EncodeTask {
    pub(crate) job: Arc<Job>,
    pub(crate) index: usize,
    pub(crate) buffer: Buffer,
}

/// The worker threads and the queue towards them.
#[derive(Debug)]
pub(crate) struct Workers {
    tasks: Option<Sender<EncodeTask>>,
    threads: Vec<JoinHandle<()>>,
}

impl Workers {
    pub(crate) fn start(
        count: usize,
        pool: &Arc<BufferPool>,
        environment: &Arc<dyn Environment>,
    ) -> Result<Self> {
        // Unbounded on purpose: what waits here is bounded by the arena, whose buffers it holds.
        let (tasks, queue) = crossbeam_channel::unbounded::<EncodeTask>();
        let threads = (0..count)
            .map(|index| {
                let worker = Worker {
                    queue: queue.clone(),
                    pool: Arc::clone(pool),
                    environment: Arc::clone(environment),
                    encoder: Encoder::new(),
                };
                std::thread::Builder::new()
                    .name(format!("dtr-encode-{index}"))
                    .spawn(move || worker.run(index == 0))
                    .context("starting a worker thread for", "encoding")
            })
            .collect::<Result<Vec<_>>>()?;
        Ok(Self { tasks: Some(tasks), threads })
    }

    pub(crate) fn queue(&self) -> Result<&Sender<EncodeTask>> {
        self.tasks.as_ref().ok_or_else(|| {
            EngineError::internal("handing a chunk to the workers", "they were stopped")
        })
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.tasks = None;
        for thread in self.threads.drain(..) {
            // A panic was reported by the save that it failed.
            let _panicked = thread.join();
        }
    }
}

struct Worker {
    queue: Receiver<EncodeTask>,
    pool: Arc<BufferPool>,
    environment: Arc<dyn Environment>,
    encoder: Encoder,
}

impl Worker {
    fn run(mut self, first: bool) {
        yield_to_training();
        if first {
            self.prewarm();
        }
        while let Ok(task) = self.queue.recv() {
            if task.job.has_failed() {
                continue;
            }
            let job = Arc::clone(&task.job);
            let start = self.environment.monotonic();
            let panicked = || EngineError::internal("encoding a chunk", "the worker panicked");
            match caught(|| self.encode(task), panicked) {
                Ok(chunk) => {
                    job.end_chunk(elapsed(&*self.environment, start));
                    job.progress.add_encoded(u64::from(chunk.raw_bytes));
                    job.flow.expect(chunk.padded_bytes() as u64);
                    // A closed queue means that the committer gave the save up.
                    let _closed = job.encoded.send(Message::Chunk(chunk));
                }
                Err(error) => {
                    // A panic may have left it in the middle of a chunk.
                    self.encoder = Encoder::new();
                    job.fail(error);
                }
            }
        }
    }

    /// Gives the buffers their memory before the first save wants it: left to the saves, the last
    /// ones would be touched only when the device is at its slowest, perhaps days later.
    fn prewarm(&self) {
        if let Err(error) = self.pool.prewarm(1) {
            tracing::warn!(%error, "buffers for encoding get their memory as they are used");
        }
    }

    fn encode(&mut self, task: EncodeTask) -> Result<EncodedChunk> {
        let EncodeTask { job, index, buffer } = task;
        job.begin_chunk();
        let watch = Stopwatch::start(&*self.environment);
        let raw_bytes = job.layout.chunk_raw_bytes(index);
        let raw_crc32c = checksum(&buffer[..raw_bytes]);
        let element = job.layout.chunk_element(index);
        let codec = job.codec_for(element, raw_bytes);
        let chunk = EncodedChunk {
            index,
            buffer,
            codec: Codec::None,
            raw_bytes: narrow(raw_bytes),
            stored_bytes: narrow(raw_bytes),
            stored_crc32c: raw_crc32c,
            raw_crc32c,
        };
        if codec == Codec::None {
            return Ok(pad(chunk));
        }
        let checksummed = watch.read();
        // Not timed: waiting for the device is not waiting for a core.
        let mut stored = self.pool.take();
        let watch = Stopwatch::start(&*self.environment);
        let encoded = tracing::trace_span!("encode").in_scope(|| {
            self.encoder
                .encode(codec, element, &chunk.buffer[..raw_bytes], &mut stored)
                .map_err(|error| EngineError::internal("encoding a chunk", error.to_string()))
        })?;
        let stored_bytes = match encoded {
            Encoded::Raw => raw_bytes,
            Encoded::Stored(bytes) => bytes,
        };
        let encoded_in = watch.read();
        let wall = checksummed.wall + encoded_in.wall;
        let cpu = checksummed.cpu + encoded_in.cpu;
        job.adaptation.learn(element, Observation { raw_bytes, stored_bytes, wall, cpu });
        Ok(match encoded {
            Encoded::Raw => pad(chunk),
            Encoded::Stored(bytes) => {
                job.note_encoded();
                pad(EncodedChunk { buffer: stored, codec, stored_bytes: narrow(bytes), ..chunk })
            }
        })
    }
}

fn narrow(chunk_bytes: usize) -> u32 {
    u32::try_from(chunk_bytes).expect("CHUNK_BYTES_MAX fits 32 bits")
}

/// Makes this thread give way to those that train: what it does has time until the next save.
fn yield_to_training() {
    let this_thread = rustix::thread::gettid();
    if let Err(error) = rustix::process::setpriority_process(Some(this_thread), NICENESS) {
        tracing::debug!(%error, "encoding threads keep the process's priority");
    }
}

/// Times the work on one chunk, by the wall and by this thread's use of a core.
struct Stopwatch<'a> {
    environment: &'a dyn Environment,
    wall: Duration,
    cpu: Duration,
}

impl<'a> Stopwatch<'a> {
    fn start(environment: &'a dyn Environment) -> Self {
        Self { environment, wall: environment.monotonic(), cpu: environment.thread_cpu() }
    }

    fn read(&self) -> Spent {
        Spent {
            wall: elapsed(self.environment, self.wall),
            cpu: self.environment.thread_cpu().saturating_sub(self.cpu),
        }
    }
}

/// What a [`Stopwatch`] shows.
struct Spent {
    wall: Duration,
    cpu: Duration,
}

fn checksum(bytes: &[u8]) -> u32 {
    tracing::trace_span!("checksum").in_scope(|| crc32c(bytes))
}

/// Fills up to the next block with zeros and takes the checksum of all of it, unless the bytes are
/// raw and whole blocks, whose checksum is known.
fn pad(mut chunk: EncodedChunk) -> EncodedChunk {
    let (stored, padded) = (chunk.stored_bytes as usize, chunk.padded_bytes());
    chunk.buffer[stored..padded].fill(0);
    if chunk.codec != Codec::None || padded != stored {
        chunk.stored_crc32c = checksum(&chunk.buffer[..padded]);
    }
    chunk
}
