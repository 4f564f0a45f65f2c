//! The files that an export of tensors is, by their names.
//!
//! ```text
//! one file:                   several files, and while they are written:
//! model.safetensors           model-00001-of-00002.safetensors    .model.safetensors.00001.tmp
//!                             model-00002-of-00002.safetensors    .model.safetensors.00002.tmp
//!                             model.safetensors.index.json        .model.safetensors.00003.tmp
//! ```
//!
//! `.model.safetensors.tmp` is what the process that writes them holds locked, and a name with `.`
//! before it and `.replaced` behind is of a file that another takes the place of.
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
/// What the name of a file ends with that was set aside.
const ASIDE_ENDING: &str = ".replaced";
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
    /// One of several, or their index, while another takes its name.
    Aside,
}

/// A file that exists.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Found {
    pub(super) role: Role,
    pub(super) path: PathBuf,
    /// Why no file may take its place; `None` of a file, and of a link that leads to no directory.
    pub(super) in_the_way: Option<&'static str>,
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

    /// Where its files are.
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

    /// What the process that writes the export holds locked.
    pub(super) fn lead(&self) -> PathBuf {
        self.hidden(&self.followed_by(DRAFT_ENDING))
    }

    /// A file while it is written. How many there will be is not in its name, so that what a
    /// process left which was killed is found again.
    pub(super) fn draft(&self, file: usize) -> PathBuf {
        let ending = format!(".{:0DIGITS_MIN$}{DRAFT_ENDING}", file + 1);
        self.hidden(&self.followed_by(&ending))
    }

    /// Where a file of this name is while another takes its place.
    pub(super) fn aside(&self, path: &Path) -> PathBuf {
        let mut name = path.file_name().unwrap_or_default().to_owned();
        name.push(ASIDE_ENDING);
        self.hidden(&name)
    }

    /// The name that what was set aside had.
    pub(super) fn before_aside(&self, path: &Path) -> PathBuf {
        let name = path.file_name().unwrap_or_default().as_bytes();
        let name = name.strip_prefix(b".").unwrap_or(name);
        let name = name.strip_suffix(ASIDE_ENDING.as_bytes()).unwrap_or(name);
        self.directory.join(OsStr::from_bytes(name))
    }

    /// Of a name that is like that of one of several files, what is before the number: files of
    /// such a name would be taken for those of another export.
    pub(super) fn stem_of_several(&self) -> Option<&OsStr> {
        let name = self.followed_by("");
        let stem = self.stem.as_bytes();
        let at = (0..stem.len()).find(|at| is_shard(&name.as_bytes()[*at..]))?;
        Some(OsStr::from_bytes(&stem[..at]))
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
        let name = name.as_bytes();
        name.strip_prefix(b".")
            .and_then(|hidden| self.hidden_role(hidden))
            .or_else(|| self.visible_role(name))
    }

    fn hidden_role(&self, name: &[u8]) -> Option<Role> {
        if let Some(before) = name.strip_suffix(ASIDE_ENDING.as_bytes()) {
            let role = self.visible_role(before)?;
            return matches!(role, Role::Index | Role::Shard).then_some(Role::Aside);
        }
        is_draft(name.strip_prefix(self.stem.as_bytes())?).then_some(Role::Draft)
    }

    fn visible_role(&self, name: &[u8]) -> Option<Role> {
        let rest = name.strip_prefix(self.stem.as_bytes())?;
        match rest.strip_prefix(FILE_ENDING.as_bytes()) {
            Some(b"") => Some(Role::Whole),
            Some(ending) => (ending == INDEX_ENDING.as_bytes()).then_some(Role::Index),
            None => is_shard(rest).then_some(Role::Shard),
        }
    }

    /// All that exists of exports of this name, what readers begin with first.
    pub(super) fn found(&self) -> Result<Vec<Found>> {
        let entries = match std::fs::read_dir(self.directory()) {
            // A process that writes there will get an error.
            Err(error) if is_nowhere(error.kind()) => return Ok(Vec::new()),
            entries => entries.context("listing", self.directory())?,
        };
        let mut found = Vec::new();
        for entry in entries {
            let entry = entry.context("listing", self.directory())?;
            if let Some(role) = self.role(&entry.file_name()) {
                let path = self.directory.join(entry.file_name());
                found.push(Found { role, in_the_way: in_the_way(&path), path });
            }
        }
        found.sort();
        Ok(found)
    }
}

/// Why what has this name is not for a file to replace. It may be gone by now.
fn in_the_way(path: &Path) -> Option<&'static str> {
    let kind = path.symlink_metadata().ok()?.file_type();
    match kind {
        _ if path.is_dir() => Some("a directory"),
        _ if kind.is_file() || kind.is_symlink() => None,
        _ => Some("no regular file"),
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
        for path in [export.index(), export.file(3, 7)] {
            let aside = export.aside(&path);
            assert_eq!(role(aside.clone()), Some(Role::Aside));
            assert_eq!(export.before_aside(&aside), path);
        }
        // A process that writes locks it, and makes it again.
        assert_eq!(role(export.lead()), None);
    }

    #[test]
    fn a_name_like_that_of_one_of_several_is_told() {
        let of_several = |name: &str| {
            let export = Export::at(Path::new(name));
            export.stem_of_several().map(|stem| stem.to_str().unwrap().to_owned())
        };
        assert_eq!(of_several("d/model-00001-of-00002.safetensors"), Some("model".into()));
        assert_eq!(of_several("a-b-00001-of-100000.safetensors"), Some("a-b".into()));
        assert_eq!(of_several("-00001-of-00002.safetensors"), Some(String::new()));
        for name in ["model", "model-1-of-2", "model-00001-of-00002-x", "model-00001"] {
            assert_eq!(of_several(&format!("{name}.safetensors")), None, "{name}");
        }
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
            ".model.safetensors.replaced",
            "model-00001-of-00002.safetensors.replaced",
            ".model.fp16.safetensors.00001.tmp",
            "pytorch_model.bin.index.json",
        ] {
            assert_eq!(export.role(OsStr::new(name)), None, "{name}");
        }
        assert_eq!(export.role(OsStr::from_bytes(b"model-\xff0001-of-00002.safetensors")), None);
    }
}
