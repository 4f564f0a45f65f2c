//! Turns the `.proto` files into Rust: shared by `examples/gen.rs`, which writes the committed
//! code, and `tests/fresh.rs`, which checks it.
//!
//! Always holds: the result depends on the `.proto` files and on the versions in `Cargo.lock` only.

use std::io;
use std::path::{Path, PathBuf};

use prost::Message as _;

/// What `grpcurl` and other tools ask the coordinator for.
const DESCRIPTORS: &str = "dtruntime.v1.bin";

/// Generates code for every `.proto` file of this crate into `output`, one file per package, and
/// the description of all of them for reflection.
pub(crate) fn generate(output: &Path) -> io::Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let descriptors = protox::compile(proto_files(&root.join("dtruntime/v1"))?, [root])
        .map_err(io::Error::other)?;
    let mut described = descriptors.clone();
    for file in &mut described.file {
        file.source_code_info = None;
    }
    std::fs::write(output.join(DESCRIPTORS), described.encode_to_vec())?;
    tonic_prost_build::configure()
        .client_mod_attribute(".", "#[cfg(feature = \"client\")]")
        .server_mod_attribute(".", "#[cfg(feature = \"server\")]")
        .build_transport(false)
        .out_dir(output)
        .compile_fds(descriptors)
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
