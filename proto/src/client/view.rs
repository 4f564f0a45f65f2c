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
        let known = view.seen_epoch;
        view.seen_epoch = known.max(reply.epoch);
        if reply.fence <= view.acknowledged_epoch {
            view.acknowledged_epoch = view.acknowledged_epoch.max(reply.epoch);
        }
        // Two heartbeats may be under way at a time, and both are told the same.
        let news: Vec<_> =
            reply.changes.into_iter().filter(|change| change.epoch > known).collect();
        let first = news.first().map_or(reply.epoch.saturating_add(1), |change| change.epoch);
        if first > known.saturating_add(1) {
            view.push(Notice::Missed(first - 1));
        }
        for change in news {
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

#[cfg(test)]
mod tests {
    use super::*;

    fn shared_at(epoch: u64) -> Shared {
        let registration = Registration {
            job: "job".into(),
            worker_id: "worker".into(),
            rank: 0,
            world_size: 2,
            ip: String::new(),
            port: 0,
            advertise_address: String::new(),
        };
        Shared::new(registration, 7, epoch)
    }

    /// What a heartbeat brings when the membership is at `epoch`, with these changes.
    fn reply(epoch: u64, changes: &[u64]) -> v1::HeartbeatReply {
        let change = |epoch: &u64| v1::MembershipChange { epoch: *epoch, ..Default::default() };
        v1::HeartbeatReply {
            epoch,
            changes: changes.iter().map(change).collect(),
            ..Default::default()
        }
    }

    /// The changes that were told; those that were missed as the last of them, negative.
    fn told(shared: &Shared) -> Vec<i64> {
        let number = |epoch| i64::try_from(epoch).unwrap();
        let notices = std::mem::take(&mut shared.view().notices);
        let epochs = notices.into_iter().map(|notice| match notice {
            Notice::Changed(change) => number(change.epoch),
            Notice::Missed(epoch) => -number(epoch),
            other => panic!("{other:?}"),
        });
        epochs.collect()
    }

    #[test]
    fn a_change_is_told_once_in_whatever_order_replies_come() {
        for replies in [[(6, vec![6]), (7, vec![6, 7])], [(7, vec![6, 7]), (6, vec![6])]] {
            let shared = shared_at(5);
            for (epoch, changes) in &replies {
                shared.take_in(reply(*epoch, changes));
            }
            assert_eq!(told(&shared), [6, 7], "{replies:?}");
            assert_eq!(shared.view().seen_epoch, 7);
        }
    }

    #[test]
    fn changes_that_nobody_told_of_are_said_to_be_missing() {
        let shared = shared_at(5);
        shared.take_in(reply(5, &[]));
        assert_eq!(told(&shared), [0; 0]);
        // The coordinator began again, and does not know what made the membership this one.
        shared.take_in(reply(7, &[]));
        assert_eq!(told(&shared), [-7]);
        // There were more than it remembers.
        shared.take_in(reply(500, &[499, 500]));
        assert_eq!(told(&shared), [-498, 499, 500]);
    }
}
