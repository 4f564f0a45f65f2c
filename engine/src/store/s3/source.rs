//! Reading a shard back, by ranges.
//!
//! Always holds: exactly the bytes that are asked for are fetched; `done` runs exactly once for
//! each read, whatever happens.

use std::sync::Arc;

use super::Shared;
use super::error::Failure;
use crate::io::buffer::Buffer;
use crate::store::{ReadDone, ShardId, ShardSource};
use crate::{EngineError, Result};

/// A shard in the bucket.
#[derive(Clone, Debug)]
pub(super) struct S3ShardSource {
    shared: Arc<Shared>,
    key: String,
    file_bytes: u64,
}

impl S3ShardSource {
    pub(super) fn open(shared: &Arc<Shared>, id: ShardId) -> Result<Self> {
        let key = shared.shard_key(id);
        let what = shared.naming("opening shard", &key);
        let Some(file_bytes) = shared.ask(&what, shared.length(&key))? else {
            return Err(missing(what));
        };
        Ok(Self { shared: Arc::clone(shared), key, file_bytes })
    }
}

impl ShardSource for S3ShardSource {
    fn name(&self) -> String {
        format!("s3://{}/{}", self.shared.address.bucket(), self.key)
    }

    fn file_bytes(&self) -> u64 {
        self.file_bytes
    }

    fn read(&self, offset: u64, buffer: Buffer, bytes: usize, done: ReadDone) {
        if let Err(error) = self.shared.check_process("reading a shard") {
            return done(Err(error), buffer);
        }
        let (shared, key) = (Arc::clone(&self.shared), self.key.clone());
        self.shared.client.spawn(async move {
            let mut buffer = buffer;
            let outcome = shared.get_range(&key, offset, &mut buffer[..bytes]).await;
            let outcome = outcome.map_err(|failure| {
                let doing = format!("reading {bytes} bytes at offset {offset} of");
                unread(&shared, shared.naming(&doing, &key), failure)
            });
            done(outcome, buffer);
        });
    }

    fn map(&self) -> Result<memmap2::MmapMut> {
        Err(EngineError::invalid(
            format!("mapping `{}`", self.name()),
            "it is no file on this machine",
            "load without `mmap=True`, or copy the checkpoint to a directory first",
        ))
    }

    // What was damaged on its way comes whole the next time.
    fn second(&self) -> Result<Option<Box<dyn ShardSource>>> {
        Ok(Some(Box::new(self.clone())))
    }
}

fn unread(shared: &Shared, what: String, failure: Failure) -> EngineError {
    match failure.status {
        // Deleted meanwhile; or shorter than its index says.
        404 if failure.is_missing() => missing(what),
        416 => EngineError::Corrupt {
            what,
            why: "it ends before that".into(),
            hint: "restore another step, or run `ckpt-tool verify` to see what is damaged".into(),
        },
        _ => shared.refused(&what, failure),
    }
}

fn missing(what: String) -> EngineError {
    EngineError::NotFound {
        what,
        why: "there is no such object".into(),
        hint: "the checkpoint was deleted or replaced meanwhile: list the store again".into(),
    }
}
