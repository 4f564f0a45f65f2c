//! Why a call is not done, and what its caller can do about it.

use std::fmt;

pub use dtr_proto::refusal::RefusalKind;

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
