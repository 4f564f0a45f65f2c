"""Tensors of a checkpoint in fresh memory: what is read for a request, and how views are created.

Always holds: only the byte spans that the requested tensors touch are read; tensors that shared
memory when saved share memory here; nothing is returned unless every chunk that it came from
matched its checksums (or the caller disabled that).
"""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dtruntime.errors import AcceleratorError, InvalidArgument
from dtruntime.loading.assembling import Assembly, Parts, whole_shape
from dtruntime.loading.scratch import Scratch, needed_bytes
from dtruntime.saving.replication import check_loadable
from dtruntime.state import gpus
from dtruntime.state.globs import compiled
from dtruntime.state.sharded_tensors import Box, LivePart, contiguous_strides, whole
from dtruntime.state.tensors import (
    NUMPY,
    TORCH_PARAMETER,
    Span,
    TensorRecord,
    hull_of,
    import_torch,
    lay_spans,
    numpy_dtype,
    rebase,
    spans_bytes,
    torch_dtype,
)
from dtruntime.state.tree import TAG_DICT, Tree

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from numpy.typing import NDArray

    from dtruntime import _native

    Lend = Callable[[int, int | None], NDArray[np.uint8] | None]

_logger = logging.getLogger("dtruntime")


class _Memory(NamedTuple):
    """Fresh memory for spans of one storage, and the tensors that view it."""

    holder: Any  # a torch.UntypedStorage or an array of bytes
    views: dict[int, TensorRecord]


class Reader:
    """Reads all or part of one checkpoint.

    Args:
        checkpoint: The checkpoint.
        verify: Whether chunks are checked against their checksums.
        mmap: Whether storages that are stored raw are mapped instead of read.
        device: The device of torch tensors; None for host memory.
        open_rank: Opens another rank's shard of the checkpoint. Default: none is needed.
        lend: Lends memory of the staging arena, as the engine does. Default: none is lent.

    """

    def __init__(
        self,
        checkpoint: _native.Checkpoint,
        *,
        verify: bool = True,
        mmap: bool = False,
        device: Any = None,
        open_rank: Callable[[int], _native.Checkpoint] | None = None,
        lend: Lend | None = None,
    ) -> None:
        self.checkpoint = checkpoint
        self.tree = Tree(checkpoint.nodes())
        self.records = [TensorRecord(*record) for record in checkpoint.tensors()]
        self._parts = Parts(checkpoint, self.tree, self.records, open_rank or _only(checkpoint))
        self._storage_bytes = checkpoint.storages()
        self._verify = verify
        self._mmap = mmap
        self._device = device
        self._lend = lend

    def load(self, keep: Sequence[bool] | None = None) -> Any:
        """Read and build the whole state, or the kept part of it."""
        nodes = range(len(self.tree.nodes))
        self.check_loadable(nodes if keep is None else (node for node in nodes if keep[node]))
        if keep is not None and not keep[0] and not self.tree.is_container(0):
            return None
        tensors = self.tensors(self.tree.tensors_below(0, keep))
        return self.tree.build(0, tensors.__getitem__, keep)

    def select(self, globs: Sequence[str], *, strict: bool) -> list[bool]:
        """Return for each node whether the globs select it.

        Raises:
            InvalidArgument: A glob matches nothing, and ``strict`` is set.

        """
        paths = self.checkpoint.paths()
        keep, unmatched = select(self.tree, paths, globs)
        if unmatched and strict:
            top = [paths[child] for _, child in self.tree.children(0)] if paths else []
            raise InvalidArgument(
                f"loading `keys` = {list(globs)!r} of step {self.checkpoint.step}",
                f"nothing matches {', '.join(map(repr, unmatched))}",
                f"the checkpoint's top-level entries are {', '.join(top) or '(none)'}; "
                "`strict=False` ignores globs that match nothing",
            )
        return keep

    def check_loadable(self, asked: Iterable[int]) -> None:
        """Refuse nodes that are rank-specific, if another number of ranks saved them."""
        check_loadable(self.checkpoint, self.tree, asked)

    def bytes_of(self, numbers: Iterable[int], parts: Mapping[int, LivePart]) -> int:
        """Return the bytes of memory that ``tensors(numbers)`` needs."""
        boxes, plain = self._split(numbers, parts)
        items = sum(box.items * self.records[number].item_bytes for number, box in boxes.items())
        groups = self._group(plain).items()
        return items + sum(
            spans_bytes(self._spans(storage, group)) for (storage, _), group in groups
        )

    def borrow(
        self, numbers: Iterable[int], parts: Mapping[int, LivePart], transient: set[int]
    ) -> Scratch | None:
        """Borrow memory for the ``transient`` tensors, which are only copied from.

        The staging arena may grow for it, up to what saving this rank's shard takes. None if no
        memory can be borrowed.
        """
        _, plain = self._split(numbers, parts)
        groups = self._group(plain)
        groups = {key: group for key, group in groups.items() if transient.issuperset(group)}
        counts = [
            spans_bytes(self._spans(storage, group)) for (storage, _), group in groups.items()
        ]
        held_bytes = self.checkpoint.held_bytes
        # Reading other ranks' shards is no reason to keep more memory than saves need.
        if self._lend is None or not 0 < sum(counts) <= held_bytes:
            return None
        memory = self._lend(needed_bytes(counts), held_bytes)
        if memory is None:
            return None
        return Scratch(memory, (number for group in groups.values() for number in group))

    def tensors(
        self,
        numbers: Iterable[int],
        devices: Mapping[int, Any] | None = None,
        parts: Mapping[int, LivePart] | None = None,
        into: Mapping[int, Any] | None = None,
        scratch: Scratch | None = None,
    ) -> dict[int, Any]:
        """Read tensors, by number, into fresh memory, or into live ones.

        Args:
            numbers: The tensors.
            devices: Torch devices of those that do not go to the reader's device.
            parts: Live sharded tensors that take some of them: only this rank's part of these is
                read. Other sharded tensors are read whole.
            into: Live tensors with the same memory layout as the saved ones: they are filled, and
                returned.
            scratch: Memory for the tensors that it was lent for.

        """
        boxes, plain = self._split(numbers, parts or {})
        made = self._boxes(boxes, devices or {})
        made |= {n: parts[n].filled(made[n]) for n in boxes if n in parts} if parts else {}
        return made | self._plain(plain, devices, into or {}, scratch)

    def _split(
        self, numbers: Iterable[int], parts: Mapping[int, LivePart]
    ) -> tuple[dict[int, Box], list[int]]:
        """Separate tensors of which a box is assembled from the others."""
        boxes: dict[int, Box] = {}
        plain = []
        for number in dict.fromkeys(numbers):
            record = self.records[number]
            if number in parts:
                boxes[number] = parts[number].box
            elif record.slice is not None:
                boxes[number] = whole(whole_shape(record))
            else:
                plain.append(number)
        return boxes, plain

    def _boxes(self, boxes: Mapping[int, Box], devices: Mapping[int, Any]) -> dict[int, Any]:
        """Assemble boxes of tensors in fresh memory."""
        if not boxes:
            return {}
        assembly = Assembly()
        holders: dict[Any, Any] = {}
        memories = []
        for number, box in boxes.items():
            record, device = self.records[number], devices.get(number)
            # Tensors that shared memory when saved, and of which the same box is read, share it. Of
            # one whose part here is empty that is not known: views of different memory look alike.
            record_here = record._replace(kind=0, requires_grad=False)
            view = (number if hull_of(record) is None else record_here, box, device)
            holder = holders.get(view)
            if holder is None:
                count = box.items * record.item_bytes
                holder = holders[view] = self._allocate(count, device, is_numpy=False)
                assembly.add(self._parts, number, box, holder)
            strides = contiguous_strides(box.sizes)
            made = record._replace(shape=box.sizes, strides=strides, offset=0, slice=None)
            memories.append(_Memory(holder, {number: made}))
        places = (holder.device for holder in holders.values())
        ordinals = {place.index for place in places if place.type == "cuda"}
        assembly.read(verify=self._verify, streams=gpus.current_streams(ordinals))
        tensors: dict[int, Any] = {}
        for memory in memories:
            tensors |= self._views(is_numpy=False, memory=memory)
        return tensors

    def _plain(
        self,
        numbers: list[int],
        devices: Mapping[int, Any] | None,
        into: Mapping[int, Any],
        scratch: Scratch | None,
    ) -> dict[int, Any]:
        groups = self._group(number for number in numbers if number not in into)
        live = {number: into[number] for number in numbers if number in into}
        # Tied tensors are read once.
        targets = [*dict.fromkeys(self._target(number, tensor) for number, tensor in live.items())]
        ordinals = {tensor.device.index for tensor in live.values() if tensor.is_cuda}
        made: dict[int, Any] = {**live}
        if self._mmap:
            for key, memory in self._map(groups).items():
                del groups[key]
                made |= self._views(key[1], memory)
        fresh: dict[tuple[int, bool], _Memory] = {}
        for (storage, is_numpy), group in groups.items():
            spans = self._spans(storage, group)
            wanted = {devices.get(number) for number in group} if devices else set()
            device = wanted.pop() if len(wanted) == 1 else None
            holder = None
            if scratch is not None and scratch.numbers.issuperset(group):
                holder = scratch.take(spans_bytes(spans))
            if holder is None:
                holder = self._allocate(spans_bytes(spans), device, is_numpy=is_numpy)
            if not is_numpy and holder.device.type == "cuda":
                ordinals.add(holder.device.index)
            records = self.records
            views = {n: rebase(records[n], hull_of(records[n]), spans, storage) for n in group}
            fresh[storage, is_numpy] = _Memory(holder, views)
            targets += _targets(storage, spans, holder, is_numpy=is_numpy)
        if targets:
            self.checkpoint.read(targets, self._verify, gpus.current_streams(ordinals))
        for (_, is_numpy), memory in fresh.items():
            made |= self._views(is_numpy, memory)
        return made

    def _target(self, number: int, live: Any) -> Any:
        """Return the read target that fills a live tensor with a saved one, both contiguous."""
        record = self.records[number]
        start = record.offset * record.item_bytes
        memory = gpus.memory_at(live.device, live.data_ptr(), live.nbytes)
        return (record.storage, start, memory)

    def _group(self, numbers: Iterable[int]) -> dict[tuple[int, bool], list[int]]:
        """Group tensors by the memory they will view: a storage, for torch or for numpy."""
        groups: dict[tuple[int, bool], list[int]] = {}
        for number in dict.fromkeys(numbers):
            record = self.records[number]
            groups.setdefault((record.storage, record.kind == NUMPY), []).append(number)
        return groups

    def _spans(self, storage: int, group: Iterable[int]) -> list[Span]:
        hulls = (hull_of(self.records[number]) for number in group)
        return lay_spans((h for h in hulls if h is not None), self._storage_bytes[storage])

    def _map(self, groups: dict[tuple[int, bool], list[int]]) -> dict[tuple[int, bool], _Memory]:
        """Map the storages that are stored raw and contiguously."""
        wanted = sorted({storage for storage, _ in groups if self._storage_bytes[storage]})
        if not wanted:
            return {}
        array, ranges = self.checkpoint.map(wanted, self._verify)
        mapped = {}
        for (storage, is_numpy), group in groups.items():
            if storage not in ranges:
                continue
            start, end = ranges[storage]
            holder: Any = array[start:end]
            if not is_numpy:
                holder = import_torch("loading a tensor").from_numpy(holder).untyped_storage()
            views = {number: self.records[number] for number in group}
            mapped[storage, is_numpy] = _Memory(holder, views)
        return mapped

    def _allocate(self, count: int, device: Any, *, is_numpy: bool) -> Any:
        """Allocate on ``device``, by default the reader's; in host memory if the GPU is full."""
        if is_numpy:
            return np.empty(count, np.uint8)
        torch = import_torch("loading a tensor")
        device = self._device if device is None else device
        if device is not None and device.type == "cuda" and gpus.are_usable():
            try:
                return torch.UntypedStorage(count, device=device)
            except torch.OutOfMemoryError as error:
                if self._device is not None:  # the caller asked for that device
                    raise _no_room(device, count) from error
                _logger.warning("%s has no memory for a copy, using the host's: %s", device, error)
        return torch.UntypedStorage(count)

    def _views(self, is_numpy: bool, memory: _Memory) -> dict[int, Any]:
        if is_numpy:
            return {n: _array(memory.holder, record) for n, record in memory.views.items()}
        storage = memory.holder
        if self._device is not None and storage.device.type == "cpu":
            storage = _moved(storage, self._device)
        return {n: _tensor(storage, record) for n, record in memory.views.items()}


def _only(checkpoint: _native.Checkpoint) -> Callable[[int], _native.Checkpoint]:
    return lambda _: checkpoint


def _targets(storage: int, spans: Iterable[Span], holder: Any, *, is_numpy: bool) -> list[Any]:
    if is_numpy:
        return [(storage, start, holder[at : at + end - start]) for start, end, at in spans]
    address, device = holder.data_ptr(), holder.device
    return [
        (storage, start, gpus.memory_at(device, address + at, end - start))
        for start, end, at in spans
    ]


def _moved(storage: Any, device: Any) -> Any:
    torch = import_torch("loading a tensor")
    try:
        return torch.UntypedStorage(storage.nbytes(), device=device).copy_(storage)
    except torch.OutOfMemoryError as error:
        raise _no_room(device, storage.nbytes()) from error


def _no_room(device: Any, count: int) -> AcceleratorError:
    return AcceleratorError(
        f"loading with `map_location` = {str(device)!r}",
        f"it has no memory for {count} more bytes",
        "free memory of the device, request fewer `keys`, or load to host memory",
    )


def _tensor(storage: Any, record: TensorRecord) -> Any:
    torch = sys.modules["torch"]
    dtype = torch_dtype(record.dtype, record.item_bytes)
    tensor = torch.empty(0, dtype=dtype, device=storage.device)
    tensor.set_(storage, record.offset, record.shape, record.strides)
    if record.kind == TORCH_PARAMETER:
        return torch.nn.Parameter(tensor, requires_grad=record.requires_grad)
    return tensor.requires_grad_() if record.requires_grad else tensor


def _array(memory: np.ndarray[Any, Any], record: TensorRecord) -> np.ndarray[Any, Any]:
    dtype = numpy_dtype(record.dtype, record.item_bytes)
    strides = tuple(stride * record.item_bytes for stride in record.strides)
    offset = record.offset * record.item_bytes
    return np.ndarray(record.shape, dtype, memory, offset, strides)


def device_of(map_location: Any) -> Any:
    """Return the torch device to load to; None for host memory."""
    if map_location is None:
        return None
    torch = import_torch("loading with `map_location`")
    try:
        device = torch.device(map_location)
    except (TypeError, RuntimeError) as error:
        raise InvalidArgument(
            f"`map_location` = {map_location!r}",
            "a device is expected, as a str or a `torch.device`",
            'pass for example "cpu" or "cuda:0"; move individual tensors after loading',
        ) from error
    if device.type == "cpu":
        return None
    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:  # a torch built without it asserts
        raise InvalidArgument(
            f"`map_location` = {map_location!r}",
            f"torch cannot use that device: {str(error).splitlines()[0]}",
            "leave it out to load to host memory; `torch.cuda.device_count()` gives the number of "
            "GPUs",
        ) from error
    return device


def select(tree: Tree, paths: Sequence[str], globs: Sequence[str]) -> tuple[list[bool], list[str]]:
    """Return for each node whether the globs select it, and the globs that match nothing.

    A node is kept if its path, or that of an enclosing container, matches; and so are its enclosing
    containers, with a dict's ``_metadata``.
    """
    patterns = compiled(globs)
    keep = [False] * len(tree.nodes)
    matched = [False] * len(globs)

    def mark(index: int, *, inherited: bool) -> bool:
        hit = inherited
        if index or not tree.is_container(index):
            for number, pattern in enumerate(patterns):
                if pattern.match(paths[index]):
                    hit = matched[number] = True
        below = False
        if tree.is_container(index):
            for _, child in tree.children(index):
                below |= mark(child, inherited=hit)
        keep[index] = hit or below
        tag, payload = tree.nodes[index][:2]
        if keep[index] and tag == TAG_DICT and payload[2]:
            metadata = range(index + 1, tree.ends[index + 1])
            keep[metadata.start : metadata.stop] = [True] * len(metadata)
        return keep[index]

    mark(0, inherited=False)
    return keep, [glob for glob, hit in zip(globs, matched, strict=True) if not hit]
