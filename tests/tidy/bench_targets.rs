//! `cargo bench -- --save-baseline main` works across the workspace: cargo hands its arguments to
//! every target that has benches, and the harness that cargo links by default refuses criterion's.

use crate::Rule;
use crate::tree::{Finding, Member, Tree};

pub(crate) const ONLY_CRITERION_IS_BENCHED: Rule = Rule {
    says: "a library or program has `bench = false`",
    check: |tree| {
        let mut findings = Vec::new();
        for member in &tree.members {
            let manifest = format!("{}/Cargo.toml", member.folder);
            let text = tree.files.get(&manifest).map_or("", String::as_str);
            for (kind, line) in benched(member, text) {
                let fix = format!("write `bench = false` below `{kind}`");
                findings.push(Finding::new(&manifest, line, fix));
            }
        }
        findings
    },
    counterexample: || {
        let manifest = "[package]\n[[bin]]\nname = \"tool\"\n[lib]\nbench = false\n";
        let mut tree = Tree::of(&[("tools/Cargo.toml", manifest)]);
        tree.members.push(Member {
            name: "tool".to_owned(),
            folder: "tools".to_owned(),
            roots: vec!["tools/src/lib.rs".to_owned(), "tools/src/main.rs".to_owned()],
            dependencies: Vec::new(),
        });
        tree
    },
    found_at: ("tools/Cargo.toml", 2),
};

/// The tables of a manifest that leave a library or program to the default harness, each with its
/// line; line 1 where cargo finds the target without a table.
fn benched(member: &Member, manifest: &str) -> Vec<(&'static str, usize)> {
    let mut benched = Vec::new();
    for (kind, root) in [("[lib]", "src/lib.rs"), ("[[bin]]", "src/main.rs")] {
        let lines: Vec<&str> = manifest.lines().map(str::trim).collect();
        let tables: Vec<usize> = (0..lines.len()).filter(|&line| lines[line] == kind).collect();
        let is_left = |table: &usize| {
            let body = lines[table + 1..].iter().take_while(|line| !line.starts_with('['));
            !body.into_iter().any(|line| *line == "bench = false")
        };
        benched.extend(tables.iter().filter(|table| is_left(table)).map(|table| (kind, table + 1)));
        let has_root = member.roots.iter().any(|path| path.ends_with(root));
        benched.extend((has_root && tables.is_empty()).then_some((kind, 1)));
    }
    benched
}
