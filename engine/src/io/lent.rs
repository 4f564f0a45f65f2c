//! A buffer that others fill, part by part, each whenever it gets to it.
//!
//! ```text
//! buffer  |  part  |   part   |     |  part  |      lent out at once, to several devices
//!             ▼         ▼               ▼
//!          dropped   dropped         dropped   ──► the buffer, to its next user
//! ```
//!
//! Always holds: parts of one buffer do not overlap; the buffer goes on exactly once, when no part
//! of it is left.
//!
//! Why `unsafe`: the borrow checker knows no parts of one buffer that are owned by different
//! threads.
#![expect(unsafe_code, reason = "parts of one buffer that several threads own")]

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use super::buffer::Buffer;

/// A part of a buffer, nobody else's until it is dropped.
pub(crate) struct Part {
    /// `None` only while the part is dropped.
    whole: Option<Arc<Whole>>,
    range: Range<usize>,
}

/// Who gets the buffer when all parts are back.
type Next = Box<dyn FnOnce(Buffer) + Send + Sync>;

struct Whole {
    buffer: Buffer,
    next: Next,
}

/// Lends `ranges` of a buffer, which ascend and do not overlap; `next` gets it when all parts were
/// dropped, on the thread that drops the last one.
///
/// # Panics
///
/// Where the ranges overlap or go beyond the buffer.
pub(crate) fn lend(
    buffer: Buffer,
    ranges: &[Range<usize>],
    next: impl FnOnce(Buffer) + Send + Sync + 'static,
) -> Vec<Part> {
    let ascend = ranges.windows(2).all(|pair| pair[0].end <= pair[1].start);
    let end = ranges.last().map_or(0, |range| range.end);
    let are_sound = ranges.iter().all(|range| range.start <= range.end);
    assert!(are_sound && ascend && end <= buffer.len(), "parts lie apart within the buffer");
    let whole = Arc::new(Whole { buffer, next: Box::new(next) });
    let part =
        |range: &Range<usize>| Part { whole: Some(Arc::clone(&whole)), range: range.clone() };
    let parts = ranges.iter().map(part).collect();
    // If there are none, this is the last.
    drop(Part { whole: Some(whole), range: 0..0 });
    parts
}

impl Part {
    /// A part of nothing.
    pub(crate) fn none() -> Self {
        Self { whole: None, range: 0..0 }
    }

    /// Its bytes.
    pub(crate) fn memory(&mut self) -> &mut [u8] {
        let Some(whole) = &self.whole else { return &mut [] };
        // Within the buffer, as `lend` and `split_at` made sure.
        let start = whole.buffer.start().wrapping_add(self.range.start);
        // SAFETY: the buffer is live while `whole` is held, and initialised; parts of it do not
        // overlap, this one is borrowed exclusively, and the buffer itself is not touched before
        // all parts are gone.
        unsafe { std::slice::from_raw_parts_mut(start, self.range.len()) }
    }

    /// How many bytes it has.
    pub(crate) fn len(&self) -> usize {
        self.range.len()
    }

    /// Whether it has none.
    pub(crate) fn is_empty(&self) -> bool {
        self.range.is_empty()
    }

    /// The first `bytes` of it, and the rest.
    ///
    /// # Panics
    ///
    /// Where it has fewer.
    #[must_use]
    pub(crate) fn split_at(mut self, bytes: usize) -> (Self, Self) {
        assert!(bytes <= self.len(), "{bytes} of {} bytes", self.len());
        let middle = self.range.start + bytes;
        let rest = Self { whole: self.whole.clone(), range: middle..self.range.end };
        self.range.end = middle;
        (self, rest)
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        if let Some(Whole { buffer, next }) = self.whole.take().and_then(Arc::into_inner) {
            next(buffer);
        }
    }
}

impl fmt::Debug for Part {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Part").field("range", &self.range).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;
    use crate::io::buffer::BufferPool;

    #[test]
    fn several_threads_fill_a_buffer_and_it_goes_on_once() {
        let pool = BufferPool::new(8192, 1).unwrap();
        let (sender, receiver) = channel();
        let next = move |buffer| sender.send(buffer).unwrap();
        let mut parts = lend(pool.take(), &[0..100, 100..4096, 5000..8192], next);
        let (head, tail) = parts.pop().unwrap().split_at(192);
        parts.extend([head, tail]);
        std::thread::scope(|scope| {
            for (value, mut part) in (1..).zip(parts) {
                scope.spawn(move || part.memory().fill(value));
            }
        });
        let buffer: Buffer = receiver.recv().unwrap();
        let expected = [(0, 100, 1), (100, 4096, 2), (5000, 5192, 3), (5192, 8192, 4)];
        for (start, end, value) in expected {
            assert!(buffer[start..end].iter().all(|byte| *byte == value), "{start}..{end}");
        }
        assert!(receiver.recv().is_err(), "nobody else can get it");
    }

    #[test]
    fn a_buffer_of_which_nothing_is_lent_goes_on_at_once() {
        let pool = BufferPool::new(4096, 1).unwrap();
        let (sender, receiver) = channel();
        assert_eq!(
            lend(pool.take(), &[], move |buffer| sender.send(buffer.len()).unwrap()).len(),
            0
        );
        assert_eq!(receiver.try_recv(), Ok(4096));
        assert_eq!(pool.free(), 1);
    }

    #[test]
    #[should_panic(expected = "parts lie apart")]
    fn parts_that_overlap_are_refused() {
        let pool = BufferPool::new(4096, 1).unwrap();
        drop(lend(pool.take(), &[0..10, 9..20], drop));
    }
}
