"""The kernel's records of processes: their descendants, processor time and memory."""

from __future__ import annotations

import contextlib
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
SAMPLE_SECONDS = 0.005


def descendants(pid: int) -> list[int]:
    """Return the descendants of a process."""
    found: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, path.read_text().split()):
                found += [child, *descendants(child)]
    return found


def cpu_seconds_of_descendants(pid: int) -> float:
    """Return the processor time that living descendants, and their ended children, have used."""
    ticks = 0
    for child in descendants(pid):
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{child}/stat").read_text().rsplit(")", 1)[1].split()
            ticks += sum(map(int, fields[11:15]))
    return ticks / TICKS_PER_SECOND


@dataclass(frozen=True)
class Memory:
    """Resident bytes of a process and its descendants.

    What they share is counted once: the most that any of them maps.
    """

    own: int
    shared: int

    @property
    def total(self) -> int:
        """The total."""
        return self.own + self.shared

    @classmethod
    def of(cls, pid: int) -> Memory:
        """Read the current values."""
        own, shared = 0, 0
        for process in [pid, *descendants(pid)]:
            with contextlib.suppress(OSError):
                fields = status_of(process)
                # A process that is just ending has no memory left, and no such fields.
                own += fields.get("RssAnon", 0)
                shared = max(shared, fields.get("RssShmem", 0))
        return cls(own, shared)


def status_of(pid: int) -> dict[str, int]:
    """Read the memory fields of a process, in bytes."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    pairs = (line.split(":", 1) for line in lines if line.endswith(" kB"))
    return {name: int(text.split()[0]) * 1024 for name, text in pairs}


class PeakMemory:
    """Watches a process and its descendants: `with PeakMemory(pid) as peak: ...`."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.before = Memory.of(pid)
        self.resident_before = status_of(pid)["VmRSS"]
        self.peak = self.before.total
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="peak-memory")

    def _watch(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            self.peak = max(self.peak, Memory.of(self.pid).total)

    @property
    def extra_bytes(self) -> int:
        """The most that was resident beyond what was resident before.

        Samples may miss a short peak; the kernel's own mark, of the process alone, does not.
        """
        marked = status_of(self.pid)["VmHWM"] - self.resident_before
        return max(self.peak - self.before.total, marked)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()
