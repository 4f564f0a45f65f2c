//! The targets of the fuzzers, without a fuzzer: what was found once, and random bytes.

use std::fs;
use std::path::Path;

use fastrand::Rng;

use super::budget::Budget;
use super::state;

#[expect(unreachable_pub, reason = "a crate of its own, to the fuzzers")]
#[path = "../fuzz/src/lib.rs"]
mod targets;

use targets::TARGETS;

/// Random inputs for each target when nobody asks for more.
const SHORT: u64 = 2_000;

fn corpus_of(target: &str) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target);
    let files = fs::read_dir(&folder).unwrap_or_else(|error| {
        panic!("`{}`: {error}", folder.display());
    });
    let mut paths: Vec<_> = files.map(|file| file.unwrap().path()).collect();
    paths.sort();
    paths.iter().map(|path| fs::read(path).unwrap()).collect()
}

#[test]
fn every_committed_input_is_read_or_refused() {
    for (name, target) in TARGETS {
        let corpus = corpus_of(name);
        assert!(corpus.len() >= 5, "{name} has {} inputs", corpus.len());
        for input in &corpus {
            target(input);
        }
        println!("{name}: {} inputs", corpus.len());
    }
}

/// An input of the corpus with a few bytes changed, cut, or repeated; or bytes without a pattern.
fn mutated(corpus: &[Vec<u8>], random: &mut Rng) -> Vec<u8> {
    let mut bytes = match random.usize(..8) {
        0 => {
            let count = random.usize(..3000);
            state::bytes(random, count)
        }
        _ => corpus[random.usize(..corpus.len())].clone(),
    };
    for _ in 0..random.usize(..6) {
        let at = random.usize(..=bytes.len());
        match random.usize(..4) {
            0 => bytes.truncate(at),
            1 => bytes.insert(at, random.u8(..)),
            2 => {
                let tail = bytes[at..].to_vec();
                bytes.extend(tail);
            }
            _ if at < bytes.len() => bytes[at] ^= 1 << random.usize(..8),
            _ => {}
        }
    }
    bytes
}

#[test]
fn random_inputs_are_read_or_refused() {
    let budget = Budget::of(SHORT);
    let corpora: Vec<_> = TARGETS.iter().map(|(name, _)| corpus_of(name)).collect();
    for number in budget.first..budget.first + budget.states {
        for ((name, target), corpus) in TARGETS.iter().zip(&corpora) {
            let input = mutated(corpus, &mut Rng::with_seed(number));
            let ended = std::panic::catch_unwind(|| target(&input));
            assert!(ended.is_ok(), "{name}, input {number}: DTR_TORTURE_FIRST={number} again");
        }
    }
    let Budget { first, states } = budget;
    println!("{states} inputs from number {first} for each of {} targets", TARGETS.len());
    println!("torture: tried {states}, next {}", first + states);
}
