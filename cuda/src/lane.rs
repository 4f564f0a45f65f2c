//! One direction of copies: a stream, the batches that were given to it, and the thread that
//! notifies of their end.
//!
//! ```text
//!  begin --> open batch --flush, or 32 MiB--> closed batches --event passed--> each is told
//!            (copies run on the               (each with the event that        (completion thread)
//!             device already)                  was recorded behind it)
//! ```
//!
//! Always holds:
//! - Everything that was given to the stream is in a batch, in the order of the stream: the batch's
//!   event is behind it.
//! - A traveller leaves its batch only when the stream has passed it, or the device is lost; so the
//!   device never uses memory that was released.
//! - Told `Ok` means: the copy's own call succeeded, the event behind it passed without an error,
//!   and the device was not lost by then.
//! - Every traveller is told exactly once, by the completion thread, in order, with no lock held.
//! - A caller that gives the stream work holds `order`, and not `state`: a driver whose queue is
//!   full blocks its caller, and that keeps nobody from being told.
//! - An end of the lane is an end of all its batches first.

use std::collections::VecDeque;
use std::mem;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};

use dtr_engine::unpoisoned;

use crate::context::{Context, Entered};
use crate::copy::{Direction, Traveller};
use crate::error::CudaError;
use crate::stream::{Event, Stream};

/// A batch of this size is closed without being asked: small enough that what lands is worked on
/// while the rest is copied, large enough that its event costs nothing.
pub const BATCH_BYTES: usize = 32 << 20;

/// How often a driver that cannot report the outcome of copies is asked.
const SYNCHRONIZE_ATTEMPTS: u32 = 3;

/// One direction of copies.
pub(crate) struct Lane {
    direction: Direction,
    shared: Arc<Shared>,
    /// `None` only while the lane is dropped.
    completion: Option<JoinHandle<()>>,
}

/// What callers and the completion thread share.
struct Shared {
    stream: Arc<Stream>,
    /// Held while the stream is given anything; always before `state`.
    order: Mutex<()>,
    state: Mutex<State>,
    /// A batch was closed, or the lane has ended.
    closed: Condvar,
    /// Travellers were notified.
    notified: Condvar,
}

#[derive(Default)]
struct State {
    open: Batch,
    /// Oldest first; the first stays until it was waited for.
    closed: VecDeque<ClosedBatch>,
    /// Travellers that were ever taken in.
    begun: u64,
    /// Travellers that were ever notified.
    notified: u64,
    is_ended: bool,
}

#[derive(Default)]
struct Batch {
    travellers: Vec<(Traveller, Result<(), CudaError>)>,
    /// Bytes of their copies.
    bytes: usize,
    /// Whether the stream was given anything, which may be work that nobody waits for.
    has_work: bool,
}

struct ClosedBatch {
    batch: Batch,
    /// The mark behind the batch, or why there is none.
    event: Result<Arc<Event>, CudaError>,
}

impl Lane {
    /// A lane with a new stream and a new thread.
    pub(crate) fn start(entered: &Entered<'_>, direction: Direction) -> Result<Self, CudaError> {
        let shared = Arc::new(Shared {
            stream: Arc::new(Stream::new(entered)?),
            order: Mutex::default(),
            state: Mutex::default(),
            closed: Condvar::new(),
            notified: Condvar::new(),
        });
        let (is_ready, ready) = sync_channel(1);
        let name = format!("dtr-{direction}-{}", entered.context().ordinal());
        let thread_shared = Arc::clone(&shared);
        let completion = thread::Builder::new()
            .name(name.clone())
            .spawn(move || complete(&thread_shared, &is_ready))
            .map_err(|error| no_thread(&name, error.to_string()))?;
        let lane = Self { direction, shared, completion: Some(completion) };
        ready.recv().map_err(|error| no_thread(&name, error.to_string()))??;
        Ok(lane)
    }

    /// Gives the stream the copy of `bytes` for `traveller`, who is notified when it is over, or
    /// that `copy` failed.
    pub(crate) fn begin(
        &self,
        traveller: Traveller,
        bytes: usize,
        copy: impl FnOnce(&Entered<'_>, &Stream) -> Result<(), CudaError>,
    ) {
        let shared = &self.shared;
        let ordered = shared.order();
        // A copy of nothing needs no device, and some drivers refuse it.
        let outcome = if bytes == 0 { Ok(()) } else { shared.give(&ordered, copy) };
        let mut state = shared.lock();
        state.open.travellers.push((traveller, outcome));
        state.open.bytes = state.open.bytes.saturating_add(bytes);
        state.open.has_work = true;
        state.begun += 1;
        let is_full = state.open.bytes >= BATCH_BYTES;
        drop(state);
        if is_full {
            shared.close(&ordered);
        }
    }

    /// Gives the stream work for which no traveller waits.
    pub(crate) fn give(
        &self,
        work: impl FnOnce(&Entered<'_>, &Stream) -> Result<(), CudaError>,
    ) -> Result<(), CudaError> {
        self.shared.give(&self.shared.order(), work)
    }

    /// Closes the open batch.
    pub(crate) fn flush(&self) {
        self.shared.close(&self.shared.order());
    }

    /// The event behind everything that was given to the stream so far, or `None` where the stream
    /// has passed it all.
    pub(crate) fn newest(&self) -> Result<Option<Arc<Event>>, CudaError> {
        let ordered = self.shared.order();
        self.shared.close(&ordered);
        let state = self.shared.lock();
        state.closed.back().map(|newest| newest.event.clone()).transpose()
    }

    /// Waits until everybody whose copy was begun before has been notified.
    pub(crate) fn finish(&self) -> Result<(), CudaError> {
        if self.is_own_thread() {
            let what = format!("waiting for the copies {}", self.direction);
            return Err(CudaError::invalid(what, "called by one of those that are waited for"));
        }
        let ordered = self.shared.order();
        self.shared.close(&ordered);
        let mut state = self.shared.lock();
        drop(ordered);
        let target = state.begun;
        while state.notified < target {
            state = unpoisoned(self.shared.notified.wait(state));
        }
        self.shared.stream.context().check_loss()
    }

    /// Travellers that have not been notified yet.
    pub(crate) fn pending(&self) -> u64 {
        let state = self.shared.lock();
        state.begun - state.notified
    }

    pub(crate) fn stream(&self) -> &Arc<Stream> {
        &self.shared.stream
    }

    fn is_own_thread(&self) -> bool {
        let own = self.completion.as_ref().map(|completion| completion.thread().id());
        own == Some(thread::current().id())
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        let Some(completion) = self.completion.take() else {
            return;
        };
        if self.shared.stream.context().check_owner().is_err() {
            // The thread does not exist in a forked child, and may have held the lock.
            mem::forget(completion);
            return;
        }
        let own = completion.thread().id() == thread::current().id();
        self.flush();
        self.shared.lock().is_ended = true;
        self.shared.closed.notify_one();
        // A notified traveller may hold the last reference to the device: the thread then ends
        // alone.
        if !own && completion.join().is_err() {
            tracing::error!(direction = %self.direction, "a completion thread panicked");
        }
    }
}

impl Shared {
    /// Gives the stream `work`, and counts it to the open batch whatever comes of it: a call that
    /// failed may have begun something.
    fn give(
        &self,
        _ordered: &MutexGuard<'_, ()>,
        work: impl FnOnce(&Entered<'_>, &Stream) -> Result<(), CudaError>,
    ) -> Result<(), CudaError> {
        let entered = self.context().enter()?;
        self.lock().open.has_work = true;
        work(&entered, &self.stream)
    }

    fn close(&self, _ordered: &MutexGuard<'_, ()>) {
        if !self.lock().open.has_work {
            return;
        }
        let entered = self.context().enter();
        let event = entered.and_then(|entered| self.stream.handle().record(&entered));
        let mut state = self.lock();
        let batch = mem::take(&mut state.open);
        state.closed.push_back(ClosedBatch { batch, event: event.map(Arc::new) });
        self.closed.notify_one();
    }

    /// The event of the oldest batch, which stays where it is; `None` when there will be none.
    fn oldest(&self) -> Option<Result<Arc<Event>, CudaError>> {
        let mut state = self.lock();
        loop {
            if let Some(oldest) = state.closed.front() {
                return Some(oldest.event.clone());
            }
            if state.is_ended {
                return None;
            }
            state = unpoisoned(self.closed.wait(state));
        }
    }

    /// Waits until the device does not use the memory of the batch behind which `event` is.
    fn settle(
        &self,
        entered: &Entered<'_>,
        event: Result<Arc<Event>, CudaError>,
    ) -> Result<(), CudaError> {
        let passed = event.and_then(|event| event.wait(entered));
        if passed.is_err() {
            self.come_to_rest(entered);
        }
        passed.and_then(|()| self.context().check_loss())
    }

    /// Waits until nothing of the stream is under way, of which an event gives no answer.
    ///
    /// A driver that refuses even this time and again does not have the stream any more (its
    /// context was destroyed, the process ends): nothing is under way then either.
    fn come_to_rest(&self, entered: &Entered<'_>) {
        for attempt in 1..=SYNCHRONIZE_ATTEMPTS {
            match self.stream.synchronize(entered) {
                Ok(()) => return,
                Err(error) if error.is_device_lost() || attempt == SYNCHRONIZE_ATTEMPTS => {
                    return self.context().give_up(&error);
                }
                Err(error) => tracing::warn!(%error, "asking again whether copies are over"),
            }
        }
    }

    /// Takes the oldest batch out and notifies its travellers.
    fn notify_oldest(&self, passed: &Result<(), CudaError>) {
        let Some(oldest) = self.lock().closed.pop_front() else {
            return;
        };
        for (traveller, begun) in oldest.batch.travellers {
            traveller.notify(begun.and_then(|()| passed.clone()));
            self.lock().notified += 1;
        }
        self.notified.notify_all();
    }

    fn context(&self) -> &Arc<Context> {
        self.stream.context()
    }

    fn order(&self) -> MutexGuard<'_, ()> {
        // It guards no data.
        unpoisoned(self.order.lock())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // No critical section can leave the state in parts: a batch moves in one step.
        unpoisoned(self.state.lock())
    }
}

/// The completion thread: says whether it could enter the context, then waits for one batch after
/// the other.
fn complete(shared: &Shared, is_ready: &SyncSender<Result<(), CudaError>>) {
    let entered = match shared.context().enter() {
        Ok(entered) => entered,
        Err(error) => {
            // Received by `start`, which waits for it.
            let _ = is_ready.send(Err(error));
            return;
        }
    };
    let _ = is_ready.send(Ok(()));
    while let Some(event) = shared.oldest() {
        let passed = shared.settle(&entered, event);
        shared.notify_oldest(&passed);
    }
}

fn no_thread(name: &str, why: String) -> CudaError {
    CudaError::System { what: format!("starting the thread `{name}`"), why }
}
