//! Time and randomness, injected so that tests decide both.

use std::fmt;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::format::names::AttemptId;
use crate::{EngineError, Result};

/// Where the engine takes time and randomness from.
pub trait Environment: Send + Sync + fmt::Debug {
    /// Time since an arbitrary start; never goes backwards.
    fn monotonic(&self) -> Duration;
    /// Milliseconds since 1970, UTC; may jump.
    fn unix_ms(&self) -> u64;
    /// Processor time that the calling thread has used.
    fn thread_cpu(&self) -> Duration;
    /// A fresh attempt id.
    fn attempt_id(&self) -> Result<AttemptId>;
}

/// Time since `start`, by the same environment's monotonic clock.
pub(crate) fn elapsed(environment: &dyn Environment, start: Duration) -> Duration {
    environment.monotonic().saturating_sub(start)
}

/// The machine's own clocks and random source.
#[derive(Debug)]
pub struct System {
    start: Instant,
}

impl Default for System {
    fn default() -> Self {
        Self { start: Instant::now() }
    }
}

impl Environment for System {
    fn monotonic(&self) -> Duration {
        self.start.elapsed()
    }

    fn unix_ms(&self) -> u64 {
        let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        u64::try_from(since_epoch.as_millis()).unwrap_or(u64::MAX)
    }

    fn thread_cpu(&self) -> Duration {
        let used = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
        Duration::try_from(used).unwrap_or_default()
    }

    fn attempt_id(&self) -> Result<AttemptId> {
        let mut bytes = [0; 16];
        getrandom::fill(&mut bytes).map_err(|error| EngineError::Io {
            what: "drawing an attempt id".into(),
            source: std::io::Error::other(error.to_string()),
            hint:
                "the kernel's random source is unavailable: check the sandbox's system-call filter"
                    .into(),
        })?;
        Ok(AttemptId(bytes))
    }
}

/// A clock that stands still until it is told to go on.
#[cfg(test)]
#[derive(Debug, Default)]
pub(crate) struct Manual(std::sync::Mutex<Duration>);

#[cfg(test)]
impl Manual {
    pub(crate) fn advance(&self, time: Duration) {
        *self.0.lock().unwrap() += time;
    }

    pub(crate) fn set(&self, time: Duration) {
        *self.0.lock().unwrap() = time;
    }
}

#[cfg(test)]
impl Environment for Manual {
    fn monotonic(&self) -> Duration {
        *self.0.lock().unwrap()
    }

    fn unix_ms(&self) -> u64 {
        0
    }

    fn thread_cpu(&self) -> Duration {
        self.monotonic()
    }

    fn attempt_id(&self) -> Result<AttemptId> {
        Ok(AttemptId([7; 16]))
    }
}
