//! A shard as memory: the one place that maps a file.
//!
//! Why `unsafe`: the compiler cannot know that nobody changes a mapped file. We know it of a
//! committed shard: once its manifest is published, no code of ours writes to it or changes its
//! length; deleting it leaves the mapping whole. What remains is outside our reach: another program
//! that truncates the file, another machine that deletes it on NFS, or a device that fails, turns a
//! read of the mapping into SIGBUS. That is why every caller of this path has asked for it.
#![expect(unsafe_code, reason = "mapping a file is unsafe in memmap2")]

use std::io;
use std::os::fd::OwnedFd;

use memmap2::{MmapMut, MmapOptions};

/// Maps a whole file, private and copy-on-write: writes stay in this process's memory.
pub(super) fn map_private(descriptor: &OwnedFd) -> io::Result<MmapMut> {
    // SAFETY: the mapping must not see its file change. The file is a shard that a manifest names,
    // which is never written, truncated or reused again (see above).
    unsafe { MmapOptions::new().map_copy(descriptor) }
}
