"""Tensors on GPUs: when they are copied, and what keeps the training from changing them before.

Three ways to be consistent (``consistency=``), of which each save takes one:

``strict``           returns when everything was copied.
``overlap``          returns at once; copies run beside forward and backward, and the optimizers'
                     next step waits for them, on the GPU. What the optimizers do not update
                     (buffers, averages) is cloned on the GPU first.
``device-snapshot``  clones everything on the GPU, returns, and copies from the clones.

Always holds: a tensor in the host's memory is copied before a save returns, whatever the mode; a
tensor whose memory is copied later is kept alive until then. Where a mode cannot be had, the save
is strict, which is said once.
"""

from __future__ import annotations

import functools
import logging
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

from dtruntime import _native
from dtruntime.errors import AcceleratorError, InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

MODES = ("strict", "overlap", "device-snapshot")
"""How a save of tensors on GPUs can be consistent."""

_logger = logging.getLogger("dtruntime")


class Place(NamedTuple):
    """Where a storage lies on a GPU, and whether it is cloned there first."""

    ordinal: int
    is_cloned: bool


class Consistency:
    """How one save treats the GPUs.

    Args:
        mode: One of ``MODES``.
        optimizers: For ``overlap``: those whose steps change the state.

    """

    def __init__(self, mode: str, optimizers: Sequence[Any] = ()) -> None:
        self.mode = mode
        self.optimizers = optimizers
        self.streams: dict[int, int] = {}
        """By device: the current stream, of every device that the state lies on."""
        self._updated = _storages_of(optimizers) if mode == "overlap" else frozenset()

    @property
    def goes_on_behind(self) -> bool:
        """Whether copies go on after the save has returned."""
        return bool(self.streams) and self.mode != "strict"

    def place(self, storage: Any) -> Place | None:
        """Take in a torch storage; None for one that is copied to the host's memory by torch."""
        device = storage.device
        if device.type != "cuda" or not are_usable():
            return None
        if device.index not in self.streams:
            self.streams[device.index] = current_stream(device.index)
        if self.mode == "overlap":
            return Place(device.index, storage._cdata not in self._updated)  # noqa: SLF001
        return Place(device.index, self.mode == "device-snapshot")

    def hold_updates(self, wait: Callable[[list[tuple[int, int]]], None]) -> None:
        """Let the optimizers' next steps wait: ``wait`` holds streams back."""
        if self.mode == "overlap" and self.streams:
            for optimizer in self.optimizers:
                _before_next_step(optimizer, lambda: wait(current_streams(self.streams)))


def _before_next_step(optimizer: Any, act: Callable[[], None]) -> None:
    def hook(*_: object) -> None:
        handle.remove()
        act()

    handle = optimizer.register_step_pre_hook(hook)


def _storages_of(optimizers: Iterable[Any]) -> frozenset[int]:
    """Give the storages that only steps of these optimizers change."""
    torch = sys.modules["torch"]
    tensors = []
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            tensors += group["params"]
        for state in optimizer.state.values():
            tensors += [value for value in state.values() if isinstance(value, torch.Tensor)]
    return frozenset(tensor.untyped_storage()._cdata for tensor in tensors)  # noqa: SLF001


def current_stream(ordinal: int) -> int:
    """Give the handle of the calling thread's current stream on a GPU."""
    stream: int = sys.modules["torch"].cuda.current_stream(ordinal).cuda_stream
    return stream


def current_streams(ordinals: Iterable[int]) -> list[tuple[int, int]]:
    """Give device and handle of the calling thread's current streams on GPUs."""
    return [(ordinal, current_stream(ordinal)) for ordinal in ordinals]


@functools.cache
def are_usable() -> bool:
    """Tell whether GPUs can be copied from without torch; if not, say so once."""
    try:
        return _native.cuda_devices() > 0
    except AcceleratorError as error:
        _logger.warning("tensors on GPUs are copied by torch, which is slower: %s", error)
        return False


def choose(consistency: str, optimizer: Any) -> Consistency:
    """Give how a save treats the GPUs, from what the caller asked for.

    Raises:
        InvalidArgument: There is no such mode, or ``overlap`` lacks the optimizers.

    """
    if consistency not in MODES:
        raise InvalidArgument(
            f"`consistency` = {consistency!r}",
            f"expected one of {', '.join(map(repr, MODES))}",
            "`strict` serves always; the others cost the training less on GPUs",
        )
    if consistency != "overlap":
        return Consistency(consistency)
    optimizers = list(optimizer) if isinstance(optimizer, (list, tuple)) else [optimizer]
    if not optimizers or not all(hasattr(one, "register_step_pre_hook") for one in optimizers):
        raise InvalidArgument(
            f"`consistency` = 'overlap' with `optimizer` = {optimizer!r}",
            "the next step of every optimizer that changes the state has to wait for the copies",
            "pass `optimizer=`, a `torch.optim.Optimizer` or a list of them",
        )
    captured = any(group.get("capturable") for one in optimizers for group in one.param_groups)
    if captured:
        _say_once("steps of a `capturable` optimizer may be replayed without hooks")
        return Consistency("strict")
    return Consistency("overlap", optimizers)


def fall_back(consistency: Consistency, error: AcceleratorError) -> Consistency:
    """Give the strict way after a GPU refused a clone.

    Raises:
        AcceleratorError: There is nothing to fall back to.

    """
    if consistency.mode == "strict":
        raise error
    _say_once(f"{error.what}: {error.why}")
    return Consistency("strict")


@functools.cache
def _say_once(why: str) -> None:
    _logger.warning("saves are strict: %s", why)
