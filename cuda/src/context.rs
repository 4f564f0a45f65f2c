//! A device's primary context: the one that torch uses too, so that addresses and streams of torch
//! mean the same here.
//!
//! Always holds:
//! - The context is current on a thread of the caller only during a call of this crate: what was
//!   current before is so again afterwards. [`Entered`] is the proof that it is.
//! - Its flags are never set: they are torch's.
//! - A loss of the device that any call reported is remembered, and later calls are not tried.
//! - In a forked child the driver is never called.
//!
//! Why `unsafe`: every call of the driver is one in C.
#![expect(unsafe_code, reason = "calls the driver, which is a library in C")]

use std::fmt;
use std::marker::PhantomData;
use std::ptr;
use std::sync::{Arc, OnceLock};

use cudarc::driver::sys::{CUcontext, CUdevice, CUstreamCaptureMode};
use rustix::process::Pid;

use crate::driver::{Calls, check_owner, loaded};
use crate::error::{Code, CudaError, UNKNOWN};

/// How much memory a device has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryInfo {
    /// Bytes that nobody has allocated, in any process. What torch keeps in its cache counts as
    /// allocated.
    pub free_bytes: usize,
    /// Bytes that there are.
    pub total_bytes: usize,
}

/// A reference to a device's primary context, released when it is dropped.
pub(crate) struct Context {
    calls: &'static Calls,
    handle: CUcontext,
    device: CUdevice,
    ordinal: u32,
    owner: Pid,
    loss: OnceLock<CudaError>,
}

// SAFETY: the driver's handles belong to the process, not to a thread.
unsafe impl Send for Context {}
// SAFETY: the driver's calls may be made by several threads at once.
unsafe impl Sync for Context {}

impl Context {
    /// The primary context of device `ordinal`, which is made if this process has none yet.
    pub(crate) fn retain(ordinal: u32) -> Result<Arc<Self>, CudaError> {
        let loaded = loaded()?;
        let devices = loaded.driver.devices;
        let no_such_device = || CudaError::NoSuchDevice { ordinal, devices };
        let index = i32::try_from(ordinal).map_err(|_| no_such_device())?;
        if ordinal >= devices {
            return Err(no_such_device());
        }
        let calls = &loaded.calls;
        let refused = |refusal| CudaError::refused(ordinal, refusal);
        let mut device: CUdevice = 0;
        // SAFETY: writes one number to the pointer, which is valid for the call.
        let code = unsafe { (calls.cuDeviceGet)(&raw mut device, index) };
        calls.check("cuDeviceGet", code).map_err(refused)?;
        let mut handle: CUcontext = ptr::null_mut();
        // SAFETY: writes one pointer to the pointer, which is valid for the call.
        let code = unsafe { (calls.cuDevicePrimaryCtxRetain)(&raw mut handle, device) };
        calls.check("cuDevicePrimaryCtxRetain", code).map_err(refused)?;
        let loss = OnceLock::new();
        Ok(Arc::new(Self { calls, handle, device, ordinal, owner: loaded.owner, loss }))
    }

    /// Makes the context current on this thread, until the result is dropped.
    pub(crate) fn enter(self: &Arc<Self>) -> Result<Entered<'_>, CudaError> {
        self.check_owner()?;
        self.check_loss()?;
        self.push()
    }

    /// The same to free something, which is worth a try even when the device is lost.
    pub(crate) fn enter_to_tidy_up(self: &Arc<Self>) -> Option<Entered<'_>> {
        self.check_owner().ok()?;
        let entered = self.push();
        entered.inspect_err(|error| tracing::warn!(%error, "a context was not entered")).ok()
    }

    fn push(self: &Arc<Self>) -> Result<Entered<'_>, CudaError> {
        // SAFETY: the handle is retained.
        let code = unsafe { (self.calls.cuCtxPushCurrent_v2)(self.handle) };
        self.check("cuCtxPushCurrent_v2", code)?;
        // From here on the drop of `entered` undoes the push.
        let mut entered = Entered { context: self, previous_mode: None, thread: PhantomData };
        entered.previous_mode = Some(self.exchange_mode(CAPTURE_MODE_RELAXED)?);
        Ok(entered)
    }

    /// Device's number, counted from 0.
    pub(crate) fn ordinal(&self) -> u32 {
        self.ordinal
    }

    pub(crate) fn calls(&self) -> &'static Calls {
        self.calls
    }

    /// An error in a forked child.
    pub(crate) fn check_owner(&self) -> Result<(), CudaError> {
        check_owner(self.owner)
    }

    /// An error once the device was lost.
    pub(crate) fn check_loss(&self) -> Result<(), CudaError> {
        self.loss.get().map_or(Ok(()), |loss| Err(loss.clone()))
    }

    /// `Ok` if `code`, which `call` returned, is success; a loss of the device is remembered.
    pub(crate) fn check(&self, call: &'static str, code: Code) -> Result<(), CudaError> {
        self.calls.check(call, code).map_err(|refusal| {
            let error = CudaError::refused(self.ordinal, refusal);
            if error.is_device_lost() {
                self.remember_loss(&error);
            }
            error
        })
    }

    /// The same for a call that asks for memory, to which drivers in some containers say
    /// `CUDA_ERROR_UNKNOWN` for want of a better word: that is a loss only if the device does not
    /// `answer` either. Else there is no such memory.
    pub(crate) fn check_memory(
        &self,
        call: &'static str,
        code: Code,
        answer: impl FnOnce() -> Result<(), CudaError>,
    ) -> Result<(), CudaError> {
        if code != UNKNOWN || answer().is_err() {
            return self.check(call, code);
        }
        let refused = self.calls.check(call, code);
        refused.map_err(|refusal| CudaError::OutOfMemory { refusal })
    }

    /// Counts the device as lost because of `error`, which says more than that something failed:
    /// that nobody can know any more what the device does.
    pub(crate) fn give_up(&self, error: &CudaError) {
        let loss = match error {
            CudaError::Call { refusal } | CudaError::OutOfMemory { refusal } => {
                CudaError::DeviceLost { ordinal: self.ordinal, refusal: refusal.clone() }
            }
            other => other.clone(),
        };
        self.remember_loss(&loss);
    }

    /// Does the last thing for something of this context, `call`, in the process that has it; a
    /// destructor has nowhere to report a failure but the log.
    pub(crate) fn tidy_up(&self, call: &'static str, run: impl FnOnce(&Calls) -> Code) {
        if self.check_owner().is_err() {
            return;
        }
        if let Err(error) = self.check(call, run(self.calls)) {
            tracing::warn!(ordinal = self.ordinal, %error, "something of a device was not freed");
        }
    }

    fn remember_loss(&self, loss: &CudaError) {
        if self.loss.set(loss.clone()).is_ok() {
            tracing::error!(ordinal = self.ordinal, %loss, "a CUDA device was lost");
        }
    }

    /// Sets the thread's mode and returns the one it had.
    fn exchange_mode(&self, mode: u32) -> Result<u32, CudaError> {
        let mut mode = mode;
        let mode_pointer = (&raw mut mode).cast::<CUstreamCaptureMode>();
        // SAFETY: reads and writes one number of 32 bits at the pointer, which is valid for the
        // call; it is a number here, so that every value that comes back is valid.
        let code = unsafe { (self.calls.cuThreadExchangeStreamCaptureMode)(mode_pointer) };
        self.check("cuThreadExchangeStreamCaptureMode", code)?;
        Ok(mode)
    }
}

/// In this mode a thread may wait for events and register memory while another one captures a CUDA
/// graph; in the default mode that would spoil the other thread's capture.
const CAPTURE_MODE_RELAXED: u32 = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED as u32;

impl Drop for Context {
    fn drop(&mut self) {
        self.tidy_up("cuDevicePrimaryCtxRelease_v2", |calls| {
            // SAFETY: retained once, released once; nothing of the context is used after it.
            unsafe { (calls.cuDevicePrimaryCtxRelease_v2)(self.device) }
        });
    }
}

impl fmt::Debug for Context {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Context").field("ordinal", &self.ordinal).finish_non_exhaustive()
    }
}

/// The proof that a context is current on this thread; what was current before is so again when
/// this is dropped.
pub(crate) struct Entered<'a> {
    context: &'a Arc<Context>,
    /// The thread's capture mode before, once it was changed.
    previous_mode: Option<u32>,
    /// A context is current on one thread: this may not go to another.
    thread: PhantomData<*const ()>,
}

impl<'a> Entered<'a> {
    pub(crate) fn context(&self) -> &'a Arc<Context> {
        self.context
    }

    pub(crate) fn memory_info(&self) -> Result<MemoryInfo, CudaError> {
        let (mut free_bytes, mut total_bytes) = (0, 0);
        let calls = self.context.calls;
        // SAFETY: writes a number to each pointer, which are valid for the call.
        let code = unsafe { (calls.cuMemGetInfo_v2)(&raw mut free_bytes, &raw mut total_bytes) };
        self.context.check("cuMemGetInfo_v2", code)?;
        Ok(MemoryInfo { free_bytes, total_bytes })
    }
}

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        if let Some(Err(error)) = self.previous_mode.map(|mode| self.context.exchange_mode(mode)) {
            tracing::warn!(%error, "a thread's capture mode was not restored");
        }
        self.context.tidy_up("cuCtxPopCurrent_v2", |calls| {
            let mut popped: CUcontext = ptr::null_mut();
            // SAFETY: writes one pointer to the pointer, which is valid for the call.
            unsafe { (calls.cuCtxPopCurrent_v2)(&raw mut popped) }
        });
    }
}
