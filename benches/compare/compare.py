"""Measure this engine, its peers, and what the machine can do, in one run.

    make compare                                    a quarter of an hour; needs fio, best as root
    make compare ARGS="--quick"                     a smaller state, fewer rounds: about two minutes
    make compare ARGS="--readme benches/README.md"  also updates its table, and the chart

Every engine has its own process for the whole run; all of them map the same copy of one real
training state. A round has each of them save, load and restore once, in an order that shifts from
round to round, with the bare copy and fio, so that changes in the machine's speed affect all of
them equally. The first round warms up; tables show the medians of the others.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import chart
import engines
import peers
import report
import state
import tables
from engines import FIO, Entrant
from limits import HUGE_PAGES_NEEDED, BareCopy, Fio
from machine import (
    available_bytes,
    describe,
    drop_caches,
    have_free_memory,
    huge_pages,
    is_root,
)
from make_state import say
from results import Results
from state import Index
from workers import Worker

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    size: str
    rounds: int
    pairs: int
    training_rounds: int
    first_rounds: int
    endurance_saves: int
    training_steps: int
    threads: int


FULL = Plan(
    size="full",
    rounds=5,
    pairs=7,
    training_rounds=3,
    first_rounds=3,
    endurance_saves=200,
    training_steps=40,
    threads=len(os.sched_getaffinity(0)),
)
QUICK = Plan(
    size="quick",
    rounds=2,
    pairs=3,
    training_rounds=1,
    first_rounds=1,
    endurance_saves=50,
    training_steps=20,
    threads=FULL.threads,
)
TINY = Plan(
    size="tiny",
    rounds=1,
    pairs=1,
    training_rounds=1,
    first_rounds=1,
    endurance_saves=4,
    training_steps=2,
    threads=1,
)
PLANS = {"full": FULL, "quick": QUICK, "tiny": TINY}
ENDURANCE_PART_BYTES = 32 << 20
SMALL_STAGING_SHARE = 8
MEMORY_STATES = 9
"""How many times the state is in memory: itself, the copies that engines keep, the one loaded."""
WORKERS_BYTES = 4 << 30
STAGING_BYTES_MIN = 16 << 20  # four chunks, the least that the engine takes


class Run:
    """One comparison: its workers, and what they have measured so far."""

    def __init__(
        self, plan: Plan, root: Path, entrants: list[Entrant], folder: Path, *, as_root: bool
    ) -> None:
        self.plan = plan
        self.root = root
        self.entrants = entrants
        self.as_root = as_root
        self.shared = state.Shared(folder)
        self.results = Results(raw_bytes=self.shared.index.raw_bytes)
        self.workers: dict[str, Worker] = {}
        self.step = 0

    @contextlib.contextmanager
    def started(self) -> Iterator[None]:
        """Run a worker for each entrant while the block runs."""
        with contextlib.ExitStack() as stack:
            stack.callback(self.shared.close)
            for entrant in (*self.entrants, FIO):
                self.workers[entrant.key] = stack.enter_context(self.worker())
            for entrant in (*self.entrants, FIO):
                worker = self.workers[entrant.key]
                worker.wait_until_ready()
                worker.ask("open", engine=entrant.key, folder=entrant.key)
            yield

    def worker(self) -> Worker:
        """Start a worker."""
        return Worker(self.shared, self.root)

    def measure(self, copy: BareCopy, fio: Fio) -> None:
        """Measure everything."""
        say("warm-up: the first save of each")
        for entrant in self.entrants:
            self.first_save(entrant)
        for number in range(self.plan.rounds):
            say(f"round {number + 1} of {self.plan.rounds}")
            self.limits(copy, fio)
            for entrant in shifted(self.entrants, number):
                self.save_and_load(entrant, copy)
        for number in range(self.plan.pairs):
            say(f"pair {number + 1} of {self.plan.pairs}: fio, then dtruntime with `none`")
            self.pair(fio)
        for number in range(self.plan.training_rounds):
            say(f"training beside a save, {number + 1} of {self.plan.training_rounds}")
            for entrant in shifted([*self.entrants, FIO], number):
                self.train(entrant)
        say("weights alone, little staging memory, first saves, endurance")
        self.weights_alone()
        self.others()

    def next_step(self) -> int:
        """Return the next step: none is saved twice."""
        self.step += 1
        return self.step

    def drop_caches(self) -> None:
        """Drop what was written from the page cache, and free memory to read it into."""
        drop_caches(self.root, as_root=self.as_root)
        have_free_memory(self.results.raw_bytes)

    def remove(self, worker: Worker, step: int) -> None:
        """Delete a checkpoint, and wait until the device has discarded it."""
        worker.ask("remove", step=step)
        os.sync()

    def first_save(self, entrant: Entrant) -> None:
        """Save for the first time, watching memory."""
        worker, step = self.workers[entrant.key], self.next_step()
        answer = worker.request_with_memory("save", step=step)
        self.results.add(entrant.key, "first_stall_seconds", answer["stall_seconds"])
        self.results.add(entrant.key, "extra_bytes", answer["extra_bytes"])
        self.remove(worker, step)

    def limits(self, copy: BareCopy, fio: Fio) -> None:
        """Measure what the machine can do."""
        copy.seconds()
        for name, huge in (("fio_huge", True), ("fio", False)):
            self.results.add(name, "durable_seconds", fio.write_seconds(huge=huge))
            self.results.add(name, "load_seconds", fio.read_seconds(huge=huge))
            fio.remove()

    def save_and_load(self, entrant: Entrant, copy: BareCopy) -> None:
        """Save warm, load and restore cold, compare."""
        worker, step = self.workers[entrant.key], self.next_step()
        if entrant.is_ours:
            self.results.add("copy", "stall_seconds", copy.seconds())
        figures = worker.ask("save", step=step)
        figures |= self.read_cold(entrant, "load", step=step)
        figures |= self.read_cold(entrant, "restore", step=step)
        for name, value in figures.items():
            self.results.add(entrant.key, name, value)
        if entrant.key == "dtruntime_auto":
            direct = self.read_cold(entrant, "restore", step=step, verb="restore_directly")
            self.results.add("direct", "restore_seconds", direct["restore_seconds"])
        self.remove(worker, step)

    def read_cold(self, entrant: Entrant, command: str, **arguments: object) -> dict[str, Any]:
        """Read a checkpoint that is not in memory, and return what that took."""
        self.drop_caches()
        figures: dict[str, Any] = self.workers[entrant.key].ask(command, **arguments)
        if not figures.pop("identical"):
            sys.exit(
                f"error: what {entrant.title} gave back differs from what it saved\n"
                f"hint: look at `{self.root / entrant.key}`"
            )
        return figures

    def pair(self, fio: Fio) -> None:
        """Write the same bytes with fio and with this engine, one after the other."""
        worker, step = self.workers["dtruntime_none"], self.next_step()
        self.results.add("pair", "fio_seconds", fio.write_seconds(huge=True))
        fio.remove()
        saved = worker.ask("save", step=step)
        self.results.add("pair", "none_seconds", saved["durable_seconds"])
        self.remove(worker, step)

    def train(self, entrant: Entrant) -> None:
        """Save while a training loop runs."""
        worker, step = self.workers[entrant.key], self.next_step()
        answer = worker.ask(
            "save_beside_training",
            step=step,
            threads=self.plan.threads,
            steps=self.plan.training_steps,
        )
        for name, value in answer.items():
            self.results.add(entrant.key, f"training_{name}", value)
        self.remove(worker, step)

    def weights_alone(self) -> None:
        """Save only the bf16 weights, with `float`."""
        worker, step = self.workers["dtruntime_float"], self.next_step()
        saved = worker.ask("save", step=step, keys=["model"])
        self.results.add("weights", "disk_bytes", saved["disk_bytes"])
        self.results.add("weights", "raw_bytes", float(self.weight_bytes()))
        self.remove(worker, step)

    def weight_bytes(self) -> int:
        """Count the bytes of the bf16 weights."""
        entries = self.shared.index.entries
        return sum(entry.bytes for entry in entries if entry.path.startswith("model/"))

    def others(self) -> None:
        """Measure what a fresh worker is needed for."""
        with self.worker() as worker:
            worker.wait_until_ready()
            self.small_staging(worker)
            self.first_saves(worker)
            self.endurance(worker)

    def small_staging(self, worker: Worker) -> None:
        """Save through an eighth of the memory, watching it the first time."""
        staging_bytes = max(self.results.raw_bytes // SMALL_STAGING_SHARE, STAGING_BYTES_MIN)
        self.results.add("small", "staging_bytes", float(staging_bytes))
        settings = {"staging_bytes": staging_bytes}
        worker.ask("open", engine="", folder="small", settings=settings)
        for number in range(1 + self.plan.first_rounds):
            step = self.next_step()
            answer = worker.request_with_memory("save", step=step)
            if number == 0:
                self.results.add("small", "extra_bytes", answer["extra_bytes"])
            else:
                self.results.add("small", "stall_seconds", answer["stall_seconds"])
                self.results.add("small", "durable_seconds", answer["durable_seconds"])
            self.remove(worker, step)
        worker.ask("close")

    def first_saves(self, worker: Worker) -> None:
        """Save with a new manager, prewarmed or not."""
        for _ in range(self.plan.first_rounds):
            for name, is_prewarmed in (("first", False), ("first_prewarmed", True)):
                worker.ask("open", engine="", folder="first", settings={})
                if is_prewarmed:
                    worker.ask("prewarm")
                step = self.next_step()
                saved = worker.ask("save", step=step)
                self.results.add(name, "stall_seconds", saved["stall_seconds"])
                self.remove(worker, step)
                worker.ask("close")

    def endurance(self, worker: Worker) -> None:
        """Save many times, and measure what is left behind."""
        saves = self.plan.endurance_saves
        warm_saves = max(saves // 10, 1)
        worker.ask("use_part", part_bytes=ENDURANCE_PART_BYTES)
        answer = worker.ask("endure", folder="endurance", saves=saves, warm_saves=warm_saves)
        moments = ("before", "warm", "end", "closed")
        for moment, held in zip(moments, answer["holdings"], strict=True):
            for name, value in held.items():
                self.results.add("endurance", f"{moment}_{name}", value)
        self.results.add("endurance", "saves", float(saves))


def shifted(entrants: list[Entrant], by: int) -> list[Entrant]:
    """Start with another one each time."""
    by %= len(entrants)
    return entrants[by:] + entrants[:by]


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="a smaller state, fewer rounds")
    parser.add_argument("--size", choices=PLANS, default="full", help="how much is measured")
    parser.add_argument(
        "--gentle", action="store_true", help="change nothing of the machine, as if not root"
    )
    parser.add_argument(
        "--installed-only", action="store_true", help="fetch no peer; leave out what is not here"
    )
    parser.add_argument("--folder", type=Path, help="where checkpoints are written for a while")
    parser.add_argument("--results", type=Path, help="where the numbers go, as JSON")
    parser.add_argument("--readme", type=Path, help="rewrite the table in this file, and the chart")
    options = parser.parse_args()
    if options.quick:
        options.size = "quick"
    options.folder = options.folder or peers.cache_folder() / "runs"
    options.results = options.results or peers.cache_folder() / "results.json"
    return options


def competitors() -> list[Entrant]:
    """Return the entrants whose packages are here, and print the names of the others."""
    present = []
    for entrant in engines.ENTRANTS:
        if missing := entrant.missing():
            say(f"left out: {entrant.title}, for want of `{missing}`")
        else:
            present.append(entrant)
    return present


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Run, and return everything that is known about the run."""
    plan = PLANS[options.size]
    entrants = competitors()
    folder = state.ensure(peers.cache_folder(), plan.size)
    shutil.rmtree(options.folder, ignore_errors=True)
    options.folder.mkdir(parents=True)
    machine = describe(options.folder)
    say(f"machine: {machine}")
    needed_bytes = MEMORY_STATES * Index.read(folder).raw_bytes + WORKERS_BYTES
    if available_bytes() < needed_bytes:
        say(
            f"warning: {available_bytes() >> 30} GiB of memory are available, {needed_bytes >> 30} "
            "may be needed\nhint: close other programs, or use `--quick`"
        )
    as_root = is_root() and not options.gentle
    if not as_root:
        say("not as root: caches are dropped file by file, with posix_fadvise(DONTNEED)")
    run = Run(plan, options.folder, entrants, folder, as_root=as_root)
    say(f"state: {run.results.raw_bytes:,} bytes, SHA-256 {run.shared.index.sha256}")
    for entrant in entrants:
        say(f"  {entrant.title}: {entrant.settings}")
    with huge_pages(HUGE_PAGES_NEEDED, as_root=as_root) as has_huge_pages, run.started():
        copy = BareCopy(state.map_state(run.shared.descriptor, run.shared.index))
        fio = Fio(
            options.folder / "fio", copy.bytes, run.drop_caches, has_huge_pages=has_huge_pages
        )
        run.measure(copy, fio)
    shutil.rmtree(options.folder)
    return {
        "machine": asdict(machine),
        "machine_text": str(machine),
        "plan": asdict(plan),
        "as_root": as_root,
        "has_huge_pages": has_huge_pages,
        "state_sha256": run.shared.index.sha256,
        "versions": report.versions(fio.version()),
        "raw_bytes": run.results.raw_bytes,
        "values": run.results.values,
    }


def main() -> None:
    """Run the comparison, or only write what an earlier run measured."""
    options = parse()
    if not options.installed_only:
        peers.ensure()
    os.environ["PYTHONPATH"] = f"{peers.folder()}:{os.environ.get('PYTHONPATH', '')}"
    sys.path.insert(0, str(peers.folder()))
    record = compare(options)
    options.results.parent.mkdir(parents=True, exist_ok=True)
    options.results.write_text(json.dumps(record, indent=1) + "\n")
    text = report.text(record)
    print(text)
    if options.readme:
        tables.rewrite(options.readme, "compare", text)
        chart.write(Path(__file__).with_name("results.svg"), record)
    say(f"numbers: {options.results}")


if __name__ == "__main__":
    main()
