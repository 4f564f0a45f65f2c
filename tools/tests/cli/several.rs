//! Tensors in several files and an index are those of one file, and no file of another export is
//! beside them.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::{FileTypeExt, symlink};
use std::path::Path;

use dtr_engine::format::index::{GlobalSlice, TensorRecord};
use dtr_engine::format::layout::ElementType;
use safetensors::{Dtype, SafeTensors};

use crate::golden::assert_golden;
use crate::ranks::saved_by;
use crate::state::{State, Store, singles, tensor};
use crate::tool::Run;

/// By name: dtype, shape and bytes.
type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

fn tensors_of(file: &Path) -> Tensors {
    let bytes = fs::read(file).unwrap();
    let (_, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
    assert_eq!(metadata.metadata().as_ref().unwrap()["format"], "pt");
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let tensors = file.iter().map(|(name, tensor)| {
        (name.to_owned(), (tensor.dtype(), tensor.shape().to_vec(), tensor.data().to_vec()))
    });
    tensors.collect()
}

fn names_in(directory: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(directory).unwrap();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

/// An export called `model`: its tensors, and bytes of tensors by file. Checks that the directory
/// holds it and these other files, and that its index is right.
#[track_caller]
fn export_in(directory: &Path, others: &[&str]) -> (Tensors, Vec<usize>) {
    let mut names = names_in(directory);
    for other in others {
        assert!(names.remove(*other), "{other} is gone: {names:?}");
    }
    let index: serde_json::Value =
        serde_json::from_slice(&fs::read(directory.join("model.safetensors.index.json")).unwrap())
            .unwrap();
    names.remove("model.safetensors.index.json");
    let count = names.len();
    let expected = (1..=count).map(|file| format!("model-{file:05}-of-{count:05}.safetensors"));
    assert_eq!(names, expected.collect());

    let (mut all, mut sizes) = (Tensors::new(), Vec::new());
    let mut map = serde_json::Map::new();
    for name in &names {
        let tensors = tensors_of(&directory.join(name));
        sizes.push(tensors.values().map(|(_, _, bytes)| bytes.len()).sum());
        map.extend(tensors.keys().map(|tensor| (tensor.clone(), name.as_str().into())));
        all.extend(tensors);
    }
    assert_eq!(index["weight_map"], serde_json::Value::Object(map));
    assert_eq!(index["metadata"]["total_size"], sizes.iter().sum::<usize>());
    assert_eq!(index.as_object().unwrap().len(), 2);
    (all, sizes)
}

/// Restores into a directory beside the store.
fn restore(store: &Store, size: &str, more: &[&str]) -> Run {
    let directory = store.beside("hf");
    let arguments = ["--max-shard-size", size, "-o", directory.to_str().unwrap()];
    store.run("restore", &[&arguments, more].concat())
}

#[track_caller]
fn restored(store: &Store, size: &str, more: &[&str]) -> Run {
    let run = restore(store, size, more);
    assert_eq!(run.status, 0, "{run:?}");
    run
}

/// What [`Store::trained`] saved last.
fn saved() -> Tensors {
    let weight = singles(150 * 256, 0.5);
    let item = |row: usize, column: usize| &weight[(row * 256 + column) * 4..][..4];
    let turned = (0..256).flat_map(|column| (0..150).flat_map(move |row| item(row, column)));
    let turned: Vec<u8> = turned.copied().collect();
    let matrix = || (Dtype::F32, vec![150, 256], weight.clone());
    let tensors = [
        ("model.embedding.weight", matrix()),
        ("model.head.weight", matrix()),
        ("model.head.transposed", (Dtype::F32, vec![256, 150], turned)),
        ("model.head.bias", (Dtype::BF16, vec![3], vec![0x80, 0x3f, 0x00, 0x40, 0, 0])),
        ("optimizer.state.0.exp_avg", (Dtype::F32, vec![10, 100], singles(1000, 2.5))),
        ("optimizer.state.0.step", (Dtype::I64, vec![], 20_u64.to_le_bytes().to_vec())),
        ("order", (Dtype::U16, vec![3], vec![3, 0, 1, 0, 2, 0])),
    ];
    tensors.map(|(name, tensor)| (name.to_owned(), tensor)).into()
}

/// The one-file export of a store.
fn whole(store: &Store) -> Tensors {
    let file = store.beside("whole.safetensors");
    let run = store.run("restore", &["--force", "-o", file.to_str().unwrap()]);
    assert_eq!(run.status, 0, "{run:?}");
    tensors_of(&file)
}

#[test]
fn several_files_hold_what_was_saved() {
    let store = Store::trained();
    // Names for one memory have it once each.
    let matrix = 150 * 256 * 4;
    for (size, expected) in [
        ("1B", vec![matrix, matrix, matrix, 4000, 6, 8, 6]),
        ("4kB", vec![matrix, matrix, matrix, 4000, 6 + 8 + 6]),
        ("300KiB", vec![2 * matrix, matrix + 6 + 4000 + 8 + 6]),
        ("0.3 mb", vec![matrix, matrix, matrix + 6 + 4000 + 8 + 6]),
    ] {
        restored(&store, size, &["--force"]);
        let (tensors, sizes) = export_in(&store.beside("hf"), &[]);
        assert!(tensors == saved(), "{size}");
        assert_eq!(sizes, expected, "{size}");
    }
}

#[test]
fn what_was_written_is_said() {
    let store = Store::trained();
    let run = restored(&store, "300kB", &["--strip-prefix", "model", "--tensors", "model.*"]);
    assert_golden("restore-several", &store.redact(&run.stdout));
    assert_golden("restore-several-notes", &store.redact(&run.stderr));
    let index = fs::read_to_string(store.beside("hf/model.safetensors.index.json")).unwrap();
    assert_golden("restore-several-index", &index);

    let file = store.beside("hf/other.safetensors");
    let arguments = ["--max-shard-size", "200kB", "--json", "-o", file.to_str().unwrap()];
    let run = store.run("restore", &arguments);
    assert_golden("restore-several-json", &store.redact(&run.stdout));
    let written: u64 = run.json()["files"]
        .as_array()
        .unwrap()
        .iter()
        .map(|file| fs::metadata(file.as_str().unwrap()).unwrap().len())
        .sum();
    assert_eq!(run.json()["disk_bytes"], written);
    assert_eq!(names_in(&store.beside("hf")).len(), 4 + 4);
}

#[test]
fn what_fits_one_file_is_one() {
    let store = Store::trained();
    let run = restored(&store, "5GB", &["--json"]);
    let file = store.beside("hf/model.safetensors");
    assert_eq!(run.json()["kind"], "file");
    assert_eq!(run.json()["files"], serde_json::json!([file.to_str().unwrap()]));
    assert_eq!(names_in(&store.beside("hf")), BTreeSet::from(["model.safetensors".into()]));
    whole(&store);
    assert!(fs::read(&file).unwrap() == fs::read(store.beside("whole.safetensors")).unwrap());
    // Exactly as large as what there is.
    let bytes = run.json()["raw_bytes"].to_string();
    assert_eq!(restored(&store, &bytes, &["--force", "--json"]).json()["kind"], "file");
}

#[test]
fn files_of_an_earlier_export_go_with_it() {
    let store = Store::trained();
    let hf = store.beside("hf");
    fs::create_dir(&hf).unwrap();
    let others = ["config.json", "model.safetensors.bak", "model2-00001-of-00002.safetensors"];
    for other in others {
        fs::write(hf.join(other), other).unwrap();
    }
    let expected = whole(&store);
    let only = BTreeSet::from(others.map(str::to_owned));
    let file = hf.join("model.safetensors");
    let file = file.to_str().unwrap();
    for size in ["1", "1", "300KiB", "1TB", "4kB", "1TiB", "200kB"] {
        restored(&store, size, &["--force"]);
        if size.starts_with("1T") {
            let names = names_in(&hf);
            let new: Vec<_> = names.difference(&only).collect();
            assert_eq!(new, ["model.safetensors"]);
            assert!(tensors_of(Path::new(file)) == expected);
        } else {
            assert!(export_in(&hf, &others).0 == expected, "{size}");
        }
        restore(&store, "10kB", &[]).assert_error(2);
        store.run("restore", &["-o", file]).assert_error(2);
    }
    let refused = restore(&store, "10kB", &[]);
    assert_golden("error-earlier-export", &store.redact(&refused.stderr));
    // One file takes the place of several, too, where no size is given.
    assert_eq!(store.run("restore", &["--force", "-o", file]).status, 0);
    assert_eq!(names_in(&hf).len(), others.len() + 1);
    for other in others {
        assert_eq!(fs::read_to_string(hf.join(other)).unwrap(), other);
    }
}

#[test]
fn what_a_killed_process_left_misleads_nobody() {
    let store = Store::trained();
    let hf = store.beside("hf");
    fs::create_dir(&hf).unwrap();
    let drafts = [".model.safetensors.tmp", ".model.safetensors.00009.tmp"];
    for left in drafts.into_iter().chain(["model-00002-of-00009.safetensors"]) {
        fs::write(hf.join(left), vec![7; 1 << 20]).unwrap();
    }
    // A file without an index is of no use; it may be all that somebody has.
    restore(&store, "1", &[]).assert_error(2);
    assert_eq!(names_in(&hf).len(), 3);
    let held = fs::File::open(hf.join(drafts[0])).unwrap();
    held.lock().unwrap();
    restore(&store, "1", &["--force"]).assert_error(1);
    assert_eq!(names_in(&hf).len(), 3);
    drop(held);
    restored(&store, "1", &["--force"]);
    export_in(&hf, &[]);

    // Drafts alone are in nobody's way.
    for name in names_in(&hf) {
        fs::remove_file(hf.join(name)).unwrap();
    }
    fs::write(hf.join(drafts[1]), "left").unwrap();
    restored(&store, "300kB", &[]);
    export_in(&hf, &[]);
}

#[test]
fn nothing_is_written_through_links() {
    let store = Store::trained();
    let (hf, outside) = (store.beside("hf"), store.beside("outside"));
    fs::create_dir(&hf).unwrap();
    fs::write(&outside, "keep").unwrap();
    let links = [
        ".model.safetensors.00001.tmp",
        "model-00001-of-00007.safetensors",
        "model-00001-of-00009.safetensors",
        "model.safetensors",
        "model.safetensors.index.json",
    ];
    for link in links {
        symlink(&outside, hf.join(link)).unwrap();
    }
    restored(&store, "1", &["--force"]);
    export_in(&hf, &[]);
    assert!(!hf.join("model-00001-of-00007.safetensors").is_symlink());
    assert_eq!(fs::read_to_string(&outside).unwrap(), "keep");
}

#[test]
fn what_fails_leaves_what_was_there() {
    let store = Store::trained();
    restored(&store, "300kB", &[]);
    let hf = store.beside("hf");
    let before = export_in(&hf, &[]);
    let mut bytes = fs::read(store.file(20, ".shard")).unwrap();
    bytes[4096 + 100] ^= 1;
    fs::write(store.file(20, ".shard"), bytes).unwrap();
    for size in ["1", "300kB", "1GB"] {
        restore(&store, size, &["--force"]).assert_error(1);
        assert!(export_in(&hf, &[]) == before, "{size}");
    }
    let other = store.beside("other");
    let arguments = ["--max-shard-size", "1", "-o", other.to_str().unwrap()];
    store.run("restore", &arguments).assert_error(1);
    assert!(names_in(&other).is_empty());
}

/// More files than are open at a time, which two ranks write in turn.
#[test]
fn there_may_be_more_files_than_are_open_at_a_time() {
    const TENSORS: u32 = 80;
    let state = |rank: u32| {
        let mut state = State::new(7);
        state.dict(None, TENSORS);
        for number in 0..TENSORS {
            let bytes = singles(4, f32::from(u8::try_from(number * 2 + rank).unwrap()));
            let storage = state.storage(ElementType::F32, bytes);
            let offsets = vec![u64::from(rank) * 2, 0];
            let slice = Some(GlobalSlice { shape: vec![4, 2], offsets });
            let record = tensor(storage, "float32", 4, &[2, 2]);
            state.tensor(&format!("w{number}"), TensorRecord { slice, ..record });
        }
        state
    };
    let store = saved_by(&[state(0), state(1)], &[]);
    restored(&store, "1", &[]);
    let (tensors, sizes) = export_in(&store.beside("hf"), &[]);
    assert_eq!(sizes, vec![32; 80]);
    assert!(tensors == whole(&store));
    let rows = |number: u8| singles(4, f32::from(number));
    assert_eq!(tensors["w79"].2, [rows(158), rows(159)].concat());

    restored(&store, "100B", &["--rank", "1", "--force"]);
    let (tensors, sizes) = export_in(&store.beside("hf"), &[]);
    assert_eq!(sizes, [vec![96; 26], vec![64]].concat());
    assert!(tensors == whole(&store));
}

#[test]
fn what_is_no_size_is_wrong_usage() {
    let store = Store::trained();
    for size in ["0", "", "-1", "5 gigabytes", "5G", "1e9", "99999999999TB"] {
        restore(&store, size, &[]).assert_error(2);
    }
    assert_golden("error-bad-size", &store.redact(&restore(&store, "many", &[]).stderr));
    assert!(!store.beside("hf").exists());
}

/// What is said to a wrong command.
#[track_caller]
fn refused(store: &Store, arguments: &[&str]) -> String {
    let run = store.run("restore", arguments);
    run.assert_error(2);
    store.redact(&run.stderr)
}

#[test]
fn a_place_that_cannot_be_is_wrong_usage() {
    let store = Store::trained();
    let into = |output: &str| refused(&store, &["--max-shard-size", "1", "--force", "-o", output]);
    let path = store.path();
    assert_golden("error-files-to-store", &into(path.to_str().unwrap()));
    assert_golden("error-files-to-s3", &into("s3://bucket/prefix"));
    let file = store.beside("file");
    fs::write(&file, "mine").unwrap();
    assert_golden("error-files-to-file", &into(file.to_str().unwrap()));
    let hf = store.beside("hf");
    fs::create_dir_all(hf.join("model-00001-of-00002.safetensors")).unwrap();
    assert_golden("error-directory-in-the-way", &into(hf.to_str().unwrap()));
    assert_eq!(names_in(&hf).len(), 1);
    assert_eq!(fs::read_to_string(&file).unwrap(), "mine");
}

fn make_pipe(path: &Path) {
    let (kind, mode) = (rustix::fs::FileType::Fifo, rustix::fs::Mode::from_raw_mode(0o600));
    rustix::fs::mknodat(rustix::fs::CWD, path, kind, mode, 0).unwrap();
}

#[test]
fn what_is_no_file_is_not_replaced() {
    let store = Store::trained();
    restored(&store, "1", &[]);
    let hf = store.beside("hf");
    let pipe = hf.join("model-00001-of-00002.safetensors");
    make_pipe(&pipe);
    let before = names_in(&hf);
    for size in ["1", "300kB", "5GB"] {
        let run = restore(&store, size, &["--force"]);
        run.assert_error(2);
        assert!(run.stderr.contains("is no regular file"), "{run:?}");
        assert_eq!(names_in(&hf), before);
    }
    assert!(pipe.symlink_metadata().unwrap().file_type().is_fifo());
}

#[test]
fn what_is_in_the_way_of_a_hidden_name_is_told() {
    let store = Store::trained();
    let hf = store.beside("hf");
    fs::create_dir(&hf).unwrap();
    for name in [".model.safetensors.tmp", ".model.safetensors.00002.tmp"] {
        let path = hf.join(name);
        let check = |kind: &str| {
            let run = restore(&store, "1", &[]);
            run.assert_error(1);
            let hint = format!("hint: remove `{}`, or choose another name", path.display());
            assert!(run.stderr.contains(&hint), "{kind}: {run:?}");
            assert_eq!(names_in(&hf), BTreeSet::from([name.to_owned()]));
        };
        fs::create_dir(&path).unwrap();
        check("directory");
        fs::remove_dir(&path).unwrap();
        make_pipe(&path);
        check("pipe");
        fs::remove_file(&path).unwrap();
    }
    symlink("nowhere", hf.join(".model.safetensors.tmp")).unwrap();
    let run = restore(&store, "1", &[]);
    assert!(run.stderr.contains("hint: remove `"), "{run:?}");
}

#[test]
fn a_name_that_is_too_long_is_told_while_the_earlier_export_is_there() {
    let store = Store::trained();
    let hf = store.beside("hf");
    fs::create_dir(&hf).unwrap();
    // With a number behind it, it is longer than any name may be.
    let name = format!("{}.safetensors", "n".repeat(230));
    fs::write(hf.join(&name), "mine").unwrap();
    let output = hf.join(&name);
    let arguments = ["--max-shard-size", "1", "--force", "-o", output.to_str().unwrap()];
    let run = store.run("restore", &arguments);
    run.assert_error(1);
    assert!(run.stderr.contains("the path is too long"), "{run:?}");
    assert_eq!(fs::read_to_string(&output).unwrap(), "mine");
    assert_eq!(names_in(&hf), BTreeSet::from([name]));
}

/// As a process leaves it that is killed while names change.
#[test]
fn what_was_set_aside_is_put_back() {
    let store = Store::trained();
    restored(&store, "300kB", &[]);
    let hf = store.beside("hf");
    let before = export_in(&hf, &[]);
    for name in names_in(&hf) {
        fs::rename(hf.join(&name), hf.join(format!(".{name}.replaced"))).unwrap();
    }
    fs::write(hf.join("model-00001-of-00003.safetensors"), "new").unwrap();
    // The run fails, after it restored what existed.
    let shard = store.file(20, ".shard");
    let bytes = fs::read(&shard).unwrap();
    fs::write(&shard, [&bytes[..4096 + 100], &[!bytes[4096 + 100]], &bytes[4096 + 101..]].concat())
        .unwrap();
    restore(&store, "300kB", &["--force"]).assert_error(1);
    assert!(export_in(&hf, &[]) == before);
}

#[test]
fn what_was_replaced_is_said() {
    let store = Store::trained();
    let removed = |run: &Run| run.json()["removed"].as_array().unwrap().len();
    let run = restored(&store, "1", &["--json"]);
    assert!(removed(&run) == 0 && !run.stderr.contains("replaced"), "{run:?}");
    let run = restored(&store, "300kB", &["--force", "--json"]);
    assert_eq!(removed(&run), 7 + 1);
    assert!(run.stderr.contains("note: replaced an export of 8 files\n"), "{run:?}");
    // Without a size, too.
    let file = store.beside("hf/model.safetensors");
    let run = store.run("restore", &["--force", "--json", "-o", file.to_str().unwrap()]);
    assert!(removed(&run) > 2 && run.stderr.contains("note: replaced an export of "), "{run:?}");
    let run = store.run("restore", &["--force", "--json", "-o", file.to_str().unwrap()]);
    assert_eq!(run.json()["removed"], serde_json::json!([file.to_str().unwrap()]));
    assert!(run.stderr.contains("note: replaced an export of 1 file\n"), "{run:?}");
}

#[test]
fn a_name_like_that_of_one_of_several_is_refused() {
    let store = Store::trained();
    let output = store.beside("model-00001-of-00002.safetensors");
    let output = output.to_str().unwrap();
    assert_golden("error-name-of-shard", &refused(&store, &["-o", output]));
    refused(&store, &["--force", "--max-shard-size", "1", "-o", output]);
    assert!(!Path::new(output).exists());
}

#[test]
fn no_store_is_made_among_safetensors_files() {
    let store = Store::trained();
    let hf = store.beside("hf");
    fs::create_dir(&hf).unwrap();
    for name in ["other.safetensors", "model.safetensors.index.json"] {
        fs::write(hf.join(name), "mine").unwrap();
        assert_golden("error-store-to-files", &refused(&store, &["-o", hf.to_str().unwrap()]));
        assert_eq!(names_in(&hf), BTreeSet::from([name.to_owned()]));
        fs::remove_file(hf.join(name)).unwrap();
    }
    // One whose first checkpoint is being written has no more than this.
    for lock in ["writer.lock", "writer-00003.lock"] {
        fs::write(hf.join(lock), "").unwrap();
        let said = refused(&store, &["--max-shard-size", "1", "-o", hf.to_str().unwrap()]);
        assert!(said.contains("it is a store"), "{said}");
        fs::remove_file(hf.join(lock)).unwrap();
    }
}

#[test]
fn one_plain_value_is_not_several() {
    let store = Store::empty();
    let mut state = State::new(1);
    state.dict(None, 2);
    let storage = state.storage(ElementType::F32, singles(4, 1.0));
    state.tensor("w", tensor(storage, "float32", 4, &[4]));
    state.node(
        Some(dtr_engine::format::tree::Key::Str("step".into())),
        dtr_engine::format::tree::Value::Int(1),
    );
    store.save(&[&state]);
    let run = restored(&store, "1", &[]);
    assert!(run.stderr.contains("1 plain value of the state is not written"), "{run:?}");
}
