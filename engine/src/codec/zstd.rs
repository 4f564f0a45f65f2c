//! One zstd frame <-> raw bytes.
//!
//! Always holds: a frame says its content size, carries no checksum (the chunk's parent holds
//! that) and is decoded by any zstd decoder; exactly one frame is decoded, with nothing after it,
//! to exactly the expected bytes.

use zstd_safe::zstd_sys::ZSTD_ErrorCode;
use zstd_safe::{CCtx, CParameter, DCtx, ParamSwitch};

use super::CodecError;

/// What a [`Compressor`] is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    /// Matches and entropy coding, level 1: higher levels are slower and no smaller on weights.
    Fast,
    /// Huffman coding alone: a plane of exponents has no matches worth the search.
    Huffman,
}

/// A level so low that zstd hardly looks for matches. At negative levels it leaves literals
/// uncompressed as well, unless told otherwise.
const HUFFMAN_LEVEL: i32 = -1000;

/// Compresses, reusing its tables.
pub(super) struct Compressor(CCtx<'static>);

impl Compressor {
    pub(super) fn new(mode: Mode) -> Result<Self, CodecError> {
        let mut context = CCtx::try_create().ok_or_else(no_memory)?;
        let parameters: &[CParameter] = match mode {
            Mode::Fast => &[CParameter::CompressionLevel(1)],
            Mode::Huffman => &[
                CParameter::CompressionLevel(HUFFMAN_LEVEL),
                CParameter::LiteralCompressionMode(ParamSwitch::Enable),
            ],
        };
        let common = [CParameter::ContentSizeFlag(true), CParameter::ChecksumFlag(false)];
        for parameter in parameters.iter().chain(&common) {
            context.set_parameter(*parameter).map_err(|code| refused("set a parameter", code))?;
        }
        Ok(Self(context))
    }

    /// Bytes of the frame written at the start of `frame`; `None` where it does not fit.
    pub(super) fn compress(
        &mut self,
        raw: &[u8],
        frame: &mut [u8],
    ) -> Result<Option<usize>, CodecError> {
        match self.0.compress2(frame, raw) {
            Ok(frame_bytes) => Ok(Some(frame_bytes)),
            Err(code)
                if zstd_safe::is_error_kind(code, ZSTD_ErrorCode::ZSTD_error_dstSize_tooSmall) =>
            {
                Ok(None)
            }
            Err(code) => Err(refused("compress", code)),
        }
    }
}

/// Decompresses, reusing its tables.
pub(super) struct Decompressor(DCtx<'static>);

impl Decompressor {
    pub(super) fn new() -> Result<Self, CodecError> {
        DCtx::try_create().map(Self).ok_or_else(no_memory)
    }

    /// Decodes `frame`, exactly one frame, to exactly the bytes of `raw`.
    pub(super) fn decompress(&mut self, frame: &[u8], raw: &mut [u8]) -> Result<(), CodecError> {
        let frame_bytes = zstd_safe::find_frame_compressed_size(frame)
            .map_err(|code| damaged("is broken", code))?;
        if frame_bytes != frame.len() {
            return Err(CodecError::Damaged(format!(
                "a zstd frame of {} bytes is expected, it ends after {frame_bytes}",
                frame.len()
            )));
        }
        // Writes into `raw` alone: a frame that holds more is refused by zstd itself.
        let raw_bytes =
            self.0.decompress(raw, frame).map_err(|code| damaged("cannot be decoded", code))?;
        if raw_bytes != raw.len() {
            return Err(CodecError::Damaged(format!(
                "{} bytes are expected, the zstd frame holds {raw_bytes}",
                raw.len()
            )));
        }
        Ok(())
    }
}

fn no_memory() -> CodecError {
    CodecError::Library("zstd found no memory for its tables".into())
}

fn refused(act: &str, code: usize) -> CodecError {
    CodecError::Library(format!("zstd refused to {act}: {}", zstd_safe::get_error_name(code)))
}

fn damaged(what: &str, code: usize) -> CodecError {
    CodecError::Damaged(format!("a zstd frame {what}: {}", zstd_safe::get_error_name(code)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_says_its_content_size_and_carries_no_checksum() {
        let raw = b"abcd".repeat(1000);
        let mut frame = vec![0; 4000];
        for mode in [Mode::Fast, Mode::Huffman] {
            let mut compressor = Compressor::new(mode).unwrap();
            let bytes = compressor.compress(&raw, &mut frame).unwrap().unwrap();
            assert_eq!(zstd_safe::get_frame_content_size(&frame[..bytes]).ok(), Some(Some(4000)));
            // Bit 2 of the frame header descriptor, after the four bytes of the magic number.
            assert_eq!(frame[4] & 0b100, 0);
        }
    }

    #[test]
    fn what_does_not_fit_is_none_and_the_compressor_works_on() {
        let raw = b"abcd".repeat(1000);
        let mut compressor = Compressor::new(Mode::Fast).unwrap();
        for room_bytes in 0..10 {
            assert_eq!(compressor.compress(&raw, &mut vec![0; room_bytes]), Ok(None));
        }
        assert!(compressor.compress(&raw, &mut [0; 100]).unwrap().is_some());
    }

    #[test]
    fn a_second_frame_is_refused() {
        let raw = b"abcd".repeat(1000);
        let mut frame = vec![0; 4000];
        let bytes = Compressor::new(Mode::Fast).unwrap().compress(&raw, &mut frame);
        let frame = &frame[..bytes.unwrap().unwrap()];
        let mut decompressor = Decompressor::new().unwrap();
        assert_eq!(decompressor.decompress(frame, &mut vec![0; 4000]), Ok(()));
        let error = decompressor.decompress(&frame.repeat(2), &mut vec![0; 8000]).unwrap_err();
        assert!(error.to_string().contains("it ends after"), "{error}");
        for raw_bytes in [0, 3999, 4001] {
            assert!(decompressor.decompress(frame, &mut vec![0; raw_bytes]).is_err());
        }
    }
}
