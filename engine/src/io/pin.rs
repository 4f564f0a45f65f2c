//! Memory that devices copy to and from by themselves: registered with their driver.
//!
//! Always holds: memory is registered while a pool owns it and nobody uses it any more when it is
//! unmapped; a registration is dropped before its memory is unmapped.

use std::fmt;

use crate::Result;

/// Registers memory with a device's driver.
pub trait Pin: fmt::Debug + Send + Sync {
    /// Registers `buffers` times `buffer_bytes` from `start`, which stay mapped until what is
    /// returned is dropped; no copy to or from them is under way then. A copy touches one buffer.
    fn pin(&self, start: *mut u8, buffer_bytes: usize, buffers: usize) -> Result<Box<dyn Pinned>>;
}

/// Memory that is registered until this is dropped.
pub trait Pinned: fmt::Debug + Send + Sync {}
