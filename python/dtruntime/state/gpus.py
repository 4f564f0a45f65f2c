"""Tensors on GPUs: when they are copied, and what keeps the training from changing them before.

Each save uses one of three modes (``consistency=``):

``strict``           returns once everything has been copied.
``overlap``          returns at once; copies run during forward and backward, and the optimizers'
                     next step waits for them, on the GPU. What the optimizers do not update
                     (buffers, averages, frozen parameters) is cloned on the GPU first.
``device-snapshot``  clones everything on the GPU, returns, and copies from the clones.

Always holds: a tensor in host memory is copied before a save returns, whatever the mode; a tensor
whose memory is copied later is kept alive until then. If a mode is not available, the save is
strict, which is logged once.
"""

from __future__ import annotations

import functools
import importlib
import logging
import sys
import weakref
from typing import TYPE_CHECKING, Any, NamedTuple

from dtruntime import _native, settings
from dtruntime.errors import AcceleratorError, InvalidArgument
from dtruntime.state import sharded_tensors

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

MODES = ("strict", "overlap", "device-snapshot")
"""The consistency modes of saves."""

_logger = logging.getLogger("dtruntime")


class GpuPlacement(NamedTuple):
    """The GPU of a storage, and whether it is cloned there first."""

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
        """By device: the current stream, of every device that the state is on."""
        self._updated = _storages_of(optimizers) if mode == "overlap" else frozenset()
        self._renormalized: set[int] = set()
        self._hold: Hold | None = None

    @property
    def copies_in_background(self) -> bool:
        """Whether copies continue after the save has returned."""
        return bool(self.streams) and self.mode != "strict"

    def note_module(self, module: Any) -> None:
        """Note the parameters that a module of the state changes in forward, not only in a step.

        Embeddings with ``max_norm`` renormalize the rows that they look up.
        """
        nn = sys.modules["torch"].nn if self.mode == "overlap" else None
        if nn is None or not isinstance(module, nn.Module):
            return
        for part in module.modules():
            if isinstance(part, (nn.Embedding, nn.EmbeddingBag)) and part.max_norm is not None:
                weight = sharded_tensors.local_of(part.weight)
                self._renormalized.add(weight.untyped_storage()._cdata)  # noqa: SLF001

    def place(self, storage: Any) -> GpuPlacement | None:
        """Return how a torch storage is copied; None if torch copies it to host memory."""
        device = storage.device
        if device.type != "cuda" or not are_usable():
            return None
        if device.index not in self.streams:
            self.streams[device.index] = current_stream(device.index)
        if self.mode == "overlap":
            number = storage._cdata  # noqa: SLF001
            is_held = number in self._updated and number not in self._renormalized
            return GpuPlacement(device.index, is_cloned=not is_held)
        return GpuPlacement(device.index, self.mode == "device-snapshot")

    def arm(self) -> None:
        """Make the optimizers' next steps wait for the copies, before the first one starts."""
        if self.mode == "overlap" and self.streams:
            self._hold = Hold([*self.streams])
            for optimizer in self.optimizers:
                _gate_of(optimizer).add(self._hold)

    def guard(self, native: _native.SaveHandle) -> None:
        """Set the save whose copies the next steps wait for."""
        if self._hold is not None:
            self._hold.native = native

    def disarm(self) -> None:
        """Release the next steps: there is nothing to wait for."""
        if self._hold is not None:
            self._hold.native = None


class Hold:
    """Copies from GPUs that something waits for before it changes the tensors."""

    def __init__(self, ordinals: list[int]) -> None:
        self.native: _native.SaveHandle | None = None
        self._ordinals = ordinals

    def is_over(self) -> bool:
        """Return whether the save has ended and none of its copies are in progress."""
        return self.native is not None and self.native.done() and self.native.wait_captured(0)

    def hold_streams(self) -> None:
        """Make later work of the current streams wait for the copies.

        A stream that is being captured into a CUDA graph cannot wait: this thread waits instead, so
        that everything has been copied before a replay.
        """
        if self.native is None:
            return
        if is_capturing():
            self.native.wait_captured()
        else:
            self.native.precede(current_streams(self._ordinals))


class _Gate:
    """What an optimizer's next step waits for. Never unregistered: torch iterates over hooks."""

    def __init__(self) -> None:
        self.pending: list[Hold] = []

    def add(self, hold: Hold) -> None:
        """Add a hold, and drop those that are over."""
        self.pending = [*(earlier for earlier in self.pending if not earlier.is_over()), hold]

    def __call__(self, *_: object) -> None:
        while self.pending:
            self.pending[0].hold_streams()  # if it raises, it also holds the retried step
            del self.pending[0]


_gates: weakref.WeakKeyDictionary[Any, _Gate] = weakref.WeakKeyDictionary()
_captured: weakref.WeakSet[Any] = weakref.WeakSet()
"""Optimizers with a step that was captured into a CUDA graph: replays run no hooks."""


def _gate_of(optimizer: Any) -> _Gate:
    gate = _gates.get(optimizer)
    if gate is None:
        gate = _Gate()
        try:
            optimizer.register_step_pre_hook(gate)
        except AttributeError as error:  # a wrapper that was not set up as an optimizer is
            raise InvalidArgument(
                f"`optimizer` = a `{type(optimizer).__name__}`",
                f"its next step cannot be made to wait: {error}",
                "pass the `torch.optim.Optimizer` that it wraps",
            ) from error
        _gates[optimizer] = gate
    return gate


def watch_captures() -> None:
    """Record, from now on, the optimizers with a step that is captured into a CUDA graph."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.backends.cuda.is_built():
        _watch_steps()


@functools.cache
def _watch_steps() -> None:
    """Register a hook for every step of every optimizer, once per process."""
    # By its module name: torch removes it from the namespace of `torch.optim`.
    optimizers = importlib.import_module("torch.optim.optimizer")
    optimizers.register_optimizer_step_pre_hook(_note_capture)


def _note_capture(optimizer: Any, *_: object) -> None:
    # A compiler traces hooks; this one must stay out of the traced graph.
    if not sys.modules["torch"].compiler.is_compiling() and is_capturing():
        _captured.add(optimizer)


def is_capturing() -> bool:
    """Return whether the calling thread's current stream is captured into a CUDA graph."""
    cuda = sys.modules["torch"].cuda
    # Checked first: without a driver the other call raises.
    return bool(cuda.is_initialized() and cuda.is_current_stream_capturing())


def _storages_of(optimizers: Iterable[Any]) -> frozenset[int]:
    """Return the storages that only steps of these optimizers change, in all of their bytes.

    A listed parameter without ``requires_grad`` does not count: no step changes it, so other code
    may, without waiting for a step; for example an average that is updated in forward.
    """
    covered: dict[int, set[tuple[int, int]]] = {}
    storages = {}
    for tensor in map(sharded_tensors.local_of, _updated_by(optimizers)):
        if _is_dense(tensor):
            storage = tensor.untyped_storage()
            start = tensor.storage_offset() * tensor.itemsize
            end = start + tensor.numel() * tensor.itemsize
            covered.setdefault(storage._cdata, set()).add((start, end))  # noqa: SLF001
            storages[storage._cdata] = storage  # noqa: SLF001
    return frozenset(
        number for number, parts in covered.items() if _cover(parts, storages[number].nbytes())
    )


def _updated_by(optimizers: Iterable[Any]) -> Iterator[Any]:
    """Return the tensors that steps of these optimizers change."""
    torch = sys.modules["torch"]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            yield from (one for one in group["params"] if one.requires_grad)
        for key, state in optimizer.state.items():
            if getattr(key, "requires_grad", True):
                yield from (value for value in state.values() if isinstance(value, torch.Tensor))


def _is_dense(tensor: Any) -> bool:
    """Return whether a tensor is contiguous, in any order of its dimensions."""
    dimensions = sorted(zip(tensor.stride(), tensor.shape, strict=True), reverse=True)
    strides, sizes = zip(*dimensions, strict=True) if dimensions else ((), ())
    return sharded_tensors.is_contiguous(sizes, strides)


def _cover(parts: Iterable[tuple[int, int]], count: int) -> bool:
    """Return whether parts cover all bytes up to ``count``.

    >>> _cover({(0, 4), (4, 9)}, 9), _cover({(0, 4), (5, 9)}, 9)
    (True, False)
    """
    reached = 0
    for start, end in sorted(parts):
        if start > reached:
            return False
        reached = max(reached, end)
    return reached >= count


def have_room(needed: Mapping[Any, int]) -> bool:
    """Return whether GPUs have this many bytes each available, including torch's cache."""
    for device, count in needed.items():
        cuda = sys.modules["torch"].cuda
        free, _ = cuda.mem_get_info(device)
        cached = cuda.memory_reserved(device) - cuda.memory_allocated(device)
        if count > free + cached:
            return False
    return True


def memory_at(device: Any, address: int, count: int) -> tuple[int, ...]:
    """Return memory as the engine reads into it: address and bytes, after a GPU's number."""
    return (device.index, address, count) if device.type == "cuda" else (address, count)


def current_stream(ordinal: int) -> int:
    """Return the handle of the calling thread's current stream on a GPU."""
    stream: int = sys.modules["torch"].cuda.current_stream(ordinal).cuda_stream
    return stream


def current_streams(ordinals: Iterable[int]) -> list[tuple[int, int]]:
    """Return device and stream handle, of the calling thread's current streams on GPUs."""
    return [(ordinal, current_stream(ordinal)) for ordinal in ordinals]


@functools.cache
def are_usable() -> bool:
    """Return whether GPUs can be copied from without torch; if not, warn once."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.version.hip is not None:
        # NVIDIA's driver may be installed as well, but torch's addresses and streams are not its.
        _warn_slow("PyTorch was built for AMD's GPUs, and only NVIDIA's can be copied from")
        return False
    try:
        return _native.cuda_devices() > 0
    except AcceleratorError as error:
        _warn_slow(error)
        return False


def _warn_slow(why: object) -> None:
    _logger.warning("tensors on GPUs are copied by torch, which is slower: %s", why)


def choose(consistency: str, optimizer: Any) -> Consistency:
    """Return how a save treats the GPUs, from the caller's arguments.

    Raises:
        InvalidArgument: There is no such mode, or ``overlap`` lacks the optimizers.

    """
    settings.choice("consistency", consistency, MODES)
    if consistency != "overlap":
        return Consistency(consistency)
    watch_captures()
    optimizers = list(optimizer) if isinstance(optimizer, (list, tuple)) else [optimizer]
    if not optimizers or not all(hasattr(one, "register_step_pre_hook") for one in optimizers):
        raise InvalidArgument(
            f"`consistency` = 'overlap' with `optimizer` = {optimizer!r}",
            "the next step of every optimizer that changes the state has to wait for the copies",
            "pass `optimizer=`, a `torch.optim.Optimizer` or a list of them",
        )
    captured = any(group.get("capturable") for one in optimizers for group in one.param_groups)
    if captured:
        _warn_once("steps of a `capturable` optimizer may be replayed without hooks")
        return Consistency("strict")
    if any(one in _captured for one in optimizers):
        _warn_once("a step of the optimizer was captured into a CUDA graph: replays run no hooks")
        return Consistency("strict")
    return Consistency("overlap", optimizers)


def fall_back(consistency: Consistency, error: AcceleratorError) -> Consistency:
    """Return the strict mode, after a GPU refused a clone.

    Raises:
        AcceleratorError: There is nothing to fall back to.

    """
    if consistency.mode == "strict":
        raise error
    _warn_once(error.summary)
    return Consistency("strict")


@functools.cache
def _warn_once(why: str) -> None:
    _logger.warning("saves are strict: %s", why)
