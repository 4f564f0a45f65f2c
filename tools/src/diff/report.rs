//! What two checkpoints have in common and what not, as text and as JSON.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{self, Write};

use serde::Serialize;

use super::entries::{Paired, Pairing};
use super::{Change, Changed, Side};
use crate::compare::Difference;
use crate::table::Table;
use crate::text;

/// Characters of a value that are shown.
const VALUE_CHARACTERS_MAX: usize = 60;
/// A state with more parts than this is flat: nothing is said about each.
const PARTS_MAX: usize = 16;

/// The outcome of a comparison.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    a: u64,
    b: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    a_rank: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    b_rank: Option<u32>,
    /// Whether no tensor and no value differs.
    pub(crate) identical: bool,
    tensors: Counts,
    values: Counts,
    /// By top-level entry of the state.
    parts: Vec<Part>,
    /// Everything that is not equal.
    changes: Vec<Row>,
    /// Whether no other checkpoint is between them.
    consecutive: bool,
}

/// How many entries became what.
#[derive(Clone, Copy, Debug, Default, Serialize)]
struct Counts {
    equal: u64,
    changed: u64,
    added: u64,
    removed: u64,
}

#[derive(Debug, Serialize)]
struct Part {
    name: String,
    tensors: Counts,
    values: Counts,
}

#[derive(Debug, Serialize)]
struct Row {
    path: String,
    kind: &'static str,
    change: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    before: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    after: Option<String>,
    #[serde(flatten)]
    difference: Option<Difference>,
}

impl Counts {
    fn add(&mut self, change: &Change) {
        match change {
            Change::Equal => self.equal += 1,
            Change::Changed(_) => self.changed += 1,
            Change::Added => self.added += 1,
            Change::Removed => self.removed += 1,
        }
    }

    fn all_equal(self) -> bool {
        self.changed + self.added + self.removed == 0
    }
}

impl Report {
    /// The report on two checkpoints, once every entry is decided.
    pub(crate) fn new(sides: (Side, Side), consecutive: bool, pairing: Pairing) -> Self {
        let (a, b) = sides;
        let mut report = Self {
            a: a.step,
            b: b.step,
            a_rank: a.rank,
            b_rank: b.rank,
            identical: true,
            tensors: Counts::default(),
            values: Counts::default(),
            parts: Vec::new(),
            changes: Vec::new(),
            consecutive,
        };
        let mut positions = BTreeMap::new();
        for entry in &pairing.entries {
            report.count(entry, &mut positions);
        }
        report.changes = pairing
            .entries
            .into_iter()
            .filter(|entry| entry.change != Change::Equal)
            .map(row)
            .collect();
        report.identical = report.changes.is_empty();
        report
    }

    /// Counts an entry in its part, which `positions` finds.
    fn count(&mut self, entry: &Paired, positions: &mut BTreeMap<String, usize>) {
        // A container that stays is no value: its entries are.
        if entry.is_container && entry.change == Change::Equal {
            return;
        }
        let position = *positions.entry(entry.part.clone()).or_insert_with(|| {
            self.parts.push(Part {
                name: entry.part.clone(),
                tensors: Counts::default(),
                values: Counts::default(),
            });
            self.parts.len() - 1
        });
        let part = &mut self.parts[position];
        let (all, of_part) = if entry.is_tensor {
            (&mut self.tensors, &mut part.tensors)
        } else {
            (&mut self.values, &mut part.values)
        };
        all.add(&entry.change);
        of_part.add(&entry.change);
    }

    fn sides(&self) -> (Side, Side) {
        (Side { step: self.a, rank: self.a_rank }, Side { step: self.b, rank: self.b_rank })
    }

    /// Writes it for people, with at most `limit` changes; 0 for all.
    pub(crate) fn write(&self, out: &mut dyn Write, limit: u64) -> io::Result<()> {
        let previous = if self.consecutive { ", the previous checkpoint" } else { "" };
        let (a, b) = self.sides();
        if self.identical {
            writeln!(out, "{b} is identical to {a}{previous}")?;
            return self.write_totals(out);
        }
        writeln!(out, "{b} against {a}{previous}\n")?;
        if self.parts.len() <= PARTS_MAX {
            self.write_parts(out)?;
            writeln!(out)?;
        }
        self.write_changes(out, limit)?;
        self.write_totals(out)?;
        self.write_suspicion(out)
    }

    fn write_parts(&self, out: &mut dyn Write) -> io::Result<()> {
        let mut table = Table::new()
            .words("PART")
            .numbers("TENSORS EQUAL")
            .numbers("CHANGED")
            .numbers("ADDED")
            .numbers("REMOVED")
            .numbers("VALUES EQUAL")
            .numbers("CHANGED")
            .numbers("ADDED")
            .numbers("REMOVED");
        for Part { name, tensors, values } in &self.parts {
            let number = |number: u64| number.to_string();
            table.row([
                text::path(name).into(),
                number(tensors.equal),
                number(tensors.changed),
                number(tensors.added),
                number(tensors.removed),
                number(values.equal),
                number(values.changed),
                number(values.added),
                number(values.removed),
            ]);
        }
        table.write(out, "")
    }

    fn write_changes(&self, out: &mut dyn Write, limit: u64) -> io::Result<()> {
        let limit = if limit == 0 { u64::MAX } else { limit };
        let shown = usize::try_from(limit).unwrap_or(usize::MAX);
        let mut table = Table::new().words("CHANGE").words("PATH").words("WHAT");
        for row in self.changes.iter().take(shown) {
            table.row([row.change.into(), text::path(&row.path).into(), row.what()]);
        }
        table.write(out, "")?;
        match self.changes.len().saturating_sub(shown) {
            0 => writeln!(out),
            more => writeln!(out, "… {more} more; `--limit 0` shows all\n"),
        }
    }

    fn write_totals(&self, out: &mut dyn Write) -> io::Result<()> {
        for (name, counts) in [("tensors", self.tensors), ("values", self.values)] {
            let Counts { equal, changed, added, removed } = counts;
            writeln!(
                out,
                "{:<9}{equal} equal, {changed} changed, {added} added, {removed} removed",
                format!("{name}:")
            )?;
        }
        Ok(())
    }

    /// Training that goes on while the weights stand still is a known way for a run to go wrong.
    fn write_suspicion(&self, out: &mut dyn Write) -> io::Result<()> {
        let (a, b) = self.sides();
        if self.tensors.equal > 0 && self.tensors.all_equal() {
            return writeln!(
                out,
                "every tensor of {b} is identical to {a}: only plain values differ"
            );
        }
        for part in self.parts.iter().take_while(|_| self.parts.len() <= PARTS_MAX) {
            if part.tensors.equal > 0 && part.tensors.all_equal() {
                writeln!(
                    out,
                    "every tensor in `{}` is identical to {a}",
                    text::one_line(text::path(&part.name))
                )?;
            }
        }
        Ok(())
    }
}

fn row(entry: Paired) -> Row {
    let (change, before, after, difference) = match entry.change {
        Change::Equal => ("equal", None, None, None),
        Change::Added => ("added", None, None, None),
        Change::Removed => ("removed", None, None, None),
        Change::Changed(Changed::Described(a, b)) => ("changed", Some(a), Some(b), None),
        Change::Changed(Changed::Items(difference)) => ("changed", None, None, Some(difference)),
    };
    let kind = match (entry.is_tensor, entry.is_container) {
        (true, _) => "tensor",
        (false, true) => "container",
        (false, false) => "value",
    };
    Row { path: entry.path, kind, change, before, after, difference }
}

impl Row {
    fn what(&self) -> String {
        if let (Some(before), Some(after)) = (&self.before, &self.after) {
            let cut = |value| text::cut(value, VALUE_CHARACTERS_MAX);
            return format!("{} -> {}", cut(before), cut(after));
        }
        let Some(difference) = self.difference else { return self.kind.into() };
        let Difference { items, items_changed, largest, items_not_finite } = difference;
        let mut what = format!("{items_changed} of {}", text::count(items, "item"));
        if let Some(largest) = largest {
            write!(what, ", largest difference {largest:.3e}").expect("strings grow");
        }
        if items_not_finite > 0 {
            write!(what, ", {items_not_finite} not finite").expect("strings grow");
        }
        what
    }
}
