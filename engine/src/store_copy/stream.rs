//! One shard, from one store to another: reads in flight, checked against the index, written.
//!
//! Always holds: every chunk was checked before it is given to the sink; memory is bounded by the
//! pool; a copy that is not wanted any more, or fails, leaves what it transferred to be resumed or
//! cleaned away, as the store does that.

use std::collections::VecDeque;
use std::sync::Arc;

use crossbeam_channel::Receiver;

use super::{Between, Copied, Uncopied, shard_of};
use crate::error::IoContext;
use crate::format::checksum::crc32c;
use crate::format::manifest::{Manifest, ShardEntry};
use crate::io::buffer::{Buffer, BufferPool};
use crate::load::{Extent, OnDamage, Shard};
use crate::store::flow::Flow;
use crate::store::{Piece, ShardId, ShardSink, ShardSize};
use crate::{EngineError, Result};

/// Bytes of reads in flight and of what waits to be written.
const BUFFERS_BYTES: usize = 96 << 20;
/// Fewest buffers: one being read, one being checked, two on their way.
const BUFFERS_MIN: usize = 4;

/// Copies shards of one checkpoint.
pub(super) struct Stream<'a> {
    pub(super) between: &'a Between<'a>,
    pub(super) manifest: &'a Manifest,
    /// What is done, for messages.
    pub(super) what: String,
}

/// A read that was begun.
type Reading = (Extent, Receiver<(Result<()>, Buffer)>);

impl Stream<'_> {
    /// Copies one shard, which is durable then and which no manifest names yet.
    pub(super) fn shard(&self, entry: &ShardEntry) -> Copied<(ShardId, Box<dyn ShardSink>)> {
        let checkpoint =
            Shard::open(self.between.source, self.manifest, entry.rank, OnDamage::Report)
                .map_err(Uncopied::of_source)?;
        let shard = shard_of(self.manifest.step, entry)?;
        let size = ShardSize { expected_bytes: entry.bytes, most_bytes: entry.bytes };
        let flow = Arc::new(Flow::new(Arc::clone(self.between.environment), None));
        // No training waits for a copy.
        flow.captured();
        let mut sink = self.between.destination.resume_shard(shard, size, &flow)?;
        let copied =
            self.extents(&checkpoint, sink.as_mut()).and_then(|()| Ok(sink.finish(entry.bytes)?));
        match copied {
            Ok(()) => Ok((shard, sink)),
            Err(error) => {
                sink.abandon();
                Err(error)
            }
        }
    }

    /// Keeps as many reads in flight as there are buffers, and passes on what arrives, in order.
    fn extents(&self, checkpoint: &Shard, sink: &mut dyn ShardSink) -> Copied<()> {
        let extents = checkpoint.extents();
        let buffer_bytes = extents.iter().map(|extent| extent.bytes).max().unwrap_or(0);
        let count = (BUFFERS_BYTES / buffer_bytes.max(1)).clamp(BUFFERS_MIN, 64);
        let pool = BufferPool::new(buffer_bytes, count)
            .context("allocating buffers to copy", checkpoint.name())?;
        let mut waiting = extents.into_iter();
        let mut next = waiting.next();
        let mut reading: VecDeque<Reading> = VecDeque::new();
        let mut told_bytes = 0;
        while next.is_some() || !reading.is_empty() {
            while let Some(extent) = next {
                // With nothing being read, all buffers are on their way out and come back.
                let buffer = if reading.is_empty() { Some(pool.take()) } else { pool.try_take() };
                let Some(buffer) = buffer else { break };
                reading.push_back((extent, checkpoint.start_reading(extent, buffer)));
                next = waiting.next();
            }
            if let Some(read) = reading.pop_front() {
                self.pass_on(checkpoint, read, sink)?;
                let sent_bytes = sink.figures().sent_bytes;
                self.between.observer.sent(sent_bytes - told_bytes);
                told_bytes = sent_bytes;
                self.check_wanted()?;
            }
        }
        // What no part was filled by goes when the shard is finished.
        let gone_bytes = told_bytes + sink.figures().resumed_bytes;
        self.between.observer.sent(checkpoint.file_bytes().saturating_sub(gone_bytes));
        Ok(self.check_wanted()?)
    }

    fn check_wanted(&self) -> Result<()> {
        if !self.between.observer.is_cancelled() {
            return Ok(());
        }
        Err(EngineError::Closed {
            what: self.what.clone(),
            why: "it was cancelled".into(),
            hint: "copy again: what was brought over is not sent twice where the store can tell"
                .into(),
        })
    }

    /// Checks what was read, and writes it.
    fn pass_on(
        &self,
        checkpoint: &Shard,
        (extent, arrival): Reading,
        sink: &mut dyn ShardSink,
    ) -> Copied<()> {
        let (outcome, buffer) = arrival
            .recv()
            .map_err(|_| EngineError::internal(self.what.clone(), "the store dropped a read"))?;
        outcome.map_err(Uncopied::of_source)?;
        let crc32c = crc32c(&buffer[..extent.bytes]);
        if extent.crc32c.is_some_and(|expected| expected != crc32c) {
            return Err(Uncopied::of_source(EngineError::corrupt(
                checkpoint.name(),
                format!(
                    "the {} bytes at offset {} have checksum {crc32c:08x}, the index says {:08x}",
                    extent.bytes,
                    extent.offset,
                    extent.crc32c.unwrap_or_default()
                ),
            )));
        }
        if extent.offset == 0 {
            checkpoint.check_start(&buffer[..extent.bytes]).map_err(Uncopied::of_source)?;
        }
        sink.write(extent.offset, Piece { buffer, bytes: extent.bytes, crc32c })?;
        self.between.observer.advanced(extent.bytes as u64);
        Ok(())
    }
}
