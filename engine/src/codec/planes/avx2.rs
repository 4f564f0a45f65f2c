//! Vectors of two lanes: processors since about 2013.
#![cfg_attr(
    not(test), // Clippy does not look for it in tests.
    expect(clippy::wildcard_imports, reason = "twenty intrinsics, each with a prefix of its own")
)]

use std::arch::x86_64::*;

use super::lanes::{LANE_BYTES, grouping, ungrouping};
use super::{load, store};

type Register = __m256i;
const LANES: usize = 2;

lane_kernels!("avx2");

#[inline]
#[target_feature(enable = "avx2")]
fn zero() -> Register {
    _mm256_setzero_si256()
}

#[inline]
#[target_feature(enable = "avx2")]
fn broadcast(bytes: &[u8; LANE_BYTES]) -> Register {
    _mm256_broadcastsi128_si256(load(bytes))
}

#[inline]
#[target_feature(enable = "avx2")]
fn load_lanes(lanes: &[[u8; LANE_BYTES]], first: usize, stride: usize) -> Register {
    _mm256_set_m128i(load(&lanes[first + stride]), load(&lanes[first]))
}

#[inline]
#[target_feature(enable = "avx2")]
fn store_lanes(lanes: &mut [[u8; LANE_BYTES]], first: usize, stride: usize, vector: Register) {
    store(&mut lanes[first], _mm256_castsi256_si128(vector));
    store(&mut lanes[first + stride], _mm256_extracti128_si256::<1>(vector));
}

#[inline]
#[target_feature(enable = "avx2")]
fn rotate_left<const WIDTH: usize>(vector: Register) -> Register {
    match WIDTH {
        2 => _mm256_or_si256(_mm256_slli_epi16::<1>(vector), _mm256_srli_epi16::<15>(vector)),
        4 => _mm256_or_si256(_mm256_slli_epi32::<1>(vector), _mm256_srli_epi32::<31>(vector)),
        _ => _mm256_or_si256(_mm256_slli_epi64::<1>(vector), _mm256_srli_epi64::<63>(vector)),
    }
}

#[inline]
#[target_feature(enable = "avx2")]
fn rotate_right<const WIDTH: usize>(vector: Register) -> Register {
    match WIDTH {
        2 => _mm256_or_si256(_mm256_srli_epi16::<1>(vector), _mm256_slli_epi16::<15>(vector)),
        4 => _mm256_or_si256(_mm256_srli_epi32::<1>(vector), _mm256_slli_epi32::<31>(vector)),
        _ => _mm256_or_si256(_mm256_srli_epi64::<1>(vector), _mm256_slli_epi64::<63>(vector)),
    }
}

#[inline]
#[target_feature(enable = "avx2")]
fn shuffle(vector: Register, order: Register) -> Register {
    _mm256_shuffle_epi8(vector, order)
}

#[inline]
#[target_feature(enable = "avx2")]
fn zip16(a: Register, b: Register) -> [Register; 2] {
    [_mm256_unpacklo_epi16(a, b), _mm256_unpackhi_epi16(a, b)]
}

#[inline]
#[target_feature(enable = "avx2")]
fn zip32(a: Register, b: Register) -> [Register; 2] {
    [_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b)]
}

#[inline]
#[target_feature(enable = "avx2")]
fn zip64(a: Register, b: Register) -> [Register; 2] {
    [_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b)]
}
