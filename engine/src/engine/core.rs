//! What all threads of an engine share: the store, the pools, and what is known of the store.
//!
//! Always holds: the known survey is that of the store as this engine last changed it; since the
//! writer's lock is ours, nobody else changes it meanwhile. Where several ranks write, each looks
//! anew before it saves.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::clock::Environment;
use crate::codec::Codec;
use crate::config::{BestMode, Compression, Config};
use crate::error::IoContext;
use crate::format::FormatError;
use crate::format::manifest::Manifest;
use crate::format::names::{AttemptId, MANIFEST_FILE};
use crate::io::buffer::BufferPool;
use crate::ranks::{Attempt, Ranks};
use crate::recovery::{self, ManifestState, StepState, StepSurvey, Survey};
use crate::retention::{self, Policy, plan_cleanup, plan_retention};
use crate::save::SaveInfo;
use crate::save::adapt::Adaptation;
use crate::save::job::{Conduct, Job};
use crate::store::flow::{Flow, Pace};
use crate::store::{FileListing, Store};
use crate::{EngineError, Result};

/// Bytes of a piece of header, index or footer on its way to the device.
const CONTROL_BUFFER_BYTES: usize = 1 << 20;
/// One being filled while the other is written.
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
    /// Where several ranks save together.
    pub(crate) ranks: Option<Arc<dyn Ranks>>,
    /// What encoding is known to cost and give.
    adaptation: Arc<Adaptation>,
    poisoned: AtomicBool,
    book: Mutex<Book>,
}

/// What the engine remembers.
#[derive(Debug, Default)]
struct Book {
    /// Counts this engine's changes of the store: a listing taken before one is not the survey.
    changes: u64,
    /// Of a writer, whose store nobody else changes.
    survey: Option<Survey>,
    /// Manifests by step, each with the listing that it was read under.
    manifests: BTreeMap<u64, (FileListing, ManifestState)>,
    /// Stored bytes per raw byte of the newest save.
    ratio: Option<f64>,
    /// How fast the device was in the newest save.
    pace: Option<Pace>,
    /// Restored from.
    protected: Option<u64>,
    /// Newest that was read back.
    verified: Option<u64>,
    /// What this rank had when steps were last offered to other ranks, by step.
    offered: BTreeMap<u64, Option<AttemptId>>,
    /// The step that all agreed on, and what of that is later: other ranks do not have it, or could
    /// not load it.
    not_common: Option<(u64, BTreeMap<u64, Option<AttemptId>>)>,
}

/// What a manifest means that the device does not give.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Unreadable {
    IsDamaged,
    IsAnError,
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
        let in_flight = usize::try_from(config.in_flight_bytes).unwrap_or(usize::MAX) / chunk_bytes;
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
            ranks,
            adaptation: Arc::new(Adaptation::new()),
            poisoned: AtomicBool::new(false),
            book: Mutex::default(),
        })
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
        self.book().protected = Some(step);
    }

    /// What lies in the store now. A manifest that cannot be read counts as damaged, so that it
    /// hides no other checkpoint.
    pub(super) fn survey(&self) -> Result<Survey> {
        let survey = self.survey_once(Unreadable::IsDamaged)?;
        if self.config.read_only && survey.steps.iter().any(StepSurvey::is_damaged) {
            // The writer may have been deleting it while we looked: what is found now counts.
            return self.survey_once(Unreadable::IsDamaged);
        }
        Ok(survey)
    }

    /// The survey that a save of `step` needs. A later checkpoint that cannot be read at this
    /// moment cannot be retired, and would come back: an error to one that leaves it behind.
    pub(super) fn survey_for_save(&self, step: u64, rewind: bool) -> Result<Survey> {
        if !rewind {
            let survey = self.known_survey()?;
            let is_passed = |later: &StepSurvey| later.step > step && later.is_damaged();
            if !survey.steps.iter().any(is_passed) {
                return Ok(survey);
            }
        }
        self.survey_once(Unreadable::IsAnError)
    }

    fn survey_once(&self, unreadable: Unreadable) -> Result<Survey> {
        Ok(self.look(unreadable)?.0)
    }

    /// The committed steps that say a number of this name, the best first.
    pub(super) fn best_steps(&self, metric: &str, mode: BestMode) -> Result<Vec<u64>> {
        let (mut survey, manifests) = self.look(Unreadable::IsDamaged)?;
        self.leave_out_own_only(&mut survey);
        Ok(retention::best_first(&survey, &manifests, metric, mode))
    }

    /// A survey, and the manifests that it was made from.
    fn look(&self, unreadable: Unreadable) -> Result<(Survey, BTreeMap<u64, ManifestState>)> {
        let changes = self.book().changes;
        let listing = self.store.list()?;
        // Not taken: two surveys at once must not read anything twice, least of all from afar.
        let mut known = self.book().manifests.clone();
        let mut manifests = BTreeMap::new();
        let mut asked = Vec::new();
        for step in &listing {
            if let Some(file) = step.files.iter().find(|file| file.name == MANIFEST_FILE) {
                match known.remove(&step.step) {
                    Some((seen, state)) if seen == *file => {
                        manifests.insert(step.step, (seen, state));
                    }
                    _ => asked.push((step.step, file)),
                }
            }
        }
        let steps: Vec<u64> = asked.iter().map(|(step, _)| *step).collect();
        let mut unread = Vec::new();
        for ((step, file), read) in asked.into_iter().zip(self.store.read_manifests(&steps)) {
            let state = match manifest_state(read) {
                Err(error @ EngineError::Io { .. }) if unreadable == Unreadable::IsDamaged => {
                    unread.push(step);
                    ManifestState::Damaged(error.to_string())
                }
                state => state?,
            };
            manifests.insert(step, (file.clone(), state));
        }
        let states = manifests.iter().map(|(step, (_, state))| (*step, state.clone())).collect();
        let survey = recovery::survey(&listing, &states, self.config.own_share());
        // What the device did not give this time is asked for again.
        manifests.retain(|step, _| !unread.contains(step));
        let mut book = self.book();
        if book.ratio.is_none() {
            book.ratio = newest_ratio(&survey, &states);
        }
        // What was saved meanwhile may have been read before.
        if book.changes == changes {
            book.manifests = manifests;
            book.survey = (!self.config.read_only).then(|| survey.clone());
        }
        drop(book);
        Ok((survey, states))
    }

    /// The survey as last taken, if nobody else can have changed the store since.
    pub(super) fn known_survey(&self) -> Result<Survey> {
        if self.ranks.is_some() {
            return self.survey();
        }
        let known = self.book().survey.clone();
        known.map_or_else(|| self.survey(), Ok)
    }

    /// Says that this engine changed the store: whatever was listed before is out of date.
    pub(super) fn note_change(&self) {
        let mut book = self.book();
        book.changes += 1;
        book.survey = None;
    }

    /// The same of a step that has, or may have, another manifest now. Its listing need not tell:
    /// the length may be the same, and some services know the time to a second only.
    pub(super) fn note_saved(&self, step: u64) {
        self.book().manifests.remove(&step);
        self.note_change();
    }

    /// What this rank can load, by name: steps of other attempts are not the same.
    pub(super) fn offers(&self, steps: &[u64]) -> Result<Vec<Attempt>> {
        let survey = self.survey()?;
        self.book().offered = survey
            .committed_steps()
            .into_iter()
            .map(|step| (step, survey.step(step).and_then(|step| step.attempt)))
            .collect();
        let offer = |step: &u64| Attempt {
            step: *step,
            id: survey.step(*step).and_then(|step| step.attempt).unwrap_or(AttemptId([0; 16])),
        };
        Ok(steps.iter().map(offer).collect())
    }

    /// All ranks agreed to load `step`: what this one alone has of later ones is no checkpoint.
    pub(super) fn note_agreed(&self, step: Option<u64>) {
        let mut book = self.book();
        book.not_common = step.map(|agreed| {
            let later = book.offered.split_off(&agreed.saturating_add(1));
            (agreed, later)
        });
    }

    /// Whether saving `step` goes back only over what other ranks do not have: checkpoints in this
    /// rank's own store that were published here and never committed, or were lost elsewhere.
    pub(super) fn goes_over_own_only(&self, step: u64) -> bool {
        let book = self.book();
        let range = book.not_common.as_ref().and_then(|(agreed, later)| {
            let newest = *later.keys().next_back()?;
            Some(agreed.saturating_add(1)..=newest)
        });
        self.config.has_own_store() && range.is_some_and(|range| range.contains(&step))
    }

    /// Takes what this rank alone has out of a survey: it is no checkpoint, and keeps none from its
    /// place. What has come to be whole in the far store is one. Gives the steps, ascending.
    fn leave_out_own_only(&self, survey: &mut Survey) -> Vec<u64> {
        let mut left_out = Vec::new();
        if !self.config.has_own_store() {
            return left_out;
        }
        let arrived = self.store.arrived();
        let book = self.book();
        let Some((_, later)) = &book.not_common else { return left_out };
        for step in &mut survey.steps {
            let is_known = later.get(&step.step).is_some_and(|attempt| *attempt == step.attempt);
            let exists = step.state == StepState::Committed;
            if is_known && exists && !arrived.contains(&step.step) {
                step.state = StepState::Incomplete;
                left_out.push(step.step);
            }
        }
        left_out
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
            _ => self.book().ratio.unwrap_or(1.0).clamp(0.0, 1.0),
        };
        (raw_bytes as f64 * ratio) as u64
    }

    /// What the workers of a new save go by.
    pub(super) fn conduct(&self, workers: usize) -> Conduct {
        let pace = self.book().pace;
        Conduct {
            workers,
            flow: Arc::new(Flow::new(Arc::clone(&self.environment), pace)),
            adaptation: Arc::clone(&self.adaptation),
        }
    }

    /// Tells the other ranks that this one does not save `step`.
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
            let mut book = self.book();
            book.ratio = ratio(info.stored_bytes, info.raw_bytes).or(book.ratio);
            book.pace = Some(job.flow.pace());
        } else {
            // Whether its manifest became visible is the store's to say.
            self.note_saved(job.step);
        }
        tracing::debug!(step = job.step, committed = info.is_some(), "save ended");
    }

    /// After the commit of `step`: deletes what the policy, or a rewind, lets go, and old debris.
    /// The save stands whatever happens here: failures are logged and tried again after the next.
    pub(crate) fn prune(&self, step: u64) -> Vec<u64> {
        self.book().verified = Some(step);
        self.note_saved(step);
        if self.config.rank != 0 && !self.config.has_own_store() {
            // Rank 0 does it for all.
            return Vec::new();
        }
        let mut removed = Vec::new();
        if let Err(error) = self.try_prune(step, &mut removed) {
            tracing::warn!(step, %error, "retention failed; it runs again after the next save");
            self.note_change();
        }
        removed
    }

    fn try_prune(&self, step: u64, removed: &mut Vec<u64>) -> Result<()> {
        let (mut survey, manifests) = self.look(Unreadable::IsDamaged)?;
        // All ranks have gone past it: nobody comes back to it.
        let mut passed = self.leave_out_own_only(&mut survey);
        passed.retain(|own| *own < step);
        let mut protected = self.protected_with(step, &survey);
        protected.extend(self.best(&survey, &manifests));
        let is_retired = |step: &u64| survey.step(*step).is_some_and(StepSurvey::is_retired);
        let mut plan = plan_retention(&survey, Policy::from(&self.config), &protected);
        // What a rewind retired is wanted nowhere; the rest is kept until the far store has it.
        plan.retain(|step| {
            is_retired(step) || self.config.remove_before_upload || self.store.may_remove(*step)
        });
        if !passed.is_empty() {
            tracing::info!(step, ?passed, "checkpoints that not all ranks have are let go");
        }
        plan.extend(passed);
        let retired = plan.iter().copied().filter(is_retired).count();
        if retired > 0 {
            tracing::info!(step, retired, "later checkpoints retired by a rewind");
        }
        let mut first_failure = Ok(());
        let mut is_stuck = false;
        for step in plan {
            // One that cannot go holds up no other, unless that may be retired by it.
            if is_stuck && is_retired(&step) {
                continue;
            }
            match self.store.let_go(step, survey.step(step).and_then(|step| step.attempt)) {
                Ok(()) => removed.push(step),
                Err(error) => {
                    is_stuck |= is_retired(&step);
                    first_failure = first_failure.and(Err(error));
                }
            }
        }
        let grace = std::time::Duration::from_secs(self.config.gc_grace_seconds);
        let orphans = plan_cleanup(&survey, self.store.now()?, grace);
        for orphan in &orphans {
            if self.store.let_go_orphan(orphan.step, &orphan.file)? {
                tracing::info!(step = orphan.step, file = orphan.file, "abandoned file removed");
            }
        }
        if !removed.is_empty() || !orphans.is_empty() {
            self.note_change();
            self.survey()?;
        }
        first_failure
    }

    /// What is kept for being best.
    fn best(&self, survey: &Survey, manifests: &BTreeMap<u64, ManifestState>) -> Vec<u64> {
        let Config { keep_best_n, best_metric, best_mode, .. } = &self.config;
        let (Some(count), Some(metric)) = (keep_best_n, best_metric) else { return Vec::new() };
        let mut best = retention::best_first(survey, manifests, metric, *best_mode);
        best.truncate(usize::try_from(*count).unwrap_or(usize::MAX));
        best
    }

    fn protected_with(&self, step: u64, survey: &Survey) -> Vec<u64> {
        let exists =
            |step: &u64| survey.step(*step).is_some_and(|step| step.state == StepState::Committed);
        let arrived = self.store.arrived().into_iter().rev().find(exists);
        let book = self.book();
        [Some(step), book.protected, book.verified, arrived].into_iter().flatten().collect()
    }

    fn book(&self) -> MutexGuard<'_, Book> {
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a manifest's bytes mean to the survey.
fn manifest_state(read: Result<Option<Vec<u8>>>) -> Result<ManifestState> {
    Ok(match read {
        Ok(None) => ManifestState::Absent,
        Ok(Some(bytes)) => match Manifest::decode(&bytes) {
            Ok(manifest) => ManifestState::Valid(Arc::new(manifest)),
            Err(FormatError::Damaged(why)) => ManifestState::Damaged(why),
            Err(FormatError::Newer(why)) => ManifestState::Newer(why),
        },
        Err(error @ EngineError::Corrupt { .. }) => ManifestState::Damaged(error.to_string()),
        Err(other) => return Err(other),
    })
}

#[expect(clippy::cast_precision_loss, reason = "an estimate")]
fn ratio(stored_bytes: u64, raw_bytes: u64) -> Option<f64> {
    (raw_bytes > 0).then(|| stored_bytes as f64 / raw_bytes as f64)
}

fn newest_ratio(survey: &Survey, manifests: &BTreeMap<u64, ManifestState>) -> Option<f64> {
    match manifests.get(&survey.newest()?)? {
        ManifestState::Valid(manifest) => {
            let stored = manifest.shards.iter().map(|shard| shard.bytes).sum();
            let raw = manifest.shards.iter().map(|shard| shard.raw_bytes).sum();
            ratio(stored, raw)
        }
        _ => None,
    }
}
