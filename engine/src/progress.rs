//! Counters that a caller can read while a save or a load runs, and the figures that remain after.
//!
//! Always holds: counters only grow during one save; the figures are complete once it has ended.

use std::sync::atomic::{AtomicU64, Ordering};

use serde::Serialize;

/// Live counters of one save, in bytes.
#[derive(Debug, Default)]
pub struct Progress {
    raw: u64,
    captured: AtomicU64,
    encoded: AtomicU64,
    written: AtomicU64,
}

/// A reading of [`Progress`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ProgressReading {
    /// Bytes of the raw layout: what the counters below, except the last, grow to.
    pub raw_bytes: u64,
    /// Raw bytes copied into the staging arena.
    pub captured_bytes: u64,
    /// Raw bytes checksummed and encoded.
    pub encoded_bytes: u64,
    /// Stored bytes handed to the device; less than `raw_bytes` where chunks shrink.
    pub written_bytes: u64,
}

impl Progress {
    /// Counters for a raw layout of `raw_bytes`.
    pub fn new(raw_bytes: u64) -> Self {
        Self { raw: raw_bytes, ..Self::default() }
    }

    /// Counts captured raw bytes.
    pub fn add_captured(&self, bytes: u64) {
        self.captured.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Counts encoded raw bytes.
    pub fn add_encoded(&self, bytes: u64) {
        self.encoded.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Counts stored bytes handed to the device.
    pub fn add_written(&self, bytes: u64) {
        self.written.fetch_add(bytes, Ordering::Relaxed);
    }

    /// The counters now; each is read on its own.
    pub fn read(&self) -> ProgressReading {
        ProgressReading {
            raw_bytes: self.raw,
            captured_bytes: self.captured.load(Ordering::Relaxed),
            encoded_bytes: self.encoded.load(Ordering::Relaxed),
            written_bytes: self.written.load(Ordering::Relaxed),
        }
    }
}

/// Figures of one save. Seconds are by a monotonic clock.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct SaveStats {
    /// From the call to its return: what the training loop loses.
    pub stall_seconds: f64,
    /// Of these, waiting for the previous save.
    pub wait_seconds: f64,
    /// Of these, copying into the staging arena.
    pub capture_seconds: f64,
    /// From the call until everything was durable and published.
    pub durable_seconds: f64,
    /// Core-seconds of checksums and encoding, over all workers.
    pub encode_seconds: f64,
    /// From the first chunk's arrival at the writer until the shard was durable.
    pub write_seconds: f64,
    /// Making the manifest visible, with its syncs.
    pub publish_seconds: f64,
    /// Bytes of the raw layout.
    pub raw_bytes: u64,
    /// Bytes of the shard file.
    pub stored_bytes: u64,
    /// Chunks in all.
    pub chunks: u64,
    /// Chunks that a codec shrank.
    pub chunks_encoded: u64,
    /// Bytes of the staging arena.
    pub staging_bytes: u64,
    /// Whether the state was larger than the arena and streamed through it.
    pub streamed: bool,
    /// Parts that the shard was uploaded in; 0 where the store is a directory.
    pub parts: u64,
    /// Requests to the store's service that had to be repeated.
    pub retries: u64,
    /// `uring`, `threads` or `s3`.
    pub io_backend: String,
}
