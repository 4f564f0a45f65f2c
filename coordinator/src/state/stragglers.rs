//! Who keeps the others waiting, for people.
//!
//! Always holds: a text says how many are missing, names [`NAMED_MAX`] of them at most, and who
//! holds each one's rank.

use dtr_proto::v1;

use super::Job;

/// Waits at a barrier that are logged, once each. The caller has a timeout that names who is
/// missing, so two are enough: one soon, and one once it is no hiccup.
pub(super) const BARRIER_AFTER_MS: [u64; 2] = [10_000, 60_000];
/// Waits for ranks that have not begun a save, logged once each. Nobody's call times out here for
/// as long as `checkpoint_timeout_ms`, an hour by default, so it is said once more.
pub(super) const SAVE_AFTER_MS: [u64; 3] = [10_000, 60_000, 600_000];
/// Ranks that a text names.
const NAMED_MAX: usize = 8;
/// Why some rank of a save may never come.
const SAVE_ALIKE: &str = "every rank calls save for the same step, as with a collective; where \
                          one rank saves alone, open its manager with `rank=0, world_size=1`";

impl Job {
    /// Ranks of the job for which this does not hold, and who holds them.
    pub(super) fn missing_of(&self, is_there: impl Fn(u32) -> bool) -> Vec<v1::MissingRank> {
        (0..self.record.world_size)
            .filter(|rank| !is_there(*rank))
            .map(|rank| v1::MissingRank {
                rank,
                worker_id: self.holders.get(&rank).cloned().unwrap_or_default(),
            })
            .collect()
    }

    /// Says who keeps the others waiting at a barrier.
    pub(super) fn barrier_text(
        &self,
        name: &str,
        missing: &[v1::MissingRank],
        waited_ms: u64,
    ) -> String {
        self.straggler_text(&format!("barrier `{}`", name.trim()), missing, waited_ms)
    }

    /// Says who has not begun a save that the others wait in, and why that may be.
    pub(super) fn save_text(
        &self,
        step: u64,
        missing: &[v1::MissingRank],
        waited_ms: u64,
    ) -> String {
        let text = self.straggler_text(&format!("the save of step {step}"), missing, waited_ms);
        format!("{text}\nhint: {SAVE_ALIKE}")
    }

    fn straggler_text(&self, what: &str, missing: &[v1::MissingRank], waited_ms: u64) -> String {
        let named: Vec<String> = missing
            .iter()
            .take(NAMED_MAX)
            .map(|m| match m.worker_id.as_str() {
                "" => format!("rank {} (nobody)", m.rank),
                worker_id => format!("rank {} (`{worker_id}`)", m.rank),
            })
            .collect();
        let more = if missing.len() > named.len() { " and others" } else { "" };
        format!(
            "{what} has waited {} for {} of {} ranks: {}{more}",
            time_text(waited_ms),
            missing.len(),
            self.record.world_size,
            named.join(", ")
        )
    }
}

/// A time as people say it: in whole seconds from one on.
fn time_text(ms: u64) -> String {
    if ms < 1_000 { format!("{ms} ms") } else { format!("{} s", ms / 1_000) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_said_in_their_unit() {
        for (ms, text) in [(0, "0 ms"), (999, "999 ms"), (1_000, "1 s"), (60_050, "60 s")] {
            assert_eq!(time_text(ms), text);
        }
    }
}
