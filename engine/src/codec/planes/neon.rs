//! Vectors of one lane: every 64-bit Arm processor.
#![expect(clippy::wildcard_imports, reason = "twenty intrinsics, each with a prefix of its own")]

use std::arch::aarch64::*;

use super::lanes::{LANE_BYTES, grouping, ungrouping};
use super::{load, store};

type Register = uint8x16_t;
const LANES: usize = 1;

lane_kernels!("neon");

#[inline]
#[target_feature(enable = "neon")]
fn zero() -> Register {
    vdupq_n_u8(0)
}

#[inline]
#[target_feature(enable = "neon")]
fn broadcast(bytes: &[u8; LANE_BYTES]) -> Register {
    load(bytes)
}

#[inline]
#[target_feature(enable = "neon")]
fn load_lanes(lanes: &[[u8; LANE_BYTES]], first: usize, _stride: usize) -> Register {
    load(&lanes[first])
}

#[inline]
#[target_feature(enable = "neon")]
fn store_lanes(lanes: &mut [[u8; LANE_BYTES]], first: usize, _stride: usize, vector: Register) {
    store(&mut lanes[first], vector);
}

#[inline]
#[target_feature(enable = "neon")]
fn rotate_left<const WIDTH: usize>(vector: Register) -> Register {
    match WIDTH {
        2 => {
            let elements = vreinterpretq_u16_u8(vector);
            vreinterpretq_u8_u16(vsriq_n_u16::<15>(vshlq_n_u16::<1>(elements), elements))
        }
        4 => {
            let elements = vreinterpretq_u32_u8(vector);
            vreinterpretq_u8_u32(vsriq_n_u32::<31>(vshlq_n_u32::<1>(elements), elements))
        }
        _ => {
            let elements = vreinterpretq_u64_u8(vector);
            vreinterpretq_u8_u64(vsriq_n_u64::<63>(vshlq_n_u64::<1>(elements), elements))
        }
    }
}

#[inline]
#[target_feature(enable = "neon")]
fn rotate_right<const WIDTH: usize>(vector: Register) -> Register {
    match WIDTH {
        2 => {
            let elements = vreinterpretq_u16_u8(vector);
            vreinterpretq_u8_u16(vsliq_n_u16::<15>(vshrq_n_u16::<1>(elements), elements))
        }
        4 => {
            let elements = vreinterpretq_u32_u8(vector);
            vreinterpretq_u8_u32(vsliq_n_u32::<31>(vshrq_n_u32::<1>(elements), elements))
        }
        _ => {
            let elements = vreinterpretq_u64_u8(vector);
            vreinterpretq_u8_u64(vsliq_n_u64::<63>(vshrq_n_u64::<1>(elements), elements))
        }
    }
}

#[inline]
#[target_feature(enable = "neon")]
fn shuffle(vector: Register, order: Register) -> Register {
    vqtbl1q_u8(vector, order)
}

#[inline]
#[target_feature(enable = "neon")]
fn zip16(a: Register, b: Register) -> [Register; 2] {
    let (a, b) = (vreinterpretq_u16_u8(a), vreinterpretq_u16_u8(b));
    [vreinterpretq_u8_u16(vzip1q_u16(a, b)), vreinterpretq_u8_u16(vzip2q_u16(a, b))]
}

#[inline]
#[target_feature(enable = "neon")]
fn zip32(a: Register, b: Register) -> [Register; 2] {
    let (a, b) = (vreinterpretq_u32_u8(a), vreinterpretq_u32_u8(b));
    [vreinterpretq_u8_u32(vzip1q_u32(a, b)), vreinterpretq_u8_u32(vzip2q_u32(a, b))]
}

#[inline]
#[target_feature(enable = "neon")]
fn zip64(a: Register, b: Register) -> [Register; 2] {
    let (a, b) = (vreinterpretq_u64_u8(a), vreinterpretq_u64_u8(b));
    [vreinterpretq_u8_u64(vzip1q_u64(a, b)), vreinterpretq_u8_u64(vzip2q_u64(a, b))]
}
