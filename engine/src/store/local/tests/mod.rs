//! The local store on real filesystems, and what it does when any one operation fails.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::symlink;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use super::*;
use crate::config::DirectIo;
use crate::format::checksum::crc32c;
use crate::format::manifest::{FORMAT_VERSION, Manifest, ShardEntry};
use crate::format::names::AttemptId;
use crate::io::buffer::{Buffer, BufferPool};
use crate::io::{ALIGNMENT, threads::Threads, uring::Uring};
use crate::recovery::{ManifestState, StepState, Survey, check_save, survey};
use crate::store::Piece;

mod faults;
pub(in crate::store) mod space;

const IN_FLIGHT_BYTES: u64 = 64 << 10;
/// The shortest shard that a manifest may name: header, index, footer.
const SHARD_BYTES: usize = 3 * ALIGNMENT;
const A: AttemptId = AttemptId([0xaa; 16]);
const B: AttemptId = AttemptId([0xbb; 16]);

fn threads() -> Arc<dyn Io> {
    let options = crate::io::threads::Options { threads: 2, direct_io: DirectIo::Auto };
    Arc::new(Threads::new(options).unwrap())
}

/// Every backend that this kernel allows.
fn backends() -> Vec<Arc<dyn Io>> {
    let uring = Uring::new(crate::io::uring::Options { direct_io: DirectIo::Auto });
    uring.into_iter().map(|uring| Arc::new(uring) as Arc<dyn Io>).chain([threads()]).collect()
}

fn flow() -> Arc<Flow> {
    Arc::new(Flow::new(Arc::new(crate::clock::System::default()), None))
}

fn writer(path: &Path) -> LocalStore {
    LocalStore::open(path, Access::Write, threads(), IN_FLIGHT_BYTES).unwrap()
}

fn shard(step: u64, attempt: AttemptId) -> ShardId {
    ShardId { step, rank: 0, attempt }
}

/// Bytes that depend on their position.
fn pattern(bytes: usize) -> Vec<u8> {
    (0..bytes).map(|index| u8::try_from(index / 7 % 251).unwrap()).collect()
}

fn filled(bytes: &[u8]) -> Piece {
    let mut buffer = BufferPool::new(bytes.len(), 1).unwrap().take();
    buffer.copy_from_slice(bytes);
    Piece { buffer, bytes: bytes.len(), crc32c: crc32c(bytes) }
}

fn sized(bytes: u64) -> ShardSize {
    ShardSize { expected_bytes: bytes, most_bytes: bytes }
}

/// Writes `bytes` in pieces of 16 KiB, the last first, and finishes.
fn write_shard(store: &dyn Store, id: ShardId, bytes: &[u8]) -> Result<Box<dyn ShardSink>> {
    let flow = flow();
    let mut sink = store.create_shard(id, sized(bytes.len() as u64), &flow)?;
    for (index, piece) in bytes.chunks(4 * ALIGNMENT).enumerate().rev() {
        let offset = (index * 4 * ALIGNMENT) as u64;
        if let Err(error) = sink.write(offset, filled(piece)) {
            sink.abandon();
            return Err(error);
        }
    }
    if let Err(error) = sink.finish(bytes.len() as u64) {
        sink.abandon();
        return Err(error);
    }
    assert_eq!(flow.read().in_flight_bytes, 0);
    Ok(sink)
}

fn manifest(id: ShardId, bytes: u64) -> Manifest {
    Manifest {
        attempt: id.attempt.to_string(),
        created_unix_ms: 1,
        dataset_positions: BTreeMap::new(),
        engine_version: "0".into(),
        format_version: FORMAT_VERSION,
        job: "job".into(),
        metadata: BTreeMap::new(),
        retired: Vec::new(),
        shards: vec![ShardEntry {
            bytes,
            file: names::shard_file_name(id.rank, id.attempt),
            footer_crc32c: "00000000".into(),
            rank: id.rank,
            raw_bytes: bytes,
            replicated: Vec::new(),
        }],
        step: id.step,
        world_size: 1,
    }
}

fn publish(store: &dyn Store, id: ShardId, bytes: u64, replaces: Option<AttemptId>) -> Result<()> {
    store.publish(Publication {
        step: id.step,
        attempt: id.attempt,
        manifest: &manifest(id, bytes).encode().unwrap(),
        replaces,
        shards: &[(id, bytes)],
    })
}

/// What the engine does for a save.
fn save(store: &dyn Store, id: ShardId, replaces: Option<AttemptId>, bytes: &[u8]) -> Result<()> {
    let sink = write_shard(store, id, bytes)?;
    let published = publish(store, id, bytes.len() as u64, replaces);
    if published.is_err() {
        sink.abandon();
    }
    published
}

fn survey_of(store: &dyn Store) -> Survey {
    let listing = store.list().unwrap();
    let manifests = listing
        .iter()
        .map(|step| {
            let state = match store.read_manifest(step.step).unwrap() {
                None => ManifestState::Absent,
                Some(bytes) => match Manifest::decode(&bytes) {
                    Ok(manifest) => ManifestState::Valid(Arc::new(manifest)),
                    Err(error) => ManifestState::Damaged(error.to_string()),
                },
            };
            (step.step, state)
        })
        .collect();
    survey(&listing, &manifests, None)
}

fn read_shard(store: &dyn Store, id: ShardId) -> Vec<u8> {
    let source = store.open_shard(id).unwrap();
    let bytes = usize::try_from(source.file_bytes()).unwrap();
    let buffer = BufferPool::new(bytes, 1).unwrap().take();
    let (sender, receiver) = mpsc::channel();
    let done = move |outcome: Result<()>, buffer: Buffer| {
        sender.send(outcome.map(|()| buffer.to_vec())).unwrap();
    };
    source.read(0, buffer, bytes, Box::new(done));
    receiver.recv().unwrap().unwrap()
}

fn names_under(path: &Path) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(path)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn a_checkpoint_is_written_listed_read_and_deleted() {
    for io in backends() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a/b/store");
        let store = LocalStore::open(&path, Access::Write, io, IN_FLIGHT_BYTES).unwrap();
        let id = shard(1000, A);
        let bytes = pattern(40 * ALIGNMENT);
        save(&store, id, None, &bytes).unwrap();

        let listing = store.list().unwrap();
        assert_eq!(listing.len(), 1);
        assert_eq!(listing[0].step, 1000);
        assert_eq!(listing[0].files.len(), 2);
        assert_eq!(listing[0].files[1].bytes, bytes.len() as u64);
        assert_eq!(survey_of(&store).committed_steps(), [1000]);
        let stored = store.read_manifest(1000).unwrap().unwrap();
        assert_eq!(Manifest::decode(&stored).unwrap(), manifest(id, bytes.len() as u64));
        assert!(read_shard(&store, id) == bytes);
        let mut mapped = store.open_shard(id).unwrap().map().unwrap();
        assert!(mapped[..] == bytes[..]);
        mapped[0] ^= 1;
        assert!(read_shard(&store, id) == bytes, "a mapping is private");

        let freed_bytes = store.remove_checkpoint(1000, None, Space::Now).unwrap();
        assert_eq!(freed_bytes, (bytes.len() + stored.len()) as u64);
        assert_eq!(store.list().unwrap(), []);
        assert_eq!(names_under(&path), ["writer.lock"]);
        assert_eq!(store.remove_checkpoint(1000, None, Space::Now).unwrap(), 0);
    }
}

#[test]
fn a_manifest_larger_than_a_buffer_is_whole() {
    let directory = tempfile::tempdir().unwrap();
    let store = writer(directory.path());
    let id = shard(1, A);
    let sink = write_shard(&store, id, &pattern(SHARD_BYTES)).unwrap();
    let mut manifest = manifest(id, SHARD_BYTES as u64);
    manifest.metadata.insert("note".into(), "x".repeat(1_000_003).into());
    let manifest = manifest.encode().unwrap();
    let shards = [(id, SHARD_BYTES as u64)];
    let publication =
        Publication { step: 1, attempt: A, manifest: &manifest, replaces: None, shards: &shards };
    store.publish(publication).unwrap();
    drop(sink);
    assert!(store.read_manifest(1).unwrap().unwrap() == manifest);
}

#[test]
fn publishing_twice_succeeds_and_another_attempt_conflicts() {
    let directory = tempfile::tempdir().unwrap();
    let store = writer(directory.path());
    let bytes = pattern(SHARD_BYTES);
    save(&store, shard(5, A), None, &bytes).unwrap();
    publish(&store, shard(5, A), bytes.len() as u64, None).unwrap();
    publish(&store, shard(5, A), bytes.len() as u64, Some(B)).unwrap();

    let error = save(&store, shard(5, B), None, &bytes).unwrap_err();
    assert!(matches!(error, EngineError::StepConflict { .. }), "{error}");
    assert!(error.to_string().contains(&A.to_string()), "{error}");
    let error = save(&store, shard(5, B), Some(B), &bytes).unwrap_err();
    assert!(matches!(error, EngineError::StepConflict { .. }), "{error}");
    let error = save(&store, shard(6, B), Some(A), &bytes).unwrap_err();
    assert!(matches!(error, EngineError::StepConflict { .. }), "{error}");
    // Losers leave nothing behind, and the winner stands.
    assert_eq!(survey_of(&store).committed_steps(), [5]);
    assert_eq!(names_under(&directory.path().join(names::step_dir_name(5))).len(), 2);
    assert_eq!(names_under(directory.path()).len(), 2);
}

#[test]
fn an_overwritten_checkpoint_leaves_its_shard_as_an_orphan() {
    let directory = tempfile::tempdir().unwrap();
    let store = writer(directory.path());
    save(&store, shard(5, A), None, &pattern(SHARD_BYTES)).unwrap();
    let reader = store.open_shard(shard(5, A)).unwrap();
    save(&store, shard(5, B), Some(A), &pattern(SHARD_BYTES + ALIGNMENT)).unwrap();

    let survey = survey_of(&store);
    assert_eq!(survey.committed_steps(), [5]);
    assert_eq!(survey.steps[0].attempt, Some(B));
    let orphan = &survey.steps[0].orphans[0];
    assert_eq!(orphan.file, names::shard_file_name(0, A));
    assert_eq!(store.remove_orphan(5, &orphan.file, Space::Now).unwrap(), Some(SHARD_BYTES as u64));
    assert_eq!(reader.file_bytes(), SHARD_BYTES as u64);
    let error = store.open_shard(shard(5, A)).unwrap_err();
    assert!(matches!(error, EngineError::NotFound { .. }), "{error}");
    assert_eq!(survey_of(&store).committed_steps(), [5]);
}

#[test]
fn a_damaged_manifest_is_replaced() {
    let directory = tempfile::tempdir().unwrap();
    let store = writer(directory.path());
    save(&store, shard(5, A), None, &pattern(SHARD_BYTES)).unwrap();
    let path = directory.path().join(names::step_dir_name(5)).join(names::MANIFEST_FILE);
    std::fs::write(&path, b"{}").unwrap();
    assert!(matches!(survey_of(&store).steps[0].state, StepState::Damaged { .. }));
    // Nobody knows what it named: nothing of that step is up for cleaning.
    assert_eq!(survey_of(&store).steps[0].orphans, []);
    assert_eq!(store.remove_orphan(5, &names::shard_file_name(0, A), Space::Now).unwrap(), None);
    save(&store, shard(5, B), None, &pattern(SHARD_BYTES)).unwrap();
    assert_eq!(survey_of(&store).committed_steps(), [5]);
}

#[test]
fn a_manifest_in_a_foreign_directory_is_no_checkpoint_and_in_no_ones_way() {
    let directory = tempfile::tempdir().unwrap();
    let store = writer(directory.path());
    save(&store, shard(5, A), None, &pattern(SHARD_BYTES)).unwrap();
    let step = |step| directory.path().join(names::step_dir_name(step));
    std::fs::rename(step(5), step(6)).unwrap();
    let survey = survey_of(&store);
    assert!(matches!(survey.steps[0].state, StepState::Damaged { .. }));
    let replaces = check_save(&survey, 6, false).unwrap().replaces;
    save(&store, shard(6, B), replaces, &pattern(SHARD_BYTES)).unwrap();
    assert_eq!(survey_of(&store).committed_steps(), [6]);
}

#[test]
fn a_manifest_is_published_only_over_complete_shards() {
    let directory = tempfile::tempdir().unwrap();
    let store = writer(directory.path());
    let error = publish(&store, shard(1, A), SHARD_BYTES as u64, None).unwrap_err();
    assert!(matches!(error, EngineError::Io { .. }), "{error}");
    let sink = write_shard(&store, shard(1, A), &pattern(SHARD_BYTES)).unwrap();
    let error = publish(&store, shard(1, A), 2 * SHARD_BYTES as u64, None).unwrap_err();
    assert!(matches!(error, EngineError::Corrupt { .. }), "{error}");
    sink.abandon();
    assert_eq!(store.list().unwrap(), []);
}

#[test]
fn an_abandoned_or_dropped_shard_is_gone_and_a_published_one_stays() {
    let directory = tempfile::tempdir().unwrap();
    let store = writer(directory.path());
    drop(store.create_shard(shard(1, A), sized(1 << 20), &flow()).unwrap());
    assert_eq!(store.list().unwrap(), []);
    store.create_shard(shard(1, A), sized(1 << 20), &flow()).unwrap().abandon();
    assert_eq!(store.list().unwrap(), []);

    let bytes = pattern(SHARD_BYTES);
    let sink = write_shard(&store, shard(1, A), &bytes).unwrap();
    publish(&store, shard(1, A), bytes.len() as u64, None).unwrap();
    sink.abandon();
    assert_eq!(survey_of(&store).committed_steps(), [1]);
}

#[test]
fn a_shard_that_a_copy_left_is_written_anew_unless_somebody_holds_it() {
    let directory = tempfile::tempdir().unwrap();
    let store = writer(directory.path());
    let step = directory.path().join(names::step_dir_name(7));
    std::fs::create_dir(&step).unwrap();
    std::fs::write(step.join(names::shard_file_name(0, A)), [7; 100]).unwrap();
    let sink = store.resume_shard(shard(7, A), sized(4096), &flow()).unwrap();
    let held = store.resume_shard(shard(7, A), sized(4096), &flow()).unwrap_err();
    assert!(matches!(held, EngineError::StoreBusy { .. }), "{held}");
    sink.abandon();
    // One that a manifest names stays.
    save(&store, shard(8, A), None, &pattern(SHARD_BYTES)).unwrap();
    assert!(store.resume_shard(shard(8, A), sized(4096), &flow()).is_err());
    assert_eq!(survey_of(&store).committed_steps(), [8]);
}

#[test]
fn a_checkpoint_of_another_attempt_than_was_looked_at_stays() {
    let directory = tempfile::tempdir().unwrap();
    let store = writer(directory.path());
    save(&store, shard(1, A), None, &pattern(SHARD_BYTES)).unwrap();
    assert_eq!(store.remove_checkpoint(1, Some(B), Space::Now).unwrap(), 0);
    assert_eq!(survey_of(&store).committed_steps(), [1]);
    assert!(store.remove_checkpoint(1, Some(A), Space::Now).unwrap() > 0);
    assert_eq!(store.list().unwrap(), []);
}

#[test]
fn a_shard_in_progress_is_no_orphan_to_a_cleaner() {
    let directory = tempfile::tempdir().unwrap();
    let store = writer(directory.path());
    let sink = store.create_shard(shard(7, A), sized(1 << 20), &flow()).unwrap();
    let file = names::shard_file_name(0, A);
    assert_eq!(survey_of(&store).steps[0].orphans[0].file, file);
    assert_eq!(store.remove_orphan(7, &file, Space::Now).unwrap(), None);
    assert!(store.remove_checkpoint(7, None, Space::Now).is_ok());
    assert_eq!(store.list().unwrap()[0].files.len(), 1);
    drop(sink);

    // What a process that died leaves has no lock.
    let step = directory.path().join(names::step_dir_name(8));
    std::fs::create_dir(&step).unwrap();
    std::fs::write(step.join(&file), [0; 100]).unwrap();
    let temporary = names::manifest_temporary_name(A);
    std::fs::write(step.join(&temporary), [0; 10]).unwrap();
    assert_eq!(store.remove_orphan(8, &file, Space::Now).unwrap(), Some(100));
    assert_eq!(store.remove_orphan(8, &temporary, Space::Now).unwrap(), Some(10));
    assert_eq!(store.list().unwrap(), [], "the emptied directory goes too");
    assert_eq!(store.remove_orphan(8, &file, Space::Now).unwrap(), Some(0));
}

#[test]
fn a_shard_that_was_published_after_the_survey_is_not_removed() {
    let directory = tempfile::tempdir().unwrap();
    let store = writer(directory.path());
    save(&store, shard(7, A), None, &pattern(SHARD_BYTES)).unwrap();
    assert_eq!(store.remove_orphan(7, &names::shard_file_name(0, A), Space::Now).unwrap(), None);
    assert_eq!(survey_of(&store).committed_steps(), [7]);
}

#[test]
fn foreign_names_and_links_are_neither_listed_nor_deleted() {
    let directory = tempfile::tempdir().unwrap();
    let elsewhere = tempfile::tempdir().unwrap();
    let store = writer(directory.path());
    save(&store, shard(3, A), None, &pattern(SHARD_BYTES)).unwrap();
    let step = directory.path().join(names::step_dir_name(3));
    std::fs::write(step.join("notes.txt"), "mine").unwrap();
    std::fs::create_dir(step.join(names::shard_file_name(1, A))).unwrap();
    let precious = elsewhere.path().join("precious");
    std::fs::write(&precious, "keep").unwrap();
    symlink(&precious, step.join(names::shard_file_name(2, A))).unwrap();
    symlink(elsewhere.path(), directory.path().join(names::step_dir_name(4))).unwrap();
    std::fs::write(directory.path().join(names::step_dir_name(5)), "a file").unwrap();
    std::fs::create_dir(directory.path().join("step-7")).unwrap();

    let listing = store.list().unwrap();
    assert_eq!(listing.iter().map(|step| step.step).collect::<Vec<_>>(), [3]);
    assert_eq!(listing[0].files.len(), 2);
    assert_eq!(store.read_manifest(4).unwrap(), None);
    for name in ["notes.txt", names::MANIFEST_FILE, "../x", "/etc/passwd"] {
        let error = store.remove_orphan(3, name, Space::Now).unwrap_err();
        assert!(matches!(error, EngineError::InvalidArgument { .. }), "{error}");
    }
    assert_eq!(store.remove_orphan(3, &names::shard_file_name(2, A), Space::Now).unwrap(), Some(0));
    assert_eq!(store.remove_checkpoint(4, None, Space::Now).unwrap(), 0);
    let error = store.create_shard(shard(4, A), sized(4096), &flow()).unwrap_err();
    assert!(matches!(error, EngineError::Io { .. }), "{error}");
    store.remove_checkpoint(3, None, Space::Now).unwrap();
    assert_eq!(names_under(&step).len(), 3);
    assert_eq!(std::fs::read_to_string(precious).unwrap(), "keep");
}

#[test]
fn a_second_writer_is_refused_and_a_reader_is_not() {
    let directory = tempfile::tempdir().unwrap();
    let first = writer(directory.path());
    let open = |access| LocalStore::open(directory.path(), access, threads(), IN_FLIGHT_BYTES);
    let error = open(Access::Write).unwrap_err();
    assert!(matches!(error, EngineError::StoreBusy { .. }), "{error}");
    assert!(error.to_string().contains("this process already has it open"), "{error}");
    assert!(error.hint().contains("read_only=True"), "{error}");

    save(&first, shard(1, A), None, &pattern(SHARD_BYTES)).unwrap();
    let reader = open(Access::Read).unwrap();
    assert_eq!(survey_of(&reader).committed_steps(), [1]);
    assert!(reader.now().is_ok());
    drop(first);
    open(Access::Write).unwrap();
}

/// A directory of rank 8 alone has no `writer.lock` that anybody holds.
#[test]
fn one_that_writes_alone_writes_beside_no_rank() {
    let directory = tempfile::tempdir().unwrap();
    let open = |access| LocalStore::open(directory.path(), access, threads(), IN_FLIGHT_BYTES);
    let (alone, rank) = (Access::Write, |rank| Access::WriteBeside { rank });
    let ranks = [open(rank(0)).unwrap(), open(rank(8)).unwrap()];
    for left in ranks {
        let error = open(alone).unwrap_err();
        assert!(matches!(error, EngineError::StoreBusy { .. }), "{error}");
        drop(left);
    }
    let writer = open(alone).unwrap();
    for number in [0, 8] {
        let error = open(rank(number)).unwrap_err();
        assert!(matches!(error, EngineError::StoreBusy { .. }), "{error}");
    }
    drop(writer);
    let _again = [open(rank(8)).unwrap(), open(rank(0)).unwrap()];
    for name in ["writer.lock", "writer-00000.lock", "writer-1.lock", "writer-000001.lock"] {
        assert!(!lock::is_lock_of_another_rank(name), "{name}");
    }
    assert!(lock::is_lock_of_another_rank("writer-123456.lock"));
}

/// Plays two parts: the test, and, with the variable set, the other process.
#[test]
fn a_writer_in_another_process_is_named_and_its_lock_ends_with_it() {
    const STORE_VARIABLE: &str = "DTR_TEST_STORE_TO_HOLD";
    if let Some(path) = std::env::var_os(STORE_VARIABLE) {
        let _store = writer(Path::new(&path));
        println!("held");
        // Until killed.
        std::io::stdin().read_line(&mut String::new()).unwrap();
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let name =
        "store::local::tests::a_writer_in_another_process_is_named_and_its_lock_ends_with_it";
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture"])
        .env(STORE_VARIABLE, directory.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap().ends_with("held")), "the other process did not open it");
    let open = || LocalStore::open(directory.path(), Access::Write, threads(), IN_FLIGHT_BYTES);
    let error = open().unwrap_err();
    assert!(matches!(error, EngineError::StoreBusy { .. }), "{error}");
    assert!(error.to_string().contains(&format!("process {}", child.id())), "{error}");
    child.kill().unwrap();
    child.wait().unwrap();
    open().unwrap();
}

#[test]
fn a_reader_creates_and_changes_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let missing = directory.path().join("missing");
    let open = |path: &Path| LocalStore::open(path, Access::Read, threads(), IN_FLIGHT_BYTES);
    let error = open(&missing).unwrap_err();
    assert!(matches!(error, EngineError::NotFound { .. }), "{error}");
    assert!(!missing.exists());

    let reader = open(directory.path()).unwrap();
    assert_eq!(reader.list().unwrap(), []);
    let refused = [
        reader.create_shard(shard(1, A), sized(0), &flow()).map(drop),
        publish(&reader, shard(1, A), SHARD_BYTES as u64, None),
        reader.remove_checkpoint(1, None, Space::Now).map(drop),
        reader.remove_orphan(1, &names::shard_file_name(0, A), Space::Now).map(drop),
    ];
    for outcome in refused {
        let error = outcome.unwrap_err();
        assert!(matches!(error, EngineError::InvalidArgument { .. }), "{error}");
    }
    assert_eq!(names_under(directory.path()), [""; 0]);
}

#[test]
fn a_path_that_cannot_be_a_store_is_one_clear_error() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("file");
    std::fs::write(&file, "x").unwrap();
    for access in [Access::Read, Access::Write] {
        let open =
            |path: &Path| LocalStore::open(path, access, threads(), IN_FLIGHT_BYTES).unwrap_err();
        let error = open(&file);
        assert!(matches!(error, EngineError::InvalidArgument { .. }), "{error}");
        let error = open(&file.join("below"));
        assert!(matches!(error, EngineError::Io { .. }), "{error}");
        assert!(error.hint().contains("a parent of the path is a file"), "{error}");
        let error = open(&directory.path().join("n".repeat(300)));
        assert!(error.hint().contains("too long"), "{error}");
        let error = open(Path::new("/proc/self/nowhere"));
        assert!(!error.hint().is_empty(), "{error}");
    }
}

#[test]
fn the_clock_is_that_of_the_filesystem() {
    let directory = tempfile::tempdir().unwrap();
    let store = writer(directory.path());
    let before = store.now().unwrap();
    let sink = store.create_shard(shard(1, A), sized(0), &flow()).unwrap();
    let modified = store.list().unwrap()[0].files[0].modified;
    let after = store.now().unwrap();
    drop(sink);
    assert!(before <= modified && modified <= after);
}

#[test]
fn free_space_is_reported_and_an_absurd_reservation_refused() {
    let directory = tempfile::tempdir().unwrap();
    let store = writer(directory.path());
    let free_bytes = store.free_bytes().unwrap().unwrap();
    assert!(free_bytes > 0);
    if let Err(error) = store.create_shard(shard(1, A), sized(1 << 50), &flow()) {
        assert!(
            matches!(&error, EngineError::NoSpace { why, .. } if why.contains("bytes are needed"))
                || matches!(error, EngineError::Io { .. }),
            "{error}"
        );
    }
    assert_eq!(store.list().unwrap(), []);
}

/// A store as a forked child has it: the same objects, in a process that did not open them.
fn forked(path: &Path) -> LocalStore {
    let locks = Locks::of_process(std::process::id() + 1);
    let writer = Some(WriterLock::acquire(&locks, path, "writer.lock").unwrap());
    let shared = Shared {
        path: path.into(),
        io: threads(),
        rank: 0,
        in_flight_bytes_max: IN_FLIGHT_BYTES,
        locks,
        changes: Mutex::default(),
        settled: AtomicBool::new(false),
        deleted: Mutex::default(),
    };
    LocalStore { shared: Arc::new(shared), writer, _beside: Vec::new() }
}

#[test]
fn a_forked_child_is_refused_and_leaves_files_and_locks_alone() {
    let directory = tempfile::tempdir().unwrap();
    let child = forked(directory.path());
    let refused = [
        child.create_shard(shard(1, A), sized(0), &flow()).map(drop),
        publish(&child, shard(1, A), SHARD_BYTES as u64, None),
        child.remove_checkpoint(1, None, Space::Now).map(drop),
        child.remove_orphan(1, &names::shard_file_name(0, A), Space::Now).map(drop),
        child.remove_checkpoint(1, None, Space::Later).map(drop),
        child.remove_orphan(1, &names::shard_file_name(0, A), Space::Later).map(drop),
        child.now().map(drop),
        child.read_manifest(1).map(drop),
    ];
    for outcome in refused {
        let error = outcome.unwrap_err();
        assert!(matches!(error, EngineError::Closed { .. }), "{error}");
    }

    let sink = sink::LocalShardSink::create(&child.shared, shard(1, A), 0, &flow()).unwrap();
    let mut sink: Box<dyn ShardSink> = Box::new(sink);
    let error = sink.write(0, filled(&[0; ALIGNMENT])).unwrap_err();
    assert!(matches!(error, EngineError::Closed { .. }), "{error}");
    let error = sink.finish(0).unwrap_err();
    assert!(matches!(error, EngineError::Closed { .. }), "{error}");
    let changes = child.shared.changes();
    let table = child.shared.locks.lock_table();
    // With both mutexes held, as another thread may have held them at the fork.
    drop(sink);
    child.close_after_fork();
    drop(table);
    drop(changes);
    let path = child.shared.shard_path(shard(1, A));
    assert!(path.exists());
    let other = Locks::new();
    let is_locked = |path: &Path| other.try_lock(path, lock::LockFile::Existing).unwrap().is_none();
    let writer_lock = directory.path().join("writer.lock");
    assert!(is_locked(&path) && is_locked(&writer_lock));
    child.close_after_fork();
    assert!(!is_locked(&path) && !is_locked(&writer_lock));
}

#[test]
fn closing_after_a_fork_does_nothing_in_the_owner() {
    let directory = tempfile::tempdir().unwrap();
    let store = writer(directory.path());
    store.close_after_fork();
    let again = LocalStore::open(directory.path(), Access::Write, threads(), IN_FLIGHT_BYTES);
    assert!(matches!(again.unwrap_err(), EngineError::StoreBusy { .. }));
}

#[test]
fn thousands_of_checkpoints_list_quickly() {
    let directory = tempfile::tempdir().unwrap();
    for step in 0..3000 {
        let path = directory.path().join(names::step_dir_name(step));
        std::fs::create_dir(&path).unwrap();
        std::fs::write(path.join(names::MANIFEST_FILE), "{}").unwrap();
    }
    let store = writer(directory.path());
    let started = std::time::Instant::now();
    assert_eq!(store.list().unwrap().len(), 3000);
    assert!(started.elapsed() < Duration::from_secs(10), "{:?}", started.elapsed());
}
