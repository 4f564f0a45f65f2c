"""A state as a flat list of nodes: their meaning, and how values are built from them.

Always holds: a container precedes its contents; no code is run except the constructors of the types
below.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from typing import TYPE_CHECKING, Any

import numpy as np

from dtruntime.state.tensors import import_torch, numpy_dtype, torch_dtype

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

DICTS = (dict, OrderedDict, Counter)
"""Types of dicts, as the tree numbers them."""

# Tags of nodes; python/src/tree.rs has the same numbers.
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

TAG_TYPES = {
    TAG_NONE: "NoneType",
    TAG_BOOL: "bool",
    TAG_INT: "int",
    TAG_FLOAT: "float",
    TAG_COMPLEX: "complex",
    TAG_STR: "str",
    TAG_BYTES: "bytes",
    TAG_NUMPY_SCALAR: "numpy.generic",
    TAG_TORCH_DTYPE: "torch.dtype",
    TAG_TORCH_DEVICE: "torch.device",
    TAG_TORCH_SIZE: "torch.Size",
    TAG_NUMPY_DTYPE: "numpy.dtype",
    TAG_LIST: "list",
    TAG_TUPLE: "tuple",
}
"""The types of values, where the tag determines them, for messages."""

Node = tuple[int, Any] | tuple[int, Any, Any]
"""``(tag, payload)``, and the key as a third item for children of a dict."""


class Tree:
    """Nodes of a loaded checkpoint with their extents; can be built in whole or in part."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        self.nodes = nodes
        self.ends = _ends_of(nodes)

    def children(self, index: int) -> Iterator[tuple[Any, int]]:
        """Yield ``(key or position, node)`` of a container's children, without its metadata."""
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
        """Return whether a node is a dict, list or tuple."""
        return self.nodes[index][0] >= TAG_CONTAINERS

    def tensors_below(self, index: int, keep: Sequence[bool] | None = None) -> list[int]:
        """Return the numbers of the tensors at and below a node, only of kept nodes."""
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
        """Build the value at a node.

        A dict has only its kept entries; lists and tuples keep their length, with None for items
        that are not kept.
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
    """Return for each node the index one past its last descendant."""
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
