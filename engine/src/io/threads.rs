//! The backend for where io_uring is refused: threads that each do one transfer at a time.
//!
//! Always holds: dropping the backend finishes everything that was submitted and then joins the
//! threads; in a forked child, where they do not exist, dropping touches nothing.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;

use super::inbox::{Inbox, complete};
use super::{EntryOp, EntryReply, File, Io, Length, OpenMode, Transfer, files};
use crate::config::DirectIo;

/// Settings of [`Threads`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct Options {
    /// How many transfers run at once. At least 1.
    pub(crate) threads: usize,
    /// Whether the page cache is bypassed.
    pub(crate) direct_io: DirectIo,
}

impl Default for Options {
    /// Eight threads: as many as chunks of 4 MiB are in flight by default.
    fn default() -> Self {
        Self { threads: 8, direct_io: DirectIo::Auto }
    }
}

/// A pool of threads.
#[derive(Debug)]
pub(crate) struct Threads {
    inbox: Arc<Inbox>,
    workers: Vec<JoinHandle<()>>,
    direct_io: DirectIo,
}

impl Threads {
    /// Starts the threads.
    pub(crate) fn new(options: Options) -> io::Result<Self> {
        let mut threads = Self {
            inbox: Arc::new(Inbox::new()),
            workers: Vec::with_capacity(options.threads),
            direct_io: options.direct_io,
        };
        for index in 0..options.threads.max(1) {
            let inbox = Arc::clone(&threads.inbox);
            let builder = std::thread::Builder::new().name(format!("dtr-io-{index}"));
            // On an error, dropping `threads` ends those already started.
            threads.workers.push(builder.spawn(move || serve(&inbox))?);
        }
        Ok(threads)
    }
}

fn serve(inbox: &Inbox) {
    while let Some(mut transfer) = inbox.next() {
        let outcome = files::attempt(&mut transfer);
        let advice = match outcome {
            Ok(moved_bytes) => files::write_behind(&transfer, moved_bytes),
            Err(_) => Vec::new(),
        };
        let file = Arc::clone(&transfer.file);
        complete(transfer, outcome);
        // After the callback: nobody should wait for advice.
        files::advise_write_behind(&file, &advice);
    }
}

impl Io for Threads {
    fn name(&self) -> &'static str {
        "threads"
    }

    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Arc<File>> {
        files::open(path, mode, self.direct_io)
    }

    fn submit(&self, transfer: Transfer) {
        self.inbox.push(transfer);
    }

    fn set_length(&self, file: &File, length: Length) -> io::Result<()> {
        files::set_length(file, length)
    }

    fn sync(&self, file: &File) -> io::Result<()> {
        files::sync(file)
    }

    fn entry(&self, operation: &EntryOp) -> io::Result<EntryReply> {
        files::entry(operation)
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        let workers = std::mem::take(&mut self.workers);
        if !self.inbox.is_owner() {
            // The threads are the parent's, and a lock may be held by one of them forever.
            std::mem::forget(workers);
            std::mem::forget(Arc::clone(&self.inbox));
            return;
        }
        self.inbox.close();
        for worker in workers {
            // The last owner may be a callback, on one of these very threads, which ends by itself.
            if worker.thread().id() != std::thread::current().id() && worker.join().is_err() {
                tracing::error!("an io thread panicked");
            }
        }
    }
}
