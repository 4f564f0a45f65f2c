//! A guess, from a sample of its bytes, at how a byte plane is best stored.
//!
//! Always holds: the sample is spread over the whole block, so a head unlike the rest does not
//! mislead; a wrong guess costs time or a little space, never a byte.

use super::planes::Kernels;

/// Elements in a sample.
const SAMPLE_ELEMENTS: usize = 4096;
/// Elements in a row, of which a sample is made: whole cache lines, many places.
const RUN_ELEMENTS: usize = 64;
/// A plane with more entropy is stored raw: Huffman coding would save less than a twentieth of it.
const ENTROPY_BITS_MAX: f32 = 7.6;

/// How a plane is likely best stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Guess {
    /// One byte over and over.
    Constant,
    /// Few enough bits a byte for Huffman coding.
    Compressible,
    /// Noise.
    Noise,
}

/// Takes samples; owns the memory for one.
pub(super) struct Sampler {
    kernels: Kernels,
    /// The sampled bytes, plane after plane.
    planes: Vec<u8>,
    /// `count * log2(count)` for every count that a histogram of a sample can hold.
    count_log2_counts: Vec<f32>,
}

impl Sampler {
    pub(super) fn new(kernels: Kernels) -> Self {
        let product = |count: u16| match f32::from(count) {
            0.0 => 0.0,
            count => count * count.log2(),
        };
        let counts = 0..=u16::try_from(SAMPLE_ELEMENTS).expect("a sample has some thousand bytes");
        Self { kernels, planes: Vec::new(), count_log2_counts: counts.map(product).collect() }
    }

    /// A guess for each plane of `elements`, lowest first.
    pub(super) fn guess(&mut self, elements: &[u8], guesses: &mut [Guess]) {
        let width = guesses.len();
        let count = (elements.len() / width).min(SAMPLE_ELEMENTS);
        self.planes.resize(count * width, 0);
        if width == 1 {
            visit_runs(elements.len(), |at, run| {
                self.planes[at..][..run.len()].copy_from_slice(&elements[run]);
            });
        } else {
            visit_runs(elements.len() / width, |at, run| {
                let mut rest = self.planes.chunks_exact_mut(count);
                let mut planes: [&mut [u8]; 8] = std::array::from_fn(|_| match rest.next() {
                    Some(plane) => &mut plane[at..][..run.len()],
                    None => &mut [],
                });
                let elements = &elements[run.start * width..run.end * width];
                self.kernels.split(elements, &mut planes[..width]);
            });
        }
        for (guess, plane) in guesses.iter_mut().zip(self.planes.chunks_exact(count)) {
            *guess = self.guess_plane(plane);
        }
    }

    fn guess_plane(&self, plane: &[u8]) -> Guess {
        let counts = histogram(plane);
        let total = u16::try_from(plane.len()).expect("a sample has some thousand bytes");
        if counts.contains(&total) {
            return Guess::Constant;
        }
        let sum: f32 = counts.iter().map(|count| self.count_log2_counts[usize::from(*count)]).sum();
        let entropy_bits = f32::from(total).log2() - sum / f32::from(total);
        if entropy_bits > ENTROPY_BITS_MAX { Guess::Noise } else { Guess::Compressible }
    }
}

/// Calls `visit` with each run of a sample of `count` elements: its place in the sample and the
/// elements it takes.
fn visit_runs(count: usize, mut visit: impl FnMut(usize, std::ops::Range<usize>)) {
    if count <= SAMPLE_ELEMENTS {
        return visit(0, 0..count);
    }
    let runs = SAMPLE_ELEMENTS / RUN_ELEMENTS;
    for run in 0..runs {
        // The first run begins the block and the last one ends it.
        let first = run * (count - RUN_ELEMENTS) / (runs - 1);
        visit(run * RUN_ELEMENTS, first..first + RUN_ELEMENTS);
    }
}

/// How often each byte occurs.
fn histogram(bytes: &[u8]) -> [u16; 256] {
    // Four tables, so that equal neighbours do not wait for each other's store.
    let mut tables = [[0_u16; 256]; 4];
    let (groups, rest) = bytes.as_chunks::<4>();
    for group in groups {
        for (table, byte) in tables.iter_mut().zip(group) {
            table[usize::from(*byte)] += 1;
        }
    }
    let [mut counts, tables @ ..] = tables;
    for byte in rest {
        counts[usize::from(*byte)] += 1;
    }
    for table in tables {
        for (count, more) in counts.iter_mut().zip(table) {
            *count += more;
        }
    }
    counts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_cover_a_sample_once_and_reach_both_ends() {
        for count in [1, 63, 4096, 4097, 5000, 1 << 17] {
            let (mut next, mut reached) = (0, Vec::new());
            visit_runs(count, |at, run| {
                assert_eq!(at, next);
                next += run.len();
                reached.push(run);
            });
            assert_eq!(next, count.min(SAMPLE_ELEMENTS));
            assert_eq!(reached[0].start, 0);
            assert_eq!(reached.last().unwrap().end, count);
            assert!(reached.is_sorted_by_key(|run| run.start));
        }
    }

    #[test]
    fn a_histogram_counts_every_byte() {
        let bytes: Vec<u8> = (0..=255).chain(0..=6).chain([255; 4]).collect();
        let counts = histogram(&bytes);
        assert_eq!(counts.iter().map(|count| usize::from(*count)).sum::<usize>(), bytes.len());
        assert_eq!((counts[0], counts[6], counts[7], counts[255]), (2, 2, 1, 5));
    }

    #[test]
    fn guesses_tell_noise_constants_and_the_rest_apart() {
        let mut sampler = Sampler::new(Kernels::detect());
        let mut random = fastrand::Rng::with_seed(1);
        let mut noise = || random.u8(..);
        // Little-endian pairs: noise below, a constant or one of four bytes above; the rotation
        // moves bit 7 of the upper byte, which is clear, into the lower one.
        for (mask, expected) in [(0, Guess::Constant), (3, Guess::Compressible)] {
            let elements: Vec<u8> =
                (0..100_000).flat_map(|_| [noise() | 0x80, noise() & mask]).collect();
            let mut guesses = [Guess::Constant; 2];
            sampler.guess(&elements, &mut guesses);
            assert_eq!(guesses[1], expected);
        }
        let elements: Vec<u8> = (0..100_000).map(|_| noise()).collect();
        let mut guesses = [Guess::Constant];
        sampler.guess(&elements, &mut guesses);
        assert_eq!(guesses, [Guess::Noise]);
    }
}
