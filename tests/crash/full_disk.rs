//! A full disk is harmless: a filesystem of every size, in steps of one block.
//!
//! On a filesystem that reserves space, and on one that does not, where writes fail in the middle.
//! Always holds: a save that does not fit fails as `NoSpace`, with a hint; the checkpoint before
//! loads; and all the space that the attempt took comes back.

use std::fmt;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use dtr_engine::config::{DirectIo, IoBackend};
use dtr_engine::io::{EntryOp, EntryReply, File, Io, Length, OpenMode, Transfer, open_backend};
use dtr_engine::{Engine, EngineError};

use super::budget::{self, Budget};
use super::check::{Tools, view};
use super::device::Mount;
use super::history::View;
use super::process::{Mounts, with_own_mounts};
use super::state::{self, CHUNK_BYTES, State};

/// Sizes when nobody asks for more.
const SHORT: u64 = 32;
const NAME: &str = "full_disk::a_full_disk_is_harmless";
const BLOCK_BYTES: u64 = 4096;
/// From nothing to 1 MiB more than both checkpoints take.
const SIZES: u64 = ((CHUNKS as u64 * CHUNK_BYTES as u64) + (2 << 20)) / BLOCK_BYTES;
/// Chunks of the save that may not fit.
const CHUNKS: usize = 16;
/// Ways to try each size: two backends, with and without a reservation.
const WAYS: u64 = 4;

/// A backend on a filesystem that cannot reserve space, which is no error.
struct Unreserved(Arc<dyn Io>);

impl fmt::Debug for Unreserved {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("Unreserved")
    }
}

impl Io for Unreserved {
    fn name(&self) -> &'static str {
        self.0.name()
    }

    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Arc<File>> {
        self.0.open(path, mode)
    }

    fn submit(&self, transfer: Transfer) {
        self.0.submit(transfer);
    }

    fn set_length(&self, file: &File, length: Length) -> io::Result<()> {
        match length {
            Length::Reserve(_) => Ok(()),
            Length::Exact(_) => self.0.set_length(file, length),
        }
    }

    fn sync(&self, file: &File) -> io::Result<()> {
        self.0.sync(file)
    }

    fn entry(&self, operation: &EntryOp) -> io::Result<EntryReply> {
        self.0.entry(operation)
    }
}

fn backend(way: u64) -> Arc<dyn Io> {
    let backend = if way & 1 == 0 { IoBackend::Auto } else { IoBackend::Threads };
    let real = open_backend(backend, DirectIo::Auto).unwrap();
    if way & 2 == 0 { real } else { Arc::new(Unreserved(real)) }
}

/// How it went, over all sizes.
#[derive(Debug, Default)]
struct Tally {
    no_store: AtomicU64,
    no_first: AtomicU64,
    no_second: AtomicU64,
    fit: AtomicU64,
}

fn free_bytes(path: &Path) -> u64 {
    let space = rustix::fs::statvfs(path).unwrap();
    space.f_bavail * space.f_frsize
}

/// An error must be this one.
fn check_no_space(error: &EngineError) -> Result<(), String> {
    match error {
        EngineError::NoSpace { .. } if error.to_string().contains("\nhint: ") => Ok(()),
        other => Err(format!("the error is another one: {other}")),
    }
}

fn fill(number: u64, directory: &Path, states: &[Arc<State>], tally: &Tally) -> Result<(), String> {
    let bytes = (number / WAYS) * 1031 % SIZES * BLOCK_BYTES + BLOCK_BYTES;
    let mount = Mount::memory(bytes, &directory.join("memory"));
    let store = mount.path().join("store");
    let (io, tools) = (backend(number % WAYS), Tools::new());
    let engine = match state::open(state::config(&store), &io, &tools.ids) {
        Ok(engine) => engine,
        Err(error) => {
            tally.no_store.fetch_add(1, Ordering::Relaxed);
            return check_no_space(&error);
        }
    };
    let mut expected = View::new();
    for (step, save) in [(1, 0), (2, 1)] {
        let before = free_bytes(mount.path());
        let saved = engine.save(states[save].request(step, save));
        match saved.and_then(|handle| state::finish(&handle)) {
            Ok(_) => drop(expected.insert(step, save)),
            Err(error) => {
                let which = if save == 0 { &tally.no_first } else { &tally.no_second };
                which.fetch_add(1, Ordering::Relaxed);
                check_no_space(&error)?;
                let after = free_bytes(mount.path());
                if after != before {
                    return Err(format!("{before} bytes were free before, {after} are after"));
                }
            }
        }
        check_view(&engine, &expected, states)?;
    }
    tally.fit.fetch_add(u64::from(expected.len() == 2), Ordering::Relaxed);
    engine.close().map_err(|error| error.to_string())?;
    drop(engine);
    let engine = state::open(state::config(&store), &io, &tools.ids).map_err(|e| e.to_string())?;
    check_view(&engine, &expected, states)
}

fn check_view(engine: &Engine, expected: &View, states: &[Arc<State>]) -> Result<(), String> {
    let found = view(engine, states)?;
    if found != *expected {
        return Err(format!("it shows {found:?}, saved was {expected:?}"));
    }
    Ok(())
}

#[test]
fn a_full_disk_is_harmless() {
    with_own_mounts(NAME, Mounts::Memory, fill_every_size);
}

fn fill_every_size() {
    let states = [
        Arc::new(State::new(1, &[30_000])),
        Arc::new(State::new(2, &[CHUNKS * CHUNK_BYTES as usize])),
    ];
    let (tally, all) = (Tally::default(), SIZES * WAYS);
    let start = |directory: &Path| directory.to_owned();
    let outcome = budget::run(Budget::of(SHORT), all, start, |directory, number| {
        fill(number, directory, &states, &tally).map(|()| true).map_err(|why| {
            format!(
                "disk {number}: {why}\nagain with DTR_TORTURE_FIRST={number} \
                     DTR_TORTURE_STATES=1"
            )
        })
    });
    let Tally { no_store, no_first, no_second, fit } = &tally;
    let counts = [no_store, no_first, no_second, fit].map(|count| count.load(Ordering::Relaxed));
    println!(
        "{} of {all} disks filled ({SIZES} sizes, {WAYS} ways): {} had no room for a store, {} not \
         for the first save, {} not for the second, {} for all",
        outcome.tried, counts[0], counts[1], counts[2], counts[3]
    );
    assert!(
        outcome.tried < SHORT || counts[2] >= outcome.tried / 8,
        "few saves failed: {counts:?}"
    );
    assert!(outcome.tried < SHORT || counts[3] > 0, "no save ever fit: {counts:?}");
}
