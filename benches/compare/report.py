"""A run's numbers for readers: the table and the verdicts of `benches/README.md`."""

from __future__ import annotations

import platform
import re
from pathlib import Path
from typing import Any

import engines
import peers
from results import Results
from tables import Verdict, verdict_table

MANIFEST = Path(__file__).parents[2] / "Cargo.toml"
MIB = 1 << 20

OTHER_ROWS = {
    "copy": "*bare copy, two threads*",
    "fio_huge": "*fio, huge pages*",
    "fio": "*fio, 4 KiB pages*",
    "direct": "dtruntime, `restore(direct=True)`",
    "first": "dtruntime, first save",
    "first_prewarmed": "dtruntime, first save after `prewarm`",
    "small": "dtruntime, `staging_bytes` an eighth of the state",
}
"""Subjects that are no engines, and the engine in other cases."""

STALL_TO_COPY_MAX = 1.15
STALL_TO_DCP_MAX = 0.6
NONE_TO_FIO_MIN = 0.85
FLOAT_TO_NONE_MAX = 1.0
STATE_SHARE_MAX = 0.82
WEIGHTS_SHARE_MAX = 0.67
LOAD_TO_PEER_MAX = 0.6
LOAD_TO_FIO_MAX = 1.1
EXTRA_BYTES_MAX = 64 * MIB
GROWTH_BYTES_MAX = 4 * MIB


def versions(fio: str) -> dict[str, str]:
    """Return the versions of everything that took part."""
    names = ("torch", "safetensors", "torch_checkpointing")
    found = {name: peers.version_of(name) for name in names}
    known = {name: version for name, version in found.items() if version is not None}
    return {
        "dtruntime": our_version(),
        **known,
        "python": platform.python_version(),
        "fio": fio.removeprefix("fio-"),
    }


def our_version() -> str:
    """Read the version of this workspace."""
    match = re.search(r'^version = "(.+)"', MANIFEST.read_text(), re.MULTILINE)
    assert match is not None, "the workspace has a version"  # noqa: S101
    return match[1]


def results_of(record: dict[str, Any]) -> Results:
    """Return a record's values."""
    return Results(record["raw_bytes"], record["values"])


def text(record: dict[str, Any]) -> str:
    """Return everything that the document shows."""
    results = results_of(record)
    lines = [
        (
            f"State: {record['raw_bytes'] / 1e9:.2f} GB of a GPT in training with AdamW (bf16 "
            f"weights, fp32 master copy, both moments), SHA-256 `{record['state_sha256'][:16]}`."
        ),
        f"Machine: {record['machine_text']}.",
        "Versions: " + ", ".join(f"{n} {v}" for n, v in record["versions"].items()) + ".",
        "",
        *table(results),
        "",
        *verdict_table(verdicts(results)),
    ]
    return "\n".join(lines)


def table(results: Results) -> list[str]:
    """Return one row for each engine, and one for each limit."""
    rows = [
        "| | stall | durable | load | restore | on disk | CPU | extra memory | training slowdown |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    present = [e for e in engines.ENTRANTS if e.key in results.values]
    titles = {e.key: e.title for e in present} | OTHER_ROWS
    rows += [f"| {title} | {' | '.join(cells(results, key))} |" for key, title in titles.items()]
    return rows


def cells(results: Results, key: str) -> list[str]:
    """Return the cells of a subject; what was not measured is left empty."""
    writers = {
        "stall_seconds": milliseconds,
        "durable_seconds": seconds,
        "load_seconds": seconds,
        "restore_seconds": seconds,
        "disk_bytes": lambda value: f"{value / results.raw_bytes:.3f}",
        "cpu_seconds": seconds,
        "extra_bytes": lambda value: f"{value / MIB:,.0f} MiB",
        "training_lost_seconds": seconds,
    }
    return [
        write(results.median(key, figure)) if results.has(key, figure) else ""
        for figure, write in writers.items()
    ]


def milliseconds(value: float) -> str:
    """Write a short time."""
    return f"{value * 1000:,.0f} ms"


def seconds(value: float) -> str:
    """Write a longer time."""
    return f"{value:.2f} s"


def verdicts(results: Results) -> list[Verdict]:
    """Return the verdicts of all figures."""
    return [
        stall_verdict(results),
        none_verdict(results),
        *float_verdicts(results),
        load_verdict(results),
        *memory_verdicts(results),
        *endurance_verdicts(results),
    ]


def stall_verdict(results: Results) -> Verdict:
    """Judge the stall."""
    copy = results.median("copy", "stall_seconds")
    dcp = results.median("dcp_async", "stall_seconds")
    limit = max(STALL_TO_COPY_MAX * copy, STALL_TO_DCP_MAX * dcp)
    stall = results.median("dtruntime_auto", "stall_seconds")
    return Verdict(
        "stall of a warm `save_async`",
        f"at most {milliseconds(limit)}: the larger of {STALL_TO_COPY_MAX} of the bare copy and "
        f"{STALL_TO_DCP_MAX} of `dcp.async_save`",
        f"{milliseconds(stall)}: {stall / copy:.2f} and {stall / dcp:.2f}",
        stall <= limit,
    )


def none_verdict(results: Results) -> Verdict:
    """Judge how close to fio the engine writes."""
    ratio = results.ratio(("pair", "fio_seconds"), ("pair", "none_seconds"))
    pairs = len(results.all("pair", "fio_seconds"))
    return Verdict(
        "durable save, `none`",
        f"at least {NONE_TO_FIO_MIN} of fio's speed with huge pages, median of {pairs} pairs",
        f"{ratio:.2f}",
        ratio >= NONE_TO_FIO_MIN,
    )


def float_verdicts(results: Results) -> list[Verdict]:
    """Judge the cost and the gain of compression."""
    ratio = results.ratio(
        ("dtruntime_float", "durable_seconds"), ("dtruntime_none", "durable_seconds")
    )
    share = results.median("dtruntime_float", "disk_bytes") / results.raw_bytes
    weights = results.median("weights", "disk_bytes") / results.median("weights", "raw_bytes")
    return [
        Verdict(
            "durable save, `float`",
            "not slower than `none`",
            f"{ratio:.2f} of its time",
            ratio <= FLOAT_TO_NONE_MAX,
        ),
        Verdict(
            "bytes on disk, `float`",
            f"at most {STATE_SHARE_MAX} of the state",
            f"{share:.3f}",
            share <= STATE_SHARE_MAX,
        ),
        Verdict(
            "bytes on disk, `float`, bf16 weights alone",
            f"at most {WEIGHTS_SHARE_MAX}",
            f"{weights:.3f}",
            weights <= WEIGHTS_SHARE_MAX,
        ),
    ]


def load_verdict(results: Results) -> Verdict:
    """Judge the load."""
    peers_loaded = [e for e in engines.ENTRANTS if not e.is_ours and e.key in results.values]
    fastest = min(peers_loaded, key=lambda e: results.median(e.key, "load_seconds"))
    peer = results.median(fastest.key, "load_seconds")
    fio = results.median("fio_huge", "load_seconds")
    limit = max(LOAD_TO_PEER_MAX * peer, LOAD_TO_FIO_MAX * fio)
    load = results.median("dtruntime_auto", "load_seconds")
    return Verdict(
        "load, caches dropped",
        f"at most {seconds(limit)}: the larger of {LOAD_TO_PEER_MAX} of the fastest peer "
        f"({fastest.title}) and {LOAD_TO_FIO_MAX} of fio's read",
        f"{seconds(load)}: {load / peer:.2f} and {load / fio:.2f}",
        load <= limit,
    )


def memory_verdicts(results: Results) -> list[Verdict]:
    """Judge the memory that a save takes."""
    rows = [
        ("default staging", "dtruntime_auto", float(results.raw_bytes)),
        ("an eighth of the state", "small", results.median("small", "staging_bytes")),
    ]
    found = []
    for title, key, staging_bytes in rows:
        extra = results.median(key, "extra_bytes")
        limit = staging_bytes + EXTRA_BYTES_MAX
        found.append(
            Verdict(
                f"extra memory during a save, {title}",
                f"at most {limit / MIB:,.0f} MiB: `staging_bytes` + 64 MiB",
                f"{extra / MIB:,.0f} MiB: {(extra - staging_bytes) / MIB:+,.0f} MiB",
                extra <= limit,
            )
        )
    return found


def endurance_verdicts(results: Results) -> list[Verdict]:
    """Judge what is left behind."""

    def held(moment: str, what: str) -> int:
        return int(results.median("endurance", f"{moment}_{what}"))

    saves = int(results.median("endurance", "saves"))
    growth = held("end", "resident_bytes") - held("warm", "resident_bytes")
    left = {w: held("closed", w) - held("before", w) for w in ("descriptors", "threads")}
    grown = {w: held("end", w) - held("warm", w) for w in ("descriptors", "threads")}
    return [
        Verdict(
            f"memory over {saves} saves",
            f"flat: grows by at most {GROWTH_BYTES_MAX // MIB} MiB after the first {saves // 10}",
            f"{growth / MIB:+.1f} MiB",
            growth <= GROWTH_BYTES_MAX,
        ),
        Verdict(
            "descriptors and threads left behind",
            "none, neither between saves nor after closing",
            f"{sum(grown.values()):+d} between, {left['descriptors']:+d} and "
            f"{left['threads']:+d} after",
            not any((*grown.values(), *left.values())),
        ),
    ]
