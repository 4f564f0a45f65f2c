//! What retention deletes has no name from then on, and takes space until that is freed.

use super::*;

/// Descriptors of this process on files below `path` that have no name any more.
pub(in crate::store) fn deleted_under(path: &Path) -> usize {
    let descriptors = std::fs::read_dir("/proc/self/fd").unwrap();
    let targets = descriptors.filter_map(|entry| std::fs::read_link(entry.unwrap().path()).ok());
    let path = path.canonicalize().unwrap();
    let is_deleted = |target: &PathBuf| target.to_string_lossy().ends_with(" (deleted)");
    targets.filter(|target| target.starts_with(&path) && is_deleted(target)).count()
}

#[test]
fn a_deleted_checkpoint_is_gone_before_its_space_is_freed() {
    for io in backends() {
        let directory = tempfile::tempdir().unwrap();
        let store = LocalStore::open(directory.path(), Access::Write, io, IN_FLIGHT_BYTES).unwrap();
        for step in 1..4 {
            save(&store, shard(step, A), None, &pattern(SHARD_BYTES)).unwrap();
        }
        store.remove_checkpoint(1, None, Space::Later).unwrap();
        store.remove_checkpoint(2, Some(A), Space::Later).unwrap();
        store.remove_checkpoint(3, Some(B), Space::Later).unwrap();
        assert_eq!(survey_of(&store).committed_steps(), [3], "another attempt's stays");
        let names = names_under(directory.path());
        assert!(!names.iter().any(|name| name.contains("step-000000000001")), "{names:?}");
        assert_eq!(deleted_under(directory.path()), 2);

        store.reclaim();
        assert_eq!(deleted_under(directory.path()), 0);
        // Nothing waits any more, and a step that was deleted can be saved again.
        store.reclaim();
        save(&store, shard(1, B), None, &pattern(SHARD_BYTES)).unwrap();
        assert_eq!(survey_of(&store).committed_steps(), [1, 3]);
    }
}

#[test]
fn a_deleted_orphan_is_gone_before_its_space_is_freed() {
    let directory = tempfile::tempdir().unwrap();
    let store = writer(directory.path());
    save(&store, shard(5, A), None, &pattern(SHARD_BYTES)).unwrap();
    save(&store, shard(5, B), Some(A), &pattern(SHARD_BYTES)).unwrap();
    assert!(store.remove_orphan(5, &names::shard_file_name(0, A), Space::Later).unwrap().is_some());
    assert_eq!(survey_of(&store).steps[0].orphans, []);
    assert_eq!(deleted_under(directory.path()), 1);
    store.reclaim();
    assert_eq!(deleted_under(directory.path()), 0);
    assert_eq!(survey_of(&store).committed_steps(), [5]);
}

#[test]
fn what_is_deleted_at_once_and_what_a_closed_store_deleted_takes_no_space() {
    let directory = tempfile::tempdir().unwrap();
    let store = writer(directory.path());
    for step in 1..3 {
        save(&store, shard(step, A), None, &pattern(SHARD_BYTES)).unwrap();
    }
    store.remove_checkpoint(1, None, Space::Now).unwrap();
    assert_eq!(deleted_under(directory.path()), 0);
    store.remove_checkpoint(2, None, Space::Later).unwrap();
    assert_eq!(deleted_under(directory.path()), 1);
    drop(store);
    assert_eq!(deleted_under(directory.path()), 0);
}

#[test]
fn only_so_many_descriptors_wait() {
    let directory = tempfile::tempdir().unwrap();
    let store = writer(directory.path());
    let orphans = u32::try_from(remove::DELETED_MAX).unwrap() + 10;
    for rank in 0..orphans {
        let id = ShardId { rank, ..shard(1, A) };
        write_shard(&store, id, &pattern(ALIGNMENT)).map(drop).unwrap();
    }
    store.remove_checkpoint(1, None, Space::Later).unwrap();
    assert_eq!(names_under(directory.path()), ["writer.lock"]);
    assert_eq!(deleted_under(directory.path()), remove::DELETED_MAX);
    store.reclaim();
    assert_eq!(deleted_under(directory.path()), 0);
}

#[test]
fn the_next_shard_is_created_when_the_space_is_back() {
    let directory = tempfile::tempdir().unwrap();
    let store = writer(directory.path());
    save(&store, shard(1, A), None, &pattern(SHARD_BYTES)).unwrap();
    store.remove_checkpoint(1, None, Space::Later).unwrap();
    assert_eq!(deleted_under(directory.path()), 1);
    let _sink = store.create_shard(shard(2, A), sized(0), &flow()).unwrap();
    assert_eq!(deleted_under(directory.path()), 0);
}

/// As NFS and FUSE do with a file that is open when it is deleted: its directory is not empty.
#[test]
fn a_directory_that_an_open_file_kept_goes_when_the_space_is_given_back() {
    let directory = tempfile::tempdir().unwrap();
    let store = writer(directory.path());
    save(&store, shard(1, A), None, &pattern(SHARD_BYTES)).unwrap();
    let step = store.shared.step_directory(1);
    let kept = step.join(".nfs0000000000000001");
    std::fs::write(&kept, "").unwrap();
    store.remove_checkpoint(1, None, Space::Later).unwrap();
    assert!(step.exists());
    std::fs::remove_file(kept).unwrap();
    store.reclaim();
    assert!(!step.exists());
}

#[test]
fn a_forked_child_gives_no_space_back() {
    let directory = tempfile::tempdir().unwrap();
    let child = forked(directory.path());
    let path = directory.path().join("file");
    std::fs::write(&path, "").unwrap();
    let lock = child.shared.locks.try_lock(&path, lock::LockFile::Existing).unwrap().unwrap();
    child.shared.deleted.lock().unwrap().locks.push(lock);
    child.reclaim();
    assert_eq!(child.shared.deleted.lock().unwrap().locks.len(), 1);
    let held = child.shared.deleted.lock().unwrap();
    // As another thread of the parent may have held it at the fork.
    child.reclaim();
    drop(held);
}
