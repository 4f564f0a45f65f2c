//! What is fuzzed: each function takes any bytes, lets a reader of the engine read them, and panics
//! if a promise of that reader does not hold.
//!
//! Always holds: what only distinguishes accidents from intent (a checksum, a magic number) is put
//! right first, so that a fuzzer gets behind it. The functions need no fuzzer: the tests of the
//! workspace replay the committed corpus and random bytes through them.
//!
//! A promise is more than that nothing panics: what decodes is written and decodes to the same;
//! what an index says of lengths is checked once more, in arithmetic that cannot overflow.

use dtr_engine::codec::{Codec, Decoder, Encoded, Encoder};
use dtr_engine::format::checksum::{crc32c, to_hex};
use dtr_engine::format::index::{IndexContext, ShardIndex, TensorRecord, difference};
use dtr_engine::format::layout::ElementType;
use dtr_engine::format::manifest::Manifest;
use dtr_engine::format::names::{
    AttemptId, manifest_temporary_name, parse_manifest_temporary, parse_shard_file, parse_step_dir,
    shard_file_name, step_dir_name,
};
use dtr_engine::format::shard::{BLOCK_BYTES, CHUNKS_OFFSET_MIN, Footer, Header, block_crc32c};
use dtr_engine::format::tree::{Walk, tensor_paths};

const PAGE: u64 = BLOCK_BYTES as u64;

/// A target's name and function.
pub type Target = (&'static str, fn(&[u8]));

/// All of them, by name.
pub const TARGETS: &[Target] = &[
    ("block", block),
    ("codec", codec),
    ("frame", frame),
    ("index", index),
    ("manifest", manifest),
    ("names", names),
];

/// The first bytes of `bytes` as a number; zeros where they end.
fn take<const N: usize>(bytes: &mut &[u8]) -> [u8; N] {
    let mut taken = [0; N];
    let count = N.min(bytes.len());
    let (first, rest) = bytes.split_at(count);
    taken[..count].copy_from_slice(first);
    *bytes = rest;
    taken
}

/// Header and footer: the bytes of a block, its checksum and magic put right.
pub fn block(bytes: &[u8]) {
    let mut rest = bytes;
    let [kind] = take(&mut rest);
    let file_bytes = u64::from_le_bytes(take(&mut rest));
    let mut block = [0; BLOCK_BYTES];
    let count = rest.len().min(BLOCK_BYTES);
    block[..count].copy_from_slice(&rest[..count]);
    if kind & 2 == 0 {
        let magic = if kind & 1 == 0 { b"DTRSHARD" } else { b"DTRSHEND" };
        block[..8].copy_from_slice(magic);
        let crc = block_crc32c(&block);
        block[BLOCK_BYTES - 4..].copy_from_slice(&crc.to_le_bytes());
    }
    if let Ok(header) = Header::decode(&block) {
        assert!(header.rank < header.world_size);
        assert!(header.chunk_bytes.is_power_of_two());
        assert_eq!(Header::decode(&header.encode()), Ok(header));
    }
    if let Ok(footer) = Footer::decode(&block, file_bytes) {
        let end = u128::from(footer.index_offset)
            + u128::from(footer.index_stored_bytes).next_multiple_of(u128::from(PAGE))
            + u128::from(PAGE);
        assert_eq!(end, u128::from(file_bytes));
        assert_eq!(Footer::decode(&footer.encode(), file_bytes), Ok(footer));
    }
}

/// A manifest: JSON behind `{`, its checksum put right. With a first byte of 0, the bytes as they
/// are.
pub fn manifest(bytes: &[u8]) {
    let (kind, body) = bytes.split_first().unwrap_or((&1, &[]));
    let file = if *kind == 0 {
        body.to_vec()
    } else {
        [format!("{{\"crc32c\":\"{}\",", to_hex(crc32c(body))).as_bytes(), body].concat()
    };
    let Ok(manifest) = Manifest::decode(&file) else { return };
    for (rank, shard) in (0..).zip(&manifest.shards) {
        let attempt = manifest.attempt_id().expect("it was checked");
        assert_eq!(shard.file, shard_file_name(rank, attempt));
    }
    let encoded = manifest.encode().expect("what is read can be written");
    assert_eq!(Manifest::decode(&encoded), Ok(manifest));
}

/// What a file is around an index, from two bytes.
fn context(shape: [u8; 2], stored_bytes: usize) -> IndexContext {
    let chunks_offset = CHUNKS_OFFSET_MIN << (shape[1] / 11 % 9);
    let index_offset = u64::from(chunks_offset) + PAGE * u64::from(shape[0]);
    let padded = (stored_bytes as u64).next_multiple_of(PAGE);
    IndexContext {
        file_bytes: index_offset + padded + PAGE,
        chunk_bytes: 1 << (16 + shape[1] % 11),
        chunks_offset,
        index_offset,
    }
}

/// A zstd frame of raw blocks: the fuzzer's bytes reach the reader as they are.
fn frame_of(content: &[u8]) -> Vec<u8> {
    let mut frame = vec![0x28, 0xb5, 0x2f, 0xfd, 0b1110_0000];
    frame.extend((content.len() as u64).to_le_bytes());
    let blocks = content.chunks(128 << 10).collect::<Vec<_>>();
    for (number, block) in blocks.iter().enumerate() {
        let is_last = u32::from(number + 1 == blocks.len());
        let length = u32::try_from(block.len()).expect("a block is short");
        frame.extend(&(is_last | (length << 3)).to_le_bytes()[..3]);
        frame.extend_from_slice(block);
    }
    frame
}

/// The index, and in it the state tree: two bytes of the file's shape, then a `ShardIndex` message.
pub fn index(bytes: &[u8]) {
    let mut wire = bytes;
    let shape = take(&mut wire);
    let stored = frame_of(wire);
    decode_index(&stored, wire.len() as u64, &context(shape, stored.len()));
}

/// The index's frame: the file's shape and the length it is said to have, then stored bytes.
pub fn frame(bytes: &[u8]) {
    let mut stored = bytes;
    let shape = take(&mut stored);
    let raw_bytes = u32::from_le_bytes(take(&mut stored)).into();
    decode_index(stored, raw_bytes, &context(shape, stored.len()));
}

fn decode_index(stored: &[u8], raw_bytes: u64, context: &IndexContext) {
    let Ok(index) = ShardIndex::decode(stored, raw_bytes, context) else { return };
    check_index(&index, context);
    let encoded = index.encode().expect("what is read can be written");
    let padded = |bytes: usize| (bytes as u64).next_multiple_of(PAGE);
    let around = IndexContext {
        file_bytes: context.index_offset + padded(encoded.stored.len()) + PAGE,
        ..*context
    };
    let again = ShardIndex::decode(&encoded.stored, encoded.raw_bytes, &around)
        .expect("what is written can be read");
    // Not compared as values: NaN is no equal of itself.
    assert_eq!(format!("{index:?}"), format!("{again:?}"));
}

/// Everything that users of an index rely on.
fn check_index(index: &ShardIndex, context: &IndexContext) {
    let mut end = 0;
    for storage in &index.storages {
        assert!(u128::from(storage.raw_offset) >= end);
        let held = storage.held();
        assert!(held.start <= held.end && held.end <= storage.bytes);
        end = u128::from(storage.raw_offset) + u128::from(held.end - held.start);
    }
    let chunks: u128 = index.chunks.iter().map(|chunk| u128::from(chunk.raw_bytes)).sum();
    assert_eq!(chunks, end, "chunks hold the raw layout");
    let mut taken: Vec<_> = index
        .chunks
        .iter()
        .map(|chunk| (u128::from(chunk.offset), u128::from(chunk.stored_bytes)))
        .collect();
    taken.sort_unstable();
    let mut free = u128::from(context.chunks_offset);
    for (offset, bytes) in taken {
        assert!(offset >= free);
        free = offset + bytes;
    }
    assert!(free <= u128::from(context.index_offset));
    for tensor in &index.tensors {
        let storage = index.storages[tensor.storage as usize];
        assert!(extent(tensor) <= u128::from(storage.bytes));
        assert_eq!(tensor.shape.len(), tensor.strides.len());
    }
    let mut walk = Walk::new(&index.nodes);
    let mut nodes = 0;
    while walk.advance().is_some() {
        nodes += 1;
        assert!(walk.path().segments.len() <= 128);
    }
    assert_eq!(nodes, index.nodes.len());
    for (tensor, path) in tensor_paths(&index.nodes).take(1000) {
        assert!((tensor as usize) < index.tensors.len());
        let _text = path.to_string();
    }
    let mut replicas = 0;
    for nodes in index.replicated_nodes() {
        assert!(nodes.start < nodes.end && nodes.end <= index.nodes.len());
        replicas += 1;
    }
    assert_eq!(replicas, index.replicated.len());
    assert!(difference(index, index).is_none());
}

/// Bytes from the storage's start to the end of the last item.
fn extent(tensor: &TensorRecord) -> u128 {
    if tensor.shape.contains(&0) {
        return 0;
    }
    let steps = tensor.shape.iter().zip(&tensor.strides);
    let last: u128 = steps.map(|(items, step)| u128::from(items - 1) * u128::from(*step)).sum();
    (u128::from(tensor.offset) + last + 1) * u128::from(tensor.item_bytes)
}

/// Every codec: how many raw bytes are expected and which codec, then stored bytes, or raw ones to
/// encode and decode again.
pub fn codec(bytes: &[u8]) {
    let mut rest = bytes;
    let [kind, low, high] = take(&mut rest);
    let codec = [Codec::None, Codec::Float, Codec::Zstd, Codec::Gzip][usize::from(kind & 3)];
    let element = ElementType::ALL[usize::from(kind >> 2) % ElementType::ALL.len()];
    if kind & 0x80 == 0 {
        let raw_bytes = usize::from(u16::from_le_bytes([low, high])) << ((kind >> 2) & 3);
        let mut raw = vec![0xa5; raw_bytes];
        if Decoder::new().decode(codec, rest, &mut raw).is_ok() {
            round_trip(codec, element, &raw);
        }
    } else {
        round_trip(codec, element, rest);
    }
}

fn round_trip(codec: Codec, element: ElementType, raw: &[u8]) {
    let mut stored = vec![0; raw.len()];
    let encoded = Encoder::new().encode(codec, element, raw, &mut stored);
    let Encoded::Stored(bytes) = encoded.expect("any bytes can be encoded") else { return };
    let mut back = vec![0x5a; raw.len()];
    Decoder::new().decode(codec, &stored[..bytes], &mut back).expect("what is written can be read");
    assert!(back == raw);
}

/// Names in a store.
pub fn names(bytes: &[u8]) {
    let Ok(name) = std::str::from_utf8(bytes) else { return };
    let is_plain = !name.contains(['/', '\0']) && !name.starts_with('.');
    if let Some(step) = parse_step_dir(name) {
        assert!(is_plain && step_dir_name(step) == name);
    }
    if let Some((rank, attempt)) = parse_shard_file(name) {
        assert!(is_plain && shard_file_name(rank, attempt) == name);
    }
    if let Some(attempt) = parse_manifest_temporary(name) {
        assert!(is_plain && manifest_temporary_name(attempt) == name);
    }
    if let Some(attempt) = AttemptId::parse(name) {
        assert!(is_plain && attempt.to_string() == name);
    }
}
