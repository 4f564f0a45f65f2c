//! One gzip member <-> raw bytes.
//!
//! ```text
//! 1f 8b | 08 deflate | 00 no optional fields | 00000000 no time | 00 | ff any system
//! deflate stream
//! crc32 of the raw bytes | length of the raw bytes, modulo 2^32        (both little-endian)
//! ```
//!
//! Always holds: a member is decoded by any gzip decoder; exactly one member with exactly this
//! header is decoded here, with nothing after it, to exactly the expected bytes. The frame is
//! written by hand because only a bare deflate state can be reset and reused.

use std::fmt::Display;

use flate2::{Compress, Compression, Crc, Decompress, FlushCompress, FlushDecompress, Status};

use super::CodecError;

const HEADER: [u8; 10] = [0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 0xff];
const TRAILER_BYTES: usize = 8;
const LEVEL: u32 = 6;

/// Compresses, reusing its tables.
pub(super) struct Compressor(Compress);

impl Compressor {
    pub(super) fn new() -> Self {
        Self(Compress::new(Compression::new(LEVEL), false))
    }

    /// Bytes of the member written at the start of `member`; `None` where it does not fit.
    pub(super) fn compress(
        &mut self,
        raw: &[u8],
        member: &mut [u8],
    ) -> Result<Option<usize>, CodecError> {
        let Some(body_room_bytes) = member.len().checked_sub(HEADER.len() + TRAILER_BYTES) else {
            return Ok(None);
        };
        let (header, rest) = member.split_at_mut(HEADER.len());
        header.copy_from_slice(&HEADER);

        self.0.reset();
        let body = &mut rest[..body_room_bytes];
        let status = self
            .0
            .compress(raw, body, FlushCompress::Finish)
            .map_err(|error| CodecError::Library(format!("deflate refused to work: {error}")))?;
        if status != Status::StreamEnd {
            // Resetting a stream that has not ended keeps its place in the output not yet taken
            // (zlib-rs 0.6), and later streams then panic for want of room.
            *self = Self::new();
            return Ok(None);
        }

        let body_bytes = index(self.0.total_out());
        rest[body_bytes..][..TRAILER_BYTES].copy_from_slice(&trailer(raw));
        Ok(Some(HEADER.len() + body_bytes + TRAILER_BYTES))
    }
}

/// Decompresses, reusing its tables.
pub(super) struct Decompressor(Decompress);

impl Decompressor {
    pub(super) fn new() -> Self {
        Self(Decompress::new(false))
    }

    /// Decodes `member`, exactly one member, to exactly the bytes of `raw`.
    pub(super) fn decompress(&mut self, member: &[u8], raw: &mut [u8]) -> Result<(), CodecError> {
        let (body, trailer_found) = member
            .strip_prefix(&HEADER)
            .and_then(<[u8]>::split_last_chunk::<TRAILER_BYTES>)
            .ok_or_else(|| damaged("its header is not the one that is written"))?;

        self.0.reset(false);
        let status = self.0.decompress(body, raw, FlushDecompress::Finish).map_err(damaged)?;
        let (body_bytes, raw_bytes) = (index(self.0.total_in()), index(self.0.total_out()));
        if status != Status::StreamEnd || raw_bytes != raw.len() {
            return Err(damaged(format!(
                "{} bytes are expected, {raw_bytes} were decoded when it stopped",
                raw.len()
            )));
        }
        if body_bytes != body.len() {
            return Err(damaged(format!(
                "a deflate stream of {} bytes is expected, it ends after {body_bytes}",
                body.len()
            )));
        }
        if trailer(raw) != *trailer_found {
            return Err(damaged("its checksum or length is not that of its content"));
        }
        Ok(())
    }
}

fn trailer(raw: &[u8]) -> [u8; TRAILER_BYTES] {
    let mut crc = Crc::new();
    crc.update(raw);
    let mut trailer = [0; TRAILER_BYTES];
    trailer[..4].copy_from_slice(&crc.sum().to_le_bytes());
    trailer[4..].copy_from_slice(&crc.amount().to_le_bytes());
    trailer
}

/// A count of bytes that are in one slice, so it always fits.
fn index(bytes: u64) -> usize {
    usize::try_from(bytes).expect("it counts bytes of a slice in memory")
}

fn damaged(why: impl Display) -> CodecError {
    CodecError::Damaged(format!("a gzip member is broken: {why}"))
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    fn member(raw: &[u8]) -> Vec<u8> {
        let mut member = vec![0; raw.len() + 64];
        let bytes = Compressor::new().compress(raw, &mut member).unwrap().unwrap();
        member.truncate(bytes);
        member
    }

    #[test]
    fn another_decoder_reads_a_member() {
        for raw in [Vec::new(), b"abcd".repeat(1000)] {
            let mut back = Vec::new();
            flate2::read::GzDecoder::new(&member(&raw)[..]).read_to_end(&mut back).unwrap();
            assert_eq!(back, raw);
            let mut back = vec![1; raw.len()];
            assert_eq!(Decompressor::new().decompress(&member(&raw), &mut back), Ok(()));
            assert_eq!(back, raw);
        }
    }

    #[test]
    fn what_does_not_fit_is_none_and_the_compressor_works_on() {
        let raw = b"abcd".repeat(1000);
        let fitting_bytes = member(&raw).len();
        let mut compressor = Compressor::new();
        for room_bytes in 0..fitting_bytes {
            assert_eq!(compressor.compress(&raw, &mut vec![0; room_bytes]), Ok(None));
        }
        let mut again = vec![0; raw.len()];
        assert_eq!(compressor.compress(&raw, &mut again), Ok(Some(fitting_bytes)));
        assert_eq!(again[..fitting_bytes], member(&raw));
    }

    #[test]
    fn a_stream_that_ran_out_of_room_does_not_break_the_next() {
        let mut random = fastrand::Rng::with_seed(1);
        let mut noise = || random.u8(..);
        let mut compressor = Compressor::new();
        for raw_bytes in (1000..60_000).step_by(1111) {
            let raw: Vec<u8> = (0..raw_bytes).map(|_| noise()).collect();
            let mut room = vec![0; raw_bytes * 97 / 100];
            assert_eq!(compressor.compress(&raw, &mut room), Ok(None), "{raw_bytes} bytes");
        }
    }

    #[test]
    fn anything_but_one_whole_member_is_refused() {
        let raw = b"abcd".repeat(1000);
        let whole = member(&raw);
        let mut decompressor = Decompressor::new();
        let mut refuses = |stored: &[u8], raw_bytes: usize| {
            decompressor.decompress(stored, &mut vec![0; raw_bytes]).unwrap_err().to_string()
        };
        assert!(refuses(&whole.repeat(2), 8000).contains("were decoded when it stopped"));
        assert!(refuses(&whole.repeat(2), 4000).contains("it ends after"));
        assert!(refuses(&[&whole[..], b"x"].concat(), 4000).contains("it ends after"));
        assert!(refuses(&whole[..whole.len() - 1], 4000).contains("broken"));
        assert!(refuses(&whole, 3999).contains("3999 bytes are expected"));
        assert!(refuses(&whole, 4001).contains("4001 bytes are expected"));
        let mut wrong_sum = whole.clone();
        let last = wrong_sum.len() - TRAILER_BYTES;
        wrong_sum[last] ^= 1;
        assert!(refuses(&wrong_sum, 4000).contains("checksum"));
    }
}
