//! What was saved comes back bit by bit: every codec, every backend, direct and buffered, arenas
//! larger and smaller than the state.

use std::sync::Mutex;

use dtr_engine::config::{Compression, DirectIo, IoBackend};
use dtr_engine::load::{ReadOptions, Target};
use dtr_engine::save::{StorageInput, StorageSource};
use dtr_engine::{Config, Engine, EngineError, Result};

use super::support::{State, config, finish, scratch};

const CODECS: [Compression; 5] = [
    Compression::Auto,
    Compression::None,
    Compression::Float,
    Compression::Zstd,
    Compression::Gzip,
];

fn backends() -> Vec<IoBackend> {
    let directory = scratch();
    let uring = Config { io_backend: IoBackend::Uring, ..config(directory.path()) };
    match Engine::open(uring) {
        Ok(_) => vec![IoBackend::Threads, IoBackend::Uring],
        Err(error) => {
            println!("skipped: io_uring, because {error}");
            vec![IoBackend::Threads]
        }
    }
}

#[test]
fn every_codec_on_every_backend() {
    let state = State::training(1, 1);
    for io_backend in backends() {
        for direct_io in [DirectIo::Auto, DirectIo::Off] {
            for compression in CODECS {
                let directory = scratch();
                let config =
                    Config { io_backend, direct_io, compression, ..config(directory.path()) };
                let engine = Engine::open(config.clone()).unwrap();
                let info = state.save(&engine, 7).unwrap();
                let checkpoint = engine.checkpoint(7).unwrap();
                state.assert_equals(&checkpoint);
                assert_eq!(info.stored_bytes, checkpoint.file_bytes(), "{config:?}");
                let report = engine.verify(7, &()).unwrap();
                assert_eq!(report.damage, [], "{config:?}");
                assert_eq!(report.raw_bytes, info.raw_bytes);
            }
        }
    }
}

#[test]
fn codecs_shrink_weights_and_none_lays_tensors_contiguous() {
    let state = State::training(2, 1);
    let stored = |compression| {
        let directory = scratch();
        let engine = Engine::open(Config { compression, ..config(directory.path()) }).unwrap();
        state.save(&engine, 1).unwrap().stored_bytes
    };
    let none = stored(Compression::None);
    assert!(stored(Compression::Float) < none * 9 / 10);
    assert!(stored(Compression::Zstd) < none);
}

#[test]
fn a_state_larger_than_the_arena_streams_through_it() {
    let state = State::training(3, 2);
    for compression in CODECS {
        let directory = scratch();
        let small =
            Config { staging_bytes: Some(4 * (64 << 10)), compression, ..config(directory.path()) };
        let engine = Engine::open(small).unwrap();
        let info = state.save(&engine, 1).unwrap();
        assert!(info.stats.streamed);
        assert_eq!(info.stats.staging_bytes, 4 * (64 << 10));
        state.assert_equals(&engine.checkpoint(1).unwrap());
    }
}

#[test]
fn what_changes_after_save_returns_does_not_change_the_checkpoint() {
    let directory = scratch();
    let engine = Engine::open(config(directory.path())).unwrap();
    let state = State::training(4, 2);
    let mut live = state.clone();
    for step in 1..=3 {
        let handle = engine.save(live.request(step)).unwrap();
        for storage in &mut live.0 {
            storage.bytes.fill(0xFF);
        }
        finish(&handle).unwrap();
        state.assert_equals(&engine.checkpoint(step).unwrap());
        live.clone_from(&state);
    }
}

#[test]
fn an_empty_state_is_a_checkpoint() {
    let directory = scratch();
    let engine = Engine::open(config(directory.path())).unwrap();
    let state = State(Vec::new());
    state.save(&engine, 0).unwrap();
    let checkpoint = engine.checkpoint(0).unwrap();
    assert_eq!(checkpoint.index().chunks.len(), 0);
    state.assert_equals(&checkpoint);
    assert_eq!(engine.verify(0, &()).unwrap().damage, []);
}

#[test]
fn the_largest_step_is_a_step() {
    let directory = scratch();
    let engine = Engine::open(config(directory.path())).unwrap();
    let state = State::training(5, 0);
    let mut request = state.request(1);
    request.step = u64::MAX;
    finish(&engine.save(request).unwrap()).unwrap();
    assert_eq!(engine.steps().unwrap(), [u64::MAX]);
    state.assert_equals(&engine.checkpoint(u64::MAX).unwrap());
}

#[test]
fn a_part_is_read_alone_and_raw_storages_can_be_mapped() {
    let directory = scratch();
    let state = State::training(6, 1);
    let engine =
        Engine::open(Config { compression: Compression::None, ..config(directory.path()) })
            .unwrap();
    state.save(&engine, 1).unwrap();
    let checkpoint = engine.checkpoint(1).unwrap();
    let storages: Vec<u32> =
        checkpoint.index().tensors.iter().map(|tensor| tensor.storage).collect();
    let mut mapped = checkpoint.map(&storages, true).unwrap();
    for (tensor, storage) in state.0.iter().enumerate() {
        let range = mapped.range_of(storages[tensor]).expect("raw storages can be mapped");
        assert!(mapped.bytes()[range] == storage.bytes[..]);
    }
    mapped.bytes_mut().fill(0);
    drop(mapped);
    // Writing to the mapping changed no file.
    state.assert_equals(&checkpoint);

    let mut middle = vec![0; 100_000];
    let target = Target { storage: storages[1], offset: 65_000, memory: &mut middle };
    let read = checkpoint.read(vec![target], ReadOptions::default()).unwrap();
    assert!(middle == state.0[1].bytes[65_000..165_000]);
    assert!(read.chunks <= 3, "{read:?} for 100 kB of 64 KiB chunks");
}

/// A source that fails, or panics, part of the way.
struct Broken {
    bytes: u64,
    panics: bool,
    reads: Mutex<u32>,
}

impl StorageSource for Broken {
    fn read(&self, offset: u64, destination: &mut [u8]) -> Result<()> {
        *self.reads.lock().unwrap() += 1;
        if offset + (destination.len() as u64) < self.bytes {
            destination.fill(1);
            return Ok(());
        }
        assert!(!self.panics, "a source that panics");
        Err(EngineError::invalid("reading a broken source", "it is broken", "repair it"))
    }
}

#[test]
fn a_source_that_fails_fails_the_save_and_leaves_no_trace() {
    let directory = scratch();
    let engine = Engine::open(config(directory.path())).unwrap();
    let good = State::training(7, 0);
    good.save(&engine, 1).unwrap();
    let broken = Broken { bytes: 1 << 20, panics: false, reads: Mutex::new(0) };
    let empty = State(Vec::new());
    let mut request = empty.request(2);
    request.storages = vec![StorageInput {
        bytes: broken.bytes,
        element: dtr_engine::format::layout::ElementType::Bytes,
        source: &broken,
    }];
    let error = engine.save(request).unwrap_err();
    assert!(matches!(error, EngineError::InvalidArgument { .. }), "{error}");
    assert!(*broken.reads.lock().unwrap() > 0);
    // The error was raised once; the engine goes on.
    engine.wait_until_finished(None).unwrap();
    assert_eq!(engine.steps().unwrap(), [1]);
    assert_eq!(engine.survey().unwrap().steps.len(), 1, "the failed attempt's directory is gone");
    good.save(&engine, 2).unwrap();
}

#[test]
fn a_source_that_panics_ends_the_save() {
    let directory = scratch();
    let engine = Engine::open(config(directory.path())).unwrap();
    let broken = Broken { bytes: 1 << 20, panics: true, reads: Mutex::new(0) };
    let empty = State(Vec::new());
    let mut request = empty.request(1);
    request.storages = vec![StorageInput {
        bytes: broken.bytes,
        element: dtr_engine::format::layout::ElementType::Bytes,
        source: &broken,
    }];
    let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| engine.save(request)));
    assert!(!matches!(outcome, Ok(Ok(_))));
    let _seen = engine.wait_until_finished(None);
    State::training(8, 0).save(&engine, 1).unwrap();
}
