"""States that a planner of ``torch.distributed.checkpoint`` cut up, as they are stored and found.

    the plans        rank 0: l.0[0:4]  step        rank 1: l.0[4:8]  step  name
    what they save   {l: {0: part}, step: 5}       {l: {0: part}, step: 5, name: "x"}

A rank saves what the planner gives it, in dicts along the paths that the planner says, where a
list's positions are keys of type int. A value that is a dict or a tuple itself is kept as the one
item of a tuple, so that it is told from those. The planning rank saves every plain value that it
holds besides, and names the tensors of which others have parts: ``load(from_rank=0)`` finds them.
None of that is in the plans: a planner may go on with those of an earlier save.

Always holds: a name is found wherever a rank saved it, and its parts make up the whole tensor, or
it is an error; nothing in a file was pickled. (What a planner wants as a pickle is pickled here,
from values that were checked.)
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
    Part,
    Place,
    open_at_once,
    whole_shape,
    why_untiled,
)
from dtruntime.restoring.fitting import has_no_memory
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
"""Key of the attribute by which the dict of a planned state is told from any other."""
_WRAPPED = (dict, OrderedDict, Counter, tuple)
_CONVERTED_BYTES = 256 << 20
"""Bytes that are read at a time before they are converted."""
_NAMED_MAX = 3
"""Entries that an error names."""


def state_of(plan: SavePlan, planner: SavePlanner, *, is_alone: bool) -> OrderedDict[Any, Any]:
    """Give what a planner gives this rank to save.

    Args:
        plan: Says what.
        planner: Gives the values.
        is_alone: Whether it is the only rank.

    Raises:
        UnsupportedValue: A value cannot be kept, or this rank holds several parts of one tensor.

    """
    state: OrderedDict[Any, Any] = OrderedDict()
    state._metadata = {_MARK: 1}  # type: ignore[attr-defined]  # noqa: SLF001
    seen: set[str] = set()
    for item in plan.items:
        name = item.index.fqn
        if name in seen:
            raise _unsupported(
                name,
                "this rank holds several parts of it, and a checkpoint has one of each rank",
                "save it as a `DTensor`, or whole",
            )
        seen.add(name)
        if not _put(state, _path_in(plan, name), _saved_of(planner, item, is_alone=is_alone)):
            raise _unsupported(
                name,
                "another entry has its place: their keys are alike as text",
                "give one of them another key",
            )
    return state


def add_known(
    state: dict[Any, Any], plan: SavePlan, planner: SavePlanner, plans: Sequence[SavePlan]
) -> None:
    """Add what the planning rank knows of what others save: values, and the names of tensors.

    Args:
        state: What it saves.
        plan: Its plan.
        planner: Its planner.
        plans: Those of all ranks.

    """
    if not _leaves_values(planner):
        return  # of what a planner makes of values, only their ranks know
    named = {item.index.fqn for item in plan.items}
    for other in plans:
        for item in other.items:
            name, data = item.index.fqn, item.tensor_data
            if name in named:
                continue
            if data is None or not data.size:  # what no two ranks can each save a part of
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
    """Put a value into nested dicts; False if something else is there."""
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
    assert data is not None  # noqa: S101  (what a planner says of a tensor)
    resolved: Any = planner.resolve_data(item)
    wait = getattr(resolved, "wait", None)  # a collective may still be on its way to it
    tensor = (resolved if wait is None else wait()).detach()
    if type(tensor) is not torch.Tensor:
        raise _unsupported(
            name,
            f"its part on this rank is a `{type(tensor).__name__}`, not a plain tensor",
            "save it as plain tensors, for example dequantized",
        )
    shape, offsets, sizes = (tuple(s) for s in (data.size, data.chunk.offsets, data.chunk.sizes))
    if tuple(tensor.shape) != sizes:
        raise _unsupported(
            name,
            f"the planner says that its part on this rank has the shape {list(sizes)}, and it has "
            f"{list(tensor.shape)}",
            "shard it evenly, as `distribute_tensor` does",
        )
    is_whole = not shape or (is_alone and sizes == shape)
    return tensor if is_whole else Piece(tensor, Slice(shape, offsets))


def _leaves_values(planner: SavePlanner) -> TypeGuard[DefaultSavePlanner]:
    """Tell whether a planner saves what is in the state, as it is."""
    kind: Any = type(planner)
    return (
        isinstance(planner, DefaultSavePlanner)
        and kind.resolve_data is DefaultSavePlanner.resolve_data
        and kind.transform_object is DefaultSavePlanner.transform_object
        and kind.lookup_object is DefaultSavePlanner.lookup_object
    )


def _value_of(planner: SavePlanner, item: WriteItem) -> Any:
    """Give a plain value of the state: as it is, where the planner would only pickle it."""
    if _leaves_values(planner):
        return planner.lookup_object(item.index)
    data: Any = planner.resolve_data(item)
    data.seek(0)
    # The planner wrote it just now, in this process, of what it holds.
    return torch.load(data, weights_only=False)


def _check_plain(name: str, value: Any, *, is_alone: bool, depth: int = 0) -> None:
    """Refuse what would not come back as it was from within a plain value."""
    if is_sharded(value) and not is_alone:
        raise _unsupported(
            name,
            "it has a sharded tensor in it, of which only one rank would save its part",
            "keep sharded tensors in dicts and lists",
        )
    if callable(getattr(value, "state_dict", None)):
        raise _unsupported(
            name,
            "torch takes this object as one value, and would put a dict in its place on loading",
            "save its `state_dict()`, or put it at the top of the state",
        )
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return
    if depth < DEPTH_MAX:  # what is deeper is refused as any state is
        for child in value:
            _check_plain(name, child, is_alone=is_alone, depth=depth + 1)


def _unsupported(name: str, why: str, hint: str) -> UnsupportedValue:
    return UnsupportedValue(f"saving `{name}`", why, hint)


class Held(NamedTuple):
    """What one rank saved under a name."""

    rank: int
    part: Part | None
    """The tensor, or a part of it; None of any other value."""
    node: int


class Saved:
    """What all ranks saved of one checkpoint, by the names that a planner gives it.

    Args:
        first: The shard by which it was found.
        readers: Those of all ranks' shards.
        rank: Whose value counts where each rank has its own; None if that has to be said.

    Raises:
        Corrupt: Parts that ranks saved do not make up a tensor.
        InvalidArgument: It has no names, or two entries have one.

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
                # To a planner they are one, however its ranks came to it.
                if self._paths.setdefault(name, path) != path and not self._is_planned:
                    raise self._same_name(name)
                some.append(Held(number, _part_at(reader, node), node))
        self._unclear = {name for name, some in found.items() if not self._take(name, some)}

    def metadata(self) -> Metadata:
        """Describe it to a planner; asking for what nobody said whose it is raises."""
        described = Described(self._refusal)
        for name in self._paths:
            if name not in self._unclear:
                described[name] = self._described(name)
        return Metadata(described, planner_data=dict(self._paths))

    def pickled(self, name: str) -> io.BytesIO:
        """Give a value as planners take it."""
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
            targets: Each with the part, and with the box of the whole tensor that it takes.
            verify: Whether chunks are checked against their checksums.

        Raises:
            InvalidArgument: A tensor is not of its box's shape.

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
                f"the planner asks for the shape {list(box.sizes)}, and gives a tensor of "
                f"{list(target.shape)}",
                "have `resolve_tensor` give what the plan says",
            )
        if target.is_meta or (target.layout is torch.strided and has_no_memory(target)):
            raise InvalidArgument(
                what,
                "the tensor that it is to be read into has no memory, or none any more",
                'give it some first, for example by `module.to_empty(device="cuda")`',
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
        """Give the parts, alike, that have a box."""
        tiles = self._tiles.get(index.fqn, {})
        parts = tiles.get(tuple(index.offset or (0,) * len(box.offsets)))
        if parts is None or parts[0].box.intersect(box) != box:
            raise InvalidArgument(
                f"reading `{index.fqn}` of step {self.step}",
                f"the planner asks for {box}, which is not within a part that a rank saved",
                "plan with the metadata of this checkpoint",
            )
        return parts

    def _take(self, name: str, some: list[Held]) -> bool:
        """Find what is read for a name; False if each rank has its own."""
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
        """Give the parts that have something, by where they begin."""
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
        return {box.offsets: alike for box, alike in tiles.items()}

    def _damage(self, name: str, why: str) -> Corrupt:
        return Corrupt(
            f"putting `{name}` together, of step {self.step}",
            why,
            "load another step; save it so that its parts on all ranks are those of one tensor",
        )

    def _choose(self, some: list[Held]) -> Held | None:
        """Give the value that counts; None if each rank has its own, and none was named."""
        if len(some) == 1 or self._is_planned:
            return some[0]
        named = [held for held in some if held.rank == self._rank]
        if named:
            return named[0]
        return some[0] if all(self._is_shared(held) for held in some) else None

    def _is_shared(self, held: Held) -> bool:
        """Tell whether all ranks saved it alike."""
        tops = self._shared[held.rank]
        before = bisect.bisect_right(tops, held.node)
        return before > 0 and held.node < self._readers[held.rank].tree.ends[tops[before - 1]]

    def _same_name(self, name: str) -> InvalidArgument:
        return InvalidArgument(
            f"reading step {self.step} by names",
            f"two of its entries are called `{name}`",
            "load it with `manager.load()`, which tells 1 from '1'",
        )

    def _refusal(self, name: str | None) -> Exception | None:
        """Give the error of asking for a name, or for all, if nobody said whose it is to be."""
        asked = sorted(self._unclear if name is None else self._unclear & {name})
        if not asked:
            return None
        named = ", ".join(f"`{some}`" for some in asked[:_NAMED_MAX])
        more = f" and {len(asked) - _NAMED_MAX} more" if len(asked) > _NAMED_MAX else ""
        return InvalidArgument(
            f"reading step {self.step}, which {len(self._readers)} ranks saved",
            f"{named}{more} {'is' if len(asked) == 1 else 'are'} what each of them saved for "
            "itself",
            "say whose it is to be: `StorageReader(manager, from_rank=0)`",
        )


class Described(dict[str, STORAGE_TYPES]):
    """What a planner is told of the names of a checkpoint.

    Args:
        refusal: Gives the error of asking for a name, or for all of them where that is None; None
            if it may be asked for.

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
        """Give all; raise where not all may be asked for."""
        self._check(None)
        return super().items()

    def _check(self, name: str | None) -> None:
        error = self._refusal(name)
        if error is not None:
            raise error


class _Batch:
    """Reads into tensors: straight where their memory can be filled, else through a copy."""

    def __init__(self, *, verify: bool) -> None:
        self._verify = verify
        self._assembly = Assembly()
        self._copies: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._copied_bytes = 0
        self._ordinals: set[int] = set()

    def add(self, parts: list[Part], box: Box, target: torch.Tensor, damaged: Any) -> None:
        """Have a tensor filled with a box that parts, alike, have."""
        record = parts[0].record
        dtype = torch_dtype(record.dtype, record.item_bytes)
        place = target
        if target.dtype != dtype or not _can_be_filled(target):
            place = torch.empty(box.sizes, dtype=dtype)
            self._copies.append((target, place))
            self._copied_bytes += place.nbytes
        if place.is_cuda:
            self._ordinals.add(place.device.index)
        first = int(place.storage_offset())
        there = Place(place.untyped_storage(), place.stride(), first)
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


def _can_be_filled(target: torch.Tensor) -> bool:
    """Tell whether a tensor's memory holds its values, as they are, where the engine can write."""
    if type(target) is not torch.Tensor or target.layout is not torch.strided:
        return False
    if target.is_conj() or target.is_neg() or target.is_quantized:
        return False
    return target.is_cpu or (target.is_cuda and gpus.are_usable())


def readers_of(first: _native.Checkpoint, source: Source) -> list[Reader]:
    """Open what each rank saved of a checkpoint, of which that of rank 0 is there."""
    others = range(1, first.manifest()["world_size"])
    opened = open_at_once(lambda rank: source.open_beside(first, rank), others)
    return [source.reader(checkpoint) for checkpoint in (first, *opened)]


def _is_planned(reader: Reader) -> bool:
    """Tell whether a state was saved as a planner said: what ranks saved alike is alike."""
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
    """Give the nodes of what has a name of its own, each with its path."""
    if reader.tree.nodes[0][0] != TAG_DICT:
        raise InvalidArgument(
            f"reading step {reader.checkpoint.step} by names",
            "its state is no dict, so what is in it has no names",
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
    """Tell whether torch's planners flatten a list: for a dict or a tensor in it, however deep."""
    if reader.tree.nodes[index][0] != TAG_LIST:
        return False
    return any(
        reader.tree.nodes[child][0] == TAG_DICT
        or _part_at(reader, child) is not None
        or _is_traversed(reader, child)
        for _, child in reader.tree.children(index)
    )
