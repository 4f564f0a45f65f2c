//! Which part of each replicated storage a rank writes.
//!
//! The storages are thought end to end and cut into as many shares as there are ranks:
//!
//! ```text
//! storages  |    0    | 1 |       2       |  3  |
//! ranks     |   0     |     1     |    2        |      the cut within storage 2 is no border's
//! ```
//!
//! A cut that is near a border between storages is moved there: what is whole in one shard is
//! read with fewer requests, and can be mapped.
//!
//! Always holds: the parts of all ranks tile every storage; a rank has at most one part of each; no
//! share is larger than the mean by more than a sixteenth of it and [`CUT_ALIGNMENT`] bytes.

use std::collections::{HashMap, HashSet};
use std::ops::Range;

use super::{SaveRequest, StorageInput};
use crate::format::index::{Replica, TensorRecord, number_replicas};
use crate::format::tree::{
    Value, Walk, children_of, subtree_end, subtree_ends, tensor_paths, validate,
};
use crate::{EngineError, Result};

/// Cuts within a storage are at multiples of this many bytes: whole items, whole cache lines.
const CUT_ALIGNMENT: u64 = 4096;
/// A cut moves to a border within this part of a share.
const SNAP_DIVISOR: u64 = 32;
/// Entries that a manifest names for each rank, and bytes of a name: a manifest is for people, the
/// index says it all.
const NAMED_MAX: usize = 8;
const NAME_BYTES_MAX: usize = 128;

/// The part of each storage that `rank` of `world_size` writes; empty ones start at 0. `bytes` are
/// the storages' lengths.
pub fn share_of(bytes: &[u64], rank: u32, world_size: u32) -> Vec<Range<u64>> {
    assert!(rank < world_size, "rank {rank} of {world_size}");
    let borders = borders_of(bytes);
    let start = cut(&borders, rank, world_size);
    let end = cut(&borders, rank + 1, world_size);
    borders
        .windows(2)
        .map(|border| {
            let (from, until) = (start.max(border[0]), end.min(border[1]));
            if from < until { from - border[0]..until - border[0] } else { 0..0 }
        })
        .collect()
}

/// What of a request's storages this rank writes.
#[derive(Debug)]
pub(crate) struct Share {
    /// By storage, in the request's order; `None` for one that is this rank's alone.
    pub(crate) replicas: Vec<Option<Replica>>,
    /// Display paths of the replicated entries, for people.
    pub(crate) names: Vec<String>,
}

impl Share {
    /// Deals the storages of a request's replicated entries.
    pub(crate) fn plan(request: &SaveRequest<'_>, rank: u32, world_size: u32) -> Result<Self> {
        let SaveRequest { nodes, tensors, storages, replicated, .. } = request;
        let mut replicas = vec![None; storages.len()];
        if replicated.is_empty() {
            return Ok(Self { replicas, names: Vec::new() });
        }
        validate(nodes, tensors.len())
            .map_err(|error| EngineError::internal("planning a save", error.to_string()))?;
        let exist = replicated.iter().all(|top| (*top as usize) < nodes.len())
            && tensors.iter().all(|tensor| (tensor.storage as usize) < storages.len());
        if !exist {
            return Err(EngineError::internal(
                "planning a save",
                "a node or a storage is named that does not exist",
            ));
        }
        let order = number_replicas(nodes, tensors, replicated);
        check_own(request, &order)?;
        let bytes: Vec<u64> =
            order.iter().map(|storage| storages[*storage as usize].bytes).collect();
        let parts = share_of(&bytes, rank, world_size);
        for ((number, storage), part) in (0..).zip(order).zip(parts) {
            let (start, bytes) = (part.start, part.end - part.start);
            replicas[storage as usize] = Some(Replica { number, start, bytes });
        }
        Ok(Self { replicas, names: names_of(request) })
    }

    /// The part of a storage that this rank writes.
    pub(crate) fn part(&self, storage: usize, input: &StorageInput<'_>) -> Range<u64> {
        match self.replicas[storage] {
            None => 0..input.bytes,
            Some(part) => part.start..part.start + part.bytes,
        }
    }
}

/// The entries' paths for people: `model.*` where each child of `model` is one.
fn names_of(request: &SaveRequest<'_>) -> Vec<String> {
    let SaveRequest { nodes, replicated, .. } = request;
    let ends = subtree_ends(nodes);
    let mut is_covered = vec![false; nodes.len()];
    for &top in replicated {
        is_covered[top as usize..ends[top as usize]].fill(true);
    }
    for (node, value) in nodes.iter().enumerate().rev() {
        let mut children = children_of(&value.value, node, &ends).peekable();
        let has_children = children.peek().is_some();
        is_covered[node] |= has_children && children.all(|child| is_covered[child]);
    }
    let mut names = Vec::new();
    let (mut walk, mut position, mut end) = (Walk::new(nodes), 0, 0);
    while names.len() < NAMED_MAX && walk.advance().is_some() {
        if position >= end && is_covered[position] {
            end = ends[position];
            let is_top = replicated.iter().any(|top| *top as usize == position);
            names.push(name_of(&walk.path().to_string(), is_top));
        }
        position += 1;
    }
    names
}

fn name_of(path: &str, is_top: bool) -> String {
    let mut name = path.replace(char::is_control, "\u{fffd}");
    name.truncate(name.floor_char_boundary(NAME_BYTES_MAX));
    match (is_top, name.is_empty()) {
        (true, _) => name,
        (false, true) => "*".into(),
        (false, false) => name + ".*",
    }
}

/// Refuses a tensor that is this rank's own and views memory of a replicated storage, beyond what a
/// replicated tensor fills: another rank may write those bytes, and has others there.
fn check_own(request: &SaveRequest<'_>, order: &[u32]) -> Result<()> {
    let SaveRequest { nodes, tensors, replicated, .. } = request;
    let shared: HashSet<u32> = order.iter().copied().collect();
    let mut is_replicated = vec![false; tensors.len()];
    for &top in replicated {
        let top = top as usize;
        for node in &nodes[top..subtree_end(nodes, top)] {
            if let Value::Tensor(tensor) = node.value {
                // A slice is replicated as a whole; its bytes are this rank's own.
                is_replicated[tensor as usize] = tensors[tensor as usize].slice.is_none();
            }
        }
    }
    let is_at_risk =
        |tensor: usize| !is_replicated[tensor] && shared.contains(&tensors[tensor].storage);
    if !(0..tensors.len()).any(is_at_risk) {
        return Ok(());
    }
    let filled = filled_by(tensors, &is_replicated);
    for (tensor, path) in tensor_paths(nodes).map(|(tensor, path)| (tensor as usize, path)) {
        let record = &tensors[tensor];
        let bytes = record.hull();
        let is_filled = |part: &Range<u64>| part.start <= bytes.start && bytes.end <= part.end;
        let parts = filled.get(&record.storage);
        let is_inside = bytes.is_empty() || parts.is_some_and(|parts| parts.iter().any(is_filled));
        if is_at_risk(tensor) && !is_inside {
            let path = path.to_string();
            return Err(EngineError::invalid(
                format!("saving `{path}`"),
                "it belongs to this rank alone but shares memory with a replicated tensor, whose \
                 bytes another rank may write",
                "save a copy of it, `tensor.clone()`, or let `replicated` name it too",
            ));
        }
    }
    Ok(())
}

/// By storage: the bytes that replicated tensors fill without gaps, merged.
fn filled_by(tensors: &[TensorRecord], alike: &[bool]) -> HashMap<u32, Vec<Range<u64>>> {
    let mut filled: HashMap<u32, Vec<Range<u64>>> = HashMap::new();
    let replicated = tensors.iter().zip(alike).filter(|(_, alike)| **alike);
    for (tensor, _) in replicated.filter(|(tensor, _)| tensor.is_dense()) {
        filled.entry(tensor.storage).or_default().push(tensor.hull());
    }
    for parts in filled.values_mut() {
        parts.sort_by_key(|part| part.start);
        let mut merged: Vec<Range<u64>> = Vec::with_capacity(parts.len());
        for part in parts.drain(..) {
            match merged.last_mut().filter(|last| part.start <= last.end) {
                Some(last) => last.end = last.end.max(part.end),
                None => merged.push(part),
            }
        }
        *parts = merged;
    }
    filled
}

/// Where the storages begin and the last one ends.
fn borders_of(bytes: &[u64]) -> Vec<u64> {
    let mut borders = Vec::with_capacity(bytes.len() + 1);
    let mut end = 0_u64;
    borders.push(end);
    for bytes in bytes {
        end = end.saturating_add(*bytes);
        borders.push(end);
    }
    borders
}

/// Where the share of `rank` starts.
fn cut(borders: &[u64], rank: u32, world_size: u32) -> u64 {
    let total = borders.last().copied().unwrap_or_default();
    let even = u128::from(total) * u128::from(rank) / u128::from(world_size);
    let even = u64::try_from(even).expect("a part of the total");
    if rank == 0 || rank == world_size {
        return even;
    }
    let above = borders.partition_point(|border| *border < even);
    let near = [above.checked_sub(1), Some(above)]
        .into_iter()
        .flatten()
        .filter_map(|position| borders.get(position).copied())
        .min_by_key(|border| border.abs_diff(even));
    let snap = total / u64::from(world_size) / SNAP_DIVISOR;
    match near {
        Some(border) if border.abs_diff(even) <= snap => border,
        _ => {
            // Within the storage that begins at the border below.
            let below = above.checked_sub(1).map_or(0, |position| borders[position]);
            below + (even - below) / CUT_ALIGNMENT * CUT_ALIGNMENT
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn one_rank_writes_everything() {
        assert_eq!(share_of(&[5, 0, 7], 0, 1), [0..5, 0..0, 0..7]);
    }

    #[test]
    fn a_storage_larger_than_a_share_is_cut() {
        let bytes = [4 * CUT_ALIGNMENT];
        let half = 2 * CUT_ALIGNMENT;
        assert_eq!(share_of(&bytes, 0, 2)[0], 0..half);
        assert_eq!(share_of(&bytes, 1, 2)[0], half..2 * half);
    }

    #[test]
    fn a_cut_near_a_border_is_moved_there() {
        let bytes = [1_000_000, 1_010_000];
        assert_eq!(share_of(&bytes, 0, 2), [0..1_000_000, 0..0]);
        assert_eq!(share_of(&bytes, 1, 2), [0..0, 0..1_010_000]);
    }

    proptest! {
        #[test]
        fn shares_tile_the_storages_and_are_even(
            bytes in proptest::collection::vec(
                prop_oneof![Just(0), 1..200_u64, 1..(1_u64 << 40)],
                0..40,
            ),
            world_size in 1..70_u32,
        ) {
            let total: u64 = bytes.iter().sum();
            let mean = total / u64::from(world_size);
            let mut ends = vec![0; bytes.len()];
            for rank in 0..world_size {
                let share = share_of(&bytes, rank, world_size);
                let held: u64 = share.iter().map(|part| part.end - part.start).sum();
                prop_assert!(held <= mean + mean / 16 + CUT_ALIGNMENT + 1, "{held} of {mean}");
                for (part, end) in share.iter().zip(&mut ends) {
                    if !part.is_empty() {
                        prop_assert_eq!(part.start, *end);
                        *end = part.end;
                    }
                }
            }
            prop_assert_eq!(ends, bytes);
        }
    }
}
