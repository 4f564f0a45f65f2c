"""What wrapping a model does to the names of its parameters, and how to undo it.

Always holds: a wrapper is named only if its prefix, taken away or added, makes all names fit.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dtruntime.restore import RestorePlan

_logger = logging.getLogger("dtruntime")
_WRAPPERS = {"_orig_mod": "`torch.compile`", "module": "`DistributedDataParallel`"}


def hint_of(missing: Sequence[str], unexpected: Sequence[str]) -> str | None:
    """Say how to restore where only a wrapper stands between a live model and what was saved.

    Args:
        missing: Paths of the live state that the checkpoint does not have.
        unexpected: Paths of the checkpoint that the live state does not have.

    >>> hint_of(["model.bias"], ["model._orig_mod.bias"])
    'what was saved was wrapped by `torch.compile`: restore into the wrapped `model`'

    """
    for attribute, wrapper in _WRAPPERS.items():
        owner = _owner_without(attribute, unexpected, missing)
        if owner is not None:
            return f"what was saved was wrapped by {wrapper}: restore into the wrapped `{owner}`"
        owner = _owner_without(attribute, missing, unexpected)
        if owner is not None:
            return f"what is live is wrapped by {wrapper}: restore into `{owner}.{attribute}`"
    return None


def warn_of_untouched(live: Any, plan: RestorePlan) -> None:
    """Log which modules at the top of a live state a restore of what fits leaves as they are."""
    changeless = {*plan.missing, *plan.misfits}
    for key, value in live.items() if isinstance(live, dict) else ():
        if not callable(getattr(value, "named_parameters", None)):
            continue
        names = {f"{key}.{name}" for name in value.state_dict()}
        if names and names <= changeless:
            advice = hint_of(plan.missing, plan.unexpected) or "look at the report"
            _logger.warning(
                "restoring step %d: not one tensor fits `%s`, which stays as it is; %s",
                plan.step,
                key,
                advice,
            )


def _owner_without(attribute: str, wrapped: Sequence[str], plain: Sequence[str]) -> str | None:
    """Give whose paths are ``plain`` if each of ``wrapped`` lacks this part of it."""
    owners = {path.split(f".{attribute}.", 1)[0] for path in wrapped if f".{attribute}." in path}
    bare = [path.replace(f".{attribute}.", ".", 1) for path in wrapped]
    is_other = bool(wrapped) and len(owners) == 1 and sorted(bare) == sorted(plain)
    return owners.pop() if is_other and set(bare).isdisjoint(wrapped) else None
