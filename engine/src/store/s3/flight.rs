//! Parts of one shard that are on their way, how many may be at once, and the first failure.
//!
//! Always holds: a part that has begun lands, whatever becomes of its task; no more is on its way
//! than the line was seen to take, but for a single part; after a failure nothing more is started.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use aws_sdk_s3::types::CompletedPart;

use super::parts::Part;
use crate::store::flow::Flow;
use crate::sync::{Condvar, Mutex, MutexGuard, unpoisoned, wait_while};
use crate::{EngineError, Result};

/// What became of a part.
#[derive(Debug)]
pub(super) enum Outcome {
    /// It arrived, as one of several.
    Part(CompletedPart),
    /// It arrived, and is the whole object.
    Whole,
    /// It was not sent, or not to its end, because the shard was given up.
    GivenUp,
    /// It failed.
    Failed(EngineError),
}

/// A part on its way; it lands even if its task is ended before it began.
pub(super) struct Landing {
    flight: Arc<Flight>,
    number: u32,
    bytes: u64,
    begun: Instant,
    pub(super) outcome: Outcome,
}

impl Landing {
    pub(super) fn of(flight: &Arc<Flight>, part: &Part) -> Self {
        let (number, bytes, begun) = (part.number, part.bytes, Instant::now());
        Self { flight: Arc::clone(flight), number, bytes, begun, outcome: Outcome::GivenUp }
    }
}

impl Drop for Landing {
    fn drop(&mut self) {
        let outcome = std::mem::replace(&mut self.outcome, Outcome::GivenUp);
        if matches!(outcome, Outcome::Part(_)) {
            self.flight.widen(self.bytes, self.begun.elapsed());
        }
        self.flight.land(self.number, self.bytes, outcome);
    }
}

/// How many bytes of parts may be on their way at once.
///
/// All that are share the line, and each has to arrive within the timeout of an attempt: on a line
/// that is too slow for all of them none would. So one goes first, and each that arrives well
/// within that time lets one more go: soon the most that is allowed, where the line is fast.
#[derive(Clone, Copy, Debug)]
pub(super) struct Widening {
    bytes: u64,
    bytes_max: u64,
    timeout: Duration,
}

/// The part of an attempt's timeout within which a part has to arrive for another to go beside it:
/// with so many more at once, the next ones still arrive in time.
const WELL_WITHIN: u32 = 4;

impl Widening {
    pub(super) fn new(bytes_max: u64, timeout: Duration) -> Self {
        Self { bytes: 0, bytes_max, timeout }
    }

    /// A part of so many bytes took so long, with others beside it.
    fn arrived(&mut self, bytes: u64, took: Duration) {
        if took * WELL_WITHIN <= self.timeout {
            self.bytes = self.bytes.max(bytes).saturating_add(bytes).min(self.bytes_max);
        }
    }

    /// Whether so many bytes more may go. One part always may.
    fn allows(&self, under_way: u64, more: u64) -> bool {
        under_way == 0 || under_way.saturating_add(more) <= self.bytes
    }
}

/// Parts that are on their way, those that have arrived, and the first failure.
#[derive(Debug)]
pub(super) struct Flight {
    flow: Arc<Flow>,
    state: Mutex<FlightState>,
    landed: Condvar,
}

#[derive(Debug)]
struct FlightState {
    widening: Widening,
    bytes: u64,
    begun: u64,
    parts: BTreeMap<u32, CompletedPart>,
    landed: u64,
    failure: Option<EngineError>,
}

impl Flight {
    pub(super) fn new(widening: Widening, flow: Arc<Flow>) -> Self {
        let state = FlightState {
            widening,
            bytes: 0,
            begun: 0,
            parts: BTreeMap::new(),
            landed: 0,
            failure: None,
        };
        Self { flow, state: Mutex::new(state), landed: Condvar::new() }
    }

    fn widen(&self, bytes: u64, took: Duration) {
        self.lock().widening.arrived(bytes, took);
    }

    /// Waits until `bytes` more may be on their way. One part always may.
    pub(super) fn start(&self, bytes: u64) -> Result<()> {
        let full = |state: &mut FlightState| {
            state.failure.is_none() && !state.widening.allows(state.bytes, bytes)
        };
        let mut state = wait_while(&self.landed, self.lock(), None, full);
        if let Some(failure) = &state.failure {
            return Err(failure.duplicate());
        }
        state.bytes += bytes;
        state.begun += 1;
        self.flow.accept(bytes);
        Ok(())
    }

    pub(super) fn land(&self, number: u32, bytes: u64, outcome: Outcome) {
        let mut state = self.lock();
        state.bytes -= bytes;
        self.flow.land(bytes);
        match outcome {
            Outcome::Part(part) => {
                state.landed += 1;
                state.parts.insert(number, part);
            }
            Outcome::Whole => state.landed += 1,
            Outcome::GivenUp => {}
            Outcome::Failed(error) => {
                state.failure.get_or_insert(error);
            }
        }
        drop(state);
        self.landed.notify_all();
    }

    pub(super) fn fail(&self, error: EngineError) {
        self.lock().failure.get_or_insert(error);
    }

    pub(super) fn check(&self) -> Result<()> {
        match &self.lock().failure {
            Some(failure) => Err(failure.duplicate()),
            None => Ok(()),
        }
    }

    /// The parts that have arrived, by number.
    pub(super) fn parts(&self) -> Result<Vec<CompletedPart>> {
        self.check()?;
        Ok(self.lock().parts.values().cloned().collect())
    }

    pub(super) fn has_begun(&self) -> bool {
        self.lock().begun > 0
    }

    pub(super) fn landed(&self) -> u64 {
        self.lock().landed
    }

    pub(super) fn wait_until_landed(&self) {
        drop(wait_while(&self.landed, self.lock(), None, |state| state.bytes > 0));
    }

    fn lock(&self) -> MutexGuard<'_, FlightState> {
        unpoisoned(self.state.lock())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;
    const TIMEOUT: Duration = Duration::from_mins(1);

    /// Most parts of 16 MiB at once on a line of so many bytes a second, after so many parts.
    fn at_once(bytes_per_second: u64, parts: u32) -> u64 {
        let part = 16 * MIB;
        let mut widening = Widening::new(128 * MIB, TIMEOUT);
        for _ in 0..parts {
            let under_way = widening.bytes.max(part);
            widening.arrived(part, Duration::from_secs(under_way / bytes_per_second));
        }
        (0..100).take_while(|parts| widening.allows(parts * part, part)).count() as u64
    }

    #[test]
    fn a_fast_line_soon_takes_all_that_is_allowed() {
        assert_eq!(at_once(100 * MIB, 0), 1);
        assert_eq!(at_once(100 * MIB, 1), 2);
        assert_eq!(at_once(100 * MIB, 7), 8);
        assert_eq!(at_once(100 * MIB, 100), 8);
    }

    #[test]
    fn on_a_slow_line_every_part_arrives_in_time() {
        for bytes_per_second in [MIB / 3, MIB, 2 * MIB, 3 * MIB, 5 * MIB] {
            let seconds = at_once(bytes_per_second, 100) * 16 * MIB / bytes_per_second;
            assert!(seconds < TIMEOUT.as_secs(), "{seconds} s at {bytes_per_second} B/s");
        }
    }
}
