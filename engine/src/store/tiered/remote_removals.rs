//! What retention deletes, removed from the remote store in its order ([`super::removals`]).
//!
//! Always holds:
//! - A checkpoint that retires another is removed after it.
//! - One thread at a time removes; a step that is committed again is not removed any more. Of one
//!   that is on its way, the removal waits until that has arrived or was given up.
//! - Rank 0 removes for all; another rank only takes back what it published of a step that a rewind
//!   has retired.
//! - A removal that failed is still to be done.

use super::queue::Queue;
use super::removals::Removal;
use super::uploader::caught;
use super::work::Work;
use crate::format::names::{AttemptId, MANIFEST_FILE, parse_shard_file};
use crate::store::Space;
use crate::store_copy::standing;
use crate::sync::{unpoisoned, wait_while};
use crate::{EngineError, Result};

impl Work {
    /// The attempt whose manifest is in the local store, if a rewind retired it and its manifest
    /// may have been put into the remote store by this process, after rank 0 had been there: it
    /// would stand again once what retired it is gone. Any other step that comes late does no harm,
    /// and is rank 0's to remove, which alone knows that what it retired is gone.
    pub(super) fn to_take_back(&self, step: u64) -> Option<AttemptId> {
        let may_be = !self.removes_for_all() && self.lock().may_have_published_retired(step);
        may_be.then(|| standing(self.local.as_ref(), step).ok().flatten()).flatten()
    }

    /// Removes a step from the remote store, behind; `attempt` was in the local store and was [to
    /// be taken back][Self::to_take_back]. Returns what is to be done for that, if anything.
    pub(super) fn remove_behind(&self, step: u64, attempt: Option<AttemptId>) -> Option<Removal> {
        self.view.forget(step);
        let removal = if self.removes_for_all() {
            Some(Removal::Checkpoint(step))
        } else {
            attempt.map(|attempt| Removal::Attempt(step, attempt))
        };
        self.asked(removal)
    }

    fn asked(&self, removal: Option<Removal>) -> Option<Removal> {
        if let Some(removal) = &removal {
            self.change(|queue| queue.remove(removal.clone()));
        }
        removal
    }

    /// Removes a file that no manifest names from the remote store, behind. Returns what is to be
    /// done for that, if anything.
    pub(super) fn remove_orphan_behind(&self, step: u64, file: &str) -> Option<Removal> {
        self.view.forget_file(step, file);
        self.asked(self.removes_for_all().then(|| Removal::Orphan(step, file.into())))
    }

    /// Waits for a removal where that is asked for. Returns the bytes freed by then.
    pub(super) fn follow(&self, asked: Option<Removal>, space: Space) -> Result<u64> {
        match (asked, space) {
            (Some(removal), Space::Now) => self.remove_now(&removal),
            (None, _) | (_, Space::Later) => Ok(0),
        }
    }

    /// Carries a removal out that waits, and those before it that it waits for. Returns the bytes
    /// freed.
    fn remove_now(&self, wanted: &Removal) -> Result<u64> {
        let _turn = unpoisoned(self.removing.lock());
        let mut freed_bytes = 0;
        while let Some(removed) = self.remove_next(Some(wanted)) {
            freed_bytes += removed?;
        }
        if self.lock().is_set_aside(wanted) {
            return Err(EngineError::Unavailable {
                what: format!("removing what was let go from `{}`", self.remote.location()),
                why: "a removal that has to come first has failed".into(),
                hint: "it is tried again behind the training, and by whoever opens the store next"
                    .into(),
            });
        }
        // Or another thread carried it out.
        Ok(freed_bytes)
    }

    /// Tries the removal whose turn it is, or that has to be done next for `wanted`.
    fn remove_next(&self, wanted: Option<&Removal>) -> Option<Result<u64>> {
        let removal = self.begin_removal(wanted)?;
        let removed = caught("removing a checkpoint", || self.remove(&removal));
        self.change(|queue| queue.end_removal(&removal, removed.is_ok()));
        Some(removed)
    }

    fn begin_removal(&self, wanted: Option<&Removal>) -> Option<Removal> {
        // What is on its way has arrived by then, or was given up.
        let is_blocked = |queue: &mut Queue| queue.is_removal_blocked(wanted);
        wait_while(&self.changed, self.lock(), None, is_blocked).begin_removal(wanted)
    }

    fn remove(&self, removal: &Removal) -> Result<u64> {
        if let Some(step) = removal.guarded_step()
            && self.change(|queue| queue.take_unfinished(step))
        {
            self.give_up_uploads(step);
        }
        match removal {
            Removal::Checkpoint(step) => {
                // Whatever stands there: this process puts nothing in its place meanwhile.
                let freed_bytes = self.remote.remove_checkpoint(*step, None, Space::Now)?;
                // What is left there is nobody's any more, and goes after the grace period; a
                // manifest that another rank put there since is taken back by that one.
                self.view.note(self.remote.as_ref(), *step);
                self.view.forget_file(*step, MANIFEST_FILE);
                Ok(freed_bytes)
            }
            Removal::Attempt(step, attempt) => {
                self.remote.remove_checkpoint(*step, Some(*attempt), Space::Now)
            }
            Removal::Orphan(step, file) => {
                let freed_bytes = self.remote.remove_orphan(*step, file, Space::Now)?;
                Ok(freed_bytes.unwrap_or(0))
            }
        }
    }

    /// Gives up what this process began to upload of a step that is not wanted any more: nobody
    /// goes on with it, and the parts that arrived take space that no listing shows.
    pub(super) fn give_up_uploads(&self, step: u64) {
        let is_own = |file: &str| {
            let rank = parse_shard_file(file).map(|(rank, _)| rank);
            self.share.is_none_or(|share| rank == Some(share.rank))
        };
        let given_up = self.remote.unfinished_uploads(Some(step)).and_then(|uploads| {
            uploads
                .iter()
                .filter(|upload| is_own(&upload.file))
                .try_for_each(|upload| self.remote.abort_upload(upload).map(drop))
        });
        if let Err(error) = given_up {
            tracing::info!(step, %error, "an upload that is not wanted any more may be left");
            self.change(|queue| queue.note_unfinished(step));
        }
    }

    /// Tries what waits to be removed, until one fails.
    pub(super) fn removes_what_waits(&self) {
        if !self.lock().removes(self.now()) {
            return;
        }
        let _turn = unpoisoned(self.removing.lock());
        while let Some(removed) = self.remove_next(None) {
            let Err(error) = removed else { continue };
            let left = self.change(|queue| queue.put_removals_off(self.now()));
            tracing::warn!(%error, left, "removing from the far store failed, to be tried again");
            return;
        }
    }
}
