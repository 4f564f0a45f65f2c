//! Every setting of the engine, with its default, unit and range, checked in one place.
//!
//! Always holds: a [`Config`] that passed `Config::validate` needs no further checks anywhere;
//! unknown keys are refused when one is read from text.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::codec::Codec;
use crate::format::manifest::JOB_BYTES_MAX;
use crate::recovery::OwnShare;
use crate::{EngineError, Result};

mod s3;

pub(crate) use s3::S3Address;
pub use s3::{S3_SCHEME, S3Credentials, S3Settings};

/// How chunks are encoded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Compression {
    /// Chunk by chunk `float` or `none`, whichever gets the save done sooner.
    #[default]
    Auto,
    /// Raw bytes.
    None,
    /// Byte planes with Huffman coding, made for floating-point weights and moments.
    Float,
    /// Plain zstd.
    Zstd,
    /// Plain gzip: for interoperability only, it is slow.
    Gzip,
}

impl Compression {
    /// The codec that is fixed by this setting; `None` for `auto`, where each chunk decides.
    pub(crate) fn fixed_codec(self) -> Option<Codec> {
        match self {
            Self::Auto => None,
            Self::None => Some(Codec::None),
            Self::Float => Some(Codec::Float),
            Self::Zstd => Some(Codec::Zstd),
            Self::Gzip => Some(Codec::Gzip),
        }
    }
}

/// Which way bytes reach the device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum IoBackend {
    /// `uring` where the kernel allows it, else `threads`.
    #[default]
    Auto,
    /// io_uring; an error where the kernel refuses it.
    Uring,
    /// A pool of threads with `pwritev2` and `preadv2`.
    Threads,
}

/// Whether the page cache is bypassed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DirectIo {
    /// Direct where the filesystem takes it, else buffered.
    #[default]
    Auto,
    /// Direct; an error where the filesystem refuses it.
    On,
    /// Buffered.
    Off,
}

/// Which values of a metric are the better ones.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BestMode {
    /// Small ones, as of a loss.
    #[default]
    Min,
    /// Large ones, as of an accuracy.
    Max,
}

/// Settings of one engine, that is of one store as one process sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Directory of the store, created by a writer with its parents; or `s3://bucket/prefix`. No
    /// default.
    pub path: PathBuf,
    /// Name of the training run, written into manifests. Default `default`; 1 to 255 bytes.
    pub job: String,
    /// This process's rank. Default 0; less than `world_size`.
    pub rank: u32,
    /// Number of ranks that save together. Default 1; more need a coordinator to write, and a store
    /// that all of them reach.
    pub world_size: u32,
    /// Number of these ranks on this machine: they share its memory and its cores. Default 1.
    pub local_world_size: u32,
    /// Never creates, writes, locks or deletes anything. Default false.
    pub read_only: bool,
    /// How chunks are encoded. Default `auto`.
    pub compression: Compression,
    /// Bytes of a chunk. Default 4 MiB; a power of two from 64 KiB to 64 MiB.
    pub chunk_bytes: u32,
    /// Bytes of the staging arena. Default: the state's size, at most this rank's part of a quarter
    /// of the machine's memory; at least four chunks.
    pub staging_bytes: Option<u64>,
    /// Whether the page cache is bypassed. Default `auto`.
    pub direct_io: DirectIo,
    /// Which way bytes reach the device. Default `auto`.
    pub io_backend: IoBackend,
    /// Bytes in flight to the device. Default: 32 MiB, or two chunks where that is more; at least
    /// one chunk, at most 1 GiB.
    pub in_flight_bytes: Option<u64>,
    /// Threads that checksum, encode and decode. Default: this rank's part of one per core, at most
    /// 16.
    pub workers: Option<u32>,
    /// Newest checkpoints to keep. Default: all. At least 1.
    pub keep_last_n: Option<u32>,
    /// Keep every checkpoint whose step is a multiple of this, besides. Default: none. At least 1.
    pub keep_every: Option<u64>,
    /// Best checkpoints to keep besides, by `best_metric`. Default: none. At least 1.
    pub keep_best_n: Option<u32>,
    /// Name of the number in checkpoints' metadata that decides which are best. Default: none.
    pub best_metric: Option<String>,
    /// Which values of it are the better ones. Default `min`.
    pub best_mode: BestMode,
    /// Age, in seconds by the store's clock, below which nothing abandoned is deleted.
    /// Default 24 h.
    pub gc_grace_seconds: u64,
    /// How a store in S3 is reached.
    pub s3: S3Settings,
    /// Store in S3, `s3://bucket/prefix`, that checkpoints are uploaded to once they are committed
    /// in the directory `path`. Default: none.
    pub remote: Option<String>,
    /// Bytes a second that uploads to `remote` take at most. Default: no bound; at least 1.
    pub remote_bytes_per_second: Option<u64>,
    /// Whether retention may take what is not in `remote` yet. Default false.
    pub remove_before_upload: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            path: PathBuf::new(),
            job: "default".into(),
            rank: 0,
            world_size: 1,
            local_world_size: 1,
            read_only: false,
            compression: Compression::Auto,
            chunk_bytes: CHUNK_BYTES_DEFAULT,
            staging_bytes: None,
            direct_io: DirectIo::Auto,
            io_backend: IoBackend::Auto,
            in_flight_bytes: None,
            workers: None,
            keep_last_n: None,
            keep_every: None,
            keep_best_n: None,
            best_metric: None,
            best_mode: BestMode::Min,
            gc_grace_seconds: 24 * 60 * 60,
            s3: S3Settings::default(),
            remote: None,
            remote_bytes_per_second: None,
            remove_before_upload: false,
        }
    }
}

/// Default of [`Config::chunk_bytes`].
const CHUNK_BYTES_DEFAULT: u32 = 4 << 20;
/// Smallest [`Config::chunk_bytes`].
pub(crate) const CHUNK_BYTES_MIN: u32 = 64 << 10;
/// Largest [`Config::chunk_bytes`].
pub(crate) const CHUNK_BYTES_MAX: u32 = 64 << 20;
/// Fewest chunks that the staging arena holds: one being captured, one encoded, two in flight.
pub(crate) const STAGING_CHUNKS_MIN: u64 = 4;
/// Bytes in flight where nothing is set, unless two chunks are more.
const IN_FLIGHT_BYTES_DEFAULT: u64 = 32 << 20;
/// Most bytes in flight.
pub(crate) const IN_FLIGHT_BYTES_MAX: u64 = 1 << 30;

impl Config {
    /// A configuration for the store at `path`, all else default.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), ..Self::default() }
    }

    /// Checks every range and the relations between settings.
    pub(crate) fn validate(&self) -> Result<()> {
        self.validate_identity()?;
        self.validate_sizes()?;
        self.validate_retention()?;
        self.s3.validate()?;
        self.validate_remote()
    }

    fn validate_remote(&self) -> Result<()> {
        let is_in_s3 = self.s3_address()?.is_some();
        let Some(remote) = &self.remote else { return Ok(()) };
        self.remote_address()?;
        if is_in_s3 {
            return Err(EngineError::invalid(
                format!("settings `path` = `{}`, `remote` = `{remote}`", self.path.display()),
                "only checkpoints in a directory are uploaded to `remote`",
                "name a directory as `path`, or leave `remote` unset",
            ));
        }
        if self.remote_bytes_per_second == Some(0) {
            return Err(EngineError::invalid(
                "setting `remote_bytes_per_second` = 0",
                "no upload would ever finish",
                "use 1 or more, or leave it unset",
            ));
        }
        Ok(())
    }

    /// The remote store of a tier, if one is set.
    pub(crate) fn remote_address(&self) -> Result<S3Address> {
        let remote = self.remote.as_deref().unwrap_or_default();
        S3Address::parse(remote).unwrap_or_else(|| {
            Err(EngineError::invalid(
                format!("setting `remote` = `{remote}`"),
                "a store in S3 is expected",
                "name a bucket and a prefix: `s3://bucket/runs/gpt`",
            ))
        })
    }

    /// Where the store is, if it is in S3.
    pub(crate) fn s3_address(&self) -> Result<Option<S3Address>> {
        self.path.to_str().and_then(S3Address::parse).transpose()
    }

    fn validate_identity(&self) -> Result<()> {
        if self.path.as_os_str().is_empty() {
            return Err(EngineError::invalid(
                "setting `path`",
                "it is empty",
                "name the directory of the store, or set CHECKPOINT_DIR",
            ));
        }
        if !(1..=JOB_BYTES_MAX).contains(&self.job.len()) {
            return Err(EngineError::invalid(
                format!("setting `job`, {} bytes long", self.job.len()),
                format!("a job name has 1 to {JOB_BYTES_MAX} bytes"),
                "choose a short name for the training run",
            ));
        }
        if !(1..=self.world_size.max(1)).contains(&self.local_world_size) {
            return Err(EngineError::invalid(
                format!("setting `local_world_size` = {}", self.local_world_size),
                format!("of {} ranks, 1 to all are on one machine", self.world_size),
                "leave it to the launcher, which sets LOCAL_WORLD_SIZE",
            ));
        }
        if self.world_size == 0 || self.rank >= self.world_size {
            return Err(EngineError::invalid(
                format!("settings `rank` = {}, `world_size` = {}", self.rank, self.world_size),
                "a rank is less than the world size, which is at least 1",
                "take both from the launcher: RANK and WORLD_SIZE",
            ));
        }
        Ok(())
    }

    /// Bytes in flight to the device, as they are set or by default.
    pub(crate) fn in_flight(&self) -> u64 {
        let two_chunks = 2 * u64::from(self.chunk_bytes);
        self.in_flight_bytes.unwrap_or(two_chunks.max(IN_FLIGHT_BYTES_DEFAULT))
    }

    /// Whether this rank's store need not be that of the others: several ranks save, and what they
    /// share is `remote`. Each then publishes, prunes and uploads what is its own.
    pub(crate) fn has_own_store(&self) -> bool {
        self.world_size > 1 && self.remote.is_some()
    }

    /// The part that a rank with a store of its own answers for.
    pub(crate) fn own_share(&self) -> Option<OwnShare> {
        let Self { rank, world_size, .. } = *self;
        self.has_own_store().then_some(OwnShare { rank, world_size })
    }

    fn validate_sizes(&self) -> Result<()> {
        if !self.chunk_bytes.is_power_of_two()
            || !(CHUNK_BYTES_MIN..=CHUNK_BYTES_MAX).contains(&self.chunk_bytes)
        {
            return Err(EngineError::invalid(
                format!("setting `chunk_bytes` = {}", self.chunk_bytes),
                format!("a power of two from {CHUNK_BYTES_MIN} to {CHUNK_BYTES_MAX} is expected"),
                format!("leave it at its default, {CHUNK_BYTES_DEFAULT}"),
            ));
        }
        let staging_bytes_min = STAGING_CHUNKS_MIN * u64::from(self.chunk_bytes);
        if let Some(staging_bytes) = self.staging_bytes.filter(|bytes| *bytes < staging_bytes_min) {
            return Err(EngineError::invalid(
                format!("setting `staging_bytes` = {staging_bytes}"),
                format!(
                    "at least {STAGING_CHUNKS_MIN} chunks, {staging_bytes_min} bytes, are needed"
                ),
                "raise `staging_bytes` or lower `chunk_bytes`",
            ));
        }
        let allowed = u64::from(self.chunk_bytes)..=IN_FLIGHT_BYTES_MAX;
        if !allowed.contains(&self.in_flight()) {
            return Err(EngineError::invalid(
                format!("setting `in_flight_bytes` = {}", self.in_flight()),
                format!(
                    "from one chunk, {}, to {IN_FLIGHT_BYTES_MAX} is expected",
                    allowed.start()
                ),
                "leave it unset: 33554432, or two chunks where that is more",
            ));
        }
        if self.workers.is_some_and(|workers| !(1..=256).contains(&workers)) {
            return Err(EngineError::invalid(
                format!("setting `workers` = {}", self.workers.unwrap_or_default()),
                "from 1 to 256 threads are expected",
                "leave it unset: one per core",
            ));
        }
        Ok(())
    }

    fn validate_retention(&self) -> Result<()> {
        if self.keep_last_n == Some(0) {
            return Err(EngineError::invalid(
                "setting `keep_last_n` = 0",
                "at least the newest checkpoint is kept",
                "use 1 or more, or leave it unset to keep all",
            ));
        }
        if self.keep_every == Some(0) {
            return Err(EngineError::invalid(
                "setting `keep_every` = 0",
                "steps cannot be multiples of 0",
                "use 1 or more, or leave it unset",
            ));
        }
        if let Some(keep_every) = self.keep_every.filter(|_| self.keep_last_n.is_none()) {
            return Err(EngineError::invalid(
                format!("setting `keep_every` = {keep_every}"),
                "without `keep_last_n` all are kept",
                "set `keep_last_n` to 1 or more, or leave `keep_every` unset",
            ));
        }
        self.validate_best()
    }

    fn validate_best(&self) -> Result<()> {
        if self.best_metric.as_deref() == Some("") {
            return Err(EngineError::invalid(
                "setting `best_metric` = ``",
                "a metric needs a name",
                "name its key in the checkpoints' `metadata`",
            ));
        }
        let Some(keep_best_n) = self.keep_best_n else { return Ok(()) };
        let what = format!("setting `keep_best_n` = {keep_best_n}");
        if keep_best_n == 0 {
            return Err(EngineError::invalid(
                what,
                "no checkpoint would be kept as one of the best",
                "use 1 or more, or leave it unset",
            ));
        }
        if self.best_metric.is_none() {
            return Err(EngineError::invalid(
                what,
                "there is no metric to rank checkpoints by",
                "set `best_metric` to the key of a number in their `metadata`, such as `val_loss`",
            ));
        }
        if self.keep_last_n.is_none() {
            return Err(EngineError::invalid(
                what,
                "without `keep_last_n`, all checkpoints are kept",
                "set `keep_last_n` to 1 or more, or leave `keep_best_n` unset",
            ));
        }
        Ok(())
    }
}
