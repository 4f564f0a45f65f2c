//! What was acknowledged survives a real loss of power: ext4 on a loop device is shut down without
//! a flush at every operation, and mounted again.
//!
//! Three devices: data ordered with the journal, data in any order, and one with a volatile cache
//! of its own (`device.rs`). What these cannot show, a filesystem that is stricter than ext4,
//! `power_loss.rs` does.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use dtr_engine::Config;
use dtr_engine::config::{DirectIo, IoBackend};
use dtr_engine::io::{Io, open_backend};
use fastrand::Rng;

use super::budget::{self, Budget, scratch};
use super::check::{Tools, check};
use super::device::{Device, Images, Layer, Switch};
use super::history::Call::{Clean, Delete, Reopen, Rewind, Save};
use super::history::{Call, Player, store};
use super::process::{Mounts, with_own_mounts};
use super::tap::{Operation, Tap, Watcher};

/// Cuts when nobody asks for more.
const SHORT: u64 = 50;
const NAME: &str = "power_cut::an_acknowledged_checkpoint_survives_a_power_cut";
const LAYERS: [Layer; 3] = [Layer::Ordered, Layer::Writeback, Layer::Stacked];

const HISTORIES: [(&[Call], Option<u32>); 4] = [
    (&[Save(1), Save(2), Save(3)], Some(2)),
    (&[Save(10), Save(20), Rewind(10), Rewind(10), Clean], None),
    (&[Save(1), Save(2), Delete(1), Reopen, Save(3)], None),
    (&[Save(1), Rewind(1), Save(2), Reopen, Rewind(1), Save(2)], Some(1)),
];

/// Where the power goes.
#[derive(Clone, Copy, Debug)]
struct Case {
    history: usize,
    io_backend: IoBackend,
    direct_io: DirectIo,
    operation: u64,
}

impl Case {
    fn backend(self) -> Arc<dyn Io> {
        open_backend(self.io_backend, self.direct_io).unwrap()
    }

    fn settings(self) -> impl Fn(&mut Config) {
        move |config| config.keep_last_n = HISTORIES[self.history].1
    }
}

/// Cuts the power before an operation.
#[derive(Debug)]
struct Cutter {
    at: u64,
    switch: Option<Switch>,
    is_cut: AtomicBool,
}

impl Cutter {
    fn new(at: u64, switch: Option<Switch>) -> Arc<Self> {
        Arc::new(Self { at, switch, is_cut: AtomicBool::new(false) })
    }

    fn cut(&self) {
        if let Some(switch) = &self.switch
            && !self.is_cut.swap(true, Ordering::SeqCst)
        {
            switch.cut();
        }
    }
}

impl Watcher for Cutter {
    fn before(&self, operation: &Operation) {
        if operation.number == self.at {
            self.cut();
        }
    }

    fn after(&self, _operation: &Operation, _error: Option<&std::io::Error>) {}
}

/// Every operation of every history, on every backend, in an order in which a part of them is a
/// part of everything.
fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for (history, (calls, _)) in HISTORIES.iter().enumerate() {
        for io_backend in [IoBackend::Auto, IoBackend::Threads] {
            for direct_io in [DirectIo::Auto, DirectIo::Off] {
                let case = Case { history, io_backend, direct_io, operation: 0 };
                let cutter = Cutter::new(u64::MAX, None);
                let io = Tap::new(case.backend(), &cutter);
                let directory = scratch();
                let place = (directory.path(), Arc::<Tap<Cutter>>::clone(&io) as Arc<dyn Io>);
                Player::play_until(place, case.settings(), calls, || false);
                // The last one: after everything.
                let operations = io.begun();
                cases.extend((0..=operations).map(|operation| Case { operation, ..case }));
            }
        }
    }
    Rng::with_seed(0).shuffle(&mut cases);
    cases
}

fn cut_power(case: Case, layer: Layer, images: &Images, directory: &Path) -> Result<(), String> {
    let mut device = Device::new(images, layer, directory);
    let cutter = Cutter::new(case.operation, Some(device.switch()));
    let io = Tap::new(case.backend(), &cutter);
    let (legal, states) = Player::play_until(
        (&device.path(), io),
        case.settings(),
        HISTORIES[case.history].0,
        || cutter.is_cut.load(Ordering::SeqCst),
    );
    cutter.cut();
    device.restore();
    let path = device.path().join(store());
    check(&path, path.exists(), &legal, &states, &Tools::new())
}

#[test]
fn an_acknowledged_checkpoint_survives_a_power_cut() {
    with_own_mounts(NAME, Mounts::Loops, cut_power_at_every_operation);
}

fn cut_power_at_every_operation() {
    let cases = cases();
    let start = |directory: &Path| (directory.to_owned(), Images::new(directory));
    let outcome = budget::run(Budget::of(SHORT), u64::MAX, start, |(directory, images), number| {
        let layer = LAYERS[usize::try_from(number % 3).unwrap()];
        // After all of them once more: what is on its way at a cut is another each time.
        let case = cases[usize::try_from(number / 3).unwrap() % cases.len()];
        cut_power(case, layer, images, directory).map(|()| true).map_err(|why| {
            format!(
                "cut {number} ({case:?} of {:?} on {layer:?}): {why}\nagain with \
                 DTR_TORTURE_FIRST={number} DTR_TORTURE_STATES=1",
                HISTORIES[case.history]
            )
        })
    });
    println!(
        "{} power cuts, a third of them each on {LAYERS:?}; {} places to cut: every operation of \
         {} histories, on both backends, direct and buffered",
        outcome.tried,
        cases.len(),
        HISTORIES.len()
    );
}
