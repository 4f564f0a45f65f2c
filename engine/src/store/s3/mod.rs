//! Checkpoints in a bucket of S3, or of a service that speaks its protocol.
//!
//! ```text
//! s3://<bucket>/<prefix>/step-000000001000/manifest.json      its existence commits the checkpoint
//!                                          rank-00000.<attempt>.shard
//! s3://<bucket>/<prefix>/conditional-put.probe                empty; whether conditions are obeyed
//! ```
//!
//! Always holds:
//! - Only keys that our own rules make are listed, read, or deleted.
//! - A reader writes and deletes nothing.
//! - A manifest is put after its shards exist whole, under a condition that lets only one
//!   writer win; whatever the answer to that was, what stands afterwards decides.
//! - A shard whose manifest may still become visible, because an answer was lost, is not deleted.
//! - In a forked child every call is refused, and dropping anything waits for nobody.
//!
//! There is no lock in a bucket: two writers of one step are kept apart by the condition, and those
//! of one store by the operator who starts them. `docs/durability.md` describes what is promised.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::time::SystemTime;

use super::flow::Flow;
use super::{
    Access, FileListing, Publication, ShardId, ShardSink, ShardSize, ShardSource, Space,
    StepListing, Store, UnfinishedUpload,
};
use crate::config::{S3Address, S3Credentials, S3Settings};
use crate::format::FormatError;
use crate::format::manifest::{MANIFEST_BYTES_MAX, Manifest};
use crate::format::names::{self, AttemptId};
use crate::sync::unpoisoned;
use crate::{EngineError, Result};

mod client;
mod error;
mod flight;
mod objects;
mod parts;
mod publish;
mod remove;
mod sink;
mod source;
mod uploads;

use client::Client;
use error::Failure;
use objects::{Asked, Object};

/// Small requests of one kind that are under way at a time.
const REQUESTS_AT_ONCE: usize = 32;

/// A store in a bucket.
#[derive(Debug)]
pub(crate) struct S3Store {
    shared: Arc<Shared>,
    access: Access,
}

/// What the store, its sinks and its sources have in common.
#[derive(Debug)]
struct Shared {
    address: S3Address,
    client: Client,
    /// Whether the service obeys conditions on writes, once that was found out.
    obeys_conditions: OnceLock<bool>,
    /// Whether the service checks whole objects that came in parts, once that was found out.
    checks_whole_objects: OnceLock<bool>,
    own: Mutex<Own>,
}

/// What this process is at.
#[derive(Debug, Default)]
struct Own {
    /// Shards that are being written, or are written and not yet released.
    live: HashSet<(u64, String)>,
    /// Attempts whose manifest may yet become visible.
    uncertain: HashSet<AttemptId>,
}

impl S3Store {
    /// Opens a store. Asks the service for one page of it, so that whatever keeps the two apart is
    /// reported here and now.
    pub(crate) fn open(
        address: &S3Address,
        access: Access,
        settings: &S3Settings,
        credentials: Option<S3Credentials>,
    ) -> Result<Self> {
        let shared = Shared {
            address: address.clone(),
            client: Client::new(settings, credentials)?,
            obeys_conditions: OnceLock::new(),
            checks_whole_objects: OnceLock::new(),
            own: Mutex::default(),
        };
        let store = Self { shared: Arc::new(shared), access };
        let what = format!("opening store `{address}`");
        let prefix = address.key("step-");
        store.shared.ask(&what, store.shared.look(&prefix))?;
        Ok(store)
    }

    fn list_below(&self, prefix: &str) -> Result<Vec<StepListing>> {
        let what = format!("listing `{}`", self.location());
        let objects = self.shared.ask(&what, self.shared.list_objects(prefix))?;
        let mut steps: Vec<StepListing> = Vec::new();
        for object in objects {
            let Some((step, name)) = self.shared.parse_key(&object.key) else { continue };
            let file = FileListing { name, bytes: object.bytes, modified: object.modified };
            match steps.last_mut() {
                Some(last) if last.step == step => last.files.push(file),
                _ => steps.push(StepListing { step, files: vec![file], unlisted: None }),
            }
        }
        // By key they came; beyond twelve digits that is not by step.
        steps.sort_by_key(|step| step.step);
        Ok(steps)
    }

    fn writer(&self, what: &str) -> Result<()> {
        self.shared.check_process(what)?;
        if self.access != Access::Read {
            return Ok(());
        }
        Err(EngineError::read_only(what, self.location()))
    }
}

impl Store for S3Store {
    fn location(&self) -> String {
        self.shared.address.to_string()
    }

    fn list(&self) -> Result<Vec<StepListing>> {
        // Our own directories alone begin so: other things below the prefix cost nothing.
        self.list_below(&self.shared.address.key("step-"))
    }

    fn list_step(&self, step: u64) -> Result<Option<StepListing>> {
        Ok(self.list_below(&self.shared.file_key(step, ""))?.pop())
    }

    fn read_manifest(&self, step: u64) -> Result<Option<Vec<u8>>> {
        let what = self.shared.naming("reading", &self.shared.manifest_key(step));
        let object = self.shared.ask(&what, self.shared.get_manifest(step))?;
        object.map(|object| self.shared.bounded_manifest(step, object)).transpose()
    }

    fn read_manifests(&self, steps: &[u64]) -> Vec<Result<Option<Vec<u8>>>> {
        if let Err(error) = self.shared.check_process("reading manifests") {
            return vec![Err(error)];
        }
        let each = Arc::clone(&self.shared);
        let objects = self.shared.at_once(steps.to_vec(), move |step| {
            let shared = Arc::clone(&each);
            async move { shared.get_manifest(step).await }
        });
        let read = |(asked, &step): (Asked<Option<Object>>, &u64)| {
            let what = self.shared.naming("reading", &self.shared.manifest_key(step));
            let object = asked.map_err(|failure| self.shared.refused(&what, failure))?;
            object.map(|object| self.shared.bounded_manifest(step, object)).transpose()
        };
        objects.into_iter().zip(steps).map(read).collect()
    }

    fn create_shard(
        &self,
        shard: ShardId,
        size: ShardSize,
        flow: &Arc<Flow>,
    ) -> Result<Box<dyn ShardSink>> {
        self.writer("creating a shard")?;
        Ok(Box::new(sink::S3ShardSink::new(&self.shared, shard, size, flow)))
    }

    fn keeps_what_arrived(&self) -> bool {
        true
    }

    fn resume_shard(
        &self,
        shard: ShardId,
        size: ShardSize,
        flow: &Arc<Flow>,
    ) -> Result<Box<dyn ShardSink>> {
        self.writer("creating a shard")?;
        Ok(Box::new(sink::S3ShardSink::resuming(&self.shared, shard, size, flow)))
    }

    fn open_shard(&self, shard: ShardId) -> Result<Box<dyn ShardSource>> {
        Ok(Box::new(source::S3ShardSource::open(&self.shared, shard)?))
    }

    fn publish(&self, publication: Publication<'_>) -> Result<()> {
        self.writer("publishing a checkpoint")?;
        publish::publish(&self.shared, publication)
    }

    fn unpublish(&self, step: u64, attempt: AttemptId, replaced: Option<&[u8]>) -> Result<()> {
        self.writer("taking back a manifest")?;
        if replaced.is_some() {
            return Err(EngineError::internal(
                format!("taking back step {step}, attempt {attempt}, in `{}`", self.location()),
                "a bucket is no rank's own store: what it replaced is not known",
            ));
        }
        remove::take_back(&self.shared, step, attempt)
    }

    // A service gives space back by itself.
    fn remove_checkpoint(&self, step: u64, only: Option<AttemptId>, _space: Space) -> Result<u64> {
        self.writer("deleting a checkpoint")?;
        remove::remove_checkpoint(&self.shared, step, only)
    }

    fn remove_orphan(&self, step: u64, file: &str, _space: Space) -> Result<Option<u64>> {
        self.writer("deleting an object")?;
        remove::remove_orphan(&self.shared, step, file)
    }

    fn unfinished_uploads(&self, step: Option<u64>) -> Result<Vec<UnfinishedUpload>> {
        uploads::unfinished(&self.shared, step)
    }

    fn abort_upload(&self, upload: &UnfinishedUpload) -> Result<bool> {
        self.writer("giving up an upload")?;
        uploads::abort_unfinished(&self.shared, upload)
    }

    fn free_bytes(&self) -> Result<Option<u64>> {
        Ok(None)
    }

    fn close_after_fork(&self) {
        // Nothing of the service's is locked, and connections are the parent's: they end with it.
    }

    fn interrupt(&self) {
        self.shared.client.interrupt();
    }

    fn now(&self) -> Result<SystemTime> {
        if let Some(now) = self.shared.client.watch.now() {
            return Ok(now);
        }
        let what = format!("asking the time of `{}`", self.location());
        let prefix = self.shared.address.key("step-");
        self.shared.ask(&what, self.shared.look(&prefix))?;
        self.shared.client.watch.now().ok_or_else(|| {
            let failure = Failure::new("the service's answers have no `Date`");
            self.shared.refused(&what, failure)
        })
    }
}

impl Shared {
    fn manifest_key(&self, step: u64) -> String {
        self.file_key(step, names::MANIFEST_FILE)
    }

    fn shard_key(&self, shard: ShardId) -> String {
        self.file_key(shard.step, &names::shard_file_name(shard.rank, shard.attempt))
    }

    fn file_key(&self, step: u64, file: &str) -> String {
        self.address.key(&format!("{}/{file}", names::step_dir_name(step)))
    }

    /// Step and file of a key of ours.
    fn parse_key(&self, key: &str) -> Option<(u64, String)> {
        let root = self.address.key("");
        let (step, file) = key.strip_prefix(&root)?.split_once('/')?;
        let step = names::parse_step_dir(step)?;
        is_own_name(file).then(|| (step, file.to_owned()))
    }

    /// An operation with the key that it is on, for messages.
    fn naming(&self, doing: &str, key: &str) -> String {
        format!("{doing} `s3://{}/{key}`", self.address.bucket())
    }

    /// Waits for a request, and says of what it failed.
    fn ask<T>(&self, what: &str, request: impl Future<Output = Asked<T>>) -> Result<T> {
        self.check_process(what)?;
        self.client.block_on(request).map_err(|failure| self.refused(what, failure))
    }

    /// Makes a request for each of `items`, some at a time. Outcomes are in their order.
    fn at_once<I, T, F>(&self, items: Vec<I>, request: impl Fn(I) -> F) -> Vec<T>
    where
        T: Send + 'static,
        F: Future<Output = T> + Send + 'static,
    {
        let mut outcomes = Vec::with_capacity(items.len());
        let mut items = items.into_iter().peekable();
        self.client.block_on(async {
            while items.peek().is_some() {
                let some = items.by_ref().take(REQUESTS_AT_ONCE);
                let tasks: Vec<_> = some.map(|item| tokio::spawn(request(item))).collect();
                for task in tasks {
                    outcomes.push(task.await.expect("requests do not panic"));
                }
            }
        });
        outcomes
    }

    /// Waits for a request whose failure the caller judges.
    fn ask_raw<T>(&self, what: &str, request: impl Future<Output = Asked<T>>) -> Result<Asked<T>> {
        self.check_process(what)?;
        Ok(self.client.block_on(request))
    }

    fn refused(&self, what: &str, failure: Failure) -> EngineError {
        let has_answer = failure.status != 0;
        let error = failure.into_error(what);
        match error {
            // Nobody answered: where did we call?
            EngineError::Unavailable { what, why, hint } if !has_answer => {
                let why = format!("{why} (endpoint {})", self.client.endpoint());
                EngineError::Unavailable { what, why, hint }
            }
            error => error,
        }
    }

    /// A step's manifest. One that does not decode is believed only if it comes twice the same: it
    /// may have been changed on its way.
    async fn get_manifest(&self, step: u64) -> Asked<Option<Object>> {
        let key = self.manifest_key(step);
        let bytes_max = usize::try_from(MANIFEST_BYTES_MAX).unwrap_or(usize::MAX);
        let mut object = self.get(&key, bytes_max).await?;
        for _ in 1..self.client.settings.attempts {
            let Some(first) = &object else { break };
            if !matches!(Manifest::decode(&first.bytes), Err(FormatError::Damaged(_))) {
                break;
            }
            let again = self.get(&key, bytes_max).await?;
            let is_same = again.as_ref().is_some_and(|again| again.bytes == first.bytes);
            object = again;
            if is_same {
                break;
            }
        }
        Ok(object)
    }

    fn bounded_manifest(&self, step: u64, object: Object) -> Result<Vec<u8>> {
        if object.bytes.len() as u64 <= MANIFEST_BYTES_MAX {
            return Ok(object.bytes);
        }
        Err(EngineError::corrupt(
            format!("s3://{}/{}", self.address.bucket(), self.manifest_key(step)),
            format!("it has more than {MANIFEST_BYTES_MAX} bytes"),
        ))
    }

    fn own(&self) -> MutexGuard<'_, Own> {
        // Every critical section is one call of a set's.
        unpoisoned(self.own.lock())
    }

    /// Refuses work in a fork of the process that opened the store.
    fn check_process(&self, what: &str) -> Result<()> {
        if self.client.in_owner() {
            return Ok(());
        }
        Err(EngineError::forked(what, &self.address, self.client.process()))
    }
}

/// Whether a writer of ours gives objects of a step this name.
fn is_own_name(name: &str) -> bool {
    name == names::MANIFEST_FILE || names::parse_shard_file(name).is_some()
}
