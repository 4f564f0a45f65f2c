"""Where training is among the checkpoints of its store: which of them count as saved, to it.

    10  20  30     30 did not verify, 20 was loaded: 30 counts as not saved, and saving it replaces
                   what is there
    10  20  30     20 was named: 30 stands, and saving it, or 25, takes a rewind

Always holds: what a load fell back from is known by its attempt, so that nothing that was saved
since is taken for it.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dtruntime import _native

_logger = logging.getLogger("dtruntime")


class Lineage:
    """The steps of one store as the training that goes on in it sees them."""

    def __init__(self, native: _native.Manager, *, is_read_only: bool) -> None:
        self._native = native
        self._is_read_only = is_read_only
        self._unsound: frozenset[tuple[int, str | None]] = frozenset()
        """Steps after the one that was loaded, each with its attempt: they do not verify."""
        self._went_back_to: int | None = None
        """Where training is, once it went back: later steps may be there."""
        self._going_on: _native.SaveHandle | None = None
        """The save that ends that, once it is durable: what is there then is what counts."""
        self.goes_back_by_itself = False
        """Whether saves that need ``rewind=True`` have it without the user's doing."""

    def note_loaded(self, step: int, *, later_are_unsound: bool) -> None:
        """Note which step was read, and whether what comes after it could not be."""
        later = self._later_than(step) if later_are_unsound else ()
        self._unsound = frozenset((number, attempt) for number, _, attempt in later)

    def note_restored(self, step: int, *, is_named: bool) -> None:
        """Note where training goes on, and say what that means for later steps, if there are."""
        self._went_back_to = self._going_on = None
        later = [number for number, why, _ in self._later_than(step) if why is None]
        if not is_named or not later or self._is_read_only:
            return
        self._went_back_to = step
        if self.goes_back_by_itself:
            return
        _logger.warning(
            "step %d is restored, and later ones exist (%s): saving from here on takes "
            "`rewind=True`, else the newest of them is what is restored next time",
            step,
            ", ".join(map(str, later)),
        )

    def note_begun(self, save: _native.SaveHandle, *, is_rewind: bool) -> None:
        """Note that a save was begun."""
        if is_rewind or self._went_back_to is not None:
            self._going_on = save

    def is_ahead(self, step: int, saving: int) -> bool:
        """Tell whether ``step`` is after all that count as saved; ``saving`` is being saved."""
        going_on = self._going_on
        if going_on is not None:
            if not going_on.done():
                return step > going_on.step
            if not going_on.failed():
                self._went_back_to = None
            self._going_on = None
        if self._went_back_to is not None:
            return step > self._went_back_to
        known = self._native.candidates()
        sound = (n for n, why, attempt in known if why is None and not self._is_unsound(n, attempt))
        return step > max(saving, *sound, -1)

    def replaces_unsound(self, step: int) -> bool:
        """Tell whether what stands in the way of ``step`` is what the load before fell back from.

        All ranks of a store find the same: they loaded the same step, and see the same later ones.
        """
        if not self._unsound:
            return False
        standing = self._later_than(step - 1)
        if not all(self._is_unsound(number, attempt) for number, _, attempt in standing):
            return False
        # What cannot even be read is in nobody's way.
        replaced = [number for number, why, _ in standing if why is None]
        if replaced:
            named = ", ".join(map(str, replaced))
            _logger.warning("saving step %d replaces step %s, which did not verify", step, named)
        return bool(replaced)

    def _is_unsound(self, step: int, attempt: str | None) -> bool:
        return (step, attempt) in self._unsound

    def _later_than(self, step: int) -> list[tuple[int, str | None, str | None]]:
        return [known for known in self._native.candidates() if known[0] > step]
