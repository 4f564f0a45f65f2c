//! A checkpoint's raw layout, of whole storages, read window by window in bounded memory.
//!
//! Always holds: a window holds whole chunks, so none is decoded twice while its window is at hand;
//! at most [`WINDOWS_KEPT`] windows are; only storages that were asked for are read, and every byte
//! was checked against its checksums.

use std::sync::{Arc, Mutex};

use dtr_engine::format::index::StorageRecord;
use dtr_engine::load::{Checkpoint, ReadOptions, Target};
use dtr_engine::{Result, unpoisoned};

/// Bytes of a window, unless a chunk is larger.
pub(crate) const WINDOW_BYTES: u64 = 16 << 20;
/// Windows kept: the one in use, and its neighbours for readers that run beside each other.
const WINDOWS_KEPT: usize = 3;

/// The windows of one rank's checkpoint.
#[derive(Debug)]
pub(crate) struct Windows<'c> {
    checkpoint: &'c Checkpoint,
    bytes: u64,
    /// By storage: whether its bytes are wanted.
    wanted: Vec<bool>,
    /// The most recently used last. Held while a window is read: reading uses every core by itself.
    recent: Mutex<Vec<(u64, Arc<Vec<u8>>)>>,
}

impl<'c> Windows<'c> {
    /// The windows over the storages for which `wanted` says yes; other bytes are zero.
    pub(crate) fn new(checkpoint: &'c Checkpoint, wanted: impl Fn(u32) -> bool) -> Self {
        let storages = 0..checkpoint.storages().len();
        let number = |storage| u32::try_from(storage).expect("storages are counted in 32 bits");
        Self {
            checkpoint,
            bytes: WINDOW_BYTES.max(u64::from(checkpoint.header().chunk_bytes)),
            wanted: storages.map(|storage| wanted(number(storage))).collect(),
            recent: Mutex::default(),
        }
    }

    /// Where a storage is in the raw layout.
    pub(crate) fn storage(&self, storage: u32) -> StorageRecord {
        self.checkpoint.storages()[storage as usize]
    }

    /// Calls `visit` with each window that overlaps the not empty `start..end` of the raw layout,
    /// and where it starts.
    pub(crate) fn visit(
        &self,
        start: u64,
        end: u64,
        mut visit: impl FnMut(u64, &[u8]),
    ) -> Result<()> {
        for window in start / self.bytes..end.div_ceil(self.bytes) {
            visit(window * self.bytes, &self.get(window)?);
        }
        Ok(())
    }

    fn get(&self, window: u64) -> Result<Arc<Vec<u8>>> {
        let mut recent = unpoisoned(self.recent.lock());
        if let Some(position) = recent.iter().position(|(number, _)| *number == window) {
            let found = recent.remove(position);
            let bytes = Arc::clone(&found.1);
            recent.push(found);
            return Ok(bytes);
        }
        let memory = match recent.len() {
            WINDOWS_KEPT.. => Arc::try_unwrap(recent.remove(0).1).unwrap_or_default(),
            _ => Vec::new(),
        };
        let bytes = Arc::new(self.read(window, memory)?);
        recent.push((window, Arc::clone(&bytes)));
        Ok(bytes)
    }

    fn read(&self, window: u64, mut memory: Vec<u8>) -> Result<Vec<u8>> {
        let storages = self.checkpoint.storages();
        let start = window * self.bytes;
        let end = self.checkpoint.raw_bytes().min(start + self.bytes);
        memory.clear();
        memory.resize(in_memory(end.saturating_sub(start)), 0);
        let mut targets = Vec::new();
        let (mut rest, mut at) = (memory.as_mut_slice(), start);
        let first = storages.partition_point(|record| record.raw_end() <= at);
        for (storage, record) in storages.iter().enumerate().skip(first) {
            if record.raw_offset >= end {
                break;
            }
            let from = record.raw_offset.max(start);
            let until = record.raw_end().min(end);
            if !self.wanted[storage] || from >= until {
                continue;
            }
            let (_, after_gap) = rest.split_at_mut(in_memory(from - at));
            let (memory, after) = after_gap.split_at_mut(in_memory(until - from));
            let storage = u32::try_from(storage).expect("storages are counted in 32 bits");
            targets.push(Target { storage, offset: from - record.raw_offset, memory });
            (rest, at) = (after, until);
        }
        self.checkpoint.read(targets, ReadOptions::default())?;
        Ok(memory)
    }
}

/// A length that is bounded by a window's.
fn in_memory(bytes: u64) -> usize {
    usize::try_from(bytes).expect("a window fits into memory")
}
