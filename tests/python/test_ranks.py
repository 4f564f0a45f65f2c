"""Several processes that save one checkpoint, through a coordinator or under torchrun."""

from __future__ import annotations

import signal
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from coordinators import CoordinatorProcess, free_port
from ranks import run_ranks, start_rank, torchrun
from support import assert_same, flip_byte, start_script

from dtruntime import (
    BarrierTimeout,
    CheckpointManager,
    CoordinatorUnavailable,
    InvalidArgument,
)
from dtruntime.ranks import embedded

if TYPE_CHECKING:
    import subprocess

EXAMPLES = Path(__file__).parents[2] / "python" / "examples"


STATES = """
def state_of(step):
    generator = torch.Generator().manual_seed(step * 100 + rank)
    return {"w": torch.randn(50_000, generator=generator), "rank": rank, "step": step}

def same(one, other):
    return torch.equal(one["w"], other["w"]) and one["rank"] == other["rank"]
"""


def start(source: str, store: Path, rank: int, world_size: int, url: str) -> subprocess.Popen[str]:
    """Start one rank."""
    return start_rank(STATES + textwrap.dedent(source), store, rank, world_size, url)


def run(source: str, store: Path, url: str, world_size: int = 3) -> list[str]:
    """Run all ranks to their end; give what each printed."""
    return run_ranks(STATES + textwrap.dedent(source), store, url, world_size)


def test_all_ranks_save_and_load_one_checkpoint(coordinator, tmp_path):
    store = tmp_path / "store"
    outputs = run(
        """
        with CheckpointManager(store, keep_last_n=2) as manager:
            try:
                manager.load()
            except CheckpointNotFound as error:
                print("empty")
            for step in (1, 2, 3):
                handle = manager.save_async(state_of(step), step=step)
            assert handle.result().step == 3
        with CheckpointManager(store) as manager:
            assert same(manager.load(), state_of(3))
            live = state_of(9)
            assert manager.restore(live).step == 3
            assert same(live, state_of(3))
            print(manager.all_steps(), manager.verify().ok)
        """,
        store,
        coordinator.url,
    )
    assert outputs == ["empty\n[2, 3] True\n"] * 3
    with CheckpointManager(store, read_only=True, rank=1, world_size=3) as evaluator:
        assert evaluator.load()["rank"] == 1


def test_damage_on_one_rank_moves_all_to_an_older_step(coordinator, tmp_path):
    store = tmp_path / "store"
    run(
        """
        with CheckpointManager(store, compression="none") as manager:
            for step in (1, 2):
                manager.save(state_of(step), step=step)
        """,
        store,
        coordinator.url,
    )
    [shard] = store.glob("step-000000000002/rank-00001.*.shard")
    data = bytearray(shard.read_bytes())
    data[10_000] ^= 1
    shard.write_bytes(data)
    outputs = run(
        """
        with CheckpointManager(store) as manager:
            assert same(manager.load(), state_of(1))
            print(manager.last_load.step, [step for step, _ in manager.last_load.fell_back_from])
        """,
        store,
        coordinator.url,
    )
    assert outputs == ["1 []\n", "1 [2]\n", "1 []\n"]


def test_a_rank_that_is_started_anew_alone_ends_the_saves_of_the_others(coordinator, tmp_path):
    store = tmp_path / "store"
    goes_on = start(
        """
        import itertools
        with CheckpointManager(store) as manager:
            manager.save(state_of(1), step=1)
            for step in itertools.count(2):
                try:
                    manager.save(state_of(step), step=step)
                except SaveAborted as error:
                    if "start all ranks again" in str(error):
                        print(error)
                        break
        """,
        store,
        0,
        2,
        coordinator.url,
    )
    is_killed = start(
        """
        with CheckpointManager(store) as manager:
            manager.save(state_of(1), step=1)
            os.kill(os.getpid(), signal.SIGKILL)
        """,
        store,
        1,
        2,
        coordinator.url,
    )
    assert is_killed.wait(60) == -signal.SIGKILL
    anew = start("CheckpointManager(store)", store, 1, 2, coordinator.url)
    out, error = goes_on.communicate(timeout=60)
    assert goes_on.returncode == 0, error
    assert "rank 1 (`worker-1`) has no checkpoint manager open" in out
    anew.kill()
    anew.communicate()
    is_killed.communicate()


def test_a_rank_that_restored_what_others_could_not_has_a_mixture(coordinator, tmp_path):
    store = tmp_path / "store"
    run(
        """
        with CheckpointManager(store, compression="none") as manager:
            manager.save(state_of(1), step=1)
        """,
        store,
        coordinator.url,
    )
    [shard] = store.glob("step-000000000001/rank-00001.*.shard")
    flip_byte(shard, 10_000)
    outputs = run(
        """
        with CheckpointManager(store) as manager:
            live = state_of(9)
            for verb in (manager.restore, manager.load):
                try:
                    verb(live) if verb == manager.restore else verb()
                except (Corrupt, RestoreIncomplete) as error:
                    print(type(error).__name__, "not on every rank" in str(error))
            print(same(live, state_of(1)), same(live, state_of(9)))
            try:
                manager.save(live, step=2)
            except (RestoreIncomplete, SaveAborted) as error:
                print(type(error).__name__)
        """,
        store,
        coordinator.url,
    )
    changed = "RestoreIncomplete True\nCorrupt False\nTrue False\nRestoreIncomplete\n"
    unchanged = "Corrupt False\nCorrupt False\nFalse True\nSaveAborted\n"
    assert outputs == [changed, unchanged, changed]


def test_a_rank_that_gives_up_is_named_on_all(coordinator, tmp_path):
    store = tmp_path / "store"
    outputs = run(
        """
        with CheckpointManager(store) as manager:
            manager.save(state_of(1), step=1)
        with CheckpointManager(store) as manager:
            try:
                manager.load(keys=["no-such" if rank == 1 else "w"])
            except (InvalidArgument, LoadAborted) as error:
                print(type(error).__name__, "rank 1 gave up: loading" in error.why)
            assert same(manager.load(), state_of(1))
        """,
        store,
        coordinator.url,
    )
    others = "LoadAborted True\n"
    assert outputs == [others, "InvalidArgument False\n", others]


def test_ranks_that_see_different_checkpoints_in_one_store_are_told_so(coordinator, tmp_path):
    store = tmp_path / "store"
    outputs = run(
        """
        with CheckpointManager(store) as manager:
            manager.save(state_of(1), step=1)
        place = store if rank else store + "-not-mounted"
        with CheckpointManager(place) as manager:
            try:
                manager.load()
            except InvalidArgument as error:
                print(error.why, "mounted everywhere" in error.hint)
        """,
        store,
        coordinator.url,
    )
    few = "the ranks see different ones: this rank has {}, and 2 ranks have some True\n"
    assert outputs == [few.format("none"), *[few.format("steps 1")] * 2]


def test_all_ranks_go_on_over_what_one_of_them_could_not_load(coordinator, tmp_path):
    store = tmp_path / "store"
    run(
        """
        with CheckpointManager(store, compression="none") as manager:
            for step in (10, 20, 30):
                manager.save(state_of(step), step=step)
        """,
        store,
        coordinator.url,
    )
    [shard] = store.glob("step-000000000030/rank-00001.*.shard")
    flip_byte(shard, 10_000)
    outputs = run(
        """
        with CheckpointManager(store) as manager:
            assert manager.load()["step"] == 20
            print([step for step in (20, 25, 30) if manager.should_save(step)])
            for step in (25, 30):
                manager.save(state_of(step), step=step)
            print(manager.all_steps())
            try:
                manager.save(state_of(30), step=30)
            except StepConflict:
                print("conflict")
        with CheckpointManager(store) as manager:
            assert same(manager.load(), state_of(30))
        """,
        store,
        coordinator.url,
    )
    assert outputs == ["[25, 30]\n[10, 20, 25, 30]\nconflict\n"] * 3


def test_another_store_needs_a_job_of_its_own(coordinator, tmp_path):
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


def test_ranks_that_open_different_stores_are_told_so(coordinator, tmp_path):
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


def test_another_world_size_goes_on_from_a_rank_that_is_named(coordinator, tmp_path):
    store = tmp_path / "store"
    run(
        """
        with CheckpointManager(store) as manager:
            manager.save(state_of(1), step=1)
        """,
        store,
        coordinator.url,
    )
    outputs = run(
        """
        with CheckpointManager(store) as manager:
            live = state_of(0)
            for refused in (lambda: manager.load(), lambda: manager.restore(live, step=1)):
                try:
                    refused()
                except InvalidArgument as error:
                    print("3 ranks saved it" in str(error), "from_rank=0" in error.hint)
            assert live["step"] == 0
            print(manager.restore(live, from_rank=2).step, live["rank"])
            manager.save(live, step=2)
            print(manager.all_steps(), manager.load()["rank"])
        """,
        store,
        coordinator.url,
        world_size=2,
    )
    assert outputs == ["True True\nTrue True\n1 2\n[1, 2] 2\n"] * 2
    with CheckpointManager(store, read_only=True) as manager:
        with pytest.raises(InvalidArgument, match="2 ranks saved it"):
            manager.load()
        with pytest.raises(InvalidArgument, match="no rank 2 saved it"):
            manager.load(from_rank=2)
        with pytest.raises(InvalidArgument, match="no rank 4294967295 saved it"):
            manager.load(from_rank=2**40)
        with pytest.raises(InvalidArgument, match="a non-negative int"):
            manager.load(from_rank=-1)
        assert manager.load(step=1, from_rank=1)["rank"] == 1
        [shard] = store.glob("step-000000000002/rank-00001.*.shard")
        shard.write_bytes(shard.read_bytes()[:-1])
        # Step 2 is gone for this rank, and step 1 is of three.
        with (
            CheckpointManager(store, read_only=True, rank=1, world_size=2) as other,
            pytest.raises(InvalidArgument, match=r"3 ranks saved it.*step 2 does not verify"),
        ):
            other.load()


REPLICAS = """
def replica_of(step):
    torch.manual_seed(step)
    model = torch.nn.Sequential(torch.nn.Linear(300, 300), torch.nn.Linear(300, 20))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(torch.randn(4, 300)).sum().backward()
    optimizer.step()
    generator = torch.Generator().manual_seed(rank)
    rng = generator.get_state()
    return {"model": model, "optimizer": optimizer, "step": step, "rng": rng}

def same_replica(one, other):
    models = zip(one["model"].parameters(), other["model"].parameters())
    moments = [x["optimizer"].state_dict()["state"][0]["exp_avg"] for x in (one, other)]
    return (all(torch.equal(a, b) for a, b in models) and torch.equal(*moments)
        and one["step"] == other["step"])

ALIKE = ["model.*", "optimizer.*", "step"]
"""


def test_replicas_are_written_once_and_any_number_of_ranks_goes_on(coordinator, tmp_path):
    store = tmp_path / "store"
    run(
        REPLICAS
        + """
with CheckpointManager(store, replicated=ALIKE, compression="none") as manager:
    state = replica_of(1)
    manager.prewarm(state)
    manager.save(state, step=1)
    live = replica_of(2)
    assert manager.restore(live).step == 1
    assert same_replica(live, replica_of(1)) and torch.equal(live["rng"], state["rng"])
""",
        store,
        coordinator.url,
    )
    sizes = [shard.stat().st_size for shard in store.glob("*/*.shard")]
    one_replica = 3 * 4 * (300 * 300 + 300 + 300 * 20 + 20)  # weights and two moments
    assert one_replica < sum(sizes) < 1.1 * one_replica
    assert max(sizes) < 1.3 * min(sizes)
    # Five ranks go on, in the shards of three.
    outputs = run(
        REPLICAS
        + """
with CheckpointManager(store, replicated=ALIKE) as manager:
    live = replica_of(2)
    try:
        manager.restore(live)
    except InvalidArgument as error:
        print("`rng` is rank-specific" in str(error), same_replica(live, replica_of(2)))
    own = live.pop("rng")
    report = manager.restore(live)
    assert same_replica(live, replica_of(1))
    print(report.step, dict(report.skipped))
    manager.save(live | {"rng": own}, step=2)
    print(manager.all_steps(), manager.verify().ok)
""",
        store,
        coordinator.url,
        world_size=5,
    )
    told = "True True\n1 {'rng': 'not asked for'}\n[1, 2] True\n"
    assert outputs == [told] * 5
    with CheckpointManager(store, read_only=True) as evaluator:
        with pytest.raises(
            InvalidArgument, match=r"`rng` is rank-specific.*5 ranks|5 ranks.*`rng`"
        ):
            evaluator.load()
        weights = evaluator.load(keys=["model.*"])["model"]
        named = evaluator.load(from_rank=4)
        assert_same(named["model"], weights)
        assert evaluator.load(keys=["model.*"], mmap=True).keys() == {"model"}
        generator = torch.Generator().manual_seed(4)
        assert torch.equal(named["rng"], generator.get_state())


def test_a_shard_of_another_rank_that_is_gone_is_a_reason_to_fall_back_that_is_told(
    coordinator, tmp_path
):
    store = tmp_path / "store"
    run(
        REPLICAS
        + """
with CheckpointManager(store, replicated=ALIKE) as manager:
    for step in (1, 2):
        manager.save(replica_of(step) | ({"log": "of rank 0"} if rank == 0 else {}), step=step)
""",
        store,
        coordinator.url,
        world_size=2,
    )
    [shard] = store.glob("step-000000000002/rank-00001.*.shard")
    shard.unlink()
    with CheckpointManager(store, read_only=True, rank=0, world_size=2) as evaluator:
        state = evaluator.load()
        assert (state["step"], state["log"]) == (1, "of rank 0")
        [(step, why)] = evaluator.last_load.fell_back_from
        assert step == 2
        assert "rank-00001" in why


def test_replicas_that_are_none_are_refused_on_every_rank_and_named(coordinator, tmp_path):
    outputs = run(
        """
        with CheckpointManager(store, replicated=["w", "rank"]) as manager:
            try:
                manager.save(state_of(1), step=1)
            except InvalidArgument as error:
                print("disagree", error)
            except SaveAborted as error:
                print("disagree", error)
            print(manager.all_steps())
        try:
            CheckpointManager(store, replicated=["w", ""])
        except InvalidArgument as error:
            print(error.why)
        """,
        tmp_path / "store",
        coordinator.url,
        world_size=2,
    )
    for output in outputs:
        for told in ("disagree", "`rank` is", "[]", "a glob is a non-empty string"):
            assert told in output, output


def test_a_glob_that_matches_nothing_fails_the_save_on_all(coordinator, tmp_path):
    outputs = run(
        """
        with CheckpointManager(store, replicated=["w", "modle.*"]) as manager:
            for state in (state_of(1), torch.zeros(3)):
                try:
                    manager.save(state, step=1)
                except (InvalidArgument, SaveAborted) as error:
                    print(error)
            print(manager.all_steps())
        """,
        tmp_path / "store",
        coordinator.url,
        world_size=2,
    )
    for output in outputs:
        for told in ("nothing matches 'modle.*'", "w, rank, step", "(none)"):
            assert told in output, output
        assert output.endswith("[]\n"), output


def test_a_state_that_one_rank_cannot_save_fails_on_all_and_training_goes_on(coordinator, tmp_path):
    outputs = run(
        """
        with CheckpointManager(store) as manager:
            state = state_of(1) | ({"bad": lambda: 0} if rank == 1 else {})
            try:
                manager.save(state, step=1)
            except UnsupportedValue as error:
                print("unsupported")
            except SaveAborted as error:
                assert error.is_retryable
                print("rank 1 failed" if "rank 1" in str(error) else str(error))
            manager.save(state_of(2), step=2)
            print(manager.all_steps())
        """,
        tmp_path / "store",
        coordinator.url,
    )
    expected = ["rank 1 failed", "unsupported", "rank 1 failed"]
    assert outputs == [f"{text}\n[2]\n" for text in expected]


def test_a_rank_that_is_killed_fails_the_save_on_the_others(coordinator, tmp_path):
    source = """
        manager = CheckpointManager(store)
        manager.save(state_of(1), step=1)
        if rank == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            manager.save(state_of(2), step=2)
        except SaveAborted as error:
            print("rank 2" in str(error), manager.all_steps())
        manager.close()
    """
    store = tmp_path / "store"
    ranks = [start(source, store, rank, 3, coordinator.url) for rank in range(3)]
    outputs = [process.communicate(timeout=60) for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0, -signal.SIGKILL], outputs
    assert [out for out, _ in outputs] == ["True [1]\n", "True [1]\n", ""]
    resumed = run(
        """
        with CheckpointManager(store) as manager:
            assert same(manager.load(), state_of(1))
            manager.save(state_of(2), step=2)
            print(manager.all_steps())
        """,
        store,
        coordinator.url,
    )
    assert resumed == ["[1, 2]\n"] * 3


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


def test_managers_do_what_the_coordinator_was_configured_to_say(tmp_path):
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
def test_under_torchrun_a_rank_0_that_does_not_come_is_named_in_time(tmp_path, monkeypatch):
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
        # DDP lays gradients out anew after its first step: sums may round in another order then.
        torch.testing.assert_close(lossy_state, calm_state, rtol=1e-4, atol=1e-6)
