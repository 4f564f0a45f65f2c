//! Every way that work with a device can fail, as variants chosen by what the caller does next.
//!
//! Always holds:
//! - A message says what was being done, why it failed, and, on a line of its own that begins with
//!   `hint: `, how to go on.
//! - What the driver said is kept as its number: a newer driver may return codes that nobody here
//!   has a name for.

use std::fmt;

/// A code of CUDA, as a number; `CUresult` of the header that we build with would be an invalid
/// value for a code that is newer than the header.
pub(crate) type Code = u32;

pub(crate) const SUCCESS: Code = 0;
pub(crate) const NO_DEVICE: Code = 100;
pub(crate) const UNKNOWN: Code = 999;

const OUT_OF_MEMORY: Code = 2;
const MAP_FAILED: Code = 205;
const OPERATING_SYSTEM: Code = 304;
const ALREADY_REGISTERED: Code = 712;
const NOT_PERMITTED: Code = 800;

/// Codes after which CUDA documents that the context can do nothing any more, and that every later
/// call fails. `CUDA_ERROR_UNKNOWN` is counted in: nothing can be trusted after it, unless the
/// device answers all the same (`Context::check_memory`).
const STICKY: &[Code] = &[
    4,   // DEINITIALIZED
    214, // ECC_UNCORRECTABLE
    220, // NVLINK_UNCORRECTABLE
    226, // CONTAINED
    700, // ILLEGAL_ADDRESS
    702, // LAUNCH_TIMEOUT
    709, // CONTEXT_IS_DESTROYED
    710, // ASSERT
    714, // HARDWARE_STACK_ERROR
    715, // ILLEGAL_INSTRUCTION
    716, // MISALIGNED_ADDRESS
    717, // INVALID_ADDRESS_SPACE
    718, // INVALID_PC
    719, // LAUNCH_FAILED
    721, // TENSOR_MEMORY_LEAK
    UNKNOWN,
];

/// An error of this crate. The variant says what to do; the fields say what happened.
///
/// It can be cloned, because one lost device is reported to everybody who waits for it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum CudaError {
    /// Go on without a device: there is no driver, or it cannot start.
    NoDriver {
        /// What was looked for, or what the driver said.
        why: String,
    },
    /// Go on without a device, or update the driver.
    DriverTooOld {
        /// The CUDA release that the driver serves, or the call that it lacks.
        found: String,
        /// What this crate needs.
        needed: String,
    },
    /// Go on without a device, or name another one.
    NoSuchDevice {
        /// The device that was asked for, counted from 0.
        ordinal: u32,
        /// How many devices the process can see.
        devices: u32,
    },
    /// Copy through memory that is not pinned, or pin less: the system refused to pin memory.
    OutOfPinnedMemory {
        /// Bytes that were to be pinned.
        bytes: usize,
        /// What the driver said.
        refusal: Refusal,
    },
    /// Fix the call: some of the memory is pinned already.
    AlreadyPinned {
        /// Where the memory begins.
        address: usize,
        /// Bytes that were to be pinned.
        bytes: usize,
        /// What the driver said.
        refusal: Refusal,
    },
    /// Ask for less: the device, or the driver itself, has no memory left.
    OutOfMemory {
        /// What the driver said.
        refusal: Refusal,
    },
    /// End the process and restore a checkpoint: the device's state is gone, for torch as well.
    DeviceLost {
        /// The device, counted from 0.
        ordinal: u32,
        /// The call that failed first.
        refusal: Refusal,
    },
    /// Wait until the capture of a CUDA graph has ended: a copy would become part of the graph.
    StreamCaptured,
    /// Fix the program: a process that was forked off cannot use its parent's driver.
    Forked {
        /// The process that started the driver.
        owner: i32,
        /// The process that called.
        child: i32,
    },
    /// Fix the call.
    InvalidArgument {
        /// The call, with its argument.
        what: String,
        /// Expected against actual.
        why: String,
    },
    /// Raise a limit of the process: the operating system refused something.
    System {
        /// What was being done.
        what: String,
        /// What the operating system said.
        why: String,
    },
    /// Retry, or report it: the driver refused a call for another reason.
    Call {
        /// What the driver said.
        refusal: Refusal,
    },
}

impl fmt::Display for CudaError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (what, why, hint) = self.parts();
        write!(formatter, "{what}: {why}\nhint: {hint}")
    }
}

impl std::error::Error for CudaError {}

impl CudaError {
    /// What the message is made of: what was being done, why it failed, and how to go on.
    pub fn parts(&self) -> (String, String, &'static str) {
        let (what, why) = match self {
            Self::NoDriver { why } => ("starting the CUDA driver".into(), why.clone()),
            Self::DriverTooOld { found, needed } => {
                ("starting the CUDA driver".into(), format!("found {found}, expected {needed}"))
            }
            Self::NoSuchDevice { ordinal, devices } => {
                let why = format!("the driver sees {devices} devices");
                (format!("opening CUDA device {ordinal}"), why)
            }
            Self::OutOfPinnedMemory { bytes, refusal } => {
                (format!("pinning {bytes} bytes of memory"), refusal.to_string())
            }
            Self::AlreadyPinned { address, bytes, refusal } => {
                (format!("pinning {bytes} bytes of memory at {address:#x}"), refusal.to_string())
            }
            Self::OutOfMemory { refusal } | Self::Call { refusal } => {
                ("using a CUDA device".into(), refusal.to_string())
            }
            Self::DeviceLost { ordinal, refusal } => {
                (format!("using CUDA device {ordinal}, which is lost"), refusal.to_string())
            }
            Self::StreamCaptured => {
                let why = "a CUDA graph is being captured on it".into();
                ("ordering copies after a stream".into(), why)
            }
            Self::Forked { owner, child } => {
                let what = format!("using the CUDA driver of process {owner} in process {child}");
                (what, "CUDA does not survive a fork".into())
            }
            Self::InvalidArgument { what, why } | Self::System { what, why } => {
                (what.clone(), why.clone())
            }
        };
        (what, why, self.hint())
    }

    /// How to go on: the text after `hint: `.
    fn hint(&self) -> &'static str {
        match self {
            Self::NoDriver { .. } => {
                "keep the tensors on the CPU, or install NVIDIA's driver; `nvidia-smi` shows \
                 whether it works"
            }
            Self::DriverTooOld { .. } => "update NVIDIA's driver; `nvidia-smi` shows its version",
            Self::NoSuchDevice { .. } => "look at `nvidia-smi -L` and at CUDA_VISIBLE_DEVICES",
            Self::OutOfPinnedMemory { .. } => {
                "lower `staging_bytes`, or raise the memory limit of the process or container; \
                 copies work without pinned memory, at a fraction of the speed"
            }
            Self::AlreadyPinned { .. } => {
                "pin each page once: pieces begin and end where pages do and do not overlap"
            }
            Self::OutOfMemory { .. } => {
                "free memory of the device, or choose a mode that does not clone the state there"
            }
            Self::DeviceLost { .. } => {
                "no call on this device can succeed in this process any more: start it again from \
                 the newest checkpoint; `dmesg | grep -i xid` names the cause"
            }
            Self::StreamCaptured => "save and restore outside of `torch.cuda.graph`",
            Self::Forked { .. } => {
                "start workers with the `spawn` or `forkserver` method, and open the device there"
            }
            Self::InvalidArgument { .. } => "correct the call",
            Self::System { .. } => "look at `ulimit -a` and the limits of the container",
            Self::Call { .. } => {
                "look CUDA's code up in the documentation of its driver API; if torch works on \
                 this device, please report this with its message"
            }
        }
    }

    /// Whether nothing can succeed on the device any more.
    pub fn is_device_lost(&self) -> bool {
        matches!(self, Self::DeviceLost { .. })
    }

    /// A refused call on device `ordinal`, folded into the variant that says what to do.
    pub(crate) fn refused(ordinal: u32, refusal: Refusal) -> Self {
        match refusal.code {
            code if STICKY.contains(&code) => Self::DeviceLost { ordinal, refusal },
            OUT_OF_MEMORY => Self::OutOfMemory { refusal },
            _ => Self::Call { refusal },
        }
    }

    /// The same, where memory was to be pinned.
    pub(crate) fn not_pinned(self, address: usize, bytes: usize) -> Self {
        match self {
            Self::OutOfMemory { refusal } => Self::OutOfPinnedMemory { bytes, refusal },
            Self::Call { refusal } => match refusal.code {
                ALREADY_REGISTERED => Self::AlreadyPinned { address, bytes, refusal },
                MAP_FAILED | OPERATING_SYSTEM | NOT_PERMITTED => {
                    Self::OutOfPinnedMemory { bytes, refusal }
                }
                _ => Self::Call { refusal },
            },
            other => other,
        }
    }

    pub(crate) fn invalid(what: impl Into<String>, why: impl Into<String>) -> Self {
        Self::InvalidArgument { what: what.into(), why: why.into() }
    }
}

/// A call that the driver refused, and why, in its own words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// The call, as CUDA's documentation names it.
    pub call: &'static str,
    /// CUDA's code for the reason.
    pub code: u32,
    /// CUDA's name for that code, such as `CUDA_ERROR_INVALID_VALUE`.
    pub name: String,
    /// CUDA's text for that code.
    pub text: String,
}

impl fmt::Display for Refusal {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { call, code, name, text } = self;
        write!(formatter, "`{call}` returned {name} ({code}): {text}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(code: Code) -> Refusal {
        let (name, text) = (format!("CUDA_ERROR_{code}"), "some text".to_owned());
        Refusal { call: "cuSomething", code, name, text }
    }

    #[test]
    fn a_code_becomes_what_to_do() {
        let refused = |code| CudaError::refused(3, refusal(code));
        for code in STICKY {
            assert!(refused(*code).is_device_lost(), "{code}");
        }
        for code in [1, 3, 201, 400, 600, 701, 712, 720, 801, 900, 12_345] {
            assert_eq!(refused(code), CudaError::Call { refusal: refusal(code) });
        }
        assert_eq!(refused(2), CudaError::OutOfMemory { refusal: refusal(2) });
    }

    #[test]
    fn a_refusal_to_pin_keeps_apart_what_to_do() {
        let pinning = |code| CudaError::refused(0, refusal(code)).not_pinned(0x1000, 4096);
        for code in [2, 205, 304, 800] {
            let expected = CudaError::OutOfPinnedMemory { bytes: 4096, refusal: refusal(code) };
            assert_eq!(pinning(code), expected);
        }
        let expected =
            CudaError::AlreadyPinned { address: 0x1000, bytes: 4096, refusal: refusal(712) };
        assert_eq!(pinning(712), expected);
        assert_eq!(pinning(1), CudaError::Call { refusal: refusal(1) });
        assert!(pinning(700).is_device_lost());
    }

    #[test]
    fn a_message_says_what_and_why_and_how_to_go_on() {
        assert_eq!(
            CudaError::refused(3, refusal(700)).to_string(),
            "using CUDA device 3, which is lost: `cuSomething` returned CUDA_ERROR_700 (700): some \
             text\nhint: no call on this device can succeed in this process any more: start it \
             again from the newest checkpoint; `dmesg | grep -i xid` names the cause"
        );
    }
}
