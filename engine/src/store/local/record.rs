//! Small files, read and written whole: manifests.
//!
//! Always holds: they go through the same [`Io`] as shards, so that every fault that can strike
//! one can be injected; memory is one buffer, taken for the occasion, beside the bytes themselves.

use std::io::{self, ErrorKind};
use std::path::Path;
use std::sync::Arc;

use crate::error::IoContext;
use crate::io::buffer::{Buffer, BufferPool};
use crate::io::{ALIGNMENT, EntryOp, File, Io, OpenMode, transfer};
use crate::{EngineError, Result};

/// Most bytes in flight: most manifests fit.
const BUFFER_BYTES_MAX: usize = 256 << 10;

/// The bytes of a file of at most `bytes_max`; `None` if there is none. A symbolic link is no file
/// of ours.
pub(super) fn read(io: &Arc<dyn Io>, path: &Path, bytes_max: u64) -> Result<Option<Vec<u8>>> {
    if super::stat_file(&**io, path)?.is_none() {
        return Ok(None);
    }
    let file = match io.open(path, OpenMode::ReadSmall) {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(EngineError::from_io("opening", path, error)),
    };
    // Asked of the descriptor: the name may mean another file by now.
    let stat = rustix::fs::fstat(&file.descriptor)
        .map_err(io::Error::from)
        .context("asking the length of", path)?;
    let file_bytes = u64::try_from(stat.st_size).unwrap_or(0);
    if file_bytes > bytes_max {
        return Err(EngineError::corrupt(
            path.display(),
            format!("it has {file_bytes} bytes, and at most {bytes_max} are expected"),
        ));
    }
    let file_bytes = usize::try_from(file_bytes)
        .map_err(|_| EngineError::internal("reading a record", "it exceeds the address space"))?;
    read_all(io, &file, file_bytes).context("reading", path).map(Some)
}

/// Writes a new file and makes its bytes durable; its name is not durable yet. A file of this name
/// is a leftover of the same attempt, and goes.
pub(super) fn write_new(io: &Arc<dyn Io>, path: &Path, bytes: &[u8]) -> Result<()> {
    let file = match io.open(path, OpenMode::CreateSmall) {
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {
            match io.entry(&EntryOp::RemoveFile(path.into())) {
                Err(error) if error.kind() != ErrorKind::NotFound => {
                    return Err(EngineError::from_io("replacing", path, error));
                }
                _ => {}
            }
            io.open(path, OpenMode::CreateSmall)
        }
        opened => opened,
    }
    .context("creating", path)?;
    write_all(io, &file, bytes).context("writing", path)?;
    io.sync(&file).context("syncing", path)
}

fn write_all(io: &Arc<dyn Io>, file: &Arc<File>, bytes: &[u8]) -> io::Result<()> {
    let mut buffer = take_buffer(bytes.len())?;
    let mut offset = 0;
    for piece in bytes.chunks(buffer.len()) {
        buffer[..piece.len()].copy_from_slice(piece);
        let outcome;
        (outcome, buffer) = transfer::write_fully(io, file, offset, buffer, 0..piece.len());
        outcome?;
        offset += piece.len() as u64;
    }
    Ok(())
}

fn read_all(io: &Arc<dyn Io>, file: &Arc<File>, file_bytes: usize) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(file_bytes);
    let mut buffer = take_buffer(file_bytes)?;
    while bytes.len() < file_bytes {
        let piece_bytes = buffer.len().min(file_bytes - bytes.len());
        let offset = bytes.len() as u64;
        let outcome;
        (outcome, buffer) = transfer::read_fully(io, file, offset, buffer, 0..piece_bytes);
        outcome?;
        bytes.extend_from_slice(&buffer[..piece_bytes]);
    }
    Ok(bytes)
}

fn take_buffer(record_bytes: usize) -> io::Result<Buffer> {
    let buffer_bytes = record_bytes.clamp(1, BUFFER_BYTES_MAX).next_multiple_of(ALIGNMENT);
    Ok(BufferPool::new(buffer_bytes, 1)?.take())
}
