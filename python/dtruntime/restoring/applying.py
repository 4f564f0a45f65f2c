"""Executing a restore plan: reads what it needs and changes the live state.

Always holds: if memory allows, everything is read and checked before anything is changed; otherwise
top-level entries are read and changed one after the other. On request, tensors are read straight
into live ones. A state that was changed in part is known to be a mixture.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtruntime.errors import CheckpointError, RestoreIncomplete, reason_of
from dtruntime.messages import listed
from dtruntime.state import gpus

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from dtruntime.loading.reader import Reader
    from dtruntime.loading.scratch import Scratch
    from dtruntime.restoring.plan import Action, RestorePlan
    from dtruntime.state.sharded_tensors import LivePart

_MEMINFO = Path("/proc/meminfo")
_CGROUP_MEMORY = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (
        Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
        Path("/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ),
)
"""Limit and usage of this process's control group, by version 2 and version 1 of the interface."""
_NAMED_MAX = 10
"""Entries that an error names."""
_MEMORY_SHARE = 0.8
"""Share of the available memory that may be used to check everything first."""


class Attempts:
    """What one call of ``restore`` did to the live state, over all checkpoints that it tried.

    Attributes:
        incomplete: Why the live state is a mixture, if it is one.

    """

    def __init__(self) -> None:
        self.incomplete: RestoreIncomplete | None = None
        self._applied: RestorePlan | None = None
        self._touched: dict[Any, str] = {}
        """What was changed so far, by ``RestorePlan.targets``."""
        self._kept: list[Any] = []  # keeps the ids in ``_touched`` valid

    def carry_out(
        self, plan: RestorePlan, reader: Reader, before_change: Callable[[], object]
    ) -> RestorePlan:
        """Execute one more plan with ``Application.run``, and return it."""
        application = Application(plan, reader)
        try:
            application.run(before_change)
        finally:
            self.incomplete = application.incomplete or self.incomplete
            self._kept += application.read_into
            self._touched |= {id(t): plan.written[id(t)] for t in application.read_into}
        self._applied = plan
        self._touched |= plan.targets()
        return plan

    def check_nothing_left(self, plan: RestorePlan) -> None:
        """Check that the last plan replaced everything that earlier attempts changed.

        Raises:
            RestoreIncomplete: It did not.

        """
        left = sorted(self._touched.keys() - plan.targets().keys(), key=self._touched.__getitem__)
        self.incomplete = None
        if left:
            names = listed([self._touched[target] for target in left], _NAMED_MAX)
            self.incomplete = RestoreIncomplete(
                f"restoring step {plan.step}",
                "a newer step had changed the live state before it turned out that it cannot be "
                f"loaded, and this one has nothing for {names}",
                "restore a step that has all of it, or initialize again what this one lacks",
            )
            raise self.incomplete

    def mixture(self, error: BaseException) -> RestoreIncomplete | None:
        """Return why the live state is a mixture after ``error``; None if it is not."""
        if self.incomplete is None and self._applied is not None:
            self.incomplete = RestoreIncomplete(
                f"restoring step {self._applied.step}",
                f"it was restored here, but not on every rank: {reason_of(error)}",
                "restore again, on all ranks, before using or saving the state",
            )
        return self.incomplete


class Application:
    """The execution of one plan.

    Attributes:
        incomplete: Why the live state is a mixture, once it is one.
        read_into: Live tensors that were read into, successfully or not.

    """

    def __init__(self, plan: RestorePlan, reader: Reader) -> None:
        self.read_into: list[Any] = []
        self.incomplete: RestoreIncomplete | None = None
        self._plan = plan
        self._reader = reader

    def run(self, before_change: Callable[[], object]) -> None:
        """Change the live state; ``before_change`` is called once, before the first change.

        Raises:
            RestoreIncomplete: It failed part-way.
            CheckpointError: It failed before anything was changed; or while reading into live
                tensors, which sets ``incomplete``: another checkpoint may be restored instead.

        """
        scratch, groups = self._find_memory()
        has_begun = is_reading = False
        doing = ""
        try:
            for actions in groups:
                doing = f"reading for {actions[0].where}" if actions else ""
                into = self._plan.read_into(actions)
                is_reading = bool(into)
                if is_reading and not has_begun:
                    before_change()
                    has_begun = True
                self.read_into += into.values()
                _note_changed(into.values())  # before reading, which may fail part-way
                tensors = self._read(actions, into, scratch)
                is_reading = False
                if not has_begun:
                    before_change()
                for action in actions:
                    has_begun = True
                    doing = f"entry {action.where}"
                    action.act(tensors)
                del tensors  # before the next group is read: there may be no memory for both
        except BaseException as error:
            if not has_begun:
                raise
            self.incomplete = RestoreIncomplete(
                f"restoring step {self._plan.step}",
                f"the live state was changed in part when this failed: {doing}: {reason_of(error)}",
                "restore again, from this step or another, before using or saving the state",
            )
            # Ctrl-C and the like propagate as they are, and so do errors after which an older
            # checkpoint may be restored.
            is_recoverable = is_reading and isinstance(error, CheckpointError)
            if not isinstance(error, Exception) or is_recoverable:
                raise
            raise self.incomplete from error

    def _read(
        self, actions: Sequence[Action], into: dict[int, Any], scratch: Scratch | None
    ) -> dict[int, Any]:
        numbers, parts = _wanted(actions)
        devices = {n: place for action in actions for n, place in action.devices.items()}
        return self._reader.tensors(numbers, devices, parts, into, scratch)

    def _find_memory(self) -> tuple[Scratch | None, Iterable[Sequence[Action]]]:
        """Find memory to read everything into at once; else the actions come in groups."""
        actions = self._plan.actions
        # An existing arena counts as new memory: its pages may never have been used.
        if not self._fits():
            return None, self._plan.items()
        return self._reader.borrow(*_wanted(actions), self._plan.transient()), [actions]

    def _fits(self) -> bool:
        """Return whether there is memory for everything at once, in the host and on GPUs."""
        have_memory = self._plan.fillable.keys() if self._plan.is_direct else frozenset()
        by_place: dict[Any, list[int]] = {}
        parts: dict[int, LivePart] = {}
        for action in self._plan.actions:
            parts |= action.parts
            for number in (n for n in action.tensors if n not in have_memory):
                by_place.setdefault(action.devices.get(number), []).append(number)
        bytes_of = self._reader.bytes_of
        in_host = bytes_of(by_place.pop(None, []), parts)
        on_gpus = {place: bytes_of(numbers, parts) for place, numbers in by_place.items()}
        is_in_host = in_host <= _MEMORY_SHARE * available_memory_bytes()
        return is_in_host and gpus.have_room(on_gpus)


def _wanted(actions: Sequence[Action]) -> tuple[list[int], dict[int, LivePart]]:
    """Return the numbers of the tensors that actions need, and the parts to read of some."""
    numbers = [number for action in actions for number in action.tensors]
    return numbers, {n: part for action in actions for n, part in action.parts.items()}


def _note_changed(tensors: Iterable[Any]) -> None:
    """Tell autograd about tensors changed outside of torch: a graph may have saved them."""
    tensors = [tensor for tensor in tensors if not tensor.is_inference()]
    if tensors:
        sys.modules["torch"].autograd.graph.increment_version(tensors)


def available_memory_bytes() -> int:
    """Return the memory that is available without swapping; unlimited if that is unknown."""
    available = 1 << 62
    with contextlib.suppress(OSError, ValueError):
        for line in _MEMINFO.read_text("ascii").splitlines():
            if line.startswith("MemAvailable:"):
                available = int(line.split()[1]) * 1024
    for limit, used in _CGROUP_MEMORY:
        with contextlib.suppress(OSError, ValueError):  # `max`: no limit
            room = int(limit.read_text("ascii")) - int(used.read_text("ascii"))
            available = min(available, max(room, 0))
    return available
