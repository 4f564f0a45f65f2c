//! A registered worker: its identity, its heartbeats and what it waits for.
//!
//! Always holds: one thing registers a worker again that was taken for dead, its heartbeat; whoever
//! learns of it first wakes that up, and gives the call's own error to its caller.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::task::AbortHandle;
use tracing::{info, warn};

use super::connection::{Connection, Inner, Pending, Wait, chance};
use super::error::{ClientError, ErrorKind};
use crate::v1::barriers_client::BarriersClient;
use crate::v1::membership_client::MembershipClient;
use crate::v1::{self, wait_barrier_reply::Outcome};

/// Notices that are kept for a reader that is slow; older ones are dropped.
const NOTICES_MAX: usize = 1_024;
/// How long leaving may hold up the end of a process.
const LEAVE: Duration = Duration::from_secs(2);
/// How long a registration that others stand in the way of is tried again.
const CONFLICT: Duration = Duration::from_mins(1);
/// How long a call waits for this worker to be a member again.
const RETURN: Duration = Duration::from_secs(10);
/// Heartbeats in a row without an answer before the connection is made anew.
const MISSES_MAX: u32 = 2;

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

/// Something that the worker should hear of.
#[derive(Clone, Debug)]
pub enum Notice {
    /// The membership changed.
    Changed(v1::MembershipChange),
    /// The job is aborted, for this reason.
    Aborted(String),
    /// This process was taken for dead, and is a member again since this change of the membership.
    Rejoined(u64),
    /// This process is no member any more.
    Fenced(ClientError),
}

/// A member of a job. Dropping it leaves the job without a word; [`Worker::leave`] says so.
#[derive(Debug)]
pub struct Worker {
    pub(super) connection: Arc<Connection>,
    pub(super) shared: Arc<Shared>,
    heartbeats: AbortHandle,
    reply: v1::RegisterReply,
}

/// What the heartbeat and the callers share.
#[derive(Debug)]
pub(super) struct Shared {
    registration: Registration,
    progress: AtomicU64,
    arrivals: AtomicU64,
    /// The step that was begun last, and how often.
    tries: Mutex<(u64, u32)>,
    view: Mutex<View>,
    changed: Condvar,
    /// Has the heartbeat look now.
    look: Notify,
    /// The heartbeat has been answered, or will not be any more.
    looked: Notify,
}

#[derive(Debug, Default)]
struct View {
    /// This process, as the coordinator knows it.
    incarnation: u64,
    /// When it joined, or joined again.
    joined_epoch: u64,
    /// It was told that it is no member, and has not tried to come back yet.
    is_fenced: bool,
    /// Drawn for coming back: the same one until that is answered; and whether it was sent before.
    next: Option<(u64, bool)>,
    /// The newest change that this worker's caller was told of by an outcome.
    acknowledged_epoch: u64,
    /// The newest change that a heartbeat brought.
    seen_epoch: u64,
    notices: VecDeque<Notice>,
    abort_reason: Option<String>,
    ended: Option<ClientError>,
}

/// A barrier to wait at.
#[derive(Clone, Debug)]
pub struct BarrierWait {
    /// Its name.
    pub name: String,
    /// How long to wait for the others.
    pub timeout: Duration,
    /// What everybody there must bring alike, in words for people; empty if nothing is compared.
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
        connection.start(&what, async move { register(owner, &name, registration).await })
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

async fn register(
    connection: Arc<Connection>,
    what: &str,
    registration: Registration,
) -> Result<Worker, ClientError> {
    let incarnation = chance();
    let request = registration.request(incarnation, 0);
    let reply = insist(connection.inner(), what, &request).await?;
    let mut view = View::default();
    view.join(incarnation, Some(reply.epoch));
    (view.seen_epoch, view.acknowledged_epoch) = (reply.epoch, reply.epoch);
    let shared = Arc::new(Shared {
        registration,
        progress: AtomicU64::new(0),
        arrivals: AtomicU64::new(0),
        tries: Mutex::default(),
        view: Mutex::new(view),
        changed: Condvar::new(),
        look: Notify::new(),
        looked: Notify::new(),
    });
    let interval = Duration::from_millis(reply.heartbeat_interval_ms.max(1));
    let beats = beat(Arc::clone(&shared), Arc::clone(connection.inner()), interval);
    let heartbeats = connection.spawn(beats);
    Ok(Worker { connection, shared, heartbeats, reply })
}

/// Asks again while others stand in the way: a former process that is not yet known to be dead, or
/// a run that is about to end.
async fn insist(
    inner: &Inner,
    what: &str,
    request: &v1::RegisterRequest,
) -> Result<v1::RegisterReply, ClientError> {
    let started = std::time::Instant::now();
    let mut warned = false;
    loop {
        let call = |channel, request| async move {
            MembershipClient::new(channel).register(request).await
        };
        let error = match inner.ask(what, Wait::Short, request.clone(), call).await {
            Ok(reply) => return Ok(reply),
            Err(error) => error,
        };
        let may_pass = matches!(error.kind, ErrorKind::Conflict | ErrorKind::JobAborted);
        if !may_pass || started.elapsed() >= CONFLICT.min(inner.patience) {
            return Err(error);
        }
        if !warned {
            warn!("{what}: {}; trying again", error.why);
            warned = true;
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
}

/// Heartbeats until the worker is no member any more.
async fn beat(shared: Arc<Shared>, inner: Arc<Inner>, interval: Duration) {
    let mut ticks = tokio::time::interval(interval);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let limit = interval.max(Duration::from_secs(2));
    let mut misses: u32 = 0;
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            () = shared.look.notified() => {}
        }
        let beat = match shared.beat_once(&inner, limit).await {
            Err(error) if error.kind == ErrorKind::Fenced => {
                shared.rejoin(&inner, limit, &error).await
            }
            beat => beat,
        };
        match beat {
            Ok(()) => {
                if misses > 0 {
                    info!("the coordinator at `{}` answers again", inner.url());
                }
                misses = 0;
            }
            Err(error) if !is_passing(&error) => {
                shared.end(error);
                return;
            }
            Err(error) => {
                misses += 1;
                if misses == 1 {
                    warn!("{error}; training goes on");
                }
                if misses.is_multiple_of(MISSES_MAX) {
                    inner.renew();
                }
            }
        }
    }
}

/// Whether a heartbeat that failed like this is just tried again.
fn is_passing(error: &ClientError) -> bool {
    !matches!(
        error.kind,
        ErrorKind::Fenced | ErrorKind::JobAborted | ErrorKind::Conflict | ErrorKind::Invalid
    )
}

impl Registration {
    fn request(&self, incarnation: u64, rejoins: u64) -> v1::RegisterRequest {
        v1::RegisterRequest {
            job: self.job.clone(),
            worker_id: self.worker_id.clone(),
            incarnation,
            rank: self.rank,
            world_size: self.world_size,
            ip: self.ip.clone(),
            port: self.port,
            advertise_address: self.advertise_address.clone(),
            rejoins,
        }
    }
}

impl Shared {
    fn view(&self) -> MutexGuard<'_, View> {
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
    fn identities(&self) -> Vec<v1::Identity> {
        let view = self.view();
        let next = view.next.map(|(next, _)| next);
        let known = [Some(view.incarnation), next].into_iter().flatten();
        known.map(|incarnation| self.identity(incarnation, view.acknowledged_epoch)).collect()
    }

    fn seen_identity(&self) -> v1::Identity {
        let view = self.view();
        self.identity(view.incarnation, view.seen_epoch)
    }

    /// The error that every call of this worker ends with from now on, if there is one.
    pub(super) fn check(&self, what: &str) -> Result<(), ClientError> {
        let view = self.view();
        let Some(ended) = &view.ended else { return Ok(()) };
        Err(ClientError { what: what.to_owned(), ..ended.clone() })
    }

    async fn beat_once(&self, inner: &Inner, limit: Duration) -> Result<(), ClientError> {
        let request = v1::HeartbeatRequest {
            identity: Some(self.seen_identity()),
            progress: self.progress.load(Ordering::Relaxed),
        };
        let call = |channel, request| async move {
            MembershipClient::new(channel).heartbeat(request).await
        };
        let reply = inner.ask("sending a heartbeat", Wait::Once(limit), request, call).await?;
        self.take_in(reply);
        Ok(())
    }

    /// Comes back after the coordinator took this process for dead: with everything that it holds
    /// in memory it is as good as before.
    async fn rejoin(
        &self,
        inner: &Inner,
        limit: Duration,
        fenced: &ClientError,
    ) -> Result<(), ClientError> {
        let (former, incarnation, was_sent) = self.view().draw_next();
        let request = self.registration.request(incarnation, former);
        let call = |channel, request| async move {
            MembershipClient::new(channel).register(request).await
        };
        let Registration { job, worker_id, .. } = &self.registration;
        let what = format!("registering worker `{worker_id}` in job `{job}` again");
        let reply = match inner.ask(&what, Wait::Once(limit), request, call).await {
            Err(error) if error.kind == ErrorKind::Fenced && was_sent => {
                // An earlier copy may have been let in, unheard, and have died since.
                self.view().join(incarnation, None);
                return Err(ClientError { kind: ErrorKind::Unavailable, ..error });
            }
            reply => reply?,
        };
        warn!("{fenced}");
        info!("worker `{worker_id}` is a member of job `{job}` again");
        let mut view = self.view();
        view.join(incarnation, Some(reply.epoch));
        view.push(Notice::Rejoined(reply.epoch));
        drop(view);
        self.tell_changed();
        Ok(())
    }

    /// Whether this process is known to be no member, and whether that is for good.
    fn standing(&self) -> (bool, bool) {
        let view = self.view();
        (view.is_fenced, view.ended.is_some())
    }

    /// A call was refused because this process is no member: the heartbeat sees to it.
    fn note_fenced(&self) {
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

    fn take_in(&self, reply: v1::HeartbeatReply) {
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

    fn tell_changed(&self) {
        self.changed.notify_all();
        self.looked.notify_waiters();
    }

    /// Passes a reply on; a refusal that concerns the membership is taken in before.
    pub(super) async fn learn<T>(
        &self,
        inner: &Inner,
        reply: Result<T, ClientError>,
    ) -> Result<T, ClientError> {
        if let Err(error) = &reply {
            match error.kind {
                ErrorKind::Fenced => self.note_fenced(),
                ErrorKind::MembershipChanged => self.catch_up(inner).await,
                _ => {}
            }
        }
        reply
    }

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
                "end this process; the job begins anew once all of its workers have ended",
            )),
            None => Err(ClientError::new(
                ErrorKind::Internal,
                what,
                "the reply has no outcome that this version knows",
                "use the same version on both sides",
            )),
        }
    }

    /// The caller was told of a loss; which epoch that is, the coordinator says.
    async fn catch_up(&self, inner: &Inner) {
        // If it cannot be asked now, the caller is told once more: no harm.
        if self.beat_once(inner, LEAVE).await.is_ok() {
            let seen_epoch = self.view().seen_epoch;
            self.acknowledge(seen_epoch);
        }
    }

    fn acknowledge(&self, epoch: u64) {
        let mut view = self.view();
        view.acknowledged_epoch = view.acknowledged_epoch.max(epoch);
    }

    fn end(&self, error: ClientError) {
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
    fn join(&mut self, incarnation: u64, epoch: Option<u64>) {
        (self.incarnation, self.next) = (incarnation, None);
        if let Some(epoch) = epoch {
            self.joined_epoch = epoch;
            self.is_fenced = false;
        }
    }

    /// The incarnation that it had, the one to come back with, and whether that was sent before.
    fn draw_next(&mut self) -> (u64, u64, bool) {
        self.is_fenced = true;
        let (next, was_sent) = self.next.unwrap_or_else(|| (chance(), false));
        self.next = Some((next, true));
        (self.incarnation, next, was_sent)
    }

    fn push(&mut self, notice: Notice) {
        if self.notices.len() == NOTICES_MAX {
            self.notices.pop_front();
        }
        self.notices.push_back(notice);
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
