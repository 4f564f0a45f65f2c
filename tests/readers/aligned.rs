//! Shards with zeros between the header and the first chunk: what is stored as it is starts where
//! storage likes it.
//!
//! Always holds: who verifies accepts nothing but zeros there; who loads needs none of them; header
//! and footer agree how far they go.

use std::fs;
use std::path::{Path, PathBuf};

use dtr_engine::config::{Compression, Config};
use dtr_engine::format::names::{AttemptId, shard_file_name, step_dir_name};
use dtr_engine::store_copy::Overwrite;
use dtr_engine::{Engine, EngineError};

use super::budget::scratch;
use super::forge::{ATTEMPT, Forged, Index, STEP};
use super::state::{self, Counter, State};

const CHUNKS_OFFSET: u32 = 8192;
const GAP_BYTES: usize = 4096;

fn forged(gap: Vec<u8>) -> Forged {
    let mut forged = Forged { gap, ..Forged::whole() };
    forged.header.chunks_offset = CHUNKS_OFFSET;
    forged
}

fn shard(store: &Path, step: u64, attempt: AttemptId) -> PathBuf {
    store.join(step_dir_name(step)).join(shard_file_name(0, attempt))
}

fn reader(store: &Path) -> Engine {
    let config = Config { read_only: true, ..state::config(store) };
    state::open(config, &state::backend(), &Counter::starting_at(0)).unwrap()
}

/// Why a checkpoint is not opened.
fn refused(store: &Path) -> String {
    let error = reader(store).checkpoint(STEP).expect_err("it is opened");
    let EngineError::Corrupt { why, .. } = error else { panic!("not as damaged, but: {error:?}") };
    assert_eq!(damage(store), [why.as_str()]);
    why
}

fn damage(store: &Path) -> Vec<String> {
    let report = reader(store).verify(STEP, &()).unwrap();
    report.damage.into_iter().map(|damage| damage.why).collect()
}

#[test]
fn raw_chunks_of_a_large_state_start_at_a_multiple_of_more_than_a_page() {
    let directory = scratch();
    let saved = State::new(1, &[5 << 20, 4 << 20]);
    let config = Config { compression: Compression::None, ..state::config(directory.path()) };
    let engine = state::open(config, &state::backend(), &Counter::starting_at(0)).unwrap();
    state::finish(&engine.save(saved.request(STEP, 0)).unwrap()).unwrap();
    let checkpoint = engine.checkpoint(STEP).unwrap();
    let chunks = checkpoint.index().chunks.iter();
    let expected = (0..).map(|i| u64::from(CHUNKS_OFFSET) + i * u64::from(state::CHUNK_BYTES));
    assert!(chunks.map(|chunk| chunk.offset).eq(expected.take(9 << 4)));
    assert!(saved.is_in(&checkpoint).unwrap());
    checkpoint.map(&[0, 1], true).expect("what is mapped is found, too");
    assert_eq!(engine.verify(STEP, &()).unwrap().damage, []);

    let attempt = checkpoint.manifest().attempt_id().unwrap();
    let path = shard(directory.path(), STEP, attempt);
    let mut bytes = fs::read(&path).unwrap();
    bytes[CHUNKS_OFFSET as usize - 1] ^= 0x10;
    fs::write(&path, bytes).unwrap();
    let why = "byte 8191 between the header and the first chunk is 0x10, expected zero";
    assert_eq!(damage(directory.path()), [why]);
    assert!(saved.is_in(&engine.checkpoint(STEP).unwrap()).unwrap(), "no tensor is hit");

    // Nor is it copied.
    let other = scratch();
    let config = Config { compression: Compression::None, ..state::config(other.path()) };
    let other = state::open(config, &state::backend(), &Counter::starting_at(9)).unwrap();
    let error = engine.copy_to(&other, STEP, Overwrite::No, &()).unwrap_err();
    assert!(error.to_string().contains(why), "{error}");
    assert!(other.steps().unwrap().is_empty());
}

#[test]
fn what_is_not_zero_before_the_first_chunk_is_damage() {
    let directory = scratch();
    forged(vec![0; GAP_BYTES]).write(directory.path());
    let reader = reader(directory.path());
    reader.checkpoint(STEP).expect("zeros are right");
    assert_eq!(reader.verify(STEP, &()).unwrap().damage, []);
    let whole = fs::read(shard(directory.path(), STEP, ATTEMPT)).unwrap();
    for bit in (0..GAP_BYTES * 8).step_by(97) {
        let mut bytes = whole.clone();
        bytes[4096 + bit / 8] ^= 1 << (bit % 8);
        fs::write(shard(directory.path(), STEP, ATTEMPT), bytes).unwrap();
        let [why] = &damage(directory.path())[..] else { panic!("bit {bit} is not seen") };
        assert!(why.starts_with(&format!("byte {} between", 4096 + bit / 8)), "bit {bit}: {why}");
    }
}

#[test]
fn header_and_footer_agree_where_the_first_chunk_is() {
    let directory = scratch();
    let mut forged = forged(vec![0; GAP_BYTES]);
    forged.footer = |footer| footer.chunks_offset = 4096;
    forged.write(directory.path());
    assert!(refused(directory.path()).contains("must tile the file"));

    // A reader that relies on the header finds it in the header.
    let by_footer =
        Forged { footer: |footer| footer.chunks_offset = CHUNKS_OFFSET, ..Forged::whole() };
    by_footer.write(directory.path());
    assert!(refused(directory.path()).contains("must tile the file"));

    // A header that says more than there is.
    forged.gap.clear();
    forged.index = Some(Index::of(&Forged::whole().message()));
    forged.write(directory.path());
    assert_eq!(
        refused(directory.path()),
        "the first chunk is at byte 8192 by the header, 4096 by the footer"
    );
}
