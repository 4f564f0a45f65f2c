//! CRC-32C (Castagnoli), plain, never seeded: the checksum of everything on disk.

/// CRC-32C of `bytes`.
pub fn crc32c(bytes: &[u8]) -> u32 {
    ::crc32c::crc32c(bytes)
}
