//! What an output is: files of tensors, or a store.
//!
//! Always holds: an output that cannot be is refused before anything is read; where something is
//! that would be lost, only `--force` lets it go.

use std::ffi::OsStr;
use std::path::Path;

use dtr_engine::config::S3_SCHEME;
use dtr_engine::{EngineError, Result};

use super::Options;
use super::export::{Export, Found, Role};
use crate::opened::{holds, is_store};

/// What a name ends with that means a file.
const FILE_SUFFIX: &str = "safetensors";

/// What names of files that `torch.save` wrote end with.
fn is_of_torch(suffix: &OsStr) -> bool {
    ["pt", "pth", "bin", "ckpt"].iter().any(|of_torch| suffix == *of_torch)
}

/// What is written.
#[derive(Debug)]
pub(super) enum Output {
    /// Tensors, to a file or several.
    Export(Export),
    /// The checkpoint as it is.
    Store,
}

impl Output {
    /// What was asked for, if it can be.
    pub(super) fn of(options: &Options) -> Result<Self> {
        let output = &options.output;
        let names_file = output.extension().is_some_and(|extension| extension == FILE_SUFFIX);
        if !names_file && options.max_shard_size.is_none() {
            return check_store(options).map(|()| Self::Store);
        }
        if output.to_str().is_some_and(|output| output.starts_with(S3_SCHEME)) {
            return refused(
                options,
                "files are written on this machine only",
                "name a file or a directory here; a store in S3 has no name that ends with \
                 `.safetensors`, and takes no `--max-shard-size`",
            );
        }
        let export = if names_file {
            check_name(options, Export::at(output))?
        } else {
            check_directory(options)?;
            Export::within(output)
        };
        check_export(options, &export)?;
        Ok(Self::Export(export))
    }
}

fn refused<T>(options: &Options, why: &str, hint: &str) -> Result<T> {
    let what = format!("restoring to `{}`", options.output.display());
    Err(EngineError::invalid(what, why, hint))
}

/// Files that are called like some of another export would be read, and replaced, with them.
fn check_name(options: &Options, export: Export) -> Result<Export> {
    let Some(stem) = export.stem_of_several() else { return Ok(export) };
    let name = if stem.is_empty() { "model".into() } else { stem.to_string_lossy() };
    refused(
        options,
        "that is the name of one file of a multi-file export, and contains the number of files",
        &format!("name the export without the numbers: `-o {name}.{FILE_SUFFIX}`"),
    )
}

/// A directory that files of tensors may be put into, or that is to be made.
fn check_directory(options: &Options) -> Result<()> {
    let Ok(found) = std::fs::metadata(&options.output) else { return Ok(()) };
    if !found.is_dir() {
        return refused(
            options,
            "it is a file, and does not end with `.safetensors`",
            "name a file that does, or a directory",
        );
    }
    if is_store(&options.output) {
        return refused(
            options,
            "it is a store, and `--max-shard-size` is for files of tensors",
            "name another directory for the files, or copy the checkpoint into this store without \
             `--max-shard-size`",
        );
    }
    Ok(())
}

/// Whether something in it is called so that loaders of weights would read it.
fn holds_tensors(directory: &Path) -> bool {
    holds(directory, |name| {
        let name = name.strip_suffix(".index.json").unwrap_or(name);
        name.strip_suffix(FILE_SUFFIX).is_some_and(|stem| stem.ends_with('.'))
    })
}

/// Whether an export may take its name, which `--force` lets it take from an earlier one. A link
/// that leads nowhere exists too, and is not written through. Returns what exists.
pub(super) fn check_export(options: &Options, export: &Export) -> Result<Vec<Found>> {
    let is_asked_for = |found: &Found| found.path == options.output;
    let mut named = export.found()?;
    named.retain(|found| !matches!(found.role, Role::Draft | Role::Aside));
    for found in &named {
        let Some(what) = found.in_the_way else { continue };
        if is_asked_for(found) {
            let hint = "name a file, or a store without `.safetensors`";
            return refused(options, &format!("it is {what}"), hint);
        }
        let path = found.path.display();
        let hint = format!("choose another place, or remove `{path}`");
        return refused(options, &format!("`{path}` is {what}"), &hint);
    }
    match named.first() {
        Some(found) if !options.force && is_asked_for(found) => {
            refused(options, "it exists", "choose another name, or replace it with `--force`")
        }
        Some(found) if !options.force => refused(
            options,
            &format!("`{}` exists, of an export of the same name", found.path.display()),
            "choose another place, or replace that export, all its files, with `--force`",
        ),
        _ => Ok(named),
    }
}

/// A store that a checkpoint may be copied into, or that is to be made.
fn check_store(options: &Options) -> Result<()> {
    if std::fs::metadata(&options.output).is_ok_and(|found| !found.is_dir()) {
        return refused(
            options,
            "it is a file, and does not end with `.safetensors`",
            "name a file that does, or the directory of a store",
        );
    }
    if let Some(suffix) = options.output.extension().filter(|name| is_of_torch(name)) {
        return refused(
            options,
            &format!("a store is a directory, and `.{}` is a file's name", suffix.display()),
            "name a file that ends with `.safetensors`, or a directory; `torch.save` writes what \
             `CheckpointManager(...).load()` returns",
        );
    }
    let selects = !options.tensors.is_empty() || !options.exclude.is_empty();
    if selects || options.strip_prefix.is_some() {
        return refused(
            options,
            "it is a store, and a checkpoint is copied into a store whole and unchanged",
            "name a file that ends with `.safetensors`, or add `--max-shard-size 5GB` for a \
             directory of files, or leave out `--tensors`, `--exclude` and `--strip-prefix`",
        );
    }
    if holds_tensors(&options.output) && !is_store(&options.output) {
        return refused(
            options,
            "it holds safetensors files and is not a store; no store is created there",
            "choose another directory for a store; for files, add `--max-shard-size 5GB`, or name \
             one that ends with `.safetensors`",
        );
    }
    if options.force {
        return refused(
            options,
            "it is a store, and nothing in a store is replaced",
            "leave out `--force`, and choose a store without this step",
        );
    }
    Ok(())
}
