//! The committed code is what the `.proto` files generate.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::Path;
use std::{fs, io};

#[path = "../codegen/mod.rs"]
mod codegen;

#[test]
fn generated_code_is_fresh() -> io::Result<()> {
    let scratch = tempfile::tempdir()?;
    codegen::generate(scratch.path())?;
    let committed = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/gen");
    assert!(
        texts(scratch.path())? == texts(&committed)?,
        "`{}` is stale\nhint: run `cargo run -p dtr-proto --example gen`",
        committed.display(),
    );
    Ok(())
}

/// The files of a directory, by name.
fn texts(directory: &Path) -> io::Result<BTreeMap<OsString, String>> {
    fs::read_dir(directory)?
        .map(|entry| {
            let entry = entry?;
            Ok((entry.file_name(), fs::read_to_string(entry.path())?))
        })
        .collect()
}
