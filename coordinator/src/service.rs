//! gRPC to events and back: who may call, what is well-formed, which status a refusal is.
//!
//! Always holds: nothing is decided here; every method lets its caller in by [`Auth`] before it
//! looks at anything else, and checks every text before the state machine sees it.

use std::sync::Arc;
use std::time::Instant;

use dtr_proto::refusal::REFUSAL_HEADER;
use dtr_proto::v1;
use dtr_proto::v1::admin_server::Admin;
use dtr_proto::v1::barriers_server::Barriers;
use dtr_proto::v1::checkpoints_server::Checkpoints;
use dtr_proto::v1::datasets_server::Datasets;
use dtr_proto::v1::membership_server::Membership;
use tokio_stream::iter;
use tonic::metadata::MetadataValue;
use tonic::{Code, Request, Response, Status};

use crate::auth::Auth;
use crate::driver::Core;
use crate::limits;
use crate::metrics::Histograms;
use crate::state::{Event, Refusal, RefusalKind, Reply};

/// Every service of the coordinator.
#[derive(Clone, Debug)]
pub struct Service {
    core: Core,
    auth: Arc<Auth>,
    histograms: Arc<Histograms>,
}

impl Service {
    /// Serves what `core` decides to whom `auth` lets in.
    pub fn new(core: Core, auth: Arc<Auth>, histograms: Arc<Histograms>) -> Self {
        Self { core, auth, histograms }
    }

    async fn ask(&self, event: Event) -> Result<Reply, Status> {
        match self.core.ask(event).await {
            Ok(Reply::Refused(refusal)) => Err(status_of(&refusal)),
            Ok(reply) => Ok(reply),
            Err(ending) => Err(Status::unavailable(format!(
                "{ending}\nhint: call again; it keeps what it had promised"
            ))),
        }
    }

    /// The message of a call about a job, if it may be made.
    fn enter<T>(&self, request: Request<T>, job: impl Fn(&T) -> &str) -> Result<T, Status> {
        let header = header_of(&request)?;
        self.auth.admit(header.as_deref(), job(request.get_ref()))?;
        limits::name("job", job(request.get_ref()))?;
        Ok(request.into_inner())
    }

    /// The message of a worker's call, if it may be made.
    fn enter_as<T>(
        &self,
        request: Request<T>,
        identity: impl Fn(&T) -> Option<&v1::Identity>,
    ) -> Result<T, Status> {
        let header = header_of(&request)?;
        let job = identity(request.get_ref()).map_or("", |identity| &identity.job);
        self.auth.admit(header.as_deref(), job)?;
        limits::identity(identity(request.get_ref()))?;
        Ok(request.into_inner())
    }

    fn enter_as_operator<T>(&self, request: Request<T>) -> Result<T, Status> {
        let header = header_of(&request)?;
        self.auth.admit_operator(header.as_deref(), request.remote_addr())?;
        Ok(request.into_inner())
    }
}

fn header_of<T>(request: &Request<T>) -> Result<Option<String>, Status> {
    let Some(value) = request.metadata().get("authorization") else { return Ok(None) };
    let text = value.to_str().map_err(|_| Status::unauthenticated("the token is not ASCII"))?;
    Ok(Some(text.to_owned()))
}

fn status_of(refusal: &Refusal) -> Status {
    let code = match refusal.kind {
        RefusalKind::Invalid => Code::InvalidArgument,
        RefusalKind::NotFound => Code::NotFound,
        RefusalKind::AlreadyCommitted => Code::AlreadyExists,
        RefusalKind::JobAborted | RefusalKind::AttemptAborted => Code::Aborted,
        RefusalKind::Conflict
        | RefusalKind::Fenced
        | RefusalKind::StaleEpoch
        | RefusalKind::Incomplete => Code::FailedPrecondition,
    };
    let mut status = Status::new(code, refusal.to_string());
    let kind = MetadataValue::from_static(refusal.kind.name());
    status.metadata_mut().insert(REFUSAL_HEADER, kind);
    status
}

/// The state machine answers each event with its own kind of reply.
fn mismatch(reply: &Reply) -> Status {
    Status::internal(format!("an unexpected reply: {reply:?}\nhint: report this as a bug"))
}

/// Takes the one kind of reply that the method answers with.
macro_rules! answer {
    ($reply:expr, $($pattern:pat => $value:expr),+ $(,)?) => {
        match $reply {
            $($pattern => Ok(Response::new($value)),)+
            other => Err(mismatch(&other)),
        }
    };
}

#[tonic::async_trait]
impl Membership for Service {
    async fn register(
        &self,
        request: Request<v1::RegisterRequest>,
    ) -> Result<Response<v1::RegisterReply>, Status> {
        let request = self.enter(request, |request| &request.job)?;
        limits::name("worker_id", &request.worker_id)?;
        limits::text("ip", &request.ip)?;
        limits::text("advertise_address", &request.advertise_address)?;
        let reply = self.ask(Event::Register(request)).await?;
        answer!(reply, Reply::Register(reply) => reply)
    }

    async fn heartbeat(
        &self,
        request: Request<v1::HeartbeatRequest>,
    ) -> Result<Response<v1::HeartbeatReply>, Status> {
        let request = self.enter_as(request, |request| request.identity.as_ref())?;
        let reply = self.ask(Event::Heartbeat(request)).await?;
        answer!(reply, Reply::Heartbeat(reply) => reply)
    }

    async fn leave(
        &self,
        request: Request<v1::LeaveRequest>,
    ) -> Result<Response<v1::LeaveReply>, Status> {
        let request = self.enter_as(request, |request| request.identity.as_ref())?;
        limits::text("failure", &request.failure)?;
        let reply = self.ask(Event::Leave(request)).await?;
        answer!(reply, Reply::Leave(reply) => reply)
    }

    async fn list_workers(
        &self,
        request: Request<v1::ListWorkersRequest>,
    ) -> Result<Response<v1::ListWorkersReply>, Status> {
        let request = self.enter(request, |request| &request.job)?;
        let reply = self.ask(Event::ListWorkers(request)).await?;
        answer!(reply, Reply::Workers(reply) => reply)
    }
}

#[tonic::async_trait]
impl Barriers for Service {
    async fn wait_barrier(
        &self,
        request: Request<v1::WaitBarrierRequest>,
    ) -> Result<Response<v1::WaitBarrierReply>, Status> {
        let request = self.enter_as(request, |request| request.identity.as_ref())?;
        limits::name("name", &request.name)?;
        limits::text("alike", &request.alike)?;
        let reply = self.ask(Event::WaitBarrier(request)).await?;
        answer!(reply, Reply::Barrier(reply) => reply)
    }

    async fn withdraw_barrier(
        &self,
        request: Request<v1::WithdrawBarrierRequest>,
    ) -> Result<Response<v1::WithdrawBarrierReply>, Status> {
        let request = self.enter_as(request, |request| request.identity.as_ref())?;
        limits::name("name", &request.name)?;
        let reply = self.ask(Event::WithdrawBarrier(request)).await?;
        answer!(reply, Reply::Done => v1::WithdrawBarrierReply {})
    }
}

/// What became of an attempt, in parts that fit a message each.
type Outcomes = tokio_stream::Iter<std::vec::IntoIter<Result<v1::ShardOutcome, Status>>>;

fn outcomes_of(reply: Reply) -> Result<Outcomes, Status> {
    use v1::shard_outcome::Outcome;
    let outcomes = match reply {
        Reply::Publish(shards) => parts_of(&shards),
        Reply::Committed(commit) => vec![Outcome::Committed(commit)],
        Reply::AttemptAborted(aborted) => vec![Outcome::Aborted(aborted)],
        other => return Err(mismatch(&other)),
    };
    let outcomes: Vec<_> = outcomes
        .into_iter()
        .map(|outcome| Ok(v1::ShardOutcome { outcome: Some(outcome) }))
        .collect();
    Ok(iter(outcomes))
}

fn parts_of(shards: &[v1::Shard]) -> Vec<v1::shard_outcome::Outcome> {
    let count = shards.len().div_ceil(limits::PART_SHARDS);
    let parts = shards.chunks(limits::PART_SHARDS).enumerate();
    parts
        .map(|(index, part)| {
            v1::shard_outcome::Outcome::Publish(v1::PublishPart {
                shards: part.to_vec(),
                is_last: index + 1 == count,
            })
        })
        .collect()
}

#[tonic::async_trait]
impl Checkpoints for Service {
    async fn begin_checkpoint(
        &self,
        request: Request<v1::BeginCheckpointRequest>,
    ) -> Result<Response<v1::BeginCheckpointReply>, Status> {
        let request = self.enter_as(request, |request| request.identity.as_ref())?;
        let reply = self.ask(Event::BeginCheckpoint(request)).await?;
        answer!(reply, Reply::BeginCheckpoint(reply) => reply)
    }

    type ReportShardStream = Outcomes;

    async fn report_shard(
        &self,
        request: Request<v1::ReportShardRequest>,
    ) -> Result<Response<Outcomes>, Status> {
        let request = self.enter_as(request, |request| request.identity.as_ref())?;
        limits::name("attempt", &request.attempt)?;
        limits::shard(request.shard.as_ref())?;
        let reply = self.ask(Event::ReportShard(request)).await?;
        Ok(Response::new(outcomes_of(reply)?))
    }

    async fn commit_checkpoint(
        &self,
        request: Request<v1::CommitCheckpointRequest>,
    ) -> Result<Response<v1::CommitCheckpointReply>, Status> {
        let request = self.enter_as(request, |request| request.identity.as_ref())?;
        limits::name("attempt", &request.attempt)?;
        let reply = self.ask(Event::CommitCheckpoint(request)).await?;
        answer!(reply, Reply::Committed(commit) => v1::CommitCheckpointReply {
            commit: Some(commit),
        })
    }

    async fn abort_checkpoint(
        &self,
        request: Request<v1::AbortCheckpointRequest>,
    ) -> Result<Response<v1::AbortCheckpointReply>, Status> {
        let request = self.enter_as(request, |request| request.identity.as_ref())?;
        limits::name("attempt", &request.attempt)?;
        limits::text("reason", &request.reason)?;
        let reply = self.ask(Event::AbortCheckpoint(request)).await?;
        answer!(reply, Reply::Done => v1::AbortCheckpointReply {})
    }

    async fn list_checkpoints(
        &self,
        request: Request<v1::ListCheckpointsRequest>,
    ) -> Result<Response<v1::ListCheckpointsReply>, Status> {
        let request = self.enter(request, |request| &request.job)?;
        let reply = self.ask(Event::ListCheckpoints(request)).await?;
        answer!(reply, Reply::Checkpoints(reply) => reply)
    }

    async fn latest_checkpoint(
        &self,
        request: Request<v1::LatestCheckpointRequest>,
    ) -> Result<Response<v1::LatestCheckpointReply>, Status> {
        let request = self.enter(request, |request| &request.job)?;
        let newest = v1::ListCheckpointsRequest { job: request.job, limit: 1 };
        let reply = self.ask(Event::ListCheckpoints(newest)).await?;
        answer!(reply, Reply::Checkpoints(reply) => v1::LatestCheckpointReply {
            commit: reply.commits.into_iter().next(),
        })
    }

    async fn agree_step(
        &self,
        request: Request<v1::AgreeStepRequest>,
    ) -> Result<Response<v1::AgreeStepReply>, Status> {
        let request = self.enter_as(request, |request| request.identity.as_ref())?;
        limits::attempts(&request.attempts)?;
        let reply = self.ask(Event::AgreeStep(request)).await?;
        answer!(reply, Reply::AgreeStep(reply) => reply)
    }
}

#[tonic::async_trait]
impl Datasets for Service {
    async fn register_dataset(
        &self,
        request: Request<v1::RegisterDatasetRequest>,
    ) -> Result<Response<v1::RegisterDatasetReply>, Status> {
        let request = self.enter(request, |request| &request.job)?;
        if let Some(identity) = &request.identity {
            limits::identity(Some(identity))?;
            if identity.job != request.job {
                return Err(Status::invalid_argument(
                    "`identity` is of another job\nhint: register within the worker's own job",
                ));
            }
        }
        let spec = request.spec.as_ref();
        limits::name("name", spec.map_or("", |spec| &spec.name))?;
        limits::text("path", spec.map_or("", |spec| &spec.path))?;
        limits::name("format", spec.map_or("", |spec| &spec.format))?;
        for file in &request.files {
            limits::text("files", file)?;
        }
        let reply = self.ask(Event::RegisterDataset(request)).await?;
        answer!(reply, Reply::RegisterDataset(reply) => reply)
    }

    async fn get_shard(
        &self,
        request: Request<v1::GetShardRequest>,
    ) -> Result<Response<v1::GetShardReply>, Status> {
        let request = self.enter(request, |request| &request.job)?;
        limits::name("name", &request.name)?;
        let started = Instant::now();
        let reply = self.ask(Event::GetShard(request)).await?;
        self.histograms.shard_assignment.observe(started.elapsed());
        answer!(reply, Reply::Shard(reply) => reply)
    }

    async fn list_datasets(
        &self,
        request: Request<v1::ListDatasetsRequest>,
    ) -> Result<Response<v1::ListDatasetsReply>, Status> {
        let request = self.enter(request, |request| &request.job)?;
        let reply = self.ask(Event::ListDatasets(request)).await?;
        answer!(reply, Reply::Datasets(reply) => reply)
    }
}

#[tonic::async_trait]
impl Admin for Service {
    async fn list_jobs(
        &self,
        request: Request<v1::ListJobsRequest>,
    ) -> Result<Response<v1::ListJobsReply>, Status> {
        self.enter_as_operator(request)?;
        let reply = self.ask(Event::ListJobs).await?;
        answer!(reply, Reply::Jobs(reply) => reply)
    }

    async fn abort_job(
        &self,
        request: Request<v1::AbortJobRequest>,
    ) -> Result<Response<v1::AbortJobReply>, Status> {
        let request = self.enter_as_operator(request)?;
        limits::name("job", &request.job)?;
        limits::text("reason", &request.reason)?;
        let reply = self.ask(Event::AbortJob(request)).await?;
        answer!(reply, Reply::Done => v1::AbortJobReply {})
    }
}
