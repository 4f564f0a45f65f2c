//! The files of an export while they are written, under other names.
//!
//! Always holds: a process that has drafts holds the export's name, until they are gone; what fails
//! leaves no file behind; what a process left which was killed is removed or put back by the next
//! one; few files are open at a time, however many there are, and none that was written to is
//! closed before it is durable.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use dtr_engine::error::IoContext;
use dtr_engine::{EngineError, Result};
use rustix::fs::{FallocateFlags, Mode, OFlags};

use super::export::{Export, Found, Role};
use super::lead::Lead;
use super::publish;
use crate::text;

/// Files open at a time. Tensors are written in about the order of files, so that few are opened
/// again.
const OPEN_MAX: usize = 32;

/// Drafts of an export's files.
#[derive(Debug)]
pub(super) struct Drafts<'a> {
    export: &'a Export,
    /// Outlives what is done when drafts are dropped.
    _lead: Lead,
    /// Bytes of all files, for messages.
    bytes_in_all: u64,
    /// By number.
    all: Vec<Draft<'a>>,
    /// By number; the most recently used last.
    open: Vec<(usize, File)>,
}

#[derive(Clone, Copy, Debug)]
struct Draft<'a> {
    /// The bytes it begins with.
    start: &'a [u8],
    /// Whether they are in it.
    is_begun: bool,
}

impl<'a> Drafts<'a> {
    /// None yet: takes the name, in a directory that is there, and repairs what was left of it. The
    /// files will take so many bytes in all.
    pub(super) fn create(export: &'a Export, bytes_in_all: u64) -> Result<Self> {
        let lead = Lead::create(export.lead()).map_err(|error| no_room(error, bytes_in_all))?;
        let left = export.found()?;
        for found in left.iter().filter(|found| found.role == Role::Draft) {
            remove_left(found)?;
        }
        publish::repair(export, &left)?;
        Ok(Self { export, _lead: lead, bytes_in_all, all: Vec::new(), open: Vec::new() })
    }

    /// Adds one that is `bytes` long and begins with these. Takes that room, where the file system
    /// can: a disk that is too small is reported before anything is read. It is not written to yet,
    /// for few files can stay open, and closing one makes it durable.
    pub(super) fn add(&mut self, start: &'a [u8], bytes: u64) -> Result<()> {
        let path = self.export.draft(self.all.len());
        let new = open_hidden(&path, OFlags::CREATE | OFlags::EXCL);
        let file = new.map_err(|error| self.explain(error))?;
        self.all.push(Draft { start, is_begun: false });
        allocate(&file, bytes, &path).map_err(|error| self.explain(error))
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
        for number in 0..self.all.len() {
            // One without tensors, or whose tensors have no items.
            if !self.all[number].is_begun {
                self.file(number)?;
            }
        }
        while !self.open.is_empty() {
            self.close_first()?;
        }
        Ok(())
    }

    fn file(&mut self, number: usize) -> Result<&File> {
        if let Some(at) = self.open.iter().rposition(|(of, _)| *of == number) {
            self.open[at..].rotate_left(1);
        } else {
            self.open_again(number)?;
        }
        let (_, file) = self.open.last().expect("it was just put there");
        Ok(file)
    }

    fn open_again(&mut self, number: usize) -> Result<()> {
        let path = self.export.draft(number);
        let file = open_carefully(&path, OFlags::empty()).context("opening", &path)?;
        let Draft { start, is_begun } = self.all[number];
        if !is_begun {
            let begun = file.write_all_at(start, 0);
            begun.map_err(|error| self.failed("writing", number, error))?;
            self.all[number].is_begun = true;
        }
        self.keep_open(number, file)
    }

    fn keep_open(&mut self, number: usize, file: File) -> Result<()> {
        if self.open.len() == OPEN_MAX {
            self.close_first()?;
        }
        self.open.push((number, file));
        Ok(())
    }

    /// Closes the one that was not used for longest. Opening it again does not
    /// report what could not be written before.
    fn close_first(&mut self) -> Result<()> {
        let (number, file) = self.open.remove(0);
        file.sync_all().map_err(|error| self.failed("syncing", number, error))
    }

    /// Written runs can be a few bytes each: a path is made only for a message.
    fn failed(&self, doing: &str, number: usize, error: io::Error) -> EngineError {
        self.explain(EngineError::from_io(doing, &self.export.draft(number), error))
    }

    pub(super) fn explain(&self, error: EngineError) -> EngineError {
        no_room(error, self.bytes_in_all)
    }
}

impl Drop for Drafts<'_> {
    fn drop(&mut self) {
        for number in 0..self.all.len() {
            // Once published, there is nothing of this name.
            let _published = std::fs::remove_file(self.export.draft(number));
        }
    }
}

/// Removes what a process left which was killed, and nothing that it cannot have left.
pub(super) fn remove_left(found: &Found) -> Result<()> {
    if found.in_the_way.is_some() {
        return Err(in_the_way(&found.path));
    }
    let removed = std::fs::remove_file(&found.path);
    removed.context("removing what was left unfinished,", &found.path)
}

/// Opens a hidden file of ours, which may be new.
pub(super) fn open_hidden(path: &Path, how: OFlags) -> Result<File> {
    let is_file = |path: &Path| path.symlink_metadata().is_ok_and(|found| found.is_file());
    match open_carefully(path, how) {
        // A pipe opens like a file.
        Ok(file) if file.metadata().is_ok_and(|found| found.is_file()) => Ok(file),
        Err(error) if is_file(path) || !path.is_symlink() && !path.exists() => {
            Err(EngineError::from_io("creating", path, error))
        }
        _ => Err(in_the_way(path)),
    }
}

fn in_the_way(path: &Path) -> EngineError {
    EngineError::Io {
        what: format!("creating `{}`", path.display()),
        source: io::Error::new(io::ErrorKind::AlreadyExists, "it exists, and is not a file"),
        hint: format!("remove `{}`, or choose another name", path.display()),
    }
}

/// Through no link, and without waiting for a reader of a pipe.
fn open_carefully(path: &Path, how: OFlags) -> io::Result<File> {
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

/// The engine's advice on a full disk is for stores; these are files, of so many bytes.
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

#[cfg(test)]
mod tests {
    use super::*;

    /// How many of this process's files are in a directory.
    fn open_in(directory: &Path) -> usize {
        let open = std::fs::read_dir("/proc/self/fd").unwrap();
        let paths = open.flat_map(|entry| std::fs::read_link(entry.unwrap().path()));
        paths.filter(|path| path.starts_with(directory)).count()
    }

    #[test]
    fn few_files_are_open_and_none_before_it_is_written() {
        let scratch = tempfile::tempdir().unwrap();
        let (directory, count) = (scratch.path(), 3 * OPEN_MAX);
        let export = Export::within(directory);
        let mut drafts = Drafts::create(&export, 0).unwrap();
        for _ in 0..count {
            drafts.add(b"start", 8).unwrap();
        }
        // What is closed with something in it is synced.
        assert_eq!(open_in(directory), 1, "the lead only");
        for number in 0..count - 1 {
            drafts.write(number, 5, b"end").unwrap();
            assert!(open_in(directory) <= 1 + OPEN_MAX);
        }
        drafts.sync().unwrap();
        assert_eq!(open_in(directory), 1);
        let read = |number| std::fs::read(export.draft(number)).unwrap();
        assert!((0..count - 1).all(|number| read(number) == b"startend"));
        assert_eq!(read(count - 1), b"start\0\0\0");
    }

    #[test]
    fn a_full_disk_is_told_with_what_helps_here() {
        let scratch = tempfile::tempdir().unwrap();
        let export = Export::within(scratch.path());
        let mut drafts = Drafts::create(&export, 5_000_000_000).unwrap();
        drafts.add(b"{}", 4096).unwrap();
        let room = std::fs::metadata(export.draft(0)).unwrap().len();
        assert_eq!(room, 4096, "taken before anything is written");
        for doing in ["writing", "syncing"] {
            let error = drafts.failed(doing, 0, io::Error::from_raw_os_error(28));
            assert!(matches!(error, EngineError::NoSpace { .. }));
            assert!(error.to_string().contains("and it takes 5.00 GB"), "{error}");
            assert!(error.hint().starts_with("free space there, name a place"), "{error}");
        }
    }
}
