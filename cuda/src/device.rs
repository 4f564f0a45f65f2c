//! A device and its two directions of copies.
//!
//! ```text
//! caller's stream   | backward | update |        | forward ...
//!                              \ follow          / precede (waits on the device)
//! stream down                    | copy | copy |
//!                                        \ event: the completion thread notifies each landing
//! ```
//!
//! Always holds:
//! - No method waits for the device but [`Device::finish`] and the drop of the device, as long as
//!   copies are from and to pinned memory; where the driver refuses memory without a reason, the
//!   device is asked for its health by waiting.
//! - The caller's stream and ours have no order but the one that [`Device::follow`] and
//!   [`Device::precede`] make.
//! - In a forked child nothing touches the driver: calls fail, drops do nothing.
//!
//! Why `unsafe`: a device's memory and a caller's streams are known by their addresses, which only
//! the caller can vouch for.
#![expect(unsafe_code, reason = "takes addresses of the device's memory and of streams")]

use std::fmt;
use std::sync::Arc;

use crate::context::{Context, Entered, MemoryInfo};
use crate::copy::{Direction, Landing, Takeoff, Traveller};
use crate::error::CudaError;
use crate::lane::Lane;
use crate::memory::DeviceBuffer;
use crate::stream::StreamHandle;

/// A CUDA device, with a stream and a thread for each direction of copies.
///
/// Dropping it waits until all copies are over and everybody has been notified; where the drop
/// happens in a [`Landing`] or [`Takeoff`] that is being notified, those of its direction are
/// notified afterwards.
pub struct Device {
    // Dropped in this order: the lanes first, then our reference to their context.
    down: Lane,
    up: Lane,
    context: Arc<Context>,
}

impl Device {
    /// Opens device `ordinal`, counted from 0 as torch does: `cuda:0` is 0.
    ///
    /// # Errors
    ///
    /// What [`probe`](crate::probe) says where there is no usable driver,
    /// [`CudaError::NoSuchDevice`], and what the driver refuses.
    pub fn open(ordinal: u32) -> Result<Arc<Self>, CudaError> {
        let context = Context::retain(ordinal)?;
        let entered = context.enter()?;
        let down = Lane::start(&entered, Direction::Down)?;
        let up = Lane::start(&entered, Direction::Up)?;
        drop(entered);
        Ok(Arc::new(Self { down, up, context }))
    }

    /// The device's number, counted from 0.
    pub fn ordinal(&self) -> u32 {
        self.context.ordinal()
    }

    /// Lets the copies of `direction` that are begun from now on run after everything that `stream`
    /// has been given so far. `stream` is a handle as in `torch.cuda.current_stream().cuda_stream`;
    /// 0 is the legacy default stream.
    ///
    /// # Errors
    ///
    /// [`CudaError::StreamCaptured`] while a CUDA graph is being captured, and what the driver
    /// refuses. No order is made then: begin no copy.
    ///
    /// # Safety
    ///
    /// `stream` is a live stream of this device's primary context.
    pub unsafe fn follow(&self, direction: Direction, stream: u64) -> Result<(), CudaError> {
        let entered = self.context.enter()?;
        // SAFETY: this function's contract; used in this call only.
        let caller = unsafe { StreamHandle::new(stream) }?;
        caller.check_not_captured(&entered)?;
        let given_so_far = caller.record(&entered)?;
        self.lane(direction).stream().handle().follow(&entered, &given_so_far)
    }

    /// Lets everything that `stream` is given from now on wait, on the device, for every copy of
    /// `direction` (and for clones, if it is [`Direction::Down`]) that was begun so far. Ends the
    /// batch, as [`Device::flush`] does.
    ///
    /// # Errors
    ///
    /// As for [`Device::follow`]. No order is made then: the stream may change what is being
    /// copied, unless the caller waits with [`Device::finish`] first.
    ///
    /// # Safety
    ///
    /// As for [`Device::follow`].
    pub unsafe fn precede(&self, direction: Direction, stream: u64) -> Result<(), CudaError> {
        let entered = self.context.enter()?;
        // SAFETY: this function's contract; used in this call only.
        let caller = unsafe { StreamHandle::new(stream) }?;
        caller.check_not_captured(&entered)?;
        match self.lane(direction).newest()? {
            Some(begun_so_far) => caller.follow(&entered, &begun_so_far),
            None => Ok(()),
        }
    }

    /// Begins a copy from the device's memory at `source`, as long as the landing's memory, and
    /// returns. The landing is notified of its end, or of why it could not begin, exactly once.
    /// Where its memory is not [pinned](crate::Pinned), the driver may wait until it has copied.
    ///
    /// It is notified when its batch is over, and a batch ends with [`Device::flush`],
    /// [`Device::precede`], [`Device::finish`], or when [`BATCH_BYTES`](crate::BATCH_BYTES) are in
    /// it. So **flush before you wait for a buffer that a landing returns**. In a forked child
    /// the landing is notified at once, by this thread.
    ///
    /// # Safety
    ///
    /// The bytes at `source` are memory of this device until the landing is notified.
    pub unsafe fn copy_down(&self, source: u64, mut landing: Box<dyn Landing>) {
        if let Err(error) = self.context.check_owner() {
            return Traveller::Landing(landing).notify(Err(error));
        }
        let memory = landing.memory();
        let (destination, bytes) = (memory.as_mut_ptr(), memory.len());
        self.down.begin(Traveller::Landing(landing), bytes, |entered, stream| {
            // SAFETY: the source by this function's contract; the destination is the landing's,
            // which the lane keeps until the stream has passed the copy.
            unsafe { stream.copy_down(entered, source, destination, bytes) }
        });
    }

    /// Begins a copy of the takeoff's memory to the device's at `destination`, and returns.
    /// Otherwise as [`Device::copy_down`].
    ///
    /// # Safety
    ///
    /// The bytes at `destination` are memory of this device until the takeoff is notified, and
    /// nobody else needs what they hold.
    pub unsafe fn copy_up(&self, takeoff: Box<dyn Takeoff>, destination: u64) {
        if let Err(error) = self.context.check_owner() {
            return Traveller::Takeoff(takeoff).notify(Err(error));
        }
        let memory = takeoff.memory();
        let (source, bytes) = (memory.as_ptr(), memory.len());
        self.up.begin(Traveller::Takeoff(takeoff), bytes, |entered, stream| {
            // SAFETY: the destination by this function's contract; the source is the takeoff's,
            // which the lane keeps until the stream has passed the copy.
            unsafe { stream.copy_up(entered, source, destination, bytes) }
        });
    }

    /// Begins a copy of `bytes` at `source` within the device, in order with the copies down, and
    /// returns where it will be.
    ///
    /// # Errors
    ///
    /// [`CudaError::OutOfMemory`], or [`CudaError::Call`] where the device cannot allocate in the
    /// order of a stream.
    ///
    /// # Safety
    ///
    /// The bytes at `source` are memory of this device until the copies down have
    /// [finished](Device::finish), or until a stream that frees them was made to
    /// [wait](Device::precede).
    pub unsafe fn clone_memory(
        &self,
        source: u64,
        bytes: usize,
    ) -> Result<DeviceBuffer, CudaError> {
        self.context.check_owner()?;
        let buffer = DeviceBuffer::allocate(self.down.stream(), bytes)?;
        if bytes > 0 {
            self.down.give(|entered, stream| {
                // SAFETY: the source by this function's contract; the destination is the buffer's,
                // which frees it behind this copy.
                unsafe { stream.copy_within(entered, source, buffer.address(), bytes) }
            })?;
        }
        Ok(buffer)
    }

    /// Ends the batch of `direction`: those whose copies were begun are notified as soon as these
    /// are over. Does not wait.
    ///
    /// # Errors
    ///
    /// [`CudaError::Forked`] in a forked child.
    pub fn flush(&self, direction: Direction) -> Result<(), CudaError> {
        self.context.check_owner()?;
        self.lane(direction).flush();
        Ok(())
    }

    /// Waits until everybody whose copy of `direction` was begun so far has been notified.
    ///
    /// # Errors
    ///
    /// [`CudaError::DeviceLost`], after everybody was notified; [`CudaError::InvalidArgument`] when
    /// called by a landing or takeoff of this direction, which would wait for itself. What became
    /// of each copy, its landing or takeoff is notified.
    pub fn finish(&self, direction: Direction) -> Result<(), CudaError> {
        self.context.check_owner()?;
        self.lane(direction).finish()
    }

    /// How many landings or takeoffs have not been notified yet. None in a forked child.
    pub fn pending(&self, direction: Direction) -> u64 {
        if self.context.check_owner().is_err() { 0 } else { self.lane(direction).pending() }
    }

    /// How much memory the device has, now.
    ///
    /// # Errors
    ///
    /// What the driver refuses.
    pub fn memory_info(&self) -> Result<MemoryInfo, CudaError> {
        self.context.enter()?.memory_info()
    }

    /// The same, once all copies down are over: memory that was freed behind them is free then.
    ///
    /// # Errors
    ///
    /// What the driver refuses.
    pub fn settled_memory_info(&self) -> Result<MemoryInfo, CudaError> {
        let entered = self.context.enter()?;
        self.come_to_rest(&entered)?;
        entered.memory_info()
    }

    /// An error once any call on the device, of this process, was told that it is lost.
    ///
    /// # Errors
    ///
    /// [`CudaError::DeviceLost`].
    pub fn check(&self) -> Result<(), CudaError> {
        self.context.check_loss()
    }

    /// Waits until all copies down are over, to see whether the device still works.
    pub(crate) fn come_to_rest(&self, entered: &Entered<'_>) -> Result<(), CudaError> {
        self.down.stream().synchronize(entered)
    }

    pub(crate) fn context(&self) -> &Arc<Context> {
        &self.context
    }

    fn lane(&self, direction: Direction) -> &Lane {
        match direction {
            Direction::Down => &self.down,
            Direction::Up => &self.up,
        }
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Takes no lock: a debug print in a forked child must not hang.
        formatter.debug_struct("Device").field("ordinal", &self.ordinal()).finish_non_exhaustive()
    }
}
