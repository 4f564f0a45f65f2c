//! The command line: which commands there are, and how wrong usage is told.
//!
//! Always holds: every message about wrong usage ends with a `hint: ` line, as every other error
//! does.

use std::ffi::OsString;
use std::io::Write;

use clap::error::ErrorKind;
use clap::{Parser, Subcommand};

use crate::console::{self, Outcome, WRONG_USAGE};
use crate::{copy, diff, doctor, gc, inspect, ls, restore, rm, verify};

const AFTER_HELP: &str = "\
Exit status: 0 on success; 1 if the data is damaged, missing, or could not be read; 2 if the \
command is wrong, or names a directory that does not exist.

RUST_LOG sets how much of the engine's log is shown on stderr; the default is `warn`.";

/// Lists, inspects, verifies, restores and compares the checkpoints of a training run.
#[derive(Debug, Parser)]
#[command(name = "ckpt-tool", version, after_help = AFTER_HELP, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

/// What to do. Each command is a file.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// List the checkpoints of a store.
    Ls(ls::Options),
    /// Show what a checkpoint contains: its properties, state tree, tensors and chunks.
    Inspect(inspect::Options),
    /// Read every byte of a checkpoint and check it against its checksums.
    Verify(verify::Options),
    /// Write a checkpoint's tensors to a safetensors file, or copy it into another store.
    Restore(restore::Options),
    /// Copy checkpoints to another store, byte for byte.
    Copy(copy::Options),
    /// Compare two checkpoints: tensors byte by byte, and plain values.
    Diff(diff::Options),
    /// Delete checkpoints: the given steps, or all but the newest.
    Rm(rm::Options),
    /// Delete files that no checkpoint needs: those of aborted saves, and what a rewind retired.
    Gc(gc::Options),
    /// Check what this machine offers for fast checkpoints.
    Doctor(doctor::Options),
}

impl Command {
    /// Does it; data goes to `out`.
    pub(crate) fn run(self, out: &mut dyn Write) -> Outcome {
        match self {
            Self::Ls(options) => ls::run(&options, out),
            Self::Inspect(options) => inspect::run(&options, out),
            Self::Verify(options) => verify::run(&options, out),
            Self::Restore(options) => restore::run(&options, out),
            Self::Copy(options) => copy::run(&options, out),
            Self::Diff(options) => diff::run(&options, out),
            Self::Rm(options) => rm::run(&options, out),
            Self::Gc(options) => gc::run(&options, out),
            Self::Doctor(options) => doctor::run(&options, out),
        }
    }
}

/// The command that was typed, or the exit status when there is nothing to run: help was asked for,
/// or the command is wrong, and that was said.
pub(crate) fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Command, u8> {
    Cli::try_parse_from(arguments).map(|cli| cli.command).map_err(|error| {
        if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) {
            // A reader that closed its end has read enough.
            let _closed = error.print();
            return console::FINE;
        }
        console::print_error(&with_hint(&error));
        WRONG_USAGE
    })
}

fn with_hint(error: &clap::Error) -> String {
    let text = error.to_string();
    let text = text.trim_end();
    if error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        return format!("{text}\n\nhint: name a command, for example `ckpt-tool ls STORE`");
    }
    let text = text.strip_suffix("For more information, try '--help'.").unwrap_or(text).trim_end();
    // What refused a value may know better.
    if text.lines().next_back().is_some_and(|line| line.starts_with("hint: ")) {
        return text.into();
    }
    format!("{text}\nhint: see `ckpt-tool --help` and `ckpt-tool COMMAND --help`")
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn wrong_usage_ends_with_a_hint() {
        for arguments in [
            &["ckpt-tool"][..],
            &["ckpt-tool", "lst"],
            &["ckpt-tool", "ls"],
            &["ckpt-tool", "rm", "store"],
            &["ckpt-tool", "rm", "store", "1", "--keep-last", "1"],
            &["ckpt-tool", "rm", "store", "--keep-last", "0"],
            &["ckpt-tool", "verify", "store", "--step", "newest"],
            &["ckpt-tool", "verify", "store", "--step", "1", "--all"],
        ] {
            let text = with_hint(&Cli::try_parse_from(arguments).unwrap_err());
            let last = text.lines().next_back().unwrap();
            assert!(last.starts_with("hint: "), "{text}");
            assert!(!text.contains("For more information"), "{text}");
        }
    }
}
