//! CRC-32C (Castagnoli), plain, never seeded: the checksum of everything on disk.

use crc_fast::CrcAlgorithm::Crc32Iscsi;

/// CRC-32C of `bytes`.
pub fn crc32c(bytes: &[u8]) -> u32 {
    crc_fast::crc32_iscsi(bytes)
}

/// A CRC-32C of bytes that come in pieces.
#[derive(Clone, Debug)]
pub(crate) struct Digest(crc_fast::Digest);

impl Digest {
    /// Of no bytes yet.
    pub(crate) fn new() -> Self {
        Self(crc_fast::Digest::new(Crc32Iscsi))
    }

    /// Takes in the bytes that follow.
    pub(crate) fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// The checksum of all bytes taken in.
    pub(crate) fn finish(&self) -> u32 {
        narrow(self.0.finalize())
    }
}

impl Default for Digest {
    fn default() -> Self {
        Self::new()
    }
}

fn narrow(crc: u64) -> u32 {
    u32::try_from(crc).expect("the checksum has 32 bits")
}

/// CRC-32C of A followed by B, from the checksums of both and the length of B.
pub fn combine(crc_a: u32, crc_b: u32, bytes_b: usize) -> u32 {
    let whole = crc_fast::checksum_combine(Crc32Iscsi, crc_a.into(), crc_b.into(), bytes_b as u64);
    narrow(whole)
}

/// How many bytes of zeros leave every checksum as it is: x has the order 2^31 - 1 modulo the
/// polynomial, which is x + 1 times a primitive one of degree 31.
const PERIOD_BYTES: usize = (1 << 31) - 1;

/// The checksums of A and of B, from that of A followed by B: only the shorter one is hashed.
pub(crate) fn split(whole: u32, a: &[u8], b: &[u8]) -> (u32, u32) {
    if a.len() <= b.len() {
        let crc_a = crc32c(a);
        // What A contributes to the whole cancels out.
        (crc_a, combine(crc_a, whole, b.len()))
    } else {
        let crc_b = crc32c(b);
        // What is left is A's, moved by the length of B: moved on, it comes back to where it began.
        let back = PERIOD_BYTES - b.len() % PERIOD_BYTES;
        (combine(whole ^ crc_b, 0, back), crc_b)
    }
}

/// A checksum as manifests show it: 8 lower-case hex digits.
pub fn to_hex(crc: u32) -> String {
    format!("{crc:08x}")
}

/// Reads what [`to_hex`] writes, and nothing else.
pub(crate) fn from_hex(text: &str) -> Option<u32> {
    let crc = u32::from_str_radix(text, 16).ok()?;
    (to_hex(crc) == text).then_some(crc)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn known_answers() {
        // RFC 3720, appendix B.4.
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(&[0xff; 32]), 0x62a8_ab43);
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(crc32c(b""), 0);
    }

    #[test]
    fn only_canonical_hex_is_read() {
        assert_eq!(from_hex("0000beef"), Some(0xbeef));
        for text in ["", "beef", "0000BEEF", "+000beef", "00000beef", "0x00beef", "0000bee\u{e9}"] {
            assert_eq!(from_hex(text), None, "{text}");
        }
    }

    proptest! {
        #[test]
        fn two_implementations_agree(bytes: Vec<u8>, cut: prop::sample::Index) {
            let expected = ::crc32c::crc32c(&bytes);
            prop_assert_eq!(crc32c(&bytes), expected);
            let (head, tail) = bytes.split_at(cut.index(bytes.len() + 1));
            let mut digest = Digest::new();
            digest.update(head);
            digest.update(tail);
            prop_assert_eq!(digest.finish(), expected);
        }

        #[test]
        fn combining_equals_concatenating(a: Vec<u8>, b: Vec<u8>) {
            let whole: Vec<u8> = a.iter().chain(&b).copied().collect();
            prop_assert_eq!(combine(crc32c(&a), crc32c(&b), b.len()), crc32c(&whole));
        }

        #[test]
        fn two_implementations_combine_alike(a: u32, b: u32, length in 0..=PERIOD_BYTES) {
            prop_assert_eq!(combine(a, b, length), ::crc32c::crc32c_combine(a, b, length));
        }

        #[test]
        fn splitting_undoes_combining(bytes: Vec<u8>, cut: prop::sample::Index) {
            let (a, b) = bytes.split_at(cut.index(bytes.len() + 1));
            prop_assert_eq!(split(crc32c(&bytes), a, b), (crc32c(a), crc32c(b)));
        }

        #[test]
        fn hex_round_trips(crc: u32) {
            prop_assert_eq!(from_hex(&to_hex(crc)), Some(crc));
        }
    }
}
