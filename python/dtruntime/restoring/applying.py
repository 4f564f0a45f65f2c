"""Carrying a restore plan out: reads what it needs and changes the live state.

Always holds: where memory allows, everything is read and checked before anything is changed;
elsewhere one top-level entry is read and changed after the other, and where it was asked for, live
tensors are read into. A state that was changed in part is known to be a mixture.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtruntime.errors import CheckpointError, RestoreIncomplete
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
"""Limit and use of this process's control group, by version 2 and version 1 of the interface."""
_NAMED_MAX = 10
"""Entries that an error names."""
_MEMORY_SHARE = 0.8
"""Share of the available memory that may be filled to check everything first."""


class Attempts:
    """What one call of ``restore`` did to the live state, until a checkpoint was whole.

    Attributes:
        incomplete: Why the live state is a mixture, if it is one.

    """

    def __init__(self) -> None:
        self.incomplete: RestoreIncomplete | None = None
        self._applied: RestorePlan | None = None
        self._touched: dict[Any, str] = {}
        """What was changed on behalf of a checkpoint, by ``RestorePlan.targets``."""
        self._kept: list[Any] = []  # what is touched by ``id``

    def carry_out(
        self, plan: RestorePlan, reader: Reader, before_change: Callable[[], object]
    ) -> RestorePlan:
        """Change the live state by one more plan, as ``Application.run`` does, and give it."""
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

    def check_made_up(self, plan: RestorePlan) -> None:
        """Refuse a last plan that leaves something as a checkpoint before it made it.

        Raises:
            RestoreIncomplete: It does.

        """
        left = sorted(self._touched.keys() - plan.targets().keys(), key=self._touched.__getitem__)
        self.incomplete = None
        if left:
            names = ", ".join(self._touched[target] for target in left[:_NAMED_MAX])
            self.incomplete = RestoreIncomplete(
                f"restoring step {plan.step}",
                "a newer step had changed the live state before it turned out that it cannot be "
                f"loaded, and this one has nothing for {names}"
                + (f" and {len(left) - _NAMED_MAX} more" if len(left) > _NAMED_MAX else ""),
                "restore a step that has all of it, or begin anew with what this one has not",
            )
            raise self.incomplete

    def mixture(self, error: BaseException) -> RestoreIncomplete | None:
        """Say why the live state is a mixture, now that the restore ended with ``error``."""
        if self.incomplete is None and self._applied is not None:
            self.incomplete = RestoreIncomplete(
                f"restoring step {self._applied.step}",
                f"it was restored here, and then not on every rank: {_told(error)}",
                "restore again, on all ranks, before using or saving the state",
            )
        return self.incomplete


class Application:
    """One plan being carried out.

    Attributes:
        incomplete: Why the live state is a mixture, once it is one.
        read_into: Live tensors that were read into, whatever came of it.

    """

    def __init__(self, plan: RestorePlan, reader: Reader) -> None:
        self.read_into: list[Any] = []
        self.incomplete: RestoreIncomplete | None = None
        self._plan = plan
        self._reader = reader

    def run(self, before_change: Callable[[], object]) -> None:
        """Change the live state; ``before_change`` is called once, before the first change.

        Raises:
            RestoreIncomplete: It failed half-way.
            CheckpointError: It failed before, and nothing was changed; or while live tensors were
                read into, of which ``incomplete`` tells: another checkpoint may make up for it.

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
                _note_changed(into.values())  # first: reading may end half-way
                tensors = self._read(actions, into, scratch)
                is_reading = False
                if not has_begun:
                    before_change()
                for action in actions:
                    has_begun = True
                    doing = f"entry {action.where}"
                    action.act(tensors)
                del tensors  # before the next are read: there may be no memory for both
        except BaseException as error:
            if not has_begun:
                raise
            self.incomplete = RestoreIncomplete(
                f"restoring step {self._plan.step}",
                f"the live state was changed in part when this failed: {doing}: {_told(error)}",
                "restore again, from this step or another, before using or saving the state",
            )
            # Ctrl-C and the like stay what they are, and so does what an older checkpoint mends.
            is_mendable = is_reading and isinstance(error, CheckpointError)
            if not isinstance(error, Exception) or is_mendable:
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
        # An arena that is there counts as new: its pages may never have been used.
        if not self._fits():
            return None, self._plan.items()
        return self._reader.borrow(*_wanted(actions), self._plan.passing()), [actions]

    def _fits(self) -> bool:
        """Tell whether there is memory for everything at once, in the host and in GPUs."""
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
    """Give the tensors that actions need, by number, and the parts that are taken of some."""
    numbers = [number for action in actions for number in action.tensors]
    return numbers, {n: part for action in actions for n, part in action.parts.items()}


def _note_changed(tensors: Iterable[Any]) -> None:
    """Tell autograd of tensors that change behind its back: a graph may have saved them."""
    tensors = [tensor for tensor in tensors if not tensor.is_inference()]
    if tensors:
        sys.modules["torch"].autograd.graph.increment_version(tensors)


def _told(error: BaseException) -> str:
    """Say what an error is, on one line if it is one of ours, and without its hint."""
    why = f"{error.what}: {error.why}" if isinstance(error, CheckpointError) else str(error)
    return f"{type(error).__name__}: {why}" if why else type(error).__name__


def available_memory_bytes() -> int:
    """Give the memory that can be had without swapping; everything, where it is not told."""
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
