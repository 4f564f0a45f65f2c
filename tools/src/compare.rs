//! Two tensors of one dtype and shape, byte by byte and, for floats, by how far they are apart.
//!
//! Pure. Always holds: two are called equal only if every byte was compared and is equal, so -0.0
//! and 0.0 differ, and so do two NaNs with different bits.

use serde::Serialize;

/// How the items of two tensors differ.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub(crate) struct Difference {
    /// Items in all.
    pub(crate) items: u64,
    /// Of these, items whose bytes differ.
    pub(crate) items_changed: u64,
    /// Largest absolute difference of two numbers; `None` where the dtype is no float that is
    /// decoded here, or where a NaN or an infinity came or went.
    #[serde(rename = "difference_max")]
    pub(crate) largest: Option<f64>,
    /// Changed items of which one is not finite.
    pub(crate) items_not_finite: u64,
}

/// Reads one item as a number.
type Decode = fn(&[u8]) -> Option<f64>;

impl Difference {
    /// Takes the next items of both tensors, cut between two items, into account. Of long items,
    /// which are cut anywhere, the bytes count as items.
    pub(crate) fn add(&mut self, dtype: &str, item_bytes: u64, a: &[u8], b: &[u8]) {
        let item_bytes = usize::try_from(item_bytes).expect("items are short");
        self.items += (a.len() / item_bytes) as u64;
        if a == b {
            return;
        }
        let decode = decoder(dtype).filter(|(bytes, _)| *bytes == item_bytes);
        for (a, b) in a.chunks_exact(item_bytes).zip(b.chunks_exact(item_bytes)) {
            if a == b {
                continue;
            }
            self.items_changed += 1;
            if let Some((a, b)) = decode.and_then(|(_, decode)| decode(a).zip(decode(b))) {
                self.add_numbers(a, b);
            }
        }
    }

    fn add_numbers(&mut self, a: f64, b: f64) {
        let apart = (a - b).abs();
        if apart.is_finite() {
            self.largest = Some(self.largest.unwrap_or(0.0).max(apart));
        } else {
            self.items_not_finite += 1;
        }
    }
}

/// How items of a dtype, torch's or numpy's, are read, and their bytes.
fn decoder(dtype: &str) -> Option<(usize, Decode)> {
    Some(match dtype {
        "float64" | "<f8" => (8, |item| Some(f64::from_le_bytes(item.try_into().ok()?))),
        "float32" | "<f4" => (4, |item| Some(f32::from_le_bytes(item.try_into().ok()?).into())),
        "bfloat16" => (2, |item| {
            let bits = u16::from_le_bytes(item.try_into().ok()?);
            Some(f32::from_bits(u32::from(bits) << 16).into())
        }),
        "float16" | "<f2" => (2, |item| Some(half(u16::from_le_bytes(item.try_into().ok()?)))),
        _ => return None,
    })
}

/// IEEE binary16 as a number.
fn half(bits: u16) -> f64 {
    let sign = if bits >> 15 == 0 { 1.0 } else { -1.0 };
    let fraction = f64::from(bits & 0x3ff) / 1024.0;
    let magnitude = match i32::from(bits >> 10 & 0x1f) {
        0 => fraction * 2.0_f64.powi(-14),
        31 if fraction == 0.0 => f64::INFINITY,
        31 => f64::NAN,
        exponent => (1.0 + fraction) * 2.0_f64.powi(exponent - 15),
    };
    sign * magnitude
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(dtype: &str, item_bytes: u64, a: &[u8], b: &[u8]) -> Difference {
        let mut difference = Difference::default();
        difference.add(dtype, item_bytes, a, b);
        difference
    }

    fn singles(numbers: &[f32]) -> Vec<u8> {
        numbers.iter().flat_map(|number| number.to_le_bytes()).collect()
    }

    #[test]
    fn the_largest_difference_is_found() {
        let found =
            of("float32", 4, &singles(&[1.0, 2.0, -3.0, 0.0]), &singles(&[1.0, 2.5, -5.0, -0.0]));
        let expected =
            Difference { items: 4, items_changed: 3, largest: Some(2.0), items_not_finite: 0 };
        assert_eq!(found, expected);
    }

    #[test]
    fn what_is_not_finite_is_counted_apart() {
        let found = of("float32", 4, &singles(&[1.0, f32::NAN]), &singles(&[f32::INFINITY, 1.0]));
        assert_eq!((found.items_changed, found.items_not_finite), (2, 2));
        assert_eq!(found.largest, None);
    }

    #[test]
    fn other_dtypes_are_compared_as_bytes() {
        let found = of("int32", 4, &[1, 0, 0, 0, 2, 0, 0, 0], &[1, 0, 0, 0, 3, 0, 0, 0]);
        assert_eq!((found.items, found.items_changed, found.largest), (2, 1, None));
    }

    #[test]
    fn halves_are_decoded() {
        for (bits, number) in [
            (0x0000, 0.0),
            (0x0001, 2.0_f64.powi(-24)),
            (0x0400, 2.0_f64.powi(-14)),
            (0x3c00, 1.0),
            (0xc000, -2.0),
            (0x7bff, 65504.0),
            (0x7c00, f64::INFINITY),
        ] {
            assert_eq!(half(bits).to_bits(), number.to_bits(), "{bits:04x}");
        }
        assert!(half(0x7e00).is_nan());
        let brain = of("bfloat16", 2, &0x3f80_u16.to_le_bytes(), &0x4000_u16.to_le_bytes());
        assert_eq!(brain.largest, Some(1.0));
    }
}
