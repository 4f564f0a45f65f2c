//! What this process knows of its membership, and who waits for that to change.
//!
//! Always holds:
//! - what it knows of epochs never goes back, and a loss counts as known once a caller was told;
//! - its end is final, and one error says why;
//! - notices are bounded: a slow reader misses the oldest.

use std::collections::VecDeque;
use std::sync::atomic::AtomicU64;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tracing::warn;

use super::connection::chance;
use super::error::{ClientError, ErrorKind};
use super::worker::{Notice, Registration};
use crate::v1;

/// Notices that are kept for a reader that is slow; older ones are dropped.
const NOTICES_MAX: usize = 1_024;
/// How long a call waits for this worker to be a member again.
const RETURN: Duration = Duration::from_secs(10);

/// What the heartbeat and the callers share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) registration: Registration,
    pub(super) progress: AtomicU64,
    pub(super) arrivals: AtomicU64,
    /// The step that was begun last, and how often.
    pub(super) tries: Mutex<(u64, u32)>,
    view: Mutex<View>,
    pub(super) changed: Condvar,
    /// Has the heartbeat look now.
    pub(super) look: Notify,
    /// The heartbeat has been answered, or will not be any more.
    looked: Notify,
}

/// What the coordinator said last.
#[derive(Debug, Default)]
pub(super) struct View {
    /// This process, as the coordinator knows it.
    pub(super) incarnation: u64,
    /// When it joined, or joined again.
    pub(super) joined_epoch: u64,
    /// It was told that it is no member, and has not tried to come back yet.
    is_fenced: bool,
    /// Drawn for coming back: the same one until that is answered; and whether it was sent before.
    pub(super) next: Option<(u64, bool)>,
    /// The newest change that this worker's caller was told of by an outcome.
    pub(super) acknowledged_epoch: u64,
    /// The newest change that a heartbeat brought.
    pub(super) seen_epoch: u64,
    pub(super) notices: VecDeque<Notice>,
    pub(super) abort_reason: Option<String>,
    pub(super) ended: Option<ClientError>,
}

impl Shared {
    /// Of a process that the coordinator has just let in.
    pub(super) fn new(registration: Registration, incarnation: u64, epoch: u64) -> Self {
        let mut view = View::default();
        view.join(incarnation, Some(epoch));
        (view.seen_epoch, view.acknowledged_epoch) = (epoch, epoch);
        Self {
            registration,
            progress: AtomicU64::new(0),
            arrivals: AtomicU64::new(0),
            tries: Mutex::default(),
            view: Mutex::new(view),
            changed: Condvar::new(),
            look: Notify::new(),
            looked: Notify::new(),
        }
    }

    pub(super) fn view(&self) -> MutexGuard<'_, View> {
        self.view.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn identity(&self, incarnation: u64, epoch: u64) -> v1::Identity {
        let Registration { job, worker_id, .. } = &self.registration;
        v1::Identity { job: job.clone(), worker_id: worker_id.clone(), incarnation, epoch }
    }

    pub(super) fn acknowledged_identity(&self) -> v1::Identity {
        let view = self.view();
        self.identity(view.incarnation, view.acknowledged_epoch)
    }

    /// Who this process is, and who it may have become by a registration on its way.
    pub(super) fn identities(&self) -> Vec<v1::Identity> {
        let view = self.view();
        let next = view.next.map(|(next, _)| next);
        let known = [Some(view.incarnation), next].into_iter().flatten();
        known.map(|incarnation| self.identity(incarnation, view.acknowledged_epoch)).collect()
    }

    pub(super) fn seen_identity(&self) -> v1::Identity {
        let view = self.view();
        self.identity(view.incarnation, view.seen_epoch)
    }

    /// The error that every call of this worker ends with from now on, if there is one.
    pub(super) fn check(&self, what: &str) -> Result<(), ClientError> {
        let view = self.view();
        let Some(ended) = &view.ended else { return Ok(()) };
        Err(ClientError { what: what.to_owned(), ..ended.clone() })
    }

    /// Whether this process is known to be no member, and whether that is for good.
    fn standing(&self) -> (bool, bool) {
        let view = self.view();
        (view.is_fenced, view.ended.is_some())
    }

    /// A call was refused because this process is no member: the heartbeat sees to it.
    pub(super) fn note_fenced(&self) {
        self.view().is_fenced = true;
        self.look.notify_one();
    }

    /// Whether a call failed only because this process was taken for dead, and it is a member again
    /// by now: then the call can be made again.
    pub(super) async fn is_back_after<T>(&self, reply: &Result<T, ClientError>) -> bool {
        if !reply.as_ref().is_err_and(|error| error.kind == ErrorKind::Fenced) {
            return false;
        }
        let is_answered = async {
            loop {
                let looked = self.looked.notified();
                let (is_out, has_ended) = self.standing();
                if !is_out || has_ended {
                    return !has_ended;
                }
                looked.await;
            }
        };
        tokio::time::timeout(RETURN, is_answered).await.unwrap_or(false)
    }

    pub(super) fn take_in(&self, reply: v1::HeartbeatReply) {
        let mut view = self.view();
        view.is_fenced = false;
        view.seen_epoch = view.seen_epoch.max(reply.epoch);
        if reply.fence <= view.acknowledged_epoch {
            view.acknowledged_epoch = view.acknowledged_epoch.max(reply.epoch);
        }
        for change in reply.changes {
            view.push(Notice::Changed(change));
        }
        if !reply.abort_reason.is_empty() && view.abort_reason.is_none() {
            view.abort_reason = Some(reply.abort_reason.clone());
            view.push(Notice::Aborted(reply.abort_reason));
        }
        drop(view);
        self.tell_changed();
    }

    pub(super) fn tell_changed(&self) {
        self.changed.notify_all();
        self.looked.notify_waiters();
    }

    pub(super) fn acknowledge(&self, epoch: u64) {
        let mut view = self.view();
        view.acknowledged_epoch = view.acknowledged_epoch.max(epoch);
    }

    pub(super) fn end(&self, error: ClientError) {
        let mut view = self.view();
        if view.ended.is_none() {
            warn!("{error}");
            view.push(Notice::Fenced(error.clone()));
            view.ended = Some(error);
        }
        drop(view);
        self.tell_changed();
    }
}

impl View {
    /// Is a member since `epoch`, or may have been. What happened meanwhile it is still to be told.
    pub(super) fn join(&mut self, incarnation: u64, epoch: Option<u64>) {
        (self.incarnation, self.next) = (incarnation, None);
        if let Some(epoch) = epoch {
            self.joined_epoch = epoch;
            self.is_fenced = false;
        }
    }

    /// The incarnation that it had, the one to come back with, and whether that was sent before.
    pub(super) fn draw_next(&mut self) -> (u64, u64, bool) {
        self.is_fenced = true;
        let (next, was_sent) = self.next.unwrap_or_else(|| (chance(), false));
        self.next = Some((next, true));
        (self.incarnation, next, was_sent)
    }

    pub(super) fn push(&mut self, notice: Notice) {
        if self.notices.len() == NOTICES_MAX {
            self.notices.pop_front();
        }
        self.notices.push_back(notice);
    }
}
