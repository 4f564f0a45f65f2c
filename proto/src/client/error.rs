//! Why a call to the coordinator failed, by what its caller does next.

use std::error::Error as _;

use tonic::{Code, Status};

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
    let refusal = status.metadata().get("dtr-refusal").and_then(|value| value.to_str().ok());
    match refusal {
        Some("invalid") => return ErrorKind::Invalid,
        Some("not-found") => return ErrorKind::NotFound,
        Some("conflict") => return ErrorKind::Conflict,
        Some("fenced") => return ErrorKind::Fenced,
        Some("stale-epoch") => return ErrorKind::MembershipChanged,
        Some("job-aborted") => return ErrorKind::JobAborted,
        Some("already-committed") => return ErrorKind::AlreadyCommitted,
        Some("attempt-aborted") => return ErrorKind::AttemptAborted,
        Some("incomplete") => return ErrorKind::Incomplete,
        _ => {}
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
