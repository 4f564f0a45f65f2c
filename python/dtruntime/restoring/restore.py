"""Restoring in place: which live object takes which part of a checkpoint.

Planning is separate from execution: ``plan_restore`` compares the live state with the checkpoint's
tree and changes nothing; ``applying.Attempts`` then executes the plan's actions.

Rules: tensors and arrays are filled in place. Objects with ``load_state_dict`` get their part; if
it has no tensors, those that also have ``check_state_dict`` get it for checking first. A dict, list
or tuple that contains any of these is walked; one with only plain data becomes exactly what was
saved. A plain value is replaced in its dict or list; a tuple that contains both is replaced, in its
enclosing dict or list, by one with the same live objects.

Always holds: what does not fit is found before anything is changed.
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from dtruntime.errors import CheckpointError, InvalidArgument
from dtruntime.loading.assembling import whole_shape
from dtruntime.restoring import modules, sharing
from dtruntime.restoring.fitting import (
    Misfit,
    array_misfit,
    can_be_filled,
    entries,
    inference_misfit,
    kind_misfit,
    tensor_misfit,
)
from dtruntime.restoring.optimizers import is_state_copy, optimizer_misfit
from dtruntime.restoring.plan import Action, RestorePlan
from dtruntime.state.sharded_tensors import LivePart, is_sharded, local_of, sharded_type
from dtruntime.state.tree import DICTS, TAG_DICT, TAG_LIST, TAG_TENSOR, TAG_TUPLE

if TYPE_CHECKING:
    from dtruntime.loading.reader import Reader
    from dtruntime.state.sharded_tensors import Box

_SEQUENCES = (TAG_LIST, TAG_TUPLE)
_NOTHING = (0, 0, False)
"""The payload of an empty dict's node."""
_NOT_PLACED = Misfit(
    "it was sharded when it was saved, and there is no live tensor in its place that determines "
    "how to shard it now: take a step, or initialize the optimizer's state, before restoring"
)
_NOT_TIED = (
    "tie live tensors exactly where the saved ones are tied, or give each its own memory: "
    "`tensor.clone()`"
)


@dataclass(frozen=True)
class _LiveTargets:
    """Where the live tensors are that take a checkpoint's tensors, by the tensors' numbers."""

    devices: dict[int, Any] = field(default_factory=dict)
    parts: dict[int, LivePart] = field(default_factory=dict)

    def add(self, number: int, live: Any) -> None:
        """Record a live tensor's GPU, and its part if it is sharded."""
        part = LivePart.of(live) if is_sharded(live) else None
        if part is not None:
            self.parts[number] = part
        local = local_of(live)
        if local.is_cuda:
            self.devices[number] = local.device


_MIGRATES = (
    "if the module's own loading code converts old entries, use that: "
    '`module.load_state_dict(manager.load(keys="model")["model"])`'
)


@dataclass
class _ModuleFit:
    """Which entries of a module's saved state will be restored.

    Attributes:
        drop: Keys of those that will not.
        targets: The module's tensors that take them.
        expanded: Expanded tensors, by their keys.
        has_effect: Whether any will be restored.

    """

    has_effect: bool
    drop: list[str] = field(default_factory=list)
    targets: _LiveTargets = field(default_factory=_LiveTargets)
    expanded: dict[str, Any] = field(default_factory=dict)


def plan_restore(
    live: Any, reader: Reader, *, strict: bool, cast: bool = False, direct: bool = False
) -> RestorePlan:
    """Compare a live state with a checkpoint and plan what to change."""
    planner = _Planner(reader, strict=strict, cast=cast)
    try:
        planner.walk(live)
    except RecursionError:
        raise InvalidArgument(
            "restoring into a live state",
            "a container in it contains itself, or containers are nested too deeply",
            "pass a state without that cycle, or a flatter one",
        ) from None
    planner.plan.is_direct = direct
    return planner.plan


_Slot = Callable[[Any], None]


class _Planner:
    """One walk over a live state beside a checkpoint's tree."""

    def __init__(self, reader: Reader, *, strict: bool, cast: bool) -> None:
        self._reader = reader
        self._tree = reader.tree
        self._paths = reader.checkpoint.paths()
        children = self._tree.children(0) if self._tree.is_container(0) else ()
        top = tuple(self._paths[child] for _, child in children)
        self.plan = RestorePlan(reader.checkpoint.step, top)
        self._strict = strict
        self._cast = cast
        self._item: Any = None
        self._claims: list[sharing.Claim] = []
        self._boxes: dict[int, Box | None] = {}

    def walk(self, live: Any) -> None:
        """Plan for the whole of a live state."""
        if not _holds_live(live) and not isinstance(live, (dict, list)):
            raise InvalidArgument(
                f"restoring into a `{type(live).__name__}`",
                "it cannot be changed in place",
                "pass a dict of models, optimizers and tensors, or use `load()`",
            )
        self.visit(live, 0, None)
        ends = self._tree.ends
        nodes = (node for a in self.plan.actions for node in range(a.node, ends[a.node]))
        self._reader.check_loadable(nodes)
        self.settle(live)
        self.find_fillable()

    def visit(self, live: Any, index: int, slot: _Slot | None) -> None:
        """Plan for ``live``, which takes the node ``index``; ``slot`` replaces it in its parent."""
        if isinstance(live, dict) and is_state_copy(live):
            self.plan.copies.append(self._paths[index] or "the root")
        if _is_tensor(live):
            self._tensor(live, index)
        elif isinstance(live, np.ndarray):
            self._array(live, index)
        elif _is_stateful(live):
            self._stateful(live, index)
        elif type(live) in (dict, OrderedDict) and (index == 0 or _holds_live(live)):
            self._dict(live, index)
        elif type(live) in (list, tuple) and _holds_live(live):
            self._sequence(live, index, slot)
        elif type(live) in (*DICTS, list):
            self._replace_contents(live, index)
        else:
            self._plain(live, index, slot)

    def settle(self, live: Any) -> None:
        """Finish the plan: leave out tensors that conflict with others in the same live memory."""
        for claim, why in [*sharing.conflicts(self._claims, self._reader)]:
            self._misfit(claim.node, why, _NOT_TIED)
            claim.give_up()
            self._claims.remove(claim)
        self.plan.written = {id(claim.live): claim.path for claim in self._claims}
        if type(live) in (dict, OrderedDict):
            changed = {action.item for action in self.plan.actions if action.has_effect}
            untouched = self.plan.untouched
            for key in live:
                if key not in changed and not any(_is_at_or_below(path, key) for path in untouched):
                    untouched.append(str(key))

    def find_fillable(self) -> None:
        """Find live tensors that can be read into directly: the saved ones are only copied to them.

        All are read before the first action. So those from the first action that runs user code on
        are excluded: that code may change what is loaded, or write to live tensors that are filled
        after it.
        """
        nodes, ends = self._tree.nodes, self._tree.ends
        taken: Counter[int] = Counter()
        user_code = itertools.dropwhile(lambda action: not action.runs_user_code, self.plan.actions)
        out_of_order = {number for action in user_code for number in action.tensors}
        for action in self.plan.actions:
            below = range(action.node, ends[action.node])
            taken.update(nodes[node][1] for node in below if nodes[node][0] == TAG_TENSOR)
        claimed = Counter(claim.number for claim in self._claims)
        memories: dict[Any, tuple[int, int]] = {}
        for number, live in ((claim.number, claim.live) for claim in self._claims):
            # An object that keeps the tensor it loads would share its memory with the live one.
            if taken[number] != claimed[number] or number in self.plan.fillable:
                continue
            if number in out_of_order:
                continue
            record = self._reader.records[number]
            if can_be_filled(live, record):
                place = (record.storage, record.offset)
                memory = (live.device, live.data_ptr(), live.nbytes)
                if memories.setdefault(memory, place) == place:
                    self.plan.fillable[number] = live

    def _misfit(self, index: int, why: str | Misfit, hint: str | None = None) -> None:
        if isinstance(why, Misfit):
            why, hint = why
        self.plan.misfits[self._paths[index] or "the root"] = why
        if hint is not None:
            self.plan.hints[hint] = None

    def _do(
        self,
        live: Any,
        index: int,
        act: Callable[[Any], None],
        targets: _LiveTargets | None = None,
        *,
        has_effect: bool = True,
        runs_user_code: bool = False,
    ) -> Action | None:
        """Plan ``act(value)`` with the value at ``index``, whose tensors go to ``targets``."""
        tree = self._tree
        targets = targets or _LiveTargets()
        for number in tree.tensors_below(index):
            box = targets.parts[number].box if number in targets.parts else None
            if self._boxes.setdefault(number, box) != box:
                why = "it is the same saved tensor as another entry, but is sharded differently"
                self._misfit(index, why)
                return None
        action = Action(
            self._item,
            index,
            tree.tensors_below(index),
            lambda tensors: act(tree.build(index, tensors.__getitem__)),
            f"`{self._paths[index] or 'the root'}` ({type(live).__name__})",
            has_effect,
            runs_user_code,
            targets.devices,
            targets.parts,
        )
        self.plan.actions.append(action)
        return action

    def _claim(self, live: Any, index: int, give_up: Callable[[], None]) -> None:
        number = self._tree.nodes[index][1]
        self._claims.append(sharing.Claim(self._paths[index], index, number, live, give_up))

    def _claim_for(self, live: Any, index: int, action: Action | None) -> None:
        """Record that a live tensor is only filled by ``action``."""

        def give_up() -> None:
            actions = self.plan.actions
            actions[:] = [other for other in actions if other is not action]

        if action is not None:
            self._claim(live, index, give_up)

    def _tensor(self, live: Any, index: int) -> None:
        torch = sys.modules["torch"]
        why = self._tensor_misfit(live, index)
        if type(live) not in (torch.Tensor, torch.nn.Parameter) and not is_sharded(live):
            why = Misfit(f"a `{type(live).__name__}` cannot be restored in place")
        if why is None:
            targets = _LiveTargets()
            targets.add(self._tree.nodes[index][1], live)
            action = self._do(live, index, lambda value: _copy_tensor(live, value), targets)
            self._claim_for(live, index, action)
        else:
            self._misfit(index, why)

    def _tensor_misfit(self, live: Any, index: int) -> Misfit | None:
        return tensor_misfit(live, index, self._reader, cast=self._cast)

    def _array(self, live: np.ndarray[Any, Any], index: int) -> None:
        why = array_misfit(live, index, self._reader, cast=self._cast)
        if why is None:
            action = self._do(live, index, lambda value: _copy_array(live, value))
            self._claim_for(live, index, action)
        else:
            self._misfit(index, why)

    def _stateful(self, live: Any, index: int) -> None:
        torch = sys.modules.get("torch")
        plan, known = self.plan, len(self.plan.missing)
        if torch is not None and isinstance(live, torch.nn.Module) and modules.loads_as_one(live):
            planned = self._module(live, index)
        else:
            planned = self._object(live, index)
        if index == 0:
            plan.has_top_mismatch = len(plan.missing) > known or not (planned or plan.hints)
        if not planned:
            plan.untouched.append(self._paths[index] or f"the {type(live).__name__}")

    def _object(self, live: Any, index: int) -> bool:
        """Plan for an object with its own way of loading; return whether anything is restored."""
        torch = sys.modules.get("torch")
        targets = _LiveTargets()
        why: Misfit | None = None
        if torch is not None and isinstance(live, torch.optim.Optimizer):
            why = optimizer_misfit(live, index, self._reader, cast=self._cast)
            why = self._find_in_optimizer(live, index, targets) or why
        elif sharded_type() is not None:
            placed: set[int] = set()
            self._find_sharded(live.state_dict(), index, targets, placed)
            below = self._tree.tensors_below(index)
            if any(self._reader.records[n].slice and n not in placed for n in below):
                why = _NOT_PLACED
        if self._tree.nodes[index][:2] == (TAG_DICT, _NOTHING) and live.state_dict():
            why = Misfit("the saved state is empty, and the live one is not")
        if why is not None:
            self._misfit(index, why)
            return False
        if not self._ask(live, index):
            return False
        user_code = modules.runs_user_code(live)
        action = self._do(live, index, live.load_state_dict, targets, runs_user_code=user_code)
        return action is not None

    def _module(self, live: Any, index: int) -> bool:
        """Plan for a module; return whether anything of it will be restored."""
        if self._tree.nodes[index][0] != TAG_DICT:
            self._misfit(index, kind_misfit(live, index, self._reader))
            return False
        known = len(self.plan.missing) + len(self.plan.unexpected)
        fit = self._compare_module(live, index)
        is_other = len(self.plan.missing) + len(self.plan.unexpected) > known
        if is_other and modules.runs_user_code(live):
            self.plan.hints[_MIGRATES] = None

        def act(value: dict[str, Any]) -> None:
            for key in fit.drop:
                del value[key]
            for key, tensor in fit.expanded.items():
                if key in value:  # torch refuses to copy into it, but accepts it as the value
                    _copy_tensor(tensor, value[key])
                    value[key] = tensor
            live.load_state_dict(value, strict=self._strict)

        user_code = modules.runs_user_code(live)
        action = self._do(
            live, index, act, fit.targets, has_effect=fit.has_effect, runs_user_code=user_code
        )
        return action is not None and fit.has_effect

    def _ask(self, live: Any, index: int) -> bool:
        """Let an object with a check and no tensors refuse its part before anything changes."""
        check = getattr(live, "check_state_dict", None)
        if not callable(check) or self._tree.tensors_below(index):
            return True
        none: dict[int, Any] = {}
        try:
            check(self._tree.build(index, none.__getitem__))
        except CheckpointError as error:
            if self._strict:
                raise
            self._misfit(index, error.why, error.hint)
            return False
        return True

    def _find_in_optimizer(self, live: Any, index: int, targets: _LiveTargets) -> Misfit | None:
        """Find where an optimizer's tensors go; return why if that cannot be determined.

        They are on the devices of their parameters, except step counts, which optimizers keep in
        host memory, and are sharded like those, unless live ones are placed differently. A wrong
        guess costs a copy: the optimizer moves what it loads.
        """
        parameters = [p for group in live.param_groups for p in group["params"]]
        saved = dict(entries(self._tree, index))
        for position, state in entries(self._tree, saved.get("state")):
            if type(position) is not int or position not in range(len(parameters)):
                continue
            parameter = parameters[position]
            now = live.state.get(parameter, {})
            for name, child in entries(self._tree, state):
                tag, number = self._tree.nodes[child][:2]
                if tag != TAG_TENSOR:
                    continue
                if is_sharded(now.get(name)) and self._tensor_misfit(now[name], child) is None:
                    targets.add(number, now[name])
                elif name != "step" and self._shape_of(number) == tuple(parameter.shape):
                    targets.add(number, parameter)
                elif is_sharded(parameter) and self._reader.records[number].slice is not None:
                    return _NOT_PLACED
                elif parameter.is_cuda and name != "step":
                    targets.devices[number] = parameter.device
        return None

    def _shape_of(self, number: int) -> tuple[int, ...]:
        return whole_shape(self._reader.records[number])

    def _find_sharded(self, live: Any, index: int, targets: _LiveTargets, placed: set[int]) -> None:
        """Find the sharded tensors of a live ``state_dict()`` that correspond to saved ones.

        Adds to ``placed`` the numbers of saved tensors with a live counterpart.
        """
        if _is_tensor(live):
            if self._tensor_misfit(live, index) is None:
                number = self._tree.nodes[index][1]
                placed.add(number)
                if is_sharded(live):
                    targets.add(number, live)
        elif isinstance(live, dict):
            for key, child in entries(self._tree, index):
                if key in live:
                    self._find_sharded(live[key], child, targets, placed)
        elif isinstance(live, (list, tuple)) and self._tree.nodes[index][0] in _SEQUENCES:
            for position, child in self._tree.children(index):
                if position < len(live):
                    self._find_sharded(live[position], child, targets, placed)

    def _compare_module(self, live: Any, index: int) -> _ModuleFit:
        """Record the differences between a module and its saved state."""
        expected = live.state_dict(keep_vars=True)
        saved = dict(self._tree.children(index))
        prefix = self._prefix(index)
        self.plan.missing += [f"{prefix}{key}" for key in expected if key not in saved]
        own = {id(tensor) for tensor in itertools.chain(live.parameters(), live.buffers())}
        fit = _ModuleFit(has_effect=not expected)
        for key, child in saved.items():
            if key not in expected:
                self.plan.unexpected.append(self._paths[child])
                continue
            tensor = expected[key]
            is_extra = key.rpartition(".")[2] == modules.EXTRA_STATE  # may have any length
            if _is_tensor(tensor) and not _is_uninitialized(tensor) and not is_extra:
                why = self._tensor_misfit(tensor, child) or inference_misfit(tensor)
                if why is not None:
                    self._misfit(child, why)
                    fit.drop.append(key)
                    continue
                fit.targets.add(self._tree.nodes[child][1], tensor)
                if id(tensor) in own:  # not what a hook created only for the state dict
                    self._claim(tensor, child, functools.partial(fit.drop.append, key))
                    if not is_sharded(tensor) and sharing.is_expanded(tensor):
                        fit.expanded[key] = tensor
            fit.has_effect = True
        return fit

    def _dict(self, live: dict[Any, Any], index: int) -> None:
        if self._tree.nodes[index][0] != TAG_DICT:
            self._misfit(index, kind_misfit(live, index, self._reader))
            return
        # Keyed by type, too: True and 1 are equal in Python, but different keys here.
        saved = {(type(key), key): child for key, child in self._tree.children(index)}
        prefix = self._prefix(index)
        for key, value in live.items():
            if index == 0:
                self._item = key
            child = saved.pop((type(key), key), None)
            if child is None:
                self.plan.missing.append(f"{prefix}{key}")
                self.plan.has_top_mismatch |= index == 0
                if index and _holds_stateful(value):
                    self.plan.untouched.append(f"{prefix}{key}")
            else:
                self.visit(value, child, _slot_of(live, key))
        extra = self.plan.not_asked_for if index == 0 else self.plan.unexpected
        extra += [self._paths[child] for child in saved.values()]

    def _sequence(self, live: list[Any] | tuple[Any, ...], index: int, slot: _Slot | None) -> None:
        tag, count = self._tree.nodes[index][:2]
        if tag != (TAG_LIST if type(live) is list else TAG_TUPLE):
            self._misfit(index, kind_misfit(live, index, self._reader))
        elif count != len(live):
            self._misfit(index, f"the live length is {len(live)}, the saved one {count}")
        else:
            # A new tuple with the same live objects replaces the old one for the plain values.
            items = live if type(live) is list or slot is None else list(live)
            for position, child in self._tree.children(index):
                if index == 0:
                    self._item = position
                item_slot = _slot_of(items, position) if type(items) is list else None
                self.visit(live[position], child, item_slot)
            if items is not live and slot is not None:
                act = lambda _: slot(tuple(items))  # noqa: E731
                where = f"`{self._paths[index]}` (tuple)"
                self.plan.actions.append(
                    Action(self._item, index, (), act, where, has_effect=False)
                )

    def _replace_contents(self, live: dict[Any, Any] | list[Any], index: int) -> None:
        """Plan to make plain data exactly what was saved; the container stays the same object."""
        expected = TAG_LIST if type(live) is list else TAG_DICT
        if self._tree.nodes[index][0] != expected:
            self._misfit(index, kind_misfit(live, index, self._reader))
            return

        def act(value: Any) -> None:
            live.clear()
            if isinstance(live, list):
                live.extend(value)
            else:
                live.update(value)
            self.plan.values[self._paths[index]] = live

        self._do(live, index, act)

    def _plain(self, live: Any, index: int, slot: _Slot | None) -> None:
        tag = self._tree.nodes[index][0]
        is_plain = not self._tree.is_container(index) and tag != TAG_TENSOR
        if live is not None and not is_plain and type(live) is not tuple:
            self._misfit(index, kind_misfit(live, index, self._reader))
            return

        if slot is None and not self._is_equal(live, index):
            self._misfit(index, "a plain value outside of any mutable container cannot be replaced")
            return

        def act(value: Any) -> None:
            if slot is not None:
                slot(value)
            self.plan.values[self._paths[index]] = value

        self._do(live, index, act)

    def _is_equal(self, live: Any, index: int) -> bool:
        """Return whether a plain value already equals the saved one."""
        tree = self._tree
        none: dict[int, Any] = {}
        return not tree.tensors_below(index) and _is_same(live, tree.build(index, none.__getitem__))

    def _prefix(self, index: int) -> str:
        return f"{self._paths[index]}." if index else ""


def _slot_of(container: Any, key: Any) -> _Slot:
    def replace(value: Any) -> None:
        container[key] = value

    return replace


def _is_same(one: Any, other: Any) -> bool:
    """Return whether two plain values are the same, including NaNs."""
    return type(one) is type(other) and (one == other or repr(one) == repr(other))


def _is_tensor(value: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def _is_uninitialized(tensor: Any) -> bool:
    torch = sys.modules["torch"]
    return isinstance(tensor, torch.nn.parameter.UninitializedTensorMixin)


def _is_at_or_below(path: str, key: Any) -> bool:
    return path == str(key) or path.startswith(f"{key}.")


def _is_stateful(value: Any) -> bool:
    return callable(getattr(value, "load_state_dict", None)) and not isinstance(value, type)


def _holds_stateful(value: Any) -> bool:
    if type(value) in (dict, OrderedDict):
        return any(_holds_stateful(child) for child in value.values())
    if type(value) in (list, tuple):
        return any(_holds_stateful(child) for child in value)
    return _is_stateful(value)


def _holds_live(value: Any) -> bool:
    """Return whether ``value`` contains anything that keeps its identity when restored."""
    if type(value) in (dict, OrderedDict):
        return any(_holds_live(child) for child in value.values())
    if type(value) in (list, tuple):
        return any(_holds_live(child) for child in value)
    return _is_tensor(value) or isinstance(value, np.ndarray) or _is_stateful(value)


def _copy_array(live: np.ndarray[Any, Any], value: np.ndarray[Any, Any]) -> None:
    """Copy, or convert as torch does: what is too large becomes infinite."""
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        np.copyto(live, value)


def _copy_tensor(live: Any, value: Any) -> None:
    """Copy a tensor, converting the dtype if it differs; some dtypes are copied as bytes."""
    torch = sys.modules["torch"]
    if value is live:
        return
    with torch.no_grad():
        source, destination = local_of(value).detach(), local_of(live).detach()
        for dimension, (size, stride) in enumerate(
            zip(destination.shape, destination.stride(), strict=True)
        ):
            if stride == 0 and size > 1:  # expanded: one item is shared by all
                destination = destination.narrow(dimension, 0, 1)
                source = source.narrow(dimension, 0, 1)
        # Some one-byte dtypes have no copy kernel.
        if destination.dtype == source.dtype and destination.dtype.itemsize == 1:
            destination, source = destination.view(torch.uint8), source.view(torch.uint8)
        destination.copy_(source)
