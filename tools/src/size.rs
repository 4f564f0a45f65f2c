//! Sizes as people write them: `5GB`, `500 MB`, `1.5GiB`, or a plain number of bytes.
//!
//! Pure. Always holds: units may be upper case or lower; `GB` is 10^9 bytes, as Hugging Face has
//! it, and `GiB` is 2^30; fractions of a byte are cut off.

/// Bytes of each unit.
const UNITS: [(&str, u128); 10] = [
    ("", 1),
    ("b", 1),
    ("kb", 1_000),
    ("kib", 1 << 10),
    ("mb", 1_000_000),
    ("mib", 1 << 20),
    ("gb", 1_000_000_000),
    ("gib", 1 << 30),
    ("tb", 1_000_000_000_000),
    ("tib", 1 << 40),
];

/// A number of bytes, at least one; or what is expected, and a hint.
pub(crate) fn parse(text: &str) -> Result<u64, String> {
    let bytes = bytes_of(text.trim()).filter(|bytes| *bytes > 0);
    bytes.ok_or_else(|| {
        "a number of bytes is expected, at least 1\nhint: write it like `5GB` or `2GiB`; units are \
         `B`, `kB`, `MB`, `GB`, `TB`, `KiB`, `MiB`, `GiB` and `TiB`"
            .into()
    })
}

/// Exact, unlike a float; `None` also of what is beyond counting.
fn bytes_of(text: &str) -> Option<u64> {
    let is_of_number = |character: char| character.is_ascii_digit() || character == '.';
    let end = text.find(|character| !is_of_number(character)).unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    let unit = unit_bytes(unit.trim_start())?;
    let (whole, fraction) = number.split_once('.').unwrap_or((number, "0"));
    let scale = 10_u128.checked_pow(u32::try_from(fraction.len()).ok()?)?;
    let whole = whole.parse::<u128>().ok()?.checked_mul(unit)?;
    let part = fraction.parse::<u128>().ok()?.checked_mul(unit)? / scale;
    u64::try_from(whole.checked_add(part)?).ok()
}

fn unit_bytes(unit: &str) -> Option<u128> {
    let fits = |(name, _): &&(&str, u128)| name.eq_ignore_ascii_case(unit);
    UNITS.iter().find(fits).map(|(_, bytes)| *bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_are_decimal_or_binary() {
        let cases = [
            ("1", 1),
            ("17 B", 17),
            ("5GB", 5_000_000_000),
            ("500 mb", 500_000_000),
            ("2GiB", 2 << 30),
            (" 1.5 KiB ", 1536),
            ("0.0019kB", 1),
            ("007tib", 7 << 40),
            ("18446744073709551615", u64::MAX),
        ];
        for (text, expected) in cases {
            assert_eq!(parse(text), Ok(expected), "{text}");
        }
    }

    #[test]
    fn what_is_no_size_is_refused() {
        let long = format!("1.{}", "0".repeat(60));
        for text in [
            "",
            "GB",
            "0",
            "0GB",
            "0.4",
            "-1",
            "+1",
            "5.",
            ".5",
            "1.2.3",
            "5G",
            "5 G B",
            "5Gb/s",
            "1e9",
            "1_000",
            "five",
            "5GB5",
            "18446744073709551616",
            "99999999999TiB",
            "٣GB",
            &long,
        ] {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
