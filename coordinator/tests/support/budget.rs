//! How many states a test tries, and which, in the words of `tests/torture/torture.py`.
#![expect(clippy::print_stdout, reason = "that is what it reads")]

use std::ops::Range;

/// Which of many numbered states to try: from `DTR_TORTURE_FIRST` on, 0 if unset, as many as
/// `DTR_TORTURE_STATES` says, or `short`.
pub(crate) fn budget(short: u64) -> Range<u64> {
    let number = |name: &str, default| {
        let given = std::env::var(name).ok();
        given.map_or(default, |text| text.parse().expect("a whole number"))
    };
    let first = number("DTR_TORTURE_FIRST", 0);
    first..first + number("DTR_TORTURE_STATES", short)
}

/// Says what was done in the words that `tests/torture/torture.py` reads.
pub(crate) fn tell(tried: &Range<u64>) {
    println!("torture: tried {}, next {}", tried.end - tried.start, tried.end);
}
