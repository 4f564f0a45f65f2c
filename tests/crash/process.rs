//! Tests that need a process of their own: one that can be killed, or one that can mount.
//!
//! Always holds: a child ends with its parent, however that ends; what a process mounted in a
//! namespace of its own, loop devices with it, is gone when the process is.

use std::path::Path;
use std::process::Command;

use rustix::process::{Signal, set_parent_process_death_signal};

/// Set in a process that has mounts of its own.
const OWN_MOUNTS: &str = "DTR_TEST_OWN_MOUNTS";

/// What mounts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mounts {
    /// Memory only: a user namespace will do.
    Memory,
    /// Loop devices: only root may.
    Loops,
}

/// Ends this process when its parent ends.
pub(crate) fn end_with_parent() {
    set_parent_process_death_signal(Some(Signal::KILL)).unwrap();
}

/// The command that runs the test named `name`, and nothing else, in another process.
pub(crate) fn rerun(program: Option<&[&str]>, name: &str) -> Command {
    let test = std::env::current_exe().unwrap();
    let mut command = match program {
        None => Command::new(test),
        Some(words) => {
            let mut command = Command::new(words[0]);
            command.args(&words[1..]).arg(test);
            command
        }
    };
    command.args([name, "--exact", "--nocapture", "--test-threads=1"]);
    command
}

/// Runs `test`, the test named `name`, in a process with mounts of its own; where that cannot be,
/// says so in the words that `tests/torture/torture.py` reads and counts.
pub(crate) fn with_own_mounts(name: &str, mounts: Mounts, test: impl FnOnce()) {
    if std::env::var_os(OWN_MOUNTS).is_some() {
        end_with_parent();
        return test();
    }
    let is_root = rustix::process::geteuid().is_root();
    let mut unshare = vec!["unshare", "--mount", "--propagation", "private"];
    if mounts == Mounts::Memory && !is_root {
        unshare.extend(["--user", "--map-root-user"]);
    }
    if let Some(why) = why_not(&unshare, mounts, is_root) {
        println!("torture: skipped: {why}");
        return;
    }
    let output = rerun(Some(&unshare), name).env(OWN_MOUNTS, "1").output().unwrap();
    let printed = String::from_utf8_lossy(&output.stdout);
    println!("{printed}");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(printed.contains("1 passed"), "the test did not run by itself:\n{printed}");
}

fn why_not(unshare: &[&str], mounts: Mounts, is_root: bool) -> Option<String> {
    let tries = |words: &[&str]| {
        let output = Command::new(words[0]).args(&words[1..]).output();
        output.is_ok_and(|output| output.status.success())
    };
    if mounts == Mounts::Loops {
        if !is_root {
            return Some("loop devices need root".into());
        }
        if !Path::new("/dev/loop-control").exists() {
            return Some("this kernel or container has no loop devices".into());
        }
        if !tries(&["mkfs.ext4", "-V"]) {
            return Some("`mkfs.ext4` is not installed (e2fsprogs)".into());
        }
    }
    let mut mount = unshare.to_vec();
    mount.extend(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", "/mnt"]);
    (!tries(&mount)).then(|| format!("`{}` is refused", mount.join(" ")))
}
