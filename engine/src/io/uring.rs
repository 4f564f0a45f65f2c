//! The fast backend: one thread, one io_uring, many transfers in flight.
//!
//! ```text
//! submit --> inbox --(eventfd)--> ring thread --SQE--> kernel
//!                                   slot table <--CQE----+
//!                                   `done` is called here
//! ```
//!
//! Always holds:
//! - A slot owns its transfer, with buffer and file, from before the kernel sees it until its
//!   completion is reaped, whatever else is gone by then.
//! - Fewer entries are in flight than either ring has room for: pushing never finds it full, and
//!   completions never overflow. What does not fit waits in the inbox.
//! - The thread sleeps in the kernel whenever there is nothing to do: a poll of the eventfd is
//!   always armed, and every push into an empty inbox signals it.
//! - Dropping the backend finishes everything submitted. If the thread fails, everything pending
//!   ends with the reason; memory that the kernel may still be writing to is never handed out
//!   again.
//! - In a forked child nothing here takes a lock or waits: the thread is the parent's.
//!
//! Why `unsafe`: the kernel reads and writes memory through raw pointers, after the call that told
//! it to returned; no safe interface exists that keeps several such operations in flight.
#![expect(unsafe_code, reason = "gives the kernel raw pointers to memory that a slot owns")]

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use io_uring::types::{Fd, SubmitArgs, Timespec};
use io_uring::{IoUring, Probe, opcode, squeue};
use rustix::event::EventfdFlags;
use rustix::io::Errno;

use super::inbox::{Inbox, Next, complete};
use super::{Direction, EntryOp, EntryReply, File, Io, Length, OpenMode, Transfer, files};
use crate::config::DirectIo;

/// Entries of the submission ring; the completion ring has twice as many.
const RING_ENTRIES: u32 = 256;
/// Most operations in flight: one entry of the ring is the eventfd's.
const SLOTS_MAX: usize = RING_ENTRIES as usize - 1;
/// Most transfers in flight; the other slots are for advice about buffered files.
const TRANSFERS_MAX: usize = 128;
/// Marks the completion of the eventfd's poll.
const WAKE: u64 = u64::MAX;
/// `POLLIN`, as the ring takes it: the type that libraries give it differs between them.
const POLL_IN: u32 = 1;
/// How long to let the kernel recover when it is short of memory for a submission.
const BUSY_PAUSE: Duration = Duration::from_millis(1);
/// How many such pauses in a row before the ring is given up: 30 seconds.
const BUSY_PAUSES_MAX: u32 = 30_000;
/// How long a failed ring's transfers may take to come back before their memory is given up.
const DRAIN_SECONDS_MAX: u64 = 60;

/// Settings of [`Uring`].
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Options {
    /// Whether the page cache is bypassed.
    pub(crate) direct_io: DirectIo,
}

/// A ring and its thread.
#[derive(Debug)]
pub(crate) struct Uring {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
    setup: &'static str,
    ring_descriptor: RawFd,
    direct_io: DirectIo,
}

/// What submitters and the ring's thread have in common.
#[derive(Debug)]
struct Shared {
    inbox: Inbox,
    /// An eventfd; written when the inbox stops being empty.
    wake: OwnedFd,
}

impl Shared {
    fn signal(&self) {
        // Any number but zero, in any byte order. Fails only where unread signals fill the counter:
        // then it is readable, which is all that matters.
        let _ = rustix::io::write(&self.wake, &[1; 8]);
    }
}

impl Uring {
    /// Starts the ring and its thread, and tries one operation. The error is the kernel's.
    pub(crate) fn new(options: Options) -> io::Result<Self> {
        let wake = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let shared = Arc::new(Shared { inbox: Inbox::new(), wake });
        // The ring is made by the thread that will use it: the kernel binds it to that one.
        let (sender, receiver) = crossbeam_channel::bounded(1);
        let thread = std::thread::Builder::new().name("dtr-io-uring".into()).spawn({
            let shared = Arc::clone(&shared);
            move || match Ring::new(shared) {
                Ok(ring) => {
                    // The receiver waits below.
                    let _ = sender.send(Ok((ring.setup, ring.kernel.as_raw_fd())));
                    run(ring);
                }
                Err(error) => {
                    let _ = sender.send(Err(error));
                }
            }
        })?;
        let started = receiver.recv().unwrap_or_else(|_| Err(io::Error::other("it panicked")));
        let (setup, ring_descriptor) = started?;
        let thread = Some(thread);
        Ok(Self { shared, thread, setup, ring_descriptor, direct_io: options.direct_io })
    }

    /// The flags that the ring was set up with.
    pub(crate) fn setup(&self) -> &'static str {
        self.setup
    }
}

impl Io for Uring {
    fn name(&self) -> &'static str {
        "uring"
    }

    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Arc<File>> {
        files::open(path, mode, self.direct_io)
    }

    fn submit(&self, transfer: Transfer) {
        if self.shared.inbox.push(transfer) {
            self.shared.signal();
        }
    }

    fn set_length(&self, file: &File, length: Length) -> io::Result<()> {
        files::set_length(file, length)
    }

    fn sync(&self, file: &File) -> io::Result<()> {
        files::sync(file)
    }

    fn entry(&self, operation: &EntryOp) -> io::Result<EntryReply> {
        files::entry(operation)
    }
}

impl Drop for Uring {
    fn drop(&mut self) {
        let thread = self.thread.take();
        if !self.shared.inbox.is_owner() {
            self.close_in_child();
            std::mem::forget(thread);
            return;
        }
        self.shared.inbox.close();
        self.shared.signal();
        let Some(thread) = thread else { return };
        // The last owner may be a callback on the ring's own thread, which then ends by itself.
        if thread.thread().id() != std::thread::current().id() && thread.join().is_err() {
            tracing::error!("the io_uring thread panicked");
        }
    }
}

impl Uring {
    /// Closes the parent's ring and eventfd, so that a child does not keep them alive.
    fn close_in_child(&self) {
        std::mem::forget(Arc::clone(&self.shared));
        // SAFETY: the child's copy of the ring's descriptor; its owner, on the stack of a thread
        // that does not exist here, will never close or use it.
        unsafe { rustix::io::close(self.ring_descriptor) };
        // SAFETY: as above; `shared` was just leaked, and `submit` refuses in a child before it
        // would signal.
        unsafe { rustix::io::close(self.shared.wake.as_raw_fd()) };
    }
}

/// The thread's life: serve until closed; on a failure end what is pending with the reason.
fn run(mut ring: Ring) {
    let reason = match catch_unwind(AssertUnwindSafe(|| ring.serve())) {
        Ok(Ok(())) => return,
        Ok(Err(error)) => format!("the io_uring backend failed: {error}"),
        Err(_) => "the io_uring backend failed: its thread panicked".to_owned(),
    };
    tracing::error!("{reason}");
    ring.shared.inbox.fail(&reason);
    ring.drain(&reason);
}

/// The ring, on its thread.
struct Ring {
    kernel: IoUring,
    setup: &'static str,
    slots: Slots,
    shared: Arc<Shared>,
    /// Whether a poll of the eventfd is in the kernel.
    wake_is_armed: bool,
    /// Scratch: completions between reading them and acting on them.
    reaped: Vec<(u64, i32)>,
}

impl Ring {
    fn new(shared: Arc<Shared>) -> io::Result<Self> {
        let (kernel, setup) = set_up()?;
        check_operations(&kernel)?;
        let mut ring = Self {
            kernel,
            setup,
            slots: Slots::new(),
            shared,
            wake_is_armed: false,
            reaped: Vec::with_capacity(2 * RING_ENTRIES as usize),
        };
        ring.check_entering()?;
        Ok(ring)
    }

    fn serve(&mut self) -> io::Result<()> {
        let mut pauses = 0;
        loop {
            self.arm_wake()?;
            if self.admit()? && self.slots.is_empty() {
                return Ok(());
            }
            match submitted(self.kernel.submit_and_wait(1))? {
                Submitted::Yes => pauses = 0,
                Submitted::Busy if pauses == BUSY_PAUSES_MAX => return Err(Errno::BUSY.into()),
                Submitted::Busy => {
                    pauses += 1;
                    std::thread::sleep(BUSY_PAUSE);
                }
            }
            self.reap()?;
        }
    }

    /// Keeps one poll of the eventfd in the kernel. A poll owns no memory of ours, unlike a read.
    fn arm_wake(&mut self) -> io::Result<()> {
        if self.wake_is_armed {
            return Ok(());
        }
        // Before the inbox is looked at: a push after that look must signal again.
        let _ = rustix::io::read(&self.shared.wake, &mut [0; 8]);
        let entry = opcode::PollAdd::new(Fd(self.shared.wake.as_raw_fd()), POLL_IN).build();
        // SAFETY: the entry refers to a descriptor only, which `shared` keeps open.
        unsafe { self.push(&entry.user_data(WAKE)) }?;
        self.wake_is_armed = true;
        Ok(())
    }

    /// Moves transfers from the inbox into slots; returns whether none will ever come again.
    fn admit(&mut self) -> io::Result<bool> {
        while self.slots.in_use() < TRANSFERS_MAX {
            match self.shared.inbox.try_next() {
                Next::Transfer(transfer) => self.begin(transfer)?,
                Next::Empty => return Ok(false),
                Next::Closed => return Ok(true),
            }
        }
        Ok(false)
    }

    fn begin(&mut self, transfer: Transfer) -> io::Result<()> {
        let range = files::attempt_range(&transfer);
        let bytes = u32::try_from(range.len()).expect("an attempt is at most 1 GiB");
        let start = transfer.buffer.start().wrapping_add(range.start);
        let descriptor = Fd(transfer.file.descriptor.as_raw_fd());
        let offset = transfer.offset;
        let entry = match transfer.direction {
            Direction::Read => opcode::Read::new(descriptor, start, bytes).offset(offset).build(),
            Direction::Write => opcode::Write::new(descriptor, start, bytes).offset(offset).build(),
        };
        // Copying to or from the page cache is work: the kernel's threads share it, instead of
        // doing it one after the other on this one.
        let copies = !transfer.file.direct && range.len() >= files::BULK_BYTES_MIN;
        let flags = if copies { squeue::Flags::ASYNC } else { squeue::Flags::empty() };
        let entry = entry.flags(flags);
        let index = self.slots.insert(Slot::Transfer(transfer));
        // SAFETY: `start..start + bytes` is in the transfer's buffer (the inbox checked the
        // range), which, like the file, the slot owns until the completion is reaped; nobody else
        // has access to a buffer that a slot owns.
        unsafe { self.push(&entry.user_data(index as u64)) }
    }

    /// # Safety
    ///
    /// Whatever the entry points to must stay valid, and untouched by others, until its completion.
    unsafe fn push(&mut self, entry: &squeue::Entry) -> io::Result<()> {
        // SAFETY: passed on to the caller.
        let pushed = unsafe { self.kernel.submission().push(entry) };
        pushed.map_err(|_| io::Error::other("the submission ring is full, against its bound"))
    }

    fn reap(&mut self) -> io::Result<()> {
        let mut reaped = std::mem::take(&mut self.reaped);
        reaped.extend(self.kernel.completion().map(|entry| (entry.user_data(), entry.result())));
        for (user_data, result) in reaped.drain(..) {
            if user_data == WAKE {
                self.wake_is_armed = false;
            } else if let Slot::Transfer(transfer) = self.slots.remove(user_data)? {
                self.finish(transfer, result)?;
            }
        }
        self.reaped = reaped;
        Ok(())
    }

    fn finish(&mut self, transfer: Transfer, result: i32) -> io::Result<()> {
        let outcome = usize::try_from(result).map_err(|_| io::Error::from_raw_os_error(-result));
        let moved_bytes = *outcome.as_ref().unwrap_or(&0);
        let advice = files::write_behind(&transfer, moved_bytes);
        let file = Arc::clone(&transfer.file);
        complete(transfer, outcome);
        advice.into_iter().try_for_each(|advice| self.advise(&file, advice))
    }

    /// Advises the kernel about a part of a buffered file, without waiting. Left out when busy.
    fn advise(&mut self, file: &Arc<File>, (offset, length): (u64, u64)) -> io::Result<()> {
        let Ok(length) = i64::try_from(length) else {
            return Ok(());
        };
        if self.slots.in_use() >= SLOTS_MAX {
            return Ok(());
        }
        let descriptor = Fd(file.descriptor.as_raw_fd());
        let advice = rustix::fs::Advice::DontNeed as i32;
        let entry = opcode::Fadvise::new(descriptor, length, advice).offset(offset).build();
        let index = self.slots.insert(Slot::Advice { _file: Arc::clone(file) });
        // SAFETY: the entry refers to a descriptor only, which the slot keeps open.
        unsafe { self.push(&entry.user_data(index as u64)) }
    }

    /// After a failure: waits for what the kernel still owns, as long as completions come, then
    /// gives up the memory of the rest.
    fn drain(&mut self, reason: &str) {
        let timeout = Timespec::new().sec(DRAIN_SECONDS_MAX);
        while self.slots.has_transfers() {
            let arguments = SubmitArgs::new().timespec(&timeout);
            let entered = self.kernel.submitter().submit_with_args(1, &arguments);
            let goes_on = matches!(submitted(entered), Ok(Submitted::Yes));
            if self.reap().is_err() || !goes_on {
                break;
            }
        }
        for slot in self.slots.take_all() {
            if let Slot::Transfer(mut transfer) = slot {
                transfer.buffer = transfer.buffer.abandon();
                complete(transfer, Err(io::Error::other(reason.to_owned())));
            }
        }
    }

    /// One no-op through the ring: sandboxes exist that allow setting it up and not using it.
    fn check_entering(&mut self) -> io::Result<()> {
        // SAFETY: a no-op refers to nothing.
        unsafe { self.push(&opcode::Nop::new().build().user_data(WAKE)) }?;
        while self.kernel.completion().next().is_none() {
            submitted(self.kernel.submit_and_wait(1))?;
        }
        Ok(())
    }
}

/// What a submission did, errors that pass aside.
enum Submitted {
    /// Entries were taken, or a signal came first.
    Yes,
    /// The kernel is short of memory or wants completions reaped first.
    Busy,
}

fn submitted(result: io::Result<usize>) -> io::Result<Submitted> {
    match result {
        Ok(_) => Ok(Submitted::Yes),
        Err(error) => match Errno::from_io_error(&error) {
            Some(Errno::INTR) => Ok(Submitted::Yes),
            Some(Errno::AGAIN | Errno::BUSY) => Ok(Submitted::Busy),
            _ => Err(error),
        },
    }
}

/// Sets up a ring with the best flags that the kernel knows.
fn set_up() -> io::Result<(IoUring, &'static str)> {
    let mut builder = IoUring::builder();
    // Linux 6.1: completions are processed only when the thread asks for them.
    builder.dontfork().setup_single_issuer().setup_defer_taskrun();
    match builder.build(RING_ENTRIES) {
        Err(error) if is_unknown_flag(&error) => {}
        built => return Ok((built?, "SINGLE_ISSUER | DEFER_TASKRUN")),
    }
    let mut builder = IoUring::builder();
    // Linux 5.19: no interrupts between processors.
    builder.dontfork().setup_coop_taskrun();
    match builder.build(RING_ENTRIES) {
        Err(error) if is_unknown_flag(&error) => {}
        built => return Ok((built?, "COOP_TASKRUN")),
    }
    Ok((IoUring::builder().dontfork().build(RING_ENTRIES)?, "no flags"))
}

fn is_unknown_flag(error: &io::Error) -> bool {
    Errno::from_io_error(error) == Some(Errno::INVAL)
}

fn check_operations(ring: &IoUring) -> io::Result<()> {
    let mut probe = Probe::new();
    ring.submitter().register_probe(&mut probe)?;
    let needed = [
        opcode::Nop::CODE,
        opcode::Read::CODE,
        opcode::Write::CODE,
        opcode::PollAdd::CODE,
        opcode::Fadvise::CODE,
    ];
    if needed.into_iter().all(|code| probe.is_supported(code)) {
        return Ok(());
    }
    Err(io::Error::new(io::ErrorKind::Unsupported, "the kernel's io_uring lacks an operation"))
}

/// An operation in flight and what it keeps alive.
enum Slot {
    Transfer(Transfer),
    Advice { _file: Arc<File> },
}

/// The operations in flight, by the number that comes back with their completion.
struct Slots {
    slots: Vec<Option<Slot>>,
    free: Vec<usize>,
}

impl Slots {
    fn new() -> Self {
        Self {
            slots: std::iter::repeat_with(|| None).take(SLOTS_MAX).collect(),
            free: (0..SLOTS_MAX).rev().collect(),
        }
    }

    fn in_use(&self) -> usize {
        SLOTS_MAX - self.free.len()
    }

    fn is_empty(&self) -> bool {
        self.in_use() == 0
    }

    fn has_transfers(&self) -> bool {
        self.slots.iter().any(|slot| matches!(slot, Some(Slot::Transfer(_))))
    }

    /// There must be room.
    fn insert(&mut self, slot: Slot) -> usize {
        let index = self.free.pop().expect("callers compare `in_use` to the bound first");
        self.slots[index] = Some(slot);
        index
    }

    fn remove(&mut self, user_data: u64) -> io::Result<Slot> {
        let index = usize::try_from(user_data).ok();
        let slot = index.and_then(|index| Some((index, self.slots.get_mut(index)?.take()?)));
        let (index, slot) =
            slot.ok_or_else(|| io::Error::other("a completion came for an empty slot"))?;
        self.free.push(index);
        Ok(slot)
    }

    fn take_all(&mut self) -> Vec<Slot> {
        let slots = std::mem::replace(self, Self::new()).slots;
        slots.into_iter().flatten().collect()
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::CommandExt;
    use std::process::Command;
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::super::Done;
    use super::super::buffer::{Buffer, BufferPool};
    use super::super::threads::{self, Threads};
    use super::*;

    fn open(name: &str) -> Option<Box<dyn Io>> {
        if name == "threads" {
            return Some(Box::new(Threads::new(threads::Options::default()).unwrap()));
        }
        match Uring::new(Options::default()) {
            Ok(uring) => Some(Box::new(uring)),
            Err(error) => {
                println!("skipped: io_uring is refused here: {error}");
                None
            }
        }
    }

    #[test]
    fn slots_are_reused_and_wrong_numbers_refused() {
        let directory = tempfile::tempdir().unwrap();
        let file = files::open(&directory.path().join("file"), OpenMode::Create, DirectIo::Off);
        let file = file.unwrap();
        let mut slots = Slots::new();
        for _ in 0..2 {
            for expected in 0..SLOTS_MAX {
                assert_eq!(slots.insert(Slot::Advice { _file: Arc::clone(&file) }), expected);
            }
            assert_eq!(slots.in_use(), SLOTS_MAX);
            assert!(!slots.has_transfers());
            for index in (0..SLOTS_MAX).rev() {
                slots.remove(index as u64).unwrap();
            }
            assert!(slots.is_empty());
        }
        for wrong in [0, SLOTS_MAX as u64, WAKE] {
            assert!(slots.remove(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn after_a_failure_every_transfer_ends_with_the_reason() {
        let Some(_) = open("uring") else { return };
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        let file = files::open(&path, OpenMode::Create, DirectIo::Auto).unwrap();
        let pool = BufferPool::new(4096, 3).unwrap();
        let wake = rustix::event::eventfd(0, EventfdFlags::NONBLOCK).unwrap();
        let shared = Arc::new(Shared { inbox: Inbox::new(), wake });
        let (sender, outcomes) = crossbeam_channel::unbounded();
        let transfer = || {
            let sender = sender.clone();
            Transfer {
                file: Arc::clone(&file),
                offset: 0,
                buffer: pool.take(),
                range: 0..4096,
                direction: Direction::Write,
                done: Box::new(move |outcome, buffer| sender.send((outcome, buffer)).unwrap()),
            }
        };
        let mut ring = Ring::new(Arc::clone(&shared)).unwrap();
        ring.begin(transfer()).unwrap();
        shared.inbox.push(transfer());
        // A completion that names no slot: what the loop calls a failure.
        // SAFETY: a no-op refers to nothing.
        unsafe { ring.push(&opcode::Nop::new().build().user_data(200)) }.unwrap();
        run(ring);
        shared.inbox.push(transfer());

        // The first was in the kernel, and its completion was waited for.
        let outcomes: Vec<_> = outcomes.try_iter().collect();
        assert_eq!(outcomes.len(), 3);
        let errors: Vec<_> = outcomes.iter().filter_map(|(o, _)| o.as_ref().err()).collect();
        assert!(!errors.is_empty());
        for error in errors {
            assert!(error.to_string().contains("the io_uring backend failed"), "{error}");
        }
        drop(outcomes);
        assert_eq!(pool.free(), 3, "no memory was given up");
    }

    #[test]
    fn a_forked_child_lets_go_and_the_parent_goes_on() {
        const TRANSFERS: usize = 32;
        const BYTES: usize = 1 << 20;
        for name in ["uring", "threads"] {
            let Some(io) = open(name) else { continue };
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("file");
            let file = io.open(&path, OpenMode::Create).unwrap();
            let pool = BufferPool::new(BYTES, TRANSFERS + 1).unwrap();
            let transfer = {
                let file = Arc::clone(&file);
                move |index: usize, buffer: Buffer, done: Done| Transfer {
                    file: Arc::clone(&file),
                    offset: (index * BYTES) as u64,
                    buffer,
                    range: 0..BYTES,
                    direction: Direction::Write,
                    done,
                }
            };
            let (sender, outcomes) = crossbeam_channel::unbounded();
            for index in 0..TRANSFERS {
                let mut buffer = pool.take();
                buffer.fill(0xa5);
                let sender = sender.clone();
                let done: Done = Box::new(move |outcome, _| sender.send(outcome.is_ok()).unwrap());
                io.submit(transfer(index, buffer, done));
            }
            drop(sender);
            let mut child = Command::new("true");
            // What the child drops is its copy; the parent's is dropped with `child`.
            let held = Mutex::new(Some((io, pool.take())));
            let in_child = move || {
                let (io, buffer) = held.lock().unwrap().take().expect("runs once");
                assert!(!buffer.is_accessible());
                let refused = Arc::new(AtomicBool::new(false));
                let done: Done = Box::new({
                    let refused = Arc::clone(&refused);
                    move |outcome, _| refused.store(outcome.is_err(), Ordering::Relaxed)
                });
                io.submit(transfer(0, buffer, done));
                assert!(refused.load(Ordering::Relaxed));
                drop(io);
                Ok(())
            };
            // SAFETY: the closure runs in the forked child before `exec`. It allocates, which the
            // C library allows after a fork, and takes only a lock that no other thread knows.
            unsafe { child.pre_exec(in_child) };
            assert!(child.status().unwrap().success(), "{name}: the child neither hung nor died");
            drop(child);
            let outcomes: Vec<_> = outcomes.iter().collect();
            assert_eq!(outcomes, [true; TRANSFERS], "{name}: the parent's transfers all arrived");
            let bytes = std::fs::read(&path).unwrap();
            assert!(bytes.iter().all(|byte| *byte == 0xa5) && bytes.len() == TRANSFERS * BYTES);
            assert_eq!(pool.free(), TRANSFERS + 1);
        }
    }
}
