//! States to save and the means to compare what comes back.
//!
//! Always holds: the same seed makes the same bytes on every machine.

use std::collections::BTreeMap;
use std::path::Path;

use dtr_engine::format::index::{TensorKind, TensorRecord};
use dtr_engine::format::layout::ElementType;
use dtr_engine::format::tree::{DictKind, Key, Node, Value};
use dtr_engine::load::{Checkpoint, ReadOptions, Target};
use dtr_engine::save::{SaveHandle, SaveInfo, SaveRequest, StorageInput};
use dtr_engine::{Config, Engine, Result};
use fastrand::Rng;

/// Between -1 and 1, denser around 0, as weights are.
#[expect(clippy::cast_precision_loss, reason = "any float will do")]
fn weight(random: &mut Rng) -> f32 {
    let sum: i64 = (0..4).map(|_| i64::from(random.u16(..)) - 32768).sum();
    sum as f32 / 131_072.0
}

/// One storage of a [`State`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Storage {
    pub(crate) element: ElementType,
    pub(crate) bytes: Vec<u8>,
}

/// Storages, each with one tensor over all of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct State(pub(crate) Vec<Storage>);

impl State {
    /// Weights, moments, indexes and odd ends: about `scale` times 6 MiB, sizes that cross chunk
    /// borders, and storages of 0, 1 and 63 bytes.
    pub(crate) fn training(seed: u64, scale: usize) -> Self {
        let mut random = Rng::with_seed(seed);
        let mut floats =
            |count: usize| -> Vec<f32> { (0..count).map(|_| weight(&mut random)).collect() };
        let f32_bytes =
            |values: &[f32]| values.iter().flat_map(|value| value.to_le_bytes()).collect();
        let bf16_bytes = |values: &[f32]| -> Vec<u8> {
            values.iter().flat_map(|value| ((value.to_bits() >> 16) as u16).to_le_bytes()).collect()
        };
        let items = scale * (1 << 19) + 1023;
        Self(vec![
            Storage { element: ElementType::Bf16, bytes: bf16_bytes(&floats(items)) },
            Storage { element: ElementType::F32, bytes: f32_bytes(&floats(items)) },
            Storage { element: ElementType::F32, bytes: f32_bytes(&floats(items / 2)) },
            Storage { element: ElementType::Bytes, bytes: Vec::new() },
            Storage { element: ElementType::Bytes, bytes: vec![42] },
            Storage { element: ElementType::F16, bytes: bf16_bytes(&floats(7)) },
            Storage { element: ElementType::F64, bytes: vec![0; 63] },
            Storage {
                element: ElementType::Bytes,
                bytes: (0..251).cycle().take(scale * 70_001).collect(),
            },
        ])
    }

    /// The request that saves this state.
    pub(crate) fn request(&self, step: u64) -> SaveRequest<'_> {
        let len = u32::try_from(self.0.len()).unwrap();
        let mut nodes = vec![Node {
            key: None,
            value: Value::Dict { len: len + 1, kind: DictKind::Plain, metadata: false },
        }];
        nodes.extend((0..len).map(|index| Node {
            key: Some(Key::Str(format!("tensor{index}"))),
            value: Value::Tensor(index),
        }));
        nodes.push(Node {
            key: Some(Key::Str("step".into())),
            value: Value::Int(i64::try_from(step).unwrap()),
        });
        SaveRequest {
            step,
            rewind: false,
            nodes,
            tensors: self
                .0
                .iter()
                .enumerate()
                .map(|(index, storage)| bytes_tensor(index, storage))
                .collect(),
            storages: self
                .0
                .iter()
                .map(|storage| StorageInput {
                    bytes: storage.bytes.len() as u64,
                    element: storage.element,
                    source: &storage.bytes,
                })
                .collect(),
            replicated: Vec::new(),
            waited: std::time::Duration::ZERO,
            prepared: std::time::Duration::ZERO,
            metadata: BTreeMap::from([("note".into(), "a state of the tests".into())]),
            dataset_positions: BTreeMap::new(),
        }
    }

    /// Saves it and waits.
    pub(crate) fn save(&self, engine: &Engine, step: u64) -> Result<SaveInfo> {
        finish(&engine.save(self.request(step))?)
    }

    /// Whether the checkpoint holds exactly this state.
    pub(crate) fn assert_equals(&self, checkpoint: &Checkpoint) {
        self.try_assert_equals(checkpoint).unwrap();
    }

    /// The same; an error if it cannot be read.
    pub(crate) fn try_assert_equals(&self, checkpoint: &Checkpoint) -> Result<()> {
        assert_eq!(self.0.len(), checkpoint.index().tensors.len());
        let mut memories: Vec<Vec<u8>> =
            self.0.iter().map(|storage| vec![0xAA; storage.bytes.len()]).collect();
        let targets = memories
            .iter_mut()
            .enumerate()
            .map(|(tensor, memory)| Target {
                storage: checkpoint.index().tensors[tensor].storage,
                offset: 0,
                memory,
            })
            .collect();
        checkpoint.read(targets, ReadOptions::default())?;
        for (index, (storage, memory)) in self.0.iter().zip(&memories).enumerate() {
            assert!(storage.bytes == *memory, "storage {index} came back changed");
        }
        Ok(())
    }
}

fn bytes_tensor(index: usize, storage: &Storage) -> TensorRecord {
    TensorRecord {
        storage: u32::try_from(index).unwrap(),
        kind: TensorKind::Torch,
        dtype: "uint8".into(),
        item_bytes: 1,
        shape: vec![storage.bytes.len() as u64],
        strides: vec![1],
        offset: 0,
        requires_grad: false,
        slice: None,
    }
}

/// The outcome of a save.
pub(crate) fn finish(handle: &SaveHandle) -> Result<SaveInfo> {
    handle.result(None).expect("no time limit was given")
}

/// Small chunks, so that little data makes many.
pub(crate) fn config(path: &Path) -> Config {
    Config { chunk_bytes: 64 << 10, in_flight_bytes: Some(1 << 20), ..Config::new(path) }
}

/// A scratch directory on the disk that holds the build, where direct I/O works.
pub(crate) fn scratch() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}
