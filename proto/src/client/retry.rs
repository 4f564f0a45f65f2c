//! Whether to ask again, and how long to wait before: pure.
//!
//! Always holds: only a coordinator that does not answer is asked again, and for no longer at a
//! time than the caller's patience; pauses grow to a limit, and differ from worker to worker.

use std::time::Duration;

use super::connection::{CONNECT, KEEPALIVE};
use super::error::ErrorKind;

/// Calls in a row that run out of time before the connection is made again.
const MISSES_MAX: u32 = 2;
const FIRST: Duration = Duration::from_millis(100);
const LONGEST: Duration = Duration::from_secs(5);

/// A call that failed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Failed {
    pub(crate) kind: ErrorKind,
    /// One try is all there is.
    pub(crate) is_only_try: bool,
    /// It waited for other workers: an answer may take any time.
    pub(crate) is_long: bool,
    /// How long this try took.
    pub(crate) took: Duration,
    /// Tries in a row that failed before it.
    pub(crate) failures: u32,
    /// How long ago the first of them was sent, and how long that may be.
    pub(crate) away: Duration,
    pub(crate) patience: Duration,
}

/// What follows a call that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// Its error is its caller's.
    Fail,
    /// It is sent again.
    Again {
        /// Tries in a row that have failed, this one included.
        failures: u32,
        /// The coordinator answered meanwhile: it is away only since now.
        was_there: bool,
        /// The connection is made again before.
        renews: bool,
    },
}

/// Whether a call is sent again: the coordinator may be away for as long as patience lasts, each
/// time that it goes away.
pub(crate) fn next(failed: Failed) -> Next {
    let Failed { kind, is_only_try, is_long, took, failures, away, patience } = failed;
    if kind != ErrorKind::Unavailable || is_only_try {
        return Next::Fail;
    }
    // A coordinator that does not answer is noticed sooner: while the connection is made, or by
    // keep-alive. An answer that is due at once says nothing by being late. Until a wait for others
    // fails for the first time, the coordinator was there.
    let was_there = is_long && (failures == 0 || took > CONNECT + KEEPALIVE.0 + KEEPALIVE.1);
    let (failures, away) = if was_there { (0, Duration::ZERO) } else { (failures, away) };
    if away >= patience {
        return Next::Fail;
    }
    let failures = failures + 1;
    Next::Again { failures, was_there, renews: failures > MISSES_MAX }
}

/// The pause after the `failures`-th failure in a row, counted from 1. `chance` is a random number:
/// workers that lost the same coordinator do not come back at the same moment.
pub(crate) fn pause(failures: u32, chance: u64) -> Duration {
    let doubled = FIRST.saturating_mul(1 << failures.saturating_sub(1).min(16));
    let whole = doubled.min(LONGEST);
    // Between half of it and all of it.
    let percent = u32::try_from(50 + chance % 51).unwrap_or(100);
    whole * percent / 100
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_one_that_is_away_is_asked_again_and_within_patience() {
        let quick = Duration::from_millis(1);
        let noticed = CONNECT + KEEPALIVE.0 + KEEPALIVE.1;
        let long = noticed + quick;
        let patience = Duration::from_secs(30);
        let failed = Failed {
            kind: ErrorKind::Unavailable,
            is_only_try: false,
            is_long: true,
            took: quick,
            failures: 0,
            away: quick,
            patience,
        };
        let again = |failures, was_there, renews| Next::Again { failures, was_there, renews };
        for (case, failed, expected) in [
            ("the first time", failed, again(1, true, false)),
            ("the first time", Failed { is_long: false, ..failed }, again(1, false, false)),
            (
                "others were long in coming",
                Failed { away: patience, ..failed },
                again(1, true, false),
            ),
            ("the second", Failed { failures: 1, ..failed }, again(2, false, false)),
            ("the third", Failed { failures: 2, ..failed }, again(3, false, true)),
            ("an answer", Failed { kind: ErrorKind::Conflict, ..failed }, Next::Fail),
            ("a refusal", Failed { kind: ErrorKind::Fenced, ..failed }, Next::Fail),
            ("one try", Failed { is_only_try: true, ..failed }, Next::Fail),
            ("patience ends", Failed { failures: 9, away: patience, ..failed }, Next::Fail),
            (
                "it was there meanwhile",
                Failed { took: long, failures: 9, away: 2 * patience, ..failed },
                again(1, true, false),
            ),
            (
                "it took connections, and answered nothing",
                Failed { took: noticed, failures: 9, away: 2 * patience, ..failed },
                Next::Fail,
            ),
            (
                "what is due at once is late",
                Failed { is_long: false, took: long, failures: 2, ..failed },
                again(3, false, true),
            ),
            ("no patience", Failed { patience: Duration::ZERO, ..failed }, Next::Fail),
            ("no patience", Failed { took: long, patience: Duration::ZERO, ..failed }, Next::Fail),
        ] {
            assert_eq!(next(failed), expected, "{case}");
        }
    }

    #[test]
    fn pauses_grow_to_a_limit() {
        assert_eq!(pause(1, 50), Duration::from_millis(100));
        assert_eq!(pause(3, 50), Duration::from_millis(400));
        assert_eq!(pause(1_000, 50), LONGEST);
        assert_eq!(pause(1_000, 0), LONGEST / 2);
    }
}
