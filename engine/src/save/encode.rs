//! Workers: checksum, encode, pad, checksum again; one thread per core, kept for the engine's life.
//!
//! Always holds: a chunk's raw checksum is taken from the arena before anything else touches the
//! bytes; its stored checksum covers exactly what the device is given, padding included; a worker
//! outlives any panic of a single chunk, which fails that save alone.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;

use crossbeam_channel::{Receiver, Sender};

use super::job::{EncodedChunk, Job, Message};
use crate::clock::{Environment, elapsed};
use crate::codec::{Codec, Encoded, Encoder};
use crate::config::Compression;
use crate::error::IoContext;
use crate::format::checksum::crc32c;
use crate::format::layout::ElementType;
use crate::io::ALIGNMENT;
use crate::io::buffer::{Buffer, BufferPool};
use crate::{EngineError, Result};

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
                    .spawn(move || worker.run())
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
    fn run(mut self) {
        while let Ok(task) = self.queue.recv() {
            if task.job.has_failed() {
                continue;
            }
            let job = Arc::clone(&task.job);
            let start = self.environment.monotonic();
            match catch_unwind(AssertUnwindSafe(|| self.encode(task))) {
                Ok(Ok(chunk)) => {
                    let nanos = elapsed(&*self.environment, start).as_nanos();
                    let nanos = u64::try_from(nanos).unwrap_or(u64::MAX);
                    job.encode_nanos.fetch_add(nanos, Ordering::Relaxed);
                    job.progress.add_encoded(u64::from(chunk.raw_bytes));
                    // A closed queue means that the committer gave the save up.
                    let _closed = job.encoded.send(Message::Chunk(chunk));
                }
                Ok(Err(error)) => job.fail(error),
                Err(_panic) => {
                    self.encoder = Encoder::new();
                    job.fail(EngineError::internal("encoding a chunk", "the worker panicked"));
                }
            }
        }
    }

    fn encode(&mut self, task: EncodeTask) -> Result<EncodedChunk> {
        let EncodeTask { job, index, buffer } = task;
        let raw_bytes = job.layout.chunk_raw_bytes(index);
        let raw_crc32c = crc32c(&buffer[..raw_bytes]);
        let element = job.layout.chunk_element(index);
        let codec = choose(job.compression, element, job.device_is_bottleneck());
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
        let mut stored = self.pool.take();
        let encoded = self
            .encoder
            .encode(codec, element, &chunk.buffer[..raw_bytes], &mut stored)
            .map_err(|error| EngineError::internal("encoding a chunk", error.to_string()))?;
        Ok(match encoded {
            Encoded::Raw => pad(chunk),
            Encoded::Stored(bytes) => {
                job.chunks_encoded.fetch_add(1, Ordering::Relaxed);
                pad(EncodedChunk { buffer: stored, codec, stored_bytes: narrow(bytes), ..chunk })
            }
        })
    }
}

fn narrow(chunk_bytes: usize) -> u32 {
    u32::try_from(chunk_bytes).expect("CHUNK_BYTES_MAX fits 32 bits")
}

/// The codec for one chunk. `auto` compresses floating-point chunks for as long as that costs no
/// time: while encoded chunks wait for the device.
fn choose(compression: Compression, element: ElementType, device_is_bottleneck: bool) -> Codec {
    match compression.fixed_codec() {
        Some(codec) => codec,
        None if element != ElementType::Bytes && device_is_bottleneck => Codec::Float,
        None => Codec::None,
    }
}

/// Fills up to the next block with zeros and takes the checksum of all of it, unless the bytes are
/// raw and whole blocks, whose checksum is known.
fn pad(mut chunk: EncodedChunk) -> EncodedChunk {
    let stored = chunk.stored_bytes as usize;
    let padded = stored.next_multiple_of(ALIGNMENT);
    chunk.buffer[stored..padded].fill(0);
    if chunk.codec != Codec::None || padded != stored {
        chunk.stored_crc32c = crc32c(&chunk.buffer[..padded]);
    }
    chunk
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn auto_compresses_floats_only_while_the_device_is_behind() {
        assert_eq!(choose(Compression::Auto, ElementType::Bf16, true), Codec::Float);
        assert_eq!(choose(Compression::Auto, ElementType::Bf16, false), Codec::None);
        assert_eq!(choose(Compression::Auto, ElementType::Bytes, true), Codec::None);
        assert_eq!(choose(Compression::Zstd, ElementType::Bytes, false), Codec::Zstd);
    }
}
