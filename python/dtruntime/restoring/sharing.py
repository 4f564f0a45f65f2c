"""Live tensors that share memory: whether all of what was saved for them can be restored.

    live                          saved
    emb.weight  ----+             one tensor, or two that view the same memory: fits
                    | memory      two that are bitwise identical:               fits
    head.weight ----+             two that differ:                              does not

The same applies to one tensor whose own items share memory, for example an expanded one.

Always holds: tensors are read only if live ones share memory and the saved ones do not share it in
the same way, and into host memory; nothing live is changed. Of tensors that conflict, the first one
is restored.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dtruntime.state.sharded_tensors import LivePart, is_sharded, local_of
from dtruntime.state.tensors import NUMPY, hull_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from dtruntime.loading.reader import Reader
    from dtruntime.state.tensors import TensorRecord


class Claim(NamedTuple):
    """A live tensor or array that takes a saved one.

    Attributes:
        path: The path of both.
        node: The node that it takes.
        number: The number of the saved tensor.
        live: The live tensor; the reference keeps its memory from being reused in the meantime.
        give_up: Removes it from the plan, so that it stays unchanged.

    """

    path: str
    node: int
    number: int
    live: Any
    give_up: Callable[[], None]


class _View(NamedTuple):
    """The memory layout of a tensor. Strides are in bytes; dimensions of size 1 are left out."""

    device: Any
    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    item_bytes: int

    @property
    def low(self) -> int:
        """The first byte."""
        return self.address + sum(
            (size - 1) * min(stride, 0) for size, stride in zip(*self[2:4], strict=True)
        )

    @property
    def high(self) -> int:
        """The byte after the last."""
        reach = ((size - 1) * max(stride, 0) for size, stride in zip(*self[2:4], strict=True))
        return self.address + sum(reach) + self.item_bytes

    @property
    def may_overlap(self) -> bool:
        """Whether its items may share memory; False is certain."""
        reach = self.item_bytes
        for stride, size in sorted(zip(map(abs, self.strides), self.shape, strict=True)):
            if stride < reach:
                return True
            reach += (size - 1) * stride
        return False

    def within(self, memory: np.ndarray[Any, Any], first: int) -> np.ndarray[Any, Any]:
        """View its items, as bytes, in a copy of the memory that starts at address ``first``."""
        shape, strides = (*self.shape, self.item_bytes), (*self.strides, 1)
        offset = self.address - first
        return np.ndarray(shape, np.uint8, memory, offset, strides)


_Placed = tuple[Claim, _View]


def is_expanded(live: Any) -> bool:
    """Return whether a tensor is expanded along a dimension: torch refuses to copy into it."""
    if live.layout is not sys.modules["torch"].strided:
        return False
    pairs = zip(live.shape, live.stride(), strict=True)
    return any(stride == 0 and size > 1 for size, stride in pairs)


def conflicts(claims: Iterable[Claim], reader: Reader) -> Iterator[tuple[Claim, str]]:
    """Yield the claims that conflict with earlier ones, each with the reason."""
    for group in _groups(claims):
        if _share_as_saved(group, reader.records):
            continue
        views = {view for _, view in group}
        is_one = len(views) == 1 and not group[0][1].may_overlap
        yield from _compare_with_first(group, reader) if is_one else _compare(group, reader)


def _groups(claims: Iterable[Claim]) -> Iterator[list[_Placed]]:
    """Yield groups of claims that may share memory, each in the original order."""
    placed = [
        (view, order, claim)
        for order, claim in enumerate(claims)
        if (view := _view_of(claim.live)) is not None
    ]
    placed.sort(key=lambda one: (str(one[0].device), one[0].low))
    group: list[tuple[_View, int, Claim]] = []
    end = 0
    for one in placed:
        view = one[0]
        if group and (view.device != group[0][0].device or view.low >= end):
            yield from _if_shared(group)
            group = []
        end = max(end, view.high) if group else view.high
        group.append(one)
    yield from _if_shared(group)


def _if_shared(group: list[tuple[_View, int, Claim]]) -> Iterator[list[_Placed]]:
    if len(group) > 1 or any(view.may_overlap for view, _, _ in group):
        yield [(claim, view) for view, _, claim in sorted(group, key=lambda one: one[1])]


def _view_of(live: Any) -> _View | None:
    """Return a tensor's memory layout; None if it has no items, or is of a kind without one."""
    if isinstance(live, np.ndarray):
        if not live.size:
            return None
        address, item_bytes, strides = live.ctypes.data, live.itemsize, live.strides
        device: Any = None
    else:
        torch = sys.modules["torch"]
        local = local_of(live)
        is_plain = type(local) in (torch.Tensor, torch.nn.Parameter)
        if not is_plain or local.layout is not torch.strided or not local.numel():
            return None
        item_bytes = local.element_size()
        address = local.data_ptr()
        strides = tuple(stride * item_bytes for stride in local.stride())
        device = None if local.device.type == "cpu" else local.device
        live = local
    kept = [(size, stride) for size, stride in zip(live.shape, strides, strict=True) if size > 1]
    shape, strides = tuple(size for size, _ in kept), tuple(stride for _, stride in kept)
    return _View(device, address, shape, strides, item_bytes)


def _share_as_saved(group: Sequence[_Placed], records: Sequence[TensorRecord]) -> bool:
    """Return whether saved tensors share memory in the same way as the live ones."""
    first = _distance(*group[0], records)
    if len({_identity(claim, view, records) for claim, view in group}) == 1:
        return not group[0][1].may_overlap or first is not None
    return first is not None and all(
        _distance(claim, view, records) == first for claim, view in group
    )


def _identity(
    claim: Claim, view: _View, records: Sequence[TensorRecord]
) -> tuple[_View, Any, int | TensorRecord]:
    """Return a key that is equal for claims with the same live tensor and the same saved one."""
    record = records[claim.number]._replace(kind=0, requires_grad=False)
    kind = (claim.live.dtype, *_flips(claim.live))
    return view, kind, claim.number if hull_of(record) is None else record


def _distance(claim: Claim, view: _View, records: Sequence[TensorRecord]) -> tuple[int, int] | None:
    """Return the saved storage and its address distance to a live tensor; None if layouts differ.

    Tensors with equal distances share memory in the same way, live and saved.
    """
    record = records[claim.number]
    pairs = zip(record.shape, record.strides, strict=True)
    kept = tuple((size, stride * record.item_bytes) for size, stride in pairs if size > 1)
    is_whole = record.kind != NUMPY and record.slice is None and hull_of(record) is not None
    is_same = kept == tuple(zip(view.shape, view.strides, strict=True))
    dtype = str(claim.live.dtype).removeprefix("torch.")
    if not is_whole or not is_same or record.dtype != dtype or any(_flips(claim.live)):
        return None
    return record.storage, view.address - record.offset * record.item_bytes


def _compare_with_first(group: Sequence[_Placed], reader: Reader) -> Iterator[tuple[Claim, str]]:
    """Yield claims that differ from the first, all of them for the same memory."""
    kept = group[0][0]
    first = _bytes_for(kept, reader)
    for claim, _ in group[1:]:
        is_same = claim.live.dtype == kept.live.dtype and _flips(claim.live) == _flips(kept.live)
        if claim.number == kept.number and is_same:
            continue
        if not np.array_equal(first, _bytes_for(claim, reader)):
            yield claim, _why(claim, kept)


def _compare(group: Sequence[_Placed], reader: Reader) -> Iterator[tuple[Claim, str]]:
    """Write saved values to a copy of the live memory; yield claims that would be overwritten."""
    start, end = min(v.low for _, v in group), max(v.high for _, v in group)
    memory, is_taken = np.zeros(end - start, np.uint8), np.zeros(end - start, np.uint8)
    kept: list[_Placed] = []
    for claim, view in group:
        there, taken = view.within(memory, start), view.within(is_taken, start)
        value = _bytes_for(claim, reader).reshape(there.shape)
        before = there.copy()
        is_other = bool((taken.astype(bool) & (before != value)).any())
        there[...] = value
        if is_other or not np.array_equal(there, value):
            there[...] = before
            others = (c for c, v in kept if v.low < view.high and view.low < v.high)
            yield claim, _why(claim, next(others, None) if is_other else None)
        else:
            taken[...] = 1
            kept.append((claim, view))


def _flips(live: Any) -> tuple[bool, bool]:
    """Return whether a tensor is a lazy conjugate, and whether it is a lazy negative."""
    if isinstance(live, np.ndarray):
        return False, False
    local = local_of(live)
    return local.is_conj(), local.is_neg()


def _bytes_for(claim: Claim, reader: Reader) -> np.ndarray[Any, Any]:
    """Read the bytes that a live tensor will hold, in its dtype and row-major order."""
    live = claim.live
    part = LivePart.of(live) if is_sharded(live) else None
    parts = {} if part is None else {claim.number: part}
    value = reader.tensors([claim.number], {}, parts)[claim.number]
    if isinstance(live, np.ndarray):
        with np.errstate(all="ignore"):
            return np.ascontiguousarray(value, live.dtype).reshape(-1).view(np.uint8)
    torch = sys.modules["torch"]
    value = local_of(value).detach()
    if value.dtype != live.dtype:
        value = value.to(live.dtype)
    is_conjugate, is_negative = _flips(live)
    value = value.conj().resolve_conj() if is_conjugate else value
    value = -value if is_negative else value
    if value.dtype.itemsize == 1:  # some one-byte dtypes have no copy kernel
        value = value.view(torch.uint8)
    flat: np.ndarray[Any, Any] = value.contiguous().reshape(-1).view(torch.uint8).numpy()
    return flat


def _why(claim: Claim, other: Claim | None) -> str:
    if other is None:
        return "items of the live one share memory, and the saved ones differ"
    return f"live `{other.path}` and `{claim.path}` share memory, and the saved ones differ"
