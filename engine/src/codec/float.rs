//! Byte planes with Huffman coding <-> raw bytes.
//!
//! The mantissas of weights are noise and their exponents are not, so elements are split into
//! byte planes ([`super::planes`]), block by block, and each plane of a block is stored on its own:
//! raw, as one byte where all are equal, or as a zstd frame that holds Huffman codes alone.
//!
//! ```text
//! header     u8 version | u8 width | u8 rotation | u8 log2 of block elements | u32 raw bytes
//! block 0    width records
//! ...
//! tail       the raw bytes after the last whole element, as they are
//!
//! record     u32: bits 0-3 plane, bits 4-7 kind, bits 8-31 value
//!              kind 0 raw        value = length of the plane, whose bytes follow
//!              kind 1 constant   value = the byte
//!              kind 2 frame      value = length of the zstd frame, which follows
//! ```
//!
//! All little-endian. A block has 2^17 elements, the last one fewer, so that its planes stay in the
//! cache and a plane is one block of its frame. The rotation is 1 bit, or 0 where the width is 1.
//! The records of a block come in any order: the encoder puts raw planes first, because those can
//! be split straight to where they are stored, and the decoder joins them from there.
//!
//! Always holds: each plane of each block is stored exactly once; the records tile the stored
//! bytes; both sides need scratch memory for one block only.

use std::fmt::Display;

use super::CodecError;
use super::planes::Kernels;
use super::sample::{Guess, Sampler};
use super::zstd::{Compressor, Decompressor, Mode};

const VERSION: u8 = 1;
const HEADER_BYTES: usize = 8;
const RECORD_BYTES: usize = 4;
const WIDTH_MAX: usize = 8;
/// Elements of a block, as a power of two: 128 KiB a plane.
const BLOCK_ELEMENTS_LOG2: u8 = 17;
/// Largest block that is read, so that a header cannot ask for much memory.
const BLOCK_ELEMENTS_LOG2_MAX: u8 = 20;

const KIND_RAW: u8 = 0;
const KIND_CONSTANT: u8 = 1;
const KIND_FRAME: u8 = 2;

/// Why encoding ends early.
enum Stop {
    /// The stored bytes would not be few enough.
    DoesNotFit,
    Failed(CodecError),
}

impl From<CodecError> for Stop {
    fn from(error: CodecError) -> Self {
        Self::Failed(error)
    }
}

/// Encodes chunks; owns scratch memory for the planes of a block.
pub(super) struct Encoder {
    kernels: Kernels,
    sampler: Sampler,
    compressor: Compressor,
    scratch: Vec<u8>,
    /// What the chunk at hand is expected to hold: for each block, a guess a plane.
    guesses: Vec<Guess>,
}

impl Encoder {
    pub(super) fn new() -> Result<Self, CodecError> {
        let kernels = Kernels::detect();
        Ok(Self {
            kernels,
            sampler: Sampler::new(kernels),
            compressor: Compressor::new(Mode::Huffman)?,
            scratch: Vec::new(),
            guesses: Vec::new(),
        })
    }

    /// Bytes written at the start of `stored`; `None` where they do not fit.
    pub(super) fn encode(
        &mut self,
        width: usize,
        raw: &[u8],
        stored: &mut [u8],
    ) -> Result<Option<usize>, CodecError> {
        let mut cursor = Cursor { room: stored, used_bytes: 0 };
        match self.encode_all(width, raw, &mut cursor) {
            Ok(()) => Ok(Some(cursor.used_bytes)),
            Err(Stop::DoesNotFit) => Ok(None),
            Err(Stop::Failed(error)) => Err(error),
        }
    }

    fn encode_all(
        &mut self,
        width: usize,
        raw: &[u8],
        cursor: &mut Cursor<'_>,
    ) -> Result<(), Stop> {
        let (elements, tail) = raw.split_at(raw.len() - raw.len() % width);
        let block_bytes = width << BLOCK_ELEMENTS_LOG2;
        self.guess(width, elements, block_bytes);
        if self.noise_bytes(width, elements, block_bytes) > cursor.room.len() {
            return Err(Stop::DoesNotFit);
        }

        cursor.take(HEADER_BYTES)?.copy_from_slice(&header(width, raw.len())?);
        for (index, block) in elements.chunks(block_bytes).enumerate() {
            let mut guesses = [Guess::Noise; WIDTH_MAX];
            guesses[..width].copy_from_slice(&self.guesses[index * width..][..width]);
            self.encode_block(block, &guesses[..width], cursor)?;
        }
        cursor.take(tail.len())?.copy_from_slice(tail);
        Ok(())
    }

    fn guess(&mut self, width: usize, elements: &[u8], block_bytes: usize) {
        self.guesses.clear();
        self.guesses.resize(elements.len().div_ceil(block_bytes) * width, Guess::Noise);
        let guesses = self.guesses.chunks_exact_mut(width);
        for (block, guesses) in elements.chunks(block_bytes).zip(guesses) {
            self.sampler.guess(block, guesses);
        }
    }

    /// Bytes of the planes that will be stored raw, whatever becomes of the others.
    fn noise_bytes(&self, width: usize, elements: &[u8], block_bytes: usize) -> usize {
        let guesses = self.guesses.chunks_exact(width);
        let noise_bytes = |(block, guesses): (&[u8], &[Guess])| {
            let planes = guesses.iter().filter(|guess| **guess == Guess::Noise).count();
            planes * (block.len() / width)
        };
        elements.chunks(block_bytes).zip(guesses).map(noise_bytes).sum()
    }

    fn encode_block(
        &mut self,
        block: &[u8],
        guesses: &[Guess],
        cursor: &mut Cursor<'_>,
    ) -> Result<(), Stop> {
        let width = guesses.len();
        if width == 1 {
            return pack(&mut self.compressor, cursor, 0, guesses[0], block);
        }
        let count = block.len() / width;
        self.scratch.resize(self.scratch.len().max(block.len()), 0);
        let mut scratch = self.scratch.chunks_exact_mut(count);
        let mut planes: [&mut [u8]; WIDTH_MAX] = Default::default();
        for (index, guess) in guesses.iter().enumerate() {
            planes[index] = match guess {
                Guess::Noise => {
                    cursor.record(index, KIND_RAW, count)?;
                    cursor.take(count)?
                }
                Guess::Constant | Guess::Compressible => {
                    scratch.next().expect("scratch holds a plane for each of the block's bytes")
                }
            };
        }
        self.kernels.split(block, &mut planes[..width]);
        for (index, guess) in guesses.iter().enumerate() {
            if *guess != Guess::Noise {
                pack(&mut self.compressor, cursor, index, *guess, planes[index])?;
            }
        }
        Ok(())
    }
}

/// Stores a plane: as it was guessed, or else as the next larger kind.
fn pack(
    compressor: &mut Compressor,
    cursor: &mut Cursor<'_>,
    index: usize,
    guess: Guess,
    plane: &[u8],
) -> Result<(), Stop> {
    // Equal to itself shifted by one: all bytes are equal, found at the speed of memory.
    if guess == Guess::Constant && plane[1..] == plane[..plane.len() - 1] {
        return cursor.record(index, KIND_CONSTANT, usize::from(plane[0]));
    }
    if guess != Guess::Noise && cursor.frame(compressor, index, plane)? {
        return Ok(());
    }
    cursor.record(index, KIND_RAW, plane.len())?;
    cursor.take(plane.len())?.copy_from_slice(plane);
    Ok(())
}

/// The stored bytes not yet written.
struct Cursor<'a> {
    room: &'a mut [u8],
    used_bytes: usize,
}

impl<'a> Cursor<'a> {
    /// The next bytes, for the caller to fill.
    fn take(&mut self, bytes: usize) -> Result<&'a mut [u8], Stop> {
        let taken = self.room.split_off_mut(..bytes).ok_or(Stop::DoesNotFit)?;
        self.used_bytes += bytes;
        Ok(taken)
    }

    fn record(&mut self, plane: usize, kind: u8, value: usize) -> Result<(), Stop> {
        self.take(RECORD_BYTES)?.copy_from_slice(&record(plane, kind, value));
        Ok(())
    }

    /// Writes the record and frame of `plane`, or nothing where that is not smaller than raw.
    fn frame(
        &mut self,
        compressor: &mut Compressor,
        index: usize,
        plane: &[u8],
    ) -> Result<bool, Stop> {
        let Some((_, room)) = self.room.split_at_mut_checked(RECORD_BYTES) else {
            return Err(Stop::DoesNotFit);
        };
        let room_bytes = room.len().min(plane.len() - 1);
        let Some(frame_bytes) = compressor.compress(plane, &mut room[..room_bytes])? else {
            return Ok(false);
        };
        self.record(index, KIND_FRAME, frame_bytes)?;
        self.take(frame_bytes)?;
        Ok(true)
    }
}

fn header(width: usize, raw_bytes: usize) -> Result<[u8; HEADER_BYTES], CodecError> {
    let raw_bytes = u32::try_from(raw_bytes).map_err(|_| {
        CodecError::Library(format!("a chunk has at most {} bytes, not {raw_bytes}", u32::MAX))
    })?;
    let width = u8::try_from(width).expect("an element has at most 8 bytes");
    let mut header = [VERSION, width, rotation_bits(width), BLOCK_ELEMENTS_LOG2, 0, 0, 0, 0];
    header[4..].copy_from_slice(&raw_bytes.to_le_bytes());
    Ok(header)
}

fn rotation_bits(width: u8) -> u8 {
    u8::from(width > 1)
}

fn record(plane: usize, kind: u8, value: usize) -> [u8; RECORD_BYTES] {
    let plane = u8::try_from(plane).expect("an element has at most 8 planes");
    let value = u32::try_from(value).expect("a plane of a block is below 2^24 bytes");
    let [low, middle, high, zero] = value.to_le_bytes();
    assert_eq!(zero, 0, "a plane of a block is below 2^24 bytes");
    [plane | (kind << 4), low, middle, high]
}

/// Decodes chunks; owns scratch memory for the planes of a block.
pub(super) struct Decoder {
    kernels: Kernels,
    decompressor: Decompressor,
    scratch: Vec<u8>,
}

/// What a record says a plane is.
#[derive(Clone, Copy)]
enum Plane<'a> {
    Raw(&'a [u8]),
    Constant(u8),
    Frame(&'a [u8]),
}

impl Decoder {
    pub(super) fn new() -> Result<Self, CodecError> {
        Ok(Self {
            kernels: Kernels::detect(),
            decompressor: Decompressor::new()?,
            scratch: Vec::new(),
        })
    }

    /// Decodes `stored`, all of it, to exactly the bytes of `raw`.
    pub(super) fn decode(&mut self, mut stored: &[u8], raw: &mut [u8]) -> Result<(), CodecError> {
        let (width, block_elements) = parse_header(take_array(&mut stored)?, raw.len())?;
        let (elements, tail) = raw.split_at_mut(raw.len() - raw.len() % width);
        for block in elements.chunks_mut(width * block_elements) {
            let planes = parse_block(&mut stored, width, block.len() / width)?;
            self.decode_block(&planes[..width], block)?;
        }
        tail.copy_from_slice(take(&mut stored, tail.len())?);
        if !stored.is_empty() {
            return Err(damaged(format!("{} bytes follow the last block", stored.len())));
        }
        Ok(())
    }

    fn decode_block(&mut self, planes: &[Plane<'_>], block: &mut [u8]) -> Result<(), CodecError> {
        if let [plane] = planes {
            return match plane {
                Plane::Raw(bytes) => {
                    block.copy_from_slice(bytes);
                    Ok(())
                }
                other => unpack(&mut self.decompressor, *other, block),
            };
        }
        self.scratch.resize(self.scratch.len().max(block.len()), 0);
        let mut scratch = self.scratch.chunks_exact_mut(block.len() / planes.len());
        let mut views: [&[u8]; WIDTH_MAX] = Default::default();
        for (view, plane) in views.iter_mut().zip(planes) {
            *view = match plane {
                Plane::Raw(bytes) => bytes,
                other => {
                    let room = scratch.next().expect("scratch holds every plane of the block");
                    unpack(&mut self.decompressor, *other, room)?;
                    room
                }
            };
        }
        self.kernels.join(&views[..planes.len()], block);
        Ok(())
    }
}

/// Writes the bytes of `plane` to `room`, which has their length.
fn unpack(
    decompressor: &mut Decompressor,
    plane: Plane<'_>,
    room: &mut [u8],
) -> Result<(), CodecError> {
    match plane {
        Plane::Raw(bytes) => room.copy_from_slice(bytes),
        Plane::Constant(byte) => room.fill(byte),
        Plane::Frame(frame) => decompressor.decompress(frame, room)?,
    }
    Ok(())
}

/// Width of an element and elements of a block.
fn parse_header(
    header: [u8; HEADER_BYTES],
    raw_bytes_expected: usize,
) -> Result<(usize, usize), CodecError> {
    let [version, width, rotation, log2, raw_bytes @ ..] = header;
    let raw_bytes = u32::from_le_bytes(raw_bytes);
    if version != VERSION {
        return Err(damaged(format!("version {VERSION} is expected, its header says {version}")));
    }
    if !matches!(width, 1 | 2 | 4 | 8) || rotation != rotation_bits(width) {
        return Err(damaged(format!(
            "elements of 1, 2, 4 or 8 bytes are expected, its header says {width}, \
             rotated by {rotation} bits"
        )));
    }
    if log2 > BLOCK_ELEMENTS_LOG2_MAX {
        return Err(damaged(format!(
            "blocks of at most 2^{BLOCK_ELEMENTS_LOG2_MAX} elements are expected, \
             its header says 2^{log2}"
        )));
    }
    if usize::try_from(raw_bytes) != Ok(raw_bytes_expected) {
        return Err(damaged(format!(
            "{raw_bytes_expected} raw bytes are expected, its header says {raw_bytes}"
        )));
    }
    Ok((usize::from(width), 1 << log2))
}

/// What each of `width` planes, of `count` bytes, is; takes their records from `stored`.
fn parse_block<'a>(
    stored: &mut &'a [u8],
    width: usize,
    count: usize,
) -> Result<[Plane<'a>; WIDTH_MAX], CodecError> {
    let mut planes = [None; WIDTH_MAX];
    for _ in 0..width {
        let (index, plane) = parse_record(stored, count)?;
        match planes[..width].get_mut(index) {
            Some(vacant @ None) => *vacant = Some(plane),
            Some(Some(_)) => return Err(damaged(format!("plane {index} occurs twice"))),
            None => return Err(damaged(format!("plane {index} of {width} does not exist"))),
        }
    }
    Ok(planes.map(|plane| plane.unwrap_or(Plane::Constant(0))))
}

fn parse_record<'a>(stored: &mut &'a [u8], count: usize) -> Result<(usize, Plane<'a>), CodecError> {
    let [tag, low, middle, high] = take_array::<RECORD_BYTES>(stored)?;
    let length = [low, middle, high].map(usize::from);
    let length = length[0] | (length[1] << 8) | (length[2] << 16);
    let plane = match tag >> 4 {
        KIND_RAW if length == count => Plane::Raw(take(stored, length)?),
        KIND_RAW => {
            return Err(damaged(format!("a plane of {count} bytes is expected, not {length}")));
        }
        KIND_CONSTANT if [middle, high] == [0, 0] => Plane::Constant(low),
        KIND_FRAME => Plane::Frame(take(stored, length)?),
        kind => return Err(damaged(format!("a plane of kind {kind} is not known"))),
    };
    Ok((usize::from(tag & 0xf), plane))
}

/// The next `bytes` of `stored`.
fn take<'a>(stored: &mut &'a [u8], bytes: usize) -> Result<&'a [u8], CodecError> {
    let left_bytes = stored.len();
    stored.split_off(..bytes).ok_or_else(|| cut_short(bytes, left_bytes))
}

/// The next `BYTES` bytes of `stored`.
fn take_array<const BYTES: usize>(stored: &mut &[u8]) -> Result<[u8; BYTES], CodecError> {
    let (array, rest) = stored.split_first_chunk().ok_or_else(|| cut_short(BYTES, stored.len()))?;
    *stored = rest;
    Ok(*array)
}

fn cut_short(bytes: usize, left_bytes: usize) -> CodecError {
    damaged(format!("{bytes} more bytes are expected, {left_bytes} are left"))
}

fn damaged(why: impl Display) -> CodecError {
    CodecError::Damaged(format!("a float chunk is broken: {why}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// bfloat16s with four exponents; sign and mantissa are noise.
    fn elements(count: usize) -> Vec<u8> {
        let mut random = fastrand::Rng::with_seed(7);
        let mut noise = || random.u8(..);
        (0..count).flat_map(|_| [noise(), 0x3c | (noise() & 0x81)]).collect()
    }

    fn encode(width: usize, raw: &[u8]) -> Vec<u8> {
        let mut stored = vec![0; raw.len()];
        let bytes = Encoder::new().unwrap().encode(width, raw, &mut stored).unwrap().unwrap();
        stored.truncate(bytes);
        stored
    }

    fn refusal(stored: &[u8], raw_bytes: usize) -> String {
        let mut raw = vec![0; raw_bytes];
        Decoder::new().unwrap().decode(stored, &mut raw).unwrap_err().to_string()
    }

    #[test]
    fn a_frame_is_read_by_a_plain_zstd_decoder() {
        let raw = elements(1 << 17);
        let stored = encode(2, &raw);
        let mut rest = &stored[HEADER_BYTES..];
        let planes = parse_block(&mut rest, 2, 1 << 17).unwrap();
        assert!(rest.is_empty());

        let (Plane::Raw(mantissas), Plane::Frame(frame)) = (planes[0], planes[1]) else {
            panic!("mantissas are noise and exponents are not");
        };
        let mut exponents = vec![0; 1 << 17];
        assert_eq!(zstd_safe::decompress(&mut exponents[..], frame), Ok(1 << 17));
        assert!(frame.len() < exponents.len() / 3);
        for (index, element) in raw.as_chunks::<2>().0.iter().enumerate() {
            let rotated = u16::from_le_bytes(*element).rotate_left(1).to_le_bytes();
            assert_eq!([mantissas[index], exponents[index]], rotated);
        }
    }

    #[test]
    fn a_constant_chunk_needs_a_record_for_each_plane_of_each_block() {
        let raw = 1.0_f32.to_le_bytes().repeat(3 << 16);
        let stored = encode(4, &raw);
        // 1.0 is 3f800000, rotated 7f000000; the bytes are the format and must not change.
        let block = [[0x10, 0, 0, 0], [0x11, 0, 0, 0], [0x12, 0, 0, 0], [0x13, 0x7f, 0, 0]];
        let expected = [[1, 4, 1, 17], [0, 0, 0x0c, 0]].into_iter().chain(block).chain(block);
        assert_eq!(stored, expected.flatten().collect::<Vec<u8>>());
        let mut back = vec![1; raw.len()];
        assert_eq!(Decoder::new().unwrap().decode(&stored, &mut back), Ok(()));
        assert!(back == raw);
    }

    #[test]
    fn a_plane_that_only_looks_constant_or_compressible_comes_back() {
        // The sample of 2^17 bytes cannot see a single byte in the middle of nothing.
        let mut spike = vec![0; 1 << 17];
        spike[3000] = 1;
        // The sampled runs hold zeros, everything between them noise.
        let mut mostly_noise = elements(1 << 16);
        for run in 0..64 {
            mostly_noise[run * ((1 << 17) - 64) / 63..][..64].fill(0);
        }
        for raw in [spike, mostly_noise] {
            let mut stored = vec![0; raw.len() + 64];
            let bytes = Encoder::new().unwrap().encode(1, &raw, &mut stored).unwrap().unwrap();
            let mut back = vec![1; raw.len()];
            assert_eq!(Decoder::new().unwrap().decode(&stored[..bytes], &mut back), Ok(()));
            assert!(back == raw);
        }
    }

    #[test]
    fn noise_is_given_up_before_anything_is_written() {
        let raw: Vec<u8> = elements(1 << 18).into_iter().step_by(2).collect();
        let mut stored = vec![0xaa; raw.len() - 1];
        assert_eq!(Encoder::new().unwrap().encode(1, &raw, &mut stored), Ok(None));
        assert!(stored.iter().all(|byte| *byte == 0xaa));
    }

    #[test]
    fn every_room_below_what_is_needed_is_refused_without_harm() {
        let raw = elements(300);
        let stored = encode(2, &raw);
        let mut encoder = Encoder::new().unwrap();
        for room_bytes in 0..stored.len() {
            assert_eq!(encoder.encode(2, &raw, &mut vec![0; room_bytes]), Ok(None));
        }
        let mut again = vec![0; raw.len()];
        assert_eq!(encoder.encode(2, &raw, &mut again), Ok(Some(stored.len())));
        assert_eq!(again[..stored.len()], stored);
    }

    #[test]
    fn a_broken_header_or_record_is_named() {
        let raw = elements(1000);
        let stored = encode(2, &raw);
        let with = |at: usize, byte: u8| {
            let mut broken = stored.clone();
            broken[at] = byte;
            refusal(&broken, raw.len())
        };
        assert!(with(0, 2).contains("version 1 is expected, its header says 2"));
        assert!(with(1, 3).contains("its header says 3"));
        assert!(with(2, 0).contains("rotated by 0 bits"));
        assert!(with(3, 21).contains("its header says 2^21"));
        assert!(with(4, 1).contains("2000 raw bytes are expected"));
        assert!(with(HEADER_BYTES, 0x02).contains("plane 2 of 2 does not exist"));
        assert!(with(HEADER_BYTES, 0x31).contains("kind 3 is not known"));
        assert!(with(HEADER_BYTES + 1, 1).contains("a plane of 1000 bytes is expected"));
        assert!(refusal(&stored, 1998).contains("1998 raw bytes are expected"));
        assert!(refusal(&stored[..7], 2000).contains("8 more bytes are expected, 7 are left"));
        assert!(refusal(&[&stored[..], b"x"].concat(), 2000).contains("1 bytes follow"));

        let twice = [&header(2, 4).unwrap()[..], &[0x10, 0, 0, 0].repeat(2)].concat();
        assert!(refusal(&twice, 4).contains("plane 0 occurs twice"));
        let wide = [&header(1, 4).unwrap()[..], &[0x10, 1, 1, 0]].concat();
        assert!(refusal(&wide, 4).contains("kind 1 is not known"));
    }
}
