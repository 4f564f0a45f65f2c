//! What is said when a command cannot be done, and with which exit status.

use crate::golden::assert_golden;
use crate::state::{State, Store, writer};
use crate::tool;

#[track_caller]
fn check(store: &Store, name: &str, status: i32, arguments: &[&str]) {
    let run = tool::run(arguments);
    run.assert_error(status);
    assert_golden(name, &store.redact(&run.stderr));
}

#[test]
fn a_path_that_is_no_store_is_wrong_usage() {
    let store = Store::trained();
    let missing = store.beside("nowhere");
    let file = store.beside("file");
    std::fs::write(&file, "text").unwrap();
    let step = store.path().join("step-000000000010");
    check(&store, "error-missing-store", 2, &["ls", missing.to_str().unwrap()]);
    check(&store, "error-store-is-file", 2, &["verify", file.to_str().unwrap()]);
    check(&store, "error-store-is-step", 2, &["inspect", step.to_str().unwrap()]);
    assert!(!missing.exists());
}

#[test]
fn a_checkpoint_that_is_not_there_is_an_error() {
    let store = Store::trained();
    let empty = Store::empty();
    let path = store.path();
    let path = path.to_str().unwrap();
    check(&store, "error-missing-step", 1, &["inspect", path, "--step", "7"]);
    check(&store, "error-diff-missing-step", 1, &["diff", path, "10", "11"]);
    let path = empty.path();
    let path = path.to_str().unwrap();
    check(&empty, "error-verify-empty", 1, &["verify", path]);
    check(&empty, "error-verify-empty-all", 1, &["verify", path, "--all"]);
    check(&empty, "error-restore-empty", 1, &["restore", path, "-o", "never.safetensors"]);
    assert_eq!(std::fs::read_dir(path).unwrap().count(), 0, "looking creates nothing");
}

#[test]
fn wrong_words_are_wrong_usage() {
    let store = Store::empty();
    check(&store, "error-no-command", 2, &[]);
    check(&store, "error-unknown-command", 2, &["lst"]);
    check(&store, "error-bad-number", 2, &["verify", "store", "--step", "newest"]);
    check(&store, "error-step-and-all", 2, &["verify", "store", "--step", "1", "--all"]);
}

#[test]
fn a_bucket_without_its_scheme_is_no_directory_to_be_made() {
    let store = Store::trained();
    let (source, bucket) = (store.path(), store.beside("bucket"));
    let stores = [source.to_str().unwrap(), bucket.to_str().unwrap()];
    let arguments = [&["copy"], &stores[..], &["--to-region", "eu-west-1"]].concat();
    check(&store, "error-copy-to-region-of-directory", 2, &arguments);
    assert!(!bucket.exists());
}

#[test]
fn what_deletes_waits_for_the_training_run() {
    let store = Store::trained();
    let training = writer(&store.path());
    for (command, arguments) in [("gc", &[][..]), ("rm", &["10"])] {
        let run = store.run(command, arguments);
        run.assert_error(1);
        assert!(run.stderr.contains(store.path().to_str().unwrap()), "{run:?}");
        assert_eq!(store.run(command, &[arguments, &["--dry-run"]].concat()).status, 0);
    }
    drop(training);
    assert_eq!(store.run("gc", &[]).status, 0);
    assert_eq!(store.run("rm", &["10"]).status, 0);
}

#[test]
fn rm_of_what_is_not_there_deletes_nothing() {
    let store = Store::trained();
    let path = store.path();
    let path = path.to_str().unwrap();
    check(&store, "error-rm-missing-step", 1, &["rm", path, "10", "15"]);
    check(&store, "error-rm-nothing-named", 2, &["rm", path]);
    assert_eq!(store.run("ls", &["--json"]).json()["checkpoints"].as_array().unwrap().len(), 2);
}

#[test]
fn an_output_that_cannot_be_is_wrong_usage() {
    let store = Store::trained();
    let path = store.path();
    let path = path.to_str().unwrap();
    let there = store.beside("there.safetensors");
    std::fs::write(&there, "mine").unwrap();
    let other = store.beside("other");
    std::fs::write(&other, "mine").unwrap();
    let (there, other) = (there.to_str().unwrap(), other.to_str().unwrap());
    let copy = store.beside("copy");
    let copy = copy.to_str().unwrap();
    check(&store, "error-output-exists", 2, &["restore", path, "-o", there]);
    check(&store, "error-output-is-file", 2, &["restore", path, "-o", other]);
    let of_torch = store.beside("model.pt");
    let of_torch = of_torch.to_str().unwrap();
    check(&store, "error-output-of-torch", 2, &["restore", path, "-o", of_torch]);
    check(
        &store,
        "error-tensors-to-store",
        2,
        &["restore", path, "--tensors", "model.*", "-o", copy],
    );
    let new = store.beside("new.safetensors");
    let new = new.to_str().unwrap();
    check(&store, "error-nothing-fits", 2, &["restore", path, "--tensors", "modle.*", "-o", new]);
    assert_eq!(std::fs::read_to_string(there).unwrap(), "mine");
    assert!(!store.beside("new.safetensors").exists() && !store.beside("copy").exists());
}

#[test]
fn what_the_file_format_cannot_say_is_named() {
    use dtr_engine::format::layout::ElementType;
    use dtr_engine::format::tree::{Key, Value};

    let store = Store::empty();
    let mut state = State::new(1);
    state.dict(None, 3);
    let bytes = state.storage(ElementType::F64, vec![0; 32]);
    state.tensor("waves", crate::state::tensor(bytes, "complex128", 16, &[2]));
    state.tensor("3", crate::state::tensor(bytes, "float64", 8, &[2]));
    state.node(Some(Key::Int(3)), Value::Tensor(1));
    store.save(&[&state]);
    let path = store.path();
    let path = path.to_str().unwrap();
    let new = store.beside("new.safetensors");
    let new = new.to_str().unwrap();
    check(&store, "error-same-name", 2, &["restore", path, "-o", new]);
    check(&store, "error-dtype", 2, &["restore", path, "--exclude", "3", "-o", new]);
    assert!(!store.beside("new.safetensors").exists());
}
