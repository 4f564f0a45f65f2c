"""What a restore will do: ordered actions, and what does not fit.

Always holds: a plan is data; nothing is read and nothing is changed by it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dtruntime.errors import InvalidArgument
from dtruntime.messages import listed, quoted
from dtruntime.reports import RestoreReport
from dtruntime.state import wrappers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from dtruntime.state.sharded_tensors import LivePart

_LISTED_MAX = 10
"""Entries of each kind that an error names."""


@dataclass(frozen=True)
class Action:
    """One change to the live state.

    Attributes:
        item: The top-level key that it belongs to.
        node: The node whose value it takes.
        tensors: Numbers of the tensors it needs.
        act: Makes the change, given those tensors by number.
        where: Names the live object in errors.
        has_effect: Whether it restores anything that was saved.
        runs_user_code: Whether it runs user code, which may read and change anything.
        devices: By number: the GPU of the live tensor that takes the saved one, if it is on one.
        parts: By number: the live sharded tensor that takes its part of the saved one.

    """

    item: Any
    node: int
    tensors: Sequence[int]
    act: Callable[[Mapping[int, Any]], None]
    where: str
    has_effect: bool = True
    runs_user_code: bool = False
    devices: Mapping[int, Any] = field(default_factory=dict)
    parts: Mapping[int, LivePart] = field(default_factory=dict)


@dataclass
class RestorePlan:
    """Everything a restore will do, and what does not fit.

    Attributes:
        step: The checkpoint's step.
        top: Its top-level entries.
        misfits: By path: why a saved entry does not fit the live one.
        hints: How to fix them, each once, in order.
        untouched: Live objects and top-level entries that a partial restore leaves unchanged.
        copies: Live dicts that an optimizer or scheduler gave, and does not read again.
        has_top_mismatch: Whether top-level keys differ from the saved ones.
        fillable: By number: the live tensor that only the saved one is copied into, with the same
            memory layout: it could be read into directly.
        is_direct: Whether such tensors are read into directly.
        written: Paths of live tensors that are written to, by their ``id``.

    """

    step: int
    top: tuple[str, ...] = ()
    actions: list[Action] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    misfits: dict[str, str] = field(default_factory=dict)
    hints: dict[str, None] = field(default_factory=dict)
    untouched: list[str] = field(default_factory=list)
    copies: list[str] = field(default_factory=list)
    has_top_mismatch: bool = False
    not_asked_for: list[str] = field(default_factory=list)
    fillable: dict[int, Any] = field(default_factory=dict)
    is_direct: bool = False
    written: dict[int, str] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        """Refuse a plan that does not fit entirely.

        Raises:
            InvalidArgument: Something is missing, unexpected, or of another shape or type.

        """
        found = []
        for kind, paths in (("missing", self.missing), ("unexpected", self.unexpected)):
            if paths:
                found.append(f"{kind} in the checkpoint: {listed(quoted(paths), _LISTED_MAX)}")
        if self.misfits:
            misfits = [f"`{path}`: {why}" for path, why in self.misfits.items()]
            found.append(listed(misfits, _LISTED_MAX, "; "))
        if not found:
            return
        raise InvalidArgument(
            f"restoring step {self.step}",
            "the live state does not fit the checkpoint: " + "; ".join(found),
            "nothing was changed; " + self._advice(),
        )

    def _advice(self) -> str:
        wrapped = wrappers.hint_of(self.missing, self.unexpected)
        if wrapped is not None:
            return wrapped
        note = f"{self.top_level_note()}: live objects must be under these keys"
        top = [note] if self.has_top_mismatch else []
        lenient = "pass `strict=False` to restore what fits and leave the rest unchanged"
        return "; ".join([*top, *self.hints, lenient])

    def top_level_note(self) -> str:
        """Return a note of the keys that the live state has to have."""
        named = listed(quoted(self.top), _LISTED_MAX)
        return f"the checkpoint's top-level entries are {named or '(none)'}"

    def targets(self) -> dict[Any, str]:
        """Return names of everything that is written to: of tensors by ``id``, and of entries."""
        return self.written | {action.where: action.where for action in self.actions}

    def read_into(self, actions: Iterable[Action]) -> dict[int, Any]:
        """Return the live tensors that these actions read into directly, by number."""
        if not self.is_direct:
            return {}
        numbers = (number for action in actions for number in action.tensors)
        return {number: self.fillable[number] for number in numbers if number in self.fillable}

    def transient(self) -> set[int]:
        """Return the numbers of tensors that are only copied from, in host memory."""
        if self.is_direct:
            return set()
        return {number for number, live in self.fillable.items() if live.is_cpu}

    def items(self) -> Iterable[list[Action]]:
        """Return the actions, one list per top-level item."""
        groups: dict[Any, list[Action]] = {}
        for action in self.actions:
            groups.setdefault(action.item, []).append(action)
        return groups.values()

    def report(self, fell_back_from: tuple[tuple[int, str], ...]) -> RestoreReport:
        """Return the report to the caller, once every action is done."""
        skipped = self.misfits | dict.fromkeys(self.not_asked_for, "not asked for")
        return RestoreReport(
            self.step,
            tuple(self.missing),
            tuple(self.unexpected),
            skipped,
            self.values,
            fell_back_from,
        )
