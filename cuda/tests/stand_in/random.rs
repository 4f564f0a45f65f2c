//! Random saves, restores and training steps on two devices at once, against a model that does them
//! one after the other.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::thread;

use dtr_cuda::{Device, Direction};
use fastrand::Rng;

use crate::scene::{
    CallerStream, Log, Memory, Scene, clone_part, copy_down_clone, copy_down_from, copy_up, follow,
    noise, precede,
};

const SLOTS: usize = 8;
const SLOT_BYTES: usize = 257;
const SEEDS: u64 = 12;
const ACTIONS: usize = 150;

/// A device, what its memory holds, and what it should hold when all is done.
struct Played {
    device: Arc<Device>,
    stream: CallerStream,
    memory: Memory,
    model: Vec<u8>,
    down: Log,
    up: Log,
    /// What each landing should get, by its index.
    expected: BTreeMap<usize, Vec<u8>>,
    random: Rng,
}

impl Played {
    fn new(ordinal: u32, seed: u64) -> Self {
        let model = noise(seed, SLOTS * SLOT_BYTES);
        Self {
            device: Device::open(ordinal).unwrap(),
            stream: CallerStream::new(ordinal),
            memory: Memory::holding(ordinal, &model),
            model,
            down: Log::default(),
            up: Log::default(),
            expected: BTreeMap::new(),
            random: Rng::with_seed(seed),
        }
    }

    fn act(&mut self) {
        let (first, last) = (self.random.usize(..SLOTS), self.random.usize(..SLOTS));
        let offset = first.min(last) * SLOT_BYTES;
        let bytes = (first.max(last) + 1) * SLOT_BYTES - offset - self.random.usize(..SLOT_BYTES);
        match self.random.usize(..5) {
            0 => self.train(offset, bytes),
            1 => self.save(offset, bytes),
            2 => self.save_by_clone(offset, bytes),
            3 => self.restore(offset, bytes),
            _ => {
                let direction = [Direction::Down, Direction::Up][self.random.usize(..2)];
                self.device.flush(direction).unwrap();
            }
        }
    }

    /// The caller's stream changes memory behind all copies.
    fn train(&mut self, offset: usize, bytes: usize) {
        let content = noise(self.random.u64(..), bytes);
        precede(&self.device, Direction::Down, &self.stream).unwrap();
        precede(&self.device, Direction::Up, &self.stream).unwrap();
        self.stream.write(&self.memory, offset, &content);
        self.model[offset..offset + bytes].copy_from_slice(&content);
    }

    fn save(&mut self, offset: usize, bytes: usize) {
        self.let_saves_follow();
        self.expect(offset, bytes);
        copy_down_from(&self.device, &self.memory, offset, self.down.landing(bytes));
    }

    fn save_by_clone(&mut self, offset: usize, bytes: usize) {
        self.let_saves_follow();
        self.expect(offset, bytes);
        let clone = clone_part(&self.device, &self.memory, offset, bytes).unwrap();
        copy_down_clone(&self.device, &clone, self.down.landing(bytes));
    }

    /// Copies down run behind the caller's stream, which waits for the copies up.
    fn let_saves_follow(&self) {
        precede(&self.device, Direction::Up, &self.stream).unwrap();
        follow(&self.device, Direction::Down, &self.stream).unwrap();
    }

    fn expect(&mut self, offset: usize, bytes: usize) {
        let content = self.model[offset..offset + bytes].to_vec();
        self.expected.insert(self.expected.len(), content);
    }

    /// Copies up run behind the caller's stream, which waits for the copies down.
    fn restore(&mut self, offset: usize, bytes: usize) {
        let content = noise(self.random.u64(..), bytes);
        precede(&self.device, Direction::Down, &self.stream).unwrap();
        follow(&self.device, Direction::Up, &self.stream).unwrap();
        copy_up(&self.device, self.up.takeoff(&content), &self.memory, offset);
        self.model[offset..offset + bytes].copy_from_slice(&content);
    }

    fn finish(mut self, scene: &Scene, seed: u64) {
        self.device.finish(Direction::Down).unwrap();
        self.device.finish(Direction::Up).unwrap();
        scene.settle();
        assert!(self.memory.content() == self.model, "seed {seed}: the memory is wrong");
        assert!(self.up.all().iter().all(|told| told.outcome == Ok(())), "seed {seed}");
        for told in self.down.all() {
            let expected = self.expected.remove(&told.index);
            assert_eq!(told.outcome, Ok(()), "seed {seed}, landing {}", told.index);
            assert!(Some(told.memory) == expected, "seed {seed}, landing {}", told.index);
        }
        assert!(self.expected.is_empty(), "seed {seed}");
    }
}

#[test]
fn random_saves_and_restores_are_those_of_the_model() {
    for seed in 0..SEEDS {
        let scene = Scene::new();
        let mut random = Rng::with_seed(seed);
        let mut played = [Played::new(0, 2 * seed), Played::new(1, 2 * seed + 1)];
        scene.delay_copies([0, 20, 100][random.usize(..3)]);
        thread::scope(|scope| {
            for one in &mut played {
                scope.spawn(|| (0..ACTIONS).for_each(|_| one.act()));
            }
        });
        for one in played {
            one.finish(&scene, seed);
        }
    }
}
