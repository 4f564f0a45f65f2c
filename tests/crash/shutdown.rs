//! Cuts the power of a mounted ext4: what it did not write to its device it never will.
//!
//! Always holds: nothing but the filesystem that was named is touched, and that fails every
//! operation from then on.
#![expect(unsafe_code, reason = "the one ioctl of the kernel that no crate wraps")]

use std::fs::File;
use std::io;
use std::path::Path;

use rustix::ioctl::{Setter, ioctl, opcode};

/// `EXT4_IOC_SHUTDOWN`, of `fs/ext4/ext4.h`.
const SHUTDOWN: u32 = opcode::read::<u32>(b'X', 125);
/// Not even the journal is flushed.
const NO_LOG_FLUSH: u32 = 2;

/// Cuts it. Needs `CAP_SYS_ADMIN`.
pub(crate) fn shut_down(mount: &Path) -> io::Result<()> {
    let root = File::open(mount)?;
    // SAFETY: by its definition the ioctl of this number reads 32 bits.
    let shutdown = unsafe { Setter::<SHUTDOWN, u32>::new(NO_LOG_FLUSH) };
    // SAFETY: the kernel reads those 32 bits through the pointer that `Setter` gives it, and keeps
    // nothing.
    unsafe { ioctl(&root, shutdown) }?;
    Ok(())
}
