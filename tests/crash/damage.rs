//! Every flipped bit is found before a tensor is returned, and so is every cut, every exchange, and
//! every shard that is whole and of another checkpoint.
//!
//! Always holds: after each damage the step's load fails as `Corrupt` or `NotFound`, never with a
//! panic and never with a byte, right or wrong; `verify` reports it; the store's other step loads
//! as before; and the damage undone, the step loads again.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use dtr_engine::config::Compression;
use dtr_engine::format::checksum::to_hex;
use dtr_engine::format::manifest::{Manifest, ShardEntry};
use dtr_engine::format::names::{
    AttemptId, MANIFEST_FILE, parse_shard_file, shard_file_name, step_dir_name,
};
use dtr_engine::format::shard::{BLOCK_BYTES, Footer, Header, block_crc32c};
use dtr_engine::{Config, Engine, EngineError};
use fastrand::Rng;

use super::budget::{self, Budget, scratch};
use super::check::Tools;
use super::state::{self, CHUNK_BYTES, State};

/// Bits that are flipped, and lengths that are tried, when nobody asks for more.
const SHORT: u64 = 20_000;
/// The step that is damaged.
const STEP: u64 = 2;
/// The one beside it.
const OTHER: u64 = 1;

/// A store of two checkpoints, one of which gets damaged.
struct Victim {
    store: PathBuf,
    state: State,
    other: State,
    tools: Tools,
    reader: Engine,
}

/// Ways to make a shard.
#[derive(Clone, Copy)]
enum Shape {
    /// Six chunks that zstd shrinks to two blocks each: a file of about 64 KiB.
    Small,
    /// Four chunks as they are, all equally long.
    Equal,
}

impl Victim {
    fn new(directory: &Path, shape: Shape) -> Self {
        Self::of(directory, shape, 2)
    }

    /// The damaged step's state is made from a seed.
    fn of(directory: &Path, shape: Shape, seed: u64) -> Self {
        let store = directory.join("store");
        let chunk = CHUNK_BYTES as usize;
        let (state, other, compression) = match shape {
            Shape::Small => (
                State::repetitive(seed, &[6 * chunk]),
                State::repetitive(1, &[6 * chunk]),
                Compression::Zstd,
            ),
            Shape::Equal => {
                (State::new(seed, &[4 * chunk]), State::new(1, &[4 * chunk]), Compression::None)
            }
        };
        let tools = Tools::new();
        let config = Config { compression, ..state::config(&store) };
        let writer = state::open(config.clone(), &tools.io, &tools.ids).unwrap();
        for (step, state) in [(OTHER, &other), (STEP, &state)] {
            state::finish(&writer.save(state.request(step, 0)).unwrap()).unwrap();
        }
        drop(writer);
        let config = Config { read_only: true, ..config };
        let reader = state::open(config, &tools.io, &tools.ids).unwrap();
        let victim = Self { store, state, other, tools, reader };
        victim.expect_whole("before any damage");
        victim
    }

    fn directory(&self, step: u64) -> PathBuf {
        self.store.join(step_dir_name(step))
    }

    fn manifest_path(&self) -> PathBuf {
        self.directory(STEP).join(MANIFEST_FILE)
    }

    fn shard_path(&self, step: u64) -> PathBuf {
        let manifest = self.reader.manifest(step).unwrap();
        self.directory(step).join(&manifest.shards[0].file)
    }

    /// The step is whole.
    fn expect_whole(&self, when: &str) {
        let checkpoint = self.reader.checkpoint(STEP).unwrap_or_else(|error| {
            panic!("{when}: {error}");
        });
        assert!(self.state.is_in(&checkpoint).unwrap(), "{when}: wrong bytes");
        assert_eq!(self.reader.verify(STEP, &()).unwrap().damage, [], "{when}");
    }

    /// The step is damaged, and every check finds that.
    fn expect_damage(&self) -> Result<(), String> {
        self.expect_damage_of_rank(&self.reader, 0)
    }

    fn expect_damage_of_rank(&self, reader: &Engine, rank: u32) -> Result<(), String> {
        let loaded = reader
            .checkpoint_of_rank(STEP, rank)
            .and_then(|checkpoint| self.state.is_in(&checkpoint));
        match loaded {
            Err(EngineError::Corrupt { .. } | EngineError::NotFound { .. }) => {}
            Err(error) => return Err(format!("the load fails, and not as damaged: {error}")),
            Ok(true) => return Err("the load does not notice; its bytes are right".into()),
            Ok(false) => return Err("the load gives wrong bytes".into()),
        }
        match reader.verify(STEP, &()) {
            Ok(report) if report.damage.is_empty() => Err("verify reports no damage".into()),
            Ok(_) => Ok(()),
            Err(error) => Err(format!("verify fails: {error}")),
        }
    }

    /// Whatever was done to one step, the other one is whole.
    fn expect_other(&self) {
        assert!(self.other.is_in(&self.reader.checkpoint(OTHER).unwrap()).unwrap());
    }
}

/// A file of the damaged step: its bytes as they should be, and the file.
struct Part {
    path: PathBuf,
    bytes: Vec<u8>,
    file: File,
}

impl Part {
    fn of(path: PathBuf) -> Self {
        let bytes = fs::read(&path).unwrap();
        let file = File::options().write(true).open(&path).unwrap();
        Self { path, bytes, file }
    }

    /// Shard and manifest.
    fn both(victim: &Victim) -> [Self; 2] {
        [Self::of(victim.shard_path(STEP)), Self::of(victim.manifest_path())]
    }

    /// Changes the file to `bytes`, calls `work`, and changes it back.
    fn with<T>(&self, bytes: &[u8], work: impl FnOnce() -> T) -> T {
        fs::write(&self.path, bytes).unwrap();
        let result = work();
        fs::write(&self.path, &self.bytes).unwrap();
        result
    }

    fn with_flipped<T>(&self, bit: usize, work: impl FnOnce() -> T) -> T {
        let at = bit / 8;
        self.file.write_all_at(&[self.bytes[at] ^ (1 << (bit % 8))], at as u64).unwrap();
        let result = work();
        self.file.write_all_at(&self.bytes[at..=at], at as u64).unwrap();
        result
    }

    fn with_length<T>(&self, length: usize, work: impl FnOnce() -> T) -> T {
        self.file.set_len(length as u64).unwrap();
        let result = work();
        self.file.write_all_at(&self.bytes, 0).unwrap();
        self.file.set_len(self.bytes.len() as u64).unwrap();
        result
    }
}

/// The `number`-th of `count` things, each once, so that the first ones are everywhere.
fn spread(number: usize, count: usize) -> usize {
    // A prime larger than any count here, so it has no common factor with one.
    const STRIDE: usize = 1_000_000_007;
    number * STRIDE % count
}

/// Which file, and which of the things in it: `counts` are those of the shard and the manifest.
fn locate(number: usize, counts: [usize; 2]) -> (usize, usize) {
    let at = spread(number, counts[0] + counts[1]);
    if at < counts[0] { (0, at) } else { (1, at - counts[0]) }
}

fn start(directory: &Path) -> (Victim, [Part; 2]) {
    let victim = Victim::new(directory, Shape::Small);
    let parts = Part::both(&victim);
    (victim, parts)
}

fn again(number: u64, why: &str) -> String {
    format!("{why}\nagain with DTR_TORTURE_FIRST={number} DTR_TORTURE_STATES=1")
}

/// Numbers of bytes of the shard and the manifest, which are the same in every such store.
fn lengths() -> [usize; 2] {
    let directory = scratch();
    let (_victim, parts) = start(directory.path());
    parts.map(|part| part.bytes.len())
}

#[test]
fn every_flipped_bit_is_found_before_a_tensor_is_returned() {
    let bytes = lengths();
    assert!((48 << 10..96 << 10).contains(&bytes[0]), "a shard of about 64 KiB: {bytes:?}");
    let bits = bytes.map(|bytes| 8 * bytes);
    let all = (bits[0] + bits[1]) as u64;
    let outcome = budget::run(Budget::of(SHORT), all, start, |(victim, parts), number| {
        let (part, bit) = locate(usize::try_from(number).unwrap(), bits);
        let found = parts[part].with_flipped(bit, || victim.expect_damage());
        found.map(|()| true).map_err(|why| {
            again(number, &format!("bit {bit} of `{}`: {why}", parts[part].path.display()))
        })
    });
    println!("{} of {all} bits flipped, each found by load and verify", outcome.tried);
}

#[test]
fn every_truncation_is_found_before_a_tensor_is_returned() {
    let bytes = lengths();
    let is_near_block = |length: &usize| matches!(length % 512, 0 | 1 | 511);
    // Without a budget from outside: those near the blocks of a device, and a few beyond the end.
    let is_full = std::env::var_os("DTR_TORTURE_STATES").is_some();
    let tried = bytes.map(|bytes| {
        let beyond = [bytes + 1, bytes + 512, bytes + 4096];
        let shorter = (0..bytes).filter(|length| is_full || is_near_block(length));
        shorter.chain(beyond).collect::<Vec<_>>()
    });
    let counts = [tried[0].len(), tried[1].len()];
    let all = (counts[0] + counts[1]) as u64;
    let outcome = budget::run(Budget::of(all), all, start, |(victim, parts), number| {
        let (part, which) = locate(usize::try_from(number).unwrap(), counts);
        let length = tried[part][which];
        let found = parts[part].with_length(length, || victim.expect_damage());
        found.map(|()| true).map_err(|why| {
            let path = parts[part].path.display();
            again(number, &format!("`{path}` cut to {length} bytes: {why}"))
        })
    });
    println!("{} of {all} lengths tried, each found by load and verify", outcome.tried);
}

/// Exchanges two ranges of `part` that are equally long; true if that changes anything.
fn exchange(victim: &Victim, part: &Part, one: usize, other: usize, length: usize) -> bool {
    let mut bytes = part.bytes.clone();
    bytes[one..one + length].copy_from_slice(&part.bytes[other..other + length]);
    bytes[other..other + length].copy_from_slice(&part.bytes[one..one + length]);
    if bytes == part.bytes {
        return false;
    }
    part.with(&bytes, || victim.expect_damage())
        .unwrap_or_else(|why| panic!("{length} bytes at {one} and {other} exchanged: {why}"));
    true
}

#[test]
fn exchanged_chunks_and_blocks_are_found_before_a_tensor_is_returned() {
    let mut exchanged = 0;
    for (shape, length) in [(Shape::Equal, CHUNK_BYTES as usize), (Shape::Small, BLOCK_BYTES)] {
        let directory = scratch();
        let victim = Victim::new(directory.path(), shape);
        let part = Part::of(victim.shard_path(STEP));
        let starts: Vec<usize> = match shape {
            Shape::Equal => (0..4).map(|chunk| BLOCK_BYTES + chunk * length).collect(),
            Shape::Small => (0..part.bytes.len()).step_by(length).collect(),
        };
        let before = exchanged;
        for (number, one) in starts.iter().enumerate() {
            for other in &starts[number + 1..] {
                exchanged += u32::from(exchange(&victim, &part, *one, *other, length));
            }
        }
        let pairs = u32::try_from(starts.len() * (starts.len() - 1) / 2).unwrap();
        assert_eq!(exchanged - before, pairs, "no two chunks or blocks are equal");
        victim.expect_other();
        victim.expect_whole("every exchange undone");
    }
    println!("{exchanged} pairs of chunks and blocks exchanged, each found by load and verify");
}

#[test]
fn files_that_are_gone_or_of_another_step_or_attempt_are_found() {
    let directory = scratch();
    let victim = Victim::new(directory.path(), Shape::Equal);
    let old = fs::read(victim.shard_path(STEP)).unwrap();
    let old_manifest = fs::read(victim.manifest_path()).unwrap();
    let config = Config { compression: Compression::None, ..state::config(&victim.store) };
    let writer = state::open(config, &victim.tools.io, &victim.tools.ids).unwrap();
    let mut request = victim.state.request(STEP, 0);
    request.rewind = true;
    state::finish(&writer.save(request).unwrap()).unwrap();
    drop(writer);
    victim.expect_whole("saved once more");
    let [shard, manifest] = Part::both(&victim);
    let expect = |what: &str, part: &Part, bytes: &[u8]| {
        assert!(part.bytes != bytes, "{what}: it is the same file");
        part.with(bytes, || victim.expect_damage()).unwrap_or_else(|why| panic!("{what}: {why}"));
        victim.expect_other();
        victim.expect_whole(what);
    };
    assert_eq!(old.len(), shard.bytes.len(), "the length gives nothing away");
    expect("the shard of an earlier attempt", &shard, &old);
    expect("the shard of another step", &shard, &fs::read(victim.shard_path(OTHER)).unwrap());
    let other_manifest = fs::read(victim.directory(OTHER).join(MANIFEST_FILE)).unwrap();
    expect("the manifest of another step", &manifest, &other_manifest);
    expect("the manifest in the shard's place", &shard, &manifest.bytes);
    expect("the shard in the manifest's place", &manifest, &shard.bytes);
    // The earlier attempt is still there, whole: its manifest brings it back, as itself.
    manifest.with(&old_manifest, || victim.expect_whole("the manifest of an earlier attempt"));
    let away = shard.path.with_extension("away");
    fs::rename(&shard.path, &away).unwrap();
    victim.expect_damage().unwrap();
    fs::rename(&away, &shard.path).unwrap();
    victim.expect_whole("the shard back");
}

/// A shard as another rank, step, attempt or number of ranks would have written it: every checksum
/// within it is right.
fn rewritten(shard: &[u8], change: impl FnOnce(&mut Header)) -> Vec<u8> {
    let mut bytes = shard.to_vec();
    let first: &[u8; BLOCK_BYTES] = shard.first_chunk().unwrap();
    let last: &[u8; BLOCK_BYTES] = shard.last_chunk().unwrap();
    let mut header = Header::decode(first).unwrap();
    change(&mut header);
    let mut footer = Footer::decode(last, shard.len() as u64).unwrap();
    let block = header.encode();
    footer.attempt = header.attempt;
    footer.header_crc32c = block_crc32c(&block);
    bytes[..BLOCK_BYTES].copy_from_slice(&block);
    bytes[shard.len() - BLOCK_BYTES..].copy_from_slice(&footer.encode());
    bytes
}

fn entry_of(shard: &[u8], like: &ShardEntry) -> ShardEntry {
    let footer_crc32c = to_hex(block_crc32c(shard.last_chunk().unwrap()));
    ShardEntry { footer_crc32c, ..like.clone() }
}

#[test]
fn a_whole_shard_of_another_step_rank_or_attempt_is_found() {
    let directory = scratch();
    let victim = Victim::new(directory.path(), Shape::Equal);
    let [shard, manifest] = Part::both(&victim);
    let ours = Manifest::decode(&manifest.bytes).unwrap();
    // The same step, rank and attempt of a store whose ids are counted as here.
    let elsewhere = scratch();
    let twin = Victim::of(elsewhere.path(), Shape::Equal, 5);
    let strangers = [
        ("state", fs::read(twin.shard_path(STEP)).unwrap()),
        ("step", rewritten(&shard.bytes, |header| header.step += 1)),
        ("attempt", rewritten(&shard.bytes, |header| header.attempt = AttemptId([7; 16]))),
        ("number of ranks", rewritten(&shard.bytes, |header| header.world_size = 2)),
        (
            "rank",
            rewritten(&shard.bytes, |header| {
                header.world_size = 2;
                header.rank = 1;
            }),
        ),
    ];
    assert_eq!(rewritten(&shard.bytes, |_| ()), shard.bytes, "what is not changed is the same");
    for (what, stranger) in &strangers {
        shard.with(stranger, || {
            victim.expect_damage().unwrap_or_else(|why| panic!("another {what}: {why}"));
            // Nor does it pass where the manifest holds its very digest: its identity is checked. A
            // state has none but its digest.
            if *what == "state" {
                return;
            }
            let shards = vec![entry_of(stranger, &ours.shards[0])];
            let signed = Manifest { shards, ..ours.clone() }.encode().unwrap();
            manifest.with(&signed, || {
                victim.expect_damage().unwrap_or_else(|why| panic!("signed, {what}: {why}"));
            });
        });
        victim.expect_whole(what);
    }
}

#[test]
fn shards_of_two_ranks_exchanged_are_found() {
    let directory = scratch();
    let victim = Victim::new(directory.path(), Shape::Equal);
    let [shard, manifest] = Part::both(&victim);
    let ours = Manifest::decode(&manifest.bytes).unwrap();
    let (_, attempt) = parse_shard_file(&ours.shards[0].file).unwrap();
    let of_rank = |rank| {
        rewritten(&shard.bytes, |header| {
            header.world_size = 2;
            header.rank = rank;
        })
    };
    let (zero, one) = (of_rank(0), of_rank(1));
    let second = ShardEntry {
        file: shard_file_name(1, attempt),
        rank: 1,
        ..entry_of(&one, &ours.shards[0])
    };
    let second_path = victim.directory(STEP).join(&second.file);
    let shards = vec![entry_of(&zero, &ours.shards[0]), second];
    let both = Manifest { shards, world_size: 2, ..ours }.encode().unwrap();
    fs::write(&manifest.path, both).unwrap();
    let reader = &victim.reader;
    let put = |first: &[u8], second: &[u8]| {
        fs::write(&shard.path, first).unwrap();
        fs::write(&second_path, second).unwrap();
    };
    put(&zero, &one);
    for rank in [0, 1] {
        assert!(victim.state.is_in(&reader.checkpoint_of_rank(STEP, rank).unwrap()).unwrap());
    }
    assert_eq!(reader.verify(STEP, &()).unwrap().damage, [], "a checkpoint of two ranks");
    put(&one, &zero);
    for rank in [0, 1] {
        victim.expect_damage_of_rank(reader, rank).unwrap();
    }
    assert_eq!(reader.verify(STEP, &()).unwrap().damage.len(), 2, "both are reported");
}

#[test]
fn damage_of_several_places_is_found_too() {
    let directory = scratch();
    let (victim, [shard, manifest]) = start(directory.path());
    let mut random = Rng::with_seed(3);
    for _ in 0..500 {
        let part = if random.usize(..4) == 0 { &manifest } else { &shard };
        let mut bytes = part.bytes.clone();
        let count = bytes.len();
        match random.usize(..3) {
            // A stretch of zeros, of garbage, or of what stands elsewhere in the file.
            0 => {
                let at = random.usize(..count);
                bytes[at..count.min(at + 4096)].fill(0);
            }
            1 => {
                let at = random.usize(..count);
                let garbage = state::bytes(&mut random, count.min(at + 512) - at);
                bytes[at..at + garbage.len()].copy_from_slice(&garbage);
            }
            _ => {
                let (from, to) = (random.usize(..count), random.usize(..count));
                let length = (count - from).min(count - to).min(4096);
                bytes.copy_within(from..from + length, to);
            }
        }
        if bytes != part.bytes {
            part.with(&bytes, || victim.expect_damage()).unwrap();
        }
    }
    victim.expect_other();
    victim.expect_whole("all damage undone");
}

#[test]
fn the_numbers_reach_every_bit_once() {
    let counts = [4_001, 90];
    let mut reached: Vec<_> = (0..4_091).map(|number| locate(number, counts)).collect();
    reached.sort_unstable();
    reached.dedup();
    assert_eq!(reached.len(), 4_091);
    let manifest = (0..1_000).filter(|number| locate(*number, counts).0 == 1).count();
    assert!(manifest > 10, "the first numbers reach both files: {manifest}");
}
