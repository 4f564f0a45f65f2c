//! Which tensor goes into which file of an export.
//!
//! ```text
//! tensors, as they are in shards:  a  b  c      D          e
//! files of at most so many bytes:  |a b| |D| |c e|
//! ```
//!
//! Pure. Always holds: each tensor is in one file; a file holds no more bytes of tensors than
//! asked for, unless it is one tensor that is larger; the same tensors make the same files.

use std::cmp::Reverse;

use dtr_engine::Result;

use super::export::Export;
use super::parts::Tensor;
use super::{header, index};

/// What is written.
#[derive(Debug)]
pub(super) struct Layout<'t> {
    pub(super) files: Vec<Planned<'t>>,
    /// The file that says which tensor is where; `None` of a single file, which needs none.
    pub(super) index: Option<Vec<u8>>,
}

/// A file to write.
#[derive(Debug)]
pub(super) struct Planned<'t> {
    /// What comes before the tensors.
    pub(super) header: Vec<u8>,
    pub(super) tensors: Vec<&'t Tensor>,
}

impl<'t> Layout<'t> {
    /// Distributes tensors among files of at most `bytes_max` bytes of them.
    pub(super) fn of(
        tensors: &'t [Tensor],
        bytes_max: u64,
        export: &Export,
        step: u64,
    ) -> Result<Self> {
        let cut = cut(tensors.iter().map(|tensor| tensor.bytes), bytes_max);
        let count = cut.len();
        let files = cut
            .into_iter()
            .map(|positions| {
                let mut tensors: Vec<_> = positions.iter().map(|at| &tensors[*at]).collect();
                // By falling item size, so that each tensor starts aligned.
                tensors.sort_by_key(|tensor| Reverse(tensor.item_bytes));
                let header = header::encode(&tensors, step)?;
                Ok(Planned { header, tensors })
            })
            .collect::<Result<Vec<_>>>()?;
        let index = match count {
            0 | 1 => None,
            _ => Some(index::encode(&files, export)?),
        };
        Ok(Self { files, index })
    }

    /// Bytes of all files.
    pub(super) fn disk_bytes(&self) -> u64 {
        let index = self.index.as_ref().map_or(0, |index| index.len() as u64);
        self.files.iter().fold(index, |sum, file| sum.saturating_add(file.disk_bytes()))
    }

    /// Bytes of all tensors, those that share memory counted once per name.
    pub(super) fn raw_bytes(&self) -> u64 {
        self.files.iter().fold(0, |sum, file| sum.saturating_add(file.raw_bytes()))
    }
}

impl Planned<'_> {
    pub(super) fn disk_bytes(&self) -> u64 {
        self.raw_bytes().saturating_add(self.header.len() as u64)
    }

    /// A header was made, so that their sum is one that files can have.
    pub(super) fn raw_bytes(&self) -> u64 {
        self.tensors.iter().map(|tensor| tensor.bytes).sum()
    }
}

/// Positions of tensors of these lengths, by file: each is filled before the next is begun. A
/// tensor larger than a file gets one of its own, and the one being filled is filled on.
fn cut(lengths: impl IntoIterator<Item = u64>, bytes_max: u64) -> Vec<Vec<usize>> {
    let mut files = Vec::<Vec<usize>>::new();
    // Which file is being filled, and how much of it is left.
    let mut filling: Option<(usize, u64)> = None;
    for (position, length) in lengths.into_iter().enumerate() {
        match &mut filling {
            Some((file, room)) if length <= *room => {
                files[*file].push(position);
                *room -= length;
            }
            _ => {
                if length <= bytes_max {
                    filling = Some((files.len(), bytes_max - length));
                }
                files.push(vec![position]);
            }
        }
    }
    files
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn files_are_filled_in_order() {
        assert_eq!(cut([6, 6, 2, 6, 2, 2], 10), [vec![0], vec![1, 2], vec![3, 4, 5]]);
        assert_eq!(cut([3, 11, 7, 1], 10), [vec![0, 2], vec![1], vec![3]]);
        assert_eq!(cut([10, 10], 10), [[0], [1]]);
        assert_eq!(cut([4, 4, 4], u64::MAX), [[0, 1, 2]]);
        assert_eq!(cut([u64::MAX, u64::MAX], u64::MAX), [[0], [1]]);
    }

    #[test]
    fn tensors_without_items_need_no_file_of_their_own() {
        assert_eq!(cut([0, 4, 0, 4, 0], 1), [vec![0, 2, 4], vec![1], vec![3]]);
        assert_eq!(cut([4, 0], 1), [[0], [1]]);
        assert!(cut([], 1).is_empty());
    }

    proptest! {
        #[test]
        fn every_tensor_is_in_one_file_that_is_no_larger_than_asked(
            lengths in prop::collection::vec(0u64..20, 0..40),
            bytes_max in 1u64..30,
        ) {
            let files = cut(lengths.iter().copied(), bytes_max);
            let mut all: Vec<usize> = files.concat();
            all.sort_unstable();
            prop_assert_eq!(all, (0..lengths.len()).collect::<Vec<_>>());
            let bytes = |file: &Vec<usize>| file.iter().map(|at| lengths[*at]).sum::<u64>();
            for file in &files {
                prop_assert!(file.is_sorted());
                prop_assert!(bytes(file) <= bytes_max || file.len() == 1);
            }
            // None is begun while the one before has room.
            let fitting: Vec<_> = files.iter().filter(|file| bytes(file) <= bytes_max).collect();
            for pair in fitting.windows(2) {
                prop_assert!(bytes(pair[0]) + lengths[pair[1][0]] > bytes_max);
            }
        }
    }
}
