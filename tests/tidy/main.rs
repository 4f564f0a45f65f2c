//! The rules of the house that no other tool checks, as one test.
//!
//! A rule is a pure function from the tree to what it found, and carries a counterexample: a small
//! tree on which it must find exactly one thing, at a stated place. A rule that cannot fire is no
//! rule. To add one, write it in the module it belongs to and name it in [`RULES`].
#![forbid(unsafe_code)]

mod bench_targets;
mod crates;
mod documents;
mod reachable;
mod rust_text;
mod text;
mod tree;
mod unsafe_code;

use std::fmt::Write as _;

use tree::{Finding, Tree};

/// One rule of the house.
struct Rule {
    /// The rule, as a sentence that can be obeyed.
    says: &'static str,
    check: fn(&Tree) -> Vec<Finding>,
    /// A tree that breaks this rule once, at [`Rule::found_at`].
    counterexample: fn() -> Tree,
    found_at: (&'static str, usize),
}

const RULES: &[Rule] = &[
    crates::ARROWS,
    crates::KNOWN,
    crates::BARRED,
    bench_targets::ONLY_CRITERION_IS_BENCHED,
    unsafe_code::LISTED,
    unsafe_code::LIST_IS_CURRENT,
    unsafe_code::EXPECTED_WITH_A_REASON,
    reachable::NO_DEAD_FILES,
    text::RUST_OPENS_WITH_ITS_MODEL,
    text::PYTHON_OPENS_WITH_A_DOCSTRING,
    text::LINES_FIT,
    text::NO_TABS,
    text::NOTHING_LEFT_UNDONE,
    documents::ONE_TITLE,
    documents::MAKE_TARGETS_EXIST,
    documents::LINKS_RESOLVE,
];

#[test]
fn the_house_is_tidy() {
    let tree = Tree::read();
    let mut report = String::new();
    for rule in RULES {
        for Finding { file, line, fix } in (rule.check)(&tree) {
            let says = rule.says;
            writeln!(report, "{file}:{line}: {says}\n  hint: {fix}").expect("strings grow");
        }
    }
    assert!(report.is_empty(), "\n{report}");
}

#[test]
fn every_rule_fires_on_its_counterexample() {
    for rule in RULES {
        let findings = (rule.check)(&(rule.counterexample)());
        let places: Vec<_> = findings.iter().map(|f| (f.file.as_str(), f.line)).collect();
        assert_eq!(places, [rule.found_at], "{}", rule.says);
    }
}

#[test]
fn the_tree_was_read() {
    let tree = Tree::read();
    for file in ["Makefile", "Cargo.toml", "engine/src/lib.rs", "tests/tidy/main.rs"] {
        assert!(tree.files.contains_key(file), "`{file}` is missing from the tree");
    }
    assert!(tree.members.iter().any(|member| member.name == "dtr-engine"));
}
