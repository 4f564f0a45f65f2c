"""Boxes of tensors, assembled from the parts that ranks saved.

    saved by two ranks     requested by the second of three
    |  rank 0  |  rank 1  |
    |      |*** ***|      |     the end of rank 0's part, and the start of rank 1's

Always holds: each item of a box was saved by exactly one rank, or by several with the same value,
or it is an error; shards of other ranks are opened only if this rank's own does not cover the box;
a part that is contiguous in source and destination is read straight to its place, and others
through memory of bounded size.
"""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from dtruntime.errors import Corrupt
from dtruntime.state import gpus
from dtruntime.state.sharded_tensors import Box, contiguous_strides, is_contiguous, whole
from dtruntime.state.tensors import TensorRecord, hull_of
from dtruntime.state.tree import TAG_TENSOR, Tree

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from dtruntime import _native

_T = TypeVar("_T")

_COPY_BYTES = 256 << 20
"""Bytes that are read at a time before they are copied to their places."""

_OPENED_AT_ONCE = 16
"""Shards that are opened concurrently."""

Target = tuple[int, int, Any]
"""A read request: a storage, its first byte, and the memory to fill."""


class Part(NamedTuple):
    """A tensor, or the part of it that a rank saved."""

    checkpoint: _native.Checkpoint
    record: TensorRecord

    @property
    def box(self) -> Box:
        """Its box of the whole tensor."""
        record = self.record
        return whole(record.shape) if record.slice is None else Box(record.slice[1], record.shape)

    def cut(self, box: Box) -> TensorRecord:
        """Describe a box within it, as a view of its storage."""
        at = zip(box.offsets, self.box.offsets, self.record.strides, strict=True)
        skipped = sum((start - own) * stride for start, own, stride in at)
        return self.record._replace(
            shape=box.sizes, offset=self.record.offset + skipped, slice=None
        )


def whole_shape(record: TensorRecord) -> tuple[int, ...]:
    """Return the shape of the whole tensor that a record describes, maybe only a part of."""
    return record.shape if record.slice is None else record.slice[0]


class Parts:
    """The parts that ranks saved of a checkpoint's tensors.

    Args:
        checkpoint: This rank's own shard.
        tree: Its tree.
        records: Its tensors.
        open_rank: Opens a rank's shard, for what only that shard has.

    """

    def __init__(
        self,
        checkpoint: _native.Checkpoint,
        tree: Tree,
        records: list[TensorRecord],
        open_rank: Callable[[int], _native.Checkpoint],
    ) -> None:
        self._own = checkpoint
        self._tree = tree
        self._records = records
        self._open_rank = open_rank
        self._places: dict[int, tuple[Any, ...]] | None = None
        self._others: list[tuple[_native.Checkpoint, dict[tuple[Any, ...], TensorRecord]]] = []

    def covering(self, number: int, box: Box) -> dict[Box, list[Part]]:
        """Return the boxes that tile one of a tensor, each with all parts that cover it.

        Raises:
            Corrupt: Some of it was saved by no rank, or by several in boxes that overlap.

        """
        record = self._records[number]
        own = Part(self._own, record)
        if not box.items:
            return {}
        is_own = record.slice is not None and not self._own.is_replicated_only
        if record.slice is None or (is_own and own.box.intersect(box) == box):
            return {box: [own]}
        found: dict[Box, list[Part]] = {}
        for part in self._of_all_ranks(number):
            common = part.box.intersect(box)
            if common is not None:
                found.setdefault(common, []).append(part)
        self._check_tiled(number, box, list(found))
        return found

    def _of_all_ranks(self, number: int) -> Iterator[Part]:
        record = self._records[number]
        if self._places is None:
            self._places = _paths_of_slices(self._tree, self._records)
            self._open_others()
        place = self._places[number]
        expected = (whole_shape(record), record.dtype)
        for checkpoint, records in self._others:
            other = records.get(place)
            if other is None:
                continue
            if (whole_shape(other), other.dtype) != expected:
                raise self.damage(
                    number, f"a rank saved it as `{other.dtype}` of shape {whole_shape(other)}"
                )
            yield Part(checkpoint, other)

    def _open_others(self) -> None:
        ranks = range(self._own.manifest()["world_size"])
        self._others = open_at_once(self._open_other, ranks)

    def _open_other(
        self, rank: int
    ) -> tuple[_native.Checkpoint, dict[tuple[Any, ...], TensorRecord]]:
        other = self._open_rank(rank)
        records = [TensorRecord(*record) for record in other.tensors()]
        places = _paths_of_slices(Tree(other.nodes()), records)
        return other, {place: records[number] for number, place in places.items()}

    def _check_tiled(self, number: int, box: Box, found: list[Box]) -> None:
        why = why_untiled(box, found)
        if why is not None:
            raise self.damage(number, why)

    def damage(self, number: int, why: str) -> Corrupt:
        """Return the error for a tensor that cannot be assembled."""
        shape = list(whole_shape(self._records[number]))
        path = next(
            path
            for path, node in zip(self._own.paths(), self._tree.nodes, strict=True)
            if node[:2] == (TAG_TENSOR, number)
        )
        return Corrupt(
            f"assembling `{path}` of shape {shape} from step {self._own.step}",
            why,
            "load another step; save it so that the parts on all ranks are those of one tensor",
        )


class Destination(NamedTuple):
    """Where a box is written to.

    Attributes:
        storage: The memory.
        strides: The strides of the box there, in items.
        first: The item of the storage at which the box starts.

    """

    storage: Any
    strides: tuple[int, ...]
    first: int


class Assembly:
    """Memory for boxes, and the reads that fill it."""

    def __init__(self) -> None:
        self._direct: dict[int, tuple[_native.Checkpoint, list[Target]]] = {}
        self._strided: list[_Strided] = []
        self._duplicates: list[tuple[_Strided, Callable[[str], Corrupt]]] = []

    def add(self, parts: Parts, number: int, box: Box, storage: Any) -> None:
        """Schedule filling ``storage`` with a box of a tensor, contiguous in row-major order."""
        strides = contiguous_strides(box.sizes)
        damaged = partial(parts.damage, number)
        for common, copies in parts.covering(number, box).items():
            at = zip(common.offsets, box.offsets, strides, strict=True)
            first = sum((start - own) * stride for start, own, stride in at)
            self.take(copies, common, Destination(storage, strides, first), damaged)

    def take(
        self,
        copies: Sequence[Part],
        box: Box,
        place: Destination,
        damaged: Callable[[str], Corrupt],
    ) -> None:
        """Schedule reading a box that lies within a part.

        Args:
            copies: The part, and duplicates of it, which have to be identical.
            box: The box of the whole tensor.
            place: Where it is written to.
            damaged: Creates the error if they are not identical.

        """
        part, *others = copies
        source = part.cut(box)
        storage = place.storage
        target = source._replace(strides=place.strides, offset=place.first)
        if is_contiguous(source.shape, source.strides) and is_contiguous(box.sizes, place.strides):
            self._read_to(part.checkpoint, source, storage, place.first * source.item_bytes)
        else:
            self._strided.append(_Strided(part.checkpoint, source, storage, target))
        self._duplicates += (
            (_Strided(other.checkpoint, other.cut(box), storage, target), damaged)
            for other in others
        )

    def read(self, *, verify: bool, streams: list[tuple[int, int]]) -> None:
        """Read everything; after an error, the memory holds unspecified bytes.

        Raises:
            Corrupt: Several ranks saved different values under one name.

        """
        self._flush(verify=verify, streams=streams)
        for destination, bits in self._read_apart(self._strided, verify, streams):
            destination.copy_(bits)
        # Pipeline stages may use the same name for different tensors.
        copies = self._read_apart([one for one, _ in self._duplicates], verify, streams)
        for (there, bits), (_, damaged) in zip(copies, self._duplicates, strict=True):
            if not _is_same(there, bits):
                raise damaged("ranks saved different values under this name")

    def _read_apart(
        self, some: list[_Strided], verify: bool, streams: list[tuple[int, int]]
    ) -> Iterator[tuple[Any, Any]]:
        """Read parts into temporary memory; yield views of their destinations and of the parts."""
        for batch in _batches(some):
            pairs = []
            for strided in batch:
                source, storage = strided.source, strided.storage
                hull = hull_of(source)
                assert hull is not None  # noqa: S101  (boxes of parts are not empty)
                memory = type(storage)(hull.end - hull.start, device=storage.device)
                flat = source._replace(shape=(len(memory),), strides=(1,), item_bytes=1)
                self._read_to(strided.checkpoint, flat, memory, 0, first=hull.start)
                pairs.append((_bits(storage, strided.target), _bits(memory, source, offset=0)))
            self._flush(verify=verify, streams=streams)
            yield from pairs

    def _read_to(
        self,
        checkpoint: _native.Checkpoint,
        source: TensorRecord,
        storage: Any,
        at: int,
        first: int | None = None,
    ) -> None:
        count = source.item_bytes * whole(source.shape).items
        first = source.offset * source.item_bytes if first is None else first
        memory = gpus.memory_at(storage.device, storage.data_ptr() + at, count)
        _, targets = self._direct.setdefault(id(checkpoint), (checkpoint, []))
        targets.append((source.storage, first, memory))

    def _flush(self, *, verify: bool, streams: list[tuple[int, int]]) -> None:
        for checkpoint, targets in self._direct.values():
            checkpoint.read(targets, verify, streams)
        self._direct.clear()


class _Strided(NamedTuple):
    """A part that is read into temporary memory: it is not contiguous, or is compared only."""

    checkpoint: _native.Checkpoint
    source: TensorRecord
    storage: Any
    target: TensorRecord


def _batches(strided: list[_Strided]) -> Iterator[list[_Strided]]:
    batch: list[_Strided] = []
    count = 0
    for one in strided:
        batch.append(one)
        hull = hull_of(one.source)
        count += 0 if hull is None else hull.end - hull.start
        if count >= _COPY_BYTES:
            yield batch
            batch, count = [], 0
    if batch:
        yield batch


def _is_same(one: Any, other: Any) -> bool:
    torch = sys.modules["torch"]
    flat = (tensor.reshape(-1).contiguous().view(torch.uint8) for tensor in (one, other))
    return bool(torch.equal(*flat))


def _bits(storage: Any, record: TensorRecord, offset: int | None = None) -> Any:
    """View a tensor's items as integers of their size: some dtypes have no copy kernel."""
    torch = sys.modules["torch"]
    numbers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    dtype = numbers.get(record.item_bytes, torch.complex128)
    tensor = torch.empty(0, dtype=dtype, device=storage.device)
    first = record.offset if offset is None else offset
    return tensor.set_(storage, first, record.shape, record.strides)


def open_at_once(opened: Callable[[int], _T], ranks: Sequence[int]) -> list[_T]:
    """Open ranks' shards, several at a time, in order; each may first have to be uploaded."""
    pool = ThreadPoolExecutor(_OPENED_AT_ONCE)
    try:
        return list(pool.map(opened, ranks))
    finally:  # Ctrl-C does not wait for other ranks' uploads
        pool.shutdown(wait=False, cancel_futures=True)


def why_untiled(box: Box, found: list[Box]) -> str | None:
    """Return why some boxes do not tile one that contains them; None if they do.

    >>> why_untiled(Box((0,), (3,)), [Box((0,), (2,))])
    'no rank saved 1 of the 3 items from [0] on'
    """
    missing = box.items - sum(part.items for part in found)
    if missing > 0:
        return f"no rank saved {missing} of the {box.items} items from {list(box.offsets)} on"
    return "parts that ranks saved overlap" if missing or overlap(found) else None


def overlap(boxes: list[Box]) -> bool:
    """Return whether any two boxes, none of them empty, have an item in common.

    >>> overlap([Box((0,), (2,)), Box((2,), (3,))]), overlap([Box((0,), (2,)), Box((1,), (3,))])
    (False, True)
    """
    if len(boxes) < 2 or not boxes[0].offsets:  # noqa: PLR2004  (a pair)
        return len(boxes) > 1
    low = np.array([box.offsets for box in boxes])
    low = low[(order := np.lexsort(low.T[::-1]))]
    high = low + np.array([box.sizes for box in boxes])[order]
    varies = ((low != low[0]) | (high != high[0])).any(axis=0)
    if varies.sum() == 1:  # the usual case: cut along one dimension
        [along] = np.flatnonzero(varies)
        return bool((high[:-1, along] > low[1:, along]).any())
    return any(
        bool(((low[:at] < high[at]) & (low[at] < high[:at])).all(axis=1).any())
        for at in range(1, len(boxes))
    )


def _paths_of_slices(tree: Tree, records: list[TensorRecord]) -> dict[int, tuple[Any, ...]]:
    """Return the typed path of each sharded tensor, by its number."""
    places: dict[int, tuple[Any, ...]] = {}
    left: list[tuple[int, tuple[Any, ...]]] = [(0, ())]
    while left:
        index, path = left.pop()
        tag, payload = tree.nodes[index][:2]
        if tag == TAG_TENSOR:
            if records[payload].slice is not None:
                places.setdefault(payload, path)
        elif tree.is_container(index):
            for key, child in tree.children(index):
                if tree.is_container(child) or tree.nodes[child][0] == TAG_TENSOR:
                    left.append((child, (*path, (tag, type(key), key))))
    return places
