"""Tensors and the memory they view: what is written of it, and how views of it are described.

Always holds: a storage is written once, however many tensors view it, and only the byte spans that
saved tensors touch; tensors that shared memory when saved share memory when loaded. The same span
arithmetic is used for saving and for partial loading. ``torch`` is looked up in ``sys.modules`` and
never imported to save: a state without tensors does not need it.
"""

from __future__ import annotations

import sys
from bisect import bisect_right
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dtruntime.errors import UnsupportedFormat, UnsupportedValue
from dtruntime.state import sharded_tensors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from dtruntime.state.gpus import Consistency

# Kinds of tensors, as the index numbers them.
TORCH = 0
TORCH_PARAMETER = 1
NUMPY = 2

# Element types, as the layout numbers them: what encoding may assume about the bytes.
ELEMENT_BYTES = 0
_TORCH_ELEMENTS = {
    "float16": 1,
    "complex32": 1,
    "bfloat16": 2,
    "bcomplex32": 2,
    "float32": 3,
    "complex64": 3,
    "float64": 4,
    "complex128": 4,
}
_NUMPY_ELEMENTS = {"<f2": 1, "<f4": 3, "<c8": 3, "<f8": 4, "<c16": 4}

SPAN_ALIGNMENT = 64
"""Spans of a storage start at multiples of this many bytes, so every item stays aligned."""

_LONE_HULL_FACTOR = 2
"""A tensor that alone views its storage is packed if its hull is larger by more than this."""

_NUMPY_KINDS = "biufcSUMmV"

_TORCH_VERSION_OF_DTYPE = {
    "float8_e8m0fnu": "2.7",
    "float4_e2m1fn_x2": "2.8",
    "bcomplex32": "2.14",
}


class Hull(NamedTuple):
    """The bytes of a storage from a tensor's first item to its last: ``start`` up to ``end``."""

    start: int
    end: int


class Span(NamedTuple):
    """Bytes ``start`` up to ``end`` of a storage, kept at byte ``at`` of what is saved of it."""

    start: int
    end: int
    at: int


class TensorRecord(NamedTuple):
    """A view of a storage, as the index describes it. Strides and offset count items.

    For a sharded tensor, it describes this rank's part, and ``slice`` is its position.
    """

    storage: int
    kind: int
    dtype: str
    item_bytes: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    requires_grad: bool
    slice: sharded_tensors.Slice | None = None


Piece = tuple[int, int, int]
"""Contiguous memory: its address, its length, and its byte offset in the storage."""

Memory = list[Piece] | tuple[int, list[Piece], bool]
"""A storage's memory: in the host, or a GPU's number, memory there, and whether it is cloned."""


class StorageRecord(NamedTuple):
    """Memory to save.

    ``memory`` is a contiguous numpy array, or pieces ``(address, length, at)`` that together make
    up the storage's ``bytes``, or None if this rank writes none of them. For a GPU it is the
    device's number, the pieces, and whether they are cloned there first.
    """

    element: int
    bytes: int
    memory: np.ndarray[Any, Any] | Memory | None


def hull_of(record: TensorRecord) -> Hull | None:
    """Return the bytes that a tensor touches; None for one without items."""
    last = 0
    for size, stride in zip(record.shape, record.strides, strict=True):
        if size == 0:
            return None
        last += (size - 1) * stride
    start = record.offset * record.item_bytes
    return Hull(start, start + (last + 1) * record.item_bytes)


def lay_spans(hulls: Iterable[Hull], storage_bytes: int) -> list[Span]:
    """Merge hulls, rounded outward to 64 bytes, into spans that are laid end to end.

    >>> lay_spans([Hull(0, 10), Hull(200, 300), Hull(210, 220)], 1000)
    [Span(start=0, end=64, at=0), Span(start=192, end=320, at=64)]
    """
    merged: list[Hull] = []
    for start, end in sorted(hulls):
        low = start - start % SPAN_ALIGNMENT
        high = min(end + -end % SPAN_ALIGNMENT, storage_bytes)
        if merged and low <= merged[-1].end:
            merged[-1] = Hull(merged[-1].start, max(merged[-1].end, high))
        else:
            merged.append(Hull(low, high))
    spans, at = [], 0
    for low, high in merged:
        spans.append(Span(low, high, at))
        at += high - low
    return spans


def spans_bytes(spans: Sequence[Span]) -> int:
    """Return the length of spans laid end to end."""
    return spans[-1].at + spans[-1].end - spans[-1].start if spans else 0


def rebase(
    record: TensorRecord, hull: Hull | None, spans: Sequence[Span], storage: int
) -> TensorRecord:
    """Describe a tensor as a view of ``storage``, which is the spans laid end to end."""
    if hull is None:
        return record._replace(storage=storage, offset=0)
    span = spans[bisect_right(spans, hull.start, key=lambda span: span.start) - 1]
    offset = (hull.start - span.start + span.at) // record.item_bytes
    if offset == record.offset and storage == record.storage:
        return record
    return record._replace(storage=storage, offset=offset)


@dataclass(slots=True)
class _TorchStorage:
    """A torch storage and the tensors seen so far that view it, by number."""

    storage: Any
    bytes: int
    is_cpu: bool
    element: int
    tensors: list[int] = field(default_factory=list)
    spans: list[Span] | None = None  # what is saved of it, once known


class TensorTable:
    """Collects the tensors and arrays of a state, each object once.

    ``add_torch`` and ``add_numpy`` return a tensor's number; ``finish`` returns the records. Every
    added object is kept alive until then: its address is its identity.
    """

    def __init__(self) -> None:
        self._numbers: dict[int, int] = {}
        self._records: list[TensorRecord] = []
        self._hulls: list[Hull | None] = []
        self._tensors: list[Any] = []
        self._torch_storages: dict[int, _TorchStorage] = {}
        self._numpy_storages: list[tuple[int, np.ndarray[Any, Any]]] = []
        self._keep_alive: list[Any] = []
        self._dtypes: dict[Any, tuple[str, int, int]] = {}

    def add_torch(self, tensor: Any, kind: int, where: Callable[[], str]) -> int:
        """Add a ``torch.Tensor`` or ``Parameter``; ``where`` names it in errors."""
        number = self._numbers.get(id(tensor))
        if number is not None:
            return number
        self._keep_alive.append(tensor)
        requires_grad = tensor.requires_grad
        strided = _as_strided(tensor, where)
        name, item_bytes, element = self._dtype(strided.dtype)
        try:
            storage = strided.untyped_storage()
            storage.data_ptr()  # raises for a tensor that only represents zeros
            identity = storage._cdata  # noqa: SLF001  (the address of the memory's owner; torch.save uses it too)
            storage_bytes = storage.nbytes()
        except (NotImplementedError, RuntimeError) as error:
            raise UnsupportedValue(
                f"saving `{where()}`",
                f"this tensor has no memory of its own ({_first_line(error)})",
                "save a plain tensor: take it out of the transformation that created it",
            ) from error
        record = TensorRecord(
            0,
            kind,
            name,
            item_bytes,
            tuple(strided.shape),
            strided.stride(),
            strided.storage_offset(),
            requires_grad,
        )
        hull = hull_of(record)
        if hull is not None and hull.end > storage_bytes:
            raise _outside(hull, storage_bytes, where)
        number = self._append(tensor, strided, record, hull)
        owner = self._torch_storages.get(identity)
        if owner is None:
            owner = _TorchStorage(storage, storage_bytes, strided.is_cpu, element)
            self._torch_storages[identity] = owner
        elif owner.element != element:
            owner.element = ELEMENT_BYTES
        owner.tensors.append(number)
        return number

    def add_sharded(self, tensor: Any, kind: int, world_size: int, where: Callable[[], str]) -> int:
        """Add what this rank of ``world_size`` saves of a ``DTensor``."""
        number = self._numbers.get(id(tensor))
        if number is not None:
            return number
        self._keep_alive.append(tensor)
        local, place = sharded_tensors.part_of(tensor, world_size, where)
        number = self._numbers[id(tensor)] = self.add_torch(local, kind, where)
        self._records[number] = self._records[number]._replace(
            requires_grad=tensor.requires_grad, slice=place
        )
        return number

    def add_piece(self, piece: sharded_tensors.Piece, where: Callable[[], str]) -> int:
        """Add a part of a tensor that a planner split."""
        number = self.add_torch(piece.tensor, TORCH, where)
        self._records[number] = self._records[number]._replace(slice=piece.place)
        return number

    def add_numpy(self, array: np.ndarray[Any, Any], where: Callable[[], str]) -> int:
        """Add a ``numpy.ndarray``; ``where`` names it in errors."""
        number = self._numbers.get(id(array))
        if number is not None:
            return number
        self._keep_alive.append(array)
        name = numpy_dtype_name(array.dtype, where)
        flags = array.flags
        packed = array if flags.c_contiguous or flags.f_contiguous else np.ascontiguousarray(array)
        item_bytes = packed.itemsize
        # numpy ignores the strides of dimensions with one item when it calls an array contiguous.
        strides = tuple(max(stride // item_bytes, 0) for stride in packed.strides)
        record = TensorRecord(0, NUMPY, name, item_bytes, packed.shape, strides, 0, False)
        number = self._append(array, packed, record, None)
        self._numpy_storages.append((number, packed))
        return number

    def slices(self) -> list[bool]:
        """Return for each tensor whether it is this rank's part of a sharded one."""
        return [record.slice is not None for record in self._records]

    def storages(self) -> list[int]:
        """Return for each tensor the number of the storage that it views."""
        numbers = [0] * len(self._records)
        for storage, owner in enumerate(self._torch_storages.values()):
            for number in owner.tensors:
                numbers[number] = storage
        for storage, (number, _) in enumerate(self._numpy_storages, len(self._torch_storages)):
            numbers[number] = storage
        return numbers

    def gpus(self) -> list[int]:
        """Return the numbers of the CUDA devices that tensors are on."""
        owners = self._torch_storages.values()
        devices = {owner.storage.device for owner in owners if not owner.is_cpu}
        return sorted(device.index for device in devices if device.type == "cuda")

    def sizes(self) -> list[int]:
        """Return an upper bound of the bytes of each storage that ``finish`` would describe."""
        sizes = [
            spans_bytes(lay_spans(self._hulls_of(owner), owner.bytes))
            if owner.spans is None
            else spans_bytes(owner.spans)
            for owner in self._torch_storages.values()
        ]
        return sizes + [array.nbytes for _, array in self._numpy_storages]

    def lay_out(self) -> None:
        """Determine what is saved of each storage; ``sizes`` is exact from then on."""
        for owner in self._torch_storages.values():
            self._lay_out(owner)

    def finish(
        self,
        is_unread: Callable[[int], bool] = lambda _: False,
        consistency: Consistency | None = None,
    ) -> tuple[list[TensorRecord], list[StorageRecord]]:
        """Return the records of all tensors and of the storages that they view.

        Storages that are neither in host memory nor on a GPU that ``consistency`` handles are
        copied to the host now, except those that are not read.
        """
        storages: list[StorageRecord] = []
        for owner in self._torch_storages.values():
            index = len(storages)
            spans = self._finish_views(owner, index)
            memory: Memory | None = [] if not spans else None
            if spans and not is_unread(index):
                memory = self._memory_of(owner, spans, consistency)
            storages.append(StorageRecord(owner.element, spans_bytes(spans), memory))
        for number, array in self._numpy_storages:
            self._records[number] = self._records[number]._replace(storage=len(storages))
            element = _NUMPY_ELEMENTS.get(self._records[number].dtype, ELEMENT_BYTES)
            storages.append(StorageRecord(element, array.nbytes, array))
        return self._records, storages

    def _append(self, seen: Any, saved: Any, record: TensorRecord, hull: Hull | None) -> int:
        number = len(self._records)
        self._numbers[id(seen)] = number
        self._tensors.append(saved)
        self._records.append(record)
        self._hulls.append(hull)
        return number

    def _hulls_of(self, owner: _TorchStorage) -> list[Hull]:
        hulls = self._hulls
        return [hull for number in owner.tensors if (hull := hulls[number]) is not None]

    def _dtype(self, dtype: Any) -> tuple[str, int, int]:
        known = self._dtypes.get(dtype)
        if known is None:
            name = str(dtype).removeprefix("torch.")
            known = (name, dtype.itemsize, _TORCH_ELEMENTS.get(name, ELEMENT_BYTES))
            self._dtypes[dtype] = known
        return known

    def _lay_out(self, owner: _TorchStorage) -> list[Span]:
        if owner.spans is not None:
            return owner.spans
        if len(owner.tensors) == 1:
            self._pack_lone(owner)
        hulls = self._hulls_of(owner)
        if not hulls:
            owner.spans = []
        elif hulls[0] == (0, owner.bytes):  # the usual case: the storage of one parameter
            owner.spans = [Span(0, owner.bytes, 0)]
        else:
            owner.spans = lay_spans(hulls, owner.bytes)
        return owner.spans

    def _finish_views(self, owner: _TorchStorage, index: int) -> list[Span]:
        spans = self._lay_out(owner)
        for number in owner.tensors:
            self._records[number] = rebase(self._records[number], self._hulls[number], spans, index)
        return spans

    def _memory_of(
        self, owner: _TorchStorage, spans: Iterable[Span], consistency: Consistency | None
    ) -> Memory:
        storage, place = owner.storage, None
        if not owner.is_cpu:
            place = consistency.place(storage) if consistency is not None else None
            storage = storage if place is not None else storage.cpu()
        self._keep_alive.append(storage)
        address = storage.data_ptr()
        pieces = [(address + start, end - start, at) for start, end, at in spans]
        return pieces if place is None else (place.ordinal, pieces, place.is_cloned)

    def _pack_lone(self, owner: _TorchStorage) -> None:
        """Make a widely strided tensor contiguous where nothing else views its storage."""
        number = owner.tensors[0]
        record = self._records[number]
        hull = self._hulls[number]
        if hull is None:
            return
        own_bytes = record.item_bytes
        for size in record.shape:
            own_bytes *= size
        if hull.end - hull.start <= _LONE_HULL_FACTOR * own_bytes:
            return
        packed = _pack(self._tensors[number].detach())
        self._keep_alive.append(packed)
        owner.storage, owner.bytes = packed.untyped_storage(), own_bytes
        self._records[number] = record._replace(strides=packed.stride(), offset=0)
        self._hulls[number] = Hull(0, own_bytes)


def _pack(tensor: Any) -> Any:
    """Return a contiguous copy of a tensor, whatever its dtype."""
    torch = sys.modules["torch"]
    if tensor.dtype.itemsize == 1:  # some one-byte dtypes have no copy kernel
        return tensor.view(torch.uint8).contiguous()
    return tensor.contiguous()


def _as_strided(tensor: Any, where: Callable[[], str]) -> Any:
    """Return a tensor whose raw bytes are its values; refuse one without such bytes."""
    torch = sys.modules["torch"]
    if tensor.layout is not torch.strided or tensor.is_nested:
        kind = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
        hint = (
            "save its parts: `tensor.unbind()`"
            if tensor.is_nested
            else "save `tensor.to_dense()`, or its indices and values"
        )
        raise UnsupportedValue(f"saving `{where()}`", f"a {kind} tensor cannot be stored", hint)
    if tensor.is_quantized:
        raise UnsupportedValue(
            f"saving `{where()}`",
            f"a quantized tensor (`{tensor.dtype}`) cannot be stored",
            "save `tensor.int_repr()` with its scales and zero points, or `tensor.dequantize()`",
        )
    if tensor.is_meta:
        raise UnsupportedValue(
            f"saving `{where()}`",
            "a tensor on the `meta` device has a shape but no values",
            "materialize it first, for example with `module.to_empty(device=...)`",
        )
    if tensor.is_conj() or tensor.is_neg():
        # A lazy conjugate or negative: the raw bytes alone are not its values.
        return tensor.detach().resolve_conj().resolve_neg()
    return tensor


def _outside(hull: Hull, storage_bytes: int, where: Callable[[], str]) -> UnsupportedValue:
    return UnsupportedValue(
        f"saving `{where()}`",
        f"its storage holds {storage_bytes} bytes and the tensor needs {hull.end}: "
        "the memory was freed (sharded wrappers resize it to 0)",
        "gather the full parameters before saving",
    )


def numpy_dtype_name(dtype: np.dtype[Any], where: Callable[[], str]) -> str:
    """Return the name that a numpy dtype is stored under; refuse one without plain raw bytes."""
    name = dtype.str
    if (
        dtype.kind in _NUMPY_KINDS
        and dtype.itemsize > 0
        and dtype.names is None
        and dtype.subdtype is None
        and np.dtype(name) == dtype
    ):
        return name
    if dtype.kind == "O":
        why, hint = "holds Python objects", "save a list, or convert it to a numeric dtype"
    elif dtype.names is not None:
        why, hint = "has named fields", "save a dict of `array[name]` for each of its fields"
    else:
        why, hint = "is not described by its raw bytes", "convert it with `array.astype(...)`"
    raise UnsupportedValue(f"saving `{where()}`", f"numpy dtype `{dtype}` {why}", hint)


def numpy_dtype(name: str, item_bytes: int | None = None) -> np.dtype[Any]:
    """Return the numpy dtype of a stored name; refuse names that a writer would not write."""
    try:
        dtype = np.dtype(name)
        known = numpy_dtype_name(dtype, lambda: name) == name
    except (TypeError, ValueError, SyntaxError):
        known = False
    if not known or (item_bytes is not None and dtype.itemsize != item_bytes):
        raise UnsupportedFormat(
            f"loading a numpy value of dtype `{name}`",
            f"numpy {np.__version__} has no such plain dtype of {item_bytes} bytes",
            "load it with the numpy version that saved it",
        )
    return dtype


def torch_dtype(name: str, item_bytes: int | None = None) -> Any:
    """Return the torch dtype of a stored name; if it is missing, the error names its version."""
    torch = import_torch(f"loading a value of dtype `torch.{name}`")
    dtype = getattr(torch, name, None) if name.isidentifier() else None
    if not isinstance(dtype, torch.dtype) or (
        item_bytes is not None and dtype.itemsize != item_bytes
    ):
        needed = _TORCH_VERSION_OF_DTYPE.get(name)
        raise UnsupportedFormat(
            f"loading a value of dtype `torch.{name}`",
            f"torch {torch.__version__} does not have it",
            f"install torch {needed} or newer" if needed else "install the torch that saved it",
        )
    return dtype


def import_torch(what: str) -> Any:
    """Return torch, for values that need it; ``what`` names the operation in the error."""
    try:
        import torch  # noqa: PLC0415  (users of numpy alone need no torch)
    except ImportError as error:
        raise UnsupportedFormat(
            what, "torch is not installed", "install it: `pip install torch`"
        ) from error
    return torch


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]
