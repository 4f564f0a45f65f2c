//! Whole transfers, made of as many attempts as it takes.
//!
//! Always holds:
//! - `done` runs once: with the full length, or with an error and the buffer.
//! - Every attempt is a submit of its own, so that a fault-injecting backend sees each.
//! - An attempt that moves nothing ends the transfer: at the end of a file for a read, as
//!   `WriteZero` for a write. Only `EAGAIN` and `EINTR` are tried again, [`RETRIES_MAX`] times.
//! - Continuing keeps the alignment of a direct file: from the last aligned boundary, which may
//!   repeat a few bytes.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use rustix::io::Errno;

use super::buffer::Buffer;
use super::{ALIGNMENT, Direction, Done, File, Io, Transfer};

/// How often in a row an attempt may ask to be tried again.
const RETRIES_MAX: u32 = 16;

/// Submits `transfer` and goes on until all of it is moved or cannot be.
pub(crate) fn transfer_fully(io: &Arc<dyn Io>, transfer: Transfer) {
    let Transfer { file, offset, buffer, range, direction, done } = transfer;
    if range.is_empty() {
        return done(Ok(0), buffer);
    }
    let whole = Whole { io: Arc::clone(io), file, offset, range, direction, done };
    whole.attempt(Progress::default(), buffer);
}

/// Reads `buffer[range]` from `offset` and waits for it. The buffer comes back with every outcome.
pub(crate) fn read_fully(
    io: &Arc<dyn Io>,
    file: &Arc<File>,
    offset: u64,
    buffer: Buffer,
    range: Range<usize>,
) -> (io::Result<()>, Buffer) {
    wait(io, file, offset, buffer, range, Direction::Read)
}

/// Writes `buffer[range]` at `offset` and waits for it. The buffer comes back with every outcome.
pub(crate) fn write_fully(
    io: &Arc<dyn Io>,
    file: &Arc<File>,
    offset: u64,
    buffer: Buffer,
    range: Range<usize>,
) -> (io::Result<()>, Buffer) {
    wait(io, file, offset, buffer, range, Direction::Write)
}

fn wait(
    io: &Arc<dyn Io>,
    file: &Arc<File>,
    offset: u64,
    buffer: Buffer,
    range: Range<usize>,
    direction: Direction,
) -> (io::Result<()>, Buffer) {
    let (sender, receiver) = crossbeam_channel::bounded(1);
    let done: Done = Box::new(move |outcome, buffer| {
        // The receiver is on the stack of the thread that waits below, and so exists.
        let _ = sender.send((outcome, buffer));
    });
    transfer_fully(io, Transfer { file: Arc::clone(file), offset, buffer, range, direction, done });
    let (outcome, buffer) = receiver.recv().expect("a backend calls `done` of every transfer");
    (outcome.map(|_| ()), buffer)
}

/// A transfer and what it needs to go on.
struct Whole {
    io: Arc<dyn Io>,
    file: Arc<File>,
    offset: u64,
    range: Range<usize>,
    direction: Direction,
    done: Done,
}

/// How far a transfer has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Progress {
    /// Bytes known to be moved.
    moved_bytes: usize,
    /// Where the next attempt starts; below `moved_bytes` where alignment asks for it.
    next: usize,
    /// Attempts in a row that asked to be tried again.
    retries: u32,
}

/// What to do after an attempt.
#[derive(Debug)]
enum Step {
    Continue(Progress),
    Finish(io::Result<usize>),
}

impl Whole {
    fn attempt(self, progress: Progress, buffer: Buffer) {
        let io = Arc::clone(&self.io);
        let transfer = Transfer {
            file: Arc::clone(&self.file),
            // Cannot overflow: the end of the transfer is a file offset too, or the kernel refused
            // the first attempt.
            offset: self.offset.saturating_add(progress.next as u64),
            buffer,
            range: self.range.start + progress.next..self.range.end,
            direction: self.direction,
            done: Box::new(move |outcome, buffer| self.advance(progress, outcome, buffer)),
        };
        io.submit(transfer);
    }

    fn advance(self, progress: Progress, outcome: io::Result<usize>, buffer: Buffer) {
        match step(progress, outcome, self.range.len(), self.direction, self.file.direct) {
            Step::Continue(progress) => self.attempt(progress, buffer),
            Step::Finish(outcome) => (self.done)(outcome, buffer),
        }
    }
}

/// Decides, from an attempt's outcome, how a transfer of `wanted_bytes` goes on.
fn step(
    progress: Progress,
    outcome: io::Result<usize>,
    wanted_bytes: usize,
    direction: Direction,
    direct: bool,
) -> Step {
    let attempt_bytes = match outcome {
        Ok(bytes) => bytes,
        Err(error) if may_retry(&error) && progress.retries < RETRIES_MAX => {
            return Step::Continue(Progress { retries: progress.retries + 1, ..progress });
        }
        Err(error) => return Step::Finish(Err(error)),
    };
    let moved_bytes = progress.next.saturating_add(attempt_bytes);
    if moved_bytes >= wanted_bytes {
        return Step::Finish(Ok(wanted_bytes));
    }
    if moved_bytes <= progress.moved_bytes {
        return Step::Finish(Err(ended_early(moved_bytes, wanted_bytes, direction)));
    }
    let next = if direct { moved_bytes - moved_bytes % ALIGNMENT } else { moved_bytes };
    Step::Continue(Progress { moved_bytes, next, retries: 0 })
}

fn may_retry(error: &io::Error) -> bool {
    matches!(Errno::from_io_error(error), Some(Errno::AGAIN | Errno::INTR))
}

fn ended_early(moved_bytes: usize, wanted_bytes: usize, direction: Direction) -> io::Error {
    match direction {
        Direction::Read => io::Error::new(
            io::ErrorKind::UnexpectedEof,
            format!("the file ends after {moved_bytes} of the {wanted_bytes} bytes to read"),
        ),
        Direction::Write => io::Error::new(
            io::ErrorKind::WriteZero,
            format!("the device took {moved_bytes} of {wanted_bytes} bytes and then no more"),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn next_of(step: Step) -> Progress {
        match step {
            Step::Continue(progress) => progress,
            Step::Finish(outcome) => panic!("finished with {outcome:?}"),
        }
    }

    fn error_of(step: Step) -> io::Error {
        match step {
            Step::Finish(Err(error)) => error,
            other => panic!("no error: {other:?}"),
        }
    }

    #[test]
    fn a_short_direct_transfer_goes_on_from_an_aligned_boundary() {
        let progress =
            next_of(step(Progress::default(), Ok(10_000), 16_384, Direction::Write, true));
        assert_eq!(progress, Progress { moved_bytes: 10_000, next: 8192, retries: 0 });
        let last = step(progress, Ok(8192), 16_384, Direction::Write, true);
        assert!(matches!(last, Step::Finish(Ok(16_384))), "{last:?}");
    }

    #[test]
    fn a_short_buffered_transfer_goes_on_where_it_stopped() {
        let progress = next_of(step(Progress::default(), Ok(10), 100, Direction::Read, false));
        assert_eq!(progress, Progress { moved_bytes: 10, next: 10, retries: 0 });
    }

    #[test]
    fn moving_nothing_is_an_error() {
        let start = Progress::default();
        let error = error_of(step(start, Ok(0), 100, Direction::Write, false));
        assert_eq!(error.kind(), io::ErrorKind::WriteZero);
        let error = error_of(step(start, Ok(0), 100, Direction::Read, false));
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn repeating_the_same_bytes_up_to_the_end_of_the_file_ends() {
        // A file of 5000 bytes, read directly.
        let progress = next_of(step(Progress::default(), Ok(5000), 8192, Direction::Read, true));
        let error = error_of(step(progress, Ok(904), 8192, Direction::Read, true));
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        assert!(error.to_string().contains("5000 of the 8192"), "{error}");
    }

    #[test]
    fn retries_are_bounded_and_counted_in_a_row() {
        let again = || Err(io::Error::from(Errno::AGAIN));
        let mut progress = Progress::default();
        for _ in 0..RETRIES_MAX {
            progress = next_of(step(progress, again(), 100, Direction::Read, false));
        }
        error_of(step(progress, again(), 100, Direction::Read, false));
        let moved = next_of(step(progress, Ok(1), 100, Direction::Read, false));
        assert_eq!(moved.retries, 0);
        let other = io::Error::from(Errno::IO);
        error_of(step(moved, Err(other), 100, Direction::Read, false));
    }
}
