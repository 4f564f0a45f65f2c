//! How much waits for the device, and how fast the device takes it: what the workers of a save go
//! by when they choose how to encode.
//!
//! ```text
//! worker --expect--> queue --accept--> in flight --land--> taken --sync--> durable
//!        |<------------- backlog of taking ------------->|
//!        |<------------------- backlog of storing ------------------------>|
//! ```
//!
//! A device may take bytes into a cache of its own and store them when it is told to sync. The
//! slower of the two is what a save waits for in the end.
//!
//! Always holds: a rate counts only time in which there was something to do, so that a device that
//! is starved does not look slow; what is recent counts most.

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use crate::clock::{Environment, elapsed};
use crate::sync::unpoisoned;

/// What is further back than this, in seconds of a busy device, counts for less than 1/e.
const MEMORY_SECONDS: f64 = 0.25;
/// How many bytes landed a rate that is known from before, or assumed, counts for.
const PRIOR_BYTES: f64 = 8e6;

/// How fast a device is, in bytes a second.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Pace {
    /// What it takes.
    pub(crate) taken: f64,
    /// What it makes durable while it syncs.
    pub(crate) stored: f64,
}

impl Pace {
    /// While nothing is known: a common solid-state disk, without a cache worth naming.
    const ASSUMED: Self = Self { taken: 1e9, stored: 1e12 };
}

/// Counts one shard's bytes on their way. Shared by workers, committer and the store.
#[derive(Debug)]
pub(crate) struct Flow {
    environment: Arc<dyn Environment>,
    state: Mutex<State>,
}

#[derive(Clone, Copy, Debug)]
struct State {
    queued_bytes: u64,
    in_flight_bytes: u64,
    /// Up to when busy time was counted; `None` while nothing is in flight.
    busy_since: Option<Duration>,
    taken: Recent,
    taken_bytes: u64,
    stored: Recent,
    stored_bytes: u64,
    /// Nobody waits for the device before the end.
    is_captured: bool,
    /// When the sync that is under way began.
    syncs_since: Option<Duration>,
}

/// What a sync covers and when it began.
#[derive(Debug)]
pub(crate) struct SyncBegun {
    since: Duration,
    covered_bytes: u64,
}

/// Bytes and the busy seconds that they took, with an exponentially fading memory.
#[derive(Clone, Copy, Debug)]
struct Recent {
    bytes: f64,
    seconds: f64,
}

impl Recent {
    fn new(bytes_per_second: f64) -> Self {
        Self { bytes: PRIOR_BYTES, seconds: PRIOR_BYTES / bytes_per_second }
    }

    fn pass(&mut self, seconds: f64) {
        let kept = (-seconds / MEMORY_SECONDS).exp();
        self.bytes *= kept;
        self.seconds = self.seconds * kept + seconds;
    }

    fn bytes_per_second(self) -> f64 {
        self.bytes / self.seconds
    }
}

/// A reading of a [`Flow`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct FlowReading {
    /// Encoded bytes that are still to pass what holds a save up: the taking, or the storing.
    pub(crate) backlog_bytes: f64,
    /// Of all, bytes that the device has been given and has not taken.
    pub(crate) in_flight_bytes: u64,
    /// How fast they pass it.
    pub(crate) bytes_per_second: f64,
}

#[expect(clippy::cast_precision_loss, reason = "bytes of one shard, for a rate")]
impl Flow {
    /// Nothing on its way yet. `pace` is the device's as an earlier shard found it.
    pub(crate) fn new(environment: Arc<dyn Environment>, pace: Option<Pace>) -> Self {
        let pace = pace.unwrap_or(Pace::ASSUMED);
        let state = State {
            queued_bytes: 0,
            in_flight_bytes: 0,
            busy_since: None,
            taken: Recent::new(pace.taken),
            taken_bytes: 0,
            stored: Recent::new(pace.stored),
            stored_bytes: 0,
            is_captured: false,
            syncs_since: None,
        };
        Self { environment, state: Mutex::new(state) }
    }

    /// A worker has `bytes` ready for the store.
    pub(crate) fn expect(&self, bytes: u64) {
        self.lock().queued_bytes += bytes;
    }

    /// Of the bytes that were expected, these are the store's business now.
    pub(crate) fn arrive(&self, bytes: u64) {
        let mut state = self.lock();
        state.queued_bytes = state.queued_bytes.saturating_sub(bytes);
    }

    /// All that is to be written was taken from the training: from now on only the end matters.
    pub(crate) fn captured(&self) {
        self.lock().is_captured = true;
    }

    /// Whether [`Flow::captured`] was called. Until then, how fast the device takes bytes may be
    /// what the training waits for.
    pub(crate) fn is_captured(&self) -> bool {
        self.lock().is_captured
    }

    /// The device was given `bytes`.
    pub(crate) fn accept(&self, bytes: u64) {
        let now = self.environment.monotonic();
        let mut state = self.lock();
        state.count_busy_time(now);
        state.in_flight_bytes += bytes;
        state.busy_since = Some(now);
    }

    /// The device has taken `bytes`, or refused them.
    pub(crate) fn land(&self, bytes: u64) {
        let now = self.environment.monotonic();
        let mut state = self.lock();
        state.count_busy_time(now);
        state.in_flight_bytes = state.in_flight_bytes.saturating_sub(bytes);
        state.taken.bytes += bytes as f64;
        state.taken_bytes += bytes;
        state.busy_since = (state.in_flight_bytes > 0).then_some(now);
    }

    /// Times `sync`, which makes durable what has landed.
    pub(crate) fn time_sync<T>(&self, sync: impl FnOnce() -> T) -> T {
        let begun = self.begin_sync();
        let synced = sync();
        self.end_sync(&begun);
        synced
    }

    /// A sync begins; there is one at a time.
    pub(crate) fn begin_sync(&self) -> SyncBegun {
        let since = self.environment.monotonic();
        let mut state = self.lock();
        state.syncs_since = Some(since);
        SyncBegun { since, covered_bytes: state.taken_bytes }
    }

    pub(crate) fn end_sync(&self, begun: &SyncBegun) {
        let SyncBegun { since, covered_bytes } = *begun;
        let seconds = elapsed(&*self.environment, since).as_secs_f64();
        let mut state = self.lock();
        state.syncs_since = None;
        state.stored.pass(seconds);
        state.stored.bytes += (covered_bytes - state.stored_bytes) as f64;
        state.stored_bytes = covered_bytes;
    }

    /// How fast the device is.
    pub(crate) fn pace(&self) -> Pace {
        self.state_now().pace()
    }

    /// Backlog and rate now.
    pub(crate) fn read(&self) -> FlowReading {
        let state = self.state_now();
        let pace = state.pace();
        let untaken_bytes = (state.queued_bytes + state.in_flight_bytes) as f64;
        if pace.taken <= pace.stored {
            return FlowReading {
                backlog_bytes: untaken_bytes,
                in_flight_bytes: state.in_flight_bytes,
                bytes_per_second: pace.taken,
            };
        }
        let syncs_since = state.syncs_since.unwrap_or_else(|| self.environment.monotonic());
        let syncs = elapsed(&*self.environment, syncs_since).as_secs_f64();
        let unstored_bytes = (state.taken_bytes - state.stored_bytes) as f64;
        FlowReading {
            backlog_bytes: untaken_bytes + (unstored_bytes - pace.stored * syncs).max(0.0),
            in_flight_bytes: state.in_flight_bytes,
            bytes_per_second: pace.stored,
        }
    }

    fn state_now(&self) -> State {
        let now = self.environment.monotonic();
        let mut state = *self.lock();
        state.count_busy_time(now);
        state
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        unpoisoned(self.state.lock())
    }
}

impl State {
    fn pace(&self) -> Pace {
        Pace { taken: self.taken.bytes_per_second(), stored: self.stored.bytes_per_second() }
    }

    fn count_busy_time(&mut self, now: Duration) {
        if let Some(since) = self.busy_since {
            self.taken.pass(now.saturating_sub(since).as_secs_f64());
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
        assert_close(flow.pace().taken, 1000.0 * MIB as f64, 0.01);
    }

    #[test]
    fn what_does_not_land_is_noticed_before_it_does() {
        let (clock, flow) = flow(None);
        flow.accept(4 * MIB);
        clock.advance(Duration::from_millis(180));
        assert!(flow.read().bytes_per_second < 0.1 * Pace::ASSUMED.taken);
    }

    #[test]
    fn a_change_of_pace_is_followed() {
        let (clock, flow) = flow(Some(Pace { taken: 1e9, stored: 1e12 }));
        assert_close(flow.read().bytes_per_second, 1e9, 1e-9);
        for _ in 0..100 {
            flow.accept(MIB);
            clock.advance(Duration::from_millis(10));
            flow.land(MIB);
        }
        assert_close(flow.read().bytes_per_second, 100.0 * MIB as f64, 0.1);
    }

    #[test]
    fn a_device_that_stores_slower_than_it_takes_is_as_fast_as_it_stores() {
        let (clock, flow) = flow(None);
        for _ in 0..4 {
            flow.accept(100 * MIB);
            clock.advance(Duration::from_millis(100));
            flow.land(100 * MIB);
            flow.time_sync(|| clock.advance(Duration::from_millis(500)));
        }
        assert_close(flow.read().bytes_per_second, 200.0 * MIB as f64, 0.05);
        assert!(flow.read().backlog_bytes < 1.0, "all is stored");
        flow.accept(10 * MIB);
        flow.land(10 * MIB);
        assert_close(flow.read().backlog_bytes, 10.0 * MIB as f64, 1e-9);
        // Half of it is stored by now.
        flow.time_sync(|| {
            clock.advance(Duration::from_millis(25));
            assert_close(flow.read().backlog_bytes, 5.0 * MIB as f64, 0.1);
        });

        let next = Flow::new(clock, Some(flow.pace()));
        assert_close(next.read().bytes_per_second, flow.read().bytes_per_second, 1e-9);
    }

    fn assert_close(actual: f64, expected: f64, part: f64) {
        assert!((actual / expected - 1.0).abs() < part, "{actual}, not {expected}");
    }
}
