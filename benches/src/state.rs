//! A training state that looks like one: bf16 weights, their fp32 masters, and AdamW's two moments.
//!
//! What a codec and a checksum see depends on how the bits are spread, so they are spread as in
//! training: weights and first moments are about normal around 0, each master is within a rounding
//! of its weight, second moments are positive and about log-normal over many octaves, and every
//! mantissa is full. Zeros, or one repeated block, would flatter every codec.
//!
//! Always holds: the same seed and size make the same bytes on every machine: nothing here goes
//! through a mathematical library whose rounding differs.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use dtr_engine::format::checksum::{combine, crc32c};
use dtr_engine::format::index::{TensorKind, TensorRecord};
use dtr_engine::format::layout::ElementType;
use dtr_engine::format::tree::{DictKind, Key, Node, Value};
use dtr_engine::load::{Checkpoint, ReadOptions, ReadStats, Target};
use dtr_engine::save::{SaveRequest, StorageInput};
use fastrand::Rng;

/// Bytes of one parameter: weight, master, and both moments.
pub const PARAMETER_BYTES: u64 = 2 + 4 + 4 + 4;
/// Most parameters of one tensor: a weight matrix of 1024 by 1024.
const TENSOR_PARAMETERS_MAX: u64 = 1 << 20;
/// What each parameter has, in the order of the storages.
const ROLES: [Role; 4] = [Role::Weight, Role::Master, Role::FirstMoment, Role::SecondMoment];

/// Storages, each with one tensor over all of it.
#[derive(Debug)]
pub struct State {
    storages: Vec<Storage>,
}

#[derive(Debug)]
struct Storage {
    role: Role,
    bytes: Vec<u8>,
}

/// What a tensor is to the optimizer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Weight,
    Master,
    FirstMoment,
    SecondMoment,
}

impl Role {
    fn name(self) -> &'static str {
        match self {
            Self::Weight => "weights",
            Self::Master => "masters",
            Self::FirstMoment => "exp_avg",
            Self::SecondMoment => "exp_avg_sq",
        }
    }

    fn element(self) -> ElementType {
        if self == Self::Weight { ElementType::Bf16 } else { ElementType::F32 }
    }

    fn dtype(self) -> &'static str {
        if self == Self::Weight { "bfloat16" } else { "float32" }
    }

    fn item_bytes(self) -> u32 {
        if self == Self::Weight { 2 } else { 4 }
    }
}

impl State {
    /// About `raw_bytes`, rounded down to whole parameters, from `seed`. Uses every core.
    pub fn generate(seed: u64, raw_bytes: u64) -> Self {
        let tensors = tensor_lengths(raw_bytes / PARAMETER_BYTES);
        let made: Vec<Mutex<[Vec<u8>; 4]>> = tensors.iter().map(|_| Mutex::default()).collect();
        let next = AtomicUsize::new(0);
        let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        std::thread::scope(|scope| {
            for _ in 0..threads {
                scope.spawn(|| {
                    loop {
                        let index = next.fetch_add(1, Ordering::Relaxed);
                        let Some(&parameters) = tensors.get(index) else { break };
                        let seed = seed ^ (index as u64).wrapping_mul(0xa076_1d64_78bd_642f);
                        let tensor = generate_tensor(seed, parameters);
                        *made[index].lock().expect("no thread panics while it holds this") = tensor;
                    }
                });
            }
        });
        let tensors = made.into_iter().map(|made| made.into_inner().expect("as above"));
        let storages = tensors.flat_map(|tensor| {
            ROLES.into_iter().zip(tensor).map(|(role, bytes)| Storage { role, bytes })
        });
        Self { storages: storages.collect() }
    }

    /// Bytes of all storages.
    pub fn raw_bytes(&self) -> u64 {
        self.storages.iter().map(|storage| storage.bytes.len() as u64).sum()
    }

    /// CRC-32C of all storages, end to end.
    pub fn crc32c(&self) -> u32 {
        crc32c_of(self.storages.iter().map(|storage| storage.bytes.as_slice()))
    }

    /// The request that saves this state as `step`.
    pub fn request(&self, step: u64) -> SaveRequest<'_> {
        SaveRequest {
            step,
            rewind: false,
            nodes: self.tree(),
            tensors: (0_u32..).zip(&self.storages).map(whole_tensor).collect(),
            storages: self
                .storages
                .iter()
                .map(|storage| StorageInput {
                    bytes: storage.bytes.len() as u64,
                    element: storage.role.element(),
                    source: &storage.bytes,
                })
                .collect(),
            replicated: Vec::new(),
            waited: std::time::Duration::ZERO,
            prepared: std::time::Duration::ZERO,
            metadata: BTreeMap::new(),
            dataset_positions: BTreeMap::new(),
        }
    }

    /// Memory for this state, touched already and holding what no save wrote there.
    pub fn memory(&self) -> Memory {
        let storages = self.storages.iter().map(|storage| vec![0; storage.bytes.len()]).collect();
        let mut memory = Memory { storages };
        memory.spoil();
        memory
    }

    /// The first storage that differs from `memory`, in words.
    pub fn difference(&self, memory: &Memory) -> Option<String> {
        let pairs = self.storages.iter().zip(&memory.storages).enumerate();
        let (index, (storage, read)) = pairs.into_iter().find(|(_, (a, b))| a.bytes != **b)?;
        let same = storage.bytes.iter().zip(read).take_while(|(a, b)| a == b).count();
        Some(format!(
            "storage {index} ({}) came back changed from its byte {same} on",
            storage.role.name()
        ))
    }

    /// A dict for each role, with a dict entry for each of its tensors.
    fn tree(&self) -> Vec<Node> {
        let dict = |key, len: usize| Node {
            key,
            value: Value::Dict {
                len: u32::try_from(len).expect("a state has few tensors"),
                kind: DictKind::Plain,
                metadata: false,
            },
        };
        let mut nodes = vec![dict(None, ROLES.len())];
        for role in ROLES {
            let tensors = (0_u32..).zip(&self.storages).filter(|(_, storage)| storage.role == role);
            let tensors: Vec<Node> = tensors
                .enumerate()
                .map(|(layer, (tensor, _))| Node {
                    key: Some(Key::Str(format!("layers.{layer}.weight"))),
                    value: Value::Tensor(tensor),
                })
                .collect();
            nodes.push(dict(Some(Key::Str(role.name().into())), tensors.len()));
            nodes.extend(tensors);
        }
        nodes
    }
}

/// Memory that a checkpoint is read into.
#[derive(Debug)]
pub struct Memory {
    storages: Vec<Vec<u8>>,
}

impl Memory {
    /// Overwrites all of it, so that bytes which a load leaves out are seen.
    pub fn spoil(&mut self) {
        for storage in &mut self.storages {
            storage.fill(0xA5);
        }
    }

    /// Reads all of a checkpoint, which must be of the state that this memory was made for.
    pub fn fill_from(&mut self, checkpoint: &Checkpoint) -> dtr_engine::Result<ReadStats> {
        let targets = (0_u32..)
            .zip(&mut self.storages)
            .map(|(storage, memory)| Target { storage, offset: 0, memory })
            .map(|target| Target {
                storage: checkpoint.index().tensors[target.storage as usize].storage,
                ..target
            })
            .collect();
        checkpoint.read(targets, ReadOptions::default())
    }

    /// CRC-32C of all of it, end to end.
    pub fn crc32c(&self) -> u32 {
        crc32c_of(self.storages.iter().map(Vec::as_slice))
    }
}

fn crc32c_of<'a>(parts: impl Iterator<Item = &'a [u8]>) -> u32 {
    parts.fold(0, |crc, part| combine(crc, crc32c(part), part.len()))
}

fn whole_tensor((index, storage): (u32, &Storage)) -> TensorRecord {
    let item_bytes = storage.role.item_bytes();
    TensorRecord {
        storage: index,
        kind: TensorKind::Torch,
        dtype: storage.role.dtype().into(),
        item_bytes,
        shape: vec![storage.bytes.len() as u64 / u64::from(item_bytes)],
        strides: vec![1],
        offset: 0,
        requires_grad: storage.role == Role::Weight,
        slice: None,
    }
}

/// As many of the largest tensors as fit, and one of the rest.
fn tensor_lengths(parameters: u64) -> Vec<usize> {
    let whole = (0..parameters / TENSOR_PARAMETERS_MAX).map(|_| TENSOR_PARAMETERS_MAX);
    let rest = Some(parameters % TENSOR_PARAMETERS_MAX).filter(|&rest| rest > 0);
    whole.chain(rest).map(|length| usize::try_from(length).expect("it fits in memory")).collect()
}

/// The four storages of one tensor, as [`ROLES`] orders them.
fn generate_tensor(seed: u64, parameters: usize) -> [Vec<u8>; 4] {
    let mut random = Rng::with_seed(seed);
    // Layers differ in how wide their weights spread.
    let deviation = [0.01, 0.02, 0.04][random.usize(..3)];
    let [mut weights, mut masters, mut first, mut second] =
        [2, 4, 4, 4].map(|width| vec![0; parameters * width]);
    let masters_and_weights = masters.chunks_exact_mut(4).zip(weights.chunks_exact_mut(2));
    let moments = first.chunks_exact_mut(4).zip(second.chunks_exact_mut(4));
    for ((master, weight), (first, second)) in masters_and_weights.zip(moments) {
        let value = normal(&mut random, deviation);
        let square = positive(&mut random);
        // A mean gradient is some tenths of the root of the mean square.
        let mean = normal(&mut random, 0.3) * square.sqrt();
        master.copy_from_slice(&value.to_le_bytes());
        weight.copy_from_slice(&bf16(value).to_le_bytes());
        first.copy_from_slice(&mean.to_le_bytes());
        second.copy_from_slice(&square.to_le_bytes());
    }
    [weights, masters, first, second]
}

/// The nearest bfloat16, ties to even.
fn bf16(value: f32) -> u16 {
    let bits = value.to_bits();
    let rounded = bits + 0x7fff + ((bits >> 16) & 1);
    let [_, _, low, high] = rounded.to_le_bytes();
    u16::from_le_bytes([low, high])
}

/// About normal with deviation 1, at most 3.5: a sum of four uniform numbers (Irwin and Hall).
#[expect(clippy::cast_precision_loss, clippy::cast_possible_wrap, reason = "34 bits in 53")]
fn standard(random: &mut Rng) -> f64 {
    // Of four uniform numbers below 2^32: their mean, and the root of their variance.
    const MEAN: i64 = 2 << 32;
    const DEVIATION: f64 = 4_294_967_296.0 * 0.577_350_269_189_625_8;
    let (a, b) = (random.u64(..), random.u64(..));
    let low = u64::from(u32::MAX);
    let sum = (a & low) + (a >> 32) + (b & low) + (b >> 32);
    (sum as i64 - MEAN) as f64 / DEVIATION
}

#[expect(clippy::cast_possible_truncation, reason = "rounds to the nearest")]
fn normal(random: &mut Rng, deviation: f64) -> f32 {
    (standard(random) * deviation) as f32
}

/// About log-normal around 2^-30, most within five octaves: the bits of a float, read as a
/// number, are nearly its logarithm.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "from 88 to 106")]
fn positive(random: &mut Rng) -> f32 {
    let exponent = 127.0 - 30.0 + 2.5 * standard(random);
    f32::from_bits((exponent * f64::from(1 << 23)) as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    const BYTES: u64 = 2 << 20;

    fn floats(state: &State, role: Role) -> Vec<f32> {
        let storages = state.storages.iter().filter(|storage| storage.role == role);
        let bytes = storages.flat_map(|storage| storage.bytes.chunks_exact(4));
        bytes.map(|item| f32::from_le_bytes(item.try_into().unwrap())).collect()
    }

    #[test]
    fn a_seed_makes_the_same_bytes_everywhere() {
        let state = State::generate(1, BYTES);
        assert_eq!(state.crc32c(), 0xa4c1_46cc);
        assert_eq!(state.crc32c(), State::generate(1, BYTES).crc32c());
        assert_ne!(state.crc32c(), State::generate(2, BYTES).crc32c());
    }

    #[test]
    fn it_has_the_size_asked_for() {
        for raw_bytes in [0, 14, 1000, BYTES, (TENSOR_PARAMETERS_MAX + 1) * PARAMETER_BYTES] {
            let state = State::generate(1, raw_bytes);
            assert_eq!(state.raw_bytes(), raw_bytes / PARAMETER_BYTES * PARAMETER_BYTES);
        }
    }

    #[test]
    fn values_are_spread_as_in_training() {
        let state = State::generate(1, BYTES);
        let masters = floats(&state, Role::Master);
        let within = |bound: f32| masters.iter().filter(|value| value.abs() < bound).count();
        assert!(within(0.04) > masters.len() / 2 && within(1e-6) < masters.len() / 1000);
        let negative = masters.iter().filter(|value| **value < 0.0).count();
        assert!((masters.len() * 2 / 5..masters.len() * 3 / 5).contains(&negative), "{negative}");

        let squares = floats(&state, Role::SecondMoment);
        assert!(squares.iter().all(|value| *value > 0.0 && value.is_finite()));
        let octaves = |low: i32, high: i32| {
            let range = 2_f32.powi(low)..2_f32.powi(high);
            squares.iter().filter(|value| range.contains(value)).count()
        };
        assert!(
            octaves(-33, -27) > squares.len() / 2 && octaves(-40, -20) > squares.len() * 99 / 100
        );

        let means = floats(&state, Role::FirstMoment);
        assert!(means.iter().zip(&squares).all(|(mean, square)| mean * mean < 1.2 * square));
    }

    #[test]
    fn a_weight_is_its_master_rounded() {
        let state = State::generate(1, 1000);
        let weights = state.storages[0].bytes.chunks_exact(2);
        for (weight, master) in weights.zip(floats(&state, Role::Master)) {
            let weight = f32::from_le_bytes([0, 0, weight[0], weight[1]]);
            assert!((weight - master).abs() <= master.abs() / 256.0, "{weight} {master}");
        }
    }

    #[test]
    fn a_changed_byte_is_a_difference() {
        let state = State::generate(1, BYTES);
        let mut memory = state.memory();
        assert!(state.difference(&memory).unwrap().starts_with("storage 0 (weights)"));
        for (storage, read) in state.storages.iter().zip(&mut memory.storages) {
            read.copy_from_slice(&storage.bytes);
        }
        assert_eq!(state.difference(&memory), None);
        assert_eq!(state.crc32c(), memory.crc32c());
        memory.storages[3][4321] ^= 1;
        let expected = "storage 3 (exp_avg_sq) came back changed from its byte 4321 on";
        assert_eq!(state.difference(&memory).unwrap(), expected);
        assert_ne!(state.crc32c(), memory.crc32c());
    }
}
