//! How a job loses workers: silence, failures, and which of them are one incident.
//!
//! Always holds:
//! - nobody dies before a whole timeout of silence on this clock, nor because this process stood
//!   still;
//! - a death is counted once, and not at all if its process comes back; what is lost within one
//!   heartbeat timeout is one incident, for a machine, a network or an exception of one rank takes
//!   several workers with it; a worker that leaves is none;
//! - a loss ends every wait at a barrier, and every attempt that needs more of the lost rank.

use dtr_proto::v1::{ChangeKind, WorkerState};

use super::members::Member;
use super::{Context, Job, Level};

/// A worker that missed this many heartbeats is suspect.
const SUSPECT_AFTER_INTERVALS: u64 = 3;

/// How a job loses a worker.
pub(super) struct Loss<'a> {
    pub(super) worker_id: &'a str,
    pub(super) kind: ChangeKind,
    pub(super) reason: String,
}

/// Losses that count as one failure.
#[derive(Clone, Copy, Debug)]
pub(super) struct Incident {
    /// The epoch of the first of them; `None` for one that is no failure.
    failure: Option<u64>,
    began_ms: u64,
}

/// Who held a rank that nobody holds now.
pub(super) struct LostMember<'a> {
    pub(super) worker_id: &'a str,
    pub(super) rank: u32,
}

impl Job {
    /// A rank that had a worker and has none now.
    pub(super) fn lost_member(&self) -> Option<LostMember<'_>> {
        let is_lost = |member: &Member| !self.holders.contains_key(&member.record.rank);
        let (worker_id, member) =
            self.members.iter().find(|(_, member)| !member.is_alive() && is_lost(member))?;
        Some(LostMember { worker_id, rank: member.record.rank })
    }

    /// The newest loss, for people.
    pub(super) fn newest_loss(&self) -> String {
        let loss = self.log.iter().rev().find(|change| change.epoch == self.record.fence);
        loss.map_or_else(
            || format!("the membership changed at epoch {}", self.record.fence),
            |loss| format!("`{}` (rank {}): {}", loss.worker_id, loss.rank, loss.reason),
        )
    }

    /// Removes a worker and notifies everything that counted on it.
    pub(super) fn lose(&mut self, context: &mut Context<'_>, loss: &Loss<'_>) {
        let Some(member) = self.members.get_mut(loss.worker_id) else { return };
        let rank = member.record.rank;
        let is_leave = loss.kind == ChangeKind::Left;
        member.record.state =
            if is_leave { WorkerState::Left.into() } else { WorkerState::Dead.into() };
        member.heard_ms = context.at.now_ms;
        self.holders.remove(&rank);
        self.record.epoch += 1;
        self.record.fence = self.record.epoch;
        self.keep_member(context, loss.worker_id);
        self.log(loss.worker_id, rank, loss.kind, loss.reason.clone());
        let level = if is_leave { Level::Info } else { Level::Warn };
        let text = format!("`{}` (rank {rank}) is gone: {}", loss.worker_id, loss.reason);
        self.note(context, level, text);
        self.count_failure(context, loss);
        if self.holders.is_empty() {
            self.note_end(context);
        }
        self.keep_job(context);
        self.break_barriers(context);
        self.lose_rank_of_attempts(context, (rank, loss.worker_id), &loss.reason);
        if self.record.failures >= context.policy.max_worker_failures {
            let reason = format!(
                "{} failures since the last checkpoint, at most {} are allowed; the last: `{}` \
                 (rank {rank}): {}",
                self.record.failures,
                context.policy.max_worker_failures - 1,
                loss.worker_id,
                loss.reason
            );
            self.abort(context, &reason);
        }
    }

    /// Counts what is a failure, once for each incident.
    fn count_failure(&mut self, context: &Context<'_>, loss: &Loss<'_>) {
        let began_ms = context.at.now_ms;
        let window_ms = context.policy.heartbeat_timeout_ms;
        let ongoing = self.incident.filter(|known| began_ms - known.began_ms <= window_ms);
        let known = match loss.kind {
            ChangeKind::Failed | ChangeKind::Died => ongoing.and_then(|known| known.failure),
            // A new process has registered already: nobody is missing.
            ChangeKind::Replaced if ongoing.is_some() => return,
            ChangeKind::Replaced => None,
            _ => return,
        };
        // The loss was just given an epoch of its own.
        let failure = known.unwrap_or(self.record.epoch);
        if known.is_none() {
            self.record.failures += 1;
            self.incident = Some(Incident { failure: Some(failure), began_ms });
        }
        *self.failures.entry(failure).or_insert(0) += 1;
        if let Some(member) = self.members.get_mut(loss.worker_id) {
            member.failure = failure;
        }
    }

    /// A process that was taken for dead lives, and with it all that it holds: once the last one of
    /// a failure is back, it was none.
    pub(super) fn take_back(&mut self, failure: u64) {
        let Some(missing) = self.failures.get_mut(&failure) else { return };
        *missing -= 1;
        if *missing == 0 {
            self.failures.remove(&failure);
            self.record.failures = self.record.failures.saturating_sub(1);
            self.incident = self.incident.filter(|known| known.failure != Some(failure));
        }
    }

    /// Counts failures from none again.
    pub(super) fn forgive(&mut self) {
        self.record.failures = 0;
        self.incident = None;
        self.failures.clear();
    }

    pub(super) fn lose_everybody(&mut self, context: &mut Context<'_>, reason: &str) {
        // A take-over is no failure.
        self.incident = Some(Incident { failure: None, began_ms: context.at.now_ms });
        for worker_id in std::mem::take(&mut self.holders).into_values() {
            let reason = reason.to_owned();
            let kind = ChangeKind::Replaced;
            let loss = Loss { worker_id: &worker_id, kind, reason };
            self.lose(context, &loss);
        }
    }

    pub(super) fn tick_members(&mut self, context: &mut Context<'_>) {
        if context.at.now_ms < self.quiet_until_ms {
            return;
        }
        let timeout_ms = context.policy.heartbeat_timeout_ms;
        let mut dead = Vec::new();
        for worker_id in self.holders.values() {
            let member = &self.members[worker_id];
            let silent_ms = context.at.now_ms.saturating_sub(member.heard_ms);
            if silent_ms > timeout_ms {
                dead.push((worker_id.clone(), silent_ms));
            }
        }
        for (worker_id, silent_ms) in dead {
            let reason =
                format!("it was silent for {silent_ms} ms, at most {timeout_ms} are allowed");
            let kind = ChangeKind::Died;
            let loss = Loss { worker_id: &worker_id, kind, reason };
            self.lose(context, &loss);
        }
        self.doubt(context);
        self.quiet_until_ms = self.next_due_ms(context);
    }

    /// Before when no tick finds anything. Who is heard of, or registers, after this one is due no
    /// sooner than the shortest limit allows.
    fn next_due_ms(&self, context: &Context<'_>) -> u64 {
        let timeout_ms = context.policy.heartbeat_timeout_ms;
        let suspect_ms = SUSPECT_AFTER_INTERVALS * context.policy.heartbeat_interval_ms;
        let stalled_ms = match context.policy.progress_timeout_ms {
            0 => u64::MAX,
            stalled_ms => stalled_ms,
        };
        let due_ms = |worker_id: &String| {
            let member = &self.members[worker_id];
            let suspect_ms = if member.is_suspect { u64::MAX } else { suspect_ms };
            let is_exempt = member.is_stalled || member.progress == 0;
            let stalled_ms = if is_exempt { u64::MAX } else { stalled_ms };
            let silent_ms = member.heard_ms.saturating_add(timeout_ms.min(suspect_ms));
            silent_ms.min(member.progressed_ms.saturating_add(stalled_ms))
        };
        let shortest_ms = timeout_ms.min(suspect_ms).min(stalled_ms);
        let latest_ms = context.at.now_ms.saturating_add(shortest_ms);
        // A limit is passed one millisecond after it was reached.
        self.holders.values().map(due_ms).fold(latest_ms, u64::min).saturating_add(1)
    }

    /// Marks who missed heartbeats, and whose training loop stands still.
    fn doubt(&mut self, context: &mut Context<'_>) {
        let now_ms = context.at.now_ms;
        let suspect_ms = SUSPECT_AFTER_INTERVALS * context.policy.heartbeat_interval_ms;
        let stalled_ms = context.policy.progress_timeout_ms;
        let mut texts = Vec::new();
        for (rank, worker_id) in &self.holders {
            let member = self.members.get_mut(worker_id).expect("holders are members");
            let silent_ms = now_ms.saturating_sub(member.heard_ms);
            if silent_ms > suspect_ms && !member.is_suspect {
                member.is_suspect = true;
                texts.push(format!("`{worker_id}` (rank {rank}) is silent for {silent_ms} ms"));
            }
            let still_ms = now_ms.saturating_sub(member.progressed_ms);
            let reports = member.progress > 0 && stalled_ms > 0;
            if reports && still_ms > stalled_ms && !member.is_stalled {
                member.is_stalled = true;
                texts.push(format!(
                    "`{worker_id}` (rank {rank}) sends heartbeats, but made no progress for \
                     {still_ms} ms"
                ));
            }
        }
        for text in texts {
            self.note(context, Level::Warn, text);
        }
    }
}
