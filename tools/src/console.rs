//! Where results and errors go, and what the exit status says.
//!
//! Always holds: only data goes to stdout; a closed stdout is no error; every error on stderr ends
//! with its `hint: ` line; nothing but a line end reaches a terminal that it would not show as it
//! is, whatever a name in a checkpoint holds.

use std::fmt::Write as _;
use std::io::{self, BufWriter, ErrorKind, StdoutLock, Write};

use dtr_engine::EngineError;
use serde::Serialize;

use crate::text;

/// Exit status when all is well.
pub(crate) const FINE: u8 = 0;
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

/// A way out on which every character but a line end is escaped that would disturb a terminal.
/// What is written at a time is whole characters.
#[derive(Debug)]
pub(crate) struct Plain<W> {
    out: W,
    /// As JSON escapes, which has such characters in strings only; else as Rust does.
    json: bool,
}

impl<W: Write> Plain<W> {
    /// For people.
    pub(crate) fn text(out: W) -> Self {
        Self { out, json: false }
    }

    /// For programs, which read the same strings.
    pub(crate) fn json(out: W) -> Self {
        Self { out, json: true }
    }

    fn escaped(&self, text: &str) -> String {
        let mut escaped = String::with_capacity(text.len());
        for character in text.chars() {
            if character == '\n' || !text::disturbs(character) {
                escaped.push(character);
            } else if self.json {
                write!(escaped, "\\u{:04x}", u32::from(character)).expect("strings grow");
            } else {
                write!(escaped, "{}", character.escape_default()).expect("strings grow");
            }
        }
        escaped
    }
}

impl<W: Write> Write for Plain<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if bytes.iter().all(|byte| matches!(byte, b'\n' | b' '..=b'~')) {
            return self.out.write(bytes);
        }
        let text = String::from_utf8_lossy(bytes);
        self.out.write_all(self.escaped(&text).as_bytes())?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

/// Stdout, buffered: a table is one write.
pub(crate) fn stdout() -> Plain<BufWriter<StdoutLock<'static>>> {
    Plain::text(BufWriter::new(io::stdout().lock()))
}

/// Writes what is buffered, says what went wrong, and gives the exit status.
pub(crate) fn finish(mut out: Plain<BufWriter<StdoutLock<'static>>>, outcome: Outcome) -> u8 {
    let flushed = out.flush().map_err(Failure::from);
    let outcome = outcome.and_then(|verdict| flushed.map(|()| verdict));
    // What is left in the buffer has nowhere to go.
    let _unwritten = out.out.into_parts();
    match outcome {
        Ok(Verdict::Fine) => FINE,
        Ok(Verdict::Wrong) => WRONG_DATA,
        Err(failure) => failed(failure),
    }
}

fn failed(failure: Failure) -> u8 {
    match failure {
        Failure::Stdout(error) if error.kind() == ErrorKind::BrokenPipe => FINE,
        Failure::Stdout(error) => {
            print_error(&format!(
                "error: writing to stdout: {error}\nhint: check where the output was sent"
            ));
            WRONG_DATA
        }
        Failure::Engine(error) => {
            print_error(&format!("error: {}", text::message(&error)));
            let wrong_usage = matches!(error, EngineError::InvalidArgument { .. });
            if wrong_usage { WRONG_USAGE } else { WRONG_DATA }
        }
    }
}

/// Writes to stderr; one that is closed has no reader.
pub(crate) fn print_error(text: &str) {
    let _closed = writeln!(Plain::text(io::stderr()), "{text}");
}

/// Shows a person something that is no data.
pub(crate) fn note(text: &str) {
    print_error(&format!("note: {text}"));
}

/// Writes `value` as JSON, indented, with a line end.
pub(crate) fn write_json(out: &mut dyn Write, value: &impl Serialize) -> Result<(), Failure> {
    serde_json::to_writer_pretty(Plain::json(&mut *out), value).map_err(|error| {
        match error.io_error_kind() {
            Some(kind) => Failure::Stdout(kind.into()),
            None => EngineError::internal("writing JSON", error.to_string()).into(),
        }
    })?;
    Ok(writeln!(out)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "ä\u{1b}]0;x\u{7}\u{7f}\u{9b}2J\u{202e}\n";

    fn written(plain: impl FnOnce(&mut Vec<u8>) -> io::Result<()>) -> String {
        let mut out = Vec::new();
        plain(&mut out).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn a_terminal_is_shown_characters_only() {
        let text = written(|out| Plain::text(out).write_all(TEXT.as_bytes()));
        assert_eq!(text, "ä\\u{1b}]0;x\\u{7}\\u{7f}\\u{9b}2J\\u{202e}\n");
    }

    #[test]
    fn json_says_the_same_string() {
        let json = written(|out| {
            write_json(out, &TEXT).map_err(|failure| io::Error::other(format!("{failure:?}")))
        });
        assert!(!json.trim_end().chars().any(text::disturbs), "{json:?}");
        assert_eq!(serde_json::from_str::<String>(&json).unwrap(), TEXT);
    }
}
