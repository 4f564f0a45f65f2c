"""Restores into objects with their own way of loading: the same with and without `direct=True`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dtruntime import InvalidArgument


def weights(value: float) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.full((3, 3), float(value)))


class Pair(torch.nn.Module):
    """Two parameters of one shape."""

    def __init__(self, one: float, other: float) -> None:
        super().__init__()
        self.one, self.other = weights(one), weights(other)

    def values(self) -> list[float]:
        return [self.one[0, 0].item(), self.other[0, 0].item()]


def exchange(_module: object, state: dict[str, Any], *_rest: object) -> None:
    state["one"], state["other"] = state["other"], state["one"]


def double(_module: object, state: dict[str, Any], *_rest: object) -> None:
    state["one"].mul_(2)


class Swapping(Pair):
    """Loads each of its parameters from the other one's entry."""

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        exchange(self, state)
        super()._load_from_state_dict(state, prefix, *rest)


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize(
    ("hook", "expected"), [(exchange, [2.0, 1.0]), (double, [2.0, 2.0]), (None, [2.0, 1.0])]
)
def test_a_module_may_change_what_it_loads(manager, hook, expected, direct):
    manager.save({"m": Pair(1, 2)}, step=1)
    live = Swapping(0, 0) if hook is None else Pair(0, 0)
    if hook is not None:
        live.register_load_state_dict_pre_hook(hook)
    manager.restore({"m": live}, direct=direct)
    assert live.values() == expected


class Zeroing:
    """An object that zeroes a tensor of another one when it is loaded."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def state_dict(self) -> dict[str, int]:
        return {"n": 1}

    def load_state_dict(self, _state: dict[str, int]) -> None:
        self.tensor.zero_()


@pytest.mark.parametrize("direct", [False, True])
def test_entries_are_restored_in_their_order(manager, direct):
    weight = torch.ones(4)
    manager.save({"first": weight, "o": Zeroing(weight.clone()), "w": weight.clone()}, step=1)
    live = {"first": torch.zeros(4), "w": torch.zeros(4)}
    manager.restore(
        {"first": live["first"], "o": Zeroing(live["w"]), "w": live["w"]}, direct=direct
    )
    assert live["w"].sum() == 4
    manager.restore(
        {"first": live["first"], "o": Zeroing(live["first"]), "w": live["w"]}, direct=direct
    )
    assert live["first"].sum() == 0


@pytest.mark.parametrize("direct", [False, True])
def test_a_hook_after_loading_does_not_win_over_what_is_restored_after_it(manager, direct):
    model, average = torch.nn.Linear(2, 2), torch.full((2, 2), 5.0)
    manager.save({"model": model, "average": average}, step=1)
    live, other = torch.nn.Linear(2, 2), torch.zeros(2, 2)

    def follow(module: torch.nn.Module, _keys: object) -> None:
        other.copy_(module.weight.detach())

    live.register_load_state_dict_post_hook(follow)
    manager.restore({"model": live, "average": other}, direct=direct)
    assert torch.equal(other, average)


class Plain(torch.nn.Linear):
    """A module whose methods have other signatures than torch's."""

    def state_dict(self) -> dict[str, Any]:
        return {"kernel": self.weight.detach(), "n": 3}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            self.weight.copy_(state["kernel"])


@pytest.mark.parametrize("direct", [False, True])
def test_modules_may_have_methods_of_their_own(manager, direct):
    saved, live = Plain(2, 2), Plain(2, 2)
    manager.save({"m": saved}, step=1)
    manager.restore({"m": live}, direct=direct)
    assert torch.equal(saved.weight, live.weight)


class Remembering(torch.nn.Linear):
    """A module whose extra state has any length."""

    def __init__(self, *words: str) -> None:
        super().__init__(2, 2)
        self.words = list(words)

    def get_extra_state(self) -> torch.Tensor:
        return torch.frombuffer(bytearray(" ".join(self.words), "utf-8"), dtype=torch.uint8)

    def set_extra_state(self, state: torch.Tensor) -> None:
        self.words = bytes(state.tolist()).decode().split()


@pytest.mark.parametrize("direct", [False, True])
def test_extra_state_may_be_a_tensor_of_any_length(manager, direct):
    saved, live = Remembering("one", "two"), Remembering("none")
    manager.save({"m": torch.nn.Sequential(saved)}, step=1)
    manager.restore({"m": torch.nn.Sequential(live)}, direct=direct)
    assert live.words == ["one", "two"]
    assert torch.equal(saved.weight, live.weight)


class Checking:
    """An object that can refuse what was saved beforehand."""

    def state_dict(self) -> dict[str, int]:
        return {"n": 1}

    def check_state_dict(self, _state: dict[str, int]) -> None:
        raise InvalidArgument("loading it", "it is another one", "choose")

    def load_state_dict(self, _state: dict[str, int]) -> None:
        raise AssertionError


def test_an_object_that_refuses_its_state_is_skipped_if_lenient(manager):
    manager.save({"c": Checking(), "w": torch.ones(2)}, step=1)
    live = {"c": Checking(), "w": torch.zeros(2)}
    with pytest.raises(InvalidArgument, match="it is another one"):
        manager.restore(live)
    assert live["w"].sum() == 0
    report = manager.restore(live, strict=False)
    assert report.skipped == {"c": "it is another one"}
    assert live["w"].sum() == 2
