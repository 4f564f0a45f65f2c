//! What each command prints, for people and for programs.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::{Duration, SystemTime};

use dtr_engine::save::SaveRequest;
use serde_json::json;

use crate::golden::assert_golden;
use crate::state::{State, Store, writer};
use crate::tool;

/// A file of an attempt that died two hours over three days ago.
fn abandon(store: &Store) {
    let directory = store.path().join("step-000000000030");
    std::fs::create_dir(&directory).unwrap();
    let name = format!("rank-00000.{}.shard", "ab".repeat(16));
    let file = File::create(directory.join(name)).unwrap();
    file.set_len(5000).unwrap();
    file.set_modified(SystemTime::now() - Duration::from_hours(74)).unwrap();
}

/// Runs a command, expects success, and compares what it prints.
#[track_caller]
fn check(store: &Store, name: &str, command: &str, arguments: &[&str]) {
    let run = store.run(command, arguments);
    assert_eq!(run.status, 0, "{run:?}");
    assert_golden(name, &store.redact(&run.stdout));
}

#[test]
fn ls_lists() {
    let store = Store::trained();
    abandon(&store);
    check(&store, "ls", "ls", &[]);
    check(&store, "ls-json", "ls", &["--json"]);
    check(&Store::empty(), "ls-empty", "ls", &[]);
}

#[test]
fn ls_shows_metadata() {
    let store = Store::trained();
    let engine = writer(&store.path());
    let metadata = BTreeMap::from([
        ("val_loss".into(), json!(0.25)),
        ("note".into(), json!("several lines\nand many words ".repeat(9))),
    ]);
    let state = State::at(40);
    let request = SaveRequest { metadata, ..state.request() };
    engine.save(request).unwrap().result(None).unwrap().unwrap();
    engine.close().unwrap();
    check(&store, "ls-metadata", "ls", &[]);
    let listed = store.run("ls", &["--json"]).json();
    assert_eq!(listed["checkpoints"][2]["metadata"]["val_loss"], 0.25);
}

#[test]
fn ls_names_the_stores_in_a_directory() {
    let store = Store::trained();
    std::fs::create_dir(store.beside("another")).unwrap();
    let run = tool::run(["ls", store.beside("").to_str().unwrap()]);
    assert_eq!(run.status, 0, "{run:?}");
    assert_eq!(run.stdout.lines().nth(1), Some("stores in it:"), "{run:?}");
    let named: Vec<_> = run.stdout.lines().skip(2).map(|line| PathBuf::from(&line[2..])).collect();
    assert_eq!(named, [store.path()]);
}

#[test]
fn ls_tells_what_a_rewind_retired() {
    let store = Store::trained();
    // As a store is left when the clean-up after the rewind was cut short.
    let kept = store.path().join("step-000000000020");
    let aside = store.beside("aside");
    copy_directory(&kept, &aside);
    let engine = writer(&store.path());
    let state = State::at(15);
    let request = SaveRequest { rewind: true, ..state.request() };
    engine.save(request).unwrap().result(None).unwrap().unwrap();
    engine.close().unwrap();
    std::fs::rename(&aside, &kept).unwrap();
    check(&store, "ls-retired", "ls", &[]);
    check(&store, "gc-retired", "gc", &[]);
    assert!(!kept.exists());
}

fn copy_directory(from: &std::path::Path, to: &std::path::Path) {
    std::fs::create_dir(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

#[test]
fn inspect_shows() {
    let store = Store::trained();
    check(&store, "inspect", "inspect", &["--step", "10"]);
    check(&store, "inspect-limited", "inspect", &["--limit", "2", "--depth", "1", "--chunks"]);
    check(&store, "inspect-json", "inspect", &["--json", "--chunks"]);
}

#[test]
fn verify_reads_all() {
    let store = Store::trained();
    check(&store, "verify", "verify", &[]);
    check(&store, "verify-all", "verify", &["--all"]);
    check(&store, "verify-json", "verify", &["--step", "10", "--json"]);
}

#[test]
fn diff_compares() {
    let store = Store::trained();
    check(&store, "diff", "diff", &["10", "20"]);
    check(&store, "diff-json", "diff", &["10", "20", "--json"]);
    assert_eq!(store.run("diff", &["10", "20", "--exit-code"]).status, 1);
}

#[test]
fn diff_says_out_loud_that_nothing_changed() {
    let store = Store::trained();
    store.save(&[&State { step: 30, ..State::at(20) }]);
    check(&store, "diff-identical", "diff", &["20", "30", "--exit-code"]);
    check(&store, "diff-same-step", "diff", &["20", "20"]);
}

#[test]
fn diff_tells_added_removed_and_reshaped() {
    use dtr_engine::format::layout::ElementType;
    use dtr_engine::format::tree::{Key, Value};

    let store = Store::empty();
    let state = |step: u64, shape: &[u64], extra: &str, key: Key| {
        let mut state = State::new(step);
        state.dict(None, 4);
        let bytes = state.storage(ElementType::F32, crate::state::singles(6, 1.0));
        state.tensor("weight", crate::state::tensor(bytes, "float32", 4, shape));
        state.tensor(extra, crate::state::tensor(bytes, "float32", 4, &[2]));
        state.node(Some(key), Value::Int(1));
        state.node(Some(Key::Str("zero".into())), Value::Float(if step == 1 { 0.0 } else { -0.0 }));
        state
    };
    store.save(&[
        &state(1, &[2, 3], "old", Key::Int(3)),
        &state(2, &[3, 2], "new", Key::Str("3".into())),
    ]);
    check(&store, "diff-structure", "diff", &["1", "2"]);
    check(&store, "diff-limited", "diff", &["1", "2", "--limit", "1"]);
}

#[test]
fn gc_deletes_what_is_old_enough() {
    let store = Store::trained();
    check(&store, "gc-nothing", "gc", &["--dry-run"]);
    abandon(&store);
    let debris = store.path().join("step-000000000030");
    check(&store, "gc-dry-run", "gc", &["--dry-run"]);
    check(&store, "gc-young", "gc", &["--grace", "1000000"]);
    assert!(debris.exists());
    check(&store, "gc-json", "gc", &["--json"]);
    assert!(!debris.exists());
    assert_eq!(store.run("verify", &["--all"]).status, 0);
}

#[test]
fn rm_deletes_what_is_named_or_older() {
    let store = Store::empty();
    store.save(&[&State::at(10), &State::at(20), &State::at(30), &State::at(40)]);
    let steps = || {
        let listed = store.run("ls", &["--json"]).json();
        let entries = listed["checkpoints"].as_array().unwrap().iter();
        entries.map(|entry| entry["step"].as_u64().unwrap()).collect::<Vec<_>>()
    };
    check(&store, "rm-dry-run", "rm", &["30", "10", "--dry-run"]);
    assert_eq!(steps(), [10, 20, 30, 40]);
    check(&store, "rm", "rm", &["30", "10", "30"]);
    assert_eq!(steps(), [20, 40]);
    check(&store, "rm-nothing", "rm", &["--keep-last", "2"]);
    check(&store, "rm-json", "rm", &["--keep-last", "1", "--json"]);
    assert_eq!(steps(), [40]);
    assert_eq!(store.run("verify", &["--all"]).status, 0);
}

#[test]
fn rm_neither_counts_nor_deletes_what_is_damaged_unless_it_is_named() {
    let store = Store::empty();
    store.save(&[&State::at(10), &State::at(20), &State::at(30)]);
    std::fs::write(store.file(20, "manifest.json"), "nonsense").unwrap();
    let report = store.run("rm", &["--keep-last", "1", "--json"]).json();
    assert_eq!(report["removed"][0]["step"], 10);
    assert_eq!(report["removed"].as_array().unwrap().len(), 1);
    assert_eq!(store.run("rm", &["20"]).status, 0);
    assert!(!store.path().join("step-000000000020").exists());
}

#[test]
fn help_explains() {
    for command in ["", "ls", "inspect", "verify", "restore", "diff", "rm", "gc", "doctor"] {
        let arguments = [command, "--help"];
        let run = tool::run(arguments.iter().filter(|word| !word.is_empty()));
        assert_eq!((run.status, run.stderr.as_str()), (0, ""), "{command}");
        let name = format!("help-{command}");
        assert_golden(name.trim_end_matches('-'), &run.stdout);
    }
}

#[test]
fn a_reader_that_goes_away_ends_it_quietly() {
    let store = Store::trained();
    let path = store.path();
    for words in [
        &["inspect", "--chunks", "--limit", "0", "--json"][..],
        &["ls"],
        &["verify", "--all"],
        &["diff", "10", "20"],
    ] {
        let mut command = tool::command();
        command.arg(words[0]).arg(&path).args(&words[1..]);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        // Before it can have written anything that fits into a pipe and is never missed.
        drop(child.stdout.take());
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{words:?}");
        assert_eq!(String::from_utf8(output.stderr).unwrap(), "", "{words:?}");
    }
}
