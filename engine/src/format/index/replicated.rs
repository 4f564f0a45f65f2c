//! Replicated entries: the same nodes and tensors in every shard, their bytes divided among the
//! shards.
//!
//! A slice of a larger tensor may stand in an entry: all ranks have the same whole, each its own
//! part of it, so its position and its memory layout differ from shard to shard.
//!
//! Always holds for an index that was checked: entries ascend and do not nest; exactly the storages
//! that their whole tensors view are replicated, and are numbered by first appearance, so that
//! shards whose entries are the same number them the same way.

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};
use std::ops::Range;

use super::{GlobalSlice, ShardIndex, TensorRecord, wire};
use crate::format::FormatError;
use crate::format::checksum::Digest;
use crate::format::tree::{self, Key, Node, Segment, TreePath, Value, Walk};

/// Characters of a value, and of a path, that a difference shows.
const SHOWN_CHARS_MAX: usize = 200;
const PATH_CHARS_MAX: usize = 400;

/// Storages that tensors at and below the nodes `tops` view, by first appearance; those of slices
/// left out. Tensors and storages that nodes and tensors name must exist.
pub(crate) fn number_replicas(nodes: &[Node], tensors: &[TensorRecord], tops: &[u32]) -> Vec<u32> {
    let mut seen = HashSet::new();
    let mut order = Vec::new();
    for &top in tops {
        let top = top as usize;
        for node in &nodes[top..tree::subtree_end(nodes, top)] {
            let Value::Tensor(tensor) = node.value else { continue };
            let record = &tensors[tensor as usize];
            if record.slice.is_none() && seen.insert(record.storage) {
                order.push(record.storage);
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
    /// Display path, cut if it is very long.
    pub path: String,
    /// What the first has there; `None` where it has nothing more.
    pub left: Option<String>,
    /// What the second has there.
    pub right: Option<String>,
}

/// Compares the replicated entries of two indexes: paths, plain values, and how tensors view what
/// memory. What the tensors hold is not compared: each rank wrote another part of it.
///
/// Takes time in proportion to the indexes: a key that stands above many nodes is compared once.
pub fn difference(left: &ShardIndex, right: &ShardIndex) -> Option<Difference> {
    let (mut left, mut right) = (Entries::new(left), Entries::new(right));
    let mut compared = Compared::default();
    loop {
        match (left.next(), right.next()) {
            (None, None) => return None,
            (Some(one), Some(other)) => {
                let is_same_place = one.is_top == other.is_top
                    && if one.is_top {
                        compared.are_same(left.path(), right.path())
                    } else {
                        // The nodes before were the same, so the paths are, but for the key.
                        is_same_key(one.node.key.as_ref(), other.node.key.as_ref())
                    };
                if !is_same_place {
                    let right = Some(format!("`{}` in its place", right.shown_path()));
                    let (path, left) = (left.shown_path(), Some(one.show()));
                    return Some(Difference { path, left, right });
                }
                if let Some((one, other)) = one.difference(&other) {
                    let path = left.shown_path();
                    return Some(Difference { path, left: Some(one), right: Some(other) });
                }
            }
            (Some(one), None) => {
                let (path, left) = (left.shown_path(), Some(one.show()));
                return Some(Difference { path, left, right: None });
            }
            (None, Some(other)) => {
                let (path, right) = (right.shown_path(), Some(other.show()));
                return Some(Difference { path, left: None, right });
            }
        }
    }
}

/// A checksum of what [`difference`] compares, for ranks that do not see each other's shards;
/// `None` where nothing is replicated. Two indexes without a difference have the same.
pub(crate) fn structure_crc32c(index: &ShardIndex) -> Option<u32> {
    if index.replicated.is_empty() {
        return None;
    }
    let mut digest = Digest::new();
    let mut entries = Entries::new(index);
    while let Some(item) = entries.next() {
        if item.is_top {
            let path = entries.path();
            digest.update(&(path.segments.len() as u64).to_le_bytes());
            path.segments.iter().for_each(|segment| take_in(&mut digest, &segment_bytes(segment)));
        }
        take_in(&mut digest, &item.bytes());
    }
    Some(digest.finish())
}

/// With its length, so that no two lists of parts look the same.
fn take_in(digest: &mut Digest, part: &[u8]) {
    digest.update(&(part.len() as u64).to_le_bytes());
    digest.update(part);
}

fn segment_bytes(segment: &Segment<'_>) -> Vec<u8> {
    match segment {
        Segment::Key(key) => {
            wire::node_bytes(&Node { key: Some((*key).clone()), value: Value::None })
        }
        Segment::Index(position) => (*position as u64).to_le_bytes().to_vec(),
        Segment::Metadata => b"metadata".to_vec(),
    }
}

/// Paths of the entries that were compared last: what is the same memory as before is the same.
#[derive(Default)]
struct Compared<'a> {
    left: Vec<Segment<'a>>,
    right: Vec<Segment<'a>>,
}

impl<'a> Compared<'a> {
    fn are_same(&mut self, left: &TreePath<'a>, right: &TreePath<'a>) -> bool {
        let (left, right) = (&left.segments, &right.segments);
        let is_same = left.len() == right.len()
            && (0..left.len()).all(|at| {
                let is_known = is_same_memory(self.left.get(at), left[at])
                    && is_same_memory(self.right.get(at), right[at]);
                is_known || is_same_segment(left[at], right[at])
            });
        (self.left, self.right) = (left.clone(), right.clone());
        is_same
    }
}

fn is_same_memory(before: Option<&Segment<'_>>, now: Segment<'_>) -> bool {
    match (before, now) {
        (Some(Segment::Key(before)), Segment::Key(now)) => std::ptr::eq(*before, now),
        _ => false,
    }
}

/// The nodes below an index's replicated entries, in order.
struct Entries<'a> {
    index: &'a ShardIndex,
    walk: Walk<'a>,
    position: usize,
    /// The entries not left yet: where each starts and ends.
    ranges: std::iter::Peekable<Box<dyn Iterator<Item = Range<usize>> + 'a>>,
    /// Tensors by first appearance: two nodes may name one tensor.
    tensors: HashMap<u32, usize>,
}

/// One node, in terms that are the same in every shard.
struct Item<'a> {
    node: &'a Node,
    is_top: bool,
    tensor: Option<Viewed<'a>>,
}

/// A tensor and what it views.
struct Viewed<'a> {
    appearance: usize,
    record: Cow<'a, TensorRecord>,
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

    /// Where the node last given stands.
    fn path(&self) -> &TreePath<'a> {
        self.walk.path()
    }

    fn shown_path(&self) -> String {
        cut(self.path().to_string(), PATH_CHARS_MAX)
    }

    fn viewed(&mut self, number: u32) -> Viewed<'a> {
        let next = self.tensors.len();
        let appearance = *self.tensors.entry(number).or_insert(next);
        let record = &self.index.tensors[number as usize];
        if let Some(slice) = &record.slice {
            let record = Cow::Owned(whole_of(record, slice));
            return Viewed { appearance, record, replica: None, storage_bytes: 0 };
        }
        let storage = &self.index.storages[record.storage as usize];
        Viewed {
            appearance,
            record: Cow::Borrowed(record),
            replica: storage.replica.map(|replica| replica.number),
            storage_bytes: storage.bytes,
        }
    }
}

/// What is the same on all ranks of a tensor of which each holds a slice.
fn whole_of(record: &TensorRecord, slice: &GlobalSlice) -> TensorRecord {
    TensorRecord {
        storage: 0,
        kind: record.kind,
        dtype: record.dtype.clone(),
        item_bytes: record.item_bytes,
        shape: slice.shape.clone(),
        strides: Vec::new(),
        offset: 0,
        requires_grad: record.requires_grad,
        slice: Some(GlobalSlice { shape: slice.shape.clone(), offsets: Vec::new() }),
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
                return Some(Item { node, is_top: position == range.start, tensor });
            }
        }
    }
}

impl Item<'_> {
    /// What the two are, if they are not the same.
    fn difference(&self, other: &Item<'_>) -> Option<(String, String)> {
        match (&self.tensor, &other.tensor) {
            (Some(one), Some(other)) => one.difference(other),
            (None, None) if is_same_value(&self.node.value, &other.node.value) => None,
            _ => Some((self.show(), other.show())),
        }
    }

    /// The same bytes in every shard.
    fn bytes(&self) -> Vec<u8> {
        let Some(viewed) = &self.tensor else { return wire::node_bytes(self.node) };
        let key = Node { key: self.node.key.clone(), value: Value::None };
        let replica = viewed.replica.unwrap_or(u32::MAX);
        let record = TensorRecord { storage: replica, ..TensorRecord::clone(&viewed.record) };
        let mut bytes = wire::node_bytes(&key);
        bytes.extend((viewed.appearance as u64).to_le_bytes());
        bytes.extend(viewed.storage_bytes.to_le_bytes());
        bytes.extend(wire::tensor_bytes(&record));
        bytes
    }

    fn show(&self) -> String {
        let text = match &self.node.value {
            Value::Tensor(_) => self.tensor.as_ref().map_or_else(String::new, |viewed| {
                format!("a `{}` tensor of shape {:?}", viewed.record.dtype, viewed.record.shape)
            }),
            Value::Int(value) => value.to_string(),
            Value::Float(value) => format!("{value:?}"),
            Value::Bool(value) => value.to_string(),
            Value::Str(text) => format!("{text:?}"),
            Value::Dict { len, .. } => format!("a dict of {len} entries"),
            Value::List { len } => format!("a list of {len} items"),
            Value::Tuple { len } => format!("a tuple of {len} items"),
            other => format!("{other:?}"),
        };
        cut(text, SHOWN_CHARS_MAX)
    }
}

impl Viewed<'_> {
    /// The first property in which two tensors differ, of each.
    fn difference(&self, other: &Self) -> Option<(String, String)> {
        if self.is_same(other) {
            return None;
        }
        let mut pairs = self.properties().into_iter().zip(other.properties());
        let (one, other) = pairs.find(|(one, other)| one != other)?;
        Some((cut(one, SHOWN_CHARS_MAX), cut(other, SHOWN_CHARS_MAX)))
    }

    fn properties(&self) -> [String; 11] {
        let TensorRecord { kind, dtype, item_bytes, shape, strides, offset, .. } = &*self.record;
        [
            format!("a {kind:?} tensor"),
            format!("a `{dtype}` tensor"),
            format!("a tensor of {item_bytes} bytes an item"),
            format!("a `{dtype}` tensor of shape {shape:?}"),
            format!("a tensor of strides {strides:?}"),
            format!("a tensor that begins {offset} items into its memory"),
            format!("a tensor with requires_grad={}", self.record.requires_grad),
            match self.record.slice {
                Some(_) => "a tensor of which each rank holds a slice".into(),
                None => "a tensor that each rank holds whole".into(),
            },
            format!("a tensor over {} bytes of memory", self.storage_bytes),
            format!("tensor number {} of those that are replicated", self.appearance),
            format!("a tensor over memory number {:?}", self.replica),
        ]
    }

    fn is_same(&self, other: &Self) -> bool {
        let (one, two) = (&self.record, &other.record);
        one.kind == two.kind
            && one.item_bytes == two.item_bytes
            && (&one.dtype, &one.shape, &one.strides) == (&two.dtype, &two.shape, &two.strides)
            && (one.offset, one.requires_grad, &one.slice)
                == (two.offset, two.requires_grad, &two.slice)
            && (self.appearance, self.replica, self.storage_bytes)
                == (other.appearance, other.replica, other.storage_bytes)
    }
}

fn cut(text: String, chars_max: usize) -> String {
    match text.char_indices().nth(chars_max) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}

fn is_same_segment(one: Segment<'_>, other: Segment<'_>) -> bool {
    match (one, other) {
        (Segment::Key(one), Segment::Key(other)) => is_same_key(Some(one), Some(other)),
        (one, other) => one == other,
    }
}

/// Equal by bits: a NaN is what it is, and 0.0 is not -0.0.
fn is_same_key(one: Option<&Key>, other: Option<&Key>) -> bool {
    match (one, other) {
        (Some(Key::Float(one)), Some(Key::Float(other))) => one.to_bits() == other.to_bits(),
        (one, other) => one == other,
    }
}

fn is_same_value(one: &Value, other: &Value) -> bool {
    match (one, other) {
        (Value::Float(one), Value::Float(other)) => one.to_bits() == other.to_bits(),
        (Value::Complex(a, b), Value::Complex(c, d)) => {
            (a.to_bits(), b.to_bits()) == (c.to_bits(), d.to_bits())
        }
        (one, other) => one == other,
    }
}
