//! How every call crosses from Python into the engine: without the GIL, in the right process, and
//! with panics caught.
//!
//! Always holds: after a panic inside the engine, every later call on the same store raises
//! `Internal` without entering the engine: its invariants may not hold any more.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use dtr_engine::{EngineError, Result, unpoisoned};
use pyo3::prelude::*;

use crate::errors;

/// Longest time without looking for signals.
pub(crate) const WAIT_SLICE: Duration = Duration::from_millis(100);

/// Shared by everything that was made from one store.
#[derive(Clone, Debug)]
pub(crate) struct Guard {
    poisoned: Arc<AtomicBool>,
    pid: u32,
}

impl Guard {
    pub(crate) fn new() -> Self {
        Self { poisoned: Arc::default(), pid: std::process::id() }
    }

    /// Runs `verb` without the GIL.
    pub(crate) fn call<T: Send>(
        &self,
        py: Python<'_>,
        what: &str,
        verb: impl FnOnce() -> Result<T> + Send,
    ) -> PyResult<T> {
        self.check(what).map_err(|error| errors::to_python(py, &error))?;
        let outcome = py.detach(|| catch_unwind(AssertUnwindSafe(verb)));
        let outcome = outcome.unwrap_or_else(|panic| {
            self.poisoned.store(true, Ordering::Release);
            Err(EngineError::internal(what, format!("it panicked: {}", message_of(&*panic))))
        });
        outcome.map_err(|error| errors::to_python(py, &error))
    }

    /// Runs `verb` on a thread of its own, so that a signal (Ctrl-C) is heard while it goes on. If
    /// one raises, `cancel` is called and the verb's outcome is dropped.
    pub(crate) fn call_interruptibly<T: Send + 'static>(
        &self,
        py: Python<'_>,
        what: &'static str,
        verb: impl FnOnce() -> Result<T> + Send + 'static,
        cancel: impl FnOnce(),
    ) -> PyResult<T> {
        let (sender, receiver) = std::sync::mpsc::sync_channel(1);
        let inner = self.clone();
        let run = move || {
            let outcome = catch_unwind(AssertUnwindSafe(verb)).unwrap_or_else(|panic| {
                inner.poisoned.store(true, Ordering::Release);
                Err(EngineError::internal(what, format!("it panicked: {}", message_of(&*panic))))
            });
            // Nobody listens any more if a signal ended the wait.
            let _gone = sender.send(outcome);
        };
        self.call(py, what, move || {
            let spawned = std::thread::Builder::new().name("dtr-call".into()).spawn(run);
            spawned.map(drop).map_err(|error| {
                EngineError::from_io("starting a thread for", std::path::Path::new(what), error)
            })
        })?;
        let receiver = std::sync::Mutex::new(receiver);
        loop {
            let outcome = py.detach(|| {
                let receiver = unpoisoned(receiver.lock());
                receiver.recv_timeout(WAIT_SLICE)
            });
            match outcome {
                Ok(outcome) => return outcome.map_err(|error| errors::to_python(py, &error)),
                Err(std::sync::mpsc::RecvTimeoutError::Timeout) => {}
                Err(std::sync::mpsc::RecvTimeoutError::Disconnected) => {
                    let error = EngineError::internal(what, "its thread ended without an outcome");
                    return Err(errors::to_python(py, &error));
                }
            }
            if let Err(signal) = py.check_signals() {
                cancel();
                return Err(signal);
            }
        }
    }

    /// Calls `wait` with slices of the time limit until it says true or the limit is over; looks
    /// for signals in between.
    pub(crate) fn wait(
        &self,
        py: Python<'_>,
        what: &str,
        timeout: Option<Duration>,
        wait: impl Fn(Duration) -> Result<bool> + Send + Sync,
    ) -> PyResult<bool> {
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        loop {
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            let slice = left.map_or(WAIT_SLICE, |left| left.min(WAIT_SLICE));
            if self.call(py, what, || wait(slice))? {
                return Ok(true);
            }
            py.check_signals()?;
            if left.is_some_and(|left| left <= slice) {
                return Ok(false);
            }
        }
    }

    fn check(&self, what: &str) -> Result<()> {
        if std::process::id() != self.pid {
            return Err(EngineError::Closed {
                what: what.into(),
                why: "this process was forked from the one that opened the store".into(),
                hint: "open the store again in this process, with `read_only=True` while the \
                       parent saves"
                    .into(),
            });
        }
        if self.poisoned.load(Ordering::Acquire) {
            return Err(EngineError::internal(what, "an earlier call panicked"));
        }
        Ok(())
    }
}

/// A number of seconds from Python; None waits forever, a negative number not at all.
pub(crate) fn timeout_of(seconds: Option<f64>) -> Option<Duration> {
    let seconds = seconds?;
    if seconds <= 0.0 {
        return Some(Duration::ZERO);
    }
    // Not finite, or centuries: that is forever.
    Duration::try_from_secs_f64(seconds).ok()
}

fn message_of(panic: &(dyn std::any::Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no message")
}
