//! What is said about checkpoints that are not as they were written.
//!
//! Always holds here: one change to one file, and `verify` ends with status 1 and names the place.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::golden::assert_golden;
use crate::state::Store;

/// Turns one bit of the byte at `offset`, from the end if it is negative.
fn flip(path: &Path, offset: i64) {
    let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
    let length = i64::try_from(file.metadata().unwrap().len()).unwrap();
    let offset = u64::try_from(if offset < 0 { length + offset } else { offset }).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).unwrap();
    file.write_all_at(&[byte[0] ^ 0x10], offset).unwrap();
}

#[track_caller]
fn check(name: &str, damage: impl Fn(&Store)) {
    let store = Store::trained();
    damage(&store);
    let run = store.run("verify", &[]);
    assert_eq!(run.status, 1, "{run:?}");
    assert_golden(name, &store.redact(&run.stdout));
    assert_eq!(store.run("verify", &["--step", "10"]).status, 0, "the other step is whole");
    assert_eq!(store.run("verify", &["--all"]).status, 1);
    let json = store.run("verify", &["--json"]).json();
    assert_eq!(json[0]["step"], 20);
    assert!(!json[0]["damage"].as_array().unwrap().is_empty(), "{json}");
}

#[test]
fn a_flipped_bit_in_a_chunk() {
    check("damage-chunk", |store| flip(&store.file(20, ".shard"), 4096 + 100));
}

#[test]
fn a_flipped_bit_in_the_padding() {
    check("damage-padding", |store| flip(&store.file(20, ".shard"), -2 * 4096 - 1));
}

#[test]
fn a_flipped_bit_in_the_index() {
    check("damage-index", |store| flip(&store.file(20, ".shard"), -2 * 4096 + 10));
}

#[test]
fn a_flipped_bit_in_the_footer() {
    check("damage-footer", |store| flip(&store.file(20, ".shard"), -4096 + 20));
}

#[test]
fn a_flipped_bit_in_the_header() {
    check("damage-header", |store| flip(&store.file(20, ".shard"), 20));
}

#[test]
fn a_flipped_bit_in_the_manifest() {
    check("damage-manifest", |store| flip(&store.file(20, "manifest.json"), 60));
}

#[test]
fn a_truncated_shard() {
    check("damage-truncated", |store| {
        let file = OpenOptions::new().write(true).open(store.file(20, ".shard")).unwrap();
        file.set_len(file.metadata().unwrap().len() - 4096).unwrap();
    });
}

#[test]
fn a_missing_shard() {
    check("damage-missing", |store| fs::remove_file(store.file(20, ".shard")).unwrap());
}

#[test]
fn ls_shows_what_it_knows() {
    let store = Store::trained();
    flip(&store.file(20, "manifest.json"), 60);
    let run = store.run("ls", &[]);
    assert_eq!(run.status, 1, "{run:?}");
    assert_golden("damage-ls", &store.redact(&run.stdout));
}

#[test]
fn nothing_damaged_is_restored() {
    let store = Store::trained();
    flip(&store.file(20, ".shard"), 4096 + 100);
    let file = store.beside("new.safetensors");
    let copy = store.beside("copy");
    for output in [&file, &copy] {
        let run = store.run("restore", &["-o", output.to_str().unwrap()]);
        run.assert_error(1);
        assert!(run.stderr.contains("model.embedding.weight"), "{run:?}");
    }
    let left: Vec<_> = fs::read_dir(store.beside("")).unwrap().collect();
    assert_eq!(left.len(), 2, "the store and the empty copy: {left:?}");
    assert_eq!(store.run("diff", &["10", "20"]).status, 1);
}
