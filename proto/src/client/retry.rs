//! How long to wait before asking again: pure.

use std::time::Duration;

const FIRST: Duration = Duration::from_millis(100);
const LONGEST: Duration = Duration::from_secs(5);

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
    fn pauses_grow_to_a_limit() {
        assert_eq!(pause(1, 50), Duration::from_millis(100));
        assert_eq!(pause(3, 50), Duration::from_millis(400));
        assert_eq!(pause(1_000, 50), LONGEST);
        assert_eq!(pause(1_000, 0), LONGEST / 2);
    }
}
