//! A registered worker: its identity, its heartbeats and what it waits for.
//!
//! Always holds: one thing registers a worker again that was taken for dead, its heartbeat; whoever
//! learns of it first wakes that up, and gives the call's own error to its caller.

use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use tokio::task::AbortHandle;

use super::connection::{Connection, Inner, Pending, Wait};
use super::error::{ClientError, ErrorKind};
use super::heartbeat;
use super::view::{Shared, View};
use crate::v1::barriers_client::BarriersClient;
use crate::v1::membership_client::MembershipClient;
use crate::v1::{self, wait_barrier_reply::Outcome};

/// How long leaving may hold up the end of a process.
const LEAVE: Duration = Duration::from_secs(2);

/// Who registers, and with whom.
#[derive(Clone, Debug)]
pub struct Registration {
    /// The training run.
    pub job: String,
    /// The worker's name.
    pub worker_id: String,
    /// Its rank.
    pub rank: u32,
    /// How many ranks there are.
    pub world_size: u32,
    /// Where its own service listens.
    pub ip: String,
    /// The port of that service.
    pub port: u32,
    /// The address that others should use instead; empty if none is.
    pub advertise_address: String,
}

/// Something that the worker should know of.
#[derive(Clone, Debug)]
pub enum Notice {
    /// The membership changed.
    Changed(v1::MembershipChange),
    /// The membership changed, up to this number, and how is not known: the coordinator began again
    /// meanwhile, or there were more changes than it remembers.
    Missed(u64),
    /// The job is aborted, for this reason.
    Aborted(String),
    /// This process was taken for dead, and is a member again since this change of the membership.
    Rejoined(u64),
    /// This process is no member any more.
    Fenced(ClientError),
}

/// A member of a job. Dropping it leaves the job silently; [`Worker::leave`] says so.
#[derive(Debug)]
pub struct Worker {
    pub(super) connection: Arc<Connection>,
    pub(super) shared: Arc<Shared>,
    pub(super) heartbeats: AbortHandle,
    pub(super) reply: v1::RegisterReply,
}

/// A barrier to wait at.
#[derive(Clone, Debug)]
pub struct BarrierWait {
    /// Its name.
    pub name: String,
    /// How long to wait for the others.
    pub timeout: Duration,
    /// What must be the same on every rank there, for people to read; empty if nothing is compared.
    pub alike: String,
    /// The arrival's number among those of its rank.
    arrival: u64,
}

impl Worker {
    /// Registers; tries again while a former process or another worker stands in the way.
    pub fn register(connection: &Arc<Connection>, registration: Registration) -> Pending<Self> {
        let what = format!(
            "registering worker `{}` in job `{}`",
            registration.worker_id, registration.job
        );
        let owner = Arc::clone(connection);
        let name = what.clone();
        connection
            .start(&what, async move { heartbeat::register(owner, &name, registration).await })
    }

    /// What the coordinator said when it let the worker in.
    pub fn welcome(&self) -> &v1::RegisterReply {
        &self.reply
    }

    /// The job.
    pub fn job(&self) -> &str {
        &self.shared.registration.job
    }

    /// The connection that it uses.
    pub fn connection(&self) -> &Arc<Connection> {
        &self.connection
    }

    /// Who this worker is, as calls say it.
    pub fn identity(&self) -> v1::Identity {
        self.shared.acknowledged_identity()
    }

    /// The newest membership number that a heartbeat brought.
    pub fn epoch(&self) -> u64 {
        self.shared.view().seen_epoch
    }

    /// Why the job is aborted, if it is.
    pub fn abort_reason(&self) -> Option<String> {
        self.shared.view().abort_reason.clone()
    }

    /// Says that the training loop moved.
    pub fn set_progress(&self, progress: u64) {
        self.shared.progress.store(progress, Ordering::Relaxed);
    }

    /// The next notice, if one comes within `timeout`.
    pub fn next_notice(&self, timeout: Duration) -> Option<Notice> {
        let view = self.shared.view();
        let is_empty = |view: &mut View| view.notices.is_empty() && view.ended.is_none();
        let waited = self.shared.changed.wait_timeout_while(view, timeout, is_empty);
        let (mut view, _) = waited.unwrap_or_else(PoisonError::into_inner);
        view.notices.pop_front()
    }

    /// Whether this worker is no member any more.
    pub fn is_ended(&self) -> bool {
        self.shared.view().ended.is_some()
    }

    /// One arrival at the barrier `name`. Arrivals are numbered: those of a later process of the
    /// same worker, which joined later, are larger.
    pub fn arrival(&self, name: &str, timeout: Duration) -> BarrierWait {
        let (name, alike) = (name.to_owned(), String::new());
        BarrierWait { name, timeout, alike, arrival: self.next_arrival() }
    }

    pub(super) fn next_arrival(&self) -> u64 {
        let count = self.shared.arrivals.fetch_add(1, Ordering::Relaxed) + 1;
        (self.shared.view().joined_epoch << 32) + count
    }

    /// The newest membership number that this process knows.
    pub(super) fn known_epoch(&self) -> u64 {
        let view = self.shared.view();
        view.seen_epoch.max(view.joined_epoch)
    }

    /// How often the step has been begun before this time.
    pub(super) fn next_try(&self, step: u64) -> u32 {
        let mut tries = self.shared.tries.lock().unwrap_or_else(PoisonError::into_inner);
        *tries = if tries.0 == step { (step, tries.1.saturating_add(1)) } else { (step, 0) };
        tries.1
    }

    /// Waits at a barrier.
    pub fn wait_barrier(&self, wait: &BarrierWait) -> Pending<u64> {
        let what = format!("waiting at barrier `{}`", wait.name);
        let shared = Arc::clone(&self.shared);
        let inner = Arc::clone(self.connection.inner());
        let (name, wait) = (what.clone(), wait.clone());
        self.connection.start(&what, async move {
            shared.check(&name)?;
            let request = v1::WaitBarrierRequest {
                identity: Some(shared.acknowledged_identity()),
                name: wait.name.clone(),
                arrival: wait.arrival,
                timeout_ms: u64::try_from(wait.timeout.as_millis()).unwrap_or(u64::MAX),
                alike: wait.alike.clone(),
            };
            let call = |channel, request| async move {
                BarriersClient::new(channel).wait_barrier(request).await
            };
            let reply = inner.ask(&name, Wait::Long, request, call).await;
            shared.barrier_outcome(&inner, &name, wait.timeout, reply).await
        })
    }

    /// Takes an arrival back: its caller no longer waits.
    pub fn withdraw(&self, wait: &BarrierWait) -> Pending<v1::WithdrawBarrierReply> {
        let request = v1::WithdrawBarrierRequest {
            identity: Some(self.identity()),
            name: wait.name.clone(),
            arrival: wait.arrival,
        };
        let what = format!("withdrawing from barrier `{}`", wait.name);
        self.connection.ask(&what, request, |channel, request| async move {
            BarriersClient::new(channel).withdraw_barrier(request).await
        })
    }

    /// Everybody in the job.
    pub fn list(&self) -> Pending<v1::ListWorkersReply> {
        let request = v1::ListWorkersRequest { job: self.job().to_owned() };
        self.connection.ask("listing workers", request, |channel, request| async move {
            MembershipClient::new(channel).list_workers(request).await
        })
    }

    /// Leaves the job: with `failure`, as a worker that failed. Heartbeats stop at once; if the
    /// coordinator does not answer soon, it notices by itself.
    pub fn leave(&self, failure: &str) -> Result<(), ClientError> {
        self.heartbeats.abort();
        let what = format!("leaving job `{}`", self.job());
        {
            let mut view = self.shared.view();
            if view.ended.is_some() {
                return Ok(());
            }
            view.ended = Some(ClientError::new(
                ErrorKind::Closed,
                &what,
                "the worker left",
                "register it again",
            ));
            self.shared.changed.notify_all();
        }
        let failure = shortened(failure);
        let identities = self.shared.identities();
        let inner = Arc::clone(self.connection.inner());
        let name = what.clone();
        let pending = self.connection.start(&what, async move {
            let call = |channel, request| async move {
                MembershipClient::new(channel).leave(request).await
            };
            let mut left = Ok(v1::LeaveReply::default());
            for identity in identities {
                let request =
                    v1::LeaveRequest { identity: Some(identity), failure: failure.clone() };
                left = inner.ask(&name, Wait::Once(LEAVE), request, call).await;
            }
            left
        });
        pending.join().map(drop)
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.heartbeats.abort();
    }
}

impl Shared {
    /// What a wait's reply means; afterwards the caller knows of every loss so far.
    pub(super) async fn barrier_outcome(
        &self,
        inner: &Inner,
        what: &str,
        timeout: Duration,
        reply: Result<v1::WaitBarrierReply, ClientError>,
    ) -> Result<u64, ClientError> {
        match self.learn(inner, reply).await?.outcome {
            Some(Outcome::Released(released)) => Ok(released.generation),
            Some(Outcome::TimedOut(late)) => Err(timed_out(what, timeout, &late)),
            Some(Outcome::EpochChanged(changed)) => {
                self.acknowledge(changed.epoch);
                Err(ClientError::new(
                    ErrorKind::MembershipChanged,
                    what,
                    format!("the job lost a worker: {}", changed.reason),
                    "decide whether to go on without it, then wait again",
                ))
            }
            Some(Outcome::Aborted(reason)) => Err(ClientError::new(
                ErrorKind::JobAborted,
                what,
                format!("the job is aborted: {reason}"),
                "end this process; the job starts over once all of its workers have ended",
            )),
            None => Err(ClientError::new(
                ErrorKind::Internal,
                what,
                "the reply has no outcome that this version knows",
                "use the same version on both sides",
            )),
        }
    }
}

fn timed_out(what: &str, timeout: Duration, late: &v1::BarrierTimedOut) -> ClientError {
    let named: Vec<String> = late
        .missing
        .iter()
        .map(|missing| match missing.worker_id.as_str() {
            "" => format!("rank {} (nobody has it)", missing.rank),
            worker_id => format!("rank {} (`{worker_id}`)", missing.rank),
        })
        .collect();
    let more = if usize::try_from(late.missing_count).unwrap_or(0) > named.len() {
        " and others"
    } else {
        ""
    };
    ClientError::new(
        ErrorKind::TimedOut,
        what,
        format!(
            "{} {} did not come within {} s: {}{more}",
            late.missing_count,
            if late.missing_count == 1 { "rank" } else { "ranks" },
            (timeout.as_secs_f64() * 10.0).round() / 10.0,
            named.join(", ")
        ),
        "look at the logs of those workers; a longer wait is `timeout=` in seconds",
    )
}

/// A failure's text, within what the coordinator takes.
pub(super) fn shortened(text: &str) -> String {
    text.chars().filter(|character| *character != '\0').take(1_000).collect()
}
