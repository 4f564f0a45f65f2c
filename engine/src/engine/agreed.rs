//! What this rank has that not all ranks have.
//!
//! Always holds: only a rank with a store of its own has such; what counts is what it had when it
//! last offered its steps, later than the step that all agreed on. What has become whole in the
//! remote store is a checkpoint like any other.

use super::Core;
use crate::Result;
use crate::format::names::AttemptId;
use crate::ranks::Attempt;
use crate::recovery::{StepState, Survey};

impl Core {
    /// What this rank can load, by name: steps of other attempts are not the same.
    pub(super) fn offers(&self, steps: &[u64]) -> Result<Vec<Attempt>> {
        let survey = self.survey()?;
        self.known().offered = survey
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
        let mut known = self.known();
        known.not_common = step.map(|agreed| {
            let later = known.offered.split_off(&agreed.saturating_add(1));
            (agreed, later)
        });
    }

    /// Whether saving `step` goes back only over what other ranks do not have: checkpoints in this
    /// rank's own store that were published here and never committed, or were lost elsewhere.
    pub(super) fn goes_over_own_only(&self, step: u64) -> bool {
        let known = self.known();
        let range = known.not_common.as_ref().and_then(|(agreed, later)| {
            let newest = *later.keys().next_back()?;
            Some(agreed.saturating_add(1)..=newest)
        });
        self.config.has_own_store() && range.is_some_and(|range| range.contains(&step))
    }

    /// Takes what this rank alone has out of a survey: it is no checkpoint, and keeps none from its
    /// place. What has become whole in the remote store is one. Gives the steps, ascending.
    pub(super) fn leave_out_own_only(&self, survey: &mut Survey) -> Vec<u64> {
        let mut left_out = Vec::new();
        if !self.config.has_own_store() {
            return left_out;
        }
        let arrived = self.arrived();
        let known = self.known();
        let Some((_, later)) = &known.not_common else { return left_out };
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
}
