//! `ckpt-tool diff`: what changed between two checkpoints of a store.
//!
//! Always holds: tensors are equal only if their dtype, shape and bytes are, and all bytes were
//! compared; equal checksums are no proof. Entries are matched by their typed paths: the integer
//! key 3 is not the string "3". The memory layout of tensors, the order of dict entries, and which
//! tensors share a storage are not compared.

use std::collections::BTreeMap;
use std::fmt;
use std::io::Write;

use clap::Args;
use dtr_engine::Engine;
use dtr_engine::load::Checkpoint;

use crate::compare::Difference;
use crate::console::{Failure, Outcome, Verdict, write_json};
use crate::opened::{self, StoreArgument};
use crate::progress::Bar;
use crate::stream::{self, PART_BYTES};
use crate::view::View;
use crate::windows::Windows;

mod entries;
mod report;

use entries::{Entry, Pairing, TensorPair};
use report::Report;

const AFTER_HELP: &str = "\
Compares every byte of every tensor that both checkpoints have, and every plain value. Exit \
status 0 whether or not they differ, because a difference is not damage. With --exit-code, 1 if \
they differ.";

/// Arguments of `diff`.
#[derive(Args, Debug)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct Options {
    #[command(flatten)]
    store: StoreArgument,
    /// The step to compare with.
    a: u64,
    /// The step that is compared.
    b: u64,
    /// The rank whose parts are compared, where several ranks saved the checkpoints.
    #[arg(long, value_name = "R")]
    rank: Option<u32>,
    /// Compare with this rank's part of B: `diff STORE 10 10 --rank 0 --b-rank 1` compares two
    /// ranks [default: the same rank].
    #[arg(long, value_name = "R", requires = "rank")]
    b_rank: Option<u32>,
    /// Exit with status 1 if they differ.
    #[arg(long)]
    exit_code: bool,
    /// Show at most this many rows of each table; 0 shows all.
    #[arg(long, value_name = "N", default_value_t = 40)]
    limit: u64,
    /// Print JSON, which is complete regardless of the limit.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(options: &Options, out: &mut dyn Write) -> Outcome {
    let engine = options.store.open()?;
    let doing = "comparing checkpoints of";
    let open =
        |side: Side| opened::checkpoint(&engine, &options.store, Some(side.step), side.rank, doing);
    let sides = options.sides();
    let (a, b) = (open(sides.0)?, open(sides.1)?);
    let mut pairing = Pairing::of(a.index(), b.index());
    let differences = compare(&a, &b, &pairing.tensor_pairs())?;
    pairing.take(&differences);
    let consecutive = are_consecutive(&engine, options)?;
    let report = Report::new(sides, consecutive, pairing);
    if options.json {
        write_json(out, &report)?;
    } else {
        report.write(out, options.limit)?;
    }
    Ok(Verdict::fine_if(!options.exit_code || report.identical))
}

/// One of the two that are compared.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Side {
    step: u64,
    /// Where several ranks saved it.
    rank: Option<u32>,
}

impl fmt::Display for Side {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.rank {
            Some(rank) => write!(out, "rank {rank} of step {}", self.step),
            None => write!(out, "step {}", self.step),
        }
    }
}

impl Options {
    fn sides(&self) -> (Side, Side) {
        let b_rank = self.b_rank.or(self.rank);
        (Side { step: self.a, rank: self.rank }, Side { step: self.b, rank: b_rank })
    }
}

/// Whether no other checkpoint lies between the two.
fn are_consecutive(engine: &Engine, options: &Options) -> Result<bool, Failure> {
    let steps = engine.steps()?;
    let position = steps.iter().position(|step| *step == options.a);
    Ok(position.and_then(|at| steps.get(at + 1)) == Some(&options.b))
}

/// Reads both tensors of each pair part by part and holds them against each other.
fn compare(
    a: &Checkpoint,
    b: &Checkpoint,
    pairs: &[TensorPair],
) -> Result<BTreeMap<TensorPair, Difference>, Failure> {
    let views = |checkpoint: &Checkpoint, number: fn(&TensorPair) -> u32| -> Vec<View> {
        let tensors = &checkpoint.index().tensors;
        pairs.iter().map(|pair| View::of(&tensors[number(pair) as usize])).collect()
    };
    let (a_views, b_views) = (views(a, |pair| pair.a), views(b, |pair| pair.b));
    let a_windows = windows(a, &a_views);
    let b_windows = windows(b, &b_views);
    let records = pairs.iter().map(|pair| &a.index().tensors[pair.a as usize]);
    let lengths =
        a_views.iter().zip(records).map(|(view, record)| (view.bytes(), record.item_bytes));
    let bar = Bar::new(a_views.iter().map(View::bytes).sum(), "comparing");
    let mut found: Vec<Difference> = vec![Difference::default(); pairs.len()];
    let mut a_memory = vec![0; PART_BYTES];
    let mut b_memory = vec![0; PART_BYTES];
    for part in stream::plan(lengths, PART_BYTES) {
        stream::read(&a_windows, &a_views, &part, &mut a_memory)?;
        stream::read(&b_windows, &b_views, &part, &mut b_memory)?;
        for segment in &part {
            let record = &a.index().tensors[pairs[segment.tensor].a as usize];
            let (a_bytes, b_bytes) = (&a_memory[segment.place()], &b_memory[segment.place()]);
            let item_bytes = stream::uncut_bytes(record.item_bytes.into());
            found[segment.tensor].add(&record.dtype, item_bytes, a_bytes, b_bytes);
        }
        bar.advance(stream::part_bytes(&part) as u64);
    }
    Ok(pairs.iter().copied().zip(found).collect())
}

fn windows<'c>(checkpoint: &'c Checkpoint, views: &[View]) -> Windows<'c> {
    let wanted: std::collections::BTreeSet<u32> = views.iter().map(|view| view.storage).collect();
    Windows::new(checkpoint, |storage| wanted.contains(&storage))
}

/// What became of an entry.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Change {
    /// Nothing.
    Equal,
    /// It is another one.
    Changed(Changed),
    /// Only the second checkpoint has it.
    Added,
    /// Only the first checkpoint has it.
    Removed,
}

/// How an entry changed.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Changed {
    /// Its type, dtype, shape or value: from this to that.
    Described(String, String),
    /// The items of a tensor.
    Items(Difference),
}

impl Entry {
    fn is_tensor(&self) -> bool {
        matches!(self, Self::Tensor { .. })
    }
}
