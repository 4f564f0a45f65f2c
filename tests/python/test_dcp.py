"""The adapter for `torch.distributed.checkpoint`: what it saves and loads, and what it refuses."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from support import assert_same, flip_byte, shard_of
from torch import nn
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.default_planner import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    _EmptyStateDictLoadPlanner,
)
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

from dtruntime import (
    Corrupt,
    InvalidArgument,
    RestoreIncomplete,
    StepConflict,
    UnsupportedValue,
)
from dtruntime.dcp import StorageReader, StorageWriter

# One process has no process group: torch says so each time.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def a_state() -> dict:
    """Return a state with everything that torch's planner flattens in a special way."""
    shared = torch.arange(200_000, dtype=torch.float32)
    return {
        "model": OrderedDict(weight=torch.randn(300, 400), bias=torch.zeros(7).bfloat16()),
        "tied": [shared, shared],
        "view": torch.arange(12).reshape(3, 4).t(),
        "number": torch.tensor(3.5),
        "nothing": torch.empty(0, 5),
        "plain": {"step": 7, "lr": 0.1, "name": "run", "none": None, "big": 2**80},
        "list": [1, 2, [3, 4]],
        "pair": (torch.ones(3), "text"),
        "numpy": {"array": np.arange(5), "scalar": np.float32(2)},
        "mixed": [{"a": torch.ones(2)}, {"a": torch.zeros(2)}],
    }


def zeroed(value):
    """Return a state of the same shape with other values."""
    if isinstance(value, dict):
        return {key: zeroed(child) for key, child in value.items()}
    if isinstance(value, list) and any(isinstance(v, (torch.Tensor, dict)) for v in value):
        return [zeroed(child) for child in value]
    return torch.zeros_like(value) if isinstance(value, torch.Tensor) else 0


def failures_of(raised: pytest.ExceptionInfo) -> list[BaseException]:
    """Return what each rank raised, according to torch."""
    return [error for error, _ in raised.value.failures.values()]


def save(manager, state, step=1, **options) -> None:
    dcp.save(state, storage_writer=StorageWriter(manager, step, **options))


def load(manager, state, step=None, **options) -> None:
    dcp.load(state, storage_reader=StorageReader(manager, step, **options))


def test_a_state_is_saved_and_loaded(manager):
    state = a_state()
    save(manager, state, metadata={"loss": 0.5})
    live = zeroed(state)
    load(manager, live)
    state["model"] = dict(state["model"])  # torch's planner knows no other dict
    assert_same(live, state)
    assert manager.metadata(1) == {"loss": 0.5}
    assert manager.verify(1).ok
    loaded = manager.load()
    for name in ("model", "view", "number", "nothing", "plain", "list", "numpy"):
        assert_same(loaded[name], state[name], name)
    # By position, and one value in a tuple: this distinguishes them from dicts and tuples.
    assert_same(loaded["tied"], dict(enumerate(state["tied"])))
    assert_same(loaded["mixed"], dict(enumerate(state["mixed"])))
    assert_same(loaded["pair"], (state["pair"],))
    # The two names of one tensor are stored once.
    assert shard_of(Path(manager.path), 1).stat().st_size < 2 * state["tied"][0].nbytes


def test_what_a_manager_saved_is_loaded(manager):
    state = a_state() | {"layers": {1: {"x": torch.ones(4)}}}
    manager.save(state, step=1)
    live = zeroed(state)
    load(manager, live)
    assert_same(live["layers"], state["layers"])
    assert_same(live["plain"], state["plain"])
    assert_same(live["numpy"], state["numpy"])
    assert_same(live["model"], dict(state["model"]))


def test_training_continues_as_if_uninterrupted(manager):
    def make():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(30, 30), nn.ReLU(), nn.Linear(30, 1))
        return model, torch.optim.AdamW(model.parameters(), lr=0.01)

    def train(model, optimizer, steps):
        for step in steps:
            inputs = torch.randn(8, 30, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            model(inputs).square().mean().backward()
            optimizer.step()

    model, optimizer = make()
    train(model, optimizer, range(5))
    saved, moments = get_state_dict(model, optimizer)
    save(manager, {"model": saved, "optimizer": moments})
    train(model, optimizer, range(5, 9))

    other, its_optimizer = make()
    with torch.no_grad():
        other[0].weight.zero_()
    weights, moments = get_state_dict(other, its_optimizer)
    live = {"model": weights, "optimizer": moments}
    load(manager, live)
    set_state_dict(
        other, its_optimizer, model_state_dict=live["model"], optim_state_dict=live["optimizer"]
    )
    train(other, its_optimizer, range(5, 9))
    assert_same(dict(other.state_dict()), dict(model.state_dict()))


def test_an_object_with_a_state_is_restored(manager):
    model, other = nn.Linear(3, 3), nn.Linear(3, 3)
    save(manager, {"model": model})
    load(manager, {"model": other})
    assert torch.equal(model.weight, other.weight)


def test_a_state_is_loaded_without_a_live_one(manager):
    state = {"model": {"w": torch.randn(50, 3)}, "step": 3, "list": [torch.ones(1), torch.ones(2)]}
    save(manager, state)
    found: dict = {}
    _load_state_dict(
        found,
        storage_reader=StorageReader(manager),
        planner=_EmptyStateDictLoadPlanner(),
        no_dist=True,
    )
    assert_same(found, state)


def test_what_is_requested_is_read_and_converted(manager):
    weight = torch.randn(64, 48)
    save(manager, {"w": weight, "v": torch.arange(10), "unasked": torch.ones(9)})
    strided = torch.zeros(48, 64).t()
    live = {"w": torch.zeros(64, 48, dtype=torch.bfloat16), "v": torch.zeros(10)}
    load(manager, live)
    assert torch.equal(live["w"], weight.bfloat16())
    assert torch.equal(live["v"], torch.arange(10.0))
    load(manager, {"w": strided})
    assert torch.equal(strided, weight)
    part = torch.zeros(100)
    load(manager, {"v": (inner := part[45:55])})
    assert torch.equal(inner, torch.arange(10.0))
    assert part.count_nonzero() == 9


def test_missing_names_and_other_shapes_are_reported(manager):
    save(manager, {"w": torch.ones(3)})
    for live in ({"w": torch.ones(4)}, {"v": torch.ones(3)}):
        with pytest.raises(CheckpointException) as raised:
            load(manager, live)
        (error,) = failures_of(raised)
        assert "checkpoint state_dict: v" in str(error) or "for w" in str(error)


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("step-1000", 1000),
        ("runs/outputs/step-1000/", 1000),
        (Path("iter_0000042"), 42),
        ("7", 7),
        ("epoch=3-step=12", 12),
        (9, 9),
    ],
)
def test_the_step_is_the_number_at_the_end_of_the_name(manager, name, step):
    writer, reader = StorageWriter(manager), StorageReader(manager)
    dcp.save({"x": torch.ones(2)}, checkpoint_id=name, storage_writer=writer)
    assert manager.all_steps() == [step]
    live = {"x": torch.zeros(2)}
    dcp.load(live, checkpoint_id=name, storage_reader=reader)
    assert live["x"].tolist() == [1, 1]


@pytest.mark.parametrize("name", ["latest", "step-1000.pt", "", "-", True, 3.5, 2**70])
def test_a_name_without_a_step_is_refused(manager, name):
    with pytest.raises(InvalidArgument, match="checkpoint_id"):
        StorageWriter(manager).reset(name)
    with pytest.raises(InvalidArgument, match="checkpoint_id"):
        StorageReader(manager).reset(name)


def test_wrong_arguments_are_refused(manager, open_manager, tmp_path):
    with pytest.raises(CheckpointException) as raised:
        dcp.save({"x": 1}, storage_writer=StorageWriter(manager))
    assert "without a step" in str(failures_of(raised)[0])
    with pytest.raises(InvalidArgument, match="two different steps"):
        StorageWriter(manager, 1).reset("step-2")
    with pytest.raises(CheckpointException) as raised:
        load(manager, {"x": 1}, from_rank=1)
    assert "there is none" in str(failures_of(raised)[0])
    replicating = open_manager(tmp_path / "other", replicated="*")
    with pytest.raises(InvalidArgument, match="without `replicated`"):
        StorageWriter(replicating, 1)
    with pytest.raises(InvalidArgument, match="another process"):
        pickle.dumps(StorageWriter(manager, 1))
    manager.save([1, 2], step=5)
    with pytest.raises(CheckpointException) as raised:
        load(manager, {"x": 1})
    assert "not a dict" in str(failures_of(raised)[0])
    manager.save({"a.b": 1, "a": {"b": 2}}, step=6)
    with pytest.raises(CheckpointException) as raised:
        load(manager, {"a": {"b": 1}})
    assert "two of its entries" in str(failures_of(raised)[0])
    with pytest.raises(CheckpointException) as raised:
        load(manager, {"x": 1}, from_rank=1)
    assert "1 ranks saved it" in str(failures_of(raised)[0])


def test_damage_is_reported_and_an_older_step_can_be_loaded(manager, store):
    for step in (1, 2):
        save(manager, {"w": torch.full((1000, 1000), float(step))}, step)
    flip_byte(shard_of(store, 2), 5000)
    live = {"w": torch.zeros(1000, 1000)}
    with pytest.raises(CheckpointException) as raised:
        load(manager, live)
    (error,) = failures_of(raised)
    assert isinstance(error, Corrupt)
    assert "affected tensors: w" in str(error)
    load(manager, live, 1)
    assert (live["w"] == 1).all()


def test_a_load_falls_back_from_a_damaged_index(manager, store):
    for step in (1, 2):
        save(manager, {"w": torch.full((10,), float(step))}, step)
    shard = shard_of(store, 2)
    flip_byte(shard, shard.stat().st_size - 100)
    live = {"w": torch.zeros(10)}
    load(manager, live)
    assert (live["w"] == 1).all()
    assert manager.last_load.step == 1


def test_an_empty_store_is_reported(manager):
    with pytest.raises(CheckpointException) as raised:
        load(manager, {"w": torch.zeros(10)})
    assert "there is none" in str(failures_of(raised)[0])


def test_an_unsupported_value_is_named_and_nothing_is_saved(manager):
    with pytest.raises(CheckpointException) as raised:
        save(manager, {"w": torch.ones(3), "odd": {"deep": object()}})
    (error,) = failures_of(raised)
    assert isinstance(error, UnsupportedValue)
    assert """`state["odd"]["deep"]`""" in str(error)
    assert manager.all_steps() == []
    save(manager, {"w": torch.ones(3)})
    assert manager.all_steps() == [1]


def test_steps_only_grow_unless_rewound_by_the_writer(manager):
    save(manager, {"x": 1}, 5)
    with pytest.raises(CheckpointException) as raised:
        save(manager, {"x": 2}, 4)
    assert isinstance(failures_of(raised)[0], StepConflict)
    save(manager, {"x": 2}, 4, rewind=True)
    assert manager.all_steps() == [4]


def test_async_save_runs_in_the_background(manager):
    state = {"w": torch.ones(100_000), "step": 1}
    saving = dcp.async_save(state, storage_writer=StorageWriter(manager, 1))
    state["w"].zero_()  # torch has staged it
    assert isinstance(saving, Future)
    saving.result()
    live = {"w": torch.zeros(100_000), "step": 0}
    load(manager, live)
    assert (live["w"] == 1).all()
    assert live["step"] == 1


class Halves(DefaultSavePlanner):
    """Stores tensors in half precision, and marks plain values as seen."""

    def create_local_plan(self):
        self.state_dict = {
            name: value.bfloat16() if isinstance(value, torch.Tensor) else value
            for name, value in self.state_dict.items()
        }
        return super().create_local_plan()

    def transform_object(self, write_item, object):  # noqa: A002  (torch's name)
        if not isinstance(object, torch.Tensor):
            object = {"seen": object}  # noqa: A001
        return super().transform_object(write_item, object)


def test_a_planner_may_change_values(manager):
    state = {"w": torch.randn(5, 5), "n": {"step": 4}}
    dcp.save(state, storage_writer=StorageWriter(manager, 1), planner=Halves())
    loaded = dict(manager.load())
    assert_same(loaded, {"w": state["w"].bfloat16(), "n": {"step": ({"seen": 4},)}})


class Odd(Halves):
    """Turns a value into one that no checkpoint can hold."""

    def transform_object(self, write_item, _):
        return DefaultSavePlanner.transform_object(self, write_item, Odd)


def test_values_changed_by_a_planner_are_plain_or_refused(manager):
    with pytest.raises(CheckpointException) as raised:
        dcp.save({"n": 1}, storage_writer=StorageWriter(manager, 1), planner=Odd())
    assert isinstance(failures_of(raised)[0], UnsupportedValue)


def test_names_of_a_planner_that_does_not_flatten_are_kept(manager):
    state = {"a.b": torch.ones(3), "nested": {"x": 1, "y": [1, 2]}, "tensors": {"t": torch.ones(2)}}
    writer = StorageWriter(manager, 1)
    dcp.save(state, storage_writer=writer, planner=DefaultSavePlanner(flatten_state_dict=False))
    live = {"a.b": torch.zeros(3), "nested": None, "tensors": None}
    dcp.load(
        live,
        storage_reader=StorageReader(manager),
        planner=DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
    )
    assert_same(live, state)
    loaded = manager.load()
    assert_same(loaded["nested"], (state["nested"],))


class Giving(DefaultLoadPlanner):
    """Provides another tensor to fill than the plan describes."""

    def __init__(self, target: torch.Tensor) -> None:
        super().__init__()
        self.target = target

    def resolve_tensor(self, _):
        return self.target


def into(manager, target: torch.Tensor) -> torch.Tensor:
    """Load `w` into a tensor."""
    shape = manager.load()["w"]
    dcp.load({"w": shape}, storage_reader=StorageReader(manager), planner=Giving(target))
    return target


def test_a_tensor_in_another_layout_is_filled_through_a_copy(manager):
    weight = torch.randn(40, dtype=torch.complex64)
    manager.save({"w": weight}, step=1)
    conjugate = torch.zeros(40, dtype=torch.complex64).conj()
    assert torch.equal(into(manager, conjugate), weight)
    negative = torch.zeros(40, dtype=torch.complex64).conj().imag
    assert negative.is_neg()
    manager.save({"w": weight.real.clone()}, step=2)
    assert torch.equal(into(manager, negative), weight.real)


def test_a_tensor_without_the_memory_is_refused(manager):
    manager.save({"w": torch.ones(4000)}, step=1)
    freed = torch.zeros(4000)
    freed.untyped_storage().resize_(0)
    nowhere = torch.empty(4000, device="meta")
    for target, why in [
        (torch.zeros(7), "provides a tensor of shape"),
        (freed, "has no memory"),
        (nowhere, "has no memory"),
    ]:
        with pytest.raises(CheckpointException) as raised:
            into(manager, target)
        assert why in str(failures_of(raised)[0])


def test_values_that_would_load_differently_are_refused(manager):
    with pytest.raises(CheckpointException) as raised:
        save(manager, {"app": {"model": nn.Linear(2, 2)}})
    assert "would replace it by a dict" in str(failures_of(raised)[0])
    assert manager.all_steps() == []


def test_keys_that_are_equal_as_text_are_refused(manager):
    with pytest.raises(CheckpointException) as raised:
        save(manager, {"a": {"1": torch.ones(2), 1: {"x": torch.ones(3)}}})
    assert "equal as strings" in str(failures_of(raised)[0])
    assert manager.all_steps() == []


def test_user_metadata_does_not_look_like_a_planned_checkpoint(manager):
    save(manager, {"pair": (1,)}, 1, metadata={"loss": 1})
    manager.save({"pair": (torch.ones(2),)}, step=2, metadata=manager.metadata(1))
    live = {"pair": None}
    load(manager, live)
    assert_same(live["pair"], (torch.ones(2),))
    with pytest.raises(InvalidArgument, match="metadata"):
        StorageWriter(manager, 1, metadata=[1])


def test_the_manager_treats_a_load_as_a_restore(manager, store, caplog):
    for step in (5, 10):
        save(manager, {"w": torch.full((1000, 1000), float(step))}, step)
    live = {"w": torch.zeros(1000, 1000)}
    load(manager, live, 5)
    assert manager.should_save(6)
    assert "saving from here on needs `rewind=True`" in caplog.text
    flip_byte(shard_of(store, 10), 5000)
    with pytest.raises(CheckpointException):
        load(manager, live, 10)
    with pytest.raises(RestoreIncomplete):
        manager.save(live, step=11)
    load(manager, live, 5)
    manager.save(live, step=11)


def test_a_load_waits_for_a_save_that_still_copies(device, manager):
    weight = device.tensor(torch.ones(100_000)).requires_grad_()
    optimizer = torch.optim.SGD([weight], lr=0.1)
    manager.save({"w": torch.zeros(100_000)}, step=1)
    device.hold_copies(True)
    handle = manager.save_async({"w": weight}, step=2, consistency="overlap", optimizer=optimizer)
    waits = device.calls("cuStreamWaitEvent")
    load(manager, {"w": weight}, 1)
    assert device.calls("cuStreamWaitEvent") > waits
    device.hold_copies(False)
    handle.result()


def test_one_writer_and_one_reader_serve_many_steps(manager):
    writer, reader = StorageWriter(manager), StorageReader(manager)
    for step in (1, 2, 3):
        dcp.save({"n": step}, checkpoint_id=f"step-{step}", storage_writer=writer)
    live = {"n": 0}
    dcp.load(live, checkpoint_id="step-1", storage_reader=reader)
    assert live["n"] == 1
    dcp.load(live, storage_reader=reader)
    assert live["n"] == 3
    states = [{"n": step, "w": torch.full((1_000_000,), float(step))} for step in (4, 5)]
    for saving in [
        dcp.async_save(state, checkpoint_id=f"step-{state['n']}", storage_writer=writer)
        for state in states
    ]:
        saving.exception()  # the one that came second may find the later step saved
    for step in manager.all_steps()[3:]:
        assert manager.load(step)["n"] == step


def test_ranks_that_would_read_different_checkpoints_are_refused(manager):
    reader = StorageReader(manager)
    plans = [dcp.planner.LoadPlan([], storage_data=(step, "attempt")) for step in (1, 1, 2)]
    assert reader.prepare_global_plan(plans[:2]) == plans[:2]
    with pytest.raises(InvalidArgument, match=r"step 1 \(attempt\), step 2"):
        reader.prepare_global_plan(plans)
