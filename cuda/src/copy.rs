//! The two ends of a copy that are on the host: where bytes land, and where they take off.
//!
//! Always holds: who begins a copy gives its memory away, and is told exactly once what became of
//! it, with the memory, when the device does not use it any more.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::CudaError;

/// A direction of copies. Each has a stream and a thread of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Direction {
    /// From the device to the host, for a save; clones within the device go with them.
    Down,
    /// From the host to the device, for a restore.
    Up,
}

impl fmt::Display for Direction {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Down => "down",
            Self::Up => "up",
        })
    }
}

/// Memory of the host that a copy from the device fills.
///
/// The device keeps it from the beginning of the copy until [`Landing::landed`].
pub trait Landing: Send {
    /// The memory to fill, all of it. Asked for once.
    fn memory(&mut self) -> &mut [u8];

    /// The copy is over. On `Ok` the memory holds the device's bytes; on `Err` it holds anything.
    ///
    /// Called on the direction's own thread, which does nothing else meanwhile, and in the order
    /// in which the copies were begun: hand on what takes long. It may begin copies, and must not
    /// wait for its own direction. A panic is logged and goes no further.
    fn landed(self: Box<Self>, outcome: Result<(), CudaError>);
}

/// Memory of the host that a copy to the device reads.
///
/// The device keeps it from the beginning of the copy until [`Takeoff::taken_off`].
pub trait Takeoff: Send {
    /// The memory to read, all of it. Asked for once.
    fn memory(&self) -> &[u8];

    /// The copy is over. On `Ok` the device has the bytes; on `Err` its memory may hold anything.
    ///
    /// Called as [`Landing::landed`] is.
    fn taken_off(self: Box<Self>, outcome: Result<(), CudaError>);
}

/// The receiver of a copy's outcome, in either direction.
pub(crate) enum Traveller {
    Landing(Box<dyn Landing>),
    Takeoff(Box<dyn Takeoff>),
}

impl Traveller {
    /// Says what became of the copy.
    pub(crate) fn notify(self, outcome: Result<(), CudaError>) {
        let notified = catch_unwind(AssertUnwindSafe(|| match self {
            Self::Landing(landing) => landing.landed(outcome),
            Self::Takeoff(takeoff) => takeoff.taken_off(outcome),
        }));
        if notified.is_err() {
            tracing::error!("the callback of a copy panicked");
        }
    }
}
