//! Counters that a caller can read while a save or a load runs, and the figures that remain after.
//!
//! Always holds: counters only grow during one save; the figures are complete once it has ended.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde::Serialize;

/// Live counters of one save, in bytes.
#[derive(Debug, Default)]
pub(crate) struct Progress {
    raw: u64,
    captured: AtomicU64,
    encoded: AtomicU64,
    written: AtomicU64,
}

/// The counters of one save at one moment.
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
    pub(crate) fn new(raw_bytes: u64) -> Self {
        Self { raw: raw_bytes, ..Self::default() }
    }

    /// Counts captured raw bytes.
    pub(crate) fn add_captured(&self, bytes: u64) {
        self.captured.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Counts encoded raw bytes.
    pub(crate) fn add_encoded(&self, bytes: u64) {
        self.encoded.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Counts stored bytes handed to the device.
    pub(crate) fn add_written(&self, bytes: u64) {
        self.written.fetch_add(bytes, Ordering::Relaxed);
    }

    /// The counters now; each is read on its own.
    pub(crate) fn read(&self) -> ProgressReading {
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
    /// From the call to its return, waiting and preparing included: what the training loop loses.
    pub stall_seconds: f64,
    /// Of these, preparing: taking the state apart, and copies from a device.
    pub prepare_seconds: f64,
    /// Of these, waiting for the previous save.
    pub wait_seconds: f64,
    /// Of these, copying into the staging arena.
    pub capture_seconds: f64,
    /// From the same moment until everything was durable and published.
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

/// A part of a save, in time since the caller began to wait for it, or to prepare it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Phase {
    pub(crate) name: &'static str,
    pub(crate) start: Duration,
    pub(crate) end: Duration,
}

impl SaveStats {
    /// The phases of a save that took until `ended`. One that failed is known to its snapshot only.
    pub(crate) fn phases(&self, ended: Duration, is_complete: bool) -> Vec<Phase> {
        let seconds = |seconds: f64| Duration::try_from_secs_f64(seconds).unwrap_or_default();
        let phase = |name, start, end| Phase { name, start, end };
        let waited = seconds(self.wait_seconds);
        let prepared = waited + seconds(self.prepare_seconds);
        let captured = prepared + seconds(self.capture_seconds);
        let mut phases = vec![
            phase("save", Duration::ZERO, ended),
            phase("wait", Duration::ZERO, waited),
            phase("prepare", waited, prepared),
            phase("capture", prepared, captured),
        ];
        if is_complete {
            let durable = seconds(self.durable_seconds);
            let written = durable.saturating_sub(seconds(self.publish_seconds));
            let write = written.saturating_sub(seconds(self.write_seconds));
            phases.push(phase("write", write, written));
            phases.push(phase("publish", written, durable));
            phases.push(phase("read back and retention", durable, ended.max(durable)));
        }
        phases
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phases_lie_within_the_save() {
        let stats = SaveStats {
            prepare_seconds: 0.5,
            wait_seconds: 1.0,
            capture_seconds: 0.25,
            write_seconds: 2.0,
            publish_seconds: 0.125,
            durable_seconds: 4.0,
            ..SaveStats::default()
        };
        let ended = Duration::from_millis(4500);
        let phases = stats.phases(ended, true);
        assert!(phases.iter().all(|phase| phase.start <= phase.end && phase.end <= ended));
        let of = |name| phases.iter().find(|phase| phase.name == name).unwrap();
        let millis = Duration::from_millis;
        assert_eq!((of("capture").start, of("capture").end), (millis(1500), millis(1750)));
        assert_eq!((of("write").start, of("write").end), (millis(1875), millis(3875)));
        assert_eq!((of("publish").end, of("save").end), (millis(4000), ended));
        assert_eq!(stats.phases(ended, false).len(), 4);
    }
}
