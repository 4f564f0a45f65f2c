//! What the coordinator knows, as a pure machine: (moment, state, event) gives replies, changes to
//! keep and notes for people.
//!
//! Always holds:
//! - no clock, no randomness, no disk and no network is reached from here: [`Moment`] brings time
//!   and chance, [`Effects`] takes what is to be done;
//! - time runs forwards, in small steps, whatever the clock does: a gap counts for two seconds at
//!   most, a step back for nothing;
//! - everything that must outlive the process is in [`Effects::changes`] of the event that decided
//!   it, and [`State::recover`] restores the same decisions from them;
//! - a limit on what is kept turns nobody away forever: the oldest that nobody uses goes, but no
//!   job that has a living worker or an open attempt;
//! - a reply in [`Effects::replies`] may be sent only once all changes up to it are durable.

mod agreement;
mod attempt;
mod barriers;
mod checkpoints;
mod datasets;
mod given_up;
mod losses;
mod members;
mod messages;
mod record;
mod refusal;
mod stragglers;
mod summary;

use std::collections::{BTreeMap, VecDeque};

use dtr_proto::v1;

pub use datasets::assign;
pub use messages::{Effects, EndedAttempt, Event, Level, Moment, Note, Policy, Reply, Ticket};
pub use record::{Change, Key, RecoverError};
pub use refusal::{Refusal, RefusalKind};
pub use summary::{JobSummary, Summary};

use attempt::Attempt;
use barriers::Barrier;
use given_up::AbortedAttempt;
use losses::Incident;
use members::Member;
use record::Stored;

/// Most jobs that one coordinator keeps.
pub const JOBS_MAX: usize = 1_000;
/// Most ranks of a job.
pub const WORLD_SIZE_MAX: u32 = 65_536;
/// Most barriers, and most datasets, that one job may have.
pub const NAMES_MAX: usize = 10_000;
/// Commits that are kept for each job; older ones are known to the store alone.
pub const COMMITS_KEPT: usize = 1_000;
/// Membership changes that are remembered for heartbeat replies.
const CHANGES_KEPT: usize = 256;
/// Time that passes from one event to the next, at most. Ticks come far more often, so a longer gap
/// means that this process stood still or its clock jumped: the workers did nothing wrong.
const GAP_MAX_MS: u64 = 2_000;

/// What all parts of a job's machine are handed.
struct Context<'a> {
    at: Moment,
    policy: &'a Policy,
    effects: &'a mut Effects,
    /// How often a job has lost its last worker, over all jobs.
    endings: &'a mut u64,
}

/// Everything the coordinator knows.
#[derive(Debug)]
pub struct State {
    policy: Policy,
    incarnation: u64,
    jobs: BTreeMap<String, Job>,
    /// What the clock said last.
    clock_ms: u64,
    /// The machine's own time.
    now_ms: u64,
    /// How often a job has lost its last worker.
    endings: u64,
}

/// One job.
#[derive(Debug, Default)]
struct Job {
    name: String,
    record: v1::JobRecord,
    members: BTreeMap<String, Member>,
    /// The living worker of each rank.
    holders: BTreeMap<u32, String>,
    /// No tick before this finds a member that was silent, or stood still, for too long.
    quiet_until_ms: u64,
    log: VecDeque<v1::MembershipChange>,
    /// What was counted last, for what is lost together with it.
    incident: Option<Incident>,
    /// Failures since this start that may prove to be none: how many of their workers are missing.
    failures: BTreeMap<u64, u32>,
    barriers: BTreeMap<String, Barrier>,
    /// Releases of barriers in this run, as far as they are known.
    releases: u64,
    /// The newest arrival of each rank at barriers that were forgotten.
    past_arrivals: BTreeMap<u32, u64>,
    attempts: BTreeMap<u64, Attempt>,
    aborted: BTreeMap<u64, AbortedAttempt>,
    commits: BTreeMap<u64, v1::Commit>,
    /// Since this start.
    commit_count: u64,
    heartbeat_count: u64,
    datasets: BTreeMap<String, v1::DatasetRecord>,
    /// When it lost its last worker; the beginning, where that was before this start.
    ended_ms: u64,
}

impl State {
    /// A coordinator that knows nothing, at its `incarnation`-th start.
    pub fn new(policy: Policy, incarnation: u64) -> Self {
        Self { policy, incarnation, jobs: BTreeMap::new(), clock_ms: 0, now_ms: 0, endings: 0 }
    }

    /// A coordinator that starts again, when its clock says `now_ms`. Every live worker counts as
    /// heard of now: nobody is declared dead before a whole timeout has passed.
    pub fn recover<'a>(
        policy: Policy,
        incarnation: u64,
        now_ms: u64,
        kept: impl IntoIterator<Item = (&'a [u8], &'a [u8])>,
    ) -> Result<Self, RecoverError> {
        let mut state = Self::new(policy, incarnation);
        state.clock_ms = now_ms;
        for (key, value) in kept {
            let key = Key::decode(key)?;
            let stored = Stored::decode(&key, value)?;
            state.job_entry(key.job()).restore(key, stored);
        }
        state.endings = state.jobs.values().map(|job| job.record.ended).max().unwrap_or(0);
        Ok(state)
    }

    /// How often the coordinator has started.
    pub fn incarnation(&self) -> u64 {
        self.incarnation
    }

    /// The patience that was configured.
    pub fn policy(&self) -> &Policy {
        &self.policy
    }

    /// Lets an event happen. `ticket` is the call that asks, if one does.
    pub fn apply(&mut self, mut at: Moment, ticket: Ticket, event: Event, effects: &mut Effects) {
        self.now_ms += at.now_ms.saturating_sub(self.clock_ms).min(GAP_MAX_MS);
        self.clock_ms = at.now_ms;
        at.now_ms = self.now_ms;
        let answer = self.decide(at, ticket, event, effects);
        match answer {
            Ok(Some(reply)) => effects.replies.push((ticket, reply)),
            Ok(None) => {}
            Err(refusal) => effects.replies.push((ticket, Reply::Refused(refusal))),
        }
    }

    /// The reply, if it can be given now.
    fn decide(
        &mut self,
        at: Moment,
        ticket: Ticket,
        event: Event,
        effects: &mut Effects,
    ) -> Result<Option<Reply>, Refusal> {
        match event {
            Event::Tick => {
                self.tick(at, effects);
                return Ok(None);
            }
            Event::Inspect => return Ok(Some(Reply::Summary(self.summary()))),
            Event::ListJobs => return Ok(Some(Reply::Jobs(self.list_jobs()))),
            Event::Register(request) => {
                self.admit(&request.job)?;
                let incarnation = self.incarnation;
                let name = request.job.clone();
                let (job, mut context) = self.context(at, effects, &name);
                let reply = job.register(&mut context, incarnation, request).map(Some);
                self.make_room_beside(&name, effects);
                return reply;
            }
            Event::RegisterDataset(request) => {
                self.admit(&request.job)?;
                let name = request.job.clone();
                let (job, mut context) = self.context(at, effects, &name);
                let reply = job.register_dataset(&mut context, request).map(Some);
                self.make_room_beside(&name, effects);
                return reply;
            }
            _ => {}
        }
        let name = event.job();
        if !self.jobs.contains_key(name) {
            return unknown_job(name, &event);
        }
        let name = name.to_owned();
        let incarnation = self.incarnation;
        let (job, mut context) = self.context(at, effects, &name);
        job.decide(&mut context, incarnation, ticket, event)
    }

    fn context<'a>(
        &'a mut self,
        at: Moment,
        effects: &'a mut Effects,
        job: &str,
    ) -> (&'a mut Job, Context<'a>) {
        let Self { policy, jobs, endings, .. } = self;
        let job = entry(jobs, job);
        (job, Context { at, policy, effects, endings })
    }

    fn job_entry(&mut self, name: &str) -> &mut Job {
        entry(&mut self.jobs, name)
    }

    /// Whether a job of this name may be made or joined.
    fn admit(&self, name: &str) -> Result<(), Refusal> {
        let jobs_max = self.policy.jobs_max;
        let is_known = self.jobs.contains_key(name);
        if is_known || self.jobs.len() < jobs_max || self.longest_ended(name).is_some() {
            return Ok(());
        }
        Err(Refusal::new(
            RefusalKind::Conflict,
            format!("{jobs_max} jobs have living workers, and `{name}` would be one more"),
            "wait until one of them has ended, or start another coordinator",
        ))
    }

    /// The job, another one than `name`, that is longest without living workers.
    fn longest_ended(&self, name: &str) -> Option<String> {
        let others = self.jobs.values().filter(|job| job.name != name && job.has_ended());
        others.min_by_key(|job| job.record.ended).map(|job| job.name.clone())
    }

    /// Forgets the job again if the call was refused; else whichever is one too many beside it.
    fn make_room_beside(&mut self, name: &str, effects: &mut Effects) {
        if self.jobs.get(name).is_some_and(Job::is_blank) {
            self.jobs.remove(name);
        }
        while self.jobs.len() > self.policy.jobs_max {
            let Some(oldest) = self.longest_ended(name) else { return };
            let Some(job) = self.jobs.remove(&oldest) else { return };
            job.forget(effects);
        }
    }

    fn tick(&mut self, at: Moment, effects: &mut Effects) {
        let Self { policy, jobs, endings, .. } = self;
        for job in jobs.values_mut() {
            let mut context = Context { at, policy, effects, endings };
            job.tick_members(&mut context);
            job.tick_barriers(&mut context);
            job.tick_attempts(&mut context);
        }
    }
}

/// What is asked about a job that is not there: lists are empty, a heartbeat is from nobody.
fn unknown_job(name: &str, event: &Event) -> Result<Option<Reply>, Refusal> {
    let reply = match event {
        Event::ListWorkers(_) => Reply::Workers(v1::ListWorkersReply::default()),
        Event::ListCheckpoints(_) => Reply::Checkpoints(v1::ListCheckpointsReply::default()),
        Event::ListDatasets(_) => Reply::Datasets(v1::ListDatasetsReply::default()),
        Event::GetShard(request) => return Err(datasets::unknown(&request.name, name)),
        Event::AbortJob(_) => {
            return Err(Refusal::new(
                RefusalKind::NotFound,
                format!("there is no job `{name}`"),
                "list the jobs; names are case-sensitive",
            ));
        }
        _ => return Err(Refusal::unregistered(name)),
    };
    Ok(Some(reply))
}

fn entry<'a>(jobs: &'a mut BTreeMap<String, Job>, name: &str) -> &'a mut Job {
    if !jobs.contains_key(name) {
        jobs.insert(name.to_owned(), Job { name: name.to_owned(), ..Job::default() });
    }
    jobs.get_mut(name).expect("it was just put there")
}

impl Job {
    fn decide(
        &mut self,
        context: &mut Context<'_>,
        incarnation: u64,
        ticket: Ticket,
        event: Event,
    ) -> Result<Option<Reply>, Refusal> {
        match event {
            Event::Heartbeat(request) => self.heartbeat(context, incarnation, &request).map(Some),
            Event::Leave(request) => self.leave(context, &request).map(Some),
            Event::ListWorkers(_) => Ok(Some(self.list_workers(context))),
            Event::WaitBarrier(request) => self.wait_barrier(context, ticket, &request),
            Event::WithdrawBarrier(request) => self.withdraw_barrier(context, &request).map(Some),
            Event::AgreeStep(request) => self.agree_step(context, ticket, request),
            Event::BeginCheckpoint(request) => self.begin(context, &request).map(Some),
            Event::ReportShard(request) => self.report(context, ticket, request),
            Event::CommitCheckpoint(request) => self.commit(context, &request).map(Some),
            Event::AbortCheckpoint(request) => self.abort_checkpoint(context, &request).map(Some),
            Event::ListCheckpoints(request) => Ok(Some(self.list_checkpoints(request.limit))),
            Event::GetShard(request) => self.get_shard(&request).map(Some),
            Event::ListDatasets(_) => Ok(Some(self.list_datasets())),
            Event::AbortJob(request) => Ok(Some(self.abort_by_operator(context, &request.reason))),
            Event::Register(_)
            | Event::RegisterDataset(_)
            | Event::ListJobs
            | Event::Inspect
            | Event::Tick => unreachable!("`State::decide` has answered what no job decides"),
        }
    }

    fn restore(&mut self, key: Key, stored: Stored) {
        match (key, stored) {
            (Key::Worker { worker_id, .. }, Stored::Worker(record)) => {
                self.restore_member(worker_id, record);
            }
            (Key::Barrier { name, .. }, Stored::Barrier(record)) => {
                self.releases = self.releases.max(record.order);
                self.barriers.insert(name, Barrier::released(record));
            }
            (Key::Attempt { step, .. }, Stored::Attempt(record)) => {
                self.attempts.insert(step, Attempt::recovered(0, record));
            }
            (Key::Commit { step, .. }, Stored::Commit(record)) => {
                self.commits.insert(step, record);
            }
            (Key::Dataset { name, .. }, Stored::Dataset(record)) => {
                self.datasets.insert(name, record);
            }
            (_, Stored::Job(record)) => self.record = record,
            // `Stored::decode` reads what the key says.
            (_, _) => {}
        }
    }

    /// Whether nothing was ever done in it: a name that only a refused call mentioned.
    fn is_blank(&self) -> bool {
        self.record.run == 0 && self.datasets.is_empty()
    }

    /// Whether nobody of it lives, and nothing of it is in flight.
    fn has_ended(&self) -> bool {
        self.holders.is_empty() && self.attempts.is_empty()
    }

    /// The last worker is gone, or something was left here by somebody who is none.
    fn note_end(&mut self, context: &mut Context<'_>) {
        *context.endings += 1;
        self.record.ended = *context.endings;
        self.ended_ms = context.at.now_ms;
    }

    /// Takes everything of it out of what is kept. What was committed is in its store.
    fn forget(self, effects: &mut Effects) {
        let job = || self.name.clone();
        let workers = self.members.keys();
        let workers = workers.map(|id| Key::Worker { job: job(), worker_id: id.clone() });
        let barriers = self.barriers.iter().filter(|(_, barrier)| barrier.is_kept());
        let barriers = barriers.map(|(name, _)| Key::Barrier { job: job(), name: name.clone() });
        let commits = self.commits.keys().map(|step| Key::Commit { job: job(), step: *step });
        let datasets = self.datasets.keys();
        let datasets = datasets.map(|name| Key::Dataset { job: job(), name: name.clone() });
        let keys = workers.chain(barriers).chain(commits).chain(datasets);
        effects.changes.extend(keys.chain([Key::Job { job: job() }]).map(Change::remove));
        let text = "it is forgotten: no job that is kept is without workers for longer".to_owned();
        effects.notes.push(Note { job: job(), level: Level::Info, text, ended: None });
    }

    fn note(&self, context: &mut Context<'_>, level: Level, text: String) {
        context.effects.notes.push(Note { job: self.name.clone(), level, text, ended: None });
    }

    fn keep_job(&self, context: &mut Context<'_>) {
        let key = Key::Job { job: self.name.clone() };
        context.effects.changes.push(Change::put(key, &self.record));
    }

    fn refuse_if_aborted(&self) -> Result<(), Refusal> {
        if self.record.abort_reason.is_empty() {
            return Ok(());
        }
        Err(Refusal::new(
            RefusalKind::JobAborted,
            format!("job `{}` is aborted: {}", self.name, self.record.abort_reason),
            "end this process; the job starts over once all of its workers have ended",
        ))
    }
}
