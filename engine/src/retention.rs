//! What may be deleted: checkpoints that the policy lets go, and files that no manifest names.
//!
//! Pure. Always holds: nothing protected is planned for deletion, nothing that the policy keeps
//! is, and nothing younger than the grace period is. A plan is a list in the order in which it is
//! carried out; carried out in part, the next plan holds the rest.

use std::time::SystemTime;

use crate::config::Config;
use crate::recovery::{OrphanFile, Survey};
use crate::store::Grace;

/// Which checkpoints a store keeps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    /// The newest that are kept; `None` keeps all. At least one is kept whatever this says.
    pub keep_last_n: Option<u32>,
    /// Steps that are multiples of this are kept besides.
    pub keep_every: Option<u64>,
}

impl From<&Config> for Policy {
    fn from(config: &Config) -> Self {
        Self {
            keep_last_n: config.keep_last_n,
            keep_every: config.keep_every,
        }
    }
}

/// Checkpoints to delete after a commit, in order: retired ones, newest first, then those that the
/// policy lets go. A step that still retires another stays until that one is gone.
///
/// `protected` are the step just committed, the step restored from, the newest that verified.
pub fn plan_retention(survey: &Survey, policy: Policy, protected: &[u64]) -> Vec<u64> {
    let retiring = survey.retiring_steps();
    let kept: Vec<u64> = protected.iter().chain(&retiring).copied().collect();
    let mut plan = survey.retired_steps();
    plan.reverse();
    plan.extend(plan_deletions(&survey.committed_steps(), policy, &kept));
    plan
}

/// Which of the `committed` steps the policy lets go, ascending, none of the `protected` ones.
pub fn plan_deletions(committed: &[u64], policy: Policy, protected: &[u64]) -> Vec<u64> {
    let Some(keep_last_n) = policy.keep_last_n else {
        return Vec::new();
    };
    let mut steps = committed.to_vec();
    steps.sort_unstable();
    steps.dedup();
    let kept = usize::try_from(keep_last_n.max(1)).unwrap_or(usize::MAX);
    steps.truncate(steps.len().saturating_sub(kept));
    steps.retain(|step| {
        let milestone = policy
            .keep_every
            .is_some_and(|every| every != 0 && step % every == 0);
        !milestone && !protected.contains(step)
    });
    steps
}

/// Orphans that have been left alone for at least `grace` at `now`, by the store's clock. Whether a
/// live attempt holds the lock of one is asked when it is deleted.
pub fn plan_cleanup(survey: &Survey, now: SystemTime, grace: Grace) -> Vec<OrphanFile> {
    // A file from the future has no age: it stays.
    let old = |orphan: &&OrphanFile| {
        now.duration_since(orphan.idle_since)
            .is_ok_and(|age| age >= grace)
    };
    survey
        .steps
        .iter()
        .flat_map(|step| &step.orphans)
        .filter(old)
        .cloned()
        .collect()
}
