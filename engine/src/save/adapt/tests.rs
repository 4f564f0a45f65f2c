//! `auto` against the better of `none` and `float`, in a simulated save: workers, queue, bounded
//! flight and a device of an exact rate, in simulated time, so that every run is the same.
#![expect(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "chunks and their bytes, as times and back"
)]

use std::collections::VecDeque;
use std::sync::Arc;

use fastrand::Rng;

use super::*;
use crate::clock::Manual;
use crate::store::flow::{Flow, Pace, SyncBegun};

const MIB: f64 = 1_048_576.0;
const CHUNK_BYTES: usize = 4 << 20;
const IN_FLIGHT_BYTES_MAX: u64 = 32 << 20;
/// How much lands until the next sync.
const SYNC_EVERY_BYTES: u64 = 64 << 20;

/// How chunks are encoded.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Policy {
    None,
    Float,
    Auto,
}

/// A machine and a state.
#[derive(Clone, Copy, Debug)]
struct Scene {
    workers: usize,
    chunks: usize,
    /// Bytes a second that the device takes.
    device_rate: f64,
    /// Bytes a second that it makes durable while it syncs.
    store_rate: f64,
    /// Of one worker, in raw bytes a second.
    encode_rate: f64,
    checksum_rate: f64,
    stored_fraction: f64,
    /// Of a core that a worker gets.
    core_share: f64,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Worker {
    Idle,
    Checksums { until: f64 },
    Encodes { since: f64, until: f64 },
    Waits { stored_bytes: u64 },
}

/// One save of a [`Scene`].
struct Save<'a> {
    scene: Scene,
    policy: Policy,
    adaptation: &'a Adaptation,
    clock: Arc<Manual>,
    flow: Flow,
    now: f64,
    chunks_left: usize,
    workers: Vec<Worker>,
    queue: VecDeque<u64>,
    in_flight: VecDeque<u64>,
    /// When the write at the head of the flight lands.
    lands_at: f64,
    encoded: usize,
    landed_bytes: u64,
    stored_bytes: u64,
    sync: Option<Sync>,
    random: Rng,
}

/// A sync that is under way.
struct Sync {
    begun: SyncBegun,
    covers_bytes: u64,
    until: f64,
}

impl<'a> Save<'a> {
    fn new(scene: Scene, policy: Policy, adaptation: &'a Adaptation, pace: Option<Pace>) -> Self {
        let clock = Arc::new(Manual::default());
        Self {
            scene,
            policy,
            adaptation,
            flow: Flow::new(Arc::clone(&clock) as _, pace),
            clock,
            now: 0.0,
            chunks_left: scene.chunks,
            workers: vec![Worker::Idle; scene.workers],
            queue: VecDeque::new(),
            in_flight: VecDeque::new(),
            lands_at: 0.0,
            encoded: 0,
            landed_bytes: 0,
            stored_bytes: 0,
            sync: None,
            random: Rng::with_seed(1),
        }
    }

    /// Seconds until everything is durable, how fast the device was found to be, and how many
    /// chunks were encoded.
    fn run(mut self) -> (f64, Pace, usize) {
        loop {
            self.settle();
            let busy = self.workers.iter().filter_map(|worker| match worker {
                Worker::Checksums { until } | Worker::Encodes { until, .. } => Some(*until),
                _ => None,
            });
            let landing = (!self.in_flight.is_empty()).then_some(self.lands_at);
            let synced = self.sync.as_ref().map(|sync| sync.until);
            let Some(next) = busy.chain(landing).chain(synced).min_by(f64::total_cmp) else {
                break;
            };
            self.now = next;
            self.clock.set(Duration::from_secs_f64(next));
            self.happen();
        }
        assert_eq!((self.chunks_left, self.flow.read().in_flight_bytes), (0, 0));
        self.begin_sync();
        self.now = self.sync.as_ref().map_or(self.now, |sync| sync.until);
        self.clock.set(Duration::from_secs_f64(self.now));
        self.end_sync();
        (self.now, self.flow.pace(), self.encoded)
    }

    fn begin_sync(&mut self) {
        let bytes = self.landed_bytes - self.stored_bytes;
        self.sync = Some(Sync {
            begun: self.flow.begin_sync(),
            covers_bytes: self.landed_bytes,
            until: self.now + bytes as f64 / self.scene.store_rate,
        });
    }

    fn end_sync(&mut self) {
        if let Some(sync) = self.sync.take_if(|sync| sync.until <= self.now) {
            self.flow.end_sync(&sync.begun);
            self.stored_bytes = sync.covers_bytes;
        }
    }

    /// All that needs no time: chunks are taken up, queued, given to the device.
    fn settle(&mut self) {
        loop {
            let before = (self.chunks_left, self.queue.len(), self.in_flight.len());
            for index in 0..self.workers.len() {
                self.settle_worker(index);
            }
            let in_flight_bytes: u64 = self.in_flight.iter().sum();
            let fits = |bytes: &u64| {
                self.in_flight.is_empty() || in_flight_bytes + bytes <= IN_FLIGHT_BYTES_MAX
            };
            if let Some(bytes) = self.queue.pop_front_if(|bytes| fits(bytes)) {
                if self.in_flight.is_empty() {
                    self.lands_at = self.now + bytes as f64 / self.scene.device_rate;
                }
                self.flow.accept(bytes);
                self.flow.arrive(bytes);
                self.in_flight.push_back(bytes);
            }
            if self.sync.is_none() && self.landed_bytes - self.stored_bytes >= SYNC_EVERY_BYTES {
                self.begin_sync();
            }
            if before == (self.chunks_left, self.queue.len(), self.in_flight.len()) {
                return;
            }
        }
    }

    fn settle_worker(&mut self, index: usize) {
        match self.workers[index] {
            Worker::Idle if self.chunks_left > 0 => {
                self.chunks_left -= 1;
                let seconds = CHUNK_BYTES as f64 / self.scene.checksum_rate;
                let until = self.now + seconds / self.scene.core_share;
                self.workers[index] = Worker::Checksums { until };
            }
            Worker::Waits { stored_bytes } if self.queue.len() < 2 * self.scene.workers => {
                self.queue.push_back(stored_bytes);
                self.workers[index] = Worker::Idle;
            }
            _ => {}
        }
    }

    /// What is due now.
    fn happen(&mut self) {
        self.end_sync();
        if !self.in_flight.is_empty() && self.lands_at <= self.now {
            let bytes = self.in_flight.pop_front().unwrap();
            self.flow.land(bytes);
            self.landed_bytes += bytes;
            if let Some(next) = self.in_flight.front() {
                self.lands_at = self.now + *next as f64 / self.scene.device_rate;
            }
        }
        for index in 0..self.workers.len() {
            match self.workers[index] {
                Worker::Checksums { until } if until <= self.now => self.checksummed(index),
                Worker::Encodes { since, until } if until <= self.now => {
                    self.encoded += 1;
                    let stored_bytes = (CHUNK_BYTES as f64 * self.scene.stored_fraction) as usize;
                    let checksum =
                        CHUNK_BYTES as f64 / self.scene.checksum_rate / self.scene.core_share;
                    let wall = Duration::from_secs_f64(self.now - since + checksum);
                    let cpu = wall.mul_f64(self.scene.core_share);
                    let raw_bytes = CHUNK_BYTES;
                    let seen = Observation { raw_bytes, stored_bytes, wall, cpu };
                    self.adaptation.learn(ElementType::F32, seen);
                    self.ready(index, stored_bytes as u64);
                }
                _ => {}
            }
        }
    }

    fn checksummed(&mut self, index: usize) {
        let encodes = match self.policy {
            Policy::None => false,
            Policy::Float => true,
            Policy::Auto => {
                let outlook = Outlook {
                    flow: self.flow.read(),
                    workers: self.scene.workers as f64,
                    chunks_left: self.chunks_left as f64 + 1.0,
                    raw_bytes: CHUNK_BYTES as f64,
                };
                self.adaptation.should_encode(ElementType::F32, outlook)
            }
        };
        if encodes {
            // No two chunks take the same time.
            let varied = 0.8 + 0.4 * self.random.f64();
            let seconds = CHUNK_BYTES as f64 / self.scene.encode_rate * varied;
            let until = self.now + seconds / self.scene.core_share;
            self.workers[index] = Worker::Encodes { since: self.now, until };
        } else {
            self.ready(index, CHUNK_BYTES as u64);
        }
    }

    fn ready(&mut self, index: usize, stored_bytes: u64) {
        self.flow.expect(stored_bytes);
        self.workers[index] = Worker::Waits { stored_bytes };
    }
}

const SCENE: Scene = Scene {
    workers: 2,
    chunks: 256,
    device_rate: 500.0 * MIB,
    store_rate: 1e12,
    encode_rate: 1200.0 * MIB,
    checksum_rate: 6000.0 * MIB,
    stored_fraction: 0.8,
    core_share: 1.0,
};

/// Seconds of a first save by `auto`, and of the one after, which knows the device.
fn auto_seconds(scene: Scene) -> [f64; 2] {
    let adaptation = Adaptation::new();
    let (first, pace, _) = Save::new(scene, Policy::Auto, &adaptation, None).run();
    let (second, _, _) = Save::new(scene, Policy::Auto, &adaptation, Some(pace)).run();
    [first, second]
}

fn fixed_seconds(scene: Scene, policy: Policy) -> f64 {
    Save::new(scene, policy, &Adaptation::new(), None).run().0
}

/// A twentieth more than the better of the fixed choices, and what nobody notices.
fn allowed_seconds(scene: Scene) -> f64 {
    let none = fixed_seconds(scene, Policy::None);
    1.05 * none.min(fixed_seconds(scene, Policy::Float)) + 0.010
}

/// What finding out costs a first save: a few chunks passed on raw, and one encoded to no avail.
fn learning_seconds(scene: Scene) -> f64 {
    4.0 * CHUNK_BYTES as f64 / scene.device_rate + CHUNK_BYTES as f64 / scene.encode_rate
}

#[test]
fn auto_is_at_most_a_twentieth_slower_than_the_better_of_none_and_float() {
    let mut scenes = 0;
    for device_mib in [20.0, 50.0, 100.0, 200.0, 400.0, 700.0, 1000.0, 2000.0, 4000.0, 20_000.0] {
        for encode_mib in [300.0, 600.0, 1200.0, 3000.0] {
            for (workers, chunks) in
                [1, 2, 8].into_iter().flat_map(|w| [25, 256, 1024].map(|c| (w, c)))
            {
                for stored_fraction in [0.3, 0.66, 0.83, 0.97] {
                    let scene = Scene {
                        workers,
                        chunks,
                        device_rate: device_mib * MIB,
                        encode_rate: encode_mib * MIB,
                        stored_fraction,
                        ..SCENE
                    };
                    let [first, second] = auto_seconds(scene);
                    let allowed = allowed_seconds(scene);
                    assert!(second <= allowed, "{second} s, {allowed} s allowed: {scene:?}");
                    let allowed = allowed + learning_seconds(scene);
                    assert!(first <= allowed, "first: {first} s, {allowed} s allowed: {scene:?}");
                    scenes += 1;
                }
            }
        }
    }
    println!("{scenes} scenes");
}

#[test]
fn a_device_that_takes_bytes_fast_and_stores_them_slowly_is_a_slow_one() {
    for store_mib in [100.0, 300.0, 1000.0, 10_000.0] {
        for device_mib in [500.0, 2000.0, 8000.0] {
            let scene =
                Scene { device_rate: device_mib * MIB, store_rate: store_mib * MIB, ..SCENE };
            let [_, second] = auto_seconds(scene);
            let allowed = allowed_seconds(scene);
            assert!(second <= allowed, "{second} s, {allowed} s allowed: {scene:?}");
        }
    }
}

#[test]
fn auto_beats_both_where_device_and_codec_are_equally_fast() {
    let scene = Scene { encode_rate: 600.0 * MIB, device_rate: 1200.0 * MIB, ..SCENE };
    let better = fixed_seconds(scene, Policy::None).min(fixed_seconds(scene, Policy::Float));
    let [_, auto] = auto_seconds(scene);
    assert!(auto < 0.97 * better, "{auto} s against {better} s");
}

#[test]
fn cores_that_others_want_are_left_to_them() {
    let scene = Scene { core_share: 0.2, ..SCENE };
    let adaptation = Adaptation::new();
    let (_, pace, first) = Save::new(scene, Policy::Auto, &adaptation, None).run();
    let (_, pace, second) = Save::new(scene, Policy::Auto, &adaptation, Some(pace)).run();
    // A few chunks, to find out.
    assert!(first < scene.chunks / 8 && second < scene.chunks / 8, "{first}, {second}");
    // And it comes back once they are free again.
    let free = Scene { core_share: 1.0, ..SCENE };
    let mut pace = pace;
    let mut encoded = 0;
    for _ in 0..3 {
        (_, pace, encoded) = Save::new(free, Policy::Auto, &adaptation, Some(pace)).run();
    }
    assert!(encoded > free.chunks / 2, "{encoded}");
}

#[test]
fn bytes_that_are_no_numbers_stay_as_they_are() {
    let flow = FlowReading { backlog_bytes: 1e9, in_flight_bytes: 0, bytes_per_second: 1e6 };
    let outlook = Outlook { flow, workers: 2.0, chunks_left: 9.0, raw_bytes: 4e6 };
    assert!(!Adaptation::new().should_encode(ElementType::Bytes, outlook));
    assert!(Adaptation::new().should_encode(ElementType::Bf16, outlook));
}
