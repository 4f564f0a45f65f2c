//! Every way the engine can fail, as variants chosen by what the caller does next.
//!
//! Always holds: a message says what was being done and to what, why it failed (expected against
//! actual), and, on a line of its own that begins with `hint: `, how to go on. Lower case, literals
//! in backticks, no stop at the end.

use std::borrow::Cow;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use rustix::io::Errno;

/// An error of the engine. The variant says what to do; the fields say what happened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EngineError {
    /// Fix the call: an argument or a setting is out of its range.
    #[error("{what}: {why}\nhint: {hint}")]
    InvalidArgument {
        /// The operation or setting, with the value given.
        what: String,
        /// Expected against actual.
        why: String,
        /// How to fix it.
        hint: String,
    },
    /// Fix the call: there is no such checkpoint.
    #[error("{what}: {why}\nhint: {hint}")]
    NotFound {
        /// The operation and what it looked for.
        what: String,
        /// What exists instead.
        why: String,
        /// How to fix it.
        hint: String,
    },
    /// Fix the call, or say `rewind`: the step is not after the newest committed one, or another
    /// attempt committed it first.
    #[error("{what}: {why}\nhint: {hint}")]
    StepConflict {
        /// The operation and its step.
        what: String,
        /// The step that is in the way.
        why: String,
        /// How to fix it.
        hint: String,
    },
    /// Wait or open read-only: another writer holds the store.
    #[error("{what}: {why}\nhint: {hint}")]
    StoreBusy {
        /// The operation and the store's path.
        what: String,
        /// Who holds it, as far as is known.
        why: String,
        /// How to fix it.
        hint: String,
    },
    /// Restore another checkpoint: bytes on the medium are not what was written.
    #[error("{what}: {why}\nhint: {hint}")]
    Corrupt {
        /// The operation and the file.
        what: String,
        /// Expected against actual; names shard and chunk.
        why: String,
        /// How to go on.
        hint: String,
    },
    /// Upgrade: the checkpoint was written by a newer version.
    #[error("{what}: {why}\nhint: {hint}")]
    UnsupportedFormat {
        /// The operation and the file.
        what: String,
        /// What is not understood.
        why: String,
        /// The version that knows it.
        hint: String,
    },
    /// Free space, then save again; the previous checkpoints are untouched.
    #[error("{what}: {why}\nhint: {hint}")]
    NoSpace {
        /// The operation and the path.
        what: String,
        /// Bytes needed against bytes free.
        why: String,
        /// How to fix it.
        hint: String,
    },
    /// Retry, or look at the device: the operating system refused an operation.
    #[error("{what}: {source}\nhint: {hint}")]
    Io {
        /// The operation and the path.
        what: String,
        /// What the operating system said.
        #[source]
        source: std::io::Error,
        /// How to go on.
        hint: String,
    },
    /// Retry, or fix the access: the service that holds the store did not do what it was asked.
    /// Nothing is known of the checkpoints themselves.
    #[error("{what}: {why}\nhint: {hint}")]
    Unavailable {
        /// The operation, with bucket, key and part.
        what: String,
        /// What the service said, with its code and the request's id; or what became of the
        /// connection.
        why: String,
        /// How to go on.
        hint: String,
    },
    /// Look at the GPU, or keep the tensors on the CPU: its driver refused an operation.
    #[error("{what}: {why}\nhint: {hint}")]
    Accelerator {
        /// The operation.
        what: String,
        /// What the driver said.
        why: String,
        /// How to go on.
        hint: String,
    },
    /// Open a new engine: this one was closed, or belongs to the parent of a forked process.
    #[error("{what}: {why}\nhint: {hint}")]
    Closed {
        /// The operation.
        what: String,
        /// Why it is closed.
        why: String,
        /// How to go on.
        hint: String,
    },
    /// Do what `kind` says: saving or loading together with other ranks did not succeed.
    #[error("{what}: {why}\nhint: {hint}")]
    Coordination {
        /// What to do next.
        kind: CoordinationKind,
        /// The operation.
        what: String,
        /// Which rank, or what of the coordinator.
        why: String,
        /// How to go on.
        hint: String,
    },
    /// Report a bug: the engine broke one of its own rules and refuses further work.
    #[error("{what}: {why}\nhint: {hint}")]
    Internal {
        /// The operation.
        what: String,
        /// The broken rule.
        why: String,
        /// How to go on.
        hint: String,
    },
}

/// Why ranks could not act together, by what the caller does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum CoordinationKind {
    /// Save again: a rank failed or was lost, and so the save failed on all of them.
    SaveAborted,
    /// Start the coordinator, or correct its address.
    Unavailable,
    /// Present the right token or certificate.
    Unauthenticated,
    /// Wait, or end what is in the way.
    Conflict,
    /// Register again: this process is no longer a member of its job.
    Fenced,
    /// Decide whether to go on: the job lost a worker.
    MembershipChanged,
    /// Look at the workers that the message names: they did not come in time.
    TimedOut,
    /// End this process: the job is aborted.
    JobAborted,
}

impl EngineError {
    /// What the message is made of: what was being done, why it failed, and how to go on.
    pub fn parts(&self) -> (&str, Cow<'_, str>, &str) {
        match self {
            Self::Io { what, source, hint } => (what, source.to_string().into(), hint),
            Self::InvalidArgument { what, why, hint }
            | Self::NotFound { what, why, hint }
            | Self::StepConflict { what, why, hint }
            | Self::StoreBusy { what, why, hint }
            | Self::Corrupt { what, why, hint }
            | Self::UnsupportedFormat { what, why, hint }
            | Self::NoSpace { what, why, hint }
            | Self::Unavailable { what, why, hint }
            | Self::Accelerator { what, why, hint }
            | Self::Closed { what, why, hint }
            | Self::Coordination { what, why, hint, .. }
            | Self::Internal { what, why, hint } => (what, why.into(), hint),
        }
    }

    /// How to fix it: the text after `hint: `.
    pub fn hint(&self) -> &str {
        self.parts().2
    }

    /// The message without its hint.
    pub fn without_hint(&self) -> String {
        let (what, why, _) = self.parts();
        format!("{what}: {why}")
    }

    /// An error of the operating system during `operation` on `path`, folded into the variant that
    /// says what to do: a full disk and an exceeded quota become [`EngineError::NoSpace`].
    pub fn from_io(operation: &str, path: &Path, source: std::io::Error) -> Self {
        use std::io::ErrorKind as Kind;
        let what = format!("{operation} `{}`", path.display());
        let of_open_files = [Errno::MFILE, Errno::NFILE].map(|errno| Some(errno.raw_os_error()));
        let hint = match source.kind() {
            Kind::StorageFull | Kind::QuotaExceeded => {
                return Self::NoSpace {
                    what,
                    why: source.to_string(),
                    hint:
                        "free space, or lower `keep_last_n`, then save again; earlier checkpoints \
                           are untouched"
                            .into(),
                };
            }
            Kind::PermissionDenied => "check the owner and mode of the path and of its parents",
            Kind::ReadOnlyFilesystem => {
                "the filesystem is mounted read-only: remount it or choose another path"
            }
            Kind::NotADirectory => "a parent of the path is a file: choose another path",
            Kind::InvalidFilename => {
                "the path is too long or holds a character that the filesystem refuses: choose \
                    another path"
            }
            Kind::Unsupported => {
                "the filesystem refuses this: set `direct_io` to `auto`, or choose another path"
            }
            Kind::NotFound => {
                "there is no such file or directory: check the path, and whether it was deleted \
                 while in use"
            }
            Kind::OutOfMemory => "free memory, or lower `staging_bytes`",
            Kind::FileTooLarge => {
                "raise the limit of a file's size (`ulimit -f`), or choose another filesystem"
            }
            Kind::InvalidInput => "check the path and the settings",
            _ if of_open_files.contains(&source.raw_os_error()) => {
                "raise the limit of open files (`ulimit -n`), or close some"
            }
            Kind::StaleNetworkFileHandle => {
                "another machine deleted it while it was in use here: list the checkpoints again"
            }
            _ => {
                "look at the kernel log (`dmesg`) and the device; earlier checkpoints are untouched"
            }
        };
        Self::Io { what, source, hint: hint.into() }
    }

    /// Damage found in `file`.
    pub(crate) fn corrupt(file: impl fmt::Display, why: impl Into<String>) -> Self {
        Self::Corrupt {
            what: format!("reading `{file}`"),
            why: why.into(),
            hint: "restore another step, or run `ckpt-tool verify` to see what is damaged".into(),
        }
    }

    /// A broken rule of our own.
    pub fn internal(what: impl Into<String>, why: impl Into<String>) -> Self {
        Self::Internal {
            what: what.into(),
            why: why.into(),
            hint: "this is a bug in dtruntime: please report it with this message; \
                   committed checkpoints are untouched"
                .into(),
        }
    }

    /// `what` would change the store at `location`, which was opened to be read.
    pub(crate) fn read_only(what: &str, location: impl fmt::Display) -> Self {
        Self::invalid(
            format!("{what} in `{location}`"),
            "the store was opened read-only",
            "open it without `read_only=True`",
        )
    }

    /// `what` was asked of the store at `location` by a fork of `process`, which opened it.
    pub(crate) fn forked(what: &str, location: impl fmt::Display, process: u32) -> Self {
        Self::Closed {
            what: format!("{what} in `{location}`"),
            why: format!(
                "the store was opened by process {process}, and this is a fork of it, process {}",
                std::process::id()
            ),
            hint: "open the store again in this process, with `read_only=True` while the parent \
                   writes to it"
                .into(),
        }
    }

    /// An argument out of range.
    pub fn invalid(
        what: impl Into<String>,
        why: impl Into<String>,
        hint: impl Into<String>,
    ) -> Self {
        Self::InvalidArgument { what: what.into(), why: why.into(), hint: hint.into() }
    }

    /// The same error for a second reader (a handle that is asked twice); the source is rendered.
    #[must_use]
    pub(crate) fn duplicate(&self) -> Self {
        macro_rules! same {
            ($($variant:ident),*) => {
                match self {
                    $(Self::$variant { what, why, hint } => Self::$variant {
                        what: what.clone(), why: why.clone(), hint: hint.clone(),
                    },)*
                    Self::Coordination { kind, what, why, hint } => Self::Coordination {
                        kind: *kind, what: what.clone(), why: why.clone(), hint: hint.clone(),
                    },
                    Self::Io { what, source, hint } => Self::Io {
                        what: what.clone(),
                        source: match source.raw_os_error() {
                            Some(code) => std::io::Error::from_raw_os_error(code),
                            None => std::io::Error::new(source.kind(), source.to_string()),
                        },
                        hint: hint.clone(),
                    },
                }
            };
        }
        same!(
            InvalidArgument,
            NotFound,
            StepConflict,
            StoreBusy,
            Corrupt,
            UnsupportedFormat,
            NoSpace,
            Unavailable,
            Accelerator,
            Closed,
            Internal
        )
    }
}

/// What `act` gives; the error that `panicked` makes where it panics.
pub(crate) fn caught<T, E>(
    act: impl FnOnce() -> Result<T, E>,
    panicked: impl FnOnce() -> E,
) -> Result<T, E> {
    catch_unwind(AssertUnwindSafe(act)).unwrap_or_else(|_panic| Err(panicked()))
}

/// Gives an `io::Result` the operation and path that its message must name.
pub trait IoContext<T> {
    /// Maps the error through [`EngineError::from_io`].
    fn context(self, operation: &str, path: impl Into<PathBuf>) -> crate::Result<T>;
}

impl<T> IoContext<T> for std::io::Result<T> {
    fn context(self, operation: &str, path: impl Into<PathBuf>) -> crate::Result<T> {
        self.map_err(|source| EngineError::from_io(operation, &path.into(), source))
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    fn rendered(errno: i32) -> String {
        let source = io::Error::from_raw_os_error(errno);
        EngineError::from_io("writing", Path::new("/store/x.shard"), source).to_string()
    }

    #[test]
    fn what_the_operating_system_says_is_folded_into_what_to_do() {
        let messages = [
            (
                28,
                "No space left on device (os error 28)\nhint: free space, or lower \
                  `keep_last_n`, then save again; earlier checkpoints are untouched",
            ),
            (
                122,
                "Quota exceeded (os error 122)\nhint: free space, or lower \
                  `keep_last_n`, then save again; earlier checkpoints are untouched",
            ),
            (
                13,
                "Permission denied (os error 13)\nhint: check the owner and mode of the path and \
                  of its parents",
            ),
            (
                30,
                "Read-only file system (os error 30)\nhint: the filesystem is mounted read-only: \
                  remount it or choose another path",
            ),
            (
                20,
                "Not a directory (os error 20)\nhint: a parent of the path is a file: choose \
                  another path",
            ),
            (
                36,
                "File name too long (os error 36)\nhint: the path is too long or holds a \
                  character that the filesystem refuses: choose another path",
            ),
            (
                2,
                "No such file or directory (os error 2)\nhint: there is no such file or directory: \
                  check the path, and whether it was deleted while in use",
            ),
            (
                24,
                "Too many open files (os error 24)\nhint: raise the limit of open files (`ulimit \
                  -n`), or close some",
            ),
            (
                12,
                "Cannot allocate memory (os error 12)\nhint: free memory, or lower `staging_bytes`",
            ),
            (
                27,
                "File too large (os error 27)\nhint: raise the limit of a file's size (`ulimit \
                  -f`), or choose another filesystem",
            ),
            (
                5,
                "Input/output error (os error 5)\nhint: look at the kernel log (`dmesg`) and the \
                  device; earlier checkpoints are untouched",
            ),
        ];
        for (errno, expected) in messages {
            let actual = rendered(errno).replace("Disk quota exceeded", "Quota exceeded");
            assert_eq!(actual, format!("writing `/store/x.shard`: {expected}"));
        }
    }

    #[test]
    fn a_duplicate_says_the_same_and_keeps_the_errno() {
        let source = io::Error::from_raw_os_error(5);
        let error = EngineError::from_io("syncing", Path::new("/store"), source);
        let again = error.duplicate();
        assert_eq!(again.to_string(), error.to_string());
        assert!(
            matches!(again, EngineError::Io { source, .. } if source.raw_os_error() == Some(5))
        );
        let bug = EngineError::internal("encoding a chunk", "the worker panicked");
        assert_eq!(
            bug.duplicate().to_string(),
            "encoding a chunk: the worker panicked\nhint: this is a bug in dtruntime: please \
             report it with this message; committed checkpoints are untouched"
        );
    }
}
