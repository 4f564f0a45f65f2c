//! The manifest: the record whose existence commits a checkpoint.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Version of the format that this engine writes.
pub const FORMAT_VERSION: u32 = 1;
/// Most bytes of a manifest.
pub const MANIFEST_BYTES_MAX: u64 = 64 << 20;

/// Everything a manifest says. Fixed when the attempt begins, so any rank publishes the same bytes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// The attempt, as 32 hex digits.
    pub attempt: String,
    /// Milliseconds since 1970, UTC, when the attempt began.
    pub created_unix_ms: u64,
    /// Positions of datasets, by name.
    pub dataset_positions: BTreeMap<String, serde_json::Value>,
    /// Version of the engine that wrote it.
    pub engine_version: String,
    /// [`FORMAT_VERSION`] of the writer.
    pub format_version: u32,
    /// The training run.
    pub job: String,
    /// What the user attached.
    pub metadata: BTreeMap<String, serde_json::Value>,
    /// Later checkpoints that this one retires (a rewind): they do not exist any more.
    pub retired: Vec<Retired>,
    /// One per rank, by rank.
    pub shards: Vec<ShardEntry>,
    /// The training step.
    pub step: u64,
    /// Ranks that saved it together.
    pub world_size: u32,
}

/// A checkpoint that ceased to exist when the manifest naming it was published.
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
    /// CRC-32C of the footer block, as 8 hex digits.
    pub footer_crc32c: String,
    /// The writer.
    pub rank: u32,
    /// Bytes of the raw layout.
    pub raw_bytes: u64,
    /// Display paths of the entries that this shard holds for every rank.
    pub replicated: Vec<String>,
}
