//! The files that an export of tensors is, by their names.
//!
//! ```text
//! one file:                   several files, and while they are written:
//! model.safetensors           model-00001-of-00002.safetensors    .model.safetensors.00001.tmp
//!                             model-00002-of-00002.safetensors    .model.safetensors.00002.tmp
//!                             model.safetensors.index.json        .model.safetensors.tmp
//! ```
//!
//! Always holds: readers find an export by `model.safetensors` or by the index, whichever they look
//! for first, or take every file that there is; so of one name, all there is belongs to one export.

use std::ffi::{OsStr, OsString};
use std::io::ErrorKind;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use dtr_engine::Result;
use dtr_engine::error::IoContext;

/// What the files in a directory are called, where no name was given: what loaders look for.
const DEFAULT_STEM: &str = "model";
/// What a file's name ends with.
const FILE_ENDING: &str = ".safetensors";
const INDEX_ENDING: &str = ".index.json";
const DRAFT_ENDING: &str = ".tmp";
/// Least digits of a file's number.
const DIGITS_MIN: usize = 5;

/// Where an export goes, and what its files are called.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Export {
    /// As it was given; empty where the process is.
    directory: PathBuf,
    /// What all its files' names begin with.
    stem: OsString,
}

/// What a file is to an export of its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Role {
    /// What readers of several files begin with.
    Index,
    /// The one file with everything.
    Whole,
    /// One of several.
    Shard,
    /// One that is being written, or was left by a process that was killed.
    Draft,
}

/// A file that is there.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Found {
    pub(super) role: Role,
    pub(super) path: PathBuf,
    /// Or leads to one.
    pub(super) is_directory: bool,
}

impl Export {
    /// The one whose single file would be `path`.
    pub(super) fn at(path: &Path) -> Self {
        let stem = path.file_stem().unwrap_or_default().into();
        Self { directory: path.parent().unwrap_or(Path::new("")).into(), stem }
    }

    /// The one in this directory.
    pub(super) fn within(directory: &Path) -> Self {
        Self { directory: directory.into(), stem: DEFAULT_STEM.into() }
    }

    /// Where its files lie.
    pub(super) fn directory(&self) -> &Path {
        if self.directory.as_os_str().is_empty() { Path::new(".") } else { &self.directory }
    }

    /// The single file.
    pub(super) fn whole(&self) -> PathBuf {
        self.directory.join(self.name(0, 1))
    }

    /// The name of one of so many files, counted from 0.
    pub(super) fn name(&self, file: usize, count: usize) -> OsString {
        if count == 1 {
            return self.followed_by("");
        }
        let mut name = self.stem.clone();
        name.push(format!("-{:0DIGITS_MIN$}-of-{count:0DIGITS_MIN$}{FILE_ENDING}", file + 1));
        name
    }

    /// One of so many files.
    pub(super) fn file(&self, file: usize, count: usize) -> PathBuf {
        self.directory.join(self.name(file, count))
    }

    pub(super) fn index(&self) -> PathBuf {
        self.directory.join(self.followed_by(INDEX_ENDING))
    }

    /// What whoever writes the export holds locked; it becomes the index.
    pub(super) fn lead(&self) -> PathBuf {
        self.hidden(&self.followed_by(DRAFT_ENDING))
    }

    /// A file while it is written. How many there will be is not in its name, so that what a
    /// process left which was killed is found again.
    pub(super) fn draft(&self, file: usize) -> PathBuf {
        let ending = format!(".{:0DIGITS_MIN$}{DRAFT_ENDING}", file + 1);
        self.hidden(&self.followed_by(&ending))
    }

    fn followed_by(&self, ending: &str) -> OsString {
        let mut name = self.stem.clone();
        name.push(FILE_ENDING);
        name.push(ending);
        name
    }

    fn hidden(&self, name: &OsStr) -> PathBuf {
        let mut hidden = OsString::from(".");
        hidden.push(name);
        self.directory.join(hidden)
    }

    /// What a file of this name is; `None` of one that is none of the export's.
    fn role(&self, name: &OsStr) -> Option<Role> {
        let (name, stem) = (name.as_bytes(), self.stem.as_bytes());
        if let Some(hidden) = name.strip_prefix(b".")
            && let Some(rest) = hidden.strip_prefix(stem)
            && is_draft(rest)
        {
            return Some(Role::Draft);
        }
        let rest = name.strip_prefix(stem)?;
        match rest.strip_prefix(FILE_ENDING.as_bytes()) {
            Some(b"") => Some(Role::Whole),
            Some(ending) => (ending == INDEX_ENDING.as_bytes()).then_some(Role::Index),
            None => is_shard(rest).then_some(Role::Shard),
        }
    }

    /// All that is there of exports of this name, what readers begin with first.
    pub(super) fn found(&self) -> Result<Vec<Found>> {
        let entries = match std::fs::read_dir(self.directory()) {
            // Whoever writes there will be told.
            Err(error) if is_nowhere(error.kind()) => return Ok(Vec::new()),
            entries => entries.context("listing", self.directory())?,
        };
        let mut found = Vec::new();
        for entry in entries {
            let entry = entry.context("listing", self.directory())?;
            if let Some(role) = self.role(&entry.file_name()) {
                let path = self.directory.join(entry.file_name());
                found.push(Found { role, is_directory: path.is_dir(), path });
            }
        }
        found.sort();
        Ok(found)
    }
}

fn is_nowhere(kind: ErrorKind) -> bool {
    matches!(kind, ErrorKind::NotFound | ErrorKind::NotADirectory)
}

/// Whether this follows a stem in the name of one of several files: `-00001-of-00002.safetensors`.
fn is_shard(rest: &[u8]) -> bool {
    let numbers = || {
        let numbers = rest.strip_prefix(b"-")?.strip_suffix(FILE_ENDING.as_bytes())?;
        let (number, count) = str::from_utf8(numbers).ok()?.split_once("-of-")?;
        Some(is_number(number) && is_number(count))
    };
    numbers().unwrap_or(false)
}

/// Whether this follows a stem in the name of a draft: `.safetensors.00001.tmp`.
fn is_draft(rest: &[u8]) -> bool {
    let number = || {
        let numbered = rest.strip_prefix(FILE_ENDING.as_bytes())?.strip_prefix(b".")?;
        let number = numbered.strip_suffix(DRAFT_ENDING.as_bytes())?;
        Some(is_number(str::from_utf8(number).ok()?))
    };
    number().unwrap_or(false)
}

fn is_number(text: &str) -> bool {
    text.len() >= DIGITS_MIN && text.bytes().all(|byte| byte.is_ascii_digit())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_that_loaders_look_for() {
        let export = Export::at(Path::new("out/a.b.safetensors"));
        let name = |path: PathBuf| path.to_str().unwrap().to_owned();
        assert_eq!(name(export.whole()), "out/a.b.safetensors");
        assert_eq!(name(export.file(0, 1)), "out/a.b.safetensors");
        assert_eq!(name(export.file(1, 3)), "out/a.b-00002-of-00003.safetensors");
        assert_eq!(name(export.file(123_455, 123_456)), "out/a.b-123456-of-123456.safetensors");
        assert_eq!(name(export.index()), "out/a.b.safetensors.index.json");
        assert_eq!(name(export.lead()), "out/.a.b.safetensors.tmp");
        assert_eq!(name(export.draft(0)), "out/.a.b.safetensors.00001.tmp");
        let here = Export::at(Path::new("x.safetensors"));
        assert_eq!((name(here.whole()), here.directory()), ("x.safetensors".into(), ".".as_ref()));
        assert_eq!(name(Export::within(Path::new("d")).whole()), "d/model.safetensors");
    }

    #[test]
    fn what_it_names_it_knows_again() {
        let export = Export::within(Path::new("d"));
        let role = |path: PathBuf| export.role(path.file_name().unwrap());
        assert_eq!(role(export.whole()), Some(Role::Whole));
        assert_eq!(role(export.index()), Some(Role::Index));
        for (file, count) in [(0, 2), (99_998, 99_999), (1_000_000, 2_000_000)] {
            assert_eq!(role(export.file(file, count)), Some(Role::Shard));
            assert_eq!(role(export.draft(file)), Some(Role::Draft));
        }
        // Whoever writes locks it, and makes it anew.
        assert_eq!(role(export.lead()), None);
    }

    #[test]
    fn what_only_looks_like_it_is_left_alone() {
        let export = Export::within(Path::new("d"));
        for name in [
            "model",
            "model.safetensors.bak",
            "model.safetensors.index.json.bak",
            "my-model.safetensors",
            "model-1-of-2.safetensors",
            "model-00001-of-0000x.safetensors",
            "model-00001-of-00002.bin",
            "model-00001-of-00002.safetensors.tmp",
            "model-adapter-00001-of-00002.safetensors",
            "model-00001-of-00002-of-00003.safetensors",
            "model.fp16-00001-of-00002.safetensors",
            ".model.safetensors.1.tmp",
            ".model.fp16.safetensors.00001.tmp",
            "pytorch_model.bin.index.json",
        ] {
            assert_eq!(export.role(OsStr::new(name)), None, "{name}");
        }
        assert_eq!(export.role(OsStr::from_bytes(b"model-\xff0001-of-00002.safetensors")), None);
    }
}
