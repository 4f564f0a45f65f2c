//! A true state that is large works: the limits against lies are none against size.

use std::collections::BTreeMap;

use dtr_engine::Config;
use dtr_engine::format::index::{TensorKind, TensorRecord};
use dtr_engine::format::layout::ElementType;
use dtr_engine::format::tree::{DictKind, Key, Node, Value};
use dtr_engine::save::{SaveRequest, StorageInput};

use super::budget::scratch;
use super::state::{self, Counter};

const TENSORS: u32 = 1_000_000;
const CHUNK_BYTES: u32 = 4 << 20;

#[test]
fn a_true_state_of_a_million_tensors_works() {
    let directory = scratch();
    let config = Config {
        chunk_bytes: CHUNK_BYTES,
        in_flight_bytes: Some(4 * u64::from(CHUNK_BYTES)),
        staging_bytes: Some(4 * u64::from(CHUNK_BYTES)),
        ..state::config(directory.path())
    };
    let engine = state::open(config, &state::backend(), &Counter::starting_at(0)).unwrap();
    let memory: Vec<Vec<u8>> = (0..TENSORS).map(|i| i.to_le_bytes().to_vec()).collect();
    let request = request(1, &memory);
    let nodes = request.nodes.clone();
    state::finish(&engine.save(request).unwrap()).unwrap();
    let checkpoint = engine.checkpoint(1).unwrap();
    assert!(checkpoint.index().nodes == nodes);
    let mut back = vec![vec![0xAA_u8; 4]; memory.len()];
    let targets = back.iter_mut().zip(&checkpoint.index().tensors);
    let targets = targets.map(|(memory, tensor)| dtr_engine::load::Target {
        storage: tensor.storage,
        offset: 0,
        memory,
    });
    checkpoint.read(targets.collect(), dtr_engine::load::ReadOptions::default()).unwrap();
    assert!(back == memory);
    assert_eq!(engine.verify(1, &()).unwrap().damage, []);
    println!("{TENSORS} tensors in a shard of {} bytes", checkpoint.file_bytes());
}

/// Names as models have them.
fn request(step: u64, memory: &[Vec<u8>]) -> SaveRequest<'_> {
    let root = Value::Dict { len: TENSORS, kind: DictKind::Plain, metadata: false };
    let mut nodes = vec![Node { key: None, value: root }];
    nodes.extend((0..TENSORS).map(|tensor| Node {
        key: Some(Key::Str(format!("model.layers.{}.experts.{}.bias", tensor / 512, tensor % 512))),
        value: Value::Tensor(tensor),
    }));
    let tensors = (0..TENSORS).map(|storage| TensorRecord {
        storage,
        kind: TensorKind::Torch,
        dtype: "float32".into(),
        item_bytes: 4,
        shape: vec![1],
        strides: vec![1],
        offset: 0,
        requires_grad: false,
        slice: None,
    });
    let storages = memory.iter().map(|bytes| StorageInput {
        bytes: bytes.len() as u64,
        element: ElementType::F32,
        source: bytes,
    });
    SaveRequest {
        step,
        rewind: false,
        nodes,
        tensors: tensors.collect(),
        storages: storages.collect(),
        replicated: Vec::new(),
        waited: std::time::Duration::ZERO,
        prepared: std::time::Duration::ZERO,
        metadata: BTreeMap::new(),
        dataset_positions: BTreeMap::new(),
    }
}
