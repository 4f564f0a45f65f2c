//! Two directories as local and remote store, one of which does to calls what the test says.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use crossbeam_channel::bounded;
use tempfile::TempDir;

use super::*;
use crate::Engine;
use crate::clock::System;
use crate::config::{Config, DirectIo, IoBackend};
use crate::format::names;
use crate::format::tree::{Node, Value};
use crate::io::open_backend;
use crate::save::SaveRequest;
use crate::store::Access;
use crate::store::local::LocalStore;
use crate::store::local::tests::space::deleted_under;
use crate::store_copy::{Between, Overwrite, Presence, Transferred, publish_whole, transfer};

/// Longer than anything here takes.
const LONG: Duration = Duration::from_mins(1);

/// What a store is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Call {
    ReadManifest(u64),
    CreateShard(u64),
    OpenShard(u64),
    Publish(u64),
    Published(u64),
    Remove(u64),
}

type Rule = Box<dyn Fn(Call) -> Result<()> + Send + Sync>;

/// A directory whose calls pass a rule first.
struct Ruled {
    store: LocalStore,
    rule: Rule,
}

impl Ruled {
    fn open(path: &Path, rule: impl Fn(Call) -> Result<()> + Send + Sync + 'static) -> Arc<Self> {
        let io = open_backend(IoBackend::Threads, DirectIo::Auto).unwrap();
        let store = LocalStore::open(path, Access::Write, io, 1 << 20).unwrap();
        Arc::new(Self { store, rule: Box::new(rule) })
    }

    /// One without faults.
    fn sound(path: &Path) -> Arc<Self> {
        Self::open(path, |_| Ok(()))
    }

    fn pass(&self, call: Call) -> Result<()> {
        (self.rule)(call)
    }
}

impl fmt::Debug for Ruled {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Ruled").finish_non_exhaustive()
    }
}

impl Store for Ruled {
    fn location(&self) -> String {
        self.store.location()
    }

    fn list(&self) -> Result<Vec<StepListing>> {
        self.store.list()
    }

    fn read_manifest(&self, step: u64) -> Result<Option<Vec<u8>>> {
        self.pass(Call::ReadManifest(step))?;
        self.store.read_manifest(step)
    }

    fn create_shard(
        &self,
        shard: ShardId,
        size: ShardSize,
        flow: &Arc<Flow>,
    ) -> Result<Box<dyn ShardSink>> {
        self.pass(Call::CreateShard(shard.step))?;
        self.store.create_shard(shard, size, flow)
    }

    fn open_shard(&self, shard: ShardId) -> Result<Box<dyn ShardSource>> {
        self.pass(Call::OpenShard(shard.step))?;
        self.store.open_shard(shard)
    }

    fn publish(&self, publication: Publication<'_>) -> Result<()> {
        self.pass(Call::Publish(publication.step))?;
        self.store.publish(publication)?;
        self.pass(Call::Published(publication.step))
    }

    fn unpublish(&self, step: u64, attempt: AttemptId, replaced: Option<&[u8]>) -> Result<()> {
        self.store.unpublish(step, attempt, replaced)
    }

    fn remove_checkpoint(&self, step: u64, only: Option<AttemptId>, space: Space) -> Result<u64> {
        self.pass(Call::Remove(step))?;
        self.store.remove_checkpoint(step, only, space)
    }

    fn remove_orphan(&self, step: u64, file: &str, space: Space) -> Result<Option<u64>> {
        self.store.remove_orphan(step, file, space)
    }

    fn reclaim(&self) {
        self.store.reclaim();
    }

    fn free_bytes(&self) -> Result<Option<u64>> {
        self.store.free_bytes()
    }

    fn close_after_fork(&self) {
        self.store.close_after_fork();
    }

    fn now(&self) -> Result<SystemTime> {
        self.store.now()
    }
}

/// The smallest checkpoint.
fn save(path: &Path, step: u64) {
    let engine = Engine::open(Config::new(path)).unwrap();
    let request = SaveRequest {
        step,
        rewind: false,
        nodes: vec![Node { key: None, value: Value::Int(1) }],
        tensors: Vec::new(),
        storages: Vec::new(),
        replicated: Vec::new(),
        waited: Duration::ZERO,
        prepared: Duration::ZERO,
        metadata: BTreeMap::new(),
        dataset_positions: BTreeMap::new(),
    };
    engine.save(request).unwrap().result(None).unwrap().unwrap();
}

/// A local directory with these steps, and a remote one that is empty.
fn places(steps: &[u64]) -> [TempDir; 2] {
    let [local, remote] = [(); 2].map(|()| tempfile::tempdir().unwrap());
    for step in steps {
        save(local.path(), *step);
    }
    [local, remote]
}

fn uploads(tier: &TieredStore) -> &dyn Uploads {
    tier.uploads().expect("it is a writer's")
}

fn tier(local: Arc<Ruled>, remote: Arc<Ruled>) -> TieredStore {
    TieredStore::writer(local, remote, Arc::new(System::default()), None, None).unwrap()
}

fn uploaded(tier: &TieredStore, step: u64) -> Result<Transferred> {
    uploads(tier).wait_for(step, Some(LONG)).expect("it ends in time")
}

fn eio(what: &str) -> EngineError {
    EngineError::from_io("reading", Path::new(what), std::io::Error::from_raw_os_error(5))
}

fn steps_of(path: &Path) -> Vec<u64> {
    Engine::open(Config { read_only: true, ..Config::new(path) }).unwrap().steps().unwrap()
}

#[test]
fn a_shard_that_cannot_be_read_here_holds_up_no_other_step() {
    let [local, remote] = places(&[1, 2, 3]);
    let local = Ruled::open(local.path(), |call| match call {
        Call::OpenShard(1) => Err(eio("a shard")),
        _ => Ok(()),
    });
    let tier = tier(local, Ruled::sound(remote.path()));
    for step in [2, 3] {
        uploaded(&tier, step).unwrap();
    }
    assert!(uploads(&tier).wait_for(1, Some(Duration::ZERO)).is_none());
    assert!(!uploads(&tier).may_remove(1) && uploads(&tier).may_remove(2));
    // Once more, and no more.
    assert!(uploads(&tier).drain(None));
    assert!(matches!(uploaded(&tier, 1), Err(EngineError::Io { .. })));
    assert!(!uploads(&tier).may_remove(1), "no other copy is known");
    drop(tier);
    assert_eq!(steps_of(remote.path()), [2, 3]);
}

#[test]
fn what_comes_back_damaged_is_read_once_more_and_damage_there_is_not_for_good() {
    for damaged_answers in [1, 2] {
        let [local, remote] = places(&[1]);
        let counts = Arc::new([AtomicU32::new(0), AtomicU32::new(0)]);
        let counted = Arc::clone(&counts);
        let remote = Ruled::open(remote.path(), move |call| {
            let [created, opened] = &*counted;
            match call {
                Call::CreateShard(_) => drop(created.fetch_add(1, Ordering::Relaxed)),
                Call::OpenShard(_) if opened.fetch_add(1, Ordering::Relaxed) < damaged_answers => {
                    return Err(EngineError::corrupt("the answer", "a bit is wrong"));
                }
                _ => {}
            }
            Ok(())
        });
        let tier = tier(Ruled::sound(local.path()), remote);
        uploaded(&tier, 1).unwrap();
        // Sent again only if it is damaged there.
        assert_eq!(counts[0].load(Ordering::Relaxed), damaged_answers);
    }
}

#[test]
fn damage_here_is_for_good_and_the_step_is_kept() {
    let [local, remote] = places(&[1, 2]);
    let step = local.path().join(names::step_dir_name(1));
    let mut files = std::fs::read_dir(step).unwrap().map(|entry| entry.unwrap().path());
    let shard = files.find(|path| path.extension().is_some_and(|end| end == "shard")).unwrap();
    let mut bytes = std::fs::read(&shard).unwrap();
    bytes[9] ^= 1;
    std::fs::write(&shard, bytes).unwrap();
    let tier = tier(Ruled::sound(local.path()), Ruled::sound(remote.path()));
    assert!(matches!(uploaded(&tier, 1), Err(EngineError::Corrupt { .. })));
    uploaded(&tier, 2).unwrap();
    assert!(!uploads(&tier).may_remove(1) && uploads(&tier).may_remove(2));
}

#[test]
fn a_manifest_that_cannot_be_read_bars_neither_the_store_nor_another_step() {
    let errors: [fn() -> EngineError; 2] =
        [|| eio("a manifest"), || EngineError::corrupt("a manifest", "it is too large")];
    for error in errors {
        let [local, remote] = places(&[1, 2]);
        let local = Ruled::open(local.path(), move |call| match call {
            Call::ReadManifest(1) => Err(error()),
            _ => Ok(()),
        });
        let tier = tier(local, Ruled::sound(remote.path()));
        uploaded(&tier, 2).unwrap();
        assert!(!uploads(&tier).may_remove(1) && !tier.is_outdated(1));
        assert!(matches!(uploaded(&tier, 1), Err(EngineError::Closed { .. })), "it waits for none");
        drop(tier);
        assert_eq!(steps_of(remote.path()), [2]);
    }
}

#[test]
fn a_manifest_that_only_the_remote_store_has_whole_is_waited_for_and_not_passed_over() {
    let [local, remote] = places(&[1, 2]);
    let both = tier(Ruled::sound(local.path()), Ruled::sound(remote.path()));
    for step in [1, 2] {
        uploaded(&both, step).unwrap();
    }
    drop(both);
    let manifest =
        |place: &TempDir| place.path().join(names::step_dir_name(2)).join("manifest.json");
    let whole = std::fs::read(manifest(&remote)).unwrap();
    let [is_away, is_unreadable] = [(); 2].map(|()| Arc::new(AtomicBool::new(false)));
    let local_store = Ruled::open(local.path(), {
        let is_unreadable = Arc::clone(&is_unreadable);
        move |call| match call {
            Call::ReadManifest(2) if is_unreadable.load(Ordering::Relaxed) => Err(eio("manifest")),
            _ => Ok(()),
        }
    });
    let remote_store = Ruled::open(remote.path(), {
        let is_away = Arc::clone(&is_away);
        move |call| match call {
            Call::ReadManifest(2) if is_away.load(Ordering::Relaxed) => {
                Err(EngineError::Unavailable {
                    what: "reading".into(),
                    why: "no route".into(),
                    hint: "wait".into(),
                })
            }
            _ => Ok(()),
        }
    });
    let both = TieredStore::reader(local_store, remote_store).unwrap();
    for damage in [false, true] {
        // Unreadable at first, then damaged.
        is_unreadable.store(!damage, Ordering::Relaxed);
        if damage {
            std::fs::write(manifest(&local), &whole[..whole.len() / 2]).unwrap();
        }
        is_away.store(true, Ordering::Relaxed);
        let error = both.read_manifest(2).unwrap_err();
        assert!(matches!(error, EngineError::Unavailable { .. }), "{error}");
        let read = both.read_manifests(&[1, 2]);
        assert!(matches!(read[0], Ok(Some(_))), "{read:?}");
        // To a listing it is what it is locally, and the remote store is asked no second time for
        // it.
        let is_local = |read: &Result<Option<Vec<u8>>>| match read {
            Ok(local) => damage && local.as_deref().is_some_and(is_damaged),
            Err(error) => !damage && matches!(error, EngineError::Io { .. }),
        };
        assert!(is_local(&read[1]), "{read:?}");
        is_away.store(false, Ordering::Relaxed);
        assert!(is_local(&both.read_manifests(&[2])[0]));
        assert_eq!(both.read_manifest(2).unwrap().as_ref(), Some(&whole));
        assert_eq!(both.read_manifests(&[2])[0].as_ref().unwrap().as_ref(), Some(&whole));
    }
}

/// Two stores with an attempt of step 1 each, of which the remote one began later.
fn outdated_places() -> [TempDir; 2] {
    let [local, remote] = places(&[1]);
    save(remote.path(), 1);
    let mut manifest = Manifest::decode(&manifest_of(&local)).unwrap();
    manifest.created_unix_ms = 1;
    let path = local.path().join(names::step_dir_name(1)).join(names::MANIFEST_FILE);
    std::fs::write(path, manifest.encode().unwrap()).unwrap();
    [local, remote]
}

fn manifest_of(place: &TempDir) -> Vec<u8> {
    let step = place.path().join(names::step_dir_name(1));
    std::fs::read(step.join(names::MANIFEST_FILE)).unwrap()
}

#[test]
fn a_reader_takes_a_step_from_here_again_once_it_is_saved_again() {
    let [local, remote] = outdated_places();
    let open = |place: &TempDir| {
        let io = open_backend(IoBackend::Threads, DirectIo::Auto).unwrap();
        Arc::new(LocalStore::open(place.path(), Access::Read, io, 1 << 20).unwrap())
    };
    let reader = TieredStore::reader(open(&local), open(&remote)).unwrap();
    reader.list().unwrap();
    assert_eq!(reader.read_manifest(1).unwrap(), Some(manifest_of(&remote)));
    std::fs::remove_dir_all(local.path().join(names::step_dir_name(1))).unwrap();
    save(local.path(), 1);
    reader.list().unwrap();
    assert_eq!(reader.read_manifest(1).unwrap(), Some(manifest_of(&local)));
}

#[test]
fn a_save_that_replaces_an_outdated_step_asks_no_remote_store_and_leaves_it_outdated_if_it_fails() {
    let [local, remote] = outdated_places();
    let is_away = Arc::new(AtomicBool::new(false));
    let away = Arc::clone(&is_away);
    let remote_store = Ruled::open(remote.path(), move |_| {
        if away.load(Ordering::Relaxed) { Err(eio("the far store")) } else { Ok(()) }
    });
    let tier = tier(Ruled::sound(local.path()), remote_store);
    assert!(tier.is_outdated(1));
    is_away.store(true, Ordering::Relaxed);
    let replaced = tier.read_local_manifest(1).unwrap().unwrap();
    assert_eq!(replaced, manifest_of(&local));
    let attempt = AttemptId([7; 16]);
    let mut manifest = Manifest::decode(&replaced).unwrap();
    manifest.attempt = attempt.to_string();
    manifest.shards[0].file = names::shard_file_name(0, attempt);
    tier.publish(Publication {
        step: 1,
        attempt,
        manifest: &manifest.encode().unwrap(),
        replaces: Manifest::decode(&manifest_of(&remote)).unwrap().attempt_id().ok(),
        shards: &[],
    })
    .unwrap();
    assert!(!tier.is_outdated(1));
    tier.unpublish(1, attempt, Some(&replaced)).unwrap();
    assert!(tier.is_outdated(1) && manifest_of(&local) == replaced);
}

#[test]
fn what_another_rank_brought_is_still_seen_after_an_upload() {
    let [local, remote] = places(&[1]);
    let both = tier(Ruled::sound(local.path()), Ruled::sound(remote.path()));
    // A shard of that step which is not here.
    let step = names::step_dir_name(1);
    std::fs::create_dir_all(remote.path().join(&step)).unwrap();
    let other = names::shard_file_name(1, AttemptId([7; 16]));
    std::fs::write(remote.path().join(&step).join(&other), b"theirs").unwrap();
    uploaded(&both, 1).unwrap();
    let listing = both.list().unwrap();
    assert!(listing[0].files.iter().any(|file| file.name == other), "{listing:?}");
}

#[test]
fn a_removal_under_way_does_not_meet_the_attempt_that_takes_the_place() {
    let [local, remote] = places(&[5]);
    let aside = tempfile::tempdir().unwrap();
    save(aside.path(), 5);
    let ((tell, told), (go, gone)) = (bounded(1), bounded(1));
    let remote = Ruled::open(remote.path(), move |call| {
        if call == Call::Remove(5) {
            tell.send(()).unwrap();
            gone.recv().unwrap();
        }
        Ok(())
    });
    let tier = tier(Ruled::sound(local.path()), remote);
    uploaded(&tier, 5).unwrap();
    std::thread::scope(|scope| {
        let removing = scope.spawn(|| tier.remove_checkpoint(5, None, Space::Now));
        told.recv().unwrap();
        // Saved again meanwhile.
        let step = names::step_dir_name(5);
        std::fs::create_dir(local.path().join(&step)).unwrap();
        for file in std::fs::read_dir(aside.path().join(&step)).unwrap() {
            let file = file.unwrap();
            std::fs::copy(file.path(), local.path().join(&step).join(file.file_name())).unwrap();
        }
        uploads(&tier).add(5);
        // Time in which it would arrive.
        assert!(uploads(&tier).wait_for(5, Some(Duration::from_millis(300))).is_none());
        go.send(()).unwrap();
        assert!(removing.join().unwrap().unwrap() > 0);
    });
    uploaded(&tier, 5).unwrap();
    let [here, there] =
        [&tier.local, &tier.remote].map(|store| standing(store.as_ref(), 5).unwrap());
    assert!(here.is_some() && here == there);
}

#[test]
fn a_step_that_could_not_be_removed_here_is_uploaded_all_the_same() {
    let [local, remote] = places(&[1]);
    let is_away = Arc::new(AtomicBool::new(true));
    let away = Arc::clone(&is_away);
    let local = Ruled::open(local.path(), |call| match call {
        Call::Remove(1) => Err(eio("a directory")),
        _ => Ok(()),
    });
    let remote = Ruled::open(remote.path(), move |call| match call {
        Call::CreateShard(1) if away.load(Ordering::Relaxed) => Err(eio("a far shard")),
        _ => Ok(()),
    });
    let tier = tier(local, remote);
    assert!(matches!(tier.remove_checkpoint(1, None, Space::Now), Err(EngineError::Io { .. })));
    assert!(matches!(tier.remove_checkpoint(1, None, Space::Later), Err(EngineError::Io { .. })));
    assert!(!uploads(&tier).may_remove(1), "it waits for its upload");
    is_away.store(false, Ordering::Relaxed);
    uploaded(&tier, 1).unwrap();
}

#[test]
fn waiting_for_uploads_ends_when_the_time_is_over() {
    let [local, remote] = places(&[1]);
    let (go, gone) = bounded(1);
    let remote = Ruled::open(remote.path(), move |call| {
        if call == Call::CreateShard(1) {
            gone.recv().unwrap();
        }
        Ok(())
    });
    let tier = tier(Ruled::sound(local.path()), remote);
    for _ in 0..3 {
        assert!(!uploads(&tier).drain(Some(Duration::from_millis(1))));
    }
    go.send(()).unwrap();
    assert!(uploads(&tier).drain(Some(LONG)));
    uploaded(&tier, 1).unwrap();
}

#[test]
fn what_goes_while_it_is_published_is_taken_back() {
    let share = OwnShare { rank: 0, world_size: 2 };
    let environment: Arc<dyn Environment> = Arc::new(System::default());
    for is_deleted in [false, true] {
        let [local, remote] = places(&[1]);
        let goes = Arc::new(AtomicBool::new(false));
        let goes_there = Arc::clone(&goes);
        let step = remote.path().join(names::step_dir_name(1));
        let step_there = step.clone();
        let remote = Ruled::open(remote.path(), move |call| {
            let step = &step_there;
            if goes.load(Ordering::Relaxed) && call == Call::Published(1) {
                // Another rank let the step go meanwhile.
                let files = std::fs::read_dir(step).unwrap().map(|file| file.unwrap().path());
                let is_shard = |path: &PathBuf| path.extension().is_some_and(|end| end == "shard");
                files.filter(is_shard).for_each(|path| std::fs::remove_file(path).unwrap());
            }
            Ok(())
        });
        let local = Ruled::sound(local.path());
        let between = Between {
            source: &*local,
            destination: &*remote,
            environment: &environment,
            observer: &(),
        };
        transfer(&between, 1, Overwrite::No).unwrap();
        let attempt = standing(&*remote, 1).unwrap().unwrap();
        let file = names::shard_file_name(0, attempt);
        remote.unpublish(1, attempt, None).unwrap();
        goes_there.store(is_deleted, Ordering::Relaxed);
        let uploaded = publish_whole(&*local, &*remote, (1, share), false).unwrap();
        assert_eq!(uploaded, if is_deleted { Presence::Less } else { Presence::All });
        assert_eq!(standing(&*remote, 1).unwrap().is_some(), !is_deleted);
        if is_deleted {
            continue;
        }
        // Who did not put it does not look: shards that are lost are uploaded by their ranks.
        std::fs::remove_file(step.join(&file)).unwrap();
        let again =
            |may_be_ours| publish_whole(&*local, &*remote, (1, share), may_be_ours).unwrap();
        assert_eq!(again(false), Presence::All);
        assert_eq!(again(true), Presence::Less);
        assert_eq!(standing(&*remote, 1).unwrap(), None);
    }
}

#[test]
fn what_is_deleted_takes_space_here_until_that_is_freed() {
    let [local, remote] = places(&[1, 2, 3]);
    let tier = tier(Ruled::sound(local.path()), Ruled::sound(remote.path()));
    uploaded(&tier, 3).unwrap();
    tier.remove_checkpoint(1, None, Space::Later).unwrap();
    assert_eq!(deleted_under(local.path()), 1);
    // What becomes an orphan when its manifest is lost.
    std::fs::remove_file(local.path().join(names::step_dir_name(2)).join(names::MANIFEST_FILE))
        .unwrap();
    let orphan = tier.local.list_step(2).unwrap().unwrap().files.remove(0).name;
    assert!(tier.remove_orphan(2, &orphan, Space::Later).unwrap().is_some());
    assert_eq!(deleted_under(local.path()), 2);
    tier.reclaim();
    assert_eq!(deleted_under(local.path()), 0);
    assert!(uploads(&tier).drain(None));
    assert_eq!(steps_of(local.path()), [3]);
}

#[test]
fn what_was_saved_after_one_looked_is_not_removed() {
    let [local, remote] = places(&[5]);
    let tier = tier(Ruled::sound(local.path()), Ruled::sound(remote.path()));
    uploaded(&tier, 5).unwrap();
    let another = Some(AttemptId([9; 16]));
    assert_eq!(tier.remove_checkpoint(5, another, Space::Now).unwrap(), 0);
    tier.remove_checkpoint(5, another, Space::Later).unwrap();
    assert!(uploads(&tier).drain(None));
    assert!(standing(&tier, 5).unwrap().is_some());
    let stands = standing(tier.remote.as_ref(), 5).unwrap();
    assert!(stands.is_some());
    assert!(tier.remove_checkpoint(5, stands, Space::Now).unwrap() > 0);
    assert_eq!(standing(tier.remote.as_ref(), 5).unwrap(), None);
}

#[test]
fn a_panic_is_told_and_nobody_waits_for_ever() {
    let [local, remote] = places(&[1, 2]);
    let remote = Ruled::open(remote.path(), |call| {
        assert!(call != Call::Publish(1) && call != Call::Remove(2), "the test says so");
        Ok(())
    });
    let tier = tier(Ruled::sound(local.path()), remote);
    assert!(matches!(uploaded(&tier, 1), Err(EngineError::Internal { .. })));
    uploaded(&tier, 2).unwrap();
    let error = tier.remove_checkpoint(2, None, Space::Now).unwrap_err();
    assert!(matches!(error, EngineError::Internal { .. }), "{error}");
    // The removal of step 1 stands behind that of step 2.
    assert!(tier.remove_checkpoint(1, None, Space::Now).is_err());
    assert!(uploads(&tier).drain(None));
}
