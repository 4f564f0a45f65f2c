//! Devices that can be taken away: ext4 on loop devices over images in memory, alone or stacked.
//!
//! ```text
//! alone      ext4 - loop - image in memory             a cut loses the page cache
//! stacked    ext4 - loop - image in ext4 - loop - ...  a cut of the lower one first loses what the
//!                                                      page cache of the lower one holds: the
//!                                                      upper one's volatile device cache
//! thin       ext4 - loop - sparse image in a memory    a write that finds no memory is a medium
//!            filesystem that is too small              error: the file's sync fails with EIO
//! ```
//!
//! `noauto_da_alloc`, because ext4 without it writes a file back when it is renamed: that hides a
//! sync that is missing. Always holds: what is mounted here is unmounted when it is dropped, and at
//! the latest when the process ends, whose own the mounts are (`process.rs`).

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use super::shutdown::shut_down;

const BLOCK_BYTES: usize = 4096;
const MEBIBYTE: u64 = 1 << 20;
/// More than a journal of 4 MiB holds.
const JOURNAL_COMMITS: u32 = 500;
/// How often a device that is busy is asked again: another thread may just be starting a process,
/// which has every file of ours open until it runs its program.
const BUSY_TRIES_MAX: u32 = 200;

/// Runs a program that must succeed.
pub(crate) fn run(words: &[&str]) {
    let output = Command::new(words[0]).args(&words[1..]).output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "`{}`: {errors}", words.join(" "));
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A mounted filesystem.
#[derive(Debug)]
pub(crate) struct Mount {
    path: PathBuf,
}

impl Mount {
    /// Mounts an image, through a loop device that goes with the mount.
    pub(crate) fn image(image: &Path, path: &Path, options: &str) -> Self {
        fs::create_dir_all(path).unwrap();
        let options = format!("loop,{options}");
        run(&["mount", "-t", "ext4", "-o", &options, text(image), text(path)]);
        Self { path: path.to_owned() }
    }

    /// Mounts memory.
    pub(crate) fn memory(bytes: u64, path: &Path) -> Self {
        fs::create_dir_all(path).unwrap();
        let options = format!("size={bytes},huge=never");
        run(&["mount", "-t", "tmpfs", "-o", &options, "tmpfs", text(path)]);
        Self { path: path.to_owned() }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    fn unmount(&self) -> Result<(), String> {
        let mut errors = String::new();
        for _ in 0..BUSY_TRIES_MAX {
            let output = Command::new("umount").arg(&self.path).output().unwrap();
            if output.status.success() {
                return Ok(());
            }
            errors = String::from_utf8_lossy(&output.stderr).into_owned();
            std::thread::sleep(Duration::from_millis(10));
        }
        Err(errors)
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let unmounted = self.unmount();
        if !std::thread::panicking() {
            unmounted.unwrap();
        }
    }
}

/// What an image of a fresh filesystem holds: its blocks that are not zeros.
#[derive(Debug)]
pub(crate) struct Image {
    bytes: u64,
    blocks: Vec<(u64, Vec<u8>)>,
}

impl Image {
    /// Makes an ext4 of `bytes`.
    pub(crate) fn format(bytes: u64, scratch: &Path) -> Self {
        let path = scratch.join("format.img");
        File::create(&path).unwrap().set_len(bytes).unwrap();
        run(&[
            "mkfs.ext4",
            "-q",
            "-F",
            "-b",
            "4096",
            "-J",
            "size=4",
            "-m",
            "0",
            "-E",
            "lazy_itable_init=0,lazy_journal_init=0,nodiscard",
            text(&path),
        ]);
        let image = Self::of(&path);
        fs::remove_file(path).unwrap();
        image
    }

    /// The same, with every block of its journal written once: on a thin device it is data that
    /// finds no memory then, and the filesystem itself goes on.
    pub(crate) fn format_and_use(bytes: u64, scratch: &Path) -> Self {
        let path = scratch.join("used.img");
        Self::format(bytes, scratch).write(&path);
        let mount = Mount::image(&path, &scratch.join("used"), "defaults");
        for _ in 0..JOURNAL_COMMITS {
            let name = mount.path().join("used");
            File::create(&name).unwrap().sync_all().unwrap();
            fs::remove_file(name).unwrap();
        }
        drop(mount);
        let image = Self::of(&path);
        fs::remove_file(path).unwrap();
        image
    }

    fn of(path: &Path) -> Self {
        let bytes = fs::read(path).unwrap();
        let blocks = bytes.chunks(BLOCK_BYTES).enumerate();
        let blocks = blocks.filter(|(_, block)| block.iter().any(|byte| *byte != 0));
        let blocks = blocks.map(|(at, block)| ((at * BLOCK_BYTES) as u64, block.to_vec()));
        Self { bytes: bytes.len() as u64, blocks: blocks.collect() }
    }

    /// Writes it to a new sparse file.
    pub(crate) fn write(&self, path: &Path) {
        let file = OpenOptions::new().write(true).create(true).truncate(true).open(path).unwrap();
        file.set_len(self.bytes).unwrap();
        for (at, block) in &self.blocks {
            file.write_all_at(block, *at).unwrap();
        }
    }
}

/// What a cut loses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Layer {
    /// The page cache.
    Ordered,
    /// The same, with data written in any order beside the journal.
    Writeback,
    /// The page cache and a volatile cache of the device.
    Stacked,
}

impl Layer {
    fn options(self) -> &'static str {
        match self {
            Self::Ordered | Self::Stacked => "noauto_da_alloc",
            Self::Writeback => "noauto_da_alloc,data=writeback",
        }
    }
}

/// Fresh images, to begin with.
#[derive(Debug)]
pub(crate) struct Images {
    single: Image,
    lower: Image,
}

const INNER: &str = "inner.img";

impl Images {
    pub(crate) fn new(scratch: &Path) -> Self {
        let single = Image::format(24 * MEBIBYTE, scratch);
        let image = scratch.join("lower.img");
        Image::format(48 * MEBIBYTE, scratch).write(&image);
        let mount = Mount::image(&image, &scratch.join("lower"), Layer::Stacked.options());
        single.write(&mount.path().join(INNER));
        drop(mount);
        let lower = Image::of(&image);
        fs::remove_file(image).unwrap();
        Self { single, lower }
    }
}

/// A device whose power can be cut. The upper filesystem is unmounted before the lower one.
#[derive(Debug)]
pub(crate) struct Device {
    directory: PathBuf,
    layer: Layer,
    mounts: Option<(Mount, Option<Mount>)>,
}

impl Device {
    /// A fresh one.
    pub(crate) fn new(images: &Images, layer: Layer, directory: &Path) -> Self {
        let image = if layer == Layer::Stacked { &images.lower } else { &images.single };
        image.write(&directory.join("device.img"));
        let mut device = Self { directory: directory.to_owned(), layer, mounts: None };
        device.mount();
        device
    }

    fn mount(&mut self) {
        let options = self.layer.options();
        let at = |name: &str| self.directory.join(name);
        let single = |path: &Path| Mount::image(&at("device.img"), path, options);
        self.mounts = Some(if self.layer == Layer::Stacked {
            let lower = single(&at("lower"));
            let upper = Mount::image(&lower.path().join(INNER), &at("mount"), options);
            (upper, Some(lower))
        } else {
            (single(&at("mount")), None)
        });
    }

    /// Where it is mounted.
    pub(crate) fn path(&self) -> PathBuf {
        self.directory.join("mount")
    }

    /// Who cuts it, from whatever thread.
    pub(crate) fn switch(&self) -> Switch {
        let (upper, lower) = self.mounts.as_ref().unwrap();
        let lowest_first = lower.iter().chain([upper]);
        Switch { mounts: lowest_first.map(|mount| mount.path().to_owned()).collect() }
    }

    /// The power comes back.
    pub(crate) fn restore(&mut self) {
        self.mounts = None;
        self.mount();
    }
}

/// Cuts the power of a device.
#[derive(Debug)]
pub(crate) struct Switch {
    mounts: Vec<PathBuf>,
}

impl Switch {
    pub(crate) fn cut(&self) {
        for mount in &self.mounts {
            shut_down(mount).unwrap();
        }
    }
}

/// A device that promises more than its memory holds.
#[derive(Debug)]
pub(crate) struct Thin {
    mount: Option<Mount>,
    memory: Mount,
    directory: PathBuf,
}

impl Thin {
    /// `bytes` of memory under a fresh `image`.
    pub(crate) fn new(image: &Image, bytes: u64, directory: &Path) -> Self {
        let memory = Mount::memory(bytes, &directory.join("memory"));
        image.write(&memory.path().join("thin.img"));
        let directory = directory.to_owned();
        let mut thin = Self { mount: None, memory, directory };
        thin.restore();
        thin
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.directory.join("mount")
    }

    /// Mounts it, once more or for the first time.
    pub(crate) fn restore(&mut self) {
        self.mount = None;
        let image = self.memory.path().join("thin.img");
        self.mount = Some(Mount::image(&image, &self.path(), "noauto_da_alloc,errors=continue"));
    }

    /// Leaves `bytes` of memory for all that is to come.
    pub(crate) fn leave(&self, bytes: u64) {
        let space = rustix::fs::statvfs(self.memory.path()).unwrap();
        let filler = (space.f_bavail * space.f_frsize).saturating_sub(bytes);
        let file = File::create(self.memory.path().join("filler")).unwrap();
        let flags = rustix::fs::FallocateFlags::empty();
        if filler > 0 {
            rustix::fs::fallocate(&file, flags, 0, filler).unwrap();
        }
    }

    /// Gives the memory back that [`Thin::leave`] took.
    pub(crate) fn heal(&self) {
        fs::remove_file(self.memory.path().join("filler")).unwrap();
    }
}

impl Drop for Thin {
    fn drop(&mut self) {
        self.mount = None;
    }
}
