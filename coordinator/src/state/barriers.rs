//! Named points that nobody passes before every rank is there.
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

use super::{Change, Job, Key, Level, Refusal, RefusalKind, Reply, Scene, Ticket};

/// Longest wait, and the shortest.
const TIMEOUT_MAX_MS: u64 = 24 * 3_600_000;
/// Ranks that a timed-out wait names.
const MISSING_NAMED_MAX: usize = 64;
/// Waits that are logged, once each.
const STRAGGLERS_AFTER_MS: [u64; 2] = [10_000, 60_000];
/// Steps that one rank may offer.
const STEPS_MAX: usize = 100_000;
/// What a rank may say of what keeps it from loading.
const HINDRANCE_CHARACTERS_MAX: usize = 1_000;
/// The barrier that ranks agree on a step at; no name that users give has a line break.
const AGREEMENT: &str = "\nstep";

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

/// What a rank can load.
#[derive(Debug)]
struct Offer {
    /// By step, the attempt.
    steps: BTreeMap<u64, String>,
    /// What keeps it from more; empty if nothing does.
    hindrance: String,
    gives_up: bool,
}

/// What came of the offers of all ranks.
#[derive(Clone, Debug, Default)]
struct Agreement {
    step: Option<u64>,
    hindrance: Option<v1::Hindrance>,
    offering: u32,
}

impl Agreement {
    fn of(arrivals: &BTreeMap<u32, Arrival>) -> Self {
        let offers: Vec<(u32, &Offer)> = arrivals
            .iter()
            .filter_map(|(rank, arrival)| Some((*rank, arrival.offer.as_ref()?)))
            .collect();
        let step = newest_common(&offers);
        let hindrance = if step.is_none() { worst_hindrance(&offers) } else { None };
        let offering = offers.iter().filter(|(_, offer)| !offer.steps.is_empty()).count();
        Self { step, hindrance, offering: u32::try_from(offering).unwrap_or(u32::MAX) }
    }

    fn recorded(record: &v1::BarrierRecord) -> Self {
        let v1::BarrierRecord { agreed_step: step, hindrance, offering, .. } = record.clone();
        Self { step, hindrance, offering }
    }
}

/// The newest step of which all of them offer the same attempt.
fn newest_common(offers: &[(u32, &Offer)]) -> Option<u64> {
    let ((_, first), rest) = offers.split_first()?;
    let is_common = |(step, attempt): &(&u64, &String)| {
        rest.iter().all(|(_, offer)| offer.steps.get(step) == Some(*attempt))
    };
    first.steps.iter().rev().find(is_common).map(|(step, _)| *step)
}

/// What keeps the first rank from loading that gives up, else the first that anything keeps.
fn worst_hindrance(offers: &[(u32, &Offer)]) -> Option<v1::Hindrance> {
    let hindered = offers.iter().filter(|(_, offer)| !offer.hindrance.is_empty());
    let (rank, offer) = hindered.min_by_key(|(rank, offer)| (!offer.gives_up, *rank))?;
    let (why, gave_up) = (offer.hindrance.clone(), offer.gives_up);
    Some(v1::Hindrance { rank: *rank, why, gave_up })
}

/// One rank's call.
struct Call<'a> {
    identity: Option<&'a v1::Identity>,
    name: &'a str,
    key: u64,
    timeout_ms: u64,
    alike: &'a str,
    offer: Option<Offer>,
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

    /// Why those who wait cannot pass together, if two of them differ in what must be alike.
    fn difference(&self) -> Option<Refusal> {
        let mut given = self.waiting.iter().filter(|(_, arrival)| !arrival.alike.is_empty());
        let (rank, first) = given.next()?;
        let (other, unlike) = given.find(|(_, arrival)| arrival.alike != first.alike)?;
        Some(Refusal::new(
            RefusalKind::Invalid,
            format!(
                "ranks differ in what must be alike: rank {rank} brings {}, rank {other} {}",
                first.alike, unlike.alike
            ),
            "give every rank the same; what differs on purpose is a job of its own: `job=`",
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
        let Agreement { step, hindrance, offering } = Agreement::of(&waiting);
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
        scene: &mut Scene<'_>,
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
        self.arrive(scene, ticket, call)
    }

    pub(super) fn agree_step(
        &mut self,
        scene: &mut Scene<'_>,
        ticket: Ticket,
        request: v1::AgreeStepRequest,
    ) -> Result<Option<Reply>, Refusal> {
        if request.steps.len() > STEPS_MAX {
            let given = request.steps.len();
            return Err(Refusal::new(
                RefusalKind::Invalid,
                format!("{given} steps are offered, at most {STEPS_MAX} are allowed"),
                "offer the newest ones",
            ));
        }
        let (steps, attempts) = (request.steps, request.attempts);
        if !attempts.is_empty() && attempts.len() != steps.len() {
            return Err(Refusal::new(
                RefusalKind::Invalid,
                format!("{} steps are offered with {} attempts", steps.len(), attempts.len()),
                "name the attempt of every step, or of none",
            ));
        }
        let attempts = attempts.into_iter().chain(std::iter::repeat(String::new()));
        let offer = Offer {
            steps: steps.into_iter().zip(attempts).collect(),
            hindrance: request.hindrance.chars().take(HINDRANCE_CHARACTERS_MAX).collect(),
            gives_up: request.gives_up,
        };
        let call = Call {
            identity: request.identity.as_ref(),
            name: AGREEMENT,
            key: request.arrival,
            timeout_ms: request.timeout_ms,
            alike: "",
            offer: Some(offer),
        };
        self.arrive(scene, ticket, call)
    }

    fn arrive(
        &mut self,
        scene: &mut Scene<'_>,
        ticket: Ticket,
        call: Call<'_>,
    ) -> Result<Option<Reply>, Refusal> {
        let (_, rank) = self.member_of(call.identity)?;
        let barrier = self.barriers.get(call.name);
        if let Some(ended) = barrier.and_then(|barrier| barrier.earlier_reply(rank, call.key)) {
            return Ok(Some(ended.reply(call.name)));
        }
        if !self.record.abort_reason.is_empty() {
            let ended = Ended::of(Outcome::Aborted(self.record.abort_reason.clone()));
            return Ok(Some(ended.reply(call.name)));
        }
        self.current_member_of(call.identity)?;
        check_timeout(call.timeout_ms)?;
        if let Some(barrier) = barrier.filter(|barrier| barrier.is_over(rank, call.key)) {
            return match &barrier.unlike {
                Some(refusal) => Err(refusal.clone()),
                None => Ok(Some(self.timed_out(barrier).reply(call.name))),
            };
        }
        if barrier.is_none() {
            if self.past_arrivals.get(&rank).is_some_and(|past| call.key <= *past) {
                return Ok(Some(self.timed_out(&Barrier::default()).reply(call.name)));
            }
            self.make_room_for_barrier(scene)?;
        }
        let now_ms = scene.at.now_ms;
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
            scene.effects.replies.push((older.ticket, Reply::Refused(superseded(rank))));
        }
        if call.name == OPENING_BARRIER {
            self.give_up_unreported(scene, rank);
        }
        self.release_if_complete(scene, call.name);
        Ok(None)
    }

    /// Another rank than `rank` that waits for all to open a store.
    pub(super) fn opening_beside(&self, rank: u32) -> Option<u32> {
        let barrier = self.barriers.get(OPENING_BARRIER)?;
        barrier.waiting.keys().copied().find(|opening| *opening != rank)
    }

    fn release_if_complete(&mut self, scene: &mut Scene<'_>, name: &str) {
        let Some(barrier) = self.barriers.get_mut(name) else { return };
        if barrier.waiting.len() != usize::try_from(self.record.world_size).unwrap_or(usize::MAX) {
            return;
        }
        if let Some(refusal) = barrier.difference() {
            barrier.unlike = Some(refusal.clone());
            for rank in 0..self.record.world_size {
                let refused = |ticket| (ticket, Reply::Refused(refusal.clone()));
                scene.effects.replies.extend(barrier.end_wait(rank).map(refused));
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
        scene.effects.changes.push(Change::put(key, record));
        let replies = waiting.values().map(|a| (a.ticket, ended.clone().reply(name)));
        scene.effects.replies.extend(replies);
    }

    /// At the limit the barrier that was released the longest ago goes, if nobody waits at it.
    fn make_room_for_barrier(&mut self, scene: &mut Scene<'_>) -> Result<(), Refusal> {
        if self.barriers.len() < scene.policy.barriers_max {
            return Ok(());
        }
        let order = |barrier: &Barrier| barrier.record.as_ref().map_or(0, |record| record.order);
        let idle = self.barriers.iter().filter(|(_, barrier)| barrier.waiting.is_empty());
        let oldest = idle.min_by_key(|(_, barrier)| order(barrier)).map(|(name, _)| name.clone());
        let name = oldest.ok_or_else(|| too_many(&self.name, scene.policy.barriers_max))?;
        let Some(barrier) = self.barriers.remove(&name) else { return Ok(()) };
        for (rank, key) in barrier.past_arrivals() {
            let past = self.past_arrivals.entry(rank).or_insert(key);
            *past = key.max(*past);
        }
        if barrier.is_kept() {
            let key = Key::Barrier { job: self.name.clone(), name };
            scene.effects.changes.push(Change::remove(key));
        }
        Ok(())
    }

    pub(super) fn withdraw_barrier(
        &mut self,
        scene: &mut Scene<'_>,
        request: &v1::WithdrawBarrierRequest,
    ) -> Result<Reply, Refusal> {
        let (_, rank) = self.member_of(request.identity.as_ref())?;
        if let Some(barrier) = self.barriers.get_mut(&request.name)
            && barrier.waiting.get(&rank).is_some_and(|arrival| arrival.key == request.arrival)
        {
            let ticket = barrier.end_wait(rank);
            let refusal = |ticket| (ticket, Reply::Refused(taken_back(rank)));
            scene.effects.replies.extend(ticket.map(refusal));
        }
        Ok(Reply::Done)
    }

    /// A worker was lost: nobody can know whether the others still mean the same point.
    pub(super) fn break_barriers(&mut self, scene: &mut Scene<'_>) {
        let reason = self.newest_loss();
        let changed = v1::EpochChanged { epoch: self.record.epoch, reason };
        self.end_waits(scene, &Ended::of(Outcome::EpochChanged(changed)));
    }

    pub(super) fn abort_barriers(&mut self, scene: &mut Scene<'_>, reason: &str) {
        self.end_waits(scene, &Ended::of(Outcome::Aborted(reason.to_owned())));
    }

    fn end_waits(&mut self, scene: &mut Scene<'_>, ended: &Ended) {
        for (name, barrier) in &mut self.barriers {
            for (rank, arrival) in std::mem::take(&mut barrier.waiting) {
                barrier.ended.insert(rank, arrival.key);
                scene.effects.replies.push((arrival.ticket, ended.clone().reply(name)));
            }
        }
    }

    /// A new run counts from the beginning.
    pub(super) fn forget_barriers(&mut self, scene: &mut Scene<'_>) {
        self.past_arrivals.clear();
        self.releases = 0;
        for (name, barrier) in std::mem::take(&mut self.barriers) {
            if barrier.record.is_some() {
                let key = Key::Barrier { job: self.name.clone(), name };
                scene.effects.changes.push(Change::remove(key));
            }
        }
    }

    pub(super) fn tick_barriers(&mut self, scene: &mut Scene<'_>) {
        let now_ms = scene.at.now_ms;
        let mut barriers = std::mem::take(&mut self.barriers);
        for (name, barrier) in barriers.iter_mut().filter(|(_, b)| !b.waiting.is_empty()) {
            let waited_ms = now_ms - barrier.since_ms;
            let warn_ms = STRAGGLERS_AFTER_MS.get(barrier.warnings).copied();
            if warn_ms.is_some_and(|warn_ms| warn_ms <= waited_ms) {
                barrier.warnings += 1;
                let what = format!("barrier `{}`", name.trim());
                let text = self.straggler_text(&what, &self.missing(barrier), waited_ms);
                self.note(scene, Level::Warn, text);
            }
            self.end_late_waits(scene, name, barrier);
        }
        self.barriers = barriers;
    }

    fn end_late_waits(&self, scene: &mut Scene<'_>, name: &str, barrier: &mut Barrier) {
        let now_ms = scene.at.now_ms;
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
            scene.effects.replies.extend(ticket.map(reply));
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

    /// Ranks of the job for which this does not hold, and who holds them.
    pub(super) fn missing_of(&self, is_there: impl Fn(u32) -> bool) -> Vec<v1::MissingRank> {
        (0..self.record.world_size)
            .filter(|rank| !is_there(*rank))
            .map(|rank| v1::MissingRank {
                rank,
                worker_id: self.holders.get(&rank).cloned().unwrap_or_default(),
            })
            .collect()
    }

    /// Says who keeps the others waiting.
    pub(super) fn straggler_text(
        &self,
        what: &str,
        missing: &[v1::MissingRank],
        waited_ms: u64,
    ) -> String {
        let named: Vec<String> = missing
            .iter()
            .take(8)
            .map(|m| match m.worker_id.as_str() {
                "" => format!("rank {} (nobody)", m.rank),
                worker_id => format!("rank {} (`{worker_id}`)", m.rank),
            })
            .collect();
        let more = if missing.len() > named.len() { " and others" } else { "" };
        format!(
            "{what} waits for {} of {} ranks since {waited_ms} ms: {}{more}",
            missing.len(),
            self.record.world_size,
            named.join(", ")
        )
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
        "pass `timeout=` in seconds; no wait is for ever",
    ))
}

fn superseded(rank: u32) -> Refusal {
    Refusal::new(
        RefusalKind::Conflict,
        format!("a later call of rank {rank} waits at the same barrier"),
        "wait at a barrier once at a time",
    )
}

fn taken_back(rank: u32) -> Refusal {
    Refusal::new(RefusalKind::Conflict, format!("rank {rank} took its arrival back"), "wait again")
}

fn too_many(job: &str, barriers_max: usize) -> Refusal {
    Refusal::new(
        RefusalKind::Conflict,
        format!("somebody waits at each of {barriers_max} barriers of job `{job}`"),
        "use a name again: each barrier counts its releases",
    )
}
