//! Registering, and the heartbeats that keep a worker registered.
//!
//! Always holds: a process that was taken for dead comes back by its heartbeat alone, with one
//! incarnation until that is answered; heartbeats end when the worker is no member for good, and
//! not because a coordinator is away.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tracing::{info, warn};

use super::connection::{Connection, Inner, Wait, chance};
use super::error::{ClientError, ErrorKind};
use super::view::Shared;
use super::worker::{Notice, Registration, Worker};
use crate::v1;
use crate::v1::membership_client::MembershipClient;

/// How long a registration that others stand in the way of is tried again.
const CONFLICT: Duration = Duration::from_mins(1);
/// How long a caller that was refused is held up to learn of the membership.
const CATCH_UP: Duration = Duration::from_secs(2);
/// Heartbeats in a row without an answer before the connection is made again.
const MISSES_MAX: u32 = 2;

/// Registers, and starts the heartbeats that keep the worker a member.
pub(super) async fn register(
    connection: Arc<Connection>,
    what: &str,
    registration: Registration,
) -> Result<Worker, ClientError> {
    let incarnation = chance();
    let request = registration.request(incarnation, 0);
    let reply = insist(connection.inner(), what, &request).await?;
    let shared = Arc::new(Shared::new(registration, incarnation, reply.epoch));
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
    let started = Instant::now();
    let mut warned = false;
    loop {
        let call = |channel, request| async move {
            MembershipClient::new(channel).register(request).await
        };
        let error = match inner.ask(what, Wait::Short, request.clone(), call).await {
            Ok(reply) => return Ok(reply),
            Err(error) => error,
        };
        // Longer than a coordinator may be away: a former process may die of a timeout as long.
        let limit = CONFLICT.min(2 * inner.patience);
        let may_pass = matches!(error.kind, ErrorKind::Conflict | ErrorKind::JobAborted);
        if !may_pass || started.elapsed() >= limit {
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

    /// The caller was told of a loss; which epoch that is, the coordinator says.
    async fn catch_up(&self, inner: &Inner) {
        // If it cannot be asked now, the caller is told once more: no harm.
        if self.beat_once(inner, CATCH_UP).await.is_ok() {
            let seen_epoch = self.view().seen_epoch;
            self.acknowledge(seen_epoch);
        }
    }
}
