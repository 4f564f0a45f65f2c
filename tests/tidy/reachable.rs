//! Which Rust files the compiler reads: those that a target's first file names, directly or not.
//!
//! Understands `mod name;`, `#[path = "..."]` on the line before it, and `include!("...")`; a
//! `mod name;` inside an inline module is not looked for.

use std::collections::BTreeSet;

use crate::Rule;
use crate::rust_text::code_of;
use crate::tree::{Finding, Member, Tree, join};

pub(crate) const NO_DEAD_FILES: Rule = Rule {
    says: "every Rust file is part of a crate",
    check: |tree| {
        let reached = reached_files(tree);
        let dead = tree.ending(&[".rs"]).filter(|(path, _)| !reached.contains(*path));
        dead.map(|(path, _)| Finding::new(path, 1, "declare it with `mod`, or delete it")).collect()
    },
    counterexample: || {
        let mut tree = Tree::of(&[
            ("engine/src/lib.rs", "mod io;\n// mod dead;\ninclude!(\"made.rs\");\n"),
            ("engine/src/io/mod.rs", "pub(crate) mod ring;\n"),
            ("engine/src/io/ring.rs", "mod slot;\n"),
            ("engine/src/io/ring/slot.rs", "#[path = \"../ring/far.rs\"]\nmod near;\n"),
            ("engine/src/io/ring/far.rs", ""),
            ("engine/src/made.rs", ""),
            ("engine/src/dead.rs", ""),
        ]);
        tree.members.push(Member {
            name: "dtr-engine".to_owned(),
            folder: "engine".to_owned(),
            roots: vec!["engine/src/lib.rs".to_owned()],
            dependencies: Vec::new(),
        });
        tree
    },
    found_at: ("engine/src/dead.rs", 1),
};

fn reached_files(tree: &Tree) -> BTreeSet<String> {
    let roots: BTreeSet<String> =
        tree.members.iter().flat_map(|member| member.roots.iter().cloned()).collect();
    let mut reached = BTreeSet::new();
    let mut waiting: Vec<String> = roots.iter().cloned().collect();
    while let Some(path) = waiting.pop() {
        let Some(text) = tree.files.get(&path) else {
            continue;
        };
        if reached.insert(path.clone()) {
            waiting.extend(named_by(&path, text, roots.contains(&path)));
        }
    }
    reached
}

/// Paths that `text`, the file at `path`, may mean by its `mod` and `include!` lines.
fn named_by(path: &str, text: &str, is_root: bool) -> Vec<String> {
    let (folder, name) = path.rsplit_once('/').unwrap_or(("", path));
    let owns_folder = is_root || name == "mod.rs";
    let stem = name.trim_end_matches(".rs");
    let inner = if owns_folder { folder.to_owned() } else { format!("{folder}/{stem}") };
    let mut named = Vec::new();
    for (line, code) in text.lines().zip(code_of(text).lines()) {
        if let Some(module) = module_declared(code) {
            named.push(format!("{inner}/{module}.rs"));
            named.push(format!("{inner}/{module}/mod.rs"));
        } else if code.contains("#[path =") || code.contains("include!(") {
            named.extend(line.split('"').nth(1).map(|file| join(folder, file)));
        }
    }
    named
}

fn module_declared(code: &str) -> Option<&str> {
    let declaration = code.trim().strip_suffix(';')?;
    let (before, module) = declaration.rsplit_once("mod ")?;
    (before.is_empty() || before.starts_with("pub")).then_some(module.trim())
}
