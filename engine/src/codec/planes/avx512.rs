//! Vectors of four lanes: servers since about 2017. Bytes and 16-bit words need the extension BW.
#![cfg_attr(
    not(test), // Clippy does not look for it in tests.
    expect(clippy::wildcard_imports, reason = "twenty intrinsics, each with a prefix of its own")
)]

use std::arch::x86_64::*;

use super::lanes::{LANE_BYTES, grouping, ungrouping};
use super::{load, store};

type Register = __m512i;
const LANES: usize = 4;

lane_kernels!("avx512f,avx512bw");

#[inline]
#[target_feature(enable = "avx512f")]
fn zero() -> Register {
    _mm512_setzero_si512()
}

#[inline]
#[target_feature(enable = "avx512f")]
fn broadcast(bytes: &[u8; LANE_BYTES]) -> Register {
    _mm512_broadcast_i32x4(load(bytes))
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load_lanes(lanes: &[[u8; LANE_BYTES]], first: usize, stride: usize) -> Register {
    let vector = _mm512_castsi128_si512(load(&lanes[first]));
    let vector = _mm512_inserti32x4::<1>(vector, load(&lanes[first + stride]));
    let vector = _mm512_inserti32x4::<2>(vector, load(&lanes[first + 2 * stride]));
    _mm512_inserti32x4::<3>(vector, load(&lanes[first + 3 * stride]))
}

#[inline]
#[target_feature(enable = "avx512f")]
fn store_lanes(lanes: &mut [[u8; LANE_BYTES]], first: usize, stride: usize, vector: Register) {
    store(&mut lanes[first], _mm512_castsi512_si128(vector));
    store(&mut lanes[first + stride], _mm512_extracti32x4_epi32::<1>(vector));
    store(&mut lanes[first + 2 * stride], _mm512_extracti32x4_epi32::<2>(vector));
    store(&mut lanes[first + 3 * stride], _mm512_extracti32x4_epi32::<3>(vector));
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn rotate_left<const WIDTH: usize>(vector: Register) -> Register {
    match WIDTH {
        2 => _mm512_or_si512(_mm512_slli_epi16::<1>(vector), _mm512_srli_epi16::<15>(vector)),
        4 => _mm512_rol_epi32::<1>(vector),
        _ => _mm512_rol_epi64::<1>(vector),
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn rotate_right<const WIDTH: usize>(vector: Register) -> Register {
    match WIDTH {
        2 => _mm512_or_si512(_mm512_srli_epi16::<1>(vector), _mm512_slli_epi16::<15>(vector)),
        4 => _mm512_ror_epi32::<1>(vector),
        _ => _mm512_ror_epi64::<1>(vector),
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn shuffle(vector: Register, order: Register) -> Register {
    _mm512_shuffle_epi8(vector, order)
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn zip16(a: Register, b: Register) -> [Register; 2] {
    [_mm512_unpacklo_epi16(a, b), _mm512_unpackhi_epi16(a, b)]
}

#[inline]
#[target_feature(enable = "avx512f")]
fn zip32(a: Register, b: Register) -> [Register; 2] {
    [_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b)]
}

#[inline]
#[target_feature(enable = "avx512f")]
fn zip64(a: Register, b: Register) -> [Register; 2] {
    [_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b)]
}
