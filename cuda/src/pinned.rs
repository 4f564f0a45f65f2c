//! Memory of the host that the device reads and writes by itself.
//!
//! A copy to or from other memory goes through the driver's own staging, waits for it, and reaches
//! a tenth of the rate or less.
//!
//! Always holds:
//! - Memory is pinned for every device, by whichever one it was registered.
//! - Dropping a [`Pinned`] unpins exactly what it pinned; in a forked child it does nothing.
//!
//! # In pieces
//!
//! Pinning costs about a second per GiB, so a large arena is pinned in the background and piece by
//! piece (256 MiB, say), each with a [`Pinned`] of its own. Until then it can be used, slowly. To
//! the driver, what touches two registrations is one piece of memory in neither: it refuses such a
//! copy, or makes it as from memory that is not pinned. Hence: **a piece begins and ends between
//! two buffers**, where a page does.
//!
//! Why `unsafe`: the driver is given an address, whose memory only the caller can vouch for.
#![expect(unsafe_code, reason = "gives the driver memory that the caller owns")]

use std::fmt;
use std::ptr;
use std::sync::Arc;

use cudarc::driver::sys::CU_MEMHOSTREGISTER_PORTABLE;

use crate::context::Context;
use crate::{CudaError, Device};

/// Memory of the caller that is pinned until this is dropped.
#[must_use = "dropping it unpins the memory"]
pub struct Pinned {
    context: Arc<Context>,
    address: usize,
    bytes: usize,
}

impl Pinned {
    /// Pins `bytes` at `start`, for every device. Takes about a second per GiB, and may be called
    /// by any thread.
    ///
    /// # Errors
    ///
    /// [`CudaError::OutOfPinnedMemory`] where the system refuses, [`CudaError::AlreadyPinned`]
    /// where a part is pinned already, [`CudaError::InvalidArgument`] for no bytes.
    ///
    /// # Safety
    ///
    /// The memory is mapped from now until this is dropped, and this is dropped only when no copy
    /// from or to it is under way. The caller's other uses of the memory are free.
    pub unsafe fn register(
        device: &Device,
        start: *mut u8,
        bytes: usize,
    ) -> Result<Self, CudaError> {
        let address = start.expose_provenance();
        if bytes == 0 {
            let what = format!("pinning 0 bytes of memory at {address:#x}");
            return Err(CudaError::invalid(what, "expected at least one"));
        }
        let context = device.context();
        let entered = context.enter()?;
        // SAFETY: mapped memory, as the contract says.
        let code = unsafe {
            (context.calls().cuMemHostRegister_v2)(start.cast(), bytes, CU_MEMHOSTREGISTER_PORTABLE)
        };
        let answer = || device.come_to_rest(&entered);
        let registered = context.check_memory("cuMemHostRegister_v2", code, answer);
        registered.map_err(|error| error.not_pinned(address, bytes))?;
        Ok(Self { context: Arc::clone(context), address, bytes })
    }

    /// Bytes that are pinned.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        let Some(_entered) = self.context.enter_to_tidy_up() else {
            return;
        };
        self.context.tidy_up("cuMemHostUnregister", |calls| {
            let start = ptr::with_exposed_provenance_mut(self.address);
            // SAFETY: registered once, unregistered once; mapped, as the contract says.
            unsafe { (calls.cuMemHostUnregister)(start) }
        });
    }
}

impl fmt::Debug for Pinned {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Pinned").field("bytes", &self.bytes).finish_non_exhaustive()
    }
}
