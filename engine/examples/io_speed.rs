//! How fast each io backend writes and reads a 1 GiB file, the way a save and a load do.
//!
//! `cargo run --release -p dtr-engine --example io_speed -- [DIRECTORY]`
//!
//! Goal: compare backends on one device. Not a goal: the device's best figure (see `fio` for that);
//! run it several times, for devices are noisy.
#![expect(clippy::print_stdout, reason = "prints its result")]

use std::path::PathBuf;

use dtr_engine::config::{DirectIo, IoBackend};
use dtr_engine::io::open_backend;
use dtr_engine::io::probe::{Speed, SpeedOptions, measure_speed};

fn main() -> dtr_engine::Result<()> {
    let directory = std::env::args_os().nth(1).map_or_else(std::env::temp_dir, PathBuf::from);
    let options = SpeedOptions { file_bytes: 1 << 30, ..SpeedOptions::default() };
    println!("{:<8} {:<9} {:>12} {:>12}", "backend", "path", "write MiB/s", "read MiB/s");
    for backend in [IoBackend::Uring, IoBackend::Threads] {
        for direct_io in [DirectIo::Auto, DirectIo::Off] {
            match open_backend(backend, direct_io) {
                Ok(io) => print(io.name(), measure_speed(&io, &directory, options)?),
                Err(error) => println!("skipped: {error}"),
            }
        }
    }
    Ok(())
}

fn print(backend: &str, speed: Speed) {
    let path = if speed.direct { "direct" } else { "buffered" };
    let write = speed.write_bytes_per_second >> 20;
    let read = speed.read_bytes_per_second >> 20;
    println!("{backend:<8} {path:<9} {write:>12} {read:>12}");
}
