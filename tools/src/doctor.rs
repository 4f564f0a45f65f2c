//! `ckpt-tool doctor`: what this machine offers for fast checkpoints, and what would help.
//!
//! Always holds: a check warns exactly if it has a hint; what could be better, or cannot be
//! measured, is a finding and no error.

use std::io::Write;
use std::path::PathBuf;

use clap::Args;
use dtr_engine::config::{DirectIo, IoBackend};
use dtr_engine::io::{open_backend, probe};
use dtr_engine::{EngineError, Result};
use serde::Serialize;

use crate::console::{Outcome, Verdict, write_json};
use crate::table::Table;
use crate::text;

const AFTER_HELP: &str = "\
Examines PATH as a location for a store. The speed is measured by writing, reading and deleting a \
file of 256 MiB there; --no-probe skips that. What could be improved is marked `warn` and is not \
an error: the exit status is 0.";

/// Arguments of `doctor`.
#[derive(Args, Debug)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct Options {
    /// A store, or a directory for a new one.
    #[arg(value_name = "PATH", default_value = ".")]
    path: PathBuf,
    /// Do not measure the speed.
    #[arg(long)]
    no_probe: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// What is printed.
#[derive(Debug, Serialize)]
struct Report {
    path: PathBuf,
    checks: Vec<Check>,
}

/// One thing looked at.
#[derive(Debug, Serialize)]
struct Check {
    name: &'static str,
    state: &'static str,
    found: String,
    hint: Option<String>,
}

impl Check {
    fn new(name: &'static str, found: impl Into<String>, hint: Option<String>) -> Self {
        let state = if hint.is_some() { "warn" } else { "ok" };
        Self { name, state, found: found.into(), hint }
    }
}

pub(crate) fn run(options: &Options, out: &mut dyn Write) -> Outcome {
    let directory = existing_directory(&options.path)?;
    let mut checks = vec![machine()];
    checks.extend(facts(probe::facts(&directory)?));
    if !options.no_probe {
        checks.push(speed(&directory));
    }
    let report = Report { path: directory, checks };
    if options.json {
        write_json(out, &report)?;
    } else {
        write_text(out, &report)?;
    }
    Ok(Verdict::Fine)
}

/// The directory itself, or the one that a store would be created in.
fn existing_directory(path: &std::path::Path) -> Result<PathBuf> {
    let refused = |why: &str| {
        let hint = "name a store, or a directory for a new one";
        EngineError::invalid(format!("examining `{}`", path.display()), why, hint)
    };
    match std::fs::metadata(path) {
        Ok(found) if found.is_dir() => Ok(path.to_owned()),
        Ok(_) => Err(refused("it is a file, but a store is a directory")),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            Err(refused("there is no such directory"))
        }
        Err(error) => Err(EngineError::from_io("examining", path, error)),
    }
}

fn machine() -> Check {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let memory = std::fs::read_to_string("/proc/meminfo").ok();
    let memory = memory.as_deref().and_then(memory_bytes);
    let memory =
        memory.map_or("memory unknown".into(), |bytes| format!("{} memory", text::bytes(bytes)));
    Check::new("machine", format!("{}, {memory}", text::count(cores, "core")), None)
}

/// `MemTotal:  1024 kB`, where a kB is 1024 bytes.
fn memory_bytes(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

fn facts(facts: probe::Facts) -> Vec<Check> {
    let probe::Facts {
        kernel,
        filesystem,
        space,
        uring,
        direct_io,
        huge_pages,
        locked_memory_bytes,
    } = facts;
    let free = format!(
        "{} free of {}",
        text::bytes(space.found.free_bytes),
        text::bytes(space.found.total_bytes)
    );
    let locked = locked_memory_bytes.found.map_or("no limit".into(), text::bytes);
    let either = |found: std::result::Result<String, String>| match found {
        Ok(how) => how,
        Err(why) => format!("no: {why}"),
    };
    vec![
        Check::new("kernel", kernel.found, kernel.hint),
        Check::new("filesystem", filesystem.found, filesystem.hint),
        Check::new("space", free, space.hint),
        Check::new("io_uring", either(uring.found), uring.hint),
        Check::new("direct I/O", either(direct_io.found), direct_io.hint),
        Check::new("huge pages", huge_pages.found, huge_pages.hint),
        Check::new("locked memory", locked, locked_memory_bytes.hint),
    ]
}

/// A speed that cannot be measured is a finding too.
fn speed(directory: &std::path::Path) -> Check {
    let measured = open_backend(IoBackend::Auto, DirectIo::Auto).and_then(|io| {
        let speed = probe::measure_speed(&io, directory, probe::SpeedOptions::default())?;
        Ok((io.name(), speed))
    });
    match measured {
        Ok((backend, speed)) => {
            let way = if speed.direct { "direct" } else { "buffered" };
            let found = format!(
                "writes {}/s, reads {}/s ({way}, {backend})",
                text::bytes(speed.write_bytes_per_second),
                text::bytes(speed.read_bytes_per_second)
            );
            Check::new("speed", found, None)
        }
        Err(error) => {
            let found = format!("not measured: {}", error.without_hint());
            Check::new("speed", found, Some(error.hint().to_owned()))
        }
    }
}

fn write_text(out: &mut dyn Write, report: &Report) -> std::io::Result<()> {
    writeln!(out, "{} as a place for checkpoints\n", report.path.display())?;
    let mut table = Table::new().words("CHECK").words("STATE").words("FOUND");
    for check in &report.checks {
        table.row([check.name.into(), check.state.into(), check.found.clone()]);
    }
    table.write(out, "")?;
    let warnings: Vec<_> = report.checks.iter().filter(|check| check.hint.is_some()).collect();
    if warnings.is_empty() {
        return writeln!(out, "\nnothing to improve");
    }
    writeln!(out)?;
    for check in warnings {
        writeln!(out, "{}\n  hint: {}", check.name, check.hint.as_deref().unwrap_or_default())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_counted_in_units_of_1024() {
        assert_eq!(memory_bytes("MemTotal:       2 kB\nMemFree: 1 kB\n"), Some(2048));
        assert_eq!(memory_bytes("MemFree: 1 kB\n"), None);
    }
}
