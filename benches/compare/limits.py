"""What the machine itself can do: the limits of every engine.

Stall: two threads that do nothing but copy the state's bytes into warm huge pages. Durable and
load: fio, with direct I/O through io_uring, writing a new file of the state's size and syncing it,
and reading it with cold caches; with buffers in huge pages, and in ordinary ones.
"""

from __future__ import annotations

import json
import mmap
import os
import shutil
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING

import numpy as np

from state import bits_of, flatten

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import torch

    from make_state import State

BLOCK_BYTES = 4 << 20
QUEUE_DEPTH = 8
HUGE_PAGE_BYTES = 2 << 20
HUGE_PAGES_NEEDED = QUEUE_DEPTH * BLOCK_BYTES // HUGE_PAGE_BYTES + 8  # fio takes some for itself

Piece = tuple["np.ndarray[tuple[int], np.dtype[np.uint8]]", int]


class BareCopy:
    """Copies the whole state into warm huge pages, with two threads."""

    def __init__(self, state: State) -> None:
        sources = [v for v in flatten(state).values() if not isinstance(v, (int, float, str))]
        self.bytes = sum(source.nbytes for source in sources)
        self._memory = mmap.mmap(-1, self.bytes + HUGE_PAGE_BYTES)
        self._memory.madvise(mmap.MADV_HUGEPAGE)
        self._target = np.frombuffer(self._memory, dtype=np.uint8)
        self._target.fill(1)
        self._halves = halves(sources, self.bytes)

    def seconds(self) -> float:
        """Copy once."""
        helper = threading.Thread(target=self._copy, args=(self._halves[1],))
        began = time.perf_counter()
        helper.start()
        self._copy(self._halves[0])
        helper.join()
        return time.perf_counter() - began

    def copied(self) -> bytes:
        """Return the last copy."""
        return self._target[: self.bytes].tobytes()

    def _copy(self, pieces: list[Piece]) -> None:
        for source, offset in pieces:
            np.copyto(self._target[offset : offset + source.nbytes], source)


def halves(sources: list[torch.Tensor], total: int) -> tuple[list[Piece], list[Piece]]:
    """Divide the bytes into two equal halves, each with the offsets to copy them to."""
    first: list[Piece] = []
    second: list[Piece] = []
    offset = 0
    for source in sources:
        raw = bits_of(source).numpy()
        cut = min(max(total // 2 - offset, 0), raw.nbytes)
        if cut > 0:
            first.append((raw[:cut], offset))
        if cut < raw.nbytes:
            second.append((raw[cut:], offset + cut))
        offset += raw.nbytes
    return first, second


class Fio:
    """Writes and reads a file of a given size as fast as fio can."""

    def __init__(
        self,
        folder: Path,
        size_bytes: int,
        drop_caches: Callable[[], object],
        *,
        has_huge_pages: bool,
    ) -> None:
        if shutil.which("fio") is None:
            sys.exit(
                "error: `fio` is not on PATH: without it there is no limit to compare with\n"
                "hint: install it; on Debian and Ubuntu: apt install fio"
            )
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.size_bytes = size_bytes
        self._drop_caches = drop_caches
        self._has_huge_pages = has_huge_pages

    def version(self) -> str:
        """Return the version of fio."""
        return subprocess.run(
            ["fio", "--version"], check=True, capture_output=True, text=True
        ).stdout.strip()

    def write_seconds(self, *, huge: bool) -> float:
        """Write a new file and sync it."""
        self.remove()
        return self._run("write", huge=huge)

    def read_seconds(self, *, huge: bool) -> float:
        """Read the file that was written, with cold caches."""
        self._drop_caches()
        return self._run("read", huge=huge)

    def remove(self) -> None:
        """Delete the file, and wait until the device has discarded it."""
        self._path.unlink(missing_ok=True)
        os.sync()

    @property
    def _path(self) -> Path:
        return self.folder / "fio.dat"

    def _run(self, kind: str, *, huge: bool) -> float:
        memory = "plain" if not huge else "reserved" if self._has_huge_pages else "transparent"
        command, environment = fio_command(kind, self._path, self.size_bytes, memory)
        done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
        if done.returncode != 0:
            sys.exit(
                f"error: fio ended with exit status {done.returncode}: {done.stderr.strip()}\n"
                f"hint: try it by hand: {' '.join(command)}"
            )
        (job,) = json.loads(done.stdout[done.stdout.index("{") :])["jobs"]
        return float(job[kind]["runtime"]) / 1000


def fio_command(
    kind: str, path: Path, size_bytes: int, memory: str
) -> tuple[list[str], dict[str, str]]:
    """Return the command, for whole blocks, and its environment.

    Its buffers are in the memory that is named:
    `plain` is 4 KiB pages, `reserved` is huge pages that root set aside, and `transparent` has the
    allocator ask for huge pages.
    """
    arguments = {
        "name": kind,
        "filename": path,
        "rw": kind,
        "size": -(-size_bytes // BLOCK_BYTES) * BLOCK_BYTES,
        "ioengine": "io_uring",
        "direct": 1,
        "bs": BLOCK_BYTES,
        "iodepth": QUEUE_DEPTH,
        "fallocate": "posix",
        "end_fsync": 1,
        "invalidate": 0,
        "output-format": "json",
    }
    environment = dict(os.environ)
    if memory == "reserved":
        arguments["iomem"] = "mmaphuge"
    elif memory == "transparent":
        environment["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
    return ["fio", *(f"--{name}={value}" for name, value in arguments.items())], environment
