//! Elements <-> byte planes.
//!
//! Every element is rotated left by one bit and its bytes are dealt out, lowest first, one to each
//! plane. The rotation puts the sign beside the mantissa, so that the top plane is the exponent
//! alone (all of it, or for f16 and f64 its upper bits), the only part of a weight that compresses:
//!
//! ```text
//! f32       s eeeeeeee mmmmmmm mmmmmmmm mmmmmmmm
//! rotated     eeeeeeee mmmmmmmm mmmmmmmm mmmmmmms
//! planes      3        2        1        0
//! ```
//!
//! Always holds: joining what was split gives the same bytes, on any processor, whichever
//! processor split them.
//!
//! # Why unsafe
//!
//! A compiler turns the scalar loops into code several times slower than memory, which would make
//! the split, not the device, the speed of a save. Safe code can neither call a function compiled
//! for a feature that only some processors have nor load a vector; nothing else here is unsafe.
#![expect(
    unsafe_code,
    reason = "vector loads, stores, and calls that need a processor feature"
)]

/// One way to split and join, which this processor can run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kernels(Isa);

/// A value exists only where the processor has the features: [`Kernels::available`] alone makes
/// them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Isa {
    Scalar,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "aarch64")]
    Neon,
}

impl Kernels {
    /// The fastest ones.
    pub fn detect() -> Self {
        *Self::available()
            .last()
            .expect("the scalar kernels run on every processor")
    }

    /// All that this processor can run, slowest first.
    pub fn available() -> Vec<Self> {
        let mut available = vec![Self(Isa::Scalar)];
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx2") {
                available.push(Self(Isa::Avx2));
            }
            if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw") {
                available.push(Self(Isa::Avx512));
            }
        }
        #[cfg(target_arch = "aarch64")]
        if std::arch::is_aarch64_feature_detected!("neon") {
            available.push(Self(Isa::Neon));
        }
        available
    }

    /// The instruction set.
    pub fn name(self) -> &'static str {
        match self.0 {
            Isa::Scalar => "scalar",
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => "avx2",
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => "avx512bw",
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => "neon",
        }
    }

    /// Deals `elements` out to `planes`, lowest byte first.
    ///
    /// # Panics
    ///
    /// Where there are not 2, 4 or 8 planes, of equal lengths that add up to that of `elements`.
    pub fn split(self, elements: &[u8], planes: &mut [&mut [u8]]) {
        match planes {
            [_, _] => self.split_to::<2>(elements, sized_mut(planes)),
            [_, _, _, _] => self.split_to::<4>(elements, sized_mut(planes)),
            [_, _, _, _, _, _, _, _] => self.split_to::<8>(elements, sized_mut(planes)),
            _ => panic!("an element has 2, 4 or 8 planes, not {}", planes.len()),
        }
    }

    /// Puts `elements` together again from `planes`.
    ///
    /// # Panics
    ///
    /// As [`Kernels::split`] does.
    pub fn join(self, planes: &[&[u8]], elements: &mut [u8]) {
        match planes {
            [_, _] => self.join_from::<2>(sized(planes), elements),
            [_, _, _, _] => self.join_from::<4>(sized(planes), elements),
            [_, _, _, _, _, _, _, _] => self.join_from::<8>(sized(planes), elements),
            _ => panic!("an element has 2, 4 or 8 planes, not {}", planes.len()),
        }
    }

    fn split_to<const WIDTH: usize>(self, elements: &[u8], planes: &mut [&mut [u8]; WIDTH]) {
        for plane in planes.iter() {
            assert_eq!(
                plane.len() * WIDTH,
                elements.len(),
                "planes hold every element's bytes"
            );
        }
        let done = match self.0 {
            Isa::Scalar => 0,
            // SAFETY: an `Isa` exists only where the processor has its features.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => unsafe { avx2::split(elements, planes) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => unsafe { avx512::split(elements, planes) },
            // SAFETY: as above.
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => unsafe { neon::split(elements, planes) },
        };
        scalar::split(elements, planes, done);
    }

    fn join_from<const WIDTH: usize>(self, planes: &[&[u8]; WIDTH], elements: &mut [u8]) {
        for plane in planes {
            assert_eq!(
                plane.len() * WIDTH,
                elements.len(),
                "planes hold every element's bytes"
            );
        }
        let done = match self.0 {
            Isa::Scalar => 0,
            // SAFETY: an `Isa` exists only where the processor has its features.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => unsafe { avx2::join(planes, elements) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => unsafe { avx512::join(planes, elements) },
            // SAFETY: as above.
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => unsafe { neon::join(planes, elements) },
        };
        scalar::join(planes, elements, done);
    }
}

fn sized<'a, 'b, const WIDTH: usize>(planes: &'a [&'b [u8]]) -> &'a [&'b [u8]; WIDTH] {
    planes
        .try_into()
        .expect("the caller matched the number of planes")
}

fn sized_mut<'a, 'b, const WIDTH: usize>(
    planes: &'a mut [&'b mut [u8]],
) -> &'a mut [&'b mut [u8]; WIDTH] {
    planes
        .try_into()
        .expect("the caller matched the number of planes")
}

/// The definition, one byte at a time; also what is left over by the others.
mod scalar {
    /// Splits from element `first` on.
    pub(super) fn split<const WIDTH: usize>(
        elements: &[u8],
        planes: &mut [&mut [u8]; WIDTH],
        first: usize,
    ) {
        let (elements, _) = elements[first * WIDTH..].as_chunks::<WIDTH>();
        for (index, plane) in planes.iter_mut().enumerate() {
            let below = (index + WIDTH - 1) % WIDTH;
            for (byte, element) in plane[first..].iter_mut().zip(elements) {
                *byte = (element[index] << 1) | (element[below] >> 7);
            }
        }
    }

    /// Joins from element `first` on.
    pub(super) fn join<const WIDTH: usize>(
        planes: &[&[u8]; WIDTH],
        elements: &mut [u8],
        first: usize,
    ) {
        let (elements, _) = elements[first * WIDTH..].as_chunks_mut::<WIDTH>();
        for index in 0..WIDTH {
            let (plane, above) = (
                &planes[index][first..],
                &planes[(index + 1) % WIDTH][first..],
            );
            for ((element, byte), above) in elements.iter_mut().zip(plane).zip(above) {
                element[index] = (byte >> 1) | (above << 7);
            }
        }
    }
}

/// Bytes of a lane, the unit within which vector instructions move bytes.
const LANE_BYTES: usize = 16;

/// For each byte of a lane, which one moves there: bytes of elements become groups, one a plane.
const fn grouping(width: usize) -> [u8; LANE_BYTES] {
    let mut order = [0; LANE_BYTES];
    let mut from = 0_u8;
    while (from as usize) < LANE_BYTES {
        let (element, byte) = (from as usize / width, from as usize % width);
        order[byte * (LANE_BYTES / width) + element] = from;
        from += 1;
    }
    order
}

/// The inverse of [`grouping`].
const fn ungrouping(width: usize) -> [u8; LANE_BYTES] {
    // Rows and columns change places: the groups are elements now.
    grouping(LANE_BYTES / width)
}

/// `split` and `join` for vectors of `LANES` lanes, from a module's primitives.
///
/// `WIDTH` vectors are worked on at a time. Vector i takes the lanes i, i + WIDTH, i + 2 WIDTH, ...
/// of memory, so that no byte ever crosses a lane:
///
/// ```text
/// rotate, group     a vector's lane holds WIDTH groups, group k for plane k
/// transpose         group k of vector i <-> group i of vector k
/// ```
///
/// after which vector k is plane k, its bytes in order. Joining is the same backwards: the
/// transposition is its own inverse.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
macro_rules! lane_kernels {
    ($features:literal) => {
        const VECTOR_BYTES: usize = LANES * LANE_BYTES;

        /// Splits as many elements as fill whole vectors, and says how many.
        #[target_feature(enable = $features)]
        pub(super) fn split<const WIDTH: usize>(
            elements: &[u8],
            planes: &mut [&mut [u8]; WIDTH],
        ) -> usize {
            let order = broadcast(const { &grouping(WIDTH) });
            let (lanes, _) = elements.as_chunks::<LANE_BYTES>();
            let mut planes = planes
                .each_mut()
                .map(|plane| plane.as_chunks_mut::<VECTOR_BYTES>().0);
            let batches = lanes.chunks_exact(WIDTH * LANES);
            let done = batches.len() * VECTOR_BYTES;
            for (batch, lanes) in batches.enumerate() {
                let mut vectors = [zero(); WIDTH];
                for (index, vector) in vectors.iter_mut().enumerate() {
                    let rotated = rotate_left::<WIDTH>(load_lanes(lanes, index, WIDTH));
                    *vector = shuffle(rotated, order);
                }
                transpose(&mut vectors);
                for (plane, vector) in planes.iter_mut().zip(vectors) {
                    store(&mut plane[batch], vector);
                }
            }
            done
        }

        /// Joins as many elements as fill whole vectors, and says how many.
        #[target_feature(enable = $features)]
        pub(super) fn join<const WIDTH: usize>(
            planes: &[&[u8]; WIDTH],
            elements: &mut [u8],
        ) -> usize {
            let order = broadcast(const { &ungrouping(WIDTH) });
            let (lanes, _) = elements.as_chunks_mut::<LANE_BYTES>();
            let planes = planes.map(|plane| plane.as_chunks::<VECTOR_BYTES>().0);
            let batches = lanes.chunks_exact_mut(WIDTH * LANES);
            let done = batches.len() * VECTOR_BYTES;
            for (batch, lanes) in batches.enumerate() {
                let mut vectors = [zero(); WIDTH];
                for (vector, plane) in vectors.iter_mut().zip(&planes) {
                    *vector = load(&plane[batch]);
                }
                transpose(&mut vectors);
                for (index, vector) in vectors.into_iter().enumerate() {
                    let rotated = rotate_right::<WIDTH>(shuffle(vector, order));
                    store_lanes(lanes, index, WIDTH, rotated);
                }
            }
            done
        }

        /// Transposes, in every lane by itself, the square of groups that `vectors` are the rows
        /// of: 2 x 2 groups of 8 bytes, 4 x 4 of 4, or 8 x 8 of 2.
        #[inline]
        #[target_feature(enable = $features)]
        fn transpose(vectors: &mut [Vector]) {
            match vectors {
                [a, b] => [*a, *b] = zip64(*a, *b),
                [a, b, c, d] => {
                    let ([ab_low, ab_high], [cd_low, cd_high]) = (zip32(*a, *b), zip32(*c, *d));
                    [*a, *b] = zip64(ab_low, cd_low);
                    [*c, *d] = zip64(ab_high, cd_high);
                }
                [a, b, c, d, e, f, g, h] => {
                    let ([ab_low, ab_high], [cd_low, cd_high]) = (zip16(*a, *b), zip16(*c, *d));
                    let ([ef_low, ef_high], [gh_low, gh_high]) = (zip16(*e, *f), zip16(*g, *h));
                    let ([abcd0, abcd1], [efgh0, efgh1]) =
                        (zip32(ab_low, cd_low), zip32(ef_low, gh_low));
                    let ([abcd2, abcd3], [efgh2, efgh3]) =
                        (zip32(ab_high, cd_high), zip32(ef_high, gh_high));
                    [*a, *b] = zip64(abcd0, efgh0);
                    [*c, *d] = zip64(abcd1, efgh1);
                    [*e, *f] = zip64(abcd2, efgh2);
                    [*g, *h] = zip64(abcd3, efgh3);
                }
                _ => unreachable!("an element has 2, 4 or 8 planes"),
            }
        }
    };
}

/// Lanes of both x86 instruction sets.
#[cfg(target_arch = "x86_64")]
mod lane {
    use std::arch::x86_64::{__m128i, _mm_loadu_si128, _mm_storeu_si128};

    use super::LANE_BYTES;

    #[inline]
    pub(super) fn load(bytes: &[u8; LANE_BYTES]) -> __m128i {
        // SAFETY: the reference covers the 16 bytes read; no alignment is asked for.
        unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) }
    }

    #[inline]
    pub(super) fn store(bytes: &mut [u8; LANE_BYTES], lane: __m128i) {
        // SAFETY: the reference covers the 16 bytes written; no alignment is asked for.
        unsafe { _mm_storeu_si128(bytes.as_mut_ptr().cast(), lane) }
    }
}

#[cfg(target_arch = "x86_64")]
#[expect(
    clippy::wildcard_imports,
    reason = "twenty intrinsics, each with a prefix of its own"
)]
mod avx2 {
    use std::arch::x86_64::*;

    use super::{LANE_BYTES, grouping, lane, ungrouping};

    type Vector = __m256i;
    const LANES: usize = 2;

    lane_kernels!("avx2");

    #[inline]
    #[target_feature(enable = "avx2")]
    fn zero() -> Vector {
        _mm256_setzero_si256()
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    fn broadcast(bytes: &[u8; LANE_BYTES]) -> Vector {
        _mm256_broadcastsi128_si256(lane::load(bytes))
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    fn load(bytes: &[u8; VECTOR_BYTES]) -> Vector {
        // SAFETY: the reference covers the 32 bytes read; no alignment is asked for.
        unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) }
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    fn store(bytes: &mut [u8; VECTOR_BYTES], vector: Vector) {
        // SAFETY: the reference covers the 32 bytes written; no alignment is asked for.
        unsafe { _mm256_storeu_si256(bytes.as_mut_ptr().cast(), vector) }
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    fn load_lanes(lanes: &[[u8; LANE_BYTES]], first: usize, stride: usize) -> Vector {
        _mm256_set_m128i(
            lane::load(&lanes[first + stride]),
            lane::load(&lanes[first]),
        )
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    fn store_lanes(lanes: &mut [[u8; LANE_BYTES]], first: usize, stride: usize, vector: Vector) {
        lane::store(&mut lanes[first], _mm256_castsi256_si128(vector));
        lane::store(
            &mut lanes[first + stride],
            _mm256_extracti128_si256::<1>(vector),
        );
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    fn rotate_left<const WIDTH: usize>(vector: Vector) -> Vector {
        match WIDTH {
            2 => _mm256_or_si256(
                _mm256_slli_epi16::<1>(vector),
                _mm256_srli_epi16::<15>(vector),
            ),
            4 => _mm256_or_si256(
                _mm256_slli_epi32::<1>(vector),
                _mm256_srli_epi32::<31>(vector),
            ),
            _ => _mm256_or_si256(
                _mm256_slli_epi64::<1>(vector),
                _mm256_srli_epi64::<63>(vector),
            ),
        }
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    fn rotate_right<const WIDTH: usize>(vector: Vector) -> Vector {
        match WIDTH {
            2 => _mm256_or_si256(
                _mm256_srli_epi16::<1>(vector),
                _mm256_slli_epi16::<15>(vector),
            ),
            4 => _mm256_or_si256(
                _mm256_srli_epi32::<1>(vector),
                _mm256_slli_epi32::<31>(vector),
            ),
            _ => _mm256_or_si256(
                _mm256_srli_epi64::<1>(vector),
                _mm256_slli_epi64::<63>(vector),
            ),
        }
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    fn shuffle(vector: Vector, order: Vector) -> Vector {
        _mm256_shuffle_epi8(vector, order)
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    fn zip16(a: Vector, b: Vector) -> [Vector; 2] {
        [_mm256_unpacklo_epi16(a, b), _mm256_unpackhi_epi16(a, b)]
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    fn zip32(a: Vector, b: Vector) -> [Vector; 2] {
        [_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b)]
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    fn zip64(a: Vector, b: Vector) -> [Vector; 2] {
        [_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b)]
    }
}

#[cfg(target_arch = "x86_64")]
#[expect(
    clippy::wildcard_imports,
    reason = "twenty intrinsics, each with a prefix of its own"
)]
mod avx512 {
    use std::arch::x86_64::*;

    use super::{LANE_BYTES, grouping, lane, ungrouping};

    type Vector = __m512i;
    const LANES: usize = 4;

    lane_kernels!("avx512f,avx512bw");

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn zero() -> Vector {
        _mm512_setzero_si512()
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn broadcast(bytes: &[u8; LANE_BYTES]) -> Vector {
        _mm512_broadcast_i32x4(lane::load(bytes))
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn load(bytes: &[u8; VECTOR_BYTES]) -> Vector {
        // SAFETY: the reference covers the 64 bytes read; no alignment is asked for.
        unsafe { _mm512_loadu_si512(bytes.as_ptr().cast()) }
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn store(bytes: &mut [u8; VECTOR_BYTES], vector: Vector) {
        // SAFETY: the reference covers the 64 bytes written; no alignment is asked for.
        unsafe { _mm512_storeu_si512(bytes.as_mut_ptr().cast(), vector) }
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn load_lanes(lanes: &[[u8; LANE_BYTES]], first: usize, stride: usize) -> Vector {
        let vector = _mm512_castsi128_si512(lane::load(&lanes[first]));
        let vector = _mm512_inserti32x4::<1>(vector, lane::load(&lanes[first + stride]));
        let vector = _mm512_inserti32x4::<2>(vector, lane::load(&lanes[first + 2 * stride]));
        _mm512_inserti32x4::<3>(vector, lane::load(&lanes[first + 3 * stride]))
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn store_lanes(lanes: &mut [[u8; LANE_BYTES]], first: usize, stride: usize, vector: Vector) {
        lane::store(&mut lanes[first], _mm512_castsi512_si128(vector));
        lane::store(
            &mut lanes[first + stride],
            _mm512_extracti32x4_epi32::<1>(vector),
        );
        lane::store(
            &mut lanes[first + 2 * stride],
            _mm512_extracti32x4_epi32::<2>(vector),
        );
        lane::store(
            &mut lanes[first + 3 * stride],
            _mm512_extracti32x4_epi32::<3>(vector),
        );
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    fn rotate_left<const WIDTH: usize>(vector: Vector) -> Vector {
        match WIDTH {
            2 => _mm512_or_si512(
                _mm512_slli_epi16::<1>(vector),
                _mm512_srli_epi16::<15>(vector),
            ),
            4 => _mm512_rol_epi32::<1>(vector),
            _ => _mm512_rol_epi64::<1>(vector),
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    fn rotate_right<const WIDTH: usize>(vector: Vector) -> Vector {
        match WIDTH {
            2 => _mm512_or_si512(
                _mm512_srli_epi16::<1>(vector),
                _mm512_slli_epi16::<15>(vector),
            ),
            4 => _mm512_ror_epi32::<1>(vector),
            _ => _mm512_ror_epi64::<1>(vector),
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    fn shuffle(vector: Vector, order: Vector) -> Vector {
        _mm512_shuffle_epi8(vector, order)
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    fn zip16(a: Vector, b: Vector) -> [Vector; 2] {
        [_mm512_unpacklo_epi16(a, b), _mm512_unpackhi_epi16(a, b)]
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn zip32(a: Vector, b: Vector) -> [Vector; 2] {
        [_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b)]
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn zip64(a: Vector, b: Vector) -> [Vector; 2] {
        [_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b)]
    }
}

#[cfg(target_arch = "aarch64")]
#[expect(
    clippy::wildcard_imports,
    reason = "twenty intrinsics, each with a prefix of its own"
)]
mod neon {
    use std::arch::aarch64::*;

    use super::{LANE_BYTES, grouping, ungrouping};

    type Vector = uint8x16_t;
    const LANES: usize = 1;

    lane_kernels!("neon");

    #[inline]
    #[target_feature(enable = "neon")]
    fn zero() -> Vector {
        vdupq_n_u8(0)
    }

    #[inline]
    #[target_feature(enable = "neon")]
    fn broadcast(bytes: &[u8; LANE_BYTES]) -> Vector {
        load(bytes)
    }

    #[inline]
    #[target_feature(enable = "neon")]
    fn load(bytes: &[u8; VECTOR_BYTES]) -> Vector {
        // SAFETY: the reference covers the 16 bytes read; no alignment is asked for.
        unsafe { vld1q_u8(bytes.as_ptr()) }
    }

    #[inline]
    #[target_feature(enable = "neon")]
    fn store(bytes: &mut [u8; VECTOR_BYTES], vector: Vector) {
        // SAFETY: the reference covers the 16 bytes written; no alignment is asked for.
        unsafe { vst1q_u8(bytes.as_mut_ptr(), vector) }
    }

    #[inline]
    #[target_feature(enable = "neon")]
    fn load_lanes(lanes: &[[u8; LANE_BYTES]], first: usize, _stride: usize) -> Vector {
        load(&lanes[first])
    }

    #[inline]
    #[target_feature(enable = "neon")]
    fn store_lanes(lanes: &mut [[u8; LANE_BYTES]], first: usize, _stride: usize, vector: Vector) {
        store(&mut lanes[first], vector);
    }

    #[inline]
    #[target_feature(enable = "neon")]
    fn rotate_left<const WIDTH: usize>(vector: Vector) -> Vector {
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
    fn rotate_right<const WIDTH: usize>(vector: Vector) -> Vector {
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
    fn shuffle(vector: Vector, order: Vector) -> Vector {
        vqtbl1q_u8(vector, order)
    }

    #[inline]
    #[target_feature(enable = "neon")]
    fn zip16(a: Vector, b: Vector) -> [Vector; 2] {
        let (a, b) = (vreinterpretq_u16_u8(a), vreinterpretq_u16_u8(b));
        [
            vreinterpretq_u8_u16(vzip1q_u16(a, b)),
            vreinterpretq_u8_u16(vzip2q_u16(a, b)),
        ]
    }

    #[inline]
    #[target_feature(enable = "neon")]
    fn zip32(a: Vector, b: Vector) -> [Vector; 2] {
        let (a, b) = (vreinterpretq_u32_u8(a), vreinterpretq_u32_u8(b));
        [
            vreinterpretq_u8_u32(vzip1q_u32(a, b)),
            vreinterpretq_u8_u32(vzip2q_u32(a, b)),
        ]
    }

    #[inline]
    #[target_feature(enable = "neon")]
    fn zip64(a: Vector, b: Vector) -> [Vector; 2] {
        let (a, b) = (vreinterpretq_u64_u8(a), vreinterpretq_u64_u8(b));
        [
            vreinterpretq_u8_u64(vzip1q_u64(a, b)),
            vreinterpretq_u8_u64(vzip2q_u64(a, b)),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes that never repeat with a short period.
    fn bytes(count: usize) -> Vec<u8> {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        std::iter::repeat_with(|| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()[3]
        })
        .take(count)
        .collect()
    }

    /// Splits into planes that begin `skew` bytes into their buffers, and returns the planes.
    fn split(kernels: Kernels, width: usize, elements: &[u8], skew: usize) -> Vec<Vec<u8>> {
        let count = elements.len() / width;
        let mut buffers = vec![vec![0xaa_u8; count + skew + 1]; width];
        let mut planes: Vec<&mut [u8]> = buffers
            .iter_mut()
            .map(|buffer| &mut buffer[skew..skew + count])
            .collect();
        kernels.split(elements, &mut planes);
        for buffer in &buffers {
            assert!(
                buffer[..skew]
                    .iter()
                    .chain(&buffer[skew + count..])
                    .all(|b| *b == 0xaa)
            );
        }
        buffers
            .iter()
            .map(|buffer| buffer[skew..skew + count].to_vec())
            .collect()
    }

    #[test]
    fn the_top_plane_is_the_exponent_and_the_sign_goes_lowest() {
        // -1.5: sign 1, exponent 127, mantissa 0x400000.
        let planes = split(Kernels(Isa::Scalar), 4, &(-1.5_f32).to_le_bytes(), 0);
        assert_eq!(planes, [[0x01], [0x00], [0x80], [0x7f]]);
        // bfloat16 of -1.5.
        let planes = split(Kernels(Isa::Scalar), 2, &[0xc0, 0xbf], 0);
        assert_eq!(planes, [[0x81], [0x7f]]);
    }

    #[test]
    fn scalar_is_a_rotation_of_the_element() {
        let elements = bytes(8 * 50);
        let planes = split(Kernels(Isa::Scalar), 8, &elements, 0);
        for (index, element) in elements.as_chunks::<8>().0.iter().enumerate() {
            let rotated = u64::from_le_bytes(*element).rotate_left(1).to_le_bytes();
            assert_eq!(
                planes.iter().map(|plane| plane[index]).collect::<Vec<_>>(),
                rotated
            );
        }
    }

    #[test]
    fn every_instruction_set_agrees_with_scalar_at_all_lengths_and_alignments() {
        let source = bytes(8 * 600 + 64);
        for kernels in Kernels::available() {
            for width in [2, 4, 8] {
                for count in (0..300).chain([511, 512, 513, 600]) {
                    let skew = count % 67;
                    let elements = &source[skew % 64..][..count * width];
                    let planes = split(kernels, width, elements, skew);
                    let context = format!("{} width {width} count {count}", kernels.name());
                    assert!(
                        planes == split(Kernels(Isa::Scalar), width, elements, 0),
                        "{context}"
                    );

                    let mut back = vec![0; elements.len() + skew];
                    let views: Vec<&[u8]> = planes.iter().map(Vec::as_slice).collect();
                    kernels.join(&views, &mut back[skew..]);
                    assert!(back[skew..] == *elements, "{context}");
                }
            }
        }
    }

    #[test]
    #[should_panic(expected = "planes hold every element's bytes")]
    fn planes_of_the_wrong_length_are_refused() {
        Kernels::detect().split(&[0; 8], &mut [&mut [0; 4], &mut [0; 3]]);
    }
}
