//! A checkpoint from one store to another, byte for byte.
//!
//! ```text
//! shard --reads in flight--> checked against the index --> sink of the other store
//! manifest -----------------------------------------------> published last, as it is
//! ```
//!
//! Several ranks, each with a store of its own, bring their shards and publish once all are there.
//!
//! Always holds: the copy has the same attempt and the same bytes, each checked on its way; it
//! exists only when all of it is there and was read back; of one that is there already, what is
//! missing is brought; what an interrupted copy brought over is not sent again where the store can
//! tell; an error says whether the original is to blame.

use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;

use crossbeam_channel::Receiver;
use serde::Serialize;

use crate::clock::{Environment, elapsed};
use crate::error::IoContext;
use crate::format::checksum::crc32c;
use crate::format::manifest::{Manifest, ShardEntry};
use crate::format::names::{AttemptId, parse_shard_file};
use crate::io::buffer::{Buffer, BufferPool};
use crate::load::{Extent, OnDamage, Shard, VerifyObserver, from_format};
use crate::recovery::OwnShare;
use crate::store::flow::Flow;
use crate::store::{FileListing, Piece, Publication, ShardId, ShardSink, ShardSize, Store};
use crate::{EngineError, Result};

/// Bytes of reads in flight and of what waits to be written.
const BUFFERS_BYTES: usize = 96 << 20;
/// Fewest buffers: one being read, one being checked, two on their way.
const BUFFERS_MIN: usize = 4;

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
    /// Of these, parts that an earlier copy, which was interrupted, had brought over.
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
    /// Anything else: the destination, or what lies between.
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

/// Copies `step`.
pub(crate) fn transfer(
    source: &dyn Store,
    destination: &dyn Store,
    step: u64,
    overwrite: Overwrite,
    environment: &Arc<dyn Environment>,
    observer: &dyn VerifyObserver,
) -> Copied<Transferred> {
    let start = environment.monotonic();
    let what = naming(step, destination);
    let Original { manifest, bytes, attempt } = Original::read(source, step, &what)?;
    let replaces = standing(destination, step)?;
    if let Some(there) = replaces.filter(|there| *there != attempt && overwrite == Overwrite::No) {
        return Err(EngineError::StepConflict {
            what,
            why: format!("it holds another checkpoint of this step, attempt {there}"),
            hint: "choose another store, or copy with `--rewind`: the copy then takes its place"
                .into(),
        }
        .into());
    }
    let was_there = replaces == Some(attempt);
    let mut transferred = Transferred { step, was_there, ..Transferred::default() };
    let copy = Copy { source, destination, manifest: &manifest, environment, observer, what };
    let mut sinks = Sinks(Vec::new());
    let mut shards = Vec::new();
    let mut found_some = false;
    for entry in &manifest.shards {
        let may_be_there = was_there || destination.keeps_what_arrived();
        if may_be_there && is_whole(destination, &manifest, entry)? {
            shards.push((shard_of(step, entry)?, entry.bytes));
            found_some = true;
            continue;
        }
        let (shard, sink) = copy.shard(entry)?;
        transferred.was_there = false;
        transferred.count(entry, sink.as_ref());
        sinks.0.push(sink);
        shards.push((shard, entry.bytes));
        read_back(destination, &manifest, entry)?;
    }
    // Also of one that was there: whoever published it may have died before it was durable.
    destination.publish(Publication {
        step,
        attempt,
        manifest: &bytes,
        replaces,
        shards: &shards,
    })?;
    sinks.0.clear();
    // Nobody guards what no manifest named: it may have been cleaned away at this moment.
    if found_some && !was_there && look_back(destination, &manifest, attempt)? != Brought::All {
        return Err(EngineError::Unavailable {
            what: naming(step, destination),
            why: "a shard that was there already was deleted meanwhile".into(),
            hint: "copy again: what is missing is sent".into(),
        }
        .into());
    }
    transferred.seconds = elapsed(&**environment, start).as_secs_f64();
    Ok(transferred)
}

/// Copies what one rank has of `step`: its own shard, or, if that is not in its store because ranks
/// have moved since, whatever is. The copy is no checkpoint before [`publish_whole`].
pub(crate) fn transfer_share(
    source: &dyn Store,
    destination: &dyn Store,
    (step, share): (u64, OwnShare),
    environment: &Arc<dyn Environment>,
    observer: &dyn VerifyObserver,
) -> Copied<Transferred> {
    let start = environment.monotonic();
    let what = naming(step, destination);
    let Original { manifest, .. } = Original::read(source, step, &what)?;
    let mut transferred = Transferred { step, was_there: true, ..Transferred::default() };
    let part = part_of(source, &manifest, share)?;
    let copy = Copy { source, destination, manifest: &manifest, environment, observer, what };
    for entry in part {
        if is_whole(destination, &manifest, entry)? {
            continue;
        }
        transferred.was_there = false;
        // Nothing to bring, and it is not there: that is told of the source.
        let (_, sink) = copy.shard(entry)?;
        read_back(destination, &manifest, entry)?;
        transferred.count(entry, sink.as_ref());
    }
    transferred.seconds = elapsed(&**environment, start).as_secs_f64();
    Ok(transferred)
}

/// The shards that one rank has to bring: its own, or, if that is not in its store because ranks
/// have moved since, whatever is. If nothing is, its own all the same: somebody may have them.
fn part_of<'a>(
    source: &dyn Store,
    manifest: &'a Manifest,
    share: OwnShare,
) -> Result<Vec<&'a ShardEntry>> {
    let files = source.list_step(manifest.step)?.map(|listing| listing.files).unwrap_or_default();
    let lies_here = |entry: &&ShardEntry| files.iter().any(|file| file.name == entry.file);
    let is_own = |entry: &&ShardEntry| !share.may_miss(manifest, entry.rank);
    let here: Vec<&ShardEntry> = manifest.shards.iter().filter(lies_here).collect();
    let own_here: Vec<&ShardEntry> = here.iter().copied().filter(is_own).collect();
    Ok(match (own_here.is_empty(), here.is_empty()) {
        (false, _) => own_here,
        (true, false) => here,
        (true, true) => manifest.shards.iter().filter(is_own).collect(),
    })
}

/// Header, footer and index as they lie at the destination now; the chunks' checksums are in the
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

/// What of a step that several ranks bring is at the destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Brought {
    /// The checkpoint.
    All,
    /// Shards of other ranks are still missing.
    Some,
    /// Not what this rank has brought: somebody removed it.
    Less,
}

/// Publishes `step` at the destination, once every rank has brought its shard there. Any rank may,
/// and several at once. `may_be_ours` says whether this process may have done so before.
pub(crate) fn publish_whole(
    source: &dyn Store,
    destination: &dyn Store,
    (step, share): (u64, OwnShare),
    may_be_ours: bool,
) -> Copied<Brought> {
    let what = naming(step, destination);
    let Original { manifest, bytes, attempt } = Original::read(source, step, &what)?;
    let standing = standing(destination, step)?;
    if standing == Some(attempt) {
        // Whoever put it looked again, unless that was this process and it could not.
        return if may_be_ours {
            look_back(destination, &manifest, attempt)
        } else {
            Ok(Brought::All)
        };
    }
    let there = There::list(destination, step)?;
    if !part_of(source, &manifest, share)?.into_iter().all(|entry| there.has(entry)) {
        return Ok(Brought::Less);
    }
    if !manifest.shards.iter().all(|entry| there.has(entry)) {
        return Ok(Brought::Some);
    }
    destination.publish(Publication {
        step,
        attempt,
        manifest: &bytes,
        replaces: standing,
        // They were just listed, each read back by the rank that brought it.
        shards: &[],
    })?;
    look_back(destination, &manifest, attempt)
}

/// Looks, now that the manifest is visible, whether its shards still are, and takes it back if not:
/// meanwhile another process let the step go, which sees what it deletes, or this one does.
fn look_back(destination: &dyn Store, manifest: &Manifest, attempt: AttemptId) -> Copied<Brought> {
    let there = There::list(destination, manifest.step)?;
    if manifest.shards.iter().all(|entry| there.has(entry)) {
        return Ok(Brought::All);
    }
    destination.unpublish(manifest.step, attempt, None)?;
    Ok(Brought::Less)
}

/// The files of a step that are in a store.
struct There(Vec<FileListing>);

impl There {
    fn list(store: &dyn Store, step: u64) -> Result<Self> {
        Ok(Self(store.list_step(step)?.map(|listing| listing.files).unwrap_or_default()))
    }

    fn has(&self, entry: &ShardEntry) -> bool {
        self.0.iter().any(|file| file.name == entry.file && file.bytes == entry.bytes)
    }
}

fn naming(step: u64, destination: &dyn Store) -> String {
    format!("copying step {step} to `{}`", destination.location())
}

/// A checkpoint's manifest, as it lies in the store that it is copied from.
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
        let file = format!("{}, manifest of step {step}", source.location());
        let bytes = source.read_manifest(step)?.ok_or_else(|| EngineError::NotFound {
            what: what.into(),
            why: "there is no committed checkpoint of this step".into(),
            hint: "`ckpt-tool ls` lists those that exist".into(),
        })?;
        let manifest = Manifest::decode(&bytes).map_err(|error| from_format(&file, error))?;
        let attempt = AttemptId::parse(&manifest.attempt)
            .ok_or_else(|| EngineError::corrupt(file, "its attempt is no attempt's name"))?;
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

struct Copy<'a> {
    source: &'a dyn Store,
    destination: &'a dyn Store,
    manifest: &'a Manifest,
    environment: &'a Arc<dyn Environment>,
    observer: &'a dyn VerifyObserver,
    what: String,
}

/// A read that was begun.
type Reading = (Extent, Receiver<(Result<()>, Buffer)>);

impl Copy<'_> {
    fn shard(&self, entry: &ShardEntry) -> Copied<(ShardId, Box<dyn ShardSink>)> {
        let checkpoint = Shard::open(self.source, self.manifest, entry.rank, OnDamage::Report)
            .map_err(Uncopied::of_source)?;
        let shard = shard_of(self.manifest.step, entry)?;
        let size = ShardSize { expected_bytes: entry.bytes, most_bytes: entry.bytes };
        let flow = Arc::new(Flow::new(Arc::clone(self.environment), None));
        // No training waits for a copy.
        flow.captured();
        let mut sink = self.destination.resume_shard(shard, size, &flow)?;
        let copied =
            self.extents(&checkpoint, sink.as_mut()).and_then(|()| Ok(sink.finish(entry.bytes)?));
        match copied {
            Ok(()) => Ok((shard, sink)),
            Err(error) => {
                sink.abandon();
                Err(error)
            }
        }
    }

    fn extents(&self, checkpoint: &Shard, sink: &mut dyn ShardSink) -> Copied<()> {
        let extents = checkpoint.extents();
        let buffer_bytes = extents.iter().map(|extent| extent.bytes).max().unwrap_or(0);
        let count = (BUFFERS_BYTES / buffer_bytes.max(1)).clamp(BUFFERS_MIN, 64);
        let pool = BufferPool::new(buffer_bytes, count)
            .context("allocating buffers to copy", checkpoint.name())?;
        let mut waiting = extents.into_iter();
        let mut next = waiting.next();
        let mut reading: VecDeque<Reading> = VecDeque::new();
        let mut told_bytes = 0;
        while next.is_some() || !reading.is_empty() {
            while let Some(extent) = next {
                // With nothing being read, all buffers are on their way out and come back.
                let buffer = if reading.is_empty() { Some(pool.take()) } else { pool.try_take() };
                let Some(buffer) = buffer else { break };
                reading.push_back((extent, checkpoint.start_reading(extent, buffer)));
                next = waiting.next();
            }
            if let Some(read) = reading.pop_front() {
                self.pass_on(checkpoint, read, sink)?;
                let sent_bytes = sink.figures().sent_bytes;
                self.observer.sent(sent_bytes - told_bytes);
                told_bytes = sent_bytes;
                self.check_wanted()?;
            }
        }
        // What no part was filled by goes when the shard is finished.
        let gone_bytes = told_bytes + sink.figures().resumed_bytes;
        self.observer.sent(checkpoint.file_bytes().saturating_sub(gone_bytes));
        Ok(self.check_wanted()?)
    }

    fn check_wanted(&self) -> Result<()> {
        if !self.observer.is_cancelled() {
            return Ok(());
        }
        Err(EngineError::Closed {
            what: self.what.clone(),
            why: "it was cancelled".into(),
            hint: "copy again: what was brought over is not sent twice where the store can tell"
                .into(),
        })
    }

    fn pass_on(
        &self,
        checkpoint: &Shard,
        (extent, arrival): Reading,
        sink: &mut dyn ShardSink,
    ) -> Copied<()> {
        let (outcome, buffer) = arrival
            .recv()
            .map_err(|_| EngineError::internal(self.what.clone(), "the store dropped a read"))?;
        outcome.map_err(Uncopied::of_source)?;
        let crc32c = crc32c(&buffer[..extent.bytes]);
        if extent.crc32c.is_some_and(|expected| expected != crc32c) {
            return Err(Uncopied::of_source(EngineError::corrupt(
                checkpoint.name(),
                format!(
                    "the {} bytes at offset {} have checksum {crc32c:08x}, the index says {:08x}",
                    extent.bytes,
                    extent.offset,
                    extent.crc32c.unwrap_or_default()
                ),
            )));
        }
        sink.write(extent.offset, Piece { buffer, bytes: extent.bytes, crc32c })?;
        self.observer.advanced(extent.bytes as u64);
        Ok(())
    }
}
