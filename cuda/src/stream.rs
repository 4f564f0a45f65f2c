//! Streams and events: work that a device does in order, and the marks in it.
//!
//! ```text
//! stream   | copy | copy | event | copy |        the device works from left to right
//!                            ^ a thread, or another stream, waits here
//! ```
//!
//! Always holds:
//! - No function here waits for the device but [`Event::wait`] and [`Stream::synchronize`], and
//!   [`Stream::allocate`] where the driver refuses without a reason.
//! - A stream of ours has no implicit order with the legacy default stream, on which torch works by
//!   default: every order is an event's.
//! - Events carry no timestamps, and a thread that waits for one sleeps.
//!
//! Why `unsafe`: every call of the driver is one in C.
#![expect(unsafe_code, reason = "calls the driver, which is a library in C")]

use std::ptr;
use std::sync::Arc;

use cudarc::driver::sys::{
    CUevent, CUevent_flags, CUstream, CUstream_flags, CUstreamCaptureStatus,
};

use crate::context::{Context, Entered};
use crate::error::CudaError;

/// A stream of anybody, by its handle. It can be asked for its place and told to wait.
#[derive(Clone, Copy)]
pub(crate) struct StreamHandle(CUstream);

impl StreamHandle {
    /// The stream that torch calls `raw`; 0 is the legacy default stream.
    ///
    /// # Safety
    ///
    /// It is a stream of the context that this will be used with, and lives as long as this.
    pub(crate) unsafe fn new(raw: u64) -> Result<Self, CudaError> {
        let address = usize::try_from(raw).map_err(|_| {
            CudaError::invalid(format!("stream {raw:#x}"), "it is not an address of this machine")
        })?;
        Ok(Self(ptr::with_exposed_provenance_mut(address)))
    }

    /// Refuses a stream on which a CUDA graph is being captured.
    pub(crate) fn check_not_captured(self, entered: &Entered<'_>) -> Result<(), CudaError> {
        let context = entered.context();
        let mut status: u32 = 0;
        let status_pointer = (&raw mut status).cast::<CUstreamCaptureStatus>();
        // SAFETY: a live stream, see `new`; writes one number of 32 bits to the pointer, which is
        // valid for the call; it is a number here, so that every value is valid.
        let code = unsafe { (context.calls().cuStreamIsCapturing)(self.0, status_pointer) };
        match context.check("cuStreamIsCapturing", code) {
            // The legacy default stream cannot even be asked while a graph is being captured.
            Err(CudaError::Call { refusal }) if refusal.code == CAPTURE_IMPLICIT => {
                Err(CudaError::StreamCaptured)
            }
            Err(error) => Err(error),
            Ok(()) if status != NOT_CAPTURED => Err(CudaError::StreamCaptured),
            Ok(()) => Ok(()),
        }
    }

    /// A mark behind all that the stream was given so far.
    pub(crate) fn record(self, entered: &Entered<'_>) -> Result<Event, CudaError> {
        let event = Event::new(entered)?;
        let context = entered.context();
        // SAFETY: a live event and a live stream, see `new`, of the context that is current.
        let code = unsafe { (context.calls().cuEventRecord)(event.handle, self.0) };
        context.check("cuEventRecord", code)?;
        Ok(event)
    }

    /// What the stream is given from now on waits for `event`, on the device.
    pub(crate) fn follow(self, entered: &Entered<'_>, event: &Event) -> Result<(), CudaError> {
        let context = entered.context();
        // SAFETY: a live stream, see `new`, and a live event; the driver keeps what it needs of the
        // event should it be destroyed before it is reached.
        let code = unsafe { (context.calls().cuStreamWaitEvent)(self.0, event.handle, 0) };
        context.check("cuStreamWaitEvent", code)
    }
}

const CAPTURE_IMPLICIT: u32 = 906;
const NOT_CAPTURED: u32 = CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE as u32;

/// A stream of ours.
pub(crate) struct Stream {
    context: Arc<Context>,
    handle: StreamHandle,
}

// SAFETY: the driver's handles belong to the process, not to a thread.
unsafe impl Send for Stream {}
// SAFETY: the driver's calls may be made by several threads at once.
unsafe impl Sync for Stream {}

impl Stream {
    pub(crate) fn new(entered: &Entered<'_>) -> Result<Self, CudaError> {
        let context = entered.context();
        let flags = CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        let mut handle: CUstream = ptr::null_mut();
        // SAFETY: writes one pointer to the pointer, which is valid for the call.
        let code = unsafe { (context.calls().cuStreamCreate)(&raw mut handle, flags) };
        context.check("cuStreamCreate", code)?;
        Ok(Self { context: Arc::clone(context), handle: StreamHandle(handle) })
    }

    pub(crate) fn context(&self) -> &Arc<Context> {
        &self.context
    }

    pub(crate) fn handle(&self) -> StreamHandle {
        self.handle
    }

    /// Waits until all that the stream was given is done.
    pub(crate) fn synchronize(&self, _entered: &Entered<'_>) -> Result<(), CudaError> {
        // SAFETY: our own live stream.
        let code = unsafe { (self.context.calls().cuStreamSynchronize)(self.handle.0) };
        self.context.check("cuStreamSynchronize", code)
    }

    /// Begins a copy of `bytes` from the device's `source` to the host's `destination`.
    ///
    /// # Safety
    ///
    /// Until the stream has passed the copy, `bytes` at `source` are memory of the device and
    /// `bytes` at `destination` belong to nobody else.
    pub(crate) unsafe fn copy_down(
        &self,
        _entered: &Entered<'_>,
        source: u64,
        destination: *mut u8,
        bytes: usize,
    ) -> Result<(), CudaError> {
        let (calls, stream) = (self.context.calls(), self.handle.0);
        // SAFETY: this function's contract, and our own live stream.
        let code =
            unsafe { (calls.cuMemcpyDtoHAsync_v2)(destination.cast(), source, bytes, stream) };
        self.context.check("cuMemcpyDtoHAsync_v2", code)
    }

    /// Begins a copy of `bytes` from the host's `source` to the device's `destination`.
    ///
    /// # Safety
    ///
    /// Until the stream has passed the copy, `bytes` at `source` are not written to, and `bytes` at
    /// `destination` are memory of the device that nobody else needs.
    pub(crate) unsafe fn copy_up(
        &self,
        _entered: &Entered<'_>,
        source: *const u8,
        destination: u64,
        bytes: usize,
    ) -> Result<(), CudaError> {
        let (calls, stream) = (self.context.calls(), self.handle.0);
        // SAFETY: this function's contract, and our own live stream.
        let code =
            unsafe { (calls.cuMemcpyHtoDAsync_v2)(destination, source.cast(), bytes, stream) };
        self.context.check("cuMemcpyHtoDAsync_v2", code)
    }

    /// Begins a copy of `bytes` within the device.
    ///
    /// # Safety
    ///
    /// Until the stream has passed the copy, `bytes` at `source` and at `destination` are memory of
    /// the device, and nobody else needs those at `destination`.
    pub(crate) unsafe fn copy_within(
        &self,
        _entered: &Entered<'_>,
        source: u64,
        destination: u64,
        bytes: usize,
    ) -> Result<(), CudaError> {
        let (calls, stream) = (self.context.calls(), self.handle.0);
        // SAFETY: this function's contract, and our own live stream.
        let code = unsafe { (calls.cuMemcpyDtoDAsync_v2)(destination, source, bytes, stream) };
        self.context.check("cuMemcpyDtoDAsync_v2", code)
    }

    /// The address of `bytes` of the device that may be used in this stream from now on.
    pub(crate) fn allocate(&self, entered: &Entered<'_>, bytes: usize) -> Result<u64, CudaError> {
        let mut address: u64 = 0;
        // SAFETY: writes one address to the pointer, which is valid for the call.
        let code = unsafe {
            (self.context.calls().cuMemAllocAsync)(&raw mut address, bytes, self.handle.0)
        };
        self.context.check_memory("cuMemAllocAsync", code, || self.synchronize(entered))?;
        Ok(address)
    }

    /// Frees memory once the stream has passed all that it was given so far.
    ///
    /// # Safety
    ///
    /// `address` came from [`Stream::allocate`], is freed once, and what uses it was given to this
    /// stream before.
    pub(crate) unsafe fn free(&self, _entered: &Entered<'_>, address: u64) {
        self.context.tidy_up("cuMemFreeAsync", |calls| {
            // SAFETY: this function's contract, and our own live stream.
            unsafe { (calls.cuMemFreeAsync)(address, self.handle.0) }
        });
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.context.tidy_up("cuStreamDestroy_v2", |calls| {
            // SAFETY: our own stream, destroyed once; the driver finishes what it was given.
            unsafe { (calls.cuStreamDestroy_v2)(self.handle.0) }
        });
    }
}

/// A mark in a stream.
pub(crate) struct Event {
    context: Arc<Context>,
    handle: CUevent,
}

// SAFETY: the driver's handles belong to the process, not to a thread.
unsafe impl Send for Event {}
// SAFETY: the driver's calls may be made by several threads at once.
unsafe impl Sync for Event {}

impl Event {
    fn new(entered: &Entered<'_>) -> Result<Self, CudaError> {
        let context = entered.context();
        let flags = CUevent_flags::CU_EVENT_BLOCKING_SYNC as u32
            | CUevent_flags::CU_EVENT_DISABLE_TIMING as u32;
        let mut handle: CUevent = ptr::null_mut();
        // SAFETY: writes one pointer to the pointer, which is valid for the call.
        let code = unsafe { (context.calls().cuEventCreate)(&raw mut handle, flags) };
        context.check("cuEventCreate", code)?;
        Ok(Self { context: Arc::clone(context), handle })
    }

    /// Waits until the stream has passed the mark.
    pub(crate) fn wait(&self, _entered: &Entered<'_>) -> Result<(), CudaError> {
        // SAFETY: our own live event.
        let code = unsafe { (self.context.calls().cuEventSynchronize)(self.handle) };
        self.context.check("cuEventSynchronize", code)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        self.context.tidy_up("cuEventDestroy_v2", |calls| {
            // SAFETY: our own event, destroyed once; the driver keeps what waiting streams need.
            unsafe { (calls.cuEventDestroy_v2)(self.handle) }
        });
    }
}
