//! The newest step that all ranks can load: pure but for `agree_step`, which is an arrival at a
//! barrier of its own.
//!
//! Always holds:
//! - a step is agreed on only where every rank offers the same attempt of it, and no newer one is
//!   offered so;
//! - where ranks agree on none, the first that gives up is named, else the first that is hindered.

use std::collections::BTreeMap;

use dtr_proto::v1;

use super::barriers::Call;
use super::{Context, Job, Refusal, RefusalKind, Reply, Ticket};

/// Steps that one rank may offer.
const STEPS_MAX: usize = 100_000;
/// What a rank may say of what keeps it from loading.
const HINDRANCE_CHARACTERS_MAX: usize = 1_000;
/// The barrier that ranks agree on a step at; no name that users give has a line break.
pub(super) const AGREEMENT: &str = "\nstep";

/// What a rank can load.
#[derive(Debug)]
pub(super) struct Offer {
    /// By step, the attempt.
    steps: BTreeMap<u64, String>,
    /// What keeps it from more; empty if nothing does.
    hindrance: String,
    gives_up: bool,
}

impl Offer {
    fn of(request: v1::AgreeStepRequest) -> Result<Self, Refusal> {
        let v1::AgreeStepRequest { steps, attempts, hindrance, gives_up, .. } = request;
        if steps.len() > STEPS_MAX {
            let given = steps.len();
            return Err(Refusal::new(
                RefusalKind::Invalid,
                format!("{given} steps are offered, at most {STEPS_MAX} are allowed"),
                "offer the newest ones",
            ));
        }
        if !attempts.is_empty() && attempts.len() != steps.len() {
            return Err(Refusal::new(
                RefusalKind::Invalid,
                format!("{} steps are offered with {} attempts", steps.len(), attempts.len()),
                "name the attempt of every step, or of none",
            ));
        }
        let attempts = attempts.into_iter().chain(std::iter::repeat(String::new()));
        Ok(Self {
            steps: steps.into_iter().zip(attempts).collect(),
            hindrance: hindrance.chars().take(HINDRANCE_CHARACTERS_MAX).collect(),
            gives_up,
        })
    }
}

/// What came of the offers of all ranks.
#[derive(Clone, Debug, Default)]
pub(super) struct Agreement {
    pub(super) step: Option<u64>,
    pub(super) hindrance: Option<v1::Hindrance>,
    pub(super) offering: u32,
}

impl Agreement {
    /// What the offers of these ranks come to, which are in the order of ranks.
    pub(super) fn of(offers: &[(u32, &Offer)]) -> Self {
        let step = newest_common(offers);
        let hindrance = if step.is_none() { worst_hindrance(offers) } else { None };
        let offering = offers.iter().filter(|(_, offer)| !offer.steps.is_empty()).count();
        Self { step, hindrance, offering: u32::try_from(offering).unwrap_or(u32::MAX) }
    }

    /// What was kept of it with a release.
    pub(super) fn recorded(record: &v1::BarrierRecord) -> Self {
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

impl Job {
    pub(super) fn agree_step(
        &mut self,
        context: &mut Context<'_>,
        ticket: Ticket,
        mut request: v1::AgreeStepRequest,
    ) -> Result<Option<Reply>, Refusal> {
        let identity = request.identity.take();
        let (key, timeout_ms) = (request.arrival, request.timeout_ms);
        let call = Call {
            identity: identity.as_ref(),
            name: AGREEMENT,
            key,
            timeout_ms,
            alike: "",
            offer: Some(Offer::of(request)?),
        };
        self.arrive(context, ticket, call)
    }
}
