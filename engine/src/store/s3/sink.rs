//! Writing a shard: parts go as they fill, several at a time.
//!
//! ```text
//! new ----> Writing --finish--> Finished --drop--> the object stays
//!              |                    |
//!              |                    +--abandon--> deleted, unless a manifest may name it
//!              +--abandon, drop--> the upload is given up
//! ```
//!
//! Always holds:
//! - A shard that fits one part is put in one piece; nothing is begun at the service before.
//! - Memory is bounded: parts in flight by the setting, those being put together by what the pools
//!   and workers hold. A buffer goes back when its part has arrived.
//! - The first failure is kept and is the answer to every later call.

use std::collections::BTreeMap;
use std::sync::Arc;

use tokio::task::AbortHandle;

use super::flight::{Flight, Landing, Outcome, Widening};
use super::parts::{Assembly, Part, Segment, part_bytes};
use super::uploads::{Arrived, Upload, Whole};
use super::{Shared, publish};
use crate::format::names::shard_file_name;
use crate::store::flow::Flow;
use crate::store::{Piece, ShardId, ShardSink, ShardSize, TransferFigures};
use crate::{EngineError, Result};

/// Parts that may be in flight if they had to be larger than the setting says, where the line takes
/// them.
const RAISED_PARTS_AT_ONCE: u64 = 4;

/// A shard that is being written.
#[derive(Debug)]
pub(super) struct S3ShardSink {
    shared: Arc<Shared>,
    id: ShardId,
    key: String,
    assembly: Assembly,
    upload: Option<Arc<Upload>>,
    flight: Arc<Flight>,
    tasks: Vec<AbortHandle>,
    phase: Phase,
    /// Whether an earlier process may have begun it, and a later one may go on.
    resumes: bool,
    /// Whether a later one would find the upload.
    is_found_again: bool,
    /// Parts that were there before.
    there: BTreeMap<u32, Arrived>,
    resumed_parts: u64,
    sent_bytes: u64,
    resumed_bytes: u64,
    /// Repetitions of requests before this shard.
    retries_before: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Bytes are accepted; nobody else knows of the object.
    Writing,
    /// The object exists, whole; a manifest may name it.
    Finished,
    /// The object is deleted, or left for good.
    Settled,
}

impl S3ShardSink {
    pub(super) fn new(
        shared: &Arc<Shared>,
        id: ShardId,
        size: ShardSize,
        flow: &Arc<Flow>,
    ) -> Self {
        let file = shard_file_name(id.rank, id.attempt);
        shared.own().live.insert((id.step, file));
        let settings = &shared.client.settings;
        let part_bytes = part_bytes(settings.part_bytes, size.most_bytes);
        // Of a shard whose parts are large because 10,000 have to do, several go at once, too.
        let least_bytes =
            if part_bytes > settings.part_bytes { RAISED_PARTS_AT_ONCE * part_bytes } else { 0 };
        let in_flight_bytes = settings.in_flight_bytes.max(least_bytes);
        Self {
            shared: Arc::clone(shared),
            id,
            key: shared.shard_key(id),
            assembly: Assembly::new(part_bytes),
            upload: None,
            flight: Arc::new(Flight::new(
                Widening::new(in_flight_bytes, shared.client.attempt_timeout()),
                Arc::clone(flow),
            )),
            tasks: Vec::new(),
            phase: Phase::Writing,
            resumes: false,
            is_found_again: true,
            there: BTreeMap::new(),
            resumed_parts: 0,
            sent_bytes: 0,
            resumed_bytes: 0,
            retries_before: shared.client.watch.retries(),
        }
    }

    /// Goes on where an earlier process broke off.
    pub(super) fn resuming(
        shared: &Arc<Shared>,
        id: ShardId,
        size: ShardSize,
        flow: &Arc<Flow>,
    ) -> Self {
        let mut sink = Self::new(shared, id, size, flow);
        sink.resumes = true;
        sink
    }

    /// Starts uploading a part, which waits while too much is in flight.
    fn send(&mut self, part: Part) -> Result<()> {
        let upload = self.upload()?;
        let there = self.there.get(&part.number).and_then(|there| there.as_completed(&part));
        self.flight.start(part.bytes)?;
        if let Some(completed) = there {
            self.resumed_parts += 1;
            self.resumed_bytes += part.bytes;
            self.flight.land(part.number, part.bytes, Outcome::Part(completed));
            return Ok(());
        }
        self.sent_bytes += part.bytes;
        let (shared, flight) = (Arc::clone(&self.shared), Arc::clone(&self.flight));
        let mut landing = Landing::of(&flight, &part);
        let task = self.shared.client.spawn(async move {
            landing.outcome = match shared.put_part(&upload, &part).await {
                Ok(completed) => Outcome::Part(completed),
                Err(failure) => {
                    let doing = format!("uploading part {} of", part.number);
                    let what = shared.naming(&doing, &upload.key);
                    Outcome::Failed(shared.refused(&what, failure))
                }
            };
            // The buffers first: a thread that waits for memory need not wait for the bookkeeping.
            drop(part);
            drop(landing);
        });
        self.tasks.retain(|task| !task.is_finished());
        self.tasks.push(task);
        Ok(())
    }

    fn upload(&mut self) -> Result<Arc<Upload>> {
        if let Some(upload) = &self.upload {
            return Ok(Arc::clone(upload));
        }
        if let Some(upload) = self.find_upload() {
            self.upload = Some(Arc::clone(&upload));
            return Ok(upload);
        }
        let what = self.shared.naming("beginning the upload of", &self.key);
        let begun = self.shared.ask(&what, self.shared.begin_upload(&self.key));
        let upload = Arc::new(self.keep_failure(begun)?);
        self.upload = Some(Arc::clone(&upload));
        Ok(upload)
    }

    /// The upload that an earlier process began. One that cannot be looked for is begun again.
    fn find_upload(&mut self) -> Option<Arc<Upload>> {
        if !self.resumes {
            return None;
        }
        match self.shared.client.block_on(self.shared.find_upload(&self.key)) {
            Ok(found) => {
                let (upload, there) = found?;
                tracing::info!(key = self.key, parts = there.len(), "an upload is resumed");
                self.there = there;
                Some(Arc::new(upload))
            }
            Err(failure) => {
                tracing::warn!(
                    key = self.key,
                    ?failure,
                    "uploads that were begun cannot be listed: every part is sent, and none is \
                     kept if this fails"
                );
                self.is_found_again = false;
                None
            }
        }
    }

    fn put_whole(&mut self, part: &Part) -> Result<()> {
        self.flight.start(part.bytes)?;
        self.sent_bytes += part.bytes;
        let what = self.shared.naming("writing", &self.key);
        let put = self.shared.ask(&what, self.shared.put_whole(&self.key, part));
        let failure = put.as_ref().err().map(EngineError::duplicate);
        let outcome = failure.map_or(Outcome::Whole, Outcome::Failed);
        self.flight.land(part.number, part.bytes, outcome);
        put
    }

    fn complete(&self, upload: &Upload, file_bytes: u64) -> Result<()> {
        self.flight.wait_until_landed();
        let parts = self.flight.parts()?;
        let whole = Whole { bytes: file_bytes, crc32c: self.assembly.crc32c() };
        let what = self.shared.naming("completing the upload of", &self.key);
        self.shared.ask(&what, self.shared.complete(upload, parts, whole))
    }

    fn keep_failure<T>(&self, result: Result<T>) -> Result<T> {
        if let Err(error) = &result {
            self.flight.fail(error.duplicate());
        }
        result
    }

    /// Ends what is under way, then gives the upload up or deletes the object. What stays behind is
    /// logged.
    fn discard(&mut self) {
        for task in self.tasks.drain(..) {
            task.abort();
        }
        self.flight.wait_until_landed();
        let was_finished = self.phase == Phase::Finished;
        self.phase = Phase::Settled;
        let shared = &self.shared;
        let outcome = match &self.upload {
            Some(_) if !was_finished && self.resumes && self.is_found_again => {
                tracing::info!(key = self.key, "an upload is kept, to be resumed");
                Ok(())
            }
            Some(upload) if !was_finished => {
                shared.client.block_on(shared.abort(&self.key, &upload.id))
            }
            // Another process that uploads the same attempt may have published it.
            _ if self.resumes => {
                tracing::info!(key = self.key, "an object is kept, for whoever brings it, too");
                Ok(())
            }
            _ if was_finished || self.flight.has_begun() => {
                shared.client.block_on(shared.delete(&self.key))
            }
            _ => Ok(()),
        };
        if let Err(failure) = outcome {
            tracing::warn!(key = self.key, ?failure, "an abandoned shard stays behind");
        }
    }
}

impl ShardSink for S3ShardSink {
    fn write(&mut self, offset: u64, piece: Piece) -> Result<()> {
        self.shared.check_process("writing a shard")?;
        if self.phase != Phase::Writing {
            return Err(EngineError::internal("writing a shard", "it is finished already"));
        }
        self.flight.check()?;
        for part in self.assembly.add(offset, Segment::of(piece)) {
            self.send(part)?;
        }
        Ok(())
    }

    fn finish(&mut self, file_bytes: u64) -> Result<()> {
        self.shared.check_process("finishing a shard")?;
        if self.phase != Phase::Writing {
            return Err(EngineError::internal("finishing a shard", "it is finished already"));
        }
        let closed = self.assembly.close(file_bytes);
        let last = self.keep_failure(closed)?;
        let finished = match (self.upload.clone(), last) {
            (None, Some(part)) => self.put_whole(&part),
            (Some(upload), last) => last
                .map_or(Ok(()), |part| self.send(part))
                .and_then(|()| self.complete(&upload, file_bytes)),
            (None, None) => Err(EngineError::internal("finishing a shard", "nothing was written")),
        };
        self.keep_failure(finished)?;
        self.phase = Phase::Finished;
        Ok(())
    }

    fn figures(&self) -> TransferFigures {
        TransferFigures {
            parts: self.flight.landed(),
            resumed_parts: self.resumed_parts,
            sent_bytes: self.sent_bytes,
            resumed_bytes: self.resumed_bytes,
            retries: self.shared.client.watch.retries().saturating_sub(self.retries_before),
        }
    }

    fn abandon(mut self: Box<Self>) {
        if !self.shared.client.in_owner() {
            return;
        }
        if self.phase == Phase::Finished
            && publish::may_be_published(&self.shared, self.id.step, self.id.attempt)
        {
            tracing::warn!(key = self.key, "an abandoned shard stays: a manifest may name it");
            self.phase = Phase::Settled;
            return;
        }
        self.discard();
    }
}

impl Drop for S3ShardSink {
    fn drop(&mut self) {
        // A forked child has neither the object's fate nor the threads that its parts end on.
        if !self.shared.client.in_owner() {
            return;
        }
        if self.phase == Phase::Writing {
            self.discard();
        }
        let file = shard_file_name(self.id.rank, self.id.attempt);
        self.shared.own().live.remove(&(self.id.step, file));
    }
}
