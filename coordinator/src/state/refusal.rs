//! Why a call is not done, and what its caller can do about it.

use std::fmt;

/// A call that changed nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// What the caller does next depends on it.
    pub kind: RefusalKind,
    /// Why: expected against actual.
    pub why: String,
    /// How to go on.
    pub hint: String,
}

/// What the caller does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RefusalKind {
    /// Fix the call.
    Invalid,
    /// Fix the name.
    NotFound,
    /// Wait and ask again, or end what stands in the way.
    Conflict,
    /// Register again: the caller is no member of the job any more.
    Fenced,
    /// Look at the membership, then ask again: it lost somebody since the caller's epoch.
    StaleEpoch,
    /// End: the job is aborted.
    JobAborted,
    /// Save a later step.
    AlreadyCommitted,
    /// Save again: this attempt was given up.
    AttemptAborted,
    /// Report the shard again: reports were lost with a restart of the coordinator.
    Incomplete,
}

impl RefusalKind {
    /// The name that crosses the wire.
    pub fn name(self) -> &'static str {
        match self {
            Self::Invalid => "invalid",
            Self::NotFound => "not-found",
            Self::Conflict => "conflict",
            Self::Fenced => "fenced",
            Self::StaleEpoch => "stale-epoch",
            Self::JobAborted => "job-aborted",
            Self::AlreadyCommitted => "already-committed",
            Self::AttemptAborted => "attempt-aborted",
            Self::Incomplete => "incomplete",
        }
    }
}

impl Refusal {
    pub(crate) fn new(kind: RefusalKind, why: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { kind, why: why.into(), hint: hint.into() }
    }

    /// The caller is nobody here.
    pub(crate) fn unregistered(job: &str) -> Self {
        Self::new(
            RefusalKind::Fenced,
            format!("the worker is not registered in job `{job}`"),
            "register it: `await orchestrator.register_worker(ip, port)`",
        )
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}\nhint: {}", self.why, self.hint)
    }
}
