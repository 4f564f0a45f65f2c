//! What the rules look at: every text file of the project, and the workspace's crates.
//!
//! Paths are relative to the root and use `/`. Folders that declare themselves a cache
//! (`CACHEDIR.TAG`: build outputs, tool caches) or an environment (`pyvenv.cfg`), and hidden ones
//! that are not ours, are no part of the project.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

/// The project, as the rules see it.
pub(crate) struct Tree {
    /// Text by path.
    pub(crate) files: BTreeMap<String, String>,
    /// Paths of what is no text to the rules: pictures, lists of requirements.
    pub(crate) others: BTreeSet<String>,
    pub(crate) members: Vec<Member>,
}

/// A crate of the workspace.
pub(crate) struct Member {
    pub(crate) name: String,
    /// The folder that holds its `Cargo.toml`.
    pub(crate) folder: String,
    /// The first file of each target: `src/lib.rs`, `src/main.rs`, tests, build scripts.
    pub(crate) roots: Vec<String>,
    /// Names of the packages it depends on in any way, for tests and builds too.
    pub(crate) dependencies: Vec<String>,
}

/// A place where a rule is broken, and how to repair it.
pub(crate) struct Finding {
    pub(crate) file: String,
    /// Counted from 1.
    pub(crate) line: usize,
    pub(crate) fix: String,
}

impl Finding {
    pub(crate) fn new(file: &str, line: usize, fix: impl Into<String>) -> Self {
        Self { file: file.to_owned(), line, fix: fix.into() }
    }
}

impl Tree {
    /// The tree that this test was built from.
    pub(crate) fn read() -> Self {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ has a parent");
        let mut tree = Self { members: read_members(root), ..Self::of(&[]) };
        read_folder(root, "", &mut tree);
        tree
    }

    /// A tree made of a few files and no crates, for counterexamples.
    pub(crate) fn of(files: &[(&str, &str)]) -> Self {
        let files = files.iter().map(|&(path, text)| (path.to_owned(), text.to_owned())).collect();
        Self { files, others: BTreeSet::new(), members: Vec::new() }
    }

    /// Files whose name ends in one of `endings`.
    pub(crate) fn ending(&self, endings: &[&str]) -> impl Iterator<Item = (&str, &str)> {
        self.files
            .iter()
            .filter(move |(path, _)| endings.iter().any(|ending| path.ends_with(ending)))
            .map(|(path, text)| (path.as_str(), text.as_str()))
    }

    /// The same, without generated ones.
    pub(crate) fn written(&self, endings: &[&str]) -> impl Iterator<Item = (&str, &str)> {
        self.ending(endings).filter(|(path, _)| !path.contains("/gen/"))
    }

    /// The number of the first line of `file` that begins with `start`, or 1.
    pub(crate) fn line_of(&self, file: &str, start: &str) -> usize {
        let text = self.files.get(file).map_or("", String::as_str);
        text.lines().position(|line| line.starts_with(start)).map_or(1, |index| index + 1)
    }
}

/// The path from the root of what a file in `folder` calls `link`.
pub(crate) fn join(folder: &str, link: &str) -> String {
    let mut parts: Vec<&str> = Vec::new();
    for part in folder.split('/').chain(link.split('/')) {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()),
            name => parts.push(name),
        }
    }
    parts.join("/")
}

fn read_folder(folder: &Path, prefix: &str, tree: &mut Tree) {
    for entry in fs::read_dir(folder).expect("the tree can be listed") {
        let entry = entry.expect("the tree can be listed");
        let name = entry.file_name().into_string().expect("names are UTF-8");
        let (path, kind) = (entry.path(), entry.file_type().expect("entries have a type"));
        if kind.is_dir() && belongs(&path, &name) {
            read_folder(&path, &format!("{prefix}{name}/"), tree);
        } else if kind.is_file() && is_text(&name, prefix) {
            let text = fs::read_to_string(&path).expect("text files are UTF-8");
            tree.files.insert(format!("{prefix}{name}"), text);
        } else if kind.is_file() {
            tree.others.insert(format!("{prefix}{name}"));
        }
    }
}

fn belongs(folder: &Path, name: &str) -> bool {
    let ours = !name.starts_with('.') || [".ci", ".cargo"].contains(&name);
    let made = ["target", "dist", "__pycache__"].contains(&name);
    ours && !made && !folder.join("CACHEDIR.TAG").exists() && !folder.join("pyvenv.cfg").exists()
}

fn is_text(name: &str, prefix: &str) -> bool {
    const ENDINGS: [&str; 9] =
        [".rs", ".py", ".pyi", ".md", ".toml", ".proto", ".sh", ".yml", ".yaml"];
    ["Makefile", "LICENSE"].contains(&name)
        || prefix == ".ci/"
        || ENDINGS.iter().any(|ending| name.ends_with(ending))
}

/// The workspace's crates, and the fuzz targets, which stand outside it for their compiler.
fn read_members(root: &Path) -> Vec<Member> {
    let manifests = ["Cargo.toml", "tests/fuzz/Cargo.toml"];
    manifests.iter().flat_map(|manifest| read_members_of(root, manifest)).collect()
}

fn read_members_of(root: &Path, manifest: &str) -> Vec<Member> {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--no-deps", "--offline", "--format-version", "1"])
        .args(["--manifest-path", manifest])
        .current_dir(root)
        .output()
        .expect("cargo runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout).expect("metadata is JSON");
    list(&metadata, "packages").iter().map(|package| member_of(root, package)).collect()
}

fn member_of(root: &Path, package: &Value) -> Member {
    let manifest = relative(root, text(package, "manifest_path"));
    let folder = manifest.strip_suffix("/Cargo.toml").expect("the root is no package");
    Member {
        name: text(package, "name").to_owned(),
        folder: folder.to_owned(),
        roots: list(package, "targets")
            .iter()
            .map(|t| relative(root, text(t, "src_path")))
            .collect(),
        dependencies: list(package, "dependencies")
            .iter()
            .map(|dependency| text(dependency, "name").to_owned())
            .collect(),
    }
}

fn relative(root: &Path, path: &str) -> String {
    let path = Path::new(path).strip_prefix(root).expect("members live in the tree");
    path.to_str().expect("names are UTF-8").to_owned()
}

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key].as_str().expect("cargo's metadata keeps its shape")
}

fn list<'a>(value: &'a Value, key: &str) -> &'a [Value] {
    value[key].as_array().expect("cargo's metadata keeps its shape")
}
