"""Work through the full counts of every promise, for as long as there is time.

    make torture BUDGET=60                          an hour; continues where the last run ended
    make torture BUDGET=5 ARGS="--rows kill power"  only these rows
    make torture BUDGET=0                           only the table of what was run so far

The rows are in `rows.py`. Rows that are not complete get a slice of time in turn, so that any
budget moves each of them forward. A row's command tries states by their numbers; the number alone
decides what a state is, so it is the seed. The command gets

    DTR_TORTURE_FIRST     number of the first state to try: where the last command ended
    DTR_TORTURE_STATES    how many to try

and prints, each at the end of a line,

    torture: tried 200, next 200              states tried; the number of the first one not tried
    torture: tried 200, next 200, end 5000    the same, where there are only 5000
    torture: skipped: WHY                     this machine cannot try it: nothing is counted

and exits with 0, or with anything else after a violation, which it has described with its number.
After several lines `torture: tried` the last one counts. A command that prints none of them and
succeeds has not run what it should, and that counts as a violation, too.

What was run is recorded in `${DTRUNTIME_CACHE:-~/.cache/dtruntime}/torture/`, one record for each
state of the engine's sources: results of an older engine say nothing about this one. After a
violation the row does not continue until its states pass; its output is kept beside the record.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from rows import ROWS, Row

ROOT = Path(__file__).resolve().parents[2]
SLICE_SECONDS = 60.0
TRIED = re.compile(r"torture: tried (\d+), next (\d+)(?:, end (\d+))?$", re.MULTILINE)
SKIPPED = re.compile(r"torture: skipped: (.+)$", re.MULTILINE)
# What decides how the engine behaves.
SOURCES = ("engine/src", "engine/Cargo.toml", "coordinator/src", "proto/src", "Cargo.lock")


@dataclass
class Progress:
    """What was run of a row."""

    tried: int = 0
    next: int = 0
    seconds: float = 0.0
    violations: int = 0
    """Commands of the last turn that found one: 0, or 1 where the row cannot continue."""
    ended: bool = False
    """There are no more states."""
    skipped: str = ""

    def is_complete(self, row: Row) -> bool:
        """Return whether nothing is left to try."""
        return self.ended or self.tried >= row.full

    def states_in(self, row: Row, seconds: float) -> int:
        """Return how many states fit into `seconds`."""
        rate = self.tried / self.seconds if self.tried and self.seconds else None
        states = row.batch if rate is None else int(rate * seconds)
        return max(1, min(states, row.full - self.tried))


class Record:
    """What was run of every row, on disk after every change."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.path = directory / f"record-{fingerprint()}.json"
        self.rows: dict[str, Progress] = {}
        if self.path.exists():
            known = json.loads(self.path.read_text())
            self.rows = {name: Progress(**row) for name, row in known.items()}

    def of(self, row: Row) -> Progress:
        """Find what was run of a row."""
        return self.rows.setdefault(row.name, Progress())

    def write(self) -> None:
        """Write it to disk atomically."""
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps({n: asdict(row) for n, row in self.rows.items()}, indent=1))
        new.replace(self.path)


def fingerprint() -> str:
    """Return the state of the engine's sources, as a hash."""
    digest = hashlib.sha256()
    for source in SOURCES:
        path = ROOT / source
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                digest.update(f"{file.relative_to(ROOT)}\n".encode())
                digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def run(command: tuple[str, ...], environment: dict[str, str], limit: float) -> tuple[int, str]:
    """Run a command in a process group of its own; return its exit status and what it printed."""
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            return 124, f"{output}\nit did not end within {limit:.0f} s\n"
        except KeyboardInterrupt:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return process.returncode, output


def turn(row: Row, record: Record, seconds: float) -> None:
    """Give a row its slice of time."""
    progress = record.of(row)
    first, states = progress.next, progress.states_in(row, seconds)
    environment = {
        **row.environment,
        "DTR_TORTURE_FIRST": str(first),
        "DTR_TORTURE_STATES": str(states),
    }
    start = time.monotonic()
    status, output = run(row.command, environment, row.limit_seconds)
    took = time.monotonic() - start
    tried = list(TRIED.finditer(output))
    skipped = SKIPPED.search(output)
    if status == 0 and skipped:
        progress.skipped = skipped[1]
        say(f"{row.name}: skipped: {progress.skipped}")
    elif status == 0 and tried:
        count, following, end = tried[-1].groups()
        progress.skipped = ""
        progress.violations = 0
        progress.tried += int(count)
        progress.next = int(following)
        progress.seconds += took
        progress.ended = end is not None and progress.next >= int(end)
        say(
            f"{row.name}: {count} {row.unit}, numbers {first} to {progress.next}, in {took:.0f} s;"
            f" {progress.tried} of {row.full} so far"
        )
    else:
        progress.violations = 1
        log = record.directory / f"{row.name}-{first}.log"
        log.write_text(output)
        tail = "\n".join(output.splitlines()[-30:])
        say(f"{row.name}: VIOLATION in numbers {first} and on (exit status {status})\n{tail}")
        say(f"{row.name}: all that it printed is in {log}; again with: {again(row, environment)}")
    record.write()


def again(row: Row, environment: dict[str, str]) -> str:
    """Return a command as text."""
    settings = " ".join(f"{name}={value}" for name, value in environment.items())
    return f"{settings} .ci/env {' '.join(row.command)}"


def work(rows: list[Row], record: Record, budget_seconds: float) -> None:
    """Give every row a slice in turn until the time is up, or nothing is left to try."""
    for prepare in dict.fromkeys(row.prepare for row in rows if row.prepare):
        status, output = run(prepare, {}, limit=3600.0)
        if status != 0:
            raise SystemExit(f"{output}\nerror: `{' '.join(prepare)}` failed\nhint: mend it first")
    end = time.monotonic() + budget_seconds
    waiting = [row for row in rows if not record.of(row).is_complete(row)]
    while waiting:
        # Rows with the least progress go first: a short budget reaches those that no run reached.
        waiting.sort(key=lambda row: record.of(row).tried / row.full)
        for position, row in enumerate(waiting):
            left = end - time.monotonic()
            if left <= 0:
                return
            turn(row, record, min(SLICE_SECONDS, left / (len(waiting) - position)))
        waiting = [row for row in waiting if can_progress(row, record.of(row))]


def can_progress(row: Row, progress: Progress) -> bool:
    """Return whether another turn can move a row forward."""
    return not (progress.is_complete(row) or progress.violations or progress.skipped)


def table(rows: list[Row], record: Record) -> str:
    """Show what was really run."""
    lines = ["| promise | test | run | of | violations |", "|---|---|--:|--:|--:|"]
    for row in rows:
        progress = record.of(row)
        full = progress.tried if progress.ended else row.full
        count = f"{progress.tried:,} {row.unit}"
        if progress.skipped:
            count = f"skipped: {progress.skipped}"
        cells = (row.promise, f"`{row.test}`", count, f"{full:,}", str(progress.violations))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def say(text: str) -> None:
    """Print at once: a run takes hours."""
    print(text, flush=True)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    names = [row.name for row in ROWS]
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", maxsplit=1)[0])
    parser.add_argument("--minutes", type=float, default=60.0, help="stop starting work after this")
    parser.add_argument("--rows", nargs="+", choices=names, default=names, metavar="ROW")
    parser.add_argument("--fresh", action="store_true", help="forget what these rows were run")
    return parser.parse_args()


def main() -> int:
    """Run, show the table, and return whether all promises held."""
    arguments = parse_arguments()
    cache = os.environ.get("DTRUNTIME_CACHE")
    home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    record = Record((Path(cache) if cache else home / "dtruntime") / "torture")
    rows = [row for row in ROWS if row.name in arguments.rows]
    if arguments.fresh:
        for row in rows:
            record.rows.pop(row.name, None)
    say(f"record: {record.path}")
    try:
        if arguments.minutes > 0:
            work(rows, record, arguments.minutes * 60)
    except KeyboardInterrupt:
        say("interrupted: what was run until now is recorded")
    say(f"\n{table(rows, record)}")
    return int(any(record.of(row).violations for row in rows))


if __name__ == "__main__":
    sys.exit(main())
