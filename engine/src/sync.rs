//! Locks, condition variables and atomics of the synchronisation that is written by hand, so that
//! loom can try every order of its steps.
//!
//! ```text
//! cargo build               std's own types, under the names they have there
//! RUSTFLAGS="--cfg loom"    loom's: each step is a point where another thread may go on
//! ```
//!
//! Always holds: without `cfg(loom)` the types are std's. With it, only tests whose
//! path holds `models` can run: loom's types know no thread that loom did not start. Reference
//! counts stay std's: what is shared is not what is checked.

use std::sync::{LockResult, PoisonError};
use std::time::Duration;

#[cfg(not(loom))]
pub(crate) use std::sync::{Condvar, Mutex, MutexGuard, atomic};

#[cfg(loom)]
pub(crate) use self::checked::Condvar;
#[cfg(loom)]
pub(crate) use loom::sync::{Mutex, MutexGuard, atomic};

/// The guard, or the value, also after a thread panicked while it held the lock: what is done under
/// a lock in this project leaves what it guards whole wherever it ends.
pub fn unpoisoned<T>(result: LockResult<T>) -> T {
    result.unwrap_or_else(PoisonError::into_inner)
}

/// Waits, at most `timeout`, while `condition` holds; whether it still does is for the guard to
/// show.
pub(crate) fn wait_while<'a, T>(
    changed: &Condvar,
    guard: MutexGuard<'a, T>,
    timeout: Option<Duration>,
    condition: impl FnMut(&mut T) -> bool,
) -> MutexGuard<'a, T> {
    match timeout {
        None => unpoisoned(changed.wait_while(guard, condition)),
        Some(timeout) => unpoisoned(changed.wait_timeout_while(guard, timeout, condition)).0,
    }
}

#[cfg(loom)]
mod checked {
    //! What loom's condition variable lacks, as std documents it.

    use std::sync::{LockResult, PoisonError};
    use std::time::Duration;

    use loom::sync::MutexGuard;

    /// loom's condition variable with std's conveniences.
    #[derive(Debug, Default)]
    pub(crate) struct Condvar(loom::sync::Condvar);

    impl Condvar {
        pub(crate) fn new() -> Self {
            Self(loom::sync::Condvar::new())
        }

        pub(crate) fn notify_one(&self) {
            self.0.notify_one();
        }

        pub(crate) fn notify_all(&self) {
            self.0.notify_all();
        }

        pub(crate) fn wait<'a, T>(
            &self,
            guard: MutexGuard<'a, T>,
        ) -> LockResult<MutexGuard<'a, T>> {
            self.0.wait(guard)
        }

        pub(crate) fn wait_while<'a, T>(
            &self,
            mut guard: MutexGuard<'a, T>,
            mut condition: impl FnMut(&mut T) -> bool,
        ) -> LockResult<MutexGuard<'a, T>> {
            while condition(&mut guard) {
                guard = self.0.wait(guard)?;
            }
            Ok(guard)
        }

        /// loom has no clock: the time never runs out.
        pub(crate) fn wait_timeout<'a, T>(
            &self,
            guard: MutexGuard<'a, T>,
            _timeout: Duration,
        ) -> LockResult<(MutexGuard<'a, T>, bool)> {
            Self::never_timed_out(self.wait(guard))
        }

        /// loom has no clock: the time never runs out.
        pub(crate) fn wait_timeout_while<'a, T>(
            &self,
            guard: MutexGuard<'a, T>,
            _timeout: Duration,
            condition: impl FnMut(&mut T) -> bool,
        ) -> LockResult<(MutexGuard<'a, T>, bool)> {
            Self::never_timed_out(self.wait_while(guard, condition))
        }

        fn never_timed_out<G>(waited: LockResult<G>) -> LockResult<(G, bool)> {
            let guard = |poisoned: PoisonError<G>| (poisoned.into_inner(), false);
            waited.map(|guard| (guard, false)).map_err(|poisoned| PoisonError::new(guard(poisoned)))
        }
    }
}
