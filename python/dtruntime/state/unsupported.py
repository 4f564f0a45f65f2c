"""Messages for values that cannot be stored, and how to convert them.

Always holds: nothing here decides what can be stored; a hint contains code that can be run as it
is.
"""

from __future__ import annotations

import dataclasses
import enum
import os
import random
import sys
from typing import TYPE_CHECKING, Any

import numpy as np

from dtruntime.errors import UnsupportedValue

if TYPE_CHECKING:
    from collections.abc import Sequence

_PATH_SHOWN_MAX = 16
_NAMED_MAX = 5
"""Values that an error names."""


class Refusals:
    """The values of one state that cannot be stored.

    Texts are kept, not exceptions: their tracebacks would keep the state's memory alive.
    """

    def __init__(self) -> None:
        self._first: list[tuple[str, str, str]] = []
        self._count = 0

    def add(self, error: UnsupportedValue) -> None:
        """Add a value, by the error that it causes alone."""
        self._count += 1
        if self._count <= _NAMED_MAX:
            self._first.append((error.what, error.why, error.hint))

    def check(self) -> None:
        """Raise one error for all values that were added, with the hint of the first."""
        if not self._first:
            return
        (what, why, hint), *others = self._first
        if others:
            named = (f"{what.removeprefix('saving ')}: {why}" for what, why, _ in others)
            why += "; also " + "; ".join(named)
        if self._count > _NAMED_MAX:
            why += f"; and {self._count - _NAMED_MAX} more"
        raise UnsupportedValue(what, why, hint)


def display(path: Sequence[Any]) -> str:
    """Return a key path as the Python expression that reaches it from ``state``.

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


def is_unicode(text: str) -> bool:
    """Return whether a string has no lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def name_of(kind: type) -> str:
    """Return a type's name, with its module unless it is a builtin."""
    module = kind.__module__
    return kind.__qualname__ if module == "builtins" else f"{module}.{kind.__qualname__}"


_GENERIC_HINT = (
    "convert it to plain values, or give its class `state_dict()` and `load_state_dict()`"
)
_PLAIN_TYPES = (bool, int, float, complex, str, bytes, list, dict, tuple)


def why_unsupported(value: Any) -> tuple[str, str]:
    """Return why a value cannot be stored, and how to convert it."""
    name = name_of(type(value))
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
        return "it has a shape but no values: leave `FakeTensorMode` before creating the state"
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
