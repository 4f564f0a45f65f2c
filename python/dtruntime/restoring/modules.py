"""Which stateful objects load in torch's own way, and which run code of the user's.

Always holds: nothing is called and nothing changed to tell.
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
    """Tell whether a module's own methods take what torch's do: then it is looked into."""
    return _takes(module.state_dict, "keep_vars") and _takes(module.load_state_dict, "strict")


def is_foreign(live: Any) -> bool:
    """Tell whether loading runs code that is neither torch's nor ours, or may."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(live, torch.nn.Module):
        return any(_is_foreign_part(part) for part in live.modules())
    if torch is not None and isinstance(live, torch.optim.Optimizer):
        return _is_foreign_part(live)
    return not _is_ours(type(live))


def _is_foreign_part(part: Any) -> bool:
    if any(getattr(part, hooks, None) for hooks in _HOOKS):
        return True
    return any(name in vars(part) or not _is_ours(_owner(part, name)) for name in _LOADERS)


def _owner(part: Any, name: str) -> type:
    """Give the class that a method comes from; that of the object where none has it."""
    return next((kind for kind in type(part).__mro__ if name in vars(kind)), object)


def _is_ours(kind: type) -> bool:
    return kind is object or kind.__module__.partition(".")[0] in _OURS


def _takes(method: Any, keyword: str) -> bool:
    try:
        parameters = inspect.signature(method).parameters
    except (TypeError, ValueError):  # a builtin, say, that does not tell
        return True
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    return takes_any or keyword in parameters
