//! Memory of the device that is ours: copies of tensors that training is about to change.
//!
//! Always holds: the memory is allocated, filled and freed in the order of the stream for copies
//! down. So a copy down that was begun before a [`DeviceBuffer`] is dropped reads what was cloned,
//! and neither the clone nor its end waits for the device or makes the device wait.
//!
//! Why `unsafe`: the memory is known by an address.
#![expect(unsafe_code, reason = "frees memory of the device, which is known by its address")]

use std::fmt;
use std::sync::Arc;

use crate::CudaError;
use crate::stream::Stream;

/// Memory of the device, freed when this is dropped and the copies down begun by then are over.
#[must_use = "dropping it frees the memory"]
pub struct DeviceBuffer {
    stream: Arc<Stream>,
    /// Of no meaning where there are no bytes.
    address: u64,
    bytes: usize,
}

impl DeviceBuffer {
    /// Allocates `bytes` in the order of `stream`.
    pub(crate) fn allocate(stream: &Arc<Stream>, bytes: usize) -> Result<Self, CudaError> {
        let entered = stream.context().enter()?;
        let address = if bytes == 0 { 0 } else { stream.allocate(&entered, bytes)? };
        Ok(Self { stream: Arc::clone(stream), address, bytes })
    }

    /// Where the memory begins, for [`Device::copy_down`](crate::Device::copy_down).
    pub fn address(&self) -> u64 {
        self.address
    }

    /// How many bytes it has.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for DeviceBuffer {
    fn drop(&mut self) {
        if self.bytes == 0 {
            return;
        }
        let Some(entered) = self.stream.context().enter_to_tidy_up() else {
            return;
        };
        // SAFETY: allocated by this stream, freed once; what uses it is given to this stream.
        unsafe { self.stream.free(&entered, self.address) }
    }
}

impl fmt::Debug for DeviceBuffer {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("DeviceBuffer")
            .field("address", &self.address)
            .field("bytes", &self.bytes)
            .finish_non_exhaustive()
    }
}
