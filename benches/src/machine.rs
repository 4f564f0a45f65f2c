//! Where scratch files go, and which machine the figures are of.

use std::env;
use std::path::{Path, PathBuf};

/// The environment variable that names a directory for scratch files.
pub const DIRECTORY_VARIABLE: &str = "DTR_BENCH_DIR";

/// The directory for scratch files: what [`DIRECTORY_VARIABLE`] names, else where this program
/// is. That is cargo's target directory: on a disk, where `/tmp` may be memory.
pub fn scratch_directory() -> PathBuf {
    let named = env::var_os(DIRECTORY_VARIABLE).filter(|name| !name.is_empty());
    let beside = || env::current_exe().ok()?.parent().map(Path::to_owned);
    named.map(PathBuf::from).or_else(beside).unwrap_or_else(env::temp_dir)
}

/// Cores and kernel, in words.
pub fn describe() -> String {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let system = rustix::system::uname();
    let [name, release, machine] = [system.sysname(), system.release(), system.machine()]
        .map(|text| text.to_string_lossy().into_owned());
    format!("{cores} cores, {name} {release} on {machine}")
}
