"""Draws a run as an SVG: one row for each engine, one panel for stall, durable, load and restore.

Written by hand, without a plotting library: a file of a few kilobytes whose lines change only where
numbers did. It has no background, and takes its colours from the reader's light or dark mode.
"""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

import engines
from report import results_of

if TYPE_CHECKING:
    from pathlib import Path

    from results import Results

WIDTH = 960
LABELS_WIDTH = 176
PANEL_WIDTH = 184
PANEL_GAP = 16
VALUE_WIDTH = 58  # the width of a number beside the longest bar
HEAD_HEIGHT = 64
ROW_HEIGHT = 25
BAR_HEIGHT = 15
FOOT_HEIGHT = 54

STYLE = """\
  text { font: 13px system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; \
fill: #1f2328 }
  .head { font-weight: 600 }
  .small { font-size: 11px; fill: #59636e }
  .value { font-size: 12px; font-variant-numeric: tabular-nums }
  .ours { font-weight: 600 }
  .bar { fill: #afb8c1 }
  .bar.ours { fill: #0969da }
  .limit { stroke: #bc4c00; stroke-width: 1.5; stroke-dasharray: 4 3 }
  .axis { stroke: #d1d9e0; stroke-width: 1 }
  @media (prefers-color-scheme: dark) {
    text { fill: #f0f6fc }
    .small { fill: #9198a1 }
    .bar { fill: #656c76 }
    .bar.ours { fill: #4493f8 }
    .limit { stroke: #f0883e }
    .axis { stroke: #3d444d }
  }"""


@dataclass(frozen=True)
class Panel:
    """One figure of all engines."""

    title: str
    figure: str
    limit: tuple[str, str]
    """The subject, and the name of the figure."""
    limit_title: str


PANELS = (
    Panel("Stall of the training loop", "stall_seconds", ("copy", "stall_seconds"), "bare copy"),
    Panel("Durable on disk", "durable_seconds", ("fio_huge", "durable_seconds"), "fio"),
    Panel("Load, cold", "load_seconds", ("fio_huge", "load_seconds"), "fio"),
    Panel("Restore in place, cold", "restore_seconds", ("fio_huge", "load_seconds"), "fio"),
)


@dataclass(frozen=True)
class Row:
    """An engine whose figures are drawn side by side."""

    key: str
    title: str
    is_ours: bool


DIRECT = Row("direct", "dtruntime, direct=True", is_ours=True)
"""What one way to restore takes; all else is as in the rows before."""


def rows_of(results: Results) -> list[Row]:
    """Return the engines that were measured, ours first."""
    entrants = [e for e in engines.ENTRANTS if e.key in results.values]
    rows = [Row(e.key, e.title.replace("`", ""), e.is_ours) for e in entrants]
    ours = [row for row in rows if row.is_ours]
    direct = [DIRECT] if results.has("direct", "restore_seconds") else []
    return [*ours, *direct, *(row for row in rows if not row.is_ours)]


def write(path: Path, record: dict[str, Any]) -> None:
    """Draw a run into a file."""
    path.write_text(draw(results_of(record), record["machine_text"]))


def draw(results: Results, machine: str) -> str:
    """Return the whole picture."""
    rows = rows_of(results)
    height = HEAD_HEIGHT + ROW_HEIGHT * len(rows) + FOOT_HEIGHT
    raw = f"{results.raw_bytes / 1e9:.2f} GB"
    parts = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
            f'width="{WIDTH}" height="{height}" role="img" '
            f'aria-label="Seconds to save and load {raw}, by engine">'
        ),
        f"<style>\n{STYLE}\n</style>",
        words(0, 20, f"Saving and loading a training state of {raw}", "head"),
        words(WIDTH, 20, "seconds, shorter is better", "small", "end"),
    ]
    for number, row in enumerate(rows):
        parts.append(words(0, middle_of(number), row.title, "ours" if row.is_ours else ""))
    for number, panel in enumerate(PANELS):
        left = LABELS_WIDTH + number * (PANEL_WIDTH + PANEL_GAP)
        parts += draw_panel(panel, results, rows, left)
    foot = height - 8
    parts.append(words(0, foot, f"Medians of interleaved rounds. {machine}", "small"))
    parts.append("</svg>\n")
    return "\n".join(parts)


def draw_panel(panel: Panel, results: Results, rows: list[Row], left: float) -> list[str]:
    """Draw the bars of one figure, and the line of what the machine can do."""
    figure = panel.figure
    values = [results.median(r.key, figure) if results.has(r.key, figure) else None for r in rows]
    limit = results.median(*panel.limit)
    scale = (PANEL_WIDTH - VALUE_WIDTH) / max(limit, *(v for v in values if v is not None))
    bottom = HEAD_HEIGHT + ROW_HEIGHT * len(rows)
    parts = [
        words(left, HEAD_HEIGHT - 14, panel.title, "head"),
        line(left, HEAD_HEIGHT - 4, bottom, "axis"),
    ]
    for number, (row, value) in enumerate(zip(rows, values, strict=True)):
        if value is None:
            continue
        kind = " ours" if row.is_ours else ""
        width = max(value * scale, 1)
        top = HEAD_HEIGHT + number * ROW_HEIGHT + (ROW_HEIGHT - BAR_HEIGHT) / 2 - 2
        parts.append(
            f'<rect class="bar{kind}" x="{left:.1f}" y="{top:.1f}" width="{width:.1f}" '
            f'height="{BAR_HEIGHT}" rx="2"/>'
        )
        shown = f"{value:.2f}"
        parts.append(words(left + width + 5, middle_of(number), shown, f"value{kind}"))
    at = left + limit * scale
    parts.append(line(at, HEAD_HEIGHT - 4, bottom + 2, "limit"))
    parts.append(line(left + 1, bottom + 6, bottom + 18, "limit"))
    parts.append(words(left + 8, bottom + 16, f"{panel.limit_title}: {limit:.2f}", "small"))
    return parts


def middle_of(row: int) -> float:
    """Return the baseline of a row's text."""
    return HEAD_HEIGHT + row * ROW_HEIGHT + ROW_HEIGHT / 2 + 3


def words(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    """Write text."""
    place = f'x="{x:.1f}" y="{y:.1f}"' + (f' text-anchor="{anchor}"' if anchor != "start" else "")
    return f'<text class="{kind}" {place}>{escape(text)}</text>'


def line(x: float, top: float, bottom: float, kind: str) -> str:
    """Draw an upright line."""
    return f'<line class="{kind}" x1="{x:.1f}" y1="{top:.1f}" x2="{x:.1f}" y2="{bottom:.1f}"/>'
