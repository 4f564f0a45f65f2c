//! A zstd frame that holds its content as it is (RFC 8878, section 3.1.1).
//!
//! Always holds: every zstd decoder gives exactly the content back.

/// What every frame begins with.
const MAGIC: [u8; 4] = 0xfd2f_b528_u32.to_le_bytes();
/// A frame in one segment, whose content size follows in 8 bytes; no checksum, no dictionary.
const DESCRIPTOR: u8 = 0b1110_0000;
/// Most bytes of a block.
const BLOCK_BYTES_MAX: usize = 128 << 10;

/// The frame of `content`.
pub(super) fn uncompressed(content: &[u8]) -> Vec<u8> {
    let blocks = content.len().div_ceil(BLOCK_BYTES_MAX).max(1);
    let mut frame = Vec::with_capacity(content.len() + 3 * blocks + 13);
    frame.extend(MAGIC);
    frame.push(DESCRIPTOR);
    frame.extend((content.len() as u64).to_le_bytes());
    for block in 0..blocks {
        let start = block * BLOCK_BYTES_MAX;
        let bytes = &content[start..content.len().min(start + BLOCK_BYTES_MAX)];
        let is_last = u32::from(block + 1 == blocks);
        // Bits 1 and 2 are the type: 0, raw.
        let length = u32::try_from(bytes.len()).expect("a block is short");
        let [low, middle, high, _] = (is_last | (length << 3)).to_le_bytes();
        frame.extend([low, middle, high]);
        frame.extend_from_slice(bytes);
    }
    frame
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plain_decoder_gives_the_content_back() {
        for bytes in [0, 1, BLOCK_BYTES_MAX, BLOCK_BYTES_MAX + 1, 3 * BLOCK_BYTES_MAX] {
            let content: Vec<u8> = (0..=250).cycle().take(bytes).collect();
            let frame = uncompressed(&content);
            assert!(frame.len() <= bytes + 13 + 3 * (bytes / BLOCK_BYTES_MAX + 1));
            let mut back = Vec::with_capacity(bytes);
            assert_eq!(zstd_safe::decompress(&mut back, &frame), Ok(bytes));
            assert!(back == content);
            assert_eq!(zstd_safe::find_frame_compressed_size(&frame), Ok(frame.len()));
        }
    }
}
