//! What every backend must do, run by every backend, direct and buffered, on a disk and on tmpfs.

use std::ffi::OsString;
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crossbeam_channel::{Receiver, unbounded};

use super::buffer::{Buffer, BufferPool};
use super::transfer::{read_fully, transfer_fully, write_fully};
use super::{
    ALIGNMENT, Direction, EntryOp, EntryReply, File, Io, Length, OpenMode, Transfer, sim, threads,
    uring,
};
use crate::config::DirectIo;

const BLOCK_BYTES: usize = 64 << 10;
const BLOCKS: usize = 48;
const DEPTH: usize = 16;

/// Opens a backend; `None`, with a printed reason, where the kernel refuses it.
type Open = fn(DirectIo) -> Option<Arc<dyn Io>>;

#[expect(clippy::unnecessary_wraps, reason = "the shape of `Open`")]
fn open_threads(direct_io: DirectIo) -> Option<Arc<dyn Io>> {
    let options = threads::Options { threads: 4, direct_io };
    Some(Arc::new(threads::Threads::new(options).unwrap()))
}

fn open_uring(direct_io: DirectIo) -> Option<Arc<dyn Io>> {
    match uring::Uring::new(uring::Options { direct_io }) {
        Ok(uring) => Some(Arc::new(uring)),
        Err(error) => {
            eprintln!("skipped: io_uring is refused here: {error}");
            None
        }
    }
}

fn open_sim_of_threads(direct_io: DirectIo) -> Option<Arc<dyn Io>> {
    let plan = sim::Plan { reorder_seed: Some(7), ..sim::Plan::default() };
    open_threads(direct_io).map(|inner| Arc::new(sim::Sim::new(inner, plan)) as Arc<dyn Io>)
}

fn open_sim_of_uring(direct_io: DirectIo) -> Option<Arc<dyn Io>> {
    let plan = sim::Plan { reorder_seed: Some(7), ..sim::Plan::default() };
    open_uring(direct_io).map(|inner| Arc::new(sim::Sim::new(inner, plan)) as Arc<dyn Io>)
}

/// Where the suite runs: a directory on a disk, and one on tmpfs if there is any.
fn places() -> Vec<tempfile::TempDir> {
    let build = Path::new(env!("CARGO_MANIFEST_DIR"));
    let on_disk = tempfile::tempdir_in(build).or_else(|_| tempfile::tempdir()).unwrap();
    std::iter::once(on_disk).chain(tempfile::tempdir_in("/dev/shm").ok()).collect()
}

fn run(open: Open) {
    for direct_io in [DirectIo::Auto, DirectIo::Off] {
        for place in places() {
            let Some(io) = open(direct_io) else { return };
            let directory = place.path();
            println!("{} with direct_io {direct_io:?} in {}", io.name(), directory.display());
            creating_takes_a_new_name(&io, directory);
            blocks_come_back_whatever_the_order(&io, directory);
            the_end_of_a_file_is_an_error(&io, directory);
            small_files_take_any_alignment(&io, directory);
            lengths_are_reserved_and_set(&io, directory);
            entries_do_what_they_say(&io, directory);
            mistakes_give_the_buffer_back(&io, directory);
            a_panicking_callback_harms_nobody(&io, directory);
            many_threads_submit_at_once(&io, directory);
            a_submitter_may_leave(&io, directory);
            drop(io);
            dropping_the_backend_completes_everything(open(direct_io).unwrap(), directory);
            the_last_owner_may_be_a_callback(open(direct_io).unwrap(), directory);
        }
    }
}

#[test]
fn threads_conform() {
    run(open_threads);
}

#[test]
fn uring_conforms() {
    run(open_uring);
}

#[test]
fn sim_of_threads_conforms() {
    run(open_sim_of_threads);
}

#[test]
fn sim_of_uring_conforms() {
    run(open_sim_of_uring);
}

fn creating_takes_a_new_name(io: &Arc<dyn Io>, directory: &Path) {
    let path = directory.join("created");
    assert_eq!(kind(io.open(&path, OpenMode::Read)), ErrorKind::NotFound);
    let file = io.open(&path, OpenMode::Create).unwrap();
    assert_eq!(file.path, path);
    for mode in [OpenMode::Create, OpenMode::CreateSmall] {
        assert_eq!(kind(io.open(&path, mode)), ErrorKind::AlreadyExists);
    }
    assert_eq!(stat(io, &path).unwrap().len(), 0, "a probe leaves nothing behind");
    assert_eq!(stat(io, &path).unwrap().mode() & 0o7133, 0, "at most rw-r--r--");
}

fn blocks_come_back_whatever_the_order(io: &Arc<dyn Io>, directory: &Path) {
    let pool = BufferPool::new(BLOCK_BYTES, DEPTH).unwrap();
    let path = directory.join("blocks");
    let file = io.open(&path, OpenMode::Create).unwrap();
    io.set_length(&file, Length::Reserve((BLOCKS * BLOCK_BYTES) as u64)).unwrap();
    let (sender, outcomes) = unbounded();
    // 7 and BLOCKS have no common divisor: every block once, out of order.
    for block in (0..BLOCKS).map(|index| index * 7 % BLOCKS) {
        let mut buffer = pool.take();
        fill(&mut buffer, block);
        let sender = sender.clone();
        transfer_fully(
            io,
            whole_block(&file, block, buffer, Direction::Write, move |outcome, _| {
                sender.send(outcome).unwrap();
            }),
        );
    }
    drop(sender);
    assert_eq!(outcomes.iter().map(Result::unwrap).sum::<usize>(), BLOCKS * BLOCK_BYTES);
    io.sync(&file).unwrap();

    let reader = io.open(&path, OpenMode::Read).unwrap();
    assert_eq!(reader.direct, file.direct);
    let (sender, outcomes) = unbounded();
    for block in (0..BLOCKS).map(|index| index * 11 % BLOCKS) {
        let mut buffer = pool.take();
        buffer.fill(0xee);
        let sender = sender.clone();
        transfer_fully(
            io,
            whole_block(&reader, block, buffer, Direction::Read, move |outcome, buffer| {
                let is_right = is_filled(&buffer, block);
                drop(buffer);
                sender.send((block, outcome, is_right)).unwrap();
            }),
        );
    }
    drop(sender);
    let outcomes: Vec<_> = outcomes.iter().collect();
    assert_eq!(outcomes.len(), BLOCKS);
    for (block, outcome, is_right) in outcomes {
        assert_eq!(outcome.unwrap(), BLOCK_BYTES);
        assert!(is_right, "block {block}");
    }
    assert_eq!(pool.free(), DEPTH);
}

fn the_end_of_a_file_is_an_error(io: &Arc<dyn Io>, directory: &Path) {
    let pool = BufferPool::new(4 * ALIGNMENT, 1).unwrap();
    let path = directory.join("ends");
    let file = io.open(&path, OpenMode::Create).unwrap();
    let (outcome, _) = write_fully(io, &file, 0, pool.take(), 0..2 * ALIGNMENT);
    outcome.unwrap();
    io.set_length(&file, Length::Exact(ALIGNMENT as u64 + 904)).unwrap();
    let reader = io.open(&path, OpenMode::Read).unwrap();
    for (offset, bytes) in [(0, 2), (0, 4), (1, 1), (2, 1), (100, 1)] {
        let offset = offset * ALIGNMENT as u64;
        let (outcome, buffer) = read_fully(io, &reader, offset, pool.take(), 0..bytes * ALIGNMENT);
        assert_eq!(kind(outcome), ErrorKind::UnexpectedEof, "{bytes} blocks at {offset}");
        assert_eq!(buffer.len(), 4 * ALIGNMENT, "the buffer comes back");
    }
}

fn small_files_take_any_alignment(io: &Arc<dyn Io>, directory: &Path) {
    let pool = BufferPool::new(ALIGNMENT, 1).unwrap();
    let path = directory.join("small");
    let file = io.open(&path, OpenMode::CreateSmall).unwrap();
    assert!(!file.direct);
    let mut buffer = pool.take();
    buffer[3..8].copy_from_slice(b"hello");
    let (outcome, mut buffer) = write_fully(io, &file, 1, buffer, 3..8);
    outcome.unwrap();
    io.sync(&file).unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), b"\0hello");
    buffer.fill(0);
    let reader = io.open(&path, OpenMode::ReadSmall).unwrap();
    let (outcome, buffer) = read_fully(io, &reader, 2, buffer, 10..14);
    outcome.unwrap();
    assert_eq!(&buffer[9..15], b"\0ello\0");
    let (outcome, _) = read_fully(io, &reader, 2, buffer, 5..5);
    outcome.unwrap();
}

fn lengths_are_reserved_and_set(io: &Arc<dyn Io>, directory: &Path) {
    let path = directory.join("lengths");
    let file = io.open(&path, OpenMode::Create).unwrap();
    io.set_length(&file, Length::Reserve(0)).unwrap();
    io.set_length(&file, Length::Reserve(1 << 20)).unwrap();
    for bytes in [12_345, 0, 1 << 20] {
        io.set_length(&file, Length::Exact(bytes)).unwrap();
        assert_eq!(stat(io, &path).unwrap().len(), bytes);
    }
    assert!(io.set_length(&file, Length::Reserve(1 << 62)).is_err(), "no disk is that large");
}

fn entries_do_what_they_say(io: &Arc<dyn Io>, directory: &Path) {
    let inner = directory.join("entries");
    let in_inner = |name: &str| inner.join(name);
    act(io, &EntryOp::CreateDir(inner.clone())).unwrap();
    assert_eq!(kind(act(io, &EntryOp::CreateDir(inner.clone()))), ErrorKind::AlreadyExists);
    for name in ["a", "b", "c"] {
        std::fs::write(in_inner(name), name).unwrap();
    }
    act(io, &EntryOp::SyncDir(inner.clone())).unwrap();

    let rename = |from, to| EntryOp::RenameNew { from: in_inner(from), to: in_inner(to) };
    assert_eq!(kind(act(io, &rename("a", "b"))), ErrorKind::AlreadyExists);
    assert_eq!(std::fs::read(in_inner("b")).unwrap(), b"b");
    act(io, &rename("a", "d")).unwrap();
    let replace = EntryOp::RenameReplace { from: in_inner("d"), to: in_inner("b") };
    act(io, &replace).unwrap();
    assert_eq!(std::fs::read(in_inner("b")).unwrap(), b"a");
    assert_eq!(names(io, &inner), ["b", "c"]);

    assert!(stat(io, &inner).unwrap().is_dir());
    std::os::unix::fs::symlink("nowhere", in_inner("link")).unwrap();
    assert!(stat(io, &in_inner("link")).unwrap().is_symlink(), "links are not followed");
    assert_eq!(kind(stat(io, &in_inner("a"))), ErrorKind::NotFound);

    assert_eq!(kind(act(io, &EntryOp::RemoveDir(inner.clone()))), ErrorKind::DirectoryNotEmpty);
    for name in ["b", "c", "link"] {
        act(io, &EntryOp::RemoveFile(in_inner(name))).unwrap();
    }
    assert_eq!(kind(act(io, &EntryOp::RemoveFile(in_inner("b")))), ErrorKind::NotFound);
    act(io, &EntryOp::RemoveDir(inner.clone())).unwrap();
    assert_eq!(kind(act(io, &EntryOp::List(inner))), ErrorKind::NotFound);

    match act(io, &EntryOp::Space(directory.to_owned())).unwrap() {
        EntryReply::Space { free_bytes, total_bytes } => {
            assert!(0 < free_bytes && free_bytes <= total_bytes);
        }
        other => panic!("{other:?}"),
    }
}

fn mistakes_give_the_buffer_back(io: &Arc<dyn Io>, directory: &Path) {
    let pool = BufferPool::new(2 * ALIGNMENT, 1).unwrap();
    let path = directory.join("mistakes");
    let file = io.open(&path, OpenMode::Create).unwrap();
    let reader = io.open(&path, OpenMode::Read).unwrap();
    let beyond = 0..3 * ALIGNMENT;
    assert_eq!(kind(write_fully(io, &file, 0, pool.take(), beyond).0), ErrorKind::InvalidInput);
    let (outcome, buffer) = write_fully(io, &reader, 0, pool.take(), 0..ALIGNMENT);
    assert!(outcome.is_err(), "the file was opened for reading");
    let (outcome, buffer) = write_fully(io, &file, u64::MAX - 4095, buffer, 0..ALIGNMENT);
    assert!(outcome.is_err(), "no file is that long");
    let (outcome, buffer) = write_fully(io, &file, 1, buffer, 0..ALIGNMENT);
    if file.direct {
        let error = outcome.unwrap_err();
        assert!(error.to_string().contains("not aligned"), "{error}");
    } else {
        outcome.unwrap();
    }
    drop(buffer);
    assert_eq!(pool.free(), 1);
}

fn a_panicking_callback_harms_nobody(io: &Arc<dyn Io>, directory: &Path) {
    let pool = BufferPool::new(BLOCK_BYTES, 1).unwrap();
    let file = io.open(&directory.join("panics"), OpenMode::Create).unwrap();
    for _ in 0..8 {
        // Waits for the buffer that the panic before released.
        let buffer = pool.take();
        io.submit(whole_block(&file, 0, buffer, Direction::Write, |_, _| {
            panic!("of a callback, on purpose");
        }));
    }
    let (outcome, _) = write_fully(io, &file, 0, pool.take(), 0..BLOCK_BYTES);
    outcome.unwrap();
}

fn many_threads_submit_at_once(io: &Arc<dyn Io>, directory: &Path) {
    const SUBMITTERS: usize = 8;
    const PER_SUBMITTER: usize = 64;
    let pool = BufferPool::new(BLOCK_BYTES, 2 * DEPTH).unwrap();
    let file = io.open(&directory.join("many"), OpenMode::Create).unwrap();
    let moved_bytes = Arc::new(AtomicUsize::new(0));
    std::thread::scope(|scope| {
        for submitter in 0..SUBMITTERS {
            let (io, file, pool, moved_bytes) = (io, &file, &pool, &moved_bytes);
            scope.spawn(move || {
                for block in 0..PER_SUBMITTER {
                    let block = submitter * PER_SUBMITTER + block;
                    let mut buffer = pool.take();
                    fill(&mut buffer, block);
                    let moved_bytes = Arc::clone(moved_bytes);
                    transfer_fully(
                        io,
                        whole_block(file, block, buffer, Direction::Write, move |outcome, _| {
                            moved_bytes.fetch_add(outcome.unwrap(), Ordering::Relaxed);
                        }),
                    );
                }
            });
        }
    });
    let held: Vec<_> = (0..pool.count()).map(|_| pool.take()).collect();
    assert_eq!(moved_bytes.load(Ordering::Relaxed), SUBMITTERS * PER_SUBMITTER * BLOCK_BYTES);
    drop(held);
    for block in [0, 100, SUBMITTERS * PER_SUBMITTER - 1] {
        let offset = (block * BLOCK_BYTES) as u64;
        let (outcome, buffer) = read_fully(io, &file, offset, pool.take(), 0..BLOCK_BYTES);
        outcome.unwrap();
        assert!(is_filled(&buffer, block), "block {block}");
    }
}

fn a_submitter_may_leave(io: &Arc<dyn Io>, directory: &Path) {
    let path = directory.join("left");
    let outcomes = submit_all(io, &path);
    // File, pool and every other handle are gone: only the backend holds them.
    assert_eq!(outcomes.iter().map(Result::unwrap).sum::<usize>(), DEPTH * BLOCK_BYTES);
    assert_file_is_filled(&path);
}

fn dropping_the_backend_completes_everything(io: Arc<dyn Io>, directory: &Path) {
    let path = directory.join("dropped");
    let outcomes = submit_all(&io, &path);
    drop(io);
    assert_eq!(outcomes.len(), DEPTH, "all were done when the drop returned");
    assert_eq!(outcomes.iter().map(Result::unwrap).sum::<usize>(), DEPTH * BLOCK_BYTES);
    assert_file_is_filled(&path);
}

fn the_last_owner_may_be_a_callback(io: Arc<dyn Io>, directory: &Path) {
    let pool = BufferPool::new(BLOCK_BYTES, 1).unwrap();
    let file = io.open(&directory.join("last"), OpenMode::Create).unwrap();
    let (sender, receiver) = unbounded();
    let (may_end, wait_to_end) = unbounded::<()>();
    let owner = Arc::clone(&io);
    io.submit(whole_block(&file, 0, pool.take(), Direction::Write, move |outcome, _| {
        let _ = wait_to_end.recv();
        drop(owner);
        sender.send(outcome).unwrap();
    }));
    drop(io);
    may_end.send(()).unwrap();
    assert_eq!(receiver.recv().unwrap().unwrap(), BLOCK_BYTES);
}

/// Writes `DEPTH` blocks with single attempts, keeping nothing but where outcomes arrive.
fn submit_all(io: &Arc<dyn Io>, path: &Path) -> Receiver<std::io::Result<usize>> {
    let pool = BufferPool::new(BLOCK_BYTES, DEPTH).unwrap();
    let file = io.open(path, OpenMode::Create).unwrap();
    let (sender, outcomes) = unbounded();
    for block in 0..DEPTH {
        let mut buffer = pool.take();
        fill(&mut buffer, block);
        let sender = sender.clone();
        io.submit(whole_block(&file, block, buffer, Direction::Write, move |outcome, _| {
            sender.send(outcome).unwrap();
        }));
    }
    outcomes
}

fn assert_file_is_filled(path: &Path) {
    let bytes = std::fs::read(path).unwrap();
    assert_eq!(bytes.len(), DEPTH * BLOCK_BYTES);
    for (block, bytes) in bytes.chunks(BLOCK_BYTES).enumerate() {
        assert!(is_filled(bytes, block), "block {block}");
    }
}

fn whole_block(
    file: &Arc<File>,
    block: usize,
    buffer: Buffer,
    direction: Direction,
    done: impl FnOnce(std::io::Result<usize>, Buffer) + Send + 'static,
) -> Transfer {
    Transfer {
        file: Arc::clone(file),
        offset: (block * BLOCK_BYTES) as u64,
        range: 0..BLOCK_BYTES,
        buffer,
        direction,
        done: Box::new(done),
    }
}

/// Each eight bytes of a block name the block and their place in it.
fn word(block: usize, place: usize) -> [u8; 8] {
    (((block as u64) << 32) + place as u64).to_le_bytes()
}

fn fill(buffer: &mut [u8], block: usize) {
    for (place, bytes) in buffer.chunks_exact_mut(8).enumerate() {
        bytes.copy_from_slice(&word(block, place));
    }
}

fn is_filled(buffer: &[u8], block: usize) -> bool {
    let mut words = buffer.chunks_exact(8).enumerate();
    words.all(|(place, bytes)| bytes == word(block, place))
}

fn act(io: &Arc<dyn Io>, operation: &EntryOp) -> std::io::Result<EntryReply> {
    io.entry(operation)
}

fn stat(io: &Arc<dyn Io>, path: &Path) -> std::io::Result<std::fs::Metadata> {
    match act(io, &EntryOp::Stat(path.to_owned()))? {
        EntryReply::Metadata(metadata) => Ok(metadata),
        other => panic!("{other:?}"),
    }
}

fn names(io: &Arc<dyn Io>, path: &Path) -> Vec<OsString> {
    match act(io, &EntryOp::List(PathBuf::from(path))).unwrap() {
        EntryReply::Names(mut names) => {
            names.sort();
            names
        }
        other => panic!("{other:?}"),
    }
}

fn kind<T>(result: std::io::Result<T>) -> ErrorKind {
    match result {
        Ok(_) => panic!("an error was expected"),
        Err(error) => error.kind(),
    }
}
