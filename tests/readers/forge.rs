//! Checkpoints that no writer of ours would write: every checksum is right, and the rest is what
//! the test says.
//!
//! Always holds: a forged checkpoint that nothing was changed in is whole.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Seek as _, SeekFrom, Write as _};
use std::path::Path;

use dtr_engine::format::checksum::{crc32c, to_hex};
use dtr_engine::format::manifest::{FORMAT_VERSION, Manifest, ShardEntry};
use dtr_engine::format::names::{AttemptId, MANIFEST_FILE, shard_file_name, step_dir_name};
use dtr_engine::format::shard::{BLOCK_BYTES, CHUNKS_OFFSET_MIN, Footer, Header, block_crc32c};
use dtr_proto::v1 as proto;
use prost::Message as _;

/// The step of every forged checkpoint.
pub(crate) const STEP: u64 = 7;
pub(crate) const ATTEMPT: AttemptId = AttemptId([0x5a; 16]);
pub(crate) const CHUNK_BYTES: u32 = 64 << 10;

/// Persisted ids of codecs.
pub(crate) const NONE: u8 = 0;
pub(crate) const FLOAT: u8 = 1;
pub(crate) const ZSTD: u8 = 2;
pub(crate) const GZIP: u8 = 3;

/// A chunk to store: its bytes as they are in the file, and what the index says of them.
#[derive(Clone, Debug)]
pub(crate) struct Chunk {
    pub(crate) stored: Vec<u8>,
    pub(crate) raw_bytes: u32,
    pub(crate) codec: u8,
    pub(crate) raw_crc32c: u32,
}

impl Chunk {
    pub(crate) fn raw(bytes: Vec<u8>) -> Self {
        let raw_bytes = u32::try_from(bytes.len()).unwrap();
        Self { raw_crc32c: crc32c(&bytes), stored: bytes, raw_bytes, codec: NONE }
    }
}

/// The index as it is in the file.
#[derive(Clone, Debug)]
pub(crate) struct Index {
    pub(crate) stored: Vec<u8>,
    /// What the footer says of its length once decompressed.
    pub(crate) raw_bytes: u64,
}

impl Index {
    /// A message as a writer would store it.
    pub(crate) fn of(message: &proto::ShardIndex) -> Self {
        Self::of_wire(&message.encode_to_vec())
    }

    pub(crate) fn of_wire(wire: &[u8]) -> Self {
        let mut stored = Vec::with_capacity(zstd_safe::compress_bound(wire.len()));
        zstd_safe::compress(&mut stored, wire, 3).unwrap();
        Self { stored, raw_bytes: wire.len() as u64 }
    }
}

/// What to write.
#[derive(Debug)]
pub(crate) struct Forged {
    pub(crate) header: Header,
    /// What is between header and chunks.
    pub(crate) gap: Vec<u8>,
    pub(crate) chunks: Vec<Chunk>,
    /// Made of the chunks and one tensor over all of them where it is `None`.
    pub(crate) index: Option<Index>,
    /// Where the file ends, if it is to be longer than what is in it: a hole takes no space.
    pub(crate) hole_bytes: u64,
    pub(crate) footer: fn(&mut Footer),
    pub(crate) manifest: fn(&mut Manifest),
}

impl Forged {
    pub(crate) fn new(chunks: Vec<Chunk>) -> Self {
        Self {
            header: Header {
                attempt: ATTEMPT,
                step: STEP,
                rank: 0,
                world_size: 1,
                chunk_bytes: CHUNK_BYTES,
                chunks_offset: CHUNKS_OFFSET_MIN,
                replicated: false,
            },
            gap: Vec::new(),
            chunks,
            index: None,
            hole_bytes: 0,
            footer: |_| {},
            manifest: |_| {},
        }
    }

    /// One raw chunk, nothing wrong with it.
    pub(crate) fn whole() -> Self {
        Self::new(vec![Chunk::raw(vec![7; 5000])])
    }

    /// Writes the checkpoint into the store at `store`.
    pub(crate) fn write(&self, store: &Path) {
        let directory = store.join(step_dir_name(STEP));
        fs::create_dir_all(&directory).unwrap();
        let index = self.index.clone().unwrap_or_else(|| Index::of(&self.message()));
        let header = self.header.encode();
        let mut file =
            File::create(directory.join(shard_file_name(self.header.rank, ATTEMPT))).unwrap();
        file.write_all(&header).unwrap();
        file.write_all(&self.gap).unwrap();
        for chunk in &self.chunks {
            file.write_all(&padded(&chunk.stored)).unwrap();
        }
        let index_offset = file.stream_position().unwrap() + self.hole_bytes;
        file.seek(SeekFrom::Start(index_offset)).unwrap();
        let stored = padded(&index.stored);
        file.write_all(&stored).unwrap();
        let file_bytes = index_offset + stored.len() as u64 + BLOCK_BYTES as u64;
        let mut footer = Footer {
            index_offset,
            index_stored_bytes: index.stored.len() as u64,
            index_raw_bytes: index.raw_bytes,
            index_crc32c: crc32c(&stored),
            header_crc32c: block_crc32c(&header),
            file_bytes,
            attempt: ATTEMPT,
            chunks_offset: self.header.chunks_offset,
            replicated: self.header.replicated,
        };
        (self.footer)(&mut footer);
        let footer = footer.encode();
        file.write_all(&footer).unwrap();
        let mut manifest = manifest(file_bytes, block_crc32c(&footer));
        (self.manifest)(&mut manifest);
        write_manifest(store, &signed(&serde_json::to_string_pretty(&manifest).unwrap()));
    }

    /// What the index would say if nothing was wrong.
    pub(crate) fn message(&self) -> proto::ShardIndex {
        let mut columns = proto::ChunkColumns::default();
        let mut offset = u64::from(self.header.chunks_offset);
        for chunk in &self.chunks {
            columns.offset.push(offset);
            columns.stored_bytes.push(u32::try_from(chunk.stored.len()).unwrap());
            columns.raw_bytes.push(chunk.raw_bytes);
            columns.codec.push(chunk.codec);
            columns.stored_crc32c.push(crc32c(&padded(&chunk.stored)));
            columns.raw_crc32c.push(chunk.raw_crc32c);
            offset += padded(&chunk.stored).len() as u64;
        }
        let raw_bytes = self.chunks.iter().map(|chunk| u64::from(chunk.raw_bytes)).sum();
        proto::ShardIndex {
            nodes: vec![node(proto::node::Value::Tensor(0))],
            storages: vec![storage(0, raw_bytes)],
            tensors: vec![tensor(0, &[raw_bytes])],
            chunks: Some(columns),
            replicated: Vec::new(),
        }
    }
}

pub(crate) fn node(value: proto::node::Value) -> proto::Node {
    proto::Node { key: None, value: Some(value) }
}

pub(crate) fn storage(raw_offset: u64, bytes: u64) -> proto::Storage {
    proto::Storage { raw_offset, bytes, element: proto::ElementType::Bytes.into(), replica: None }
}

/// Bytes, one after the other.
pub(crate) fn tensor(storage: u32, shape: &[u64]) -> proto::Tensor {
    let mut strides = vec![1; shape.len()];
    for dimension in (1..shape.len()).rev() {
        strides[dimension - 1] = strides[dimension] * shape[dimension];
    }
    proto::Tensor {
        storage,
        kind: proto::TensorKind::Torch.into(),
        dtype: "uint8".into(),
        item_bytes: 1,
        shape: shape.into(),
        strides,
        offset: 0,
        requires_grad: false,
        slice: None,
    }
}

fn manifest(bytes: u64, footer_crc32c: u32) -> Manifest {
    Manifest {
        attempt: ATTEMPT.to_string(),
        created_unix_ms: 1,
        dataset_positions: BTreeMap::new(),
        engine_version: "0".into(),
        format_version: FORMAT_VERSION,
        job: "job".into(),
        metadata: BTreeMap::new(),
        retired: Vec::new(),
        shards: vec![ShardEntry {
            bytes,
            file: shard_file_name(0, ATTEMPT),
            footer_crc32c: to_hex(footer_crc32c),
            rank: 0,
            raw_bytes: bytes,
            replicated: Vec::new(),
        }],
        step: STEP,
        world_size: 1,
    }
}

/// A manifest's bytes: JSON that begins with `{`, under a checksum that is right.
pub(crate) fn signed(json: &str) -> Vec<u8> {
    let body = json.strip_prefix('{').unwrap();
    format!("{{\"crc32c\":\"{}\",{body}", to_hex(crc32c(body.as_bytes()))).into_bytes()
}

pub(crate) fn write_manifest(store: &Path, bytes: &[u8]) {
    let directory = store.join(step_dir_name(STEP));
    fs::create_dir_all(&directory).unwrap();
    fs::write(directory.join(MANIFEST_FILE), bytes).unwrap();
}

fn padded(bytes: &[u8]) -> Vec<u8> {
    let mut padded = bytes.to_vec();
    padded.resize(bytes.len().next_multiple_of(BLOCK_BYTES), 0);
    padded
}
