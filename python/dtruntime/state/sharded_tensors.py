"""Tensors of which each rank holds a part: torch's ``DTensor``, as in FSDP2 and tensor parallelism.

A part is a box: its offset from the whole tensor's first item, and its number of items, per
dimension.

Always holds: if several ranks hold the same part, one of them writes its bytes; a tensor whose
memory does not determine its values is refused, not guessed at. ``torch`` is looked up in
``sys.modules`` and never imported.
"""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

from dtruntime.errors import UnsupportedValue

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


class Slice(NamedTuple):
    """The position of a part in the whole tensor: the whole shape, and the part's offsets."""

    shape: tuple[int, ...]
    offsets: tuple[int, ...]


class Piece(NamedTuple):
    """A part of a tensor that a planner split: a plain tensor, and its position."""

    tensor: Any
    place: Slice


class Box(NamedTuple):
    """A box of a tensor's items: per dimension, ``sizes`` items starting at ``offsets``."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def items(self) -> int:
        """The number of items."""
        return math.prod(self.sizes)

    def intersect(self, other: Box) -> Box | None:
        """Return the intersection; None if it is empty.

        >>> Box((0, 0), (4, 8)).intersect(Box((3, 2), (4, 2)))
        Box(offsets=(3, 2), sizes=(1, 2))
        """
        offsets, sizes = [], []
        for start, size, start2, size2 in zip(*self, *other, strict=True):
            low, high = max(start, start2), min(start + size, start2 + size2)
            if low >= high:
                return None
            offsets.append(low)
            sizes.append(high - low)
        return Box(tuple(offsets), tuple(sizes))


def whole(shape: Sequence[int]) -> Box:
    """Return the box of a whole tensor."""
    return Box((0,) * len(shape), tuple(shape))


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the strides, in items, of a contiguous row-major tensor.

    >>> contiguous_strides((2, 3, 4))
    (12, 4, 1)
    """
    strides, items = [], 1
    for size in reversed(shape):
        strides.append(items)
        items *= max(size, 1)
    return tuple(reversed(strides))


def is_contiguous(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Return whether items are in row-major order without gaps; strides count items."""
    pairs = zip(shape, strides, contiguous_strides(shape), strict=True)
    return all(size == 1 or stride == expected for size, stride, expected in pairs)


def sharded_type() -> type | None:
    """Return torch's class of sharded tensors; None if it was not imported."""
    module = sys.modules.get("torch.distributed.tensor")
    return getattr(module, "DTensor", None)


def is_sharded(value: Any) -> bool:
    """Return whether a value is a ``DTensor``."""
    kind = sharded_type()
    return kind is not None and isinstance(value, kind)


def local_of(tensor: Any) -> Any:
    """Return this rank's part of a tensor, sharing its memory; a plain tensor as it is."""
    if not is_sharded(tensor):
        return tensor
    local = tensor._local_tensor  # noqa: SLF001  (`to_local` would take part in autograd)
    wait = getattr(local, "wait", None)  # a collective may still be writing it
    return local if wait is None else wait()


def part_of(tensor: Any, world_size: int, where: Callable[[], str]) -> tuple[Any, Slice | None]:
    """Return what this rank saves of a sharded tensor, and its position.

    Args:
        tensor: The ``DTensor``.
        world_size: Ranks that save together.
        where: Names it in errors.

    Returns:
        A plain tensor that shares the memory, empty if another rank saves the same part; and its
        position, or None if it is the whole tensor, as on every rank.

    Raises:
        UnsupportedValue: It is a partial sum, not a plain tensor locally, not a box, or its mesh
            has ranks that do not save.

    """
    torch = sys.modules["torch"]
    _check(torch, tensor, where)
    local = local_of(tensor).detach()
    mesh, shape = tensor.device_mesh, tuple(tensor.shape)
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return _nothing(local, shape, where)
    is_replicated = all(placement.is_replicate() for placement in tensor.placements)
    if is_replicated and world_size in (1, mesh.size()):
        return local, None
    if mesh.size() > world_size:
        raise UnsupportedValue(
            f"saving `{where()}`",
            f"{mesh.size()} ranks hold parts of it, and this manager saves for {world_size}",
            "open the manager on all of them, with one store and `world_size` set to their number; "
            "or save the whole tensor, `tensor.full_tensor()`",
        )
    if mesh.size() == world_size == 1:
        return local, None
    box = box_of(tensor)
    if box is None or tuple(local.shape) != box.sizes:
        raise UnsupportedValue(
            f"saving `{where()}`",
            f"this rank's part, of shape {tuple(local.shape)}, is not the contiguous box that its "
            f"placements {tensor.placements} describe",
            "redistribute it evenly first: `tensor.redistribute(placements=[...])`",
        )
    along_mesh = zip(coordinate, tensor.placements, strict=True)
    is_owner = not any(at for at, placement in along_mesh if placement.is_replicate())
    # Only if all ranks are in one mesh are equal parts of one name certain to be the same.
    if shape and not is_owner and mesh.size() == world_size:
        local = local.narrow(0, 0, 0)
    return local, Slice(shape, box.offsets)


def _check(torch: Any, tensor: Any, where: Callable[[], str]) -> None:
    if any(placement.is_partial() for placement in tensor.placements):
        raise UnsupportedValue(
            f"saving `{where()}`",
            "each rank holds a summand of it, not a part",
            "reduce it first: `tensor.redistribute(placements=[Replicate()])`",
        )
    local = local_of(tensor)
    if type(local) is not torch.Tensor:
        raise UnsupportedValue(
            f"saving `{where()}`",
            f"its part on this rank is a `{type(local).__name__}`, not a plain tensor",
            "save it as a plain tensor, for example dequantized",
        )


def _nothing(local: Any, shape: tuple[int, ...], where: Callable[[], str]) -> tuple[Any, Slice]:
    """Return the part of a rank that is outside the tensor's mesh."""
    if not shape:
        raise UnsupportedValue(
            f"saving `{where()}`",
            "this rank is not in the mesh of this tensor, which has no dimensions",
            "save it on the ranks of its mesh only, or its value: `tensor.full_tensor()`",
        )
    return local.new_empty((0, *shape[1:])), Slice(shape, (0,) * len(shape))


def box_of(tensor: Any) -> Box | None:
    """Return this rank's box of a tensor, all of a plain one; None if its part is not a box."""
    if not is_sharded(tensor):
        return whole(tensor.shape)
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:
        return Box((0,) * tensor.ndim, (0,) * tensor.ndim)
    [chunk] = tensor.__create_chunk_list__()
    box = Box(tuple(chunk.offsets), tuple(chunk.sizes))
    return box if _is_box(tensor, coordinate, box) else None


def _is_box(tensor: Any, coordinate: Sequence[int], box: Box) -> bool:
    """Return whether strided placements, which interleave items, result in one box after all.

    With FSDP2 over tensor parallelism they do; torch's own list of chunks does not distinguish.
    """
    strided = {p.dim for p in tensor.placements if type(p).__name__ == "_StridedShard"}
    for dim in strided:
        held = sys.modules["torch"].arange(tensor.shape[dim])
        mesh = tensor.device_mesh
        for along, (at, placement) in enumerate(zip(coordinate, tensor.placements, strict=True)):
            if not placement.is_replicate() and placement.dim == dim:
                parts, _ = placement._split_tensor(  # noqa: SLF001  (how torch itself splits them)
                    held, mesh.size(along), with_padding=False, contiguous=True
                )
                held = parts[at]
        first = box.offsets[dim]
        if held.tolist() != list(range(first, first + box.sizes[dim])):
            return False
    return True


class LivePart(NamedTuple):
    """The part that a live sharded tensor takes from a checkpoint.

    Attributes:
        like: The live tensor.
        box: This rank's box of it.

    """

    like: Any
    box: Box

    @classmethod
    def of(cls, tensor: Any) -> LivePart | None:
        """Return the part that ``tensor`` takes; None if it is not a box."""
        box = box_of(tensor)
        return None if box is None else cls(tensor, box)

    @property
    def device(self) -> Any:
        """The device of this rank's part."""
        return local_of(self.like).device

    def filled(self, local: Any) -> Any:
        """Return a sharded tensor like the live one, with ``local`` as this rank's part."""
        kind: Any = sharded_type()
        # `from_local` would move an offloaded part to the mesh's device.
        return kind(local.detach(), self.like._spec, requires_grad=False)  # noqa: SLF001
