//! Which operations a save is made of, in which order, and what is left when any one of them fails.

use std::collections::BTreeSet;
use std::io;

use super::*;
use crate::io::{Direction, File, Length, OpenMode, Transfer};

/// Passes operations on, writes them down, and fails some.
#[derive(Debug)]
struct Watched {
    inner: Arc<dyn Io>,
    state: Mutex<Watch>,
}

#[derive(Debug, Default)]
struct Watch {
    log: Vec<String>,
    fault: Option<Fault>,
    /// Every sync of a file fails from now on.
    fail_syncs: bool,
    struck: bool,
}

#[derive(Clone, Copy, Debug)]
struct Fault {
    /// Position of the operation that fails.
    at: usize,
    /// It and all later ones.
    forever: bool,
    /// It is done first, and only the reply is lost.
    done: bool,
    kind: Errno,
}

impl Watched {
    fn new(fault: Option<Fault>) -> Arc<Self> {
        let state = Mutex::new(Watch { fault, ..Watch::default() });
        Arc::new(Self { inner: threads(), state })
    }

    /// Writes an operation down; says whether it is to fail, and whether it is done first.
    fn enter(&self, operation: &str, path: &Path) -> Option<Fault> {
        let mut state = self.state.lock().unwrap();
        let position = state.log.len();
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned());
        state.log.push(format!("{operation} {}", name.unwrap_or_default()));
        let fault = state
            .fault
            .filter(|fault| position == fault.at || (fault.forever && position > fault.at));
        state.struck |= fault.is_some();
        fault
    }

    fn run<T>(
        &self,
        operation: &str,
        path: &Path,
        work: impl FnOnce() -> io::Result<T>,
    ) -> io::Result<T> {
        match self.enter(operation, path) {
            None => work(),
            Some(fault) => {
                if fault.done {
                    let _lost_reply = work();
                }
                Err(fault.kind.into())
            }
        }
    }
}

impl Io for Watched {
    fn name(&self) -> &'static str {
        "watched"
    }

    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Arc<File>> {
        self.run(&format!("open {mode:?}"), path, || self.inner.open(path, mode))
    }

    fn submit(&self, transfer: Transfer) {
        let operation = match transfer.direction {
            Direction::Read => "read",
            Direction::Write => "write",
        };
        match self.enter(operation, &transfer.file.path) {
            None => self.inner.submit(transfer),
            Some(fault) => (transfer.done)(Err(fault.kind.into()), transfer.buffer),
        }
    }

    fn set_length(&self, file: &File, length: Length) -> io::Result<()> {
        let operation = match length {
            Length::Reserve(_) => "reserve",
            Length::Exact(_) => "length",
        };
        self.run(operation, &file.path, || self.inner.set_length(file, length))
    }

    fn sync(&self, file: &File) -> io::Result<()> {
        self.run("sync", &file.path, || {
            if self.state.lock().unwrap().fail_syncs {
                return Err(Errno::IO.into());
            }
            self.inner.sync(file)
        })
    }

    fn entry(&self, operation: &EntryOp) -> io::Result<EntryReply> {
        let (name, path) = match operation {
            EntryOp::CreateDir(path) => ("mkdir", path),
            EntryOp::SyncDir(path) => ("syncdir", path),
            EntryOp::RenameNew { from, .. } => ("rename new", from),
            EntryOp::RenameReplace { from, .. } => ("rename replace", from),
            EntryOp::RemoveFile(path) => ("unlink", path),
            EntryOp::RemoveDir(path) => ("rmdir", path),
            EntryOp::List(path) => ("list", path),
            EntryOp::Stat(path) => ("stat", path),
            EntryOp::Space(path) => ("space", path),
        };
        self.run(name, path, || self.inner.entry(operation))
    }
}

fn open(path: &Path, io: &Arc<Watched>) -> Result<LocalStore> {
    let io: Arc<dyn Io> = Arc::<Watched>::clone(io);
    LocalStore::open(path, Access::Write, io, IN_FLIGHT_BYTES)
}

fn log_of(path: &Path, work: impl FnOnce(&LocalStore)) -> Vec<String> {
    let io = Watched::new(None);
    let store = open(path, &io).unwrap();
    io.state.lock().unwrap().log.clear();
    work(&store);
    std::mem::take(&mut io.state.lock().unwrap().log)
}

#[test]
fn a_commit_makes_each_thing_durable_before_what_names_it() {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path().join("store");
    let shard_name = names::shard_file_name(0, A);
    let temporary = names::manifest_temporary_name(A);
    let step = names::step_dir_name(2);

    let log = log_of(&root, |store| {
        save(store, shard(2, A), None, &pattern(SHARD_BYTES)).unwrap();
    });
    let expected = [
        format!("mkdir {step}"),
        "syncdir store".into(),
        format!("open Create {shard_name}"),
        format!("reserve {shard_name}"),
        format!("write {shard_name}"),
        format!("length {shard_name}"),
        format!("sync {shard_name}"),
        format!("syncdir {step}"),
        format!("stat {shard_name}"),
        "stat manifest.json".into(),
        format!("open CreateSmall {temporary}"),
        format!("write {temporary}"),
        format!("sync {temporary}"),
        format!("rename new {temporary}"),
        format!("syncdir {step}"),
    ];
    assert_eq!(log, expected);
}

#[test]
fn a_deletion_makes_the_loss_of_the_manifest_durable_first() {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path().join("store");
    save(&writer(&root), shard(2, A), None, &pattern(SHARD_BYTES)).unwrap();
    let log = log_of(&root, |store| {
        store.remove_checkpoint(2, None, Space::Now).unwrap();
    });
    let changes: Vec<&String> = log.iter().filter(|line| !line.starts_with("stat")).collect();
    let (step, shard_name) = (names::step_dir_name(2), names::shard_file_name(0, A));
    let expected = [
        format!("list {step}"),
        // What is seen is made durable, once, before anything goes because of it.
        "list store".into(),
        format!("syncdir {step}"),
        "unlink manifest.json".into(),
        format!("syncdir {step}"),
        format!("unlink {shard_name}"),
        format!("rmdir {step}"),
        "syncdir store".into(),
    ];
    assert_eq!(changes, expected.iter().collect::<Vec<_>>());
}

#[test]
fn retention_tells_a_sync_that_failed_after_the_directory_had_gone() {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path().join("store");
    save(&writer(&root), shard(2, A), None, &pattern(SHARD_BYTES)).unwrap();
    let removes = |store: &LocalStore| store.remove_checkpoint(2, None, Space::Later);
    let log = log_of(&root, |store| assert!(removes(store).unwrap() > 0));
    assert_eq!(log.last().unwrap(), "syncdir store");
    save(&writer(&root), shard(2, A), None, &pattern(SHARD_BYTES)).unwrap();
    let kind = Errno::IO;
    let io = Watched::new(None);
    let store = open(&root, &io).unwrap();
    let at = io.state.lock().unwrap().log.len() + log.len() - 1;
    io.state.lock().unwrap().fault = Some(Fault { at, forever: false, done: false, kind });
    assert!(matches!(removes(&store), Err(EngineError::Io { .. })));
    assert!(!store.shared.step_directory(2).exists());
}

#[test]
fn every_new_directory_is_durable_in_its_parent() {
    let directory = tempfile::tempdir().unwrap();
    let io = Watched::new(None);
    open(&directory.path().join("a/b"), &io).unwrap();
    let log = io.state.lock().unwrap().log.clone();
    let parent = directory.path().file_name().unwrap().to_string_lossy().into_owned();
    let synced = format!("syncdir {parent}");
    let expected = ["mkdir b", "mkdir a", &synced, "mkdir b", "syncdir a", "list b"];
    assert_eq!(log, expected);
}

/// Saves step 2 beside step 1, or over it, with one fault; returns whether the fault struck.
fn save_under_fault(fault: Fault, overwrite: bool) -> bool {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("store");
    let bytes = pattern(12 * ALIGNMENT);
    save(&writer(&path), shard(1, A), None, &bytes).unwrap();

    let (id, replaces) = if overwrite { (shard(1, B), Some(A)) } else { (shard(2, B), None) };
    let io = Watched::new(Some(fault));
    let saved = open(&path, &io).and_then(|store| save(&store, id, replaces, &bytes));
    let struck = io.state.lock().unwrap().struck;
    let log = io.state.lock().unwrap().log.clone();
    let case = format!("{fault:?}, overwrite {overwrite}, {saved:?}, {log:#?}");
    if let Err(error) = &saved {
        assert!(matches!(error, EngineError::Io { .. } | EngineError::NoSpace { .. }), "{case}");
        assert!(!error.hint().is_empty(), "{case}");
        assert!(struck, "{case}");
    }
    assert!(!log.is_empty());
    let syncs: Vec<&String> = log.iter().filter(|line| line.starts_with("sync rank")).collect();
    assert!(syncs.len() <= 1, "never synced again: {case}");

    // As the next process finds it.
    let store = writer(&path);
    let survey = survey_of(&store);
    let committed = survey.committed_steps();
    let damaged = survey.steps.iter().any(|step| matches!(step.state, StepState::Damaged { .. }));
    assert!(!damaged, "{case}, {survey:#?}");
    assert!(committed.contains(&1), "{case}, {survey:#?}");
    let new_stands = survey
        .step(id.step)
        .is_some_and(|step| step.attempt == Some(B) && step.state == StepState::Committed);
    assert!(saved.is_err() || new_stands, "{case}, {survey:#?}");
    if new_stands {
        assert!(read_shard(&store, id) == bytes, "{case}");
    }
    if !(overwrite && new_stands) {
        assert!(read_shard(&store, shard(1, A)) == bytes, "{case}");
    }
    // Whatever is left goes, and the step can be saved.
    for orphan in survey.steps.iter().flat_map(|step| &step.orphans) {
        assert!(
            store.remove_orphan(orphan.step, &orphan.file, Space::Now).unwrap().is_some(),
            "{case}"
        );
    }
    let standing = survey.step(id.step).and_then(|step| step.attempt);
    let third = ShardId { attempt: AttemptId([0xcc; 16]), ..id };
    save(&store, third, standing, &bytes).unwrap();
    struck
}

#[test]
fn any_one_failure_leaves_the_checkpoint_before_and_nothing_half_visible() {
    let mut cases = BTreeSet::new();
    for kind in [Errno::IO, Errno::NOSPC, Errno::DQUOT, Errno::EXIST] {
        for (forever, done, overwrite) in
            (0..8).map(|bits| (bits & 1 > 0, bits & 2 > 0, bits & 4 > 0))
        {
            for at in 0.. {
                if !save_under_fault(Fault { at, forever, done, kind }, overwrite) {
                    cases.insert(at);
                    break;
                }
            }
        }
    }
    assert!(*cases.first().unwrap() > 15, "{cases:?}");
}

#[test]
fn writes_in_flight_are_bounded_and_a_failed_one_is_told_once_and_for_all() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("store");
    let io = Watched::new(None);
    let store = open(&path, &io).unwrap();
    let flow = flow();
    let mut sink = store.create_shard(shard(1, A), sized(0), &flow).unwrap();
    let at = io.state.lock().unwrap().log.len() + 1;
    io.state.lock().unwrap().fault =
        Some(Fault { at, forever: false, done: false, kind: Errno::IO });
    let mut failure = None;
    for index in 0..100 {
        let written = sink.write(index * 32768, filled(&pattern(32768)));
        assert!(flow.read().in_flight_bytes <= IN_FLIGHT_BYTES);
        if let Err(error) = written {
            failure = Some(error);
            break;
        }
    }
    let failure = failure.expect("the failure is told before all is written").to_string();
    assert!(failure.contains("writing 32768 bytes at offset 32768 of"), "{failure}");
    assert_eq!(sink.write(0, filled(&[1; 4096])).unwrap_err().to_string(), failure);
    assert_eq!(sink.finish(32768).unwrap_err().to_string(), failure);
    sink.abandon();
    assert_eq!(store.list().unwrap(), []);
}

/// A new store in a directory of its own, and what happens to it.
fn watched() -> (tempfile::TempDir, Arc<Watched>, LocalStore) {
    let directory = tempfile::tempdir().unwrap();
    let io = Watched::new(None);
    let store = open(&directory.path().join("store"), &io).unwrap();
    (directory, io, store)
}

/// More than two syncs' worth, so that it is synced while it is written.
const LARGE_BYTES: u64 = 64 * IN_FLIGHT_BYTES;

/// The flow of a shard that nobody waits for before its end.
fn captured() -> Arc<Flow> {
    let flow = flow();
    flow.captured();
    flow
}

/// Writes pieces of a large shard over and over until `ended` says so.
fn write_until(sink: &mut dyn ShardSink, ended: impl Fn() -> bool) -> Result<()> {
    let piece = pattern(4 * ALIGNMENT);
    for offset in (0..LARGE_BYTES).step_by(piece.len()).cycle() {
        if ended() {
            break;
        }
        sink.write(offset, filled(&piece))?;
    }
    Ok(())
}

#[test]
fn a_large_shard_is_synced_while_it_is_written_and_once_more_in_the_end() {
    let (_directory, io, store) = watched();
    let mut sink = store.create_shard(shard(1, A), sized(LARGE_BYTES), &captured()).unwrap();
    let name = names::shard_file_name(0, A);
    let sync = format!("sync {name}");
    write_until(sink.as_mut(), || io.state.lock().unwrap().log.contains(&sync)).unwrap();
    sink.finish(LARGE_BYTES).unwrap();
    let log = std::mem::take(&mut io.state.lock().unwrap().log);
    let last_write = log.iter().rposition(|operation| operation.starts_with("write")).unwrap();
    let step = names::step_dir_name(1);
    // An early one may have begun after the last write as well.
    let end = log.iter().rposition(|operation| operation.starts_with("length")).unwrap();
    assert!(log[last_write + 1..end].iter().all(|operation| *operation == sync), "{log:?}");
    assert_eq!(log[end..], [format!("length {name}"), sync, format!("syncdir {step}")]);
}

#[test]
fn an_early_sync_that_fails_fails_the_shard_and_is_its_last() {
    let (_directory, io, store) = watched();
    io.state.lock().unwrap().fail_syncs = true;
    let mut sink = store.create_shard(shard(1, A), sized(LARGE_BYTES), &captured()).unwrap();
    let failure = write_until(sink.as_mut(), || false).unwrap_err().to_string();
    assert!(failure.contains("syncing"), "{failure}");
    io.state.lock().unwrap().fail_syncs = false;
    assert_eq!(sink.write(0, filled(&[1; 4096])).unwrap_err().to_string(), failure);
    assert_eq!(sink.finish(LARGE_BYTES).unwrap_err().to_string(), failure);
    sink.abandon();
    let log = std::mem::take(&mut io.state.lock().unwrap().log);
    let syncs = log.iter().filter(|operation| operation.starts_with("sync rank")).count();
    assert_eq!(syncs, 1, "{log:?}");
    assert_eq!(store.list().unwrap(), []);
}

#[test]
fn a_shard_that_is_given_up_ends_its_early_sync_first() {
    let (_directory, io, store) = watched();
    let mut sink = store.create_shard(shard(1, A), sized(LARGE_BYTES), &captured()).unwrap();
    let sync = format!("sync {}", names::shard_file_name(0, A));
    write_until(sink.as_mut(), || io.state.lock().unwrap().log.contains(&sync)).unwrap();
    drop(sink);
    let log = std::mem::take(&mut io.state.lock().unwrap().log);
    let unlink = log.iter().position(|operation| operation.starts_with("unlink")).unwrap();
    assert!(!log[unlink..].contains(&sync), "{log:?}");
    assert_eq!(store.list().unwrap(), []);
}

#[test]
fn nothing_is_synced_early_while_the_training_waits_for_the_device() {
    let (_directory, io, store) = watched();
    let flow = flow();
    let mut sink = store.create_shard(shard(1, A), sized(LARGE_BYTES), &flow).unwrap();
    let sync = format!("sync {}", names::shard_file_name(0, A));
    let is_synced = || io.state.lock().unwrap().log.contains(&sync);
    let written = std::cell::Cell::new(0);
    let enough = || {
        written.set(written.get() + 1);
        written.get() > 2 * LARGE_BYTES / (4 * ALIGNMENT as u64)
    };
    write_until(sink.as_mut(), enough).unwrap();
    assert!(!is_synced());
    flow.captured();
    write_until(sink.as_mut(), is_synced).unwrap();
    sink.abandon();
}
