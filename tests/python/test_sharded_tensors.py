"""Sharded tensors: what each rank saves of them, and how any number of ranks restores them."""

from __future__ import annotations

import ctypes
import itertools
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import run_ranks, torchrun
from safetensors.torch import load_file
from support import assert_same, script_environment

from dtruntime import CheckpointManager, Corrupt, InvalidArgument
from dtruntime.loading.assembling import Assembly, Part, Parts, overlap
from dtruntime.state.sharded_tensors import Box, Slice, contiguous_strides
from dtruntime.state.tensors import TensorRecord
from dtruntime.state.tree import TAG_DICT, TAG_TENSOR, Tree

# A process group without communication: it only provides meshes and placements.
LAYOUTS = """
import itertools, math
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

world_size = int(os.environ["WORLD_SIZE"])
dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())

def placements_of(layout):
    return [Replicate() if dim is None else Shard(dim) for dim in layout]

def sharded(full, mesh_shape, layout):
    "The DTensor of this rank, cut by torch's own rule: one mesh dimension after the other."
    mesh = init_device_mesh("cpu", mesh_shape)
    local = full
    for at, size, dim in zip(mesh.get_coordinate(), mesh_shape, layout):
        if dim is not None:
            parts = list(local.chunk(size, dim))
            empty = local.narrow(dim, 0, 0)
            local = (parts + [empty] * (size - len(parts)))[at]
    return DTensor.from_local(
        local.clone(), mesh, placements_of(layout), run_check=False, shape=full.shape,
        stride=full.stride(),
    )

def full_of(case):
    shape, dtype = CASES[case]
    generator = torch.Generator().manual_seed(case)
    bits = torch.randint(0, 256, (math.prod(shape) * dtype.itemsize,), generator=generator)
    return bits.to(torch.uint8).view(dtype).reshape(shape)

CASES = [
    ((10, 6), torch.float32),
    ((7,), torch.bfloat16),
    ((1, 5), torch.float64),
    ((2, 3, 8), torch.int32),
    ((13, 4, 3), torch.float16),
    ((3, 200_000), torch.float32),
    ((16, 16), torch.complex64),
    ((5, 8), torch.float8_e4m3fn),
    ((), torch.float32),
]

def layouts(ndim):
    "Meshes of all ranks, and what each of their dimensions does."
    dims = [None, *range(ndim)]
    for dim in dims:
        yield (world_size,), (dim,)
    if world_size % 2 == 0:
        for pair in itertools.product(dims, dims):
            if pair[0] is None or pair[0] != pair[1]:
                yield (world_size // 2, 2), pair

def state_of(shift):
    "Each case under some layout of its own."
    state = {}
    for case in range(len(CASES)):
        full = full_of(case)
        choices = list(layouts(full.ndim))
        mesh_shape, layout = choices[(shift + case) % len(choices)]
        state[f"case{case}"] = sharded(full, mesh_shape, layout)
    return state

def same_bits(one, other):
    one, other = one.contiguous(), other.contiguous()
    return one.shape == other.shape and torch.equal(
        one.view(-1).view(torch.uint8), other.view(-1).view(torch.uint8)
    )
"""
SHIFTS = 8
EXAMPLES = Path(__file__).parents[2] / "python" / "examples"


def written_to_a_file(store, step):
    """Return the cases that ``ckpt-tool restore`` can write, without torch."""
    file = store.parent / f"{step}.safetensors"
    asked = ["--step", str(step), "--tensors", "model.*", "--strip-prefix", "model"]
    command = [sys.executable, "-m", "dtruntime.tool", "restore", store, "-o", file, *asked]
    subprocess.run(command, env=script_environment(), check=True, capture_output=True)
    return dict(sorted(load_file(file).items()))


@pytest.mark.parametrize(("saved_by", "loaded_by"), [(4, 3), (3, 2), (2, 4)])
def test_any_layout_is_restored_into_any_other(coordinator, tmp_path, saved_by, loaded_by):
    store = tmp_path / "store"
    run_ranks(
        LAYOUTS
        + f"""
with CheckpointManager(store, replicated="*", chunk_bytes="64KiB") as manager:
    for shift in range({SHIFTS}):
        manager.save({{"model": state_of(shift), "shift": shift}}, step=shift)
""",
        store,
        coordinator.url,
        world_size=saved_by,
    )
    full_of = whole_cases()
    with CheckpointManager(store, read_only=True, rank=0, world_size=1) as alone:
        for shift in range(SHIFTS):
            loaded = alone.load(step=shift)
            assert loaded["shift"] == shift
            assert_same(loaded["model"], full_of)
            assert_same(written_to_a_file(store, shift), full_of)
        assert alone.verify().ok
    outputs = run_ranks(
        LAYOUTS
        + f"""
with CheckpointManager(store) as manager:
    for shift in range({SHIFTS}):
        live = {{"model": state_of(shift + 5), "shift": None}}
        expected = {{name: t.to_local().clone() for name, t in live["model"].items()}}
        for tensor in live["model"].values():
            tensor.to_local().view(torch.uint8).zero_() if tensor.ndim else None
        manager.restore(live, step=shift)
        for name, tensor in live["model"].items():
            assert same_bits(tensor.to_local(), expected[name]), (shift, name, tensor.placements)
    print("restored")
""",
        store,
        coordinator.url,
        world_size=loaded_by,
    )
    assert outputs == ["restored\n"] * loaded_by


def whole_cases():
    """Return the cases of `LAYOUTS` as plain tensors."""
    names = {"os": __import__("os"), "math": math, "itertools": itertools, "torch": torch}
    source = LAYOUTS[LAYOUTS.index("def full_of") : LAYOUTS.index("def layouts")]
    exec(source, names)  # noqa: S102  (what the ranks run, too)
    return {f"case{case}": names["full_of"](case) for case in range(len(names["CASES"]))}


def test_parts_that_replicas_hold_are_written_once(coordinator, tmp_path):
    store = tmp_path / "store"
    outputs = run_ranks(
        LAYOUTS
        + """
full = torch.arange(100_000.0).reshape(100, 1000)
with CheckpointManager(store, replicated="*", compression="none") as manager:
    halves = {"w": sharded(full, (2, 2), (None, 0))}
    print(manager.save(halves, step=1).raw_bytes)
    replicated = {"w": sharded(full, (4,), (None,))}
    print(manager.save(replicated, step=2).raw_bytes)
""",
        store,
        coordinator.url,
        world_size=4,
    )
    written = [list(map(int, out.split())) for out in outputs]
    assert [first for first, _ in written] == [200_000, 200_000, 0, 0]
    assert sum(second for _, second in written) == 400_000, "whole on every rank: dealt among all"


def test_parts_that_are_empty_here_and_shared_memory_are_told_apart(coordinator, tmp_path):
    store = tmp_path / "store"
    run_ranks(
        LAYOUTS
        + """
# Views of one tensor, of which the second replica writes nothing.
experts = torch.arange(400.0).reshape(4, 10, 10)
mesh = init_device_mesh("cpu", (2, 2))
column = mesh.get_coordinate()[1]
mine = experts[:, :, 5 * column : 5 * column + 5].clone()
state = {
    f"expert{number}": DTensor.from_local(
        part, mesh, placements_of((None, 1)), run_check=False, shape=(10, 10), stride=(10, 1)
    )
    for number, part in enumerate(mine.unbind(0))
}
with CheckpointManager(store, replicated="*") as manager:
    manager.save(state, step=1)
    loaded = manager.load()
    for number in range(4):
        assert torch.equal(loaded[f"expert{number}"], experts[number]), number
    live = {
        name: DTensor.from_local(
            torch.zeros(10, 5), mesh, placements_of((None, 1)), run_check=False, shape=(10, 10),
            stride=(10, 1),
        )
        for name in state
    }
    manager.restore(live)
    for name in state:
        assert torch.equal(live[name].to_local(), state[name].to_local()), name
""",
        store,
        coordinator.url,
        world_size=4,
    )


def test_parts_of_different_tensors_are_refused(coordinator, tmp_path):
    store = tmp_path / "store"
    outputs = run_ranks(
        LAYOUTS
        + """
full = torch.arange(12.0).reshape(6, 2)
mesh = init_device_mesh("cpu", (world_size,))
with CheckpointManager(store) as manager:
    for tensor in (
        DTensor.from_local(full, mesh, [Partial()], run_check=False),
        DTensor.from_local(full, mesh, [Shard(0)], run_check=False, shape=(7, 2), stride=(2, 1)),
    ):
        try:
            manager.save({"w": tensor}, step=1)
        except UnsupportedValue as error:
            print(error.why.split(",")[0])
""",
        store,
        coordinator.url,
        world_size=2,
    )
    assert outputs[0].splitlines() == [
        "each rank holds a summand of it",
        "this rank's part",
    ]


def test_pipeline_stages_with_equal_names_keep_their_tensors(coordinator, tmp_path):
    run_ranks(
        LAYOUTS
        + """
from torch.distributed.device_mesh import DeviceMesh
mesh = DeviceMesh("cpu", [0, 1] if rank < 2 else [2, 3])
def stage_of(value, placement):
    local = torch.full((4, 2), value)
    return DTensor.from_local(local, mesh, [placement], run_check=False)

with CheckpointManager(store) as manager:
    for step, placement in enumerate((Replicate(), Shard(0))):
        mine = 1.0 + (rank >= 2)
        manager.save({"w": stage_of(mine, placement)}, step=step)
        live = {"w": stage_of(0.0, placement)}
        manager.restore(live, step=step)
        assert torch.equal(live["w"].to_local(), torch.full((4, 2), mine)), (step, live)
    try:
        manager.load(step=1)
    except Corrupt as error:
        assert "different values under this name" in error.why, error
    else:
        raise AssertionError("stages were mixed")
""",
        store := tmp_path / "store",
        coordinator.url,
        world_size=4,
    )
    assert store.exists()


def test_a_manager_of_fewer_ranks_than_hold_parts_is_refused(coordinator, tmp_path):
    run_ranks(
        LAYOUTS
        + """
full = torch.arange(64.0).reshape(8, 8)
with CheckpointManager(f"{store}-{rank}", rank=0, world_size=1) as manager:
    for layout in ((0,), (1,)):
        try:
            manager.save({"w": sharded(full, (world_size,), layout)}, step=1)
        except UnsupportedValue as error:
            assert "hold parts of it, and this manager saves for 1" in error.why, error
        else:
            raise AssertionError("it was saved")
    # What every rank holds whole, one rank can save.
    manager.save({"w": sharded(full, (world_size,), (None,))}, step=2)
    assert torch.equal(manager.load()["w"], full)
""",
        tmp_path / "store",
        coordinator.url,
        world_size=2,
    )


def test_an_optimizer_gets_sharded_moments_or_says_why_not(coordinator, tmp_path):
    run_ranks(
        LAYOUTS
        + """
class Wrapper:
    "An optimizer behind an object of its own, as trainers have."
    def __init__(self, optimizer):
        self.state_dict, self.load_state_dict = optimizer.state_dict, optimizer.load_state_dict

def make(layout):
    parameter = torch.nn.Parameter(sharded(torch.ones(8, 6), (world_size,), layout))
    parameter.grad = sharded(torch.arange(48.0).reshape(8, 6), (world_size,), layout)
    return parameter, torch.optim.AdamW([parameter])

with CheckpointManager(store, replicated="*") as manager:
    parameter, optimizer = make((0,))
    optimizer.step()
    manager.save({"o": optimizer}, step=1)
    moment = torch.arange(48.0).reshape(8, 6) * 0.1
    for layout in ((0,), (1,)):
        parameter, optimizer = make(layout)
        manager.restore({"o": optimizer})
        found = optimizer.state[parameter]["exp_avg"]
        assert found.placements == parameter.placements
        assert torch.allclose(found.to_local(), sharded(moment, (world_size,), layout).to_local())
        before = found.to_local().clone()
        optimizer.step()
        manager.restore({"o": Wrapper(optimizer)})
        assert torch.equal(optimizer.state[parameter]["exp_avg"].to_local(), before)
    parameter, optimizer = make((0,))
    try:
        manager.restore({"o": Wrapper(optimizer)})
    except InvalidArgument as error:
        assert "take a step, or initialize the optimizer's state" in error.why, error
        assert not optimizer.state
    else:
        raise AssertionError("whole moments for parts of parameters")
""",
        tmp_path / "store",
        coordinator.url,
        world_size=2,
    )


def test_interleaved_parts_are_not_a_box(coordinator, tmp_path):
    run_ranks(
        LAYOUTS
        + """
from torch.distributed.tensor.placement_types import _StridedShard
from dtruntime.state.sharded_tensors import box_of
flat = sharded(torch.arange(64.0).reshape(8, 8), (4,), (1,)).flatten()
if any(type(p) is _StridedShard for p in flat.placements):
    with CheckpointManager(store) as manager:
        try:
            manager.save({"w": flat}, step=1)
        except UnsupportedValue as error:
            assert "is not the contiguous box" in error.why, error
        else:
            raise AssertionError("it was saved")
# As FSDP2 makes them over tensor parallelism: one piece after all.
mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
at = mesh.get_coordinate()
rows = torch.arange(16).chunk(2)[at[1]].chunk(2)[at[0]]
both = DTensor.from_local(
    rows.float(), mesh, [_StridedShard(0, split_factor=2), Shard(0)], run_check=False,
    shape=(16,), stride=(1,),
)
box = box_of(both)
assert (box.offsets[0], box.sizes[0]) == (int(rows[0]), 4), box
""",
        tmp_path / "store",
        coordinator.url,
        world_size=4,
    )


def test_ranks_with_different_tensors_under_one_name_are_refused(coordinator, tmp_path):
    store = tmp_path / "store"
    run_ranks(
        LAYOUTS
        + """
shapes = [(4, 2), (6, 2)]
with CheckpointManager(store) as manager:
    # Each rank takes its part of a tensor of its own, or the same half of one.
    manager.save({"w": sharded(torch.zeros(shapes[rank]), (2,), (0,))}, step=1)
    half = sharded(torch.zeros(4, 2), (2,), (0,) if rank == 0 else (1,))
    manager.save({"w": half}, step=2)
try:
    with CheckpointManager(store, replicated="w") as manager:
        manager.save({"w": sharded(torch.zeros(shapes[rank]), (2,), (0,))}, step=3)
except CheckpointError as error:
    assert "disagree on the replicated entries" in error.why, error
else:
    raise AssertionError("it was saved")
""",
        store,
        coordinator.url,
        world_size=2,
    )
    with CheckpointManager(store, read_only=True, rank=0, world_size=2) as manager:
        with pytest.raises(
            Corrupt, match=r"assembling `w` of shape \[4, 2\] from.*of shape \(6, 2\)"
        ):
            manager.load(step=1)
        with pytest.raises(Corrupt, match="parts that ranks saved overlap"):
            manager.load(step=2)


def test_a_plain_checkpoint_is_restored_into_parts_and_back(coordinator, tmp_path):
    store = tmp_path / "store"
    full = torch.arange(77.0).reshape(11, 7)
    with CheckpointManager(store, replicated="*") as manager:
        manager.save({"w": full, "wide": full.t()}, step=1)
    run_ranks(
        LAYOUTS
        + """
full = torch.arange(77.0).reshape(11, 7)
with CheckpointManager(store, replicated="*") as manager:
    live = {
        "w": sharded(torch.zeros(11, 7), (world_size,), (0,)),
        "wide": sharded(torch.zeros(7, 11), (world_size,), (1,)),
    }
    manager.restore(live)
    expected = sharded(full, (world_size,), (0,)).to_local()
    assert torch.equal(live["w"].to_local(), expected)
    assert torch.equal(live["wide"].to_local(), sharded(full.t(), (world_size,), (1,)).to_local())
    manager.save(live, step=2)
""",
        store,
        coordinator.url,
        world_size=3,
    )
    live = {"w": torch.zeros(11, 7), "wide": torch.zeros(7, 11)}
    with CheckpointManager(store, read_only=True) as manager:
        assert manager.restore(live).step == 2
        assert_same(manager.load(keys="wide"), {"wide": full.t().contiguous()})
        with pytest.raises(InvalidArgument, match=r"the live shape is \(7, 11\), the saved one"):
            manager.restore({"w": torch.zeros(7, 11), "wide": torch.zeros(7, 11)})
    assert torch.equal(live["w"], full)
    assert torch.equal(live["wide"], full.t())


def test_a_sharded_model_continues_on_another_number_of_ranks(tmp_path):
    example, store = EXAMPLES / "train_fsdp.py", tmp_path / "store"
    four = torchrun("--nproc-per-node", 4, example, store, "--steps", 20)
    assert four.returncode == 0, four.stderr
    assert four.stdout.splitlines()[0] == "4 ranks begin after step 0"
    calm = torchrun("--nproc-per-node", 2, example, tmp_path / "calm", "--steps", 40)
    two = torchrun("--nproc-per-node", 2, example, store, "--steps", 40)
    assert two.returncode == 0, two.stderr
    lines = two.stdout.splitlines()
    assert lines[0] == "2 ranks begin after step 20"
    # Sums over four shares and over two are rounded differently.
    expected = [float(line.rsplit(" ", 1)[1]) for line in calm.stdout.splitlines()[-2:]]
    actual = [float(line.rsplit(" ", 1)[1]) for line in lines[1:]]
    assert actual == pytest.approx(expected, rel=1e-3)
    with CheckpointManager(store, read_only=True) as alone:
        state = alone.load()
    assert state["model"]["0.0.weight"].shape == (256, 256)
    assert state["optimizer"]["state"][0]["exp_avg"].shape == (256, 256)
    part = [store, "--rank", "1", "--json"]
    inspected = json.loads(ckpt_tool("inspect", *part).stdout)
    [weight] = (t for t in inspected["tensors"] if t["paths"] == ["model.0.0.weight"])
    assert (weight["shape"], weight["slice"]["offsets"]) == ([128, 256], [128, 0])
    refused = ckpt_tool("restore", *part[:3], "--output", tmp_path / "other")
    assert refused.returncode != 0
    assert "the shard holds a slice of it" in refused.stderr
    assert not [*(tmp_path / "other").glob("step-*")]
    for rank in ([], ["--rank", "1"]):
        file = tmp_path / "whole.safetensors"
        done = ckpt_tool("restore", store, *rank, "--force", "--output", file)
        assert done.returncode == 0, done.stderr
        written = load_file(file)
        for name, weight in state["model"].items():
            assert torch.equal(written[f"model.{name}"], weight), name
        for number, moments in state["optimizer"]["state"].items():
            for name, moment in moments.items():
                there = written[f"optimizer.state.{number}.{name}"]
                assert torch.equal(there, moment), (number, name)
        for size in ("1B", "600kB", "1GiB"):
            files = ["--max-shard-size", size, "--output", tmp_path / "files"]
            done = ckpt_tool("restore", store, *rank, "--force", *files)
            assert done.returncode == 0, done.stderr
            assert_same(written_to_files(tmp_path / "files"), dict(sorted(written.items())))


def written_to_files(directory: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of an export, read like loaders that support several files."""
    whole, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    assert whole.exists() != index.exists()
    if whole.exists():
        assert [*directory.iterdir()] == [whole]
        return dict(sorted(load_file(whole).items()))
    described = json.loads(index.read_text())
    names = described["weight_map"]
    files = {name: load_file(directory / name) for name in set(names.values())}
    assert {*directory.iterdir()} == {index, *(directory / name for name in files)}
    assert sum(map(len, files.values())) == len(names)
    tensors = {tensor: files[name][tensor] for tensor, name in names.items()}
    assert described["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    return tensors


def ckpt_tool(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the tool."""
    program = shutil.which("ckpt-tool")
    assert program
    command = [program, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


boxes = st.integers(1, 3).flatmap(
    lambda ndim: st.lists(
        st.tuples(
            st.tuples(*[st.integers(0, 5)] * ndim), st.tuples(*[st.integers(1, 4)] * ndim)
        ).map(lambda pair: Box(*pair)),
        min_size=1,
        max_size=6,
    )
)


@given(boxes)
def test_boxes_overlap_as_their_items_do(some):
    counts = np.zeros((10,) * len(some[0].offsets), int)
    for box in some:
        counts[tuple(slice(o, o + s) for o, s in zip(*box, strict=True))] += 1
    assert overlap(some) == bool((counts > 1).any())


@given(boxes)
def test_what_two_boxes_have_in_common_is_in_both(some):
    one, other = some[0], some[-1]
    common = one.intersect(other)
    items = [
        set(itertools.product(*map(range, b.offsets, map(sum, zip(*b, strict=True)))))
        for b in (one, other)
    ]
    both = items[0] & items[1]
    assert (common is None) == (not both)
    assert common is None or common.items == len(both)


@given(st.lists(st.integers(0, 4), max_size=4))
def test_strides_are_those_of_torch(shape):
    assert contiguous_strides(shape) == torch.empty(shape).stride()


class Saved:
    """A rank's checkpoint of one tensor under `w`, or a part of one, in memory."""

    step, attempt, is_replicated_only = 1, "one", False

    def __init__(self, part: torch.Tensor, place: Slice | None, ranks: int) -> None:
        self.part = part
        self.ranks = ranks
        name = str(part.dtype).removeprefix("torch.")
        strides, at = part.stride(), part.storage_offset()
        shape = tuple(part.shape)
        self.record = TensorRecord(0, 0, name, part.itemsize, shape, strides, at, False, place)
        self.reads = 0

    def nodes(self):
        return [(TAG_DICT, (1, 0, False)), (TAG_TENSOR, 0, "w")]

    def paths(self):
        return ["", "w"]

    def tensors(self):
        return [self.record]

    def manifest(self):
        return {"world_size": self.ranks}

    def read(self, targets, verify, streams):
        assert verify
        assert not streams
        for _, first, (address, count) in targets:
            self.reads += count
            start = self.part.untyped_storage().data_ptr() + first
            ctypes.memmove(address, start, count)


def assembled(saved: list[Saved], rank: int, box: Box) -> torch.Tensor:
    """Assemble a box as a rank would."""
    own = saved[rank]
    parts = Parts(own, Tree(own.nodes()), [own.record], lambda rank: saved[rank])
    storage = torch.UntypedStorage(box.items * own.record.item_bytes)
    assembly = Assembly()
    assembly.add(parts, 0, box, storage)
    assembly.read(verify=True, streams=[])
    dtype = own.part.dtype
    return torch.empty(0, dtype=dtype).set_(storage, 0, box.sizes, contiguous_strides(box.sizes))


@st.composite
def cut_tensors(draw):
    """Draw a tensor, a grid of parts of it in any memory order, and a box."""
    shape = draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    full = torch.arange(math.prod(shape), dtype=torch.int16).reshape(shape)
    cuts = [
        [
            0,
            *sorted(
                draw(st.sets(st.integers(1, size - 1), max_size=2) if size > 1 else st.just(()))
            ),
        ]
        for size in shape
    ]
    ranges = [list(itertools.pairwise([*cut, size])) for cut, size in zip(cuts, shape, strict=True)]
    parts = []
    for corner in itertools.product(*ranges):
        part = full[tuple(slice(low, high) for low, high in corner)].clone()
        if draw(st.booleans()) and part.ndim > 1:
            part = part.transpose(0, 1).contiguous().transpose(0, 1)
        parts.append((part, tuple(low for low, _ in corner)))
    bounds = [sorted(draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in shape]
    box = Box(tuple(low for low, _ in bounds), tuple(high - low for low, high in bounds))
    return full, parts, box


@settings(deadline=None)  # the machine may be busy
@given(cut_tensors(), st.randoms())
def test_any_box_is_assembled_from_any_parts(drawn, random):
    full, parts, box = drawn
    saved = [Saved(part, Slice(tuple(full.shape), at), len(parts)) for part, at in parts]
    # A rank may hold nothing, like one whose replica another rank writes.
    saved.append(Saved(parts[0][0].narrow(0, 0, 0), Slice(tuple(full.shape), parts[0][1]), 0))
    for one in saved:
        one.ranks = len(saved)
    random.shuffle(saved)
    expected = full[tuple(slice(o, o + s) for o, s in zip(*box, strict=True))]
    for rank in range(len(saved)):
        assert torch.equal(assembled(saved, rank, box), expected)
    whole = Saved(full.t().contiguous().t() if full.ndim == 2 else full, None, 1)
    assert torch.equal(assembled([whole], 0, box), expected)
    if box.items and len(parts) > 1:
        lost = next(n for n, one in enumerate(saved) if Part(one, one.record).box.intersect(box))
        left = saved[:lost] + saved[lost + 1 :]
        for one in left:
            one.ranks = len(left)
        with pytest.raises(Corrupt, match="no rank saved"):
            for rank in range(len(left)):
                assembled(left, rank, box)


def test_an_own_part_opens_no_other_shard():
    full = torch.arange(12.0).reshape(4, 3)
    own = Saved(full[2:], Slice((4, 3), (2, 0)), 2)
    parts = Parts(own, Tree(own.nodes()), [own.record], lambda _: pytest.fail("it was opened"))
    [(box, [part])] = parts.covering(0, Box((3, 0), (1, 3))).items()
    assert part.checkpoint is own
    assert box == Box((3, 0), (1, 3))


def test_replicas_of_a_part_have_to_be_identical():
    full = torch.arange(12.0).reshape(4, 3)
    halves = [(full[:2], (0, 0)), (full[2:], (2, 0)), (full[2:].clone(), (2, 0))]
    saved = [Saved(part, Slice((4, 3), at), 3) for part, at in halves]
    whole = Box((0, 0), (4, 3))
    assert torch.equal(assembled(saved, 0, whole), full)
    halves[2][0][1, 1] = math.nan
    with pytest.raises(Corrupt, match="ranks saved different values under this name"):
        assembled(saved, 0, whole)
    own = Box((2, 0), (2, 3))
    assert torch.equal(assembled(saved, 1, own), full[2:])
    assert assembled(saved, 2, own)[1, 1].isnan()
