"""The machine: its description in reports, and what a run needs from it.

Dropping the page cache and reserving huge pages need root, and affect other processes. Without
them the cache is dropped file by file, which a report says, and the allocator provides huge pages
for fio's buffers.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import os
import platform
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

DROP_CACHES = Path("/proc/sys/vm/drop_caches")
HUGE_PAGES = Path("/proc/sys/vm/nr_hugepages")
_TOUCH = """
import mmap, sys
flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE
mmap.mmap(-1, int(sys.argv[1]), flags)
"""


@dataclass(frozen=True)
class Machine:
    """What a reader needs to know about the machine to judge the numbers."""

    cpu: str
    cores: int
    memory_gib: float
    kernel: str
    filesystem: str
    device: str
    date: str

    def __str__(self) -> str:
        return (
            f"{self.cpu}, {self.cores} cores, {self.memory_gib:.0f} GiB of memory, "
            f"Linux {self.kernel}, {self.filesystem} on {self.device}, {self.date}"
        )


def describe(folder: Path) -> Machine:
    """Describe this machine, with the filesystem of a folder."""
    match = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    meminfo = re.search(r"MemTotal:\s*(\d+)", Path("/proc/meminfo").read_text())
    filesystem, device = mount_of(folder)
    return Machine(
        cpu=match[1].strip() if match else platform.machine(),
        cores=len(os.sched_getaffinity(0)),
        memory_gib=int(meminfo[1]) / (1 << 20) if meminfo else 0.0,
        kernel=platform.release(),
        filesystem=filesystem,
        device=device,
        date=dt.datetime.now(tz=dt.timezone.utc).date().isoformat(),
    )


def available_bytes() -> int:
    """Return the memory that is available without swapping; 0 if that is unknown."""
    match = re.search(r"MemAvailable:\s*(\d+)", Path("/proc/meminfo").read_text())
    return int(match[1]) * 1024 if match else 0


def mount_of(folder: Path) -> tuple[str, str]:
    """Return type and device of the filesystem of a folder."""
    device = folder.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, right = line.split(" - ", 1)
        if left.split()[2] == number:
            kind, source = right.split()[:2]
            return kind, source
    return "an unknown filesystem", number


def is_root() -> bool:
    """Return whether this process may change the machine."""
    return os.geteuid() == 0


def drop_caches(folder: Path, *, as_root: bool) -> None:
    """Drop a folder's files from the page cache."""
    os.sync()
    if as_root:
        DROP_CACHES.write_text("3")
        return
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def have_free_memory(count: int) -> None:
    """Make sure that this much free memory is backed by this machine.

    A virtual machine returns free memory to its host, and getting it back takes time. Reads into
    the page cache, which was just dropped, would not pay for that, but those into new memory would.
    So a separate process allocates and releases as much before every read.
    """
    subprocess.run([sys.executable, "-c", _TOUCH, str(count)], check=True)


@contextlib.contextmanager
def huge_pages(count: int, *, as_root: bool) -> Iterator[bool]:
    """Reserve huge pages while the block runs; yields whether that succeeded."""
    if not as_root:
        yield False
        return
    before = int(HUGE_PAGES.read_text())
    HUGE_PAGES.write_text(str(before + count))
    try:
        yield int(HUGE_PAGES.read_text()) >= before + count
    finally:
        HUGE_PAGES.write_text(str(before))
