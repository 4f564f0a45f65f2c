//! What the stages of one save share.
//!
//! Always holds: the first failure wins and stays; once failed, every stage drops what it is given,
//! so that buffers flow back and nobody waits forever.

use std::sync::Arc;
use std::time::Duration;

use crossbeam_channel::Sender;

use super::adapt::{Adaptation, Outlook};
use super::arrivals::Arrivals;
use crate::EngineError;
use crate::codec::Codec;
use crate::config::Compression;
use crate::format::layout::{ElementType, Layout};
use crate::format::shard::padded_bytes;
use crate::io::buffer::Buffer;
use crate::progress::{Progress, SaveStats};
use crate::store::flow::Flow;
use crate::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use crate::sync::{Mutex, unpoisoned};

/// State shared by capture, workers and committer.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) step: u64,
    pub(crate) layout: Arc<Layout>,
    pub(crate) compression: Compression,
    pub(crate) progress: Progress,
    /// What is on its way from devices.
    pub(crate) arrivals: Arrivals,
    /// What is on its way to the device.
    pub(crate) flow: Arc<Flow>,
    pub(crate) adaptation: Arc<Adaptation>,
    workers: usize,
    /// Chunks that no worker has taken up yet.
    chunks_left: AtomicUsize,
    /// Towards the committer.
    pub(crate) encoded: Sender<Message>,
    encode_nanos: AtomicU64,
    chunks_encoded: AtomicU64,
    stats: Mutex<SaveStats>,
    failed: AtomicBool,
    failure: Mutex<Option<EngineError>>,
}

/// What `auto` goes by.
#[derive(Debug)]
pub(crate) struct Conduct {
    /// Threads that encode.
    pub(crate) workers: usize,
    pub(crate) flow: Arc<Flow>,
    pub(crate) adaptation: Arc<Adaptation>,
}

/// What the committer receives.
#[derive(Debug)]
pub(crate) enum Message {
    /// A chunk ready to be written.
    Chunk(EncodedChunk),
    /// Look at [`Job::failure`].
    Failed,
}

/// A chunk's stored bytes, padded.
#[derive(Debug)]
pub(crate) struct EncodedChunk {
    pub(crate) index: usize,
    pub(crate) buffer: Buffer,
    pub(crate) codec: Codec,
    pub(crate) raw_bytes: u32,
    pub(crate) stored_bytes: u32,
    pub(crate) stored_crc32c: u32,
    pub(crate) raw_crc32c: u32,
}

impl EncodedChunk {
    /// Bytes that it takes in the file.
    pub(crate) fn padded_bytes(&self) -> usize {
        padded_bytes(self.stored_bytes)
    }
}

impl Job {
    pub(crate) fn new(
        step: u64,
        layout: Arc<Layout>,
        compression: Compression,
        conduct: Conduct,
        encoded: Sender<Message>,
    ) -> Self {
        Self {
            progress: Progress::new(layout.raw_bytes()),
            arrivals: Arrivals::new(),
            chunks_left: AtomicUsize::new(layout.chunk_count()),
            step,
            layout,
            compression,
            flow: conduct.flow,
            adaptation: conduct.adaptation,
            workers: conduct.workers,
            encoded,
            encode_nanos: AtomicU64::new(0),
            chunks_encoded: AtomicU64::new(0),
            stats: Mutex::default(),
            failed: AtomicBool::new(false),
            failure: Mutex::new(None),
        }
    }

    /// Ends the save with `error`, unless it failed before, and wakes the committer.
    pub(crate) fn fail(&self, error: EngineError) {
        let mut failure = unpoisoned(self.failure.lock());
        failure.get_or_insert(error);
        self.failed.store(true, Ordering::Release);
        drop(failure);
        // A full queue wakes the committer as well, which then finds the flag; a closed one means
        // that it is gone already.
        let _full_or_closed = self.encoded.try_send(Message::Failed);
    }

    pub(crate) fn has_failed(&self) -> bool {
        self.failed.load(Ordering::Acquire)
    }

    /// The error that ended the save, if one did.
    pub(crate) fn failure(&self) -> Option<EngineError> {
        let failure = unpoisoned(self.failure.lock());
        failure.as_ref().map(EngineError::duplicate)
    }

    /// A worker takes up a chunk.
    pub(crate) fn begin_chunk(&self) {
        self.chunks_left.fetch_sub(1, Ordering::Relaxed);
    }

    /// A worker is done with a chunk, which took it so long.
    pub(crate) fn end_chunk(&self, took: Duration) {
        let nanos = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        self.encode_nanos.fetch_add(nanos, Ordering::Relaxed);
    }

    /// A codec shrank a chunk.
    pub(crate) fn note_encoded(&self) {
        self.chunks_encoded.fetch_add(1, Ordering::Relaxed);
    }

    /// The codec for one chunk: the fixed one, or by `auto` what gets the save done sooner.
    #[expect(clippy::cast_precision_loss, reason = "chunks and their bytes, for a forecast")]
    pub(crate) fn codec_for(&self, element: ElementType, raw_bytes: usize) -> Codec {
        self.compression.fixed_codec().unwrap_or_else(|| {
            let outlook = Outlook {
                flow: self.flow.read(),
                workers: self.workers as f64,
                chunks_left: self.chunks_left.load(Ordering::Relaxed) as f64 + 1.0,
                raw_bytes: raw_bytes as f64,
            };
            let pays = self.adaptation.should_encode(element, outlook);
            if pays { Codec::Float } else { Codec::None }
        })
    }

    pub(crate) fn update_stats(&self, update: impl FnOnce(&mut SaveStats)) {
        let mut stats = unpoisoned(self.stats.lock());
        update(&mut stats);
    }

    pub(crate) fn stats(&self) -> SaveStats {
        let mut stats = unpoisoned(self.stats.lock()).clone();
        stats.raw_bytes = self.layout.raw_bytes();
        stats.chunks = self.layout.chunk_count() as u64;
        stats.chunks_encoded = self.chunks_encoded.load(Ordering::Relaxed);
        stats.encode_seconds =
            Duration::from_nanos(self.encode_nanos.load(Ordering::Relaxed)).as_secs_f64();
        stats
    }
}
