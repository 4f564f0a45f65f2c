//! Why the coordinator does not do a call, as its caller's program reads it.
//!
//! Always holds: each kind has one name, and [`RefusalKind::parse`] gives the kind of every name
//! that [`RefusalKind::name`] gives, and of no other.

/// The trailer that holds a kind's name.
pub const REFUSAL_HEADER: &str = "dtr-refusal";

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
    /// Every kind.
    pub const ALL: [Self; 9] = [
        Self::Invalid,
        Self::NotFound,
        Self::Conflict,
        Self::Fenced,
        Self::StaleEpoch,
        Self::JobAborted,
        Self::AlreadyCommitted,
        Self::AttemptAborted,
        Self::Incomplete,
    ];

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

    /// The kind of this name; None for one of a later version.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_is_read_as_its_kind() {
        for kind in RefusalKind::ALL {
            assert_eq!(RefusalKind::parse(kind.name()), Some(kind));
        }
        assert_eq!(RefusalKind::parse("Fenced"), None);
        assert_eq!(RefusalKind::parse(""), None);
    }
}
