//! What must hold between the records of an index, and between them and their file.
//!
//! Always holds: arithmetic on numbers that a file chose is checked.

use super::{
    ChunkRecord, DIMENSIONS_MAX, DTYPE_BYTES_MAX, GlobalSlice, IndexContext, STORAGES_MAX,
    StorageRecord, TENSORS_MAX, TensorRecord,
};
use crate::codec::Codec;
use crate::format::FormatError;
use crate::format::layout::{RAW_BYTES_MAX, STORAGE_ALIGNMENT};
use crate::format::shard::REGION_ALIGNMENT;

/// Largest shape, stride or offset: Python's side counts in signed 64 bits.
const ITEMS_MAX: u64 = i64::MAX.unsigned_abs();

/// Storages ascend, aligned, without overlap, within the largest raw layout.
pub(super) fn storages(storages: &[StorageRecord]) -> Result<(), FormatError> {
    ensure!(
        storages.len() <= STORAGES_MAX,
        "the index has {} storages, at most {STORAGES_MAX}",
        storages.len()
    );
    let mut end = 0;
    for (index, StorageRecord { raw_offset, bytes, replica, .. }) in storages.iter().enumerate() {
        ensure!(
            raw_offset.is_multiple_of(STORAGE_ALIGNMENT),
            "storage {index} starts at raw byte {raw_offset}, expected a multiple of \
             {STORAGE_ALIGNMENT}"
        );
        ensure!(
            *raw_offset >= end,
            "storage {index} starts at raw byte {raw_offset}, before the previous one ends at {end}"
        );
        let held = match replica {
            None => Some(*bytes),
            Some(part) => {
                let end = part.start.checked_add(part.bytes);
                let is_part = end.is_some_and(|end| end <= *bytes && *bytes <= RAW_BYTES_MAX);
                is_part.then_some(part.bytes)
            }
        };
        let Some(held) = held else {
            return Err(FormatError::Damaged(format!(
                "storage {index} of {bytes} bytes, at most {RAW_BYTES_MAX}, has no part {replica:?}"
            )));
        };
        end = match raw_offset.checked_add(held) {
            Some(end) if end <= RAW_BYTES_MAX => end,
            _ => {
                return Err(FormatError::Damaged(format!(
                    "storage {index} of {bytes} bytes at raw byte {raw_offset} ends after \
                     {RAW_BYTES_MAX}"
                )));
            }
        };
    }
    Ok(())
}

/// Every tensor stays within its storage.
pub(super) fn tensors(
    tensors: &[TensorRecord],
    storages: &[StorageRecord],
) -> Result<(), FormatError> {
    ensure!(
        tensors.len() <= TENSORS_MAX,
        "the index has {} tensors, at most {TENSORS_MAX}",
        tensors.len()
    );
    for (index, tensor) in tensors.iter().enumerate() {
        check_tensor(tensor, storages)
            .map_err(|why| FormatError::Damaged(format!("tensor {index} {why}")))?;
    }
    Ok(())
}

/// Checks one tensor. The error continues a sentence that begins with the tensor.
fn check_tensor(tensor: &TensorRecord, storages: &[StorageRecord]) -> Result<(), String> {
    let Some(storage) = storages.get(tensor.storage as usize) else {
        return Err(format!("views storage {} of {}", tensor.storage, storages.len()));
    };
    let dimensions = tensor.shape.len();
    if dimensions > DIMENSIONS_MAX || tensor.strides.len() != dimensions {
        return Err(format!(
            "has {dimensions} dimensions and {} strides, expected as many of each, at most \
             {DIMENSIONS_MAX}",
            tensor.strides.len()
        ));
    }
    if tensor.dtype.is_empty() || tensor.dtype.len() > DTYPE_BYTES_MAX {
        return Err(format!(
            "has a dtype name of {} bytes, expected 1 to {DTYPE_BYTES_MAX}",
            tensor.dtype.len()
        ));
    }
    if tensor.item_bytes == 0 {
        return Err("has items of 0 bytes, expected at least 1".into());
    }
    let numbers = tensor.shape.iter().chain(&tensor.strides).chain([&tensor.offset]);
    if let Some(number) = numbers.copied().find(|number| *number > ITEMS_MAX) {
        return Err(format!("has a shape, stride or offset of {number}, at most {ITEMS_MAX}"));
    }
    match extent_bytes(tensor) {
        Some(bytes) if bytes <= storage.bytes => {}
        bytes => {
            let needs = bytes.map_or("more than 2^63".into(), |bytes| bytes.to_string());
            return Err(format!(
                "needs {needs} bytes of storage {}, which has {}",
                tensor.storage, storage.bytes
            ));
        }
    }
    tensor.slice.as_ref().map_or(Ok(()), |slice| check_slice(slice, &tensor.shape))
}

/// Bytes from the storage's start to the end of the tensor's last item, 0 when there is no item;
/// `None` when that, or the number of items, overflows.
fn extent_bytes(tensor: &TensorRecord) -> Option<u64> {
    if tensor.shape.contains(&0) {
        return Some(0);
    }
    let mut last = tensor.offset;
    let mut total_bytes = u64::from(tensor.item_bytes);
    for (items, stride) in tensor.shape.iter().zip(&tensor.strides) {
        last = last.checked_add((items - 1).checked_mul(*stride)?)?;
        total_bytes = total_bytes.checked_mul(*items).filter(|bytes| *bytes <= ITEMS_MAX)?;
    }
    last.checked_add(1)?.checked_mul(u64::from(tensor.item_bytes))
}

fn check_slice(slice: &GlobalSlice, shape: &[u64]) -> Result<(), String> {
    if slice.shape.len() != shape.len() || slice.offsets.len() != shape.len() {
        return Err(format!(
            "has {} dimensions, and is a slice with {} offsets of a tensor with {}",
            shape.len(),
            slice.offsets.len(),
            slice.shape.len()
        ));
    }
    for ((items, offset), whole) in shape.iter().zip(&slice.offsets).zip(&slice.shape) {
        if *whole > ITEMS_MAX || offset.checked_add(*items).is_none_or(|end| end > *whole) {
            return Err(format!(
                "is a slice of {items} items at {offset} in a dimension of {whole}"
            ));
        }
    }
    Ok(())
}

/// No chunk is empty or grew, and raw ones are as long stored.
pub(super) fn chunks(chunks: &[ChunkRecord]) -> Result<(), FormatError> {
    for (index, chunk) in chunks.iter().enumerate() {
        let ChunkRecord { stored_bytes, raw_bytes, codec, .. } = chunk;
        ensure!(
            (1..=*raw_bytes).contains(stored_bytes)
                && (*codec != Codec::None || stored_bytes == raw_bytes),
            "chunk {index} with codec {codec:?} takes {stored_bytes} bytes for {raw_bytes} raw ones"
        );
    }
    Ok(())
}

/// Chunks are full but for the last, and together as long as the raw layout.
pub(super) fn chunk_lengths(
    chunks: &[ChunkRecord],
    raw_bytes: u64,
    chunk_bytes: u32,
) -> Result<(), FormatError> {
    let mut left = raw_bytes;
    for (index, chunk) in chunks.iter().enumerate() {
        let expected = left.min(u64::from(chunk_bytes));
        ensure!(
            u64::from(chunk.raw_bytes) == expected,
            "chunk {index} has {} raw bytes, expected {expected}",
            chunk.raw_bytes
        );
        left -= expected;
    }
    ensure!(
        left == 0,
        "{} chunks hold {} of {raw_bytes} raw bytes",
        chunks.len(),
        raw_bytes - left
    );
    Ok(())
}

/// Header, zeros, chunks, index and footer tile the file: no hole, no overlap, no trailing byte.
pub(super) fn tiling(
    chunks: &[ChunkRecord],
    index_stored_bytes: u64,
    context: &IndexContext,
) -> Result<(), FormatError> {
    let mut regions: Vec<(u64, u64)> =
        chunks.iter().map(|chunk| (chunk.offset, u64::from(chunk.stored_bytes))).collect();
    regions.sort_unstable();
    regions.push((context.index_offset, index_stored_bytes));
    let mut end = u64::from(context.chunks_offset);
    for (offset, bytes) in regions {
        ensure!(
            offset == end,
            "a region starts at byte {offset} where the one before it ends at {end}: header, \
             chunks, index and footer must tile the file"
        );
        end = bytes
            .checked_next_multiple_of(REGION_ALIGNMENT)
            .and_then(|bytes| end.checked_add(bytes))
            .filter(|end| *end < context.file_bytes)
            .ok_or_else(|| {
                FormatError::Damaged(format!(
                    "a region of {bytes} bytes at byte {offset} does not fit a file of {}",
                    context.file_bytes
                ))
            })?;
    }
    ensure!(
        end.checked_add(REGION_ALIGNMENT) == Some(context.file_bytes),
        "the index ends at byte {end} of {}, expected the footer right after it",
        context.file_bytes
    );
    Ok(())
}
