//! Cutting a shard into the parts of an upload: pure but for the memory that it holds.
//!
//! ```text
//! pieces  |  header |    chunk 0    |    chunk 1    |   chunk 2   |  ...  | index | footer |
//! parts   |            part 1           |            part 2             | ... |  part n   |
//!                                       ^ a piece that straddles a cut is in both, uncopied
//! ```
//!
//! Always holds:
//! - Every part but the last has exactly the part size; parts tile the shard.
//! - A part's checksum is made from those of its pieces: of the bytes of a piece that straddles a
//!   cut only the shorter side is hashed again, all others never.
//! - A piece stays in its pool's buffer while the pool can spare it and the buffer is used well;
//!   else it is copied, so that a slow service never starves other users of the pool.

use std::collections::BTreeMap;

use bytes::Bytes;

use crate::format::checksum::{combine, crc32c, split};
use crate::store::Piece;
use crate::{EngineError, Result};

/// Most parts of an upload.
const PARTS_MAX: u64 = 10_000;
/// Index and padding of the largest shard: what a part size must have room for beside the chunks.
const CONTROL_BYTES_MAX: u64 = 2 << 30;
/// Part sizes are raised in steps of this.
const PART_STEP_BYTES: u64 = 1 << 20;

/// The part size for chunks of at most `most_bytes`: the one that is wanted, or as much more as
/// keeps the number of parts within bounds.
pub(super) fn part_bytes(wanted: u64, most_bytes: u64) -> u64 {
    let needed = most_bytes.saturating_add(CONTROL_BYTES_MAX).div_ceil(PARTS_MAX);
    wanted.max(needed.next_multiple_of(PART_STEP_BYTES))
}

/// Bytes with their checksum.
#[derive(Clone, Debug)]
pub(super) struct Segment {
    pub(super) bytes: Bytes,
    pub(super) crc32c: u32,
}

impl Segment {
    /// Takes over a piece: where it is, or by copying it.
    pub(super) fn of(piece: Piece) -> Self {
        let Piece { buffer, bytes, crc32c } = piece;
        let uses_most = 2 * bytes >= buffer.len();
        let bytes = match if uses_most { buffer.park() } else { Err(buffer) } {
            Ok(parked) => Bytes::from_owner(parked).slice(..bytes),
            Err(buffer) => Bytes::copy_from_slice(&buffer[..bytes]),
        };
        Self { bytes, crc32c }
    }

    fn split_at(self, head_bytes: usize) -> (Self, Self) {
        let (head, tail) = (self.bytes.slice(..head_bytes), self.bytes.slice(head_bytes..));
        let (crc_head, crc_tail) = split(self.crc32c, &head, &tail);
        (Self { bytes: head, crc32c: crc_head }, Self { bytes: tail, crc32c: crc_tail })
    }
}

/// A part that is complete.
#[derive(Clone, Debug)]
pub(super) struct Part {
    /// Counted from 1, as the service does.
    pub(super) number: u32,
    pub(super) segments: Vec<Bytes>,
    pub(super) bytes: u64,
    pub(super) crc32c: u32,
}

/// The parts that are being put together.
#[derive(Debug)]
pub(super) struct Assembly {
    part_bytes: u64,
    /// By part, the segments by offset.
    filling: BTreeMap<u64, Filling>,
    /// Length and checksum of the parts that were handed out.
    complete: BTreeMap<u64, (u64, u32)>,
}

#[derive(Debug, Default)]
struct Filling {
    segments: BTreeMap<u64, Segment>,
    bytes: u64,
}

impl Assembly {
    pub(super) fn new(part_bytes: u64) -> Self {
        Self { part_bytes, filling: BTreeMap::new(), complete: BTreeMap::new() }
    }

    /// Takes in what stands at `offset` of the shard; gives the parts that are complete by it.
    pub(super) fn add(&mut self, offset: u64, segment: Segment) -> Vec<Part> {
        let mut complete = Vec::new();
        let (mut at, mut rest) = (offset, segment);
        loop {
            let index = at / self.part_bytes;
            let room = (index + 1) * self.part_bytes - at;
            let room = usize::try_from(room).unwrap_or(usize::MAX);
            if rest.bytes.len() <= room {
                complete.extend(self.fill(index, at, rest));
                return complete;
            }
            let (head, tail) = rest.split_at(room);
            complete.extend(self.fill(index, at, head));
            (at, rest) = (at + room as u64, tail);
        }
    }

    fn fill(&mut self, index: u64, at: u64, segment: Segment) -> Option<Part> {
        let filling = self.filling.entry(index).or_default();
        filling.bytes += segment.bytes.len() as u64;
        filling.segments.insert(at, segment);
        if filling.bytes < self.part_bytes {
            return None;
        }
        let filling = self.filling.remove(&index)?;
        Some(self.hand_out(index, filling))
    }

    fn hand_out(&mut self, index: u64, filling: Filling) -> Part {
        let crc32c = filling
            .segments
            .values()
            .fold(crc32c(&[]), |crc, segment| combine(crc, segment.crc32c, segment.bytes.len()));
        self.complete.insert(index, (filling.bytes, crc32c));
        Part {
            number: u32::try_from(index + 1).unwrap_or(u32::MAX),
            segments: filling.segments.into_values().map(|segment| segment.bytes).collect(),
            bytes: filling.bytes,
            crc32c,
        }
    }

    /// The last part, unless the shard ended with the one before. The shard has `file_bytes`, and
    /// every one of them must have come.
    pub(super) fn close(&mut self, file_bytes: u64) -> Result<Option<Part>> {
        let last = file_bytes.saturating_sub(1) / self.part_bytes;
        let part = self.filling.remove(&last).map(|filling| self.hand_out(last, filling));
        let bytes: u64 = self.complete.values().map(|(bytes, _)| bytes).sum();
        if !self.filling.is_empty() || bytes != file_bytes {
            return Err(EngineError::internal(
                "uploading a shard",
                format!("{bytes} of its {file_bytes} bytes came, in {} parts", self.complete.len()),
            ));
        }
        Ok(part)
    }

    /// The checksum of the whole shard, once it is closed.
    pub(super) fn crc32c(&self) -> u32 {
        self.complete.values().fold(crc32c(&[]), |crc, (bytes, part)| {
            combine(crc, *part, usize::try_from(*bytes).unwrap_or(usize::MAX))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::buffer::BufferPool;
    use proptest::prelude::*;

    const PART_BYTES: u64 = 1000;

    fn segment(bytes: &[u8]) -> Segment {
        Segment { bytes: Bytes::copy_from_slice(bytes), crc32c: crc32c(bytes) }
    }

    #[test]
    fn ten_thousand_parts_suffice() {
        const GIB: u64 = 1 << 30;
        assert_eq!(part_bytes(16 << 20, GIB), 16 << 20);
        assert_eq!(part_bytes(16 << 20, 150 * GIB), 16 << 20);
        for most in [200 * GIB, 1024 * GIB, 5000 * GIB] {
            let part = part_bytes(16 << 20, most);
            assert!((most + CONTROL_BYTES_MAX).div_ceil(part) <= PARTS_MAX, "{most}: {part}");
        }
    }

    #[test]
    fn a_piece_is_copied_only_where_its_pool_cannot_spare_it() {
        let pool = BufferPool::new(8192, 2).unwrap();
        let piece = |bytes| Piece { buffer: pool.take(), bytes, crc32c: 0 };
        let first = piece(8192);
        let address = first.buffer.as_ptr();
        let held = Segment::of(first);
        assert_eq!((held.bytes.as_ptr(), pool.free()), (address, 1));
        let copied = Segment::of(piece(8192));
        assert_eq!((copied.bytes.len(), pool.free()), (8192, 1));
        drop(held);
        let small = Segment::of(piece(100));
        assert_eq!((small.bytes.len(), pool.free()), (100, 2));
    }

    #[test]
    fn a_hole_is_no_shard() {
        let mut assembly = Assembly::new(PART_BYTES);
        assert!(assembly.add(0, segment(&[1; 500])).is_empty());
        assert!(assembly.add(600, segment(&[1; 100])).is_empty());
        assert!(assembly.close(700).is_err());
    }

    proptest! {
        #[test]
        fn parts_tile_the_shard_whatever_the_pieces_and_their_order(
            sizes in prop::collection::vec(1_usize..2500, 1..12), order: prop::sample::Index,
        ) {
            let bytes: Vec<u8> = (0..251).cycle().take(sizes.iter().sum()).collect();
            let mut pieces = Vec::new();
            let mut at = 0;
            for size in sizes {
                pieces.push((at as u64, segment(&bytes[at..at + size])));
                at += size;
            }
            let count = pieces.len();
            pieces.rotate_left(order.index(count));
            let mut assembly = Assembly::new(PART_BYTES);
            let mut parts: Vec<Part> = Vec::new();
            for (offset, segment) in pieces {
                parts.extend(assembly.add(offset, segment));
            }
            parts.extend(assembly.close(bytes.len() as u64).unwrap());
            parts.sort_by_key(|part| part.number);
            let mut whole = Vec::new();
            for (number, part) in (1..).zip(&parts) {
                let own = part.segments.concat();
                prop_assert_eq!((part.number, part.bytes), (number, own.len() as u64));
                prop_assert_eq!(part.crc32c, crc32c(&own));
                whole.extend(own);
                let is_last = whole.len() == bytes.len();
                prop_assert!(is_last || part.bytes == PART_BYTES);
            }
            prop_assert!(whole == bytes);
            prop_assert_eq!(assembly.crc32c(), crc32c(&bytes));
        }
    }
}
