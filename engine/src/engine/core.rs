//! What all threads of an engine share: the store, the pools, and what is remembered of saves.
//!
//! Always holds: what is remembered is under one lock, not held while a store is asked; after a
//! panic of the committer no further save is begun.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use crate::clock::Environment;
use crate::codec::Codec;
use crate::config::{Compression, Config};
use crate::error::IoContext;
use crate::format::names::AttemptId;
use crate::io::buffer::{BufferPool, CONTROL_BUFFER_BYTES};
use crate::ranks::{Attempt, Ranks};
use crate::recovery::{ManifestState, Survey};
use crate::save::SaveInfo;
use crate::save::adapt::Adaptation;
use crate::save::job::{Conduct, Job};
use crate::store::flow::{Flow, Pace};
use crate::store::{FileListing, Store};
use crate::sync::unpoisoned;
use crate::{EngineError, Result};

/// Buffers for header, index and footer: one being filled while the other is written.
const CONTROL_BUFFERS: usize = 2;

/// Shared by the caller's threads, the workers and the committer.
#[derive(Debug)]
pub(crate) struct Core {
    pub(crate) config: Config,
    pub(crate) store: Arc<dyn Store>,
    pub(crate) environment: Arc<dyn Environment>,
    /// Encoded chunks. Workers alone take from it, so that the committer, which they wait for,
    /// never waits for them.
    pub(crate) encode_pool: Arc<BufferPool>,
    /// Header, index and footer, piece by piece. The committer alone takes from it.
    pub(crate) control_pool: Arc<BufferPool>,
    pub(crate) io_name: &'static str,
    /// Threads that checksum, encode and decode.
    pub(super) workers: usize,
    /// Where several ranks save together.
    pub(crate) ranks: Option<Arc<dyn Ranks>>,
    /// What encoding is known to cost and give.
    adaptation: Arc<Adaptation>,
    poisoned: AtomicBool,
    known: Mutex<Known>,
    /// The attempt that this rank began last, among several.
    last_attempt: Mutex<Option<AttemptId>>,
}

/// What the engine remembers.
#[derive(Debug, Default)]
pub(super) struct Known {
    /// Counts this engine's changes of the store: a listing taken before one is not the survey.
    pub(super) changes: u64,
    /// Of a writer, whose store nobody else changes.
    pub(super) survey: Option<Survey>,
    /// Manifests by step, each with the listing that it was read under.
    pub(super) manifests: BTreeMap<u64, (FileListing, ManifestState)>,
    /// Stored bytes per raw byte of the newest save.
    pub(super) ratio: Option<f64>,
    /// How fast the device was in the newest save.
    pub(super) pace: Option<Pace>,
    /// Restored from.
    pub(super) protected: Option<u64>,
    /// Newest that was read back.
    pub(super) verified: Option<u64>,
    /// What this rank had when steps were last offered to other ranks, by step.
    pub(super) offered: BTreeMap<u64, Option<AttemptId>>,
    /// The step that all agreed on, and what of that is later: other ranks do not have it, or could
    /// not load it.
    pub(super) not_common: Option<(u64, BTreeMap<u64, Option<AttemptId>>)>,
}

impl Core {
    pub(super) fn new(
        config: Config,
        store: Arc<dyn Store>,
        environment: Arc<dyn Environment>,
        io_name: &'static str,
        ranks: Option<Arc<dyn Ranks>>,
    ) -> Result<Self> {
        let chunk_bytes = config.chunk_bytes as usize;
        let in_flight = usize::try_from(config.in_flight()).unwrap_or(usize::MAX) / chunk_bytes;
        let workers = super::memory::worker_count(&config);
        let encodes = !config.read_only && config.compression.fixed_codec() != Some(Codec::None);
        // In flight, and one being filled by each worker.
        let buffers = if encodes { in_flight + workers } else { 1 };
        let encode_pool = BufferPool::new(chunk_bytes, buffers)
            .context("allocating buffers for", store.location())?;
        let control_pool = BufferPool::new(CONTROL_BUFFER_BYTES, CONTROL_BUFFERS)
            .context("allocating buffers for", store.location())?;
        Ok(Self {
            config,
            store,
            environment,
            encode_pool,
            control_pool,
            io_name,
            workers,
            ranks,
            adaptation: Arc::new(Adaptation::new()),
            poisoned: AtomicBool::new(false),
            known: Mutex::default(),
            last_attempt: Mutex::default(),
        })
    }

    /// The attempt that this rank began last, of whatever step; among several ranks only.
    pub(crate) fn last_attempt(&self) -> Option<AttemptId> {
        *unpoisoned(self.last_attempt.lock())
    }

    pub(crate) fn note_attempt(&self, attempt: AttemptId) {
        *unpoisoned(self.last_attempt.lock()) = Some(attempt);
    }

    /// After a panic of the committer nothing that the engine believes can be trusted.
    pub(crate) fn poison(&self) {
        self.poisoned.store(true, Ordering::Release);
    }

    pub(super) fn check_healthy(&self, what: &str) -> Result<()> {
        if self.poisoned.load(Ordering::Acquire) {
            return Err(EngineError::internal(
                what,
                "an earlier save panicked: close and reopen the store",
            ));
        }
        Ok(())
    }

    pub(super) fn protect(&self, step: u64) {
        self.known().protected = Some(step);
    }

    /// Stored bytes that a state of `raw_bytes` will take, by the ratio of the save before.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss,
        reason = "an estimate"
    )]
    pub(super) fn expected_stored_bytes(&self, raw_bytes: u64) -> u64 {
        let ratio = match self.config.compression {
            Compression::None => 1.0,
            _ => self.known().ratio.unwrap_or(1.0).clamp(0.0, 1.0),
        };
        (raw_bytes as f64 * ratio) as u64
    }

    /// What the workers of a new save go by.
    pub(super) fn conduct(&self) -> Conduct {
        let pace = self.known().pace;
        Conduct {
            workers: self.workers,
            flow: Arc::new(Flow::new(Arc::clone(&self.environment), pace)),
            adaptation: Arc::clone(&self.adaptation),
        }
    }

    /// Reports to the other ranks that this one does not save `step`.
    pub(super) fn decline(&self, step: u64, reason: &str) {
        let Some(ranks) = &self.ranks else { return };
        let told = ranks
            .begin(step)
            .and_then(|begun| ranks.abort(Attempt { step, id: begun.attempt }, reason, true));
        if let Err(error) = told {
            // They were told by another rank already, or find out by the attempt's own timeout.
            tracing::debug!(step, %error, "declining a save");
        }
    }

    /// Books the end of a save.
    pub(crate) fn save_ended(&self, job: &Job, info: Option<&SaveInfo>) {
        if let Some(info) = info {
            let mut known = self.known();
            known.ratio = ratio(info.stored_bytes, info.raw_bytes).or(known.ratio);
            known.pace = Some(job.flow.pace());
        } else {
            // Whether its manifest became visible is the store's to say.
            self.note_saved(job.step);
        }
        tracing::debug!(step = job.step, committed = info.is_some(), "save ended");
    }

    pub(super) fn known(&self) -> MutexGuard<'_, Known> {
        unpoisoned(self.known.lock())
    }
}

#[expect(clippy::cast_precision_loss, reason = "an estimate")]
pub(super) fn ratio(stored_bytes: u64, raw_bytes: u64) -> Option<f64> {
    (raw_bytes > 0).then(|| stored_bytes as f64 / raw_bytes as f64)
}
