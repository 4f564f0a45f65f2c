"""States that a planner of ``torch.distributed.checkpoint`` split: how they are stored and read.

    the plans        rank 0: l.0[0:4]  step        rank 1: l.0[4:8]  step  name
    what they save   {l: {0: part}, step: 5}       {l: {0: part}, step: 5, name: "x"}

A rank saves what the planner assigns to it, in dicts along the planner's paths, where a list's
positions are int keys. A value that is itself a dict or tuple is wrapped in a tuple, to distinguish
it from those dicts. The planning rank also saves every plain value that it holds, and empty parts
of the tensors that other ranks save: ``load(from_rank=0)`` finds them. None of that is in the
plans: a planner may reuse those of an earlier save.

Always holds: a name is found whichever rank saved it, and its parts tile the whole tensor, or it is
an error; no file contains pickled data. (What a planner wants as a pickle is pickled here, from
values that were checked.)
"""

from __future__ import annotations

import bisect
import io
from collections import Counter, OrderedDict
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    STORAGE_TYPES,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import WriteItemType

from dtruntime.errors import Corrupt, InvalidArgument, UnsupportedValue
from dtruntime.loading.assembling import (
    Assembly,
    Destination,
    Part,
    open_at_once,
    whole_shape,
    why_untiled,
)
from dtruntime.messages import listed, quoted
from dtruntime.restoring.fitting import has_no_memory, is_writable
from dtruntime.state import gpus
from dtruntime.state.sharded_tensors import Box, Piece, Slice, is_sharded, whole
from dtruntime.state.state_tree import DEPTH_MAX
from dtruntime.state.tensors import NUMPY, torch_dtype
from dtruntime.state.tree import TAG_DICT, TAG_LIST, TAG_TENSOR, TAG_TUPLE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from torch.distributed.checkpoint.metadata import MetadataIndex
    from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem

    from dtruntime import _native
    from dtruntime.loading.reader import Reader
    from dtruntime.loading.source import Source

Path = tuple[str | int, ...]
"""Keys and positions of nested containers."""

_MARK = "torch.distributed.checkpoint"
"""Key in ``_metadata`` that marks the dict of a planned state."""
_WRAPPED = (dict, OrderedDict, Counter, tuple)
_CONVERTED_BYTES = 256 << 20
"""Bytes that are read at a time before they are converted."""
_NAMED_MAX = 3
"""Entries that an error names."""


def state_of(plan: SavePlan, planner: SavePlanner, *, is_alone: bool) -> OrderedDict[Any, Any]:
    """Return the state that a planner assigns to this rank.

    Args:
        plan: The items to save.
        planner: Returns their values.
        is_alone: Whether this is the only rank.

    Raises:
        UnsupportedValue: A value cannot be stored, or this rank holds several parts of one tensor.

    """
    state: OrderedDict[Any, Any] = OrderedDict()
    state._metadata = {_MARK: 1}  # type: ignore[attr-defined]  # noqa: SLF001
    seen: set[str] = set()
    for item in plan.items:
        name = item.index.fqn
        if name in seen:
            raise _unsupported(
                name,
                "this rank holds several parts of it, and a checkpoint has one part per rank",
                "save it as a `DTensor`, or whole",
            )
        seen.add(name)
        if not _put(state, _path_in(plan, name), _saved_of(planner, item, is_alone=is_alone)):
            raise _unsupported(
                name,
                "another entry has the same path: their keys are equal as strings",
                "rename one of the keys",
            )
    return state


def add_known(
    state: dict[Any, Any], plan: SavePlan, planner: SavePlanner, plans: Sequence[SavePlan]
) -> None:
    """Add what the planning rank knows about other ranks' items: values, and names of tensors.

    Args:
        state: The state that this rank saves.
        plan: Its plan.
        planner: Its planner.
        plans: The plans of all ranks.

    """
    if not _keeps_values(planner):
        return  # only the ranks themselves know what their planners turn values into
    named = {item.index.fqn for item in plan.items}
    for other in plans:
        for item in other.items:
            name, data = item.index.fqn, item.tensor_data
            if name in named:
                continue
            if data is None or not data.size:  # cannot be split among ranks
                if name not in planner.state_dict:
                    continue
                value = _saved_of(planner, item, is_alone=False)
            else:
                shape = tuple(data.size)
                nothing = torch.empty((0, *shape[1:]), dtype=data.properties.dtype)
                value = Piece(nothing, Slice(shape, (0,) * len(shape)))
            named.add(name)
            _put(state, _path_in(other, name), value)


def _saved_of(planner: SavePlanner, item: WriteItem, *, is_alone: bool) -> Any:
    if item.type != WriteItemType.BYTE_IO:
        return _piece_of(planner, item, is_alone=is_alone)
    value = _value_of(planner, item)
    _check_plain(item.index.fqn, value, is_alone=is_alone)
    return (value,) if type(value) in _WRAPPED else value


def _put(state: dict[Any, Any], path: Path, value: Any) -> bool:
    """Put a value into nested dicts; return False if its place is taken."""
    *parents, last = path
    for key in parents:
        below = state.setdefault(key, {})
        if not isinstance(below, dict):
            return False
        state = below
    is_free = last not in state
    if is_free:
        state[last] = value
    return is_free


def _path_in(plan: SavePlan, name: str) -> Path:
    paths = plan.planner_data
    path = paths.get(name) if isinstance(paths, dict) else None
    if not isinstance(path, tuple) or ".".join(map(str, path)) != name:
        return (name,)
    return path


def _piece_of(planner: SavePlanner, item: WriteItem, *, is_alone: bool) -> Any:
    name, data = item.index.fqn, item.tensor_data
    assert data is not None  # noqa: S101  (planners set it for tensors)
    resolved: Any = planner.resolve_data(item)
    wait = getattr(resolved, "wait", None)  # a collective may still be writing it
    tensor = (resolved if wait is None else wait()).detach()
    if type(tensor) is not torch.Tensor:
        raise _unsupported(
            name,
            f"its part on this rank is a `{type(tensor).__name__}`, not a plain tensor",
            "save it as a plain tensor, for example dequantized",
        )
    shape, offsets, sizes = (tuple(s) for s in (data.size, data.chunk.offsets, data.chunk.sizes))
    if tuple(tensor.shape) != sizes:
        raise _unsupported(
            name,
            f"the planner describes its part on this rank with shape {list(sizes)}, but it has "
            f"shape {list(tensor.shape)}",
            "shard it evenly, as `distribute_tensor` does",
        )
    is_whole = not shape or (is_alone and sizes == shape)
    return tensor if is_whole else Piece(tensor, Slice(shape, offsets))


def _keeps_values(planner: SavePlanner) -> TypeGuard[DefaultSavePlanner]:
    """Return whether a planner saves the values of the state unchanged."""
    kind: Any = type(planner)
    return (
        isinstance(planner, DefaultSavePlanner)
        and kind.resolve_data is DefaultSavePlanner.resolve_data
        and kind.transform_object is DefaultSavePlanner.transform_object
        and kind.lookup_object is DefaultSavePlanner.lookup_object
    )


def _value_of(planner: SavePlanner, item: WriteItem) -> Any:
    """Return a plain value of the state, without pickling it if the planner does nothing else."""
    if _keeps_values(planner):
        return planner.lookup_object(item.index)
    data: Any = planner.resolve_data(item)
    data.seek(0)
    # Trusted: the planner has just written it in this process.
    return torch.load(data, weights_only=False)


def _check_plain(name: str, value: Any, *, is_alone: bool, depth: int = 0) -> None:
    """Refuse plain values with contents that would not load as they were."""
    if is_sharded(value) and not is_alone:
        raise _unsupported(
            name,
            "it contains a sharded tensor, of which only one rank would save its part",
            "keep sharded tensors in dicts and lists",
        )
    if callable(getattr(value, "state_dict", None)):
        raise _unsupported(
            name,
            "torch treats this object as one value, and would replace it by a dict on loading",
            "save its `state_dict()`, or put it at the top level of the state",
        )
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return
    if depth < DEPTH_MAX:  # deeper nesting is refused when the state is flattened
        for child in value:
            _check_plain(name, child, is_alone=is_alone, depth=depth + 1)


def _unsupported(name: str, why: str, hint: str) -> UnsupportedValue:
    return UnsupportedValue(f"saving `{name}`", why, hint)


class Held(NamedTuple):
    """What one rank saved under a name."""

    rank: int
    part: Part | None
    """The tensor, or a part of it; None for any other value."""
    node: int


class Saved:
    """What all ranks saved of one checkpoint, by the planner's names.

    Args:
        first: The shard that was opened first.
        readers: Readers of all ranks' shards.
        rank: Whose value is read where each rank has its own; None to refuse such entries.

    Raises:
        Corrupt: The parts that ranks saved do not tile a tensor.
        InvalidArgument: Its entries have no names, or two have the same.

    """

    def __init__(
        self,
        first: _native.Checkpoint,
        readers: Sequence[Reader],
        rank: int | None,
    ) -> None:
        self.step, self.attempt = first.step, first.attempt
        self._readers = readers
        self._rank = rank
        self._is_planned = _is_planned(readers[0])
        self._shared = [reader.checkpoint.replicated() for reader in readers]
        self._paths: dict[str, Path] = {}
        self._values: dict[str, Held] = {}
        self._tiles: dict[str, dict[tuple[int, ...], list[Part]]] = {}
        found: dict[str, list[Held]] = {}
        for number, reader in enumerate(readers):
            for path, node in _leaves(reader, is_planned=self._is_planned):
                name = ".".join(map(str, path))
                some = found.setdefault(name, [])
                # To a planner they are the same entry, even if its ranks have different paths.
                if self._paths.setdefault(name, path) != path and not self._is_planned:
                    raise self._same_name(name)
                some.append(Held(number, _part_at(reader, node), node))
        self._unclear = {name for name, some in found.items() if not self._take(name, some)}

    def metadata(self) -> Metadata:
        """Return a description for a planner; looking up an ambiguous name in it raises."""
        described = Described(self._refusal)
        for name in self._paths:
            if name not in self._unclear:
                described[name] = self._described(name)
        return Metadata(described, planner_data=dict(self._paths))

    def pickled(self, name: str) -> io.BytesIO:
        """Return a value as planners expect it: as a pickle."""
        held = self._values[name]
        reader = self._readers[held.rank]
        tensors = reader.tensors(reader.tree.tensors_below(held.node))
        data = io.BytesIO()
        torch.save(reader.tree.build(held.node, tensors.__getitem__), data)
        data.seek(0)
        return data

    def read_into(
        self, targets: Iterable[tuple[MetadataIndex, Box, torch.Tensor]], *, verify: bool
    ) -> None:
        """Fill tensors with boxes of parts; after an error they hold unspecified bytes.

        Args:
            targets: Tensors, each with the part, and the box of the whole tensor that it takes.
            verify: Whether chunks are checked against their checksums.

        Raises:
            InvalidArgument: A tensor does not have its box's shape.

        """
        batch = _Batch(verify=verify)
        for index, box, target in targets:
            self._check_target(index.fqn, box, target)
            if box.items:
                damaged = partial(self._damage, index.fqn)
                batch.add(self._holding(index, box), box, target, damaged)
        batch.read()

    def _check_target(self, name: str, box: Box, target: torch.Tensor) -> None:
        what = f"reading `{name}` of step {self.step}"
        if tuple(target.shape) != box.sizes:
            raise InvalidArgument(
                what,
                f"the planner requests shape {list(box.sizes)}, but provides a tensor of shape "
                f"{list(target.shape)}",
                "make `resolve_tensor` return what the plan describes",
            )
        if target.is_meta or (target.layout is torch.strided and has_no_memory(target)):
            raise InvalidArgument(
                what,
                "the tensor to read it into has no memory, or its memory was freed",
                'allocate it first, for example with `module.to_empty(device="cuda")`',
            )

    def _described(self, name: str) -> STORAGE_TYPES:
        if name in self._values:
            return BytesStorageMetadata()
        tiles = [parts[0] for _, parts in sorted(self._tiles[name].items())]
        record = tiles[0].record
        chunks = [
            ChunkStorageMetadata(torch.Size(part.box.offsets), torch.Size(part.box.sizes))
            for part in tiles
        ]
        properties = TensorProperties(dtype=torch_dtype(record.dtype, record.item_bytes))
        return TensorStorageMetadata(properties, torch.Size(whole_shape(record)), chunks)

    def _holding(self, index: MetadataIndex, box: Box) -> list[Part]:
        """Return the identical parts that contain a box."""
        tiles = self._tiles.get(index.fqn, {})
        parts = tiles.get(tuple(index.offset or (0,) * len(box.offsets)))
        if parts is None or parts[0].box.intersect(box) != box:
            raise InvalidArgument(
                f"reading `{index.fqn}` of step {self.step}",
                f"the planner requests {box}, which is not within a part that a rank saved",
                "plan with the metadata of this checkpoint",
            )
        return parts

    def _take(self, name: str, some: list[Held]) -> bool:
        """Determine what is read for a name; return False if each rank has its own."""
        parts = [held.part for held in some if held.part is not None]
        if len(parts) == len(some) and all(part.record.slice is not None for part in parts):
            self._tiles[name] = self._tiled(name, parts)
            return True
        chosen = self._choose(some)
        if chosen is None:
            return False
        if chosen.part is None:
            self._values[name] = chosen
        else:
            self._tiles[name] = {chosen.part.box.offsets: [chosen.part]}
        return True

    def _tiled(self, name: str, parts: Sequence[Part]) -> dict[tuple[int, ...], list[Part]]:
        """Return the non-empty parts, by their offsets."""
        filled = [part for part in parts if part.box.items] or [parts[0]]
        record = filled[0].record
        shape = whole_shape(record)
        tiles: dict[Box, list[Part]] = {}
        for part in filled:
            other = part.record
            if (whole_shape(other), other.dtype) != (shape, record.dtype):
                why = f"ranks saved it as `{record.dtype}` of shape {list(shape)} and as "
                raise self._damage(name, f"{why}`{other.dtype}` of {list(whole_shape(other))}")
            tiles.setdefault(part.box, []).append(part)
        why_not = why_untiled(whole(shape), list(tiles))
        if why_not is not None:
            raise self._damage(name, why_not)
        return {box.offsets: same for box, same in tiles.items()}

    def _damage(self, name: str, why: str) -> Corrupt:
        return Corrupt(
            f"assembling `{name}` from step {self.step}",
            why,
            "load another step; save it so that the parts on all ranks are those of one tensor",
        )

    def _choose(self, some: list[Held]) -> Held | None:
        """Return the value to read; None if each rank has its own, and none was chosen."""
        if len(some) == 1 or self._is_planned:
            return some[0]
        named = [held for held in some if held.rank == self._rank]
        if named:
            return named[0]
        return some[0] if all(self._is_shared(held) for held in some) else None

    def _is_shared(self, held: Held) -> bool:
        """Return whether an entry is replicated."""
        tops = self._shared[held.rank]
        before = bisect.bisect_right(tops, held.node)
        return before > 0 and held.node < self._readers[held.rank].tree.ends[tops[before - 1]]

    def _same_name(self, name: str) -> InvalidArgument:
        return InvalidArgument(
            f"reading step {self.step} by names",
            f"two of its entries are called `{name}`",
            "load it with `manager.load()`, which distinguishes 1 from '1'",
        )

    def _refusal(self, name: str | None) -> Exception | None:
        """Return the error for requesting a name, or all, if each rank has its own value."""
        asked = sorted(self._unclear if name is None else self._unclear & {name})
        if not asked:
            return None
        named = listed(quoted(asked), _NAMED_MAX)
        return InvalidArgument(
            f"reading step {self.step}, which {len(self._readers)} ranks saved",
            f"{named} {'is' if len(asked) == 1 else 'are'} rank-specific: each rank saved its own",
            "choose a rank: `StorageReader(manager, from_rank=0)`",
        )


class Described(dict[str, STORAGE_TYPES]):
    """The names of a checkpoint, as described to a planner.

    Args:
        refusal: Returns the error for requesting a name, or all of them if that is None; None if
            the request is allowed.

    """

    def __init__(self, refusal: Callable[[str | None], Exception | None]) -> None:
        super().__init__()
        self._refusal = refusal

    def __contains__(self, name: object) -> bool:
        self._check(str(name))
        return super().__contains__(name)

    def __missing__(self, name: str) -> STORAGE_TYPES:
        self._check(name)
        raise KeyError(name)

    def items(self) -> Any:
        """Return all items; raise if a name is ambiguous."""
        self._check(None)
        return super().items()

    def _check(self, name: str | None) -> None:
        error = self._refusal(name)
        if error is not None:
            raise error


class _Batch:
    """Reads into tensors: directly if their memory can be written, else through a copy."""

    def __init__(self, *, verify: bool) -> None:
        self._verify = verify
        self._assembly = Assembly()
        self._copies: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._copied_bytes = 0
        self._ordinals: set[int] = set()

    def add(self, parts: list[Part], box: Box, target: torch.Tensor, damaged: Any) -> None:
        """Schedule filling a tensor with a box that identical parts contain."""
        record = parts[0].record
        dtype = torch_dtype(record.dtype, record.item_bytes)
        place = target
        if target.dtype != dtype or not is_writable(target):
            place = torch.empty(box.sizes, dtype=dtype)
            self._copies.append((target, place))
            self._copied_bytes += place.nbytes
        if place.is_cuda:
            self._ordinals.add(place.device.index)
        first = int(place.storage_offset())
        there = Destination(place.untyped_storage(), place.stride(), first)
        self._assembly.take(parts, box, there, damaged)
        if self._copied_bytes >= _CONVERTED_BYTES:
            self.read()

    def read(self) -> None:
        """Read what was added."""
        self._assembly.read(verify=self._verify, streams=gpus.current_streams(self._ordinals))
        for target, place in self._copies:
            target.copy_(place)
        self._assembly = Assembly()
        self._copies.clear()
        self._copied_bytes = 0


def readers_of(first: _native.Checkpoint, source: Source) -> list[Reader]:
    """Return readers of all ranks' shards of a checkpoint, of which rank 0's is open already."""
    others = range(1, first.manifest()["world_size"])
    opened = open_at_once(lambda rank: source.open_beside(first, rank), others)
    return [source.reader(checkpoint) for checkpoint in (first, *opened)]


def _is_planned(reader: Reader) -> bool:
    """Return whether a state was saved by a planner: equal names then have equal values."""
    tag, payload = reader.tree.nodes[0][:2]
    if tag != TAG_DICT or not payload[2] or reader.tree.nodes[1][0] != TAG_DICT:
        return False
    return any(key == _MARK for key, _ in reader.tree.children(1))


def _part_at(reader: Reader, node: int) -> Part | None:
    tag, number = reader.tree.nodes[node][:2]
    if tag != TAG_TENSOR or reader.records[number].kind == NUMPY:
        return None
    return Part(reader.checkpoint, reader.records[number])


def _leaves(reader: Reader, *, is_planned: bool) -> Iterator[tuple[Path, int]]:
    """Yield the nodes of all named entries, each with its path."""
    if reader.tree.nodes[0][0] != TAG_DICT:
        raise InvalidArgument(
            f"reading step {reader.checkpoint.step} by names",
            "its state is not a dict, so its contents have no names",
            "load it with `manager.load()`",
        )
    return _below(reader, 0, (), is_planned=is_planned)


def _below(
    reader: Reader, index: int, path: Path, *, is_planned: bool
) -> Iterator[tuple[Path, int]]:
    tree = reader.tree
    is_dict = tree.nodes[index][0] == TAG_DICT
    for key, child in tree.children(index):
        here = (*path, key if is_planned or not is_dict else str(key))
        tag, payload = tree.nodes[child][:2]
        if tag == TAG_DICT or (not is_planned and _is_traversed(reader, child)):
            yield from _below(reader, child, here, is_planned=is_planned)
        elif is_planned and tag == TAG_TUPLE and payload == 1:
            yield here, child + 1
        else:
            yield here, child


def _is_traversed(reader: Reader, index: int) -> bool:
    """Return whether torch's planners flatten a list: if there is a dict or tensor in it."""
    if reader.tree.nodes[index][0] != TAG_LIST:
        return False
    return any(
        reader.tree.nodes[child][0] == TAG_DICT
        or _part_at(reader, child) is not None
        or _is_traversed(reader, child)
        for _, child in reader.tree.children(index)
    )
