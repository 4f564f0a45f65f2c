//! What this machine offers, for people: `ckpt-tool doctor` prints it.
//!
//! Always holds: every fact is found by trying or by asking the kernel, never by guessing from a
//! version; a fact that costs speed or safety carries a hint; files made for a probe are removed.

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::process::Resource;
use serde::Serialize;

use super::buffer::{Buffer, BufferPool};
use super::files::{self, DirectSupport};
use super::transfer::transfer_fully;
use super::{Direction, EntryOp, EntryReply, File, Io, Length, OpenMode, Transfer, backend, uring};
use crate::config::DirectIo;
use crate::error::IoContext;
use crate::sync::unpoisoned;
use crate::{EngineError, Result};

/// Below this much free space no speed is measured.
const SPEED_FREE_BYTES_MIN: u64 = 1 << 30;
/// Below this limit memory cannot usefully be locked.
const LOCKED_BYTES_MIN: u64 = 64 << 20;

/// Something found, and what to do about it if it could be better.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Fact<T> {
    /// What was found.
    pub found: T,
    /// How to improve it; `None` where it is fine.
    pub hint: Option<String>,
}

impl<T> Fact<T> {
    fn fine(found: T) -> Self {
        Self { found, hint: None }
    }

    fn improvable(found: T, hint: impl Into<String>) -> Self {
        Self { found, hint: Some(hint.into()) }
    }
}

/// What this machine offers to a store in one directory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Facts {
    /// Release of the kernel.
    pub kernel: Fact<String>,
    /// Type of the filesystem.
    pub filesystem: Fact<String>,
    /// Free and total bytes.
    pub space: Fact<Space>,
    /// Whether io_uring starts: the flags it was set up with, or why not.
    pub uring: Fact<std::result::Result<String, String>>,
    /// Whether the page cache can be bypassed: the alignments, or why not.
    pub direct_io: Fact<std::result::Result<String, String>>,
    /// The mode of transparent huge pages: `always`, `madvise` or `never`.
    pub huge_pages: Fact<String>,
    /// Bytes of memory that may be locked; `None` for no limit.
    pub locked_memory_bytes: Fact<Option<u64>>,
}

/// Room in a filesystem.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Space {
    /// Bytes this user may still write.
    pub free_bytes: u64,
    /// Size of the filesystem.
    pub total_bytes: u64,
}

/// Finds out everything except speed. `directory` must exist.
pub fn facts(directory: &Path) -> Result<Facts> {
    let statistics = rustix::fs::statfs(directory).map_err(io::Error::from);
    let filesystem = files::filesystem_name(&statistics.context("examining", directory)?);
    let uring = uring_fact();
    Ok(Facts {
        locked_memory_bytes: locked_memory_fact(
            rustix::process::getrlimit(Resource::Memlock).current,
            uring.found.is_ok(),
        ),
        kernel: Fact::fine(rustix::system::uname().release().to_string_lossy().into_owned()),
        space: space(directory)?,
        uring,
        direct_io: direct_io_fact(directory, &filesystem),
        filesystem: filesystem_fact(filesystem),
        huge_pages: huge_pages_fact(),
    })
}

fn filesystem_fact(name: String) -> Fact<String> {
    match name.as_str() {
        "tmpfs" => Fact::improvable(
            name,
            "this is memory: checkpoints here are lost at a reboot; choose a disk",
        ),
        "overlayfs" => Fact::improvable(
            name,
            "this is a container's own layer: checkpoints here are lost with the container; mount \
             a volume",
        ),
        _ => Fact::fine(name),
    }
}

fn space(directory: &Path) -> Result<Fact<Space>> {
    let reply = files::entry(&EntryOp::Space(directory.to_owned()));
    let EntryReply::Space { free_bytes, total_bytes } =
        reply.context("asking for the free space of", directory)?
    else {
        return Err(EngineError::internal("asking for free space", "another reply came"));
    };
    let found = Space { free_bytes, total_bytes };
    Ok(if free_bytes < SPEED_FREE_BYTES_MIN {
        Fact::improvable(found, "free space, or choose another filesystem")
    } else {
        Fact::fine(found)
    })
}

fn uring_fact() -> Fact<std::result::Result<String, String>> {
    match uring::Uring::new(uring::Options::default()) {
        Ok(uring) => Fact::fine(Ok(uring.setup().to_owned())),
        Err(error) => {
            let sysctl = fs::read_to_string("/proc/sys/kernel/io_uring_disabled");
            let sysctl = sysctl.map_or_else(|_| "absent".into(), |text| text.trim().to_owned());
            let why = format!("{error}; `kernel.io_uring_disabled` is {sysctl}");
            Fact::improvable(Err(why), backend::uring_hint(&error))
        }
    }
}

fn direct_io_fact(directory: &Path, filesystem: &str) -> Fact<std::result::Result<String, String>> {
    let scratch = match Scratch::new(directory, |path| {
        files::open(path, OpenMode::Create, DirectIo::Auto)
    }) {
        Ok(scratch) => scratch,
        Err(error) => {
            let why = format!("no file can be created here: {error}");
            return Fact::improvable(Err(why), "make the directory writable, or choose another");
        }
    };
    let hint = "buffered writes are slower and end in a long sync: ext4 (not `data=journal`) and \
                xfs on a local disk take direct I/O";
    match (scratch.file.direct, files::direct_support(scratch.file.descriptor.as_fd())) {
        (true, DirectSupport::Aligned { memory, offset }) => {
            Fact::fine(Ok(format!("memory aligned to {memory}, offsets to {offset} bytes")))
        }
        (true, _) => Fact::fine(Ok("alignment not told; a probe with 4096 bytes passed".into())),
        (false, DirectSupport::Aligned { memory, offset }) => {
            let why = format!("{filesystem} wants alignments of {memory} and {offset} bytes");
            Fact::improvable(Err(why), hint)
        }
        (false, _) => Fact::improvable(Err(format!("{filesystem} refuses it")), hint),
    }
}

fn huge_pages_fact() -> Fact<String> {
    let text = fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled");
    match text.as_deref().map(selected) {
        Ok(Some(mode @ ("always" | "madvise"))) => Fact::fine(mode.to_owned()),
        Ok(mode) => Fact::improvable(
            mode.unwrap_or("unknown").to_owned(),
            "allow them: `echo madvise > /sys/kernel/mm/transparent_hugepage/enabled`",
        ),
        Err(_) => Fact::improvable(
            "absent".to_owned(),
            "use a kernel with transparent huge pages: staging memory is slower without them",
        ),
    }
}

/// The choice in brackets: `always [madvise] never`.
fn selected(text: &str) -> Option<&str> {
    let (_, rest) = text.split_once('[')?;
    Some(rest.split_once(']')?.0)
}

/// Only kernels before 5.12 count a ring's memory as locked, and then refuse it.
fn locked_memory_fact(limit_bytes: Option<u64>, uring_works: bool) -> Fact<Option<u64>> {
    match limit_bytes {
        Some(bytes) if bytes < LOCKED_BYTES_MIN && !uring_works => Fact::improvable(
            limit_bytes,
            "if io_uring is refused with `ENOMEM`, raise `ulimit -l`: kernels before 5.12 count a \
             ring's memory as locked",
        ),
        _ => Fact::fine(limit_bytes),
    }
}

/// How [`measure_speed`] measures.
#[derive(Clone, Copy, Debug)]
pub struct SpeedOptions {
    /// Size of the file; a multiple of `transfer_bytes`.
    pub file_bytes: u64,
    /// Size of each transfer; a multiple of 4096.
    pub transfer_bytes: usize,
    /// Transfers in flight.
    pub depth: usize,
}

impl Default for SpeedOptions {
    /// 256 MiB in transfers of 4 MiB, 32 MiB in flight: as a save writes.
    fn default() -> Self {
        Self { file_bytes: 256 << 20, transfer_bytes: 4 << 20, depth: 8 }
    }
}

/// How fast a file was written and read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Speed {
    /// Whether the page cache was bypassed.
    pub direct: bool,
    /// Size of the file.
    pub file_bytes: u64,
    /// From the reservation of space to the end of the sync.
    pub write_bytes_per_second: u64,
    /// From opening to the last byte; what was written is dropped from the page cache before.
    pub read_bytes_per_second: u64,
}

/// Writes a file as a save does, syncs it, reads it back, and removes it.
pub fn measure_speed(io: &Arc<dyn Io>, directory: &Path, options: SpeedOptions) -> Result<Speed> {
    let free_bytes = space(directory)?.found.free_bytes;
    let needed_bytes = SPEED_FREE_BYTES_MIN.max(options.file_bytes.saturating_mul(2));
    if free_bytes < needed_bytes {
        return Err(EngineError::NoSpace {
            what: format!("measuring the speed of `{}`", directory.display()),
            why: format!("{needed_bytes} bytes free are needed, {free_bytes} are"),
            hint: "free space, or measure another filesystem".into(),
        });
    }
    let pool = BufferPool::new(options.transfer_bytes, options.depth);
    let pool = pool.context("allocating buffers to measure the speed of", directory)?;
    pool.prewarm(1).context("allocating buffers to measure the speed of", directory)?;
    fill_with_noise(&pool);

    let write_began = Instant::now();
    let scratch = Scratch::new(directory, |path| io.open(path, OpenMode::Create));
    let scratch = scratch.context("creating a file to measure the speed of", directory)?;
    let written = write_all(io, &scratch.file, &pool, options);
    written.context("measuring how fast to write", &scratch.file.path)?;
    let write_time = write_began.elapsed();

    files::drop_cached(&scratch.file);
    let read_began = Instant::now();
    let read = io
        .open(&scratch.file.path, OpenMode::Read)
        .and_then(|reader| transfer_all(io, &reader, &pool, options, Direction::Read));
    read.context("measuring how fast to read", &scratch.file.path)?;
    Ok(Speed {
        direct: scratch.file.direct,
        file_bytes: options.file_bytes,
        write_bytes_per_second: per_second(options.file_bytes, write_time),
        read_bytes_per_second: per_second(options.file_bytes, read_began.elapsed()),
    })
}

fn write_all(
    io: &Arc<dyn Io>,
    file: &Arc<File>,
    pool: &Arc<BufferPool>,
    options: SpeedOptions,
) -> io::Result<()> {
    io.set_length(file, Length::Reserve(options.file_bytes))?;
    transfer_all(io, file, pool, options, Direction::Write)?;
    io.set_length(file, Length::Exact(options.file_bytes))?;
    io.sync(file)
}

/// Keeps as many transfers in flight as the pool has buffers, and waits for all.
fn transfer_all(
    io: &Arc<dyn Io>,
    file: &Arc<File>,
    pool: &Arc<BufferPool>,
    options: SpeedOptions,
    direction: Direction,
) -> io::Result<()> {
    let failure = Arc::new(Mutex::new(None));
    let first_failure = || unpoisoned(failure.lock()).take();
    let mut offset = 0;
    while offset < options.file_bytes {
        let buffer = pool.take();
        if let Some(error) = first_failure() {
            return Err(error);
        }
        let range = 0..options.transfer_bytes;
        let failure = Arc::clone(&failure);
        let done = Box::new(move |outcome: io::Result<usize>, buffer: Buffer| {
            if let Err(error) = outcome {
                *unpoisoned(failure.lock()) = Some(error);
            }
            // Only now: the next user of this buffer must see the failure.
            drop(buffer);
        });
        let file = Arc::clone(file);
        transfer_fully(io, Transfer { file, offset, buffer, range, direction, done });
        offset += options.transfer_bytes as u64;
    }
    // All buffers back means that all transfers are done.
    let all: Vec<_> = (0..pool.count()).map(|_| pool.take()).collect();
    drop(all);
    first_failure().map_or(Ok(()), Err)
}

/// Bytes that no device can compress or find twice.
fn fill_with_noise(pool: &Arc<BufferPool>) {
    let mut buffers: Vec<_> = (0..pool.count()).map(|_| pool.take()).collect();
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for word in buffers.iter_mut().flat_map(|buffer| buffer.chunks_exact_mut(8)) {
        // xorshift64
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        word.copy_from_slice(&state.to_le_bytes());
    }
}

fn per_second(bytes: u64, time: Duration) -> u64 {
    let nanoseconds = time.as_nanos().max(1);
    u64::try_from(u128::from(bytes) * 1_000_000_000 / nanoseconds).unwrap_or(u64::MAX)
}

/// A file for a probe; removed when dropped.
struct Scratch {
    file: Arc<File>,
}

impl Scratch {
    fn new(
        directory: &Path,
        open: impl FnOnce(&Path) -> io::Result<Arc<File>>,
    ) -> io::Result<Self> {
        Ok(Self { file: open(&Self::path(directory))? })
    }

    /// A name of its own for each process and probe.
    fn path(directory: &Path) -> PathBuf {
        static NUMBER: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);
        let number = NUMBER.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        directory.join(format!(".dtr-probe-{}-{number}.tmp", std::process::id()))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = files::entry(&EntryOp::RemoveFile(self.file.path.clone())) {
            tracing::warn!(path = %self.file.path.display(), %error, "a probe's file stays");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::IoBackend;

    #[test]
    fn facts_are_found_and_leave_nothing_behind() {
        let directory = tempfile::tempdir().unwrap();
        let found = facts(directory.path()).unwrap();
        assert!(found.kernel.found.starts_with(|first: char| first.is_ascii_digit()));
        assert!(found.space.found.free_bytes <= found.space.found.total_bytes);
        assert_eq!(found.uring.found.is_err(), found.uring.hint.is_some());
        assert_eq!(found.direct_io.found.is_err(), found.direct_io.hint.is_some());
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_missing_directory_is_an_error_that_names_it() {
        let error = facts(Path::new("/nowhere/at/all")).unwrap_err();
        assert!(error.to_string().contains("/nowhere/at/all"), "{error}");
    }

    #[test]
    fn the_selected_mode_is_in_brackets() {
        assert_eq!(selected("always [madvise] never\n"), Some("madvise"));
        assert_eq!(selected("always"), None);
    }

    #[test]
    fn memory_is_no_place_for_checkpoints() {
        assert!(filesystem_fact("tmpfs".into()).hint.is_some());
        assert!(filesystem_fact("ext4".into()).hint.is_none());
        assert!(locked_memory_fact(Some(8 << 20), false).hint.is_some());
        assert!(locked_memory_fact(Some(8 << 20), true).hint.is_none());
        assert!(locked_memory_fact(None, false).hint.is_none());
    }

    #[test]
    fn speed_is_measured_and_the_file_removed() {
        let directory = tempfile::tempdir().unwrap();
        let io = super::super::open_backend(IoBackend::Auto, DirectIo::Auto).unwrap();
        let options = SpeedOptions { file_bytes: 8 << 20, transfer_bytes: 1 << 20, depth: 4 };
        match measure_speed(&io, directory.path(), options) {
            Ok(speed) => {
                assert!(speed.write_bytes_per_second > 0 && speed.read_bytes_per_second > 0);
            }
            Err(EngineError::NoSpace { .. }) => println!("skipped: too little space here"),
            Err(error) => panic!("{error}"),
        }
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
    }

    #[test]
    fn rates_do_not_overflow() {
        assert_eq!(per_second(1 << 30, Duration::from_secs(2)), 1 << 29);
        assert_eq!(per_second(u64::MAX, Duration::ZERO), u64::MAX);
    }
}
