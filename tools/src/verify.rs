//! `ckpt-tool verify`: reads every byte and says what is damaged.
//!
//! Always holds: nothing in the store changes; all damage that is found is told, not the first
//! alone; of several steps one that cannot be verified keeps no other from it; the exit status is 0
//! only if all that were asked for are whole.

use std::io::Write;

use clap::Args;
use dtr_engine::format::manifest::total_bytes;
use dtr_engine::load::{Damage, VerifyReport};
use dtr_engine::recovery::Survey;
use dtr_engine::{Engine, EngineError};
use serde::{Serialize, Serializer};

use crate::console::{Failure, Outcome, Verdict, write_json};
use crate::opened::{StoreArgument, chosen_steps};
use crate::progress::Bar;
use crate::text;

/// Tensors that are named for one damaged chunk.
const TENSORS_SHOWN_MAX: usize = 8;

/// Arguments of `verify`.
#[derive(Args, Debug)]
#[command(after_help = "Exit status 1 if anything is damaged.")]
pub(crate) struct Options {
    #[command(flatten)]
    store: StoreArgument,
    /// The step to verify [default: the newest]
    #[arg(long, value_name = "N", conflicts_with = "all", allow_negative_numbers = true)]
    step: Option<u64>,
    /// Verify every checkpoint.
    #[arg(long)]
    all: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// What is printed about one checkpoint.
#[derive(Debug, Serialize)]
struct Verified {
    #[serde(flatten)]
    report: VerifyReport,
    /// Why it could not be verified at all.
    #[serde(serialize_with = "as_text")]
    error: Option<EngineError>,
}

#[expect(clippy::ref_option, reason = "serde passes a reference to the field")]
fn as_text<S: Serializer>(error: &Option<EngineError>, serializer: S) -> Result<S::Ok, S::Error> {
    error.as_ref().map(EngineError::to_string).serialize(serializer)
}

impl Verified {
    fn is_fine(&self) -> bool {
        self.report.damage.is_empty() && self.error.is_none()
    }
}

pub(crate) fn run(options: &Options, out: &mut dyn Write) -> Outcome {
    let engine = options.store.open()?;
    let survey = engine.survey()?;
    let chosen = chosen_steps(&survey, options.step, options.all, "verifying", &options.store);
    let steps = chosen?;
    let bar =
        Bar::new(total_bytes(steps.iter().map(|step| stored_bytes(&survey, *step))), "verifying");
    let mut verified = Vec::new();
    for step in steps {
        bar.doing(&format!("verifying step {step}"));
        let result = verify(&engine, step, options.all, &bar)?;
        if !options.json {
            write_text(out, &result)?;
            out.flush()?;
        }
        verified.push(result);
    }
    drop(bar);
    if options.json {
        write_json(out, &verified)?;
    } else if options.all {
        write_summary(out, &verified)?;
    }
    Ok(Verdict::fine_if(verified.iter().all(Verified::is_fine)))
}

/// Nearly what will be read: the files of a step that a manifest names.
fn stored_bytes(survey: &Survey, step: u64) -> u64 {
    survey.step(step).map_or(0, |step| {
        let orphans = total_bytes(step.orphans.iter().map(|orphan| orphan.bytes));
        step.bytes.saturating_sub(orphans)
    })
}

/// Verifies one step. Of several, one that cannot be verified does not keep the others from it.
fn verify(engine: &Engine, step: u64, of_several: bool, bar: &Bar) -> Result<Verified, Failure> {
    match engine.verify(step, bar) {
        Ok(report) => Ok(Verified { report, error: None }),
        Err(error) if of_several => Ok(Verified {
            report: VerifyReport { step, ..VerifyReport::default() },
            error: Some(error),
        }),
        Err(error) => Err(error.into()),
    }
}

fn write_text(out: &mut dyn Write, verified: &Verified) -> std::io::Result<()> {
    let Verified { report, error } = verified;
    if let Some(error) = error {
        return writeln!(out, "step {}: not verified: {}", report.step, text::message(error));
    }
    let verdict = match report.damage.len() {
        0 => "fine".into(),
        places => format!("DAMAGED in {}", text::count(places, "place")),
    };
    writeln!(
        out,
        "step {}: {verdict}: {}, {}, {} stored ({} raw) read in {:.2} s, {}",
        report.step,
        text::count(report.shards, "shard"),
        text::count(report.chunks, "chunk"),
        text::bytes(report.stored_bytes),
        text::bytes(report.raw_bytes),
        report.seconds,
        text::rate(report.stored_bytes, report.seconds)
    )?;
    for damage in &report.damage {
        writeln!(out, "  {}: {}", text::one_line(&damage.shard), text::one_line(&what(damage)))?;
        write_tensors(out, &damage.tensors)?;
    }
    if !report.damage.is_empty() {
        writeln!(
            out,
            "  hint: restore another step; `ckpt-tool verify --all` shows which ones are whole"
        )?;
    }
    Ok(())
}

/// What is damaged.
fn what(damage: &Damage) -> String {
    let why = &damage.why;
    match damage.chunk {
        Some(chunk) if !why.starts_with("chunk ") => format!("chunk {chunk}: {why}"),
        _ => why.clone(),
    }
}

fn write_tensors(out: &mut dyn Write, tensors: &[String]) -> std::io::Result<()> {
    if tensors.is_empty() {
        return Ok(());
    }
    let shown: Vec<&str> =
        tensors.iter().take(TENSORS_SHOWN_MAX).map(|path| text::path(path)).collect();
    let more = match tensors.len() - shown.len() {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    writeln!(out, "    affected tensors: {}{more}", text::one_line(&shown.join(", ")))
}

fn write_summary(out: &mut dyn Write, verified: &[Verified]) -> std::io::Result<()> {
    let bad: Vec<String> = verified
        .iter()
        .filter(|verified| !verified.is_fine())
        .map(|verified| verified.report.step.to_string())
        .collect();
    let all = text::count(verified.len(), "checkpoint");
    if bad.is_empty() {
        return writeln!(out, "{all} verified, all fine");
    }
    writeln!(out, "{all} verified; not fine: {}", bad.join(", "))
}
