//! The manifest: the record whose existence commits a checkpoint.
//!
//! ```text
//! {"crc32c":"89abcdef",      the checksum covers every byte after this comma
//!   "attempt": "...",
//!   ...
//! }
//! ```
//!
//! Always holds: one manifest has one encoding (keys sorted, fixed layout); nothing is parsed
//! before its checksum is right; a manifest that was decoded names exactly one shard per rank, by
//! the one file name that our own rules give it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::FormatError;
use super::checksum::{crc32c, from_hex, to_hex};
use super::names::{AttemptId, shard_file_name};
use super::shard::{REGION_ALIGNMENT, check_version};

/// Version of the format that this engine writes.
pub const FORMAT_VERSION: u32 = 1;
/// Most bytes of a manifest.
pub(crate) const MANIFEST_BYTES_MAX: u64 = 64 << 20;
/// Deepest nesting of arrays and objects within one entry of the metadata or dataset positions.
const METADATA_DEPTH_MAX: usize = 64;
/// Values and objects that any manifest may have, and the bytes that each one more takes: a parsed
/// value is many times as long as its text, and what a rank's shard takes is longer than this.
const VALUES_FREE: u64 = 1 << 16;
const VALUE_TEXT_BYTES_MIN: u64 = 20;
const OBJECTS_FREE: u64 = 1 << 13;
const OBJECT_TEXT_BYTES_MIN: u64 = 192;
/// Most bytes of a job's name.
pub(crate) const JOB_BYTES_MAX: usize = 255;

const PREFIX_START: &str = "{\"crc32c\":\"";
const PREFIX_END: &str = "\",";

/// Everything a manifest says. Whichever rank publishes it: the first one to be there counts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// The attempt, as 32 hex digits.
    pub attempt: String,
    /// Milliseconds since 1970, UTC, when the attempt began.
    pub created_unix_ms: u64,
    /// Positions of datasets, by name.
    pub dataset_positions: BTreeMap<String, Value>,
    /// Version of the engine that wrote it.
    pub engine_version: String,
    /// [`FORMAT_VERSION`] of the writer.
    pub format_version: u32,
    /// The training run.
    pub job: String,
    /// What the user attached.
    pub metadata: BTreeMap<String, Value>,
    /// Later checkpoints that this one retires (a rewind), or that were before: they do not exist.
    pub retired: Vec<Retired>,
    /// One per rank, by rank.
    pub shards: Vec<ShardEntry>,
    /// The training step.
    pub step: u64,
    /// Ranks that saved it together.
    pub world_size: u32,
}

/// A checkpoint that was discarded when the manifest naming it was published.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Retired {
    /// Its attempt: a later checkpoint of the same step is another one.
    pub attempt: String,
    /// Its step.
    pub step: u64,
}

/// A shard as its manifest knows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardEntry {
    /// Length of the file.
    pub bytes: u64,
    /// File name, by our own rules.
    pub file: String,
    /// [`block_crc32c`](super::shard::block_crc32c) of the footer, as 8 hex digits.
    pub footer_crc32c: String,
    /// The writer.
    pub rank: u32,
    /// Bytes of the raw layout.
    pub raw_bytes: u64,
    /// Display paths of the entries that this shard holds for every rank.
    pub replicated: Vec<String>,
}

impl Manifest {
    /// The file's bytes. Fails on what [`Manifest::decode`] would refuse.
    pub fn encode(&self) -> Result<Vec<u8>, FormatError> {
        self.validate()?;
        let text = serde_json::to_string_pretty(self)
            .map_err(|error| FormatError::Damaged(format!("the manifest is no JSON: {error}")))?;
        let body = format!("{}\n", text.strip_prefix('{').unwrap_or(&text));
        let crc = to_hex(crc32c(body.as_bytes()));
        let bytes = format!("{PREFIX_START}{crc}{PREFIX_END}{body}").into_bytes();
        check_bytes(&bytes)?;
        check_density(&bytes)?;
        Ok(bytes)
    }

    /// Reads a file's bytes: size, checksum, version, then everything else.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        check_bytes(bytes)?;
        check_crc(bytes)?;
        // This skips all else, and takes no memory for it.
        check_version(parse::<Version>(bytes)?.format_version, "manifest")?;
        check_density(bytes)?;
        let manifest: Self = parse(bytes)?;
        manifest.validate()?;
        Ok(manifest)
    }

    /// The attempt that wrote the checkpoint.
    pub fn attempt_id(&self) -> Result<AttemptId, FormatError> {
        parse_attempt(&self.attempt)
    }

    /// Bytes of all shards' files, as they are said to be.
    pub fn stored_bytes(&self) -> u64 {
        total_bytes(self.shards.iter().map(|shard| shard.bytes))
    }

    /// Bytes of what all ranks saved, before compression, as they are said to be.
    pub fn raw_bytes(&self) -> u64 {
        total_bytes(self.shards.iter().map(|shard| shard.raw_bytes))
    }

    /// The number of this name that the user attached, if one is.
    pub(crate) fn metric(&self, name: &str) -> Option<f64> {
        self.metadata.get(name)?.as_f64().filter(|value| value.is_finite())
    }

    /// Checks the fields that say nothing of the shards.
    fn validate_identity(&self) -> Result<(), FormatError> {
        check_version(self.format_version, "manifest")?;
        self.attempt_id()?;
        ensure!(
            (1..=JOB_BYTES_MAX).contains(&self.job.len()),
            "the manifest's job has a name of {} bytes, expected 1 to {JOB_BYTES_MAX}",
            self.job.len()
        );
        for (name, value) in self.metadata.iter().chain(&self.dataset_positions) {
            ensure!(
                !nests_deeper(value, METADATA_DEPTH_MAX),
                "the manifest's metadata `{name}` nests deeper than {METADATA_DEPTH_MAX}"
            );
        }
        self.retired.iter().try_for_each(|retired| retired.attempt_id().map(|_| ()))
    }

    fn validate(&self) -> Result<(), FormatError> {
        self.validate_identity()?;
        let attempt = self.attempt_id()?;
        ensure!(
            self.world_size > 0 && self.shards.len() as u64 == u64::from(self.world_size),
            "the manifest names {} shards, expected one for each of {} ranks",
            self.shards.len(),
            self.world_size
        );
        self.shards.iter().zip(0..).try_for_each(|(shard, rank)| shard.validate(rank, attempt))
    }
}

/// The sum of numbers of bytes that somebody else wrote down: it stops at the largest number.
pub fn total_bytes(sizes: impl Iterator<Item = u64>) -> u64 {
    sizes.fold(0, u64::saturating_add)
}

impl Retired {
    /// The attempt that is retired.
    pub(crate) fn attempt_id(&self) -> Result<AttemptId, FormatError> {
        parse_attempt(&self.attempt)
    }
}

impl ShardEntry {
    /// [`ShardEntry::footer_crc32c`] as a number.
    fn footer_crc(&self) -> Result<u32, FormatError> {
        from_hex(&self.footer_crc32c).ok_or_else(|| {
            FormatError::Damaged(format!(
                "the manifest has a footer checksum `{}`, expected 8 lower-case hex digits",
                self.footer_crc32c
            ))
        })
    }

    fn validate(&self, rank: u32, attempt: AttemptId) -> Result<(), FormatError> {
        ensure!(
            self.rank == rank,
            "the manifest names rank {} where rank {rank} is expected",
            self.rank
        );
        let expected = shard_file_name(rank, attempt);
        ensure!(
            self.file == expected,
            "the manifest names shard file `{}`, expected `{expected}`",
            self.file
        );
        // What a shard of this length must hold is for its footer to say.
        ensure!(
            self.bytes.is_multiple_of(REGION_ALIGNMENT),
            "the manifest gives shard {rank} {} bytes, expected a multiple of {REGION_ALIGNMENT}",
            self.bytes
        );
        self.footer_crc().map(|_| ())
    }
}

/// The one field that every version has.
#[derive(Deserialize)]
struct Version {
    format_version: u32,
}

fn check_bytes(bytes: &[u8]) -> Result<(), FormatError> {
    ensure!(
        bytes.len() as u64 <= MANIFEST_BYTES_MAX,
        "the manifest has {} bytes, at most {MANIFEST_BYTES_MAX}",
        bytes.len()
    );
    Ok(())
}

/// Checks, before they are parsed, that the values will take memory in proportion to the bytes.
fn check_density(bytes: &[u8]) -> Result<(), FormatError> {
    let text_bytes = bytes.len() as u64;
    let (values, objects) = count_values(bytes);
    let values_max = VALUES_FREE + text_bytes / VALUE_TEXT_BYTES_MIN;
    let objects_max = OBJECTS_FREE + text_bytes / OBJECT_TEXT_BYTES_MIN;
    ensure!(
        values <= values_max && objects <= objects_max,
        "the manifest has about {values} values and {objects} objects in {text_bytes} bytes, \
         expected at most {values_max} and {objects_max}: large data belongs in the state"
    );
    Ok(())
}

/// About how many values and objects JSON text holds; a list counts twice, for its own memory.
fn count_values(text: &[u8]) -> (u64, u64) {
    let (mut values, mut objects) = (0, 0);
    let (mut in_string, mut escaped) = (false, false);
    for byte in text {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_string => escaped = true,
            b'"' => in_string = !in_string,
            _ if in_string => {}
            b',' => values += 1,
            b'[' => values += 2,
            b'{' => objects += 1,
            _ => {}
        }
    }
    (values, objects)
}

/// Checks the checksum in the prefix against the bytes after it.
fn check_crc(bytes: &[u8]) -> Result<(), FormatError> {
    ensure!(!bytes.is_empty(), "the manifest is empty");
    let Some((expected, body)) = split_prefix(bytes) else {
        return Err(FormatError::Damaged(format!(
            "the manifest does not begin with `{PREFIX_START}xxxxxxxx{PREFIX_END}`"
        )));
    };
    let actual = crc32c(body);
    ensure!(actual == expected, "the manifest's checksum is {actual:08x}, expected {expected:08x}");
    Ok(())
}

fn split_prefix(bytes: &[u8]) -> Option<(u32, &[u8])> {
    let (crc, body) = bytes.strip_prefix(PREFIX_START.as_bytes())?.split_at_checked(8)?;
    let crc = from_hex(str::from_utf8(crc).ok()?)?;
    Some((crc, body.strip_prefix(PREFIX_END.as_bytes())?))
}

/// The parser bounds nesting itself, at 128.
fn parse<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> Result<T, FormatError> {
    serde_json::from_slice(bytes)
        .map_err(|error| FormatError::Damaged(format!("the manifest is malformed: {error}")))
}

fn parse_attempt(text: &str) -> Result<AttemptId, FormatError> {
    AttemptId::parse(text).ok_or_else(|| {
        FormatError::Damaged(format!(
            "the manifest has an attempt `{text}`, expected 32 lower-case hex digits"
        ))
    })
}

/// Whether arrays and objects nest deeper than `depth_max`. The recursion ends there.
fn nests_deeper(value: &Value, depth_max: usize) -> bool {
    let below = |child: &Value| nests_deeper(child, depth_max - 1);
    match value {
        Value::Array(items) => depth_max == 0 || items.iter().any(below),
        Value::Object(entries) => depth_max == 0 || entries.values().any(below),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    const ATTEMPT: &str = "00112233445566778899aabbccddeeff";

    fn shard(rank: u32) -> ShardEntry {
        ShardEntry {
            bytes: 12_288,
            file: shard_file_name(rank, AttemptId::parse(ATTEMPT).unwrap()),
            footer_crc32c: "0123abcd".into(),
            rank,
            raw_bytes: 100,
            replicated: vec!["model.*".into()],
        }
    }

    fn sample() -> Manifest {
        Manifest {
            attempt: ATTEMPT.into(),
            created_unix_ms: 1_700_000_000_000,
            dataset_positions: BTreeMap::from([("text".into(), json!({"epoch": 1, "next": 7}))]),
            engine_version: "0.1.0".into(),
            format_version: FORMAT_VERSION,
            job: "gpt".into(),
            metadata: BTreeMap::from([("loss".into(), json!(0.1)), ("b".into(), json!([1, null]))]),
            retired: vec![Retired { attempt: ATTEMPT.into(), step: 2000 }],
            shards: vec![shard(0), shard(1)],
            step: u64::MAX,
            world_size: 2,
        }
    }

    #[test]
    fn sums_of_what_somebody_wrote_down_do_not_overflow() {
        let large = ShardEntry { bytes: u64::MAX - 4095, raw_bytes: u64::MAX, ..shard(0) };
        let manifest = Manifest { shards: vec![large, shard(1)], ..sample() };
        assert_eq!((manifest.stored_bytes(), manifest.raw_bytes()), (u64::MAX, u64::MAX));
        assert_eq!((sample().stored_bytes(), sample().raw_bytes()), (24_576, 200));
    }

    /// Bytes with a right checksum, whatever the body.
    fn seal(body: &str) -> Vec<u8> {
        let crc = to_hex(crc32c(body.as_bytes()));
        format!("{PREFIX_START}{crc}{PREFIX_END}{body}").into_bytes()
    }

    /// The manifest's bytes without the writer's checks.
    fn encode_unchecked(manifest: &Manifest) -> Vec<u8> {
        seal(serde_json::to_string(manifest).unwrap().strip_prefix('{').unwrap())
    }

    #[track_caller]
    fn assert_damaged(bytes: &[u8], expected: &str) {
        match Manifest::decode(bytes) {
            Err(FormatError::Damaged(why)) if why.contains(expected) => {}
            other => panic!("expected an error with `{expected}`, got {other:?}"),
        }
    }

    #[track_caller]
    fn assert_change_refused(change: impl Fn(&mut Manifest), expected: &str) {
        let mut manifest = sample();
        change(&mut manifest);
        assert_damaged(&encode_unchecked(&manifest), expected);
        let why = manifest.encode().expect_err("the writer accepts it").to_string();
        assert!(why.contains(expected), "{why}");
    }

    #[test]
    fn a_manifest_round_trips() {
        let bytes = sample().encode().unwrap();
        assert_eq!(Manifest::decode(&bytes), Ok(sample()));
        assert_eq!(Manifest::decode(&bytes).unwrap().encode().unwrap(), bytes);
    }

    #[test]
    fn keys_are_sorted_at_every_level() {
        let mut manifest = sample();
        manifest.metadata.insert("nested".into(), json!({"z": 1, "a": {"y": 1, "b": 2}, "m": 3}));
        let text = String::from_utf8(manifest.encode().unwrap()).unwrap();
        let compact: String = text.split_whitespace().collect();
        assert!(compact.contains(r#""nested":{"a":{"b":2,"y":1},"m":3,"z":1}"#), "{text}");
        let top: Vec<&str> = text
            .lines()
            .filter_map(|line| line.strip_prefix("  \""))
            .filter_map(|line| line.split('"').next())
            .collect();
        assert!(top.len() == 11 && top.is_sorted(), "{top:?}");
    }

    #[test]
    fn every_flipped_bit_is_refused() {
        let bytes = sample().encode().unwrap();
        for bit in 0..bytes.len() * 8 {
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            let result = Manifest::decode(&flipped);
            assert!(matches!(result, Err(FormatError::Damaged(_))), "bit {bit}: {result:?}");
        }
    }

    #[test]
    fn every_truncation_is_refused() {
        let bytes = sample().encode().unwrap();
        for length in 0..bytes.len() {
            assert!(Manifest::decode(&bytes[..length]).is_err(), "cut to {length} bytes");
        }
        assert_damaged(&[&bytes[..], b"\n"].concat(), "checksum");
    }

    #[test]
    fn checksums_come_before_parsing() {
        assert_damaged(b"", "is empty");
        assert_damaged(b"{}", "does not begin with");
        assert_damaged(br#"{"crc32c":"0000000G","a":1}"#, "does not begin with");
        assert_damaged(br#"{"crc32c":"00000000",not json"#, "checksum");
        assert_damaged(&seal("not json"), "malformed");
        assert_damaged(&seal("}"), "malformed");
        let deep = format!("\"format_version\":1,\"metadata\":{{\"a\":{}", "[".repeat(10_000));
        assert_damaged(&seal(&deep), "malformed");
        assert_damaged(&seal(&format!("{deep}{}}}}}", "]".repeat(10_000))), "recursion");
        let too_large = usize::try_from(MANIFEST_BYTES_MAX).unwrap() + 1;
        assert_damaged(&vec![b' '; too_large], "at most 67108864");
    }

    #[test]
    fn more_values_than_their_text_is_worth_are_refused() {
        let with_values = |count: usize| {
            let metadata = BTreeMap::from([("x".to_owned(), json!(vec![0; count]))]);
            Manifest { metadata, ..sample() }
        };
        let few = with_values(60_000);
        assert_eq!(Manifest::decode(&few.encode().unwrap()), Ok(few));
        let why = with_values(200_000).encode().unwrap_err().to_string();
        assert!(why.contains("large data belongs in the state"), "{why}");
        for (item, count) in
            [("0,", 200_000), ("[],", 100_000), ("{},", 20_000), ("{\"\":[0]},", 15_000)]
        {
            let items = item.repeat(count);
            let dense = format!("\"format_version\":1,\"metadata\":{{\"a\":[{items}0]}}}}");
            assert_damaged(&seal(&dense), "large data belongs in the state");
        }
        // What stands in a string is no value.
        let text = BTreeMap::from([("x".to_owned(), json!("[{,\\\"".repeat(100_000)))]);
        let text = Manifest { metadata: text, ..sample() };
        assert_eq!(Manifest::decode(&text.encode().unwrap()), Ok(text));
        // A hundred thousand ranks are fine.
        let attempt = sample().attempt_id().unwrap();
        let like = sample().shards[0].clone();
        let shard =
            |rank| ShardEntry { rank, file: shard_file_name(rank, attempt), ..like.clone() };
        let shards = (0..100_000).map(shard).collect();
        let wide = Manifest { shards, world_size: 100_000, ..sample() };
        assert!(Manifest::decode(&wide.encode().unwrap()) == Ok(wide));
    }

    #[test]
    fn a_newer_version_says_so_whatever_else_it_holds() {
        let bytes = seal("\"format_version\":2,\"shards\":\"elsewhere\"}");
        let Err(FormatError::Newer(why)) = Manifest::decode(&bytes) else {
            panic!("version 2 was taken for damage")
        };
        assert!(why.contains("format version 2"), "{why}");
        assert_change_refused(|manifest| manifest.format_version = 0, "format version 0");
    }

    #[test]
    fn fields_that_no_writer_wrote_are_refused() {
        assert_change_refused(|manifest| manifest.attempt = ATTEMPT.to_uppercase(), "an attempt");
        assert_change_refused(|manifest| manifest.attempt.clear(), "an attempt");
        assert_change_refused(|manifest| manifest.job.clear(), "name of 0 bytes");
        assert_change_refused(|manifest| manifest.job = "j".repeat(256), "name of 256 bytes");
        assert_change_refused(|manifest| manifest.retired[0].attempt = "0".into(), "an attempt");
        assert_change_refused(|manifest| manifest.world_size = 3, "2 shards");
        assert_change_refused(|manifest| manifest.shards.clear(), "0 shards");
        assert_change_refused(
            |manifest| {
                manifest.shards.clear();
                manifest.world_size = 0;
            },
            "0 shards",
        );
        assert_change_refused(|manifest| manifest.shards.swap(0, 1), "rank 1 where rank 0");
        assert_change_refused(|manifest| manifest.shards[1] = shard(0), "rank 0 where rank 1");
        let change_shard = |change: fn(&mut ShardEntry), expected: &str| {
            assert_change_refused(|manifest| change(&mut manifest.shards[1]), expected);
        };
        change_shard(|shard| shard.file = "../../etc/passwd".into(), "shard file");
        change_shard(|shard| shard.file = shard.file.replace("00001", "00000"), "shard file");
        change_shard(|shard| shard.file = shard.file.replace("00112233", "10112233"), "shard file");
        change_shard(|shard| shard.footer_crc32c = "123abcd".into(), "footer checksum");
        change_shard(|shard| shard.footer_crc32c = "0123ABCD".into(), "footer checksum");
        change_shard(|shard| shard.bytes += 1, "multiple of 4096");
    }

    #[test]
    fn metadata_nests_up_to_its_limit() {
        let nested = |depth: usize| (0..depth).fold(json!(1), |value, _| json!([value]));
        let mut manifest = sample();
        manifest.metadata.insert("deep".into(), nested(METADATA_DEPTH_MAX));
        assert_eq!(Manifest::decode(&manifest.encode().unwrap()), Ok(manifest));
        let expected = "`deep` nests deeper than 64";
        let deep = || ("deep".to_owned(), nested(METADATA_DEPTH_MAX + 1));
        assert_change_refused(|manifest| manifest.metadata.extend([deep()]), expected);
        assert_change_refused(|manifest| manifest.dataset_positions.extend([deep()]), expected);
    }

    #[test]
    fn unknown_keys_are_ignored() {
        let text = serde_json::to_string(&sample()).unwrap();
        let bytes = seal(&text.replacen('{', "\"later\":[1],", 1));
        assert_eq!(Manifest::decode(&bytes), Ok(sample()));
    }

    proptest! {
        #[test]
        fn numbers_and_texts_survive_exactly(
            step: u64,
            created_unix_ms: u64,
            raw_bytes: u64,
            pages in 0..u64::MAX / REGION_ALIGNMENT,
            footer_crc: u32,
            job in ".{1,60}",
            note: String,
            number in any::<f64>().prop_filter("JSON has no infinity", |number| number.is_finite()),
            integer: i64,
        ) {
            let mut manifest = sample();
            manifest.step = step;
            manifest.created_unix_ms = created_unix_ms;
            manifest.job = job;
            manifest.shards[0].raw_bytes = raw_bytes;
            manifest.shards[0].bytes = pages * REGION_ALIGNMENT;
            manifest.shards[0].footer_crc32c = to_hex(footer_crc);
            manifest.metadata.insert(note.clone(), json!([note, number, integer, step]));
            let decoded = Manifest::decode(&manifest.encode().unwrap()).unwrap();
            prop_assert_eq!(decoded.shards[0].footer_crc(), Ok(footer_crc));
            let bits = decoded.metadata[&note][1].as_f64().unwrap().to_bits();
            prop_assert_eq!(bits, number.to_bits());
            prop_assert_eq!(decoded, manifest);
        }

        #[test]
        fn garbage_is_refused(bytes: Vec<u8>, text: String) {
            prop_assert!(Manifest::decode(&bytes).is_err());
            prop_assert!(Manifest::decode(&seal(&text)).is_err());
        }
    }
}
