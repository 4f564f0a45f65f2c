"""Processes that share a dataset are killed, resumed, change in number, and end together.

A real coordinator assigns their files.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
from collections import Counter
from pathlib import Path

import pytest
import torch
from ranks import place_of, torchrun
from samples import expected, flat, make_files, open_dataset, samples_of
from support import run_script, start_script

from dtruntime import (
    CheckpointManager,
    CheckpointNotFound,
    DatasetRegistry,
    InvalidArgument,
    ShardedDataset,
    ShardedLoader,
    TrainingOrchestrator,
)

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


EXAMPLES = Path(__file__).parents[2] / "python" / "examples"


def train(library, store, log, writer):
    """Train to the end, from the newest checkpoint on; log and print each step."""
    dataset = open_dataset(library)
    loader = ShardedLoader(dataset, batch_size=3, num_workers=2)
    with CheckpointManager(store, keep_last_n=3) as manager, log.open("a") as file:
        state = {"data": dataset, "step": 0}
        with contextlib.suppress(CheckpointNotFound):
            manager.restore(state)
        step = state["step"]
        for epoch in range(dataset.epoch, 3):
            dataset.set_epoch(epoch)
            for batch in loader:
                step += 1
                file.write(f"{step} {' '.join(batch)}\n")
                file.flush()
                os.write(writer, b".")
                if step % 3 == 0:
                    manager.save_async(state | {"step": step}, step=step)


def train_in_child(library, store, log, steps):
    """Train in a process that is killed after so many steps; return whether it finished."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(reader)
            train(library, store, log, writer)
            code = 0
        finally:
            os._exit(code)
    os.close(writer)
    left = steps
    while left and (heard := os.read(reader, left)):
        left -= len(heard)
    os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.close(reader)
    assert code in (0, -signal.SIGKILL)
    return code == 0


def test_a_killed_and_resumed_run_trains_on_every_sample_once(library, tmp_path):
    """Only what the restored checkpoint covers counts; later steps are repeated identically."""
    seed = random.SystemRandom().randrange(1 << 32)
    draw = random.Random(seed)
    log = tmp_path / "log"
    kills = 0
    while not train_in_child(library, tmp_path / "store", log, draw.randrange(2, 40)):
        kills += 1
        assert kills < 200, f"seed {seed}"
    assert kills >= 2, f"seed {seed}"
    steps = {}
    for line in log.read_text().splitlines(keepends=True):
        step, *batch = line.split()
        if line.endswith("\n"):  # the last line of a killed process may be cut
            assert steps.setdefault(int(step), batch) == batch, f"seed {seed}, step {step}"
    trained = flat(steps[step] for step in sorted(steps))
    count = expected(library).total()
    for epoch in range(3):
        part = trained[epoch * count : (epoch + 1) * count]
        assert Counter(part) == expected(library), f"seed {seed}"
    assert len(trained) == 3 * count


RANK = """
import asyncio, os, sys
from dtruntime import CheckpointManager, DatasetRegistry, ShardedDataset, ShardedLoader
folder, store, step, limit, resume, first = sys.argv[1:7]
with CheckpointManager(store) as manager:
    registry = DatasetRegistry()
    registry.register("train", folder, "text", 1000)
    dataset = ShardedDataset(registry, "train")
    assert (dataset.rank, dataset.world_size) == (int(os.environ["RANK"]),
                                                  int(os.environ["WORLD_SIZE"]))
    if resume == "yes":
        dataset.restore_from(manager)
    loader = ShardedLoader(dataset, batch_size=2, num_workers=1, end="exact")
    seen = []
    for batch in loader:
        seen += batch
        if len(seen) >= int(limit):
            break
    manager.save({"data": dataset, "rank": dataset.rank}, step=int(step))
    print(*seen, flush=True)
"""


def test_a_changed_number_of_ranks_shares_what_is_left(library, coordinator, tmp_path):
    seen: Counter[str] = Counter()
    for turn, world_size in enumerate((2, 3, 1, 2, 2)):
        resume = "yes" if turn else "no"
        limit = 10_000 if turn == 4 else 12
        arguments = (library[0], tmp_path / "store", turn, limit, resume, "")
        ranks = [
            start_script(RANK, *arguments, environment=place_of(rank, world_size, coordinator.url))
            for rank in range(world_size)
        ]
        for process in ranks:
            out, err = process.communicate(timeout=120)
            assert process.returncode == 0, err
            seen.update(out.split())
    assert seen == expected(library)


TOGETHER = """
import datetime, os, sys
import torch.distributed as dist
from dtruntime import CheckpointError, DatasetRegistry, ShardedDataset, ShardedLoader
folder, meeting, end, workers = sys.argv[1:5]
rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank,
                        world_size=world_size, timeout=datetime.timedelta(seconds=60))
registry = DatasetRegistry()
registry.register("train", folder, "text", 1000)
dataset = ShardedDataset(registry, "train")
loader = ShardedLoader(dataset, batch_size=2, num_workers=int(workers), end=end or None)
try:
    for epoch in range(2):
        dataset.set_epoch(epoch)
        seen = [line for batch in loader for line in batch]
        steps = sum(1 for _ in loader)
        print(steps, *seen, flush=True)
except CheckpointError as error:
    print(type(error).__name__, error.why, flush=True)
dist.destroy_process_group()
"""


def run_together(coordinator, folder, meeting, end, workers):
    arguments = (folder, meeting, end, workers)
    ranks = [
        start_script(TOGETHER, *arguments, environment=place_of(rank, 3, coordinator.url))
        for rank in range(3)
    ]
    outputs = []
    for process in ranks:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        outputs.append([line.split() for line in out.splitlines()])
    return outputs


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("end", ["", "pad"])
def test_ranks_end_together(coordinator, tmp_path, end, workers):
    counts = [9, 1, 4, 0, 7, 3, 2]
    names = make_files(tmp_path / "d", counts)
    outputs = run_together(coordinator, tmp_path / "d", tmp_path / "meeting", end, workers)
    for epoch in range(2):
        lines = [output[epoch] for output in outputs]
        assert len({line[0] for line in lines}) == 1, lines  # equal steps
        seen = Counter(sample for line in lines for sample in line[1:])
        if end == "pad":  # nothing is missing, and a rank repeats only its own samples
            assert seen.keys() == samples_of(names, counts).keys()
            shares = [{sample.split(":")[0] for sample in line[1:]} for line in lines]
            assert sum(map(len, shares)) == len(set.union(*shares))
        else:
            assert set(seen.values()) <= {1}
        assert int(lines[0][0]) > 0


def test_a_read_error_on_one_rank_ends_all(coordinator, tmp_path):
    names = make_files(tmp_path / "d", [9, 9, 9, 9, 9, 9])
    (tmp_path / "d" / names[0]).write_bytes(b"\xff" * 40)
    outputs = run_together(coordinator, tmp_path / "d", tmp_path / "meeting", "pad", 1)
    kinds = sorted(output[-1][0] for output in outputs)
    assert kinds == ["Conflict", "Conflict", "UnreadableSample"]


def test_a_rank_with_nothing_to_repeat_ends_all(coordinator, tmp_path):
    make_files(tmp_path / "d", [9, 0, 0])
    outputs = run_together(coordinator, tmp_path / "d", tmp_path / "meeting", "pad", 0)
    kinds = sorted(output[-1][0] for output in outputs)
    # The two without samples reach it at once: one of them may be told of the other's error.
    assert "InvalidArgument" in kinds
    assert {*kinds} <= {"Conflict", "InvalidArgument"}


def test_ranks_that_cannot_end_together(library, tmp_path):
    dataset = open_dataset(library, place=(0, 2))
    with pytest.raises(InvalidArgument, match=r"is not initialized\nhint: call `init_process_gr"):
        ShardedLoader(dataset)
    with pytest.raises(InvalidArgument, match="did you mean `exact`"):
        ShardedLoader(dataset, end="exactly")
    assert len(list(ShardedLoader(dataset, end="exact", batch_size=None))) == len(list(dataset))
    dist = torch.distributed
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/m", rank=0, world_size=1)
    try:
        with pytest.raises(InvalidArgument, match="the process group has 1"):
            ShardedLoader(dataset)
    finally:
        dist.destroy_process_group()


def test_a_registry_knows_its_rank_in_a_job(coordinator, tmp_path):
    names = make_files(tmp_path / "d", [2, 2, 2])
    orchestrator = TrainingOrchestrator("w", coordinator.url, 3, 1)
    asyncio.run(orchestrator.register_worker("127.0.0.1", 1))
    registry = DatasetRegistry(coordinator.url)
    registry.register("train", tmp_path / "d", "text", 6)
    dataset = ShardedDataset(registry, "train")
    assert (dataset.rank, dataset.world_size) == (1, 3)
    assert len(list(dataset)) == 2
    everything = ShardedDataset(registry, "train", rank=0, world_size=1)
    assert Counter(everything) == samples_of(names, [2, 2, 2])
    child = os.fork()
    if child == 0:
        code = 1
        try:
            dataset.set_epoch(1)
        except Exception as error:  # noqa: BLE001
            code = 0 if type(error).__name__ == "Closed" else 2
        os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    dataset.set_epoch(1)
    orchestrator.leave()


def test_only_datasets_need_torch():
    done = run_script(
        """
        import sys
        sys.modules["torch"] = None
        import dtruntime
        assert "ShardedDataset" in dtruntime.__all__
        try:
            dtruntime.ShardedDataset
        except dtruntime.UnsupportedFormat as error:
            print(error)
        """
    )
    assert done.stdout.startswith("using `ShardedDataset`: torch is not installed"), done.stderr


def test_the_example_continues_with_what_was_left(tmp_path):
    results = []
    for name, more in (("calm", []), ("lossy", ["--lose", "1:13"])):
        several = ("--standalone", "--nproc-per-node", 2, "--max-restarts", 1)
        done = torchrun(*several, EXAMPLES / "train_dataset.py", tmp_path / name, *more)
        assert done.returncode == 0, done.stderr
        results.append(done.stdout.splitlines())
    assert results[0][-1].startswith("done: ")
    assert results[0][-1] == results[1][-1], "the same steps and weights"
    begins = [line for line in results[1] if "begin after step" in line]
    assert begins == [f"2 ranks begin after step {step}, epoch 0" for step in (0, 10)]
