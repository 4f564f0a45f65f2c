//! Tensors of which ranks hold slices come out of a checkpoint whole, or not at all.

use std::collections::BTreeMap;

use dtr_engine::format::index::{GlobalSlice, TensorRecord};
use dtr_engine::format::layout::ElementType;
use dtr_engine::format::tree::Key;
use safetensors::SafeTensors;

use crate::golden::assert_golden;
use crate::ranks::saved_by;
use crate::state::{State, Store, singles, tensor};

/// Items from a row and a column on, as many as there are.
#[derive(Clone, Copy, Debug)]
struct Cut {
    at: [u64; 2],
    size: [u64; 2],
}

/// A matrix of floats that count up.
#[derive(Clone, Debug)]
struct Matrix {
    shape: [u64; 2],
    bytes: Vec<u8>,
}

impl Matrix {
    fn new(rows: u32, columns: u32, scale: f32) -> Self {
        let bytes = singles(rows * columns, scale);
        Self { shape: [rows.into(), columns.into()], bytes }
    }

    fn cut(&self, cut: Cut) -> Vec<u8> {
        let rows = cut.at[0]..cut.at[0] + cut.size[0];
        rows.flat_map(|row| {
            let start = (row * self.shape[1] + cut.at[1]) * 4;
            let place = |position| usize::try_from(position).unwrap();
            self.bytes[place(start)..place(start + cut.size[1] * 4)].to_vec()
        })
        .collect()
    }
}

/// Adds a slice of a matrix, in memory of its own.
fn add(state: &mut State, name: &str, matrix: &Matrix, cut: Cut) {
    let storage = state.storage(ElementType::F32, matrix.cut(cut));
    let slice = GlobalSlice { shape: matrix.shape.to_vec(), offsets: cut.at.to_vec() };
    let record = tensor(storage, "float32", 4, &cut.size);
    state.tensor(name, TensorRecord { slice: Some(slice), ..record });
}

const RANKS: u64 = 4;

/// Cut by rows, by both, by columns, and by rows among two ranks, twice.
fn matrices() -> [(&'static str, Matrix); 4] {
    [
        ("rows", Matrix::new(5, 4, 0.5)),
        ("grid", Matrix::new(6, 10, 0.25)),
        ("columns", Matrix::new(3, 8, 2.0)),
        ("twice", Matrix::new(4, 2, 8.0)),
    ]
}

fn cut_of(name: &str, rank: u64) -> Cut {
    let (row, column) = (rank / 2, rank % 2);
    match name {
        // The last rank gets nothing.
        "rows" => {
            Cut { at: [(2 * rank).min(5), 0], size: [5_u64.saturating_sub(2 * rank).min(2), 4] }
        }
        "grid" => Cut { at: [4 * row, 5 * column], size: [4 - 2 * row, 5] },
        "columns" => Cut { at: [0, 2 * rank], size: [3, 2] },
        _ => Cut { at: [2 * column, 0], size: [2, 2] },
    }
}

/// What a rank saves: slices, what is replicated (node 1), and a tensor of its own.
fn state_of(rank: u64) -> State {
    let mut state = State::new(7);
    state.dict(None, 6);
    let bias = state.storage(ElementType::F32, singles(3, 1.0));
    state.tensor("bias", tensor(bias, "float32", 4, &[3]));
    for (name, matrix) in matrices() {
        add(&mut state, name, &matrix, cut_of(name, rank));
    }
    let own = state.storage(ElementType::Bytes, vec![rank.try_into().unwrap(); 5]);
    state.tensor("rng", tensor(own, "uint8", 1, &[5]));
    state
}

fn states() -> Vec<State> {
    (0..RANKS).map(state_of).collect()
}

/// By name: shape and bytes.
type Tensors = BTreeMap<String, (Vec<usize>, Vec<u8>)>;

fn restored(store: &Store, arguments: &[&str]) -> (Tensors, String) {
    let output = store.beside("whole.safetensors");
    let all = [arguments, &["--force", "-o", output.to_str().unwrap()]].concat();
    let run = store.run("restore", &all);
    assert_eq!(run.status, 0, "{run:?}");
    let bytes = std::fs::read(&output).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let tensors = file
        .iter()
        .map(|(name, tensor)| (name.to_owned(), (tensor.shape().to_vec(), tensor.data().to_vec())));
    (tensors.collect(), store.redact(&run.stderr))
}

fn expected() -> Tensors {
    let matrices = matrices().map(|(name, matrix)| {
        let shape = matrix.shape.map(|size| usize::try_from(size).unwrap()).to_vec();
        (name.to_owned(), (shape, matrix.bytes))
    });
    let bias = ("bias".to_owned(), (vec![3], singles(3, 1.0)));
    matrices.into_iter().chain([bias]).collect()
}

#[test]
fn slices_of_all_ranks_are_put_together() {
    let store = saved_by(&states(), &[1]);
    let (found, said) = restored(&store, &[]);
    assert_eq!(found, expected());
    assert_golden("restore-slices-notes", &said);

    // A rank's own tensors come with it.
    let (found, said) = restored(&store, &["--rank", "2"]);
    let own = ("rng".to_owned(), (vec![5], vec![2; 5]));
    assert_eq!(found, expected().into_iter().chain([own]).collect());
    assert_eq!(said, "note: replaced an export of 1 file\n");
    let (found, _) = restored(&store, &["--tensors", "*s", "--exclude", "rows"]);
    assert_eq!(found.keys().collect::<Vec<_>>(), ["bias", "columns"]);

    let output = store.beside("rank.safetensors");
    let output = output.to_str().unwrap();
    let run = store.run("restore", &["--json", "-o", output]);
    assert_eq!(run.json()["rank"], serde_json::Value::Null);
    assert_eq!(run.json()["raw_bytes"], (20 + 60 + 24 + 8 + 3) * 4);
    assert_eq!(run.json()["left_out"], 1);
    // What is asked for by name is not left out.
    for tensors in ["rng", "r*"] {
        let run = store.run("restore", &["--tensors", tensors, "--force", "-o", output]);
        run.assert_error(2);
        assert_golden("error-own-tensors", &store.redact(&run.stderr).replace("r*", "rng"));
    }
}

#[test]
fn any_views_of_memory_may_be_slices() {
    // Columns of a matrix that lies transposed, in memory before and behind which others lie; each
    // rank has it twice, and a tensor that the other has not.
    let matrix = Matrix::new(6, 4, 1.0);
    let states: Vec<State> = (0..2_u64)
        .map(|rank| {
            let mut state = State::new(7);
            state.dict(None, 4);
            let columns = 2 * rank..2 * rank + 2;
            let column = |at| matrix.cut(Cut { at: [0, at], size: [6, 1] });
            let transposed = columns.flat_map(column);
            let bytes = [1; 8].into_iter().chain(transposed).chain([2; 4]).collect();
            let storage = state.storage(ElementType::F32, bytes);
            let record = TensorRecord {
                strides: vec![1, 6],
                offset: 2,
                slice: Some(GlobalSlice { shape: vec![6, 4], offsets: vec![0, 2 * rank] }),
                ..tensor(storage, "float32", 4, &[6, 2])
            };
            state.tensor("w", record.clone());
            state.tensor("tied", record);
            let packed = state.storage(ElementType::Bytes, vec![rank.try_into().unwrap(); 3]);
            let slice = GlobalSlice { shape: vec![2, 3], offsets: vec![rank, 0] };
            let record = tensor(packed, "float4_e2m1fn_x2", 1, &[1, 3]);
            state.tensor("packed", TensorRecord { slice: Some(slice), ..record });
            let own = Matrix::new(1, 1, 1.0);
            add(&mut state, &format!("stage{rank}"), &own, Cut { at: [0, 0], size: [1, 1] });
            state
        })
        .collect();
    let store = saved_by(&states, &[]);
    let (found, said) = restored(&store, &[]);
    let names: Vec<_> = found.keys().map(String::as_str).collect();
    assert_eq!(names, ["packed", "stage0", "stage1", "tied", "w"]);
    for name in ["w", "tied"] {
        assert_eq!(found[name], (vec![6, 4], matrix.bytes.clone()));
    }
    assert_eq!(found["packed"], (vec![2, 6], vec![0, 0, 0, 1, 1, 1]));
    assert!(said.contains("5 tensors for 4 storages"), "{said}");
    let (found, _) = restored(&store, &["--rank", "1"]);
    assert!(found.contains_key("stage1") && !found.contains_key("stage0"));
    assert_eq!(found["w"].1, matrix.bytes);
}

#[test]
fn what_shares_memory_with_what_all_have_alike_is_a_ranks_own_all_the_same() {
    let state = |rank: u8| {
        let mut state = State::new(7);
        state.dict(None, 2);
        let shared = state.storage(ElementType::F32, singles(2, 1.0));
        state.tensor("alike", tensor(shared, "float32", 4, &[2]));
        let own = if rank == 0 { shared } else { state.storage(ElementType::F32, vec![rank; 8]) };
        state.tensor("own", tensor(own, "float32", 4, &[2]));
        state
    };
    let store = saved_by(&[state(0), state(1)], &[1]);
    let (found, said) = restored(&store, &[]);
    assert_eq!(found.keys().collect::<Vec<_>>(), ["alike"]);
    assert!(said.contains("like `own`"), "{said}");
    let (found, _) = restored(&store, &["--rank", "1"]);
    assert_eq!(found["own"].1, [1; 8]);
}

#[test]
fn paths_that_only_read_the_same_are_not_one_tensor() {
    let state = |rank: u64, key: Key| {
        let mut state = State::new(7);
        state.dict(None, 1);
        let matrix = Matrix::new(2, 2, 1.0);
        add(&mut state, "", &matrix, Cut { at: [rank, 0], size: [1, 2] });
        state.nodes.last_mut().unwrap().key = Some(key);
        state
    };
    let store = saved_by(&[state(0, Key::Int(3)), state(1, Key::Str("3".into()))], &[]);
    let output = store.beside("refused.safetensors");
    let output = output.to_str().unwrap();
    let run = store.run("restore", &["-o", output]);
    run.assert_error(2);
    assert!(run.stderr.contains("two tensors are called this"), "{run:?}");
    let run = store.run("restore", &["--rank", "0", "-o", output]);
    run.assert_error(1);
    assert!(run.stderr.contains("no rank saved 2 of its 4 items"), "{run:?}");
}

#[test]
fn tensors_that_claim_more_than_a_file_holds_are_refused() {
    let repeated = |state: &mut State, name: &str, items: u64, slice: Option<GlobalSlice>| {
        let storage = state.storage(ElementType::Bytes, vec![7]);
        let record = tensor(storage, "uint8", 1, &[items]);
        state.tensor(name, TensorRecord { strides: vec![0], slice, ..record });
    };
    let most = i64::MAX.unsigned_abs();
    let mut plain = State::new(7);
    plain.dict(None, 2);
    repeated(&mut plain, "one", most, None);
    repeated(&mut plain, "two", most, None);
    let slices: Vec<State> = (0..3)
        .map(|_| {
            let mut state = State::new(7);
            state.dict(None, 1);
            let slice = GlobalSlice { shape: vec![most], offsets: vec![0] };
            repeated(&mut state, "one", most, Some(slice));
            state
        })
        .collect();
    let alone = Store::empty();
    alone.save(&[&plain]);
    for store in [alone, saved_by(&slices, &[])] {
        let output = store.beside("refused.safetensors");
        let run = store.run("restore", &["-o", output.to_str().unwrap()]);
        run.assert_error(2);
        assert!(run.stderr.contains("larger than files can be"), "{run:?}");
    }
    // No disk has room for it, and none is filled to find out.
    let mut large = State::new(7);
    large.dict(None, 1);
    repeated(&mut large, "large", 1 << 50, None);
    let store = Store::empty();
    store.save(&[&large]);
    let output = store.beside("large.safetensors");
    let run = store.run("restore", &["-o", output.to_str().unwrap()]);
    run.assert_error(1);
    assert!(run.stderr.contains("allocating room for"), "{run:?}");
    assert_eq!(std::fs::read_dir(output.parent().unwrap()).unwrap().count(), 1);
}

#[test]
fn an_empty_tensor_that_readers_cannot_count_is_refused() {
    let empty = |shape: [u64; 3]| {
        let mut state = State::new(7);
        state.dict(None, 1);
        let storage = state.storage(ElementType::Bytes, Vec::new());
        let record = TensorRecord { strides: vec![0; 3], ..tensor(storage, "uint8", 1, &[0]) };
        state.tensor("empty", TensorRecord { shape: shape.to_vec(), ..record });
        let store = Store::empty();
        store.save(&[&state]);
        store
    };
    let (found, _) = restored(&empty([1 << 62, 0, 4]), &[]);
    assert_eq!(found["empty"].1, Vec::<u8>::new());
    let store = empty([1 << 62, 4, 0]);
    let output = store.beside("refused.safetensors");
    let run = store.run("restore", &["-o", output.to_str().unwrap()]);
    run.assert_error(2);
    assert!(run.stderr.contains("cannot be counted"), "{run:?}");
}

#[test]
fn one_rank_that_has_a_slice_that_is_all_needs_no_other() {
    let mut state = State::new(7);
    state.dict(None, 1);
    let matrix = Matrix::new(3, 5, 1.0);
    add(&mut state, "w", &matrix, Cut { at: [0, 0], size: [3, 5] });
    let store = Store::empty();
    store.save(&[&state]);
    let (found, _) = restored(&store, &[]);
    assert_eq!(found["w"], (vec![3, 5], matrix.bytes));
}

#[test]
fn slices_larger_than_what_is_read_at_once_are_whole() {
    let matrix = Matrix::new(1100, 8 * 1000, 0.125);
    let columns = matrix.shape[1] / 2;
    let states: Vec<State> = (0..2)
        .map(|rank| {
            let mut state = State::new(7);
            state.dict(None, 1);
            let cut = Cut { at: [0, rank * columns], size: [matrix.shape[0], columns] };
            add(&mut state, "w", &matrix, cut);
            state
        })
        .collect();
    let (found, _) = restored(&saved_by(&states, &[]), &[]);
    assert!(found["w"].1 == matrix.bytes);
}

/// That a restore of what ranks saved says this, and leaves no file, whosever part is asked for.
#[track_caller]
fn assert_refused(states: &[State], why: &str) {
    let store = saved_by(states, &[]);
    let output = store.beside("refused.safetensors");
    for rank in [&[][..], &["--rank", "1"]] {
        let all = [rank, &["-o", output.to_str().unwrap()]].concat();
        let run = store.run("restore", &all);
        run.assert_error(1);
        assert!(run.stderr.contains(why), "{run:?}");
        assert_eq!(std::fs::read_dir(output.parent().unwrap()).unwrap().count(), 1);
    }
}

#[test]
fn what_is_no_tensor_is_refused() {
    let matrix = Matrix::new(4, 2, 8.0);
    let other = Matrix::new(4, 2, 4.0);
    let of = |matrix: &Matrix, at, size| {
        let mut state = State::new(7);
        state.dict(None, 1);
        add(&mut state, "w", matrix, Cut { at, size });
        state
    };
    let first = of(&matrix, [0, 0], [2, 2]);
    assert_refused(&[first.clone(), of(&matrix, [3, 0], [1, 2])], "no rank saved 2 of its 8 items");
    assert_refused(&[first.clone(), of(&matrix, [1, 0], [3, 2])], "overlap");
    let twice = |half: &Matrix| {
        let second = of(&matrix, [2, 0], [2, 2]);
        [first.clone(), second, of(half, [0, 0], [2, 2])]
    };
    assert_refused(&twice(&other), "different values");
    let (found, _) = restored(&saved_by(&twice(&matrix), &[]), &[]);
    assert_eq!(found["w"].1, matrix.bytes);
    // A rank that holds all of it gets its own.
    let stages = [of(&matrix, [0, 0], [4, 2]), of(&other, [0, 0], [4, 2])];
    let (found, _) = restored(&saved_by(&stages, &[]), &["--rank", "1"]);
    assert_eq!(found["w"].1, other.bytes);
    let longer = Matrix::new(5, 2, 8.0);
    assert_refused(&[first.clone(), of(&longer, [2, 0], [2, 2])], "of shape [4, 2]");
    let mut retyped = of(&matrix, [2, 0], [2, 2]);
    retyped.tensors[0].dtype = "int32".into();
    assert_refused(&[first, retyped], "as `int32` of shape [4, 2]");
}
