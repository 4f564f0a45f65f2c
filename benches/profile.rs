//! Where the time of a save and of a load goes, span by span, on any machine and without `perf`.
//!
//! For each codec: a first save, which also maps and touches the arena; saves that are not
//! recorded, to compare with; as many that are, and a load. What is recorded becomes a table of CPU
//! seconds and a timeline file.
//!
//! Always holds: the loaded bytes are compared with the state; a profile without spans is an error,
//! not an empty table.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "printing is its purpose")]

use std::fs::File;
use std::io::BufWriter;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Parser, ValueEnum, value_parser};
use dtr_benches::machine;
use dtr_benches::profile::{Phase, write_timeline};
use dtr_benches::spans::{Recorder, process_cpu};
use dtr_benches::state::State;
use dtr_engine::config::{Compression, IoBackend};
use dtr_engine::save::SaveInfo;
use dtr_engine::{Config, Engine};
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::{Layer, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;

/// The span in which bytes are checksummed.
const CHECKSUM: &str = "checksum";
/// Everything is drawn from this.
const SEED: u64 = 42;

/// Shows where the time of a save and of a load goes.
#[derive(Debug, Parser)]
#[command(name = "profile", max_term_width = 100)]
struct Options {
    /// Size of the state in MiB: bf16 weights, fp32 masters, both moments of AdamW.
    #[arg(long, value_name = "MIB", default_value_t = 1024)]
    #[arg(value_parser = value_parser!(u64).range(1..=1 << 20))]
    size_mib: u64,
    /// Codecs to profile, one after the other.
    #[arg(long, value_name = "CODEC", value_delimiter = ',', default_value = "auto,none,float")]
    codecs: Vec<Codec>,
    /// Saves to record for each codec; the table adds them up.
    #[arg(long, value_name = "COUNT", default_value_t = 2)]
    #[arg(value_parser = value_parser!(u64).range(1..=1000))]
    steps: u64,
    /// Which way bytes reach the device.
    #[arg(long, value_name = "BACKEND", default_value = "auto")]
    io_backend: Backend,
    /// Where checkpoints and the timeline are written; by default what DTR_BENCH_DIR names, else
    /// cargo's target directory.
    #[arg(long, value_name = "PATH")]
    directory: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Codec {
    Auto,
    None,
    Float,
    Zstd,
    Gzip,
}

impl From<Codec> for Compression {
    fn from(codec: Codec) -> Self {
        match codec {
            Codec::Auto => Self::Auto,
            Codec::None => Self::None,
            Codec::Float => Self::Float,
            Codec::Zstd => Self::Zstd,
            Codec::Gzip => Self::Gzip,
        }
    }
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Backend {
    Auto,
    Uring,
    Threads,
}

impl From<Backend> for IoBackend {
    fn from(backend: Backend) -> Self {
        match backend {
            Backend::Auto => Self::Auto,
            Backend::Uring => Self::Uring,
            Backend::Threads => Self::Threads,
        }
    }
}

fn main() -> ExitCode {
    let options = Options::parse();
    let recorder = Recorder::default();
    install(&recorder);
    match run(&options, &recorder) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Gives the engine's spans to the recorder, and its warnings to stderr.
fn install(recorder: &Recorder) {
    let spans = Targets::new().with_target("dtr_engine", LevelFilter::TRACE);
    let warnings = tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        .with_filter(LevelFilter::WARN);
    tracing_subscriber::registry().with(recorder.clone().with_filter(spans)).with(warnings).init();
}

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

fn run(options: &Options, recorder: &Recorder) -> Outcome<()> {
    let directory = options.directory.clone().unwrap_or_else(machine::scratch_directory);
    let state = State::generate(SEED, options.size_mib << 20);
    println!(
        "{}; {} MiB of state, crc32c {:08x}; checkpoints in {}",
        machine::describe(),
        options.size_mib,
        state.crc32c(),
        directory.display()
    );
    let mut phases = Vec::new();
    for &codec in &options.codecs {
        phases.extend(profile_codec(codec, &state, options, &directory, recorder)?);
    }
    let timeline = directory.join("checkpoint-profile.json");
    let file = File::create(&timeline).map_err(|error| unwritable(&timeline, &error))?;
    write_timeline(&mut BufWriter::new(file), &phases)?;
    println!("timeline, for ui.perfetto.dev or chrome://tracing: {}", timeline.display());
    println!("below the spans, where perf is installed: {}", perf_command());
    Ok(())
}

/// Prints the tables of one codec; returns the phases for the timeline.
fn profile_codec(
    codec: Codec,
    state: &State,
    options: &Options,
    directory: &Path,
    recorder: &Recorder,
) -> Outcome<[Phase; 2]> {
    let store = tempfile::tempdir_in(directory).map_err(|error| unwritable(directory, &error))?;
    let engine = Engine::open(Config {
        compression: codec.into(),
        io_backend: options.io_backend.into(),
        keep_last_n: Some(1),
        ..Config::new(store.path())
    })?;
    let name = format!("{codec:?}").to_lowercase();
    let name = format!("{name}, {}", engine.io_backend());
    let saved = profile_saves(&engine, state, options.steps, recorder, &name)?;
    let loaded = profile_load(&engine, state, recorder, &name)?;
    engine.close()?;
    store.close()?;
    Ok([saved, loaded])
}

fn profile_saves(
    engine: &Engine,
    state: &State,
    count: u64,
    recorder: &Recorder,
    name: &str,
) -> Outcome<Phase> {
    let save = |step: u64| -> Outcome<SaveInfo> {
        Ok(engine.save(state.request(step))?.result(None).expect("no time limit was given")?)
    };
    let warm = save(1)?;
    let cpu_at_start = process_cpu();
    (2..2 + count).try_for_each(|step| save(step).map(drop))?;
    let plain_cpu = process_cpu().saturating_sub(cpu_at_start);
    let (phase, outcome) = Phase::record(recorder, format!("save, {name}"), || {
        (2 + count..2 + 2 * count).try_for_each(|step| save(step).map(drop))
    });
    outcome?;

    print_phase(&phase)?;
    match phase.share_of(CHECKSUM) {
        Some(share) => println!("  checksums: {:.1} % of the save's CPU seconds", 100.0 * share),
        None => println!("  checksums: no span is named `{CHECKSUM}`"),
    }
    println!("  as many saves that were not recorded: {:.3} CPU seconds", plain_cpu.as_secs_f64());
    let (stored_mib, raw_mib) = (warm.stored_bytes >> 20, warm.raw_bytes >> 20);
    println!("  the first save stored {stored_mib} MiB of {raw_mib} MiB\n");
    Ok(phase)
}

fn profile_load(engine: &Engine, state: &State, recorder: &Recorder, name: &str) -> Outcome<Phase> {
    let step = engine.steps()?.last().copied().ok_or("no checkpoint was left")?;
    let mut memory = state.memory();
    let (phase, outcome) = Phase::record(recorder, format!("load, {name}"), || {
        memory.fill_from(&engine.checkpoint(step)?)
    });
    outcome?;
    if let Some(difference) = state.difference(&memory) {
        return Err(difference.into());
    }
    print_phase(&phase)?;
    println!("  crc32c of what came back: {:08x}\n", memory.crc32c());
    Ok(phase)
}

fn unwritable(path: &Path, error: &std::io::Error) -> String {
    format!(
        "writing to `{}`: {error}\nhint: name another place with `--directory` or {}",
        path.display(),
        machine::DIRECTORY_VARIABLE
    )
}

fn print_phase(phase: &Phase) -> Outcome<()> {
    if phase.recording.spans.is_empty() {
        return Err(format!(
            "recording `{}`: the engine entered no span\nhint: build it without a `max_level` \
             or `release_max_level` feature of tracing",
            phase.name
        )
        .into());
    }
    print!("{}", phase.table());
    Ok(())
}

/// How to look below the spans.
fn perf_command() -> String {
    let program = std::env::current_exe().unwrap_or_else(|_| "profile".into());
    format!("perf record --call-graph dwarf {} --codecs float && perf report", program.display())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        Options::command().debug_assert();
    }

    #[test]
    fn a_small_profile_runs_to_its_end() {
        let recorder = Recorder::default();
        install(&recorder);
        let directory = tempfile::tempdir_in(machine::scratch_directory()).unwrap();
        let path = directory.path().to_str().unwrap();
        let arguments = ["profile", "--size-mib", "9", "--steps", "2", "--directory", path];
        run(&Options::parse_from(arguments), &recorder).unwrap();
        let timeline = std::fs::read(directory.path().join("checkpoint-profile.json")).unwrap();
        let timeline: serde_json::Value = serde_json::from_slice(&timeline).unwrap();
        let events = timeline["traceEvents"].as_array().unwrap();
        // A save and a load for each of three codecs.
        for process in 1..=6 {
            let of_process = events.iter().filter(|event| event["pid"] == process);
            assert!(of_process.filter(|event| event["ph"] == "X").count() > 3, "{process}");
        }
    }
}
