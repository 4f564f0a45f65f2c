//! Writes `src/gen` again: `cargo run -p dtr-proto --example gen`.

use std::path::Path;

#[path = "../codegen/mod.rs"]
mod codegen;

fn main() -> std::io::Result<()> {
    codegen::generate(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src/gen"))
}
