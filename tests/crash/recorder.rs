//! A backend that writes down every operation that changes something, with the bytes it writes.
//!
//! Always holds: an operation is in the log if it was performed, a write also while it is on its
//! way; a sync is in the log once it has succeeded, with the writes that had ended when it began:
//! it covers no others. After [`Recorder::kill_at`] nothing is performed from that position on, as
//! if the process were gone.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

use dtr_engine::io::{Direction, EntryOp, EntryReply, File, Io, Length, OpenMode, Transfer};

const EIO: i32 = 5;

/// A file, by the order of creation: a name may mean several, one after the other.
pub(crate) type FileId = usize;

/// One operation that changed something. Paths are relative to the directory that is watched.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Op {
    MakeDir(PathBuf),
    Create(PathBuf, FileId),
    Write {
        file: FileId,
        offset: u64,
        bytes: Vec<u8>,
    },
    SetLength(FileId, Length),
    /// Covers the writes at these positions of the log, and every length set before.
    Sync(FileId, Vec<usize>),
    SyncDir(PathBuf),
    Rename {
        from: PathBuf,
        to: PathBuf,
    },
    RemoveFile(PathBuf),
    RemoveDir(PathBuf),
}

/// The backend.
#[derive(Debug)]
pub(crate) struct Recorder {
    inner: Arc<dyn Io>,
    root: PathBuf,
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    log: Vec<Op>,
    /// Writes that have ended well, by position.
    ended: Vec<usize>,
    files: BTreeMap<PathBuf, FileId>,
    created: FileId,
    kill_at: Option<usize>,
}

impl Recorder {
    /// Watches what happens below `root`.
    pub(crate) fn new(inner: Arc<dyn Io>, root: &Path) -> Arc<Self> {
        Arc::new(Self { inner, root: root.to_owned(), state: Arc::default() })
    }

    pub(crate) fn log(&self) -> Vec<Op> {
        lock(&self.state).log.clone()
    }

    pub(crate) fn position(&self) -> usize {
        lock(&self.state).log.len()
    }

    /// Nothing happens any more once the log is this long; `None`: everything does again.
    pub(crate) fn kill_at(&self, position: Option<usize>) {
        lock(&self.state).kill_at = position;
    }

    fn alive(&self) -> io::Result<MutexGuard<'_, State>> {
        let state = lock(&self.state);
        if state.kill_at.is_some_and(|position| state.log.len() >= position) {
            return Err(io::Error::from_raw_os_error(EIO));
        }
        Ok(state)
    }

    fn relative(&self, path: &Path) -> PathBuf {
        path.strip_prefix(&self.root).expect("all happens below the root").to_owned()
    }

    fn file_id(&self, file: &File) -> FileId {
        lock(&self.state).files[&self.relative(&file.path)]
    }

    /// Performs `work` and writes `op` down if it succeeds.
    fn perform<T>(&self, op: Op, work: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        drop(self.alive()?);
        let result = work()?;
        let mut state = lock(&self.state);
        if let Op::Rename { from, to } = &op
            && let Some(id) = state.files.remove(from)
        {
            state.files.insert(to.clone(), id);
        }
        state.log.push(op);
        Ok(result)
    }

    fn changes(&self, operation: &EntryOp) -> Option<Op> {
        Some(match operation {
            EntryOp::CreateDir(path) => Op::MakeDir(self.relative(path)),
            EntryOp::SyncDir(path) => Op::SyncDir(self.relative(path)),
            EntryOp::RenameNew { from, to } | EntryOp::RenameReplace { from, to } => {
                Op::Rename { from: self.relative(from), to: self.relative(to) }
            }
            EntryOp::RemoveFile(path) => Op::RemoveFile(self.relative(path)),
            EntryOp::RemoveDir(path) => Op::RemoveDir(self.relative(path)),
            EntryOp::List(_) | EntryOp::Stat(_) | EntryOp::Space(_) => return None,
        })
    }
}

impl Io for Recorder {
    fn name(&self) -> &'static str {
        "recorder"
    }

    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Arc<File>> {
        drop(self.alive()?);
        let file = self.inner.open(path, mode)?;
        if matches!(mode, OpenMode::Create | OpenMode::CreateSmall) {
            let path = self.relative(path);
            let mut state = lock(&self.state);
            let id = state.created;
            state.created += 1;
            state.files.insert(path.clone(), id);
            state.log.push(Op::Create(path, id));
        }
        Ok(file)
    }

    fn submit(&self, transfer: Transfer) {
        let mut state = match self.alive() {
            Ok(state) => state,
            Err(error) => return (transfer.done)(Err(error), transfer.buffer),
        };
        if transfer.direction == Direction::Read {
            drop(state);
            return self.inner.submit(transfer);
        }
        let position = state.log.len();
        let file = state.files[&self.relative(&transfer.file.path)];
        let bytes = transfer.buffer[transfer.range.clone()].to_vec();
        let wanted = bytes.len();
        state.log.push(Op::Write { file, offset: transfer.offset, bytes });
        drop(state);
        let shared = Arc::clone(&self.state);
        let done = transfer.done;
        self.inner.submit(Transfer {
            done: Box::new(move |outcome, buffer| {
                // A write that was short is a possible one, and its rest is another.
                if outcome.as_ref().is_ok_and(|moved| *moved == wanted) {
                    lock(&shared).ended.push(position);
                }
                done(outcome, buffer);
            }),
            ..transfer
        });
    }

    fn set_length(&self, file: &File, length: Length) -> io::Result<()> {
        let op = Op::SetLength(self.file_id(file), length);
        self.perform(op, || self.inner.set_length(file, length))
    }

    fn sync(&self, file: &File) -> io::Result<()> {
        let mut covered = lock(&self.state).ended.clone();
        covered.sort_unstable();
        self.perform(Op::Sync(self.file_id(file), covered), || self.inner.sync(file))
    }

    fn entry(&self, operation: &EntryOp) -> io::Result<EntryReply> {
        if let Some(op) = self.changes(operation) {
            return self.perform(op, || self.inner.entry(operation));
        }
        drop(self.alive()?);
        self.inner.entry(operation)
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap()
}
