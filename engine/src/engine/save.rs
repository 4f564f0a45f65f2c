//! Starting a save: everything that happens in the caller's thread.
//!
//! Always holds: every check that can refuse the save is made before anything is written.

use std::sync::Arc;
use std::time::Duration;

use crossbeam_channel::Receiver;

use super::{Inner, Saving};
use crate::clock::elapsed;
use crate::config::Config;
use crate::format::checksum;
use crate::format::layout::{Layout, StorageSpec};
use crate::format::manifest::{FORMAT_VERSION, Manifest, Retired, ShardEntry};
use crate::format::names::{AttemptId, shard_file_name};
use crate::format::shard::BLOCK_BYTES;
use crate::io::buffer::BufferPool;
use crate::recovery::check_save;
use crate::save::capture::{Origin, Until, capture, fits};
use crate::save::commit::CommitTask;
use crate::save::job::{Job, Message};
use crate::save::share::Share;
use crate::save::write::{chunks_offset, draft_index};
use crate::save::{SaveHandle, SaveRequest, StorageInput};
use crate::sync::unpoisoned;
use crate::{EngineError, Result};

/// Room for footer and a small index, when free space is checked.
const CONTROL_BYTES: u64 = 1 << 20;

/// The layout of the save before, good for as long as the storages stay the same.
#[derive(Debug)]
pub(super) struct CachedPlan {
    storages: Vec<StorageSpec>,
    layout: Arc<Layout>,
}

/// A save that the committer has, and whose snapshot is still to be taken.
struct Begun<'a> {
    job: Arc<Job>,
    handle: SaveHandle,
    arena: Arc<BufferPool>,
    storages: Vec<Origin<'a>>,
}

/// When the caller called, and when it began to wait for this save, or to prepare it.
#[derive(Clone, Copy)]
struct Clocked {
    called: Duration,
    started: Duration,
}

/// What taking the snapshot goes by.
struct Capturing<'a> {
    job: &'a Arc<Job>,
    handle: &'a SaveHandle,
    started: Duration,
    until: Until,
}

impl Inner {
    pub(super) fn save(&self, request: SaveRequest<'_>, until: Until) -> Result<SaveHandle> {
        let step = request.step;
        let _span = tracing::trace_span!("save", step).entered();
        let called = self.core.environment.monotonic();
        // What the caller did for this save before is a part of it.
        let started = called.saturating_sub(request.waited + request.prepared);
        // Held until the snapshot is taken: callers on several threads take turns.
        let mut saving = self.turn();
        let begun = self.begin(&mut saving, request, Clocked { called, started });
        // From here on the committer reports a failure to the other ranks.
        let Begun { job, handle, arena, storages } =
            begun.inspect_err(|error| self.core.decline(step, &error.without_hint()))?;
        let capturing = Capturing { job: &job, handle: &handle, started, until };
        self.capture(&capturing, &storages, &arena)?;
        Ok(handle)
    }

    fn begin<'a>(
        &self,
        saving: &mut Saving,
        mut request: SaveRequest<'a>,
        clocked: Clocked,
    ) -> Result<Begun<'a>> {
        self.wait_for_last(None)?;
        let waited = request.waited + elapsed(&*self.core.environment, clocked.called);
        let rewind = request.rewind || self.core.goes_over_own_only(request.step);
        let survey = self.core.survey_for_save(request.step, rewind)?;
        let plan = check_save(&survey, request.step, rewind)?;
        let Config { rank, world_size, chunk_bytes, .. } = self.core.config;
        let share = Share::plan(&request, rank, world_size)?;
        let origins = origins_of(&request.storages, &share);
        let layout = saving.layout(&request.storages, &share, &origins, chunk_bytes)?;
        let reserve_bytes = self.check_space(request.step, layout.raw_bytes())?;
        let arena = self.arena(saving, layout.raw_bytes())?;
        let (job, encoded) = self.start_job(&request, layout, &arena, waited);
        let handle = SaveHandle::new(Arc::clone(&job));
        let manifest = self.draft_manifest(&mut request, plan.retired);
        check_manifest(&manifest, &share.names)?;
        let index = draft_index(&job.layout, &share, request)?;
        self.submit(CommitTask {
            job: Arc::clone(&job),
            encoded,
            index,
            manifest,
            replicated: share.names,
            replaces: plan.replaces,
            not_before_unix_ms: plan.not_before_unix_ms,
            reserve_bytes,
            handle: handle.clone(),
            started: clocked.started,
        })?;
        *unpoisoned(self.last.lock()) = Some(handle.clone());
        Ok(Begun { job, handle, arena, storages: origins })
    }

    /// What the stages of the save share, and the committer's end of their queue.
    fn start_job(
        &self,
        request: &SaveRequest<'_>,
        layout: Arc<Layout>,
        arena: &BufferPool,
        waited: Duration,
    ) -> (Arc<Job>, Receiver<Message>) {
        let (to_committer, encoded) = crossbeam_channel::bounded(2 * self.core.workers);
        let compression = self.core.config.compression;
        let conduct = self.core.conduct();
        let job = Arc::new(Job::new(request.step, layout, compression, conduct, to_committer));
        job.update_stats(|stats| {
            stats.prepare_seconds = request.prepared.as_secs_f64();
            stats.wait_seconds = waited.as_secs_f64();
            stats.staging_bytes = (arena.buffer_bytes() * arena.count()) as u64;
            stats.streamed = !fits(&job, arena);
            stats.io_backend = self.core.io_name.into();
        });
        (job, encoded)
    }

    /// The manifest, as far as it is known; what was attached is taken out of the request.
    fn draft_manifest(&self, request: &mut SaveRequest<'_>, retired: Vec<Retired>) -> Manifest {
        Manifest {
            // The committer fills in what makes it this attempt's.
            attempt: AttemptId([0; 16]).to_string(),
            created_unix_ms: 0,
            dataset_positions: std::mem::take(&mut request.dataset_positions),
            engine_version: env!("CARGO_PKG_VERSION").into(),
            format_version: FORMAT_VERSION,
            job: self.core.config.job.clone(),
            metadata: std::mem::take(&mut request.metadata),
            retired,
            shards: Vec::new(),
            step: request.step,
            world_size: self.core.config.world_size,
        }
    }

    /// Takes the snapshot. If that fails, the handle's error is the one that is returned here.
    fn capture(
        &self,
        capturing: &Capturing<'_>,
        storages: &[Origin<'_>],
        arena: &Arc<BufferPool>,
    ) -> Result<()> {
        let Capturing { job, handle, started, until } = *capturing;
        let environment = &self.core.environment;
        let capture_start = environment.monotonic();
        let workers = self.workers.as_ref().ok_or_else(|| self.read_only())?.queue()?;
        let failed = FailUnlessDone { job };
        let captured = capture(job, storages, arena, workers, until);
        job.update_stats(|stats| {
            stats.capture_seconds = elapsed(&**environment, capture_start).as_secs_f64();
            stats.stall_seconds = elapsed(&**environment, started).as_secs_f64();
        });
        match captured {
            Ok(()) => {
                if job.arrivals.wait_landed(Some(Duration::ZERO)) {
                    job.flow.captured();
                }
                std::mem::forget(failed);
                Ok(())
            }
            Err(error) => {
                job.fail(error.duplicate());
                drop(failed);
                // The attempt's files are gone when this returns, and the caller has seen why.
                handle.wait(None);
                let _seen = handle.take_unseen_error();
                Err(error)
            }
        }
    }

    fn submit(&self, task: CommitTask) -> Result<()> {
        self.committer.as_ref().ok_or_else(|| self.read_only())?.submit(task)
    }

    fn read_only(&self) -> EngineError {
        EngineError::read_only("saving", self.core.store.location())
    }

    /// Refuses a save that the store has no room for; returns the length to reserve.
    fn check_space(&self, step: u64, raw_bytes: u64) -> Result<u64> {
        let expected = self.core.expected_stored_bytes(raw_bytes);
        let Config { chunk_bytes, compression, .. } = &self.core.config;
        let chunks_offset = chunks_offset(raw_bytes, *chunk_bytes, compression.fixed_codec());
        let needed = expected.saturating_add(CONTROL_BYTES + u64::from(chunks_offset));
        let store = &self.core.store;
        let mut free_bytes = store.free_bytes()?;
        if free_bytes.is_some_and(|free| free < needed) {
            // What retention is deleting may still take space.
            store.reclaim();
            free_bytes = store.free_bytes()?;
        }
        match free_bytes {
            Some(free) if free < needed => Err(EngineError::NoSpace {
                what: format!("saving step {step} in `{}`", store.location()),
                why: format!("about {needed} bytes are needed, {free} are free"),
                hint: "free space, or lower `keep_last_n`, then save again; nothing was written. \
                       What killed processes left goes with `ckpt-tool gc STORE --grace 0` while \
                       nobody trains"
                    .into(),
            }),
            _ => Ok(needed),
        }
    }
}

/// So many retired checkpoints that they, not the metadata, fill a manifest.
const RETIRED_MANY: usize = 4096;

/// Whether the manifest can be written, whatever its shards turn out to be: what the user attached
/// is refused here or never.
fn check_manifest(manifest: &Manifest, replicated: &[String]) -> Result<()> {
    let entry = |rank| ShardEntry {
        // The smallest shard: header, index, footer.
        bytes: 3 * BLOCK_BYTES as u64,
        file: shard_file_name(rank, AttemptId([0; 16])),
        footer_crc32c: checksum::to_hex(0),
        rank,
        raw_bytes: 0,
        replicated: replicated.to_vec(),
    };
    let shards = (0..manifest.world_size).map(entry).collect();
    let complete = Manifest { shards, ..manifest.clone() };
    complete.encode().map(drop).map_err(|error| {
        let hint = if manifest.retired.len() < RETIRED_MANY {
            "attach less `metadata`: large or nested data belongs in the state"
        } else {
            "the rewind discards more checkpoints than one manifest can name: delete the newest \
             of them first"
        };
        EngineError::invalid(format!("saving step {}", manifest.step), error.to_string(), hint)
    })
}

/// Where each storage's part is copied from.
fn origins_of<'a>(storages: &[StorageInput<'a>], share: &Share) -> Vec<Origin<'a>> {
    let origin = |(number, input): (usize, &StorageInput<'a>)| Origin {
        source: input.source,
        device: input.source.device(),
        start: share.part(number, input).start,
    };
    storages.iter().enumerate().map(origin).collect()
}

impl Saving {
    /// The layout of the parts that this rank writes.
    fn layout(
        &mut self,
        storages: &[StorageInput<'_>],
        share: &Share,
        origins: &[Origin<'_>],
        chunk_bytes: u32,
    ) -> Result<Arc<Layout>> {
        let specs: Vec<StorageSpec> = storages
            .iter()
            .enumerate()
            .map(|(number, input)| {
                let part = share.part(number, input);
                StorageSpec {
                    bytes: part.end - part.start,
                    element: input.element,
                    on_device: origins[number].device.is_some(),
                }
            })
            .collect();
        if let Some(plan) = self.plan.as_ref().filter(|plan| plan.storages == specs) {
            return Ok(Arc::clone(&plan.layout));
        }
        let layout = Arc::new(Layout::plan(&specs, chunk_bytes).map_err(|error| {
            EngineError::invalid(
                "planning a save",
                error.to_string(),
                "save a smaller state, or raise `chunk_bytes`",
            )
        })?);
        self.plan = Some(CachedPlan { storages: specs, layout: Arc::clone(&layout) });
        Ok(layout)
    }
}

/// A panic of a storage's source must end the save, not leave it waiting for chunks.
struct FailUnlessDone<'a> {
    job: &'a Job,
}

impl Drop for FailUnlessDone<'_> {
    fn drop(&mut self) {
        self.job.fail(EngineError::internal("capturing a storage", "the copy panicked"));
        self.job.arrivals.all_begun();
    }
}
