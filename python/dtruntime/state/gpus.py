"""Tensors on GPUs: when they are copied, and what keeps the training from changing them before.

Three ways to be consistent (``consistency=``), of which each save takes one:

``strict``           returns when everything was copied.
``overlap``          returns at once; copies run beside forward and backward, and the optimizers'
                     next step waits for them, on the GPU. What the optimizers do not update
                     (buffers, averages, frozen parameters) is cloned on the GPU first.
``device-snapshot``  clones everything on the GPU, returns, and copies from the clones.

Always holds: a tensor in the host's memory is copied before a save returns, whatever the mode; a
tensor whose memory is copied later is kept alive until then. Where a mode cannot be had, the save
is strict, which is said once.
"""

from __future__ import annotations

import functools
import importlib
import logging
import sys
import weakref
from typing import TYPE_CHECKING, Any, NamedTuple

from dtruntime import _native
from dtruntime.errors import AcceleratorError, InvalidArgument
from dtruntime.state import sharded_tensors

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

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
        self._hold: Hold | None = None

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

    def arm(self) -> None:
        """Let the optimizers' next steps wait for the copies, before the first one is begun."""
        if self.mode == "overlap" and self.streams:
            self._hold = Hold([*self.streams])
            for optimizer in self.optimizers:
                _gate_of(optimizer).add(self._hold)

    def guard(self, native: _native.SaveHandle) -> None:
        """Name the save whose copies the next steps wait for."""
        if self._hold is not None:
            self._hold.native = native

    def disarm(self) -> None:
        """Let the next steps go: there is nothing to wait for."""
        if self._hold is not None:
            self._hold.native = None


class Hold:
    """Copies from GPUs that something waits for before it changes the tensors."""

    def __init__(self, ordinals: list[int]) -> None:
        self.native: _native.SaveHandle | None = None
        self._ordinals = ordinals

    def is_over(self) -> bool:
        """Tell whether the save has ended: nothing of it is copied any more."""
        return self.native is not None and self.native.done() and self.native.wait_captured(0)

    def hold_streams(self) -> None:
        """Let what the current streams are given from now on wait for the copies.

        A stream that is being captured into a CUDA graph cannot be made to: this thread waits then,
        so that a replay finds everything copied.
        """
        if self.native is None:
            return
        if is_capturing():
            self.native.wait_captured()
        else:
            self.native.precede(current_streams(self._ordinals))


class _Gate:
    """What an optimizer's next step waits for. Its hook stays: torch iterates over them."""

    def __init__(self) -> None:
        self.pending: list[Hold] = []

    def add(self, hold: Hold) -> None:
        """Take one more in; of those that are over nothing is left to wait for."""
        self.pending = [*(earlier for earlier in self.pending if not earlier.is_over()), hold]

    def __call__(self, *_: object) -> None:
        while self.pending:
            self.pending[0].hold_streams()  # one that fails holds the step that is tried again, too
            del self.pending[0]


_gates: weakref.WeakKeyDictionary[Any, _Gate] = weakref.WeakKeyDictionary()
_captured: weakref.WeakSet[Any] = weakref.WeakSet()
"""Optimizers of which a step was captured into a CUDA graph: its replays run no hooks."""


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
    """Note, from now on, the optimizers of which a step is captured into a CUDA graph."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.backends.cuda.is_built():
        _watch_steps()


@functools.cache
def _watch_steps() -> None:
    """Have every step of every optimizer looked at, once in a process."""
    # By its name: torch takes it off `torch.optim` again.
    optimizers = importlib.import_module("torch.optim.optimizer")
    optimizers.register_optimizer_step_pre_hook(_note_capture)


def _note_capture(optimizer: Any, *_: object) -> None:
    # A compiler traces hooks, and has nothing to do with what these are for.
    if not sys.modules["torch"].compiler.is_compiling() and is_capturing():
        _captured.add(optimizer)


def is_capturing() -> bool:
    """Tell whether the calling thread's current stream is captured into a CUDA graph."""
    cuda = sys.modules["torch"].cuda
    # Asked first: without a driver the other question is an error.
    return bool(cuda.is_initialized() and cuda.is_current_stream_capturing())


def _storages_of(optimizers: Iterable[Any]) -> frozenset[int]:
    """Give the storages that only steps of these optimizers change, all of their bytes.

    A parameter without ``requires_grad`` is none of theirs, though it is listed: no step changes
    it, so whatever does asks no optimizer, as an average does that forward keeps.
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
    """Give the tensors that steps of these optimizers change."""
    torch = sys.modules["torch"]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            yield from (one for one in group["params"] if one.requires_grad)
        for key, state in optimizer.state.items():
            if getattr(key, "requires_grad", True):
                yield from (value for value in state.values() if isinstance(value, torch.Tensor))


def _is_dense(tensor: Any) -> bool:
    """Tell whether items lie side by side, each once, in whichever order of the dimensions."""
    count = 1
    strides = zip(tensor.stride(), tensor.shape, strict=True)
    for stride, size in sorted(pair for pair in strides if pair[1] != 1):
        if stride != count:
            return False
        count *= size
    return True


def _cover(parts: Iterable[tuple[int, int]], count: int) -> bool:
    """Tell whether parts cover all bytes up to ``count``.

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
    """Tell whether GPUs have memory for so many bytes each, what torch keeps of it included."""
    for device, count in needed.items():
        cuda = sys.modules["torch"].cuda
        free, _ = cuda.mem_get_info(device)
        cached = cuda.memory_reserved(device) - cuda.memory_allocated(device)
        if count > free + cached:
            return False
    return True


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
    torch = sys.modules.get("torch")
    if torch is not None and torch.version.hip is not None:
        # NVIDIA's driver may be there besides; torch's addresses and streams are none of its.
        _say_slow("PyTorch was built for AMD's GPUs, and only NVIDIA's can be copied from")
        return False
    try:
        return _native.cuda_devices() > 0
    except AcceleratorError as error:
        _say_slow(error)
        return False


def _say_slow(why: object) -> None:
    _logger.warning("tensors on GPUs are copied by torch, which is slower: %s", why)


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
        _say_once("steps of a `capturable` optimizer may be replayed without hooks")
        return Consistency("strict")
    if any(one in _captured for one in optimizers):
        _say_once("a step of the optimizer was captured into a CUDA graph: replays run no hooks")
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
