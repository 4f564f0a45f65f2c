//! The files of an export while they are written, under other names.
//!
//! Always holds: what fails leaves no file behind; what a process left which was killed is removed
//! by the next one; few files are open at a time, however many there are, and none that was written
//! to is closed before it is durable.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use dtr_engine::error::IoContext;
use dtr_engine::{EngineError, Result};
use rustix::fs::{FallocateFlags, Mode, OFlags};

use super::export::{Export, Role};
use super::lead::Lead;
use crate::text;

/// Files open at a time. Tensors are written in about the order of files, so that few are opened
/// again.
const OPEN_MAX: usize = 32;

/// Drafts of an export's files.
#[derive(Debug)]
pub(super) struct Drafts<'e> {
    pub(super) export: &'e Export,
    pub(super) lead: Lead,
    /// How many there are.
    pub(super) count: usize,
    /// By number; the most recently used last.
    open: Vec<(usize, File)>,
}

impl<'e> Drafts<'e> {
    /// None yet: takes the name, in a directory that is there.
    pub(super) fn create(export: &'e Export) -> Result<Self> {
        let lead = Lead::create(export.lead())?;
        for left in export.found()?.iter().filter(|found| found.role == Role::Draft) {
            std::fs::remove_file(&left.path)
                .context("removing what was left unfinished,", &left.path)?;
        }
        Ok(Self { export, lead, count: 0, open: Vec::new() })
    }

    /// Adds one that is `bytes` long, of so many in all. Takes that room, where the file system
    /// can: a disk that is too small is told before anything is read.
    pub(super) fn add(&mut self, bytes: u64, bytes_in_all: u64) -> Result<()> {
        let (number, path) = (self.count, self.export.draft(self.count));
        let new = OFlags::CREATE | OFlags::EXCL;
        let file = open_carefully(&path, new).context("creating", &path)?;
        self.count += 1;
        allocate(&file, bytes, &path).map_err(|error| no_room(error, bytes_in_all))?;
        self.keep_open(number, file)
    }

    pub(super) fn write(&mut self, number: usize, at: u64, bytes: &[u8]) -> Result<()> {
        let done = self.file(number)?.write_all_at(bytes, at);
        done.map_err(|error| self.failed("writing", number, error))
    }

    pub(super) fn read(&mut self, number: usize, at: u64, bytes: &mut [u8]) -> Result<()> {
        let done = self.file(number)?.read_exact_at(bytes, at);
        done.map_err(|error| self.failed("reading back", number, error))
    }

    /// Makes all of them durable.
    pub(super) fn sync(&mut self) -> Result<()> {
        while !self.open.is_empty() {
            self.close_first()?;
        }
        Ok(())
    }

    fn file(&mut self, number: usize) -> Result<&File> {
        if let Some(at) = self.open.iter().rposition(|(of, _)| *of == number) {
            self.open[at..].rotate_left(1);
        } else {
            let path = self.export.draft(number);
            let file = open_carefully(&path, OFlags::empty()).context("opening", &path)?;
            self.keep_open(number, file)?;
        }
        let (_, file) = self.open.last().expect("it was just put there");
        Ok(file)
    }

    fn keep_open(&mut self, number: usize, file: File) -> Result<()> {
        if self.open.len() == OPEN_MAX {
            self.close_first()?;
        }
        self.open.push((number, file));
        Ok(())
    }

    /// Closes the one that was not used for longest. Whoever opens it again is not told of what
    /// could not be written before.
    fn close_first(&mut self) -> Result<()> {
        let (number, file) = self.open.remove(0);
        file.sync_all().map_err(|error| self.failed("syncing", number, error))
    }

    /// Written runs can be a few bytes each: a path is made where one is told.
    fn failed(&self, doing: &str, number: usize, error: io::Error) -> EngineError {
        EngineError::from_io(doing, &self.export.draft(number), error)
    }
}

impl Drop for Drafts<'_> {
    fn drop(&mut self) {
        for number in 0..self.count {
            // Once published, there is nothing of this name.
            let _published = std::fs::remove_file(self.export.draft(number));
        }
    }
}

/// Through no link, and without waiting for whoever may read a pipe.
pub(super) fn open_carefully(path: &Path, how: OFlags) -> io::Result<File> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
    Ok(rustix::fs::open(path, flags | how, Mode::from_raw_mode(0o666))?.into())
}

fn allocate(file: &File, bytes: u64, path: &Path) -> Result<()> {
    let allocate = || rustix::fs::fallocate(file, FallocateFlags::empty(), 0, bytes);
    match rustix::io::retry_on_intr(allocate) {
        Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => Ok(()),
        done => done.map_err(io::Error::from).context("allocating room for", path),
    }
}

/// The engine's advice is for stores; these are files, of so many bytes.
fn no_room(error: EngineError, bytes: u64) -> EngineError {
    match error {
        EngineError::NoSpace { what, why, .. } => EngineError::NoSpace {
            what,
            why: format!("{why}, and it takes {}", text::bytes(bytes)),
            hint: "free space there, name a place on another disk, or choose fewer `--tensors`"
                .into(),
        },
        other => other,
    }
}

/// Makes a directory with its parents, each durable in its own.
pub(super) fn make_directory(path: &Path) -> Result<()> {
    let Some(parent) = path.parent().filter(|_| !path.is_dir()) else { return Ok(()) };
    let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
    make_directory(parent)?;
    match std::fs::create_dir(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            Err(EngineError::from_io("creating directory", path, error))
        }
        _ => sync_directory(parent),
    }
}

pub(super) fn sync_directory(path: &Path) -> Result<()> {
    let opened = File::open(path).and_then(|directory| directory.sync_all());
    opened.context("syncing directory", path)
}
