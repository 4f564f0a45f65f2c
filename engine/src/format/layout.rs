//! The raw layout: storages grouped by element type, 64-byte aligned, laid end to end, cut into
//! chunks.
//!
//! ```text
//! raw layout  | f64 storages | f32 storages | 16-bit storages | bytes |
//! chunks      |   0   |   1   |   2   |   3   |   4   |   5   |  6 |
//! ```
//!
//! Always holds: storages ascend by raw offset and do not overlap; the raw layout ends where its
//! last storage does; the pieces of a chunk tile it. Grouping makes nearly every chunk of one
//! element type, which is what an encoder wants.

use std::cmp::Reverse;
use std::ops::Range;

use super::index::{STORAGES_MAX, StorageRecord};
use crate::{EngineError, Result};

/// Alignment, in bytes, of every storage in the raw layout: a cache line, and the widest vector.
pub(crate) const STORAGE_ALIGNMENT: u64 = 64;
/// Most bytes of a raw layout: offsets stay well inside what file offsets can hold.
pub(crate) const RAW_BYTES_MAX: u64 = 1 << 60;

/// What the bytes of a storage are, as far as encoding cares. Discriminants are persisted, and
/// ascend by width.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum ElementType {
    /// Integers, booleans, 8-bit floats, anything else: encoded as single bytes.
    Bytes = 0,
    /// IEEE binary16.
    F16 = 1,
    /// bfloat16.
    Bf16 = 2,
    /// IEEE binary32; also each half of a complex64.
    F32 = 3,
    /// IEEE binary64; also each half of a complex128.
    F64 = 4,
}

impl ElementType {
    /// All, by ascending discriminant.
    pub const ALL: [Self; 5] = [Self::Bytes, Self::F16, Self::Bf16, Self::F32, Self::F64];
}

/// A storage to be laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct StorageSpec {
    /// Length; may be 0.
    pub(crate) bytes: u64,
    /// What the bytes are.
    pub(crate) element: ElementType,
    /// Whether they are in the memory of a device: chunks of the host's memory and of a device's
    /// are captured in different ways.
    pub(crate) on_device: bool,
}

/// Where every storage is, and what every chunk holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Layout {
    /// By ascending raw offset.
    spans: Vec<Span>,
    /// Position in `spans` of each input storage.
    positions: Vec<u32>,
    chunk_bytes: u32,
    raw_bytes: u64,
}

/// One storage in the raw layout.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Span {
    record: StorageRecord,
    /// Index in the input.
    storage: u32,
}

impl Span {
    fn end(&self) -> u64 {
        self.record.raw_end()
    }
}

impl Layout {
    /// Lays storages out: the host's before a device's, wider element types first, input order
    /// within one type.
    pub(crate) fn plan(storages: &[StorageSpec], chunk_bytes: u32) -> Result<Self> {
        if storages.len() > STORAGES_MAX {
            return Err(too_large(&format!("{} storages, at most {STORAGES_MAX}", storages.len())));
        }
        let mut order: Vec<usize> = (0..storages.len()).collect();
        order.sort_by_key(|&storage| {
            let StorageSpec { element, on_device, .. } = storages[storage];
            (on_device, Reverse(element))
        });
        let mut raw_bytes = 0_u64;
        let mut records = Vec::with_capacity(order.len());
        for &storage in &order {
            let StorageSpec { bytes, element, .. } = storages[storage];
            let raw_offset = raw_bytes.next_multiple_of(STORAGE_ALIGNMENT);
            raw_bytes =
                raw_offset.checked_add(bytes).filter(|end| *end <= RAW_BYTES_MAX).ok_or_else(
                    || too_large(&format!("storages of more than {RAW_BYTES_MAX} bytes")),
                )?;
            records.push(StorageRecord { raw_offset, bytes, element, replica: None });
        }
        Ok(Self::new(&records, &order, chunk_bytes))
    }

    fn new(records: &[StorageRecord], order: &[usize], chunk_bytes: u32) -> Self {
        assert!(chunk_bytes > 0, "chunks have bytes");
        let narrow = |index: usize| u32::try_from(index).expect("STORAGES_MAX fits 32 bits");
        let mut positions = vec![0; order.len()];
        for (position, &storage) in order.iter().enumerate() {
            positions[storage] = narrow(position);
        }
        let spans: Vec<Span> = records
            .iter()
            .zip(order)
            .map(|(&record, &storage)| Span { record, storage: narrow(storage) })
            .collect();
        let raw_bytes = spans.last().map_or(0, Span::end);
        Self { spans, positions, chunk_bytes, raw_bytes }
    }

    /// Bytes from the start of the raw layout to an input storage.
    pub(crate) fn raw_offset(&self, storage: usize) -> u64 {
        self.spans[self.record_index(storage)].record.raw_offset
    }

    /// Position of an input storage among [`Layout::records`]: what a tensor record names.
    pub(crate) fn record_index(&self, storage: usize) -> usize {
        self.positions[storage] as usize
    }

    /// Where an input storage is.
    pub(crate) fn record(&self, storage: usize) -> StorageRecord {
        self.spans[self.record_index(storage)].record
    }

    /// The storages as an index lists them: by ascending raw offset.
    pub(crate) fn records(&self) -> impl ExactSizeIterator<Item = StorageRecord> {
        self.spans.iter().map(|span| span.record)
    }

    /// Bytes of the raw layout, gaps included.
    pub(crate) fn raw_bytes(&self) -> u64 {
        self.raw_bytes
    }

    /// Raw bytes of every chunk but the last.
    pub(crate) fn chunk_bytes(&self) -> u32 {
        self.chunk_bytes
    }

    /// Number of chunks; 0 when no storage has a byte.
    pub(crate) fn chunk_count(&self) -> usize {
        usize::try_from(self.raw_bytes.div_ceil(u64::from(self.chunk_bytes)))
            .expect("RAW_BYTES_MAX bounds the chunks")
    }

    /// Raw bytes of one chunk.
    pub(crate) fn chunk_raw_bytes(&self, chunk: usize) -> usize {
        let Range { start, end } = self.chunk_range(chunk);
        narrow(end - start)
    }

    /// Where a chunk is in the raw layout.
    fn chunk_range(&self, chunk: usize) -> Range<u64> {
        assert!(chunk < self.chunk_count(), "chunk {chunk} of {}", self.chunk_count());
        let start = chunk as u64 * u64::from(self.chunk_bytes);
        start..(start + u64::from(self.chunk_bytes)).min(self.raw_bytes)
    }

    /// The chunks that hold a range of the raw layout; none for an empty one.
    pub(crate) fn chunks_of(&self, raw: Range<u64>) -> Range<usize> {
        chunks_of(raw, self.chunk_bytes)
    }

    /// The element type that holds most of a chunk's bytes; the wider one of equals.
    pub(crate) fn chunk_element(&self, chunk: usize) -> ElementType {
        let mut bytes = [0; ElementType::ALL.len()];
        for piece in self.pieces(chunk) {
            if let Some(storage) = piece.storage {
                let element = self.spans[self.record_index(storage)].record.element;
                bytes[element as usize] += piece.length;
            }
        }
        ElementType::ALL
            .into_iter()
            .max_by_key(|element| bytes[*element as usize])
            .expect("there are element types")
    }

    /// What a chunk holds, in order, gaps included.
    pub(crate) fn pieces(&self, chunk: usize) -> Pieces<'_> {
        let Range { start, end } = self.chunk_range(chunk);
        let first = self.spans.partition_point(|span| span.end() <= start);
        Pieces { spans: &self.spans[first..], start, cursor: start, end }
    }
}

/// The chunks of `chunk_bytes` that hold a range of a raw layout; none for an empty one.
pub(crate) fn chunks_of(raw: Range<u64>, chunk_bytes: u32) -> Range<usize> {
    let chunk_bytes = u64::from(chunk_bytes);
    let index = |chunk: u64| usize::try_from(chunk).expect("RAW_BYTES_MAX bounds the chunks");
    let start = index(raw.start / chunk_bytes);
    if raw.is_empty() { start..start } else { start..index(raw.end.div_ceil(chunk_bytes)) }
}

/// A run of a chunk's bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    /// Input index of the storage that it comes from; `None` for a gap, which is zeros.
    pub(crate) storage: Option<usize>,
    /// Bytes from the storage's start; 0 for a gap.
    pub(crate) storage_offset: u64,
    /// Bytes from the chunk's start.
    pub(crate) chunk_offset: usize,
    /// Bytes; at least 1.
    pub(crate) length: usize,
}

/// The pieces of one chunk: found by binary search, then one step each.
#[derive(Clone, Debug)]
pub(crate) struct Pieces<'a> {
    /// Those that end after the cursor.
    spans: &'a [Span],
    start: u64,
    cursor: u64,
    end: u64,
}

impl Iterator for Pieces<'_> {
    type Item = Piece;

    fn next(&mut self) -> Option<Piece> {
        if self.cursor == self.end {
            return None;
        }
        let (span, rest) = loop {
            let (span, rest) = self.spans.split_first()?;
            if span.end() > self.cursor {
                break (span, rest);
            }
            self.spans = rest; // An empty storage.
        };
        let from = self.cursor;
        let gap = from < span.record.raw_offset;
        if gap {
            self.cursor = span.record.raw_offset.min(self.end);
        } else {
            self.cursor = span.end().min(self.end);
            self.spans = rest;
        }
        Some(Piece {
            storage: (!gap).then_some(span.storage as usize),
            storage_offset: if gap { 0 } else { from - span.record.raw_offset },
            chunk_offset: narrow(from - self.start),
            length: narrow(self.cursor - from),
        })
    }
}

/// A count of bytes within one chunk.
fn narrow(bytes: u64) -> usize {
    usize::try_from(bytes).expect("a chunk's length fits 32 bits")
}

fn too_large(what: &str) -> EngineError {
    EngineError::invalid(
        format!("laying out a state of {what}"),
        "one shard cannot hold it",
        "spread the state over more ranks or over several checkpoints",
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn spec(bytes: u64, element: ElementType) -> StorageSpec {
        StorageSpec { bytes, element, on_device: false }
    }

    #[test]
    fn wider_types_come_first_in_input_order() {
        use ElementType::{Bf16, Bytes, F16, F32, F64};
        let storages =
            [spec(1, Bytes), spec(2, F16), spec(4, F32), spec(8, F32), spec(8, F64), spec(2, Bf16)];
        let layout = Layout::plan(&storages, 1 << 16).unwrap();
        let offsets: Vec<u64> = (0..storages.len()).map(|i| layout.raw_offset(i)).collect();
        assert_eq!(offsets, [320, 256, 64, 128, 0, 192]);
        assert_eq!(layout.raw_bytes(), 321);
        assert_eq!(layout.chunk_count(), 1);
        assert_eq!(layout.chunk_raw_bytes(0), 321);
        assert_eq!(layout.chunk_element(0), F32);
    }

    #[test]
    fn empty_states_have_no_chunks() {
        for storages in [vec![], vec![spec(0, ElementType::F32); 3]] {
            let layout = Layout::plan(&storages, 1 << 16).unwrap();
            assert_eq!((layout.raw_bytes(), layout.chunk_count()), (0, 0));
            assert_eq!(layout.records().len(), storages.len());
        }
    }

    #[test]
    fn too_large_a_state_is_an_error() {
        let half = spec(u64::MAX / 2, ElementType::Bytes);
        assert!(Layout::plan(&[half, half, half], 1 << 16).is_err());
        assert!(Layout::plan(&[spec(u64::MAX, ElementType::Bytes)], 1 << 16).is_err());
        assert!(Layout::plan(&[spec(RAW_BYTES_MAX, ElementType::Bytes)], 1 << 16).is_ok());
    }

    #[test]
    fn chunks_of_a_range() {
        let layout = Layout::plan(&[spec(1000, ElementType::Bytes)], 100).unwrap();
        assert_eq!(layout.chunks_of(0..0), 0..0);
        assert_eq!(layout.chunks_of(0..100), 0..1);
        assert_eq!(layout.chunks_of(99..101), 0..2);
        assert_eq!(layout.chunks_of(100..1000), 1..10);
    }

    fn storages() -> impl Strategy<Value = Vec<StorageSpec>> {
        let bytes = prop_oneof![Just(0), 1_u64..300, 1_u64..5000];
        let element = proptest::sample::select(&ElementType::ALL[..]);
        proptest::collection::vec(
            (bytes, element).prop_map(|(bytes, element)| spec(bytes, element)),
            0..60,
        )
    }

    proptest! {
        #[test]
        fn pieces_tile_every_chunk_and_every_storage(storages in storages(), log in 7..12) {
            let layout = Layout::plan(&storages, 1_u32 << log).unwrap();
            let mut seen = vec![0_u64; storages.len()];
            let mut raw = 0_u64;
            for chunk in 0..layout.chunk_count() {
                let mut cursor = 0;
                let mut held = [0; ElementType::ALL.len()];
                for piece in layout.pieces(chunk) {
                    prop_assert_eq!(piece.chunk_offset, cursor);
                    prop_assert!(piece.length > 0);
                    cursor += piece.length;
                    let Some(storage) = piece.storage else {
                        prop_assert!((piece.length as u64) < STORAGE_ALIGNMENT);
                        continue;
                    };
                    // Storages come whole and in order, also across chunks.
                    prop_assert_eq!(piece.storage_offset, seen[storage]);
                    let at = raw + piece.chunk_offset as u64;
                    prop_assert_eq!(layout.raw_offset(storage) + piece.storage_offset, at);
                    seen[storage] += piece.length as u64;
                    held[storages[storage].element as usize] += piece.length;
                }
                prop_assert_eq!(cursor, layout.chunk_raw_bytes(chunk));
                let most = held[layout.chunk_element(chunk) as usize];
                prop_assert_eq!(most, held.into_iter().max().unwrap());
                raw += cursor as u64;
            }
            prop_assert_eq!(raw, layout.raw_bytes());
            prop_assert_eq!(seen, storages.iter().map(|spec| spec.bytes).collect::<Vec<_>>());
        }

        #[test]
        fn records_describe_the_same_layout(storages in storages(), log in 7..12) {
            let layout = Layout::plan(&storages, 1_u32 << log).unwrap();
            let records: Vec<StorageRecord> = layout.records().collect();
            prop_assert!(records.is_sorted_by_key(|record| Reverse(record.element)));
            for record in &records {
                prop_assert!(record.raw_offset.is_multiple_of(STORAGE_ALIGNMENT));
            }
            for (storage, spec) in storages.iter().enumerate() {
                let record = records[layout.record_index(storage)];
                prop_assert_eq!((record.bytes, record.element), (spec.bytes, spec.element));
                prop_assert_eq!(record.raw_offset, layout.raw_offset(storage));
            }
        }
    }
}
