"""Tensors of which each rank holds a part: torch's ``DTensor``, as FSDP2 and tensor parallelism do.

A part is a box: how far from the whole tensor's first item it begins, and how many items it has,
per dimension.

Always holds: of parts that several ranks hold alike, one rank gives the bytes; a tensor whose
memory does not say what it holds is refused, not guessed at. ``torch`` is looked up in
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
    """Where a part stands in the whole tensor: its shape, and the part's first item."""

    shape: tuple[int, ...]
    offsets: tuple[int, ...]


class Piece(NamedTuple):
    """A part of a tensor that others cut up: a plain tensor of its own, and where it stands."""

    tensor: Any
    place: Slice


class Box(NamedTuple):
    """Items of a tensor: from ``offsets`` on, ``sizes`` of them, per dimension."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def items(self) -> int:
        """How many items it has."""
        return math.prod(self.sizes)

    def intersect(self, other: Box) -> Box | None:
        """Give what both have; None if that is nothing.

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
    """Give the box of a whole tensor."""
    return Box((0,) * len(shape), tuple(shape))


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Give the strides, in items, of a tensor without gaps in row-major order.

    >>> contiguous_strides((2, 3, 4))
    (12, 4, 1)
    """
    strides, items = [], 1
    for size in reversed(shape):
        strides.append(items)
        items *= max(size, 1)
    return tuple(reversed(strides))


def sharded_type() -> type | None:
    """Give torch's class of sharded tensors; None where nothing has made one."""
    module = sys.modules.get("torch.distributed.tensor")
    return getattr(module, "DTensor", None)


def is_sharded(value: Any) -> bool:
    """Tell whether each rank holds a part of this value, or could."""
    kind = sharded_type()
    return kind is not None and isinstance(value, kind)


def local_of(tensor: Any) -> Any:
    """Give what this rank holds of a tensor: of a plain one, itself. Shares its memory."""
    if not is_sharded(tensor):
        return tensor
    local = tensor._local_tensor  # noqa: SLF001  (`to_local` would take part in autograd)
    wait = getattr(local, "wait", None)  # a collective may still be on its way to it
    return local if wait is None else wait()


def part_of(tensor: Any, world_size: int, where: Callable[[], str]) -> tuple[Any, Slice | None]:
    """Give what this rank saves of a sharded tensor, and where that stands.

    Args:
        tensor: The ``DTensor``.
        world_size: Ranks that save together.
        where: Names it in errors.

    Returns:
        A plain tensor that shares the memory, without items where another rank saves the same
        part; and its place, or None if it is the whole, as on every rank.

    Raises:
        UnsupportedValue: It is a partial sum, in memory of a kind that is not plain, no box, or of
            ranks that do not all save.

    """
    torch = sys.modules["torch"]
    _check(torch, tensor, where)
    local = local_of(tensor).detach()
    mesh, shape = tensor.device_mesh, tuple(tensor.shape)
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return _nothing(local, shape, where)
    is_alike = all(placement.is_replicate() for placement in tensor.placements)
    if is_alike and world_size in (1, mesh.size()):
        return local, None
    if mesh.size() > world_size:
        raise UnsupportedValue(
            f"saving `{where()}`",
            f"{mesh.size()} ranks hold parts of it, and this manager saves for {world_size}",
            "open the manager on all of them, on one store: `world_size` is their number; or save "
            "the whole, `tensor.full_tensor()`",
        )
    if mesh.size() == world_size == 1:
        return local, None
    box = box_of(tensor)
    if box is None or tuple(local.shape) != box.sizes:
        raise UnsupportedValue(
            f"saving `{where()}`",
            f"what this rank holds of it, of shape {tuple(local.shape)}, is not what its "
            f"placements {tensor.placements} cut out in one piece",
            "redistribute it evenly first: `tensor.redistribute(placements=[...])`",
        )
    dealt = zip(coordinate, tensor.placements, strict=True)
    is_owner = not any(at for at, placement in dealt if placement.is_replicate())
    # Only where all ranks are in one mesh do equal parts of one name have to be the same.
    if shape and not is_owner and mesh.size() == world_size:
        local = local.narrow(0, 0, 0)
    return local, Slice(shape, box.offsets)


def _check(torch: Any, tensor: Any, where: Callable[[], str]) -> None:
    if any(placement.is_partial() for placement in tensor.placements):
        raise UnsupportedValue(
            f"saving `{where()}`",
            "each rank holds a summand of it, not a part",
            "sum it up first: `tensor.redistribute(placements=[Replicate()])`",
        )
    local = local_of(tensor)
    if type(local) is not torch.Tensor:
        raise UnsupportedValue(
            f"saving `{where()}`",
            f"its part on this rank is a `{type(local).__name__}`, not a plain tensor",
            "save it as plain tensors, for example dequantized",
        )


def _nothing(local: Any, shape: tuple[int, ...], where: Callable[[], str]) -> tuple[Any, Slice]:
    """Give the part of a rank that is outside the tensor's mesh."""
    if not shape:
        raise UnsupportedValue(
            f"saving `{where()}`",
            "this rank is not in the mesh of this tensor, which has no dimension",
            "save it on the ranks of its mesh only, or its value: `tensor.full_tensor()`",
        )
    return local.new_empty((0, *shape[1:])), Slice(shape, (0,) * len(shape))


def box_of(tensor: Any) -> Box | None:
    """Give what this rank holds of a tensor, of a plain one all of it; None if it is no box."""
    if not is_sharded(tensor):
        return whole(tensor.shape)
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:
        return Box((0,) * tensor.ndim, (0,) * tensor.ndim)
    [chunk] = tensor.__create_chunk_list__()
    box = Box(tuple(chunk.offsets), tuple(chunk.sizes))
    return box if _is_box(tensor, coordinate, box) else None


def _is_box(tensor: Any, coordinate: Sequence[int], box: Box) -> bool:
    """Tell whether strided placements, which deal items in turn, come to one piece after all.

    FSDP2 over tensor parallelism does; torch's own list of chunks tells no difference.
    """
    strided = {p.dim for p in tensor.placements if type(p).__name__ == "_StridedShard"}
    for dim in strided:
        held = sys.modules["torch"].arange(tensor.shape[dim])
        mesh = tensor.device_mesh
        for along, (at, placement) in enumerate(zip(coordinate, tensor.placements, strict=True)):
            if not placement.is_replicate() and placement.dim == dim:
                parts, _ = placement._split_tensor(  # noqa: SLF001  (how torch itself deals them)
                    held, mesh.size(along), with_padding=False, contiguous=True
                )
                held = parts[at]
        first = box.offsets[dim]
        if held.tolist() != list(range(first, first + box.sizes[dim])):
            return False
    return True


class LivePart(NamedTuple):
    """What a live sharded tensor takes from a checkpoint: its part, on its device.

    Attributes:
        like: The live tensor.
        box: What this rank holds of it.

    """

    like: Any
    box: Box

    @classmethod
    def of(cls, tensor: Any) -> LivePart | None:
        """Describe what ``tensor`` takes; None if that is no box."""
        box = box_of(tensor)
        return None if box is None else cls(tensor, box)

    @property
    def device(self) -> Any:
        """Give the device of this rank's part."""
        return local_of(self.like).device

    def filled(self, local: Any) -> Any:
        """Give a sharded tensor like the live one, of which this rank holds ``local``."""
        kind: Any = sharded_type()
        # `from_local` would move what is offloaded to the mesh's device.
        return kind(local.detach(), self.like._spec, requires_grad=False)  # noqa: SLF001
