//! How much waits for the device, and how fast the device takes it: what the workers of a save go
//! by when they choose how to encode.
//!
//! ```text
//! worker --expect--> queue --accept--> in flight --land--> on the device
//!        |<----------- backlog ------------------>|
//! ```
//!
//! A device may take bytes into a cache of its own and write them when it is told to sync: that
//! time is counted apart, for it comes after everything else.
//!
//! Always holds: the rate counts only time in which something was in flight, so that a device that
//! is starved does not look slow; what is recent counts most.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::clock::{Environment, elapsed};

/// What lies further back than this, in seconds of a busy device, counts for less than 1/e.
const MEMORY_SECONDS: f64 = 0.25;
/// How many bytes landed a rate that is known from before, or assumed, counts for.
const PRIOR_BYTES: f64 = 8e6;

/// How fast a device is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pace {
    /// What it takes.
    pub bytes_per_second: f64,
    /// What a sync takes for each byte since the one before.
    pub sync_seconds_per_byte: f64,
}

impl Pace {
    /// While nothing is known: a common solid-state disk.
    const ASSUMED: Self = Self { bytes_per_second: 1e9, sync_seconds_per_byte: 0.0 };
}

/// Counts one shard's bytes on their way. Shared by workers, committer and the store.
#[derive(Debug)]
pub struct Flow {
    environment: Arc<dyn Environment>,
    /// As an earlier shard found it.
    sync_seconds_per_byte: f64,
    state: Mutex<State>,
}

#[derive(Clone, Copy, Debug, Default)]
struct State {
    queued_bytes: u64,
    in_flight_bytes: u64,
    /// Up to when busy time was counted; `None` while nothing is in flight.
    busy_since: Option<Duration>,
    landed: Recent,
    landed_bytes: u64,
    sync: Duration,
}

/// Bytes that landed and the busy seconds that it took, with an exponentially fading memory.
#[derive(Clone, Copy, Debug, Default)]
struct Recent {
    bytes: f64,
    seconds: f64,
}

impl Recent {
    fn pass(&mut self, seconds: f64) {
        let kept = (-seconds / MEMORY_SECONDS).exp();
        self.bytes *= kept;
        self.seconds = self.seconds * kept + seconds;
    }
}

/// A reading of a [`Flow`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct FlowReading {
    /// Encoded bytes that are not on the device yet.
    pub backlog_bytes: f64,
    /// Of these, bytes that the device has been given.
    pub in_flight_bytes: u64,
    /// How fast the device is.
    pub pace: Pace,
}

#[expect(clippy::cast_precision_loss, reason = "bytes of one shard, for a rate")]
impl Flow {
    /// Nothing on its way yet. `pace` is the device's as an earlier shard found it.
    pub fn new(environment: Arc<dyn Environment>, pace: Option<Pace>) -> Self {
        let Pace { bytes_per_second, sync_seconds_per_byte } = pace.unwrap_or(Pace::ASSUMED);
        let landed = Recent { bytes: PRIOR_BYTES, seconds: PRIOR_BYTES / bytes_per_second };
        let state = Mutex::new(State { landed, ..State::default() });
        Self { environment, sync_seconds_per_byte, state }
    }

    /// A worker has `bytes` ready for the store.
    pub fn expect(&self, bytes: u64) {
        self.lock().queued_bytes += bytes;
    }

    /// Of the bytes that were expected, these are the store's business now.
    pub fn arrive(&self, bytes: u64) {
        let mut state = self.lock();
        state.queued_bytes = state.queued_bytes.saturating_sub(bytes);
    }

    /// The device was given `bytes`.
    pub fn accept(&self, bytes: u64) {
        let now = self.environment.monotonic();
        let mut state = self.lock();
        state.count_busy_time(now);
        state.in_flight_bytes += bytes;
        state.busy_since = Some(now);
    }

    /// The device has taken `bytes`, or refused them.
    pub fn land(&self, bytes: u64) {
        let now = self.environment.monotonic();
        let mut state = self.lock();
        state.count_busy_time(now);
        state.in_flight_bytes = state.in_flight_bytes.saturating_sub(bytes);
        state.landed.bytes += bytes as f64;
        state.landed_bytes += bytes;
        state.busy_since = (state.in_flight_bytes > 0).then_some(now);
    }

    /// Times `sync`, which makes what landed durable.
    pub fn time_sync<T>(&self, sync: impl FnOnce() -> T) -> T {
        let start = self.environment.monotonic();
        let synced = sync();
        self.lock().sync = elapsed(&*self.environment, start);
        synced
    }

    /// How fast the device was, once everything is synced.
    pub fn pace(&self) -> Pace {
        let Pace { bytes_per_second, .. } = self.read().pace;
        let state = self.lock();
        let sync_seconds_per_byte = state.sync.as_secs_f64() / state.landed_bytes.max(1) as f64;
        Pace { bytes_per_second, sync_seconds_per_byte }
    }

    /// Backlog and rate now.
    pub fn read(&self) -> FlowReading {
        let now = self.environment.monotonic();
        let mut state = *self.lock();
        state.count_busy_time(now);
        FlowReading {
            backlog_bytes: (state.queued_bytes + state.in_flight_bytes) as f64,
            in_flight_bytes: state.in_flight_bytes,
            pace: Pace {
                bytes_per_second: state.landed.bytes / state.landed.seconds,
                sync_seconds_per_byte: self.sync_seconds_per_byte,
            },
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Every critical section is a few assignments.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn count_busy_time(&mut self, now: Duration) {
        if let Some(since) = self.busy_since {
            self.landed.pass(now.saturating_sub(since).as_secs_f64());
            self.busy_since = Some(now);
        }
    }
}

#[cfg(test)]
#[expect(clippy::cast_precision_loss, reason = "a few megabytes, for a rate")]
mod tests {
    use super::*;
    use crate::clock::Manual;

    const MIB: u64 = 1 << 20;

    fn flow(pace: Option<Pace>) -> (Arc<Manual>, Flow) {
        let clock = Arc::new(Manual::default());
        (Arc::clone(&clock), Flow::new(clock, pace))
    }

    #[test]
    fn the_backlog_is_what_is_not_on_the_device() {
        let (_, flow) = flow(None);
        flow.expect(3);
        flow.accept(5);
        assert_eq!((flow.read().backlog_bytes, flow.read().in_flight_bytes), (8.0, 5));
        flow.arrive(3);
        flow.land(5);
        assert_eq!((flow.read().backlog_bytes, flow.read().in_flight_bytes), (0.0, 0));
    }

    #[test]
    fn idle_time_does_not_make_a_device_slow() {
        let (clock, flow) = flow(None);
        for _ in 0..50 {
            flow.accept(MIB);
            clock.advance(Duration::from_millis(1));
            flow.land(MIB);
            clock.advance(Duration::from_secs(1));
        }
        let expected = 1000.0 * MIB as f64;
        assert!((flow.read().pace.bytes_per_second / expected - 1.0).abs() < 0.01);
    }

    #[test]
    fn what_does_not_land_is_noticed_before_it_does() {
        let (clock, flow) = flow(None);
        flow.accept(4 * MIB);
        clock.advance(Duration::from_millis(180));
        assert!(flow.read().pace.bytes_per_second < 0.1 * Pace::ASSUMED.bytes_per_second);
    }

    #[test]
    fn a_change_of_pace_is_followed() {
        let (clock, flow) = flow(Some(Pace { bytes_per_second: 1e9, sync_seconds_per_byte: 0.0 }));
        assert!((flow.read().pace.bytes_per_second / 1e9 - 1.0).abs() < 1e-9);
        for _ in 0..100 {
            flow.accept(MIB);
            clock.advance(Duration::from_millis(10));
            flow.land(MIB);
        }
        let expected = 100.0 * MIB as f64;
        assert!((flow.read().pace.bytes_per_second / expected - 1.0).abs() < 0.1);
    }

    #[test]
    fn a_sync_is_known_to_the_next_shard() {
        let (clock, flow) = flow(None);
        flow.accept(MIB);
        flow.land(MIB);
        flow.time_sync(|| clock.advance(Duration::from_secs(1)));
        assert!(flow.read().pace.sync_seconds_per_byte < 1e-12, "what was known before");
        let next = Flow::new(clock, Some(flow.pace()));
        let expected = 1.0 / MIB as f64;
        assert!((next.read().pace.sync_seconds_per_byte / expected - 1.0).abs() < 1e-9);
    }
}
