//! Small states to save, the engine that saves them, and the means to compare what comes back.
//!
//! Always holds: the same seed makes the same bytes; an engine of these tests draws its attempt ids
//! and times from a counter, so that the same calls write the same bytes.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use dtr_engine::clock::Environment;
use dtr_engine::config::{Compression, Config, DirectIo, IoBackend};
use dtr_engine::engine::Components;
use dtr_engine::format::index::{TensorKind, TensorRecord};
use dtr_engine::format::layout::ElementType;
use dtr_engine::format::names::AttemptId;
use dtr_engine::format::tree::{Node, Value};
use dtr_engine::io::{Io, open_backend};
use dtr_engine::load::{Checkpoint, ReadOptions, Target};
use dtr_engine::save::{SaveHandle, SaveRequest, StorageInput};
use dtr_engine::{Engine, Result};
use fastrand::Rng;

pub(crate) const CHUNK_BYTES: u32 = 64 << 10;
/// Where a manifest says which save of its history it is.
const SAVE_KEY: &str = "save";

/// Bytes; every fourth repeats the one before, so that codecs have something to do.
pub(crate) fn bytes(random: &mut Rng, count: usize) -> Vec<u8> {
    let mut bytes: Vec<u8> = Vec::with_capacity(count + 8);
    while bytes.len() < count {
        bytes.extend(random.u64(..).to_le_bytes());
        let last = bytes.len() - 1;
        bytes[last] = bytes[last - 1];
        bytes[last - 4] = bytes[last - 5];
    }
    bytes.truncate(count);
    bytes
}

/// Storages of bytes, each with one tensor over all of it.
#[derive(Debug)]
pub(crate) struct State {
    storages: Vec<Vec<u8>>,
}

impl State {
    /// One storage for each of `sizes`, in bytes.
    pub(crate) fn new(seed: u64, sizes: &[usize]) -> Self {
        let mut random = Rng::with_seed(seed);
        Self { storages: sizes.iter().map(|size| bytes(&mut random, *size)).collect() }
    }

    /// Storages of runs of one value, which codecs shrink to little.
    pub(crate) fn repetitive(seed: u64, sizes: &[usize]) -> Self {
        let mut random = Rng::with_seed(seed);
        let storages = sizes
            .iter()
            .map(|size| {
                bytes(&mut random, size.div_ceil(8)).iter().flat_map(|byte| [*byte; 8]).collect()
            })
            .collect();
        Self { storages }
    }

    /// The request that saves this state as save `save` of its history.
    pub(crate) fn request(&self, step: u64, save: usize) -> SaveRequest<'_> {
        let len = u32::try_from(self.storages.len()).unwrap();
        let mut nodes = vec![Node { key: None, value: Value::List { len } }];
        nodes.extend((0..len).map(|tensor| Node { key: None, value: Value::Tensor(tensor) }));
        let tensors = (0..).zip(&self.storages).map(|(storage, bytes)| TensorRecord {
            storage,
            kind: TensorKind::Torch,
            dtype: "uint8".into(),
            item_bytes: 1,
            shape: vec![bytes.len() as u64],
            strides: vec![1],
            offset: 0,
            requires_grad: false,
            slice: None,
        });
        let storages = self.storages.iter().map(|bytes| StorageInput {
            bytes: bytes.len() as u64,
            element: ElementType::Bytes,
            source: bytes,
        });
        SaveRequest {
            step,
            rewind: false,
            nodes,
            tensors: tensors.collect(),
            storages: storages.collect(),
            replicated: Vec::new(),
            waited: Duration::ZERO,
            prepared: Duration::ZERO,
            metadata: BTreeMap::from([(SAVE_KEY.into(), save.into())]),
            dataset_positions: BTreeMap::new(),
        }
    }

    /// Whether the checkpoint, read whole, gives exactly this state.
    pub(crate) fn is_in(&self, checkpoint: &Checkpoint) -> Result<bool> {
        if checkpoint.index().storages.len() != self.storages.len() {
            return Ok(false);
        }
        let mut memories: Vec<Vec<u8>> =
            self.storages.iter().map(|bytes| vec![0xAA; bytes.len()]).collect();
        let targets = (0..).zip(&mut memories);
        let targets = targets.map(|(storage, memory)| Target { storage, offset: 0, memory });
        // One thread: many states are tried side by side.
        let options = ReadOptions { workers: Some(1), ..ReadOptions::default() };
        checkpoint.read(targets.collect(), options)?;
        Ok(memories == self.storages)
    }
}

/// Which save of its history a checkpoint is.
pub(crate) fn save_of(checkpoint: &Checkpoint) -> usize {
    let save = checkpoint.manifest().metadata[SAVE_KEY].as_u64().unwrap();
    usize::try_from(save).unwrap()
}

/// Clock and ids that count.
#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    pub(crate) fn starting_at(start: u64) -> Arc<Self> {
        Arc::new(Self(AtomicU64::new(start)))
    }
}

impl Environment for Counter {
    fn monotonic(&self) -> Duration {
        Duration::ZERO
    }

    fn unix_ms(&self) -> u64 {
        0
    }

    fn thread_cpu(&self) -> Duration {
        Duration::ZERO
    }

    fn attempt_id(&self) -> Result<AttemptId> {
        let count = self.0.fetch_add(1, Ordering::Relaxed);
        Ok(AttemptId(Rng::with_seed(count).u128(..).to_le_bytes()))
    }
}

/// Small chunks, little memory, one worker: the same calls write the same bytes in the same order.
pub(crate) fn config(path: &Path) -> Config {
    Config {
        compression: Compression::None,
        chunk_bytes: CHUNK_BYTES,
        in_flight_bytes: Some(4 * u64::from(CHUNK_BYTES)),
        staging_bytes: Some(4 * u64::from(CHUNK_BYTES)),
        workers: Some(1),
        ..Config::new(path)
    }
}

/// The backend below all of this: what it does to files is under tests of its own.
pub(crate) fn backend() -> Arc<dyn Io> {
    open_backend(IoBackend::Threads, DirectIo::Off).unwrap()
}

pub(crate) fn open(config: Config, io: &Arc<dyn Io>, ids: &Arc<Counter>) -> Result<Engine> {
    let environment: Arc<dyn Environment> = Arc::<Counter>::clone(ids);
    Engine::open_with(config, Components { io: Arc::clone(io), environment })
}

/// The outcome of a save.
pub(crate) fn finish(handle: &SaveHandle) -> Result<dtr_engine::save::SaveInfo> {
    handle.result(None).expect("no time limit was given")
}
