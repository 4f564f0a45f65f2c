"""Whether a saved optimizer state fits a live optimizer.

torch only notices after changing part of it, or at the next step; optimizers with their own way of
loading are not checked here.

Always holds: nothing is read and nothing is changed; keys that the live class fills in, or does not
need, are not required, and unknown keys are accepted: learning rate schedulers and newer versions
of torch add some.
"""

from __future__ import annotations

import functools
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

from dtruntime.loading.assembling import whole_shape
from dtruntime.messages import quoted
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
"""State of torch's optimizers that has the parameter's own shape and dtype."""
_OPTIONAL = frozenset({"capturable", "differentiable", "foreach", "fused", "maximize"})
"""Keys that no class of torch needs in a group: each has a default."""
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
"""The state that torch's classes read for a parameter if there is any; AdamW is an Adam."""
_OTHER_CLASS = "restore into an optimizer of the class that was saved"


class _Saved(NamedTuple):
    """The nodes of a saved optimizer."""

    groups: list[dict[Any, int]]
    states: list[tuple[Any, dict[Any, int]]]


def optimizer_misfit(live: Any, index: int, reader: Reader, *, cast: bool) -> Misfit | None:
    """Return why a saved optimizer does not fit a live one; None if it does."""
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
    """Return whether an optimizer loads what was saved, adding only the keys of torch's classes."""
    torch = sys.modules["torch"]
    return (
        type(live).load_state_dict is torch.optim.Optimizer.load_state_dict
        and not live._optimizer_load_state_dict_pre_hooks  # noqa: SLF001  (these may add keys)
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
    """Yield descriptions of keys that the live class needs and the saved state lacks."""
    name = type(live).__name__
    unneeded = _OPTIONAL | _filled_in(_filler_of(type(live)))
    for position, (group, has) in enumerate(zip(live.param_groups, saved.groups, strict=True)):
        # Only those that are defaults, too: loading adds others to groups.
        missing = (live.defaults.keys() & group.keys()) - has.keys() - unneeded
        if missing:
            keys = ", ".join(quoted(sorted(missing)))
            yield f"the live `{name}` needs {keys}, and the saved group {position} has no such key"
    needed = next((_NEEDED[c.__name__] for c in type(live).__mro__ if _is_known(c)), ())
    count = sum(len(group["params"]) for group in live.param_groups)
    for position, state in saved.states:
        missing = set(needed) - state.keys()
        if state and missing and type(position) is int and position in range(count):
            keys = ", ".join(quoted(sorted(missing)))
            yield (
                f"the live `{name}` needs {keys} for each parameter, and the saved state of "
                f"parameter {position} has {', '.join(quoted(state))}"
            )


def _other_moments(live: Any, saved: _Saved, reader: Reader, *, cast: bool) -> Iterator[Misfit]:
    """Yield misfits of moments with another shape than their parameter, or another dtype.

    torch would convert the dtype silently.
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
    """Return the class that defines an optimizer's ``__setstate__``."""
    return next(owner for owner in kind.__mro__ if "__setstate__" in vars(owner))


@functools.cache
def _filled_in(owner: type) -> frozenset[str]:
    """Return the keys that a class of torch adds to loaded groups, found by loading a dummy."""
    dummy: Any = object.__new__(owner)
    dummy.defaults = {}
    dummy._patch_step_function = lambda: None  # it would change the class  # noqa: SLF001
    group: dict[str, Any] = {"params": []}
    dummy.__setstate__({"state": {}, "param_groups": [group]})
    return frozenset(group)


def is_state_copy(live: dict[Any, Any]) -> bool:
    """Return whether a dict is what ``state_dict()`` of an optimizer or a scheduler returned."""
    keys = live.keys()
    return keys == {"state", "param_groups"} or keys >= {"last_epoch", "_step_count"}
