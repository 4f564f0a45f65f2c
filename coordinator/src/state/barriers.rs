//! Named points that nobody passes before every rank has arrived.
//!
//! A barrier's releases are counted by its generation. Arrivals of a rank are numbered upwards, so
//! the same arrival sent twice is one, an old one that comes late counts for nothing, and a rank
//! that lost the reply gets it again from the kept record, also after a restart.
//!
//! Always holds:
//! - a release needs an arrival of every rank of the job, each from a living member that knew of
//!   the newest loss when it arrived;
//! - every wait ends: released, timed out (naming who is missing), epoch changed, or aborted;
//! - an arrival that timed out, was withdrawn or was overtaken by a loss counts for nothing;
//! - a barrier is forgotten only while nobody waits at it, and what arrived there before counts for
//!   nothing.

use std::collections::BTreeMap;

use dtr_proto::OPENING_BARRIER;
use dtr_proto::v1::{self, wait_barrier_reply::Outcome};

use super::agreement::{AGREEMENT, Agreement, Offer};
use super::stragglers::BARRIER_AFTER_MS;
use super::{Change, Context, Job, Key, Level, Refusal, RefusalKind, Reply, Ticket};

/// Longest wait.
const TIMEOUT_MAX_MS: u64 = 24 * 3_600_000;
/// Ranks that a timed-out wait names.
const MISSING_NAMED_MAX: usize = 64;

/// One barrier.
#[derive(Debug, Default)]
pub(super) struct Barrier {
    /// The last release, if there was one.
    record: Option<v1::BarrierRecord>,
    waiting: BTreeMap<u32, Arrival>,
    /// The newest arrival of each rank that ended without a release.
    ended: BTreeMap<u32, u64>,
    /// Why the last round was refused, if it was.
    unlike: Option<Refusal>,
    /// When the first of those who wait now arrived.
    since_ms: u64,
    warnings: usize,
}

#[derive(Debug)]
struct Arrival {
    key: u64,
    ticket: Ticket,
    deadline_ms: u64,
    /// What must be the same on every rank; empty if nothing must.
    alike: String,
    /// What the rank can load, where it was asked.
    offer: Option<Offer>,
}

/// One rank's call.
pub(super) struct Call<'a> {
    pub(super) identity: Option<&'a v1::Identity>,
    pub(super) name: &'a str,
    pub(super) key: u64,
    pub(super) timeout_ms: u64,
    pub(super) alike: &'a str,
    pub(super) offer: Option<Offer>,
}

impl Barrier {
    pub(super) fn released(record: v1::BarrierRecord) -> Self {
        Self { record: Some(record), ..Self::default() }
    }

    /// Whether there is a record of it.
    pub(super) fn is_kept(&self) -> bool {
        self.record.is_some()
    }

    /// The newest arrival of each rank that is not waiting any more.
    fn past_arrivals(&self) -> impl Iterator<Item = (u32, u64)> {
        let released = self.record.iter().flat_map(|record| (0..).zip(record.arrivals.clone()));
        released.chain(self.ended.iter().map(|(rank, key)| (*rank, *key)))
    }

    /// Why those who wait cannot pass together, if two of them differ in what must be equal.
    fn difference(&self) -> Option<Refusal> {
        let mut given = self.waiting.iter().filter(|(_, arrival)| !arrival.alike.is_empty());
        let (rank, first) = given.next()?;
        let (other, unlike) = given.find(|(_, arrival)| arrival.alike != first.alike)?;
        Some(Refusal::new(
            RefusalKind::Invalid,
            format!(
                "ranks differ in what must be the same: rank {rank} brings {}, rank {other} {}",
                first.alike, unlike.alike
            ),
            "give every rank the same; runs that differ on purpose need separate jobs: `job=`",
        ))
    }

    /// What the rank was told, if this arrival was part of the last release.
    fn earlier_reply(&self, rank: u32, key: u64) -> Option<Ended> {
        let record = self.record.as_ref()?;
        let arrived = record.arrivals.get(usize::try_from(rank).ok()?)?;
        (*arrived == key).then_some(Ended {
            outcome: Outcome::Released(v1::BarrierReleased { generation: record.generation }),
            agreement: Agreement::recorded(record),
        })
    }

    /// Whether the rank's arrival is over: it, or a later one, was released or ended otherwise.
    fn is_over(&self, rank: u32, key: u64) -> bool {
        let place = usize::try_from(rank).unwrap_or(usize::MAX);
        let released = self.record.as_ref().and_then(|record| record.arrivals.get(place));
        let is_past = |newest: Option<&u64>| newest.is_some_and(|newest| key <= *newest);
        is_past(released) || is_past(self.ended.get(&rank))
    }

    /// Ends one rank's wait, if it waits.
    fn end_wait(&mut self, rank: u32) -> Option<Ticket> {
        let arrival = self.waiting.remove(&rank)?;
        self.ended.insert(rank, arrival.key);
        Some(arrival.ticket)
    }

    /// Releases everybody: the new record, and who waits.
    fn release(&mut self, order: u64) -> (&v1::BarrierRecord, BTreeMap<u32, Arrival>) {
        let waiting = std::mem::take(&mut self.waiting);
        let generation = self.record.as_ref().map_or(0, |record| record.generation + 1);
        let offers = waiting.iter().filter_map(|(rank, a)| Some((*rank, a.offer.as_ref()?)));
        let offers: Vec<(u32, &Offer)> = offers.collect();
        let Agreement { step, hindrance, offering } = Agreement::of(&offers);
        let record = v1::BarrierRecord {
            generation,
            arrivals: waiting.values().map(|arrival| arrival.key).collect(),
            agreed_step: step,
            order,
            hindrance,
            offering,
        };
        (self.record.insert(record), waiting)
    }
}

/// How a wait ended.
#[derive(Clone)]
struct Ended {
    outcome: Outcome,
    agreement: Agreement,
}

impl Ended {
    fn of(outcome: Outcome) -> Self {
        Self { outcome, agreement: Agreement::default() }
    }

    fn reply(self, name: &str) -> Reply {
        let waited = v1::WaitBarrierReply { outcome: Some(self.outcome) };
        if name == AGREEMENT {
            let Agreement { step, hindrance, offering } = self.agreement;
            let waited = Some(waited);
            Reply::AgreeStep(v1::AgreeStepReply { waited, step, hindrance, offering })
        } else {
            Reply::Barrier(waited)
        }
    }
}

impl Job {
    pub(super) fn wait_barrier(
        &mut self,
        context: &mut Context<'_>,
        ticket: Ticket,
        request: &v1::WaitBarrierRequest,
    ) -> Result<Option<Reply>, Refusal> {
        let call = Call {
            identity: request.identity.as_ref(),
            name: &request.name,
            key: request.arrival,
            timeout_ms: request.timeout_ms,
            alike: &request.alike,
            offer: None,
        };
        self.arrive(context, ticket, call)
    }

    pub(super) fn arrive(
        &mut self,
        context: &mut Context<'_>,
        ticket: Ticket,
        call: Call<'_>,
    ) -> Result<Option<Reply>, Refusal> {
        let (_, rank) = self.member_of(call.identity)?;
        if let Some(ended) = self.answer_known(rank, &call)? {
            return Ok(Some(ended.reply(call.name)));
        }
        if !self.barriers.contains_key(call.name) {
            self.make_room_for_barrier(context)?;
        }
        self.enter(context, ticket, rank, call)?;
        Ok(None)
    }

    /// What the arrival is told at once: its release, if it is sent again, or why it counts for
    /// nothing.
    fn answer_known(&self, rank: u32, call: &Call<'_>) -> Result<Option<Ended>, Refusal> {
        let barrier = self.barriers.get(call.name);
        if let Some(ended) = barrier.and_then(|barrier| barrier.earlier_reply(rank, call.key)) {
            return Ok(Some(ended));
        }
        if !self.record.abort_reason.is_empty() {
            return Ok(Some(Ended::of(Outcome::Aborted(self.record.abort_reason.clone()))));
        }
        self.current_member_of(call.identity)?;
        check_timeout(call.timeout_ms)?;
        let Some(barrier) = barrier else {
            let is_past = self.past_arrivals.get(&rank).is_some_and(|past| call.key <= *past);
            return Ok(is_past.then(|| self.timed_out(&Barrier::default())));
        };
        match &barrier.unlike {
            _ if !barrier.is_over(rank, call.key) => Ok(None),
            Some(refusal) => Err(refusal.clone()),
            None => Ok(Some(self.timed_out(barrier))),
        }
    }

    /// Lets the rank wait, in the place of an earlier call of it, and releases all if it is the
    /// last.
    fn enter(
        &mut self,
        context: &mut Context<'_>,
        ticket: Ticket,
        rank: u32,
        call: Call<'_>,
    ) -> Result<(), Refusal> {
        let now_ms = context.at.now_ms;
        let barrier = self.barriers.entry(call.name.to_owned()).or_default();
        if barrier.waiting.get(&rank).is_some_and(|arrival| arrival.key > call.key) {
            return Err(superseded(rank));
        }
        if barrier.waiting.is_empty() {
            barrier.since_ms = now_ms;
            barrier.warnings = 0;
            barrier.unlike = None;
        }
        let arrival = Arrival {
            key: call.key,
            ticket,
            deadline_ms: now_ms + call.timeout_ms,
            alike: call.alike.to_owned(),
            offer: call.offer,
        };
        if let Some(older) = barrier.waiting.insert(rank, arrival)
            && older.ticket != ticket
        {
            context.effects.replies.push((older.ticket, Reply::Refused(superseded(rank))));
        }
        if call.name == OPENING_BARRIER {
            self.give_up_unreported(context, rank);
        }
        self.release_if_complete(context, call.name);
        Ok(())
    }

    /// Another rank than `rank` that waits for all to open a store.
    pub(super) fn opening_beside(&self, rank: u32) -> Option<u32> {
        let barrier = self.barriers.get(OPENING_BARRIER)?;
        barrier.waiting.keys().copied().find(|opening| *opening != rank)
    }

    fn release_if_complete(&mut self, context: &mut Context<'_>, name: &str) {
        let Some(barrier) = self.barriers.get_mut(name) else { return };
        if barrier.waiting.len() != usize::try_from(self.record.world_size).unwrap_or(usize::MAX) {
            return;
        }
        if let Some(refusal) = barrier.difference() {
            barrier.unlike = Some(refusal.clone());
            for rank in 0..self.record.world_size {
                let refused = |ticket| (ticket, Reply::Refused(refusal.clone()));
                context.effects.replies.extend(barrier.end_wait(rank).map(refused));
            }
            return;
        }
        self.releases += 1;
        let (record, waiting) = barrier.release(self.releases);
        let ended = Ended {
            outcome: Outcome::Released(v1::BarrierReleased { generation: record.generation }),
            agreement: Agreement::recorded(record),
        };
        let key = Key::Barrier { job: self.name.clone(), name: name.to_owned() };
        context.effects.changes.push(Change::put(key, record));
        let replies = waiting.values().map(|a| (a.ticket, ended.clone().reply(name)));
        context.effects.replies.extend(replies);
    }

    /// At the limit the barrier that was released the longest ago goes, if nobody waits at it.
    fn make_room_for_barrier(&mut self, context: &mut Context<'_>) -> Result<(), Refusal> {
        if self.barriers.len() < context.policy.barriers_max {
            return Ok(());
        }
        let order = |barrier: &Barrier| barrier.record.as_ref().map_or(0, |record| record.order);
        let idle = self.barriers.iter().filter(|(_, barrier)| barrier.waiting.is_empty());
        let oldest = idle.min_by_key(|(_, barrier)| order(barrier)).map(|(name, _)| name.clone());
        let name = oldest.ok_or_else(|| too_many(&self.name, context.policy.barriers_max))?;
        let Some(barrier) = self.barriers.remove(&name) else { return Ok(()) };
        for (rank, key) in barrier.past_arrivals() {
            let past = self.past_arrivals.entry(rank).or_insert(key);
            *past = key.max(*past);
        }
        if barrier.is_kept() {
            let key = Key::Barrier { job: self.name.clone(), name };
            context.effects.changes.push(Change::remove(key));
        }
        Ok(())
    }

    pub(super) fn withdraw_barrier(
        &mut self,
        context: &mut Context<'_>,
        request: &v1::WithdrawBarrierRequest,
    ) -> Result<Reply, Refusal> {
        let (_, rank) = self.member_of(request.identity.as_ref())?;
        if let Some(barrier) = self.barriers.get_mut(&request.name)
            && barrier.waiting.get(&rank).is_some_and(|arrival| arrival.key == request.arrival)
        {
            let ticket = barrier.end_wait(rank);
            let refusal = |ticket| (ticket, Reply::Refused(taken_back(rank)));
            context.effects.replies.extend(ticket.map(refusal));
        }
        Ok(Reply::Done)
    }

    /// A worker was lost: nobody can know whether the others still mean the same point.
    pub(super) fn break_barriers(&mut self, context: &mut Context<'_>) {
        let reason = self.newest_loss();
        let changed = v1::EpochChanged { epoch: self.record.epoch, reason };
        self.end_waits(context, &Ended::of(Outcome::EpochChanged(changed)));
    }

    pub(super) fn abort_barriers(&mut self, context: &mut Context<'_>, reason: &str) {
        self.end_waits(context, &Ended::of(Outcome::Aborted(reason.to_owned())));
    }

    fn end_waits(&mut self, context: &mut Context<'_>, ended: &Ended) {
        for (name, barrier) in &mut self.barriers {
            for (rank, arrival) in std::mem::take(&mut barrier.waiting) {
                barrier.ended.insert(rank, arrival.key);
                context.effects.replies.push((arrival.ticket, ended.clone().reply(name)));
            }
        }
    }

    /// A new run counts from the beginning.
    pub(super) fn forget_barriers(&mut self, context: &mut Context<'_>) {
        self.past_arrivals.clear();
        self.releases = 0;
        for (name, barrier) in std::mem::take(&mut self.barriers) {
            if barrier.record.is_some() {
                let key = Key::Barrier { job: self.name.clone(), name };
                context.effects.changes.push(Change::remove(key));
            }
        }
    }

    pub(super) fn tick_barriers(&mut self, context: &mut Context<'_>) {
        let now_ms = context.at.now_ms;
        let mut barriers = std::mem::take(&mut self.barriers);
        for (name, barrier) in barriers.iter_mut().filter(|(_, b)| !b.waiting.is_empty()) {
            let waited_ms = now_ms - barrier.since_ms;
            let warn_ms = BARRIER_AFTER_MS.get(barrier.warnings).copied();
            if warn_ms.is_some_and(|warn_ms| warn_ms <= waited_ms) {
                barrier.warnings += 1;
                let text = self.barrier_text(name, &self.missing(barrier), waited_ms);
                self.note(context, Level::Warn, text);
            }
            self.end_late_waits(context, name, barrier);
        }
        self.barriers = barriers;
    }

    fn end_late_waits(&self, context: &mut Context<'_>, name: &str, barrier: &mut Barrier) {
        let now_ms = context.at.now_ms;
        if barrier.waiting.values().all(|arrival| now_ms < arrival.deadline_ms) {
            return;
        }
        let timed_out = self.timed_out(barrier);
        let is_late = |(_, arrival): &(&u32, &Arrival)| arrival.deadline_ms <= now_ms;
        let late: Vec<u32> =
            barrier.waiting.iter().filter(is_late).map(|(rank, _)| *rank).collect();
        for rank in late {
            let ticket = barrier.end_wait(rank);
            let reply = |ticket| (ticket, timed_out.clone().reply(name));
            context.effects.replies.extend(ticket.map(reply));
        }
    }

    /// Not everybody came.
    fn timed_out(&self, barrier: &Barrier) -> Ended {
        let missing = self.missing(barrier);
        Ended::of(Outcome::TimedOut(v1::BarrierTimedOut {
            missing_count: u32::try_from(missing.len()).unwrap_or(u32::MAX),
            missing: missing.into_iter().take(MISSING_NAMED_MAX).collect(),
        }))
    }

    fn missing(&self, barrier: &Barrier) -> Vec<v1::MissingRank> {
        self.missing_of(|rank| barrier.waiting.contains_key(&rank))
    }

    pub(super) fn waiting_count(&self) -> usize {
        self.barriers.values().map(|barrier| barrier.waiting.len()).sum()
    }
}

fn check_timeout(timeout_ms: u64) -> Result<(), Refusal> {
    if (1..=TIMEOUT_MAX_MS).contains(&timeout_ms) {
        return Ok(());
    }
    Err(Refusal::new(
        RefusalKind::Invalid,
        format!("the timeout is {timeout_ms} ms, 1 to {TIMEOUT_MAX_MS} is allowed"),
        "pass `timeout=` in seconds; every wait has a limit",
    ))
}

fn superseded(rank: u32) -> Refusal {
    Refusal::new(
        RefusalKind::Conflict,
        format!("a later call of rank {rank} waits at the same barrier"),
        "wait at each barrier only once at a time",
    )
}

fn taken_back(rank: u32) -> Refusal {
    Refusal::new(RefusalKind::Conflict, format!("rank {rank} withdrew its arrival"), "wait again")
}

fn too_many(job: &str, barriers_max: usize) -> Refusal {
    Refusal::new(
        RefusalKind::Conflict,
        format!("somebody waits at each of {barriers_max} barriers of job `{job}`"),
        "reuse names: each barrier counts its releases",
    )
}
