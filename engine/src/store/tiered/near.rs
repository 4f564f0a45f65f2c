//! A shard in the near store, of which the far one may have a copy.
//!
//! Always holds: the near shard is what is read; the far one is asked only for what was damaged.

use std::sync::Arc;

use crate::io::buffer::Buffer;
use crate::store::{ReadDone, ShardId, ShardSource, Store};
use crate::{EngineError, Result};

#[derive(Debug)]
pub(super) struct NearShard {
    pub(super) near: Box<dyn ShardSource>,
    pub(super) far: Arc<dyn Store>,
    pub(super) shard: ShardId,
}

impl ShardSource for NearShard {
    fn name(&self) -> String {
        self.near.name()
    }

    fn file_bytes(&self) -> u64 {
        self.near.file_bytes()
    }

    fn read(&self, offset: u64, buffer: Buffer, bytes: usize, done: ReadDone) {
        self.near.read(offset, buffer, bytes, done);
    }

    fn map(&self) -> Result<memmap2::MmapMut> {
        self.near.map()
    }

    fn second(&self) -> Result<Option<Box<dyn ShardSource>>> {
        match self.far.open_shard(self.shard) {
            Ok(copy) => Ok(Some(copy)),
            Err(EngineError::NotFound { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }
}
