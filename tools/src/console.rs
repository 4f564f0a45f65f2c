//! Where results and errors go, and what the exit status says.
//!
//! Always holds: only data goes to stdout; a closed stdout is no error; every error on stderr ends
//! with its `hint: ` line.

use std::io::{self, BufWriter, ErrorKind, StdoutLock, Write};
use std::process::ExitCode;

use dtr_engine::EngineError;
use serde::Serialize;

/// Exit status when something is wrong with the data, or it could not be read.
const WRONG_DATA: u8 = 1;
/// Exit status when the command is wrong.
pub(crate) const WRONG_USAGE: u8 = 2;

/// How a command ended.
pub(crate) type Outcome = Result<Verdict, Failure>;

/// What a command that ran to its end found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// All is well.
    Fine,
    /// Something is wrong; the output says what.
    Wrong,
}

impl Verdict {
    /// Fine if `fine`.
    pub(crate) fn fine_if(fine: bool) -> Self {
        if fine { Self::Fine } else { Self::Wrong }
    }
}

/// Why a command did not run to its end.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The engine refused, or the command itself in the engine's words.
    Engine(EngineError),
    /// Stdout could not be written.
    Stdout(io::Error),
}

impl From<EngineError> for Failure {
    fn from(error: EngineError) -> Self {
        Self::Engine(error)
    }
}

/// Only stdout is written without a context.
impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Stdout(error)
    }
}

/// Stdout, buffered: a table is one write.
pub(crate) fn stdout() -> BufWriter<StdoutLock<'static>> {
    BufWriter::new(io::stdout().lock())
}

/// Writes what is buffered, says what went wrong, and gives the exit status.
pub(crate) fn finish(mut out: BufWriter<StdoutLock<'static>>, outcome: Outcome) -> ExitCode {
    let flushed = out.flush().map_err(Failure::from);
    let outcome = outcome.and_then(|verdict| flushed.map(|()| verdict));
    // What is left in the buffer has nowhere to go.
    let _unwritten = out.into_parts();
    match outcome {
        Ok(Verdict::Fine) => ExitCode::SUCCESS,
        Ok(Verdict::Wrong) => ExitCode::from(WRONG_DATA),
        Err(failure) => failed(failure),
    }
}

fn failed(failure: Failure) -> ExitCode {
    match failure {
        Failure::Stdout(error) if error.kind() == ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Failure::Stdout(error) => {
            print_error(&format!(
                "error: writing to stdout: {error}\nhint: check where the output was sent"
            ));
            ExitCode::from(WRONG_DATA)
        }
        Failure::Engine(error) => {
            print_error(&format!("error: {error}"));
            let wrong_usage = matches!(error, EngineError::InvalidArgument { .. });
            ExitCode::from(if wrong_usage { WRONG_USAGE } else { WRONG_DATA })
        }
    }
}

/// Writes to stderr; one that is closed has no reader to tell.
pub(crate) fn print_error(text: &str) {
    let _closed = writeln!(io::stderr(), "{text}");
}

/// Tells a person something that is no data.
pub(crate) fn note(text: &str) {
    print_error(&format!("note: {text}"));
}

/// Writes `value` as JSON, indented, with a line end.
pub(crate) fn write_json(out: &mut dyn Write, value: &impl Serialize) -> Result<(), Failure> {
    serde_json::to_writer_pretty(&mut *out, value).map_err(|error| {
        match error.io_error_kind() {
            Some(kind) => Failure::Stdout(kind.into()),
            None => EngineError::internal("writing JSON", error.to_string()).into(),
        }
    })?;
    Ok(writeln!(out)?)
}
