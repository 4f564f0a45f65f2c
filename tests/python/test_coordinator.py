"""Workers and a real coordinator: the documented scripts, losses on both sides, datasets."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time
import warnings

import pytest
from coordinators import CoordinatorProcess, free_port
from support import script_environment, wait_until

from dtruntime import (
    BarrierTimeout,
    Closed,
    Conflict,
    CoordinatorUnavailable,
    DatasetNotFound,
    DatasetRegistry,
    InvalidArgument,
    JobAborted,
    MembershipChanged,
    TrainingOrchestrator,
)


@pytest.fixture
def make(coordinator):
    """Make orchestrators that leave at the end."""
    made = []

    def make_one(rank: int, world_size: int, **settings) -> TrainingOrchestrator:
        one = TrainingOrchestrator(f"worker-{rank}", coordinator.url, world_size, rank, **settings)
        made.append(one)
        return one

    yield make_one
    for one in made:
        one.leave()


STARTED: list[subprocess.Popen[str]] = []


@pytest.fixture(autouse=True)
def no_worker_outlives_its_test():
    yield
    while STARTED:
        with STARTED.pop() as process:  # which closes its pipes, and waits for it
            process.kill()  # where a test failed; nothing happens to one that has ended


def start_worker(source: str, url: str, **environment: object) -> subprocess.Popen[str]:
    """Start a script as a worker."""
    extra = {key: str(value) for key, value in environment.items()}
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(source)],
        env=script_environment() | {"COORDINATOR_URL": url} | extra,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    STARTED.append(process)
    return process


def finish(process: subprocess.Popen[str]) -> str:
    out, error = process.communicate(timeout=60)
    assert process.returncode == 0, error
    return out


async def until(holds) -> None:
    await asyncio.to_thread(wait_until, holds)  # the loop continues meanwhile


ONE_NODE = """
    import asyncio, os
    from dtruntime import TrainingOrchestrator, DatasetRegistry, CheckpointManager

    async def main():
        # Connect to coordinator
        orch = TrainingOrchestrator(
            worker_id="worker-0",
            coordinator_url=os.environ["COORDINATOR_URL"],
            world_size=1,
            rank=0
        )

        await orch.register_worker(ip="127.0.0.1", port=8080)

        # Training code here...
        print("Training started!")

    if __name__ == "__main__":
        asyncio.run(main())
"""

FOUR_NODES = """
    import os
    import asyncio
    import socket
    from dtruntime import TrainingOrchestrator, DatasetRegistry, CheckpointManager

    async def main():
        rank = int(os.environ["RANK"])
        world_size = int(os.environ["WORLD_SIZE"])
        coordinator_url = os.environ["COORDINATOR_URL"]

        # Initialize orchestrator
        orch = TrainingOrchestrator(
            worker_id=f"worker-{rank}",
            coordinator_url=coordinator_url,
            world_size=world_size,
            rank=rank
        )

        # Register worker
        hostname = socket.gethostname()
        ip = socket.gethostbyname(hostname)
        await orch.register_worker(ip=ip, port=8080 + rank)

        # Register dataset (only rank 0)
        if rank == 0:
            registry = DatasetRegistry(coordinator_url)
            registry.register(
                "training_data",
                os.environ["DATA"],
                "parquet",
                total_samples=1_000_000,
                shard_size=10_000
            )

        # Wait for dataset registration
        await orch.wait_barrier("dataset_ready")

        # Get shard for this worker
        registry = DatasetRegistry(coordinator_url)
        shard_files = registry.get_shard("training_data", worker_rank=rank, epoch=0)

        print(f"Worker {rank} got {len(shard_files)} shard files")
        print("\\n".join(shard_files))

    if __name__ == "__main__":
        asyncio.run(main())
"""


def test_the_documented_scripts_run_one_after_another(coordinator, tmp_path):
    data = tmp_path / "data"
    (data / "deep").mkdir(parents=True)
    names = {f"part-{index}.parquet" for index in range(9)} | {"deep/more.parquet"}
    for name in names:
        (data / name).touch()
    (data / "README.txt").touch()
    assert finish(start_worker(ONE_NODE, coordinator.url)) == "Training started!\n"
    workers = [
        start_worker(FOUR_NODES, coordinator.url, RANK=rank, WORLD_SIZE=4, DATA=data)
        for rank in range(4)
    ]
    lines = [finish(worker).splitlines() for worker in workers]
    counts = sorted(int(text[0].split()[3]) for text in lines)
    assert counts == [2, 2, 3, 3]
    files = [file for text in lines for file in text[1:]]
    assert sorted(files) == sorted(str(data / name) for name in names)
    # Every worker left: nothing failed, none is registered.
    assert coordinator.metric('coordinator_workers_active{job="default"}') == 0
    assert coordinator.metric('coordinator_worker_failures{job="default"}') == 0
    # And once more, as after a restart of the whole job.
    assert finish(start_worker(ONE_NODE, coordinator.url)) == "Training started!\n"


def test_an_empty_dataset_works_and_is_reported(coordinator, tmp_path):
    (tmp_path / "data").mkdir()
    registry = DatasetRegistry(coordinator.url)
    with pytest.warns(UserWarning, match="has no parquet files"):
        info = registry.register("empty", tmp_path / "data", "parquet", 1_000_000, 10_000)
    assert (info.file_count, info.shard_count) == (0, 100)
    assert registry.get_shard("empty", worker_rank=0, epoch=0) == []


def test_missing_datasets(coordinator, tmp_path):
    registry = DatasetRegistry(coordinator.url)
    with pytest.raises(DatasetNotFound, match=r"does not exist on this worker\nhint: mount"):
        registry.register("nowhere", tmp_path / "nowhere", "parquet", 10, 1)
    with pytest.raises(
        DatasetNotFound, match=r"`other` is not registered in job `default`\nhint: "
    ):
        registry.get_shard("other", worker_rank=0)
    with pytest.raises(InvalidArgument, match="only local directories are supported"):
        registry.register("remote", "s3://bucket/data", "parquet", 10, 1)


def test_shards_by_epoch(coordinator, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for index in range(20):
        (data / f"{index:02}.bin").touch()
    registry = DatasetRegistry(coordinator.url, job="shards")
    for _ in range(2):  # registering the same again is no change
        registry.register("d", data, "bin", 20, 1, seed=3)
    shares = [registry.get_shard("d", rank, epoch=0, world_size=3) for rank in range(3)]
    assert sorted(map(len, shares)) == [6, 7, 7]
    files = [str(file) for file in data.iterdir()]
    assert sorted(file for share in shares for file in share) == sorted(files)
    assert registry.get_shard("d", 0, epoch=1, world_size=3) != shares[0]
    with pytest.raises(InvalidArgument, match="only ranks below 3 exist"):
        registry.get_shard("d", 3, world_size=3)


def test_shards_are_of_the_ranks_that_run_now_and_a_dataset_may_change_before_they_do(
    coordinator, tmp_path, monkeypatch
):
    data = tmp_path / "data"
    data.mkdir()
    for index in range(8):
        (data / f"{index:02}.bin").touch()
    registry = DatasetRegistry(coordinator.url, job="smaller")
    registry.register("d", data, "bin", 8, 1)

    async def run_with(world_size):
        for rank in range(world_size):
            worker = TrainingOrchestrator(
                f"w{rank}", coordinator.url, world_size, rank, job="smaller"
            )
            await worker.register_worker("127.0.0.1", 1)
            workers.append(worker)

    workers = []
    asyncio.run(run_with(4))
    assert len(registry.get_shard("d", 0)) == 2
    for worker in workers:
        worker.leave()
    # The next run has two ranks, and asks before any of them is registered.
    monkeypatch.setenv("WORLD_SIZE", "2")
    (data / "08.bin").touch()
    registry.register("d", data, "bin", 9, 1)
    assert sorted(len(registry.get_shard("d", rank)) for rank in range(2)) == [4, 5]
    (data / "09.bin").touch()
    with pytest.raises(Conflict, match="for the next run it is registered"):
        registry.register("d", data, "bin", 10, 1)


def test_barriers_release_together(make):
    async def act():
        workers = [make(rank, 3) for rank in range(3)]
        for worker in workers:
            await worker.register_worker("127.0.0.1", 1)
        for generation in range(5):
            waits = [worker.wait_barrier("round", timeout=20) for worker in workers]
            assert await asyncio.gather(*waits) == [generation] * 3
        infos = await workers[1].workers()
        assert [(info.rank, info.worker_id, info.state) for info in infos] == [
            (rank, f"worker-{rank}", "alive") for rank in range(3)
        ]

    asyncio.run(act())


def test_a_barrier_names_who_is_missing(make):
    async def act():
        first, second = make(0, 3), make(1, 3)
        await first.register_worker("127.0.0.1", 1)
        await second.register_worker("127.0.0.1", 1)
        with pytest.raises(BarrierTimeout) as caught:
            await first.wait_barrier("alone", timeout=0.3)
        text = str(caught.value)
        assert "2 ranks did not come within 0.3 s" in text
        assert "rank 1 (`worker-1`), rank 2 (nobody has it)" in text
        with pytest.raises(InvalidArgument, match="1 to 86400000 is allowed"):
            await first.wait_barrier("never", timeout=0)

    asyncio.run(act())


def test_a_cancelled_wait_is_withdrawn(make):
    async def act():
        first, second = make(0, 2), make(1, 2)
        await first.register_worker("127.0.0.1", 1)
        await second.register_worker("127.0.0.1", 1)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(first.wait_barrier("b"), 0.3)
        # Had the arrival stayed, this would release the barrier.
        with pytest.raises(BarrierTimeout, match="worker-0"):
            await second.wait_barrier("b", timeout=0.5)

    asyncio.run(act())


KEEPS_RUNNING = """
    import asyncio, os, sys, time
    from dtruntime import TrainingOrchestrator

    async def main():
        orch = TrainingOrchestrator()
        await orch.register_worker("127.0.0.1", 1)
        print("registered", flush=True)

    asyncio.run(main())
    exec(sys.stdin.read())
"""


@pytest.mark.parametrize(
    ("end", "kind", "reason"),
    [
        ("pass", "left", "it finished"),
        ("raise ValueError('bad batch')", "failed", "ValueError: bad batch"),
        ("os.kill(os.getpid(), 9)", "died", "it was silent for"),
    ],
)
def test_the_others_are_told_how_a_worker_ended(coordinator, make, end, kind, reason):
    changes = []

    async def act():
        one = make(0, 2, on_membership_change=changes.append)
        await one.register_worker("127.0.0.1", 1)
        other = start_worker(KEEPS_RUNNING, coordinator.url, RANK=1, WORLD_SIZE=2)
        assert other.stdout.readline() == "registered\n"
        waiting = asyncio.create_task(one.wait_barrier("b", timeout=30))
        other.communicate(end, timeout=30)
        with pytest.raises(MembershipChanged, match=reason):
            await waiting
        await until(lambda: kind in [change.kind for change in changes])
        change = next(change for change in changes if change.kind == kind)
        assert (change.worker_id, change.rank) == ("worker-1", 1)
        assert reason in change.reason
        failures = coordinator.metric('coordinator_worker_failures{job="default"}')
        assert failures == (0 if kind == "left" else 1)
        # A replacement takes the place at once, and both continue.
        new = make(1, 2)
        await new.register_worker("127.0.0.1", 1)
        assert len(await asyncio.gather(one.wait_barrier("b"), new.wait_barrier("b"))) == 2

    asyncio.run(act())


def test_a_callback_that_exits_stops_no_later_notice(make):
    kinds = []

    def note(change):
        kinds.append(change.kind)
        raise SystemExit(3)

    async def act():
        one = make(0, 2, on_membership_change=note)
        await one.register_worker("127.0.0.1", 1)
        other = make(1, 2)
        await other.register_worker("127.0.0.1", 1)
        await until(lambda: "joined" in kinds)
        other.leave()
        await until(lambda: "left" in kinds)

    asyncio.run(act())


def test_the_failure_budget_aborts_the_job(tmp_path):
    process = CoordinatorProcess(tmp_path, max_worker_failures=2)
    process.start()
    reasons = []

    async def act():
        one = TrainingOrchestrator("worker-0", process.url, 2, 0, on_abort=reasons.append)
        await one.register_worker("127.0.0.1", 1)
        for _ in range(2):
            other = start_worker(KEEPS_RUNNING, process.url, RANK=1, WORLD_SIZE=2)
            assert other.stdout.readline() == "registered\n"
            other.communicate("raise RuntimeError('broken')", timeout=30)
            await asyncio.sleep(2.5)  # longer than a heartbeat timeout: the next is not part of it
        await until(lambda: reasons)
        assert "2 failures since the last checkpoint" in reasons[0]
        assert "RuntimeError: broken" in reasons[0]
        with pytest.raises(JobAborted, match="2 failures"):
            one.check()
        with pytest.raises(JobAborted, match="2 failures"):
            await one.wait_barrier("b")
        # Once every worker has left, the job starts again.
        one.leave()
        fresh = TrainingOrchestrator("worker-0", process.url, 1, 0)
        await fresh.register_worker("127.0.0.1", 1)
        assert await fresh.wait_barrier("b") == 0
        fresh.leave()

    try:
        asyncio.run(act())
    finally:
        process.end()


STOPPED = KEEPS_RUNNING.replace(
    "TrainingOrchestrator()",
    "TrainingOrchestrator(on_membership_change=lambda change: kinds.append(change.kind))",
).replace("orch = ", "global orch, kinds; kinds = []; orch = ")


async def stopped_until_dead(source: str, coordinator, make):
    """Start rank 1 with ``source`` beside rank 0, and stop it for longer than it may be silent."""
    changes = []
    one = make(0, 2, on_membership_change=changes.append)
    await one.register_worker("127.0.0.1", 1)
    other = start_worker(source, coordinator.url, RANK=1, WORLD_SIZE=2)
    assert other.stdout.readline() == "registered\n"
    other.send_signal(signal.SIGSTOP)
    await until(lambda: "died" in [change.kind for change in changes])
    return one, other, changes


def test_a_stopped_worker_rejoins_by_itself(coordinator, make):
    source = STOPPED.replace(
        "exec(sys.stdin.read())",
        """
    sys.stdin.readline()
    while "rejoined" not in kinds:
        time.sleep(0.01)
    try:
        asyncio.run(orch.wait_barrier("b", timeout=30))
    except Exception as error:  # its own loss is one that it is told of
        print(type(error).__name__)
    print(asyncio.run(orch.wait_barrier("b", timeout=30)))
    """,
    )

    async def act():
        one, other, changes = await stopped_until_dead(source, coordinator, make)
        other.send_signal(signal.SIGCONT)
        await until(lambda: changes[-1].kind == "joined")
        ended = asyncio.create_task(asyncio.to_thread(other.communicate, "go on\n", 30))
        with pytest.raises(MembershipChanged, match="it was silent for"):
            await one.wait_barrier("b")
        assert await one.wait_barrier("b") == 0
        out, error = await ended
        assert (other.returncode, out) == (0, "MembershipChanged\n0\n"), error

    asyncio.run(act())


def test_a_replaced_worker_stays_fenced(coordinator, make):
    source = STOPPED.replace(
        "exec(sys.stdin.read())",
        """
    while "fenced" not in kinds:
        time.sleep(0.01)
    try:
        asyncio.run(orch.wait_barrier("b", timeout=30))
    except Exception as error:
        print(type(error).__name__, error.why)
    """,
    )

    async def act():
        _, other, _ = await stopped_until_dead(source, coordinator, make)
        second = make(1, 2)
        await second.register_worker("127.0.0.1", 1)
        other.send_signal(signal.SIGCONT)
        out, error = other.communicate(timeout=30)
        assert out == "WorkerFenced another process took the place of `worker-1`\n", error

    asyncio.run(act())


def test_the_end_of_a_membership_is_noticed_between_two_checks():
    class Worker:
        """It ends after the wait for a notice timed out, but before the thread checks for it."""

        is_ended = False
        waits = 0

        def next_notice(self, _seconds):
            self.waits, self.is_ended = self.waits + 1, True
            return {"kind": "fenced", "reason": "replaced"} if self.waits == 2 else None

    told = []
    one = TrainingOrchestrator("w", "http://127.0.0.1:9", 1, 0, on_membership_change=told.append)
    one._deliver_notices(Worker())
    assert [(change.kind, change.reason) for change in told] == [("fenced", "replaced")]


def test_the_coordinator_is_killed_and_restarted(coordinator, make):
    async def act():
        first, second = make(0, 2), make(1, 2)
        await first.register_worker("127.0.0.1", 1)
        await second.register_worker("127.0.0.1", 1)
        epoch = first.epoch
        assert await asyncio.gather(first.wait_barrier("b"), second.wait_barrier("b")) == [0, 0]
        waiting = asyncio.create_task(first.wait_barrier("b", timeout=60))
        await until(lambda: coordinator.metric('coordinator_barriers_waiting{job="default"}') == 1)
        coordinator.end(signal.SIGKILL)
        await asyncio.sleep(0.3)
        coordinator.start()
        # The arrival is sent again, the members are still members, the count continues.
        assert await second.wait_barrier("b", timeout=60) == 1
        assert await waiting == 1
        assert second.epoch >= epoch
        assert coordinator.metric("coordinator_starts_total") == 2

    asyncio.run(act())


def test_the_coordinator_stops_quickly_and_cleanly(coordinator, make):
    async def act():
        first, second = make(0, 2), make(1, 2)
        await first.register_worker("127.0.0.1", 1)
        await second.register_worker("127.0.0.1", 1)
        waiting = asyncio.create_task(first.wait_barrier("b", timeout=60))
        await until(lambda: coordinator.metric('coordinator_barriers_waiting{job="default"}') == 1)
        started = time.monotonic()
        assert coordinator.end(signal.SIGTERM) == 0
        assert time.monotonic() - started < 8
        coordinator.start()
        assert await second.wait_barrier("b", timeout=60) == 0
        assert await waiting == 0

    asyncio.run(act())


def test_another_world_size_waits_for_the_old_run_to_end(coordinator, make):
    async def act():
        old = make(0, 2)
        await old.register_worker("127.0.0.1", 1)
        # The same worker with another world size takes the job over.
        new = make(0, 1)
        await new.register_worker("127.0.0.1", 1)
        assert await new.wait_barrier("b") == 0
        assert coordinator.metric('coordinator_worker_failures{job="default"}') == 0

    asyncio.run(act())


def test_no_coordinator_listens():
    url = f"http://127.0.0.1:{free_port()}"

    async def act():
        one = TrainingOrchestrator("w", url, 1, 0, patience=0.3)
        with pytest.raises(CoordinatorUnavailable) as caught:
            await one.register_worker("127.0.0.1", 1)
        assert isinstance(caught.value, ConnectionError)
        text = str(caught.value)
        assert f"the coordinator at `{url}` does not answer: " in text
        assert "refused" in text
        assert "hint: start it (`coordinator 0.0.0.0:" in text
        with pytest.raises(Closed, match="`w` is not registered"):
            await one.wait_barrier("b")

    asyncio.run(act())


def test_wrong_arguments_are_explained(coordinator):
    with pytest.raises(InvalidArgument, match=r"neither http nor https\nhint: write it as"):
        TrainingOrchestrator("w", "ftp://host", 1, 0)

    async def act():
        one = TrainingOrchestrator("w", coordinator.url, 2, 2)
        with pytest.raises(InvalidArgument, match="`rank` is 2, below the world size of 2"):
            await one.register_worker("127.0.0.1", 1)
        with pytest.raises(InvalidArgument, match="0 to 65535"):
            await one.register_worker("127.0.0.1", 70_000)

    asyncio.run(act())


def test_a_forked_child_is_not_a_member(coordinator, make):
    async def act():
        one = make(0, 1)
        await one.register_worker("127.0.0.1", 1)
        return one

    one = asyncio.run(act())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # this is what is tested
        child = os.fork()
    if child == 0:
        code = 0
        try:
            one._worker.epoch  # noqa: B018  (it raises)
            code = 1
        except Closed:
            one.leave()
        os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert one._worker.epoch > 0
    assert coordinator.metric('coordinator_workers_active{job="default"}') == 1


def test_the_coordinators_settings_reach_workers(tmp_path):
    config = tmp_path / "coordinator.toml"
    config.write_text(
        '[storage]\nbackend = "local"\npath = "/checkpoints"\n[dataset]\ndefault_shard_size = 5\n'
    )
    process = CoordinatorProcess(tmp_path)
    process.start()

    async def act():
        one = TrainingOrchestrator("w", process.url, 1, 0)
        await one.register_worker("127.0.0.1", 1)
        assert one.coordinator_settings == {
            "storage.backend": '"local"',
            "storage.path": '"/checkpoints"',
            "dataset.default_shard_size": "5",
        }
        (tmp_path / "data").mkdir()
        (tmp_path / "data" / "a.csv").touch()
        info = DatasetRegistry(process.url).register("d", tmp_path / "data", "csv", 12)
        assert (info.shard_size, info.shard_count, info.file_count) == (5, 3, 1)
        one.leave()

    try:
        asyncio.run(act())
    finally:
        process.end()
