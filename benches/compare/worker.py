"""A process in which one engine at a time saves and loads the shared state, on command.

Commands come as lines of JSON on standard input, answers go as lines of JSON to the descriptor
that standard output was; what libraries print goes to standard error. Nothing but the engine and
the one command runs here, so that its memory and processor time are the engine's.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import importlib
import json
import os
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import engines
from processes import cpu_seconds_of_descendants, status_of
from state import Index, bits_of, flatten, map_state
from training import Training

if TYPE_CHECKING:
    from make_state import State


class Worker:
    """Executes commands: every method but `run` is one, with its keywords as arguments."""

    def __init__(self, descriptor: int, index: Index, root: Path) -> None:
        self.descriptor = descriptor
        self.index = index
        self.root = root
        self.state = map_state(descriptor, index)
        self.engine: engines.Engine | None = None
        self.training: Training | None = None

    def run(self, answers: Any) -> None:
        """Answer each command until there are no more."""
        for line in sys.stdin:
            command = json.loads(line)
            answer = getattr(self, command.pop("do"))(**command)
            print(json.dumps(answer), file=answers, flush=True)

    def use_part(self, part_bytes: int | None) -> dict[str, int]:
        """Limit what is saved from now on to this much of the state."""
        self.state = map_state(self.descriptor, self.index, part_bytes)
        tensors = (v for v in flatten(self.state).values() if isinstance(v, torch.Tensor))
        return {"raw_bytes": sum(tensor.nbytes for tensor in tensors)}

    def open(self, engine: str, folder: str, settings: dict[str, Any] | None = None) -> None:
        """Create an engine on a folder."""
        path = self.root / folder
        if settings is None:
            entrant = engines.entrant(engine)
            for module in entrant.modules:
                importlib.import_module(module)
            self.engine = entrant.make(path)
        else:
            self.engine = engines.Dtruntime(path, **settings)

    def close(self) -> None:
        """Close the engine."""
        self.the_engine.close()
        self.engine = None
        gc.collect()

    @property
    def the_engine(self) -> engines.Engine:
        """The engine that was opened."""
        assert self.engine is not None, "no engine is open"  # noqa: S101
        return self.engine

    def prewarm(self) -> None:
        """Prewarm: do what the first save would do."""
        self.the_engine.prewarm(self.state)

    def save(self, step: int, keys: list[str] | None = None) -> dict[str, float]:
        """Save, and return what it took."""
        engine = self.the_engine
        state = self.state if keys is None else {key: self.state[key] for key in keys}
        Path("/proc/self/clear_refs").write_text("5")  # reset VmHWM
        cpu_before = cpu_seconds()
        began = time.perf_counter()
        engine.save(step, state)
        returned = time.perf_counter()
        with engine.may_change():
            free = time.perf_counter()
        engine.finish()
        durable = time.perf_counter()
        return {
            "call_seconds": returned - began,
            "stall_seconds": free - began,
            "durable_seconds": durable - began,
            "cpu_seconds": cpu_seconds() - cpu_before,
            "disk_bytes": engines.disk_bytes(engine.folder),
        }

    def save_beside_training(self, step: int, threads: int, steps: int) -> dict[str, float]:
        """Train, save meanwhile, and return how much longer the steps took."""
        engine = self.the_engine
        if self.training is None:
            self.training = Training(threads)
        training = self.training
        undisturbed = [engines.seconds_of(training.step) for _ in range(steps)]
        taken = 0
        began = time.perf_counter()
        engine.save(step, self.state)
        while taken < steps or not engine.is_durable():
            training.backward()
            with engine.may_change():
                training.update()
            taken += 1
        engine.finish()
        seconds = time.perf_counter() - began
        step_seconds = statistics.median(undisturbed)
        return {
            "lost_seconds": seconds - taken * step_seconds,
            "step_seconds": step_seconds,
            "steps": taken,
        }

    def load(self, step: int) -> dict[str, Any]:
        """Load, and compare every bit with the state."""
        began = time.perf_counter()
        loaded = self.the_engine.load(step, self.state)
        seconds = time.perf_counter() - began
        answer = {"load_seconds": seconds, "identical": is_same(loaded, self.state)}
        del loaded
        release_memory()
        return answer

    def restore(self, step: int, verb: str = "restore") -> dict[str, Any]:
        """Restore tensors that a training would hold, and compare every bit with the state."""
        live = engines.emptied(self.state)
        for value in flatten(live).values():
            if isinstance(value, torch.Tensor):
                bits_of(value).zero_()  # its memory is resident, like a model's
        restore = getattr(self.the_engine, verb)
        began = time.perf_counter()
        restore(step, live)
        seconds = time.perf_counter() - began
        answer = {"restore_seconds": seconds, "identical": is_same(live, self.state)}
        del live
        release_memory()
        return answer

    def remove(self, step: int) -> None:
        """Delete a checkpoint."""
        self.the_engine.remove(step)

    def endure(self, folder: str, saves: int, warm_saves: int) -> dict[str, Any]:
        """Save many times; return what is held before, after some, after all, and when closed."""
        before = holdings()
        self.open("", folder, {"keep_last_n": 2})
        counts = [before]
        for step in range(1, saves + 1):
            self.the_engine.save(step, self.state)
            self.the_engine.finish()
            if step in (warm_saves, saves):
                counts.append(holdings())
        self.close()
        return {"holdings": [*counts, holdings()]}


def release_memory() -> None:
    """Return what a load allocated to the system: later saves must not find it warm."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def cpu_seconds() -> float:
    """Return the processor time that this process and those it started have used."""
    own = resource.getrusage(resource.RUSAGE_SELF)
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    total = own.ru_utime + own.ru_stime + ended.ru_utime + ended.ru_stime
    return total + cpu_seconds_of_descendants(os.getpid())


def holdings() -> dict[str, int]:
    """Count what a process could leave behind.

    Threads that the kernel starts and ends by itself, for a ring, are not the engine's. A deleted
    file may be open for as long as the filesystem takes to give back its space.
    """
    gc.collect()
    end = time.monotonic() + 30
    while is_releasing() and time.monotonic() < end:
        time.sleep(0.01)
    names = []
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # it has just ended
            names.append((task / "comm").read_text())
    return {
        "resident_bytes": status_of(os.getpid())["VmRSS"],
        "threads": sum(not name.startswith("iou-wrk") for name in names),
        "descriptors": sum(1 for _ in Path("/proc/self/fd").iterdir()),
    }


def is_releasing() -> bool:
    """Return whether a file that has no name any more is open."""
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # the one that lists them
            target = str(descriptor.readlink())
            if ".shard" in target and target.endswith(" (deleted)"):
                return True
    return False


def is_same(loaded: State, state: State) -> bool:
    """Compare by paths, types, shapes and bits."""
    ours, theirs = flatten(state), flatten(loaded)
    return ours.keys() == theirs.keys() and all(
        is_same_value(value, theirs[path]) for path, value in ours.items()
    )


def is_same_value(ours: Any, theirs: Any) -> bool:
    """Compare two leaves."""
    if not isinstance(ours, torch.Tensor):
        return type(ours) is type(theirs) and bool(ours == theirs)
    return (
        isinstance(theirs, torch.Tensor)
        and ours.dtype == theirs.dtype
        and ours.shape == theirs.shape
        and torch.equal(wide(ours), wide(theirs))
    )


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """View a tensor's bits as the widest integers that they fill."""
    bits = bits_of(tensor)
    return bits.view(torch.int64) if len(bits) % 8 == 0 else bits


def main() -> None:
    """Map the state and execute commands."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--state", type=Path, required=True, help="folder of its index")
    parser.add_argument("--descriptor", type=int, required=True, help="the bytes in memory")
    parser.add_argument("--root", type=Path, required=True, help="where checkpoints go")
    options = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    worker = Worker(options.descriptor, Index.read(options.state), options.root)
    print(json.dumps("ready"), file=answers, flush=True)
    worker.run(answers)


if __name__ == "__main__":
    main()
