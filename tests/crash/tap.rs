//! A backend that notifies a watcher of every operation, before and after, and changes none.
//!
//! Always holds: operations are numbered from 0 as they begin, on whatever thread; `before` runs on
//! the caller's thread before anything is done, `after` once the outcome is known and before anyone
//! else knows it. A watcher may keep a thread from going on forever.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use dtr_engine::io::sim::OpKind;
use dtr_engine::io::{EntryOp, EntryReply, File, Io, Length, OpenMode, Transfer};

/// One operation.
#[derive(Clone, Debug)]
pub(crate) struct Operation {
    pub(crate) number: u64,
    pub(crate) kind: OpKind,
    /// The file or directory; of a rename, the target.
    pub(crate) path: PathBuf,
}

/// What is notified.
pub(crate) trait Watcher: Send + Sync + fmt::Debug {
    fn before(&self, operation: &Operation);
    fn after(&self, operation: &Operation, error: Option<&io::Error>);
}

/// The backend.
#[derive(Debug)]
pub(crate) struct Tap<W> {
    inner: Arc<dyn Io>,
    watcher: Arc<W>,
    begun: AtomicU64,
}

impl<W: Watcher> Tap<W> {
    pub(crate) fn new(inner: Arc<dyn Io>, watcher: &Arc<W>) -> Arc<Self> {
        Arc::new(Self { inner, watcher: Arc::clone(watcher), begun: AtomicU64::new(0) })
    }

    /// How many operations have begun.
    pub(crate) fn begun(&self) -> u64 {
        self.begun.load(Ordering::SeqCst)
    }

    fn begin(&self, kind: OpKind, path: &Path) -> Operation {
        let number = self.begun.fetch_add(1, Ordering::SeqCst);
        let operation = Operation { number, kind, path: path.to_owned() };
        self.watcher.before(&operation);
        operation
    }

    fn perform<T>(
        &self,
        kind: OpKind,
        path: &Path,
        work: impl FnOnce() -> io::Result<T>,
    ) -> io::Result<T> {
        let operation = self.begin(kind, path);
        let outcome = work();
        self.watcher.after(&operation, outcome.as_ref().err());
        outcome
    }
}

impl<W: Watcher + 'static> Io for Tap<W> {
    fn name(&self) -> &'static str {
        self.inner.name()
    }

    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Arc<File>> {
        self.perform(OpKind::Open(mode), path, || self.inner.open(path, mode))
    }

    fn submit(&self, transfer: Transfer) {
        let operation = self.begin(OpKind::Transfer(transfer.direction), &transfer.file.path);
        let watcher = Arc::clone(&self.watcher);
        let done = transfer.done;
        self.inner.submit(Transfer {
            done: Box::new(move |outcome, buffer| {
                watcher.after(&operation, outcome.as_ref().err());
                done(outcome, buffer);
            }),
            ..transfer
        });
    }

    fn set_length(&self, file: &File, length: Length) -> io::Result<()> {
        let kind = OpKind::SetLength(length);
        self.perform(kind, &file.path, || self.inner.set_length(file, length))
    }

    fn sync(&self, file: &File) -> io::Result<()> {
        self.perform(OpKind::Sync, &file.path, || self.inner.sync(file))
    }

    fn entry(&self, operation: &EntryOp) -> io::Result<EntryReply> {
        let path = match operation {
            EntryOp::CreateDir(path)
            | EntryOp::SyncDir(path)
            | EntryOp::RemoveFile(path)
            | EntryOp::RemoveDir(path)
            | EntryOp::List(path)
            | EntryOp::Stat(path)
            | EntryOp::Space(path)
            | EntryOp::RenameNew { to: path, .. }
            | EntryOp::RenameReplace { to: path, .. } => path,
        };
        self.perform(OpKind::Entry(operation.clone()), path, || self.inner.entry(operation))
    }
}
