//! No name and no link leads out of the store, whatever put it there and whatever is done next.
//!
//! ```text
//! scratch/store/      what is attacked
//! scratch/outside/    what must stay as it is: files, and checkpoints that links point to
//! ```
//!
//! Always holds: after listing, opening, verifying, reading, saving, overwriting, deleting and
//! cleaning, everything outside is as it was, down to its times; nothing of it was shown as a
//! checkpoint's; and a later step of the store is saved and read as if nothing had been.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{MetadataExt as _, symlink};
use std::path::{Path, PathBuf};
use std::time::Duration;

use dtr_engine::engine::GcOptions;
use dtr_engine::format::manifest::Manifest;
use dtr_engine::format::names::{
    AttemptId, MANIFEST_FILE, manifest_temporary_name, shard_file_name, step_dir_name,
};
use dtr_engine::format::tree::{DictKind, Key, Node, Value};
use dtr_engine::recovery::StepState;
use dtr_engine::{Config, Engine, EngineError};
use fastrand::Rng;
use serde_json::json;

use super::budget::{Budget, scratch};
use super::forge::signed;
use super::state::{self, Counter, State};

/// Attacks when nobody asks for more.
const SHORT: u64 = 100;
/// The step that is attacked, and one after it.
const STEP: u64 = 3;
const LATER: u64 = 5;

/// What an attack leaves of step [`STEP`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Left {
    /// The checkpoint that was saved.
    Whole,
    /// None that opens.
    Nothing,
}

type Attack = (&'static str, fn(&Ground, &mut Rng) -> Left);

const ATTACKS: &[Attack] = &[
    ("the step's directory is a link", step_is_a_link),
    ("the manifest is a link", manifest_is_a_link),
    ("the shard is a link", shard_is_a_link),
    ("a temporary manifest is a link", temporary_is_a_link),
    ("an orphan is a link", orphan_is_a_link),
    ("an orphan is a second name of a file outside", orphan_is_a_hard_link),
    ("the shard is no file", shard_is_no_file),
    ("a manifest names a shard elsewhere", manifest_names_a_shard_elsewhere),
    ("a manifest retires steps elsewhere", manifest_retires_elsewhere),
    ("a step has an odd name", step_has_an_odd_name),
    ("a file has an odd name", file_has_an_odd_name),
    ("tensors have odd names", tensors_have_odd_names),
];

#[test]
fn no_name_and_no_link_leads_out_of_the_store() {
    let budget = Budget::of(SHORT);
    for number in budget.first..budget.first + budget.states {
        let (name, attack) = ATTACKS[usize::try_from(number).unwrap() % ATTACKS.len()];
        let ground = Ground::new();
        let left = attack(&ground, &mut Rng::with_seed(number));
        let before = snapshot(&ground.outside());
        if let Err(why) = ground.use_store(left) {
            panic!(
                "attack {number}, {name}: {why}\nagain with DTR_TORTURE_FIRST={number} \
                 DTR_TORTURE_STATES=1"
            );
        }
        let after = snapshot(&ground.outside());
        assert!(before == after, "attack {number}, {name}: {before:#?}\nbecame {after:#?}");
        let around = names_in(ground.directory.path());
        assert_eq!(around, ["outside", "store"], "attack {number}, {name}");
    }
    println!(
        "{} attacks of {} kinds from number {}: nothing outside was touched or shown",
        budget.states,
        ATTACKS.len(),
        budget.first
    );
    println!("torture: tried {}, next {}", budget.states, budget.first + budget.states);
}

/// A store with a checkpoint, and beside it what must not be touched.
struct Ground {
    directory: tempfile::TempDir,
    state: State,
}

impl Ground {
    fn new() -> Self {
        let directory = scratch();
        let ground = Self { directory, state: State::new(1, &[10_000, 64]) };
        fs::create_dir(ground.outside()).unwrap();
        fs::write(ground.outside().join("precious"), "keep").unwrap();
        for (store, seed) in [(ground.outside(), 2), (ground.store(), 1)] {
            let engine = open(&store, false);
            let state = State::new(seed, &[10_000, 64]);
            state::finish(&engine.save(state.request(STEP, 0)).unwrap()).unwrap();
        }
        ground
    }

    fn store(&self) -> PathBuf {
        self.directory.path().join("store")
    }

    fn outside(&self) -> PathBuf {
        self.directory.path().join("outside")
    }

    fn step(&self) -> PathBuf {
        self.store().join(step_dir_name(STEP))
    }

    fn manifest(&self) -> PathBuf {
        self.step().join(MANIFEST_FILE)
    }

    fn shard(&self) -> PathBuf {
        self.step().join(shard_of(&self.manifest()))
    }

    /// Does everything that can be done with a store.
    fn use_store(&self, left: Left) -> Result<(), String> {
        let reader = open(&self.store(), true);
        self.look(&reader, left)?;
        drop(reader);
        let writer = open(&self.store(), false);
        self.look(&writer, left)?;
        let later = State::new(9, &[20_000]);
        let saved = writer.save(later.request(LATER, 1)).and_then(|handle| state::finish(&handle));
        saved.map_err(|error| format!("a later step cannot be saved: {error}"))?;
        // With rewind: over whatever stands there. It may be refused, and then as what it is.
        let mut again = self.state.request(STEP, 2);
        again.rewind = true;
        let again = writer.save(again).and_then(|handle| state::finish(&handle));
        if let Err(error @ EngineError::Internal { .. }) = again {
            return Err(format!("overwriting: {error}"));
        }
        let clean = GcOptions { dry_run: false, grace: Some(Duration::ZERO) };
        writer.gc(clean).map_err(|error| format!("cleaning: {error}"))?;
        for step in [STEP, LATER] {
            match writer.delete(step) {
                Ok(_) | Err(EngineError::NotFound { .. } | EngineError::Io { .. }) => {}
                Err(error) => return Err(format!("deleting step {step}: {error}")),
            }
        }
        writer.gc(clean).map_err(|error| format!("cleaning again: {error}"))?;
        state::finish(&writer.save(later.request(LATER + 1, 3)).unwrap()).unwrap();
        let opened = writer.checkpoint(LATER + 1).map_err(|error| error.to_string())?;
        match later.is_in(&opened) {
            Ok(true) => Ok(()),
            other => Err(format!("the last save is not there: {other:?}")),
        }
    }

    fn look(&self, engine: &Engine, left: Left) -> Result<(), String> {
        let survey = engine.survey().map_err(|error| format!("listing: {error}"))?;
        for step in &survey.steps {
            if step.state == StepState::Committed && step.step != STEP {
                return Err(format!("step {} is shown", step.step));
            }
        }
        match engine.verify(STEP, &()) {
            Ok(report) if (report.damage.is_empty()) != (left == Left::Whole) => {
                return Err(format!("verify reports {:?}", report.damage));
            }
            Err(error) if left == Left::Whole => return Err(format!("verify: {error}")),
            _ => {}
        }
        match (engine.checkpoint(STEP), left) {
            (Ok(opened), Left::Whole) => match self.state.is_in(&opened) {
                Ok(true) => Ok(()),
                other => Err(format!("the checkpoint is another: {other:?}")),
            },
            (Err(EngineError::NotFound { .. } | EngineError::Corrupt { .. }), Left::Nothing) => {
                Ok(())
            }
            (Ok(_), Left::Nothing) => Err("what lies outside is opened".into()),
            (Err(error), _) => Err(format!("opening: {error}")),
        }
    }
}

fn open(store: &Path, read_only: bool) -> Engine {
    let config = Config { read_only, gc_grace_seconds: 0, ..state::config(store) };
    // Each engine its own attempts, as if it was another process.
    let ids = Counter::starting_at(fs::metadata(store).map_or(0, |store| store.ino()));
    state::open(config, &state::backend(), &ids).unwrap()
}

fn shard_of(manifest: &Path) -> String {
    Manifest::decode(&fs::read(manifest).unwrap()).unwrap().shards[0].file.clone()
}

/// Everything below a directory: kind, mode, length, times, content or target.
fn snapshot(directory: &Path) -> BTreeMap<PathBuf, (u32, u64, i64, i64, Vec<u8>)> {
    let mut found = BTreeMap::new();
    let mut waiting = vec![directory.to_owned()];
    while let Some(path) = waiting.pop() {
        let metadata = fs::symlink_metadata(&path).unwrap();
        let content = if metadata.is_file() {
            fs::read(&path).unwrap()
        } else if metadata.is_dir() {
            waiting.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
            Vec::new()
        } else {
            fs::read_link(&path).unwrap().as_os_str().as_bytes().to_vec()
        };
        let times = (metadata.mtime(), metadata.mtime_nsec());
        found.insert(path, (metadata.mode(), metadata.size(), times.0, times.1, content));
    }
    found
}

fn names_in(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).unwrap();
    let mut names: Vec<String> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// Puts a link to `target` in the place of what is at `path`.
fn replace_by_link(path: &Path, target: &Path) {
    if path.is_dir() {
        fs::remove_dir_all(path).unwrap();
    } else if path.exists() {
        fs::remove_file(path).unwrap();
    }
    symlink(target, path).unwrap();
}

fn step_is_a_link(ground: &Ground, random: &mut Rng) -> Left {
    let targets = [
        ground.outside().join(step_dir_name(STEP)),
        Path::new("../outside").join(step_dir_name(STEP)),
        ground.outside(),
        ground.outside().join("nowhere"),
        PathBuf::from("/"),
        PathBuf::from("."),
    ];
    replace_by_link(&ground.step(), &targets[random.usize(..targets.len())]);
    Left::Nothing
}

fn manifest_is_a_link(ground: &Ground, random: &mut Rng) -> Left {
    let there = ground.outside().join(step_dir_name(STEP)).join(MANIFEST_FILE);
    let ours = ground.manifest();
    // Also a link to what is right, and would open.
    let copy = ground.outside().join("copy");
    fs::copy(&ours, &copy).unwrap();
    let targets = [there, copy, ground.outside().join("nowhere"), "/dev/zero".into()];
    replace_by_link(&ours, &targets[random.usize(..targets.len())]);
    Left::Nothing
}

fn shard_is_a_link(ground: &Ground, random: &mut Rng) -> Left {
    let shard = ground.shard();
    let copy = ground.outside().join("copy");
    fs::copy(&shard, &copy).unwrap();
    let relative = PathBuf::from("../../outside/copy");
    let targets = [copy, relative, "/dev/zero".into(), ground.outside().join("precious")];
    replace_by_link(&shard, &targets[random.usize(..targets.len())]);
    Left::Nothing
}

fn temporary_is_a_link(ground: &Ground, random: &mut Rng) -> Left {
    let mut attempts = vec![AttemptId([7; 16])];
    // Those that the store draws next.
    let ids = Counter::starting_at(fs::metadata(ground.store()).unwrap().ino());
    attempts.extend((0..4).map(|_| dtr_engine::clock::Environment::attempt_id(&*ids).unwrap()));
    for step in [STEP, LATER] {
        let directory = ground.store().join(step_dir_name(step));
        fs::create_dir_all(&directory).unwrap();
        for attempt in &attempts {
            let name = match random.usize(..2) {
                0 => manifest_temporary_name(*attempt),
                _ => shard_file_name(random.u32(1..=3), *attempt),
            };
            symlink(ground.outside().join("precious"), directory.join(name)).unwrap();
        }
    }
    Left::Whole
}

fn orphan_is_a_link(ground: &Ground, random: &mut Rng) -> Left {
    let rank = random.u32(..9);
    let name = shard_file_name(rank, AttemptId([0xbb; 16]));
    let targets = [ground.outside().join("precious"), ground.outside(), "/etc/passwd".into()];
    symlink(&targets[random.usize(..targets.len())], ground.step().join(name)).unwrap();
    Left::Whole
}

fn orphan_is_a_hard_link(ground: &Ground, random: &mut Rng) -> Left {
    let rank = random.u32(..9);
    let name = shard_file_name(rank, AttemptId([0xbb; 16]));
    fs::hard_link(ground.outside().join("precious"), ground.step().join(name)).unwrap();
    Left::Whole
}

fn shard_is_no_file(ground: &Ground, random: &mut Rng) -> Left {
    let shard = ground.shard();
    fs::remove_file(&shard).unwrap();
    match random.usize(..3) {
        0 => fs::create_dir(&shard).unwrap(),
        1 => drop(std::os::unix::net::UnixListener::bind(&shard).unwrap()),
        _ => rustix::fs::mknodat(
            rustix::fs::CWD,
            &shard,
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR,
            0,
        )
        .unwrap(),
    }
    Left::Nothing
}

fn manifest_names_a_shard_elsewhere(ground: &Ground, random: &mut Rng) -> Left {
    let outside = ground.outside().join(step_dir_name(STEP));
    let there = outside.join(shard_of(&outside.join(MANIFEST_FILE)));
    let there = there.to_str().unwrap();
    let ours = shard_of(&ground.manifest());
    let names = [
        format!("../../outside/{}/{ours}", step_dir_name(STEP)),
        there.to_owned(),
        format!("./{ours}"),
        format!("{ours}\0"),
        format!("{ours}/../../../outside/precious"),
        ours.replace("rank", "\u{ff52}ank"),
        ours.replace('-', "\u{2010}"),
        ours.replace("00000", "0000\u{660}"),
        ours.replacen("rank-00000", "rank-000000", 1),
        ours.to_uppercase(),
        String::new(),
        "..".into(),
        "/etc/passwd".into(),
        format!("{ours}\u{202e}"),
        "a".repeat(1 << 16),
    ];
    rewrite_manifest(ground, |manifest| {
        manifest["shards"][0]["file"] = json!(names[random.usize(..names.len())]);
    });
    Left::Nothing
}

/// What is retired is deleted: by number, and never by a name.
fn manifest_retires_elsewhere(ground: &Ground, random: &mut Rng) -> Left {
    let retired = [
        json!([{"attempt": "../../outside", "step": 4}]),
        json!([{"attempt": "00000000000000000000000000000000", "step": "../../outside"}]),
        json!([{"attempt": "", "step": u64::MAX}]),
        json!(["../outside"]),
    ];
    rewrite_manifest(ground, |manifest| {
        manifest["retired"] = retired[random.usize(..retired.len())].clone();
    });
    Left::Nothing
}

fn rewrite_manifest(ground: &Ground, change: impl FnOnce(&mut serde_json::Value)) {
    let path = ground.manifest();
    let text = fs::read_to_string(&path).unwrap();
    let mut value: serde_json::Value = serde_json::from_str(&text).unwrap();
    value.as_object_mut().unwrap().remove("crc32c");
    change(&mut value);
    fs::write(path, signed(&value.to_string())).unwrap();
}

/// Names that a person may take for a step's.
fn step_has_an_odd_name(ground: &Ground, random: &mut Rng) -> Left {
    let names: [&[u8]; 12] = [
        b"step-00000000000\xd9\xa4",
        "step-00000000000\u{ff14}".as_bytes(),
        b"step-000000000004\n",
        b"step-+00000000004",
        b"step--00000000004",
        b"step-4",
        b"step-0000000000004",
        b"Step-000000000004",
        b"step-000000000004\xff",
        b"step-99999999999999999999999999",
        b" step-000000000004",
        "step-000000000004\u{202e}".as_bytes(),
    ];
    let name = std::ffi::OsStr::from_bytes(names[random.usize(..names.len())]);
    copy_directory(&ground.outside().join(step_dir_name(STEP)), &ground.store().join(name));
    Left::Whole
}

fn file_has_an_odd_name(ground: &Ground, random: &mut Rng) -> Left {
    let names: [&[u8]; 9] = [
        b"rank-00000.5a.shard",
        b"rank-00000.5A5A5A5A5A5A5A5A5A5A5A5A5A5A5A5A.shard",
        b"rank-00000.\xff\xfe.shard",
        b"manifest.json\n",
        b"MANIFEST.JSON",
        b"manifest.json.tmp",
        b"manifest.json..tmp",
        "rank-00000\u{2024}5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a.shard".as_bytes(),
        b"...",
    ];
    let name = std::ffi::OsStr::from_bytes(names[random.usize(..names.len())]);
    fs::copy(ground.outside().join("precious"), ground.step().join(name)).unwrap();
    Left::Whole
}

fn copy_directory(from: &Path, to: &Path) {
    fs::create_dir(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

/// A tensor's name is text in the index and nothing else: it is saved, shown, and read back.
fn tensors_have_odd_names(ground: &Ground, random: &mut Rng) -> Left {
    let names = [
        "../../outside/precious",
        "/etc/passwd",
        "a\0b",
        "..",
        ".",
        "",
        "\u{202e}gnp.exe",
        "\u{feff}\u{200b}",
        "a/b\\c",
        "CON",
        "e\u{301} is not \u{e9}",
        "\u{10ffff}",
        "line\nbreak\x1b[31m",
        "step-000000000001/manifest.json",
    ];
    let long = "n".repeat(1 << 20);
    let mut pick = || match random.usize(..=names.len()) {
        number if number < names.len() => names[number],
        _ => long.as_str(),
    };
    let mut request = ground.state.request(STEP, 0);
    let keys = [pick().to_owned(), format!("{}\u{1}", pick())];
    request.nodes = vec![Node {
        key: None,
        value: Value::Dict { len: 2, kind: DictKind::Plain, metadata: false },
    }];
    for (tensor, key) in (0..).zip(keys) {
        request.nodes.push(Node { key: Some(Key::Str(key)), value: Value::Tensor(tensor) });
    }
    let nodes = request.nodes.clone();
    let engine = open(&ground.store(), false);
    request.rewind = true;
    state::finish(&engine.save(request).unwrap()).unwrap();
    assert_eq!(engine.checkpoint(STEP).unwrap().index().nodes, nodes);
    Left::Whole
}

#[test]
fn a_lock_that_is_a_link_is_refused_and_not_followed() {
    for target in ["outside/precious", "outside/nowhere"] {
        let ground = Ground::new();
        let lock = ground.store().join("writer.lock");
        let before = snapshot(&ground.outside());
        replace_by_link(&lock, &ground.directory.path().join(target));
        let error = state::open(
            state::config(&ground.store()),
            &state::backend(),
            &Counter::starting_at(0),
        )
        .unwrap_err();
        assert!(matches!(error, EngineError::Io { .. }), "{error}");
        assert!(error.to_string().contains("writer.lock"), "{error}");
        assert!(snapshot(&ground.outside()) == before, "the lock was followed to `{target}`");
        // A reader needs no lock.
        assert!(open(&ground.store(), true).checkpoint(STEP).is_ok());
    }
}

#[test]
fn the_store_itself_may_be_a_link() {
    let ground = Ground::new();
    let link = ground.directory.path().join("link");
    symlink(ground.store(), &link).unwrap();
    let opened = open(&link, true);
    assert!(ground.state.is_in(&opened.checkpoint(STEP).unwrap()).unwrap());
}

#[test]
fn what_is_outside_would_be_noticed_if_it_changed() {
    let ground = Ground::new();
    let before = snapshot(&ground.outside());
    File::options().append(true).open(ground.outside().join("precious")).unwrap();
    assert!(snapshot(&ground.outside()) == before, "opening changes nothing");
    fs::write(ground.outside().join("precious"), "keep").unwrap();
    assert!(snapshot(&ground.outside()) != before, "the same bytes written again are noticed");
}
