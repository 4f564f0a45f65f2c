//! Files that hold what is expected to be printed.
//!
//! Always holds: what differs from run to run (paths, times, speeds, versions) is replaced before
//! it is compared. `UPDATE_GOLDEN=1` writes the files again; the difference is for people to read.

use std::fs;
use std::path::{Path, PathBuf};

/// Compares `actual` with the file of this name.
#[track_caller]
pub(crate) fn assert_golden(name: &str, actual: &str) {
    let path = directory().join(format!("{name}.txt"));
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        fs::create_dir_all(directory()).unwrap();
        fs::write(&path, actual).unwrap();
        return;
    }
    let expected = fs::read_to_string(&path)
        .unwrap_or_else(|error| panic!("`{}`: {error}; set UPDATE_GOLDEN=1", path.display()));
    assert!(
        expected == actual,
        "`{name}` prints something else (UPDATE_GOLDEN=1 accepts it)\n--- expected\n{expected}\n\
         --- actual\n{actual}"
    );
}

fn directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

/// Replaces what differs from run to run. `replacements` are literal, longest first.
pub(crate) fn redact(text: &str, replacements: &[(String, &str)]) -> String {
    let mut text = text.to_owned();
    for (found, replacement) in replacements {
        text = text.replace(found, replacement);
    }
    text.lines().map(|line| redact_line(line) + "\n").collect()
}

fn redact_line(line: &str) -> String {
    let line = redact_dates(line);
    for name in ["\"seconds\": ", "\"created_unix_ms\": ", "\"age_seconds\": "] {
        if let Some((before, value)) = line.split_once(name) {
            let comma = if value.ends_with(',') { "," } else { "" };
            return format!("{before}{name}…{comma}");
        }
    }
    // It holds the time.
    if let Some((before, after)) = line.split_once("manifest's checksum is ") {
        let rest = after.get(8 + ", expected ".len() + 8..).unwrap_or_default();
        return format!("{before}manifest's checksum is …, expected …{rest}");
    }
    // Verify's and restore's lines end with how long it took and how fast that was.
    match line.rsplit_once(" in ") {
        Some((before, after)) if after.contains(" s, ") => format!("{before} in … s, …"),
        _ => line,
    }
}

/// `2026-11-24 08:30:00` becomes a text of the same width.
fn redact_dates(line: &str) -> String {
    const SHAPE: &[u8] = b"dddd-dd-dd dd:dd:dd";
    let fits = |at: &[u8]| {
        at.iter().zip(SHAPE).all(|(byte, shape)| match shape {
            b'd' => byte.is_ascii_digit(),
            other => byte == other,
        })
    };
    let found = line.as_bytes().windows(SHAPE.len()).position(fits);
    found.map_or(line.to_owned(), |at| {
        format!("{}YYYY-MM-DD hh:mm:ss{}", &line[..at], &line[at + SHAPE.len()..])
    })
}

#[test]
fn what_varies_is_replaced() {
    let text = "STEP 2026-11-24 08:30:00 /tmp/x\n  \"seconds\": 0.25,\nread in 0.10 s, 2 GB/s\n";
    let expected = "STEP YYYY-MM-DD hh:mm:ss S\n  \"seconds\": …,\nread in … s, …\n";
    assert_eq!(redact(text, &[("/tmp/x".into(), "S")]), expected);
}
