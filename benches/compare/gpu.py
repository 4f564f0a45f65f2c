"""Measure saves and restores of tensors on a real GPU, beside PyTorch's own, in one run.

    make bench-gpu                                   # here, some minutes
    make bench-gpu ARGS="--gigabytes 2 --rounds 2"   # less
    python benches/compare/gpu.py                    # after `pip install dtruntime-...whl`
    python benches/compare/gpu.py --device cpu --gigabytes 0.05   # only tries the script

What is measured, each as the median of several rounds after a warm-up:

- the bus: one copy of 1 GB between the GPU and pinned memory, by PyTorch, in each direction;
- the stall of a save, from the call to its return, and what the training steps after it lose: from
  the return until the GPU has done them, with nothing waited for in between, against the same steps
  without a save;
- both of `save_async` in each mode, and of `torch.distributed.checkpoint.async_save` with a
  `DefaultStager` that is kept, whose staging is waited for before the next update;
- the disk: the checkpoint's file, read by several threads around the page cache;
- loads into fresh memory of the GPU, and restores in place, with no file in the page cache.

Always holds: the output says what was not done as described here. The disk holds at most twice the
state.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import mmap
import os
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.checkpoint import filesystem, staging, state_dict_saver

from dtruntime import CheckpointManager
from dtruntime.state import gpus
from machine import drop_caches, is_root

if TYPE_CHECKING:
    from collections.abc import Callable

STEPS_AFTER = 10
"""Training steps that run while a save continues in the background."""
WIDTHS = {"cuda": 4096, "cpu": 256}
BATCH_SIZES = {"cuda": 4096, "cpu": 64}
"""So large on a GPU that forward and backward take longer than the copy of the state."""
BUS_BYTES = {"cuda": 1_000_000_000, "cpu": 10_000_000}
READ_BYTES = 8 << 20
STAGING_BYTES_MIN = 64 << 20
READERS = 8

COPY_RATE_MIN = 0.9
STRICT_STALL_MAX = 1.15
OVERLAP_STALL_MAX_SECONDS = 0.005
OVERLAP_STALL_MAX_SECONDS_PER_TENSOR = 2e-6
SLOWDOWN_MAX = 0.03
DCP_SHARE_MAX = 0.5
RESTORE_RATE_MIN = 0.8


class Training:
    """A model whose state has the size asked for, and a step that keeps the GPU busy."""

    def __init__(self, device: torch.device, gigabytes: float) -> None:
        # fp32 weights and two moments of AdamW: twelve bytes a weight.
        width = WIDTHS[device.type]
        count = max(1, round(gigabytes * 1e9 / (12 * width * width)))
        layers = [torch.nn.Linear(width, width, bias=False) for _ in range(count)]
        self.model = torch.nn.Sequential(*layers).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, foreach=True)
        self.batch = torch.randn(BATCH_SIZES[device.type], width, device=device)
        self.device = device
        self.step()

    def state(self) -> dict[str, Any]:
        """Return what is saved."""
        return {"model": self.model, "optimizer": self.optimizer}

    def tensors(self) -> int:
        """Count the tensors of the state."""
        return 4 * len(self.model)

    def state_bytes(self) -> int:
        """Return the bytes of the state."""
        weights = sum(p.numel() * p.element_size() for p in self.model.parameters())
        return 3 * weights

    def step(self, before_update: Callable[[], object] | None = None) -> None:
        """Train one step, without waiting for the GPU."""
        loss = self.model(self.batch).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        if before_update is not None:
            before_update()
        self.optimizer.step()

    def seconds_of_steps(self, before_update: Callable[[], object] | None = None) -> float:
        """Train, and wait for the GPU only at the end: copies continue meanwhile."""
        start = time.perf_counter()
        self.step(before_update)
        for _ in range(STEPS_AFTER - 1):
            self.step()
        settle(self.device)
        return time.perf_counter() - start


@dataclass
class Begun:
    """A save that has returned: what the next update has to wait for, and how it is ended."""

    finish: Callable[[], object]
    before_update: Callable[[], object] | None = None


@dataclass
class Timings:
    """Seconds of one way to save, by round."""

    stalls: list[float] = field(default_factory=list)
    plain: list[float] = field(default_factory=list)
    slowed: list[float] = field(default_factory=list)

    @property
    def stall(self) -> float:
        """Seconds until the save returned."""
        return statistics.median(self.stalls)

    @property
    def lost(self) -> float:
        """Seconds that the steps after it took longer."""
        return statistics.median(self.slowed) - statistics.median(self.plain)

    @property
    def slowdown(self) -> float:
        """The same as a share of what they take without a save."""
        return self.lost / statistics.median(self.plain)


@dataclass
class Machine:
    """Bytes a second that the machine itself can do."""

    down: float
    up: float
    disk: float = 0.0


def settle(device: torch.device) -> None:
    """Wait until the GPU has done everything."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def bus_rate(device: torch.device, *, up: bool) -> float:
    """Return bytes a second between the GPU and pinned memory."""
    count, has_gpu = BUS_BYTES[device.type], device.type == "cuda"
    on_gpu = torch.empty(count, dtype=torch.uint8, device=device)
    in_host = torch.empty(count, dtype=torch.uint8, pin_memory=has_gpu)
    target, source = (on_gpu, in_host) if up else (in_host, on_gpu)
    seconds = []
    for _ in range(6):
        settle(device)
        start = time.perf_counter()
        target.copy_(source, non_blocking=True)
        settle(device)
        seconds.append(time.perf_counter() - start)
    return count / statistics.median(seconds[1:])


def disk_rate(path: Path) -> float:
    """Return bytes a second of reading a file around the page cache, by several threads."""
    size = path.stat().st_size
    try:
        file = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        say("the disk was read through the page cache: the filesystem has no direct I/O")
        file = os.open(path, os.O_RDONLY)

    def read(first: int) -> None:
        with mmap.mmap(-1, READ_BYTES) as buffer:  # on a page, as direct I/O demands
            for offset in range(first * READ_BYTES, size, READERS * READ_BYTES):
                os.preadv(file, [buffer], offset)

    try:
        start = time.perf_counter()
        with concurrent.futures.ThreadPoolExecutor(READERS) as pool:
            list(pool.map(read, range(READERS)))
        return size / (time.perf_counter() - start)
    finally:
        os.close(file)


def measure(training: Training, rounds: int, begin: Callable[[int], Begun]) -> Timings:
    """Save and train on in turns; the first round warms up."""
    timings = Timings()
    for number in range(rounds + 1):
        settle(training.device)
        plain = training.seconds_of_steps()
        start = time.perf_counter()
        begun = begin(number + 1)
        stall = time.perf_counter() - start
        slowed = training.seconds_of_steps(begun.before_update)
        begun.finish()
        if number:
            timings.plain.append(plain)
            timings.stalls.append(stall)
            timings.slowed.append(slowed)
    return timings


def measure_dcp(training: Training, rounds: int, folder: Path) -> Timings:
    """Measure PyTorch's own saves, with memory that is pinned once."""
    state = {name: value.state_dict() for name, value in training.state().items()}
    writer = filesystem.FileSystemWriter(folder, thread_count=min(8, os.cpu_count() or 1))
    stager = make_stager(training)

    def begin(_: int) -> Begun:
        response: Any = state_dict_saver.async_save(
            state, storage_writer=writer, async_stager=stager, no_dist=True
        )
        staged = getattr(response, "staging_completion", None)
        if staged is None:  # staged at once, as without a GPU
            return Begun(response.result)
        return Begun(response.upload_completion.result, staged.result)

    try:
        return measure(training, rounds, begin)
    finally:
        stager.close()
        shutil.rmtree(folder, ignore_errors=True)


def make_stager(training: Training) -> Any:
    """Create the stager that pins its memory and copies in the background."""
    if training.device.type != "cuda":
        return staging.DefaultStager(staging.StagingOptions(*[False] * 4))
    shared = "/dev/shm"  # noqa: S108  (where torch puts it)
    if shutil.disk_usage(shared).free > 1.2 * training.state_bytes():
        return staging.DefaultStager()
    say(f"dcp's stager pins memory that is not shared: {shared} is too small for the state")
    return staging.DefaultStager(staging.StagingOptions(use_shared_memory=False))


def measure_mode(
    training: Training, rounds: int, manager: CheckpointManager, mode: str
) -> tuple[Timings, float]:
    """Measure one mode; also give bytes a second of its copies, once they are all waited for."""
    chosen: dict[str, Any] = {"optimizer": training.optimizer} if mode == "overlap" else {}
    rates = []
    first = (manager.latest_step() or 0) + 1

    def begin(number: int) -> Begun:
        step = first + number
        handle = manager.save_async(training.state(), step, consistency=mode, **chosen)

        def finish() -> None:
            stats = handle.result().stats
            rates.append(stats.raw_bytes / stats.capture_seconds)

        return Begun(finish)

    timings = measure(training, rounds, begin)
    return timings, statistics.median(rates[1:])


def measure_reads(
    training: Training, rounds: int, store: Path, read: Callable[[], object]
) -> float:
    """Return the seconds of a load or a restore, with no file in the page cache."""
    seconds = []
    for _ in range(rounds + 1):
        forget(store)
        if training.device.type == "cuda":
            torch.cuda.empty_cache()
        settle(training.device)
        start = time.perf_counter()
        kept = read()
        settle(training.device)
        seconds.append(time.perf_counter() - start)
        del kept
    return statistics.median(seconds[1:])


def forget(store: Path) -> str:
    """Drop the store from the page cache; return how."""
    if is_root():
        try:
            drop_caches(store, as_root=True)
        except OSError:  # root in a container may not be allowed to
            pass
        else:
            return "page cache dropped before each read"
    drop_caches(store, as_root=False)
    return "page cache dropped before each read, of the store's files only"


def say(text: str) -> None:
    """Print immediately: a run that is cut short has printed its results so far."""
    print(text, flush=True)


def judge(name: str, figure: str, *, is_met: bool) -> None:
    """Print a figure beside its bound."""
    say(f"{name:58}{figure:44}{'met' if is_met else 'NOT MET'}")


def judge_at_most(name: str, value: float, bound: float) -> None:
    """Check that a ratio is not larger than its bound."""
    judge(name, f"at most {bound:.2f}, was {value:.2f}", is_met=value <= bound)


def judge_at_least(name: str, value: float, bound: float) -> None:
    """Check that a ratio is not smaller than its bound."""
    judge(name, f"at least {bound:.2f}, was {value:.2f}", is_met=value >= bound)


def show(name: str, timings: Timings) -> None:
    """Print what was measured of one way to save."""
    say(
        f"{name:26}{timings.stall * 1e3:10.1f} ms{timings.lost * 1e3:12.1f} ms"
        f"{timings.slowdown * 100:9.1f} %"
    )


def judge_saves(
    training: Training, machine: Machine, found: dict[str, Timings], copy_rate: float
) -> None:
    """Print the saves' figures beside their bounds."""
    strict, overlap, dcp = found["strict"], found["overlap"], found["dcp"]
    judge_at_least("copies of `strict` over the bus", copy_rate / machine.down, COPY_RATE_MIN)
    bare = training.state_bytes() / machine.down
    judge_at_most("stall of `strict` over the bare copy", strict.stall / bare, STRICT_STALL_MAX)
    bound = OVERLAP_STALL_MAX_SECONDS + (OVERLAP_STALL_MAX_SECONDS_PER_TENSOR * training.tensors())
    figure = f"at most {bound * 1e3:.1f} ms, was {overlap.stall * 1e3:.1f} ms"
    judge("stall of `overlap`", figure, is_met=overlap.stall <= bound)
    slowdown = f"at most {SLOWDOWN_MAX * 100:.0f} %, was {overlap.slowdown * 100:.1f} %"
    name = f"slowdown by `overlap` of the next {STEPS_AFTER} steps"
    judge(name, slowdown, is_met=overlap.slowdown <= SLOWDOWN_MAX)
    judge_at_most("stall of `overlap` over dcp's", overlap.stall / dcp.stall, DCP_SHARE_MAX)
    # Noise in the figure of a peer that loses nothing is no bound.
    if dcp.lost <= 0:
        say("dcp slowed the next steps by nothing that could be measured: no ratio to it")
    else:
        share = overlap.lost / dcp.lost
        judge_at_most("slowdown by `overlap` over dcp's", share, DCP_SHARE_MAX)
    total = (overlap.stall + overlap.lost) / (dcp.stall + dcp.lost)
    say(f"stall and slowdown of `overlap` together, over dcp's: {total:.2f}")


def judge_restores(
    training: Training, rounds: int, manager: CheckpointManager, machine: Machine
) -> None:
    """Measure loads and restores, and print them beside their bounds."""
    store, size = Path(manager.path), training.state_bytes()
    slower = min(machine.disk, machine.up)
    say(f"the slower of disk and bus: {slower / 1e9:.1f} GB/s; {forget(store)}")
    device = training.device if training.device.type == "cuda" else None
    reads: dict[str, Callable[[], object]] = {
        "load to the GPU": lambda: manager.load(map_location=device),
        "restore in place": lambda: manager.restore(training.state()),
    }
    for name, read in reads.items():
        seconds = measure_reads(training, rounds, store, read)
        say(f"{name}: {seconds:.2f} s, {size / seconds / 1e9:.1f} GB/s")
        rate = size / seconds / slower
        judge_at_least(f"{name}, over the slower of disk and bus", rate, RESTORE_RATE_MIN)


def run(device: torch.device, gigabytes: float, rounds: int, folder: Path) -> None:
    """Measure everything, and print it as it becomes known."""
    training = Training(device, gigabytes)
    size = training.state_bytes()
    check_room(folder, size)
    machine = Machine(bus_rate(device, up=False), bus_rate(device, up=True))
    say(f"state {size / 1e9:.2f} GB in {training.tensors()} tensors; {rounds} rounds")
    say(f"bus: {machine.down / 1e9:.1f} GB/s down, {machine.up / 1e9:.1f} GB/s up")
    say(f"{'':26}{'stall':>13}{f'{STEPS_AFTER} steps lose':>15}{'of them':>11}")
    found = {"dcp": measure_dcp(training, rounds, folder / "dcp")}
    show("dcp.async_save", found["dcp"])
    settings: dict[str, Any] = {
        "compression": "none",
        "staging_bytes": max(2 * size, STAGING_BYTES_MIN),
    }
    with CheckpointManager(folder / "store", keep_last_n=1, **settings) as manager:
        manager.prewarm(training.state())
        copy_rate = 0.0
        for mode in ("overlap", "device-snapshot", "strict"):
            found[mode], copy_rate = measure_mode(training, rounds, manager, mode)
            show(f"dtruntime, {mode}", found[mode])
        files = (path for path in Path(manager.path).rglob("*") if path.is_file())
        machine.disk = disk_rate(max(files, key=lambda path: path.stat().st_size))
        say(f"disk: {machine.disk / 1e9:.1f} GB/s")
        judge_saves(training, machine, found, copy_rate)
        judge_restores(training, rounds, manager, machine)


def check_room(folder: Path, size: int) -> None:
    """Refuse a state so large that two do not fit on the disk."""
    free = shutil.disk_usage(folder).free
    if free < 2.1 * size:
        sys.exit(
            f"measuring in `{folder}`: {free / 1e9:.0f} GB are free, and twice the state of "
            f"{size / 1e9:.1f} GB is needed\n"
            "hint: give less as `--gigabytes`, or another `--folder`"
        )


def describe(device: torch.device) -> str:
    """Print the name of the device, or refuse it."""
    cores = len(os.sched_getaffinity(0))
    if device.type != "cuda":
        return f"on no GPU: the figures mean nothing; torch {torch.__version__}, {cores} CPUs"
    if not torch.cuda.is_available():
        sys.exit("PyTorch sees no GPU here: nothing was measured")
    if not gpus.are_usable():
        sys.exit("the package cannot reach the GPU's driver, and would measure torch's copies")
    return f"on {torch.cuda.get_device_name(device)}, torch {torch.__version__}, {cores} CPUs"


def main() -> None:
    """Measure what the arguments say."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=10.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", help="where to save; default: a temporary folder")
    parser.add_argument("--device", default="cuda:0")
    options = parser.parse_args()
    device = torch.device(options.device)
    say(describe(device))
    warnings.filterwarnings("ignore", module="torch.distributed.checkpoint")  # of one process
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        run(device, options.gigabytes, options.rounds, Path(folder))


if __name__ == "__main__":
    main()
