//! The state tree: nested containers with tensors at the leaves, as a flat list in preorder.
//!
//! Always holds after decoding: the list is exactly one tree, no deeper than `DEPTH_MAX`; every
//! child of a dict has a key, no other node has one; tensor indexes are in range. Nothing here
//! recurses, so no tree, however deep, overflows a stack.

use std::fmt;

use super::FormatError;

/// Deepest nesting of containers.
const DEPTH_MAX: usize = 128;
/// Most nodes in one tree.
pub(crate) const NODES_MAX: usize = 1 << 24;

/// One node. Children follow their parent directly, in order.
#[derive(Clone, Debug, PartialEq)]
pub struct Node {
    /// Key in the parent dict; `None` for children of lists and tuples, for the root, and for the
    /// metadata child of an ordered dict.
    pub key: Option<Key>,
    /// What stands here.
    pub value: Value,
}

/// A dict's key, typed: the integer 3 is not the string "3".
#[derive(Clone, Debug, PartialEq)]
pub enum Key {
    /// A string.
    Str(String),
    /// An integer that fits 64 bits.
    Int(i64),
    /// A larger integer: two's complement, little-endian, no redundant sign bytes.
    BigInt(Vec<u8>),
    /// A boolean.
    Bool(bool),
    /// A float, by its bits (-0.0 and NaN kept).
    Float(f64),
    /// Bytes.
    Bytes(Vec<u8>),
    /// Python's `None`.
    None,
}

/// The type of a dict. Discriminants are persisted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum DictKind {
    /// `dict`.
    Plain = 0,
    /// `collections.OrderedDict`, as module state dicts are.
    Ordered = 1,
    /// `collections.Counter`, as some schedulers of learning rates have.
    Counter = 2,
}

impl DictKind {
    /// All, by ascending discriminant.
    pub const ALL: [Self; 3] = [Self::Plain, Self::Ordered, Self::Counter];
}

/// What stands at a node. Containers carry their number of children.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// `None`.
    None,
    /// A boolean.
    Bool(bool),
    /// An integer that fits 64 bits.
    Int(i64),
    /// A larger integer: two's complement, little-endian, no redundant sign bytes.
    BigInt(Vec<u8>),
    /// A float, by its bits.
    Float(f64),
    /// A complex number, by its bits.
    Complex(f64, f64),
    /// A string.
    Str(String),
    /// Bytes.
    Bytes(Vec<u8>),
    /// Index into the shard's tensors; two nodes may name the same one.
    Tensor(u32),
    /// A numpy scalar: `dtype.str` and the item's bytes.
    NumpyScalar {
        /// numpy's `dtype.str`, for example `<f4`.
        dtype: String,
        /// The item's bytes.
        bytes: Vec<u8>,
    },
    /// `torch.dtype`, by name without `torch.`.
    TorchDtype(String),
    /// `torch.device`, as its string.
    TorchDevice(String),
    /// `torch.Size`.
    TorchSize(Vec<i64>),
    /// `numpy.dtype`, as its `str`.
    NumpyDtype(String),
    /// A dict with this many entries.
    Dict {
        /// Entries, not counting the metadata child.
        len: u32,
        /// Its type.
        kind: DictKind,
        /// The first child, without a key, is the dict's `_metadata` attribute.
        metadata: bool,
    },
    /// A list.
    List {
        /// Items.
        len: u32,
    },
    /// A tuple.
    Tuple {
        /// Items.
        len: u32,
    },
}

impl Value {
    /// Whether children follow.
    pub fn is_container(&self) -> bool {
        self.children().is_some()
    }

    /// How many children follow, and how they are named; `None` for a leaf.
    fn children(&self) -> Option<Open> {
        let (left, naming) = match *self {
            Self::Dict { len, metadata, .. } => {
                (len as usize + usize::from(metadata), Naming::Keys { metadata })
            }
            Self::List { len } | Self::Tuple { len } => (len as usize, Naming::Positions),
            _ => return None,
        };
        Some(Open { left, position: 0, naming })
    }
}

/// One step of a path.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Segment<'a> {
    /// An entry of a dict.
    Key(&'a Key),
    /// An item of a list or tuple.
    Index(usize),
    /// The `_metadata` attribute of a dict.
    Metadata,
}

/// Where a node stands, from the root. Typed; for people, [`fmt::Display`] joins the segments with
/// `.`: strings as they are, integers and positions in decimal (so the integer 3, the string `3`
/// and position 3 look the same), other keys as Python writes them.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TreePath<'a> {
    /// The steps; none for the root.
    pub segments: Vec<Segment<'a>>,
}

impl fmt::Display for TreePath<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (position, segment) in self.segments.iter().enumerate() {
            if position > 0 {
                formatter.write_str(".")?;
            }
            segment.fmt(formatter)?;
        }
        Ok(())
    }
}

impl fmt::Display for Segment<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Key(key) => key.fmt(formatter),
            Self::Index(index) => index.fmt(formatter),
            Self::Metadata => formatter.write_str("_metadata"),
        }
    }
}

impl fmt::Display for Key {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Str(text) => formatter.write_str(text),
            Self::Int(value) => value.fmt(formatter),
            // Decimal would cost the square of a length that a file chose.
            Self::BigInt(bytes) => {
                formatter.write_str("int(0x")?;
                bytes.iter().rev().try_for_each(|byte| write!(formatter, "{byte:02x}"))?;
                formatter.write_str(")")
            }
            Self::Bool(true) => formatter.write_str("True"),
            Self::Bool(false) => formatter.write_str("False"),
            Self::Float(value) => write!(formatter, "{value:?}"),
            Self::Bytes(bytes) => write!(formatter, "b\"{}\"", bytes.escape_ascii()),
            Self::None => formatter.write_str("None"),
        }
    }
}

/// Visits a tree's nodes in order, knowing the path of each.
///
/// A list that is no tree is walked as far as it is one.
#[derive(Clone, Debug)]
pub struct Walk<'a> {
    nodes: &'a [Node],
    /// Index of the next node.
    next: usize,
    /// The containers around the node last visited, outermost first; itself last if it is one.
    open: Vec<Open>,
    /// Path of the node last visited.
    path: TreePath<'a>,
}

/// A container whose children are being visited.
#[derive(Clone, Copy, Debug)]
struct Open {
    /// Children not yet visited.
    left: usize,
    /// Children already visited.
    position: usize,
    naming: Naming,
}

/// How a container names its children.
#[derive(Clone, Copy, Debug)]
enum Naming {
    /// Lists and tuples.
    Positions,
    /// Dicts; with metadata, all but the first.
    Keys { metadata: bool },
}

impl Open {
    /// Whether the next child has a key.
    fn next_has_key(&self) -> bool {
        match self.naming {
            Naming::Positions => false,
            Naming::Keys { metadata } => !metadata || self.position > 0,
        }
    }

    /// The path segment of the next child.
    fn next_segment<'a>(&self, node: &'a Node) -> Segment<'a> {
        match (&node.key, self.naming) {
            (Some(key), _) => Segment::Key(key),
            (None, Naming::Keys { .. }) => Segment::Metadata,
            (None, Naming::Positions) => Segment::Index(self.position),
        }
    }
}

impl<'a> Walk<'a> {
    /// Starts before the root.
    pub fn new(nodes: &'a [Node]) -> Self {
        Self { nodes, next: 0, open: Vec::new(), path: TreePath::default() }
    }

    /// Goes to the next node in preorder; `None` after the last.
    pub fn advance(&mut self) -> Option<&'a Node> {
        self.leave_finished();
        let node = self.nodes.get(self.next)?;
        match self.open.last_mut() {
            Some(parent) => {
                self.path.segments.push(parent.next_segment(node));
                parent.position += 1;
                parent.left -= 1;
            }
            None if self.next > 0 => return None,
            None => {}
        }
        self.next += 1;
        self.open.extend(node.value.children());
        Some(node)
    }

    /// Path of the node that [`Walk::advance`] returned last.
    pub fn path(&self) -> &TreePath<'a> {
        &self.path
    }

    /// Closes the node last visited, if it is a leaf, and every container that has no child left.
    fn leave_finished(&mut self) {
        // A path is as long as the containers around its node; one that is itself open adds one.
        self.path.segments.truncate(self.open.len().saturating_sub(1));
        while self.open.last().is_some_and(|container| container.left == 0) {
            self.open.pop();
            self.path.segments.truncate(self.open.len().saturating_sub(1));
        }
    }
}

/// Index after the last node of the subtree whose top is `top`, or after the last node of a list
/// that is no tree.
pub(crate) fn subtree_end(nodes: &[Node], top: usize) -> usize {
    let mut left = 1;
    let mut end = top;
    while left > 0
        && let Some(node) = nodes.get(end)
    {
        left += node.value.children().map_or(0, |children| children.left);
        left -= 1;
        end += 1;
    }
    end
}

/// [`subtree_end`] of every node of a tree.
pub(crate) fn subtree_ends(nodes: &[Node]) -> Vec<usize> {
    let mut ends = vec![0; nodes.len()];
    for (index, node) in nodes.iter().enumerate().rev() {
        let mut end = index + 1;
        for _ in 0..node.value.children().map_or(0, |children| children.left) {
            end = ends.get(end).copied().unwrap_or(nodes.len());
        }
        ends[index] = end;
    }
    ends
}

/// The children of the node `index`, without a dict's metadata; `ends` are the tree's
/// [`subtree_ends`].
pub(crate) fn children_of<'a>(
    value: &Value,
    index: usize,
    ends: &'a [usize],
) -> impl Iterator<Item = usize> + 'a {
    let (count, first) = match *value {
        Value::Dict { len, metadata, .. } => {
            (len, if metadata { ends[index + 1] } else { index + 1 })
        }
        Value::List { len } | Value::Tuple { len } => (len, index + 1),
        _ => (0, index + 1),
    };
    let children = std::iter::successors(Some(first), |child| ends.get(*child).copied());
    children.take(count as usize)
}

/// Every tensor node in order: the tensor's index and the node's path.
pub fn tensor_paths(nodes: &[Node]) -> impl Iterator<Item = (u32, TreePath<'_>)> {
    let mut walk = Walk::new(nodes);
    std::iter::from_fn(move || {
        loop {
            if let Value::Tensor(tensor) = walk.advance()?.value {
                return Some((tensor, walk.path().clone()));
            }
        }
    })
}

/// Bytes of all strings and bytes, of which a value may have any number.
pub(crate) fn value_bytes(nodes: &[Node]) -> u64 {
    let bytes = |node: &Node| match &node.value {
        Value::Str(text) => text.len(),
        Value::Bytes(bytes) => bytes.len(),
        _ => 0,
    };
    nodes.iter().map(|node| bytes(node) as u64).sum()
}

/// Checks that `nodes` are exactly one tree over `tensors` tensors, and that each value has its one
/// right form.
pub(crate) fn validate(nodes: &[Node], tensors: usize) -> Result<(), FormatError> {
    ensure!(!nodes.is_empty(), "the tree is empty, expected at least a root");
    ensure!(nodes.len() <= NODES_MAX, "the tree has {} nodes, at most {NODES_MAX}", nodes.len());
    let mut walk = Walk::new(nodes);
    loop {
        walk.leave_finished();
        let index = walk.next;
        let has_key = walk.open.last().is_some_and(Open::next_has_key);
        let Some(node) = walk.advance() else { break };
        ensure!(
            node.key.is_some() == has_key,
            "node {index} at `{}` {}",
            walk.path(),
            if has_key {
                "of a dict has no key"
            } else {
                "has a key but is not an entry of a dict"
            }
        );
        ensure!(
            walk.open.len() <= DEPTH_MAX,
            "node {index} nests containers deeper than {DEPTH_MAX}"
        );
        let left = nodes.len() - walk.next;
        if let Some(children) = node.value.children() {
            ensure!(
                children.left <= left,
                "node {index} at `{}` claims {} children, and only {left} nodes follow",
                walk.path(),
                children.left
            );
        }
        validate_node(node, tensors).map_err(|why| {
            FormatError::Damaged(format!("node {index} at `{}` {why}", walk.path()))
        })?;
    }
    ensure!(
        walk.open.is_empty(),
        "the tree ends early: {} containers lack children",
        walk.open.len()
    );
    ensure!(
        walk.next == nodes.len(),
        "the tree ends after {} nodes, and {} are there",
        walk.next,
        nodes.len()
    );
    Ok(())
}

/// Checks one node by itself. The error continues a sentence that begins with the node.
fn validate_node(node: &Node, tensors: usize) -> Result<(), String> {
    if let Some(Key::BigInt(bytes)) = &node.key
        && !is_canonical_big_int(bytes)
    {
        return Err("has an integer key that is not in its shortest form".into());
    }
    match &node.value {
        Value::BigInt(bytes) if !is_canonical_big_int(bytes) => {
            Err("is an integer that is not in its shortest form".into())
        }
        Value::Tensor(tensor) if *tensor as usize >= tensors => {
            Err(format!("names tensor {tensor} of {tensors}"))
        }
        Value::Dict { kind: DictKind::Plain | DictKind::Counter, metadata: true, .. } => {
            Err("is a plain dict with metadata, which only ordered ones have".into())
        }
        _ => Ok(()),
    }
}

/// Whether an integer needs more than 64 bits and every byte that it has.
fn is_canonical_big_int(bytes: &[u8]) -> bool {
    let [.., below, top] = bytes else {
        return false;
    };
    let negative = below & 0x80 != 0;
    bytes.len() > 8 && *top != if negative { 0xff } else { 0x00 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keyed(key: Key, value: Value) -> Node {
        Node { key: Some(key), value }
    }

    fn item(value: Value) -> Node {
        Node { key: None, value }
    }

    fn dict(len: u32) -> Value {
        Value::Dict { len, kind: DictKind::Plain, metadata: false }
    }

    fn text(text: &str) -> Key {
        Key::Str(text.into())
    }

    /// `{"model": OrderedDict(_metadata=[t0], {"0.weight": t1}), 3: (None, [t2]), "end": t3}`
    fn sample() -> Vec<Node> {
        vec![
            item(dict(3)),
            keyed(text("model"), Value::Dict { len: 1, kind: DictKind::Ordered, metadata: true }),
            item(Value::List { len: 1 }),
            item(Value::Tensor(0)),
            keyed(text("0.weight"), Value::Tensor(1)),
            keyed(Key::Int(3), Value::Tuple { len: 2 }),
            item(Value::None),
            item(Value::List { len: 1 }),
            item(Value::Tensor(2)),
            keyed(text("end"), Value::Tensor(3)),
        ]
    }

    #[track_caller]
    fn assert_refused(nodes: &[Node], expected: &str) {
        let why = validate(nodes, 4).expect_err("it is accepted").to_string();
        assert!(why.contains(expected), "{why}");
    }

    #[test]
    fn paths_are_typed_and_shown() {
        let nodes = sample();
        assert_eq!(validate(&nodes, 4), Ok(()));
        let paths: Vec<(u32, String)> =
            tensor_paths(&nodes).map(|(tensor, path)| (tensor, path.to_string())).collect();
        let expected = [(0, "model._metadata.0"), (1, "model.0.weight"), (2, "3.1.0"), (3, "end")];
        assert_eq!(paths, expected.map(|(tensor, path)| (tensor, path.to_owned())));
        let (_, path) = tensor_paths(&nodes).nth(2).unwrap();
        let (three, expected_key) = (path.segments[0], Key::Int(3));
        assert_eq!(three, Segment::Key(&expected_key));
        assert_eq!(path.segments[1..], [Segment::Index(1), Segment::Index(0)]);
    }

    #[test]
    fn a_walk_visits_every_node_in_order() {
        let nodes = sample();
        let mut walk = Walk::new(&nodes);
        let mut lengths = Vec::new();
        for node in &nodes {
            assert!(std::ptr::eq(walk.advance().unwrap(), node));
            lengths.push(walk.path().segments.len());
        }
        assert_eq!(walk.advance(), None);
        assert_eq!(walk.advance(), None);
        assert_eq!(lengths, [0, 1, 2, 3, 2, 1, 2, 2, 3, 1]);
    }

    #[test]
    fn keys_are_shown_as_python_writes_them() {
        let shown = |key: Key| key.to_string();
        assert_eq!(shown(Key::Int(-3)), "-3");
        assert_eq!(
            shown(Key::BigInt(vec![0, 0, 0, 0, 0, 0, 0, 0, 1])),
            "int(0x010000000000000000)"
        );
        assert_eq!(shown(Key::Bool(true)), "True");
        assert_eq!(shown(Key::Bool(false)), "False");
        assert_eq!(shown(Key::Float(0.5)), "0.5");
        assert_eq!(shown(Key::Bytes(vec![b'a', 0])), "b\"a\\x00\"");
        assert_eq!(shown(Key::None), "None");
    }

    #[test]
    fn what_is_not_exactly_one_tree_is_refused() {
        assert_refused(&[], "empty");
        assert_refused(
            &[item(Value::None), item(Value::None)],
            "ends after 1 nodes, and 2 are there",
        );
        assert_refused(&sample()[..9], "ends early: 1 containers");
        assert_refused(&sample()[..2], "claims 3 children, and only 1 nodes follow");
        assert_refused(
            &[item(Value::List { len: 2 }), item(Value::List { len: 1 }), item(Value::None)],
            "ends early: 1 containers",
        );
        assert_refused(&[item(Value::List { len: u32::MAX })], "claims 4294967295 children");
        let metadata = Value::Dict { len: u32::MAX, kind: DictKind::Ordered, metadata: true };
        assert_refused(&[item(metadata)], "claims 4294967296 children");
    }

    #[test]
    fn keys_stand_in_dicts_and_nowhere_else() {
        assert_refused(&[item(dict(1)), item(Value::None)], "of a dict has no key");
        let keyed_none = || keyed(text("a"), Value::None);
        assert_refused(&[keyed_none()], "is not an entry of a dict");
        assert_refused(&[item(Value::List { len: 1 }), keyed_none()], "is not an entry of a dict");
        assert_refused(&[item(Value::Tuple { len: 1 }), keyed_none()], "is not an entry of a dict");
        let with_metadata = |kind| item(Value::Dict { len: 0, kind, metadata: true });
        assert_refused(
            &[with_metadata(DictKind::Ordered), keyed_none()],
            "is not an entry of a dict",
        );
        assert_refused(
            &[with_metadata(DictKind::Plain), item(Value::None)],
            "only ordered ones have",
        );
    }

    #[test]
    fn values_have_their_one_right_form() {
        assert_refused(&[item(Value::Tensor(4))], "names tensor 4 of 4");
        for bytes in [vec![], vec![1], vec![1; 8], vec![1, 1, 1, 1, 1, 1, 1, 1, 0], vec![0xff; 9]] {
            assert_refused(&[item(Value::BigInt(bytes.clone()))], "shortest form");
            assert_refused(
                &[item(dict(1)), keyed(Key::BigInt(bytes), Value::None)],
                "shortest form",
            );
        }
        for bytes in [
            vec![0, 0, 0, 0, 0, 0, 0, 0x80, 0],
            vec![0, 0, 0, 0, 0, 0, 0, 0x7f, 0xff],
            vec![0, 0, 0, 0, 0, 0, 0, 0, 1],
        ] {
            assert_eq!(validate(&[item(Value::BigInt(bytes))], 0), Ok(()));
        }
    }

    #[test]
    fn depth_is_bounded() {
        let nested = |containers: usize| {
            let mut nodes = vec![item(Value::List { len: 1 }); containers];
            nodes.push(item(Value::None));
            nodes
        };
        assert_eq!(validate(&nested(DEPTH_MAX), 0), Ok(()));
        assert_refused(&nested(DEPTH_MAX + 1), "deeper than 128");
        // Far deeper than any stack: walking it takes none.
        assert_refused(&nested(1_000_000), "deeper than 128");
        let nodes = nested(100_000);
        let mut walk = Walk::new(&nodes);
        assert_eq!(std::iter::from_fn(|| walk.advance()).count(), nodes.len());
    }
}
