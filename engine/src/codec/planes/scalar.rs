//! The definition, one byte at a time: for any processor, and for what fills no vector.

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
pub(super) fn join<const WIDTH: usize>(planes: &[&[u8]; WIDTH], elements: &mut [u8], first: usize) {
    let (elements, _) = elements[first * WIDTH..].as_chunks_mut::<WIDTH>();
    for index in 0..WIDTH {
        let (plane, above) = (&planes[index][first..], &planes[(index + 1) % WIDTH][first..]);
        for ((element, byte), above) in elements.iter_mut().zip(plane).zip(above) {
            element[index] = (byte >> 1) | (above << 7);
        }
    }
}
