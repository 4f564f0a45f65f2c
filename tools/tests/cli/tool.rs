//! Running the built program.

use std::process::{Command, Output, Stdio};

/// What a run left.
#[derive(Debug)]
pub(crate) struct Run {
    pub(crate) status: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Run {
    /// The JSON on stdout.
    #[track_caller]
    pub(crate) fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    /// That it failed with this status, told why on stderr with a hint, and printed no data.
    #[track_caller]
    pub(crate) fn assert_error(&self, status: i32) {
        assert_eq!(self.status, status, "{self:?}");
        assert_eq!(self.stdout, "", "{self:?}");
        let last = self.stderr.trim_end().lines().next_back().unwrap_or_default();
        assert!(last.starts_with("hint: "), "{self:?}");
    }
}

/// Runs `ckpt-tool` with these arguments.
pub(crate) fn run<T: AsRef<std::ffi::OsStr>>(arguments: impl IntoIterator<Item = T>) -> Run {
    let Output { status, stdout, stderr } =
        command().args(arguments).stdin(Stdio::null()).output().unwrap();
    Run {
        status: status.code().expect("it was not killed"),
        stdout: String::from_utf8(stdout).unwrap(),
        stderr: String::from_utf8(stderr).unwrap(),
    }
}

/// The program, with its log at errors: whether io_uring is there must not change what is printed.
pub(crate) fn command() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ckpt-tool"));
    command.env("RUST_LOG", "error");
    command
}
