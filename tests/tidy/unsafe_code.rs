//! Which files may hold `unsafe`: a list that is compared with the tree, both ways.

use crate::Rule;
use crate::rust_text::{code_of, has_word};
use crate::tree::{Finding, Tree};

/// The files that may hold `unsafe`, and why safe code was not enough.
const MAY_HOLD_UNSAFE: &[(&str, &str)] = &[
    ("cuda/src/context.rs", "the CUDA driver is a library in C"),
    ("cuda/src/device.rs", "a device's memory and streams are known by their addresses"),
    ("cuda/src/driver.rs", "the CUDA driver is a library in C"),
    ("cuda/src/memory.rs", "a device's memory is known by its address"),
    ("cuda/src/pinned.rs", "a device reads and writes memory that the caller owns"),
    ("cuda/src/storage.rs", "copies from and to addresses in a device's memory"),
    ("cuda/src/stream.rs", "the CUDA driver is a library in C"),
    ("cuda/tests/stand_in/library.rs", "the stand-in for the CUDA driver is a library in C"),
    ("cuda/tests/stand_in/scene.rs", "memory that a device writes to, and its address"),
    ("engine/src/codec/planes/mod.rs", "vector instructions, chosen at run time"),
    ("engine/src/io/buffer.rs", "hands out disjoint parts of one mapping at run time"),
    ("engine/src/io/lent.rs", "parts of one buffer that several threads own"),
    ("engine/src/io/mapping.rs", "aligned memory with madvise, which no safe type gives"),
    ("engine/src/io/uring.rs", "the kernel uses buffers that the ring was told of"),
    ("engine/src/memcpy.rs", "streaming stores, and memory that is known by its address"),
    ("engine/src/store/local/map.rs", "a mapping is safe only while no one cuts its file"),
    ("python/src/device.rs", "torch's memory on GPUs and its streams, known by their addresses"),
    ("python/src/tensor.rs", "memory that Python owns, read through its address"),
    ("tests/crash/shutdown.rs", "the ioctl that cuts the power of a filesystem in a test"),
];

pub(crate) const LISTED: Rule = Rule {
    says: "`unsafe` lives in the listed files only",
    check: |tree| {
        let elsewhere = tree.ending(&[".rs"]).filter(|(path, _)| !is_listed(path));
        elsewhere
            .filter_map(|(path, _)| {
                let line = first_unsafe(tree, path)?;
                let fix = "use what the listed files offer; a new entry in MAY_HOLD_UNSAFE needs \
                           a reason why safe code is not enough";
                Some(Finding::new(path, line, fix))
            })
            .collect()
    },
    counterexample: || {
        Tree::of(&[("engine/src/save.rs", "//! No unsafe.\nfn f() {\n    unsafe { g(\"\") }\n}\n")])
    },
    found_at: ("engine/src/save.rs", 3),
};

pub(crate) const LIST_IS_CURRENT: Rule = Rule {
    says: "a file listed for `unsafe` holds some",
    check: |tree| {
        let stale = MAY_HOLD_UNSAFE.iter().filter(|(path, _)| first_unsafe(tree, path).is_none());
        stale.map(|(path, _)| Finding::new(path, 1, "take it off MAY_HOLD_UNSAFE")).collect()
    },
    counterexample: || {
        let (safe, holders) = MAY_HOLD_UNSAFE.split_first().expect("the list is not empty");
        let mut files = vec![(safe.0, "//! No unsafe: \"unsafe\".\n")];
        files.extend(holders.iter().map(|(path, _)| (*path, "unsafe fn f() {}\n")));
        Tree::of(&files)
    },
    found_at: (MAY_HOLD_UNSAFE[0].0, 1),
};

pub(crate) const EXPECTED_WITH_A_REASON: Rule = Rule {
    says: "a file with `unsafe` says why safe code was not enough",
    check: |tree| {
        let listed = tree.files.iter().filter(|(path, _)| is_listed(path));
        listed
            .filter(|(path, text)| {
                let says_why = text.contains("#![expect(") && text.contains("reason =");
                first_unsafe(tree, path).is_some() && !says_why
            })
            .map(|(path, _)| {
                Finding::new(path, 1, "open it with #![expect(unsafe_code, reason = \"...\")]")
            })
            .collect()
    },
    counterexample: || Tree::of(&[(MAY_HOLD_UNSAFE[0].0, "//! Fast.\nunsafe fn f() {}\n")]),
    found_at: (MAY_HOLD_UNSAFE[0].0, 1),
};

fn is_listed(path: &str) -> bool {
    MAY_HOLD_UNSAFE.iter().any(|(listed, _)| *listed == path)
}

fn first_unsafe(tree: &Tree, path: &str) -> Option<usize> {
    let code = code_of(tree.files.get(path)?);
    code.lines().position(|line| has_word(line, "unsafe")).map(|index| index + 1)
}
