//! The stand-in for `libcuda.so`: built, loaded in its place, and controlled.
//!
//! Always holds: it is loaded once per process, before the crate looks for a driver. The dynamic
//! loader then gives it to every caller that asks for `libcuda.so`, because that is the name it
//! carries.
//!
//! Why `unsafe`: it is a library in C.
#![expect(unsafe_code, reason = "loads a library in C and calls it")]

use std::env;
use std::ffi::{CStr, OsStr, c_char, c_int, c_uint, c_void};
use std::path::Path;
use std::process::Command;
use std::ptr;
use std::sync::OnceLock;

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};
use rustix::process::{Pid, WaitOptions, waitpid};

/// A call of the driver that the stand-in is built without, for a process of its own.
pub(crate) const WITHOUT: &str = "DTR_CUDA_STAND_IN_WITHOUT";

/// What has happened, and what exists now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct Counters {
    pub(crate) copies_run: u64,
    pub(crate) bytes_copied: u64,
    pub(crate) pageable_copies: u64,
    pub(crate) failures: u64,
    pub(crate) live_streams: u64,
    pub(crate) live_events: u64,
    pub(crate) contexts_retained: u64,
    pub(crate) bytes_allocated: u64,
    pub(crate) bytes_registered: u64,
}

/// Declares the controls: pointers, how they are found, and how they are called.
macro_rules! controls {
    ($($symbol:ident => $name:ident($($argument:ident: $type:ty),*) $(-> $result:ty)?;)*) => {
        /// The stand-in's controls; what each does is said in `cuda.c`.
        pub(crate) struct StandIn {
            $($name: unsafe extern "C" fn($($type),*) $(-> $result)?,)*
        }

        impl StandIn {
            fn find(library: &Library) -> Self {
                Self {
                    $($name: {
                        type Control = unsafe extern "C" fn($($type),*) $(-> $result)?;
                        // SAFETY: the type of the function in `cuda.c`.
                        *unsafe { library.get::<Control>(stringify!($symbol)) }.unwrap()
                    },)*
                }
            }

            $(pub(crate) fn $name(&self, $($argument: $type),*) $(-> $result)? {
                // SAFETY: every handle and address that a test has came from the stand-in, and the
                // memory behind pointers outlives the call.
                unsafe { (self.$name)($($argument),*) }
            })*
        }
    };
}

controls! {
    stand_in_set_up => set_up(version: c_int, devices: c_int);
    stand_in_allocate => allocate(device: c_int, bytes: usize) -> u64;
    stand_in_free => free(address: u64);
    stand_in_make_stream => make_stream(device: c_int) -> u64;
    stand_in_legacy_stream => legacy_stream(device: c_int) -> u64;
    stand_in_end_stream => end_stream(stream: u64);
    stand_in_write => write(stream: u64, to: u64, from: *const c_void, bytes: usize);
    stand_in_hold => hold(stream: u64, is_held: bool);
    stand_in_hold_copies => hold_copies(are_held: bool);
    stand_in_hold_call => hold_named(name: *const c_char);
    stand_in_capture => capture(stream: u64, is_captured: bool);
    stand_in_settle => settle();
    stand_in_delay_copies => delay_copies(microseconds: c_int);
    stand_in_fail => fail_named(name: *const c_char, nth: u64, times: u64, code: u32);
    stand_in_lose => lose(device: c_int, code: u32);
    stand_in_count => count_into(counters: *mut Counters);
    stand_in_calls => calls_named(name: *const c_char) -> u64;
    stand_in_all_calls => all_calls() -> u64;
    stand_in_pushed => pushed() -> c_int;
    stand_in_capture_mode => capture_mode() -> u32;
    stand_in_reset => reset();
}

impl StandIn {
    /// The stand-in, loaded by the first call.
    pub(crate) fn get() -> &'static Self {
        static LOADED: OnceLock<StandIn> = OnceLock::new();
        LOADED.get_or_init(load)
    }

    /// Lets the `nth` call of `name` from now fail with `code`, and the next ones: `times` in all.
    pub(crate) fn fail(&self, name: &'static CStr, nth: u64, times: u64, code: u32) {
        self.fail_named(name.as_ptr(), nth, times, code);
    }

    /// Lets calls of `name` wait until another one, or none, is held.
    pub(crate) fn hold_call(&self, name: Option<&'static CStr>) {
        self.hold_named(name.map_or(ptr::null(), CStr::as_ptr));
    }

    /// How often `name` was called.
    pub(crate) fn calls(&self, name: &'static CStr) -> u64 {
        self.calls_named(name.as_ptr())
    }

    pub(crate) fn count(&self) -> Counters {
        let mut counters = Counters::default();
        self.count_into(&raw mut counters);
        counters
    }
}

fn load() -> StandIn {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("libcuda.so");
    build(&file);
    // SAFETY: the stand-in's initialiser does no more than to name what a fork must do.
    let library = unsafe { Library::open(Some(&file), RTLD_NOW | RTLD_GLOBAL) }.unwrap();
    let stand_in = StandIn::find(&library);
    // Loaded for the process's life, as the driver is.
    std::mem::forget(library);
    stand_in
}

fn build(file: &Path) {
    let compiler = env::var("CC").unwrap_or_else(|_| "cc".to_owned());
    let mut command = Command::new(&compiler);
    command.args(["-shared", "-fPIC", "-O1", "-pthread", "-Wl,-soname,libcuda.so"]);
    command.args([OsStr::new("-o"), file.as_os_str()]);
    command.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/stand_in/cuda.c"));
    if let Ok(call) = env::var(WITHOUT) {
        command.arg(format!("-D{call}=lacking_{call}"));
    }
    let output = command.output().unwrap_or_else(|error| panic!("running `{compiler}`: {error}"));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// Whatever a child does takes less.
const CHILD_SECONDS: c_uint = 60;

/// What `run` says in a child that was forked off, where the threads of this process are not.
pub(crate) fn in_forked_child(run: impl FnOnce() -> bool) -> bool {
    let own = Library::this();
    // SAFETY: the type of `fork` of the C library.
    let fork = *unsafe { own.get::<unsafe extern "C" fn() -> c_int>("fork") }.unwrap();
    // SAFETY: the type of `alarm` of the C library.
    let alarm = *unsafe { own.get::<unsafe extern "C" fn(c_uint) -> c_uint>("alarm") }.unwrap();
    // SAFETY: the type of `_exit` of the C library.
    let exit = *unsafe { own.get::<unsafe extern "C" fn(c_int) -> !>("_exit") }.unwrap();
    // SAFETY: the child runs `run`, which waits for no thread of the parent, and ends.
    match unsafe { fork() } {
        0 => {
            // SAFETY: ends this child by a signal, should it wait for what never comes.
            unsafe { alarm(CHILD_SECONDS) };
            let is_good = std::panic::catch_unwind(std::panic::AssertUnwindSafe(run));
            // SAFETY: ends the child without the destructors that are the parent's.
            unsafe { exit(c_int::from(!is_good.unwrap_or(false))) }
        }
        child => {
            let child = Pid::from_raw(child).expect("fork gives the child's number");
            let ended = waitpid(Some(child), WaitOptions::empty()).unwrap();
            ended.is_some_and(|(_, status)| status.exit_status() == Some(0))
        }
    }
}
