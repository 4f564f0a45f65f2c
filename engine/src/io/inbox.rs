//! Transfers that a backend has accepted and not yet begun, and the one way in which it ends them.
//!
//! Always holds:
//! - A transfer that enters leaves exactly once: to a worker, or, once the backend has failed, to
//!   its own `done` with the reason. Closing, which only the last owner does, lets what waits be
//!   done.
//! - `done` runs outside the lock, and a panic in it ends only that call.
//! - In a forked child no lock is taken: a thread that is not there may hold it.

use std::collections::VecDeque;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};

use rustix::process::{Pid, getpid};

use super::{ALIGNMENT, Transfer};
use crate::sync::{Condvar, Mutex, MutexGuard, unpoisoned, wait_while};

/// The queue between submitters and a backend's threads.
#[derive(Debug)]
pub(super) struct Inbox {
    state: Mutex<State>,
    arrived: Condvar,
    /// The process whose threads serve this queue.
    owner: Pid,
}

#[derive(Debug, Default)]
struct State {
    waiting: VecDeque<Transfer>,
    /// The backend is being dropped.
    closed: bool,
    /// Why the backend died, if it did.
    failure: Option<String>,
}

/// What [`Inbox::try_next`] found.
#[derive(Debug)]
pub(super) enum Next {
    /// The transfer to begin.
    Transfer(Transfer),
    /// Nothing now; more may come.
    Empty,
    /// Nothing now or ever.
    Closed,
}

impl Inbox {
    pub(super) fn new() -> Self {
        Self { state: Mutex::default(), arrived: Condvar::new(), owner: getpid() }
    }

    /// Accepts a transfer, or ends it at once where it is malformed or the backend is dead.
    /// Returns whether the queue was empty until now, that is, whether a worker must be woken.
    pub(super) fn push(&self, transfer: Transfer) -> bool {
        let admitted = match self.check(&transfer) {
            Ok(()) => self.admit(transfer),
            Err(error) => Err((transfer, error)),
        };
        admitted.unwrap_or_else(|(transfer, error)| {
            complete(transfer, Err(error));
            false
        })
    }

    fn admit(&self, transfer: Transfer) -> Result<bool, (Transfer, io::Error)> {
        let mut state = self.lock();
        if let Some(failure) = &state.failure {
            return Err((transfer, io::Error::other(failure.clone())));
        }
        let was_empty = state.waiting.is_empty();
        state.waiting.push_back(transfer);
        drop(state);
        self.arrived.notify_one();
        Ok(was_empty)
    }

    /// The next transfer, if one waits.
    pub(super) fn try_next(&self) -> Next {
        let mut state = self.lock();
        match state.waiting.pop_front() {
            Some(transfer) => Next::Transfer(transfer),
            None if state.closed => Next::Closed,
            None => Next::Empty,
        }
    }

    /// The next transfer, or waits for one; `None` once closed and empty.
    pub(super) fn next(&self) -> Option<Transfer> {
        let is_idle = |state: &mut State| state.waiting.is_empty() && !state.closed;
        wait_while(&self.arrived, self.lock(), None, is_idle).waiting.pop_front()
    }

    /// Lets the workers end once nothing waits.
    pub(super) fn close(&self) {
        self.lock().closed = true;
        self.arrived.notify_all();
    }

    /// Ends everything that waits, and everything to come, with `reason`.
    pub(super) fn fail(&self, reason: &str) {
        let waiting = {
            let mut state = self.lock();
            state.failure.get_or_insert_with(|| reason.to_owned());
            std::mem::take(&mut state.waiting)
        };
        for transfer in waiting {
            complete(transfer, Err(io::Error::other(reason.to_owned())));
        }
    }

    /// Whether this is the process whose threads serve the queue, and not a fork of it.
    pub(super) fn is_owner(&self) -> bool {
        getpid() == self.owner
    }

    fn check(&self, transfer: &Transfer) -> io::Result<()> {
        if !self.is_owner() {
            return Err(io::Error::other(format!(
                "the io backend belongs to process {}, of which this one is a fork: open the \
                 store again in this process",
                self.owner
            )));
        }
        check_shape(transfer)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        unpoisoned(self.state.lock())
    }
}

/// Calls `done` with the outcome. A panic in it is logged and goes no further: it must not take the
/// thread, and with it everyone else's transfers, along.
pub(super) fn complete(transfer: Transfer, outcome: io::Result<usize>) {
    let Transfer { file, buffer, done, .. } = transfer;
    if catch_unwind(AssertUnwindSafe(|| done(outcome, buffer))).is_err() {
        tracing::error!(
            path = %file.path.display(),
            "the callback of a transfer panicked; other transfers go on"
        );
    }
}

/// Names what the kernel would answer with a bare `EINVAL`.
fn check_shape(transfer: &Transfer) -> io::Result<()> {
    let range = &transfer.range;
    let misuse = |why: String| Err(io::Error::new(io::ErrorKind::InvalidInput, why));
    if range.start > range.end || range.end > transfer.buffer.len() {
        return misuse(format!(
            "bytes {range:?} of a buffer of {} bytes do not exist",
            transfer.buffer.len()
        ));
    }
    let aligned = |value: usize| value.is_multiple_of(ALIGNMENT);
    let offset_is_aligned = transfer.offset.is_multiple_of(ALIGNMENT as u64);
    if transfer.file.direct && !(offset_is_aligned && aligned(range.start) && aligned(range.end)) {
        return misuse(format!(
            "a direct transfer of bytes {range:?} at offset {} is not aligned to {ALIGNMENT}",
            transfer.offset
        ));
    }
    Ok(())
}
