//! `doctor`, which says something else on every machine: its form is checked, not its findings.

use std::path::Path;

use crate::tool;

#[test]
fn every_finding_has_a_state_and_a_warning_has_a_hint() {
    let scratch = tempfile::tempdir().unwrap();
    let run = tool::run(["doctor", scratch.path().to_str().unwrap(), "--no-probe", "--json"]);
    assert_eq!(run.status, 0, "{run:?}");
    let json = run.json();
    let checks = json["checks"].as_array().unwrap();
    let names: Vec<&str> = checks.iter().map(|check| check["name"].as_str().unwrap()).collect();
    let expected = [
        "machine",
        "kernel",
        "filesystem",
        "space",
        "io_uring",
        "direct I/O",
        "huge pages",
        "locked memory",
    ];
    assert_eq!(names, expected);
    for check in checks {
        assert_eq!(check["state"] == "warn", check["hint"].is_string(), "{check}");
        assert!(!check["found"].as_str().unwrap().is_empty(), "{check}");
    }
    assert_eq!(std::fs::read_dir(scratch.path()).unwrap().count(), 0, "nothing stays behind");
}

#[test]
fn memory_is_warned_about() {
    let memory = Path::new("/dev/shm");
    if !memory.is_dir() {
        return;
    }
    let run = tool::run(["doctor", "/dev/shm", "--no-probe"]);
    assert_eq!(run.status, 0, "{run:?}");
    if run.stdout.contains("tmpfs") {
        assert!(run.stdout.contains("this is memory"), "{}", run.stdout);
    }
}

#[test]
fn the_speed_is_measured_or_said_not_to_be() {
    let scratch = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let run = tool::run(["doctor", scratch.path().to_str().unwrap()]);
    assert_eq!(run.status, 0, "{run:?}");
    let speed = run.stdout.lines().find(|line| line.starts_with("speed")).unwrap();
    assert!(speed.contains("writes ") || speed.contains("not measured"), "{speed}");
    assert_eq!(std::fs::read_dir(scratch.path()).unwrap().count(), 0);
}

#[test]
fn a_file_is_no_place_for_a_store() {
    let file = tempfile::NamedTempFile::new().unwrap();
    tool::run(["doctor", file.path().to_str().unwrap()]).assert_error(2);
    tool::run(["doctor", "/nowhere/at/all"]).assert_error(2);
}
