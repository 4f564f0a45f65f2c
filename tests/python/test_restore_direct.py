"""Restores that read straight into live tensors: results, and damage found part-way."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from support import assert_same, flip_byte, run_script, shard_of

from dtruntime import CheckpointManager, Corrupt, RestoreIncomplete
from dtruntime.loading.reader import Reader


class Tied(torch.nn.Module):
    """Two names for one parameter, a buffer, and one that is expanded."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(50, 8)
        self.head = torch.nn.Linear(8, 50, bias=False)
        self.head.weight = self.embedding.weight
        self.norm = torch.nn.BatchNorm1d(8)
        self.register_buffer("mask", torch.ones(1).expand(4))


def state_of(seed: int) -> dict[str, object]:
    torch.manual_seed(seed)
    model = Tied()
    optimizer = torch.optim.AdamW(model.parameters())
    model.head(model.norm(model.embedding(torch.arange(50)))).sum().backward()
    optimizer.step()
    base = torch.randn(600)
    return {
        "model": model,
        "optimizer": optimizer,
        "plain": torch.randn(70_000),
        "bits": torch.arange(9).to(torch.float8_e5m2),
        "turned": torch.randn(30, 20).t(),
        "part": base[100:200],
        "other part": base[150:300],
        "nothing": torch.empty(0, 3),
        "scalar": torch.tensor(seed),
        "array": np.arange(seed, seed + 10),
        "list": [torch.randn(3), {"deep": torch.randn(2, 2), "n": seed}],
    }


def contents(state: dict[str, object]) -> dict[str, object]:
    flat = dict(state)
    return {k: v.state_dict() if hasattr(v, "state_dict") else v for k, v in flat.items()}


@pytest.mark.parametrize("direct", [False, True])
def test_the_result_is_the_same(manager, direct):
    saved, live = state_of(1), state_of(2)
    manager.save(saved, step=1)
    kept = {"plain": live["plain"], "weight": live["model"].embedding.weight}
    report = manager.restore(live, direct=direct)
    assert (report.missing, report.unexpected, dict(report.skipped)) == ((), (), {})
    assert_same(contents(live), contents(saved))
    assert live["plain"] is kept["plain"]
    assert live["model"].head.weight is kept["weight"]


def test_no_memory_is_allocated_for_tensors_of_the_same_layout(manager, monkeypatch):
    saved = {"model": Tied(), "plain": torch.randn(70_000), "list": [torch.randn(3)]}
    live = copy.deepcopy(saved)
    del saved["model"].mask, live["model"].mask
    live["plain"].zero_()
    manager.save(saved, step=1)

    def allocate(*_arguments: object, **_settings: object) -> None:
        raise AssertionError

    monkeypatch.setattr(Reader, "_allocate", allocate)
    monkeypatch.setattr(Reader, "borrow", lambda *_: None)
    manager.restore(live, direct=True)
    assert_same(contents(live), contents(saved))
    with pytest.raises(AssertionError):
        manager.restore(live)


def test_tensors_of_another_layout_are_copied(manager):
    manager.save({"a": torch.randn(8, 6), "b": torch.randn(5), "c": torch.randn(4)}, step=1)
    saved = manager.load()
    live = {
        "a": torch.zeros(6, 8).t(),
        "b": torch.zeros(5, dtype=torch.float64),
        "c": torch.zeros(8)[::2],
    }
    manager.restore(live, direct=True, cast=True)
    for key, value in live.items():
        assert torch.equal(value, saved[key].to(value.dtype)), key


def test_restored_tensors_share_no_new_memory(manager):
    model = torch.nn.Linear(4, 4)
    manager.save({"model": model, "average": {"weight": model.weight}, "twin": model.bias}, step=1)
    live = {"model": torch.nn.Linear(4, 4), "average": {}, "twin": torch.zeros(4)}
    manager.restore(live, direct=True)
    average, twin = live["average"]["weight"], live["twin"]
    assert torch.equal(average, model.weight)
    assert torch.equal(twin, model.bias)
    live["model"].weight.data.zero_()
    live["model"].bias.data.zero_()
    assert torch.equal(average, model.weight)
    assert torch.equal(twin, model.bias)


def test_autograd_knows_that_a_tensor_was_changed(manager):
    weight = torch.nn.Parameter(torch.randn(10))
    manager.save({"weight": weight}, step=1)
    loss = (weight * weight).sum()
    manager.restore({"weight": weight}, direct=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def many(value: float) -> dict[str, torch.Tensor]:
    return {f"t{number}": torch.full((30_000,), value) for number in range(4)}


@pytest.fixture
def damaged(open_manager, store):
    """Return a manager of two steps, the newer one with a bit flipped past the first chunks."""
    with CheckpointManager(store, compression="none", chunk_bytes="64KiB") as manager:
        for step in (1, 2):
            manager.save(many(float(step)), step=step)
    flip_byte(shard_of(store, 2), 200_000)
    return open_manager()


def test_an_older_checkpoint_makes_up_for_a_damaged_one(damaged):
    live, manager = many(0.0), damaged
    report = manager.restore(live, direct=True)
    assert report.step == 1
    assert [step for step, _ in report.fell_back_from] == [2]
    assert_same(live, many(1.0))
    manager.save(live, step=3)


def test_a_state_that_damage_changed_in_part_is_a_mixture(damaged):
    live, manager = many(0.0), damaged
    # Unless it is direct, nothing is changed.
    with pytest.raises(Corrupt):
        manager.restore(live, step=2)
    assert_same(live, many(0.0))
    with pytest.raises(RestoreIncomplete, match="changed in part") as caught:
        manager.restore(live, step=2, direct=True)
    assert isinstance(caught.value.__cause__, Corrupt)
    with pytest.raises(RestoreIncomplete, match="the live state is a mixture"):
        manager.save(live, step=3)
    assert manager.restore(live, step=1, direct=True).step == 1
    assert_same(live, many(1.0))
    manager.save(live, step=3, rewind=True)


def test_an_older_checkpoint_without_all_of_it_does_not_make_up(open_manager, store):
    def state(value: float, size: int) -> dict[str, torch.Tensor]:
        return many(value) | {"head": torch.full((size,), value)}

    with CheckpointManager(store, compression="none", chunk_bytes="64KiB") as manager:
        manager.save(many(1.0), step=1)
        manager.save(state(2.0, 10), step=2)
        manager.save(state(3.0, 20), step=3)
    flip_byte(shard_of(store, 3), 200_000)
    live, manager = state(0.0, 20), open_manager()
    with pytest.raises(RestoreIncomplete, match="this one has nothing for head"):
        manager.restore(live, strict=False, direct=True)
    with pytest.raises(RestoreIncomplete, match="the live state is a mixture"):
        manager.save(live, step=4)
    flip_byte(shard_of(store, 2), 200_000)
    with pytest.raises(RestoreIncomplete, match="this one has nothing for head"):
        manager.restore(live, strict=False, direct=True)
    assert not manager.restore(many(0.0), direct=True).missing


def test_other_errors_leave_a_mixture_at_once(damaged, monkeypatch):
    damaged.save(many(3.0) | {"turned": torch.ones(2, 3)}, step=3)
    live = many(0.0) | {"turned": torch.zeros(3, 2).t()}

    def fail(*_arguments: object, **_settings: object) -> None:
        raise RuntimeError("no memory, says torch")

    monkeypatch.setattr(Reader, "_allocate", fail)
    with pytest.raises(RestoreIncomplete, match="no memory, says torch"):
        damaged.restore(live, direct=True)


def test_arrays_need_no_torch(store):
    script = f"""
    import sys
    import numpy as np
    from dtruntime import CheckpointManager

    with CheckpointManager({str(store)!r}) as manager:
        manager.save({{"a": np.arange(5.0)}}, step=1)
        live = {{"a": np.zeros(5)}}
        manager.restore(live, direct=True)
    print(live["a"].sum(), "torch" in sys.modules)
    """
    assert run_script(script).stdout == "10.0 False\n"
