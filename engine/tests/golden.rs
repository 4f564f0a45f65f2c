//! Format version 1, byte for byte: what was once written must be read the same forever.
//!
//! `golden/v1` holds the bytes of one small record of each kind and, beside them, what they mean.
//! A change of the text is a change of the format's meaning, a change of the bytes one of its form;
//! either needs a new version, not new files here. Files for a *new* record are written by
//! `UPDATE_GOLDEN=1 cargo test -p dtr-engine --test golden`.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::path::PathBuf;
use std::{env, fs};

use dtr_engine::codec::Codec;
use dtr_engine::format::index::{
    ChunkRecord, GlobalSlice, IndexContext, Replica, ShardIndex, StorageRecord, TensorKind,
    TensorRecord,
};
use dtr_engine::format::layout::ElementType;
use dtr_engine::format::manifest::{FORMAT_VERSION, Manifest, Retired, ShardEntry};
use dtr_engine::format::names::{AttemptId, shard_file_name};
use dtr_engine::format::shard::{BLOCK_BYTES, CHUNKS_OFFSET_MIN, Footer, Header};
use dtr_engine::format::tree::{DictKind, Key, Node, Value};
use serde_json::json;

const CHUNK_BYTES: u32 = 1 << 16;
const INDEX_OFFSET: u64 = 4096 + 65_536 + 4096;
const FILE_BYTES: u64 = INDEX_OFFSET + 4096 + 4096;

#[test]
fn header() {
    check_header("header", CHUNKS_OFFSET_MIN, false);
}

#[test]
fn replicated_header() {
    check_header("replicated_header", CHUNKS_OFFSET_MIN, true);
}

#[test]
fn aligned_header() {
    check_header("aligned_header", 1 << 16, false);
}

fn check_header(name: &str, chunks_offset: u32, replicated: bool) {
    let header = Header {
        attempt: attempt(),
        step: 1000,
        rank: 1,
        world_size: 2,
        chunk_bytes: CHUNK_BYTES,
        chunks_offset,
        replicated,
    };
    let golden = bytes(&format!("{name}.bin"), &header.encode());
    assert_eq!(golden, header.encode());
    let decoded = Header::decode(&golden.try_into().expect("one block"));
    assert_eq!(decoded.as_ref(), Ok(&header));
    assert_text(&format!("{name}.txt"), &decoded);
}

#[test]
fn footer() {
    check_footer("footer", CHUNKS_OFFSET_MIN);
}

#[test]
fn aligned_footer() {
    check_footer("aligned_footer", 1 << 16);
}

fn check_footer(name: &str, chunks_offset: u32) {
    let footer = Footer {
        index_offset: INDEX_OFFSET,
        index_stored_bytes: 700,
        index_raw_bytes: 1200,
        index_crc32c: 0x0123_4567,
        header_crc32c: 0x89ab_cdef,
        file_bytes: FILE_BYTES,
        attempt: attempt(),
        chunks_offset,
        replicated: false,
    };
    let golden = bytes(&format!("{name}.bin"), &footer.encode());
    assert_eq!(golden, footer.encode());
    let block: [u8; BLOCK_BYTES] = golden.try_into().expect("one block");
    let decoded = Footer::decode(&block, FILE_BYTES);
    assert_eq!(decoded.as_ref(), Ok(&footer));
    assert_text(&format!("{name}.txt"), &decoded);
}

/// The stored bytes may differ by zstd's version; what they decompress to may not.
#[test]
fn index() {
    check_index("index", &sample_index());
}

fn check_index(name: &str, index: &ShardIndex) {
    let encoded = index.encode().expect("the sample is valid");
    let golden = bytes(&format!("{name}.bin"), &encoded.stored);
    let capacity = usize::try_from(encoded.raw_bytes).expect("a small index");
    assert!(decompress(&golden, capacity) == decompress(&encoded.stored, capacity));
    let padded = (golden.len() as u64).next_multiple_of(4096);
    let context = IndexContext {
        file_bytes: INDEX_OFFSET + padded + 4096,
        chunk_bytes: CHUNK_BYTES,
        chunks_offset: CHUNKS_OFFSET_MIN,
        index_offset: INDEX_OFFSET,
    };
    let decoded = ShardIndex::decode(&golden, encoded.raw_bytes, &context);
    assert_eq!(decoded.as_ref(), Ok(index));
    assert_text(&format!("{name}.txt"), &decoded);
}

#[test]
fn replicated_index() {
    check_index("replicated_index", &sample_replicated_index());
}

#[test]
fn manifest() {
    let manifest = sample_manifest();
    let encoded = manifest.encode().expect("the sample is valid");
    let golden = bytes("manifest.json", &encoded);
    assert_eq!(String::from_utf8_lossy(&golden), String::from_utf8_lossy(&encoded));
    let decoded = Manifest::decode(&golden);
    assert_eq!(decoded.as_ref(), Ok(&manifest));
    assert_text("manifest.txt", &decoded);
}

fn path(name: &str) -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "tests/golden/v1", name].iter().collect()
}

/// The golden file's bytes, after writing `encoded` there if that was asked for.
fn bytes(name: &str, encoded: &[u8]) -> Vec<u8> {
    if env::var_os("UPDATE_GOLDEN").is_some() {
        fs::write(path(name), encoded).expect("writing a golden file");
    }
    fs::read(path(name)).expect("reading a golden file; UPDATE_GOLDEN=1 writes it")
}

fn assert_text(name: &str, decoded: &impl Debug) {
    let text = format!("{decoded:#?}\n");
    let golden = bytes(name, text.as_bytes());
    assert_eq!(String::from_utf8_lossy(&golden), text);
}

fn decompress(stored: &[u8], capacity: usize) -> Vec<u8> {
    let mut raw = Vec::with_capacity(capacity);
    zstd_safe::decompress(&mut raw, stored).expect("a zstd frame");
    raw
}

fn attempt() -> AttemptId {
    AttemptId::parse("00112233445566778899aabbccddeeff").expect("32 hex digits")
}

/// Every kind of key, value, tensor and chunk; no NaN, which does not equal itself.
fn sample_index() -> ShardIndex {
    ShardIndex {
        nodes: sample_nodes(),
        storages: vec![
            StorageRecord {
                raw_offset: 0,
                bytes: 65_536,
                element: ElementType::F32,
                replica: None,
            },
            StorageRecord {
                raw_offset: 65_536,
                bytes: 0,
                element: ElementType::Bf16,
                replica: None,
            },
            StorageRecord {
                raw_offset: 65_536,
                bytes: 100,
                element: ElementType::Bytes,
                replica: None,
            },
        ],
        tensors: sample_tensors(),
        chunks: vec![
            ChunkRecord {
                offset: 8192,
                stored_bytes: 65_536,
                raw_bytes: 65_536,
                codec: Codec::None,
                stored_crc32c: 0x0102_0304,
                raw_crc32c: 0x0102_0304,
            },
            ChunkRecord {
                offset: 4096,
                stored_bytes: 60,
                raw_bytes: 100,
                codec: Codec::Zstd,
                stored_crc32c: 0x0506_0708,
                raw_crc32c: 0x090a_0b0c,
            },
        ],
        replicated: Vec::new(),
    }
}

/// The same, of two ranks with `model` replicated.
fn sample_replicated_index() -> ShardIndex {
    let mut index = sample_index();
    let storage = index.tensors[0].storage as usize;
    let bytes = index.storages[storage].bytes;
    index.storages[storage].bytes = 2 * bytes;
    index.storages[storage].replica = Some(Replica { number: 0, start: bytes, bytes });
    index.replicated = vec![1];
    index
}

fn sample_nodes() -> Vec<Node> {
    let node = |key, value| Node { key, value };
    let text = |text: &str| Some(Key::Str(text.into()));
    let big = vec![0, 0, 0, 0, 0, 0, 0, 0, 1];
    vec![
        node(None, Value::Dict { len: 8, kind: DictKind::Plain, metadata: false }),
        node(text("model"), Value::Dict { len: 2, kind: DictKind::Ordered, metadata: true }),
        node(None, Value::Dict { len: 0, kind: DictKind::Ordered, metadata: false }),
        node(text("weight"), Value::Tensor(0)),
        node(text("tied"), Value::Tensor(0)),
        node(Some(Key::Int(-3)), Value::List { len: 3 }),
        node(None, Value::Tensor(1)),
        node(None, Value::Tensor(2)),
        node(None, Value::Tensor(3)),
        node(Some(Key::BigInt(big.clone())), Value::Tuple { len: 5 }),
        node(None, Value::None),
        node(None, Value::Bool(true)),
        node(None, Value::Int(i64::MIN)),
        node(None, Value::BigInt(big)),
        node(None, Value::Float(-0.0)),
        node(Some(Key::Bool(false)), Value::Complex(0.5, -2.0)),
        node(Some(Key::Float(0.1)), Value::Str("caf\u{e9}".into())),
        node(Some(Key::Bytes(vec![0, 255])), Value::Bytes(vec![1, 2, 3])),
        node(Some(Key::None), Value::TorchSize(vec![2, -1])),
        node(text("types"), Value::List { len: 4 }),
        node(None, Value::NumpyScalar { dtype: "<f4".into(), bytes: vec![0, 0, 128, 63] }),
        node(None, Value::TorchDtype("bfloat16".into())),
        node(None, Value::TorchDevice("cuda:0".into())),
        node(None, Value::NumpyDtype("<i8".into())),
    ]
}

fn sample_tensors() -> Vec<TensorRecord> {
    let parameter = TensorRecord {
        storage: 0,
        kind: TensorKind::TorchParameter,
        dtype: "float32".into(),
        item_bytes: 4,
        shape: vec![128, 128],
        strides: vec![1, 128],
        offset: 0,
        requires_grad: true,
        slice: None,
    };
    let empty = TensorRecord {
        storage: 1,
        kind: TensorKind::Torch,
        dtype: "bfloat16".into(),
        item_bytes: 2,
        shape: vec![0],
        strides: vec![1],
        requires_grad: false,
        ..parameter.clone()
    };
    let array = TensorRecord {
        storage: 2,
        kind: TensorKind::Numpy,
        dtype: "|u1".into(),
        item_bytes: 1,
        shape: vec![],
        strides: vec![],
        offset: 99,
        ..empty.clone()
    };
    let slice = TensorRecord {
        kind: TensorKind::Torch,
        requires_grad: false,
        slice: Some(GlobalSlice { shape: vec![256, 128], offsets: vec![128, 0] }),
        ..parameter.clone()
    };
    vec![parameter, empty, array, slice]
}

fn sample_manifest() -> Manifest {
    let shard = |rank, footer_crc32c: &str, replicated| ShardEntry {
        bytes: FILE_BYTES,
        file: shard_file_name(rank, attempt()),
        footer_crc32c: footer_crc32c.into(),
        rank,
        raw_bytes: 65_636,
        replicated,
    };
    Manifest {
        attempt: attempt().to_string(),
        created_unix_ms: 1_767_225_600_000,
        dataset_positions: BTreeMap::from([("text".into(), json!({"epoch": 1, "sample": 4096}))]),
        engine_version: "0.1.0".into(),
        format_version: FORMAT_VERSION,
        job: "gpt".into(),
        metadata: BTreeMap::from([
            ("loss".into(), json!(2.5)),
            ("note".into(), json!("caf\u{e9}")),
        ]),
        retired: vec![Retired { attempt: "ffeeddccbbaa99887766554433221100".into(), step: 2000 }],
        shards: vec![
            shard(0, "89abcdef", vec!["model.weight".into()]),
            shard(1, "00000001", vec![]),
        ],
        step: 1000,
        world_size: 2,
    }
}
