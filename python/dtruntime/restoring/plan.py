"""What a restore will do, once it was decided: actions in their order, and what does not fit.

Always holds: a plan is data; nothing is read and nothing changed by it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dtruntime.errors import InvalidArgument
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
        has_effect: Whether anything that was saved comes to be in it.
        is_foreign: Whether it runs code of the user's, which may read and change anything.
        devices: By number: the GPU of the live tensor that takes the tensor, if it is on one.
        parts: By number: the live sharded tensor that takes its part of the tensor.

    """

    item: Any
    node: int
    tensors: Sequence[int]
    act: Callable[[Mapping[int, Any]], None]
    where: str
    has_effect: bool = True
    is_foreign: bool = False
    devices: Mapping[int, Any] = field(default_factory=dict)
    parts: Mapping[int, LivePart] = field(default_factory=dict)


@dataclass
class RestorePlan:
    """Everything a restore will do, and what it found that does not fit.

    Attributes:
        step: The checkpoint's step.
        top: Its top-level entries.
        misfits: By path: why what was saved is not for what is live.
        hints: What to do about them, each once, in order.
        untouched: What of the live state a restore of what fits leaves as it is: objects, and
            top-level entries.
        is_top_amiss: Whether top-level entries are not called what they were when saved.
        fillable: By number: a live tensor that the saved one is copied into and nothing else, and
            that lies as it does: it could be read into as well.
        is_direct: Whether it is.
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
    is_top_amiss: bool = False
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
        found = [
            *(f"missing in the checkpoint: `{path}`" for path in self.missing[:_LISTED_MAX]),
            *(f"unexpected in the checkpoint: `{path}`" for path in self.unexpected[:_LISTED_MAX]),
            *(f"`{path}`: {why}" for path, why in list(self.misfits.items())[:_LISTED_MAX]),
        ]
        count = len(self.missing) + len(self.unexpected) + len(self.misfits)
        if not count:
            return
        if count > len(found):
            found.append(f"and {count - len(found)} more")
        raise InvalidArgument(
            f"restoring step {self.step}",
            "the live state does not fit the checkpoint: " + "; ".join(found),
            "nothing was changed; " + self._advice(),
        )

    def _advice(self) -> str:
        wrapped = wrappers.hint_of(self.missing, self.unexpected)
        if wrapped is not None:
            return wrapped
        top = [f"{self.told_top()}: live objects go under these"] if self.is_top_amiss else []
        lenient = "pass `strict=False` to restore what fits and leave the rest as it is"
        return "; ".join([*top, *self.hints, lenient])

    def told_top(self) -> str:
        """Say what the live state's keys have to be."""
        named = [f"`{path}`" for path in self.top[:_LISTED_MAX]]
        if len(self.top) > len(named):
            named.append(f"and {len(self.top) - len(named)} more")
        return f"the checkpoint's top-level entries are {', '.join(named) or '(none)'}"

    def targets(self) -> dict[Any, str]:
        """Give everything that is written to, with its name: tensors by ``id``, and entries."""
        return self.written | {action.where: action.where for action in self.actions}

    def read_into(self, actions: Iterable[Action]) -> dict[int, Any]:
        """Give the live tensors that are read into for these actions, by number."""
        if not self.is_direct:
            return {}
        numbers = (number for action in actions for number in action.tensors)
        return {number: self.fillable[number] for number in numbers if number in self.fillable}

    def passing(self) -> set[int]:
        """Give numbers of tensors that nobody keeps once they are copied on, within the host."""
        if self.is_direct:
            return set()
        return {number for number, live in self.fillable.items() if live.is_cpu}

    def items(self) -> Iterable[list[Action]]:
        """Give the actions, one list per top-level item."""
        groups: dict[Any, list[Action]] = {}
        for action in self.actions:
            groups.setdefault(action.item, []).append(action)
        return groups.values()

    def report(self, fell_back_from: tuple[tuple[int, str], ...]) -> RestoreReport:
        """Give what the caller is told once every action is done."""
        skipped = self.misfits | dict.fromkeys(self.not_asked_for, "not asked for")
        return RestoreReport(
            self.step,
            tuple(self.missing),
            tuple(self.unexpected),
            skipped,
            self.values,
            fell_back_from,
        )
