//! Numbers for metrics and operators, read off the state.

use dtr_proto::v1::{self, WorkerState};

use super::{Job, State};

/// The whole coordinator in numbers.
#[derive(Clone, Debug, Default)]
pub struct Summary {
    /// How often it has started.
    pub incarnation: u64,
    /// Every job that has workers, or had some lately.
    pub jobs: Vec<JobSummary>,
}

/// One job in numbers.
#[derive(Clone, Debug, Default)]
pub struct JobSummary {
    /// Its name.
    pub job: String,
    /// How many ranks it has.
    pub world_size: u32,
    /// Heartbeats since this start.
    pub heartbeats: u64,
    /// Checkpoints committed since this start.
    pub checkpoints: u64,
    /// Workers by state.
    pub workers: Vec<(&'static str, usize)>,
    /// Workers that live.
    pub workers_active: usize,
    /// Workers that wait at barriers.
    pub barriers_waiting: usize,
    /// Checkpoints in flight.
    pub attempts: usize,
    /// The membership number.
    pub epoch: u64,
    /// Failures since the last commit.
    pub failures: u32,
    /// Failures that are left before the job is aborted.
    pub failures_left: u32,
    /// Why it is aborted; empty while it runs.
    pub abort_reason: String,
    /// The newest committed step and when it was committed, by the wall clock.
    pub latest: Option<(u64, u64)>,
}

/// How long a job that has ended still appears in metrics.
const SHOWN_AFTER_END_MS: u64 = 3_600_000;

const STATES: [(&str, WorkerState); 5] = [
    ("alive", WorkerState::Alive),
    ("suspect", WorkerState::Suspect),
    ("stalled", WorkerState::Stalled),
    ("dead", WorkerState::Dead),
    ("left", WorkerState::Left),
];

impl State {
    pub(super) fn summary(&self) -> Summary {
        Summary {
            incarnation: self.incarnation,
            jobs: self
                .jobs
                .values()
                .filter(|job| job.is_told_of(self.now_ms))
                .map(|job| job.summary(self.policy.max_worker_failures))
                .collect(),
        }
    }

    pub(super) fn list_jobs(&self) -> v1::ListJobsReply {
        let info = |job: &Job| v1::JobInfo {
            job: job.name.clone(),
            world_size: job.record.world_size,
            workers_alive: u32::try_from(job.holders.len()).unwrap_or(u32::MAX),
            epoch: job.record.epoch,
            failures: job.record.failures,
            abort_reason: job.record.abort_reason.clone(),
            latest_step: job.commits.keys().next_back().copied(),
        };
        v1::ListJobsReply { jobs: self.jobs.values().map(info).collect() }
    }
}

impl Job {
    fn is_told_of(&self, now_ms: u64) -> bool {
        !self.has_ended() || now_ms.saturating_sub(self.ended_ms) < SHOWN_AFTER_END_MS
    }

    fn summary(&self, failures_max: u32) -> JobSummary {
        let newest = self.commits.last_key_value();
        JobSummary {
            job: self.name.clone(),
            world_size: self.record.world_size,
            heartbeats: self.heartbeat_count,
            checkpoints: self.commit_count,
            workers: STATES.map(|(name, state)| (name, self.count_state(state))).to_vec(),
            workers_active: self.holders.len(),
            barriers_waiting: self.waiting_count(),
            attempts: self.attempts.len(),
            epoch: self.record.epoch,
            failures: self.record.failures,
            failures_left: failures_max.saturating_sub(self.record.failures),
            abort_reason: self.record.abort_reason.clone(),
            latest: newest.map(|(step, commit)| (*step, commit.committed_unix_ms)),
        }
    }
}
