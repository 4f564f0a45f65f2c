//! Uploading checkpoints to a remote store, behind the training: what the engine asks of it.
//!
//! Always holds: only a store that has a remote one behind it, and is open for writing, has
//! uploads; a step waits from [`Uploads::add`] until it has arrived, failed for good, or was
//! deleted.

use std::time::Duration;

use crate::store_copy::Transferred;
use crate::{EngineError, Result};

/// The uploads of a store; see [`Store::uploads`](super::Store::uploads).
pub(crate) trait Uploads: Send + Sync {
    /// `step` is committed, wherever that is decided: the remote store gets it from now
    /// on.
    fn add(&self, step: u64);

    /// Whether retention may take a checkpoint: not while it waits for its upload, nor if that
    /// failed for good.
    fn may_remove(&self, step: u64) -> bool;

    /// Steps that are whole in the remote store, ascending: retention keeps the newest of them
    /// until a newer one has arrived, so that a machine that is lost does not take all with it.
    fn arrived(&self) -> Vec<u64>;

    /// What came of the upload of a step; `None` if it has not ended within `timeout`.
    fn wait_for(&self, step: u64, timeout: Option<Duration>) -> Option<Result<Transferred>>;

    /// Checkpoints that are not in the remote store yet, by ascending step.
    fn pending(&self) -> Vec<PendingUpload>;

    /// Why the newest of the checkpoints is not in the remote store whose upload has failed and is
    /// not tried again; `None` where there is none.
    fn failed(&self) -> Option<EngineError>;

    /// Waits, at most so long, until everything was uploaded to the remote store, or has failed
    /// once more; true if it has. From the first call on nothing is tried more than once, until one
    /// has seen the end.
    fn drain(&self, timeout: Option<Duration>) -> bool;

    /// Begins no upload any more, and ends what is under way: the next writer goes on with it.
    fn stop(&self);
}

/// A checkpoint that is still to be uploaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PendingUpload {
    /// The step.
    pub step: u64,
    /// Bytes that have gone so far in this try, or were there already.
    pub uploaded_bytes: u64,
    /// Bytes of the shards that this process uploads.
    pub total_bytes: u64,
}
