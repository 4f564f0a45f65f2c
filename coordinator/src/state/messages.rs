//! What goes into the machine, and what comes out of it.
//!
//! Always holds: every event but those about all jobs names its job; nothing here decides anything.

use std::collections::BTreeMap;

use dtr_proto::v1;

use super::{Change, JOBS_MAX, NAMES_MAX, Refusal, Summary};

/// A call that waits for its reply.
pub type Ticket = u64;

/// Time and chance, from outside.
#[derive(Clone, Copy, Debug, Default)]
pub struct Moment {
    /// Milliseconds on the coordinator's monotonic clock.
    pub now_ms: u64,
    /// Milliseconds since 1970 on the wall clock: only ever recorded, never compared.
    pub wall_ms: u64,
    /// Random bits, fresh for every event.
    pub random: u128,
}

/// How patient the coordinator is.
#[derive(Clone, Debug)]
pub struct Policy {
    /// How often workers send heartbeats.
    pub heartbeat_interval_ms: u64,
    /// After how long without one a worker is dead.
    pub heartbeat_timeout_ms: u64,
    /// At how many failures since the last commit a job is aborted.
    pub max_worker_failures: u32,
    /// How long the rank of a dead worker is kept for the same worker.
    pub failure_backoff_ms: u64,
    /// After how long without progress a worker that reports it counts as stalled; 0 never.
    pub progress_timeout_ms: u64,
    /// How long an attempt may take from its begin to its last report.
    pub checkpoint_timeout_ms: u64,
    /// Most jobs that are kept.
    pub jobs_max: usize,
    /// Most barriers of a job that are kept.
    pub barriers_max: usize,
    /// What workers are told when they register.
    pub settings: BTreeMap<String, String>,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            heartbeat_interval_ms: 1_000,
            heartbeat_timeout_ms: 30_000,
            max_worker_failures: 3,
            failure_backoff_ms: 5_000,
            progress_timeout_ms: 600_000,
            checkpoint_timeout_ms: 3_600_000,
            jobs_max: JOBS_MAX,
            barriers_max: NAMES_MAX,
            settings: BTreeMap::new(),
        }
    }
}

/// What happens to the machine.
#[derive(Clone, Debug)]
#[expect(missing_docs, reason = "each is the request of the same name")]
pub enum Event {
    Register(v1::RegisterRequest),
    Heartbeat(v1::HeartbeatRequest),
    Leave(v1::LeaveRequest),
    ListWorkers(v1::ListWorkersRequest),
    WaitBarrier(v1::WaitBarrierRequest),
    WithdrawBarrier(v1::WithdrawBarrierRequest),
    AgreeStep(v1::AgreeStepRequest),
    BeginCheckpoint(v1::BeginCheckpointRequest),
    ReportShard(v1::ReportShardRequest),
    CommitCheckpoint(v1::CommitCheckpointRequest),
    AbortCheckpoint(v1::AbortCheckpointRequest),
    ListCheckpoints(v1::ListCheckpointsRequest),
    RegisterDataset(v1::RegisterDatasetRequest),
    GetShard(v1::GetShardRequest),
    ListDatasets(v1::ListDatasetsRequest),
    ListJobs,
    AbortJob(v1::AbortJobRequest),
    /// The numbers that metrics are made of.
    Inspect,
    /// Time passed.
    Tick,
}

impl Event {
    /// The job that the event is about; empty for those that are about all of them.
    pub fn job(&self) -> &str {
        match self {
            Self::Register(request) => &request.job,
            Self::ListWorkers(request) => &request.job,
            Self::ListCheckpoints(request) => &request.job,
            Self::RegisterDataset(request) => &request.job,
            Self::GetShard(request) => &request.job,
            Self::ListDatasets(request) => &request.job,
            Self::AbortJob(request) => &request.job,
            Self::Heartbeat(request) => identity_job(request.identity.as_ref()),
            Self::Leave(request) => identity_job(request.identity.as_ref()),
            Self::WaitBarrier(request) => identity_job(request.identity.as_ref()),
            Self::WithdrawBarrier(request) => identity_job(request.identity.as_ref()),
            Self::AgreeStep(request) => identity_job(request.identity.as_ref()),
            Self::BeginCheckpoint(request) => identity_job(request.identity.as_ref()),
            Self::ReportShard(request) => identity_job(request.identity.as_ref()),
            Self::CommitCheckpoint(request) => identity_job(request.identity.as_ref()),
            Self::AbortCheckpoint(request) => identity_job(request.identity.as_ref()),
            Self::ListJobs | Self::Inspect | Self::Tick => "",
        }
    }
}

/// What a call is answered with.
#[derive(Clone, Debug)]
#[expect(missing_docs, reason = "each is the reply of the same name")]
pub enum Reply {
    Register(v1::RegisterReply),
    Heartbeat(v1::HeartbeatReply),
    Leave(v1::LeaveReply),
    Workers(v1::ListWorkersReply),
    Barrier(v1::WaitBarrierReply),
    AgreeStep(v1::AgreeStepReply),
    BeginCheckpoint(v1::BeginCheckpointReply),
    /// The caller is asked to publish these shards.
    Publish(Vec<v1::Shard>),
    Committed(v1::Commit),
    AttemptAborted(v1::AttemptAborted),
    Checkpoints(v1::ListCheckpointsReply),
    RegisterDataset(v1::RegisterDatasetReply),
    Shard(v1::GetShardReply),
    Datasets(v1::ListDatasetsReply),
    Jobs(v1::ListJobsReply),
    Summary(Summary),
    Done,
    Refused(Refusal),
}

/// What an event leads to.
#[derive(Debug, Default)]
pub struct Effects {
    /// Answers, each to the call that waits for it.
    pub replies: Vec<(Ticket, Reply)>,
    /// What to keep, in order.
    pub changes: Vec<Change>,
    /// What people should know of.
    pub notes: Vec<Note>,
}

/// Something that an operator should know of: the reason of a decision.
#[derive(Clone, Debug, PartialEq)]
pub struct Note {
    /// The job.
    pub job: String,
    /// How much it matters.
    pub level: Level,
    /// What happened and why.
    pub text: String,
    /// An attempt that has ended, for metrics and traces.
    pub ended: Option<EndedAttempt>,
}

/// An attempt that was committed or given up. Milliseconds of the machine's clock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndedAttempt {
    /// Its id.
    pub attempt: String,
    /// The step.
    pub step: u64,
    /// When the first rank began it.
    pub begun_ms: u64,
    /// When a rank was asked to publish: all shards were durable then.
    pub asked_ms: Option<u64>,
    /// When it ended.
    pub ended_ms: u64,
    /// Why it was given up; empty if it was committed.
    pub error: String,
}

/// How much a note matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// As it should be.
    Info,
    /// Somebody may have to act.
    Warn,
}

fn identity_job(identity: Option<&v1::Identity>) -> &str {
    identity.map_or("", |identity| &identity.job)
}
