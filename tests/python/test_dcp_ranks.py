"""The adapter for `torch.distributed.checkpoint` on several ranks: any number saves, any loads."""

from __future__ import annotations

import json

import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file
from test_sharded_tensors import ckpt_tool

GROUP = """
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from datetime import timedelta
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from dtruntime.dcp import StorageReader, StorageWriter
world_size = int(os.environ["WORLD_SIZE"])
dist.init_process_group(
    "gloo", rank=rank, world_size=world_size, timeout=timedelta(seconds=120),
    store=dist.FileStore(f"{store}.group-{world_size}-{os.environ.get('GROUP', 0)}", world_size),
)
mesh = init_device_mesh("cpu", (world_size,))

def full(name):
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    return torch.randn(1001, 12, generator=generator)

def state_of(make):
    "Sharded and replicated tensors and plain values, each passed through `make`."
    shard = lambda name, dim: distribute_tensor(make(full(name)), mesh, [Shard(dim)])
    return {
        "model": {"rows": shard("rows", 0), "columns": shard("columns", 1),
                  "all_ranks": distribute_tensor(make(full("all_ranks")), mesh, [Replicate()]),
                  "plain": make(full("plain")), "plain2": make(full("plain2"))},
        "optimizer": {"state": {"rows": {"step": make(torch.tensor(5.0)), "m": shard("m", 0)}},
                      "groups": [{"lr": 0.1, "names": ["rows", "columns"]}]},
        "step": 5,
    }

def whole(value):
    if isinstance(value, dict):
        return {key: whole(child) for key, child in value.items()}
    if isinstance(value, list):
        return [whole(child) for child in value]
    return value.full_tensor() if isinstance(value, DTensor) else value

def check(live):
    live = whole(live)
    for name, tensor in live["model"].items():
        assert torch.equal(tensor, full(name)), name
    moments = live["optimizer"]["state"]["rows"]
    assert torch.equal(moments["m"], full("m")) and moments["step"] == 5
    assert live["optimizer"]["groups"] == [{"lr": 0.1, "names": ["rows", "columns"]}]
    assert live["step"] == 5

def failures(call):
    try:
        call()
    except dcp.api.CheckpointException as raised:
        return {rank: type(error).__name__ for rank, (error, _) in raised.failures.items()}
    raise AssertionError("it did not fail")
"""


SAVE = """
with CheckpointManager(store, agreement_timeout=60) as manager:
    for step in (1, 2):
        writer, planner = StorageWriter(manager, step), DefaultSavePlanner(enable_plan_caching=True)
        dcp.save(state_of(torch.clone), storage_writer=writer, planner=planner)
    live = state_of(torch.zeros_like)
    live["step"] = 0
    dcp.load(live, storage_reader=StorageReader(manager))
    check(live)
    print(sorted(manager.load(keys=["model", "step"], strict=False)["model"]))
"""


LOAD = """
live = state_of(torch.zeros_like)
live["step"] = 0
live["optimizer"]["groups"] = [{"lr": 0, "names": []}]
with CheckpointManager(store, agreement_timeout=60) as manager:
    dcp.load(live, storage_reader=StorageReader(manager))
    check(live)
    everything = manager.load(from_rank=0)
    assert torch.equal(everything["model"]["rows"], full("rows")) and everything["step"] == 5
live = state_of(torch.zeros_like)
with CheckpointManager(store, read_only=True) as reader:
    dcp.load(live, storage_reader=StorageReader(reader))
    check(live)
print("loaded")
"""


@pytest.mark.parametrize("others", [1, 2, 4])
def test_any_number_of_ranks_loads_what_any_number_saved(coordinator, store, others):
    printed = run_ranks(GROUP + SAVE, store, coordinator.url, 3)
    # Every rank has its parts; rank 0 lists all of them.
    everything = ["all_ranks", "columns", "plain", "plain2", "rows"]
    assert json.loads(printed[0].replace("'", '"')) == everything
    manifest = json.loads((store / "step-000000000002" / "manifest.json").read_text())
    stored = sum(shard["raw_bytes"] for shard in manifest["shards"])
    assert stored == pytest.approx(6 * 1001 * 12 * 4, rel=0.02)  # each byte once
    assert run_ranks(GROUP + LOAD, store, coordinator.url, others) == ["loaded\n"] * others


def test_the_tool_assembles_it(coordinator, store, tmp_path):
    run_ranks(GROUP + SAVE, store, coordinator.url, 3)
    assert ckpt_tool("verify", store, "--all").returncode == 0
    file = tmp_path / "model.safetensors"
    ran = ckpt_tool("restore", store, "-o", file, "--tensors", "model.*")
    assert ran.returncode == 0, ran.stderr
    written = load_file(file)
    assert sorted(written) == [
        f"model.{n}" for n in ("all_ranks", "columns", "plain", "plain2", "rows")
    ]
    for name in ("rows", "columns", "plain"):
        generator = torch.Generator().manual_seed(sum(map(ord, name)))
        assert torch.equal(written[f"model.{name}"], torch.randn(1001, 12, generator=generator))


def test_a_rank_that_cannot_save_fails_the_save_on_all(coordinator, store):
    printed = run_ranks(
        GROUP
        + """
class Failing(DefaultSavePlanner):
    def resolve_data(self, item):
        if rank == 1:
            raise RuntimeError("the tensor is gone")
        return super().resolve_data(item)

with CheckpointManager(store, agreement_timeout=60) as manager:
    state = state_of(torch.clone)
    writer = StorageWriter(manager, 1)
    print(failures(lambda: dcp.save(state, storage_writer=writer, planner=Failing())))
    print(manager.all_steps())
    dcp.save(state, storage_writer=StorageWriter(manager, 2))
    print(manager.all_steps())
""",
        store,
        coordinator.url,
    )
    told = "{0: 'SaveAborted', 1: 'RuntimeError', 2: 'SaveAborted'}\n[]\n[2]\n"
    assert printed == [told] * 3


def test_values_of_a_rank_are_read_with_from_rank(coordinator, store):
    printed = run_ranks(
        GROUP
        + """
with CheckpointManager(store, replicated=["all_ranks"], agreement_timeout=60) as manager:
    manager.save({"own": torch.tensor([rank]), "all_ranks": torch.ones(3), "n": rank}, step=1)
    live = {"own": torch.tensor([9]), "all_ranks": torch.zeros(3), "n": 9}
    dcp.load(live, storage_reader=StorageReader(manager))
    assert live["own"] == rank and live["all_ranks"].sum() == 3 and live["n"] == rank
    dcp.load(live, storage_reader=StorageReader(manager, from_rank=1))
    assert live["own"] == 1 and live["n"] == 1
print("loaded")
""",
        store,
        coordinator.url,
        2,
    )
    assert printed == ["loaded\n"] * 2
    printed = run_ranks(
        GROUP
        + """
with CheckpointManager(store, agreement_timeout=60) as manager:
    live = {"own": torch.tensor([9]), "all_ranks": torch.zeros(3)}
    print(sorted(failures(lambda: dcp.load(live, storage_reader=StorageReader(manager))).values()))
    all_ranks = {"all_ranks": torch.zeros(3)}
    dcp.load(all_ranks, storage_reader=StorageReader(manager))
    assert all_ranks["all_ranks"].sum() == 3
    dcp.load(live, storage_reader=StorageReader(manager, from_rank=1))
    print(live["own"].tolist())
""",
        store,
        coordinator.url,
        3,
    )
    assert printed == ["['InvalidArgument', 'InvalidArgument', 'InvalidArgument']\n[1]\n"] * 3


def test_pipeline_stages_are_assembled(coordinator, store):
    printed = run_ranks(
        GROUP
        + """
with CheckpointManager(store, agreement_timeout=60) as manager:
    stage = {f"layer{rank}": torch.full((4,), float(rank)), f"scalar{rank}": torch.tensor(rank)}
    dcp.save({"model": stage, "step": 3}, storage_writer=StorageWriter(manager, 1))
    other = 1 - rank
    model = {f"layer{other}": torch.zeros(4), f"scalar{other}": torch.tensor(9)}
    live = {"model": model, "step": 0}
    dcp.load(live, storage_reader=StorageReader(manager))
    assert live["model"][f"layer{other}"].tolist() == [float(other)] * 4
    assert live["model"][f"scalar{other}"] == other and live["step"] == 3
    print(sorted(manager.load(from_rank=0)["model"]))
""",
        store,
        coordinator.url,
        2,
    )
    assert printed == ["['layer0', 'layer1', 'scalar0']\n"] * 2


def test_a_group_other_than_the_managers_is_refused(coordinator, store):
    printed = run_ranks(
        GROUP
        + """
from pathlib import Path
with CheckpointManager(store, agreement_timeout=60) as manager:
    writer = lambda: StorageWriter(manager, 1)
    some, first = dist.new_group([1, 2]), dist.new_group([0])
    print(failures(lambda: dcp.save({"x": 1}, storage_writer=writer(), no_dist=True)))
    try:
        dcp.save({"x": 1}, storage_writer=writer(), use_collectives=False)
    except InvalidArgument as error:
        print(error.what)
    if rank == 0:
        print(failures(lambda: dcp.save({"x": 1}, storage_writer=writer(), process_group=first)))
    else:
        print(failures(lambda: dcp.save({"x": 1}, storage_writer=writer(), process_group=some)))
        own = Path(store).with_name(f"own-{rank}")
        with CheckpointManager(own, rank=0, world_size=1) as alone:
            dcp.save({"x": 1}, storage_writer=StorageWriter(alone, 1), no_dist=True)
            print(alone.all_steps())
""",
        store,
        coordinator.url,
    )
    one, two = "{0: 'InvalidArgument'}\n", "{0: 'InvalidArgument', 1: 'InvalidArgument'}\n"
    apart = "`dcp.save` with `use_collectives=False`\n"
    assert printed == [one + apart + one, *[one + apart + two + "[1]\n"] * 2]


def test_empty_lists_and_tensors_load_on_any_number_of_ranks(coordinator, store):
    state = """
def state_of(make):
    return {
        "list": [make(torch.full((1000,), float(n))) for n in range(5)],
        "deep": [[make(torch.ones(3)), {}], {"a": make(torch.tensor(2.0))}],
        "nothing": make(torch.empty(0, 4)), "values": [1, [2, 3]], "pair": (1, "x"),
    }

def check(live):
    expected = state_of(torch.clone)
    assert [t.tolist() for t in live["list"]] == [t.tolist() for t in expected["list"]]
    assert live["deep"][0][0].tolist() == [1, 1, 1] and live["deep"][0][1] == {}
    assert live["deep"][1]["a"] == 2 and live["nothing"].shape == (0, 4)
    assert live["values"] == [1, [2, 3]] and live["pair"] == (1, "x")
"""
    save = """
with CheckpointManager(store, agreement_timeout=60) as manager:
    dcp.save(state_of(torch.clone), storage_writer=StorageWriter(manager, 1))
"""
    load = """
with CheckpointManager(store, agreement_timeout=60) as manager:
    live = state_of(torch.zeros_like) | {"values": [0], "pair": ()}
    dcp.load(live, storage_reader=StorageReader(manager))
    check(live)
    for sized in manager.load(from_rank=0)["list"].values():
        assert sized.shape == (1000,)
print("loaded")
"""
    assert run_ranks(GROUP + state + save + load, store, coordinator.url, 3) == ["loaded\n"] * 3
    assert run_ranks(GROUP + state + load, store, coordinator.url, 2) == ["loaded\n"] * 2


def test_a_planner_may_reuse_plans_of_an_earlier_save(coordinator, store):
    printed = run_ranks(
        GROUP
        + """
def save(step, state):
    planner = DefaultSavePlanner(enable_plan_caching=True)
    dcp.save(state, storage_writer=StorageWriter(manager, step), planner=planner)

def load(step, state):
    dcp.load(state, storage_reader=StorageReader(manager, step))
    return state

with CheckpointManager(store, agreement_timeout=60) as manager:
    all_ranks = {"lr": 0.1, "scale": torch.tensor(3.0), "w": torch.ones(5)}
    save(1, all_ranks)
    for step, owner in ((2, 0), (3, 1)):  # the plan of one rank changes, the other's does not
        save(step, all_ranks | ({f"only{owner}": torch.ones(2)} if rank == owner else {}))
        everything = manager.load(step, from_rank=0)
        assert sorted(everything) == ["lr", f"only{owner}", "scale", "w"], everything
        only = f"only{owner}"
        live = {"lr": 0, "scale": torch.tensor(0.0), "w": torch.zeros(5), only: torch.zeros(2)}
        live = load(step, live)
        print(live["lr"], live["scale"].item(), live["w"].sum().item(), live[only].tolist())
""",
        store,
        coordinator.url,
        2,
    )
    assert printed == ["0.1 3.0 5.0 [1.0, 1.0]\n" * 2] * 2


def test_a_planner_may_convert_tensors_on_several_ranks(coordinator, store):
    printed = run_ranks(
        GROUP
        + """
class Halves(DefaultSavePlanner):
    def transform_object(self, item, value):
        value = super().transform_object(item, value)
        return value.bfloat16() if isinstance(value, torch.Tensor) else value

with CheckpointManager(store, agreement_timeout=60) as manager:
    writer = StorageWriter(manager, 1)
    dcp.save(state_of(torch.clone), storage_writer=writer, planner=Halves())
    live = state_of(torch.zeros_like)
    dcp.load(live, storage_reader=StorageReader(manager))
    live = whole(live)
    for name, tensor in live["model"].items():
        assert torch.equal(tensor, full(name).bfloat16().float()), name
    print(live["step"])
""",
        store,
        coordinator.url,
        2,
    )
    assert printed == ["5\n"] * 2


def test_two_dimensional_meshes_and_parts_of_equal_shape(coordinator, store):
    printed = run_ranks(
        GROUP
        + """
two = init_device_mesh("cpu", (2, 2))
half = init_device_mesh("cpu", (2, 2), mesh_dim_names=("side", "rank"))["rank"]
with CheckpointManager(store, agreement_timeout=60) as manager:
    hybrid = lambda t: {
        "all_ranks": distribute_tensor(t, two, [Replicate(), Shard(0)]),
        "both": distribute_tensor(t, two, [Shard(0), Shard(1)]),
    }
    dcp.save(hybrid(full("x")), storage_writer=StorageWriter(manager, 1))
    live = hybrid(torch.zeros(1001, 12))
    dcp.load(live, storage_reader=StorageReader(manager))
    assert all(torch.equal(t.full_tensor(), full("x")) for t in live.values())
    # Two sides that call different tensors the same, each on a mesh of its own.
    mine = DTensor.from_local(torch.full((4, 1), float(rank // 2)), half, [Shard(0)])
    manager.save({"w": mine}, step=2)
    live = {"w": DTensor.from_local(torch.zeros(4, 1), half, [Shard(0)])}
    print(set(failures(lambda: dcp.load(live, storage_reader=StorageReader(manager))).values()))
""",
        store,
        coordinator.url,
        4,
    )
    assert printed == ["{'Corrupt'}\n"] * 4


def test_ranks_save_in_the_background(coordinator, store):
    printed = run_ranks(
        GROUP
        + """
with CheckpointManager(store, agreement_timeout=60, staging_bytes="16MiB") as manager:
    writer = StorageWriter(manager)
    for step in (1, 2):
        state = state_of(torch.clone)
        saving = dcp.async_save(state, checkpoint_id=f"step-{step}", storage_writer=writer)
        state["model"]["plain"].zero_()
        saving.result()
    live = state_of(torch.zeros_like)
    dcp.load(live, storage_reader=StorageReader(manager))
    check(live)
    dcp.save({"x": 1}, storage_writer=StorageWriter(manager, 1, rewind=True))
    print(manager.all_steps())
""",
        store,
        coordinator.url,
        2,
    )
    assert printed == ["[1]\n"] * 2


def test_an_unsupported_value_does_not_end_the_save_in_flight(coordinator, store):
    printed = run_ranks(
        GROUP
        + """
with CheckpointManager(store, agreement_timeout=60, compression="gzip") as manager:
    handle = manager.save_async({"w": torch.randn(2_000_000)}, step=1)
    try:
        manager.save_async({"x": 1}, step=2, metadata={1: 2})
    except InvalidArgument:
        print(handle.result().step)
    handle = manager.save_async({"w": torch.randn(2_000_000)}, step=3)
    writer = StorageWriter(manager, 4)
    print(failures(lambda: dcp.save({"odd": object()}, storage_writer=writer))[0])
    print(handle.result().step)
    try:
        manager.save_async({"x": 1}, step=5, if_busy="raise")
    except InvalidArgument as error:
        print(error.what)
""",
        store,
        coordinator.url,
        2,
    )
    told = "1\nUnsupportedValue\n3\nsaving with `if_busy` = 'raise' on 2 ranks\n"
    assert printed == [told] * 2
