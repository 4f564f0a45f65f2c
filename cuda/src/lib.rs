//! Pinned staging memory, and copies between device and host that nobody waits for.
//!
//! ```text
//!   caller's stream (torch)          stream down                 host
//!   backward, update  --follow-->    copies to pinned memory --> landing notified -> CRC, disk
//!   next update       <--precede--                                 (completion thread)
//!
//!   caller's stream (torch)          stream up                   host
//!   last use          --follow-->    copies from pinned memory <-- takeoff, read from disk
//!   forward           <--precede--                             --> takeoff notified: buffer free
//! ```
//!
//! The crate knows no Python and no torch: it is given addresses, handles of streams, and boxes
//! that own memory. [`DeviceStorage`] is how the engine sees a tensor. The crate builds without
//! CUDA; the driver is looked for when [`probe`] or [`Device::open`] is called, and its absence is
//! an error like any other.
//!
//! Always holds:
//! - Nothing panics, whatever the driver lacks or says; with [`Pinned`] memory nothing waits for
//!   the device but [`Device::finish`] and the drop of a [`Device`].
//! - Memory that was given to a copy comes back exactly once, when the device does not use it any
//!   more, with what became of the copy. It is called good only if the driver said so of the copy
//!   and of the event behind it.
//! - When a device is lost, everybody who waits is notified, and every later call says so.
//! - torch's context, its flags, its current streams and the thread's current device are as they
//!   were before a call.
//!
//! # A save
//!
//! ```no_run
//! use dtr_cuda::{CudaError, Device, Direction, Landing};
//!
//! struct Chunk(Vec<u8>);
//!
//! impl Landing for Chunk {
//!     fn memory(&mut self) -> &mut [u8] {
//!         &mut self.0
//!     }
//!
//!     fn landed(self: Box<Self>, outcome: Result<(), CudaError>) {
//!         // Hand the bytes, or the error, to the thread that encodes and writes.
//! #       drop(outcome);
//!     }
//! }
//!
//! /// Copies a tensor of 4 MiB as it is behind everything that `stream` was given.
//! #[expect(unsafe_code, reason = "the tensor and the stream are known by their addresses")]
//! fn snapshot(tensor: u64, stream: u64) -> Result<(), CudaError> {
//!     let device = Device::open(0)?;
//!     // SAFETY: a live stream of this device.
//!     unsafe { device.follow(Direction::Down, stream) }?;
//!     // SAFETY: the caller keeps the tensor until `finish` has returned.
//!     unsafe { device.copy_down(tensor, Box::new(Chunk(vec![0; 4 << 20]))) };
//!     // SAFETY: as above.
//!     unsafe { device.precede(Direction::Down, stream) }?;
//!     // From here on the stream may be told to change the tensor: it waits by itself.
//!     device.finish(Direction::Down)
//! }
//! ```
//!
//! # How it is tested
//!
//! `stand_in/cuda.c` is a driver without a device: host memory behind the same calls, a thread per
//! stream, so that a missing event shows as wrong bytes, and failures on demand. The tests build it
//! and load it in the place of `libcuda.so`.

mod context;
mod copy;
mod device;
mod driver;
mod error;
mod lane;
mod memory;
mod pinned;
mod storage;
mod stream;

pub use context::MemoryInfo;
pub use copy::{Direction, Landing, Takeoff};
pub use device::Device;
pub use driver::{Driver, probe};
pub use error::{CudaError, Refusal};
pub use lane::BATCH_BYTES;
pub use memory::DeviceBuffer;
pub use pinned::Pinned;
pub use storage::{ArenaPin, DeviceStorage, Piece, engine_error, shared_device};
