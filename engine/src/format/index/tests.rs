//! Tests of the index: round trips, what is refused, and that nothing panics.

use dtr_proto::v1 as proto;
use proptest::prelude::*;
use prost::Message;

use super::*;
use crate::format::layout::{Layout, StorageSpec};
use crate::format::shard::CHUNKS_OFFSET_MIN;
use crate::format::tree::{DictKind, Key, Value};

const CHUNK_BYTES: u32 = 1 << 16;
const PAGE: u64 = 4096;

fn node(key: Option<&str>, value: Value) -> Node {
    Node { key: key.map(|key| Key::Str(key.into())), value }
}

fn dict(len: u32) -> Value {
    Value::Dict { len, kind: DictKind::Plain, metadata: false }
}

fn tensor(storage: u32, shape: &[u64], strides: &[u64]) -> TensorRecord {
    TensorRecord {
        storage,
        kind: TensorKind::Torch,
        dtype: "float32".into(),
        item_bytes: 4,
        shape: shape.into(),
        strides: strides.into(),
        offset: 0,
        requires_grad: false,
        slice: None,
    }
}

/// A layout's chunks, placed one after the other; every second one is stored in half its length.
fn place(layout: &Layout) -> Vec<ChunkRecord> {
    let mut offset = PAGE;
    (0..layout.chunk_count())
        .map(|i| {
            let raw_bytes = u32::try_from(layout.chunk_raw_bytes(i)).unwrap();
            let encoded = i % 2 == 1;
            let stored_bytes = if encoded { raw_bytes.div_ceil(2) } else { raw_bytes };
            let chunk = ChunkRecord {
                offset,
                stored_bytes,
                raw_bytes,
                codec: if encoded { Codec::Float } else { Codec::None },
                stored_crc32c: 0x1111_1111,
                raw_crc32c: 0x2222_2222,
            };
            offset += u64::from(stored_bytes).next_multiple_of(PAGE);
            chunk
        })
        .collect()
}

/// Three storages in four chunks.
fn sample() -> ShardIndex {
    let f32s = |bytes| StorageSpec { bytes, element: ElementType::F32, on_device: false };
    let bytes = StorageSpec { bytes: 1000, element: ElementType::Bytes, on_device: false };
    let layout = Layout::plan(&[f32s(100_000), f32s(120_000), bytes], CHUNK_BYTES).unwrap();
    ShardIndex {
        nodes: vec![
            node(None, dict(2)),
            node(Some("weight"), Value::Tensor(0)),
            node(Some("bias"), Value::Tensor(1)),
        ],
        storages: layout.records().collect(),
        tensors: vec![tensor(0, &[250, 100], &[100, 1]), tensor(1, &[30_000], &[1])],
        chunks: place(&layout),
        replicated: Vec::new(),
    }
}

/// A file that holds the index right after its chunks, as far as the index sees it.
fn context(index: &ShardIndex, stored: &[u8]) -> IndexContext {
    let end = |chunk: &ChunkRecord| {
        chunk.offset.saturating_add(u64::from(chunk.stored_bytes).next_multiple_of(PAGE))
    };
    let index_offset = index.chunks.iter().map(end).max().unwrap_or(PAGE);
    let padded = (stored.len() as u64).next_multiple_of(PAGE);
    IndexContext {
        file_bytes: index_offset.saturating_add(padded + PAGE),
        chunk_bytes: CHUNK_BYTES,
        chunks_offset: CHUNKS_OFFSET_MIN,
        index_offset,
    }
}

/// Stores wire bytes that no writer of ours would write.
fn store_wire(wire: &[u8]) -> EncodedIndex {
    let mut stored = Vec::with_capacity(zstd_safe::compress_bound(wire.len()));
    zstd_safe::compress(&mut stored, wire, 1).unwrap();
    EncodedIndex { stored, raw_bytes: wire.len() as u64 }
}

/// Writes without a check, then reads.
fn reread(index: &ShardIndex) -> Result<ShardIndex, FormatError> {
    reread_in(index, |_| {})
}

fn reread_in(
    index: &ShardIndex,
    change: impl Fn(&mut IndexContext),
) -> Result<ShardIndex, FormatError> {
    let encoded = store_wire(&wire::encode(index));
    let mut context = context(index, &encoded.stored);
    change(&mut context);
    ShardIndex::decode(&encoded.stored, encoded.raw_bytes, &context)
}

fn decode_wire(wire: &[u8]) -> Result<ShardIndex, FormatError> {
    let EncodedIndex { stored, raw_bytes } = store_wire(wire);
    let context = context(&ShardIndex::default(), &stored);
    ShardIndex::decode(&stored, raw_bytes, &context)
}

fn decode_as_it_is(wire: &[u8]) -> Result<ShardIndex, FormatError> {
    let stored = frame::uncompressed(wire);
    let context = context(&ShardIndex::default(), &stored);
    ShardIndex::decode(&stored, wire.len() as u64, &context)
}

#[track_caller]
fn assert_refused(result: Result<ShardIndex, FormatError>, expected: &str) {
    match result {
        Err(FormatError::Damaged(why)) if why.contains(expected) => {}
        other => panic!("expected an error with `{expected}`, got {other:?}"),
    }
}

/// Applies a change to the sample and expects both writer and reader to refuse the result.
#[track_caller]
fn assert_change_refused(change: impl Fn(&mut ShardIndex), expected: &str) {
    let mut index = sample();
    change(&mut index);
    assert_refused(reread(&index), expected);
    let why = index.encode().expect_err("the writer accepts it").to_string();
    assert!(why.contains(expected), "{why}");
}

/// Applies a change to the sample's chunks, which only the reader can judge.
#[track_caller]
fn assert_chunks_refused(change: impl Fn(&mut Vec<ChunkRecord>), expected: &str) {
    let mut index = sample();
    change(&mut index.chunks);
    assert_refused(reread_in(&index, |other| *other = context(&sample(), &[0; 100])), expected);
}

#[test]
fn an_index_round_trips() {
    let index = sample();
    let encoded = index.encode().unwrap();
    let context = context(&index, &encoded.stored);
    assert_eq!(ShardIndex::decode(&encoded.stored, encoded.raw_bytes, &context), Ok(index));
}

#[test]
fn a_state_without_tensors_round_trips() {
    let index = ShardIndex { nodes: vec![node(None, dict(0))], ..ShardIndex::default() };
    assert_eq!(reread(&index), Ok(index));
}

/// The sample, its first tensor replicated: half of its bytes are here.
fn shared_sample() -> ShardIndex {
    let f32s = |bytes| StorageSpec { bytes, element: ElementType::F32, on_device: false };
    let bytes = StorageSpec { bytes: 1000, element: ElementType::Bytes, on_device: false };
    let layout = Layout::plan(&[f32s(50_000), f32s(120_000), bytes], CHUNK_BYTES).unwrap();
    let mut storages: Vec<StorageRecord> = layout.records().collect();
    storages[0].bytes = 100_000;
    storages[0].replica = Some(Replica { number: 0, start: 50_000, bytes: 50_000 });
    ShardIndex { storages, chunks: place(&layout), replicated: vec![1], ..sample() }
}

#[track_caller]
fn assert_shared_change_refused(change: impl Fn(&mut ShardIndex), expected: &str) {
    let mut index = shared_sample();
    change(&mut index);
    assert_refused(reread(&index), expected);
    let why = index.encode().expect_err("the writer accepts it").to_string();
    assert!(why.contains(expected), "{why}");
}

#[test]
fn an_index_of_a_part_round_trips() {
    assert_eq!(reread(&shared_sample()), Ok(shared_sample()));
    assert!(shared_sample().replicated_nodes().eq(std::iter::once(1..2)));
    let whole = ShardIndex {
        replicated: vec![0],
        storages: (0..)
            .zip(shared_sample().storages)
            .take(2)
            .map(|(number, storage)| {
                let (start, bytes) = (storage.held().start, storage.raw_end() - storage.raw_offset);
                StorageRecord { replica: Some(Replica { number, start, bytes }), ..storage }
            })
            .chain(shared_sample().storages.into_iter().skip(2))
            .collect(),
        ..shared_sample()
    };
    assert_eq!(reread(&whole), Ok(whole));
}

#[test]
fn parts_that_contradict_the_tree_are_refused() {
    fn set(storage: &mut StorageRecord, number: u32, start: u64, bytes: u64) {
        storage.replica = Some(Replica { number, start, bytes });
    }
    let change = |change: fn(&mut ShardIndex), expected: &str| {
        assert_shared_change_refused(change, expected);
    };
    change(|index| set(&mut index.storages[0], 0, 50_001, 50_000), "has no part");
    change(|index| set(&mut index.storages[0], 0, u64::MAX, 50_000), "has no part");
    change(|index| set(&mut index.storages[0], 1, 50_000, 50_000), "expected 0");
    change(
        |index| {
            index.storages[0] = StorageRecord { bytes: 50_000, replica: None, ..index.storages[0] }
        },
        "needs",
    );
    change(|index| set(&mut index.storages[1], 1, 0, 120_000), "2 storages are replicated");
    change(|index| index.replicated.clear(), "1 storages are replicated");
    change(|index| index.replicated = vec![2], "storage 1 is replica None, expected 0");
    change(|index| index.replicated = vec![1, 1], "node 1 is named as replicated");
    change(|index| index.replicated = vec![0, 1], "node 1 is named as replicated");
    change(|index| index.replicated = vec![3], "node 3 is named as replicated");
    change(|index| index.replicated = vec![u32::MAX], "is named as replicated");
}

/// The shared sample, its second tensor replicated too, and a slice: some rows of 900.
fn sliced_sample(first_row: u64, rows: u64) -> ShardIndex {
    let mut index = shared_sample();
    index.replicated = vec![0];
    index.tensors[1] = TensorRecord {
        slice: Some(GlobalSlice { shape: vec![900, 100], offsets: vec![first_row, 0] }),
        ..tensor(1, &[rows, 100], &[100, 1])
    };
    index
}

#[test]
fn ranks_have_a_tensor_alike_of_which_each_holds_a_slice() {
    let first = sliced_sample(0, 300);
    assert_eq!(reread(&first), Ok(first.clone()));
    let second = sliced_sample(300, 100);
    assert_eq!(difference(&first, &second), None);
    assert_eq!(structure_crc32c(&first), structure_crc32c(&second));
    let mut whole = second.clone();
    whole.tensors[1].slice = None;
    let mut taller = second;
    taller.tensors[1].slice.as_mut().unwrap().shape[0] = 901;
    for other in [&whole, &taller] {
        assert_eq!(difference(&first, other).unwrap().path, "bias");
        assert_ne!(structure_crc32c(&first), structure_crc32c(other));
    }
    assert_shared_change_refused(
        |index| {
            *index = sliced_sample(0, 300);
            let part = Replica { number: 1, start: 0, bytes: 120_000 };
            index.storages[1].replica = Some(part);
        },
        "2 storages are replicated",
    );
}

#[test]
fn ranks_are_compared_by_what_they_share() {
    let plain = |value| {
        let mut index = shared_sample();
        index.nodes[0] = node(None, dict(3));
        index.nodes.push(node(Some("epoch"), value));
        index.replicated.push(3);
        index
    };
    let nan = || plain(Value::Float(f64::NAN));
    assert_eq!(difference(&nan(), &nan()), None);
    let found = difference(&plain(Value::Int(3)), &plain(Value::Int(4))).unwrap();
    let shown = |text: &str| Some(text.to_owned());
    assert_eq!((found.path.as_str(), found.left, found.right), ("epoch", shown("3"), shown("4")));
    assert!(difference(&plain(Value::Float(0.0)), &plain(Value::Float(-0.0))).is_some());
    // What is a rank's own, and which part it holds, may differ.
    let mut other = shared_sample();
    other.nodes[2] = node(Some("other"), Value::Tensor(1));
    other.storages[0].replica = Some(Replica { number: 0, start: 0, bytes: 50_000 });
    assert_eq!(difference(&shared_sample(), &other), None);
    let mut reshaped = shared_sample();
    reshaped.tensors[0] = tensor(0, &[100, 250], &[250, 1]);
    assert_eq!(difference(&shared_sample(), &reshaped).unwrap().path, "weight");
    let found = difference(&plain(Value::None), &shared_sample()).unwrap();
    assert_eq!((found.path.as_str(), found.right), ("epoch", None));
    // A checksum of it shows the same.
    let alike = [(nan(), nan()), (shared_sample(), other)];
    for (one, two) in &alike {
        assert_eq!((structure_crc32c(one), difference(one, two)), (structure_crc32c(two), None));
    }
    let different = [
        (plain(Value::Int(3)), plain(Value::Int(4))),
        (plain(Value::Float(0.0)), plain(Value::Float(-0.0))),
        (shared_sample(), reshaped),
        (plain(Value::None), shared_sample()),
    ];
    for (one, two) in &different {
        assert!(structure_crc32c(one).is_some());
        assert_ne!(structure_crc32c(one), structure_crc32c(two));
    }
    assert_eq!(structure_crc32c(&sample()), None);
}

#[test]
fn the_wire_is_the_message_of_the_proto_file() {
    let message = proto::ShardIndex::decode(&wire::encode(&shared_sample())[..]).unwrap();
    assert_eq!((message.replicated.len(), message.storages[0].replica.unwrap().start), (1, 50_000));
    assert_eq!(message.encode_to_vec(), wire::encode(&shared_sample()));
    let wire = wire::encode(&sample());
    let message = proto::ShardIndex::decode(&wire[..]).unwrap();
    assert_eq!(message.nodes.len(), 3);
    assert_eq!(message.storages.len(), 3);
    assert_eq!(message.tensors.len(), 2);
    assert_eq!(message.chunks.as_ref().unwrap().offset.len(), 4);
    assert_eq!(message.encode_to_vec(), wire);
}

#[test]
fn unknown_fields_are_skipped() {
    let mut wire = wire::encode(&sample());
    prost::encoding::string::encode(1000, &"from the future".to_owned(), &mut wire);
    let encoded = store_wire(&wire);
    let context = context(&sample(), &encoded.stored);
    let decoded = ShardIndex::decode(&encoded.stored, encoded.raw_bytes, &context);
    assert_eq!(decoded, Ok(sample()));
}

#[test]
fn storages_that_break_the_layout_are_refused() {
    assert_change_refused(|index| index.storages[1].raw_offset += 1, "multiple of 64");
    assert_change_refused(|index| index.storages[1].raw_offset = 0, "before the previous one ends");
    assert_change_refused(|index| index.storages.swap(0, 1), "before the previous one ends");
    assert_change_refused(|index| index.storages[2].bytes = u64::MAX, "ends after");
    assert_change_refused(|index| index.storages[2].bytes = 1 << 60, "ends after");
}

#[test]
fn tensors_that_leave_their_storage_are_refused() {
    let change = |change: fn(&mut TensorRecord), expected: &str| {
        assert_change_refused(|index| change(&mut index.tensors[0]), expected);
    };
    change(|tensor| tensor.storage = 3, "views storage 3 of 3");
    change(|tensor| tensor.shape[0] = 251, "needs 100400 bytes of storage 0, which has 100000");
    change(|tensor| tensor.strides[1] = 2, "needs 100396 bytes");
    change(|tensor| tensor.offset = 1, "needs 100004 bytes");
    change(|tensor| tensor.item_bytes = 0, "items of 0 bytes");
    change(|tensor| tensor.item_bytes = u32::MAX, "needs");
    change(|tensor| tensor.shape[0] = u64::MAX, "at most 9223372036854775807");
    change(|tensor| tensor.strides[0] = i64::MAX.unsigned_abs(), "needs more than 2^63");
    change(|tensor| tensor.shape = vec![1 << 40, 1 << 40], "needs more than 2^63");
    // Expanded dimensions take no storage, but their items still count.
    change(
        |tensor| {
            tensor.shape = vec![1 << 31, 1 << 31];
            tensor.strides = vec![0, 0];
        },
        "needs more than 2^63",
    );
    change(|tensor| tensor.strides.truncate(1), "2 dimensions and 1 strides");
    change(
        |tensor| {
            tensor.shape = vec![1; 65];
            tensor.strides = vec![1; 65];
        },
        "65 dimensions",
    );
    change(|tensor| tensor.dtype.clear(), "dtype name of 0 bytes");
    change(|tensor| tensor.dtype = "x".repeat(256), "dtype name of 256 bytes");
}

#[test]
fn views_of_every_kind_are_accepted() {
    for (shape, strides, offset) in [
        (vec![], vec![], 24_999), // 0-dimensional, the last item
        (vec![0, 1 << 40], vec![1 << 40, 1], 1 << 40), // no items
        (vec![1 << 40], vec![0], 5), // expanded
        (vec![12_500], vec![2], 1), // every second item
        (vec![100, 250], vec![1, 100], 0), // transposed
    ] {
        let mut index = sample();
        index.tensors[0] = TensorRecord { offset, ..tensor(0, &shape, &strides) };
        assert_eq!(reread(&index), Ok(index.clone()));
    }
}

#[test]
fn slices_stay_within_their_tensor() {
    let slice = |shape: &[u64], offsets: &[u64]| {
        Some(GlobalSlice { shape: shape.into(), offsets: offsets.into() })
    };
    let mut index = sample();
    index.tensors[0].slice = slice(&[1000, 100], &[750, 0]);
    assert_eq!(reread(&index), Ok(index));
    for (slice, expected) in [
        (slice(&[1000, 100], &[751, 0]), "250 items at 751 in a dimension of 1000"),
        (slice(&[1000, 100], &[u64::MAX, 0]), "in a dimension of 1000"),
        (slice(&[u64::MAX, 100], &[0, 0]), "in a dimension of"),
        (slice(&[1000], &[0, 0]), "a tensor with 1"),
        (slice(&[1000, 100], &[0]), "with 1 offsets"),
    ] {
        assert_change_refused(|index| index.tensors[0].slice.clone_from(&slice), expected);
    }
}

#[test]
fn chunks_that_do_not_tile_the_file_are_refused() {
    assert_chunks_refused(|chunks| chunks[1].offset += PAGE, "must tile"); // a hole
    assert_chunks_refused(|chunks| chunks[1].offset -= PAGE, "must tile"); // an overlap
    assert_chunks_refused(|chunks| chunks[1].offset = chunks[0].offset, "must tile");
    assert_chunks_refused(|chunks| chunks[0].offset = 0, "must tile"); // the header
    assert_chunks_refused(|chunks| chunks[0].offset += 1, "must tile"); // unaligned
    assert_chunks_refused(|chunks| chunks[3].offset = u64::MAX - 4095, "must tile");
    assert_refused(reread_in(&sample(), |context| context.index_offset += PAGE), "must tile");
    assert_refused(reread_in(&sample(), |context| context.chunks_offset *= 2), "must tile");
    assert_refused(reread_in(&sample(), |context| context.index_offset -= PAGE), "must tile");
    assert_refused(reread_in(&sample(), |context| context.file_bytes += PAGE), "right after it");
    assert_refused(reread_in(&sample(), |context| context.file_bytes += 1), "right after it");
    assert_refused(reread_in(&sample(), |context| context.file_bytes -= PAGE), "does not fit");
}

#[test]
fn chunks_may_lie_in_any_order() {
    let mut index = sample();
    let [first, second, ..] = index.chunks[..] else { panic!("two chunks") };
    index.chunks[1].offset = first.offset;
    index.chunks[0].offset = first.offset + u64::from(second.stored_bytes).next_multiple_of(PAGE);
    assert_eq!(reread(&index), Ok(index));
}

#[test]
fn chunks_that_do_not_hold_the_raw_layout_are_refused() {
    assert_chunks_refused(|chunks| chunks.truncate(3), "3 chunks hold");
    assert_chunks_refused(|chunks| chunks.extend_from_within(3..), "chunk 4 has");
    assert_chunks_refused(|chunks| chunks[1].raw_bytes -= 1, "chunk 1 has 65535 raw bytes");
    assert_refused(reread_in(&sample(), |context| context.chunk_bytes *= 2), "expected 131072");
}

#[test]
fn chunks_whose_lengths_lie_are_refused() {
    assert_change_refused(|index| index.chunks[1].stored_bytes = 0, "chunk 1");
    assert_change_refused(|index| index.chunks[1].stored_bytes = CHUNK_BYTES + 1, "chunk 1");
    assert_change_refused(|index| index.chunks[0].stored_bytes -= 1, "chunk 0 with codec None");
}

#[test]
fn columns_that_disagree_are_refused() {
    let change = |change: fn(&mut proto::ChunkColumns), expected: &str| {
        let mut message = proto::ShardIndex::decode(&wire::encode(&sample())[..]).unwrap();
        change(message.chunks.as_mut().unwrap());
        let encoded = store_wire(&message.encode_to_vec());
        let context = context(&sample(), &encoded.stored);
        let decoded = ShardIndex::decode(&encoded.stored, encoded.raw_bytes, &context);
        if expected.is_empty() {
            assert_eq!(decoded, Ok(sample()));
        } else {
            assert_refused(decoded, expected);
        }
    };
    change(|columns| columns.segment = vec![0; 4], "");
    change(|columns| columns.segment = vec![0, 0, 1, 0], "`segment`");
    change(|columns| columns.segment = vec![0; 3], "`segment`");
    change(|columns| columns.offset.truncate(3), "`stored_bytes` has 4 items, expected 3");
    change(|columns| columns.stored_bytes.truncate(3), "`stored_bytes`");
    change(|columns| columns.raw_bytes.truncate(3), "`raw_bytes`");
    change(|columns| columns.codec.truncate(3), "`codec`");
    change(|columns| columns.stored_crc32c.truncate(3), "`stored_crc32c`");
    change(|columns| columns.raw_crc32c.truncate(3), "`raw_crc32c`");
    change(|columns| columns.codec[2] = 4, "chunk 2 has unknown codec 4");
}

#[test]
fn messages_that_this_version_does_not_know_are_refused() {
    let change = |change: fn(&mut proto::ShardIndex), expected: &str| {
        let mut message = proto::ShardIndex::decode(&wire::encode(&sample())[..]).unwrap();
        change(&mut message);
        assert_refused(decode_wire(&message.encode_to_vec()), expected);
    };
    change(|index| index.storages[1].element = 5, "`Storage` message 1 has unknown element type 5");
    change(|index| index.tensors[1].kind = 0, "`Tensor` message 1 has unknown kind 0");
    change(|index| index.tensors[1].kind = 4, "unknown kind 4");
    change(|index| index.nodes[1].value = None, "`Node` message 1 has no value");
}

#[test]
fn hostile_wires_are_refused_before_they_take_memory() {
    // A node of no bytes.
    assert_refused(decode_wire(&[0x0a, 0x00]), "no value");
    // Valid but endless: more nodes and storages than any state has.
    let nodes = [0x0a, 0x03, 0x82, 0x01, 0x00].repeat(tree::NODES_MAX + 1);
    assert_refused(decode_as_it_is(&nodes), "more than 16777216 `Node` messages");
    let storages = [0x12, 0x00].repeat(STORAGES_MAX + 1);
    assert_refused(decode_as_it_is(&storages), "more than 4194304 `Storage` messages");
    // Fewer, and packed to a few stored bytes.
    assert_refused(decode_wire(&nodes[..5 << 17]), "unpacks to more than");
    assert_refused(decode_wire(&storages[..2 << 17]), "unpacks to more than");
    // Chunks that a file of three pages has no room for.
    let columns = proto::ChunkColumns { codec: vec![0; 1000], ..Default::default() };
    let message = proto::ShardIndex { chunks: Some(columns), ..Default::default() };
    assert_refused(decode_wire(&message.encode_to_vec()), "room for 3 chunks");
    // A message longer than the index, a chunk field twice, a field of the wrong type, a group.
    assert_refused(decode_wire(&[0x0a, 0xff, 0xff, 0xff, 0xff, 0x0f]), "4294967295 bytes");
    assert_refused(decode_wire(&[0x0a, 0xff]), "not a valid message");
    assert_refused(decode_wire(&[0x22, 0x00, 0x22, 0x00]), "twice");
    assert_refused(decode_wire(&[0x08, 0x00]), "wire type Varint");
    assert_refused(decode_wire(&[0x4b].repeat(100_000)), "not a valid message");
}

#[test]
fn hostile_frames_are_refused_before_they_take_memory() {
    let EncodedIndex { stored, raw_bytes } = sample().encode().unwrap();
    let context = context(&sample(), &stored);
    let decode = |stored: &[u8], raw_bytes| ShardIndex::decode(stored, raw_bytes, &context);
    assert_refused(decode(&stored, INDEX_BYTES_MAX + 1), "claims");
    assert_refused(decode(&stored[..8], memory_max(8) + 1), "claims");
    assert_refused(decode(&stored, raw_bytes + 1), "expected");
    assert_refused(decode(&stored, raw_bytes - 1), "decompressing the index");
    assert_refused(decode(&[stored.clone(), stored.clone()].concat(), raw_bytes), "frame ends");
    assert_refused(decode(&[&stored[..], &[0]].concat(), raw_bytes), "frame ends");
    for length in 0..stored.len() {
        assert!(decode(&stored[..length], raw_bytes).is_err(), "cut to {length} bytes");
    }
}

#[test]
fn a_state_that_repeats_itself_is_stored_as_it_is_and_read() {
    for len in [100, 1 << 20] {
        let mut nodes = vec![node(None, Value::List { len })];
        nodes.extend((0..len).map(|_| node(None, Value::None)));
        let index = ShardIndex { nodes, ..ShardIndex::default() };
        let encoded = index.encode().unwrap();
        let is_packed = (encoded.stored.len() as u64) < encoded.raw_bytes;
        assert_eq!(is_packed, len == 100, "{} stored bytes", encoded.stored.len());
        let context = context(&index, &encoded.stored);
        let decoded = ShardIndex::decode(&encoded.stored, encoded.raw_bytes, &context);
        assert!(decoded == Ok(index));
    }
}

#[test]
fn a_large_state_round_trips() {
    const TENSORS: u32 = 50_000;
    let specs = vec![
        StorageSpec { bytes: 64, element: ElementType::F32, on_device: false };
        TENSORS as usize
    ];
    let layout = Layout::plan(&specs, CHUNK_BYTES).unwrap();
    let leaf = |i| Node { key: Some(Key::Int(i64::from(i))), value: Value::Tensor(i) };
    let index = ShardIndex {
        nodes: std::iter::once(node(None, dict(TENSORS))).chain((0..TENSORS).map(leaf)).collect(),
        storages: layout.records().collect(),
        tensors: (0..TENSORS).map(|i| tensor(i, &[4, 4], &[4, 1])).collect(),
        chunks: place(&layout),
        replicated: Vec::new(),
    };
    assert!(reread(&index) == Ok(index));
}

/// Any key, and any leaf value.
fn key() -> impl Strategy<Value = Key> {
    prop_oneof![
        any::<String>().prop_map(Key::Str),
        any::<i64>().prop_map(Key::Int),
        big_int().prop_map(Key::BigInt),
        any::<bool>().prop_map(Key::Bool),
        any::<u64>().prop_map(|bits| Key::Float(f64::from_bits(bits))),
        any::<Vec<u8>>().prop_map(Key::Bytes),
        Just(Key::None),
    ]
}

fn big_int() -> impl Strategy<Value = Vec<u8>> {
    proptest::collection::vec(any::<u8>(), 8..20).prop_map(|mut bytes| {
        bytes.push(1); // Neither sign's redundant byte.
        bytes
    })
}

fn leaf() -> impl Strategy<Value = Value> {
    let float = || any::<u64>().prop_map(f64::from_bits);
    prop_oneof![
        Just(Value::None),
        any::<bool>().prop_map(Value::Bool),
        any::<i64>().prop_map(Value::Int),
        big_int().prop_map(Value::BigInt),
        float().prop_map(Value::Float),
        (float(), float()).prop_map(|(real, imaginary)| Value::Complex(real, imaginary)),
        any::<String>().prop_map(Value::Str),
        any::<Vec<u8>>().prop_map(Value::Bytes),
        (0_u32..2).prop_map(Value::Tensor),
        any::<(String, Vec<u8>)>().prop_map(|(dtype, bytes)| Value::NumpyScalar { dtype, bytes }),
        any::<String>().prop_map(Value::TorchDtype),
        any::<String>().prop_map(Value::TorchDevice),
        any::<Vec<i64>>().prop_map(Value::TorchSize),
        any::<String>().prop_map(Value::NumpyDtype),
    ]
}

/// Any tree, as the flat list of a root without a key.
fn tree() -> impl Strategy<Value = Vec<Node>> {
    let leaf = leaf().prop_map(|value| vec![Node { key: None, value }]);
    leaf.prop_recursive(6, 60, 6, |child| {
        let children = proptest::collection::vec((key(), child.clone()), 0..6);
        (children, 0..6, child).prop_map(|(children, kind, metadata)| {
            let len = u32::try_from(children.len()).unwrap();
            let (is_dict, has_metadata) = (kind < 4, kind == 2);
            let value = match kind {
                0 => dict(len),
                1 | 2 => Value::Dict { len, kind: DictKind::Ordered, metadata: has_metadata },
                3 => Value::Dict { len, kind: DictKind::Counter, metadata: false },
                4 => Value::List { len },
                _ => Value::Tuple { len },
            };
            let mut nodes = vec![Node { key: None, value }];
            nodes.extend(has_metadata.then_some(metadata).into_iter().flatten());
            for (key, mut child) in children {
                child[0].key = is_dict.then_some(key);
                nodes.extend(child);
            }
            nodes
        })
    })
}

proptest! {
    #[test]
    fn every_tree_round_trips(nodes in tree()) {
        let index = ShardIndex { nodes, ..sample() };
        let encoded = index.encode().unwrap();
        let context = context(&index, &encoded.stored);
        let decoded = ShardIndex::decode(&encoded.stored, encoded.raw_bytes, &context).unwrap();
        // By bytes: NaN does not equal itself.
        prop_assert_eq!(wire::encode(&decoded), wire::encode(&index));
        prop_assert_eq!(format!("{decoded:?}"), format!("{index:?}"));
    }

    #[test]
    fn garbage_is_refused(bytes: Vec<u8>) {
        prop_assert!(decode_wire(&bytes).is_err());
        let context = context(&sample(), &bytes);
        prop_assert!(ShardIndex::decode(&bytes, 100, &context).is_err());
    }

    #[test]
    fn damaged_wires_never_panic(at: prop::sample::Index, byte: u8, cut: prop::sample::Index) {
        let mut wire = wire::encode(&sample());
        let at = at.index(wire.len());
        wire[at] = byte;
        let _ = decode_in_sample(&wire);
        wire.truncate(cut.index(wire.len()));
        let _ = decode_in_sample(&wire);
    }
}

fn decode_in_sample(wire: &[u8]) -> Result<ShardIndex, FormatError> {
    let encoded = store_wire(wire);
    let context = context(&sample(), &encoded.stored);
    ShardIndex::decode(&encoded.stored, encoded.raw_bytes, &context)
}

#[test]
fn what_is_too_large_to_be_stored_is_known_before_it_is_encoded() {
    assert!(ShardIndex::default().check_size().is_ok());
    // Memory that nobody touches, and so takes none.
    let half = || vec![0; usize::try_from(INDEX_BYTES_MAX / 2).unwrap()];
    let nodes = vec![node(None, Value::Bytes(half())), node(None, Value::Bytes(half()))];
    let mut large = ShardIndex { nodes, ..ShardIndex::default() };
    assert!(large.check_size().is_ok());
    large.nodes.push(node(None, Value::Str("a".into())));
    assert!(large.check_size().unwrap_err().to_string().contains("1073741825 bytes"));
}
