//! `ckpt-tool ls`: what a store holds.
//!
//! Always holds: nothing in the store changes, and no shard's chunks are read; every step that is
//! there has one row, in whatever state it is, and what cannot be read of it is left blank.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::PathBuf;

use clap::Args;
use dtr_engine::engine::{GcOptions, GcReport};
use dtr_engine::format::manifest::{Manifest, total_bytes};
use dtr_engine::recovery::{StepState, StepSurvey};
use dtr_engine::{Engine, Result};
use serde::Serialize;
use serde_json::Value;

use crate::console::{Outcome, Verdict, write_json};
use crate::opened::StoreArgument;
use crate::table::Table;
use crate::text;

/// Characters of metadata in a row.
const METADATA_CHARS: usize = 60;
/// Stores that are named where none was.
const STORES_SHOWN: usize = 10;

/// Arguments of `ls`.
#[derive(Args, Debug)]
#[command(
    after_help = "Exit status 1 if a checkpoint is damaged, as far as a listing shows; `verify` \
                  reads every byte."
)]
pub(crate) struct Options {
    #[command(flatten)]
    store: StoreArgument,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// What is printed.
#[derive(Debug, Serialize)]
struct Listing {
    store: String,
    checkpoints: Vec<Entry>,
    /// Files that no checkpoint needs; `removed` are those that `gc` would take now.
    abandoned: GcReport,
}

#[derive(Debug, Serialize)]
struct Entry {
    step: u64,
    state: &'static str,
    /// What is wrong, or which step retired it.
    why: Option<String>,
    created_unix_ms: Option<u64>,
    /// Bytes of all files in the step's directory.
    disk_bytes: u64,
    /// Bytes of its shards.
    stored_bytes: Option<u64>,
    raw_bytes: Option<u64>,
    ranks: Option<u32>,
    attempt: Option<String>,
    /// What was saved with it, by name.
    metadata: Option<BTreeMap<String, Value>>,
}

pub(crate) fn run(options: &Options, out: &mut dyn Write) -> Outcome {
    let engine = options.store.open()?;
    let listing = list(&engine, &options.store)?;
    if options.json {
        write_json(out, &listing)?;
    } else {
        write_table(out, &listing)?;
        if listing.checkpoints.is_empty() {
            write_stores(out, &options.store.stores_below())?;
        }
    }
    Ok(Verdict::fine_if(listing.checkpoints.iter().all(|entry| entry.state != "damaged")))
}

fn list(engine: &Engine, store: &StoreArgument) -> Result<Listing> {
    let survey = engine.survey()?;
    let checkpoints = survey
        .steps
        .iter()
        .map(|step| {
            // A manifest that cannot be read leaves blanks: the state says why.
            let manifest = match step.state {
                StepState::Incomplete | StepState::Newer { .. } => None,
                _ => engine.manifest(step.step).ok(),
            };
            entry(step, manifest.as_ref())
        })
        .collect();
    let abandoned = engine.gc(GcOptions { dry_run: true, grace: None })?;
    Ok(Listing { store: store.display(), checkpoints, abandoned })
}

fn entry(step: &StepSurvey, manifest: Option<&Manifest>) -> Entry {
    let (state, why) = match &step.state {
        StepState::Committed => ("committed", None),
        StepState::Retired { by } => ("retired", Some(format!("by the rewind to step {by}"))),
        StepState::Damaged { why } => ("damaged", Some(why.clone())),
        StepState::Newer { why } => ("newer", Some(why.clone())),
        StepState::Incomplete => ("incomplete", Some("never committed".into())),
    };
    Entry {
        step: step.step,
        state,
        why,
        created_unix_ms: manifest.map(|manifest| manifest.created_unix_ms),
        disk_bytes: step.bytes,
        stored_bytes: manifest.map(Manifest::stored_bytes),
        raw_bytes: manifest.map(Manifest::raw_bytes),
        ranks: manifest.map(|manifest| manifest.world_size),
        attempt: manifest.map(|manifest| manifest.attempt.clone()),
        metadata: manifest.map(|manifest| manifest.metadata.clone()),
    }
}

fn write_table(out: &mut dyn Write, listing: &Listing) -> std::io::Result<()> {
    if listing.checkpoints.is_empty() {
        return writeln!(out, "no checkpoints in `{}`", listing.store);
    }
    let mut table = Table::new()
        .numbers("STEP")
        .words("SAVED (UTC)")
        .numbers("AGE")
        .numbers("SIZE")
        .numbers("RAW")
        .numbers("RATIO")
        .numbers("RANKS")
        .words("ATTEMPT")
        .words("STATE");
    let is_told = |entry: &Entry| entry.metadata.as_ref().is_some_and(|told| !told.is_empty());
    let has_metadata = listing.checkpoints.iter().any(is_told);
    if has_metadata {
        table = table.words("METADATA");
    }
    for entry in &listing.checkpoints {
        let or_dash = |cell: Option<String>| cell.unwrap_or_else(|| "-".into());
        let state = match &entry.why {
            Some(why) => format!("{}: {why}", entry.state),
            None => entry.state.into(),
        };
        let ratio = entry.stored_bytes.zip(entry.raw_bytes);
        let mut row = vec![
            entry.step.to_string(),
            or_dash(entry.created_unix_ms.map(text::utc)),
            or_dash(entry.created_unix_ms.map(|at| text::age(text::seconds_since(at)))),
            text::bytes(entry.stored_bytes.unwrap_or(entry.disk_bytes)),
            or_dash(entry.raw_bytes.map(text::bytes)),
            or_dash(ratio.map(|(stored, raw)| text::ratio(stored, raw))),
            or_dash(entry.ranks.map(|ranks| ranks.to_string())),
            or_dash(entry.attempt.as_deref().map(|attempt| text::short_attempt(attempt).into())),
            state,
        ];
        if has_metadata {
            row.push(shown(entry.metadata.iter().flatten()));
        }
        table.row(row);
    }
    table.write(out, "")?;
    write_abandoned(out, listing)
}

/// Metadata on one line, cut where it is long: `--json` has all of it.
fn shown<'a>(metadata: impl Iterator<Item = (&'a String, &'a Value)>) -> String {
    let entries: Vec<String> = metadata.map(|(name, value)| format!("{name}={value}")).collect();
    text::cut(&text::one_line(&entries.join(", ")), METADATA_CHARS).into_owned()
}

/// Says where there are stores, to one who named the directory that holds them.
fn write_stores(out: &mut dyn Write, stores: &[PathBuf]) -> std::io::Result<()> {
    if !stores.is_empty() {
        writeln!(out, "stores in it:")?;
    }
    for store in stores.iter().take(STORES_SHOWN) {
        writeln!(out, "  {}", store.display())?;
    }
    match stores.len().saturating_sub(STORES_SHOWN) {
        0 => Ok(()),
        more => writeln!(out, "  and {more} more"),
    }
}

fn write_abandoned(out: &mut dyn Write, listing: &Listing) -> std::io::Result<()> {
    let GcReport { removed, kept, freed_bytes } = &listing.abandoned;
    if !removed.is_empty() {
        writeln!(
            out,
            "\n{} that no checkpoint needs, {}: `ckpt-tool gc {}` deletes them",
            text::count(removed.len(), "item"),
            text::bytes(*freed_bytes),
            listing.store
        )?;
    }
    if !kept.is_empty() {
        let kept_bytes = total_bytes(kept.iter().map(|item| item.bytes));
        writeln!(
            out,
            "\n{} of unfinished or replaced attempts, {}: too recent for `ckpt-tool gc`",
            text::count(kept.len(), "file"),
            text::bytes(kept_bytes)
        )?;
    }
    Ok(())
}
