//! One checkpoint of many ranks: complete, or not there.
//!
//! ```text
//! begin ──► reports, one a rank ──► the last reporter is asked to publish ──► commit
//!   └────────────┴── a rank fails or is lost: aborted, on every rank
//! ```
//!
//! What exists is decided by the manifest in the store; the coordinator brings its authors
//! together. Once all shards are durable a lost rank changes nothing: if it was to publish, the
//! next waiting rank is asked, and both would write the same bytes.
//!
//! Where each rank has a store of its own, every rank is asked, and reports again once the manifest
//! is durable there; the last such report commits:
//!
//! ```text
//! begin ──► reports ──► all are asked to publish ──► reports, published ──► commit
//!   └──────────┴───────────────────┴──────────── a rank fails or is lost: aborted
//! ```
//!
//! Always holds:
//! - a step has at most one attempt at a time, and one commit; its attempt id never comes back;
//! - an attempt is committed only with a shard of every rank of the job;
//! - a rank that comes late to an attempt that was given up is told so once, instead of beginning
//!   the next attempt alone; so is one that begins a step which another rank has passed, or while
//!   another rank waits for all to open a store;
//! - an attempt ends: committed, or given up within `checkpoint_timeout_ms`.

use dtr_proto::v1;

use super::attempt::{ATTEMPTS_MAX, Attempt, Report, invalid_shard};
use super::given_up::{Refused, Told};
use super::losses::LostMember;
use super::members::ended;
use super::stragglers::SAVE_AFTER_MS;
use super::{
    COMMITS_KEPT, Change, Context, Job, Key, Level, Note, Refusal, RefusalKind, Reply, Ticket,
};

/// What to do where one rank opens a store, and others have it open.
const OPEN_ALL: &str = "if it was restarted, end this process too and start all ranks again: they \
                        continue from the newest checkpoint";

impl Job {
    pub(super) fn begin(
        &mut self,
        context: &mut Context<'_>,
        request: &v1::BeginCheckpointRequest,
    ) -> Result<Reply, Refusal> {
        self.member_of(request.identity.as_ref())?;
        self.refuse_if_aborted()?;
        let (worker_id, rank) = self.current_member_of(request.identity.as_ref())?;
        let step = request.step;
        self.give_up_left(context, (rank, &worker_id), step);
        if let Some(attempt) = self.attempts.get_mut(&step) {
            attempt.begun.insert(rank, request.tries);
            return Ok(attempt.reply(self.record.world_size));
        }
        self.tell_of_aborted(rank, request)?;
        self.check_step(step, request.rewind)?;
        self.refuse_if_incomplete(rank, request)?;
        self.refuse_if_passed(rank, request)?;
        self.refuse_if_opening(rank, request)?;
        if self.attempts.len() >= ATTEMPTS_MAX {
            return Err(Refusal::new(
                RefusalKind::Conflict,
                format!("job `{}` has {ATTEMPTS_MAX} checkpoints in flight", self.name),
                "wait for the earlier ones",
            ));
        }
        let record = v1::AttemptRecord {
            attempt: format!("{:032x}", context.at.random),
            created_unix_ms: context.at.wall_ms,
            epoch: self.record.epoch,
            rewind: request.rewind,
        };
        let key = Key::Attempt { job: self.name.clone(), step };
        context.effects.changes.push(Change::put(key, &record));
        let mut attempt = Attempt::new(context.at.now_ms, record);
        attempt.begun.insert(rank, request.tries);
        let reply = attempt.reply(self.record.world_size);
        self.attempts.insert(step, attempt);
        Ok(reply)
    }

    /// A rank saves one step at a time, and goes on to later ones: what it has not reported of
    /// others that it began, or of earlier ones, it never will.
    fn give_up_left(
        &mut self,
        context: &mut Context<'_>,
        (rank, worker_id): (u32, &str),
        step: u64,
    ) {
        let is_left = |(other, attempt): &(&u64, &Attempt)| {
            let knows = attempt.begun.contains_key(&rank) || **other < step;
            **other != step && knows && !attempt.shards.contains_key(&rank)
        };
        let left: Vec<u64> =
            self.attempts.iter().filter(is_left).map(|(other, _)| *other).collect();
        for other in left {
            let reason =
                format!("rank {rank} (`{worker_id}`) went on to step {step} without reporting it");
            self.give_up(context, other, (Some(rank), reason));
        }
    }

    fn check_step(&self, step: u64, rewind: bool) -> Result<(), Refusal> {
        let Some((newest, _)) = self.commits.last_key_value() else { return Ok(()) };
        if step > *newest || rewind {
            return Ok(());
        }
        Err(Refusal::new(
            RefusalKind::AlreadyCommitted,
            format!("step {step} is not after the newest committed step, {newest}"),
            "save a later step, or pass `rewind=True` after going back on purpose",
        ))
    }

    /// Refuses a save that cannot end: a worker was lost, and nobody took its place. A rank that
    /// never came is waited for.
    fn refuse_if_incomplete(
        &mut self,
        rank: u32,
        request: &v1::BeginCheckpointRequest,
    ) -> Result<(), Refusal> {
        let Some(LostMember { worker_id, rank: lost }) = self.lost_member() else { return Ok(()) };
        let step = request.step;
        let reason = format!(
            "step {step} cannot be saved by all ranks: rank {lost} (`{worker_id}`) is gone"
        );
        let told = Told::Lost(self.record.fence);
        let hint = "training may go on; save again once a worker has taken its place";
        Err(self.refuse_step(request, Refused { rank, cause: lost, told, reason, hint }))
    }

    /// Refuses a save that cannot end: another rank has begun a later step without this one, and
    /// saves one step at a time. Also of a rank that goes back: the others would have to know.
    fn refuse_if_passed(
        &mut self,
        rank: u32,
        request: &v1::BeginCheckpointRequest,
    ) -> Result<(), Refusal> {
        let step = request.step;
        let Some((later, passed)) = self.passed_by(rank, step) else { return Ok(()) };
        let worker_id = self.holders.get(&passed).map_or("nobody", String::as_str);
        let reason = format!(
            "step {step} cannot be saved by all ranks: rank {passed} (`{worker_id}`) went on to \
             step {later} without it"
        );
        let (told, hint) = (Told::Renewed, "training may go on; save the same steps on every rank");
        Err(self.refuse_step(request, Refused { rank, cause: passed, told, reason, hint }))
    }

    /// Refuses a save that cannot end: another rank waits for all to open a store, this one too.
    fn refuse_if_opening(
        &mut self,
        rank: u32,
        request: &v1::BeginCheckpointRequest,
    ) -> Result<(), Refusal> {
        let Some(opening) = self.opening_beside(rank) else { return Ok(()) };
        let reason = self.why_opening(opening);
        let reason = format!("step {} cannot be saved by all ranks: {reason}", request.step);
        let (told, hint) = (Told::Renewed, OPEN_ALL);
        Err(self.refuse_step(request, Refused { rank, cause: opening, told, reason, hint }))
    }

    /// A rank opens a store: what it has not reported of the saves that others wait for, it never
    /// will.
    pub(super) fn give_up_unreported(&mut self, context: &mut Context<'_>, rank: u32) {
        let is_waited_for = |(_, attempt): &(&u64, &Attempt)| !attempt.shards.contains_key(&rank);
        let steps: Vec<u64> =
            self.attempts.iter().filter(is_waited_for).map(|(step, _)| *step).collect();
        for step in steps {
            let reason = format!("{}; {OPEN_ALL}", self.why_opening(rank));
            self.give_up(context, step, (Some(rank), reason));
        }
    }

    fn why_opening(&self, rank: u32) -> String {
        let worker_id = self.holders.get(&rank).map_or("nobody", String::as_str);
        format!(
            "rank {rank} (`{worker_id}`) has no checkpoint manager open, and waits for all ranks \
             to open one"
        )
    }

    /// A later step that is being saved without `rank`, and a rank that has begun it.
    fn passed_by(&self, rank: u32, step: u64) -> Option<(u64, u32)> {
        let mut later = self.attempts.range(step.saturating_add(1)..);
        // A rank that has begun it, too, went back since.
        later.find_map(|(later, attempt)| {
            let first = attempt.begun.keys().next()?;
            let is_without = !attempt.is_recovered && !attempt.begun.contains_key(&rank);
            is_without.then_some((*later, *first))
        })
    }

    pub(super) fn report(
        &mut self,
        context: &mut Context<'_>,
        ticket: Ticket,
        request: v1::ReportShardRequest,
    ) -> Result<Option<Reply>, Refusal> {
        let (_, rank) = self.member_of(request.identity.as_ref())?;
        let v1::ReportShardRequest {
            step,
            attempt: id,
            shard,
            own_store,
            published_crc32c,
            replicated_crc32c,
            ..
        } = request;
        if let Some(commit) = self.commits.get(&step).filter(|commit| commit.attempt == id) {
            return Ok(Some(Reply::Committed(commit.clone())));
        }
        let world_size = self.record.world_size;
        let Some(attempt) = self.attempts.get_mut(&step).filter(|a| a.record.attempt == id) else {
            return Ok(Some(Reply::AttemptAborted(self.why_gone(rank, step, &id))));
        };
        let shard = shard.ok_or_else(|| invalid_shard("it is missing"))?;
        if shard.rank != rank {
            return Err(invalid_shard(&format!("it is of rank {}, not {rank}", shard.rank)));
        }
        let report = Report { shard, own_store, published_crc32c, replicated_crc32c };
        if let Some(older) = attempt.take(ticket, rank, report)? {
            context.effects.replies.push((older, Reply::Refused(superseded(rank))));
        }
        if let Some(other) = attempt.differs_from(rank) {
            self.give_up(context, step, (None, unlike(rank, other)));
        } else if attempt.is_published_by_all(world_size) {
            let crc32c = attempt.published.values().next().copied().unwrap_or_default();
            let commit = attempt.commit(step, context, crc32c);
            self.settle(context, &commit);
        } else if attempt.is_complete(world_size) {
            context.effects.replies.extend(attempt.ask_after_report(context.at.now_ms, rank));
        }
        Ok(None)
    }

    pub(super) fn commit(
        &mut self,
        context: &mut Context<'_>,
        request: &v1::CommitCheckpointRequest,
    ) -> Result<Reply, Refusal> {
        self.member_of(request.identity.as_ref())?;
        let v1::CommitCheckpointRequest { step, attempt: id, manifest_crc32c, .. } = request;
        if let Some(commit) = self.commits.get(step).filter(|commit| commit.attempt == *id) {
            if commit.manifest_crc32c != *manifest_crc32c {
                return Err(other_manifest(*step));
            }
            return Ok(Reply::Committed(commit.clone()));
        }
        let world_size = self.record.world_size;
        let attempt = self.attempts.get(step).filter(|attempt| attempt.record.attempt == *id);
        let attempt = attempt.ok_or_else(|| {
            Refusal::new(
                RefusalKind::AttemptAborted,
                format!("attempt `{id}` of step {step} is over"),
                "training may go on; save again",
            )
        })?;
        if !attempt.is_complete(world_size) {
            let there = attempt.shards.len();
            return Err(Refusal::new(
                RefusalKind::Incomplete,
                format!("{there} of {world_size} shards of step {step} are reported"),
                "report the shard again: reports do not outlive the coordinator's process",
            ));
        }
        if attempt.each_publishes() {
            return Err(Refusal::new(
                RefusalKind::Invalid,
                format!("step {step} is published by each rank in a store of its own"),
                "report the shard again, with the checksum of the manifest",
            ));
        }
        let commit = attempt.commit(*step, context, *manifest_crc32c);
        self.settle(context, &commit);
        Ok(Reply::Committed(commit))
    }

    /// Records a commit and answers everybody who waits for it.
    fn settle(&mut self, context: &mut Context<'_>, commit: &v1::Commit) {
        let step = commit.step;
        let Some(attempt) = self.attempts.remove(&step) else { return };
        let job = || self.name.clone();
        let changes = &mut context.effects.changes;
        changes.push(Change::put(Key::Commit { job: job(), step }, commit));
        changes.push(Change::remove(Key::Attempt { job: job(), step }));
        if attempt.record.rewind {
            for (later, _) in self.commits.split_off(&(step.saturating_add(1))) {
                changes.push(Change::remove(Key::Commit { job: job(), step: later }));
            }
        }
        self.commits.insert(step, commit.clone());
        while self.commits.len() > COMMITS_KEPT {
            let Some((oldest, _)) = self.commits.pop_first() else { break };
            changes.push(Change::remove(Key::Commit { job: self.name.clone(), step: oldest }));
        }
        self.commit_count += 1;
        self.forgive();
        self.keep_job(context);
        let took_ms = context.at.now_ms - attempt.begun_ms;
        let text = format!(
            "step {step} is committed: {} bytes of {} ranks in {took_ms} ms",
            commit.bytes, commit.world_size
        );
        let ended = Some(attempt.ended(step, context.at.now_ms, String::new()));
        let note = Note { job: self.name.clone(), level: Level::Info, text, ended };
        context.effects.notes.push(note);
        for ticket in attempt.waiting.into_values() {
            context.effects.replies.push((ticket, Reply::Committed(commit.clone())));
        }
    }

    pub(super) fn abort_checkpoint(
        &mut self,
        context: &mut Context<'_>,
        request: &v1::AbortCheckpointRequest,
    ) -> Result<Reply, Refusal> {
        let (worker_id, rank) = self.member_of(request.identity.as_ref())?;
        let step = request.step;
        let attempt = self.attempts.get_mut(&step);
        if let Some(attempt) = attempt.filter(|attempt| attempt.record.attempt == request.attempt) {
            if request.unpublished {
                attempt.asked.remove(&rank);
            }
            let reason = format!("rank {rank} (`{worker_id}`) failed: {}", request.reason);
            self.give_up(context, step, (Some(rank), reason));
        }
        Ok(Reply::Done)
    }

    /// A rank is gone. What it had not reported is lost with it; what was complete is not.
    pub(super) fn lose_rank_of_attempts(
        &mut self,
        context: &mut Context<'_>,
        (rank, worker_id): (u32, &str),
        reason: &str,
    ) {
        let world_size = self.record.world_size;
        let now_ms = context.at.now_ms;
        let mut incomplete = Vec::new();
        for (step, attempt) in &mut self.attempts {
            if let Some(ticket) = attempt.waiting.remove(&rank) {
                // It may live, and asks again once it is a member.
                let refused = Reply::Refused(ended(worker_id, &self.name));
                context.effects.replies.push((ticket, refused));
            }
            // In stores of their own all must publish, and one that is gone may not have.
            if !attempt.is_complete(world_size) || attempt.each_publishes() {
                incomplete.push(*step);
            } else if attempt.publisher.is_some_and(|(publisher, _)| publisher == rank) {
                attempt.publisher = None;
                context.effects.replies.extend(attempt.ask_next(now_ms));
            }
        }
        for step in incomplete {
            let reason = format!("rank {rank} (`{worker_id}`) was lost: {reason}");
            self.give_up(context, step, (Some(rank), reason));
        }
        self.lose_rank_of_given_up(rank);
    }

    pub(super) fn forget_attempts(&mut self, context: &mut Context<'_>, reason: &str) {
        let steps: Vec<u64> = self.attempts.keys().copied().collect();
        for step in steps {
            self.give_up(context, step, (None, reason.to_owned()));
        }
        self.aborted.clear();
    }

    pub(super) fn tick_attempts(&mut self, context: &mut Context<'_>) {
        let now_ms = context.at.now_ms;
        let publish_ms = context.policy.heartbeat_timeout_ms;
        let mut late = Vec::new();
        for (step, attempt) in &mut self.attempts {
            let is_slow = attempt
                .publisher
                .is_some_and(|(_, asked_ms)| now_ms.saturating_sub(asked_ms) > publish_ms);
            if is_slow && !attempt.waiting.is_empty() && !attempt.each_publishes() {
                context.effects.replies.extend(attempt.ask_next(now_ms));
            }
            if now_ms.saturating_sub(attempt.begun_ms) > context.policy.checkpoint_timeout_ms {
                late.push(*step);
            }
        }
        self.name_stragglers(context);
        for step in late {
            let why = self.too_late(step, context.policy.checkpoint_timeout_ms);
            self.give_up(context, step, why);
        }
    }

    /// Says who has not begun a checkpoint that the others save.
    fn name_stragglers(&mut self, context: &mut Context<'_>) {
        let mut attempts = std::mem::take(&mut self.attempts);
        for (step, attempt) in &mut attempts {
            let waited_ms = context.at.now_ms.saturating_sub(attempt.begun_ms);
            let warn_ms = SAVE_AFTER_MS.get(attempt.warnings).copied();
            if warn_ms.is_none_or(|warn_ms| waited_ms < warn_ms) {
                continue;
            }
            attempt.warnings += 1;
            let missing = self.missing_of(|rank| attempt.begun.contains_key(&rank));
            if !missing.is_empty() && !attempt.is_recovered {
                let text = self.save_text(*step, &missing, waited_ms);
                self.note(context, Level::Warn, text);
            }
        }
        self.attempts = attempts;
    }

    fn too_late(&self, step: u64, timeout_ms: u64) -> (Option<u32>, String) {
        let shards = self.attempts.get(&step).map(|attempt| &attempt.shards);
        let is_missing = |rank: &u32| shards.is_some_and(|shards| !shards.contains_key(rank));
        let rank = (0..self.record.world_size).find(is_missing);
        let who = rank.map_or_else(
            || "nobody published the manifest, or not every rank in its own store".to_owned(),
            |rank| format!("rank {rank} did not report"),
        );
        (rank, format!("{who} within {timeout_ms} ms"))
    }

    pub(super) fn list_checkpoints(&self, limit: u32) -> Reply {
        let limit = if limit == 0 { usize::MAX } else { usize::try_from(limit).unwrap_or(0) };
        let commits = self.commits.values().rev().take(limit).cloned().collect();
        Reply::Checkpoints(v1::ListCheckpointsReply { commits })
    }
}

fn unlike(rank: u32, other: u32) -> String {
    let (one, two) = (rank.min(other), rank.max(other));
    format!(
        "ranks {one} and {two} disagree on the replicated entries: `replicated` names entries \
         that do not have the same names, types, shapes and plain values on both"
    )
}

fn superseded(rank: u32) -> Refusal {
    Refusal::new(
        RefusalKind::Conflict,
        format!("a later report of rank {rank} waits for the same attempt"),
        "report each shard only once at a time",
    )
}

fn other_manifest(step: u64) -> Refusal {
    Refusal::new(
        RefusalKind::AlreadyCommitted,
        format!("step {step} is committed with a manifest of another checksum"),
        "read the manifest in the store: it is the one that counts",
    )
}
