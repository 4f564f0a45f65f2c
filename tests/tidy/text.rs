//! How files are written: how they open, how wide they are, and what may not be left in them.

use crate::Rule;
use crate::rust_text::has_word;
use crate::tree::{Finding, Tree};

const COLUMNS_MAX: usize = 100;

/// Put together here so that this file does not find itself.
const LEFT_UNDONE: [&str; 4] =
    [concat!("TO", "DO"), concat!("FIX", "ME"), concat!("X", "XX"), concat!("db", "g!(")];

pub(crate) const RUST_OPENS_WITH_ITS_MODEL: Rule = Rule {
    says: "a Rust file opens with `//!`: what it models and what always holds",
    check: |tree| {
        let opens =
            |text: &str| ["//! ", "#![doc = include_str!("].iter().any(|o| text.starts_with(o));
        let silent = tree.written(&[".rs"]).filter(|(_, text)| !opens(text));
        silent
            .map(|(path, _)| Finding::new(path, 1, "open the file with a `//!` comment"))
            .collect()
    },
    counterexample: || Tree::of(&[("a.rs", "//! A.\n"), ("b.rs", "// B.\n//! B.\n")]),
    found_at: ("b.rs", 1),
};

pub(crate) const PYTHON_OPENS_WITH_A_DOCSTRING: Rule = Rule {
    says: "a Python file opens with a docstring",
    check: |tree| {
        let silent = tree.written(&[".py"]).filter(|(_, text)| {
            let first = text.lines().find(|line| !line.is_empty() && !line.starts_with('#'));
            !first.is_some_and(|line| line.trim_start_matches('r').starts_with("\"\"\""))
        });
        silent.map(|(path, _)| Finding::new(path, 1, "say what the file is for")).collect()
    },
    counterexample: || {
        Tree::of(&[("a.py", "#!/usr/bin/env python3\n\n\"\"\"A.\"\"\"\n"), ("b.py", "import os\n")])
    },
    found_at: ("b.py", 1),
};

pub(crate) const LINES_FIT: Rule = Rule {
    says: "a line has at most 100 columns",
    check: |tree| {
        lines_where(tree, &[".rs", ".py", ".pyi"], |line| {
            // Instructions to a linter stand where they must.
            let written = line.find("  # noqa").or_else(|| line.find("  # type: "));
            let columns = line[..written.unwrap_or(line.len())].chars().count();
            (columns > COLUMNS_MAX).then(|| format!("it has {columns}: break it"))
        })
    },
    counterexample: || {
        let text = format!("{}\n{}\n", "é".repeat(COLUMNS_MAX), "e".repeat(COLUMNS_MAX + 1));
        Tree::of(&[("a.py", &text)])
    },
    found_at: ("a.py", 2),
};

pub(crate) const NO_TABS: Rule = Rule {
    says: "only the Makefile holds tabs",
    check: |tree| {
        lines_where(tree, &[".rs", ".py", ".pyi", ".toml", ".md", ".proto", ".sh"], |line| {
            line.contains('\t').then(|| "write spaces, or `\\t` in a literal".to_owned())
        })
    },
    counterexample: || Tree::of(&[("Makefile", "a:\n\tb\n"), ("a.toml", "[a]\n\tb = 1\n")]),
    found_at: ("a.toml", 2),
};

pub(crate) const NOTHING_LEFT_UNDONE: Rule = Rule {
    says: "what is left to do is an issue, not a comment",
    check: |tree| {
        lines_where(tree, &[""], |line| {
            let word = LEFT_UNDONE.iter().find(|word| match word.strip_suffix("!(") {
                Some(_) => line.contains(**word),
                None => has_word(line, word),
            })?;
            Some(format!("do it now, or file it, and take `{word}` out"))
        })
    },
    counterexample: || {
        let text = format!("METHODOLOGY = 1\n# {}: later\n", LEFT_UNDONE[0]);
        Tree::of(&[("a.py", &text)])
    },
    found_at: ("a.py", 2),
};

/// Every line of the files with these `endings` that `objection` objects to.
fn lines_where(
    tree: &Tree,
    endings: &[&str],
    objection: impl Fn(&str) -> Option<String>,
) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (path, text) in tree.written(endings) {
        for (index, line) in text.lines().enumerate() {
            findings.extend(objection(line).map(|fix| Finding::new(path, index + 1, fix)));
        }
    }
    findings
}
