//! The other ranks of a job, as a save and a load see them.
//!
//! ```text
//! every rank: begin ──► write the shard, durable ──► report ──┬─ all but one wait
//!                                                             └─ one publishes and commits
//!
//! with a store of its own, every rank:
//!             begin ──► write the shard, durable ──► report ──► publish ──► report ──► wait
//! ```
//!
//! Always holds: whether a checkpoint exists is said by its manifest in the store, never by the
//! coordinator; a shard that was reported is deleted only when it is known that no rank was asked
//! to publish it, or in a store of its own that the manifest was taken back.

use std::fmt;
use std::time::Duration;

use crate::Result;
use crate::format::manifest::ShardEntry;
use crate::format::names::AttemptId;

#[cfg(feature = "coordinator")]
mod coordinated;

#[cfg(feature = "coordinator")]
pub use coordinated::Coordinated;

/// Brings the ranks of a job together. Calls wait for the other ranks, none for the training.
pub trait Ranks: Send + Sync + fmt::Debug {
    /// Begins the save of a step, or joins the attempt that another rank began.
    fn begin(&self, step: u64) -> Result<Begun>;

    /// Reports this rank's durable shard, and waits for what becomes of the attempt; gives the
    /// attempt up once `is_cancelled`.
    fn report(
        &self,
        attempt: Attempt,
        report: Report<'_>,
        is_cancelled: &dyn Fn() -> bool,
    ) -> Result<Outcome>;

    /// Says that the manifest, whose bytes have this checksum, is durable. False if the coordinator
    /// has forgotten the reports, which then have to be sent again.
    fn commit(&self, attempt: Attempt, manifest_crc32c: u32) -> Result<bool>;

    /// Gives the attempt up on every rank; `is_unpublished` if this one was asked to publish, did
    /// not, and will not.
    fn abort(&self, attempt: Attempt, reason: &str, is_unpublished: bool) -> Result<()>;

    /// Waits, for at most `timeout`, until every rank has said which attempts it can load.
    fn agree(
        &self,
        offered: &[Attempt],
        hindrance: Hindrance<'_>,
        timeout: Duration,
    ) -> Result<Agreed>;
}

/// What keeps a rank from loading more than it offers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hindrance<'a> {
    /// Nothing.
    None,
    /// Checkpoints that it cannot read: which, and why.
    Damage(&'a str),
    /// It gives up, for this reason.
    GivesUp(&'a str),
}

/// What every rank loads: the same answer for all of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Agreed {
    /// The newest step that all can load.
    Step(u64),
    /// There is none, though nothing keeps any rank from loading.
    Nothing {
        /// How many ranks have a checkpoint, each one that others have not.
        offering: u32,
    },
    /// There is none, and one of the reasons is this.
    Hindered {
        /// The rank that cannot load.
        rank: u32,
        /// What it said.
        why: String,
        /// Whether it gave up.
        gave_up: bool,
    },
}

/// What a rank says of its part in an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Report<'a> {
    /// Its durable shard.
    pub shard: &'a ShardEntry,
    /// Whether each rank publishes in a store of its own; the same on every rank.
    pub own_store: bool,
    /// Checksum of the manifest that is durable there.
    pub published_crc32c: Option<u32>,
    /// With a store of its own: checksum of the structure of the replicated entries, if
    /// anything.
    pub replicated_crc32c: Option<u32>,
    /// Of rank 0 with a store of its own: what the manifests say besides the shards; else empty.
    pub annotations: &'a [u8],
}

/// What every rank of an attempt is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Begun {
    /// The attempt, the same on every rank.
    pub attempt: AttemptId,
    /// When it began, for the manifest.
    pub created_unix_ms: u64,
}

/// One try at saving a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attempt {
    /// The step.
    pub step: u64,
    /// Which try.
    pub id: AttemptId,
}

/// What became of an attempt, for one rank.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// This rank publishes the manifest; in a store of its own, as every rank does.
    Publish {
        /// The shards, by ascending rank.
        shards: Vec<ShardEntry>,
        /// What rank 0 has reported that the manifests say besides.
        annotations: Vec<u8>,
    },
    /// The checkpoint is committed.
    Committed,
    /// The attempt was given up.
    Aborted {
        /// Why; names the rank.
        why: String,
        /// Whether a rank may have been asked to publish before: then the store says what is.
        may_be_published: bool,
    },
}
