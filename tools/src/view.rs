//! A tensor as its storage holds it, read in row-major order.
//!
//! ```text
//! storage    |a b c d e f g h|         shape [2, 2], strides [4, 1], offset 1
//! row-major  |b c f g|                 runs: 1..3 and 5..7
//! ```
//!
//! Pure. Always holds: what [`View::copy`] writes for a range of the row-major bytes, once it was
//! shown every window of the storage in [`View::hull`] of that range, is exactly those bytes. The
//! arithmetic cannot overflow for a tensor whose index was decoded: it is within its storage.

use std::ops::Range;

use dtr_engine::format::index::TensorRecord;

/// Where the bytes of a tensor are in its storage.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct View {
    /// Index of the storage.
    pub(crate) storage: u32,
    /// First byte, from the storage's start.
    start: u64,
    /// Dimensions of runs, outermost first.
    dimensions: Vec<Dimension>,
    /// Bytes that are together.
    run_bytes: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Dimension {
    items: u64,
    /// From one item to the next in the storage.
    stride_bytes: u64,
    /// Row-major bytes of one item.
    item_bytes: u64,
    /// From an item's first byte in the storage to behind its last.
    extent_bytes: u64,
}

/// Bytes of a storage from some offset on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Window<'a> {
    /// Where they start in the storage.
    pub(crate) start: u64,
    /// The bytes.
    pub(crate) bytes: &'a [u8],
}

impl View {
    /// The view that a tensor is.
    pub(crate) fn of(tensor: &TensorRecord) -> Self {
        let strided =
            Self::strided(tensor.item_bytes, &tensor.shape, &tensor.strides, tensor.offset);
        Self { storage: tensor.storage, ..strided }
    }

    /// A view of storage 0: shape, strides, and the offset of the first item, all in items.
    pub(crate) fn strided(item_bytes: u32, shape: &[u64], strides: &[u64], offset: u64) -> Self {
        let item_bytes = u64::from(item_bytes);
        let start = offset.saturating_mul(item_bytes);
        if shape.contains(&0) {
            return Self { storage: 0, start, dimensions: Vec::new(), run_bytes: 0 };
        }
        let mut run_bytes = item_bytes;
        let mut extent_bytes = item_bytes;
        let mut block_bytes = item_bytes;
        let mut dimensions = Vec::new();
        for (&items, &stride) in shape.iter().zip(strides).rev() {
            if items == 1 {
                continue;
            }
            let stride_bytes = stride * item_bytes;
            if dimensions.is_empty() && stride_bytes == run_bytes {
                run_bytes *= items;
                extent_bytes = run_bytes;
            } else {
                dimensions.push(Dimension {
                    items,
                    stride_bytes,
                    item_bytes: block_bytes,
                    extent_bytes,
                });
                extent_bytes += (items - 1) * stride_bytes;
            }
            block_bytes *= items;
        }
        dimensions.reverse();
        Self { storage: 0, start, dimensions, run_bytes }
    }

    /// Row-major bytes.
    pub(crate) fn bytes(&self) -> u64 {
        self.dimensions.first().map_or(self.run_bytes, |outer| outer.items * outer.item_bytes)
    }

    /// Whether it is in its storage as it is read.
    pub(crate) fn is_contiguous(&self) -> bool {
        self.dimensions.is_empty()
    }

    /// Bytes of the storage between which all of the row-major `range`, not empty, is.
    pub(crate) fn hull(&self, range: &Range<u64>) -> Range<u64> {
        let mut source = self.start;
        let mut range = range.clone();
        for dimension in &self.dimensions {
            let first = range.start / dimension.item_bytes;
            let last = (range.end - 1) / dimension.item_bytes;
            source += first * dimension.stride_bytes;
            if first < last {
                let span = (last - first) * dimension.stride_bytes + dimension.extent_bytes;
                return source..source + span;
            }
            let row = first * dimension.item_bytes;
            range = range.start - row..range.end - row;
        }
        source + range.start..source + range.end
    }

    /// Where the row-major byte at `position` is in the storage, and how many bytes from it on
    /// are together there.
    pub(crate) fn run_at(&self, position: u64) -> (u64, u64) {
        let (mut source, mut within) = (self.start, position);
        for dimension in &self.dimensions {
            source += within / dimension.item_bytes * dimension.stride_bytes;
            within %= dimension.item_bytes;
        }
        (source + within, self.run_bytes - within)
    }

    /// Copies what `window` holds of the row-major `range` to its place in `memory`, which stands
    /// for that range.
    pub(crate) fn copy(&self, range: &Range<u64>, window: Window<'_>, memory: &mut [u8]) {
        let block = Block { source: self.start, row: 0 };
        self.copy_block(block, &self.dimensions, &mut Copying { range, window, memory });
    }

    fn copy_block(&self, block: Block, dimensions: &[Dimension], copying: &mut Copying<'_>) {
        let Some((outer, inner)) = dimensions.split_first() else {
            return copying.run(block, self.run_bytes);
        };
        for item in copying.items(block, outer) {
            let block = Block {
                source: block.source + item * outer.stride_bytes,
                row: block.row + item * outer.item_bytes,
            };
            self.copy_block(block, inner, copying);
        }
    }
}

/// A part of a view, by its first byte.
#[derive(Clone, Copy, Debug)]
struct Block {
    /// In the storage.
    source: u64,
    /// In row-major order.
    row: u64,
}

struct Copying<'a> {
    range: &'a Range<u64>,
    window: Window<'a>,
    memory: &'a mut [u8],
}

impl Copying<'_> {
    fn window_end(&self) -> u64 {
        self.window.start + self.window.bytes.len() as u64
    }

    /// Items of a block's outermost dimension that have bytes in both range and window.
    fn items(&self, block: Block, dimension: &Dimension) -> Range<u64> {
        let Dimension { items, stride_bytes, item_bytes, extent_bytes } = *dimension;
        let mut first = self.range.start.saturating_sub(block.row) / item_bytes;
        let mut end = self.range.end.saturating_sub(block.row).div_ceil(item_bytes).min(items);
        let before = self.window.start.saturating_sub(block.source + extent_bytes - 1);
        let until = self.window_end().saturating_sub(block.source);
        if stride_bytes == 0 {
            if before > 0 || until == 0 {
                end = first;
            }
        } else {
            first = first.max(before.div_ceil(stride_bytes));
            end = end.min(until.div_ceil(stride_bytes));
        }
        first..end
    }

    fn run(&mut self, block: Block, run_bytes: u64) {
        let skipped = self
            .range
            .start
            .saturating_sub(block.row)
            .max(self.window.start.saturating_sub(block.source));
        let end = run_bytes
            .min(self.range.end.saturating_sub(block.row))
            .min(self.window_end().saturating_sub(block.source));
        if skipped >= end {
            return;
        }
        let bytes = index(end - skipped);
        let from = index(block.source + skipped - self.window.start);
        let to = index(block.row + skipped - self.range.start);
        self.memory[to..to + bytes].copy_from_slice(&self.window.bytes[from..from + bytes]);
    }
}

/// A position within memory.
fn index(position: u64) -> usize {
    usize::try_from(position).expect("positions in memory fit")
}

#[cfg(test)]
mod tests {
    use dtr_engine::format::index::TensorKind;
    use proptest::prelude::*;

    use super::*;

    fn tensor(item_bytes: u32, shape: &[u64], strides: &[u64], offset: u64) -> TensorRecord {
        TensorRecord {
            storage: 0,
            kind: TensorKind::Torch,
            dtype: "some".into(),
            item_bytes,
            shape: shape.into(),
            strides: strides.into(),
            offset,
            requires_grad: false,
            slice: None,
        }
    }

    /// Row-major bytes, item by item.
    fn by_definition(tensor: &TensorRecord, storage: &[u8]) -> Vec<u8> {
        let count: u64 = tensor.shape.iter().product();
        let item_bytes = tensor.item_bytes as usize;
        (0..count)
            .flat_map(|mut number| {
                let mut at = tensor.offset;
                for (items, stride) in tensor.shape.iter().zip(&tensor.strides).rev() {
                    at += number % items * stride;
                    number /= items;
                }
                let at = index(at) * item_bytes;
                storage[at..at + item_bytes].to_vec()
            })
            .collect()
    }

    #[test]
    fn what_lies_together_is_one_run() {
        for (shape, strides) in [
            (&[][..], &[][..]),
            (&[2, 3, 4], &[12, 4, 1]),
            (&[1, 3, 1, 4], &[7, 4, 99, 1]),
            (&[0, 3], &[3, 1]),
        ] {
            let view = View::of(&tensor(4, shape, strides, 1));
            assert!(view.is_contiguous(), "{shape:?} {strides:?}");
            assert_eq!(view.bytes(), shape.iter().product::<u64>() * 4);
        }
        let rows = View::of(&tensor(4, &[5, 2, 3], &[12, 3, 1], 0));
        assert_eq!((rows.dimensions.len(), rows.run_bytes), (1, 24));
        assert!(!View::of(&tensor(1, &[2, 3], &[1, 2], 0)).is_contiguous());
    }

    #[test]
    fn a_hull_is_tight_within_one_run() {
        let rows = View::of(&tensor(2, &[4, 3], &[10, 1], 1));
        assert_eq!(rows.hull(&(6..8)), 22..24);
        assert_eq!(rows.hull(&(5..7)), 2..28);
        assert_eq!(rows.hull(&(0..24)), 2..68);
    }

    proptest! {
        #[test]
        fn windows_in_any_cut_give_the_definition(
            item_bytes in 1u32..5,
            dimensions in prop::collection::vec((0u64..5, 0u64..7), 0..4),
            offset in 0u64..3,
            window_bytes in 1usize..40,
            cuts in (0.0..1.0f64, 0.0..1.0f64),
        ) {
            let (shape, strides): (Vec<u64>, Vec<u64>) = dimensions.into_iter().unzip();
            let tensor = tensor(item_bytes, &shape, &strides, offset);
            let storage: Vec<u8> = (0..=250).cycle().take(512).collect();
            let expected = by_definition(&tensor, &storage);
            let view = View::of(&tensor);
            prop_assert_eq!(view.bytes(), expected.len() as u64);

            let at = |cut: f64| (cut * text_float(expected.len())).floor();
            let (low, high) = (at(cuts.0).min(at(cuts.1)), at(cuts.0).max(at(cuts.1)));
            let range = to_u64(low)..to_u64(high);
            prop_assume!(!range.is_empty());
            let hull = view.hull(&range);
            let mut memory = vec![0xAA; index(range.end - range.start)];
            for (number, bytes) in storage.chunks(window_bytes).enumerate() {
                let start = (number * window_bytes) as u64;
                if start < hull.end && start + bytes.len() as u64 > hull.start {
                    view.copy(&range, Window { start, bytes }, &mut memory);
                }
            }
            prop_assert_eq!(&memory[..], &expected[index(range.start)..index(range.end)]);

            let mut by_runs = Vec::new();
            while by_runs.len() < expected.len() {
                let (start, bytes) = view.run_at(by_runs.len() as u64);
                by_runs.extend_from_slice(&storage[index(start)..index(start + bytes)]);
            }
            prop_assert_eq!(by_runs, expected);
        }
    }

    fn text_float(number: usize) -> f64 {
        crate::text::float(number as u64)
    }

    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "small")]
    fn to_u64(number: f64) -> u64 {
        number as u64
    }
}
