"""How wrapping a model changes the names of its parameters, and how to undo that.

Always holds: a wrapper is suggested only if removing or adding its prefix makes all names match.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from dtruntime.messages import listed, quoted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dtruntime.restoring.plan import RestorePlan

_logger = logging.getLogger("dtruntime")
_LISTED_MAX = 10
"""Entries that a warning names."""
_WRAPPERS = {
    "_orig_mod": "`torch.compile`",
    "module": "`DistributedDataParallel` or `AveragedModel`",
}
_OWN = ("n_averaged",)
"""Entries that wrappers add to those of what they wrap."""


def hint_of(missing: Sequence[str], unexpected: Sequence[str]) -> str | None:
    """Return how to restore if a live model and the saved one differ only by a wrapper.

    Args:
        missing: Paths of the live state that the checkpoint does not have.
        unexpected: Paths of the checkpoint that the live state does not have.

    >>> hint_of(["model.bias"], ["model._orig_mod.bias"])
    'what was saved was wrapped by `torch.compile`: restore into the wrapped `model`, or, ...'

    """
    for attribute, wrapper in _WRAPPERS.items():
        owner = _owner_without(attribute, unexpected, missing)
        if owner is not None:
            return (
                f"what was saved was wrapped by {wrapper}: restore into the wrapped `{owner}`, or, "
                f'without wrapping it, into `torch.nn.ModuleDict({{"{attribute}": ...}})` instead'
            )
        owner = _owner_without(attribute, missing, unexpected)
        if owner is not None:
            return f"what is live is wrapped by {wrapper}: restore into `{owner}.{attribute}`"
    return None


def warn_of_untouched(plan: RestorePlan) -> None:
    """Log what a restore left unchanged: objects and top-level entries, and owners of copies."""
    if plan.copies:
        _logger.warning(
            "restoring step %d: %s is a copy that `state_dict()` made: the dict is filled, the "
            "object that made it is unchanged; restore into the object itself, or pass the dict "
            "to its `load_state_dict()` afterwards",
            plan.step,
            listed(quoted(plan.copies), _LISTED_MAX),
        )
    if not plan.untouched:
        return
    advice = hint_of(plan.missing, plan.unexpected) or plan.top_level_note()
    _logger.warning(
        "restoring step %d: nothing was restored into %s; %s",
        plan.step,
        listed(quoted(plan.untouched), _LISTED_MAX),
        "; ".join([advice, *plan.hints]),
    )


def _owner_without(attribute: str, wrapped: Sequence[str], plain: Sequence[str]) -> str | None:
    """Return the owner of ``wrapped`` if removing the attribute from each yields ``plain``."""
    wrapped = [path for path in wrapped if path.rpartition(".")[2] not in _OWN]
    owners = {path.split(f".{attribute}.", 1)[0] for path in wrapped if f".{attribute}." in path}
    bare = [path.replace(f".{attribute}.", ".", 1) for path in wrapped]
    is_other = bool(wrapped) and len(owners) == 1 and sorted(bare) == sorted(plain)
    return owners.pop() if is_other and set(bare).isdisjoint(wrapped) else None
