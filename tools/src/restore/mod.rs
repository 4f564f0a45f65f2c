//! `ckpt-tool restore`: a checkpoint's tensors to a safetensors file, or all of it to a store.
//!
//! Always holds: every byte that is written was checked against its checksums; what stands at the
//! output's name is whole; memory is bounded, however large the tensors.

use std::io::Write;
use std::path::{Path, PathBuf};

use clap::Args;
use dtr_engine::{EngineError, Result};
use serde::Serialize;

use crate::console::{Outcome, Verdict, write_json};
use crate::opened::{self, StoreArgument};
use crate::text;

mod draft;
mod file;
mod gather;
mod header;
mod parts;
mod selection;
mod store;
mod tiling;

/// What a name ends with that means a file.
const FILE_SUFFIX: &str = "safetensors";

/// For messages.
const DOING: &str = "restoring from";

const AFTER_HELP: &str = "\
An OUTPUT that ends with `.safetensors` is a file of the tensors, named by their paths in the \
state; plain values are not in it, and tensors that share memory are written once per name. Of \
tensors that ranks hold in slices, as FSDP does, the slices of all ranks are put together. Any \
other OUTPUT is a store, `s3://bucket/prefix` or a directory, created if need be: the checkpoint \
is copied into it whole, under its own step.

In GLOB, `*` stands for any characters, dots too, and `?` for one: `model.*.weight`.";

/// Arguments of `restore`.
#[derive(Args, Debug)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct Options {
    #[command(flatten)]
    store: StoreArgument,
    /// The step to restore [default: the newest]
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    step: Option<u64>,
    /// The rank whose part is restored, where several ranks saved the checkpoint; `ckpt-tool copy`
    /// copies all of them. Its tensors in slices are completed from the others [default: for a
    /// file, what is no rank's own].
    #[arg(long, value_name = "R")]
    rank: Option<u32>,
    /// Write only tensors whose path fits; may be given several times. For files only.
    #[arg(long, value_name = "GLOB")]
    tensors: Vec<String>,
    /// Leave out tensors whose path fits; may be given several times. For files only.
    #[arg(long, value_name = "GLOB")]
    exclude: Vec<String>,
    /// Name tensors by what follows this path, such as `model`: as a model's own file has them. For
    /// files only.
    #[arg(long, value_name = "PATH")]
    strip_prefix: Option<String>,
    /// A file `NAME.safetensors`, or a store: a directory, or `s3://bucket/prefix`.
    #[arg(long, short, value_name = "OUTPUT")]
    output: PathBuf,
    /// Replace a file that exists.
    #[arg(long)]
    force: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// What is printed.
#[derive(Debug, Serialize)]
struct Restored {
    step: u64,
    /// None for what is no rank's alone, of several.
    rank: Option<u32>,
    output: PathBuf,
    /// `file` or `store`.
    kind: &'static str,
    tensors: u64,
    /// Tensors that were left out, since they are each rank's own and no rank was named.
    left_out: u64,
    /// Raw bytes of the tensors or storages that were written.
    raw_bytes: u64,
    /// Bytes of what was written, as it lies there.
    disk_bytes: u64,
    seconds: f64,
}

pub(crate) fn run(options: &Options, out: &mut dyn Write) -> Outcome {
    let to_file = is_file_name(&options.output);
    check_options(options, to_file)?;
    let engine = options.store.open()?;
    let (step, rank) = (options.step, options.rank);
    let restored = if to_file {
        let checkpoint = opened::any_rank(&engine, &options.store, step, rank, DOING)?;
        file::restore(&engine, &checkpoint, options)?
    } else {
        let checkpoint = opened::checkpoint(&engine, &options.store, step, rank, DOING)?;
        store::restore(&checkpoint, &options.output, options.store.s3())?
    };
    if options.json {
        write_json(out, &restored)?;
    } else {
        write_text(out, &restored)?;
    }
    Ok(Verdict::Fine)
}

fn is_file_name(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == FILE_SUFFIX)
}

/// Refuses what cannot work before anything is read.
fn check_options(options: &Options, to_file: bool) -> Result<()> {
    let output = options.output.display();
    let refused = |why: &str, hint: &str| {
        Err(EngineError::invalid(format!("restoring to `{output}`"), why, hint))
    };
    let found = std::fs::metadata(&options.output).ok();
    if to_file {
        // A link that leads nowhere is there too, and is not written through.
        let is_there = std::fs::symlink_metadata(&options.output).is_ok();
        return match found {
            Some(found) if found.is_dir() => {
                refused("it is a directory", "name a file, or a store without `.safetensors`")
            }
            _ if is_there && !options.force => {
                refused("it exists", "choose another name, or replace it with `--force`")
            }
            _ => Ok(()),
        };
    }
    if found.is_some_and(|found| !found.is_dir()) {
        return refused(
            "it is a file, and does not end with `.safetensors`",
            "name a file that does, or the directory of a store",
        );
    }
    let selects = !options.tensors.is_empty() || !options.exclude.is_empty();
    if selects || options.strip_prefix.is_some() {
        return refused(
            "it is a store, and a checkpoint is copied into one whole, as it is",
            "name a file that ends with `.safetensors`, or leave out `--tensors`, `--exclude` and \
             `--strip-prefix`",
        );
    }
    if options.force {
        return refused(
            "it is a store, and nothing in a store is replaced",
            "leave out `--force`, and choose a store without this step",
        );
    }
    Ok(())
}

fn write_text(out: &mut dyn Write, restored: &Restored) -> std::io::Result<()> {
    writeln!(
        out,
        "step {}: {}, {} written to {} `{}` in {:.2} s, {}",
        restored.step,
        text::count(restored.tensors, "tensor"),
        text::bytes(restored.disk_bytes),
        restored.kind,
        restored.output.display(),
        restored.seconds,
        text::rate(restored.raw_bytes, restored.seconds)
    )
}
