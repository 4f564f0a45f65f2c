"""Flattening a training state into a list of nodes; ``tree`` rebuilds it.

Always holds: what is loaded equals what was saved, by type and by bits; nothing is converted
silently, and a value for which this is impossible is an error that names its key path. No code is
stored, and none is run on loading except the constructors of the types below.

Supported: dict, OrderedDict (with a module's ``_metadata``), Counter, list, tuple, None, bool, int
of any size, float, complex, str, bytes, numpy scalars, arrays and dtypes, torch tensors,
parameters, dtypes, devices and sizes. An object with ``state_dict()`` is saved as what that
returns. Of a ``DTensor``, this rank's part is saved, with its position. A tensor or array that
occurs several times is loaded as one object; containers are loaded once per occurrence.
"""

from __future__ import annotations

import contextlib
import gc
import sys
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dtruntime.errors import UnsupportedValue
from dtruntime.state import sharded_tensors
from dtruntime.state.tensors import (
    TORCH,
    TORCH_PARAMETER,
    StorageRecord,
    TensorRecord,
    TensorTable,
    numpy_dtype_name,
)
from dtruntime.state.tree import (
    DICTS,
    TAG_BOOL,
    TAG_BYTES,
    TAG_COMPLEX,
    TAG_DICT,
    TAG_FLOAT,
    TAG_INT,
    TAG_LIST,
    TAG_NONE,
    TAG_NUMPY_DTYPE,
    TAG_NUMPY_SCALAR,
    TAG_STR,
    TAG_TENSOR,
    TAG_TORCH_DEVICE,
    TAG_TORCH_DTYPE,
    TAG_TORCH_SIZE,
    TAG_TUPLE,
)
from dtruntime.state.unsupported import (
    Refusals,
    display,
    is_unicode,
    name_of,
    why_unsupported,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from dtruntime.saving.replication import Replication
    from dtruntime.state.gpus import Consistency
    from dtruntime.state.tree import Node

DEPTH_MAX = 128
"""Deepest nesting of containers."""
_KEY_TYPES = (str, int, bool, float, bytes, type(None))


class FlatState(NamedTuple):
    """A flattened state. ``table`` keeps every tensor's memory alive.

    ``replicated`` are the topmost nodes of the replicated entries.
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
    """Flatten a state.

    Args:
        state: The state.
        replication: Finds the replicated entries, of which only this rank's part is read.
        consistency: How tensors on GPUs are treated. Default: torch copies them to the host.
        world_size: Ranks that save together, each its parts of sharded tensors.

    Raises:
        UnsupportedValue: Values cannot be stored; the message names the key paths of the first.
        InvalidArgument: A glob of ``replication`` matches nothing.

    >>> flatten({"epoch": 3, "lr": [0.1]}).nodes
    [(13, (2, 0, False)), (2, 3, 'epoch'), (14, 1, 'lr'), (3, 0.1)]

    """
    flattener = _Flattener(world_size, consistency)
    with collector_paused():
        flattener.walk(state)
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
    """Return what saving ``state`` needs, without copying anything.

    Returns:
        The bytes of tensor memory that it would write, and the GPUs that it would copy from.

    """
    flattener = _Flattener(world_size)
    with collector_paused():
        flattener.walk(state)
    sizes, gpus = flattener.table.sizes(), flattener.table.gpus()
    if replication is None:
        return sum(sizes), gpus
    table = flattener.table
    shared = replication.of(flattener.nodes, table.storages(), sizes, table.slices())
    parts = (shared.part(storage) or (0, size) for storage, size in enumerate(sizes))
    return sum(end - start for start, end in parts), gpus


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """Pause the cyclic garbage collector while many records that all stay alive are created.

    It would traverse torch's whole heap, at a higher cost than the walk itself.
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

    def __init__(self, world_size: int, consistency: Consistency | None = None) -> None:
        self._consistency = consistency
        self.nodes: list[Node] = []
        self.table = TensorTable()
        self._world_size = world_size
        self._path: list[Any] = []
        self._open_containers: set[int] = set()
        self._is_endless = False
        self._refusals = Refusals()
        self._handlers: dict[type, Callable[[Any], tuple[int, Any]]] = {
            type(None): lambda _: (TAG_NONE, None),
            bool: lambda value: (TAG_BOOL, value),
            int: lambda value: (TAG_INT, value),
            float: lambda value: (TAG_FLOAT, value),
            complex: lambda value: (TAG_COMPLEX, value),
            bytes: lambda value: (TAG_BYTES, value),
            str: self._str,
            np.ndarray: lambda array: (TAG_TENSOR, self.table.add_numpy(array, self._where)),
            sharded_tensors.Piece: lambda piece: (
                TAG_TENSOR,
                self.table.add_piece(piece, self._where),
            ),
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

    def walk(self, state: Any) -> None:
        """Append the nodes of a state.

        Raises:
            UnsupportedValue: Values in it cannot be stored.

        """
        try:
            self._add(state, None, is_keyed=False)
        except UnsupportedValue as error:
            self._refusals.add(error)
        finally:
            self._handlers.clear()  # they refer to this, which keeps the state's memory alive
        self._refusals.check()

    def _add(self, value: Any, key: Any, *, is_keyed: bool) -> None:
        """Append the nodes of ``value``, which is under ``key`` of a dict if ``is_keyed``."""
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
        if value.dtype.str[1:] in ("U0", "S0"):  # numpy would return a nonempty `tobytes()`
            return value.dtype.str, b""
        return numpy_dtype_name(value.dtype, self._where), value.tobytes()

    def _stateful(self, value: Any, key: Any, *, is_keyed: bool) -> None:
        method = None if isinstance(value, type) else getattr(value, "state_dict", None)
        if not callable(method):
            raise self._unsupported(value)
        if self._consistency is not None:
            self._consistency.note_module(value)
        with self._inside(value):
            self._add(method(), key, is_keyed=is_keyed)

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
        try:
            self._add(child, key, is_keyed=is_keyed)
        except UnsupportedValue as error:
            if self._is_endless:
                raise
            self._refusals.add(error)  # the walk continues, to find the others
        self._path.pop()

    def _inside(self, container: Any) -> _Inside:
        if id(container) in self._open_containers:
            self._is_endless = True  # every path through a graph could take forever
            raise UnsupportedValue(
                f"saving `{self._where()}`",
                f"this `{name_of(type(container))}` contains itself",
                "break the cycle: save each part once and link them again after loading",
            )
        if len(self._open_containers) >= DEPTH_MAX:
            self._is_endless = True
            raise UnsupportedValue(
                f"saving `{self._where()}`",
                f"containers are nested deeper than {DEPTH_MAX}",
                "save a flatter structure",
            )
        return _Inside(self._open_containers, id(container))

    def _check_key(self, key: Any) -> None:
        kind = type(key)
        if kind is str:
            if not key.isascii() and not is_unicode(key):
                self._refuse_key(key, "a string with lone surrogates is not valid text")
        elif kind not in _KEY_TYPES:
            self._refuse_key(key, f"a key of type `{name_of(kind)}` cannot be stored")

    def _str(self, value: str) -> tuple[int, str]:
        if not value.isascii() and not is_unicode(value):
            raise UnsupportedValue(
                f"saving `{self._where()}`",
                "a string with lone surrogates is not valid text",
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

    def _refuse_key(self, key: Any, why: str) -> None:
        hint = "use str, int, bool, float, bytes or None as keys"
        if isinstance(key, (str, int, np.generic)):
            hint += "; convert it, for example with `str(key)` or `int(key)`"
        what = f"saving `{self._where()}`, key `{key!r}`"
        self._refusals.add(UnsupportedValue(what, why, hint))

    def _unsupported(self, value: Any) -> UnsupportedValue:
        why, hint = why_unsupported(value)
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
