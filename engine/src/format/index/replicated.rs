//! What all ranks saved alike: the same nodes and tensors in every shard, the bytes dealt out.
//!
//! Always holds for an index that was checked: entries ascend and do not nest; exactly the storages
//! that their tensors view are replicated, and are numbered by first appearance, so that shards
//! whose entries are the same number them alike.

use std::collections::{HashMap, HashSet};

use super::{ShardIndex, TensorRecord};
use crate::format::FormatError;
use crate::format::tree::{self, Key, Node, Segment, TreePath, Value, Walk};

/// Characters of a value that a difference shows.
const SHOWN_CHARS_MAX: usize = 80;

/// Storages that tensors at and below the nodes `tops` view, by first appearance. Tensors and
/// storages that nodes and tensors name must exist.
pub fn number_replicas(nodes: &[Node], tensors: &[TensorRecord], tops: &[u32]) -> Vec<u32> {
    let mut seen = HashSet::new();
    let mut order = Vec::new();
    for &top in tops {
        let top = top as usize;
        for node in &nodes[top..tree::subtree_end(nodes, top)] {
            let Value::Tensor(tensor) = node.value else { continue };
            let storage = tensors[tensor as usize].storage;
            if seen.insert(storage) {
                order.push(storage);
            }
        }
    }
    order
}

/// Checks what the module's head promises. Tree, storages and tensors were checked before.
pub(super) fn check(index: &ShardIndex) -> Result<(), FormatError> {
    let mut end = 0;
    for &top in &index.replicated {
        ensure!(
            (top as usize) < index.nodes.len() && top as usize >= end,
            "node {top} is named as replicated, expected one of {} nodes, after the entry that \
             ends at {end}",
            index.nodes.len()
        );
        end = tree::subtree_end(&index.nodes, top as usize);
    }
    let order = number_replicas(&index.nodes, &index.tensors, &index.replicated);
    for (number, storage) in (0_u32..).zip(&order) {
        let found = index.storages[*storage as usize].replica.map(|replica| replica.number);
        ensure!(
            found == Some(number),
            "storage {storage} is replica {found:?}, expected {number}, by first appearance"
        );
    }
    let replicas = index.storages.iter().filter(|storage| storage.replica.is_some()).count();
    ensure!(
        replicas == order.len(),
        "{replicas} storages are replicated, and the entries view {}",
        order.len()
    );
    Ok(())
}

/// Where two shards' replicated entries first differ.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// Display path.
    pub path: String,
    /// What the first has there; `None` for nothing.
    pub left: Option<String>,
    /// What the second has there.
    pub right: Option<String>,
}

/// Compares the replicated entries of two indexes: paths, plain values, shapes and memory. What the
/// tensors hold is not compared: each rank wrote another part of it.
pub fn difference(left: &ShardIndex, right: &ShardIndex) -> Option<Difference> {
    let (mut left, mut right) = (Entries::new(left), Entries::new(right));
    loop {
        let (one, other) = (left.next(), right.next());
        match (&one, &other) {
            (None, None) => return None,
            (Some(one), Some(other)) if one.is_same(other) => {}
            _ => return Some(Item::difference(one, other)),
        }
    }
}

/// The nodes below an index's replicated entries, in order.
struct Entries<'a> {
    index: &'a ShardIndex,
    walk: Walk<'a>,
    position: usize,
    /// The entries not left yet: where each starts and ends.
    ranges: std::iter::Peekable<Box<dyn Iterator<Item = std::ops::Range<usize>> + 'a>>,
    /// Tensors by first appearance: two nodes may name one tensor.
    tensors: HashMap<u32, usize>,
}

/// One node, in terms that are the same in every shard.
struct Item<'a> {
    path: TreePath<'a>,
    node: &'a Node,
    tensor: Option<Viewed<'a>>,
}

/// A tensor and what it views.
struct Viewed<'a> {
    appearance: usize,
    record: &'a TensorRecord,
    replica: Option<u32>,
    storage_bytes: u64,
}

impl<'a> Entries<'a> {
    fn new(index: &'a ShardIndex) -> Self {
        let ranges: Box<dyn Iterator<Item = _>> = Box::new(index.replicated_nodes());
        Self {
            index,
            walk: Walk::new(&index.nodes),
            position: 0,
            ranges: ranges.peekable(),
            tensors: HashMap::new(),
        }
    }

    fn viewed(&mut self, number: u32) -> Viewed<'a> {
        let next = self.tensors.len();
        let record = &self.index.tensors[number as usize];
        let storage = &self.index.storages[record.storage as usize];
        Viewed {
            appearance: *self.tensors.entry(number).or_insert(next),
            record,
            replica: storage.replica.map(|replica| replica.number),
            storage_bytes: storage.bytes,
        }
    }
}

impl<'a> Iterator for Entries<'a> {
    type Item = Item<'a>;

    fn next(&mut self) -> Option<Item<'a>> {
        loop {
            while self.ranges.next_if(|range| range.end <= self.position).is_some() {}
            let range = self.ranges.peek()?.clone();
            let node = self.walk.advance()?;
            let position = self.position;
            self.position += 1;
            if range.contains(&position) {
                let tensor = match node.value {
                    Value::Tensor(number) => Some(self.viewed(number)),
                    _ => None,
                };
                return Some(Item { path: self.walk.path().clone(), node, tensor });
            }
        }
    }
}

impl Item<'_> {
    fn is_same(&self, other: &Item<'_>) -> bool {
        let paths = self.path.segments.iter().zip(&other.path.segments);
        self.path.segments.len() == other.path.segments.len()
            && paths.into_iter().all(|(one, other)| is_same_segment(*one, *other))
            && match (&self.tensor, &other.tensor) {
                (Some(one), Some(other)) => one.is_same(other),
                (None, None) => is_same_value(&self.node.value, &other.node.value),
                _ => false,
            }
    }

    fn difference(one: Option<Self>, other: Option<Self>) -> Difference {
        let path_of = |item: &Option<Self>| item.as_ref().map(|item| item.path.to_string());
        let shown = |item: Option<Self>| item.map(|item| item.show());
        let (left, right) = (path_of(&one), path_of(&other));
        match (left, right) {
            (Some(left), Some(right)) if left != right => {
                Difference { path: left.clone(), left: shown(one), right: None }
            }
            (left, right) => Difference {
                path: left.or(right).unwrap_or_default(),
                left: shown(one),
                right: shown(other),
            },
        }
    }

    fn show(&self) -> String {
        let text = match &self.tensor {
            Some(Viewed { record, storage_bytes, .. }) => format!(
                "a `{}` tensor of shape {:?} and strides {:?}, over {storage_bytes} bytes",
                record.dtype, record.shape, record.strides
            ),
            None => match &self.node.value {
                Value::Int(value) => value.to_string(),
                Value::Float(value) => format!("{value:?}"),
                Value::Bool(value) => value.to_string(),
                Value::Str(text) => format!("{text:?}"),
                Value::Dict { len, .. } => format!("a dict of {len} entries"),
                Value::List { len } => format!("a list of {len} items"),
                Value::Tuple { len } => format!("a tuple of {len} items"),
                other => format!("{other:?}"),
            },
        };
        match text.char_indices().nth(SHOWN_CHARS_MAX) {
            Some((end, _)) => format!("{}...", &text[..end]),
            None => text,
        }
    }
}

impl Viewed<'_> {
    fn is_same(&self, other: &Viewed<'_>) -> bool {
        let storage = other.record.storage;
        let record = TensorRecord { storage, ..self.record.clone() };
        record == *other.record
            && (self.appearance, self.replica, self.storage_bytes)
                == (other.appearance, other.replica, other.storage_bytes)
    }
}

fn is_same_segment(one: Segment<'_>, other: Segment<'_>) -> bool {
    match (one, other) {
        (Segment::Key(Key::Float(one)), Segment::Key(Key::Float(other))) => {
            one.to_bits() == other.to_bits()
        }
        (one, other) => one == other,
    }
}

/// Equal by bits: a NaN is what it is, and 0.0 is not -0.0.
fn is_same_value(one: &Value, other: &Value) -> bool {
    match (one, other) {
        (Value::Float(one), Value::Float(other)) => one.to_bits() == other.to_bits(),
        (Value::Complex(a, b), Value::Complex(c, d)) => {
            (a.to_bits(), b.to_bits()) == (c.to_bits(), d.to_bits())
        }
        (one, other) => one == other,
    }
}
