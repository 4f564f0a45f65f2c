"""Show that `compression="auto"` is never much slower than the better of `none` and `float`.

    make compare-auto    about ten minutes; needs root, and blkio of cgroup version 1

The real device is slowed to several rates by `blkio.throttle.write_bps_device`, which counts direct
writes to the group of the process that makes them; the engine writes with direct I/O. At each rate
the three settings save in turns, each in its own worker. Then the same three save at the device's
full speed, while a training loop uses every core.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import make_state
import peers
import state
import tables
from machine import describe, is_root
from make_state import say
from results import Results
from workers import Worker

if TYPE_CHECKING:
    from collections.abc import Iterator

CODECS = ("none", "float", "auto")
RATES = (50, 200, 500, 1000)
"""In MB/s."""
SLOWER_MAX = 1.05
SECONDS_PER_SAVE = 4
"""At slow rates, only so much of the state is saved as takes about so long."""
TRAINING_STEPS = 40


class Throttle:
    """A control group whose writes to one device can be slowed."""

    def __init__(self, group: Path, device: str) -> None:
        self.group = group
        self.device = device

    def add(self, pid: int) -> None:
        """Put a process into the group."""
        (self.group / "cgroup.procs").write_text(str(pid))

    def limit(self, bytes_per_second: int | None) -> None:
        """Slow the group's writes; None lifts the limit."""
        limit = f"{self.device} {bytes_per_second or 0}"
        (self.group / "blkio.throttle.write_bps_device").write_text(limit)


@contextlib.contextmanager
def throttle(folder: Path) -> Iterator[Throttle]:
    """Make a group for the device of a folder while the block runs."""
    with blkio_mounted() as root:
        group = root / f"dtruntime-compare-{os.getpid()}"
        group.mkdir()
        try:
            yield Throttle(group, whole_device(folder))
        finally:
            for pid in (group / "cgroup.procs").read_text().split():
                with contextlib.suppress(OSError):  # it has ended
                    (root / "cgroup.procs").write_text(pid)
            group.rmdir()


@contextlib.contextmanager
def blkio_mounted() -> Iterator[Path]:
    """Return the folder of the blkio controller, mounting it if needed."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, right = line.split(" - ", 1)
        kind, _, options = right.split(maxsplit=2)
        if kind == "cgroup" and "blkio" in options.split(","):
            yield Path(left.split()[4])
            return
    with tempfile.TemporaryDirectory(prefix="blkio-") as folder:
        command = ["mount", "-t", "cgroup", "-o", "blkio", "none", folder]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode != 0:
            sys.exit(
                f"error: the blkio controller cannot be mounted: {done.stderr.strip()}\n"
                "hint: the kernel needs CONFIG_BLK_DEV_THROTTLING, and cgroup version 2 must not "
                "have taken the io controller"
            )
        try:
            yield Path(folder)
        finally:
            subprocess.run(["umount", folder], check=True)


def whole_device(folder: Path) -> str:
    """Return the number of a folder's disk; a partition cannot be slowed."""
    number = folder.stat().st_dev
    entry = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}").resolve()
    if not entry.exists():
        sys.exit(
            f"error: `{folder}` lies on no block device\n"
            "hint: name a folder on a disk with `--folder`"
        )
    if (entry / "partition").exists():
        entry = entry.parent
    return (entry / "dev").read_text().strip()


@dataclass
class Run:
    """The three workers and what they have measured."""

    workers: dict[str, Worker]
    slow: Throttle
    rounds: int
    results: Results
    step: int = 0

    def at_rate(self, megabytes: int | None) -> None:
        """Save in turns at one rate; None is the device as it is."""
        part_bytes = None if megabytes is None else megabytes * 1_000_000 * SECONDS_PER_SAVE
        self.slow.limit(None)
        for worker in self.workers.values():
            raw = worker.ask("use_part", part_bytes=part_bytes)["raw_bytes"]
            self.save(worker)
        self.results.add(str(megabytes), "raw_bytes", raw)
        self.slow.limit(None if megabytes is None else megabytes * 1_000_000)
        for number in range(self.rounds):
            say(f"  {megabytes or 'full'} MB/s, round {number + 1} of {self.rounds}")
            for codec in CODECS[number % 3 :] + CODECS[: number % 3]:
                saved = self.save(self.workers[codec])
                self.results.add(str(megabytes), codec, saved["durable_seconds"])
                self.results.add(str(megabytes), f"{codec}_bytes", saved["disk_bytes"])
        self.slow.limit(None)

    def save(self, worker: Worker) -> dict[str, Any]:
        """Save once and clean up."""
        self.step += 1
        saved: dict[str, Any] = worker.ask("save", step=self.step)
        worker.ask("remove", step=self.step)
        os.sync()
        return saved

    def beside_training(self, threads: int) -> None:
        """Save while a training loop wants every core."""
        for worker in self.workers.values():
            worker.ask("use_part", part_bytes=None)
            self.save(worker)
        for number in range(self.rounds):
            say(f"  beside training, round {number + 1} of {self.rounds}")
            for codec in CODECS[number % 3 :] + CODECS[: number % 3]:
                self.step += 1
                command = {"step": self.step, "threads": threads, "steps": TRAINING_STEPS}
                answer = self.workers[codec].ask("save_beside_training", **command)
                self.results.add("training", codec, answer["lost_seconds"])
                self.workers[codec].ask("remove", step=self.step)
                os.sync()


def rate_row(results: Results, rate: str) -> str:
    """Return the row of one rate, with the verdict."""
    raw = results.median(rate, "raw_bytes")
    none, floats, auto = (results.median(rate, codec) for codec in CODECS)
    ratio = auto / min(none, floats)
    shares = [results.median(rate, f"{codec}_bytes") / raw for codec in CODECS]
    name = "as it is" if rate == "None" else f"{rate} MB/s"
    cells = [name, f"{raw / 1e6:,.0f} MB", f"{raw / none / 1e6:,.0f} MB/s"]
    cells += [f"{value:.2f} s" for value in (none, floats, auto)]
    cells += [f"{shares[1]:.2f}", f"{shares[2]:.2f}", f"{ratio:.3f}"]
    cells += [tables.cell(ratio <= SLOWER_MAX)]
    return f"| {' | '.join(cells)} |"


def text(results: Results, rates: list[str]) -> str:
    """Write the tables."""
    lost = [statistics.median(results.all("training", codec)) for codec in CODECS]
    lines = [
        (
            "| device | state | `none` writes at | `none` | `float` | `auto` | on disk, `float` "
            f"| on disk, `auto` | `auto` to the better | at most {SLOWER_MAX} |"
        ),
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|---|",
        *(rate_row(results, rate) for rate in rates),
        "",
        "| a training loop on every core loses to | `none` | `float` | `auto` |",
        "|---|--:|--:|--:|",
        "| one save | " + " | ".join(f"{value:.2f} s" for value in lost) + " |",
    ]
    return "\n".join(lines)


def main() -> None:
    """Run."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=3, help="saves of each setting at each rate")
    parser.add_argument("--rates", type=int, nargs="*", default=RATES, help="in MB/s")
    parser.add_argument("--size", choices=make_state.SIZES, default="full", help="which state")
    parser.add_argument("--folder", type=Path, help="where checkpoints are written for a while")
    parser.add_argument("--results", type=Path, help="where the numbers go, as JSON")
    options = parser.parse_args()
    if not is_root():
        sys.exit(
            "error: slowing a device needs root\n"
            "hint: run it as root; the engine's tests show the same on a device that is simulated"
        )
    folder = options.folder or peers.cache_folder() / "runs-auto"
    results_file = options.results or peers.cache_folder() / "results-auto.json"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    shared = state.Shared(state.ensure(peers.cache_folder(), options.size))
    say(f"machine: {describe(folder)}")
    results = Results(shared.index.raw_bytes)
    with contextlib.ExitStack() as stack:
        slow = stack.enter_context(throttle(folder))
        workers = {codec: stack.enter_context(Worker(shared, folder)) for codec in CODECS}
        for codec, worker in workers.items():
            worker.wait_until_ready()
            worker.ask("open", engine="", folder=codec, settings={"compression": codec})
            slow.add(worker.pid)
        run = Run(workers, slow, options.rounds, results)
        for rate in (*options.rates, None):
            run.at_rate(rate)
        run.beside_training(len(os.sched_getaffinity(0)))
    shutil.rmtree(folder)
    results_file.write_text(json.dumps(results.values, indent=1) + "\n")
    print(text(results, [str(rate) for rate in (*options.rates, None)]))


if __name__ == "__main__":
    main()
