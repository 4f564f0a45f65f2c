//! The committer: writes the shard, publishes the manifest, reads it back, applies retention.
//!
//! Always holds: the order is shard durable -> manifest visible and durable -> read back -> older
//! checkpoints deleted -> handle resolved -> their space freed (with several ranks, before the
//! handle is resolved) -> next save written; a save that fails before the manifest leaves nothing
//! behind but earlier checkpoints, unless other ranks may still name its shard; a panic here fails
//! that save and poisons the engine, and waits nobody out. Where several ranks save together, what
//! is visible is what [`super::together`] brought about.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender};
use dtr_proto::span;

use super::handle::{SaveHandle, SaveInfo};
use super::job::{Job, Message};
use super::together::{Together, annotations_of};
use super::write::{WrittenShard, chunks_offset, write_shard};
use crate::clock::elapsed;
use crate::engine::Core;
use crate::error::{IoContext, caught};
use crate::format::checksum::to_hex;
use crate::format::index::ShardIndex;
use crate::format::manifest::{Manifest, ShardEntry};
use crate::format::names::{AttemptId, shard_file_name};
use crate::format::shard::Header;
use crate::load::{OnDamage, Shard, read_manifest};
use crate::ranks::{Attempt, Begun, Ranks};
use crate::store::{Publication, ShardId, ShardSink, ShardSize, TransferFigures};
use crate::{EngineError, Result};

/// One save, as the committer gets it.
#[derive(Debug)]
pub(crate) struct CommitTask {
    pub(crate) job: Arc<Job>,
    pub(crate) encoded: Receiver<Message>,
    /// Without its chunks.
    pub(crate) index: ShardIndex,
    /// Complete but for the attempt, when it began, and the shards.
    pub(crate) manifest: Manifest,
    /// Names of the replicated entries.
    pub(crate) replicated: Vec<String>,
    pub(crate) replaces: Option<AttemptId>,
    /// The earliest that the manifest may say the attempt began.
    pub(crate) not_before_unix_ms: u64,
    pub(crate) reserve_bytes: u64,
    pub(crate) handle: SaveHandle,
    /// When the caller began to wait for this save, or to prepare it.
    pub(crate) started: Duration,
}

/// The committer's thread and the queue towards it.
#[derive(Debug)]
pub(crate) struct Committer {
    tasks: Option<Sender<CommitTask>>,
    thread: Option<JoinHandle<()>>,
}

impl Committer {
    pub(crate) fn start(core: &Arc<Core>) -> Result<Self> {
        // One save is in flight at a time: the next one waits for this one's handle.
        let (tasks, queue) = crossbeam_channel::bounded::<CommitTask>(1);
        let core = Arc::clone(core);
        let thread = std::thread::Builder::new()
            .name("dtr-commit".into())
            .spawn(move || queue.iter().for_each(|task| run(&core, task)))
            .context("starting a thread for", "committing")?;
        Ok(Self { tasks: Some(tasks), thread: Some(thread) })
    }

    pub(crate) fn submit(&self, task: CommitTask) -> Result<()> {
        let tasks = self.tasks.as_ref();
        tasks.and_then(|tasks| tasks.send(task).ok()).ok_or_else(|| {
            EngineError::internal("starting a save", "the committing thread has ended")
        })
    }
}

impl Drop for Committer {
    fn drop(&mut self) {
        self.tasks = None;
        if let Some(thread) = self.thread.take() {
            // A panic was reported by the save that it failed.
            let _panicked = thread.join();
        }
    }
}

fn run(core: &Core, task: CommitTask) {
    let handle = task.handle.clone();
    let job = Arc::clone(&task.job);
    let result = poisoning(core, job.step, || commit(core, task));
    if let Err(error) = &result {
        // Copiers and workers that are still at it must stop before the handle resolves.
        job.fail(error.duplicate());
        tracing::error!(step = job.step, %error, "save failed");
    }
    core.save_ended(&job, result.as_ref().ok());
    if core.config.world_size > 1 {
        // Ranks may share a filesystem, and this space be what another's next save needs.
        reclaim(core, job.step);
    }
    handle.resolve(result);
    // Nobody waits for it now.
    reclaim(core, job.step);
}

/// Frees the space of what retention deleted.
fn reclaim(core: &Core, step: u64) {
    let _span = tracing::trace_span!("reclaim").entered();
    let reclaimed = poisoning(core, step, || {
        core.store.reclaim();
        Ok(())
    });
    if let Err(error) = reclaimed {
        tracing::error!(step, %error, "giving back the space of deleted checkpoints failed");
    }
}

/// A panic becomes an error, and the engine saves no more.
fn poisoning<T>(core: &Core, step: u64, act: impl FnOnce() -> Result<T>) -> Result<T> {
    caught(act, || {
        core.poison();
        EngineError::internal(format!("saving step {step}"), "the committing thread panicked")
    })
}

fn commit(core: &Core, task: CommitTask) -> Result<SaveInfo> {
    let job = Arc::clone(&task.job);
    let begun = match &core.ranks {
        Some(ranks) => begin_together(core, ranks.as_ref(), &task)?,
        None => Begun {
            attempt: core.environment.attempt_id()?,
            created_unix_ms: core.environment.unix_ms(),
        },
    };
    let started = task.started;
    let committed = poisoning(core, job.step, || commit_attempt(core, task, begun));
    trace(core, &job, begun.attempt, started, committed.as_ref().err());
    if let (Err(error), Some(ranks)) = (&committed, &core.ranks) {
        // First, because telling the others may take a while.
        job.fail(error.duplicate());
        give_up(ranks.as_ref(), Attempt { step: job.step, id: begun.attempt }, error);
    }
    committed
}

/// Begins an attempt under whose name this rank has written nothing yet. A coordinator that was
/// away may hand out, from its journal, one that this rank has seen the end of: what was written
/// under its name belongs to a checkpoint, or may come to.
fn begin_together(core: &Core, ranks: &dyn Ranks, task: &CommitTask) -> Result<Begun> {
    let step = task.job.step;
    let ended = [task.replaces, core.last_attempt()];
    let mut begun = ranks.begin(step)?;
    if ended.contains(&Some(begun.attempt)) {
        let attempt = Attempt { step, id: begun.attempt };
        tracing::warn!(step, %begun.attempt, "starting over: the coordinator named an attempt \
                                              that has ended");
        ranks.abort(attempt, "this rank has seen it end and starts over", false)?;
        begun = ranks.begin(step)?;
    }
    if ended.contains(&Some(begun.attempt)) {
        let why = format!("the coordinator named attempt {}, which has ended", begun.attempt);
        return Err(EngineError::internal(format!("beginning to save step {step}"), why));
    }
    core.note_attempt(begun.attempt);
    Ok(begun)
}

/// Says where the time of an attempt went, for traces, as [`dtr_proto::span`] describes.
fn trace(
    core: &Core,
    job: &Job,
    attempt: AttemptId,
    started: Duration,
    error: Option<&EngineError>,
) {
    if !tracing::enabled!(target: span::TARGET, tracing::Level::TRACE) {
        return;
    }
    let attempt = attempt.to_string();
    let ended = elapsed(&*core.environment, started);
    let error = error.map(EngineError::to_string).unwrap_or_default();
    let rank = core.config.rank;
    let whole = format!("save/{rank}");
    let above = if core.config.world_size > 1 { span::CHECKPOINT } else { "" };
    for phase in job.stats().phases(ended, error.is_empty()) {
        let is_whole = phase.name == "save";
        tracing::trace!(
            target: span::TARGET,
            trace = attempt,
            span = phase.name,
            id = format!("{}/{rank}", phase.name),
            parent = if is_whole { above } else { &whole },
            ago_us = micros(ended.saturating_sub(phase.start)),
            took_us = micros(phase.end.saturating_sub(phase.start)),
            job = core.config.job,
            step = job.step,
            rank,
            error,
        );
    }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

/// Reports to the other ranks that the attempt failed on this one.
fn give_up(ranks: &dyn Ranks, attempt: Attempt, error: &EngineError) {
    if matches!(error, EngineError::Coordination { .. }) {
        // They know, or the coordinator cannot be asked.
        return;
    }
    if let Err(untold) = ranks.abort(attempt, &error.without_hint(), false) {
        tracing::warn!(step = attempt.step, %untold, "the other ranks could not be told that this \
                                                      save has failed");
    }
}

/// A shard that is durable, for a manifest to name.
struct Durable {
    shard: ShardId,
    written: WrittenShard,
    entry: ShardEntry,
    /// What its manifest takes the place of.
    replaces: Option<AttemptId>,
}

/// When the stages of an attempt began and ended.
struct Moments {
    started: Duration,
    write_began: Duration,
    publish_began: Duration,
    published: Duration,
}

fn commit_attempt(core: &Core, task: CommitTask, begun: Begun) -> Result<SaveInfo> {
    let CommitTask { job, encoded, index, mut manifest, replaces, started, .. } = task;
    let write_began = core.environment.monotonic();
    let shard = ShardId { step: job.step, rank: core.config.rank, attempt: begun.attempt };
    manifest.attempt = begun.attempt.to_string();
    manifest.created_unix_ms = begun.created_unix_ms.max(task.not_before_unix_ms);
    let size = ShardSize { expected_bytes: task.reserve_bytes, most_bytes: job.layout.raw_bytes() };
    let (written, sink) = write(core, &job, (shard, size), index, encoded)?;
    let publish_began = core.environment.monotonic();
    let figures = sink.figures();
    let entry = shard_entry(&job, shard, written, task.replicated);
    let durable = Durable { shard, written, entry, replaces };
    make_visible(core, &job, &durable, &mut manifest, sink)?;
    if let Some(uploads) = core.store.uploads() {
        uploads.add(shard.step);
    }
    let published = core.environment.monotonic();
    let moments = Moments { started, write_began, publish_began, published };
    book(&job, &moments, written, figures);
    tracing::trace_span!("read_back").in_scope(|| read_back(core, &durable, &manifest))?;
    let removed_steps = tracing::trace_span!("retention").in_scope(|| core.prune(shard.step));
    Ok(SaveInfo {
        step: shard.step,
        attempt: shard.attempt.to_string(),
        location: core.store.location(),
        raw_bytes: job.layout.raw_bytes(),
        stored_bytes: written.file_bytes,
        removed_steps,
        stats: job.stats(),
    })
}

/// Writes the shard and makes it durable.
fn write(
    core: &Core,
    job: &Arc<Job>,
    (shard, size): (ShardId, ShardSize),
    index: ShardIndex,
    encoded: Receiver<Message>,
) -> Result<(WrittenShard, Box<dyn ShardSink>)> {
    let mut sink = core.store.create_shard(shard, size, &job.flow)?;
    let header = Header {
        attempt: shard.attempt,
        step: shard.step,
        rank: shard.rank,
        world_size: core.config.world_size,
        chunk_bytes: job.layout.chunk_bytes(),
        chunks_offset: chunks_offset(
            job.layout.raw_bytes(),
            job.layout.chunk_bytes(),
            job.compression.fixed_codec(),
        ),
        replicated: !index.replicated.is_empty(),
    };
    let written = write_shard(job, index, &header, &encoded, sink.as_mut(), &core.control_pool);
    // Frees the buffers of whatever a failed save left in the queue.
    drop(encoded);
    or_abandon(sink, written.and_then(|written| job.failure().map_or(Ok(written), Err)))
}

/// Publishes the manifest, alone or with the other ranks.
fn make_visible(
    core: &Core,
    job: &Job,
    durable: &Durable,
    manifest: &mut Manifest,
    sink: Box<dyn ShardSink>,
) -> Result<()> {
    let Some(ranks) = &core.ranks else {
        manifest.shards = vec![durable.entry.clone()];
        return publish(core, manifest, durable, sink);
    };
    let (annotations, sink) = or_abandon(sink, annotations_of(&core.config, manifest))?;
    let together = Together {
        core,
        ranks: ranks.as_ref(),
        job,
        attempt: Attempt { step: durable.shard.step, id: durable.shard.attempt },
        entry: durable.entry.clone(),
        replicated_crc32c: durable.written.replicated_crc32c,
        annotations,
        replaces: durable.replaces,
    };
    commit_together(&together, manifest, sink)
}

/// Notes what the attempt took.
fn book(job: &Job, moments: &Moments, written: WrittenShard, figures: TransferFigures) {
    let &Moments { started, write_began, publish_began, published } = moments;
    job.update_stats(|stats| {
        stats.write_seconds = publish_began.saturating_sub(write_began).as_secs_f64();
        stats.publish_seconds = published.saturating_sub(publish_began).as_secs_f64();
        stats.durable_seconds = published.saturating_sub(started).as_secs_f64();
        stats.stored_bytes = written.file_bytes;
        stats.parts = figures.parts;
        stats.retries = figures.retries;
    });
}

/// The result with the sink that it left as it was; after a failure nobody wants the shard.
fn or_abandon<T>(sink: Box<dyn ShardSink>, result: Result<T>) -> Result<(T, Box<dyn ShardSink>)> {
    match result {
        Ok(value) => Ok((value, sink)),
        Err(error) => {
            sink.abandon();
            Err(error)
        }
    }
}

fn commit_together(
    together: &Together<'_>,
    manifest: &Manifest,
    sink: Box<dyn ShardSink>,
) -> Result<()> {
    // Where it has to be taken back, what stood there before stands there again.
    let (replaced, sink) = or_abandon(sink, together.replaced())?;
    together.commit(manifest).map_err(|failure| {
        if !failure.may_be_published && together.takes_back(replaced.as_deref()) {
            sink.abandon();
        }
        failure.error
    })
}

fn shard_entry(
    job: &Job,
    shard: ShardId,
    written: WrittenShard,
    replicated: Vec<String>,
) -> ShardEntry {
    ShardEntry {
        bytes: written.file_bytes,
        file: shard_file_name(shard.rank, shard.attempt),
        footer_crc32c: to_hex(written.footer_crc32c),
        rank: shard.rank,
        raw_bytes: job.layout.raw_bytes(),
        replicated,
    }
}

fn publish(
    core: &Core,
    manifest: &Manifest,
    durable: &Durable,
    sink: Box<dyn ShardSink>,
) -> Result<()> {
    let _span = tracing::trace_span!("publish").entered();
    let shard = durable.shard;
    let encoded = manifest.encode().map_err(|error| {
        EngineError::internal(format!("publishing step {}", shard.step), error.to_string())
    });
    let (bytes, sink) = or_abandon(sink, encoded)?;
    let published = core.store.publish(Publication {
        step: shard.step,
        attempt: shard.attempt,
        manifest: &bytes,
        replaces: durable.replaces,
        shards: &[(shard, durable.written.file_bytes)],
    });
    // The store keeps the shard if the manifest may have become visible all the same.
    or_abandon(sink, published).map(drop)
}

/// Reads manifest, header, footer, index and lengths of what was just committed.
fn read_back(core: &Core, durable: &Durable, written: &Manifest) -> Result<()> {
    let (shard, store) = (durable.shard, core.store.as_ref());
    let manifest = read_manifest(store, shard.step)?;
    Shard::open(store, &manifest, shard.rank, OnDamage::Report)?;
    let is_ours = match core.ranks {
        None => manifest == *written,
        // Another rank may have written it.
        Some(_) => manifest.attempt == written.attempt && manifest.shards.contains(&durable.entry),
    };
    if is_ours {
        return Ok(());
    }
    Err(EngineError::corrupt(
        format!("{}, step {}", core.store.location(), shard.step),
        "the manifest read back after the commit is not the one that was written",
    ))
}
