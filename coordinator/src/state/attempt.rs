//! One attempt: what each rank has reported, and who is asked to publish.
//!
//! Always holds:
//! - a rank has one shard in an attempt: a later report of another one changes nothing;
//! - either all ranks of an attempt have a store of their own, or none;
//! - who is asked to publish has waited with a report, and is handed all that have arrived.

use std::collections::{BTreeMap, BTreeSet};

use dtr_proto::v1;

use super::{Context, EndedAttempt, Refusal, RefusalKind, Reply, Ticket};

/// Attempts that a job may have in flight.
pub(super) const ATTEMPTS_MAX: usize = 64;

/// An attempt in flight.
#[derive(Debug)]
pub(super) struct Attempt {
    pub(super) record: v1::AttemptRecord,
    pub(super) begun_ms: u64,
    /// How often it was said who has not begun it.
    pub(super) warnings: usize,
    /// Ranks that know of it, each with how often it had tried the step before. After a restart
    /// nobody is known to, so everybody may.
    pub(super) begun: BTreeMap<u32, u32>,
    pub(super) shards: BTreeMap<u32, v1::Shard>,
    /// Whether each rank publishes in a store of its own; known with the first report.
    has_own_stores: Option<bool>,
    /// Checksums of the manifests that are durable in the ranks' own stores.
    pub(super) published: BTreeMap<u32, u32>,
    /// Checksums of the structure of the replicated entries, where each has a store of its own.
    replicated: BTreeMap<u32, Option<u32>>,
    pub(super) waiting: BTreeMap<u32, Ticket>,
    /// The rank that was asked to publish, and when.
    pub(super) publisher: Option<(u32, u64)>,
    /// The ranks that were ever asked, but for those that have said that they will not.
    pub(super) asked: BTreeSet<u32>,
    /// Begun before a restart: who was asked then is not known.
    pub(super) is_recovered: bool,
}

/// What a rank says of its part.
pub(super) struct Report {
    pub(super) shard: v1::Shard,
    pub(super) own_store: bool,
    pub(super) published_crc32c: Option<u32>,
    pub(super) replicated_crc32c: Option<u32>,
}

impl Attempt {
    /// One that just begins.
    pub(super) fn new(now_ms: u64, record: v1::AttemptRecord) -> Self {
        Self { is_recovered: false, ..Self::recovered(now_ms, record) }
    }

    /// One that an earlier process of the coordinator kept.
    pub(super) fn recovered(now_ms: u64, record: v1::AttemptRecord) -> Self {
        Self {
            record,
            begun_ms: now_ms,
            warnings: 0,
            begun: BTreeMap::new(),
            shards: BTreeMap::new(),
            has_own_stores: None,
            published: BTreeMap::new(),
            replicated: BTreeMap::new(),
            waiting: BTreeMap::new(),
            publisher: None,
            asked: BTreeSet::new(),
            is_recovered: true,
        }
    }

    /// Whether a rank may have published, or still may. In stores of their own ranks take back
    /// what was not committed.
    pub(super) fn may_be_published(&self) -> bool {
        !self.each_publishes() && (self.is_recovered || !self.asked.is_empty())
    }

    pub(super) fn each_publishes(&self) -> bool {
        self.has_own_stores == Some(true)
    }

    pub(super) fn ended(&self, step: u64, ended_ms: u64, error: String) -> EndedAttempt {
        EndedAttempt {
            attempt: self.record.attempt.clone(),
            step,
            begun_ms: self.begun_ms,
            asked_ms: self.publisher.map(|(_, asked_ms)| asked_ms),
            ended_ms,
            error,
        }
    }

    pub(super) fn is_complete(&self, world_size: u32) -> bool {
        self.shards.len() == usize::try_from(world_size).unwrap_or(usize::MAX)
    }

    /// Whether the manifest is durable in every rank's own store.
    pub(super) fn is_published_by_all(&self, world_size: u32) -> bool {
        self.is_complete(world_size) && self.published.len() == self.shards.len()
    }

    pub(super) fn commit(
        &self,
        step: u64,
        context: &Context<'_>,
        manifest_crc32c: u32,
    ) -> v1::Commit {
        v1::Commit {
            step,
            attempt: self.record.attempt.clone(),
            world_size: u32::try_from(self.shards.len()).unwrap_or(u32::MAX),
            bytes: total(self.shards.values().map(|shard| shard.bytes)),
            raw_bytes: total(self.shards.values().map(|shard| shard.raw_bytes)),
            manifest_crc32c,
            committed_unix_ms: context.at.wall_ms,
            epoch: self.record.epoch,
        }
    }

    /// Takes a report in; returns the waiter of an earlier one of the same rank.
    pub(super) fn take(
        &mut self,
        ticket: Ticket,
        rank: u32,
        report: Report,
    ) -> Result<Option<Ticket>, Refusal> {
        if self.has_own_stores.is_some_and(|known| known != report.own_store) {
            return Err(Refusal::new(
                RefusalKind::Invalid,
                format!("rank {rank} and others differ in whether each has a store of its own"),
                "give `remote` to every rank of the job, or to none",
            ));
        }
        if self.shards.get(&rank).is_some_and(|earlier| *earlier != report.shard) {
            return Err(invalid_shard("it contradicts an earlier report of the same attempt"));
        }
        self.has_own_stores = Some(report.own_store);
        self.replicated.insert(rank, report.replicated_crc32c);
        self.begun.entry(rank).or_insert(0);
        self.shards.insert(rank, report.shard);
        if let Some(crc32c) = report.published_crc32c {
            self.published.insert(rank, crc32c);
        }
        Ok(self.waiting.insert(rank, ticket))
    }

    /// Another rank than `rank`, whose replicated entries differ from those of `rank`.
    pub(super) fn differs_from(&self, rank: u32) -> Option<u32> {
        let own = self.replicated.get(&rank)?;
        let differs = |(_, other): &(&u32, &Option<u32>)| *other != own;
        self.replicated.iter().find(differs).map(|(other, _)| *other)
    }

    /// Asks the ranks that are to publish now that `rank` has reported.
    pub(super) fn ask_after_report(&mut self, now_ms: u64, rank: u32) -> Vec<(Ticket, Reply)> {
        let has_published = |rank: &u32| self.published.contains_key(rank);
        let asked: Vec<u32> = match self.publisher {
            _ if self.each_publishes() => {
                self.waiting.keys().copied().filter(|rank| !has_published(rank)).collect()
            }
            Some((publisher, _)) if publisher != rank => Vec::new(),
            _ => vec![rank],
        };
        asked.into_iter().filter_map(|rank| self.ask(now_ms, rank)).collect()
    }

    pub(super) fn reply(&self, world_size: u32) -> Reply {
        Reply::BeginCheckpoint(v1::BeginCheckpointReply {
            attempt: self.record.attempt.clone(),
            created_unix_ms: self.record.created_unix_ms,
            world_size,
        })
    }

    /// Asks `rank` to publish.
    fn ask(&mut self, now_ms: u64, rank: u32) -> Option<(Ticket, Reply)> {
        let ticket = self.waiting.remove(&rank)?;
        self.publisher = Some((rank, now_ms));
        self.asked.insert(rank);
        Some((ticket, Reply::Publish(self.shards.values().cloned().collect())))
    }

    /// Asks the first rank that waits, if one does.
    pub(super) fn ask_next(&mut self, now_ms: u64) -> Option<(Ticket, Reply)> {
        let rank = *self.waiting.keys().next()?;
        self.ask(now_ms, rank)
    }
}

pub(super) fn invalid_shard(why: &str) -> Refusal {
    Refusal::new(
        RefusalKind::Invalid,
        format!("the shard cannot be accepted: {why}"),
        "report what this rank wrote in this attempt",
    )
}

/// What a rank says of its bytes is not looked at: no sum of it may overflow.
fn total(bytes: impl Iterator<Item = u64>) -> u64 {
    bytes.fold(0, u64::saturating_add)
}
