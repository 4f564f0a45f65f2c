//! Retention after a commit: what is deleted, and the loop that deletes it.
//!
//! Always holds: the save stands whatever happens here; what failed to go is planned again after
//! the next save; where one store serves all ranks, rank 0 alone prunes it.

use std::collections::BTreeMap;
use std::time::Duration;

use super::Core;
use super::survey::Unreadable;
use crate::Result;
use crate::config::Config;
use crate::recovery::{ManifestState, StepState, Survey};
use crate::retention::{self, Policy, plan_cleanup, plan_prune};
use crate::store::{Space, Uploads};

impl Core {
    /// After the commit of `step`: deletes what the policy, or a rewind, does not keep, and old
    /// debris. The save stands whatever happens here: failures are logged and tried again after the
    /// next.
    pub(crate) fn prune(&self, step: u64) -> Vec<u64> {
        self.known().verified = Some(step);
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

    /// Retention once more, as after the last commit of this process, if there was one; true if
    /// something went.
    pub(super) fn prune_again(&self) -> bool {
        let last = self.known().verified;
        last.is_some_and(|step| !self.prune(step).is_empty())
    }

    fn try_prune(&self, step: u64, removed: &mut Vec<u64>) -> Result<()> {
        let (mut survey, manifests) = self.look(Unreadable::IsDamaged)?;
        // All ranks have gone past it: nobody comes back to it.
        let mut passed = self.leave_out_own_only(&mut survey);
        passed.retain(|own| *own < step);
        let mut protected = self.protected_with(step, &survey);
        protected.extend(self.best(&survey, &manifests));
        let uploads = self.store.uploads().filter(|_| !self.config.remove_before_upload);
        let may_remove = |step: u64| uploads.is_none_or(|uploads| uploads.may_remove(step));
        let policy = Policy::from(&self.config);
        let plan = plan_prune(&survey, policy, &protected, &passed, may_remove);
        log_plan(step, &survey, &plan, &passed);
        let deleted = self.delete_planned(&survey, plan, removed);
        let had_orphans = self.delete_orphans(&survey)?;
        if !removed.is_empty() || had_orphans {
            self.note_change();
            self.survey()?;
        }
        deleted
    }

    /// Carries a plan out as far as it goes; the first failure is the answer.
    fn delete_planned(
        &self,
        survey: &Survey,
        plan: Vec<u64>,
        removed: &mut Vec<u64>,
    ) -> Result<()> {
        let mut first_failure = Ok(());
        let mut is_stuck = false;
        for step in plan {
            // One that cannot go holds up no other, unless that may be retired by it.
            if is_stuck && survey.is_retired(step) {
                continue;
            }
            let attempt = survey.step(step).and_then(|step| step.attempt);
            match self.store.remove_checkpoint(step, attempt, Space::Later) {
                Ok(_) => removed.push(step),
                Err(error) => {
                    is_stuck |= survey.is_retired(step);
                    first_failure = first_failure.and(Err(error));
                }
            }
        }
        first_failure
    }

    /// Deletes old debris; true if there was any.
    fn delete_orphans(&self, survey: &Survey) -> Result<bool> {
        let grace = Duration::from_secs(self.config.gc_grace_seconds);
        let orphans = plan_cleanup(survey, self.store.now()?, grace);
        for orphan in &orphans {
            let gone = self.store.remove_orphan(orphan.step, &orphan.file, Space::Later)?;
            if gone.is_some() {
                tracing::info!(step = orphan.step, file = orphan.file, "abandoned file removed");
            }
        }
        Ok(!orphans.is_empty())
    }

    /// What is kept for being best.
    fn best(&self, survey: &Survey, manifests: &BTreeMap<u64, ManifestState>) -> Vec<u64> {
        let Config { keep_best_n, best_metric, best_mode, .. } = &self.config;
        let (Some(count), Some(metric)) = (keep_best_n, best_metric) else { return Vec::new() };
        let mut best = retention::best_first(survey, manifests, metric, *best_mode);
        best.truncate(usize::try_from(*count).unwrap_or(usize::MAX));
        best
    }

    /// Steps that are whole in the remote store, ascending; none without one.
    pub(super) fn arrived(&self) -> Vec<u64> {
        self.store.uploads().map(Uploads::arrived).unwrap_or_default()
    }

    fn protected_with(&self, step: u64, survey: &Survey) -> Vec<u64> {
        let exists =
            |step: &u64| survey.step(*step).is_some_and(|step| step.state == StepState::Committed);
        let arrived = self.arrived().into_iter().rev().find(exists);
        let known = self.known();
        [Some(step), known.protected, known.verified, arrived].into_iter().flatten().collect()
    }
}

fn log_plan(step: u64, survey: &Survey, plan: &[u64], passed: &[u64]) {
    if !passed.is_empty() {
        tracing::info!(step, ?passed, "checkpoints that not all ranks have are let go");
    }
    let retired = plan.iter().filter(|step| survey.is_retired(**step)).count();
    if retired > 0 {
        tracing::info!(step, retired, "later checkpoints retired by a rewind");
    }
}
