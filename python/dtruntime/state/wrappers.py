"""What wrapping a model does to the names of its parameters, and how to undo it.

Always holds: a wrapper is named only if its prefix, taken away or added, makes all names fit.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

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
"""What wrappers have of their own, beside what they wrap."""


def hint_of(missing: Sequence[str], unexpected: Sequence[str]) -> str | None:
    """Say how to restore where only a wrapper stands between a live model and what was saved.

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
                f'without wrapping it, into `torch.nn.ModuleDict({{"{attribute}": ...}})` in its '
                "place"
            )
        owner = _owner_without(attribute, missing, unexpected)
        if owner is not None:
            return f"what is live is wrapped by {wrapper}: restore into `{owner}.{attribute}`"
    return None


def warn_of_untouched(plan: RestorePlan) -> None:
    """Log which objects and top-level entries a restore of what fits left as they are."""
    if not plan.untouched:
        return
    named = [f"`{path}`" for path in plan.untouched[:_LISTED_MAX]]
    if len(plan.untouched) > len(named):
        named.append(f"and {len(plan.untouched) - len(named)} more")
    advice = hint_of(plan.missing, plan.unexpected) or plan.told_top()
    _logger.warning(
        "restoring step %d: nothing was restored into %s; %s",
        plan.step,
        ", ".join(named),
        "; ".join([advice, *plan.hints]),
    )


def _owner_without(attribute: str, wrapped: Sequence[str], plain: Sequence[str]) -> str | None:
    """Give whose paths are ``plain`` if each of ``wrapped`` lacks this part of it."""
    wrapped = [path for path in wrapped if path.rpartition(".")[2] not in _OWN]
    owners = {path.split(f".{attribute}.", 1)[0] for path in wrapped if f".{attribute}." in path}
    bare = [path.replace(f".{attribute}.", ".", 1) for path in wrapped]
    is_other = bool(wrapped) and len(owners) == 1 and sorted(bare) == sorted(plain)
    return owners.pop() if is_other and set(bare).isdisjoint(wrapped) else None
