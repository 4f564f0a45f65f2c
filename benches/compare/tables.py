"""What all comparisons write: verdicts as a table, and tables at their place in a document.

Always holds: a document without such a place stays as it is, and the run says what is missing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True)
class Verdict:
    """One figure, and the limit that the engine has to meet."""

    figure: str
    must: str
    was: str
    is_met: bool | None
    """None where it was not measured."""


def verdict_table(found: list[Verdict], of: str = "figure") -> list[str]:
    """Return the verdicts as a table; its first column is headed `of`."""
    rows = [f"| {of} | target | measured | |", "|---|---|---|---|"]
    rows += [f"| {v.figure} | {v.must} | {v.was} | {cell(v.is_met)} |" for v in found]
    return rows


def cell(is_met: bool | None) -> str:
    """Return whether a figure is what it must be."""
    return "" if is_met is None else "met" if is_met else "**not met**"


def rewrite(path: Path, name: str, text: str) -> None:
    """Write text between the marks of a name in a document."""
    begin, end = (f"<!-- {name}:{side} -->" for side in ("begin", "end"))
    before, _, rest = path.read_text().partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise SystemExit(
            f"error: `{path}` has no place for the table\n"
            f"hint: write `{begin}` and `{end}` where it belongs, each on a line of its own"
        )
    path.write_text(f"{before}{begin}\n{text}\n{end}{after}")
