//! What is restored is what was saved, bit by bit.

use std::collections::BTreeMap;
use std::path::Path;

use dtr_engine::format::layout::ElementType;
use dtr_engine::load::{ReadOptions, Target};
use dtr_engine::{Config, Engine};
use safetensors::{Dtype, SafeTensors};

use crate::golden::assert_golden;
use crate::state::{State, Store, singles, tensor};
use crate::tool;

/// Rows of a matrix of floats become columns.
fn transposed(bytes: &[u8], rows: usize, columns: usize) -> Vec<u8> {
    let item = |row: usize, column: usize| &bytes[(row * columns + column) * 4..][..4];
    (0..columns)
        .flat_map(|column| (0..rows).flat_map(move |row| item(row, column).to_vec()))
        .collect()
}

#[test]
fn a_file_holds_every_tensor() {
    let store = Store::trained();
    let output = store.beside("all.safetensors");
    let run = store.run("restore", &["--output", output.to_str().unwrap()]);
    assert_eq!(run.status, 0, "{run:?}");
    assert_golden("restore-file", &store.redact(&run.stdout));
    assert_golden("restore-file-notes", &store.redact(&run.stderr));

    let bytes = std::fs::read(&output).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let weight = singles(150 * 256, 0.5);
    let expected: BTreeMap<&str, (Dtype, Vec<usize>, Vec<u8>)> = BTreeMap::from([
        ("model.embedding.weight", (Dtype::F32, vec![150, 256], weight.clone())),
        ("model.head.weight", (Dtype::F32, vec![150, 256], weight.clone())),
        ("model.head.transposed", (Dtype::F32, vec![256, 150], transposed(&weight, 150, 256))),
        ("model.head.bias", (Dtype::BF16, vec![3], vec![0x80, 0x3f, 0x00, 0x40, 0, 0])),
        ("optimizer.state.0.exp_avg", (Dtype::F32, vec![10, 100], singles(1000, 2.5))),
        ("optimizer.state.0.step", (Dtype::I64, vec![], 20_u64.to_le_bytes().to_vec())),
        ("order", (Dtype::U16, vec![3], vec![3, 0, 1, 0, 2, 0])),
    ]);
    assert_eq!(file.len(), expected.len());
    for (name, (dtype, shape, bytes)) in expected {
        let found = file.tensor(name).unwrap();
        assert_eq!((found.dtype(), found.shape()), (dtype, &shape[..]), "{name}");
        assert!(found.data() == bytes, "{name}");
        // Each starts where its items are aligned.
        let start = found.data().as_ptr() as usize - bytes_start(&file);
        assert_eq!(start % dtype.bitsize().div_ceil(8), 0, "{name}");
    }
    let (_, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
    let metadata = metadata.metadata().as_ref().unwrap();
    assert_eq!((&*metadata["format"], &*metadata["step"]), ("pt", "20"));
}

fn bytes_start(file: &SafeTensors<'_>) -> usize {
    file.iter().map(|(_, tensor)| tensor.data().as_ptr() as usize).min().unwrap()
}

#[test]
fn globs_choose() {
    let store = Store::trained();
    let output = store.beside("some.safetensors");
    let output = output.to_str().unwrap();
    let arguments = ["--tensors", "*.weight", "--tensors", "order", "--exclude", "*.embedding.*"];
    let all = [&arguments[..], &["--step", "10", "--json", "-o", output]].concat();
    let run = store.run("restore", &all);
    assert_eq!(run.status, 0, "{run:?}");
    assert_golden("restore-json", &store.redact(&run.stdout));
    let bytes = std::fs::read(output).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let mut names = file.names();
    names.sort_unstable();
    assert_eq!(names, ["model.head.weight", "order"]);

    assert_eq!(store.run("restore", &["-o", output]).status, 2, "it exists");
    assert_eq!(store.run("restore", &["--force", "-o", output]).status, 0);
    let bytes = std::fs::read(output).unwrap();
    assert_eq!(SafeTensors::deserialize(&bytes).unwrap().len(), 7);
}

#[test]
fn names_are_those_of_the_models_own_file() {
    let store = Store::trained();
    let output = store.beside("model.safetensors");
    let output = output.to_str().unwrap();
    for prefix in ["model", "model."] {
        let only = ["--tensors", "model.*", "--strip-prefix", prefix, "--force", "-o", output];
        let run = store.run("restore", &only);
        assert_eq!(run.status, 0, "{run:?}");
        let bytes = std::fs::read(output).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let mut names = file.names();
        names.sort_unstable();
        assert_eq!(names, ["embedding.weight", "head.bias", "head.transposed", "head.weight"]);
    }
    for (prefix, tensors) in [("model", "*"), ("mod", "model.*"), ("model.head.bias", "*.bias")] {
        let arguments = ["--tensors", tensors, "--strip-prefix", prefix, "--force", "-o", output];
        let run = store.run("restore", &arguments);
        assert_eq!(run.status, 2, "{run:?}");
        assert!(run.stderr.contains("it is not in there"), "{run:?}");
    }
}

/// More than a window, in tensors that share chunks and windows, strided and not.
fn large() -> State {
    let (rows, columns) = (1500_u32, 4000_u32);
    let mut state = State::new(1);
    state.dict(None, 5);
    let first = state.storage(ElementType::F32, singles(77, 1.0));
    let matrix = state.storage(ElementType::F32, singles(rows * columns, 0.25));
    let last = state.storage(ElementType::Bytes, vec![7; 12]);
    state.tensor("first", tensor(first, "float32", 4, &[77]));
    let shape = [u64::from(rows), u64::from(columns)];
    let plain = tensor(matrix, "float32", 4, &shape);
    let turned = dtr_engine::format::index::TensorRecord {
        shape: vec![shape[1], shape[0]],
        strides: vec![1, shape[1]],
        ..plain.clone()
    };
    let repeated = dtr_engine::format::index::TensorRecord {
        shape: vec![3, 2, 2],
        strides: vec![0, 1_000_000, 3],
        offset: 5,
        ..plain.clone()
    };
    state.tensor("turned", turned);
    state.tensor("plain", plain);
    state.tensor("repeated", repeated);
    // Two 4-bit values in each byte.
    state.tensor("packed", tensor(last, "float4_e2m1fn_x2", 1, &[2, 6]));
    state
}

#[test]
fn tensors_larger_than_a_window_are_whole() {
    let store = Store::empty();
    let state = large();
    store.save(&[&state, &State { step: 2, ..large() }]);
    let output = store.beside("large.safetensors");
    let run = store.run("restore", &["--output", output.to_str().unwrap()]);
    assert_eq!(run.status, 0, "{run:?}");
    let bytes = std::fs::read(&output).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let matrix = &state.storages[1].1;
    assert!(file.tensor("plain").unwrap().data() == matrix);
    assert!(file.tensor("turned").unwrap().data() == transposed(matrix, 1500, 4000));
    assert!(file.tensor("first").unwrap().data() == state.storages[0].1);
    let once: Vec<u8> = [5, 8, 1_000_005, 1_000_008]
        .iter()
        .flat_map(|item: &usize| matrix[item * 4..][..4].to_vec())
        .collect();
    assert!(file.tensor("repeated").unwrap().data() == once.repeat(3));
    let packed = file.tensor("packed").unwrap();
    assert_eq!((packed.dtype(), packed.shape()), (Dtype::F4, &[2, 12][..]));

    let diff = store.run("diff", &["1", "2", "--exit-code"]);
    assert_eq!(diff.status, 0, "{diff:?}");
}

#[test]
fn a_copy_is_the_checkpoint() {
    let store = Store::trained();
    let copy = store.beside("deep/copy");
    for step in ["10", "20"] {
        let run = store.run("restore", &["--step", step, "-o", copy.to_str().unwrap()]);
        assert_eq!(run.status, 0, "{run:?}");
    }
    let verified = tool::run(["verify", copy.to_str().unwrap(), "--all"]);
    assert_eq!(verified.status, 0, "{verified:?}");
    for step in [10, 20] {
        assert_same(&store.path(), &copy, step);
    }
    // Steps are copied in order, and only once.
    let again = store.run("restore", &["--step", "10", "-o", copy.to_str().unwrap()]);
    again.assert_error(1);
    assert_golden("error-copy-again", &store.redact(&again.stderr));
}

/// The draft has one name, so that no killed process leaves a second one.
#[test]
fn what_a_killed_process_left_is_written_anew() {
    let store = Store::trained();
    let (file, draft) = (store.beside("x.safetensors"), store.beside(".x.safetensors.tmp"));
    std::fs::write(&draft, vec![7; 1 << 20]).unwrap();
    let run = || store.run("restore", &["-o", file.to_str().unwrap(), "--force"]);
    let held = std::fs::File::open(&draft).unwrap();
    held.lock().unwrap();
    run().assert_error(1);
    assert!(!file.exists());
    drop(held);
    assert_eq!(run().status, 0);
    let first = std::fs::read(&file).unwrap();
    assert!(SafeTensors::deserialize(&first).is_ok() && !draft.exists());
    // Nothing is written through a link.
    std::os::unix::fs::symlink(&file, &draft).unwrap();
    run().assert_error(1);
    assert!(std::fs::read(&file).unwrap() == first && draft.is_symlink());
}

#[test]
fn a_newer_step_that_is_damaged_is_named() {
    let store = Store::trained();
    std::fs::remove_file(store.file(20, ".shard")).unwrap();
    let file = store.beside("x.safetensors");
    let run = store.run("restore", &["-o", file.to_str().unwrap()]);
    assert_eq!(run.status, 0, "{run:?}");
    assert!(run.stderr.contains("step 20 is damaged"), "{run:?}");
}

#[test]
fn a_large_copy_is_the_checkpoint() {
    let store = Store::empty();
    store.save(&[&large()]);
    let copy = store.beside("copy");
    let run = store.run("restore", &["-o", copy.to_str().unwrap(), "--json"]);
    assert_eq!(run.status, 0, "{run:?}");
    assert_eq!(run.json()["kind"], "store");
    assert_same(&store.path(), &copy, 1);
}

#[track_caller]
fn assert_same(a: &Path, b: &Path, step: u64) {
    let open = |path: &Path| {
        let engine = Engine::open(Config { read_only: true, ..Config::new(path) }).unwrap();
        engine.checkpoint(step).unwrap()
    };
    let (a, b) = (open(a), open(b));
    assert_eq!(a.index().nodes, b.index().nodes);
    assert_eq!(a.index().tensors, b.index().tensors);
    assert_eq!(a.index().storages, b.index().storages);
    assert_eq!(a.manifest().metadata, b.manifest().metadata);
    assert_eq!(a.manifest().dataset_positions, b.manifest().dataset_positions);
    assert_eq!(a.manifest().job, b.manifest().job);
    for (number, record) in a.index().storages.iter().enumerate() {
        let read = |checkpoint: &dtr_engine::load::Checkpoint| {
            let mut memory = vec![0xAA; usize::try_from(record.bytes).unwrap()];
            let storage = u32::try_from(number).unwrap();
            let target = Target { storage, offset: 0, memory: &mut memory };
            checkpoint.read(vec![target], ReadOptions::default()).unwrap();
            memory
        };
        assert!(read(&a) == read(&b), "storage {number}");
    }
}
