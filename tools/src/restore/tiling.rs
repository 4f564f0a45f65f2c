//! Whether boxes tile a tensor.
//!
//! Pure. Always holds: boxes that are accepted hold every item of the tensor; those that are first
//! of their kind hold it once.

use std::collections::BTreeSet;

/// A part of a tensor, per dimension.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Tile<'a> {
    /// Position of its first item.
    pub(super) offsets: &'a [u64],
    /// Items.
    pub(super) sizes: &'a [u64],
}

impl Tile<'_> {
    fn end(&self, dimension: usize) -> u64 {
        self.offsets[dimension] + self.sizes[dimension]
    }

    fn overlaps(&self, other: &Self) -> bool {
        (0..self.offsets.len()).all(|dimension| {
            self.offsets[dimension] < other.end(dimension)
                && other.offsets[dimension] < self.end(dimension)
        })
    }
}

/// Checks that `tiles`, none of them empty, hold each item of a tensor of this shape, and once, but
/// for tiles that are equal; whether each is the first of its kind. An error says what is wrong.
pub(super) fn check(shape: &[u64], tiles: &[Tile<'_>]) -> Result<Vec<bool>, String> {
    let mut distinct = BTreeSet::new();
    let firsts = tiles.iter().map(|tile| distinct.insert(*tile)).collect();
    let expected = items(shape).ok_or_else(|| format!("its shape {shape:?} is too large"))?;
    let held = distinct
        .iter()
        .try_fold(0, |sum: u128, tile| sum.checked_add(items(tile.sizes)?))
        .ok_or("its parts are too large")?;
    if held < expected {
        return Err(format!("no rank saved {} of its {expected} items", expected - held));
    }
    if held > expected || any_overlap(distinct.into_iter().collect()) {
        return Err("parts that ranks saved overlap".into());
    }
    Ok(firsts)
}

fn items(shape: &[u64]) -> Option<u128> {
    shape.iter().try_fold(1, |items: u128, size| items.checked_mul(u128::from(*size)))
}

/// Sweeps along the first dimension in which the tiles stand apart: tensors are cut along one or
/// two, so that few tiles are beside each other there.
fn any_overlap(mut tiles: Vec<Tile<'_>>) -> bool {
    let Some(first) = tiles.first().copied() else { return false };
    let along = (0..first.offsets.len())
        .find(|&at| tiles.iter().any(|tile| tile.offsets[at] != first.offsets[at]))
        .unwrap_or(0);
    if first.offsets.is_empty() {
        return tiles.len() > 1;
    }
    tiles.sort_unstable_by_key(|tile| tile.offsets[along]);
    tiles.iter().enumerate().any(|(position, tile)| {
        let beside = tiles[position + 1..].iter();
        beside
            .take_while(|later| later.offsets[along] < tile.end(along))
            .any(|later| later.overlaps(tile))
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn tile<'a>(offsets: &'a [u64], sizes: &'a [u64]) -> Tile<'a> {
        Tile { offsets, sizes }
    }

    #[test]
    fn what_is_missing_is_counted_and_what_overlaps_is_refused() {
        let halves = [tile(&[0, 0], &[2, 3]), tile(&[2, 0], &[2, 3])];
        assert_eq!(check(&[4, 3], &halves), Ok(vec![true, true]));
        assert_eq!(check(&[4, 3], &halves[..1]), Err("no rank saved 6 of its 12 items".into()));
        let alike = [halves[1], halves[0], halves[0]];
        assert_eq!(check(&[4, 3], &alike), Ok(vec![true, true, false]));
        let shifted = [halves[0], tile(&[1, 0], &[2, 3])];
        assert_eq!(check(&[4, 3], &shifted), Err("parts that ranks saved overlap".into()));
        let within = [halves[0], tile(&[0, 0], &[2, 1]), halves[1]];
        assert_eq!(check(&[4, 3], &within), Err("parts that ranks saved overlap".into()));
        let huge = check(&[u64::MAX; 3], &halves);
        assert_eq!(huge, Err(format!("its shape {:?} is too large", [u64::MAX; 3])));
    }

    #[test]
    fn scalars_and_empty_tensors() {
        assert_eq!(check(&[], &[tile(&[], &[]), tile(&[], &[])]), Ok(vec![true, false]));
        assert_eq!(check(&[], &[]), Err("no rank saved 1 of its 1 items".into()));
        assert_eq!(check(&[0, 5], &[]), Ok(vec![]));
    }

    /// Cuts a box at a position, and the halves again.
    fn cut(tiles: &mut Vec<(Vec<u64>, Vec<u64>)>, cuts: &[(usize, usize, u64)]) {
        for (which, dimension, at) in cuts {
            let which = which % tiles.len();
            let (offsets, sizes) = tiles[which].clone();
            let dimension = dimension % sizes.len();
            if sizes[dimension] < 2 {
                continue;
            }
            let at = 1 + at % (sizes[dimension] - 1);
            let mut second = (offsets, sizes);
            tiles[which].1[dimension] = at;
            second.0[dimension] += at;
            second.1[dimension] -= at;
            tiles.push(second);
        }
    }

    proptest! {
        #[test]
        fn cuts_tile_and_a_moved_tile_does_not(
            shape in prop::collection::vec(1u64..7, 1..4),
            cuts in prop::collection::vec((0usize..64, 0usize..4, 0u64..7), 0..12),
            moved in (0usize..64, 0usize..4),
        ) {
            let mut cut_up = vec![(vec![0; shape.len()], shape.clone())];
            cut(&mut cut_up, &cuts);
            let tiles = |parts: &[(Vec<u64>, Vec<u64>)]| {
                let parts = parts.iter().map(|(offsets, sizes)| tile(offsets, sizes));
                check(&shape, &parts.collect::<Vec<_>>())
            };
            prop_assert_eq!(tiles(&cut_up), Ok(vec![true; cut_up.len()]));
            let which = moved.0 % cut_up.len();
            cut_up[which].0[moved.1 % shape.len()] += 1;
            // Alone, it holds as many items as the tensor.
            if cut_up.len() > 1 {
                prop_assert!(tiles(&cut_up).is_err() || leaves(&shape, &cut_up[which]));
            }
        }
    }

    /// Whether a tile stands out of the shape: an index that was decoded has none.
    fn leaves(shape: &[u64], (offsets, sizes): &(Vec<u64>, Vec<u64>)) -> bool {
        (0..shape.len()).any(|at| offsets[at] + sizes[at] > shape[at])
    }
}
