//! Every mutant still applies to the tree and names a test that exists: `tests/mutants` has the
//! patches, and `make torture` shows that each is caught.

use std::path::{Path, PathBuf};
use std::process::Command;

/// The folders with the tests of the binaries that `tests/mutants/mutants.py` knows.
const FOLDERS: &[(&str, &str)] = &[
    ("crash", "tests/crash"),
    ("engine", "engine/src"),
    ("engine_tests", "tests/engine"),
    ("machine", "coordinator/tests/machine"),
    ("ranks", "tests/ranks"),
    ("readers", "tests/readers"),
    ("s3", "tests/s3"),
    ("stand_in", "cuda/tests/stand_in"),
];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

fn mutants() -> Vec<PathBuf> {
    let entries = std::fs::read_dir(root().join("tests/mutants")).unwrap();
    let paths = entries.map(|entry| entry.unwrap().path());
    let mutants: Vec<PathBuf> =
        paths.filter(|path| path.extension().is_some_and(|ending| ending == "patch")).collect();
    assert!(mutants.len() >= 10, "only {} mutants", mutants.len());
    mutants
}

#[test]
fn every_mutant_still_applies() {
    let has_git = Command::new("git").arg("--version").output().is_ok();
    if !has_git {
        println!("skipped: git is not installed");
        return;
    }
    for path in mutants() {
        let mut check = Command::new("git");
        check.args(["apply", "--check"]).arg(&path).current_dir(root());
        let checked = check.output().unwrap();
        let errors = String::from_utf8_lossy(&checked.stderr);
        assert!(checked.status.success(), "repair `{}`: {errors}", path.display());
    }
}

#[test]
fn every_mutant_names_a_test_that_is_there() {
    for path in mutants() {
        let patch = std::fs::read_to_string(&path).unwrap();
        let line = patch.lines().find_map(|line| line.strip_prefix("Caught by: "));
        let (binary, test) = line.and_then(|line| line.split_once(' ')).unwrap();
        let (_, folder) = FOLDERS.iter().find(|(name, _)| *name == binary).unwrap();
        let name = test.rsplit("::").next().unwrap();
        let is_there = defines(&root().join(folder), &format!("fn {name}("));
        assert!(is_there, "`{}`: there is no `{test}` in `{folder}`", path.display());
    }
}

/// Whether a source in this folder, or in one within it, has the text.
fn defines(folder: &Path, text: &str) -> bool {
    std::fs::read_dir(folder).unwrap().any(|entry| {
        let path = entry.unwrap().path();
        let is_source = path.extension().is_some_and(|ending| ending == "rs");
        (path.is_dir() && defines(&path, text))
            || (is_source && std::fs::read_to_string(&path).unwrap().contains(text))
    })
}
