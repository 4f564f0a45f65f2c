//! Tensors of a device, saved by the engine and read back, to the host and to a device.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use dtr_cuda::{ArenaPin, Device, DeviceStorage, Direction};
use dtr_engine::config::Compression;
use dtr_engine::format::index::{TensorKind, TensorRecord};
use dtr_engine::format::layout::ElementType;
use dtr_engine::format::tree::{DictKind, Key, Node, Value};
use dtr_engine::io::pin::Pin;
use dtr_engine::load::{DeviceTarget, ReadOptions, Target};
use dtr_engine::save::{SaveHandle, SaveRequest, StorageInput, StorageSource};
use dtr_engine::{Config, Engine, EngineError, Result};
use fastrand::Rng;

use crate::scene::{CallerStream, Memory, Scene, follow, noise, precede, storage_of};

const CHUNK_BYTES: u32 = 64 << 10;

/// Where a tensor is.
enum Tensor {
    Host(Vec<u8>),
    Device(Memory, DeviceStorage),
}

impl Tensor {
    fn on(device: &Arc<Device>, content: &[u8]) -> Self {
        let memory = Memory::holding(device.ordinal(), content);
        // In two pieces, as a storage of which only parts are saved.
        let storage = storage_of(device, &memory, content.len() / 3);
        Self::Device(memory, storage)
    }

    fn source(&self) -> &dyn StorageSource {
        match self {
            Self::Host(bytes) => bytes,
            Self::Device(_, storage) => storage,
        }
    }

    fn content(&self) -> Vec<u8> {
        match self {
            Self::Host(bytes) => bytes.clone(),
            Self::Device(memory, _) => memory.content(),
        }
    }

    fn memory(&self) -> &Memory {
        let Self::Device(memory, _) = self else { panic!("it is the host's") };
        memory
    }
}

fn record(storage: u32, bytes: u64) -> TensorRecord {
    TensorRecord {
        storage,
        kind: TensorKind::Numpy,
        dtype: "|u1".into(),
        item_bytes: 1,
        shape: vec![bytes],
        strides: vec![1],
        offset: 0,
        requires_grad: false,
        slice: None,
    }
}

fn request(tensors: &[Tensor], step: u64) -> SaveRequest<'_> {
    let len = u32::try_from(tensors.len()).unwrap();
    let root =
        Node { key: None, value: Value::Dict { len, kind: DictKind::Plain, metadata: false } };
    let named = |number: u32| Node {
        key: Some(Key::Str(format!("tensor{number}"))),
        value: Value::Tensor(number),
    };
    let elements = [ElementType::F32, ElementType::Bf16, ElementType::Bytes];
    let inputs = tensors.iter().enumerate().map(|(number, tensor)| StorageInput {
        bytes: tensor.content().len() as u64,
        element: elements[number % elements.len()],
        source: tensor.source(),
    });
    SaveRequest {
        step,
        rewind: false,
        nodes: [root].into_iter().chain((0..len).map(named)).collect(),
        tensors: (0..).zip(tensors).map(|(n, t)| record(n, t.content().len() as u64)).collect(),
        storages: inputs.collect(),
        replicated: Vec::new(),
        waited: Duration::ZERO,
        prepared: Duration::ZERO,
        metadata: BTreeMap::new(),
        dataset_positions: BTreeMap::new(),
    }
}

fn engine(path: &Path, staging_chunks: u64, compression: Compression) -> Engine {
    Engine::open(Config {
        chunk_bytes: CHUNK_BYTES,
        staging_bytes: Some(staging_chunks * u64::from(CHUNK_BYTES)),
        compression,
        ..Config::new(path)
    })
    .unwrap()
}

fn finish(handle: &SaveHandle) -> Result<()> {
    handle.result(None).unwrap().map(drop)
}

/// Tensors of the host and of two devices, of odd sizes.
fn mixed(devices: &[Arc<Device>; 2], seed: u64) -> Vec<Tensor> {
    let mut random = Rng::with_seed(seed);
    let mut sizes = vec![0, 1, 63, 300_000, 65_536, 1_000_003];
    sizes.extend((0..12).map(|_| random.usize(..200_000)));
    (0..)
        .zip(sizes)
        .map(|(number, bytes)| {
            let content = noise(seed * 100 + number, bytes);
            match random.usize(..3) {
                0 => Tensor::Host(content),
                device => Tensor::on(&devices[device - 1], &content),
            }
        })
        .collect()
}

fn assert_saved(engine: &Engine, step: u64, expected: &[Vec<u8>]) {
    let checkpoint = engine.checkpoint(step).unwrap();
    let mut memories: Vec<Vec<u8>> = expected.iter().map(|bytes| vec![0xAA; bytes.len()]).collect();
    let storage = |tensor: usize| checkpoint.index().tensors[tensor].storage;
    let targets = memories.iter_mut().enumerate();
    let targets = targets.map(|(n, memory)| Target { storage: storage(n), offset: 0, memory });
    checkpoint.read(targets.collect(), ReadOptions::default()).unwrap();
    for (number, (found, expected)) in memories.iter().zip(expected).enumerate() {
        assert!(found == expected, "tensor {number} of {} bytes", expected.len());
    }
}

#[test]
fn tensors_of_host_and_devices_come_back_bit_by_bit() {
    let _scene = Scene::new();
    for (seed, compression, staging_chunks) in [
        (1, Compression::None, 200),
        (2, Compression::Float, 200),
        // Smaller than the state: it streams through.
        (3, Compression::Auto, 8),
        (4, Compression::Zstd, 16),
    ] {
        let directory = tempfile::tempdir().unwrap();
        let devices = [0, 1].map(|ordinal| Device::open(ordinal).unwrap());
        let tensors = mixed(&devices, seed);
        let expected: Vec<_> = tensors.iter().map(Tensor::content).collect();
        let engine = engine(directory.path(), staging_chunks, compression);
        finish(&engine.save(request(&tensors, 1)).unwrap()).unwrap();
        finish(&engine.save_behind(request(&tensors, 2)).unwrap()).unwrap();
        for step in [1, 2] {
            assert_saved(&engine, step, &expected);
        }
        // And into devices: half of each tensor there, from its middle.
        let checkpoint = engine.checkpoint(2).unwrap();
        let blank: Vec<Tensor> =
            expected.iter().map(|bytes| Tensor::on(&devices[1], &vec![0; bytes.len()])).collect();
        let mut targets = Vec::new();
        for (number, tensor) in blank.iter().enumerate() {
            let Tensor::Device(_, memory) = tensor else { unreachable!() };
            let (storage, bytes) = (checkpoint.index().tensors[number].storage, memory.bytes());
            let offset = bytes / 2;
            let bytes = usize::try_from(bytes - offset).unwrap();
            targets.push(DeviceTarget { storage, offset, bytes, memory, at: offset });
        }
        checkpoint.read_to(Vec::new(), targets, ReadOptions::default()).unwrap();
        for (number, (tensor, expected)) in blank.iter().zip(&expected).enumerate() {
            let (found, half) = (tensor.content(), expected.len() / 2);
            assert!(found[half..] == expected[half..], "seed {seed}, tensor {number}");
            assert!(found[..half].iter().all(|byte| *byte == 0), "seed {seed}, tensor {number}");
        }
    }
}

#[test]
fn a_save_holds_what_the_stream_had_been_given_and_nothing_later() {
    let scene = Scene::new();
    let directory = tempfile::tempdir().unwrap();
    let device = Device::open(0).unwrap();
    let stream = CallerStream::new(0);
    let tensors = [Tensor::on(&device, &vec![1; 300_000])];
    let engine = engine(directory.path(), 100, Compression::None);
    // The training writes 2, is saved, and writes 3; the device has not begun anything yet.
    stream.hold(true);
    stream.write(tensors[0].memory(), 0, &vec![2; 300_000]);
    follow(&device, Direction::Down, &stream).unwrap();
    let handle = engine.save_behind(request(&tensors, 1)).unwrap();
    assert!(handle.wait_begun(None));
    precede(&device, Direction::Down, &stream).unwrap();
    stream.write(tensors[0].memory(), 0, &vec![3; 300_000]);
    assert!(!handle.wait_captured(Some(Duration::ZERO)));
    stream.hold(false);
    finish(&handle).unwrap();
    scene.settle();
    assert_eq!(tensors[0].content(), vec![3; 300_000]);
    assert_saved(&engine, 1, &[vec![2; 300_000]]);
}

#[test]
fn a_clone_keeps_what_the_training_overwrites() {
    let scene = Scene::new();
    let directory = tempfile::tempdir().unwrap();
    let device = Device::open(0).unwrap();
    let stream = CallerStream::new(0);
    let tensor = Tensor::on(&device, &vec![1; 300_000]);
    let engine = engine(directory.path(), 8, Compression::None);
    follow(&device, Direction::Down, &stream).unwrap();
    let Tensor::Device(memory, storage) = tensor else { unreachable!() };
    let clone = storage.clone_on_device().unwrap();
    precede(&device, Direction::Down, &stream).unwrap();
    stream.write(&memory, 0, &vec![2; 300_000]);
    scene.settle();
    let saved = [Tensor::Device(memory, clone)];
    finish(&engine.save_behind(request(&saved, 1)).unwrap()).unwrap();
    assert_saved(&engine, 1, &[vec![1; 300_000]]);
    assert_eq!(saved[0].content(), vec![2; 300_000]);
}

#[test]
fn a_pinned_arena_is_never_left_by_a_copy() {
    let scene = Scene::new();
    let directory = tempfile::tempdir().unwrap();
    let devices = [0, 1].map(|ordinal| Device::open(ordinal).unwrap());
    let tensors = mixed(&devices, 5);
    let engine = engine(directory.path(), 200, Compression::None);
    let pin: Arc<dyn Pin> = Arc::new(ArenaPin::new(&devices[0]));
    engine.pin_staging(&pin).unwrap();
    finish(&engine.save(request(&tensors, 1)).unwrap()).unwrap();
    let counted = scene.count();
    assert!(counted.bytes_registered > 0);
    assert_eq!(counted.pageable_copies, 0, "each copy lies in one registered piece");
    engine.close().unwrap();
    drop(pin);
    assert_eq!(scene.count().bytes_registered, 0);
}

#[test]
fn an_arena_that_cannot_be_pinned_serves_all_the_same() {
    let scene = Scene::new();
    let directory = tempfile::tempdir().unwrap();
    let devices = [0, 1].map(|ordinal| Device::open(ordinal).unwrap());
    let tensors = mixed(&devices, 6);
    let expected: Vec<_> = tensors.iter().map(Tensor::content).collect();
    let engine = engine(directory.path(), 200, Compression::None);
    scene.fail_repeatedly(c"cuMemHostRegister_v2", 100, 2);
    engine.pin_staging(&(Arc::new(ArenaPin::new(&devices[0])) as Arc<dyn Pin>)).unwrap();
    finish(&engine.save(request(&tensors, 1)).unwrap()).unwrap();
    assert_saved(&engine, 1, &expected);
}

#[test]
fn a_device_that_is_lost_fails_the_save_and_the_read_and_nothing_hangs() {
    let mut scene = Scene::new();
    scene.may_leave_memory();
    let directory = tempfile::tempdir().unwrap();
    let device = Device::open(0).unwrap();
    let tensors = [Tensor::on(&device, &noise(7, 2_000_000)), Tensor::Host(noise(8, 100_000))];
    let engine = engine(directory.path(), 8, Compression::None);
    finish(&engine.save(request(&tensors, 1)).unwrap()).unwrap();
    let checkpoint = engine.checkpoint(1).unwrap();
    scene.lose(0, 700);
    for behind in [false, true] {
        let saved = if behind {
            engine.save_behind(request(&tensors, 2)).and_then(|handle| finish(&handle))
        } else {
            engine.save(request(&tensors, 2)).and_then(|handle| finish(&handle))
        };
        let error = saved.unwrap_err();
        assert!(matches!(error, EngineError::Accelerator { .. }), "{error}");
        assert!(error.to_string().contains("dmesg"), "{error}");
    }
    let Tensor::Device(_, memory) = &tensors[0] else { unreachable!() };
    let storage = checkpoint.index().tensors[0].storage;
    let target = DeviceTarget { storage, offset: 0, bytes: 2_000_000, memory, at: 0 };
    let read = checkpoint.read_to(Vec::new(), vec![target], ReadOptions::default());
    assert!(matches!(read, Err(EngineError::Accelerator { .. })), "{read:?}");
    // The host's tensors are saved on.
    let tensors = [Tensor::Host(noise(9, 100_000))];
    finish(&engine.save(request(&tensors, 3)).unwrap()).unwrap();
    assert_eq!(engine.steps().unwrap(), [1, 3]);
}

#[test]
fn any_failed_copy_fails_the_save_and_leaves_the_one_before() {
    let scene = Scene::new();
    let directory = tempfile::tempdir().unwrap();
    let devices = [0, 1].map(|ordinal| Device::open(ordinal).unwrap());
    let tensors = mixed(&devices, 10);
    let expected: Vec<_> = tensors.iter().map(Tensor::content).collect();
    let engine = engine(directory.path(), 16, Compression::None);
    finish(&engine.save(request(&tensors, 1)).unwrap()).unwrap();
    let copies = {
        let before = scene.calls(c"cuMemcpyDtoHAsync_v2");
        finish(&engine.save_behind(request(&tensors, 2)).unwrap()).unwrap();
        engine.delete(2).unwrap();
        scene.calls(c"cuMemcpyDtoHAsync_v2") - before
    };
    // How many events there are depends on who waits for buffers when.
    let every_copy = (1..=copies).map(|nth| (c"cuMemcpyDtoHAsync_v2", nth));
    for (name, nth) in every_copy.chain([(c"cuEventRecord", 1), (c"cuEventSynchronize", 1)]) {
        scene.fail(name, nth, 1);
        let handle = engine.save_behind(request(&tensors, 2)).unwrap();
        let error = finish(&handle).unwrap_err();
        assert!(handle.wait_captured(Some(Duration::from_mins(1))));
        assert!(matches!(error, EngineError::Accelerator { .. }), "{name:?} {nth}: {error}");
        assert_eq!(engine.steps().unwrap(), [1]);
    }
    finish(&engine.save(request(&tensors, 2)).unwrap()).unwrap();
    assert_saved(&engine, 2, &expected);
}
