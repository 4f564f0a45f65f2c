//! Which backend a store uses: decided when it is opened, by setting and kernel, and said once.

use std::io;
use std::sync::{Arc, Once};

use rustix::io::Errno;

use super::{Io, threads, uring};
use crate::config::{DirectIo, IoBackend};
use crate::{EngineError, Result};

/// Opens the backend that `backend` names. With `auto`, where io_uring is refused, the pool of
/// threads takes its place, and the process's log says so once, with the reason.
pub fn open_backend(backend: IoBackend, direct_io: DirectIo) -> Result<Arc<dyn Io>> {
    match backend {
        IoBackend::Threads => open_threads(direct_io),
        IoBackend::Uring => match uring::Uring::new(uring::Options { direct_io }) {
            Ok(uring) => Ok(Arc::new(uring)),
            Err(source) => Err(EngineError::Io {
                what: "starting the io backend `uring`".into(),
                hint: format!("{}, or set `io_backend` to `auto`", uring_hint(&source)),
                source,
            }),
        },
        IoBackend::Auto => match uring::Uring::new(uring::Options { direct_io }) {
            Ok(uring) => Ok(Arc::new(uring)),
            Err(error) => {
                say_fallback_once(&error);
                open_threads(direct_io)
            }
        },
    }
}

fn open_threads(direct_io: DirectIo) -> Result<Arc<dyn Io>> {
    let options = threads::Options { direct_io, ..threads::Options::default() };
    match threads::Threads::new(options) {
        Ok(threads) => Ok(Arc::new(threads)),
        Err(source) => Err(EngineError::Io {
            what: "starting the io backend `threads`".into(),
            source,
            hint: "raise the limit on processes and threads (`ulimit -u`, or the container's \
                   pids limit)"
                .into(),
        }),
    }
}

fn say_fallback_once(error: &io::Error) {
    static SAID: Once = Once::new();
    SAID.call_once(|| {
        tracing::warn!(
            reason = %error,
            hint = uring_hint(error),
            "io_uring is not available: the io backend `threads` is used instead"
        );
    });
}

/// What to do about an io_uring that does not start.
pub(super) fn uring_hint(error: &io::Error) -> &'static str {
    match Errno::from_io_error(error) {
        Some(Errno::PERM | Errno::ACCESS) => {
            "allow io_uring: `sysctl kernel.io_uring_disabled=0`, and in a container a seccomp \
             profile that permits `io_uring_setup`, `io_uring_enter` and `io_uring_register`"
        }
        Some(Errno::NOSYS) => "use Linux 5.6 or newer, and a sandbox that has io_uring",
        Some(Errno::NOMEM) => "raise the limit on locked memory (`ulimit -l`)",
        Some(Errno::MFILE | Errno::NFILE) => "raise the limit on open files (`ulimit -n`)",
        _ => "use Linux 5.6 or newer; `ckpt-tool doctor` shows what the kernel allows",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn auto_always_opens_something() {
        for direct_io in [DirectIo::Auto, DirectIo::Off] {
            let io = open_backend(IoBackend::Auto, direct_io).unwrap();
            assert!(["uring", "threads"].contains(&io.name()), "{}", io.name());
        }
        assert_eq!(open_backend(IoBackend::Threads, DirectIo::Auto).unwrap().name(), "threads");
    }

    #[test]
    fn every_refusal_has_a_hint_of_its_own() {
        let refusals = [Errno::PERM, Errno::NOSYS, Errno::NOMEM, Errno::MFILE, Errno::IO];
        let mut hints = refusals.map(|errno| uring_hint(&errno.into())).to_vec();
        hints.sort_unstable();
        hints.dedup();
        assert_eq!(hints.len(), refusals.len());
    }
}
