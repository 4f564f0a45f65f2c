//! `ckpt-tool rm`: deletes checkpoints.
//!
//! Always holds: nothing is deleted before everything that is to go was found, and what goes is
//! what the same command with `--dry-run` says; a checkpoint goes manifest first, so that one that
//! a kill left half deleted is none. Damaged ones go only if they are named.

use std::io::Write;
use std::num::NonZeroU32;

use clap::{ArgGroup, Args};
use dtr_engine::recovery::{StepState, StepSurvey, Survey};
use dtr_engine::{Engine, EngineError, Result};
use serde::Serialize;

use crate::console::{Outcome, Verdict, note, write_json};
use crate::opened::{StoreArgument, exists};
use crate::table::Table;
use crate::text;

const AFTER_HELP: &str = "\
With --keep-last, only checkpoints with an intact manifest are counted and deleted. Without \
--dry-run, no training run may have the store open. A remote store keeps what it has of these \
steps, and receives no more of them.";

const USAGE: &str = "\
ckpt-tool rm [OPTIONS] <STORE> <STEP>...
       ckpt-tool rm [OPTIONS] <STORE> --keep-last <N>";

/// Arguments of `rm`.
#[derive(Args, Debug)]
#[command(
    after_help = AFTER_HELP,
    override_usage = USAGE,
    group = ArgGroup::new("which").required(true)
)]
pub(crate) struct Options {
    #[command(flatten)]
    store: StoreArgument,
    /// Steps of the checkpoints to delete.
    #[arg(value_name = "STEP", group = "which")]
    steps: Vec<u64>,
    /// Delete all but the newest N.
    #[arg(long, value_name = "N", group = "which")]
    keep_last: Option<NonZeroU32>,
    /// Only print what would be deleted.
    #[arg(long)]
    dry_run: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// What is printed.
#[derive(Debug, Serialize)]
struct Report {
    dry_run: bool,
    removed: Vec<Removed>,
    freed_bytes: u64,
}

#[derive(Clone, Copy, Debug, Serialize)]
struct Removed {
    step: u64,
    bytes: u64,
}

pub(crate) fn run(options: &Options, out: &mut dyn Write) -> Outcome {
    let engine =
        if options.dry_run { options.store.open() } else { options.store.open_as_writer() }?;
    let survey = engine.survey()?;
    let doomed = match options.keep_last {
        Some(kept) => all_but_newest(&survey, kept.get()),
        None => named(&survey, &options.steps, &options.store)?,
    };
    let removed = if options.dry_run { doomed } else { delete(&engine, &doomed)? };
    engine.close()?;
    let freed_bytes = removed.iter().fold(0, |sum, removed| removed.bytes.saturating_add(sum));
    let report = Report { dry_run: options.dry_run, removed, freed_bytes };
    if options.json {
        write_json(out, &report)?;
    } else {
        write_text(out, &report)?;
    }
    Ok(Verdict::Fine)
}

/// Sound checkpoints before the newest `kept` of them, ascending.
fn all_but_newest(survey: &Survey, kept: u32) -> Vec<Removed> {
    let is_sound = |step: &&StepSurvey| step.state == StepState::Committed;
    let sound: Vec<Removed> = survey.steps.iter().filter(is_sound).map(removed).collect();
    let count = sound.len().saturating_sub(usize::try_from(kept).unwrap_or(usize::MAX));
    sound[..count].to_vec()
}

/// Those that are named, ascending, each once.
fn named(survey: &Survey, steps: &[u64], store: &StoreArgument) -> Result<Vec<Removed>> {
    for step in steps {
        let found = survey.steps.iter().find(|known| known.step == *step);
        match found.map(|known| &known.state) {
            Some(StepState::Newer { why }) => return Err(newer(*step, why, store)),
            Some(state) if exists(state) => {}
            _ => return Err(missing(*step, store)),
        }
    }
    Ok(survey.steps.iter().filter(|known| steps.contains(&known.step)).map(removed).collect())
}

fn removed(survey: &StepSurvey) -> Removed {
    Removed { step: survey.step, bytes: survey.bytes }
}

fn missing(step: u64, store: &StoreArgument) -> EngineError {
    EngineError::NotFound {
        what: format!("deleting step {step} from `{}`", store.display()),
        why: "there is no checkpoint of this step; nothing was deleted".into(),
        hint: format!("`ckpt-tool ls {}` shows the steps there are", store.display()),
    }
}

fn newer(step: u64, why: &str, store: &StoreArgument) -> EngineError {
    EngineError::UnsupportedFormat {
        what: format!("deleting step {step} from `{}`", store.display()),
        why: format!("{why}; nothing was deleted"),
        hint: "delete it with the version that wrote it".into(),
    }
}

/// Deletes them, oldest first; says what had gone if one of them cannot.
fn delete(engine: &Engine, doomed: &[Removed]) -> Result<Vec<Removed>> {
    let mut gone = Vec::with_capacity(doomed.len());
    for Removed { step, .. } in doomed.iter().copied() {
        match engine.delete(step) {
            Ok(bytes) => gone.push(Removed { step, bytes }),
            Err(error) => {
                if !gone.is_empty() {
                    note(&format!("{} deleted before that", text::count(gone.len(), "checkpoint")));
                }
                return Err(error);
            }
        }
    }
    Ok(gone)
}

fn write_text(out: &mut dyn Write, report: &Report) -> std::io::Result<()> {
    if report.removed.is_empty() {
        return writeln!(out, "nothing to delete: there are no more checkpoints than that");
    }
    let mut table = Table::new().words("ACTION").numbers("STEP").numbers("SIZE");
    let action = if report.dry_run { "would delete" } else { "deleted" };
    for Removed { step, bytes } in &report.removed {
        table.row([action.into(), step.to_string(), text::bytes(*bytes)]);
    }
    table.write(out, "")?;
    let freed = if report.dry_run { "would be freed" } else { "freed" };
    writeln!(out, "\n{} {freed}", text::bytes(report.freed_bytes))
}
