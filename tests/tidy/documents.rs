//! What the documents promise: one title each, and no command that does not exist.

use crate::Rule;
use crate::tree::{Finding, Tree, join};

pub(crate) const ONE_TITLE: Rule = Rule {
    says: "a document has one title",
    check: |tree| {
        let mut findings = Vec::new();
        for (path, text) in tree.written(&[".md"]) {
            let prose = lines(text).filter(|line| !line.is_code);
            let mut titles = prose.filter(|line| line.text.starts_with("# "));
            if titles.next().is_none() {
                findings.push(Finding::new(path, 1, "open it with `# ` and its title"));
            }
            findings.extend(titles.map(|line| {
                Finding::new(path, line.number, "make it a section (`## `), or another document")
            }));
        }
        findings
    },
    counterexample: || {
        Tree::of(&[("a.md", "# A\n```\n# a comment\n```\n"), ("b.md", "# B\n\n## C\n\n# D\n")])
    },
    found_at: ("b.md", 5),
};

pub(crate) const MAKE_TARGETS_EXIST: Rule = Rule {
    says: "a `make` command in a document is a target of the Makefile",
    check: |tree| {
        let makefile = tree.files.get("Makefile").map_or("", String::as_str);
        let exists = |target: &str| {
            makefile
                .lines()
                .any(|line| line.split_once(':').is_some_and(|(name, _)| name == target))
        };
        let mut findings = Vec::new();
        for (path, text) in tree.written(&[".md"]) {
            for line in lines(text) {
                for target in make_targets(&line).filter(|target| !exists(target)) {
                    let fix = format!("the Makefile has no `{target}`: correct one of them");
                    findings.push(Finding::new(path, line.number, fix));
                }
            }
        }
        findings
    },
    counterexample: || {
        Tree::of(&[
            ("Makefile", "test: native\n\tcargo test\n"),
            ("README.md", "# A\n\nmake sure: `make test`\n\n    make bake  # a cake\n"),
        ])
    },
    found_at: ("README.md", 5),
};

pub(crate) const LINKS_RESOLVE: Rule = Rule {
    says: "a relative link leads to a file or folder of the tree",
    check: |tree| {
        let mut findings = Vec::new();
        for (path, text) in tree.written(&[".md"]) {
            let folder = path.rsplit_once('/').map_or("", |(folder, _)| folder);
            for line in lines(text).filter(|line| !line.is_code) {
                let broken = links(line.text).filter(|link| !exists(tree, &join(folder, link)));
                findings.extend(broken.map(|link| {
                    let fix = format!("`{link}` is not there: correct the link");
                    Finding::new(path, line.number, fix)
                }));
            }
        }
        findings
    },
    counterexample: || {
        let good = "[b](../b.md#part) [c](.) [d](https://d) [e](#e) [f](crate::f)";
        let text = format!("# A\n\n{good}\n[g](g.md)\n");
        Tree::of(&[("docs/a.md", &text), ("b.md", "# B\n")])
    },
    found_at: ("docs/a.md", 4),
};

/// Targets of the links in a line that mean a path.
fn links(line: &str) -> impl Iterator<Item = &str> {
    let targets = line.split("](").skip(1).filter_map(|rest| rest.split([')', '#']).next());
    targets.filter(|target| !target.is_empty() && !target.contains(':'))
}

fn exists(tree: &Tree, path: &str) -> bool {
    let folder = format!("{path}/");
    tree.others.contains(path)
        || tree.files.keys().any(|file| file == path || file.starts_with(&folder))
}

/// A line of a document.
struct Line<'a> {
    /// Counted from 1.
    number: usize,
    text: &'a str,
    /// Fenced or indented.
    is_code: bool,
}

fn lines(text: &str) -> impl Iterator<Item = Line<'_>> {
    let mut fenced = false;
    text.lines().enumerate().map(move |(index, text)| {
        fenced ^= text.starts_with("```");
        Line { number: index + 1, text, is_code: fenced || text.starts_with("    ") }
    })
}

/// Targets of the `make` commands in a line: all of it where it is code, else between backticks.
fn make_targets<'a>(line: &Line<'a>) -> impl Iterator<Item = &'a str> {
    let first = usize::from(!line.is_code);
    let commands = line.text.split('`').skip(first).step_by(2).map(str::trim_start);
    commands.filter_map(|command| {
        let target = command.strip_prefix("make ")?.split_whitespace().next()?;
        target.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'-').then_some(target)
    })
}
