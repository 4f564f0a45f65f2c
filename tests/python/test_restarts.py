"""Ranks that `torchrun` restarts, simulated by the environment that it gives them."""

from __future__ import annotations

import socket
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import torch
from coordinators import free_port
from ranks import PREAMBLE
from support import script_environment, start_script

from dtruntime import CheckpointManager
from dtruntime.ranks import embedded

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="this PyTorch has no distributed"
)

KEY = "dtruntime/coordinator/run"
SAVES = """
with CheckpointManager(store) as manager:
    print("open", flush=True)
    manager.save({"rank": rank}, step=1)
    assert manager.load()["rank"] == rank
    print("saved")
"""
REPORTS = """
from dtruntime.ranks import connecting
from dtruntime.ranks import membership

connecting.PATIENCE_SECONDS = 2.0

meet = membership._await_ranks

def told(*arguments):
    print("meets", flush=True)
    meet(*arguments)

membership._await_ranks = told
"""
WAITS = """
manager = CheckpointManager(store)
print("open", flush=True)
signal.pause()
"""


class Agent:
    """What agents of `torchrun` give their processes: a store, which outlives them."""

    def __init__(self, address: str = "127.0.0.1") -> None:
        self.address = address
        self.store = torch.distributed.TCPStore(address, 0, is_master=True, wait_for_workers=False)

    def start(self, source: str, path: Path, rank: int, restarts: int = 0) -> subprocess.Popen[str]:
        """Start one of two ranks; agents count restarts each for itself."""
        environment = {
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RUN_ID": "run",
            "TORCHELASTIC_RESTART_COUNT": str(restarts),
            "MASTER_ADDR": self.address,
            "MASTER_PORT": str(self.store.port),
            "LOCAL_WORLD_SIZE": "1",
            "WORLD_SIZE": "2",
            "RANK": str(rank),
            "COORDINATOR_URL": "",
        }
        return start_script(PREAMBLE + source, path, environment=environment)


def finish(ranks: list[subprocess.Popen[str]]) -> None:
    ended = [rank.communicate(timeout=120) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], ended
    assert all(out.endswith("open\nsaved\n") for out, _ in ended), ended


def test_the_entry_of_an_earlier_rank_0_is_ignored(tmp_path):
    agent = Agent()
    agent.store.set(KEY, f"http://127.0.0.1:{free_port()} a-token-of-before")
    late = agent.start(SAVES, tmp_path / "store", 1, restarts=1)
    finish([agent.start(SAVES, tmp_path / "store", 0), late])


def test_a_rank_that_starts_before_the_old_rank_0_ended_finds_the_new_one(tmp_path):
    agent = Agent()
    old = [agent.start(WAITS, tmp_path / "store", rank) for rank in range(2)]
    assert [rank.stdout.readline() for rank in old] == ["open\n"] * 2
    left = agent.store.get(KEY)
    old[1].kill()
    early = agent.start(REPORTS + SAVES, tmp_path / "store", 1, restarts=1)
    assert early.stdout.readline() == "meets\n"
    old[0].kill()
    for rank in old:
        rank.communicate()
    finish([agent.start(SAVES, tmp_path / "store", 0), early])
    assert agent.store.get(KEY) != left


@pytest.mark.parametrize(
    ("addresses", "expected"),
    [
        (
            ["127.0.1.1"],
            (socket.AF_INET, "node0"),
        ),  # as on systems whose own name resolves to loopback
        (["::1", "127.0.0.1"], (socket.AF_INET, "node0")),
    ],
)
def test_a_name_of_this_machine_is_published_as_a_name(monkeypatch, addresses, expected):
    def found(*_arguments: object, **_how: object) -> list[tuple[object, ...]]:
        kinds = {False: socket.AF_INET, True: socket.AF_INET6}
        return [
            (kinds[":" in address], socket.SOCK_DGRAM, 0, "", (address, 9)) for address in addresses
        ]

    monkeypatch.setattr(socket, "getaddrinfo", found)
    assert embedded._own_address("node0") == expected


def test_an_agent_at_an_ipv6_address(tmp_path):
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            pass
    except OSError as error:
        pytest.skip(f"this machine has no IPv6: {error}")
    agent = Agent("::1")
    finish([agent.start(SAVES, tmp_path / "store", rank) for rank in range(2)])
    assert agent.store.get(KEY).startswith(b"http://[::1]:")


ELASTIC = """
import contextlib, os, pathlib, signal, sys
from dtruntime import *

store, mark = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
rank, restarts = int(os.environ["RANK"]), os.environ["TORCHELASTIC_RESTART_COUNT"]
state = {"step": 0, "rank": rank}
with CheckpointManager(store) as manager:
    with contextlib.suppress(CheckpointNotFound):
        manager.restore(state)
    for step in range(state["step"] + 1, 5):
        manager.save({"step": step, "rank": rank}, step=step)
        if (step, rank) == (2, 1) and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
(store / f"ended-{rank}").write_text(restarts)
"""


def test_agents_with_different_restart_counts_find_each_other(tmp_path):
    script, store, port = tmp_path / "train.py", tmp_path / "store", free_port()
    script.write_text(ELASTIC)
    command = [
        sys.executable, "-m", "torch.distributed.run",
        "--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "3",
        "--rdzv-backend", "c10d", "--rdzv-id", "run", "--rdzv-endpoint", f"127.0.0.1:{port}",
        script, store, tmp_path / "mark",
    ]  # fmt: skip
    environment = script_environment()
    environment.pop("COORDINATOR_URL", None)
    agents = [
        subprocess.Popen(
            [*map(str, command)],
            env=environment | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    ended = [agent.communicate(timeout=240) for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], ended
    with CheckpointManager(store, read_only=True, rank=1, world_size=2) as reader:
        assert reader.all_steps() == [1, 2, 3, 4]
        assert reader.load() == {"step": 4, "rank": 1}
    # The agent of the lost process has counted; the other one has not, unless its own process ended
    # first.
    assert "1" in {(store / f"ended-{rank}").read_text() for rank in range(2)}
