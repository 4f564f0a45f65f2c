//! Memory that the kernel may own: one mapping cut into equal buffers.
//!
//! ```text
//! |<--------------------------- one anonymous mapping ----------------------->|
//! | buffer 0 | buffer 1 | buffer 2 | ...                         | buffer n-1 |
//!       free list (last in, first out: warm memory is handed out again first)
//! ```
//!
//! Always holds:
//! - A [`Buffer`] is the only access to its part of the mapping, and a [`Slab`] to all of it; the
//!   mapping lives until the pool and all of them are gone.
//! - Nothing is zeroed between uses: a buffer holds whatever its last user left. The caller that
//!   takes one overwrites what it hands on.
//! - A forked child does not have this memory. There a buffer may be dropped, which does nothing,
//!   and must not be read or written.
//!
//! Why `unsafe`: parts of one mapping handed out at run time are beyond what the borrow checker can
//! follow.
#![expect(unsafe_code, reason = "hands out disjoint parts of one anonymous mapping")]

use std::fmt;
use std::io;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use rustix::io::Errno;
use rustix::process::{Pid, getpid};

use super::ALIGNMENT;
use super::mapping::Mapping;
use super::pin::{Pin, Pinned};
use crate::sync::{Condvar, Mutex, MutexGuard, unpoisoned, wait_while};

/// What one thread populates at a time: large enough to amortise the call, small enough to share.
const POPULATE_PIECE_BYTES: usize = 32 << 20;
/// Bytes of a buffer for header, index and footer, which are read and written piece by piece.
pub(crate) const CONTROL_BUFFER_BYTES: usize = 1 << 20;
/// The index of a stand-in for a buffer that was left to the kernel.
const LOST: usize = usize::MAX;

/// Equal buffers in one mapping.
pub(crate) struct BufferPool {
    mapping: Mapping,
    buffer_bytes: usize,
    count: usize,
    state: Mutex<State>,
    returned: Condvar,
    /// The process that has the memory.
    owner: Pid,
    /// Its registration with a device's driver; `None` where that refused.
    pinned: OnceLock<Option<Box<dyn Pinned>>>,
}

/// Which buffers are where.
#[derive(Debug)]
struct State {
    /// Indices of free buffers; the last one was used last.
    free: Vec<usize>,
    /// Buffers that a failed backend could not get back from the kernel.
    lost: usize,
    /// Buffers that wait in a slow transfer: at most half of all.
    parked: usize,
}

impl BufferPool {
    /// Maps `count` buffers of `buffer_bytes`, a multiple of [`ALIGNMENT`]. No memory is touched:
    /// see [`BufferPool::prewarm`].
    pub(crate) fn new(buffer_bytes: usize, count: usize) -> io::Result<Arc<Self>> {
        if buffer_bytes == 0 || !buffer_bytes.is_multiple_of(ALIGNMENT) || count == 0 {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!(
                    "{count} buffers of {buffer_bytes} bytes: at least one, \
                     of a multiple of {ALIGNMENT} bytes, is expected"
                ),
            ));
        }
        let bytes = buffer_bytes.checked_mul(count).ok_or(Errno::NOMEM)?;
        Ok(Arc::new(Self {
            mapping: Mapping::new(bytes)?,
            buffer_bytes,
            count,
            // Reversed: the first to be taken is the first in memory, so a little-used pool stays
            // within few huge pages.
            state: Mutex::new(State { free: (0..count).rev().collect(), lost: 0, parked: 0 }),
            returned: Condvar::new(),
            owner: getpid(),
            pinned: OnceLock::new(),
        }))
    }

    /// Registers the memory with a device's driver, until the pool and every buffer are gone. Does
    /// nothing if it is, or if that was refused before: trying takes seconds.
    pub(crate) fn pin(&self, pin: &dyn Pin) -> crate::Result<()> {
        self.assert_owner();
        let mut refusal = Ok(());
        self.pinned.get_or_init(|| {
            let pinned = pin.pin(self.mapping.start(), self.buffer_bytes, self.count);
            pinned.map_err(|error| refusal = Err(error)).ok()
        });
        refusal
    }

    /// Gives every page its memory now, with up to `threads` threads, so that no later write pays
    /// for page faults. Contents are kept, so this may run while buffers are in use.
    pub(crate) fn prewarm(&self, threads: usize) -> io::Result<()> {
        self.assert_owner();
        match self.populate(threads) {
            // Before Linux 5.14.
            Err(Errno::INVAL) => self.touch_free_buffers(),
            result => result?,
        }
        Ok(())
    }

    /// A free buffer, or waits until one is returned. Its contents are arbitrary.
    ///
    /// # Panics
    ///
    /// In a forked child, which does not have the memory; and if a failed backend lost every
    /// buffer, so that none can ever return.
    pub(crate) fn take(self: &Arc<Self>) -> Buffer {
        self.assert_owner();
        let none_yet = |state: &mut State| state.free.is_empty() && state.lost < self.count;
        let index = wait_while(&self.returned, self.lock(), None, none_yet).free.pop();
        let Some(index) = index else {
            panic!("all {} buffers of the pool were lost to a failed io backend", self.count)
        };
        Buffer { pool: Arc::clone(self), index }
    }

    /// A free buffer, or `None` where all are in use or the process is a forked child.
    pub(crate) fn try_take(self: &Arc<Self>) -> Option<Buffer> {
        if !self.is_owner() {
            return None;
        }
        let index = self.lock().free.pop()?;
        Some(Buffer { pool: Arc::clone(self), index })
    }

    /// All buffers at once, as one piece of memory, or `None` where one is in use or the process is
    /// a forked child.
    pub(crate) fn try_take_all(self: &Arc<Self>) -> Option<Slab> {
        if !self.is_owner() {
            return None;
        }
        let mut state = self.lock();
        if state.free.len() < self.count {
            return None;
        }
        let indices = std::mem::take(&mut state.free);
        drop(state);
        Some(Slab { pool: Arc::clone(self), indices })
    }

    /// Bytes of each buffer.
    pub(crate) fn buffer_bytes(&self) -> usize {
        self.buffer_bytes
    }

    /// Number of buffers.
    pub(crate) fn count(&self) -> usize {
        self.count
    }

    /// Number of buffers that nobody holds at this moment.
    pub(crate) fn free(&self) -> usize {
        if self.is_owner() { self.lock().free.len() } else { 0 }
    }

    fn populate(&self, threads: usize) -> Result<(), Errno> {
        let pieces = self.mapping.bytes().div_ceil(POPULATE_PIECE_BYTES);
        let next = AtomicUsize::new(0);
        let work = || {
            loop {
                let piece = next.fetch_add(1, Ordering::Relaxed);
                if piece >= pieces {
                    return Ok(());
                }
                self.mapping.populate(piece * POPULATE_PIECE_BYTES, POPULATE_PIECE_BYTES)?;
            }
        };
        std::thread::scope(|scope| {
            let helpers: Vec<_> =
                (1..threads.clamp(1, pieces)).map(|_| scope.spawn(work)).collect();
            let own = work();
            helpers
                .into_iter()
                .fold(own, |result, helper| result.and(helper.join().unwrap_or(Err(Errno::FAULT))))
        })
    }

    /// Writes a byte of every page of the buffers that are free, while holding them: nobody else
    /// can then be writing there. Buffers in use are being touched by their users.
    fn touch_free_buffers(&self) {
        let indices = std::mem::take(&mut self.lock().free);
        for &index in &indices {
            for page in (0..self.buffer_bytes).step_by(ALIGNMENT) {
                let byte = self.start_of(index).wrapping_add(page);
                // SAFETY: within buffer `index` of the live mapping, which no one else holds.
                let value = unsafe { byte.read_volatile() };
                // SAFETY: as above.
                unsafe { byte.write_volatile(value) };
            }
        }
        self.lock().free.extend(indices);
        self.returned.notify_all();
    }

    fn start_of(&self, index: usize) -> *mut u8 {
        assert!(index < self.count, "a buffer's index is below the pool's count");
        // Within the mapping, whose length is count * buffer_bytes.
        self.mapping.start().wrapping_add(index * self.buffer_bytes)
    }

    fn is_owner(&self) -> bool {
        getpid() == self.owner
    }

    fn assert_owner(&self) {
        assert!(
            self.is_owner(),
            "a buffer pool of process {} was used in process {}, a fork that does not have its \
             memory: open the store again in the child",
            self.owner,
            getpid(),
        );
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        unpoisoned(self.state.lock())
    }
}

impl fmt::Debug for BufferPool {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Takes no lock: a debug print in a forked child must not hang.
        formatter
            .debug_struct("BufferPool")
            .field("buffer_bytes", &self.buffer_bytes)
            .field("count", &self.count)
            .finish_non_exhaustive()
    }
}

impl Drop for BufferPool {
    fn drop(&mut self) {
        // Before the memory goes.
        drop(self.pinned.take());
        if self.is_owner() {
            self.mapping.unmap();
        }
    }
}

/// One buffer of a pool: exclusive access to its bytes until it is dropped, which returns it. In a
/// forked child dropping it does nothing.
pub struct Buffer {
    pool: Arc<BufferPool>,
    index: usize,
}

impl Buffer {
    /// Whether this process has the buffer's memory: false in a forked child, which must not read
    /// or write it.
    pub(crate) fn is_accessible(&self) -> bool {
        self.index != LOST && self.pool.is_owner()
    }

    /// Gives the buffer to a transfer that may take long, read-only from now on. Refused, with the
    /// buffer, where half of the pool is parked already: the other half keeps everybody else going.
    pub(crate) fn park(self) -> Result<Parked, Self> {
        let mut state = self.pool.lock();
        if 2 * (state.parked + 1) > self.pool.count {
            drop(state);
            return Err(self);
        }
        state.parked += 1;
        drop(state);
        Ok(Parked(self))
    }

    /// Leaves the memory to the kernel for good and returns an empty stand-in: for a backend that
    /// failed while the kernel may still write to this memory, and still owes its caller a buffer.
    pub(super) fn abandon(mut self) -> Self {
        self.pool.lock().lost += 1;
        // Those who wait for a buffer must see that one fewer can come.
        self.pool.returned.notify_all();
        // Keeps the mapping alive: the stand-in's `Drop` releases one count, this one stays.
        std::mem::forget(Arc::clone(&self.pool));
        self.index = LOST;
        self
    }

    /// Bytes of the memory behind this buffer: none if it was left to the kernel.
    fn bytes(&self) -> usize {
        if self.index == LOST { 0 } else { self.pool.buffer_bytes }
    }

    /// Where the bytes are. Takes no reference to them: the kernel may be writing there.
    pub(super) fn start(&self) -> *mut u8 {
        if self.index == LOST {
            NonNull::dangling().as_ptr()
        } else {
            self.pool.start_of(self.index)
        }
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: the pool's mapping is live while `self.pool` is held, initialised (anonymous
        // memory reads as zero) and `start..start + len` is this buffer's own part of it.
        unsafe { std::slice::from_raw_parts(self.start(), self.bytes()) }
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as for `deref`; the index was taken off the free list, so no other `Buffer` has
        // this part, and `self` is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.start(), self.bytes()) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // In a child the lock may have been held by a thread that does not exist here.
        if !self.is_accessible() {
            return;
        }
        self.pool.lock().free.push(self.index);
        self.pool.returned.notify_one();
    }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Buffer")
            .field("index", &self.index)
            .field("bytes", &self.bytes())
            .finish_non_exhaustive()
    }
}

/// All the memory of a pool of buffers, until it is dropped.
pub struct Slab {
    pool: Arc<BufferPool>,
    /// As they were free: the last one was used last.
    indices: Vec<usize>,
}

impl Slab {
    /// Where the memory is.
    pub fn start(&self) -> *mut u8 {
        self.pool.start_of(0)
    }

    /// Length of the memory.
    pub fn bytes(&self) -> usize {
        self.pool.mapping.bytes()
    }
}

impl Drop for Slab {
    fn drop(&mut self) {
        // In a child the lock may have been held by a thread that does not exist here.
        if self.pool.is_owner() {
            self.pool.lock().free.append(&mut self.indices);
            self.pool.returned.notify_all();
        }
    }
}

impl fmt::Debug for Slab {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Slab").field("bytes", &self.bytes()).finish_non_exhaustive()
    }
}

/// A buffer that waits in a slow transfer; see [`Buffer::park`].
#[derive(Debug)]
pub(crate) struct Parked(Buffer);

impl AsRef<[u8]> for Parked {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl Drop for Parked {
    fn drop(&mut self) {
        if self.0.is_accessible() {
            self.0.pool.lock().parked -= 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_checked() {
        for (buffer_bytes, count) in [(0, 1), (100, 1), (4096, 0), (usize::MAX - 4095, 2)] {
            assert!(BufferPool::new(buffer_bytes, count).is_err(), "{buffer_bytes} x {count}");
        }
    }

    #[test]
    fn buffers_are_aligned_disjoint_and_zero_at_first() {
        let pool = BufferPool::new(3 * 4096, 5).unwrap();
        let mut buffers: Vec<_> = (0..5).map(|_| pool.take()).collect();
        assert!(pool.try_take().is_none());
        for (value, buffer) in (1..).zip(&mut buffers) {
            assert_eq!(buffer.as_ptr().align_offset(4096), 0);
            assert!(buffer.iter().all(|byte| *byte == 0));
            buffer.fill(value);
        }
        for (value, buffer) in (1u8..).zip(&buffers) {
            assert_eq!(buffer.len(), 3 * 4096);
            assert!(buffer.iter().all(|byte| *byte == value));
        }
        drop(buffers);
        assert_eq!(pool.free(), 5);
    }

    #[test]
    fn the_last_returned_is_the_next_taken() {
        let pool = BufferPool::new(4096, 3).unwrap();
        let (first, second) = (pool.take(), pool.take());
        let address = first.as_ptr();
        drop(second);
        drop(first);
        assert_eq!(pool.take().as_ptr(), address);
    }

    #[test]
    fn a_taker_waits_for_a_return() {
        let pool = BufferPool::new(4096, 1).unwrap();
        let mut held = pool.take();
        held[0] = 7;
        let taker = std::thread::spawn({
            let pool = Arc::clone(&pool);
            move || pool.take()[0]
        });
        drop(held);
        assert_eq!(taker.join().unwrap(), 7, "contents are kept");
    }

    #[test]
    fn at_most_half_of_a_pool_is_parked() {
        let pool = BufferPool::new(4096, 5).unwrap();
        let parked: Vec<_> = (0..2).map(|_| pool.take().park().unwrap()).collect();
        let refused = pool.take().park().unwrap_err();
        assert_eq!((pool.free(), parked[0].as_ref().len()), (2, 4096));
        drop(parked);
        assert_eq!(pool.free(), 4);
        drop(refused.park().unwrap());
        assert_eq!(pool.free(), 5);
    }

    #[test]
    fn all_buffers_are_taken_at_once_or_none() {
        let pool = BufferPool::new(2 * 4096, 3).unwrap();
        let held = pool.take();
        assert!(pool.try_take_all().is_none());
        assert_eq!(pool.free(), 2);
        let last = held.as_ptr();
        drop(held);
        let slab = pool.try_take_all().unwrap();
        assert_eq!((slab.bytes(), pool.free()), (6 * 4096, 0));
        assert!(pool.try_take().is_none());
        let waiting = std::thread::spawn({
            let pool = Arc::clone(&pool);
            move || pool.take().as_ptr().addr()
        });
        drop(slab);
        assert_eq!(waiting.join().unwrap(), last.addr(), "the last returned is the next taken");
        assert_eq!(pool.free(), 3);
    }

    #[test]
    fn a_slab_outlives_its_pool_handle() {
        let pool = BufferPool::new(4096, 2).unwrap();
        let slab = pool.try_take_all().unwrap();
        drop(pool);
        let end = slab.start().wrapping_add(slab.bytes() - 1);
        // SAFETY: the last byte of the memory, to which the slab is the only access.
        unsafe { end.write_volatile(9) };
    }

    #[test]
    fn a_buffer_outlives_its_pool_handle() {
        let pool = BufferPool::new(4096, 1).unwrap();
        let mut buffer = pool.take();
        drop(pool);
        buffer.fill(9);
        assert_eq!(buffer[4095], 9);
    }

    #[test]
    fn prewarming_keeps_contents_while_buffers_are_out() {
        // An interpreter has neither the time nor the memory for more.
        let (buffer_bytes, count) = if cfg!(miri) { (2 * ALIGNMENT, 5) } else { (1 << 20, 80) };
        let pool = BufferPool::new(buffer_bytes, count).unwrap();
        let mut buffer = pool.take();
        buffer.fill(5);
        pool.prewarm(3).unwrap();
        pool.touch_free_buffers();
        assert!(buffer.iter().all(|byte| *byte == 5));
        assert_eq!(pool.free(), count - 1);
    }

    #[test]
    fn an_abandoned_buffer_is_empty_and_never_returns() {
        let pool = BufferPool::new(4096, 2).unwrap();
        let stand_in = pool.take().abandon();
        assert!(stand_in.is_empty());
        assert!(!stand_in.is_accessible());
        drop(stand_in);
        assert_eq!(pool.free(), 1);
    }
}
