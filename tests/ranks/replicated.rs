//! Replicated entries: written once, a part by each, and read at any world size.

use dtr_engine::config::Compression;
use dtr_engine::format::index::ShardIndex;
use dtr_engine::format::layout::ElementType;
use dtr_engine::format::tree::Value;
use dtr_engine::load::{Checkpoint, ReadOptions, Target};
use dtr_engine::save::{SaveInfo, SaveRequest};
use dtr_engine::{Config, Engine, EngineError, Result};
use fastrand::Rng;

use crate::support::{State, Storage, finish};
use crate::world::{Rank, World, refusals, together};

/// What one rank has: the first storages are the same on all of them.
struct Mixed {
    state: State,
    shared: usize,
}

impl Mixed {
    fn new(rank: u32, step: u64) -> Self {
        let State(mut storages) = State::training(step, 1);
        let shared = storages.len();
        let State(own) = State::training(step * 1000 + u64::from(rank), 1);
        // Ranks need not have as much of their own.
        storages.extend(own.into_iter().skip(5).take(1 + rank as usize % 3));
        Self { state: State(storages), shared }
    }

    /// Sizes, types and what is shared by chance.
    fn random(seed: u64, rank: u32) -> Self {
        let storages = |mut random: Rng, count: usize| -> Vec<Storage> {
            let mut storage = || {
                let element = ElementType::ALL[random.usize(..ElementType::ALL.len())];
                let most = [1, 100, 70_000, 600_000][random.usize(..4)];
                let mut bytes = vec![0; random.usize(..most)];
                random.fill(&mut bytes);
                Storage { element, bytes }
            };
            (0..count).map(|_| storage()).collect()
        };
        let mut random = Rng::with_seed(seed);
        let mut all = storages(random.fork(), random.usize(1..=7));
        let shared = all.len();
        let own = random.usize(..4);
        all.extend(storages(Rng::with_seed(random.u64(..) ^ u64::from(rank)), own));
        Self { state: State(all), shared }
    }

    fn request(&self, step: u64) -> SaveRequest<'_> {
        let request = self.state.request(step);
        let last = u32::try_from(request.nodes.len() - 1).unwrap();
        let shared = 1..=u32::try_from(self.shared).unwrap();
        SaveRequest { replicated: shared.chain([last]).collect(), ..request }
    }

    fn save(&self, rank: &Rank, step: u64) -> Result<SaveInfo> {
        finish(&rank.engine.save(self.request(step))?)
    }

    fn shared_bytes(&self) -> u64 {
        self.state.0[..self.shared].iter().map(|storage| storage.bytes.len() as u64).sum()
    }

    /// Whether the shared part is what was saved.
    fn assert_shared(&self, checkpoint: &Checkpoint) {
        for (tensor, storage) in self.state.0[..self.shared].iter().enumerate() {
            assert!(read(checkpoint, tensor).unwrap() == storage.bytes, "storage {tensor}");
        }
    }
}

/// All of one tensor, from the last byte to the first in odd pieces: nothing hangs on the order.
fn read(checkpoint: &Checkpoint, tensor: usize) -> Result<Vec<u8>> {
    let storage = checkpoint.index().tensors[tensor].storage;
    let bytes = usize::try_from(checkpoint.storages()[storage as usize].bytes).unwrap();
    let mut memory = vec![0xAA; bytes];
    let mut targets = Vec::new();
    let mut rest = memory.as_mut_slice();
    while !rest.is_empty() {
        let (before, piece) = rest.split_at_mut(rest.len() - rest.len().min(99_991));
        targets.push(Target { storage, offset: before.len() as u64, memory: piece });
        rest = before;
    }
    checkpoint.read(targets, ReadOptions::default())?;
    Ok(memory)
}

fn save_all(ranks: &[Rank], step: u64) -> Vec<SaveInfo> {
    let saved = together(ranks, |rank| Mixed::new(rank.number, step).save(rank, step));
    saved.into_iter().collect::<Result<_>>().unwrap()
}

fn reader(world: &World, rank: u32, world_size: u32) -> Engine {
    let config = Config { rank, world_size, read_only: true, ..world.config(0) };
    Engine::open(config).unwrap()
}

fn held_bytes(index: &ShardIndex) -> u64 {
    index.storages.iter().filter_map(|storage| storage.replica).map(|part| part.bytes).sum()
}

#[test]
fn each_rank_writes_an_even_part_and_gets_everything_back() {
    let world = World::new(4);
    let ranks = world.ranks();
    save_all(&ranks, 5);
    let shared_bytes = Mixed::new(0, 5).shared_bytes();
    let mut held = Vec::new();
    for rank in &ranks {
        let checkpoint = rank.engine.checkpoint(5).unwrap();
        Mixed::new(rank.number, 5).state.assert_equals(&checkpoint);
        held.push(held_bytes(checkpoint.index()));
    }
    assert_eq!(held.iter().sum::<u64>(), shared_bytes, "every byte once");
    let mean = shared_bytes / 4;
    assert!(held.iter().all(|held| *held <= mean + mean / 16 + 4096), "{held:?} of {mean}");
    let reader = world.reader(0);
    assert_eq!(reader.verify(5, &()).unwrap().damage, []);
    let manifest = reader.manifest(5).unwrap();
    assert!(manifest.shards.iter().all(|shard| shard.replicated[..2] == ["tensor0", "tensor1"]));
}

#[test]
fn any_number_of_ranks_loads_what_is_shared_and_nothing_of_another_rank() {
    let world = World::new(3);
    save_all(&world.ranks(), 1);
    let saved = Mixed::new(0, 1);
    for (rank, world_size) in [(0, 1), (1, 2), (0, 4), (7, 8)] {
        let checkpoint = reader(&world, rank, world_size).checkpoint(1).unwrap();
        assert!(checkpoint.is_replicated_only());
        saved.assert_shared(&checkpoint);
        let own = checkpoint.index().tensors.len() - 1;
        let error = read(&checkpoint, own).unwrap_err();
        assert!(matches!(error, EngineError::InvalidArgument { .. }), "{error:?}");
        let own = checkpoint.index().tensors[own].storage;
        assert!(checkpoint.map(&[own], true).is_err(), "nor may it be mapped");
    }
    // Who names a rank gets what that one had.
    let other = reader(&world, 0, 1).checkpoint_of_rank(1, 2).unwrap();
    Mixed::new(2, 1).state.assert_equals(&other);
}

#[test]
fn one_rank_saves_for_any_number() {
    let world = World::new(1);
    let engine = Engine::open(world.config(0)).unwrap();
    let saved = Mixed::new(0, 1);
    finish(&engine.save(saved.request(1)).unwrap()).unwrap();
    saved.state.assert_equals(&engine.checkpoint(1).unwrap());
    let checkpoint = reader(&world, 2, 3).checkpoint(1).unwrap();
    saved.assert_shared(&checkpoint);
    assert!(checkpoint.is_replicated_only());
}

#[test]
fn damage_in_one_shard_is_met_by_whoever_needs_it_and_named() {
    let world = World::new(3);
    let ranks = world.ranks();
    save_all(&ranks, 1);
    let file = &world.reader(0).manifest(1).unwrap().shards[2].file;
    let path = world.path().join("step-000000000001").join(file);
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[5000] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    for rank in &ranks {
        let checkpoint = rank.engine.checkpoint(1).unwrap();
        let error = Mixed::new(rank.number, 1).state.try_assert_equals(&checkpoint).unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, EngineError::Corrupt { .. }), "{text}");
        assert!(text.contains("rank-00002") && text.contains("affected tensors: tensor"), "{text}");
    }
    std::fs::remove_file(&path).unwrap();
    let error = ranks[0].engine.checkpoint(1).unwrap_err();
    assert!(error.to_string().contains("rank-00002"), "{error}");
}

#[test]
fn ranks_that_disagree_save_nothing_and_are_told_where() {
    let world = World::new(3);
    let ranks = world.ranks();
    save_all(&ranks, 1);
    let disagree = |step: u64, change: &(dyn Fn(&mut SaveRequest<'_>) + Sync)| {
        let saved = together(&ranks, |rank| {
            let mixed = Mixed::new(rank.number, step);
            let mut request = mixed.request(step);
            if rank.number == 1 {
                change(&mut request);
            }
            finish(&rank.engine.save(request)?)
        });
        refusals(saved)
    };
    let refused = disagree(2, &|request| {
        let last = request.nodes.last_mut().unwrap();
        last.value = Value::Int(7);
    });
    for error in &refused {
        assert!(error.contains("`step` is") && error.contains("7 on rank 1"), "{error}");
    }
    let refused = disagree(3, &|request| request.replicated.clear());
    assert!(refused.iter().all(|error| error.contains("not replicated")), "{refused:?}");
    let refused = disagree(4, &|request| {
        request.tensors[0].shape = vec![request.storages[0].bytes / 2, 2];
        request.tensors[0].strides = vec![2, 1];
    });
    assert!(refused.iter().all(|error| error.contains("`tensor0` is a `uint8` tensor")));
    let reader = world.reader(0);
    assert_eq!(reader.steps().unwrap(), [1]);
    // None of them was asked to publish and did not say that it will not: nothing is left.
    let left: usize = reader.survey().unwrap().steps.iter().map(|step| step.orphans.len()).sum();
    assert_eq!(left, 0, "{:?}", reader.survey());
    save_all(&ranks, 5);
}

#[test]
fn memory_that_is_partly_a_rank_s_own_is_refused() {
    let world = World::new(2);
    let ranks = world.ranks();
    let refused = together(&ranks, |rank| {
        let mixed = Mixed::new(rank.number, 1);
        let mut request = mixed.request(1);
        // The first half is shared; what this rank has behind it, another would write.
        let bytes = request.storages[0].bytes / 2;
        request.tensors[0].shape = vec![bytes];
        let last = request.tensors.last_mut().unwrap();
        (last.storage, last.offset, last.shape) = (0, bytes - 1, vec![10]);
        finish(&rank.engine.save(request)?)
    });
    for error in refusals(refused) {
        assert!(error.contains("shares memory"), "{error}");
    }
    assert!(world.reader(0).steps().unwrap().is_empty());
}

#[test]
fn ranks_may_cut_and_encode_as_they_like() {
    let world = World::new(3);
    let compressions = [Compression::None, Compression::Zstd, Compression::Float];
    let open = |number: u32| {
        let compression = compressions[number as usize];
        let config = Config { chunk_bytes: 65_536 << number, compression, ..world.config(number) };
        world.rank_through(number, config, |ranks| ranks)
    };
    let ranks: Vec<Rank> = (0..3).map(open).collect();
    save_all(&ranks, 1);
    for rank in &ranks {
        Mixed::new(rank.number, 1).state.assert_equals(&rank.engine.checkpoint(1).unwrap());
    }
    Mixed::new(0, 1).assert_shared(&reader(&world, 0, 1).checkpoint(1).unwrap());
}

#[test]
fn states_by_chance_come_back_at_every_world_size() {
    for seed in 0..12_u64 {
        println!("seed {seed}");
        let world = World::new(1 + u32::try_from(seed % 5).unwrap());
        let ranks = world.ranks();
        let saved = together(&ranks, |rank| Mixed::random(seed, rank.number).save(rank, 1));
        saved.into_iter().collect::<Result<Vec<_>>>().unwrap();
        for rank in 0..world.size {
            let checkpoint = world.reader(rank).checkpoint(1).unwrap();
            Mixed::random(seed, rank).state.assert_equals(&checkpoint);
        }
        for world_size in 1..7 {
            let checkpoint = reader(&world, world_size - 1, world_size).checkpoint(1).unwrap();
            Mixed::random(seed, 0).assert_shared(&checkpoint);
        }
        assert_eq!(world.reader(0).verify(1, &()).unwrap().damage, [], "seed {seed}");
    }
}
