"""A training state as a flat list of nodes, and back.

Always holds: what comes back equals what went in, by type and by bits; nothing is converted
silently, and a value that cannot be kept so is an error that names its key path. No code is stored
and none is run on loading, beyond the constructors of the types below.

Kept: dict, OrderedDict (with a module's ``_metadata``), Counter, list, tuple, None, bool, int of
any size, float, complex, str, bytes, numpy scalars, arrays and dtypes, torch tensors, parameters,
dtypes, devices and sizes. An object with ``state_dict()`` stands for what that returns. Of a
``DTensor``, this rank's part is kept, with where it stands. A tensor or an array that stands at
several places comes back as one object; containers come back one per place.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import gc
import os
import random
import sys
from collections import Counter, OrderedDict
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dtruntime import sharded_tensors
from dtruntime.errors import UnsupportedValue
from dtruntime.tensors import (
    TORCH,
    TORCH_PARAMETER,
    StorageRecord,
    TensorRecord,
    TensorTable,
    import_torch,
    numpy_dtype,
    numpy_dtype_name,
    torch_dtype,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from dtruntime.gpus import Consistency
    from dtruntime.replication import Replication

DICTS = (dict, OrderedDict, Counter)
"""Types of dicts, as the tree numbers them."""

DEPTH_MAX = 128
"""Deepest nesting of containers."""

# Tags of nodes; python/src/tree.rs numbers them alike.
TAG_NONE = 0
TAG_BOOL = 1
TAG_INT = 2
TAG_FLOAT = 3
TAG_COMPLEX = 4
TAG_STR = 5
TAG_BYTES = 6
TAG_TENSOR = 7
TAG_NUMPY_SCALAR = 8
TAG_TORCH_DTYPE = 9
TAG_TORCH_DEVICE = 10
TAG_TORCH_SIZE = 11
TAG_NUMPY_DTYPE = 12
TAG_DICT = 13
TAG_LIST = 14
TAG_TUPLE = 15
TAG_CONTAINERS = TAG_DICT

Node = tuple[int, Any] | tuple[int, Any, Any]
"""``(tag, payload)``, and the key as a third item for children of a dict."""


class FlatState(NamedTuple):
    """A state, taken apart. ``table`` keeps every tensor's memory alive.

    ``replicated`` are the topmost nodes of what all ranks save alike.
    """

    nodes: list[Node]
    tensors: list[TensorRecord]
    storages: list[StorageRecord]
    replicated: list[int]
    table: TensorTable


def flatten(
    state: Any,
    replication: Replication | None = None,
    consistency: Consistency | None = None,
    world_size: int = 1,
) -> FlatState:
    """Take a state apart.

    Args:
        state: The state.
        replication: Finds what all ranks save alike, of which only this rank's part is read.
        consistency: How tensors on GPUs are treated. Default: torch copies them to the host.
        world_size: Ranks that save together, of which each gives its parts of sharded tensors.

    Raises:
        UnsupportedValue: A value cannot be kept; the message names its key path.
        InvalidArgument: Nothing is there that all ranks should save alike.

    >>> flatten({"epoch": 3, "lr": [0.1]}).nodes
    [(13, (2, 0, False)), (2, 3, 'epoch'), (14, 1, 'lr'), (3, 0.1)]

    """
    flattener = _Flattener(world_size)
    with _collector_paused():
        flattener.add(state, None, is_keyed=False)
        nodes, table = flattener.nodes, flattener.table
        if replication is None:
            return FlatState(nodes, *table.finish(consistency=consistency), [], table)
        table.lay_out()
        shared = replication.of(nodes, table.storages(), table.sizes(), table.slices())
        is_unread = lambda storage: shared.part(storage) == (0, 0)  # noqa: E731
        tensors, storages = table.finish(is_unread, consistency)
        return FlatState(nodes, tensors, storages, shared.nodes, table)


def needs_of(
    state: Any, replication: Replication | None = None, world_size: int = 1
) -> tuple[int, list[int]]:
    """Give what saving ``state`` needs; copies nothing.

    Returns:
        The bytes of tensor memory that it would write, and the GPUs that it would copy from.

    """
    flattener = _Flattener(world_size)
    with _collector_paused():
        flattener.add(state, None, is_keyed=False)
    sizes, gpus = flattener.table.sizes(), flattener.table.gpus()
    if replication is None:
        return sum(sizes), gpus
    table = flattener.table
    shared = replication.of(flattener.nodes, table.storages(), sizes, table.slices())
    parts = (shared.part(storage) or (0, size) for storage, size in enumerate(sizes))
    return sum(end - start for start, end in parts), gpus


@contextlib.contextmanager
def _collector_paused() -> Iterator[None]:
    """Keep the cyclic collector out of a burst of records that all stay alive.

    Each burst would make it search torch's whole heap, for more than the walk itself costs.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class _Flattener:
    """One walk over one state."""

    def __init__(self, world_size: int) -> None:
        self.nodes: list[Node] = []
        self.table = TensorTable()
        self._world_size = world_size
        self._path: list[Any] = []
        self._open_containers: set[int] = set()
        self._handlers: dict[type, Callable[[Any], tuple[int, Any]]] = {
            type(None): lambda _: (TAG_NONE, None),
            bool: lambda value: (TAG_BOOL, value),
            int: lambda value: (TAG_INT, value),
            float: lambda value: (TAG_FLOAT, value),
            complex: lambda value: (TAG_COMPLEX, value),
            bytes: lambda value: (TAG_BYTES, value),
            str: self._str,
            np.ndarray: lambda array: (TAG_TENSOR, self.table.add_numpy(array, self._where)),
        }
        torch = sys.modules.get("torch")
        if torch is not None:
            self._handlers |= {
                torch.Tensor: self._tensor,
                torch.nn.Parameter: self._parameter,
                torch.dtype: lambda value: (TAG_TORCH_DTYPE, str(value).removeprefix("torch.")),
                torch.device: lambda value: (TAG_TORCH_DEVICE, str(value)),
                torch.Size: lambda value: (TAG_TORCH_SIZE, tuple(value)),
            }
        if (sharded := sharded_tensors.sharded_type()) is not None:
            self._handlers[sharded] = self._sharded

    def add(self, value: Any, key: Any, *, is_keyed: bool) -> None:
        """Append the nodes of ``value``, which stands under ``key`` of a dict if ``is_keyed``."""
        kind = type(value)
        handler = self._handlers.get(kind)
        if handler is not None:
            tag, payload = handler(value)
            self.nodes.append((tag, payload, key) if is_keyed else (tag, payload))
        elif kind in DICTS:
            self._dict(value, key, is_keyed=is_keyed)
        elif kind is list or kind is tuple:
            self._sequence(value, key, is_keyed=is_keyed)
        elif isinstance(value, np.generic):
            payload = self._numpy_scalar(value)
            self.nodes.append(
                (TAG_NUMPY_SCALAR, payload, key) if is_keyed else (TAG_NUMPY_SCALAR, payload)
            )
        elif isinstance(value, np.dtype):
            name = numpy_dtype_name(value, self._where)
            self.nodes.append((TAG_NUMPY_DTYPE, name, key) if is_keyed else (TAG_NUMPY_DTYPE, name))
        else:
            self._stateful(value, key, is_keyed=is_keyed)

    def _numpy_scalar(self, value: Any) -> tuple[str, bytes]:
        if value.dtype.str[1:] in ("U0", "S0"):  # of which numpy would give one byte
            return value.dtype.str, b""
        return numpy_dtype_name(value.dtype, self._where), value.tobytes()

    def _stateful(self, value: Any, key: Any, *, is_keyed: bool) -> None:
        method = None if isinstance(value, type) else getattr(value, "state_dict", None)
        if not callable(method):
            raise self._unsupported(value)
        with self._inside(value):
            self.add(method(), key, is_keyed=is_keyed)

    def _dict(self, value: dict[Any, Any], key: Any, *, is_keyed: bool) -> None:
        kind = DICTS.index(type(value))
        attributes = vars(value) if kind else {}
        has_metadata = "_metadata" in attributes
        has_metadata &= type(value) is OrderedDict
        if len(attributes) > has_metadata:
            extra = next(name for name in attributes if not has_metadata or name != "_metadata")
            name = type(value).__name__
            raise UnsupportedValue(
                f"saving `{self._where()}`",
                f"this {name} has an attribute `{extra}`, which would be lost",
                f"put it under a key, or save a copy: `{name}(value)`",
            )
        payload = (len(value), kind, has_metadata)
        self.nodes.append((TAG_DICT, payload, key) if is_keyed else (TAG_DICT, payload))
        with self._inside(value):
            if has_metadata:
                self._child("_metadata", attributes["_metadata"], is_keyed=False)
            for child_key, child in value.items():
                self._check_key(child_key)
                self._child(child_key, child, is_keyed=True)

    def _sequence(self, value: list[Any] | tuple[Any, ...], key: Any, *, is_keyed: bool) -> None:
        tag = TAG_LIST if type(value) is list else TAG_TUPLE
        self.nodes.append((tag, len(value), key) if is_keyed else (tag, len(value)))
        with self._inside(value):
            for index, child in enumerate(value):
                self._child(index, child, is_keyed=False)

    def _child(self, key: Any, child: Any, *, is_keyed: bool) -> None:
        self._path.append(key)
        self.add(child, key, is_keyed=is_keyed)
        self._path.pop()

    def _inside(self, container: Any) -> _Inside:
        if id(container) in self._open_containers:
            raise UnsupportedValue(
                f"saving `{self._where()}`",
                f"this `{_name_of(type(container))}` contains itself",
                "break the cycle: save each part once and link them again after loading",
            )
        if len(self._open_containers) >= DEPTH_MAX:
            raise UnsupportedValue(
                f"saving `{self._where()}`",
                f"containers are nested deeper than {DEPTH_MAX}",
                "save a flatter structure",
            )
        return _Inside(self._open_containers, id(container))

    def _check_key(self, key: Any) -> None:
        kind = type(key)
        if kind is str:
            if not key.isascii() and not _is_unicode(key):
                raise self._unsupported_key(key, "a string with lone surrogates is not text")
        elif kind not in _KEY_TYPES:
            raise self._unsupported_key(key, f"a key of type `{_name_of(kind)}` cannot be stored")

    def _str(self, value: str) -> tuple[int, str]:
        if not value.isascii() and not _is_unicode(value):
            raise UnsupportedValue(
                f"saving `{self._where()}`",
                "a string with lone surrogates is not text",
                'save bytes: `value.encode("utf-8", "surrogatepass")`',
            )
        return TAG_STR, value

    def _tensor(self, tensor: Any) -> tuple[int, int]:
        return TAG_TENSOR, self.table.add_torch(tensor, TORCH, self._where)

    def _parameter(self, tensor: Any) -> tuple[int, int]:
        return TAG_TENSOR, self.table.add_torch(tensor, TORCH_PARAMETER, self._where)

    def _sharded(self, tensor: Any) -> tuple[int, int]:
        is_parameter = isinstance(tensor, sys.modules["torch"].nn.Parameter)
        kind = TORCH_PARAMETER if is_parameter else TORCH
        return TAG_TENSOR, self.table.add_sharded(tensor, kind, self._world_size, self._where)

    def _where(self) -> str:
        return display(self._path)

    def _unsupported_key(self, key: Any, why: str) -> UnsupportedValue:
        hint = "use str, int, bool, float, bytes or None as keys"
        if isinstance(key, (str, int, np.generic)):
            hint += "; convert it, for example with `str(key)` or `int(key)`"
        return UnsupportedValue(f"saving `{self._where()}`, key `{key!r}`", why, hint)

    def _unsupported(self, value: Any) -> UnsupportedValue:
        why, hint = _why_unsupported(value)
        return UnsupportedValue(f"saving `{self._where()}`", why, hint)


class _Inside:
    """Marks a container as open while its children are walked."""

    __slots__ = ("_identity", "_open")

    def __init__(self, opened: set[int], identity: int) -> None:
        self._open = opened
        self._identity = identity

    def __enter__(self) -> None:
        self._open.add(self._identity)

    def __exit__(self, *_: object) -> None:
        self._open.discard(self._identity)


_PATH_SHOWN_MAX = 16
_KEY_TYPES = (str, int, bool, float, bytes, type(None))


def display(path: Sequence[Any]) -> str:
    """Write a key path as the expression that reaches it from ``state``.

    >>> display(["model", "layers", 3])
    'state["model"]["layers"][3]'
    """
    if len(path) > _PATH_SHOWN_MAX:
        return f"{display(path[: _PATH_SHOWN_MAX - 4])}[...]{display(path[-4:])[len('state') :]}"
    return "state" + "".join(
        '["' + key.encode("utf-8", "backslashreplace").decode().replace('"', '\\"') + '"]'
        if isinstance(key, str)
        else f"[{key!r}]"
        for key in path
    )


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _name_of(kind: type) -> str:
    module = kind.__module__
    return kind.__qualname__ if module == "builtins" else f"{module}.{kind.__qualname__}"


_GENERIC_HINT = (
    "convert it to plain values, or give its class `state_dict()` and `load_state_dict()`"
)
_PLAIN_TYPES = (bool, int, float, complex, str, bytes, list, dict, tuple)


def _why_unsupported(value: Any) -> tuple[str, str]:
    """Say why a value cannot be stored, and how to convert it."""
    name = _name_of(type(value))
    if isinstance(value, type) or callable(value):
        what = "a class" if isinstance(value, type) else f"a `{name}`"
        return (
            f"{what} is code, not data",
            "save the plain values it needs, and rebuild it from them",
        )
    why = f"a value of type `{name}` cannot be stored"
    torch = sys.modules.get("torch")
    if torch is not None:
        if isinstance(value, torch.Tensor):
            return why, _tensor_subclass_hint(torch, value)
        if isinstance(value, torch.Generator):
            return why, "save `generator.get_state()`"
        if isinstance(value, (torch.UntypedStorage, torch.TypedStorage)):
            return why, "save a tensor that views it"
    return why, _conversion_hint(value)


def _tensor_subclass_hint(torch: Any, tensor: Any) -> str:
    name = type(tensor).__name__
    if name == "ShardedTensor":
        return "save DTensors: give FSDP a `device_mesh`, or shard with `fully_shard`"
    if name == "FakeTensor":
        return "it has a shape but no values: leave `FakeTensorMode` before making the state"
    if isinstance(tensor, torch.nn.parameter.UninitializedTensorMixin):
        return "it has no values yet: run the lazy module once, then save"
    if name == "NestedTensor":
        return "save its parts: `tensor.unbind()`"
    if name == "MaskedTensor":
        return "save `tensor.get_data()` and `tensor.get_mask()`"
    return "subclasses of tensors are not converted silently: `tensor.as_subclass(torch.Tensor)`"


def _conversion_hint(value: Any) -> str:  # noqa: C901, PLR0911, PLR0912  (a table of types)
    if isinstance(value, enum.Enum):
        return "save `value.value` or `value.name`"
    if isinstance(value, np.ma.MaskedArray):
        return "save its parts: `array.data` and `numpy.ma.getmaskarray(array)`"
    if isinstance(value, np.ndarray):
        return "subclasses of arrays are not converted silently: `numpy.asarray(array)`"
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return "save `value._asdict()` or `tuple(value)`"
    for plain in _PLAIN_TYPES:
        if isinstance(value, plain):
            return f"subclasses are not converted silently: `{plain.__name__}(value)`"
    if isinstance(value, (set, frozenset)):
        return "save `sorted(value)` or `list(value)`"
    if isinstance(value, (bytearray, memoryview)):
        return "save `bytes(value)`"
    if isinstance(value, os.PathLike):
        return "save `str(value)`"
    if dataclasses.is_dataclass(value):
        return "save `dataclasses.asdict(value)`"
    if isinstance(value, random.Random):
        return "save `value.getstate()`"
    if isinstance(value, np.random.Generator):
        return "save `value.bit_generator.state`"
    if isinstance(value, np.random.RandomState):
        return "save `value.get_state()`"
    return _GENERIC_HINT


class Tree:
    """Nodes of a loaded checkpoint with their extents, ready to be built in whole or in part."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        self.nodes = nodes
        self.ends = _ends_of(nodes)

    def children(self, index: int) -> Iterator[tuple[Any, int]]:
        """Give ``(key or position, node)`` of a container's children, without its metadata."""
        tag, payload = self.nodes[index][:2]
        child = index + 1
        if tag == TAG_DICT:
            count, _, has_metadata = payload
            if has_metadata:
                child = self.ends[child]
        else:
            count = payload
        for position in range(count):
            node = self.nodes[child]
            yield (node[2] if tag == TAG_DICT else position), child  # type: ignore[misc]
            child = self.ends[child]

    def is_container(self, index: int) -> bool:
        """Tell a dict, list or tuple from a leaf."""
        return self.nodes[index][0] >= TAG_CONTAINERS

    def tensors_below(self, index: int, keep: Sequence[bool] | None = None) -> list[int]:
        """Give the numbers of the tensors at and below a node, of kept nodes only."""
        return [
            self.nodes[position][1]
            for position in range(index, self.ends[index])
            if self.nodes[position][0] == TAG_TENSOR and (keep is None or keep[position])
        ]

    def build(
        self,
        index: int,
        tensor_at: Callable[[int], Any],
        keep: Sequence[bool] | None = None,
    ) -> Any:
        """Make the value at a node.

        Of a dict only kept entries are made; lists and tuples keep their length, with None in
        the places that are not kept.
        """
        tag, payload = self.nodes[index][:2]
        if tag == TAG_DICT:
            return self._build_dict(index, tensor_at, keep)
        if tag in (TAG_LIST, TAG_TUPLE):
            items = [
                self.build(child, tensor_at, keep) if keep is None or keep[child] else None
                for _, child in self.children(index)
            ]
            return items if tag == TAG_LIST else tuple(items)
        if tag == TAG_TENSOR:
            return tensor_at(payload)
        return _leaf(tag, payload)

    def _build_dict(
        self, index: int, tensor_at: Callable[[int], Any], keep: Sequence[bool] | None
    ) -> dict[Any, Any]:
        _, kind, has_metadata = self.nodes[index][1]
        made: dict[Any, Any] = DICTS[kind]()
        for key, child in self.children(index):
            if keep is None or keep[child]:
                made[key] = self.build(child, tensor_at, keep)
        if has_metadata:
            made._metadata = self.build(index + 1, tensor_at)  # type: ignore[attr-defined]  # noqa: SLF001
        return made


def _ends_of(nodes: Sequence[Node]) -> list[int]:
    """Give for each node the index after its last descendant."""
    ends = [0] * len(nodes)
    open_containers: list[list[int]] = []  # [index, children still to come]
    for index, node in enumerate(nodes):
        tag, payload = node[:2]
        count = 0
        if tag == TAG_DICT:
            count = payload[0] + payload[2]
        elif tag in (TAG_LIST, TAG_TUPLE):
            count = payload
        if count:
            open_containers.append([index, count])
            continue
        ends[index] = index + 1
        while open_containers:
            open_containers[-1][1] -= 1
            if open_containers[-1][1]:
                break
            ends[open_containers.pop()[0]] = index + 1
    return ends


def _leaf(tag: int, payload: Any) -> Any:
    if tag <= TAG_BYTES:
        return payload
    if tag == TAG_NUMPY_SCALAR:
        return _numpy_scalar(*payload)
    if tag == TAG_NUMPY_DTYPE:
        return numpy_dtype(payload)
    if tag == TAG_TORCH_DTYPE:
        return torch_dtype(payload)
    torch = import_torch("loading a torch value")
    return torch.device(payload) if tag == TAG_TORCH_DEVICE else torch.Size(payload)


def _numpy_scalar(name: str, data: bytes) -> Any:
    if not data and name[1:] in ("U0", "S0"):
        return np.str_() if name[1] == "U" else np.bytes_()
    dtype = numpy_dtype(name, len(data))
    # A bytearray, so that a void scalar, which views its buffer, stays writable.
    return np.frombuffer(bytearray(data), dtype)[0]
