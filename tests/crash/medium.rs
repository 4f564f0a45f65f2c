//! What a filesystem may show after the power failed at some point of a log of operations.
//!
//! The model is that of POSIX without any of the kindnesses of one filesystem ("All File Systems
//! Are Not Created Equal", OSDI 2014): ext4, xfs and btrfs show a part of these states each.
//!
//! | what                                | after the power loss                                   |
//! |-------------------------------------|--------------------------------------------------------|
//! | bytes and length of a file          | as they were at the last successful `fdatasync` of it  |
//! | a write since then                  | not there, there, or torn: each block of 512 or of     |
//! |                                     | 4096 bytes is old, new, zeros or garbage by itself     |
//! | a reservation or length since then  | there or not, whatever became of the writes around it  |
//! | an entry of a directory             | as it was at the last successful `fsync` of it         |
//! | a creation, rename, removal since   | there or not, each by itself, a rename as a whole      |
//!
//! A sync of a file says nothing about its name, a sync of a directory nothing about the files in
//! it or about its own name, and a sync covers only what had ended when it began.
//!
//! Reordering needs no choice of its own: two operations on different names, or blocks, have the
//! same result in either order, and of two on the same one either order gives what a subset in the
//! order of the log gives.
//!
//! Assumed: a rename within a directory is atomic, and what was synced stays. The lock file of the
//! writer, which goes past [`dtr_engine::io::Io`], is absent, empty or garbage.

use std::collections::BTreeMap;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::Write as _;
use std::path::{Path, PathBuf};

use dtr_engine::io::Length;
use fastrand::Rng;

use super::recorder::Op;
use super::state;

/// Sizes of the blocks that a device writes whole.
const BLOCK_BYTES: [usize; 2] = [512, 4096];

/// A directory's or a file's number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Node {
    Dir(usize),
    File(usize),
}

/// An operation with its names resolved as they were when it was performed.
#[derive(Clone, Debug)]
enum Event {
    /// Names of one directory come to mean something else, or nothing, all at once.
    Entries {
        dir: usize,
        changes: Vec<(String, Option<Node>)>,
    },
    Write {
        file: usize,
        offset: usize,
        bytes: Vec<u8>,
    },
    SetLength {
        file: usize,
        length: Length,
    },
    Sync {
        file: usize,
        covered: Vec<usize>,
    },
    SyncDir {
        dir: usize,
    },
}

/// A log, ready to lose parts of.
#[derive(Debug)]
pub(crate) struct Medium {
    events: Vec<Event>,
}

/// What becomes of the operations that were not synced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    /// All of them happen.
    All,
    /// None of them happens.
    None,
    /// All but the one at this position of the log happen.
    AllBut(usize),
    /// Only the one at this position of the log happens.
    Only(usize),
    /// Each by itself, in part or whole, drawn from a seed.
    Random(u64),
}

/// A directory tree, with its files' bytes.
#[derive(Debug, Default, Hash)]
pub(crate) struct Image {
    directories: Vec<PathBuf>,
    files: BTreeMap<PathBuf, Content>,
}

/// A file's bytes. What is behind them, up to the length, is zeros: reservations are much longer
/// than what is written.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct Content {
    bytes: Vec<u8>,
    length: usize,
}

impl Content {
    /// The bytes that a write brings, whole.
    fn put(&mut self, offset: usize, bytes: &[u8]) {
        let end = offset + bytes.len();
        if self.bytes.len() < end {
            self.bytes.resize(end, 0);
        }
        self.bytes[offset..end].copy_from_slice(bytes);
        self.length = self.length.max(end);
    }

    fn set_length(&mut self, length: Length) {
        match length {
            Length::Reserve(bytes) => self.length = self.length.max(to_usize(bytes)),
            Length::Exact(bytes) => {
                self.length = to_usize(bytes);
                self.bytes.truncate(self.length);
            }
        }
    }

    /// Some of the blocks of a write, and what else may stand where the others should.
    fn tear(&mut self, offset: usize, bytes: &[u8], random: &mut Rng) {
        // Every second of those that are not there whole is not there at all.
        if random.bool() {
            return;
        }
        let block_bytes = BLOCK_BYTES[random.usize(..BLOCK_BYTES.len())];
        // A write that the power cut short has a beginning; others lose blocks anywhere.
        let beginning = random.bool().then(|| random.usize(..=bytes.len() / block_bytes));
        for (number, block) in bytes.chunks(block_bytes).enumerate() {
            let at = offset + number * block_bytes;
            match (beginning, random.usize(..4)) {
                (Some(beginning), _) if number < beginning => self.put(at, block),
                (Some(_), _) | (None, 0) => {}
                (None, 1) => self.put(at, block),
                (None, 2) => self.put(at, &vec![0; block.len()]),
                (None, _) => self.put(at, &state::bytes(random, block.len())),
            }
        }
    }
}

impl Medium {
    pub(crate) fn new(log: &[Op]) -> Self {
        let mut names = Names { dirs: vec![BTreeMap::new()] };
        Self { events: log.iter().map(|op| names.resolve(op)).collect() }
    }

    /// Positions below `point` of what a power loss at `point` may undo.
    pub(crate) fn unsynced(&self, point: usize) -> Vec<usize> {
        let durable = self.durable(point);
        (0..point).filter(|at| !durable[*at] && !self.is_sync(*at)).collect()
    }

    fn is_sync(&self, at: usize) -> bool {
        matches!(self.events[at], Event::Sync { .. } | Event::SyncDir { .. })
    }

    /// Of each operation before `point`, whether a sync before `point` covers it.
    fn durable(&self, point: usize) -> Vec<bool> {
        let mut durable = vec![false; point];
        for (sync_at, sync) in self.events[..point].iter().enumerate() {
            for (at, is_durable) in durable.iter_mut().enumerate().take(sync_at) {
                *is_durable |= match (&self.events[at], sync) {
                    (Event::Entries { dir, .. }, Event::SyncDir { dir: synced }) => dir == synced,
                    (Event::Write { file, .. }, Event::Sync { file: synced, covered }) => {
                        file == synced && covered.binary_search(&at).is_ok()
                    }
                    (Event::SetLength { file, .. }, Event::Sync { file: synced, .. }) => {
                        file == synced
                    }
                    _ => false,
                };
            }
        }
        durable
    }

    /// What is found after a power loss when the first `point` operations had begun, and all of
    /// them but the last had ended.
    pub(crate) fn image(&self, point: usize, fate: Fate) -> Image {
        let durable = self.durable(point);
        let mut random = match fate {
            Fate::Random(seed) => Some(Rng::with_seed(seed)),
            _ => None,
        };
        let mut dirs: BTreeMap<usize, BTreeMap<&str, Node>> = BTreeMap::new();
        let mut files: BTreeMap<usize, Content> = BTreeMap::new();
        for (at, event) in self.events[..point].iter().enumerate() {
            let whole = durable[at]
                || match fate {
                    Fate::All => true,
                    Fate::None => false,
                    Fate::AllBut(left_out) => at != left_out,
                    Fate::Only(kept) => at == kept,
                    Fate::Random(_) => random.as_mut().is_some_and(Rng::bool),
                };
            match event {
                Event::Entries { dir, changes } if whole => {
                    let names = dirs.entry(*dir).or_default();
                    for (name, node) in changes {
                        match node {
                            Some(node) => names.insert(name, *node),
                            None => names.remove(name.as_str()),
                        };
                    }
                }
                Event::Write { file, offset, bytes } => {
                    let content = files.entry(*file).or_default();
                    if whole {
                        content.put(*offset, bytes);
                    } else if let Some(random) = &mut random {
                        content.tear(*offset, bytes, random);
                    }
                }
                Event::SetLength { file, length } if whole => {
                    files.entry(*file).or_default().set_length(*length);
                }
                _ => {}
            }
        }
        let mut image = Image::default();
        image.gather(Path::new(""), 0, &dirs, &files);
        image
    }
}

fn to_usize(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap()
}

/// The names as the running process sees them.
struct Names {
    dirs: Vec<BTreeMap<String, Node>>,
}

impl Names {
    fn resolve(&mut self, op: &Op) -> Event {
        match op {
            Op::MakeDir(path) => {
                self.dirs.push(BTreeMap::new());
                let made = Node::Dir(self.dirs.len() - 1);
                self.change(path, vec![(name_of(path), Some(made))])
            }
            Op::Create(path, file) => {
                self.change(path, vec![(name_of(path), Some(Node::File(*file)))])
            }
            Op::Rename { from, to } => {
                assert_eq!(from.parent(), to.parent(), "the model knows renames in one directory");
                let node = self.dirs[self.dir_of(from)][&name_of(from)];
                self.change(from, vec![(name_of(from), None), (name_of(to), Some(node))])
            }
            Op::RemoveFile(path) | Op::RemoveDir(path) => {
                self.change(path, vec![(name_of(path), None)])
            }
            Op::Write { file, offset, bytes } => {
                Event::Write { file: *file, offset: to_usize(*offset), bytes: bytes.clone() }
            }
            Op::SetLength(file, length) => Event::SetLength { file: *file, length: *length },
            Op::Sync(file, covered) => Event::Sync { file: *file, covered: covered.clone() },
            Op::SyncDir(path) => Event::SyncDir { dir: self.find(path) },
        }
    }

    /// Entries beside `path` that change together.
    fn change(&mut self, path: &Path, changes: Vec<(String, Option<Node>)>) -> Event {
        let dir = self.dir_of(path);
        for (name, node) in &changes {
            match node {
                Some(node) => self.dirs[dir].insert(name.clone(), *node),
                None => self.dirs[dir].remove(name),
            };
        }
        Event::Entries { dir, changes }
    }

    fn dir_of(&self, path: &Path) -> usize {
        self.find(path.parent().unwrap())
    }

    fn find(&self, path: &Path) -> usize {
        path.components().fold(0, |dir, name| {
            match self.dirs[dir][name.as_os_str().to_str().unwrap()] {
                Node::Dir(inner) => inner,
                Node::File(_) => panic!("`{}` leads through a file", path.display()),
            }
        })
    }
}

fn name_of(path: &Path) -> String {
    path.file_name().unwrap().to_str().unwrap().to_owned()
}

impl Image {
    fn gather(
        &mut self,
        path: &Path,
        dir: usize,
        dirs: &BTreeMap<usize, BTreeMap<&str, Node>>,
        files: &BTreeMap<usize, Content>,
    ) {
        self.directories.push(path.to_owned());
        for (name, node) in dirs.get(&dir).into_iter().flatten() {
            match node {
                Node::Dir(inner) => self.gather(&path.join(name), *inner, dirs, files),
                Node::File(file) => {
                    let content = files.get(file).cloned().unwrap_or_default();
                    self.files.insert(path.join(name), content);
                }
            }
        }
    }

    /// Whether the directory exists.
    pub(crate) fn has_directory(&self, path: &Path) -> bool {
        self.directories.iter().any(|directory| directory == path)
    }

    pub(crate) fn add_file(&mut self, path: PathBuf, bytes: Vec<u8>) {
        self.files.insert(path, Content { length: bytes.len(), bytes });
    }

    pub(crate) fn fingerprint(&self, of_what_else: impl Hash) -> u64 {
        let mut hasher = DefaultHasher::new();
        (self, of_what_else).hash(&mut hasher);
        hasher.finish()
    }

    /// Puts it where there is nothing yet.
    pub(crate) fn build(&self, root: &Path) {
        for directory in &self.directories {
            fs::create_dir(root.join(directory)).unwrap();
        }
        for (path, content) in &self.files {
            let mut file = fs::File::create_new(root.join(path)).unwrap();
            file.write_all(&content.bytes).unwrap();
            file.set_len(content.length as u64).unwrap();
        }
    }
}

#[test]
fn an_image_is_what_the_syncs_left() {
    let write = |file, offset, byte| Op::Write { file, offset, bytes: vec![byte; 1024] };
    let log = [
        Op::MakeDir("s".into()),
        Op::SyncDir("".into()),
        Op::Create("s/a".into(), 0),
        write(0, 0, 1),
        write(0, 1024, 2),
        Op::Sync(0, vec![3]),
        Op::SyncDir("s".into()),
        write(0, 0, 3),
        Op::Rename { from: "s/a".into(), to: "s/b".into() },
    ];
    let medium = Medium::new(&log);
    assert_eq!(medium.unsynced(1), [0]);
    assert_eq!(medium.unsynced(9), [4, 7, 8], "a write that had not ended is not covered");
    let files = |point, fate| {
        let image = medium.image(point, fate);
        let files = image.files.into_iter();
        files.map(|(path, content)| (path, content.bytes)).collect::<BTreeMap<_, _>>()
    };
    let one = |name: &str, bytes: Vec<u8>| BTreeMap::from([(PathBuf::from(name), bytes)]);
    assert_eq!(files(6, Fate::None), BTreeMap::new(), "a file's sync does not sync its name");
    assert_eq!(files(6, Fate::Only(2)), one("s/a", vec![1; 1024]));
    assert_eq!(files(9, Fate::None), one("s/a", vec![1; 1024]));
    assert_eq!(files(9, Fate::Only(8)), one("s/b", vec![1; 1024]));
    assert_eq!(files(9, Fate::All), one("s/b", [vec![3; 1024], vec![2; 1024]].concat()));
    assert_eq!(files(9, Fate::AllBut(8)), one("s/a", [vec![3; 1024], vec![2; 1024]].concat()));
    let torn = |content: &Vec<u8>| content[..512] != content[512..1024];
    let found = |torn: fn(&Vec<u8>) -> bool| {
        (0..200).any(|seed| files(9, Fate::Random(seed)).values().any(torn))
    };
    assert!(found(torn), "writes tear at 512 bytes");
    assert!(found(|content| content.len() == 1024), "a write may be lost with its length");
    assert!(found(|content| content.len() == 1536), "or with a part of it");
    assert!(found(|content| content.contains(&0)), "zeros");
    assert!(found(|content| content.iter().any(|byte| *byte > 3)), "garbage");
}
