//! Why a call to the coordinator failed, by what its caller does next.
//!
//! Always holds: what the coordinator said is passed on in its own words, with its own hint; one
//! that is not reached is [`ErrorKind::Unavailable`], and named by its address.

use std::error::Error as _;

use tonic::{Code, Status};

use crate::refusal::{REFUSAL_HEADER, RefusalKind};

/// A failed call: what was done, why it failed, how to go on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientError {
    /// What the caller does next depends on it.
    pub kind: ErrorKind,
    /// The operation, and what it was done to.
    pub what: String,
    /// Expected against actual.
    pub why: String,
    /// How to go on.
    pub hint: String,
}

/// What the caller does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// Start the coordinator, or correct its address; then call again.
    Unavailable,
    /// Present the right token or certificate.
    Unauthenticated,
    /// Fix the call.
    Invalid,
    /// Fix the name.
    NotFound,
    /// Wait, or end what stands in the way.
    Conflict,
    /// Register again.
    Fenced,
    /// Look at the membership, then call again.
    MembershipChanged,
    /// End this process.
    JobAborted,
    /// Others did not come in time.
    TimedOut,
    /// Save a later step.
    AlreadyCommitted,
    /// Save again; training may go on.
    AttemptAborted,
    /// Report the shard again.
    Incomplete,
    /// Make a new object: this one was closed.
    Closed,
    /// Report a bug.
    Internal,
}

impl From<RefusalKind> for ErrorKind {
    fn from(refusal: RefusalKind) -> Self {
        match refusal {
            RefusalKind::Invalid => Self::Invalid,
            RefusalKind::NotFound => Self::NotFound,
            RefusalKind::Conflict => Self::Conflict,
            RefusalKind::Fenced => Self::Fenced,
            RefusalKind::StaleEpoch => Self::MembershipChanged,
            RefusalKind::JobAborted => Self::JobAborted,
            RefusalKind::AlreadyCommitted => Self::AlreadyCommitted,
            RefusalKind::AttemptAborted => Self::AttemptAborted,
            RefusalKind::Incomplete => Self::Incomplete,
        }
    }
}

impl std::fmt::Display for ClientError {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "{}: {}\nhint: {}", self.what, self.why, self.hint)
    }
}

impl std::error::Error for ClientError {}

impl ClientError {
    pub(crate) fn new(
        kind: ErrorKind,
        what: impl Into<String>,
        why: impl Into<String>,
        hint: impl Into<String>,
    ) -> Self {
        Self { kind, what: what.into(), why: why.into(), hint: hint.into() }
    }

    pub(crate) fn closed(what: impl Into<String>) -> Self {
        Self::new(ErrorKind::Closed, what, "it was closed", "make a new one")
    }

    /// What a status means for its caller.
    pub(crate) fn of(what: &str, url: &str, status: &Status) -> Self {
        let kind = kind_of(status);
        let (why, hint) = match status.message().split_once("\nhint: ") {
            Some((why, hint)) => (why.to_owned(), hint.to_owned()),
            None if kind == ErrorKind::Unavailable => {
                (unreachable_why(url, status), unreachable_hint(url))
            }
            None => (status.message().to_owned(), "see the coordinator's log".to_owned()),
        };
        Self { kind, what: what.to_owned(), why, hint }
    }
}

fn kind_of(status: &Status) -> ErrorKind {
    let name = status.metadata().get(REFUSAL_HEADER).and_then(|value| value.to_str().ok());
    if let Some(refusal) = name.and_then(RefusalKind::parse) {
        return refusal.into();
    }
    match status.code() {
        Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled => ErrorKind::Unavailable,
        // A connection that breaks in the middle of a call: the coordinator did not say this.
        Code::Unknown | Code::Internal if status.source().is_some() => ErrorKind::Unavailable,
        Code::Unauthenticated | Code::PermissionDenied => ErrorKind::Unauthenticated,
        Code::InvalidArgument | Code::OutOfRange | Code::ResourceExhausted => ErrorKind::Invalid,
        Code::NotFound => ErrorKind::NotFound,
        _ => ErrorKind::Internal,
    }
}

/// The innermost cause says most.
fn unreachable_why(url: &str, status: &Status) -> String {
    let mut cause = status.message().to_owned();
    let mut source = status.source();
    while let Some(inner) = source {
        cause = inner.to_string();
        source = inner.source();
    }
    format!("the coordinator at `{url}` does not answer: {cause}")
}

fn unreachable_hint(url: &str) -> String {
    let port = url.rsplit(':').next().unwrap_or_default().trim_end_matches('/');
    format!(
        "start it (`coordinator 0.0.0.0:{port}`), check COORDINATOR_URL, and that the port is open \
         between the machines"
    )
}
