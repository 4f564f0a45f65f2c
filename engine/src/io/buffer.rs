//! Memory that the kernel may own: huge-page pools cut into equal buffers.
#![expect(unsafe_code, reason = "hands out disjoint parts of one anonymous mapping")]

/// A buffer.
#[derive(Debug)]
pub struct Buffer;
