"""Stores in S3, against the tests' own server, which runs as a process."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
import torch.distributed.checkpoint as dcp
from coordinators import CoordinatorProcess
from support import assert_same, run_script, script_environment, start_script

from dtruntime import CheckpointManager, CheckpointNotFound, InvalidArgument, Unavailable
from dtruntime.dcp import StorageReader, StorageWriter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

TARGET = Path(os.environ.get("CARGO_TARGET_DIR", Path(__file__).parents[2] / "target"))
SERVER = TARGET / "release" / "examples" / "s3-server"
TOOL = TARGET / "release" / "ckpt-tool"
SECRET = "owner-secret-7f3a9c"  # noqa: S105  (the server's own, good for nothing else)
TOKEN = "session-token-55aa"  # noqa: S105


pytestmark = pytest.mark.usefixtures("server")


@contextlib.contextmanager
def serving(objects: Path) -> Iterator[tuple[subprocess.Popen[str], str, str]]:
    """Start a server with an empty bucket; yield it, its URL and its owner's key."""
    assert SERVER.exists(), "build it: make everything"
    with subprocess.Popen(
        [SERVER, objects], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        url, bucket, key, secret = process.stdout.readline().split()
        assert (bucket, secret) == ("checkpoints", SECRET)
        yield process, url, key
        process.stdin.close()
        process.wait(10)


@pytest.fixture
def server(tmp_path, monkeypatch) -> Iterator[subprocess.Popen[str]]:
    """Start a server with an empty bucket, and point the usual chain at it."""
    with serving(tmp_path / "objects") as (process, url, key):
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            monkeypatch.delenv(name)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", key)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", url)
        monkeypatch.setenv("AWS_REGION", "us-east-1")
        for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
            (tmp_path / name).touch()
            monkeypatch.setenv(name, str(tmp_path / name))
        yield process


STORE = "s3://checkpoints/runs/gpt"


def state_of(seed: int) -> dict:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(300_000, generator=generator)
    return {"model": {"w": weights, "tied": weights}, "steps": [1, 2.5, None], "epoch": seed}


def test_what_is_saved_to_s3_is_loaded():
    with CheckpointManager(STORE, keep_last_n=2, chunk_bytes="64KiB") as manager:
        assert manager.io_backend == "s3"
        assert manager.path == STORE
        assert manager.latest_step() is None
        for step in (1, 2, 3):
            info = manager.save(state_of(step), step=step)
        assert (info.location, info.stats.parts, info.stats.retries) == (STORE, 1, 0)
        assert manager.all_steps() == [2, 3]
        assert_same(manager.load(), state_of(3))
        assert_same(manager.load(step=2, keys=["model.*"]), {"model": state_of(2)["model"]})
        assert manager.verify(2).ok
        live = state_of(9)
        manager.restore(live, step=2)
        assert_same(live, state_of(2))
        with CheckpointManager(STORE, read_only=True) as reader:
            assert_same(reader.load(), state_of(3))
            with pytest.raises(InvalidArgument, match="read-only"):
                reader.delete(3)
        assert manager.delete(2) > 0
        assert manager.all_steps() == [3]


def test_a_state_in_parts():
    state = {"big": torch.arange(5_000_000)}
    with CheckpointManager(STORE, compression="none", s3={"part_bytes": "5MiB"}) as manager:
        assert manager.save(state, step=1).stats.parts == 8
        assert_same(manager.load(), state)
        with pytest.raises(InvalidArgument, match="mmap=True"):
            manager.load(mmap=True)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # here it is one process
@pytest.mark.parametrize("remote", [None, STORE])
def test_dcp_uses_the_store(tmp_path, remote):
    place = {"path": STORE} if remote is None else {"path": tmp_path / "near", "remote": remote}
    state = {"w": torch.arange(5_000_000), "step": 1}
    with CheckpointManager(**place, s3={"part_bytes": "5MiB"}) as manager:
        dcp.save(state, storage_writer=StorageWriter(manager, 1))
    shutil.rmtree(tmp_path / "near", ignore_errors=True)
    live = {"w": torch.zeros(5_000_000, dtype=torch.int64), "step": 0}
    with CheckpointManager(STORE, read_only=True) as reader:
        dcp.load(live, storage_reader=StorageReader(reader))
    assert_same(live, state)


def test_the_other_ways_to_name_a_store():
    async def train() -> None:
        manager = CheckpointManager(storage_path="checkpoints/runs/other", backend="s3")
        first = await manager.save_async({"a": 1}, step=1000)
        assert first.location == "s3://checkpoints/runs/other"
        handle = manager.save_async({"a": 2}, step=1001)
        await asyncio.gather(handle.wait(), asyncio.sleep(0))
        manager.close()

    asyncio.run(train())
    with CheckpointManager("s3://checkpoints/runs/other/", backend="s3") as manager:
        assert manager.load() == {"a": 2}


def test_a_directory_that_drains_into_s3(tmp_path):
    near = tmp_path / "near"
    with CheckpointManager(near, remote=STORE, keep_last_n=2, compression="none") as manager:
        for step in (1, 2, 3):
            handle = manager.save_async(state_of(step), step=step)
        assert handle.result().location == str(near)
        info = handle.uploaded.result(60)
        assert manager.pending_uploads() == []
        assert (info.step, info.parts, info.was_there) == (3, 1, False)
        assert info.bytes == handle.result().stored_bytes
    with CheckpointManager(STORE, read_only=True) as far:
        assert far.all_steps()[-1] == 3
        assert_same(far.load(), state_of(3))
    shutil.rmtree(near)
    with CheckpointManager(near, remote=STORE) as manager:
        assert manager.latest_step() == 3
        assert_same(manager.load(), state_of(3))
        manager.save(state_of(4), step=4)
    with CheckpointManager(STORE, read_only=True) as far:
        assert far.latest_step() == 4, "closing waits for the upload"
    with CheckpointManager(tmp_path / "alone") as manager:
        assert manager.save_async({}, step=1).uploaded.result(10) is None


RANK_SCRIPT = """
import os, sys
import torch
from dtruntime import *
rank, path, action = int(os.environ["RANK"]), sys.argv[1], sys.argv[2]

def state_of(step):
    generator = torch.Generator().manual_seed(step * 100 + rank)
    return {"w": torch.randn(50_000, generator=generator), "rank": rank}

with CheckpointManager(path, remote="s3://checkpoints/runs/cluster", keep_last_n=2) as manager:
    if action == "save":
        for step in (1, 2, 3):
            handle = manager.save_async(state_of(step), step=step)
            assert handle.result().step == step
            assert handle.uploaded.result(60).bytes > 0
    loaded = manager.load()
    assert torch.equal(loaded["w"], state_of(3)["w"]) and loaded["rank"] == rank
    files = sorted(os.listdir(path + "/step-000000000003"))
    print(manager.all_steps(), manager.last_load.step, files)
"""


def test_ranks_with_a_directory_each_and_one_store_in_s3(tmp_path):
    coordinator = CoordinatorProcess(tmp_path)
    coordinator.start()

    def run(action: str) -> list[str]:
        ranks = [
            subprocess.Popen(
                [sys.executable, "-c", RANK_SCRIPT, tmp_path / f"machine-{rank}", action],
                env=script_environment()
                | {"RANK": str(rank), "WORLD_SIZE": "2", "COORDINATOR_URL": coordinator.url},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(2)
        ]
        ended = [rank.communicate(timeout=120) for rank in ranks]
        for rank, (_, error) in zip(ranks, ended, strict=True):
            assert rank.returncode == 0, error
        return [out for out, _ in ended]

    try:
        for rank, output in enumerate(run("save")):
            assert output.startswith("[2, 3] 3 ['manifest.json', ")
            assert f"rank-{rank:05}" in output
            assert f"rank-{1 - rank:05}" not in output, "each has its own shard, and no other's"
        with CheckpointManager("s3://checkpoints/runs/cluster", read_only=True) as far:
            assert far.all_steps() == [2, 3]
            assert far.verify().ok
            assert far.load(from_rank=1)["rank"] == 1
        shutil.rmtree(tmp_path / "machine-1")  # a new machine takes its place
        (tmp_path / "machine-1" / "step-000000000003").mkdir(parents=True)
        first, second = run("load")
        assert first.startswith("[2, 3] 3 ['manifest.json', ")
        assert second == "[2, 3] 3 []\n"
    finally:
        coordinator.end()


REPLICATED_SCRIPT = """
import os, sys
import torch
from dtruntime import *
path, action = sys.argv[1:]

def state_of(step):
    generator = torch.Generator().manual_seed(step)
    weights = torch.randn(50_000, generator=generator)
    return {"model": {"w": weights}, "rank": int(os.environ["RANK"])}

rate = 1 if action == "save" else None
manager = CheckpointManager(
    path, remote="s3://checkpoints/runs/both", replicated=["model.*"], remote_bytes_per_second=rate
)
if action == "save":
    manager.save_async(state_of(1), step=1).result()
    os._exit(9)
if action == "begin":
    try:
        manager.load()
    except LoadAborted as error:
        print(error.why)
        os._exit(0)
    except CheckpointNotFound:
        print("begins")
    assert manager.should_save(1)
    manager.save(state_of(1), step=1)
loaded = manager.load()
assert torch.equal(loaded["model"]["w"], state_of(1)["model"]["w"])
assert loaded["rank"] == state_of(1)["rank"]
print(manager.last_load.step)
manager.close()
"""


@contextlib.contextmanager
def two_machines(folder: Path) -> Iterator[Callable[[str], list[tuple[int, str, str]]]]:
    """Return a function that runs a rank on each of two machines, and returns the outcomes."""
    coordinator = CoordinatorProcess(folder)
    coordinator.start()

    def run(action: str) -> list[tuple[int, str, str]]:
        environment = script_environment() | {"COORDINATOR_URL": coordinator.url, "WORLD_SIZE": "2"}
        ranks = [
            subprocess.Popen(
                [sys.executable, "-c", REPLICATED_SCRIPT, folder / f"machine-{rank}", action],
                env=environment | {"RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(2)
        ]
        said = [rank.communicate(timeout=120) for rank in ranks]
        return [(rank.returncode, *texts) for rank, texts in zip(ranks, said, strict=True)]

    try:
        yield run
    finally:
        coordinator.end()


def test_machines_that_crash_before_the_upload_load_what_they_hold_together(tmp_path):
    with two_machines(tmp_path) as run:
        assert [code for code, _, _ in run("save")] == [9, 9]
        with CheckpointManager("s3://checkpoints/runs/both", read_only=True) as far:
            assert far.all_steps() == []
        found = run("load")
        assert [out for _, out, _ in found] == ["1\n", "1\n"], found
        # A job of another size finds what was replicated.
        with CheckpointManager("s3://checkpoints/runs/both", read_only=True) as far:
            assert far.load(keys=["model.*"])["model"]["w"].shape == (50_000,)


class Relay:
    """A proxy to a port of this machine, until it is cut."""

    def __init__(self, port: int) -> None:
        self._far_port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._ends = [self._listener]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self._far_port))
                self._ends += [near, far]
                for ends in ((near, far), (far, near)):
                    threading.Thread(target=self._pass_on, args=ends, daemon=True).start()

    def _pass_on(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while received := source.recv(1 << 16):
                sink.sendall(received)
            sink.shutdown(socket.SHUT_WR)

    def cut(self) -> None:
        for end in self._ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()


UNREACHABLE_SCRIPT = """
import sys
from dtruntime import *
patience = {"attempts": 1, "connect_timeout_ms": 1000}
with CheckpointManager("s3://checkpoints/runs/away", s3=patience) as manager:
    manager.save({"a": 1}, step=1)
    print("saved", flush=True)
    sys.stdin.readline()
    try:
        manager.load()
    except (LoadAborted, Unavailable) as error:
        print(type(error).__name__, "rank 1 gave up" in error.why)
"""


def test_a_rank_whose_network_fails_is_named_on_the_others(tmp_path):
    coordinator = CoordinatorProcess(tmp_path)
    coordinator.start()
    relay = Relay(int(os.environ["AWS_ENDPOINT_URL_S3"].rsplit(":", 1)[1]))
    environment = {"COORDINATOR_URL": coordinator.url, "WORLD_SIZE": "2"}
    ways = [{"RANK": "0"}, {"RANK": "1", "AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{relay.port}"}]
    ranks = [start_script(UNREACHABLE_SCRIPT, environment=environment | way) for way in ways]
    try:
        said = [rank.stdout.readline() for rank in ranks]
        assert said == ["saved\n"] * 2, "".join(rank.communicate()[1] for rank in ranks)
        relay.cut()
        for rank in ranks:
            rank.stdin.write("go\n")
            rank.stdin.flush()
        ended = [rank.communicate(timeout=120) for rank in ranks]
        outputs = [out for out, _ in ended]
        assert outputs == ["LoadAborted True\n", "Unavailable False\n"], ended
    finally:
        relay.cut()
        coordinator.end()


def test_a_machine_lost_before_the_first_upload_is_reported_on_all(tmp_path):
    with two_machines(tmp_path) as run:
        assert [code for code, _, _ in run("save")] == [9, 9]
        shutil.rmtree(tmp_path / "machine-1")
        found = run("begin")
        assert [code for code, _, _ in found] == [0, 0], found
        have = ("this rank has steps 1", "this rank has none")
        for (_, out, _), said in zip(found, have, strict=True):
            assert out == f"there is none: {said}, ranks that have some: 1\n"
        shutil.rmtree(tmp_path / "machine-0")
        found = run("begin")
        assert [(code, out) for code, out, _ in found] == [(0, "begins\n1\n")] * 2, found
        with CheckpointManager("s3://checkpoints/runs/both", read_only=True) as far:
            assert far.all_steps() == [1]
            assert far.verify().ok


UPLOADING_SCRIPT = """
import sys, threading, torch
from dtruntime import CheckpointManager
manager = CheckpointManager(
    sys.argv[1], remote="s3://checkpoints/runs/gpt", compression="none",
    remote_bytes_per_second="16MiB",
)
manager.save({"big": torch.arange(10_000_000)}, step=1)
asked = threading.Event()
while manager.pending_uploads()[0].uploaded_bytes < 40 << 20:
    asked.wait(0.01)
print("two parts were passed on", flush=True)
sys.stdin.read()
"""


def test_what_a_process_uploaded_that_was_killed_is_not_sent_again(tmp_path):
    near = tmp_path / "near"
    with start_script(UPLOADING_SCRIPT, near) as process:
        assert process.stdout.readline() == "two parts were passed on\n"
        process.kill()
    with CheckpointManager(STORE, read_only=True) as far:
        assert far.all_steps() == []
    [copied] = json.loads(tool("copy", near, STORE, "--json"))
    assert 1 <= copied["resumed_parts"] < copied["parts"] == 5
    with CheckpointManager(STORE) as far:
        assert_same(far.load(), {"big": torch.arange(10_000_000)})
    left = json.loads(tool("gc", STORE, "--grace", 0, "--dry-run", "--json"))
    assert (left["removed"], left["kept"]) == ([], [])
    # The next writer of the directory finds it there.
    with CheckpointManager(near, remote=STORE) as manager:
        manager.save_async({"big": 2}, step=2).uploaded.result(60)
        assert manager.pending_uploads() == []


def test_a_failed_upload_is_raised_and_the_checkpoint_remains(server, tmp_path):
    patience = {"attempts": 1, "connect_timeout_ms": 300, "request_timeout_ms": 300}
    manager = CheckpointManager(tmp_path / "near", remote=STORE, s3=patience)
    server.stdin.close()
    server.wait(10)
    handle = manager.save_async({"a": 1}, step=1)
    assert handle.result().step == 1
    with pytest.raises(
        Unavailable, match="uploading step 1 to `s3://checkpoints/runs/gpt`: reading"
    ):
        manager.close()
    manager.close()
    assert isinstance(handle.uploaded.exception(10), Unavailable)
    with CheckpointManager(tmp_path / "near", read_only=True) as reader:
        assert reader.load() == {"a": 1}


def test_a_retried_upload_hides_no_later_one(tmp_path):
    obstacle = tmp_path / "objects/checkpoints/runs/gpt/step-000000000001"
    obstacle.parent.mkdir(parents=True)
    obstacle.touch()  # the service keeps objects in directories
    with CheckpointManager(tmp_path / "near", remote=STORE, s3={"attempts": 1}) as manager:
        first, second = (manager.save_async({"a": step}, step=step) for step in (1, 2))
        assert second.uploaded.result(60).step == 2
        assert first.result().step == 1
        assert not first.uploaded.done()
        obstacle.unlink()
        assert first.uploaded.result(60).step == 1


def test_an_interrupt_ends_the_wait_for_uploads(tmp_path):
    done = run_script(
        """
import os, signal, sys
from dtruntime import CheckpointManager
manager = CheckpointManager(sys.argv[1], remote=sys.argv[2], remote_bytes_per_second=1)
manager.save({"a": 1}, step=1)
[(step, uploaded, total)] = manager.pending_uploads()
assert step == 1 and 0 <= uploaded <= total and total > 0
for seconds in (0.3, 2):
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        manager.close()
    except KeyboardInterrupt:
        print("interrupted", flush=True)
# A process that ends waits for nothing then.
""",
        tmp_path / "near",
        STORE,
    )
    assert done.stdout == "interrupted\n" * 2, done.stderr
    assert "closing waits for the upload of step 1: 0.0 of 0.0 MiB are left" in done.stderr
    with CheckpointManager(tmp_path / "near", remote=STORE):
        pass
    with CheckpointManager(STORE, read_only=True) as far:
        assert far.load() == {"a": 1}


def test_an_address_whose_slashes_pathlib_collapsed_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for backend in (None, "s3"):
        with pytest.raises(InvalidArgument, match='pass a `str`: "s3://checkpoints/runs/gpt"'):
            CheckpointManager(Path(STORE), backend=backend)
    assert not (tmp_path / "s3:").exists()
    with CheckpointManager("./s3:/run") as manager:
        manager.save({}, step=1)


def test_a_service_behind_a_proxy_of_the_environment(monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", os.environ["AWS_ENDPOINT_URL_S3"])
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://s3.invalid")
    with CheckpointManager(STORE) as manager:
        manager.save({"a": 1}, step=1)
        assert manager.load() == {"a": 1}
    monkeypatch.setenv("NO_PROXY", "s3.invalid")
    with pytest.raises(Unavailable):
        CheckpointManager(STORE, s3={"attempts": 1})


def test_an_endpoint_of_the_environment_needs_no_region_and_shows_no_password(monkeypatch):
    monkeypatch.delenv("AWS_REGION")
    with CheckpointManager(STORE) as manager:
        manager.save({"a": 1}, step=1)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://someone:hush@127.0.0.1:9")
    with pytest.raises(Unavailable, match=r"127\.0\.0\.1:9") as caught:
        CheckpointManager(STORE, s3={"attempts": 1})
    assert "hush" not in str(caught.value)


def test_an_unreachable_service_is_not_damage(server):
    patience = {"attempts": 2, "connect_timeout_ms": 500, "request_timeout_ms": 500}
    with CheckpointManager(STORE, s3=patience) as manager:
        manager.save({"a": 1}, step=1)
        with pytest.raises(CheckpointNotFound):
            manager.load(step=2)
        server.stdin.close()
        server.wait(10)
        for act in (manager.load, manager.verify, lambda: manager.save({"a": 2}, step=2)):
            with pytest.raises(Unavailable) as caught:
                act()
            assert caught.value.is_retryable
            assert "\nhint: " in str(caught.value)
    with pytest.raises(Unavailable, match="opening store `s3://checkpoints/runs/gpt`"):
        CheckpointManager(STORE, s3=patience)


def test_a_forked_child_is_refused_and_the_parent_continues():
    done = run_script(
        """
import os, sys, torch
from dtruntime import CheckpointManager, Closed
manager = CheckpointManager("s3://checkpoints/runs/gpt")
handle = manager.save_async({"w": torch.randn(3_000_000)}, step=1)
child = os.fork()
if child == 0:
    code = 0
    for verb in (manager.load, manager.latest_step, lambda: manager.save_async({}, step=9)):
        try:
            verb()
            code = 1
        except Closed:
            pass
    manager.close()
    evaluator = CheckpointManager("s3://checkpoints/runs/gpt", read_only=True)
    evaluator.all_steps()
    del handle, manager, evaluator
    import gc; gc.collect()
    os._exit(code)
print("child", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print("step", handle.result().step, manager.verify(1).ok)
""",
    )
    assert done.stdout.split() == ["child", "0", "step", "1", "True"], done.stderr


def test_secrets_are_never_logged(monkeypatch):
    monkeypatch.setenv("AWS_SESSION_TOKEN", TOKEN)
    monkeypatch.setenv("RUST_LOG", "trace")
    done = run_script(
        """
import torch
from dtruntime import CheckpointManager, CheckpointError
with CheckpointManager("s3://checkpoints/runs/gpt") as manager:
    manager.save({"w": torch.randn(1000)}, step=1)
    manager.load()
try:
    CheckpointManager("s3://no-such-bucket/runs")
except CheckpointError as error:
    print(error)
"""
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "NoSuchBucket" in done.stdout
    assert "aws_smithy" in done.stderr, "the SDK's own log is part of what is looked at"
    for secret in (SECRET, TOKEN):
        assert secret not in done.stdout + done.stderr


def tool(*arguments: object) -> str:
    done = subprocess.run(
        [TOOL, *map(str, arguments)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_tool_takes_stores_in_s3(tmp_path):
    with CheckpointManager(STORE) as manager:
        for step in (1, 2):
            manager.save(state_of(step), step=step)
    assert " 2 " in tool("ls", STORE)
    assert "model" in tool("inspect", STORE)
    tool("verify", STORE, "--all")
    assert "model.w" in tool("diff", STORE, 1, 2)
    assert "nothing to delete" in tool("gc", STORE, "--grace", 0)
    tool("restore", STORE, "-o", tmp_path / "state.safetensors")
    assert (tmp_path / "state.safetensors").exists()
    tool("restore", STORE, "-o", tmp_path / "files", "--max-shard-size", 1)
    assert (tmp_path / "files" / "model.safetensors.index.json").exists()
    tool("restore", STORE, "--step", 1, "-o", tmp_path / "local")
    with CheckpointManager(tmp_path / "local", read_only=True) as local:
        assert_same(local.load(), state_of(1))
    tool("restore", tmp_path / "local", "-o", "s3://checkpoints/runs/copy")
    with CheckpointManager("s3://checkpoints/runs/copy", read_only=True) as copy:
        assert_same(copy.load(), state_of(1))
    assert "copied in" in tool("copy", STORE, tmp_path / "mirror", "--all")
    assert "there already" in tool("copy", STORE, tmp_path / "mirror")
    tool("copy", tmp_path / "mirror", "s3://checkpoints/runs/mirror", "--step", 2)
    with CheckpointManager("s3://checkpoints/runs/mirror", read_only=True) as mirror:
        assert_same(mirror.load(), state_of(2))
    with serving(tmp_path / "elsewhere") as (_, url, _):
        with CheckpointManager(STORE, s3={"endpoint_url": url}) as other:
            assert other.all_steps() == []
        tool("copy", STORE, STORE, "--to-endpoint-url", url)
        with CheckpointManager(STORE, s3={"endpoint_url": url}, read_only=True) as other:
            assert other.all_steps() == [2]
            assert_same(other.load(), state_of(2))
    refused = subprocess.run(
        [TOOL, "ls", "s3://no-such-bucket/x"], capture_output=True, text=True, check=False
    )
    assert refused.returncode == 1
    assert refused.stderr.startswith("error: opening store `s3://no-such-bucket/x`: NoSuchBucket")
