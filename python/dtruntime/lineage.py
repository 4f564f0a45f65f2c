"""Where training is among the checkpoints of its store: which of them count as saved.

    10  20  30     30 did not verify, 20 was loaded: 30 counts as not saved, and saving it replaces
                   the damaged one
    10  20  30     20 was requested: 30 remains, and saving it, or 25, takes a rewind

Always holds: a checkpoint that a load fell back from is identified by its attempt, so that one
saved later under the same step is not taken for it.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dtruntime import _native

_logger = logging.getLogger("dtruntime")


class Lineage:
    """The steps of one store as seen by the training that continues in it."""

    def __init__(self, native: _native.Manager, *, is_read_only: bool) -> None:
        self._native = native
        self._is_read_only = is_read_only
        self._unsound: dict[tuple[int, str | None], str | None] = {}
        """Steps after the loaded one that do not verify, each with its attempt, and why they do
        not; None if another rank could not load it."""
        self._rewound_to: int | None = None
        """The step that training went back to; later ones may exist."""
        self._rewinding_save: _native.SaveHandle | None = None
        """The save that ends the rewind once it is durable: then all existing steps count again."""
        self.rewinds_implicitly = False
        """Whether the caller passes ``rewind=True`` by itself where a save needs it."""

    def note_loaded(self, step: int, failed: Mapping[int, str], *, later_are_unsound: bool) -> None:
        """Note which step was read as the newest, and whether the later ones could not be."""
        later = self._later_than(step) if later_are_unsound else ()
        self._unsound = {(number, attempt): failed.get(number) for number, _, attempt in later}

    def forget_unsound(self) -> None:
        """Have every step tried again."""
        self._unsound = {}

    def passed_over(self) -> dict[int, str]:
        """Return the steps that this process could not read before, with the reasons.

        They are not tried again: what is read in several calls must be of one checkpoint.
        """
        if not self._unsound:
            return {}
        found = ((n, self._unsound.get((n, attempt))) for n, _, attempt in self._later_than(-1))
        return {number: why for number, why in found if why is not None}

    def note_restored(self, step: int, *, is_named: bool) -> None:
        """Note where training continues, and warn about later steps, if there are any."""
        self._rewound_to = self._rewinding_save = None
        if is_named:
            self._unsound = {}
        later = [number for number, why, _ in self._later_than(step) if why is None]
        if not is_named or not later or self._is_read_only:
            return
        self._rewound_to = step
        if self.rewinds_implicitly:
            return
        _logger.warning(
            "step %d is restored, and later ones exist (%s): saving from here on needs "
            "`rewind=True`; otherwise the newest of them is restored next time",
            step,
            ", ".join(map(str, later)),
        )

    def note_begun(self, save: _native.SaveHandle, *, is_rewind: bool) -> None:
        """Note that a save was started."""
        if is_rewind or self._rewound_to is not None:
            self._rewinding_save = save

    def is_ahead(self, step: int, saving: int) -> bool:
        """Return whether ``step`` is after all that count as saved; ``saving`` is in flight."""
        save = self._rewinding_save
        if save is not None:
            if not save.done():
                return step > save.step
            if not save.failed():
                self._rewound_to = None
            self._rewinding_save = None
        if self._rewound_to is not None:
            return step > self._rewound_to
        known = self._native.candidates()
        sound = (n for n, why, attempt in known if why is None and not self._is_unsound(n, attempt))
        return step > max(saving, *sound, -1)

    def replaces_unsound(self, step: int) -> bool:
        """Return whether only checkpoints that the last load fell back from conflict with ``step``.

        All ranks of a store get the same answer: they loaded the same step, and see the same later
        ones.
        """
        if not self._unsound:
            return False
        standing = self._later_than(step - 1)
        if not all(self._is_unsound(number, attempt) for number, _, attempt in standing):
            return False
        # A checkpoint whose manifest cannot be read does not conflict.
        replaced = [number for number, why, _ in standing if why is None]
        if replaced:
            named = ", ".join(map(str, replaced))
            _logger.warning("saving step %d replaces step %s, which did not verify", step, named)
        return bool(replaced)

    def _is_unsound(self, step: int, attempt: str | None) -> bool:
        return (step, attempt) in self._unsound

    def _later_than(self, step: int) -> list[tuple[int, str | None, str | None]]:
        return [known for known in self._native.candidates() if known[0] > step]
