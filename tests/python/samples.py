"""Files of samples for tests of datasets, and how they are assigned.

A sample here is ``name:number``, so a list of samples says which file each came from.
"""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from hashlib import sha256
from typing import TYPE_CHECKING

import pytest
from support import script_environment

from dtruntime import (
    DatasetNotFound,
    ShardedDataset,
)
from dtruntime.datasets.registry import Share

if TYPE_CHECKING:
    from pathlib import Path


class Dealer:
    """Assigns the files of a folder, as a coordinator would."""

    def __init__(self, folder, files, place=(0, 1), told=(), **changes):
        self.folder, self.files, self.own = folder, sorted(files), place
        self.told, self.changes = dict(told), changes
        self.asked = 0

    def place(self, rank, world_size):
        own_rank, own_size = self.own
        return (
            own_rank if rank is None else rank,
            own_size if world_size is None else world_size,
            self.told,
        )

    def share(self, name, place, epoch):
        if name != "train":
            raise DatasetNotFound(f"dataset `{name}`", "it is not registered", "register it")
        self.asked += 1
        rank, world_size = place
        order = sorted(self.files, key=lambda file: sha256(f"{epoch} {file}".encode()).digest())
        share = Share(
            str(self.folder), order[rank::world_size], len(order), "text", 100, 0, shuffle=True
        )
        return share._replace(**self.changes)


def lines_of(name: str, count: int) -> list[str]:
    return [f"{name}:{number}" for number in range(count)]


def make_files(folder: Path, counts: list[int]) -> list[str]:
    """Write a text file for each count, with that many samples."""
    folder.mkdir(exist_ok=True)
    names = [f"f{index:02}.txt" for index in range(len(counts))]
    for name, count in zip(names, counts, strict=True):
        (folder / name).write_text("".join(line + "\n" for line in lines_of(name, count)))
    return names


def samples_of(names: list[str], counts: list[int]) -> Counter[str]:
    pairs = zip(names, counts, strict=True)
    return Counter(line for name, count in pairs for line in lines_of(name, count))


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """Forty files; file ``k`` has ``k % 7`` samples: some none, most a few."""
    counts = [number % 7 for number in range(40)]
    folder = tmp_path_factory.mktemp("library")
    return folder, make_files(folder, counts), counts


def open_dataset(library, file_count=40, place=(0, 1), **options):
    folder, names, _ = library
    return ShardedDataset(Dealer(folder, names[:file_count], place), "train", **options)


def expected(library, file_count=40) -> Counter[str]:
    _, names, counts = library
    return samples_of(names[:file_count], counts[:file_count])


def take(iterator, count):
    """Return the next items, at most ``count``."""
    return [item for _, item in zip(range(count), iterator, strict=False)]


def flat(batches):
    return [sample for batch in batches for sample in batch]


def run_file(script, *arguments):
    return subprocess.run(
        [sys.executable, "-W", "ignore", str(script), *map(str, arguments)],
        env=script_environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
