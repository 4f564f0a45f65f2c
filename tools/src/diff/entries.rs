//! The entries of two state trees, matched by path.
//!
//! Always holds: every entry of either tree is in the pairing once; those that hold tensors of one
//! description wait for the comparison of their bytes, all others are decided.

use std::collections::{BTreeMap, BTreeSet};

use dtr_engine::format::index::{ShardIndex, TensorKind, TensorRecord};
use dtr_engine::format::tree::{Value, Walk};

use super::{Change, Changed};
use crate::compare::Difference;
use crate::tree_text::place;
use crate::values;

/// What stands at a path.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Entry {
    /// A tensor, and what else must be equal.
    Tensor { number: u32, description: String },
    /// A plain value, as text that equals only if the value does; or a container's type.
    Plain { text: String, is_container: bool },
}

/// Two tensors whose bytes are to be compared, by their numbers in the two shards.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct TensorPair {
    pub(crate) a: u32,
    pub(crate) b: u32,
}

/// A path with what became of it.
#[derive(Clone, Debug)]
pub(crate) struct Paired {
    /// For people.
    pub(crate) path: String,
    /// The first step of the path: the part of the state that it belongs to.
    pub(crate) part: String,
    pub(crate) is_tensor: bool,
    pub(crate) is_container: bool,
    pub(crate) change: Change,
    waits_for: Option<TensorPair>,
}

/// All paths of two trees.
#[derive(Debug)]
pub(crate) struct Pairing {
    pub(crate) entries: Vec<Paired>,
}

/// An entry with its path for people and the part that it belongs to.
struct Located {
    path: String,
    part: String,
    entry: Entry,
}

impl Pairing {
    /// Matches the entries of two trees, in the order of the second, then what was removed.
    pub(crate) fn of(a: &ShardIndex, b: &ShardIndex) -> Self {
        let mut before: BTreeMap<String, (usize, Located)> = entries(a)
            .into_iter()
            .enumerate()
            .map(|(order, (key, located))| (key, (order, located)))
            .collect();
        let mut paired: Vec<Paired> = entries(b)
            .into_iter()
            .map(|(key, located)| pair(before.remove(&key).map(|(_, entry)| entry), located))
            .collect();
        let mut removed: Vec<(usize, Located)> = before.into_values().collect();
        removed.sort_by_key(|(order, _)| *order);
        paired.extend(removed.into_iter().map(|(_, located)| decided(located, Change::Removed)));
        Self { entries: paired }
    }

    /// The tensors whose bytes decide, each pair once, in the order in which they are in the first.
    pub(crate) fn tensor_pairs(&self) -> Vec<TensorPair> {
        let pairs: BTreeSet<TensorPair> =
            self.entries.iter().filter_map(|entry| entry.waits_for).collect();
        pairs.into_iter().collect()
    }

    /// Decides the entries that waited.
    pub(crate) fn take(&mut self, differences: &BTreeMap<TensorPair, Difference>) {
        for entry in &mut self.entries {
            let Some(pair) = entry.waits_for.take() else { continue };
            // Tensors without items have no part to be compared in, and no bytes to differ.
            let difference = differences.get(&pair).copied().unwrap_or_default();
            if difference.items_changed > 0 {
                entry.change = Change::Changed(Changed::Items(difference));
            }
        }
    }
}

/// The entries of a tree by typed path, in its order.
fn entries(index: &ShardIndex) -> Vec<(String, Located)> {
    let mut walk = Walk::new(&index.nodes);
    let mut entries = Vec::with_capacity(index.nodes.len());
    while let Some(node) = walk.advance() {
        let segments = &walk.path().segments;
        let entry = match &node.value {
            Value::Tensor(number) => Entry::Tensor {
                number: *number,
                description: describe(&index.tensors[*number as usize]),
            },
            value => Entry::Plain { text: values::text(value), is_container: value.is_container() },
        };
        let located = Located {
            path: walk.path().to_string(),
            part: segments.first().map(ToString::to_string).unwrap_or_default(),
            entry,
        };
        // What distinguishes the types of keys, and -0.0 from 0.0.
        entries.push((format!("{segments:?}"), located));
    }
    entries
}

fn pair(before: Option<Located>, after: Located) -> Paired {
    let Some(before) = before else { return decided(after, Change::Added) };
    match (&before.entry, &after.entry) {
        (
            Entry::Tensor { number: a, description: a_is },
            Entry::Tensor { number: b, description: b_is },
        ) if a_is == b_is => {
            let waits_for = Some(TensorPair { a: *a, b: *b });
            Paired { waits_for, ..decided(after, Change::Equal) }
        }
        (a, b) if shown(a) == shown(b) => decided(after, Change::Equal),
        (a, b) => {
            let changed = Changed::Described(shown(a), shown(b));
            decided(after, Change::Changed(changed))
        }
    }
}

fn decided(located: Located, change: Change) -> Paired {
    Paired {
        is_tensor: located.entry.is_tensor(),
        is_container: matches!(located.entry, Entry::Plain { is_container: true, .. }),
        path: located.path,
        part: located.part,
        change,
        waits_for: None,
    }
}

fn shown(entry: &Entry) -> String {
    match entry {
        Entry::Tensor { description, .. } => description.clone(),
        Entry::Plain { text, .. } => text.clone(),
    }
}

/// Everything about a tensor that must be equal besides its bytes.
fn describe(tensor: &TensorRecord) -> String {
    let library = match tensor.kind {
        TensorKind::Torch => "tensor",
        TensorKind::TorchParameter => "parameter",
        TensorKind::Numpy => "numpy array",
    };
    let grad = if tensor.requires_grad { ", requires grad" } else { "" };
    format!("{library} {} {}{grad}", tensor.dtype, place(tensor))
}
