//! Tensors to a safetensors file.
//!
//! ```text
//! checkpoint -> windows -> parts (this thread) -> write (a thread) -> sync -> rename
//! ```
//!
//! Always holds: the file gets its name only when it is whole and durable; what fails leaves
//! nothing behind.

use std::collections::BTreeSet;
use std::fs::{File, TryLockError};
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Instant;

use dtr_engine::config::{DirectIo, IoBackend};
use dtr_engine::error::IoContext;
use dtr_engine::format::tree::Value;
use dtr_engine::io::{EntryOp, open_backend};
use dtr_engine::load::Checkpoint;
use dtr_engine::{EngineError, Result};
use rustix::fs::{Mode, OFlags};

use super::selection::{Selected, select};
use super::{Options, Restored, header};
use crate::console::note;
use crate::progress::Bar;
use crate::stream::{self, PART_BYTES};
use crate::text;
use crate::view::View;
use crate::windows::Windows;

/// Parts in memory: one being read, one being written.
const PARTS: usize = 2;

/// Writes the selected tensors.
pub(super) fn restore(checkpoint: &Checkpoint, options: &Options) -> Result<Restored> {
    let start = Instant::now();
    let tensors = select(
        checkpoint.index(),
        &options.tensors,
        &options.exclude,
        options.strip_prefix.as_deref(),
    )?;
    let header = header::encode(&tensors, checkpoint.step())?;
    let views: Vec<View> = tensors.iter().map(|tensor| View::of(tensor.record)).collect();
    let raw_bytes = views.iter().map(View::bytes).sum();

    let draft = Draft::create(&options.output)?;
    draft.write(&header)?;
    let bar = Bar::new(raw_bytes, "restoring");
    write_tensors(checkpoint, &tensors, &views, &draft, &bar)?;
    draft.publish(&options.output, options.force)?;
    drop(bar);
    say_what_is_missing(checkpoint, &tensors);
    Ok(Restored {
        step: checkpoint.step(),
        rank: checkpoint.header().rank,
        output: options.output.clone(),
        kind: "file",
        tensors: tensors.len() as u64,
        raw_bytes,
        disk_bytes: header.len() as u64 + raw_bytes,
        seconds: start.elapsed().as_secs_f64(),
    })
}

/// Reads part after part, while another thread writes the one before.
fn write_tensors(
    checkpoint: &Checkpoint,
    tensors: &[Selected<'_>],
    views: &[View],
    draft: &Draft,
    bar: &Bar,
) -> Result<()> {
    let wanted: BTreeSet<u32> = views.iter().map(|view| view.storage).collect();
    let windows = Windows::new(checkpoint, |storage| wanted.contains(&storage));
    let items = tensors.iter().map(|tensor| tensor.record.item_bytes);
    let lengths = views.iter().map(View::bytes).zip(items);
    let (to_writer, filled) = sync_channel::<Vec<u8>>(PARTS);
    let (to_reader, empty) = sync_channel::<Vec<u8>>(PARTS);
    std::thread::scope(|scope| {
        let writer = scope.spawn(move || write_parts(draft, filled, &to_reader, bar));
        let read = (0..PARTS).map(|_| Vec::new()).chain(empty.iter());
        let result = read_parts(&windows, views, lengths, read, &to_writer);
        drop(to_writer);
        drop(empty);
        let written = writer.join().unwrap_or_else(|_| {
            Err(EngineError::internal("writing a safetensors file", "the writing thread panicked"))
        });
        // If writing failed, reading merely stopped.
        written.and(result)
    })
}

fn read_parts(
    windows: &Windows<'_>,
    views: &[View],
    lengths: impl Iterator<Item = (u64, u32)>,
    memories: impl Iterator<Item = Vec<u8>>,
    to_writer: &SyncSender<Vec<u8>>,
) -> Result<()> {
    for (part, mut memory) in stream::plan(lengths, PART_BYTES).zip(memories) {
        memory.resize(stream::part_bytes(&part), 0);
        stream::read(windows, views, &part, &mut memory)?;
        if to_writer.send(memory).is_err() {
            break;
        }
    }
    Ok(())
}

fn write_parts(
    draft: &Draft,
    filled: Receiver<Vec<u8>>,
    to_reader: &SyncSender<Vec<u8>>,
    bar: &Bar,
) -> Result<()> {
    for memory in filled {
        draft.write(&memory)?;
        bar.advance(memory.len() as u64);
        // The reader may have read all there is.
        let _finished = to_reader.send(memory);
    }
    Ok(())
}

/// A file under a name of its own, locked, and removed unless it is published. One that a process
/// left which was killed is written anew.
struct Draft {
    file: File,
    path: PathBuf,
}

impl Draft {
    fn create(output: &Path) -> Result<Self> {
        let name = output.file_name().unwrap_or_default().to_string_lossy();
        let path = output.with_file_name(format!(".{name}.tmp"));
        loop {
            let file = create_or_open(&path).context("creating", &path)?;
            file.try_lock().map_err(|error| busy(&path, error))?;
            // Whoever held the lock may have published the file, or removed it.
            if is_still(&file, &path).context("looking at", &path)? {
                file.set_len(0).context("emptying", &path)?;
                return Ok(Self { file, path });
            }
        }
    }

    fn write(&self, bytes: &[u8]) -> Result<()> {
        (&self.file).write_all(bytes).context("writing", &self.path)
    }

    /// Makes it durable and gives it its name.
    fn publish(&self, output: &Path, replace: bool) -> Result<()> {
        self.file.sync_all().context("syncing", &self.path)?;
        let io = open_backend(IoBackend::Threads, DirectIo::Off)?;
        let (from, to) = (self.path.clone(), output.to_owned());
        let rename = if replace {
            EntryOp::RenameReplace { from, to }
        } else {
            EntryOp::RenameNew { from, to }
        };
        io.entry(&rename).context("renaming the finished file to", output)?;
        let parent = match output.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        io.entry(&EntryOp::SyncDir(parent.into())).context("syncing directory", parent)?;
        Ok(())
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        // Once published, there is nothing of this name.
        let _published = std::fs::remove_file(&self.path);
    }
}

/// Through no link, and without waiting for whoever may read a pipe.
fn create_or_open(path: &Path) -> io::Result<File> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::CLOEXEC;
    let careful = OFlags::NOFOLLOW | OFlags::NONBLOCK;
    Ok(rustix::fs::open(path, flags | careful, Mode::from_raw_mode(0o666))?.into())
}

/// Whether `path` names this file.
fn is_still(file: &File, path: &Path) -> io::Result<bool> {
    let ours = file.metadata()?;
    match std::fs::symlink_metadata(path) {
        Ok(there) => Ok((there.dev(), there.ino()) == (ours.dev(), ours.ino())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

fn busy(path: &Path, error: TryLockError) -> EngineError {
    match error {
        TryLockError::WouldBlock => EngineError::StoreBusy {
            what: format!("writing `{}`", path.display()),
            why: "another process writes it".into(),
            hint: "wait for that process or stop it, or choose another name".into(),
        },
        TryLockError::Error(error) => EngineError::from_io("locking", path, error),
    }
}

/// A reader of the file must not take it for the whole state.
fn say_what_is_missing(checkpoint: &Checkpoint, tensors: &[Selected<'_>]) {
    let index = checkpoint.index();
    let storages: BTreeSet<u32> = tensors.iter().map(|tensor| tensor.record.storage).collect();
    if storages.len() < tensors.len() {
        note(&format!(
            "tensors that share memory in the checkpoint are written once per name: {} for {}",
            text::count(tensors.len(), "tensor"),
            text::count(storages.len(), "storage")
        ));
    }
    let is_plain = |value: &Value| !value.is_container() && !matches!(value, Value::Tensor(_));
    let plain = index.nodes.iter().filter(|node| is_plain(&node.value)).count();
    if plain > 0 {
        note(&format!(
            "{} of the state are not in the file, which holds tensors only",
            text::count(plain, "plain value")
        ));
    }
}
