//! Memory -> memory, for bulk bytes that nobody reads soon.
//!
//! An ordinary store first reads the line that it writes to and then keeps it in the cache, in the
//! place of something useful. Stores that bypass the caches do neither: a copy of a training state
//! takes about two thirds of the time, and leaves the training loop's own data where they were.
//!
//! Always holds: the destination holds the source's bytes when a copy returns, for every thread
//! that is notified of its end; lengths are equal or the copy panics.
//!
//! # Why unsafe
//!
//! Streaming stores exist only as intrinsics on raw pointers, and a tensor that another thread may
//! write to is no Rust slice.
#![expect(unsafe_code, reason = "streaming stores, and sources that are known by address only")]

use crate::format::checksum::Digest;

/// Shorter copies are made with ordinary stores: what is small may well be read soon.
const STREAMED_BYTES_MIN: usize = 32 << 10;
/// What is hashed and then copied while the first-level cache still holds it.
const TILE_BYTES: usize = 16 << 10;

/// Copies `source` to `destination`.
///
/// # Panics
///
/// Where their lengths differ.
pub(crate) fn copy(source: &[u8], destination: &mut [u8]) {
    assert_eq!(source.len(), destination.len(), "a copy has one length");
    // SAFETY: a slice is readable over its length, which is that of `destination`.
    unsafe { copy_from(source.as_ptr(), destination) }
}

/// Copies `source` to `destination` and returns the CRC-32C of the bytes, which are read from
/// memory once.
///
/// # Panics
///
/// Where their lengths differ.
pub(crate) fn copy_with_checksum(source: &[u8], destination: &mut [u8]) -> u32 {
    assert_eq!(source.len(), destination.len(), "a copy has one length");
    let mut digest = Digest::new();
    for (from, to) in source.chunks(TILE_BYTES).zip(destination.chunks_mut(TILE_BYTES)) {
        digest.update(from);
        if source.len() < STREAMED_BYTES_MIN {
            to.copy_from_slice(from);
        } else {
            // SAFETY: `from` is readable over its length, which is that of `to`.
            unsafe { stream(from.as_ptr(), to) };
        }
    }
    digest.finish()
}

/// Fills `destination` with the bytes at `source`.
///
/// # Safety
///
/// `destination.len()` bytes at `source` must stay mapped and readable during the call, and must
/// not overlap `destination`. Should another thread write to them meanwhile, the copied bytes are
/// some mixture of old and new, and nothing else.
pub unsafe fn copy_from(source: *const u8, destination: &mut [u8]) {
    if destination.len() < STREAMED_BYTES_MIN {
        // SAFETY: as this function's contract says; `destination` is exclusive.
        unsafe { source.copy_to_nonoverlapping(destination.as_mut_ptr(), destination.len()) }
    } else {
        // SAFETY: this function's contract is the same.
        unsafe { stream(source, destination) }
    }
}

/// [`copy_from`] with streaming stores.
///
/// # Safety
///
/// As for [`copy_from`].
#[cfg(all(target_arch = "x86_64", not(miri)))]
#[expect(
    clippy::cast_ptr_alignment,
    reason = "loads take any alignment; stores get an aligned one"
)]
unsafe fn stream(source: *const u8, destination: &mut [u8]) {
    use std::arch::x86_64::{__m128i, _mm_loadu_si128, _mm_sfence, _mm_stream_si128};

    // A streaming store wants an address that is a multiple of its 16 bytes; four make a line.
    let (head, blocks, tail) = {
        let head_bytes = destination.as_ptr().align_offset(16).min(destination.len());
        let (head, rest) = destination.split_at_mut(head_bytes);
        let (blocks, tail) = rest.as_chunks_mut::<64>();
        (head, blocks, tail)
    };
    let blocks_source = source.wrapping_add(head.len());
    let tail_source = blocks_source.wrapping_add(blocks.as_flattened().len());
    // SAFETY: the first `head.len()` bytes of the source, as the contract says.
    unsafe { source.copy_to_nonoverlapping(head.as_mut_ptr(), head.len()) };
    for (index, block) in blocks.iter_mut().enumerate() {
        let from = blocks_source.wrapping_add(64 * index).cast::<__m128i>();
        // SAFETY: 64 bytes of the source, four times 16, at any alignment.
        let vectors = unsafe { [0, 1, 2, 3].map(|lane| _mm_loadu_si128(from.wrapping_add(lane))) };
        let to = block.as_mut_ptr().cast::<__m128i>();
        for (lane, vector) in vectors.into_iter().enumerate() {
            // SAFETY: within the 64 bytes of `block`, whose start is a multiple of 16.
            unsafe { _mm_stream_si128(to.wrapping_add(lane), vector) };
        }
    }
    // Streaming stores are not ordered with what signals other threads that the copy is done.
    // SAFETY: part of SSE, which every x86-64 processor has.
    unsafe { _mm_sfence() };
    // SAFETY: the last `tail.len()` bytes of the source, as the contract says.
    unsafe { tail_source.copy_to_nonoverlapping(tail.as_mut_ptr(), tail.len()) };
}

/// [`copy_from`], where the processor has no streaming stores that Rust can name.
///
/// # Safety
///
/// As for [`copy_from`].
#[cfg(not(all(target_arch = "x86_64", not(miri))))]
unsafe fn stream(source: *const u8, destination: &mut [u8]) {
    // SAFETY: as the contract says; `destination` is exclusive.
    unsafe { source.copy_to_nonoverlapping(destination.as_mut_ptr(), destination.len()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::checksum::crc32c;

    /// Bytes without a short period.
    fn noise(bytes: usize) -> Vec<u8> {
        (0..bytes as u64).map(|index| (index * index).to_le_bytes()[1] ^ 0x5a).collect()
    }

    #[test]
    fn every_alignment_and_length_is_copied_and_nothing_beside_it() {
        let source = noise(STREAMED_BYTES_MIN + 256);
        for from in [0, 1, 15, 63] {
            for to in [0, 1, 8, 16, 33] {
                for bytes in
                    [0, 1, 63, 64, 4096, STREAMED_BYTES_MIN, STREAMED_BYTES_MIN + 1 + 2 * from]
                {
                    let mut room = vec![0xee; bytes + 128];
                    let part = &source[from..from + bytes];
                    copy(part, &mut room[to..to + bytes]);
                    assert!(room[to..to + bytes] == *part, "{from} {to} {bytes}");
                    let around = room[..to].iter().chain(&room[to + bytes..]);
                    assert!(around.into_iter().all(|byte| *byte == 0xee), "{from} {to} {bytes}");
                }
            }
        }
    }

    #[test]
    fn a_copy_with_checksum_is_both() {
        for bytes in [0, 5, TILE_BYTES, STREAMED_BYTES_MIN - 1, 3 * STREAMED_BYTES_MIN + 77] {
            let source = noise(bytes);
            let mut copied = vec![0; bytes];
            assert_eq!(copy_with_checksum(&source, &mut copied), crc32c(&source), "{bytes}");
            assert!(copied == source, "{bytes}");
        }
    }

    #[test]
    #[should_panic(expected = "a copy has one length")]
    fn unequal_lengths_are_refused() {
        copy(&[1, 2], &mut [0]);
    }
}
