//! A store with checkpoints of a small training state.
//!
//! Always holds: the same calls make the same bytes on every machine: attempt ids count from one,
//! checkpoints are three days old, and chunks are stored raw.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use dtr_engine::clock::{Environment, System};
use dtr_engine::config::{Compression, DirectIo, IoBackend};
use dtr_engine::engine::Components;
use dtr_engine::format::index::{TensorKind, TensorRecord};
use dtr_engine::format::layout::ElementType;
use dtr_engine::format::names::AttemptId;
use dtr_engine::format::tree::{DictKind, Key, Node, Value};
use dtr_engine::io::open_backend;
use dtr_engine::save::{SaveRequest, StorageInput};
use dtr_engine::{Config, Engine, Result};

use crate::golden::redact;
use crate::tool::{self, Run};

/// How old checkpoints are.
const AGE: Duration = Duration::from_hours(80);

/// A store in a directory that goes with it.
pub(crate) struct Store {
    scratch: tempfile::TempDir,
}

impl Store {
    /// A directory without checkpoints.
    pub(crate) fn empty() -> Self {
        let scratch = tempfile::tempdir().unwrap();
        std::fs::create_dir(scratch.path().join("store")).unwrap();
        Self { scratch }
    }

    /// Checkpoints of [`State::at`] steps 10 and 20.
    pub(crate) fn trained() -> Self {
        let store = Self::empty();
        store.save(&[&State::at(10), &State::at(20)]);
        store
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.scratch.path().join("store")
    }

    /// A path beside the store.
    pub(crate) fn beside(&self, name: &str) -> PathBuf {
        self.scratch.path().join(name)
    }

    pub(crate) fn save(&self, states: &[&State]) {
        let engine = writer(&self.path());
        for state in states {
            engine.save(state.request()).unwrap().result(None).unwrap().unwrap();
        }
        engine.close().unwrap();
    }

    /// The one file in a step's directory whose name ends like this.
    pub(crate) fn file(&self, step: u64, ending: &str) -> PathBuf {
        let directory = self.path().join(format!("step-{step:012}"));
        let files = std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
        let mut fitting = files.filter(|path| path.to_str().unwrap().ends_with(ending));
        let found = fitting.next().unwrap();
        assert_eq!(fitting.next(), None);
        found
    }

    /// Runs a command on this store.
    pub(crate) fn run(&self, command: &str, arguments: &[&str]) -> Run {
        let path = self.path();
        let mut all = vec![command, path.to_str().unwrap()];
        all.extend(arguments);
        tool::run(all)
    }

    /// Text with what differs from run to run replaced.
    pub(crate) fn redact(&self, text: &str) -> String {
        let path = |path: &Path| path.to_str().unwrap().to_owned();
        let scratch = self.scratch.path();
        let replacements = [
            (path(&scratch.join("store")), "STORE"),
            (path(scratch), "SCRATCH"),
            (env!("CARGO_PKG_VERSION").to_owned(), "VERSION"),
        ];
        redact(text, &replacements)
    }
}

/// A writer whose checkpoints are the same on every machine.
pub(crate) fn writer(path: &Path) -> Engine {
    try_writer(path).unwrap()
}

pub(crate) fn try_writer(path: &Path) -> Result<Engine> {
    let config = Config {
        chunk_bytes: 64 << 10,
        in_flight_bytes: Some(1 << 20),
        compression: Compression::None,
        job: "gpt".into(),
        ..Config::new(path)
    };
    let io = open_backend(IoBackend::Threads, DirectIo::Off)?;
    let environment = Arc::new(Counting { system: System::default(), attempts: AtomicU64::new(1) });
    Engine::open_with(config, Components { io, environment })
}

/// Attempts that count, at one moment.
#[derive(Debug)]
struct Counting {
    system: System,
    attempts: AtomicU64,
}

impl Environment for Counting {
    fn monotonic(&self) -> Duration {
        self.system.monotonic()
    }

    fn unix_ms(&self) -> u64 {
        let at = SystemTime::now() - AGE;
        let since_1970 = at.duration_since(SystemTime::UNIX_EPOCH).unwrap();
        u64::try_from(since_1970.as_millis()).unwrap()
    }

    fn thread_cpu(&self) -> Duration {
        self.system.thread_cpu()
    }

    fn attempt_id(&self) -> Result<AttemptId> {
        let number = self.attempts.fetch_add(1, Ordering::Relaxed);
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&number.to_le_bytes());
        Ok(AttemptId(bytes))
    }
}

/// A state to save.
#[derive(Clone, Debug)]
pub(crate) struct State {
    pub(crate) step: u64,
    pub(crate) nodes: Vec<Node>,
    pub(crate) tensors: Vec<TensorRecord>,
    pub(crate) storages: Vec<(ElementType, Vec<u8>)>,
}

impl State {
    /// A state without entries.
    pub(crate) fn new(step: u64) -> Self {
        Self { step, nodes: Vec::new(), tensors: Vec::new(), storages: Vec::new() }
    }

    /// A model with tied and strided tensors, an optimizer with integer keys, a numpy array, plain
    /// values. What the optimizer holds, and `step`, depend on the step; the model does not.
    pub(crate) fn at(step: u64) -> Self {
        let mut state = Self::new(step);
        state.dict(None, 4);
        state.node(
            Some(Key::Str("model".into())),
            Value::Dict { len: 4, kind: DictKind::Ordered, metadata: false },
        );
        let weight = state.storage(ElementType::F32, singles(150 * 256, 0.5));
        let parameter = |tensor| TensorRecord {
            kind: TensorKind::TorchParameter,
            requires_grad: true,
            ..tensor
        };
        state.tensor("embedding.weight", parameter(tensor(weight, "float32", 4, &[150, 256])));
        state.tensor("head.weight", parameter(tensor(weight, "float32", 4, &[150, 256])));
        let transposed = TensorRecord {
            shape: vec![256, 150],
            strides: vec![1, 256],
            ..tensor(weight, "float32", 4, &[256, 150])
        };
        state.tensor("head.transposed", transposed);
        let bias = state.storage(ElementType::Bf16, vec![0x80, 0x3f, 0x00, 0x40, 0, 0]);
        state.tensor("head.bias", tensor(bias, "bfloat16", 2, &[3]));

        state.dict(Some(Key::Str("optimizer".into())), 2);
        state.dict(Some(Key::Str("state".into())), 1);
        state.dict(Some(Key::Int(0)), 2);
        let scale = f32::from(u16::try_from(step).unwrap()) / 8.0;
        let moment = state.storage(ElementType::F32, singles(1000, scale));
        state.tensor("exp_avg", tensor(moment, "float32", 4, &[10, 100]));
        let count = state.storage(ElementType::Bytes, step.to_le_bytes().to_vec());
        state.tensor("step", tensor(count, "int64", 8, &[]));
        state.node(Some(Key::Str("lr".into())), Value::Float(0.001));

        let order = state.storage(ElementType::Bytes, vec![3, 0, 1, 0, 2, 0]);
        let order = tensor(order, "<u2", 2, &[3]);
        state.tensor("order", TensorRecord { kind: TensorKind::Numpy, ..order });
        state.node(Some(Key::Str("step".into())), Value::Int(i64::try_from(step).unwrap()));
        state
    }

    pub(crate) fn dict(&mut self, key: Option<Key>, len: u32) {
        self.node(key, Value::Dict { len, kind: DictKind::Plain, metadata: false });
    }

    pub(crate) fn node(&mut self, key: Option<Key>, value: Value) {
        self.nodes.push(Node { key, value });
    }

    pub(crate) fn storage(&mut self, element: ElementType, bytes: Vec<u8>) -> u32 {
        self.storages.push((element, bytes));
        u32::try_from(self.storages.len() - 1).unwrap()
    }

    pub(crate) fn tensor(&mut self, key: &str, tensor: TensorRecord) {
        let number = u32::try_from(self.tensors.len()).unwrap();
        self.tensors.push(tensor);
        self.node(Some(Key::Str(key.into())), Value::Tensor(number));
    }

    pub(crate) fn request(&self) -> SaveRequest<'_> {
        SaveRequest {
            step: self.step,
            rewind: false,
            nodes: self.nodes.clone(),
            tensors: self.tensors.clone(),
            storages: self
                .storages
                .iter()
                .map(|(element, bytes)| StorageInput {
                    bytes: bytes.len() as u64,
                    element: *element,
                    source: bytes,
                })
                .collect(),
            replicated: Vec::new(),
            waited: Duration::ZERO,
            prepared: Duration::ZERO,
            metadata: BTreeMap::from([("note".into(), "from the tests".into())]),
            dataset_positions: BTreeMap::from([("text".into(), self.step.into())]),
        }
    }
}

/// A contiguous tensor at the start of a storage.
pub(crate) fn tensor(storage: u32, dtype: &str, item_bytes: u32, shape: &[u64]) -> TensorRecord {
    let mut stride = 1;
    let mut strides: Vec<u64> = shape
        .iter()
        .rev()
        .map(|items| {
            let this = stride;
            stride *= items;
            this
        })
        .collect();
    strides.reverse();
    TensorRecord {
        storage,
        kind: TensorKind::Torch,
        dtype: dtype.into(),
        item_bytes,
        shape: shape.into(),
        strides,
        offset: 0,
        requires_grad: false,
        slice: None,
    }
}

/// The bytes of this many floats that count up.
pub(crate) fn singles(count: u32, scale: f32) -> Vec<u8> {
    #[expect(clippy::cast_precision_loss, reason = "small numbers")]
    let number = |position: u32| position as f32 * scale;
    (0..count).flat_map(|position| number(position).to_le_bytes()).collect()
}
