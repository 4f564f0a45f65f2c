//! Where the time of a save and of a load goes, span by span, on any machine and without `perf`.
//!
//! For each codec: a first save, which also maps and touches the arena; a save without recording,
//! to compare with; then the saves that are recorded, and a load. What is recorded becomes a table
//! of CPU seconds and a timeline file.
//!
//! Always holds: the loaded bytes are compared with the state; a profile without spans is an error,
//! not an empty table.
#![expect(clippy::print_stdout, reason = "printing is what this program is for")]

use std::fs::File;
use std::io::BufWriter;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, ValueEnum};
use dtr_benches::machine;
use dtr_benches::profile::{Phase, write_timeline};
use dtr_benches::spans::{Recorder, process_cpu};
use dtr_benches::state::State;
use dtr_engine::config::{Compression, IoBackend};
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
    #[arg(long, value_name = "MIB", default_value_t = 1024, value_parser = clap::value_parser!(u64).range(1..=1 << 20))]
    size_mib: u64,
    /// Codecs to profile, one after the other.
    #[arg(long, value_name = "CODEC", value_delimiter = ',', default_value = "auto,none,float")]
    codecs: Vec<Codec>,
    /// Saves to record for each codec; the table adds them up.
    #[arg(long, value_name = "COUNT", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=1000))]
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
            println!("error: {error}");
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
        state.raw_bytes() >> 20,
        state.crc32c(),
        directory.display()
    );
    let mut phases = Vec::new();
    for &codec in &options.codecs {
        phases.extend(profile_codec(codec, &state, options, &directory, recorder)?);
    }
    let timeline = directory.join("checkpoint-profile.json");
    write_timeline(&mut BufWriter::new(File::create(&timeline)?), &phases)?;
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
    let name = format!("{codec:?}").to_lowercase();
    let store = tempfile::tempdir_in(directory)?;
    let engine = Engine::open(Config {
        compression: codec.into(),
        io_backend: options.io_backend.into(),
        keep_last_n: Some(1),
        ..Config::new(store.path())
    })?;
    let mut steps = 1_u64..;
    let mut save = || -> Outcome<f64> {
        let request = state.request(steps.next().expect("steps do not end"));
        let info = engine.save(request)?.result(None).expect("no time limit was given")?;
        #[expect(clippy::cast_precision_loss, reason = "a ratio, for people")]
        Ok(info.stored_bytes as f64 / info.raw_bytes as f64)
    };
    save()?;
    let plain_cpu = cpu_of(&mut save)?;

    let label = format!("save, {name}, {}", engine.io_backend());
    let (saved, outcome) = Phase::record(recorder, label, || -> Outcome<f64> {
        (0..options.steps).try_fold(0.0, |_, _| save())
    });
    let ratio = outcome?;
    print_phase(&saved)?;
    match saved.share_of(CHECKSUM) {
        Some(share) => println!("  checksums: {:.1} % of the save's CPU seconds", 100.0 * share),
        None => println!("  checksums: no span is named `{CHECKSUM}`"),
    }
    println!("  stored: {:.1} % of the raw bytes", 100.0 * ratio);
    println!(
        "  CPU seconds of one save: {:.3} recorded, {:.3} not recorded\n",
        saved.cpu.as_secs_f64() / Duration::from_secs(options.steps).as_secs_f64(),
        plain_cpu.as_secs_f64()
    );

    let mut memory = state.memory();
    let newest = engine.steps()?.last().copied().ok_or("no checkpoint was left")?;
    let label = format!("load, {name}, {}", engine.io_backend());
    let (loaded, outcome) =
        Phase::record(recorder, label, || memory.fill_from(&engine.checkpoint(newest)?));
    outcome?;
    if let Some(difference) = state.difference(&memory) {
        return Err(difference.into());
    }
    print_phase(&loaded)?;
    println!("  crc32c of what came back: {:08x}\n", memory.crc32c());
    engine.close()?;
    store.close()?;
    Ok([saved, loaded])
}

fn cpu_of<T>(work: impl FnOnce() -> Outcome<T>) -> Outcome<Duration> {
    let start = process_cpu();
    work()?;
    Ok(process_cpu().saturating_sub(start))
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
