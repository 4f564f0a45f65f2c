//! Every mutant still applies to the tree: `tests/mutants` has the patches, and `make torture`
//! shows that each is caught.

use std::path::Path;
use std::process::Command;

#[test]
fn every_mutant_still_applies() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let has_git = Command::new("git").arg("--version").output().is_ok();
    if !has_git {
        println!("skipped: git is not installed");
        return;
    }
    let mut patches = 0;
    for entry in std::fs::read_dir(root.join("tests/mutants")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|extension| extension != "patch") {
            continue;
        }
        let checked =
            Command::new("git").args(["apply", "--check"]).arg(&path).current_dir(root).output();
        let checked = checked.unwrap();
        let errors = String::from_utf8_lossy(&checked.stderr);
        assert!(checked.status.success(), "mend `{}`: {errors}", path.display());
        patches += 1;
    }
    assert!(patches >= 10, "only {patches} mutants");
}
