//! Chunk bytes <-> stored bytes, pure.
//!
//! Always holds: decoding what was encoded gives the same bytes; encoding never grows a chunk (one
//! that does not shrink below `STORED_FRACTION_MAX` is left raw); a decoder given any bytes at all
//! returns an error or exactly the expected number of bytes, and allocates nothing whose size those
//! bytes choose.
//!
//! ```
//! use dtr_engine::codec::{Codec, Decoder, Encoded, Encoder};
//! use dtr_engine::format::layout::ElementType;
//!
//! let raw = vec![7_u8; 4096];
//! let mut stored = vec![0_u8; 4096];
//! let encoded = Encoder::new().encode(Codec::Float, ElementType::F32, &raw, &mut stored)?;
//! let Encoded::Stored(bytes) = encoded else { panic!("a constant chunk shrinks") };
//!
//! let mut back = vec![0_u8; 4096];
//! Decoder::new().decode(Codec::Float, &stored[..bytes], &mut back)?;
//! assert_eq!(back, raw);
//! # Ok::<(), dtr_engine::codec::CodecError>(())
//! ```

use std::fmt;

use crate::format::layout::ElementType;

mod float;
mod gzip;
pub mod planes;
mod sample;
mod zstd;

/// A chunk is stored encoded only where its stored bytes are below this fraction (numerator,
/// denominator) of its raw bytes: saving less is not worth a decoder's time at every load.
pub(crate) const STORED_FRACTION_MAX: (usize, usize) = (97, 100);

/// How a chunk's raw bytes become its stored bytes. The discriminants are persisted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Codec {
    /// Raw bytes.
    None = 0,
    /// Byte planes with Huffman coding.
    Float = 1,
    /// One zstd frame.
    Zstd = 2,
    /// One gzip member.
    Gzip = 3,
}

impl Codec {
    /// The codec with this persisted id; `None` where this version knows no such codec.
    pub(crate) fn from_id(id: u8) -> Option<Self> {
        match id {
            0 => Some(Self::None),
            1 => Some(Self::Float),
            2 => Some(Self::Zstd),
            3 => Some(Self::Gzip),
            _ => None,
        }
    }

    /// The persisted id.
    pub fn id(self) -> u8 {
        self as u8
    }

    /// The name that users write and read.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Float => "float",
            Self::Zstd => "zstd",
            Self::Gzip => "gzip",
        }
    }
}

/// What [`Encoder::encode`] made of a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoded {
    /// It did not shrink, or need not: store the raw bytes, with [`Codec::None`].
    Raw,
    /// This many stored bytes are at the start of the buffer.
    Stored(usize),
}

/// Why a chunk was not encoded or decoded: one sentence, expected against actual. The caller adds
/// the file and the chunk.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CodecError {
    /// The stored bytes break a rule of their codec.
    #[error("{0}")]
    Damaged(String),
    /// A compression library refused to work: no memory, or a defect.
    #[error("{0}")]
    Library(String),
}

/// Encodes chunks, one at a time. Each worker thread owns one: its scratch memory, a few MiB
/// however large a chunk is, is allocated at the first use of a codec and kept.
#[derive(Default)]
pub struct Encoder {
    float: Option<float::Encoder>,
    zstd: Option<zstd::Compressor>,
    gzip: Option<gzip::Compressor>,
}

impl Encoder {
    /// An encoder that holds no memory yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Encodes `raw`, whose elements are `element`, into `stored`, never past its end: a result
    /// that does not fit, or is not below `STORED_FRACTION_MAX`, is [`Encoded::Raw`], and what
    /// `stored` then holds means nothing.
    pub fn encode(
        &mut self,
        codec: Codec,
        element: ElementType,
        raw: &[u8],
        stored: &mut [u8],
    ) -> Result<Encoded, CodecError> {
        let room_bytes = stored.len().min(stored_bytes_max(raw.len()));
        let stored = &mut stored[..room_bytes];
        let encoded = match codec {
            Codec::None => None,
            Codec::Float => lazily(&mut self.float, float::Encoder::new)?.encode(
                element_bytes(element),
                raw,
                stored,
            )?,
            Codec::Zstd => lazily(&mut self.zstd, || zstd::Compressor::new(zstd::Mode::Fast))?
                .compress(raw, stored)?,
            Codec::Gzip => {
                lazily(&mut self.gzip, || Ok(gzip::Compressor::new()))?.compress(raw, stored)?
            }
        };
        Ok(encoded.map_or(Encoded::Raw, Encoded::Stored))
    }
}

impl fmt::Debug for Encoder {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Encoder").finish_non_exhaustive()
    }
}

/// Decodes chunks, one at a time. Each thread owns one; its scratch memory is kept.
#[derive(Default)]
pub struct Decoder {
    float: Option<float::Decoder>,
    zstd: Option<zstd::Decompressor>,
    gzip: Option<gzip::Decompressor>,
}

impl Decoder {
    /// A decoder that holds no memory yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Decodes `stored`, all of it, to exactly the bytes of `raw`; anything else is an error, and
    /// what `raw` then holds means nothing.
    ///
    /// Ok means "the right length", not "the right bytes": the chunk's checksums say that.
    pub fn decode(
        &mut self,
        codec: Codec,
        stored: &[u8],
        raw: &mut [u8],
    ) -> Result<(), CodecError> {
        match codec {
            Codec::None => copy(stored, raw),
            Codec::Float => lazily(&mut self.float, float::Decoder::new)?.decode(stored, raw),
            Codec::Zstd => lazily(&mut self.zstd, zstd::Decompressor::new)?.decompress(stored, raw),
            Codec::Gzip => {
                lazily(&mut self.gzip, || Ok(gzip::Decompressor::new()))?.decompress(stored, raw)
            }
        }
    }
}

impl fmt::Debug for Decoder {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Decoder").finish_non_exhaustive()
    }
}

/// Most stored bytes that still count as shrunk.
fn stored_bytes_max(raw_bytes: usize) -> usize {
    let (numerator, denominator) = STORED_FRACTION_MAX;
    raw_bytes.saturating_mul(numerator).saturating_sub(1) / denominator
}

/// Bytes of an element, which is the number of its byte planes.
fn element_bytes(element: ElementType) -> usize {
    match element {
        ElementType::Bytes => 1,
        ElementType::F16 | ElementType::Bf16 => 2,
        ElementType::F32 => 4,
        ElementType::F64 => 8,
    }
}

fn copy(stored: &[u8], raw: &mut [u8]) -> Result<(), CodecError> {
    if stored.len() != raw.len() {
        return Err(CodecError::Damaged(format!(
            "a raw chunk of {} bytes is expected, {} bytes are stored",
            raw.len(),
            stored.len()
        )));
    }
    raw.copy_from_slice(stored);
    Ok(())
}

/// What `slot` holds, made now where it holds nothing.
fn lazily<T>(
    slot: &mut Option<T>,
    make: impl FnOnce() -> Result<T, CodecError>,
) -> Result<&mut T, CodecError> {
    let value = match slot.take() {
        Some(value) => value,
        None => make()?,
    };
    Ok(slot.insert(value))
}

#[cfg(test)]
mod tests;
