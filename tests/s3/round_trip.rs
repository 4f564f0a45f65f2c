//! What is saved comes back: every codec, in one piece and in parts, whole and by ranges.

use std::sync::atomic::Ordering;

use dtr_engine::config::Compression;
use dtr_engine::load::{ReadOptions, Target};
use dtr_engine::{Config, Engine};

use crate::place::{PART_BYTES, Place, open};
use crate::support::State;

const COMPRESSIONS: [Compression; 5] = [
    Compression::Auto,
    Compression::None,
    Compression::Float,
    Compression::Zstd,
    Compression::Gzip,
];

#[test]
fn every_codec_comes_back_in_one_piece_and_in_parts() {
    let place = Place::new();
    for compression in COMPRESSIONS {
        let engine = open(Config { compression, ..place.config() });
        for (step, scale) in [(1, 0), (2, 1), (3, 5)] {
            let state = State::training(step, scale);
            let info = state.save(&engine, step).unwrap();
            let parts = info.stored_bytes.div_ceil(PART_BYTES);
            assert_eq!(info.stats.parts, parts, "{compression:?}, {} bytes", info.stored_bytes);
            assert_eq!((info.stats.retries, info.stats.io_backend.as_str()), (0, "s3"));
            state.assert_equals(&engine.checkpoint(step).unwrap());
        }
        assert_eq!(engine.steps().unwrap(), [1, 2, 3]);
        let report = engine.verify(3, &()).unwrap();
        assert_eq!((report.damage.len(), report.shards), (0, 1), "{report:?}");
    }
    assert_eq!(place.unfinished(), 0);
}

#[test]
fn a_service_that_does_not_check_whole_objects_will_do() {
    let Some(place) = Place::own("it lets the service not check whole objects") else { return };
    place.rules().checks_whole_objects.store(false, Ordering::Relaxed);
    let engine = open(Config { compression: Compression::None, ..place.config() });
    let state = State::training(1, 3);
    assert!(state.save(&engine, 1).unwrap().stats.parts > 1);
    state.assert_equals(&engine.checkpoint(1).unwrap());
}

#[test]
fn a_state_larger_than_the_staging_memory_streams_through_it() {
    let place = Place::new();
    for compression in [Compression::None, Compression::Float] {
        // Less than a part: what waits for its part to fill must not starve what would fill it.
        let config = Config { compression, staging_bytes: Some(256 << 10), ..place.config() };
        let engine = open(config);
        let state = State::training(1, 4);
        let info = state.save(&engine, 1).unwrap();
        assert!(info.stats.streamed && info.stats.parts > 1, "{info:?}");
        state.assert_equals(&engine.checkpoint(1).unwrap());
    }
}

#[test]
fn an_empty_state_is_a_checkpoint() {
    let place = Place::new();
    let engine = open(place.config());
    State(Vec::new()).save(&engine, 1).unwrap();
    State(Vec::new()).assert_equals(&engine.checkpoint(1).unwrap());
}

#[test]
fn a_partial_load_reads_the_ranges_it_needs_and_no_more() {
    let Some(place) = Place::own("it counts the ranges that the service was asked for") else {
        return;
    };
    let config = Config { compression: Compression::None, ..place.config() };
    let engine = open(config);
    let state = State::training(1, 2);
    state.save(&engine, 1).unwrap();
    place.rules().take_ranges();
    let checkpoint = engine.checkpoint(1).unwrap();
    // Footer, header, index.
    assert_eq!(place.rules().take_ranges().len(), 3);
    let (first, bytes) = (300_000, 100_000);
    let mut memory = vec![0; bytes];
    let storage = checkpoint.index().tensors[1].storage;
    let target = Target { storage, offset: first as u64, memory: &mut memory };
    let figures = checkpoint.read(vec![target], ReadOptions::default()).unwrap();
    assert!(memory == state.0[1].bytes[first..first + bytes]);
    let ranges = place.rules().take_ranges();
    let read: u64 = ranges.iter().map(|(_, _, bytes)| bytes).sum();
    assert_eq!((ranges.len() as u64, read), (figures.chunks, figures.stored_bytes));
    // 100,000 bytes touch at most three chunks of 64 KiB.
    assert!((2..=3).contains(&ranges.len()), "{ranges:?}");
}

#[test]
fn a_reader_sees_what_a_writer_commits_and_changes_nothing() {
    let place = Place::new();
    let config = place.config();
    let writer = open(config.clone());
    let reader: Engine = open(Config { read_only: true, ..config });
    let state = State::training(1, 1);
    assert!(reader.steps().unwrap().is_empty());
    state.save(&writer, 4).unwrap();
    assert_eq!(reader.steps().unwrap(), [4]);
    state.assert_equals(&reader.checkpoint(4).unwrap());
    assert!(reader.delete(4).is_err());
    assert!(reader.checkpoint(4).unwrap().map(&[0], true).is_err(), "there is no file to map");
}
