//! How many states are tried, which, and by how many threads.
//!
//! | variable             | meaning                                                             |
//! |----------------------|---------------------------------------------------------------------|
//! | `DTR_TORTURE_STATES` | states to try in each test instead of its short budget              |
//! | `DTR_TORTURE_FIRST`  | number of the first one, 0 if unset: where an earlier run ended     |
//!
//! Always holds: the number alone decides what a state is; every thread has a directory of its own.

use std::collections::HashSet;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// The numbers of the states to try.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Budget {
    pub(crate) first: u64,
    pub(crate) states: u64,
}

impl Budget {
    /// The short budget, or what the environment says.
    pub(crate) fn of(short: u64) -> Self {
        let number = |name: &str| {
            let text = std::env::var(name).ok()?;
            let parsed = text.parse().ok();
            Some(parsed.unwrap_or_else(|| panic!("{name} = `{text}`: a whole number is expected")))
        };
        Self {
            first: number("DTR_TORTURE_FIRST").unwrap_or(0),
            states: number("DTR_TORTURE_STATES").unwrap_or(short),
        }
    }
}

/// What came of the states of a [`Budget`].
#[derive(Debug)]
pub(crate) struct Outcome {
    /// States that were tried, all different.
    pub(crate) tried: u64,
    /// Numbers that led to a state that had been tried already.
    pub(crate) alike: u64,
    /// Where the next run begins.
    pub(crate) next: u64,
}

/// Tries states on all cores until `budget.states` different ones are through, or none is left
/// below `end`. `start` makes a thread's tools, given a scratch directory of its own; `work` tries
/// the state of a number, and says that it was tried before (false), or what is wrong with it.
///
/// # Panics
///
/// With what `work` found wrong first.
pub(crate) fn run<T>(
    budget: Budget,
    end: u64,
    start: impl Fn(&Path) -> T + Sync,
    work: impl Fn(&mut T, u64) -> Result<bool, String> + Sync,
) -> Outcome {
    // Every engine maps memory of its own, and clearing 2 MiB for each of a few buffers of 64 KiB
    // takes longer than all else. The kernel may not know the setting, which only costs time.
    let _ = rustix::thread::disable_transparent_huge_pages(true);
    let counts = Counts { next: AtomicU64::new(budget.first), ..Counts::default() };
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let failures: Vec<String> = std::thread::scope(|scope| {
        let attend = || {
            let directory = scratch();
            let mut tools = start(directory.path());
            while let Some(number) = counts.take(budget, end) {
                match work(&mut tools, number) {
                    Ok(is_new) => counts.book(is_new),
                    Err(why) => {
                        counts.failed.store(true, Ordering::Relaxed);
                        return Some(why);
                    }
                }
            }
            None
        };
        let threads: Vec<_> = (0..threads).map(|_| scope.spawn(attend)).collect();
        threads.into_iter().filter_map(|thread| thread.join().unwrap()).collect()
    });
    assert!(failures.is_empty(), "{}", failures.join("\n\n"));
    let outcome = Outcome {
        tried: counts.taken.into_inner(),
        alike: counts.alike.into_inner(),
        next: counts.next.into_inner(),
    };
    report(&outcome, end);
    outcome
}

/// Says what was done in the words that `tests/torture/torture.py` reads.
fn report(outcome: &Outcome, end: u64) {
    let Outcome { tried, next, .. } = outcome;
    if end == u64::MAX {
        println!("torture: tried {tried}, next {next}");
    } else {
        println!("torture: tried {tried}, next {next}, end {end}");
    }
}

/// What the threads of a run share.
#[derive(Debug, Default)]
struct Counts {
    next: AtomicU64,
    /// Taken, less those that turned out to be tried already: the threads together keep to the
    /// budget.
    taken: AtomicU64,
    alike: AtomicU64,
    failed: AtomicBool,
}

impl Counts {
    fn take(&self, budget: Budget, end: u64) -> Option<u64> {
        if self.failed.load(Ordering::Relaxed) {
            return None;
        }
        if self.taken.fetch_add(1, Ordering::Relaxed) < budget.states {
            let number = self.next.fetch_add(1, Ordering::Relaxed);
            if number < end {
                return Some(number);
            }
            self.next.fetch_sub(1, Ordering::Relaxed);
        }
        self.taken.fetch_sub(1, Ordering::Relaxed);
        None
    }

    fn book(&self, is_new: bool) {
        if !is_new {
            self.taken.fetch_sub(1, Ordering::Relaxed);
            self.alike.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Fingerprints of the states that were tried.
#[derive(Debug, Default)]
pub(crate) struct Seen(Mutex<HashSet<u64>>);

impl Seen {
    /// Whether this state is a new one.
    pub(crate) fn is_new(&self, fingerprint: u64) -> bool {
        self.0.lock().unwrap().insert(fingerprint)
    }
}

/// A scratch directory in memory where there is such a place, for nothing here needs a device.
pub(crate) fn scratch() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm")
        .or_else(|_| tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")))
        .unwrap()
}
