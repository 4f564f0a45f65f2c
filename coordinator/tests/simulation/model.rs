//! What must be true of every history, whatever the world does.
//!
//! Always holds: what is looked at is what was sent, decided and kept, and no state of the machine.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::hash::{DefaultHasher, Hash as _};

use coordinator::state::{Change, Event, Key, Reply};
use dtr_proto::v1::{self, WorkerState};
use prost::Message;

use crate::{BARRIERS_MAX, JOB, JOBS_MAX, TIMEOUT_MS, WORLD_SIZE};

/// What must be true.
pub(crate) struct Model {
    pub(crate) seed: u64,
    pub(crate) epoch_told: u64,
    pub(crate) arrivals: BTreeMap<u32, BTreeSet<u64>>,
    pub(crate) arrivals_used: HashSet<u64>,
    pub(crate) generation: Option<u64>,
    pub(crate) shards: HashSet<(String, u32)>,
    pub(crate) manifests: BTreeMap<u64, String>,
    /// Of each rank, where each has a store of its own.
    pub(crate) own_manifests: Option<Vec<BTreeMap<u64, String>>>,
    pub(crate) commits: BTreeMap<u64, String>,
    pub(crate) commits_when_calm: Option<usize>,
    pub(crate) members: BTreeMap<String, v1::WorkerRecord>,
    /// Steps whose attempts are in flight.
    pub(crate) open: BTreeSet<u64>,
    /// The worker whose registration is being decided.
    pub(crate) registering: Option<String>,
    pub(crate) heard_ms: HashMap<u64, u64>,
    pub(crate) trace: DefaultHasher,
}

impl Model {
    pub(crate) fn new(seed: u64, has_own_stores: bool) -> Self {
        let own_manifests =
            has_own_stores.then(|| (0..WORLD_SIZE).map(|_| BTreeMap::new()).collect());
        Self {
            seed,
            own_manifests,
            epoch_told: 0,
            arrivals: BTreeMap::new(),
            arrivals_used: HashSet::new(),
            generation: None,
            shards: HashSet::new(),
            manifests: BTreeMap::new(),
            commits: BTreeMap::new(),
            commits_when_calm: None,
            members: BTreeMap::new(),
            open: BTreeSet::new(),
            registering: None,
            heard_ms: HashMap::new(),
            trace: DefaultHasher::new(),
        }
    }

    /// What is in the store that all share, or in each one's own.
    fn stores(&self) -> &[BTreeMap<u64, String>] {
        self.own_manifests.as_deref().unwrap_or(std::slice::from_ref(&self.manifests))
    }

    pub(crate) fn newest_stored(&self) -> u64 {
        let newest = self.stores().iter().filter_map(|store| store.keys().next_back().copied());
        newest.max().unwrap_or(0)
    }

    pub(crate) fn check_list(&self, shards: &[v1::Shard]) {
        let ranks: Vec<u32> = shards.iter().map(|shard| shard.rank).collect();
        let everybody: Vec<u32> = (0..WORLD_SIZE).collect();
        self.assert(ranks == everybody, "the list of shards is not of every rank");
    }

    /// A worker is told that an attempt is no checkpoint, and never will be.
    pub(crate) fn take_back(&mut self, worker: usize, step: u64, attempt: &String) {
        let is_committed = self.commits.get(&step) == Some(attempt);
        self.assert(!is_committed, "a committed step is taken back");
        let Some(own) = &mut self.own_manifests else { return };
        if own[worker].get(&step) == Some(attempt) {
            own[worker].remove(&step);
        }
    }

    pub(crate) fn assert(&self, holds: bool, what: &str) {
        assert!(holds, "seed {}: {what}", self.seed);
    }

    /// Whether the event is of a process that is no member.
    pub(crate) fn is_stale(&self, event: &Event) -> bool {
        let identity = match event {
            Event::Heartbeat(request) => &request.identity,
            Event::Leave(request) => &request.identity,
            Event::WaitBarrier(request) => &request.identity,
            Event::BeginCheckpoint(request) => &request.identity,
            Event::ReportShard(request) => &request.identity,
            Event::CommitCheckpoint(request) => &request.identity,
            Event::AbortCheckpoint(request) => &request.identity,
            _ => return false,
        };
        let identity = identity.as_ref().expect("workers say who they are");
        if identity.job != JOB {
            return false;
        }
        self.members.get(&identity.worker_id).is_none_or(|record| {
            record.incarnation != identity.incarnation || record.state() != WorkerState::Alive
        })
    }

    /// What was decided about who is a member, and about what must not be forgotten.
    pub(crate) fn see_member(
        &mut self,
        change: &Change,
        now_ms: u64,
        grace_ms: u64,
        slack_ms: u64,
    ) {
        if change.key.job() != JOB {
            return;
        }
        match (&change.key, &change.value) {
            (Key::Worker { worker_id, .. }, Some(value)) => {
                let record = decode::<v1::WorkerRecord>(value);
                if self.registering.as_ref() != Some(worker_id) {
                    self.check_death(&record, now_ms, grace_ms, slack_ms);
                }
                self.members.insert(worker_id.clone(), record);
            }
            (Key::Worker { worker_id, .. }, None) => {
                let gone = self.members.remove(worker_id);
                let lives = gone.is_some_and(|gone| gone.state() == WorkerState::Alive);
                self.assert(!lives, "a worker that lives is forgotten");
            }
            (Key::Attempt { step, .. }, Some(_)) => drop(self.open.insert(*step)),
            (Key::Attempt { step, .. }, None) => drop(self.open.remove(step)),
            (Key::Job { .. }, None) => {
                self.assert(self.open.is_empty(), "a job with an open attempt is forgotten");
            }
            _ => {}
        }
    }

    /// What was kept.
    pub(crate) fn take_in(&mut self, change: &Change) {
        change.key.encode().hash(&mut self.trace);
        change.value.hash(&mut self.trace);
        if change.key.job() != JOB {
            return;
        }
        match (&change.key, &change.value) {
            (Key::Barrier { .. }, Some(value)) => self.check_release(&decode(value)),
            (Key::Barrier { .. }, None) => self.generation = None,
            (Key::Commit { step, .. }, Some(value)) => self.check_commit(*step, &decode(value)),
            // It was forgotten: what comes under its name is another one.
            (Key::Job { .. }, None) => {
                self.epoch_told = 0;
                self.arrivals_used.clear();
            }
            _ => {}
        }
    }

    /// A timeout of silence came before.
    fn check_death(&self, record: &v1::WorkerRecord, now_ms: u64, grace_ms: u64, slack_ms: u64) {
        let known = self.members.values().find(|known| known.incarnation == record.incarnation);
        let was_alive = known.is_some_and(|known| known.state() == WorkerState::Alive);
        if record.state() != WorkerState::Dead || !was_alive {
            return;
        }
        let heard_ms = self.heard_ms.get(&record.incarnation).copied().unwrap_or(0);
        let silent_ms = (now_ms - heard_ms).min(grace_ms);
        let text = format!("dead after {silent_ms} ms");
        self.assert(silent_ms + slack_ms > TIMEOUT_MS, &text);
    }

    fn check_release(&mut self, record: &v1::BarrierRecord) {
        let ranks = u32::try_from(record.arrivals.len()).expect("few");
        self.assert(ranks == WORLD_SIZE, "a barrier was released early");
        for (rank, arrival) in (0..).zip(&record.arrivals) {
            let sent = self.arrivals.get(&rank).is_some_and(|sent| sent.contains(arrival));
            self.assert(sent, "a barrier was released with an arrival that nobody sent");
            let is_new = self.arrivals_used.insert(*arrival);
            self.assert(is_new, "an arrival released a barrier twice");
        }
        let follows =
            self.generation.map_or(record.generation == 0, |last| record.generation == last + 1);
        self.assert(follows, "a barrier's generation jumped");
        self.generation = Some(record.generation);
    }

    fn check_commit(&mut self, step: u64, commit: &v1::Commit) {
        for rank in 0..WORLD_SIZE {
            let written = self.shards.contains(&(commit.attempt.clone(), rank));
            self.assert(written, "a commit names a shard that was not written");
        }
        let has_it = |store: &BTreeMap<_, _>| store.get(&step) == Some(&commit.attempt);
        let stands = self.stores().iter().all(has_it);
        self.assert(stands, "a commit is not the store's manifest");
        let earlier = self.commits.insert(step, commit.attempt.clone());
        let is_one = earlier.is_none_or(|earlier| earlier == commit.attempt);
        self.assert(is_one, "a step was committed twice");
    }

    /// A reply that is sent must report nothing that a crash could take back.
    pub(crate) fn reply_leaves(&mut self, reply: &Reply) {
        let epoch = match reply {
            Reply::Register(reply) => reply.epoch,
            Reply::Heartbeat(reply) => {
                self.assert(reply.epoch >= self.epoch_told, "an epoch went back");
                reply.epoch
            }
            _ => return,
        };
        self.epoch_told = self.epoch_told.max(epoch);
    }

    /// What a coordinator that starts again knows is what was kept.
    pub(crate) fn recover(&mut self, disk: &BTreeMap<Vec<u8>, Vec<u8>>) {
        self.members.clear();
        self.open.clear();
        self.generation = None;
        self.check_limits(disk);
        let mut epoch = 0;
        for (key, value) in disk {
            let key = Key::decode(key).expect("it was encoded");
            if key.job() != JOB {
                continue;
            }
            match key {
                Key::Attempt { step, .. } => drop(self.open.insert(step)),
                Key::Worker { worker_id, .. } => {
                    self.members.insert(worker_id, decode(value));
                }
                Key::Barrier { .. } => {
                    self.generation = Some(decode::<v1::BarrierRecord>(value).generation);
                }
                Key::Job { .. } => epoch = decode::<v1::JobRecord>(value).epoch,
                _ => {}
            }
        }
        self.assert(epoch >= self.epoch_told, "a restart lost an epoch that was told");
    }

    /// What is kept is within its limits, and nothing is left of what was forgotten.
    fn check_limits(&self, disk: &BTreeMap<Vec<u8>, Vec<u8>>) {
        let keys = disk.keys().map(|key| Key::decode(key).expect("it was encoded"));
        let mut jobs = BTreeSet::new();
        let mut barriers = BTreeMap::new();
        for key in keys {
            jobs.insert(key.job().to_owned());
            if let Key::Barrier { job, .. } = key {
                *barriers.entry(job).or_insert(0) += 1;
            }
        }
        check_count(self, "jobs", jobs.len(), JOBS_MAX);
        for count in barriers.into_values() {
            check_count(self, "barriers", count, BARRIERS_MAX);
        }
    }
}

/// No more than so many, whichever workers come and go.
fn check_count(model: &Model, what: &str, count: usize, count_max: usize) {
    model.assert(count <= count_max, &format!("{count} {what} are kept"));
}

fn decode<M: Message + Default>(value: &[u8]) -> M {
    M::decode(value).expect("the machine encoded it")
}
