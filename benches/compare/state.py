"""The state that every engine saves: its file, and its one copy in memory.

A finished state is kept outside the clone, under the hash of `make_state.py` and of the size, as
raw bytes with an index beside them. The SHA-256 of all bytes is printed with every run. What
measures maps those bytes from one shared copy in memory:

    state.bin    tensors one after the other, each 64 bytes past a page's start, where
                 torch's allocator puts large ones, too
    state.json   names, types, shapes and offsets; plain values; the SHA-256
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import make_state
from make_state import SIZES, State, say, train

PAGE_BYTES = 4096
OFFSET_IN_PAGE = 64


def flatten(state: State, prefix: str = "") -> dict[str, Any]:
    """Return the leaves by their path, with `/` between the keys."""
    flat: dict[str, Any] = {}
    for key, value in state.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}/")
        else:
            flat[prefix + key] = value
    return flat


def unflatten(flat: dict[str, Any]) -> State:
    """Undo `flatten`."""
    state: State = {}
    for path, value in flat.items():
        *folders, name = path.split("/")
        inner = state
        for folder in folders:
            inner = inner.setdefault(folder, {})
        inner[name] = value
    return state


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    """View a contiguous tensor as bytes."""
    return tensor.reshape(-1).view(torch.uint8)


@dataclass(frozen=True)
class Entry:
    """The position of a tensor in `state.bin`."""

    path: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    bytes: int


@dataclass(frozen=True)
class Index:
    """What `state.json` holds."""

    entries: tuple[Entry, ...]
    values: dict[str, Any]
    file_bytes: int
    sha256: str

    @property
    def raw_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.bytes for entry in self.entries)

    @classmethod
    def read(cls, folder: Path) -> Index:
        """Read the index of a finished state."""
        fields = json.loads((folder / "state.json").read_text())
        entries = (Entry(**{**e, "shape": tuple(e["shape"])}) for e in fields.pop("entries"))
        return cls(entries=tuple(entries), **fields)


def ensure(cache: Path, size_name: str) -> Path:
    """Return the folder of the state of this size, training first if it does not exist."""
    size = SIZES[size_name]
    key = hashlib.sha256(Path(make_state.__file__).read_bytes() + repr(size).encode()).hexdigest()[
        :16
    ]
    folder = cache / f"state-{size_name}-{key}"
    if not (folder / "state.json").exists():
        say(f"training the model whose state is saved (once; kept in {folder})")
        folder.mkdir(parents=True, exist_ok=True)
        write(folder, train(size))
    return folder


def write(folder: Path, state: State) -> None:
    """Write both files; the index last, so that its existence means that the state is complete."""
    entries: list[Entry] = []
    values: dict[str, Any] = {}
    sha256 = hashlib.sha256()
    end = 0
    with (folder / "state.bin").open("wb") as file:
        for path, value in flatten(state).items():
            if not isinstance(value, torch.Tensor):
                values[path] = value
                continue
            offset = -(-end // PAGE_BYTES) * PAGE_BYTES + OFFSET_IN_PAGE
            raw = bits_of(value.contiguous()).numpy()
            file.seek(offset)
            file.write(raw.data)
            sha256.update(path.encode() + b"\0")
            sha256.update(raw.data)
            end = offset + raw.nbytes
            dtype = str(value.dtype).removeprefix("torch.")
            entries.append(Entry(path, dtype, tuple(value.shape), offset, raw.nbytes))
        end = -(-end // PAGE_BYTES) * PAGE_BYTES
        file.truncate(end)
    index = Index(tuple(entries), values, end, sha256.hexdigest())
    partial = folder / "state.json.partial"
    partial.write_text(json.dumps(asdict(index)))
    partial.rename(folder / "state.json")


class Shared:
    """The state's bytes in memory, once for all processes that inherit the descriptor.

    Ordinary 4 KiB pages, like those of a tensor that torch allocated.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.index = Index.read(folder)
        self.descriptor = os.memfd_create("state", 0)
        os.ftruncate(self.descriptor, self.index.file_bytes)
        with (
            (folder / "state.bin").open("rb") as source,
            mmap.mmap(self.descriptor, 0) as memory,
            memoryview(memory) as view,
        ):
            if source.readinto(view) != self.index.file_bytes:
                sys.exit(f"error: `{folder}` is cut short\nhint: remove it; it is made again")

    def close(self) -> None:
        """Release the memory, once the last process that maps it ends."""
        os.close(self.descriptor)


def map_state(descriptor: int, index: Index, part_bytes: int | None = None) -> State:
    """View the shared bytes as tensors; of whole parameters only so many that they fit a part."""
    memory = mmap.mmap(descriptor, 0, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
    flat: dict[str, Any] = dict(index.values)
    chosen = within(index, part_bytes)
    for entry in index.entries:
        if entry.path in chosen:
            dtype = getattr(torch, entry.dtype)
            count = entry.bytes // dtype.itemsize
            tensor = torch.frombuffer(memory, dtype=dtype, count=count, offset=entry.offset)
            flat[entry.path] = tensor.view(entry.shape)
    return unflatten(flat)


def within(index: Index, part_bytes: int | None) -> set[str]:
    """Choose parameters, each with its master copy and moments, up to a number of bytes."""
    if part_bytes is None:
        return {entry.path for entry in index.entries}
    sizes: dict[str, int] = {}
    for entry in index.entries:
        sizes[owner(entry.path)] = sizes.get(owner(entry.path), 0) + entry.bytes
    total = 0
    owners: set[str] = set()
    for name, size in sizes.items():
        if total + size <= part_bytes or not owners:
            owners.add(name)
            total += size
    return {entry.path for entry in index.entries if owner(entry.path) in owners}


def owner(path: str) -> str:
    """Name the parameter that a tensor belongs to."""
    return path.split("/")[1]
