//! Tables of aligned columns, for people.
//!
//! Always holds: a cell is one line, whatever a name in a checkpoint holds: control characters are
//! shown escaped, so no name can move the cursor of a terminal.

use std::io::{self, Write};

use crate::text;

/// Blanks between columns.
const GAP: &str = "  ";

/// How the cells of a column stand below their title.
#[derive(Clone, Copy, Debug)]
enum Align {
    Left,
    Right,
}

/// Rows below titled columns.
#[derive(Debug, Default)]
pub(crate) struct Table {
    columns: Vec<(&'static str, Align)>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table without columns.
    pub(crate) fn new() -> Self {
        Self::default()
    }

    /// Adds a column of words.
    pub(crate) fn words(mut self, title: &'static str) -> Self {
        self.columns.push((title, Align::Left));
        self
    }

    /// Adds a column of numbers.
    pub(crate) fn numbers(mut self, title: &'static str) -> Self {
        self.columns.push((title, Align::Right));
        self
    }

    /// Adds a row with a cell per column.
    pub(crate) fn row(&mut self, cells: impl Into<Vec<String>>) {
        let cells = cells.into();
        assert_eq!(cells.len(), self.columns.len(), "a cell for each column");
        self.rows.push(cells.into_iter().map(text::into_one_line).collect());
    }

    /// Writes it, each line after `indent`.
    pub(crate) fn write(&self, out: &mut dyn Write, indent: &str) -> io::Result<()> {
        let titles: Vec<String> = self.columns.iter().map(|(title, _)| (*title).into()).collect();
        let widths: Vec<usize> = (0..self.columns.len())
            .map(|column| {
                let cells = std::iter::once(&titles).chain(&self.rows);
                cells.map(|row| row[column].chars().count()).max().unwrap_or(0)
            })
            .collect();
        for row in std::iter::once(&titles).chain(&self.rows) {
            let mut line = String::from(indent);
            for ((cell, width), (_, align)) in row.iter().zip(&widths).zip(&self.columns) {
                let padding = " ".repeat(width - cell.chars().count());
                match align {
                    Align::Left => line.extend([cell, padding.as_str(), GAP]),
                    Align::Right => line.extend([padding.as_str(), cell, GAP]),
                }
            }
            writeln!(out, "{}", line.trim_end())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_and_nothing_trails() {
        let mut table = Table::new().numbers("STEP").words("STATE").words("NOTE");
        table.row(["5".into(), "committed".into(), String::new()]);
        table.row(["1000".into(), "é".into(), "x\u{1b}[2Jy\nz".into()]);
        let mut out = Vec::new();
        table.write(&mut out, "> ").unwrap();
        let expected = "> STEP  STATE      NOTE\n\
                        >    5  committed\n\
                        > 1000  é          x\\u{1b}[2Jy\\nz\n";
        assert_eq!(String::from_utf8(out).unwrap(), expected);
    }
}
