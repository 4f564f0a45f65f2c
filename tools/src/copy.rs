//! `ckpt-tool copy`: checkpoints to another store, byte for byte.
//!
//! Always holds: what is copied has the same attempt and the same bytes, each checked on its way;
//! what exists at the destination is left alone, unless `--rewind` says that it may go; whatever of
//! the source was not copied is named, and the exit status says so.

use std::io::Write;
use std::path::PathBuf;

use clap::Args;
use dtr_engine::format::manifest::total_bytes;
use dtr_engine::store_copy::{Overwrite, Transferred};
use dtr_engine::{Engine, EngineError};
use serde::Serialize;

use crate::console::{Failure, Outcome, Verdict, write_json};
use crate::opened::{OtherS3Arguments, StoreArgument, chosen_steps};
use crate::progress::Bar;
use crate::text;

const AFTER_HELP: &str = "\
Either store may be a directory or `s3://bucket/prefix`. To resume an interrupted copy, run the \
same command again: parts that a service already has are not sent twice. If a step already exists \
at the destination, its lengths and indices are checked, and missing shards are copied; `verify` \
checks every byte. Unlike `restore`, which writes a new checkpoint, a copy keeps compression, \
attempt and every byte.

Exit status 1 if a step could not be copied.";

/// Arguments of `copy`.
#[derive(Args, Debug)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct Options {
    #[command(flatten)]
    store: StoreArgument,
    /// The other store, created if necessary.
    #[arg(value_name = "DESTINATION")]
    destination: PathBuf,
    #[command(flatten)]
    to: OtherS3Arguments,
    /// The step to copy [default: the newest]
    #[arg(long, value_name = "N", conflicts_with = "all", allow_negative_numbers = true)]
    step: Option<u64>,
    /// Copy every checkpoint that the other store does not have.
    #[arg(long)]
    all: bool,
    /// Let the copy discard what training went back past: another checkpoint of the same step, and
    /// later ones, if the other store still has them.
    #[arg(long)]
    rewind: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// What is printed about one checkpoint.
#[derive(Debug, Serialize)]
struct Copied {
    #[serde(flatten)]
    transferred: Transferred,
    /// Why it was not copied.
    error: Option<String>,
}

pub(crate) fn run(options: &Options, out: &mut dyn Write) -> Outcome {
    let source = options.store.open()?;
    let survey = source.survey()?;
    let chosen = chosen_steps(&survey, options.step, options.all, "copying from", &options.store);
    let steps = chosen?;
    let destination = options.store.open_other(&options.destination, &options.to)?;
    let stored_bytes = |step: &u64| survey.step(*step).map_or(0, |step| step.bytes);
    let bar = Bar::new(total_bytes(steps.iter().map(stored_bytes)), "copying");
    let mut copied = Vec::new();
    for step in steps {
        bar.doing(&format!("copying step {step}"));
        let result = copy((&source, &destination), step, options, &bar)?;
        if !options.json {
            write_text(out, &result)?;
            out.flush()?;
        }
        copied.push(result);
    }
    drop(bar);
    destination.close()?;
    if options.json {
        write_json(out, &copied)?;
    }
    Ok(Verdict::fine_if(copied.iter().all(|copied| copied.error.is_none())))
}

/// Copies one step. Of several, one that cannot be copied does not keep the others from it; what
/// says nothing of this step in particular ends all.
fn copy(
    (source, destination): (&Engine, &Engine),
    step: u64,
    options: &Options,
    bar: &Bar,
) -> Result<Copied, Failure> {
    let overwrite = if options.rewind { Overwrite::Yes } else { Overwrite::No };
    match source.copy_to(destination, step, overwrite, bar) {
        Ok(transferred) => Ok(Copied { transferred, error: None }),
        Err(
            error @ (EngineError::Corrupt { .. }
            | EngineError::NotFound { .. }
            | EngineError::StepConflict { .. }
            | EngineError::UnsupportedFormat { .. }),
        ) if options.all => Ok(Copied {
            transferred: Transferred { step, ..Transferred::default() },
            error: Some(error.to_string()),
        }),
        Err(error) => Err(error.into()),
    }
}

fn write_text(out: &mut dyn Write, copied: &Copied) -> std::io::Result<()> {
    let Copied { transferred: copied, error } = copied;
    if let Some(error) = error {
        return writeln!(out, "step {}: NOT COPIED: {error}", copied.step);
    }
    if copied.was_there {
        return writeln!(out, "step {}: there already", copied.step);
    }
    let resumed = match copied.resumed_parts {
        0 => String::new(),
        parts => format!(", {} of an earlier copy kept", text::count(parts, "part")),
    };
    writeln!(
        out,
        "step {}: {} copied in {:.2} s, {}{resumed}",
        copied.step,
        text::bytes(copied.bytes),
        copied.seconds,
        text::rate(copied.bytes, copied.seconds)
    )
}
