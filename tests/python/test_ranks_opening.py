"""How ranks find each other and agree on a store: by a coordinator, a group or torchrun."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from coordinators import CoordinatorProcess, free_port
from ranks import run, run_ranks, torchrun
from support import assert_same, start_script

from dtruntime import BarrierTimeout, CheckpointManager, CoordinatorUnavailable, InvalidArgument
from dtruntime.ranks import embedded, launch

EXAMPLES = Path(__file__).parents[2] / "python" / "examples"


def test_another_store_needs_another_job(coordinator, tmp_path):
    outputs = run(
        """
        model = CheckpointManager(store + "/model")
        try:
            CheckpointManager(store + "/ema")
        except InvalidArgument as error:
            print("model` open in the same job" in error.why, "`job=" in error.hint)
        ema = CheckpointManager(store + "/ema", job="ema")
        for step in (1, 2, 3):
            pairs = [(model, state_of(step)), (ema, state_of(step + 100))]
            if rank == 1:
                pairs.reverse()
            for handle in [manager.save_async(state, step=step) for manager, state in pairs]:
                handle.result()
        model.close()
        # A store may follow another one in the same job.
        with CheckpointManager(store + "/later") as later:
            later.save(state_of(1), step=1)
            print(model.path.name, later.verify(1).ok, ema.verify(3).ok, ema.all_steps())
        ema.close()
        with CheckpointManager(store + "/model") as model:
            assert same(model.load(), state_of(3))
        """,
        tmp_path / "stores",
        coordinator.url,
        world_size=2,
    )
    assert outputs == ["True True\nmodel True True [1, 2, 3]\n"] * 2


def test_ranks_that_open_different_stores_are_refused(coordinator, tmp_path):
    outputs = run(
        """
        ways = [
            (dict(path=f"s3://bucket/{rank}"), "rank 0 brings `s3://bucket/0`"),
            (dict(path=store, remote=f"s3://bucket/{rank}"), "front of `s3://bucket/1`"),
            (dict(path=store if rank else "s3://bucket/run/"), "rank 1 a directory"),
        ]
        for settings, told in ways:
            try:
                CheckpointManager(**settings)
            except InvalidArgument as error:
                print(told in error.why, "`job=`" in error.hint)
        """,
        tmp_path / "store",
        coordinator.url,
        world_size=2,
    )
    assert outputs == ["True True\n" * 3] * 2


def test_an_orchestrator_and_a_manager_of_one_process_are_one_worker(coordinator, tmp_path):
    outputs = run(
        """
        import asyncio

        async def main():
            orchestrator = TrainingOrchestrator(f"trainer-{rank}")
            await orchestrator.register_worker()
            with CheckpointManager(store) as manager:
                await manager.save_async(state_of(1), step=1)
            workers = await orchestrator.workers()
            await orchestrator.wait_barrier("end", timeout=60)
            print([worker.worker_id for worker in workers if worker.state == "alive"])

        asyncio.run(main())
        """,
        tmp_path / "store",
        coordinator.url,
        world_size=2,
    )
    assert outputs == ["['trainer-0', 'trainer-1']\n"] * 2


def test_ranks_without_a_coordinator_are_told_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.delenv("COORDINATOR_URL", raising=False)
    with pytest.raises(InvalidArgument, match="coordinator_url="):
        CheckpointManager(tmp_path, rank=0, world_size=2)
    with pytest.raises(InvalidArgument, match="coordinator_url="):
        CheckpointManager(tmp_path, rank=0, world_size=2, remote="s3://bucket/run")


def test_managers_use_the_coordinators_settings(tmp_path):
    configured = CoordinatorProcess(
        tmp_path,
        **{
            "checkpoint.keep_last_n": 2,
            "checkpoint.interval_steps": 5,
            "checkpoint.async_write": "false",
            "checkpoint.compression": "none",
            "storage.path": tmp_path / "told",
        },
    )
    configured.start()
    try:
        outputs = run_ranks(
            """
            with CheckpointManager() as manager:
                assert os.fspath(manager.path) == store, manager.path
                for step in range(1, 21):
                    if manager.should_save(step):
                        handle = manager.save_async({"w": torch.zeros(9000)}, step=step)
                        assert handle.done()
                        assert handle.result().stored_bytes > 36_000  # not compressed
                print(manager.all_steps()[-2:])
            with CheckpointManager(store, keep_last_n=3, save_interval_steps=1) as manager:
                assert manager.should_save(21)
                manager.save({"w": torch.zeros(9)}, step=21)
                print(manager.all_steps()[-3:])
            """,
            tmp_path / "told",
            configured.url,
            world_size=2,
        )
        assert outputs == ["[15, 20]\n[15, 20, 21]\n"] * 2
    finally:
        configured.end()
    with CheckpointManager(tmp_path / "told", read_only=True) as reader:
        assert reader.all_steps() == [15, 20, 21]


def test_a_rank_that_opens_alone_is_told_who_is_missing(coordinator, tmp_path):
    with pytest.raises(BarrierTimeout) as caught:
        CheckpointManager(
            tmp_path / "store",
            rank=0,
            world_size=2,
            coordinator_url=coordinator.url,
            agreement_timeout=0.5,
        )
    assert "rank 1 (nobody has it)" in str(caught.value)
    assert "where one rank saves, pass `rank=0, world_size=1`" in caught.value.hint


needs_distributed = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="this PyTorch has no distributed"
)


IN_A_GROUP = """
import torch.distributed as dist
dist.init_process_group("gloo", init_method=sys.argv[2], rank=int(sys.argv[3]), world_size=2)
with CheckpointManager(store, replicated="w") as manager:
    manager.save({"w": torch.arange(9), "own": dist.get_rank()}, step=1)
    assert manager.load()["own"] == dist.get_rank()
dist.destroy_process_group()
"""


@needs_distributed
def test_ranks_find_each_other_by_their_process_group(tmp_path, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "COORDINATOR_URL"):
        monkeypatch.delenv(name, raising=False)
    met = f"tcp://127.0.0.1:{free_port()}"
    source = "import sys, torch\nfrom dtruntime import *\nstore = sys.argv[1]\n" + IN_A_GROUP
    store = tmp_path / "store"
    ranks = [start_script(source, store, met, rank, environment={}) for rank in range(2)]
    ended = [rank.communicate(timeout=240) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], ended
    with CheckpointManager(store, read_only=True, rank=1, world_size=2) as reader:
        assert_same(reader.load(), {"w": torch.arange(9), "own": 1})


@needs_distributed
def test_under_torchrun_a_missing_rank_0_is_named_in_time(tmp_path, monkeypatch):
    agent = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.delenv("COORDINATOR_URL", raising=False)
    for name, value in {
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": agent.port,
        "LOCAL_WORLD_SIZE": 2,
    }.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(BarrierTimeout) as caught:
        CheckpointManager(tmp_path / "store", rank=1, world_size=2, agreement_timeout=0.5)
    assert "rank 0, which hosts the coordinator, has not opened its manager" in caught.value.why
    assert "open the manager on every rank" in caught.value.hint
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    monkeypatch.setattr(embedded, "_CONNECT_SECONDS", 0.2)
    with pytest.raises(CoordinatorUnavailable, match="agent"):
        CheckpointManager(tmp_path / "store", rank=1, world_size=2, agreement_timeout=0.5)


@needs_distributed
def test_torchrun_needs_nothing_else_and_a_lost_rank_is_resumed(tmp_path):
    example = EXAMPLES / "train_ranks.py"
    calm = torchrun("--standalone", "--nproc-per-node", 4, example, tmp_path / "calm")
    assert calm.returncode == 0, calm.stderr
    lossy = torchrun(
        "--standalone",
        "--nproc-per-node", 4,
        "--max-restarts", 1,
        example,
        tmp_path / "lossy",
        "--lose", "2:30",
    )  # fmt: skip
    assert lossy.returncode == 0, lossy.stderr
    begins = [line for line in lossy.stdout.splitlines() if "begin after step" in line]
    assert begins[0] == "4 ranks begin after step 0"
    assert begins[1] in ("4 ranks begin after step 20", "4 ranks begin after step 30")
    assert calm.stdout.splitlines()[-1] == lossy.stdout.splitlines()[-1], "the same loss"
    for rank in range(4):
        states = []
        for run_name in ("calm", "lossy"):
            store = tmp_path / run_name
            with CheckpointManager(store, read_only=True, rank=rank, world_size=4) as manager:
                states.append(manager.load())
        calm_state, lossy_state = states
        assert calm_state["step"] == lossy_state["step"] == 40
        # DDP rearranges gradients after its first step: sums may round in another order then.
        torch.testing.assert_close(lossy_state, calm_state, rtol=1e-4, atol=1e-6)


def test_ranks_that_met_through_a_file_have_to_say_where_rank_0_is(monkeypatch):
    group = launch.ProcessGroup(rank=1, world_size=2, store=object(), master="")
    monkeypatch.setattr(launch, "process_group", lambda *_: group)
    with pytest.raises(InvalidArgument, match="does not say on which machine") as caught:
        embedded.find(1, 1.0, {})
    assert "MASTER_ADDR" in caught.value.hint
    monkeypatch.setattr(launch, "process_group", lambda *_: group._replace(rank=0, world_size=1))
    assert embedded.find(0, 1.0, {}) is None, "one rank looks for nobody"
