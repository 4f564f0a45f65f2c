//! Elements <-> byte planes.
//!
//! Every element is rotated left by one bit and its bytes are dealt out, lowest first, one to each
//! plane. The rotation puts the sign beside the mantissa, so that the top plane holds the exponent
//! without it (of an f64 the upper bits; of an f16 some mantissa as well), which is the only
//! part of a weight that compresses:
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
//! for a feature that only some processors have nor load a vector; nothing else here is unsafe, and
//! the files of the instruction sets are safe code.
#![expect(unsafe_code, reason = "vector loads, stores, and calls that need a processor feature")]

#[deny(unsafe_code)]
mod scalar;

#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
#[deny(unsafe_code)]
#[macro_use]
mod lanes;
#[cfg(target_arch = "x86_64")]
#[deny(unsafe_code)]
mod avx2;
#[cfg(target_arch = "x86_64")]
#[deny(unsafe_code)]
mod avx512;
#[cfg(target_arch = "aarch64")]
#[deny(unsafe_code)]
mod neon;

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
    pub(crate) fn detect() -> Self {
        *Self::available().last().expect("the scalar kernels run on every processor")
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
            assert_eq!(plane.len() * WIDTH, elements.len(), "planes hold every element's bytes");
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
            assert_eq!(plane.len() * WIDTH, elements.len(), "planes hold every element's bytes");
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
    planes.try_into().expect("the caller matched the number of planes")
}

fn sized_mut<'a, 'b, const WIDTH: usize>(
    planes: &'a mut [&'b mut [u8]],
) -> &'a mut [&'b mut [u8]; WIDTH] {
    planes.try_into().expect("the caller matched the number of planes")
}

/// Reads a vector. The vector type is the caller's processor's own, of `BYTES` bytes.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
#[inline]
fn load<V: Vector, const BYTES: usize>(bytes: &[u8; BYTES]) -> V {
    const { assert!(size_of::<V>() == BYTES) };
    // SAFETY: the reference covers the bytes read, no alignment is asked for, and a `Vector` may
    // have any bits.
    unsafe { bytes.as_ptr().cast::<V>().read_unaligned() }
}

/// Writes a vector.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
#[inline]
fn store<V: Vector, const BYTES: usize>(bytes: &mut [u8; BYTES], vector: V) {
    const { assert!(size_of::<V>() == BYTES) };
    // SAFETY: the reference covers the bytes written, no alignment is asked for, and a `Vector`
    // has no padding.
    unsafe { bytes.as_mut_ptr().cast::<V>().write_unaligned(vector) }
}

/// Types of which any bits are a value, without padding.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
trait Vector: Copy {}

#[cfg(target_arch = "x86_64")]
impl Vector for std::arch::x86_64::__m128i {}
#[cfg(target_arch = "x86_64")]
impl Vector for std::arch::x86_64::__m256i {}
#[cfg(target_arch = "x86_64")]
impl Vector for std::arch::x86_64::__m512i {}
#[cfg(target_arch = "aarch64")]
impl Vector for std::arch::aarch64::uint8x16_t {}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes that never repeat with a short period.
    fn bytes(count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        fastrand::Rng::with_seed(1).fill(&mut bytes);
        bytes
    }

    /// Splits into planes that begin `skew` bytes into their buffers, and returns the planes.
    fn split(kernels: Kernels, width: usize, elements: &[u8], skew: usize) -> Vec<Vec<u8>> {
        let count = elements.len() / width;
        let mut buffers = vec![vec![0xaa_u8; count + skew + 1]; width];
        let mut planes: Vec<&mut [u8]> =
            buffers.iter_mut().map(|buffer| &mut buffer[skew..skew + count]).collect();
        kernels.split(elements, &mut planes);
        for buffer in &buffers {
            assert!(buffer[..skew].iter().chain(&buffer[skew + count..]).all(|b| *b == 0xaa));
        }
        buffers.iter().map(|buffer| buffer[skew..skew + count].to_vec()).collect()
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
            assert_eq!(planes.iter().map(|plane| plane[index]).collect::<Vec<_>>(), rotated);
        }
    }

    #[test]
    fn every_instruction_set_agrees_with_scalar_at_all_lengths_and_alignments() {
        let source = bytes(8 * 513 + 64);
        // An interpreter takes seconds for each: it gets a whole vector and a rest.
        let lengths = if cfg!(miri) { vec![0, 5, 71] } else { (0..300).chain(511..514).collect() };
        for kernels in Kernels::available() {
            for width in [2, 4, 8] {
                for &count in &lengths {
                    let skew = count % 67;
                    let elements = &source[skew % 64..][..count * width];
                    let planes = split(kernels, width, elements, skew);
                    let context = format!("{} width {width} count {count}", kernels.name());
                    assert!(planes == split(Kernels(Isa::Scalar), width, elements, 0), "{context}");

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
