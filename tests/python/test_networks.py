"""Two machines and a network between them that breaks: namespaces joined by one cable.

The coordinator and rank 0 are on the first machine, rank 1 on the second. What is broken is real:
the link, or every packet of one direction. ``DTR_TORTURE_STATES`` sets how many rounds are tried,
``DTR_TORTURE_FIRST`` which is the first: its number is its seed.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from coordinators import CoordinatorProcess
from support import script_environment, wait_until

from dtruntime import CheckpointManager

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

EXAMPLE = Path(__file__).parents[2] / "python" / "examples" / "train_ranks.py"
ADDRESSES = ("10.77.0.1", "10.77.0.2")
LINK = "cable0"  # a name that is no keyword of `ip`
PORT = 50051
NOWHERE = "02:00:00:00:00:99"
"""A hardware address that no device has."""
TIMEOUT_SECONDS = 1.0
"""The time without a heartbeat after which a worker is dead."""


def run_ip(*arguments: str) -> None:
    """Change the network."""
    command = [shutil.which("ip") or "ip", *arguments]
    subprocess.run(command, check=True, capture_output=True, text=True)


class Network:
    """Two machines, each a network namespace."""

    def __init__(self) -> None:
        number = os.getpid()
        self.machines = (f"dtr-{number}-a", f"dtr-{number}-b")

    def on(self, machine: int, *command: object) -> list[str]:
        """Return the command that runs this one on a machine."""
        return ["ip", "netns", "exec", self.machines[machine], *map(str, command)]

    def ip(self, machine: int, *arguments: str) -> None:
        run_ip("-n", self.machines[machine], *arguments)

    def make(self) -> None:
        for name in self.machines:
            run_ip("netns", "add", name)
        ends = [part for name in self.machines for part in ("name", LINK, "netns", name)]
        veth = [*ends[:4], "type", "veth", "peer", *ends[4:]]
        run_ip("link", "add", *veth)
        for machine, address in enumerate(ADDRESSES):
            self.ip(machine, "address", "add", f"{address}/24", "dev", LINK)
            self.ip(machine, "link", "set", "lo", "up")
            self.ip(machine, "link", "set", LINK, "up")

    def remove(self) -> None:
        for name in self.machines:
            with suppress(subprocess.CalledProcessError):  # it was not created
                run_ip("netns", "del", name)

    @contextmanager
    def unplugged(self) -> Iterator[None]:
        self.ip(0, "link", "set", LINK, "down")
        try:
            yield
        finally:
            self.ip(0, "link", "set", LINK, "up")

    @contextmanager
    def cut_off(self, machine: int) -> Iterator[None]:
        """Drop everything that is sent to a machine; what it sends arrives."""
        other = 1 - machine
        way = [ADDRESSES[machine], "dev", LINK]
        self.ip(other, "neigh", "replace", *way, "lladdr", NOWHERE, "nud", "permanent")
        try:
            yield
        finally:
            self.ip(other, "neigh", "del", *way)

    @contextmanager
    def broken(self, way: str) -> Iterator[None]:
        """Break it in one of the ways while the block runs."""
        if way == "unplugged":
            broken = self.unplugged()
        else:
            broken = self.cut_off(0 if way == "coordinator hears nothing" else 1)
        with broken:
            yield


@pytest.fixture
def network() -> Iterator[Network]:
    """Two machines with a cable between them."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and `ip`")
    network = Network()
    try:
        network.make()
    except subprocess.CalledProcessError as error:
        network.remove()
        pytest.skip(f"no network namespaces here: {error.stderr!r}")
    yield network
    network.remove()


class Coordinator(CoordinatorProcess):
    """The coordinator, on the first machine."""

    def __init__(self, network: Network, folder: Path) -> None:
        timeout = int(1000 * TIMEOUT_SECONDS)
        super().__init__(folder, heartbeat_timeout_ms=timeout, failure_backoff_ms=0)
        self.network = network

    @property
    def url(self) -> str:
        return f"http://{ADDRESSES[0]}:{PORT}"

    def start(self) -> None:
        sets = [f"--set=coordinator.{key}={value}" for key, value in self.settings.items()]
        command = [
            self.program,
            f"{ADDRESSES[0]}:{PORT}",
            "--metrics-address=off",
            f"--state-path={self.folder / 'coordinator.redb'}",
            *sets,
        ]
        with (self.folder / "coordinator.log").open("ab") as log:
            self.process = subprocess.Popen(self.network.on(0, *command), stderr=log)
        wait_until(lambda: "listening on" in self.log)


WORKER = """
import json, os, sys, torch
from dtruntime import *
rank = int(os.environ["RANK"])

def state_of(step):
    generator = torch.Generator().manual_seed(step * 100 + rank)
    return {"w": torch.randn(10_000, generator=generator), "rank": rank}

def tell(**what):
    print(json.dumps(what), flush=True)

manager = None
for line in sys.stdin:
    if line == "open\\n":
        if manager is not None:
            try:
                manager.close()
            except CheckpointError:
                pass
        manager = CheckpointManager(sys.argv[1], agreement_timeout=60)
        tell(ready=True)
        continue
    try:
        tell(saved=manager.save_async(state_of(int(line)), step=int(line)).result().step)
    except CheckpointError as error:
        tell(failed=int(line), kind=type(error).__name__, text=str(error))
manager.close()
"""


class Worker:
    """One rank, in a separate process; its output is read as it arrives."""

    def __init__(self, network: Network, rank: int, store: Path, url: str) -> None:
        environment = {"RANK": str(rank), "WORLD_SIZE": "2", "COORDINATOR_URL": url}
        self.process = subprocess.Popen(
            network.on(rank, sys.executable, "-c", WORKER, store),
            env=script_environment() | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.answers: list[dict] = []
        self.log = ""
        self.threads = [threading.Thread(target=self._listen), threading.Thread(target=self._log)]
        for thread in self.threads:
            thread.start()

    def _listen(self) -> None:
        with self.process.stdout:
            for line in self.process.stdout:
                self.answers.append(json.loads(line))

    def _log(self) -> None:
        with self.process.stderr:
            for line in self.process.stderr:
                self.log += line

    def tell(self, what: object) -> None:
        """Tell it to save a step, or to ``open`` its manager again."""
        self.process.stdin.write(f"{what}\n")
        self.process.stdin.flush()

    def end(self) -> int:
        self.process.stdin.close()
        code = self.process.wait(60)
        for thread in self.threads:
            thread.join()
        return code


WAYS = ("unplugged", "coordinator hears nothing", "worker hears nothing")


class Trial:
    """Two workers that save, and the outcomes."""

    def __init__(self, network: Network, coordinator: Coordinator, store: Path) -> None:
        self.network = network
        self.workers = [Worker(network, rank, store, coordinator.url) for rank in (0, 1)]
        self.step = 0
        self.saved: set[int] = set()
        self.breaks = 0
        self.failed = 0
        self.ask("open")

    def ask(self, what: object, meanwhile: Callable[[], None] = lambda: None) -> list[dict]:
        """Send all of them the same command, and wait for their answers."""
        before = [len(worker.answers) for worker in self.workers]
        for worker in self.workers:
            worker.tell(what)
        meanwhile()
        pairs = list(zip(self.workers, before, strict=True))
        try:
            wait_until(lambda: all(len(worker.answers) > count for worker, count in pairs), 60)
        except AssertionError:
            said = [(worker.answers[count:], worker.log[-2_000:]) for worker, count in pairs]
            raise AssertionError(f"{what!r} has no end on every rank: {said}") from None
        return [worker.answers[count] for worker, count in pairs]

    def save(self, meanwhile: Callable[[], None] = lambda: None) -> list[dict]:
        """Have all save the next step; return the outcomes, by rank."""
        self.step += 1
        found = self.ask(self.step, meanwhile)
        self.saved.update(outcome["saved"] for outcome in found if "saved" in outcome)
        self.failed += sum("failed" in outcome for outcome in found)
        return found

    def break_for(self, way: str, seconds: float) -> list[dict]:
        """Break the network, and repair it while a step is saved."""
        self.breaks += 1
        with ExitStack() as broken:
            broken.enter_context(self.network.broken(way))

            def meanwhile() -> None:
                time.sleep(seconds)
                broken.close()

            return self.save(meanwhile)

    def shake(self, chance: random.Random) -> None:
        """Break it again and again while a step is saved: a loose contact."""

        def meanwhile() -> None:
            for _ in range(12):
                self.breaks += 1
                with self.network.broken(chance.choice(WAYS)):
                    time.sleep(chance.uniform(0.01, 0.3) * TIMEOUT_SECONDS)
                time.sleep(chance.uniform(0.01, 0.3) * TIMEOUT_SECONDS)

        self.save(meanwhile)

    def recover(self) -> None:
        """Keep saving: a worker that was considered dead rejoins by itself, without a restart."""
        wait_until(lambda: all("saved" in outcome for outcome in self.save()))

    def check(self, store: Path) -> None:
        """Every save that reported success is loadable; every checkpoint is complete."""
        for rank in (0, 1):
            with CheckpointManager(store, read_only=True, rank=rank, world_size=2) as reader:
                steps = reader.all_steps()
                assert self.saved <= set(steps)
                for step in steps:
                    assert reader.verify(step).ok
                    generator = torch.Generator().manual_seed(step * 100 + rank)
                    state = reader.load(step=step)
                    assert torch.equal(state["w"], torch.randn(10_000, generator=generator))


def test_a_network_that_breaks_costs_saves_and_nothing_else(network, tmp_path):
    rounds = int(os.environ.get("DTR_TORTURE_STATES", "1"))
    first_round = int(os.environ.get("DTR_TORTURE_FIRST", "0"))
    coordinator = Coordinator(network, tmp_path)
    coordinator.start()
    trial = Trial(network, coordinator, tmp_path / "store")
    try:
        for seed in range(first_round, first_round + rounds):
            print("round", seed)  # noqa: T201  (shown on failure)
            trial.recover()
            for way in WAYS:
                # Longer than a worker may be silent: the save fails on both, rank 1 is named.
                first, second = trial.break_for(way, 2 * TIMEOUT_SECONDS)
                assert first["kind"] == "SaveAborted", (way, first)
                assert "rank 1" in first["text"], (way, first)
                assert second["kind"] in ("WorkerFenced", "SaveAborted"), (way, second)
                trial.recover()
                # Shorter than that: only timings show it.
                trial.break_for(way, 0.3 * TIMEOUT_SECONDS)
                trial.recover()
            trial.shake(random.Random(seed))
            trial.recover()
    finally:
        codes = [worker.end() for worker in trial.workers]
        coordinator.end()
    assert codes == [0, 0], [worker.log for worker in trial.workers]
    trial.check(tmp_path / "store")
    counts = f"{trial.breaks} breaks, {len(trial.saved)} steps saved, {trial.failed} saves failed"
    print(f"{counts}\ntorture: tried {rounds}, next {first_round + rounds}")  # noqa: T201


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no distributed")
def test_torchrun_on_two_machines_needs_nothing_else(network, tmp_path):
    def machine(number: int) -> subprocess.Popen[str]:
        environment = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": LINK}
        arguments = [
            "--nnodes", 2, "--node-rank", number, "--nproc-per-node", 2,
            "--master-addr", ADDRESSES[0], "--master-port", 29500,
            EXAMPLE, tmp_path / "store",
        ]  # fmt: skip
        command = network.on(number, sys.executable, "-m", "torch.distributed.run", *arguments)
        return subprocess.Popen(
            command,
            env={**script_environment(), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    machines = [machine(0), machine(1)]
    ended = [process.communicate(timeout=240) for process in machines]
    assert [process.returncode for process in machines] == [0, 0], ended
    assert "4 ranks begin after step 0" in ended[0][0]
    with CheckpointManager(tmp_path / "store", read_only=True, rank=3, world_size=4) as reader:
        assert reader.all_steps() == [30, 40]
        assert reader.verify().ok
