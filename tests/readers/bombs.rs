//! A small file that asks for much is refused: for terabytes that are not there, for what unpacks
//! to gigabytes, for depth without end.
//!
//! Always holds: whatever a checkpoint claims, listing, opening, verifying and reading it ends with
//! a typed error, within [`SECONDS_MAX`] of CPU time and [`MEMORY_BYTES_MAX`] of memory beside
//! what the process has; and a checkpoint forged without a lie is read. The measure is that of a
//! whole process, so the bombs go off in one of their own.

use std::fs;
use std::io::Write as _;
use std::path::Path;
use std::time::Duration;

use dtr_engine::load::{ReadOptions, Target};
use dtr_engine::{Config, EngineError};
use dtr_proto::v1 as proto;
use fastrand::Rng;
use proto::node::Value;
use rustix::time::{ClockId, clock_gettime};

use super::alone::alone;
use super::budget::{Budget, scratch};
use super::forge::{
    CHUNK_BYTES, Chunk, FLOAT, Forged, GZIP, Index, STEP, ZSTD, node, signed, storage, tensor,
    write_manifest,
};
use super::state::{self, Counter};

/// Bombs when nobody asks for more.
const SHORT: u64 = 52;
const SECONDS_MAX: f64 = 1.0;
const MEMORY_BYTES_MAX: u64 = 64 << 20;
/// Storages that are read where a checkpoint opens: more would be the reader's own request.
const READ_BYTES_MAX: u64 = 1 << 20;

/// A kind of bomb: its name, and how to put one into a store.
type Kind = (&'static str, fn(&Path, &mut Rng));

const KINDS: &[Kind] = &[
    ("a footer of terabytes", footer_of_terabytes),
    ("a header with impossible chunks", header_with_impossible_chunks),
    ("a file of terabytes, all hole", file_of_terabytes),
    ("a manifest that names a shard of exabytes", manifest_of_exabytes),
    ("a manifest that names many shards that are not there", manifest_of_many_shards),
    ("a manifest of many values", manifest_of_many_values),
    ("a manifest of many small objects", manifest_of_many_objects),
    ("a manifest of many names", manifest_of_many_names),
    ("a manifest that nests without end", manifest_that_nests),
    ("an index of gigabytes, packed", index_of_gigabytes),
    ("an index of millions of nodes, packed", index_of_many_nodes),
    ("an index of millions of records, packed", index_of_many_records),
    ("an index whose length lies", index_whose_length_lies),
    ("a tree with a count that lies", tree_with_a_lying_count),
    ("a tree that nests without end", tree_that_nests),
    ("a tensor that is larger than its storage", tensor_of_exabytes),
    ("a storage without chunks", storage_without_chunks),
    ("a part of a storage of which no shard has the rest", part_without_the_rest),
    ("chunk columns that lie", columns_that_lie),
    ("damage in a chunk of many tensors", many_views_of_damage),
    ("an empty tensor beyond every number", empty_tensor_far_away),
    ("a zstd chunk of gigabytes", zstd_chunk),
    ("a gzip chunk of gigabytes", gzip_chunk),
    ("a float chunk that lies", float_chunk),
    ("a chunk of garbage", garbage_chunk),
];

#[test]
fn a_small_file_that_asks_for_much_is_refused() {
    alone("bombs::a_small_file_that_asks_for_much_is_refused", set_off_all);
}

fn set_off_all() {
    let budget = Budget::of(SHORT);
    let mut most = Cost::default();
    let mut violations = Vec::new();
    let warm = scratch();
    Forged::whole().write(warm.path());
    // What the first engine of a process takes is not the bomb's.
    open_all(warm.path()).expect("a checkpoint without a lie is read");
    for number in budget.first..budget.first + budget.states {
        let kind = usize::try_from(number).unwrap() % KINDS.len();
        let (name, place) = KINDS[kind];
        let directory = scratch();
        place(directory.path(), &mut Rng::with_seed(number));
        let again = format!(
            "bomb {number}, {name}; again with DTR_TORTURE_FIRST={number} DTR_TORTURE_STATES=1"
        );
        let (found, cost) = measured(|| open_all(directory.path()));
        match found {
            Ok(()) => violations.push(format!("it is taken for a checkpoint: {again}")),
            Err(why) if is_refusal(&why) => {}
            Err(why) => violations.push(format!("not as damaged, but: {why:?}\n{again}")),
        }
        if cost.seconds > SECONDS_MAX || cost.memory_bytes > MEMORY_BYTES_MAX {
            violations.push(format!(
                "{:.1} s and {} MiB: {again}",
                cost.seconds,
                cost.memory_bytes >> 20
            ));
        }
        most = Cost {
            seconds: most.seconds.max(cost.seconds),
            memory_bytes: most.memory_bytes.max(cost.memory_bytes),
        };
    }
    assert!(violations.is_empty(), "{}", violations.join("\n"));
    println!(
        "{} bombs of {} kinds from number {}: at most {:.2} s and {} MiB each",
        budget.states,
        KINDS.len(),
        budget.first,
        most.seconds,
        most.memory_bytes >> 20
    );
    println!("torture: tried {}, next {}", budget.states, budget.first + budget.states);
}

/// How a checkpoint is refused.
#[derive(Debug)]
enum Why {
    Error(EngineError),
    /// `verify` reports damage where everything else went well.
    Reported,
}

fn is_refusal(why: &Why) -> bool {
    matches!(why, Why::Reported | Why::Error(EngineError::Corrupt { .. }))
}

/// Everything that a reader does with a checkpoint.
fn open_all(store: &Path) -> Result<(), Why> {
    let config = Config { read_only: true, ..state::config(store) };
    let engine = state::open(config, &state::backend(), &Counter::starting_at(0)).unwrap();
    engine.survey().map_err(Why::Error)?;
    let report = engine.verify(STEP, &()).map_err(Why::Error)?;
    let opened = engine.checkpoint_of_rank(STEP, 0).map_err(Why::Error)?;
    for (storage, record) in (0..).zip(&opened.index().storages) {
        if record.bytes > READ_BYTES_MAX {
            continue;
        }
        let mut memory = vec![0; usize::try_from(record.bytes).unwrap()];
        let target = Target { storage, offset: 0, memory: &mut memory };
        opened.read(vec![target], ReadOptions::default()).map_err(Why::Error)?;
    }
    if report.damage.is_empty() { Ok(()) } else { Err(Why::Reported) }
}

/// What an act took.
#[derive(Clone, Copy, Debug, Default)]
struct Cost {
    /// CPU time of all threads.
    seconds: f64,
    /// Most resident memory beyond what was in use before.
    memory_bytes: u64,
}

fn measured<T>(act: impl FnOnce() -> T) -> (T, Cost) {
    let before_bytes = status_bytes("VmRSS:");
    // Resets the high-water mark.
    fs::write("/proc/self/clear_refs", "5").unwrap();
    let start = cpu_time();
    let result = act();
    let seconds = cpu_time().saturating_sub(start).as_secs_f64();
    let memory_bytes = status_bytes("VmHWM:").saturating_sub(before_bytes);
    (result, Cost { seconds, memory_bytes })
}

fn cpu_time() -> Duration {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec.try_into().unwrap(), time.tv_nsec.try_into().unwrap())
}

fn status_bytes(name: &str) -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
    let kib: u64 = line.trim().strip_suffix(" kB").unwrap().parse().unwrap();
    kib << 10
}

fn footer_of_terabytes(store: &Path, random: &mut Rng) {
    let footer: [fn(&mut dtr_engine::format::shard::Footer); 6] = [
        |footer| footer.index_raw_bytes = 1 << 40,
        |footer| footer.index_raw_bytes = 1 << 30,
        |footer| footer.index_stored_bytes = 1 << 40,
        |footer| footer.index_stored_bytes = u64::MAX,
        |footer| footer.file_bytes = 1 << 42,
        |footer| footer.index_offset = u64::MAX - 4095,
    ];
    Forged { footer: footer[random.usize(..footer.len())], ..Forged::whole() }.write(store);
}

fn header_with_impossible_chunks(store: &Path, random: &mut Rng) {
    let mut forged = Forged::whole();
    let sizes = [0, 1, 4096, CHUNK_BYTES + 1, 128 << 20, 1 << 31, u32::MAX];
    forged.header.chunk_bytes = sizes[random.usize(..sizes.len())];
    forged.write(store);
}

fn file_of_terabytes(store: &Path, random: &mut Rng) {
    let hole_bytes = 4096 * (1 + random.u64(..1 << 28));
    Forged { hole_bytes, ..Forged::whole() }.write(store);
}

fn manifest_of_exabytes(store: &Path, random: &mut Rng) {
    let manifest: [fn(&mut dtr_engine::format::manifest::Manifest); 4] = [
        |manifest| manifest.shards[0].bytes = 1 << 60,
        |manifest| manifest.shards[0].bytes = u64::MAX - 4095,
        |manifest| manifest.world_size = u32::MAX,
        |manifest| {
            manifest.shards[0].raw_bytes = u64::MAX;
            manifest.shards[0].bytes = 0;
        },
    ];
    Forged { manifest: manifest[random.usize(..manifest.len())], ..Forged::whole() }.write(store);
}

fn manifest_of_many_shards(store: &Path, _: &mut Rng) {
    let manifest = |manifest: &mut dtr_engine::format::manifest::Manifest| {
        use dtr_engine::format::names::shard_file_name;
        manifest.world_size = 4000;
        let like = manifest.shards[0].clone();
        manifest.shards = (0..manifest.world_size)
            .map(|rank| dtr_engine::format::manifest::ShardEntry {
                rank,
                file: shard_file_name(rank, super::forge::ATTEMPT),
                ..like.clone()
            })
            .collect();
    };
    Forged { manifest, ..Forged::whole() }.write(store);
}

/// A manifest whose metadata is `value`, as it is.
fn write_metadata(store: &Path, key: &str, value: &str) {
    write_with(store, &format!("\"{key}\": {{}}"), value);
}

/// A manifest with `value` in the place of `member`, which is empty.
fn write_with(store: &Path, member: &str, value: &str) {
    Forged::whole().write(store);
    let path = store
        .join(dtr_engine::format::names::step_dir_name(STEP))
        .join(dtr_engine::format::names::MANIFEST_FILE);
    let text = fs::read_to_string(&path).unwrap();
    let (_, body) = text.split_once("\",").unwrap();
    let json = format!("{{{body}").replacen(member, value, 1);
    write_manifest(store, &signed(&json));
}

fn list_of(item: &str, bytes: usize) -> String {
    let mut list = vec![item; bytes / (item.len() + 1)].join(",");
    list.insert(0, '[');
    list.push(']');
    list
}

fn manifest_of_many_values(store: &Path, random: &mut Rng) {
    let items = ["0", "[]", "\"\"", "null", "[0]"];
    let list = list_of(items[random.usize(..items.len())], (4 + random.usize(..4)) << 20);
    let key = ["metadata", "dataset_positions"][random.usize(..2)];
    write_metadata(store, key, &format!("\"{key}\": {{\"x\": {list}}}"));
}

fn manifest_of_many_objects(store: &Path, random: &mut Rng) {
    let items = ["{\"\":0}", "{\"a\":{\"b\":{}}}", "{\"\":[]}"];
    let list = list_of(items[random.usize(..items.len())], (1 + random.usize(..4)) << 20);
    write_metadata(store, "metadata", &format!("\"metadata\": {{\"x\": {list}}}"));
}

fn manifest_of_many_names(store: &Path, random: &mut Rng) {
    let list = list_of("\"a\"", (4 + random.usize(..4)) << 20);
    write_with(store, "\"replicated\": []", &format!("\"replicated\": {list}"));
}

fn manifest_that_nests(store: &Path, random: &mut Rng) {
    let depth = 200 + random.usize(..1 << 20);
    let (open, close) = [("[", "]"), ("{\"a\":", "}")][random.usize(..2)];
    let mut value = open.repeat(depth);
    value.push('0');
    value.push_str(&close.repeat(depth));
    let key = ["metadata", "unknown"][random.usize(..2)];
    if key == "metadata" {
        write_metadata(store, "metadata", &format!("\"metadata\": {{\"x\": {value}}}"));
    } else {
        write_metadata(store, "metadata", &format!("\"metadata\": {{}}, \"x\": {value}"));
    }
}

/// A zstd frame of `blocks` blocks, each 128 KiB of one byte: four bytes stand for each.
fn zstd_of_runs(blocks: usize, byte: u8, says_length: bool) -> Vec<u8> {
    const BLOCK: u32 = 128 << 10;
    let mut frame = vec![0x28, 0xb5, 0x2f, 0xfd];
    if says_length {
        // A content size of 8 bytes, and no window besides.
        frame.push(0b1110_0000);
        frame.extend((blocks as u64 * u64::from(BLOCK)).to_le_bytes());
    } else {
        // A window of 1 MiB.
        frame.extend([0, 0b0101_0000]);
    }
    for block in 0..blocks {
        let last = u32::from(block + 1 == blocks);
        let header = last | (1 << 1) | (BLOCK << 3);
        frame.extend(&header.to_le_bytes()[..3]);
        frame.push(byte);
    }
    frame
}

fn index_of_gigabytes(store: &Path, random: &mut Rng) {
    let blocks = [64, 1000, 8192, 8191, 100_000][random.usize(..5)];
    let stored = zstd_of_runs(blocks, random.u8(..), true);
    let raw_bytes = blocks as u64 * (128 << 10);
    Forged { index: Some(Index { stored, raw_bytes }), ..Forged::whole() }.write(store);
}

/// The wire of a list of `count` nodes that are `None`.
fn index_of_many_nodes(store: &Path, random: &mut Rng) {
    let count = (1 << 20) + random.usize(..15 << 20);
    let list = node(Value::List(u32::try_from(count).unwrap()));
    let mut wire = Vec::new();
    prost::encoding::message::encode(1, &list, &mut wire);
    let mut item = Vec::new();
    prost::encoding::message::encode(1, &node(Value::None(proto::Unit {})), &mut item);
    wire.extend(item.repeat(count));
    Forged { index: Some(Index::of_wire(&wire)), ..Forged::new(Vec::new()) }.write(store);
}

fn index_of_many_records(store: &Path, random: &mut Rng) {
    let count = (1 << 20) + random.usize(..3 << 20);
    let mut wire = Vec::new();
    prost::encoding::message::encode(1, &node(Value::None(proto::Unit {})), &mut wire);
    let mut item = Vec::new();
    if random.bool() {
        prost::encoding::message::encode(2, &storage(0, 0), &mut item);
        wire.extend(item.repeat(count));
    } else {
        prost::encoding::message::encode(2, &storage(0, 0), &mut wire);
        prost::encoding::message::encode(3, &tensor(0, &[0, 0, 0]), &mut item);
        wire.extend(item.repeat(count));
    }
    Forged { index: Some(Index::of_wire(&wire)), ..Forged::new(Vec::new()) }.write(store);
}

fn index_whose_length_lies(store: &Path, random: &mut Rng) {
    let mut index = Index::of(&Forged::whole().message());
    index.raw_bytes = match random.usize(..5) {
        0 => index.raw_bytes + 1,
        1 => index.raw_bytes - 1,
        2 => 1,
        3 => index.stored.len() as u64 * (128 * 1024 / 4),
        _ => 16 << 20,
    };
    Forged { index: Some(index), ..Forged::whole() }.write(store);
}

fn tree_with_a_lying_count(store: &Path, random: &mut Rng) {
    let mut message = Forged::whole().message();
    let count = [2, 1000, 1 << 24, u32::MAX - 1, u32::MAX][random.usize(..5)];
    let root = match random.usize(..3) {
        0 => Value::List(count),
        1 => Value::Tuple(count),
        _ => Value::Dict(proto::Dict {
            len: count,
            kind: proto::DictKind::Ordered.into(),
            metadata: true,
        }),
    };
    message.nodes.insert(0, node(root));
    Forged { index: Some(Index::of(&message)), ..Forged::whole() }.write(store);
}

fn tree_that_nests(store: &Path, random: &mut Rng) {
    let depth = 129 + random.usize(..100_000);
    let mut message = Forged::whole().message();
    let leaf = message.nodes.pop().unwrap();
    message.nodes = vec![node(Value::List(1)); depth];
    message.nodes.push(leaf);
    Forged { index: Some(Index::of(&message)), ..Forged::whole() }.write(store);
}

fn tensor_of_exabytes(store: &Path, random: &mut Rng) {
    let mut message = Forged::whole().message();
    let tensor = &mut message.tensors[0];
    match random.usize(..6) {
        0 => tensor.shape = vec![1 << 62],
        1 => tensor.strides = vec![1 << 62],
        2 => tensor.offset = u64::MAX,
        3 => tensor.item_bytes = u32::MAX,
        4 => tensor.shape = vec![0; 1 << 16],
        _ => {
            tensor.shape = vec![1 << 32, 1 << 32];
            tensor.strides = vec![0, 0];
        }
    }
    Forged { index: Some(Index::of(&message)), ..Forged::whole() }.write(store);
}

fn storage_without_chunks(store: &Path, random: &mut Rng) {
    let mut message = Forged::whole().message();
    let bytes = [1 << 40, 1 << 60, u64::MAX, 5001][random.usize(..4)];
    message.storages[0].bytes = bytes;
    message.tensors[0] = tensor(0, &[bytes.min(1 << 60)]);
    Forged { index: Some(Index::of(&message)), ..Forged::whole() }.write(store);
}

fn part_without_the_rest(store: &Path, random: &mut Rng) {
    let mut forged = Forged::whole();
    forged.header.replicated = true;
    let mut message = forged.message();
    let held = message.storages[0].bytes;
    let bytes = [1 << 40, 1 << 60, u64::MAX, held + 1][random.usize(..4)];
    let start = [0, 1, bytes - held, u64::MAX][random.usize(..4)];
    message.storages[0].bytes = bytes;
    message.storages[0].replica = Some(proto::Replica { number: 0, start, bytes: held });
    message.tensors[0] = tensor(0, &[bytes.min(1 << 60)]);
    message.replicated = vec![0];
    forged.index = Some(Index::of(&message));
    forged.write(store);
}

fn columns_that_lie(store: &Path, random: &mut Rng) {
    let mut message = Forged::whole().message();
    let columns = message.chunks.as_mut().unwrap();
    match random.usize(..7) {
        0 => columns.raw_bytes[0] = u32::MAX,
        1 => columns.stored_bytes[0] = u32::MAX,
        2 => columns.offset[0] = u64::MAX,
        3 => columns.codec = vec![0; 1 << 20],
        4 => columns.offset = vec![4096; 1 << 18],
        5 => columns.segment = vec![1],
        _ => columns.codec[0] = 200,
    }
    Forged { index: Some(Index::of(&message)), ..Forged::whole() }.write(store);
}

/// Chunks whose checksums are wrong, and tensors that are in all of them, under long names.
fn many_views_of_damage(store: &Path, random: &mut Rng) {
    const CHUNKS: usize = 64;
    const TENSORS: u32 = 20_000;
    let chunk = Chunk { raw_crc32c: 1, ..Chunk::raw(vec![7; CHUNK_BYTES as usize]) };
    let mut forged = Forged::new(vec![chunk; CHUNKS]);
    let mut message = forged.message();
    let all = message.storages[0].bytes;
    message.tensors = vec![tensor(0, &[all]); TENSORS as usize];
    let long_key = "k".repeat(random.usize(..1 << 20));
    let mut nodes = vec![
        node(Value::Dict(proto::Dict {
            len: 1,
            kind: proto::DictKind::Plain.into(),
            metadata: false,
        })),
        node(Value::List(TENSORS)),
    ];
    nodes[1].key = Some(proto::node::Key::KeyStr(long_key));
    nodes.extend((0..TENSORS).map(|tensor| node(Value::Tensor(tensor))));
    message.nodes = nodes;
    forged.index = Some(Index::of(&message));
    forged.write(store);
}

/// Legal; what reports the damage must not count on where it is.
fn empty_tensor_far_away(store: &Path, _: &mut Rng) {
    let mut forged = Forged::whole();
    forged.chunks[0].raw_crc32c ^= 1;
    let mut message = forged.message();
    message.tensors[0].shape = vec![0, 3];
    message.tensors[0].strides = vec![i64::MAX.unsigned_abs(); 2];
    message.tensors[0].offset = i64::MAX.unsigned_abs();
    message.tensors[0].item_bytes = u32::MAX;
    forged.index = Some(Index::of(&message));
    forged.write(store);
}

fn packed(codec: u8, stored: Vec<u8>, raw_bytes: u32) -> Forged {
    // The index says that it shrank: raw bytes are never fewer.
    let raw_bytes = raw_bytes.max(u32::try_from(stored.len()).unwrap());
    let mut forged = Forged::new(vec![Chunk { stored, raw_bytes, codec, raw_crc32c: 0 }]);
    forged.header.chunk_bytes = raw_bytes.next_power_of_two().max(CHUNK_BYTES);
    forged
}

fn zstd_chunk(store: &Path, random: &mut Rng) {
    let blocks = [1, 100, 8192, 16_000][random.usize(..4)];
    let frame = zstd_of_runs(blocks, 0, random.bool());
    packed(ZSTD, frame, CHUNK_BYTES).write(store);
}

fn gzip_chunk(store: &Path, random: &mut Rng) {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
    for _ in 0..=random.usize(..64) {
        encoder.write_all(&vec![0; 1 << 20]).unwrap();
    }
    let mut member = encoder.finish().unwrap();
    // The one header that is written: no time, no name, no system.
    member[8..10].copy_from_slice(&[0, 255]);
    packed(GZIP, member, CHUNK_BYTES).write(store);
}

/// What the header of a float chunk claims, as random bytes that begin like one.
fn float_chunk(store: &Path, random: &mut Rng) {
    let width = [1, 2, 4, 8, 255][random.usize(..5)];
    let log2 = [0, 17, 20, 21, 63, 255][random.usize(..6)];
    let mut stored = vec![1, width, u8::from(width > 1), log2];
    let raw_bytes = [u32::MAX, CHUNK_BYTES, 64 << 20, 0][random.usize(..4)];
    stored.extend(raw_bytes.to_le_bytes());
    // A frame that claims the most, and zeros.
    stored.extend([0x2f, 0xff, 0xff, 0xff]);
    stored.extend(zstd_of_runs(8192, 0, true));
    packed(FLOAT, stored, 16 << 20).write(store);
}

fn garbage_chunk(store: &Path, random: &mut Rng) {
    let codec = [FLOAT, ZSTD, GZIP][random.usize(..3)];
    let count = 1 + random.usize(..60_000);
    packed(codec, state::bytes(random, count), CHUNK_BYTES).write(store);
}

#[test]
fn a_frame_of_runs_unpacks_to_what_it_claims() {
    let frame = zstd_of_runs(80, 3, true);
    let mut out = Vec::with_capacity(80 * (128 << 10));
    assert_eq!(zstd_safe::decompress(&mut out, &frame), Ok(80 * (128 << 10)));
    assert!(frame.len() < 400, "{} bytes stand for 10 MiB", frame.len());
}
