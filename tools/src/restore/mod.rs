//! `ckpt-tool restore`: a checkpoint's tensors to safetensors files, or all of it to a store.
//!
//! Always holds: every byte that is written was checked against its checksums; what stands at the
//! output's name is whole; memory is bounded, however large the tensors.

use std::io::Write;
use std::path::PathBuf;

use clap::Args;
use serde::Serialize;

use crate::console::{Outcome, Verdict, write_json};
use crate::opened::{self, StoreArgument};
use crate::{size, text};

mod draft;
mod export;
mod file;
mod gather;
mod header;
mod index;
mod layout;
mod lead;
mod output;
mod parts;
mod publish;
mod selection;
mod store;
mod tiling;

use output::Output;

/// For messages.
const DOING: &str = "restoring from";

const AFTER_HELP: &str = "\
An OUTPUT that ends with `.safetensors` is a file of the tensors, named by their paths in the \
state. It does not contain plain values, and tensors that share memory are written once per name. \
If ranks hold slices of a tensor, as with FSDP, the slices of all ranks are assembled. Any other \
OUTPUT is a store, `s3://bucket/prefix` or a directory, created if necessary: the whole \
checkpoint is copied into it, under its own step.

With `--max-shard-size`, `-o NAME.safetensors` writes `NAME-00001-of-00003.safetensors` and so \
on, and `NAME.safetensors.index.json`, which maps tensors to files. If everything fits in one \
file, that is `NAME.safetensors`. Any other OUTPUT is a directory for these files, created if \
necessary, and NAME is `model`. The index is written last: numbered files without it are from a \
run that was interrupted. With `--force`, all files of that NAME are replaced, even if there were \
more or fewer.

In GLOB, `*` matches any characters, including dots, and `?` matches one: `model.*.weight`.";

/// Arguments of `restore`.
#[derive(Args, Debug)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct Options {
    #[command(flatten)]
    store: StoreArgument,
    /// The step to restore [default: the newest]
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    step: Option<u64>,
    /// The rank whose part is restored, if several ranks saved the checkpoint; `ckpt-tool copy`
    /// copies all of them. Its sliced tensors are completed from the others [default: for a file,
    /// what belongs to no single rank].
    #[arg(long, value_name = "R")]
    rank: Option<u32>,
    /// Write only tensors whose path matches; may be repeated. For files only.
    #[arg(long, value_name = "GLOB")]
    tensors: Vec<String>,
    /// Leave out tensors whose path matches; may be repeated. For files only.
    #[arg(long, value_name = "GLOB")]
    exclude: Vec<String>,
    /// Name tensors by what follows this path, such as `model`, as in a model's own file. For files
    /// only.
    #[arg(long, value_name = "PATH")]
    strip_prefix: Option<String>,
    /// Write several files, each with at most this many bytes of tensors, and an index, as Hugging
    /// Face's tools read them: `5GB`, `500MB`, `2GiB`. A larger tensor gets its own file.
    #[arg(long, value_name = "SIZE", value_parser = size::parse, allow_negative_numbers = true)]
    max_shard_size: Option<u64>,
    /// A file `NAME.safetensors`; with `--max-shard-size`, also a directory for files; else a
    /// store: a directory, or `s3://bucket/prefix`.
    #[arg(long, short, value_name = "OUTPUT")]
    output: PathBuf,
    /// Replace an existing export of the same name, with all its files.
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
    /// `file`, `files` or `store`.
    kind: &'static str,
    /// Files of tensors, in their order; of several, their index comes last.
    files: Vec<PathBuf>,
    /// Files of an earlier export that are not there any more, or have others in their place.
    removed: Vec<PathBuf>,
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
    let output = Output::of(options)?;
    let engine = options.store.open()?;
    let (step, rank) = (options.step, options.rank);
    let restored = match &output {
        Output::Export(export) => {
            let checkpoint = opened::any_rank(&engine, &options.store, step, rank, DOING)?;
            file::restore(&engine, &checkpoint, options, export)?
        }
        Output::Store => {
            let checkpoint = opened::checkpoint(&engine, &options.store, step, rank, DOING)?;
            store::restore(&checkpoint, &options.output, options.store.s3())?
        }
    };
    if options.json {
        write_json(out, &restored)?;
    } else {
        write_text(out, &restored)?;
    }
    Ok(Verdict::Fine)
}

fn write_text(out: &mut dyn Write, restored: &Restored) -> std::io::Result<()> {
    writeln!(
        out,
        "step {}: {}, {} written to {} in {:.2} s, {}",
        restored.step,
        text::count(restored.tensors, "tensor"),
        text::bytes(restored.disk_bytes),
        restored.place(),
        restored.seconds,
        text::rate(restored.raw_bytes, restored.seconds)
    )
}

impl Restored {
    fn place(&self) -> String {
        match &self.files[..] {
            [] => format!("{} `{}`", self.kind, self.output.display()),
            [file] => format!("{} `{}`", self.kind, file.display()),
            [files @ .., index] => {
                format!(
                    "{} and their index `{}`",
                    text::count(files.len(), "file"),
                    index.display()
                )
            }
        }
    }
}
