//! `ckpt-tool copy`: checkpoints to another store, byte for byte.
//!
//! Always holds: what is copied has the same attempt and the same bytes, each checked on its way;
//! what is there already is left alone.

use std::io::Write;
use std::path::PathBuf;

use clap::Args;
use dtr_engine::transfer::Transferred;

use crate::console::{Outcome, Verdict, write_json};
use crate::opened::{StoreArgument, no_checkpoint};
use crate::progress::Bar;
use crate::text;

const AFTER_HELP: &str = "\
Either store may be a directory or `s3://bucket/prefix`. A copy that was interrupted goes on when \
the command is given again: parts that a service has are not sent twice. Unlike `restore`, which \
writes a checkpoint anew, a copy keeps compression, attempt and every byte.";

/// Arguments of `copy`.
#[derive(Args, Debug)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct Options {
    #[command(flatten)]
    store: StoreArgument,
    /// The other store, created if need be.
    #[arg(value_name = "DESTINATION")]
    destination: PathBuf,
    /// The step to copy [default: the newest]
    #[arg(long, value_name = "N", conflicts_with = "all")]
    step: Option<u64>,
    /// Copy every checkpoint that the other store does not have.
    #[arg(long)]
    all: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(options: &Options, out: &mut dyn Write) -> Outcome {
    let source = options.store.open()?;
    let survey = source.survey()?;
    let steps = match (options.step, options.all) {
        (Some(step), _) => vec![step],
        (None, true) => survey.committed_steps(),
        (None, false) => survey.newest().into_iter().collect(),
    };
    if steps.is_empty() {
        return Err(no_checkpoint("copying from", &options.store).into());
    }
    let destination = options.store.open_other(&options.destination)?;
    let stored_bytes = |step: &u64| survey.step(*step).map_or(0, |step| step.bytes);
    let bar = Bar::new(steps.iter().map(stored_bytes).sum(), "copying");
    let mut copied = Vec::new();
    for step in steps {
        bar.doing(&format!("copying step {step}"));
        let transferred = source.copy_to(&destination, step, &bar)?;
        if !options.json {
            write_text(out, &transferred)?;
            out.flush()?;
        }
        copied.push(transferred);
    }
    drop(bar);
    destination.close()?;
    if options.json {
        write_json(out, &copied)?;
    }
    Ok(Verdict::Fine)
}

fn write_text(out: &mut dyn Write, copied: &Transferred) -> std::io::Result<()> {
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
