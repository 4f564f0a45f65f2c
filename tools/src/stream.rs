//! Tensors end to end, each in row-major order, read part by part in bounded memory.
//!
//! Always holds: the parts of one plan hold every byte of every tensor once, in order; a part ends
//! between two items of a tensor, unless these are larger than [`ITEM_BYTES_MAX`].

use std::ops::Range;

use dtr_engine::Result;

use crate::view::{View, Window};
use crate::windows::Windows;

/// Bytes of a part.
pub(crate) const PART_BYTES: usize = 16 << 20;
/// Largest items that are not cut: those of every dtype with a numeric meaning.
const ITEM_BYTES_MAX: u64 = 16;

/// Bytes of one tensor within a part.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Segment {
    /// Position of the tensor in the stream.
    pub(crate) tensor: usize,
    /// Which of its row-major bytes.
    pub(crate) range: Range<u64>,
    /// Where they stand in the part.
    pub(crate) at: usize,
}

impl Segment {
    /// Where it stands in the part.
    pub(crate) fn place(&self) -> Range<usize> {
        self.at..self.at + length(&self.range)
    }
}

/// Cuts tensors of these lengths and item sizes into parts of at most `part_bytes`.
pub(crate) fn plan(
    tensors: impl IntoIterator<Item = (u64, u32)>,
    part_bytes: usize,
) -> impl Iterator<Item = Vec<Segment>> {
    let mut tensors = tensors.into_iter().enumerate();
    let mut current: Option<(usize, u64, u64, u64)> = None;
    std::iter::from_fn(move || {
        let mut part = Vec::new();
        let mut used = 0;
        while used < part_bytes {
            let Some((tensor, done, bytes, item_bytes)) = current.take().or_else(|| {
                let (tensor, (bytes, item_bytes)) = tensors.next()?;
                Some((tensor, 0, bytes, u64::from(item_bytes)))
            }) else {
                break;
            };
            let unit = uncut_bytes(item_bytes);
            let room = (part_bytes - used) as u64;
            let taken = (bytes - done).min(room - room % unit);
            if taken > 0 {
                part.push(Segment { tensor, range: done..done + taken, at: used });
                used += length(&(0..taken));
            }
            if done + taken < bytes {
                current = Some((tensor, done + taken, bytes, item_bytes));
                break;
            }
        }
        (!part.is_empty()).then_some(part)
    })
}

/// Bytes that no part is cut within, for items of `item_bytes`.
pub(crate) fn uncut_bytes(item_bytes: u64) -> u64 {
    if item_bytes > ITEM_BYTES_MAX { 1 } else { item_bytes }
}

/// Bytes of a part.
pub(crate) fn part_bytes(part: &[Segment]) -> usize {
    part.last().map_or(0, |last| last.place().end)
}

/// Reads a part of the stream that `views` are into `memory`.
pub(crate) fn read(
    windows: &Windows<'_>,
    views: &[View],
    part: &[Segment],
    memory: &mut [u8],
) -> Result<()> {
    for segment in part {
        let view = &views[segment.tensor];
        let base = windows.storage(view.storage).raw_offset;
        let hull = view.hull(&segment.range);
        let place = &mut memory[segment.place()];
        windows.visit(base + hull.start, base + hull.end, |start, bytes| {
            // A window may begin before the storage does.
            let skipped = base.saturating_sub(start);
            let bytes = &bytes[length(&(0..skipped)).min(bytes.len())..];
            let window = Window { start: (start + skipped) - base, bytes };
            view.copy(&segment.range, window, place);
        })?;
    }
    Ok(())
}

/// The length of a range that is in memory.
fn length(range: &Range<u64>) -> usize {
    usize::try_from(range.end - range.start).expect("a part fits into memory")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn small_tensors_share_a_part() {
        let parts: Vec<_> = plan([(3, 1), (0, 4), (8, 4), (4, 4)], 10).collect();
        let segment = |tensor, range, at| Segment { tensor, range, at };
        assert_eq!(
            parts,
            [
                vec![segment(0, 0..3, 0), segment(2, 0..4, 3)],
                vec![segment(2, 4..8, 0), segment(3, 0..4, 4)],
            ]
        );
        assert_eq!(parts.iter().map(|part| part_bytes(part)).collect::<Vec<_>>(), [7, 8]);
        assert_eq!(plan([(0, 1), (0, 1)], 10).count(), 0);
    }

    proptest! {
        #[test]
        fn parts_hold_every_byte_once(
            tensors in prop::collection::vec((0u64..40, 1u32..20), 0..12),
            part_bytes in 16usize..64,
        ) {
            let tensors: Vec<_> = tensors
                .into_iter()
                .map(|(items, item_bytes)| (items * u64::from(item_bytes), item_bytes))
                .collect();
            let mut done = vec![0; tensors.len()];
            for part in plan(tensors.iter().copied(), part_bytes) {
                let mut at = 0;
                for segment in part {
                    prop_assert_eq!(segment.at, at);
                    prop_assert_eq!(segment.range.start, done[segment.tensor]);
                    let item_bytes = u64::from(tensors[segment.tensor].1);
                    prop_assert!(item_bytes > 16 || segment.range.end % item_bytes == 0);
                    done[segment.tensor] = segment.range.end;
                    at = segment.place().end;
                }
                prop_assert!(at <= part_bytes);
            }
            let lengths: Vec<u64> = tensors.iter().map(|(bytes, _)| *bytes).collect();
            prop_assert_eq!(done, lengths);
        }
    }
}
