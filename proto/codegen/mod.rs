//! Turns the `.proto` files into Rust: shared by `examples/gen.rs`, which writes the committed
//! code, and `tests/fresh.rs`, which checks it.
//!
//! Always holds: the result depends on the `.proto` files and on the versions in `Cargo.lock` only.

use std::io;
use std::path::{Path, PathBuf};

/// Generates code for every `.proto` file of this crate into `output`, one file per package.
pub(crate) fn generate(output: &Path) -> io::Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let descriptors = protox::compile(proto_files(&root.join("dtruntime/v1"))?, [root])
        .map_err(io::Error::other)?;
    prost_build::Config::new().out_dir(output).compile_fds(descriptors)
}

/// The `.proto` files in `directory`, sorted: the generated order follows theirs.
fn proto_files(directory: &Path) -> io::Result<Vec<PathBuf>> {
    let mut files = std::fs::read_dir(directory)?
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<io::Result<Vec<_>>>()?;
    files.retain(|file| file.extension().is_some_and(|extension| extension == "proto"));
    files.sort();
    Ok(files)
}
