//! Which crate may know which: data flows one way, and so do dependencies.

use crate::Rule;
use crate::tree::{Finding, Member, Tree};

/// Each crate of the workspace with the workspace's crates that it may use.
const MAY_USE: &[(&str, &[&str])] = &[
    ("dtr-proto", &[]),
    ("dtr-engine", &["dtr-proto"]),
    ("dtr-cuda", &["dtr-engine"]),
    ("coordinator", &["dtr-proto"]),
    ("dtr-python", &["ckpt-tool", "coordinator", "dtr-cuda", "dtr-engine", "dtr-proto"]),
    ("ckpt-tool", &["dtr-engine", "dtr-proto"]),
    ("dtr-benches", &["coordinator", "dtr-engine", "dtr-proto"]),
    ("dtr-fuzz", &["dtr-engine"]),
    ("integration-tests", &["ckpt-tool", "coordinator", "dtr-engine", "dtr-proto"]),
];

/// What a crate must never depend on, directly or not.
const BARRED_FROM: &[(&str, &[&str], &str)] = &[
    ("dtr-proto", &["pyo3", "redb", "axum"], "proto is messages and the client of a worker"),
    (
        "dtr-engine",
        &["pyo3", "numpy", "cudarc", "tonic"],
        "the engine sees bytes, not who sent them",
    ),
    ("dtr-cuda", &["pyo3", "numpy"], "addresses and streams are all it takes of Python"),
    ("coordinator", &["pyo3", "numpy", "cudarc"], "the coordinator runs where no worker does"),
    ("ckpt-tool", &["pyo3", "cudarc"], "the tool runs where neither Python nor a GPU is"),
];

pub(crate) const ARROWS: Rule = Rule {
    says: "a crate depends only on the crates below it",
    check: |tree| {
        let is_member = |name: &str| MAY_USE.iter().any(|(member, _)| *member == name);
        dependencies_where(tree, |member, dependency| {
            let (_, allowed) = MAY_USE.iter().find(|(name, _)| *name == member.name)?;
            let fits = !is_member(dependency) || allowed.contains(&dependency);
            (!fits).then(|| {
                format!("move what `{}` needs below both crates, or pass it in", member.name)
            })
        })
    },
    counterexample: || workspace_with("dtr-engine", "engine", &["serde", "dtr-python"]),
    found_at: ("engine/Cargo.toml", 3),
};

pub(crate) const KNOWN: Rule = Rule {
    says: "every crate has its place in the order of crates",
    check: |tree| {
        let strangers = tree
            .members
            .iter()
            .filter(|member| !MAY_USE.iter().any(|(name, _)| *name == member.name));
        strangers
            .map(|member| {
                let fix = format!("name `{}` in MAY_USE with what it may use", member.name);
                Finding::new(&manifest_of(member), 1, fix)
            })
            .collect()
    },
    counterexample: || workspace_with("helpers", "helpers", &[]),
    found_at: ("helpers/Cargo.toml", 1),
};

pub(crate) const BARRED: Rule = Rule {
    says: "a crate does not learn about other worlds",
    check: |tree| {
        dependencies_where(tree, |member, dependency| {
            let (_, _, reason) = BARRED_FROM
                .iter()
                .find(|(name, barred, _)| *name == member.name && barred.contains(&dependency))?;
            Some(format!("{reason}: do this in the crate above"))
        })
    },
    counterexample: || workspace_with("dtr-engine", "engine", &["dtr-proto", "pyo3"]),
    found_at: ("engine/Cargo.toml", 3),
};

/// Every dependency that `objection` objects to, at its line in the manifest.
fn dependencies_where(
    tree: &Tree,
    objection: impl Fn(&Member, &str) -> Option<String>,
) -> Vec<Finding> {
    let mut findings = Vec::new();
    for member in &tree.members {
        let manifest = manifest_of(member);
        for dependency in &member.dependencies {
            if let Some(fix) = objection(member, dependency) {
                let line = tree.line_of(&manifest, dependency);
                findings.push(Finding::new(&manifest, line, format!("`{dependency}`: {fix}")));
            }
        }
    }
    findings
}

fn manifest_of(member: &Member) -> String {
    format!("{}/Cargo.toml", member.folder)
}

fn workspace_with(name: &str, folder: &str, dependencies: &[&str]) -> Tree {
    let member = Member {
        name: name.to_owned(),
        folder: folder.to_owned(),
        roots: Vec::new(),
        dependencies: dependencies.iter().map(|&name| name.to_owned()).collect(),
    };
    let manifest = format!("[dependencies]\n{}\n", dependencies.join("\n"));
    let mut tree = Tree::of(&[(&manifest_of(&member), &manifest)]);
    tree.members.push(member);
    tree
}
