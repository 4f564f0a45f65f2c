"""Which stateful objects load like torch's own, and which run user code.

Always holds: nothing is called and nothing is changed.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any

EXTRA_STATE = "_extra_state"
"""Last part of the key under which a module's ``get_extra_state`` is saved."""
_OURS = frozenset({"torch", "dtruntime"})
_HOOKS = (
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)
_LOADERS = ("load_state_dict", "_load_from_state_dict", "__setstate__")


def loads_as_one(module: Any) -> bool:
    """Return whether a module's methods take torch's arguments: then its entries are compared."""
    return _takes(module.state_dict, "keep_vars") and _takes(module.load_state_dict, "strict")


def runs_user_code(live: Any) -> bool:
    """Return whether loading runs, or may run, code that is neither torch's nor ours."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(live, torch.nn.Module):
        return any(_part_runs_user_code(part) for part in live.modules())
    if torch is not None and isinstance(live, torch.optim.Optimizer):
        return _part_runs_user_code(live)
    return not _is_ours(type(live))


def _part_runs_user_code(part: Any) -> bool:
    if any(getattr(part, hooks, None) for hooks in _HOOKS):
        return True
    return any(name in vars(part) or not _is_ours(_owner(part, name)) for name in _LOADERS)


def _owner(part: Any, name: str) -> type:
    """Return the class that defines a method; ``object`` if none does."""
    return next((kind for kind in type(part).__mro__ if name in vars(kind)), object)


def _is_ours(kind: type) -> bool:
    return kind is object or kind.__module__.partition(".")[0] in _OURS


def _takes(method: Any, keyword: str) -> bool:
    try:
        parameters = inspect.signature(method).parameters
    except (TypeError, ValueError):  # for example a builtin without a signature
        return True
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    return takes_any or keyword in parameters
