//! The raw layout: storages grouped by element type, 64-byte aligned, laid end to end, cut into
//! chunks.

/// What the bytes of a storage are, as far as encoding cares. Discriminants are persisted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum ElementType {
    /// Integers, booleans, 8-bit floats, anything else: encoded as single bytes.
    Bytes = 0,
    /// IEEE binary16.
    F16 = 1,
    /// bfloat16.
    Bf16 = 2,
    /// IEEE binary32; also each half of a complex64.
    F32 = 3,
    /// IEEE binary64; also each half of a complex128.
    F64 = 4,
}
