//! `auto`: whether encoding the next chunk gets the save done sooner.
//!
//! Encoding takes a worker's time and saves the device's. With `k` of the `n` chunks that are left
//! passed on raw, the save ends when both workers and device are done:
//!
//! ```text
//! workers   (n - k) * encode / workers
//! device    backlog + k * raw + (n - k) * encoded          all in seconds of a chunk
//! ```
//!
//! The best `k` makes the two equal. If it is less than a chunk, everything is encoded. If not, raw
//! chunks come while the device would otherwise run dry, and a chunk is encoded while it would not.
//! A device that stores slower than it takes counts as what it stores: [`crate::store::flow`].
//!
//! Always holds: the decision is a pure function of what was measured; what was measured of a kind
//! of chunk fades while such chunks pass unencoded, so that a change is noticed. A worker that got
//! less than [`CORE_SHARE_MIN`] of a core is one that the training wants the core from, and encodes
//! nothing.

use std::sync::Mutex;
use std::time::Duration;

use crate::format::layout::ElementType;
use crate::store::flow::FlowReading;
use crate::sync::unpoisoned;

/// Weight of the newest observation.
const NEWEST_WEIGHT: f64 = 0.25;
/// How far what may have changed goes back to what was assumed at first, each time a chunk passes
/// unencoded.
const FORGOTTEN_WEIGHT: f64 = 0.01;
/// A worker that computes gets nearly all of a core, unless others want it too.
const CORE_SHARE_MIN: f64 = 0.6;
/// Chunks that hardly shrink are not worth a decoder's time.
const STORED_FRACTION_MAX: f64 = 0.97;
/// Encoding is not begun on the last moment: its time varies.
const TIME_MARGIN: f64 = 1.25;

/// What encoding does to chunks of one element type.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Estimate {
    /// Processor time: what the machine is, not how busy it is.
    cpu_seconds_per_byte: f64,
    stored_fraction: f64,
    /// Part of a core that a worker gets.
    core_share: f64,
}

impl Estimate {
    /// Before anything is known: what a processor of 2017 does to weights.
    const ASSUMED: Self =
        Self { cpu_seconds_per_byte: 1e-9, stored_fraction: 0.8, core_share: 1.0 };

    fn towards(self, other: Self, weight: f64) -> Self {
        let mix = |ours: f64, theirs: f64| ours + (theirs - ours) * weight;
        Self {
            cpu_seconds_per_byte: mix(self.cpu_seconds_per_byte, other.cpu_seconds_per_byte),
            stored_fraction: mix(self.stored_fraction, other.stored_fraction),
            core_share: mix(self.core_share, other.core_share),
        }
    }

    /// The data may be others by now, and the cores free again; the processor stays what it is.
    fn fade(self) -> Self {
        let assumed = Self { cpu_seconds_per_byte: self.cpu_seconds_per_byte, ..Self::ASSUMED };
        self.towards(assumed, FORGOTTEN_WEIGHT)
    }

    /// Whether to encode the next chunk.
    fn pays(self, outlook: Outlook) -> bool {
        let Outlook { flow, workers, chunks_left, raw_bytes } = outlook;
        let FlowReading { backlog_bytes, bytes_per_second, .. } = flow;
        let encode = self.cpu_seconds_per_byte * raw_bytes / self.core_share * TIME_MARGIN;
        let raw = raw_bytes / bytes_per_second;
        let encoded = raw * self.stored_fraction;
        let backlog = backlog_bytes / bytes_per_second;

        let workers_end = encode * (chunks_left / workers).ceil();
        let device_end = backlog + encoded * chunks_left;
        let best_raw_chunks = (workers_end - device_end) / (raw - encoded + encode / workers);
        self.stored_fraction < STORED_FRACTION_MAX
            && self.core_share >= CORE_SHARE_MIN
            && (best_raw_chunks < 0.5 || backlog >= encode)
    }
}

/// What lies ahead of a worker that takes up a chunk.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Outlook {
    pub(crate) flow: FlowReading,
    /// Threads that encode.
    pub(crate) workers: f64,
    /// This one and those that nobody has taken up yet.
    pub(crate) chunks_left: f64,
    pub(crate) raw_bytes: f64,
}

/// What one chunk's checksums and encoding took, and what encoding gave.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Observation {
    pub(crate) raw_bytes: usize,
    pub(crate) stored_bytes: usize,
    pub(crate) wall: Duration,
    pub(crate) cpu: Duration,
}

#[expect(clippy::cast_precision_loss, reason = "bytes of a chunk, for a ratio")]
impl From<Observation> for Estimate {
    fn from(seen: Observation) -> Self {
        let raw_bytes = seen.raw_bytes.max(1) as f64;
        let cpu_seconds = seen.cpu.as_secs_f64().max(1e-9);
        Self {
            cpu_seconds_per_byte: cpu_seconds / raw_bytes,
            stored_fraction: seen.stored_bytes as f64 / raw_bytes,
            core_share: (cpu_seconds / seen.wall.as_secs_f64()).clamp(0.01, 1.0),
        }
    }
}

/// What all workers of an engine have learned about encoding, by element type; kept from save to
/// save.
#[derive(Debug)]
pub(crate) struct Adaptation(Mutex<[Option<Estimate>; ElementType::ALL.len()]>);

impl Adaptation {
    pub(crate) fn new() -> Self {
        Self(Mutex::default())
    }

    /// Whether to encode a chunk. Bytes that are no floating-point numbers stay as they are.
    pub(crate) fn should_encode(&self, element: ElementType, outlook: Outlook) -> bool {
        if element == ElementType::Bytes {
            return false;
        }
        let mut estimates = unpoisoned(self.0.lock());
        let known = &mut estimates[element as usize];
        let pays = known.unwrap_or(Estimate::ASSUMED).pays(outlook);
        if !pays {
            *known = known.map(Estimate::fade);
        }
        pays
    }

    /// Learns from a chunk that was encoded.
    pub(crate) fn learn(&self, element: ElementType, seen: Observation) {
        let mut estimates = unpoisoned(self.0.lock());
        let known = &mut estimates[element as usize];
        let seen = Estimate::from(seen);
        *known = Some(known.map_or(seen, |known| known.towards(seen, NEWEST_WEIGHT)));
    }
}

#[cfg(test)]
mod tests;
