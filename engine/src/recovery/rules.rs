//! Whether a step may be saved or copied into a store, by what exists there.
//!
//! Always holds: a checkpoint that exists ceases to exist only where the caller said that the
//! training went back; what ceased to exist is said again by every save before it.

use super::{StepState, StepSurvey, Survey, in_order};
use crate::format::manifest::{Manifest, Retired};
use crate::format::names::AttemptId;
use crate::store_copy::Overwrite;
use crate::{EngineError, Result};

/// How a save at some step is to be published.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct SavePlan {
    /// The attempt whose manifest stands there now and goes.
    pub(crate) replaces: Option<AttemptId>,
    /// Later checkpoints that cease to exist at that commit, or did before.
    pub(crate) retired: Vec<Retired>,
    /// The earliest that it may say it began: after whatever it takes the place of, whose clock may
    /// have been ahead. A copy of that is then never taken for the later one.
    pub(crate) not_before_unix_ms: u64,
}

/// Most checkpoints that are said to have ceased to exist though nothing is seen of them.
pub(super) const UNSEEN_MAX: usize = 4096;

/// Decides whether `step` may be saved and what its manifest must say. Without `rewind`, a step is
/// saved only after the newest that can be loaded; with it, every later checkpoint is retired at
/// the commit. Later ones that are damaged are retired either way: repaired, they would be newest.
///
/// What ceased to exist before is said again, though nothing is seen of it: a copy may be where
/// this store does not look now, and the manifest that said so may go.
pub(crate) fn check_save(survey: &Survey, step: u64, rewind: bool) -> Result<SavePlan> {
    if let Some(newest) = survey.newest_in_the_way().filter(|newest| step <= *newest && !rewind) {
        return Err(EngineError::StepConflict {
            what: format!("saving step {step}"),
            why: format!("step {newest} is committed, and only later steps can be saved"),
            hint: format!(
                "save after step {newest}, or pass `rewind=True` if training went back: steps \
                 after {step} are then discarded when step {step} is committed"
            ),
        });
    }
    if let Some((newer, why)) = survey.newer().find(|(newer, _)| *newer >= step) {
        return Err(EngineError::UnsupportedFormat {
            what: format!("saving step {step}"),
            why: format!(
                "step {newer} would have to be discarded, but a newer version wrote it: \
                          {why}"
            ),
            hint: format!(
                "upgrade dtruntime, or delete step {newer} with the version that wrote it"
            ),
        });
    }
    let replaces = survey.step(step).and_then(|survey| survey.attempt);
    let in_its_place = survey.steps.iter().filter(|other| other.step >= step);
    let created = in_its_place.map(|other| other.created_unix_ms).max();
    Ok(SavePlan {
        replaces,
        retired: retired_by(survey, step, rewind),
        not_before_unix_ms: created.map_or(0, |created| created.saturating_add(1)),
    })
}

/// Decides whether a checkpoint may be copied into a store that holds this. One that ceased to
/// exist there would be none; and unless it is said, a copy ends no checkpoint that exists there.
pub(crate) fn check_copy(survey: &Survey, copied: &Manifest, overwrite: Overwrite) -> Result<()> {
    let refused = |why: String, hint: &str| EngineError::StepConflict {
        what: format!("copying step {}", copied.step),
        why,
        hint: hint.into(),
    };
    let is_this = |ceased: &Retired| ceased.step == copied.step && ceased.attempt == copied.attempt;
    if survey.ceased.iter().any(is_this) {
        return Err(refused(
            "it was discarded there when training went back to an earlier step".into(),
            "copy it to another store",
        ));
    }
    let exists = |retired: &&Retired| {
        let there = survey.step(retired.step).filter(|there| there.state == StepState::Committed);
        there.and_then(|there| there.attempt).is_some_and(|id| id.to_string() == retired.attempt)
    };
    match copied.retired.iter().rfind(exists) {
        Some(ended) if overwrite == Overwrite::No => Err(refused(
            format!(
                "this checkpoint was saved by a rewind that discarded step {}, and that step \
                 exists there",
                ended.step
            ),
            "copy with `--rewind`, which discards the later steps there too, or choose another \
             store",
        )),
        _ => Ok(()),
    }
}

fn retired_by(survey: &Survey, step: u64, rewind: bool) -> Vec<Retired> {
    let goes = |later: &&StepSurvey| {
        later.step > step && (rewind || later.is_retired() || later.is_damaged())
    };
    let named = |later: &StepSurvey| {
        Some(Retired { attempt: later.attempt?.to_string(), step: later.step })
    };
    let seen: Vec<Retired> = survey.steps.iter().filter(goes).filter_map(named).collect();
    // Of too many, those that would be the newest.
    let unseen = survey.ceased.iter().rev().filter(|entry| entry.step > step).take(UNSEEN_MAX);
    in_order(seen.iter().chain(unseen))
}
