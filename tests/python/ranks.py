"""Jobs of several processes, each a rank that runs the same source."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from typing import TYPE_CHECKING

from support import script_environment, start_script

if TYPE_CHECKING:
    from pathlib import Path

PREAMBLE = """
import os, sys, signal
import torch
from dtruntime import *
rank, store = int(os.environ["RANK"]), sys.argv[1]
"""


STATES = """
def state_of(step):
    generator = torch.Generator().manual_seed(step * 100 + rank)
    return {"w": torch.randn(50_000, generator=generator), "rank": rank, "step": step}

def same(one, other):
    return torch.equal(one["w"], other["w"]) and one["rank"] == other["rank"]
"""
"""States that differ by rank and step, for sources that ``start`` and ``run`` run."""


def place_of(rank: int, world_size: int, url: str) -> dict[str, str]:
    """Return the environment of one rank."""
    return {"RANK": str(rank), "WORLD_SIZE": str(world_size), "COORDINATOR_URL": url}


def start_rank(
    source: str, store: Path, rank: int, world_size: int, url: str
) -> subprocess.Popen[str]:
    """Start one rank: its source can use `rank`, `store`, and all names of the package."""
    place = place_of(rank, world_size, url)
    return start_script(PREAMBLE + textwrap.dedent(source), store, environment=place)


def run_ranks(source: str, store: Path, url: str, world_size: int = 3) -> list[str]:
    """Run all ranks to their end; return what each printed."""
    processes = [start_rank(source, store, rank, world_size, url) for rank in range(world_size)]
    ended = [process.communicate(timeout=300) for process in processes]
    for process, (_, error) in zip(processes, ended, strict=True):
        assert process.returncode == 0, error
    return [out for out, _ in ended]


def start(source: str, store: Path, rank: int, world_size: int, url: str) -> subprocess.Popen[str]:
    """Start one rank of a source that uses ``STATES``."""
    return start_rank(STATES + textwrap.dedent(source), store, rank, world_size, url)


def run(source: str, store: Path, url: str, world_size: int = 3) -> list[str]:
    """Run all ranks of a source that uses ``STATES`` to their end; return what each printed."""
    return run_ranks(STATES + textwrap.dedent(source), store, url, world_size)


def torchrun(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a script on several ranks of one machine."""
    environment = script_environment() | {"OMP_NUM_THREADS": "1"}
    environment.pop("COORDINATOR_URL", None)
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
