//! `ckpt-tool`: lists, inspects, verifies, restores and compares checkpoints.
//!
//! ```text
//! arguments -> a command -> the engine's verbs -> stdout: tables, or JSON
//!                                              -> stderr: errors, notes, progress bars, the log
//! ```
//!
//! Always holds: exit status 0 means that all is well, 1 that something is wrong with the data (or
//! could not be read, or is not there), 2 that the command was wrong. Stores are opened read-only,
//! except by `gc` and `rm` without `--dry-run` and for the store that `restore` writes to. A reader
//! of stdout that goes away ends the tool quietly.
#![forbid(unsafe_code)]

use std::ffi::OsString;

mod cli;
mod compare;
mod console;
mod copy;
mod diff;
mod doctor;
mod gc;
mod glob;
mod inspect;
mod log;
mod ls;
mod opened;
mod progress;
mod restore;
mod rm;
mod size;
mod stream;
mod table;
mod text;
mod tree_text;
mod values;
mod verify;
mod view;
mod windows;

/// Runs the tool, as a program whose command line this is, its name first; its exit status.
pub fn run(arguments: impl IntoIterator<Item = OsString>) -> u8 {
    let command = match cli::parse(arguments) {
        Ok(command) => command,
        Err(status) => return status,
    };
    log::start();
    let mut out = console::stdout();
    let result = command.run(&mut out);
    console::finish(out, result)
}
