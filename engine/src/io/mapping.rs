//! One anonymous mapping, of huge pages where the kernel has them.
//!
//! Always holds: the bytes begin at a multiple of 2 MiB and are zero at first. A forked child does
//! not have this memory (`MADV_DONTFORK`: otherwise `fork` copies every page that a device is
//! writing to).
//!
//! Why `unsafe`: safe collections give neither huge pages nor `MADV_DONTFORK`.
#![expect(unsafe_code, reason = "maps, advises on and unmaps anonymous memory")]

use std::io;
use std::ptr::{self, NonNull};

use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags};

/// Size of a huge page where it matters (x86-64, and AArch64 with 4 KiB pages); elsewhere only an
/// alignment.
const HUGE_PAGE_BYTES: usize = 2 << 20;

/// The anonymous mapping; unmapped by hand, because a forked child must not.
pub(super) struct Mapping {
    /// Start of the whole mapping.
    mapped: NonNull<u8>,
    mapped_bytes: usize,
    /// Start of the part in use: the first multiple of [`HUGE_PAGE_BYTES`].
    base: NonNull<u8>,
    bytes: usize,
}

// SAFETY: the mapping belongs to the process, not to a thread; access to its bytes goes through
// `Buffer`s, which are exclusive.
unsafe impl Send for Mapping {}
// SAFETY: as above; the methods on `&Mapping` only advise the kernel.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `bytes`; no memory is touched.
    pub(super) fn new(bytes: usize) -> io::Result<Self> {
        let mapped_bytes = bytes.checked_add(HUGE_PAGE_BYTES).ok_or(Errno::NOMEM)?;
        // Miri checks this file's arithmetic and aliasing, and knows only plain mappings.
        let flags =
            if cfg!(miri) { MapFlags::PRIVATE } else { MapFlags::PRIVATE | MapFlags::NORESERVE };
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new anonymous mapping at an address of the kernel's choice touches no memory
        // that anything refers to.
        let start = unsafe {
            rustix::mm::mmap_anonymous(ptr::null_mut(), mapped_bytes, protection, flags)
        }?;
        let mapped = NonNull::new(start.cast::<u8>()).ok_or(Errno::NOMEM)?;
        let skip = mapped.as_ptr().align_offset(HUGE_PAGE_BYTES);
        // At most HUGE_PAGE_BYTES - 1, which `mapped_bytes` has over and above `bytes`.
        let base = NonNull::new(mapped.as_ptr().wrapping_add(skip)).ok_or(Errno::NOMEM)?;
        let mut mapping = Self { mapped, mapped_bytes, base, bytes };
        if let Err(error) = mapping.advise() {
            mapping.unmap();
            return Err(error.into());
        }
        Ok(mapping)
    }

    /// Where the bytes are.
    pub(super) fn start(&self) -> *mut u8 {
        self.base.as_ptr()
    }

    /// How many there are.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    fn advise(&self) -> Result<(), Errno> {
        // Refused where the kernel has no huge pages: slower, not wrong.
        let _ = self.advise_part(0, self.bytes, Advice::LinuxHugepage);
        // Must hold: a fork would otherwise copy pages that a device is reading or writing.
        self.advise_part(0, self.bytes, Advice::LinuxDontFork)
    }

    /// Gives the pages of a part their memory now; contents are kept.
    pub(super) fn populate(&self, offset: usize, bytes: usize) -> Result<(), Errno> {
        let bytes = bytes.min(self.bytes - offset);
        loop {
            match self.advise_part(offset, bytes, Advice::LinuxPopulateWrite) {
                Err(Errno::INTR | Errno::AGAIN) => {}
                result => return result,
            }
        }
    }

    fn advise_part(&self, offset: usize, bytes: usize, advice: Advice) -> Result<(), Errno> {
        assert!(offset + bytes <= self.bytes, "advice stays within the mapping");
        if cfg!(miri) {
            return Ok(());
        }
        let start = self.base.as_ptr().wrapping_add(offset).cast();
        // SAFETY: the range is in this mapping, and none of the advices given here changes what
        // its memory holds.
        unsafe { rustix::mm::madvise(start, bytes, advice) }
    }

    /// Must be called at most once, by the process that mapped, when no `Buffer` is left.
    pub(super) fn unmap(&mut self) {
        // SAFETY: exactly the range that `new` mapped; the pool is going and every `Buffer` held
        // a count of it, so nothing refers to the memory.
        let unmapped =
            unsafe { rustix::mm::munmap(self.mapped.as_ptr().cast(), self.mapped_bytes) };
        debug_assert!(unmapped.is_ok(), "a mapping is unmapped whole: {unmapped:?}");
    }
}
