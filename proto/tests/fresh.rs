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
        contents(scratch.path())? == contents(&committed)?,
        "`{}` is stale\nhint: run `cargo run -p dtr-proto --example gen`",
        committed.display(),
    );
    Ok(())
}

/// What the files of a directory hold, by name.
fn contents(directory: &Path) -> io::Result<BTreeMap<OsString, Vec<u8>>> {
    fs::read_dir(directory)?
        .map(|entry| {
            let entry = entry?;
            Ok((entry.file_name(), fs::read(entry.path())?))
        })
        .collect()
}
