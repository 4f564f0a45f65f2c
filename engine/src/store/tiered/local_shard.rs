//! A shard in the local store, of which the remote one may have a copy.
//!
//! Always holds: the local shard is what is read; the remote one is asked only for what was
//! damaged.

use std::sync::Arc;

use crate::io::buffer::Buffer;
use crate::store::{ReadDone, ShardId, ShardSource, Store};
use crate::{EngineError, Result};

#[derive(Debug)]
pub(super) struct LocalShard {
    pub(super) local: Box<dyn ShardSource>,
    pub(super) remote: Arc<dyn Store>,
    pub(super) shard: ShardId,
}

impl ShardSource for LocalShard {
    fn name(&self) -> String {
        self.local.name()
    }

    fn file_bytes(&self) -> u64 {
        self.local.file_bytes()
    }

    fn read(&self, offset: u64, buffer: Buffer, bytes: usize, done: ReadDone) {
        self.local.read(offset, buffer, bytes, done);
    }

    fn map(&self) -> Result<memmap2::MmapMut> {
        self.local.map()
    }

    fn second(&self) -> Result<Option<Box<dyn ShardSource>>> {
        match self.remote.open_shard(self.shard) {
            Ok(copy) => Ok(Some(copy)),
            Err(EngineError::NotFound { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }
}
