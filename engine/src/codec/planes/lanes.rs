//! How planes are made of vectors, once for all instruction sets.
//!
//! WIDTH vectors of LANES lanes are worked on at a time. Vector i takes the lanes i, i + WIDTH,
//! i + 2 WIDTH, ... of memory, so that no byte ever crosses a lane, which is what vector
//! instructions do badly:
//!
//! ```text
//! rotate, group     a vector's lane holds WIDTH groups, group k for plane k
//! transpose         group k of vector i <-> group i of vector k
//! ```
//!
//! after which vector k is plane k, its bytes in order. Joining is the same backwards: the
//! transposition is its own inverse.

/// Bytes of a lane, the unit within which vector instructions move bytes.
pub(super) const LANE_BYTES: usize = 16;

/// For each byte of a lane, which one moves there: bytes of elements become groups, one a plane.
pub(super) const fn grouping(width: usize) -> [u8; LANE_BYTES] {
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
pub(super) const fn ungrouping(width: usize) -> [u8; LANE_BYTES] {
    // Rows and columns change places: the groups are elements now.
    grouping(LANE_BYTES / width)
}

/// `split` and `join`, from the primitives of the module that asks for them.
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
            let mut planes = planes.each_mut().map(|plane| plane.as_chunks_mut::<VECTOR_BYTES>().0);
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
        fn transpose(vectors: &mut [Register]) {
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
