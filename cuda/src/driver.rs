//! The CUDA driver: found, checked and started once, without a panic whatever is missing.
//!
//! ```text
//! libcuda.so.1 -> its version -> every call that this crate makes -> cuInit -> how many devices
//!  NoDriver     DriverTooOld             DriverTooOld             NoDriver     NoSuchDevice
//! ```
//!
//! Always holds:
//! - The answer is found once per process and kept: a driver does not come or go while one runs.
//! - No call is made through a symbol that the library lacks.
//! - A call of the driver returns a number: see [`Code`].
//! - A child that was forked off while another thread looked for the driver does not wait for it.
//!
//! Why the calls are not made through cudarc's own functions: they panic where a symbol is missing,
//! they return an `enum` of the codes of CUDA 12.2, so that a newer driver's code would be
//! undefined behaviour, and they take a toolkit's stub for the driver where that is found first.
//! Their argument types, which come from NVIDIA's header, are checked against ours when this file
//! is compiled.
//!
//! Why `unsafe`: the driver is a library in C.
#![expect(unsafe_code, reason = "loads a library in C and calls it")]

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicI32, Ordering};

use cudarc::driver::sys::{
    self, CUcontext, CUdevice, CUdeviceptr, CUevent, CUstream, CUstreamCaptureMode,
    CUstreamCaptureStatus,
};
use libloading::os::unix::{Library, RTLD_NOW};
use rustix::process::{Pid, getpid};

use crate::CudaError;
use crate::error::{Code, NO_DEVICE, Refusal, SUCCESS};

/// CUDA 11.2, of December 2020: the first with `cuMemAllocAsync`. Every other call that this crate
/// makes is older.
const VERSION_MIN: u32 = 11_020;

/// What the driver's library is called; the first is the name by which torch loads it.
const LIBRARY_NAMES: [&str; 2] = ["libcuda.so.1", "libcuda.so"];

/// Loads nothing, but finds what is loaded (`dlopen(3)` of Linux).
const RTLD_NOLOAD: c_int = 4;

/// Declares the driver's calls: a struct of pointers, how they are found, and the proof that their
/// arguments are those of NVIDIA's header.
macro_rules! driver_calls {
    ($($name:ident($($argument:ty),*);)*) => {
        /// The driver's calls, each under the name of CUDA's documentation.
        #[expect(non_snake_case, reason = "CUDA's names")]
        pub(crate) struct Calls {
            $(pub(crate) $name: unsafe extern "C" fn($($argument),*) -> Code,)*
            cuGetErrorName: unsafe extern "C" fn(Code, *mut *const c_char) -> Code,
            cuGetErrorString: unsafe extern "C" fn(Code, *mut *const c_char) -> Code,
        }

        impl Calls {
            /// All calls, or the name of one that the library lacks.
            fn find() -> Result<Self, &'static str> {
                Ok(Self {
                    $($name: {
                        type Call = unsafe extern "C" fn($($argument),*) -> Code;
                        // SAFETY: the header's type, as the constants below prove.
                        unsafe { symbol::<Call>(stringify!($name)) }?
                    },)*
                    // SAFETY: the header's type; `CUresult` is represented as `u32`.
                    cuGetErrorName: unsafe { symbol("cuGetErrorName") }?,
                    // SAFETY: as above.
                    cuGetErrorString: unsafe { symbol("cuGetErrorString") }?,
                })
            }
        }

        $(const _: unsafe fn($($argument),*) -> sys::CUresult = sys::$name;)*
    };
}

driver_calls! {
    cuInit(c_uint);
    cuDeviceGetCount(*mut c_int);
    cuDeviceGet(*mut CUdevice, c_int);
    cuDevicePrimaryCtxRetain(*mut CUcontext, CUdevice);
    cuDevicePrimaryCtxRelease_v2(CUdevice);
    cuCtxPushCurrent_v2(CUcontext);
    cuCtxPopCurrent_v2(*mut CUcontext);
    cuThreadExchangeStreamCaptureMode(*mut CUstreamCaptureMode);
    cuStreamCreate(*mut CUstream, c_uint);
    cuStreamDestroy_v2(CUstream);
    cuStreamSynchronize(CUstream);
    cuStreamWaitEvent(CUstream, CUevent, c_uint);
    cuStreamIsCapturing(CUstream, *mut CUstreamCaptureStatus);
    cuEventCreate(*mut CUevent, c_uint);
    cuEventDestroy_v2(CUevent);
    cuEventRecord(CUevent, CUstream);
    cuEventSynchronize(CUevent);
    cuMemcpyDtoHAsync_v2(*mut c_void, CUdeviceptr, usize, CUstream);
    cuMemcpyHtoDAsync_v2(CUdeviceptr, *const c_void, usize, CUstream);
    cuMemcpyDtoDAsync_v2(CUdeviceptr, CUdeviceptr, usize, CUstream);
    cuMemAllocAsync(*mut CUdeviceptr, usize, CUstream);
    cuMemFreeAsync(CUdeviceptr, CUstream);
    cuMemGetInfo_v2(*mut usize, *mut usize);
    cuMemHostRegister_v2(*mut c_void, usize, c_uint);
    cuMemHostUnregister(*mut c_void);
}

impl Calls {
    /// `Ok` if `code`, which `call` returned, is success.
    pub(crate) fn check(&self, call: &'static str, code: Code) -> Result<(), Refusal> {
        if code == SUCCESS {
            return Ok(());
        }
        let name = describe(self.cuGetErrorName, code);
        let text = describe(self.cuGetErrorString, code);
        Err(Refusal { call, code, name, text })
    }

    fn start(&self) -> Result<(), CudaError> {
        // SAFETY: takes no pointer; may be called from any thread, any number of times.
        let code = unsafe { (self.cuInit)(0) };
        match self.check("cuInit", code) {
            Err(refusal) if refusal.code == NO_DEVICE => Err(no_device()),
            Err(refusal) => Err(CudaError::NoDriver { why: refusal.to_string() }),
            Ok(()) => Ok(()),
        }
    }

    fn count_devices(&self) -> Result<u32, CudaError> {
        let mut count: c_int = 0;
        // SAFETY: writes one integer to the pointer, which is valid for the call.
        let code = unsafe { (self.cuDeviceGetCount)(&raw mut count) };
        self.check("cuDeviceGetCount", code)
            .map_err(|refusal| CudaError::NoDriver { why: refusal.to_string() })?;
        u32::try_from(count).ok().filter(|count| *count > 0).ok_or_else(no_device)
    }
}

/// What is known of a driver that works.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Driver {
    /// The newest CUDA release that it serves: 1000 * major + 10 * minor.
    pub version: u32,
    /// How many devices this process can see: at least 1.
    pub devices: u32,
}

/// Looks for a driver, starts it, and counts the devices, on the first call; later ones repeat the
/// answer. The first call with a driver takes some hundred milliseconds.
///
/// # Errors
///
/// [`CudaError::NoDriver`], [`CudaError::DriverTooOld`] or [`CudaError::NoSuchDevice`] where no
/// device can be used, and [`CudaError::Forked`] in a child of the process that looked first.
pub fn probe() -> Result<Driver, CudaError> {
    loaded().map(|loaded| loaded.driver)
}

/// A driver that works, and its calls.
pub(crate) struct Loaded {
    pub(crate) calls: Calls,
    pub(crate) driver: Driver,
    /// The process that started it.
    pub(crate) owner: Pid,
}

/// The driver, loaded and started by the first call.
pub(crate) fn loaded() -> Result<&'static Loaded, CudaError> {
    static LOADED: OnceLock<Result<Loaded, CudaError>> = OnceLock::new();
    let found = if let Some(found) = LOADED.get() {
        found
    } else {
        claim()?;
        LOADED.get_or_init(load)
    };
    let loaded = found.as_ref().map_err(Clone::clone)?;
    check_owner(loaded.owner)?;
    Ok(loaded)
}

/// Lets this process look for the driver, unless it was forked off one that has begun to: the
/// thread that would end that is not here.
fn claim() -> Result<(), CudaError> {
    /// The process that looked first; 0 until one does.
    static SEEKER: AtomicI32 = AtomicI32::new(0);
    let own = getpid();
    match SEEKER.compare_exchange(0, own.as_raw_pid(), Ordering::Relaxed, Ordering::Relaxed) {
        Ok(_) => Ok(()),
        Err(seeker) => check_owner(Pid::from_raw(seeker).unwrap_or(own)),
    }
}

/// `Ok` in the process `owner`, an error in a child of it.
pub(crate) fn check_owner(owner: Pid) -> Result<(), CudaError> {
    let child = getpid();
    if child == owner {
        return Ok(());
    }
    Err(CudaError::Forked { owner: owner.as_raw_pid(), child: child.as_raw_pid() })
}

fn load() -> Result<Loaded, CudaError> {
    if library().is_none() {
        let why = "the system has no library `libcuda.so.1`".to_owned();
        return Err(CudaError::NoDriver { why });
    }
    // Before all other calls: whether the library has those is a question of its version.
    let version = version()?;
    if version < VERSION_MIN {
        return Err(too_old(format!("a driver for CUDA {}", release(version))));
    }
    let calls = Calls::find().map_err(|missing| too_old(format!("one without `{missing}`")))?;
    calls.start()?;
    let driver = Driver { version, devices: calls.count_devices()? };
    tracing::debug!(version, devices = driver.devices, "the CUDA driver has started");
    Ok(Loaded { calls, driver, owner: getpid() })
}

fn version() -> Result<u32, CudaError> {
    type GetVersion = unsafe extern "C" fn(*mut c_int) -> Code;
    const _: unsafe fn(*mut c_int) -> sys::CUresult = sys::cuDriverGetVersion;
    let no_driver = |why: String| CudaError::NoDriver { why };
    // SAFETY: the header's type, as the constant proves.
    let get_version = unsafe { symbol::<GetVersion>("cuDriverGetVersion") }
        .map_err(|missing| no_driver(format!("the library `libcuda` lacks `{missing}`")))?;
    let mut version: c_int = 0;
    // SAFETY: writes one integer to the pointer, which is valid for the call; needs no `cuInit`.
    let code = unsafe { get_version(&raw mut version) };
    u32::try_from(version).ok().filter(|_| code == SUCCESS).ok_or_else(|| {
        no_driver(format!("`cuDriverGetVersion` returned {code} and version {version}"))
    })
}

/// The driver's library, which stays loaded for the process's life: the one that this process has
/// already, under whichever name, because another one, such as a toolkit's stub that is made to be
/// linked with, would be a driver of its own, without the contexts that the tensors are in.
fn library() -> Option<&'static Library> {
    static LIBRARY: OnceLock<Option<Library>> = OnceLock::new();
    let open = |flags| {
        move |name| {
            // SAFETY: runs the initialisers of a library that is called so, which is what a driver
            // is found by.
            unsafe { Library::open(Some(name), flags) }.ok()
        }
    };
    let find = || {
        let loaded = LIBRARY_NAMES.into_iter().find_map(open(RTLD_NOW | RTLD_NOLOAD));
        loaded.or_else(|| LIBRARY_NAMES.into_iter().find_map(open(RTLD_NOW)))
    };
    LIBRARY.get_or_init(find).as_ref()
}

/// The function `name` of the driver, or the name again.
///
/// # Safety
///
/// `F` is the type of a pointer to that function.
unsafe fn symbol<F: Copy>(name: &'static str) -> Result<F, &'static str> {
    let library = library().ok_or(name)?;
    // SAFETY: this function's contract; the library stays loaded for the process's life.
    let symbol = unsafe { library.get::<F>(name) };
    symbol.map(|symbol| *symbol).map_err(|_| name)
}

/// What the driver says about `code`.
fn describe(ask: unsafe extern "C" fn(Code, *mut *const c_char) -> Code, code: Code) -> String {
    let mut text: *const c_char = ptr::null();
    // SAFETY: writes one pointer to the pointer, which is valid for the call.
    let asked = unsafe { ask(code, &raw mut text) };
    if asked != SUCCESS || text.is_null() {
        return "a code that the driver does not explain".to_owned();
    }
    // SAFETY: on success it is a string of the driver's own, which ends in 0 and is never freed.
    unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
}

fn too_old(found: String) -> CudaError {
    let needed = format!("one for CUDA {} or newer", release(VERSION_MIN));
    CudaError::DriverTooOld { found, needed }
}

fn no_device() -> CudaError {
    CudaError::NoSuchDevice { ordinal: 0, devices: 0 }
}

/// `version` as people write it.
fn release(version: u32) -> String {
    format!("{}.{}", version / 1000, version % 1000 / 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_release_is_written_as_people_do() {
        assert_eq!((release(11_020), release(12_080)), ("11.2".to_owned(), "12.8".to_owned()));
    }
}
