//! Which tensors go into a file, and under which names.
//!
//! Pure. Always holds: what is selected has a name that the file format allows.

use std::collections::BTreeSet;

use dtr_engine::{EngineError, Result};

use super::Options;
use super::header::METADATA_NAME;
use crate::{glob, text};

/// Names that a message shows.
pub(super) const NAMES_SHOWN_MAX: usize = 5;
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
        let is_wanted = self.wanted.is_empty() || glob::matches_any(self.wanted, path);
        is_wanted && !glob::matches_any(self.unwanted, path)
    }

    /// What the tensor at `path` is called in the file.
    pub(super) fn name<'p>(&self, path: &'p str) -> Result<&'p str> {
        let name = match self.below {
            None => path,
            Some(below) => path_below(path, below)?,
        };
        if name == METADATA_NAME {
            return Err(cannot(path, "the file format reserves this name"));
        }
        Ok(name)
    }

    /// Reports that no tensor is selected; `unfit` are some that are not.
    pub(super) fn none_of(&self, unfit: &[String]) -> EngineError {
        let hint = if unfit.is_empty() {
            "the checkpoint holds no tensor: restore it to a store".into()
        } else {
            format!("the checkpoint's tensors have names like {}", listed(unfit))
        };
        EngineError::invalid(self.selecting(), "there is none", hint)
    }

    /// Reports that tensors which were asked for are each rank's own, of as many ranks.
    pub(super) fn whose(&self, alone: &BTreeSet<String>, ranks: u32) -> EngineError {
        let some: Vec<String> = alone.iter().take(NAMES_SHOWN_MAX).cloned().collect();
        let more = match alone.len() - some.len() {
            0 => String::new(),
            more => format!(" and {more} more"),
        };
        EngineError::invalid(
            self.selecting(),
            format!("each of {ranks} ranks saved its own: {}{more}", listed(&some)),
            format!(
                "choose a rank with `--rank R`, from 0 to {}; or leave them out with \
                 `--exclude`. Tensors saved as `replicated` belong to no single rank",
                ranks - 1
            ),
        )
    }

    /// Whether tensors were asked for by name.
    pub(super) fn is_explicit(&self) -> bool {
        !self.wanted.is_empty()
    }

    fn selecting(&self) -> String {
        match self.wanted {
            [] => "selecting tensors".into(),
            _ => format!("selecting tensors that fit `{}`", self.wanted.join("`, `")),
        }
    }
}

/// A tensor's path as it is matched and shown.
pub(super) fn shown(path: String) -> String {
    if path.is_empty() { ROOT_NAME.into() } else { path }
}

/// Names for a message.
pub(super) fn listed(names: &[String]) -> String {
    let quoted: Vec<_> =
        names.iter().map(|name| format!("`{}`", text::one_line(text::path(name)))).collect();
    quoted.join(", ")
}

/// What follows `below`, which may end with a dot, in a path.
fn path_below<'p>(path: &'p str, below: &str) -> Result<&'p str> {
    let container = below.strip_suffix('.').unwrap_or(below);
    let rest = path.strip_prefix(container).and_then(|rest| rest.strip_prefix('.'));
    rest.filter(|rest| !rest.is_empty()).ok_or_else(|| {
        let shown = text::one_line(container);
        EngineError::invalid(
            format!("naming tensor `{}` without `{shown}`", text::one_line(path)),
            "it is not in there",
            format!("choose what does with `--tensors '{shown}.*'`, or name a path above it"),
        )
    })
}

pub(super) fn cannot(name: &str, why: &str) -> EngineError {
    let name = text::one_line(name);
    EngineError::invalid(
        format!("writing tensor `{name}` to a safetensors file"),
        why,
        format!(
            "leave it out with `--exclude '{name}'`, or copy the checkpoint with `ckpt-tool copy`"
        ),
    )
}
