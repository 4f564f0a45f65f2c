//! Which tensors go into a file, and under which names.
//!
//! Pure. Always holds: what is selected has a name that the file format allows.

use dtr_engine::{EngineError, Result};

use super::Options;
use super::header::METADATA_NAME;
use crate::{glob, text};

/// Names that a message shows.
const NAMES_SHOWN_MAX: usize = 5;
/// What a state is called that is one tensor and nothing else.
const ROOT_NAME: &str = "tensor";

/// What a user asks for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Selection<'o> {
    /// All, if it is empty.
    wanted: &'o [String],
    unwanted: &'o [String],
    /// Tensors are named by what follows this in their paths.
    below: Option<&'o str>,
}

impl<'o> Selection<'o> {
    pub(super) fn of(options: &'o Options) -> Self {
        Self {
            wanted: &options.tensors,
            unwanted: &options.exclude,
            below: options.strip_prefix.as_deref(),
        }
    }

    /// Whether the tensor at `path` is selected.
    pub(super) fn fits(&self, path: &str) -> bool {
        let path = if path.is_empty() { ROOT_NAME } else { path };
        let is_wanted = self.wanted.is_empty() || glob::matches_any(self.wanted, path);
        is_wanted && !glob::matches_any(self.unwanted, path)
    }

    /// What the tensor at `path` is called in the file; `None` if it is not selected.
    pub(super) fn name(&self, path: &str) -> Result<Option<String>> {
        if !self.fits(path) {
            return Ok(None);
        }
        let path = if path.is_empty() { ROOT_NAME } else { path };
        let name = match self.below {
            None => path,
            Some(below) => path_below(path, below)?,
        };
        if name == METADATA_NAME {
            return Err(cannot(path, "the file format keeps this name for itself"));
        }
        Ok(Some(name.to_owned()))
    }

    /// Tells that no tensor is selected, of those at `paths`.
    pub(super) fn none_of<'p>(&self, paths: impl Iterator<Item = &'p str>) -> EngineError {
        let names: Vec<String> = paths
            .take(NAMES_SHOWN_MAX)
            .map(|path| format!("`{}`", text::one_line(text::path(path))))
            .collect();
        let hint = if names.is_empty() {
            "the checkpoint holds no tensor: restore it to a store".into()
        } else {
            format!("the checkpoint's tensors are called like {}", names.join(", "))
        };
        let what = match self.wanted {
            [] => "selecting tensors".into(),
            _ => format!("selecting tensors that fit `{}`", self.wanted.join("`, `")),
        };
        EngineError::invalid(what, "there is none", hint)
    }
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

pub(super) fn cannot(name: &str, why: &str) -> EngineError {
    let name = text::one_line(name);
    EngineError::invalid(
        format!("writing tensor `{name}` to a safetensors file"),
        why,
        format!("leave it out with `--exclude '{name}'`, or restore to a store, which takes all"),
    )
}
