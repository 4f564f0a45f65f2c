//! What may be deleted: checkpoints that the policy does not keep, and files that no manifest
//! names.
//!
//! Pure. Always holds: nothing protected is planned for deletion, nothing that the policy keeps
//! is, and nothing younger than the grace period is. What is best is protected. A plan is a list in
//! the order in which it is carried out; carried out in part, the next plan holds the rest.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use crate::config::{BestMode, Config};
use crate::recovery::{ManifestState, OrphanFile, Survey};

/// Which checkpoints a store keeps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Policy {
    /// The newest that are kept; `None` keeps all. At least one is kept whatever this says.
    pub(crate) keep_last_n: Option<u32>,
    /// Steps that are multiples of this are kept in addition.
    pub(crate) keep_every: Option<u64>,
}

impl From<&Config> for Policy {
    fn from(config: &Config) -> Self {
        Self { keep_last_n: config.keep_last_n, keep_every: config.keep_every }
    }
}

/// The checkpoints that exist and say a number of this name in their metadata, the best first; of
/// equal ones the newer.
pub(crate) fn best_first(
    survey: &Survey,
    manifests: &BTreeMap<u64, ManifestState>,
    metric: &str,
    mode: BestMode,
) -> Vec<u64> {
    let of = |step: u64| match manifests.get(&step)? {
        ManifestState::Valid(manifest) => Some((step, manifest.metric(metric)?)),
        _ => None,
    };
    rank(survey.committed_steps().into_iter().filter_map(of).collect(), mode)
}

fn rank(mut measured: Vec<(u64, f64)>, mode: BestMode) -> Vec<u64> {
    measured.sort_by(|(step, value), (other_step, other)| {
        let order = match mode {
            BestMode::Min => value.total_cmp(other),
            BestMode::Max => other.total_cmp(value),
        };
        order.then(Reverse(step).cmp(&Reverse(other_step)))
    });
    measured.into_iter().map(|(step, _)| step).collect()
}

/// Checkpoints to delete after a commit, in order: retired ones, newest first, then those that the
/// policy does not keep. A step that still retires another stays until that one is gone.
///
/// `protected` are the step just committed, the step restored from, the newest that verified, the
/// best.
fn plan_retention(survey: &Survey, policy: Policy, protected: &[u64]) -> Vec<u64> {
    let retiring = survey.retiring_steps();
    let kept: Vec<u64> = protected.iter().chain(&retiring).copied().collect();
    let mut plan = survey.retired_steps();
    plan.retain(|step| !protected.contains(step));
    plan.reverse();
    plan.extend(plan_deletions(&survey.committed_steps(), policy, &kept));
    plan
}

/// [`plan_retention`], with what waits for the remote store left out, unless a rewind retired it:
/// that is wanted nowhere. `may_remove` says of a step whether it need not wait; `passed` are
/// checkpoints that not all ranks have and that all have gone past: they go in any case, last.
pub(crate) fn plan_prune(
    survey: &Survey,
    policy: Policy,
    protected: &[u64],
    passed: &[u64],
    may_remove: impl Fn(u64) -> bool,
) -> Vec<u64> {
    let mut plan = plan_retention(survey, policy, protected);
    plan.retain(|step| survey.is_retired(*step) || may_remove(*step));
    plan.extend(passed);
    plan
}

/// Which of the `committed` steps the policy does not keep, ascending, none of the `protected`
/// ones.
fn plan_deletions(committed: &[u64], policy: Policy, protected: &[u64]) -> Vec<u64> {
    let Some(keep_last_n) = policy.keep_last_n else {
        return Vec::new();
    };
    let mut steps = committed.to_vec();
    steps.sort_unstable();
    steps.dedup();
    let kept = usize::try_from(keep_last_n.max(1)).unwrap_or(usize::MAX);
    steps.truncate(steps.len().saturating_sub(kept));
    steps.retain(|step| {
        let milestone = policy.keep_every.is_some_and(|every| every != 0 && step % every == 0);
        !milestone && !protected.contains(step)
    });
    steps
}

/// Orphans that have been left alone for at least `grace` at `now`, by the store's clock. Whether a
/// live attempt holds the lock of one is asked when it is deleted.
pub(crate) fn plan_cleanup(survey: &Survey, now: SystemTime, grace: Duration) -> Vec<OrphanFile> {
    // A file from the future has no age: it stays.
    let old =
        |orphan: &&OrphanFile| now.duration_since(orphan.idle_since).is_ok_and(|age| age >= grace);
    survey.steps.iter().flat_map(|step| &step.orphans).filter(old).cloned().collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;
    use crate::recovery::{StepState, StepSurvey};

    fn step(step: u64, state: StepState) -> StepSurvey {
        StepSurvey { step, state, attempt: None, created_unix_ms: 0, bytes: 0, orphans: Vec::new() }
    }

    fn policy(keep_last_n: Option<u32>, keep_every: Option<u64>) -> Policy {
        Policy { keep_last_n, keep_every }
    }

    #[test]
    fn what_waits_for_the_remote_store_stays_unless_it_was_retired_or_passed() {
        let committed = [1, 2, 3, 4].map(|number| step(number, StepState::Committed));
        let retired = [8, 9].map(|number| step(number, StepState::Retired { by: 4 }));
        let incomplete = [step(7, StepState::Incomplete)];
        let steps = committed.into_iter().chain(incomplete).chain(retired).collect();
        let survey = Survey { steps, ceased: Vec::new() };
        let plan = plan_prune(&survey, policy(Some(1), None), &[4], &[7], |step| step != 2);
        assert_eq!(plan, [9, 8, 1, 3, 7]);
    }

    #[test]
    fn the_newest_and_the_milestones_stay() {
        let committed = [100, 200, 300, 400, 500];
        assert_eq!(plan_deletions(&committed, policy(None, Some(200)), &[]), [0; 0]);
        assert_eq!(plan_deletions(&committed, policy(Some(2), None), &[]), [100, 200, 300]);
        assert_eq!(plan_deletions(&committed, policy(Some(2), Some(200)), &[]), [100, 300]);
        assert_eq!(plan_deletions(&committed, policy(Some(2), None), &[100]), [200, 300]);
        assert_eq!(plan_deletions(&committed, policy(Some(9), None), &[]), [0; 0]);
        assert_eq!(plan_deletions(&committed, policy(Some(0), None), &[]), [100, 200, 300, 400]);
    }

    #[test]
    fn the_best_come_first_and_of_equal_ones_the_newer() {
        let measured = || vec![(10, 0.5), (20, -0.0), (30, 0.5), (40, 2.0), (50, 0.0)];
        assert_eq!(rank(measured(), BestMode::Min), [20, 50, 30, 10, 40]);
        assert_eq!(rank(measured(), BestMode::Max), [40, 30, 10, 50, 20]);
    }

    #[test]
    fn a_step_stays_while_one_that_it_retired_is_there() {
        let steps = vec![
            step(10, StepState::Committed),
            step(20, StepState::Retired { by: 10 }),
            step(25, StepState::Retired { by: 10 }),
            step(30, StepState::Committed),
            step(35, StepState::Damaged { why: String::new() }),
            step(40, StepState::Committed),
        ];
        let survey = Survey { steps, ..Survey::default() };
        assert_eq!(plan_retention(&survey, policy(Some(1), None), &[]), [25, 20, 30]);
        assert_eq!(plan_retention(&survey, policy(Some(1), None), &[20, 30]), [25]);
        assert_eq!(plan_retention(&survey, Policy::default(), &[]), [25, 20]);
    }

    #[test]
    fn only_what_was_left_alone_for_the_grace_period_is_cleaned() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1000);
        let orphan = |name: &str, age_seconds: i64| OrphanFile {
            step: 1,
            file: name.into(),
            bytes: 1,
            idle_since: SystemTime::UNIX_EPOCH
                + Duration::from_secs(u64::try_from(1000 - age_seconds).unwrap()),
        };
        let orphans =
            vec![orphan("old", 100), orphan("just", 60), orphan("young", 59), orphan("future", -1)];
        let steps = vec![StepSurvey { orphans, ..step(1, StepState::Incomplete) }];
        let survey = Survey { steps, ..Survey::default() };
        let names = |grace_seconds| {
            let plan = plan_cleanup(&survey, now, Duration::from_secs(grace_seconds));
            plan.into_iter().map(|orphan| orphan.file).collect::<Vec<_>>()
        };
        assert_eq!(names(60), ["old", "just"]);
        assert_eq!(names(0), ["old", "just", "young"]);
    }

    proptest! {
        #[test]
        fn deletions_obey_policy_and_protection_and_are_complete(
            committed in prop::collection::btree_set(0u64..60, 0..40),
            protected in prop::collection::vec(0u64..60, 0..4),
            keep_last_n in prop::option::of(1u32..10),
            keep_every in prop::option::of(1u64..10),
        ) {
            let policy = Policy { keep_last_n, keep_every };
            let steps: Vec<u64> = committed.iter().copied().collect();
            let plan = plan_deletions(&steps, policy, &protected);
            let gone: BTreeSet<u64> = plan.iter().copied().collect();
            prop_assert_eq!(gone.len(), plan.len());
            prop_assert!(gone.is_subset(&committed));
            prop_assert!(protected.iter().all(|step| !gone.contains(step)));
            let newest: BTreeSet<u64> = match keep_last_n {
                None => committed.clone(),
                Some(count) => committed.iter().rev().take(count as usize).copied().collect(),
            };
            prop_assert!(newest.is_disjoint(&gone));
            prop_assert!(gone.iter().all(|step| keep_every.is_none_or(|every| step % every != 0)));
            let left: Vec<u64> = committed.difference(&gone).copied().collect();
            for step in &left {
                let has_reason = newest.contains(step)
                    || protected.contains(step)
                    || keep_every.is_some_and(|every| step % every == 0);
                prop_assert!(has_reason, "{} stays without a reason", step);
            }
            prop_assert_eq!(plan_deletions(&left, policy, &protected), Vec::<u64>::new());
        }
    }
}
