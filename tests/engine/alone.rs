//! Tests that measure a whole process, and so need one of their own.
//!
//! Always holds: the test ran there, by itself, or the one that asked for it fails.

use std::process::Command;

/// Set in the process that measures.
const ALONE: &str = "DTR_TEST_ALONE";

/// Runs `test`, the test named `name`, in a process where nothing else runs.
pub(crate) fn alone(name: &str, test: impl FnOnce()) {
    if std::env::var_os(ALONE).is_some() {
        return test();
    }
    let output = Command::new(std::env::current_exe().unwrap())
        .args([name, "--exact", "--nocapture", "--test-threads=1"])
        .env(ALONE, "1")
        .output()
        .unwrap();
    let printed = String::from_utf8_lossy(&output.stdout);
    println!("{printed}");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(printed.contains("1 passed"), "the test did not run alone:\n{printed}");
}
