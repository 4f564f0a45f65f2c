//! Nothing is acknowledged after a failed sync: the kernel's own EIO, from a device whose memory
//! ran out.
//!
//! Always holds: a save that met a failed sync fails; the file that could not be synced is never
//! synced again; the checkpoint before loads, also when the device is mounted again.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use dtr_engine::Config;
use dtr_engine::config::{DirectIo, IoBackend};
use dtr_engine::io::sim::OpKind;
use dtr_engine::io::{Io, open_backend};
use fastrand::Rng;

use super::budget::{self, Budget};
use super::check::{Tools, view};
use super::device::{Image, Thin};
use super::history::View;
use super::process::{Mounts, with_own_mounts};
use super::state::{self, CHUNK_BYTES, State};
use super::tap::{Operation, Tap, Watcher};

/// Devices when nobody asks for more.
const SHORT: u64 = 10;
const NAME: &str = "failed_sync::nothing_is_acknowledged_after_a_failed_sync";
const DEVICE_BYTES: u64 = 64 << 20;
/// Enough for the filesystem and a small checkpoint.
const MEMORY_BYTES: u64 = 16 << 20;
/// Chunks of the save that does not fit.
const CHUNKS: usize = 24;

/// Which syncs failed, and which file was synced again all the same.
#[derive(Debug, Default)]
struct Syncs {
    failed: Mutex<BTreeSet<PathBuf>>,
    again: Mutex<Vec<PathBuf>>,
}

impl Watcher for Syncs {
    fn before(&self, operation: &Operation) {
        if operation.kind == OpKind::Sync && self.failed.lock().unwrap().contains(&operation.path) {
            self.again.lock().unwrap().push(operation.path.clone());
        }
    }

    fn after(&self, operation: &Operation, error: Option<&std::io::Error>) {
        if operation.kind == OpKind::Sync && error.is_some() {
            self.failed.lock().unwrap().insert(operation.path.clone());
        }
    }
}

/// What happened, over all devices.
#[derive(Debug, Default)]
struct Tally {
    failed_syncs: AtomicU64,
    failed_saves: AtomicU64,
}

fn states() -> Vec<Arc<State>> {
    let chunk = CHUNK_BYTES as usize;
    let sizes = [vec![30_000], vec![chunk; CHUNKS], vec![20_000]];
    let states = (1..).zip(sizes).map(|(seed, sizes)| Arc::new(State::new(seed, &sizes)));
    states.collect()
}

fn wear_out(
    number: u64,
    image: &Image,
    directory: &Path,
    states: &[Arc<State>],
    tally: &Tally,
) -> Result<(), String> {
    let mut random = Rng::with_seed(number);
    let mut thin = Thin::new(image, MEMORY_BYTES, directory);
    let store = thin.path().join("store");
    let backend = [IoBackend::Auto, IoBackend::Threads][random.usize(..2)];
    // Three times in four through the page cache, where only the sync can show it.
    let direct_io = if random.usize(..4) == 0 { DirectIo::Auto } else { DirectIo::Off };
    let syncs = Arc::new(Syncs::default());
    let io: Arc<dyn Io> = Tap::new(open_backend(backend, direct_io).unwrap(), &syncs);
    let tools = Tools::new();
    let engine = state::open(state::config(&store), &io, &tools.ids).map_err(|e| e.to_string())?;
    let save = |step: u64, save: usize| {
        engine.save(states[save].request(step, save)).and_then(|handle| state::finish(&handle))
    };
    save(1, 0).map_err(|error| format!("the first save: {error}"))?;
    // From hardly enough for the names to nearly enough for all.
    thin.leave(4096 * (32 + random.u64(..CHUNKS as u64 * 15)));
    let outcome = save(2, 1);
    let failed = syncs.failed.lock().unwrap().len() as u64;
    if outcome.is_ok() && failed > 0 {
        return Err("a save was acknowledged after a sync that failed".into());
    }
    tally.failed_syncs.fetch_add(failed, Ordering::Relaxed);
    tally.failed_saves.fetch_add(u64::from(outcome.is_err()), Ordering::Relaxed);
    thin.heal();
    // Nobody knows what such a filesystem still takes; what it acknowledges must be so.
    let later = save(3, 2);
    let again = syncs.again.lock().unwrap().clone();
    if !again.is_empty() {
        return Err(format!("synced again after a failure: {again:?}"));
    }
    let _told_already = engine.close();
    drop(engine);
    thin.restore();
    let mut expected = View::from([(1, 0)]);
    expected.extend(outcome.is_ok().then_some((2, 1)));
    expected.extend(later.is_ok().then_some((3, 2)));
    let config = Config { read_only: true, ..state::config(&store) };
    let reader = state::open(config, &tools.io, &tools.ids).map_err(|error| error.to_string())?;
    let found = view(&reader, states)?;
    // What failed may have been committed for all that, if it is whole.
    let is_legal = expected.iter().all(|(step, save)| found.get(step) == Some(save));
    if !is_legal {
        return Err(format!("mounted anew it shows {found:?}, acknowledged was {expected:?}"));
    }
    Ok(())
}

#[test]
fn nothing_is_acknowledged_after_a_failed_sync() {
    with_own_mounts(NAME, Mounts::Loops, wear_out_devices);
}

fn wear_out_devices() {
    let (states, tally) = (states(), Tally::default());
    let start = |directory: &Path| {
        let image = Image::format_and_use(DEVICE_BYTES, directory);
        (directory.to_owned(), image)
    };
    let outcome = budget::run(Budget::of(SHORT), u64::MAX, start, |(directory, image), number| {
        let worn = wear_out(number, image, directory, &states, &tally);
        worn.map(|()| true).map_err(|why| {
            format!(
                "device {number}: {why}\nagain with DTR_TORTURE_FIRST={number} \
                     DTR_TORTURE_STATES=1"
            )
        })
    });
    let [syncs, saves] =
        [&tally.failed_syncs, &tally.failed_saves].map(|count| count.load(Ordering::Relaxed));
    println!(
        "{} devices ran out of memory: {syncs} syncs failed with the kernel's own error, {saves} \
         saves failed, none was acknowledged and no file synced again",
        outcome.tried
    );
    assert!(outcome.tried < SHORT || syncs >= outcome.tried / 3, "only {syncs} syncs failed");
}
