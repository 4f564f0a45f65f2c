//! From the shards of a checkpoint to the tensors of an export.
//!
//! ```text
//! own shard:     what the rank holds, or what is replicated          -> tensors
//! every shard:   slices                                              -> a tensor for each path
//! ```
//!
//! Always holds: names are unique; what was asked for exists, or its absence is reported. Memory
//! grows with what the shards describe, and is bounded by their bytes.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use dtr_engine::format::index::{ShardIndex, TensorRecord};
use dtr_engine::format::tree::{TreePath, Value, tensor_paths};
use dtr_engine::load::Checkpoint;
use dtr_engine::{Engine, Result};

use super::parts::{Found, Tensor};
use super::selection::{NAMES_SHOWN_MAX, Selection, cannot, shown};

/// Descriptions that are kept, whatever the bytes of the shards, and beyond: one for as many bytes
/// as the smallest storage takes.
const DESCRIPTIONS_FREE: u64 = 1 << 20;
const BYTES_PER_DESCRIPTION: u64 = 64;

/// Whose tensors are wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Whose {
    /// All that the rank of the checkpoint has, those of which it holds slices whole.
    OfRank,
    /// What is no rank's alone: replicated entries, and tensors of which each rank holds a slice.
    OfAll,
}

/// The tensors, and what was left out.
#[derive(Debug)]
pub(super) struct Gathered {
    pub(super) tensors: Vec<Tensor>,
    /// Paths of tensors that were asked for and are each rank's own.
    pub(super) alone: BTreeSet<String>,
}

/// Finds what of the tensors of a checkpoint goes into files, in the order in which shards have it.
pub(super) fn gather(
    engine: &Engine,
    own: &Checkpoint,
    selection: &Selection<'_>,
    whose: Whose,
) -> Result<Gathered> {
    let mut gathering = Gathering::new(selection, whose, own.step());
    gathering.add(own, Gathering::take_own)?;
    if whose == Whose::OfAll || !gathering.in_slices.is_empty() {
        for rank in (0..own.manifest().world_size).filter(|rank| *rank != own.header().rank) {
            gathering.add(&engine.shard_beside(own, rank)?, Gathering::take_other)?;
        }
    }
    let Gathering { found, alone, unfit, step, .. } = gathering;
    if found.is_empty() && alone.is_empty() {
        return Err(selection.none_of(&unfit));
    }
    let mut ordered = found
        .into_iter()
        .map(|(name, found)| Ok((found.order(), found.put_together(name, step)?)))
        .collect::<Result<Vec<_>>>()?;
    ordered.sort_by_key(|(order, _)| *order);
    Ok(Gathered { tensors: ordered.into_iter().map(|(_, tensor)| tensor).collect(), alone })
}

struct Gathering<'s, 'o> {
    selection: &'s Selection<'o>,
    whose: Whose,
    step: u64,
    /// By name in the files.
    found: BTreeMap<String, Found>,
    /// Names of those in slices, by their paths with the types of keys, which may differ where a
    /// path reads the same.
    in_slices: HashMap<String, String>,
    alone: BTreeSet<String>,
    /// Some that were not asked for.
    unfit: Vec<String>,
    /// How many descriptions may still be kept.
    allowed: u64,
}

/// A tensor of a shard.
struct Candidate<'a> {
    rank: u32,
    path: &'a TreePath<'a>,
    shown: String,
    record: &'a TensorRecord,
    /// Whether it is at or below a replicated entry.
    is_replicated: bool,
}

impl<'s, 'o> Gathering<'s, 'o> {
    fn new(selection: &'s Selection<'o>, whose: Whose, step: u64) -> Self {
        Self {
            selection,
            whose,
            step,
            found: BTreeMap::new(),
            in_slices: HashMap::new(),
            alone: BTreeSet::new(),
            unfit: Vec::new(),
            allowed: DESCRIPTIONS_FREE,
        }
    }

    /// Takes each tensor of a shard that was asked for.
    fn add(
        &mut self,
        shard: &Checkpoint,
        take: impl Fn(&mut Self, &Candidate<'_>) -> Result<()>,
    ) -> Result<()> {
        self.allowed = self.allowed.saturating_add(shard.file_bytes() / BYTES_PER_DESCRIPTION);
        let index = shard.index();
        for ((number, path), is_replicated) in tensor_paths(&index.nodes).zip(are_replicated(index))
        {
            let shown = shown(path.to_string());
            if self.selection.fits(&shown) {
                let record = &index.tensors[number as usize];
                let rank = shard.header().rank;
                take(self, &Candidate { rank, path: &path, shown, record, is_replicated })?;
            } else if self.unfit.len() < NAMES_SHOWN_MAX {
                self.unfit.push(shown);
            }
        }
        Ok(())
    }

    fn take_own(&mut self, own: &Candidate<'_>) -> Result<()> {
        let Some(slice) = &own.record.slice else {
            if self.whose == Whose::OfRank || own.is_replicated {
                return self.insert(own).map(drop);
            }
            return self.leave(own);
        };
        let name = self.insert(own)?;
        // What a rank holds all of needs no other.
        if self.whose == Whose::OfAll || slice.shape != own.record.shape {
            self.in_slices.insert(format!("{:?}", own.path), name);
        }
        Ok(())
    }

    fn take_other(&mut self, other: &Candidate<'_>) -> Result<()> {
        if other.record.slice.is_none() {
            let is_own = self.whose == Whose::OfAll && !other.is_replicated;
            return if is_own { self.leave(other) } else { Ok(()) };
        }
        let typed = format!("{:?}", other.path);
        if let Some(name) = self.in_slices.get(&typed) {
            let found = self.found.get_mut(name).expect("what has a name was found");
            found.add(other.rank, other.record, self.step)?;
            return self.count(&other.shown);
        }
        if self.whose == Whose::OfAll {
            let name = self.insert(other)?;
            self.in_slices.insert(typed, name);
        }
        Ok(())
    }

    /// Takes a tensor that was not met before; its name.
    fn insert(&mut self, tensor: &Candidate<'_>) -> Result<String> {
        let name = self.selection.name(&tensor.shown)?.to_owned();
        let found = Found::new(tensor.shown.clone(), tensor.rank, tensor.record);
        if self.found.insert(name.clone(), found).is_some() {
            let why = "two tensors are called this, as integer and string keys can be";
            return Err(cannot(&tensor.shown, why));
        }
        self.count(&tensor.shown)?;
        Ok(name)
    }

    fn leave(&mut self, tensor: &Candidate<'_>) -> Result<()> {
        if self.alone.insert(tensor.shown.clone()) { self.count(&tensor.shown) } else { Ok(()) }
    }

    /// A few bytes of a shard must not become gigabytes of memory.
    fn count(&mut self, path: &str) -> Result<()> {
        self.allowed = self.allowed.checked_sub(1).ok_or_else(|| {
            cannot(path, "the shards describe more tensors than their bytes could hold")
        })?;
        Ok(())
    }
}

/// For each tensor node in order: whether it is replicated.
fn are_replicated(index: &ShardIndex) -> impl Iterator<Item = bool> + '_ {
    let mut alike = index.replicated_nodes().peekable();
    let nodes = index.nodes.iter().enumerate();
    nodes.filter(|(_, node)| matches!(node.value, Value::Tensor(_))).map(move |(position, _)| {
        while alike.next_if(|range| range.end <= position).is_some() {}
        alike.peek().is_some_and(|range| range.contains(&position))
    })
}
