//! Throughput of saves and loads, and the stall of a save, by criterion.
//!
//! Always holds: what cannot be measured on this machine is printed and counted, never left out in
//! silence; each result is followed by the checksum of the bytes that came back.
#![expect(clippy::print_stdout, reason = "printing is what this program is for")]

use std::path::Path;
use std::time::Duration;

use criterion::measurement::WallTime;
use criterion::{
    BenchmarkGroup, BenchmarkId, Criterion, PlottingBackend, SamplingMode, Throughput,
};
use dtr_benches::cases::{Case, Run, Scale, States, check_backend};
use dtr_benches::machine;

fn main() {
    let mut criterion = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2))
        .nresamples(10_000)
        .plotting_backend(PlottingBackend::Plotters)
        .configure_from_args();
    let scale = if is_measuring() { Scale::FULL } else { Scale::TINY };
    let directory = machine::scratch_directory();
    println!("{}; scratch files in {}", machine::describe(), directory.display());

    let cases = Case::all(&scale);
    let mut states = States::default();
    let mut skipped = 0;
    for cases in cases.chunk_by(|a, b| a.group() == b.group()) {
        let mut group = criterion.benchmark_group(cases[0].group());
        // One save is long enough to be a sample of its own.
        group.sampling_mode(SamplingMode::Flat);
        for case in cases {
            match check_backend(case.io_backend, &scale, &directory) {
                Ok(()) => measure(&mut group, case, &scale, &mut states, &directory),
                Err(error) => {
                    println!("skipped: {}, because {error}", case.name());
                    skipped += 1;
                }
            }
        }
        group.finish();
    }
    println!("{skipped} of {} benchmarks were skipped", cases.len());
    criterion.final_summary();
}

/// Measures one case, unless the command line leaves it out: then nothing is prepared either.
fn measure(
    group: &mut BenchmarkGroup<'_, WallTime>,
    case: &Case,
    scale: &Scale,
    states: &mut States,
    directory: &Path,
) {
    let mut run = None;
    group.throughput(Throughput::Bytes(case.raw_bytes));
    group.bench_function(BenchmarkId::new(case.function(), case.size()), |bencher| {
        let run = run.get_or_insert_with(|| {
            let state = states.get(case.raw_bytes);
            or_stop(case, Run::prepare(*case, scale, state, directory))
        });
        bencher.iter_custom(|iterations| or_stop(case, run.measure(iterations)));
    });
    if let Some(run) = run {
        println!("{}: crc32c of what came back {:08x}", case.name(), or_stop(case, run.finish()));
    }
}

/// Criterion's own rule: `cargo bench` measures, `cargo test --benches` and `cargo bench -- --test`
/// run each benchmark once.
fn is_measuring() -> bool {
    let is_given = |flag: &str| std::env::args().any(|argument| argument == flag);
    is_given("--bench") && !is_given("--test")
}

/// A failed save is no slow one: the whole bench ends.
fn or_stop<T>(case: &Case, result: dtr_engine::Result<T>) -> T {
    result.unwrap_or_else(|error| panic!("{}: {error}", case.name()))
}
