//! Reading a shard back.
//!
//! Always holds: an open shard can be read to its end whatever becomes of its name, but for one
//! that another machine deletes on NFS (`ESTALE`); `done` runs exactly once for each read, whatever
//! happens.

use std::sync::Arc;

use super::{Shared, map};
use crate::error::IoContext;
use crate::io::buffer::Buffer;
use crate::io::{Direction, File, OpenMode, Transfer, transfer};
use crate::store::{ReadDone, ShardId, ShardSource};
use crate::{EngineError, Result};

/// An open shard.
#[derive(Debug)]
pub(super) struct LocalShardSource {
    shared: Arc<Shared>,
    file: Arc<File>,
    file_bytes: u64,
}

impl LocalShardSource {
    pub(super) fn open(shared: &Arc<Shared>, id: ShardId) -> Result<Self> {
        let path = shared.shard_path(id);
        let missing = || EngineError::NotFound {
            what: format!("opening shard `{}`", path.display()),
            why: "there is no such file".into(),
            hint: "the checkpoint was deleted or replaced meanwhile: list the store again".into(),
        };
        let Some(metadata) = super::stat_file(&*shared.io, &path)? else {
            return Err(missing());
        };
        let file = shared.io.open(&path, OpenMode::Read).map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => missing(),
            _ => EngineError::from_io("opening shard", &path, error),
        })?;
        Ok(Self { shared: Arc::clone(shared), file, file_bytes: metadata.len() })
    }
}

impl ShardSource for LocalShardSource {
    fn name(&self) -> String {
        self.file.path.display().to_string()
    }

    fn file_bytes(&self) -> u64 {
        self.file_bytes
    }

    fn read(&self, offset: u64, buffer: Buffer, bytes: usize, done: ReadDone) {
        if let Err(error) = self.shared.check_process("reading a shard") {
            return done(Err(error), buffer);
        }
        let file = Arc::clone(&self.file);
        let path = self.file.path.clone();
        transfer::transfer_fully(
            &self.shared.io,
            Transfer {
                file,
                offset,
                buffer,
                range: 0..bytes,
                direction: Direction::Read,
                done: Box::new(move |outcome, buffer| {
                    let outcome = outcome.map(drop).map_err(|error| {
                        let operation = format!("reading {bytes} bytes at offset {offset} of");
                        match error.kind() {
                            std::io::ErrorKind::UnexpectedEof => EngineError::corrupt(
                                path.display(),
                                format!("it ends before the {bytes} bytes at offset {offset}"),
                            ),
                            _ => EngineError::from_io(&operation, &path, error),
                        }
                    });
                    done(outcome, buffer);
                }),
            },
        );
    }

    fn map(&self) -> Result<memmap2::MmapMut> {
        map::map_private(&self.file.descriptor).context("mapping", &self.file.path)
    }
}
