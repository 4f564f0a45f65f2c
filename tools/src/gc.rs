//! `ckpt-tool gc`: deletes what no checkpoint needs.
//!
//! Always holds: what goes is the engine's decision, the same with and without `--dry-run`, which
//! opens the store as a reader; all that goes or is too young to go is printed with its reason.

use std::io::Write;
use std::time::Duration;

use clap::Args;
use dtr_engine::engine::{GcItem, GcOptions, GcReport};
use serde::Serialize;

use crate::console::{Outcome, Verdict, write_json};
use crate::opened::StoreArgument;
use crate::table::Table;
use crate::text;

const AFTER_HELP: &str = "\
Deletes files of attempts that were never committed or were replaced, once they are older than \
the grace period, and checkpoints that a rewind retired; in S3 also uploads that were never \
finished. A file that a running save holds is kept. Without --dry-run, no training run may have \
the store open.";

/// Arguments of `gc`.
#[derive(Args, Debug)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct Options {
    #[command(flatten)]
    store: StoreArgument,
    /// Only print what would be deleted.
    #[arg(long)]
    dry_run: bool,
    /// Age below which files are kept [default: 86400, a day]
    #[arg(long, value_name = "SECONDS")]
    grace: Option<u64>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// What is printed.
#[derive(Debug, Serialize)]
struct Cleaned {
    dry_run: bool,
    #[serde(flatten)]
    report: GcReport,
}

pub(crate) fn run(options: &Options, out: &mut dyn Write) -> Outcome {
    let engine =
        if options.dry_run { options.store.open() } else { options.store.open_as_writer() }?;
    let grace = options.grace.map(Duration::from_secs);
    let report = engine.gc(GcOptions { dry_run: options.dry_run, grace })?;
    engine.close()?;
    let cleaned = Cleaned { dry_run: options.dry_run, report };
    if options.json {
        write_json(out, &cleaned)?;
    } else {
        write_text(out, &cleaned)?;
    }
    Ok(Verdict::Fine)
}

fn write_text(out: &mut dyn Write, cleaned: &Cleaned) -> std::io::Result<()> {
    let Cleaned { dry_run, report } = cleaned;
    if report.removed.is_empty() && report.kept.is_empty() {
        return writeln!(out, "nothing to delete: no save has left anything behind");
    }
    let mut table = Table::new()
        .words("ACTION")
        .numbers("STEP")
        .words("FILE")
        .numbers("SIZE")
        .numbers("AGE")
        .words("WHY");
    let action = if *dry_run { "would delete" } else { "deleted" };
    for item in &report.removed {
        table.row(cells(action, item));
    }
    for item in &report.kept {
        table.row(cells("kept", item));
    }
    table.write(out, "")?;
    let freed = if *dry_run { "would be freed" } else { "freed" };
    writeln!(out, "\n{} {freed}", text::bytes(report.freed_bytes))
}

fn cells(action: &str, item: &GcItem) -> [String; 6] {
    let (file, age) = match &item.file {
        Some(file) => (file.clone(), text::age(item.age_seconds)),
        None => ("(whole checkpoint)".into(), "-".into()),
    };
    let bytes = text::bytes(item.bytes);
    [action.into(), item.step.to_string(), file, bytes, age, item.why.clone()]
}
