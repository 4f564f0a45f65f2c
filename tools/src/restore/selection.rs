//! Which tensors go into a file, and under which names.
//!
//! Always holds: names are unique, and everything that is selected can be written.

use std::collections::BTreeMap;

use dtr_engine::format::index::{ShardIndex, TensorRecord};
use dtr_engine::format::tree::tensor_paths;
use dtr_engine::{EngineError, Result};

use super::header::{METADATA_NAME, file_dtype};
use crate::tree_text::place;
use crate::{glob, text};

/// Names that a message shows.
const NAMES_SHOWN_MAX: usize = 5;
/// What a state is called that is one tensor and nothing else.
const ROOT_NAME: &str = "tensor";

/// A tensor to write.
#[derive(Clone, Debug)]
pub(super) struct Selected<'c> {
    pub(super) name: String,
    pub(super) record: &'c TensorRecord,
    /// As the file calls it.
    pub(super) dtype: &'static str,
    /// As the file counts it.
    pub(super) shape: Vec<u64>,
}

/// The tensors that fit `wanted` (all, if it is empty) and not `unwanted`: by falling item size, so
/// that each starts aligned, then as they lie in the checkpoint, so that it is read once. Named by
/// what follows `below` in their paths, if that is given.
pub(super) fn select<'c>(
    index: &'c ShardIndex,
    wanted: &[String],
    unwanted: &[String],
    below: Option<&str>,
) -> Result<Vec<Selected<'c>>> {
    let mut selected: BTreeMap<String, (String, u32)> = BTreeMap::new();
    for (tensor, path) in tensor_paths(&index.nodes) {
        let path = path.to_string();
        let path = if path.is_empty() { ROOT_NAME.into() } else { path };
        let fits = wanted.is_empty() || glob::matches_any(wanted, &path);
        if !fits || glob::matches_any(unwanted, &path) {
            continue;
        }
        let name = match below {
            None => path.clone(),
            Some(below) => path_below(&path, below)?.to_owned(),
        };
        if name == METADATA_NAME {
            return Err(cannot(&path, "the file format keeps this name for itself"));
        }
        if selected.insert(name, (path.clone(), tensor)).is_some() {
            return Err(cannot(
                &path,
                "two tensors are called this, as integer and string keys can be",
            ));
        }
    }
    if selected.is_empty() {
        return Err(none_selected(index, wanted));
    }
    let mut tensors = selected
        .into_iter()
        .map(|(name, (path, tensor))| describe(name, &path, &index.tensors[tensor as usize]))
        .collect::<Result<Vec<_>>>()?;
    tensors.sort_by_key(|tensor| {
        let record = tensor.record;
        (std::cmp::Reverse(record.item_bytes), record.storage, record.offset)
    });
    Ok(tensors)
}

/// What follows `below`, which may end with a dot, in a path.
fn path_below<'p>(path: &'p str, below: &str) -> Result<&'p str> {
    let container = below.strip_suffix('.').unwrap_or(below);
    let rest = path.strip_prefix(container).and_then(|rest| rest.strip_prefix('.'));
    rest.filter(|rest| !rest.is_empty()).ok_or_else(|| {
        let shown = text::one_line(container);
        EngineError::invalid(
            format!("naming tensor `{}` without `{shown}`", text::one_line(path)),
            "it does not lie there",
            format!("choose what does with `--tensors '{shown}.*'`, or name a path above it"),
        )
    })
}

fn describe<'c>(name: String, path: &str, record: &'c TensorRecord) -> Result<Selected<'c>> {
    if record.slice.is_some() {
        return Err(sliced(path, record));
    }
    let known = file_dtype(&record.dtype).filter(|known| known.item_bytes == record.item_bytes);
    let Some(known) = known else {
        let why = format!("the file format has no dtype like `{}`", record.dtype);
        return Err(cannot(path, &why));
    };
    let mut shape = record.shape.clone();
    if known.values_per_item > 1 {
        let Some(last) = shape.last_mut() else {
            return Err(cannot(path, "it packs two values into one and has no dimension for them"));
        };
        *last *= known.values_per_item;
    }
    Ok(Selected { name, record, dtype: known.name, shape })
}

fn cannot(name: &str, why: &str) -> EngineError {
    let name = text::one_line(name);
    EngineError::invalid(
        format!("writing tensor `{name}` to a safetensors file"),
        why,
        format!("leave it out with `--exclude '{name}'`, or restore to a store, which takes all"),
    )
}

/// Refuses to pass a part of a tensor off as the tensor.
pub(super) fn sliced(name: &str, record: &TensorRecord) -> EngineError {
    EngineError::invalid(
        format!("restoring tensor `{}`", text::one_line(name)),
        format!("the shard holds a slice of it, {}; other ranks hold the rest", place(record)),
        "copy the whole checkpoint with `ckpt-tool copy`, or load it in Python, which puts slices \
         together: `CheckpointManager(store, read_only=True).load()`",
    )
}

fn none_selected(index: &ShardIndex, wanted: &[String]) -> EngineError {
    let names: Vec<String> = tensor_paths(&index.nodes)
        .take(NAMES_SHOWN_MAX)
        .map(|(_, path)| format!("`{}`", text::one_line(text::path(&path.to_string()))))
        .collect();
    let hint = if names.is_empty() {
        "the checkpoint holds no tensor: restore it to a store".into()
    } else {
        format!("the checkpoint's tensors are called like {}", names.join(", "))
    };
    let what = match wanted {
        [] => "selecting tensors".into(),
        _ => format!("selecting tensors that fit `{}`", wanted.join("`, `")),
    };
    EngineError::invalid(what, "there is none", hint)
}
