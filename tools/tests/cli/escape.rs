//! Names and links that were made to harm a reader of a store.
//!
//! Always holds here: what is printed is characters and line ends; what is outside the store and
//! the output is as it was, down to its times; and of what links point to nothing is shown.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::{MetadataExt as _, symlink};
use std::path::{Path, PathBuf};

use dtr_engine::format::layout::ElementType;
use dtr_engine::format::tree::{Key, Value};
use safetensors::SafeTensors;

use crate::golden::assert_golden;
use crate::state::{State, Store, singles, tensor};
use crate::tool::{self, Run};

/// Names that mean something to a filesystem, a terminal, or a reader in a hurry.
const NAMES: [&str; 14] = [
    "../x",
    "/etc/passwd",
    "nul\0name",
    "\u{1b}[2J\u{1b}]0;title\u{7}",
    "\u{9b}31m",
    "\u{90}q\u{9c}",
    "carriage\rreturn\u{8}\u{7f}",
    "line\nhint: run something else",
    "turned \u{202e}gpj.exe",
    "isolated \u{2066}x\u{2069}",
    "separate\u{2028}d",
    "é\u{301}\u{1f600}",
    "",
    " ",
];

/// A state whose tensors have those names, a very long one, and values that are no better.
fn odd(step: u64, scale: f32) -> State {
    let long = "long".repeat(100);
    let mut state = State::new(step);
    state.dict(None, u32::try_from(NAMES.len()).unwrap() + 3);
    for name in NAMES.into_iter().chain([long.as_str()]) {
        let storage = state.storage(ElementType::F32, singles(20, scale));
        state.tensor(name, tensor(storage, "float32", 4, &[20]));
    }
    let value = format!("{step}\u{1b}[2J\u{202e}\nvalue");
    state.node(Some(Key::Str("\u{1b}[1mplain".into())), Value::Str(value));
    state.node(Some(Key::Bytes(vec![0x1b, b'[', 0xff])), Value::Bytes(vec![0x1b, 0x9b]));
    state
}

fn odd_store() -> Store {
    let store = Store::empty();
    store.save(&[&odd(10, 1.0), &odd(20, 2.0)]);
    store
}

/// That all of it can be shown by any terminal as it is.
#[track_caller]
fn assert_plain(run: &Run) {
    for text in [&run.stdout, &run.stderr] {
        let odd = |character: &char| {
            let shown = *character == '\n' || !character.is_control();
            let turns = matches!(character, '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
            !shown || turns
        };
        assert_eq!(text.chars().find(odd), None, "{run:?}");
        let hints = text.lines().filter(|line| line.starts_with("hint: run something")).count();
        assert_eq!(hints, 0, "{run:?}");
    }
}

/// Runs a command whose output is plain and ends with this status.
#[track_caller]
fn run(store: &Store, status: i32, command: &str, arguments: &[&str]) -> Run {
    let run = store.run(command, arguments);
    assert_plain(&run);
    assert_eq!(run.status, status, "{run:?}");
    run
}

#[test]
fn names_are_shown_as_characters() {
    let store = odd_store();
    let inspected = run(&store, 0, "inspect", &["--limit", "0"]);
    assert_golden("escape-inspect", &store.redact(&inspected.stdout));
    let compared = run(&store, 0, "diff", &["10", "20", "--limit", "0"]);
    assert_golden("escape-diff", &store.redact(&compared.stdout));
    run(&store, 0, "ls", &[]);
    run(&store, 0, "gc", &["--dry-run"]);
    run(&store, 0, "restore", &["-o", store.beside("copy").to_str().unwrap()]);

    let shard = store.file(20, ".shard");
    let mut bytes = fs::read(&shard).unwrap();
    bytes[4096] ^= 1;
    fs::write(&shard, bytes).unwrap();
    let verified = run(&store, 1, "verify", &[]);
    assert_golden("escape-verify", &store.redact(&verified.stdout));
    run(&store, 1, "verify", &["--all", "--json"]);
    run(&store, 1, "restore", &["-o", store.beside("x.safetensors").to_str().unwrap()]);
}

#[test]
fn json_says_the_names_as_they_are() {
    let store = odd_store();
    let inspected = run(&store, 0, "inspect", &["--json"]).json();
    let compared = run(&store, 0, "diff", &["10", "20", "--json"]).json();
    let listed = |list: &serde_json::Value, name: fn(&serde_json::Value) -> String| {
        list.as_array().unwrap().iter().map(name).collect::<BTreeSet<_>>()
    };
    let lists = [
        listed(&inspected["tensors"], |tensor| tensor["paths"][0].as_str().unwrap().into()),
        listed(&compared["changes"], |change| change["path"].as_str().unwrap().into()),
    ];
    for list in lists {
        for name in NAMES {
            assert!(list.contains(name), "{name:?} is not among {list:?}");
        }
    }
}

#[test]
fn names_lead_nowhere_when_tensors_are_restored() {
    let store = odd_store();
    let output = store.beside("all.safetensors");
    run(&store, 0, "restore", &["-o", output.to_str().unwrap()]);
    let bytes = fs::read(&output).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(file.len(), NAMES.len() + 1);
    for name in NAMES {
        // A file of tensors has no empty names.
        let there = if name.is_empty() { "tensor" } else { name };
        assert!(file.tensor(there).unwrap().data() == singles(20, 2.0), "{name:?}");
    }
    let one = store.beside("one.safetensors");
    run(&store, 0, "restore", &["--tensors", "../x", "-o", one.to_str().unwrap()]);
    assert_eq!(names_in(&store.beside("")), ["all.safetensors", "one.safetensors", "store"]);
    assert!(!Path::new("/etc/passwd.safetensors").exists());
}

#[test]
fn an_error_names_names_as_characters() {
    let store = Store::empty();
    let mut state = State::new(1);
    state.dict(None, 2);
    let bytes = state.storage(ElementType::F32, singles(2, 1.0));
    let one = || tensor(bytes, "float32", 4, &[2]);
    let name = "\u{1b}[2J\u{202e}\nhint: run something else";
    state.tensor(&format!("{name}.weight"), one());
    state.dict(Some(Key::Str(name.into())), 1);
    state.tensor("weight", one());
    store.save(&[&state]);
    let output = store.beside("new.safetensors");
    let refused = run(&store, 2, "restore", &["-o", output.to_str().unwrap()]);
    assert_golden("escape-same-name", &store.redact(&refused.stderr));
    assert!(!output.exists());
}

/// What a link is put in place of.
#[derive(Clone, Copy, Debug)]
enum Place {
    Step,
    Manifest,
    Shard,
}

/// Two stores of the same steps; a link in the first one's step 20 leads to the second.
fn linked(place: Place) -> (Store, Store) {
    let (store, outside) = (Store::trained(), Store::empty());
    outside.save(&[&State::at(10), &odd(20, 3.0)]);
    fs::write(outside.path().join("precious"), "keep").unwrap();
    let step = |store: &Store| store.path().join("step-000000000020");
    let (ours, theirs) = match place {
        Place::Step => (step(&store), step(&outside)),
        Place::Manifest => (store.file(20, "manifest.json"), outside.file(20, "manifest.json")),
        Place::Shard => (store.file(20, ".shard"), outside.file(20, ".shard")),
    };
    if ours.is_dir() {
        fs::remove_dir_all(&ours).unwrap();
    } else {
        fs::remove_file(&ours).unwrap();
    }
    symlink(theirs, ours).unwrap();
    (store, outside)
}

#[track_caller]
fn check_link(place: Place, name: &str) {
    let (store, outside) = linked(place);
    let before = snapshot(&outside.path());
    let file = store.beside("new.safetensors");
    let (file, copy) = (file.to_str().unwrap(), store.beside("copy"));
    let copy = copy.to_str().unwrap();
    for arguments in [
        &["inspect", "--step", "20"][..],
        &["inspect", "--step", "20", "--json"],
        &["verify", "--step", "20"],
        &["diff", "10", "20"],
        &["restore", "--step", "20", "-o", file],
        &["restore", "--step", "20", "-o", copy],
    ] {
        let refused = run(&store, 1, arguments[0], &arguments[1..]);
        let said = format!("{}{}", refused.stdout, refused.stderr);
        assert!(!said.contains("passwd"), "what lies outside is shown: {refused:?}");
    }
    let said = store.run("inspect", &["--step", "20"]);
    assert_golden(name, &store.redact(&said.stderr));
    for arguments in [&["gc", "--dry-run"][..], &["gc"], &["ls"], &["verify", "--all"]] {
        let seen = store.run(arguments[0], &arguments[1..]);
        assert_plain(&seen);
        assert!(!seen.stdout.contains("passwd"), "what lies outside is shown: {seen:?}");
    }
    assert_eq!(run(&store, 0, "verify", &["--step", "10"]).status, 0);
    assert!(before == snapshot(&outside.path()), "something outside was touched");
    let left: Vec<_> =
        names_in(&store.beside("")).into_iter().filter(|name| name != "copy").collect();
    assert_eq!(left, ["store"]);
}

#[test]
fn a_step_that_is_a_link_is_no_step() {
    check_link(Place::Step, "escape-step-link");
}

#[test]
fn a_manifest_that_is_a_link_is_refused() {
    check_link(Place::Manifest, "escape-manifest-link");
}

#[test]
fn a_shard_that_is_a_link_is_refused() {
    check_link(Place::Shard, "escape-shard-link");
}

#[test]
fn an_output_that_is_a_link_is_not_written_through() {
    let store = Store::trained();
    fs::create_dir(store.beside("outside")).unwrap();
    fs::write(store.beside("outside/precious"), "keep").unwrap();
    let (dangling, taken) = (store.beside("new.safetensors"), store.beside("old.safetensors"));
    symlink(store.beside("outside/made"), &dangling).unwrap();
    symlink(store.beside("outside/precious"), &taken).unwrap();
    let before = snapshot(&store.beside("outside"));
    let (dangling, taken) = (dangling.to_str().unwrap(), taken.to_str().unwrap());
    let refused = run(&store, 2, "restore", &["-o", dangling]);
    assert_golden("escape-output-link", &store.redact(&refused.stderr));
    run(&store, 2, "restore", &["-o", taken]);
    run(&store, 0, "restore", &["--force", "-o", taken]);
    assert!(fs::symlink_metadata(taken).unwrap().is_file(), "the link itself is replaced");
    assert!(before == snapshot(&store.beside("outside")));
    let left = names_in(&store.beside(""));
    assert_eq!(left, ["new.safetensors", "old.safetensors", "outside", "store"]);
}

#[test]
fn an_output_of_an_impossible_name_leaves_nothing() {
    let store = Store::trained();
    let name = format!("{}.safetensors", "n".repeat(250));
    let output = store.beside(&name);
    let refused = run(&store, 1, "restore", &["-o", output.to_str().unwrap()]);
    refused.assert_error(1);
    let odd = store.beside("\u{1b}[2J\u{202e}.safetensors");
    let restored =
        tool::run(["restore".as_ref(), store.path().as_os_str(), "-o".as_ref(), odd.as_os_str()]);
    assert_plain(&restored);
    assert_eq!(restored.status, 0, "{restored:?}");
    assert!(odd.is_file());
    assert_eq!(names_in(&store.beside("")).len(), 2);
}

/// Everything below a directory: length, times, content.
fn snapshot(directory: &Path) -> BTreeMap<PathBuf, (u64, i64, i64, Vec<u8>)> {
    let mut found = BTreeMap::new();
    let mut waiting = vec![directory.to_owned()];
    while let Some(path) = waiting.pop() {
        let metadata = fs::symlink_metadata(&path).unwrap();
        let mut content = Vec::new();
        if metadata.is_dir() {
            waiting.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        } else {
            content = fs::read(&path).unwrap();
        }
        found.insert(path, (metadata.size(), metadata.mtime(), metadata.mtime_nsec(), content));
    }
    found
}

fn names_in(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).unwrap();
    let mut names: Vec<String> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}
