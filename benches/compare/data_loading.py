"""Samples per CPU second of a ``ShardedDataset`` and of a bare loop over the same files.

    .ci/env python benches/compare/data_loading.py

One process reads files of short JSON lines, the loaders in batches of 64: counting and reading
ahead is then a larger part of the work than in any training. Files are in the page cache. CPU
seconds count every thread of the process; other work on the machine affects them less than the
clock.

Always holds: each way reads the same samples, and their checksum is compared.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
import zlib
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader

from dtruntime import DatasetRegistry, ShardedDataset, ShardedLoader, _native
from dtruntime.ranks.connecting import Security

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

FILES = 32
ROUNDS = 5
BATCH = 64


def write_files(folder: Path, samples: int) -> list[Path]:
    """Write the dataset."""
    paths = []
    for number in range(FILES):
        rows = (json.dumps({"id": number * samples + row, "text": "word " * 20}) + "\n"
                for row in range(samples))  # fmt: skip
        paths.append(folder / f"part-{number:03}.jsonl")
        paths[-1].write_text("".join(rows))
    return paths


def bare(paths: Iterable[str]) -> Iterable[Any]:
    """Read with a bare loop."""
    for path in paths:
        with open(path, "rb") as file:  # noqa: PTH123
            for line in file:
                yield json.loads(line)


def measure(read: Callable[[], Iterable[Any]]) -> tuple[float, int, int]:
    """Return samples a second of CPU time, how many there were, and their checksum."""
    begun, count, checksum = time.process_time(), 0, 0
    for sample in read():
        count += 1
        checksum = zlib.crc32(sample["id"].to_bytes(8, "little"), checksum)
    return count / (time.process_time() - begun), count, checksum


def main() -> None:
    """Measure each way in turns, and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=10_000, help="of each of the files")
    samples = parser.parse_args().samples
    coordinator = _native.EmbeddedCoordinator("127.0.0.1")
    url = f"http://127.0.0.1:{coordinator.port}"
    with tempfile.TemporaryDirectory() as folder:
        write_files(Path(folder), samples)
        registry = DatasetRegistry(url, security=Security(token=coordinator.token))
        registry.register("bench", folder, "jsonl", FILES * samples)
        paths = registry.get_shard("bench", 0, world_size=1)
        dataset = ShardedDataset(registry, "bench", rank=0, world_size=1)
        plain = DataLoader(dataset, batch_size=BATCH, collate_fn=list)
        loader = ShardedLoader(dataset, batch_size=BATCH, collate_fn=list)
        ways: dict[str, Callable[[], Iterable[Any]]] = {
            "bare loop": lambda: bare(paths),
            "ShardedDataset": lambda: dataset,
            "DataLoader over it": lambda: chain.from_iterable(plain),
            "ShardedLoader over it": lambda: chain.from_iterable(loader),
        }
        found: dict[str, list[tuple[float, int, int]]] = {name: [] for name in ways}
        for _ in range(ROUNDS):
            for name, read in ways.items():
                found[name].append(measure(read))
    seen = {(count, checksum) for runs in found.values() for _, count, checksum in runs}
    assert len(seen) == 1, seen  # noqa: S101
    ((count, checksum),) = seen
    print(f"{count} samples, crc32 of their ids {checksum:08x}, medians of {ROUNDS}")
    base = statistics.median(speed for speed, *_ in found["bare loop"])
    for name, runs in found.items():
        speed = statistics.median(speed for speed, *_ in runs)
        print(f"{name:28} {speed:12,.0f} samples/CPU s  {speed / base:.2f} of the bare loop")


if __name__ == "__main__":
    main()
