//! Syncing a shard while it is being written, so that the last sync, which everybody waits for, is
//! short.
//!
//! Many devices take bytes into a cache of their own faster than they store them, and store most of
//! them only when they are asked to sync. Asked early, they do so beside the writes instead of
//! after. While a state larger than the staging arena still streams through it, nothing is synced:
//! the training waits for the next buffer then, and the cache is what makes that short.
//!
//! Always holds: one thread for one shard, which is gone before the shard is finished or deleted; a
//! sync that fails fails the shard, and is the last one.

use std::sync::Arc;
use std::thread::JoinHandle;

use super::flight::Flight;
use crate::Result;
use crate::error::IoContext;
use crate::io::{File, Io};

/// How often, in flights: 64 MiB with the default setting of 32 MiB in flight. Fewer bytes make a
/// sync's own cost felt, more leave a longer rest for the end.
const FLIGHTS_PER_SYNC: u64 = 2;

/// The thread that syncs.
#[derive(Debug)]
pub(super) struct EarlySync(JoinHandle<()>);

impl EarlySync {
    /// Syncs `file` every now and then until `flight` ends; a shard of few bytes needs none.
    pub(super) fn start(
        io: &Arc<dyn Io>,
        file: &Arc<File>,
        flight: &Arc<Flight>,
        expected_bytes: u64,
    ) -> Result<Option<Self>> {
        let every_bytes = flight.bytes_max().saturating_mul(FLIGHTS_PER_SYNC);
        if expected_bytes < every_bytes.saturating_mul(2) {
            return Ok(None);
        }
        let (io, file, flight) = (Arc::clone(io), Arc::clone(file), Arc::clone(flight));
        let path = file.path.clone();
        std::thread::Builder::new()
            .name("dtr-early-sync".into())
            .spawn(move || sync_until_ended(&*io, &file, &flight, every_bytes))
            .map(|thread| Some(Self(thread)))
            .context("starting a thread for syncing", &path)
    }

    /// Waits for the thread, once nothing more is in flight.
    pub(super) fn end(self, flight: &Flight) {
        flight.end();
        // It only waits and syncs; a panic of the two would be the store's, and fails the shard.
        if self.0.join().is_err() {
            let what = "syncing a shard early";
            flight.fail(crate::EngineError::internal(what, "the thread panicked"));
        }
    }

    /// In a forked child, where the thread does not exist.
    pub(super) fn forget(self) {
        std::mem::forget(self);
    }
}

pub(super) fn sync_until_ended(io: &dyn Io, file: &File, flight: &Flight, every_bytes: u64) {
    while flight.wait_for_landed(every_bytes) {
        let _span = tracing::trace_span!("early_sync").entered();
        let synced = flight.flow().time_sync(|| io.sync(file));
        if let Err(error) = synced.context("syncing", &file.path) {
            flight.fail(error);
        }
    }
}
