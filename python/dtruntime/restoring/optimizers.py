"""Whether a saved optimizer can become the state of a live one.

torch finds out when it has changed some of it, or at the next step; of optimizers that load in a
way of their own, only they know.

Always holds: nothing is read and nothing changed to tell; keys that the live class fills in, or
does without, are not asked for, nor are more keys than it knows in the way: learning rate
schedulers and newer versions of torch add some.
"""

from __future__ import annotations

import functools
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

from dtruntime.loading.assembling import whole_shape
from dtruntime.restoring.fitting import Misfit, dtype_misfit, entries
from dtruntime.state.tree import TAG_LIST, TAG_TENSOR

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dtruntime.loading.reader import Reader

_MOMENTS = frozenset(
    {
        *("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "momentum_buffer"),
        *("square_avg", "grad_avg", "acc_delta", "sum", "prev", "step_size", "ax", "variance"),
    }
)
"""What torch's optimizers keep of a parameter in the parameter's own shape and dtype."""
_OPTIONAL = frozenset({"capturable", "differentiable", "foreach", "fused", "maximize"})
"""What no class of torch needs in a group: where it is not filled in, it has a default."""
_NEEDED = {
    "ASGD": ("step", "eta", "mu", "ax"),
    "Adadelta": ("step", "square_avg", "acc_delta"),
    "Adafactor": ("step",),
    "Adagrad": ("step", "sum"),
    "Adam": ("step", "exp_avg", "exp_avg_sq"),
    "Adamax": ("step", "exp_avg", "exp_inf"),
    "NAdam": ("step", "mu_product", "exp_avg", "exp_avg_sq"),
    "RAdam": ("step", "exp_avg", "exp_avg_sq"),
    "RMSprop": ("step", "square_avg"),
    "Rprop": ("step", "prev", "step_size"),
    "SparseAdam": ("step", "exp_avg", "exp_avg_sq"),
}
"""What torch's classes read of a parameter's state if there is any; AdamW is an Adam."""
_OTHER_CLASS = "restore into an optimizer of the class that was saved"


class _Saved(NamedTuple):
    """What a checkpoint has of an optimizer: nodes."""

    groups: list[dict[Any, int]]
    states: list[tuple[Any, dict[Any, int]]]


def optimizer_misfit(live: Any, index: int, reader: Reader, *, cast: bool) -> Misfit | None:
    """Tell in what a saved optimizer cannot be that of the live one's parameters."""
    is_torchs = type(live).__module__.startswith("torch.optim")
    if not is_torchs and not _loads_as_torch_does(live):
        return None
    saved = _saved_at(index, reader)
    if saved is None:
        return Misfit("an optimizer is live, and the checkpoint has none")
    nodes = reader.tree.nodes
    expected = [len(group["params"]) for group in live.param_groups]
    found = [nodes[group["params"]][1] for group in saved.groups if "params" in group]
    if found != expected:
        return Misfit(f"the live groups have {expected} parameters, the saved ones {found}")
    if _loads_as_torch_does(live):
        why = next(_lacks(live, saved), None)
        if why is not None:
            return Misfit(why, _OTHER_CLASS)
    return next(_other_moments(live, saved, reader, cast=cast), None) if is_torchs else None


def _loads_as_torch_does(live: Any) -> bool:
    """Tell whether what is loaded is what was saved, with the keys that torch's classes add."""
    torch = sys.modules["torch"]
    return (
        type(live).load_state_dict is torch.optim.Optimizer.load_state_dict
        and not live._optimizer_load_state_dict_pre_hooks  # noqa: SLF001  (they may add keys)
        and _filler_of(type(live)).__module__.startswith("torch.optim")
    )


def _saved_at(index: int, reader: Reader) -> _Saved | None:
    tree = reader.tree
    saved = dict(entries(tree, index))
    groups = saved.get("param_groups")
    if groups is None or tree.nodes[groups][0] != TAG_LIST:
        return None
    return _Saved(
        [dict(entries(tree, group)) for _, group in tree.children(groups)],
        [(key, dict(entries(tree, node))) for key, node in entries(tree, saved.get("state"))],
    )


def _lacks(live: Any, saved: _Saved) -> Iterator[str]:
    """Say what the live class reads and the saved groups and states do not have."""
    name = type(live).__name__
    unneeded = _OPTIONAL | _filled_in(_filler_of(type(live)))
    for position, (group, has) in enumerate(zip(live.param_groups, saved.groups, strict=True)):
        # Of the defaults, too: loading adds some that no group has.
        missing = (live.defaults.keys() & group.keys()) - has.keys() - unneeded
        if missing:
            keys = ", ".join(f"`{key}`" for key in sorted(missing))
            yield f"the live `{name}` needs {keys}, and the saved group {position} has no such key"
    needed = next((_NEEDED[c.__name__] for c in type(live).__mro__ if _is_known(c)), ())
    count = sum(len(group["params"]) for group in live.param_groups)
    for position, state in saved.states:
        missing = set(needed) - state.keys()
        if state and missing and type(position) is int and position in range(count):
            keys = ", ".join(f"`{key}`" for key in sorted(missing))
            yield (
                f"the live `{name}` needs {keys} of each parameter, and the saved state of "
                f"parameter {position} has {', '.join(f'`{key}`' for key in state)}"
            )


def _other_moments(live: Any, saved: _Saved, reader: Reader, *, cast: bool) -> Iterator[Misfit]:
    """Say which moments have not the shape of their parameter, or would be converted to its dtype.

    torch converts them without a word.
    """
    parameters = [p for group in live.param_groups for p in group["params"]]
    for position, state in saved.states:
        if type(position) is not int or position not in range(len(parameters)):
            continue
        parameter = parameters[position]
        for name in sorted(_MOMENTS & state.keys()):
            tag, number = reader.tree.nodes[state[name]][:2]
            if tag != TAG_TENSOR:
                continue
            record = reader.records[number]
            where, shape = f"the live parameter {position}", tuple(parameter.shape)
            if whole_shape(record) != shape:
                saved_shape = whole_shape(record)
                yield Misfit(f"{where} has shape {shape}, its saved `{name}` {saved_shape}")
            elif parameter.is_floating_point():
                other = dtype_misfit(parameter.dtype, record, cast=cast)
                if other is not None:
                    yield Misfit(f"`{name}` of {where}: {other.why}", other.hint)


def _is_known(kind: type) -> bool:
    return kind.__name__ in _NEEDED and kind.__module__.startswith("torch.optim")


def _filler_of(kind: type) -> type:
    """Give the class whose ``__setstate__`` an optimizer has."""
    return next(owner for owner in kind.__mro__ if "__setstate__" in vars(owner))


@functools.cache
def _filled_in(owner: type) -> frozenset[str]:
    """Give the keys that a class of torch adds to loaded groups that lack them: it is asked."""
    asked: Any = object.__new__(owner)
    asked.defaults = {}
    asked._patch_step_function = lambda: None  # that would change the class  # noqa: SLF001
    group: dict[str, Any] = {"params": []}
    asked.__setstate__({"state": {}, "param_groups": [group]})
    return frozenset(group)
