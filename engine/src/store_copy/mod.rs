//! A checkpoint from one store to another, byte for byte.
//!
//! ```text
//! shard --reads in flight--> checked against the index --> sink of the other store
//! manifest -----------------------------------------------> published last, as it is
//! ```
//!
//! Several ranks, each with a store of its own, copy their shards and publish once all exist.
//!
//! Always holds: the copy has the same attempt and the same bytes, each checked on its way; it
//! exists only when all of it is durable and was read back; of one that exists already, what is
//! missing is copied; what an interrupted copy transferred is not sent again where the store can
//! recognise it; an error says whether the original is to blame.

use std::fmt;
use std::sync::Arc;

use serde::Serialize;

use crate::clock::{Environment, elapsed};
use crate::format::manifest::{Manifest, ShardEntry};
use crate::format::names::{AttemptId, parse_shard_file};
use crate::load::{OnDamage, Shard, VerifyObserver, from_format, read_manifest_for};
use crate::store::{Publication, ShardId, ShardSink, Store};
use crate::{EngineError, Result};

mod share;
mod stream;

use share::look_back;
pub(crate) use share::{Presence, publish_whole, transfer_share};
use stream::Stream;

/// What was copied.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Transferred {
    /// The step.
    pub step: u64,
    /// Whether the other store had this checkpoint already, with all shards, of the length and with
    /// the index that they should have; nothing was copied then.
    pub was_there: bool,
    /// Bytes of the shards.
    pub bytes: u64,
    /// Parts that the shards were uploaded in; 0 where the other store is a directory.
    pub parts: u64,
    /// Of these, parts that an earlier copy, which was interrupted, had transferred.
    pub resumed_parts: u64,
    /// Requests that had to be repeated.
    pub retries: u64,
    /// Seconds it took.
    pub seconds: f64,
}

/// What becomes of checkpoints of the other store that stand in the way: another one of the step,
/// or later ones that the training went back over when it saved this one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Overwrite {
    /// They stay, and the copy is refused.
    No,
    /// The copy takes their place.
    Yes,
}

/// Why a checkpoint was not copied.
#[derive(Debug)]
pub(crate) enum Uncopied {
    /// What was to be copied is damaged, not there, or of a newer version: it will be next time.
    Source(EngineError),
    /// Anything else: the destination, or what is between.
    Elsewhere(EngineError),
}

impl Uncopied {
    /// Of an error that was met while the source was read.
    fn of_source(error: EngineError) -> Self {
        match error {
            EngineError::Corrupt { .. }
            | EngineError::NotFound { .. }
            | EngineError::UnsupportedFormat { .. } => Self::Source(error),
            error => Self::Elsewhere(error),
        }
    }

    /// Whether another try may succeed though nobody changes anything here.
    pub(crate) fn may_pass(&self) -> bool {
        match self {
            Self::Source(_)
            | Self::Elsewhere(
                EngineError::Internal { .. } | EngineError::UnsupportedFormat { .. },
            ) => false,
            Self::Elsewhere(_) => true,
        }
    }
}

impl fmt::Display for Uncopied {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (Self::Source(error) | Self::Elsewhere(error)) = self;
        error.fmt(formatter)
    }
}

impl From<EngineError> for Uncopied {
    fn from(error: EngineError) -> Self {
        Self::Elsewhere(error)
    }
}

impl From<Uncopied> for EngineError {
    fn from(uncopied: Uncopied) -> Self {
        match uncopied {
            Uncopied::Source(error) | Uncopied::Elsewhere(error) => error,
        }
    }
}

/// A copy that may not have come about.
pub(crate) type Copied<T> = std::result::Result<T, Uncopied>;

/// The two stores of a copy, and what goes with it.
pub(crate) struct Between<'a> {
    pub(crate) source: &'a dyn Store,
    pub(crate) destination: &'a dyn Store,
    pub(crate) environment: &'a Arc<dyn Environment>,
    pub(crate) observer: &'a dyn VerifyObserver,
}

/// Shards that are at the destination, before a manifest names them.
struct Arrived {
    shards: Vec<(ShardId, u64)>,
    sinks: Sinks,
    /// Whether some were there before.
    found_some: bool,
    transferred: Transferred,
}

/// Copies `step`.
pub(crate) fn transfer(
    between: &Between<'_>,
    step: u64,
    overwrite: Overwrite,
) -> Copied<Transferred> {
    let Between { source, destination, environment, .. } = *between;
    let start = environment.monotonic();
    let original = Original::read(source, step, &naming(step, destination))?;
    let Original { manifest, bytes, attempt } = &original;
    let replaces = standing(destination, step)?;
    if let Some(there) = replaces.filter(|there| there != attempt && overwrite == Overwrite::No) {
        return Err(in_the_way(step, destination, there).into());
    }
    let was_there = replaces == Some(*attempt);
    let Arrived { shards, mut sinks, found_some, mut transferred } =
        transfer_all(between, manifest, was_there)?;
    // Also of one that existed: the process that published it may have died before it was durable.
    destination.publish(Publication {
        step,
        attempt: *attempt,
        manifest: bytes,
        replaces,
        shards: &shards,
    })?;
    sinks.0.clear();
    // Nobody guards what no manifest named: it may have been cleaned away at this moment.
    if found_some && !was_there && look_back(destination, manifest, *attempt)? != Presence::All {
        return Err(lost_meanwhile(step, destination).into());
    }
    transferred.seconds = elapsed(&**environment, start).as_secs_f64();
    Ok(transferred)
}

/// Copies the shards that are not at the destination yet; `was_there` if the checkpoint is.
fn transfer_all(between: &Between<'_>, manifest: &Manifest, was_there: bool) -> Copied<Arrived> {
    let (step, destination) = (manifest.step, between.destination);
    let stream = Stream { between, manifest, what: naming(step, destination) };
    let mut arrived = Arrived {
        shards: Vec::new(),
        sinks: Sinks(Vec::new()),
        found_some: false,
        transferred: Transferred { step, was_there, ..Transferred::default() },
    };
    for entry in &manifest.shards {
        let may_be_there = was_there || destination.keeps_what_arrived();
        if may_be_there && is_whole(destination, manifest, entry)? {
            arrived.shards.push((shard_of(step, entry)?, entry.bytes));
            arrived.found_some = true;
            continue;
        }
        let (shard, sink) = stream.shard(entry)?;
        arrived.transferred.was_there = false;
        arrived.transferred.count(entry, sink.as_ref());
        arrived.sinks.0.push(sink);
        arrived.shards.push((shard, entry.bytes));
        read_back(destination, manifest, entry)?;
    }
    Ok(arrived)
}

fn in_the_way(step: u64, destination: &dyn Store, there: AttemptId) -> EngineError {
    EngineError::StepConflict {
        what: naming(step, destination),
        why: format!("it holds another checkpoint of this step, attempt {there}"),
        hint: "choose another store, or copy with `--rewind`: the copy then takes its place".into(),
    }
}

fn lost_meanwhile(step: u64, destination: &dyn Store) -> EngineError {
    EngineError::Unavailable {
        what: naming(step, destination),
        why: "a shard that was there already was deleted meanwhile".into(),
        hint: "copy again: what is missing is sent".into(),
    }
}

/// Header, footer and index as they are at the destination now; the chunks' checksums are in the
/// index. What comes damaged is asked for once more: it may have been damaged on its way.
fn read_back(destination: &dyn Store, manifest: &Manifest, entry: &ShardEntry) -> Result<()> {
    let open = || Shard::open(destination, manifest, entry.rank, OnDamage::Report).map(drop);
    match open() {
        Err(error @ EngineError::Corrupt { .. }) => {
            tracing::warn!(%error, "what was copied came back damaged, and is read once more");
            open()
        }
        opened => opened,
    }
}

/// Whether a shard is at the destination, as far as [`read_back`] sees.
fn is_whole(destination: &dyn Store, manifest: &Manifest, entry: &ShardEntry) -> Result<bool> {
    match read_back(destination, manifest, entry) {
        Ok(()) => Ok(true),
        Err(EngineError::NotFound { .. } | EngineError::Corrupt { .. }) => Ok(false),
        Err(error) => Err(error),
    }
}

fn shard_of(step: u64, entry: &ShardEntry) -> Result<ShardId> {
    let (rank, attempt) = parse_shard_file(&entry.file)
        .ok_or_else(|| EngineError::corrupt(&entry.file, "it is no shard's name"))?;
    Ok(ShardId { step, rank, attempt })
}

fn naming(step: u64, destination: &dyn Store) -> String {
    format!("copying step {step} to `{}`", destination.location())
}

/// A checkpoint's manifest, as it is in the store that it is copied from.
struct Original {
    manifest: Manifest,
    bytes: Vec<u8>,
    attempt: AttemptId,
}

impl Original {
    fn read(source: &dyn Store, step: u64, what: &str) -> Copied<Self> {
        Self::try_read(source, step, what).map_err(Uncopied::of_source)
    }

    fn try_read(source: &dyn Store, step: u64, what: &str) -> Result<Self> {
        let (manifest, bytes) = read_manifest_for(source, step, what)?;
        let attempt =
            manifest.attempt_id().map_err(|error| from_format(&source.location(), error))?;
        Ok(Self { manifest, bytes, attempt })
    }
}

impl Transferred {
    fn count(&mut self, entry: &ShardEntry, sink: &dyn ShardSink) {
        let figures = sink.figures();
        self.bytes += entry.bytes;
        self.parts += figures.parts;
        self.resumed_parts += figures.resumed_parts;
        self.retries += figures.retries;
    }
}

/// The attempt of the checkpoint that a store holds. What does not decode is none: publishing
/// decides what becomes of it.
pub(crate) fn standing(store: &dyn Store, step: u64) -> Result<Option<AttemptId>> {
    let manifest = store.read_manifest(step)?.and_then(|bytes| Manifest::decode(&bytes).ok());
    Ok(manifest.and_then(|manifest| manifest.attempt_id().ok()))
}

/// Sinks whose shards are whole; given up unless the manifest was published.
struct Sinks(Vec<Box<dyn ShardSink>>);

impl Drop for Sinks {
    fn drop(&mut self) {
        for sink in self.0.drain(..) {
            sink.abandon();
        }
    }
}
