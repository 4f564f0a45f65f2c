//! What is in the store, and since when that is known.
//!
//! Always holds: the known survey is that of the store as this engine last changed it; since the
//! writer's lock is ours, nobody else changes it meanwhile. Where several ranks write, each looks
//! again before it saves. A manifest is read again only where its file's listing has changed, or a
//! save of ours may have replaced it.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::Core;
use super::core::ratio;
use crate::config::BestMode;
use crate::format::FormatError;
use crate::format::manifest::Manifest;
use crate::format::names::MANIFEST_FILE;
use crate::recovery::{self, ManifestState, StepSurvey, Survey};
use crate::{EngineError, Result, retention};

/// What a manifest means that the device does not give.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unreadable {
    IsDamaged,
    IsAnError,
}

impl Core {
    /// What is in the store now. A manifest that cannot be read counts as damaged, so that it
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
        let survey = self.survey_once(Unreadable::IsAnError)?;
        let is_lost = |later: &&StepSurvey| {
            later.step > step && later.is_damaged() && later.attempt.is_none()
        };
        let lost: Vec<u64> = survey.steps.iter().filter(is_lost).map(|later| later.step).collect();
        if lost.is_empty() {
            return Ok(survey);
        }
        for later in lost {
            self.look_for_another_copy(later)?;
        }
        self.survey_once(Unreadable::IsAnError)
    }

    /// Reads a damaged manifest again. A store may have a second copy that it could not ask for
    /// while it was surveyed: now that is an error.
    fn look_for_another_copy(&self, step: u64) -> Result<()> {
        let read = self.store.read_manifest(step);
        if let Err(error @ (EngineError::Io { .. } | EngineError::Unavailable { .. })) = read {
            return Err(error);
        }
        self.known().manifests.remove(&step);
        Ok(())
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
    pub(super) fn look(
        &self,
        unreadable: Unreadable,
    ) -> Result<(Survey, BTreeMap<u64, ManifestState>)> {
        let changes = self.known().changes;
        let mut listing = self.store.list()?;
        if unreadable == Unreadable::IsAnError {
            for step in listing.iter_mut().filter(|step| step.unlisted.is_some()) {
                // The error itself, unless it has passed.
                if let Some(listed) = self.store.list_step(step.step)? {
                    *step = listed;
                }
            }
        }
        // Not taken: two surveys at once must not read anything twice, least of all from afar.
        let mut read_before = self.known().manifests.clone();
        let mut manifests = BTreeMap::new();
        let mut asked = Vec::new();
        for step in &listing {
            if let Some(file) = step.files.iter().find(|file| file.name == MANIFEST_FILE) {
                match read_before.remove(&step.step) {
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
        let mut known = self.known();
        if known.ratio.is_none() {
            known.ratio = newest_ratio(&survey, &states);
        }
        // What was saved meanwhile may have been read before.
        if known.changes == changes {
            known.manifests = manifests;
            known.survey = (!self.config.read_only).then(|| survey.clone());
        }
        drop(known);
        Ok((survey, states))
    }

    /// The survey as last taken, if nobody else can have changed the store since.
    pub(super) fn known_survey(&self) -> Result<Survey> {
        if self.ranks.is_some() {
            return self.survey();
        }
        let survey = self.known().survey.clone();
        survey.map_or_else(|| self.survey(), Ok)
    }

    /// Says that this engine changed the store: whatever was listed before is out of date.
    pub(super) fn note_change(&self) {
        let mut known = self.known();
        known.changes += 1;
        known.survey = None;
    }

    /// The same of a step that has, or may have, another manifest now. Its listing need not tell:
    /// the length may be the same, and some services know the time to a second only.
    pub(super) fn note_saved(&self, step: u64) {
        self.known().manifests.remove(&step);
        self.note_change();
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

fn newest_ratio(survey: &Survey, manifests: &BTreeMap<u64, ManifestState>) -> Option<f64> {
    match manifests.get(&survey.newest()?)? {
        ManifestState::Valid(manifest) => ratio(manifest.stored_bytes(), manifest.raw_bytes()),
        _ => None,
    }
}
