//! A state tree as indented lines.
//!
//! Always holds: however large the tree, at most `limit` children of each container are shown, and
//! what is left out is counted.

use std::io::{self, Write};

use dtr_engine::format::index::{GlobalSlice, ShardIndex, TensorKind, TensorRecord};
use dtr_engine::format::tree::{Segment, Value, Walk};

use crate::{text, values};

/// Characters of a plain value that are shown.
const VALUE_CHARACTERS_MAX: usize = 60;

/// How much of a tree is shown.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Extent {
    /// Children per container.
    pub(crate) limit: u64,
    /// Levels below the root.
    pub(crate) depth: Option<usize>,
}

/// A container on the way to the node last visited.
struct Open {
    children: u64,
    visited: u64,
}

/// Writes the tree, each line after `indent`.
pub(crate) fn write(
    out: &mut dyn Write,
    indent: &str,
    index: &ShardIndex,
    extent: Extent,
) -> io::Result<()> {
    let mut walk = Walk::new(&index.nodes);
    let mut open: Vec<Open> = Vec::new();
    // Nothing this deep or deeper is shown until the walk comes back up.
    let mut hidden_from = usize::MAX;
    while let Some(node) = walk.advance() {
        let segments = &walk.path().segments;
        let depth = segments.len();
        open.truncate(depth);
        let position = open.last_mut().map_or(0, |parent| {
            parent.visited += 1;
            parent.visited - 1
        });
        let siblings = open.last().map_or(1, |parent| parent.children);
        open.push(Open { children: values::children(&node.value), visited: 0 });
        if depth >= hidden_from {
            continue;
        }
        let margin = format!("{indent}{}", "  ".repeat(depth));
        if position >= extent.limit {
            hidden_from = depth;
            writeln!(out, "{margin}… {} more", siblings - position)?;
            continue;
        }
        hidden_from = usize::MAX;
        if extent.depth.is_some_and(|deepest| depth >= deepest) {
            hidden_from = depth + 1;
        }
        let label = segments.last().map(label);
        let line = match label {
            Some(label) => format!("{label}: {}", describe(&node.value, index)),
            None => describe(&node.value, index),
        };
        writeln!(out, "{margin}{}", text::one_line(&line))?;
    }
    Ok(())
}

fn label(segment: &Segment<'_>) -> String {
    match segment {
        Segment::Index(position) => format!("[{position}]"),
        other => other.to_string(),
    }
}

/// One line about a node.
fn describe(value: &Value, index: &ShardIndex) -> String {
    match value {
        Value::Tensor(tensor) => describe_tensor(&index.tensors[*tensor as usize]),
        Value::Dict { len, .. } => {
            let entries = if *len == 1 { "1 entry".into() } else { format!("{len} entries") };
            format!("{}, {entries}", values::type_name(value))
        }
        Value::List { len } | Value::Tuple { len } => {
            format!("{}, {}", values::type_name(value), text::count(*len, "item"))
        }
        plain => text::cut(&values::text(plain), VALUE_CHARACTERS_MAX).into_owned(),
    }
}

/// One line about a tensor.
fn describe_tensor(tensor: &TensorRecord) -> String {
    let library = match tensor.kind {
        TensorKind::Numpy => "numpy ",
        TensorKind::Torch | TensorKind::TorchParameter => "",
    };
    let shape = place(tensor);
    format!("{library}{} {shape}, {}", tensor.dtype, text::bytes(tensor_bytes(tensor)))
}

/// A tensor's shape, and of a slice where it stands: `[2, 8] at [2, 0] of [4, 8]`.
pub(crate) fn place(tensor: &TensorRecord) -> String {
    let shape = text::shape(&tensor.shape);
    match &tensor.slice {
        None => shape,
        Some(GlobalSlice { shape: whole, offsets }) => {
            format!("{shape} at {} of {}", text::shape(offsets), text::shape(whole))
        }
    }
}

/// Bytes of a tensor's items: checked against overflow when its index was decoded.
pub(crate) fn tensor_bytes(tensor: &TensorRecord) -> u64 {
    if tensor.shape.contains(&0) {
        return 0;
    }
    tensor.shape.iter().product::<u64>() * u64::from(tensor.item_bytes)
}

#[cfg(test)]
mod tests {
    use dtr_engine::format::tree::{DictKind, Key, Node};

    use super::*;

    fn written(limit: u64, depth: Option<usize>) -> String {
        let node = |key: &str, value| Node { key: Some(Key::Str(key.into())), value };
        let item = |value| Node { key: None, value };
        let index = ShardIndex {
            nodes: vec![
                item(Value::Dict { len: 3, kind: DictKind::Ordered, metadata: false }),
                node("a", Value::List { len: 3 }),
                item(Value::Int(1)),
                item(Value::Tuple { len: 1 }),
                item(Value::None),
                item(Value::Int(3)),
                node("b", Value::Str("x".repeat(100))),
                node("c", Value::Dict { len: 0, kind: DictKind::Plain, metadata: false }),
            ],
            ..ShardIndex::default()
        };
        let mut out = Vec::new();
        write(&mut out, "", &index, Extent { limit, depth }).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn a_tree_is_indented() {
        let value = format!("\"{}…", "x".repeat(59));
        let expected = format!(
            "OrderedDict, 3 entries\n  a: list, 3 items\n    [0]: 1\n    [1]: tuple, 1 item\n      \
             [0]: None\n    [2]: 3\n  b: {value}\n  c: dict, 0 entries\n"
        );
        assert_eq!(written(9, None), expected);
    }

    #[test]
    fn what_is_left_out_is_counted() {
        let expected = "OrderedDict, 3 entries\n  a: list, 3 items\n    [0]: 1\n    … 2 more\n  \
                        … 2 more\n";
        assert_eq!(written(1, None), expected);
        assert!(
            written(9, Some(1)).starts_with("OrderedDict, 3 entries\n  a: list, 3 items\n  b: ")
        );
        assert_eq!(written(9, Some(0)), "OrderedDict, 3 entries\n");
    }
}
