//! Attempts that were given up, and who knows it.
//!
//! Always holds:
//! - a rank that had no part in an attempt that was given up is told once when it comes to the
//!   step, and then it is past it; what it sends again is told again;
//! - a job remembers [`ATTEMPTS_MAX`] such steps at most, and forgets the lowest first.

use std::collections::BTreeMap;

use dtr_proto::v1;

use super::attempt::ATTEMPTS_MAX;
use super::{Change, Context, Job, Key, Level, Note, Refusal, RefusalKind, Reply};

/// An attempt that was given up: why, for ranks that still write their shard, and for those that
/// come to it late.
#[derive(Debug)]
pub(super) struct AbortedAttempt {
    attempt: String,
    aborted: v1::AttemptAborted,
    /// The most often that one of its ranks had tried the step before.
    tries: u32,
    /// Ranks that knew of it, or have heard since, or were lost.
    told: BTreeMap<u32, Told>,
}

/// What a rank knows of an attempt that was given up.
#[derive(Clone, Copy, Debug)]
pub(super) enum Told {
    /// It was there, or has heard, having tried the step so often before.
    Tries(u32),
    /// Its process was lost at this epoch, and may come back.
    Lost(u64),
    /// Its process is another one since.
    Renewed,
}

/// A step that is given up before it is begun.
pub(super) struct Refused {
    /// The rank that would have begun it.
    pub(super) rank: u32,
    /// The rank because of which it cannot end, and what that one knows.
    pub(super) cause: u32,
    pub(super) told: Told,
    pub(super) reason: String,
    pub(super) hint: &'static str,
}

impl AbortedAttempt {
    /// Whether a rank that begins the step comes for the next attempt. A call that was sent again
    /// does not, nor one that a lost rank had made before it was lost.
    fn is_past(&self, rank: u32, request: &v1::BeginCheckpointRequest) -> bool {
        let is_next = |told: &Told| match *told {
            Told::Tries(told) => request.tries > told,
            Told::Lost(epoch) => request.known_epoch >= epoch,
            Told::Renewed => true,
        };
        request.tries > self.tries || self.told.get(&rank).is_some_and(is_next)
    }
}

impl Job {
    /// Refuses a rank that was not there when the step's last attempt was given up, once, and a
    /// call for that attempt that is sent again.
    pub(super) fn tell_of_aborted(
        &mut self,
        rank: u32,
        request: &v1::BeginCheckpointRequest,
    ) -> Result<(), Refusal> {
        let step = request.step;
        let Some(last) = self.aborted.get_mut(&step) else { return Ok(()) };
        if last.is_past(rank, request) {
            self.aborted.remove(&step);
            return Ok(());
        }
        let reason = last.aborted.reason.clone();
        last.told.insert(rank, Told::Tries(request.tries));
        Err(Refusal::new(
            RefusalKind::AttemptAborted,
            format!("the save of step {step} was given up: {reason}"),
            "training may go on; save again",
        ))
    }

    /// Gives a step up before it is begun, for this rank and for every rank that comes to it late.
    pub(super) fn refuse_step(
        &mut self,
        request: &v1::BeginCheckpointRequest,
        refused: Refused,
    ) -> Refusal {
        let Refused { rank, cause, told, reason, hint } = refused;
        let known = self.aborted.entry(request.step).or_insert_with(|| AbortedAttempt {
            attempt: String::new(),
            aborted: v1::AttemptAborted {
                reason: reason.clone(),
                rank: Some(cause),
                may_be_published: false,
            },
            tries: request.tries,
            told: BTreeMap::from([(cause, told)]),
        });
        known.tries = known.tries.max(request.tries);
        known.told.insert(rank, Told::Tries(request.tries));
        while self.aborted.len() > ATTEMPTS_MAX {
            self.aborted.pop_first();
        }
        Refusal::new(RefusalKind::AttemptAborted, reason, hint)
    }

    /// What a rank is answered that reports to an attempt that is over.
    pub(super) fn why_gone(&mut self, rank: u32, step: u64, id: &str) -> v1::AttemptAborted {
        let known = self.aborted.get_mut(&step).filter(|aborted| aborted.attempt == id);
        known.map_or_else(
            || v1::AttemptAborted {
                reason: format!("attempt `{id}` of step {step} is over"),
                rank: None,
                may_be_published: true,
            },
            |aborted| {
                aborted.told.entry(rank).or_insert(Told::Tries(0));
                aborted.aborted.clone()
            },
        )
    }

    /// Gives an attempt up, because of a rank if one is the reason, and answers everybody who
    /// waits.
    pub(super) fn give_up(
        &mut self,
        context: &mut Context<'_>,
        step: u64,
        (rank, reason): (Option<u32>, String),
    ) {
        let Some(attempt) = self.attempts.remove(&step) else { return };
        let may_be_published = attempt.may_be_published();
        let ended = Some(attempt.ended(step, context.at.now_ms, reason.clone()));
        let aborted = v1::AttemptAborted { reason, rank, may_be_published };
        let key = Key::Attempt { job: self.name.clone(), step };
        context.effects.changes.push(Change::remove(key));
        for ticket in attempt.waiting.into_values() {
            context.effects.replies.push((ticket, Reply::AttemptAborted(aborted.clone())));
        }
        let text = format!("the save of step {step} is given up: {}", aborted.reason);
        let note = Note { job: self.name.clone(), level: Level::Warn, text, ended };
        context.effects.notes.push(note);
        let tries = attempt.begun.values().copied().max().unwrap_or_default();
        let begun = attempt.begun.into_iter();
        let told = begun.map(|(rank, tries)| (rank, Told::Tries(tries))).collect();
        let attempt = attempt.record.attempt;
        if self.aborted.len() >= ATTEMPTS_MAX {
            self.aborted.pop_first();
        }
        let known = AbortedAttempt { attempt, aborted, tries, told };
        self.aborted.insert(step, known);
    }

    /// A process is gone, and may come back with a call that it had made before.
    pub(super) fn lose_rank_of_given_up(&mut self, rank: u32) {
        let epoch = self.record.epoch;
        for aborted in self.aborted.values_mut() {
            aborted.told.insert(rank, Told::Lost(epoch));
        }
    }

    /// A new process has a rank: it knows nothing of attempts that were given up before.
    pub(super) fn renew_rank_of_given_up(&mut self, rank: u32) {
        for aborted in self.aborted.values_mut() {
            aborted.told.insert(rank, Told::Renewed);
        }
    }
}
