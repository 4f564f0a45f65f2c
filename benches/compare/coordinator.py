"""Measure the coordinator under the load of ten thousand workers, and others, in one run.

    make fleet    about four minutes

The load is `benches/fleet.rs`, on the same cores as the service that it loads. The coordinator's
heartbeats are compared with the keep-alives of as many leases in etcd, its barrier with that of
torch's own store. If etcd is not installed, its rows are left out, and the run says so.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import tables
from machine import describe
from make_state import say

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE = Path(__file__).parent
START_SECONDS = 30.0
MUST = {
    "heartbeat": "p99 under 20 ms",
    "barrier": "within 250 ms",
    "commit": "within 100 ms",
    "memory": "under 300 MB",
}
"""The limits that the coordinator has to meet."""

Figures = dict[str, tuple[int, float, float, float]]
"""By name: how many, and their median, p99 and maximum, in milliseconds."""


def free_port() -> int:
    """Return a port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running(command: list[str | Path], port: int, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a service until the block ends; it listens when the block begins."""
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    deadline = time.monotonic() + START_SECONDS
    try:
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"error: `{command[0]}` does not listen\nhint: see {log}")
            time.sleep(0.05)
        yield process
    finally:
        process.terminate()
        process.wait(30)


def memory_mb(pid: int) -> float:
    """Return the most memory that a process had resident."""
    match = re.search(r"VmHWM:\s*(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(match[1]) * 1024 / 1e6 if match else 0.0


def cpu_seconds(pid: int) -> float:
    """Return the processor time that a process used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def fleet(url: str, options: argparse.Namespace, *more: str) -> Figures:
    """Run the load against a service."""
    program = Path(os.environ["CARGO_TARGET_DIR"]) / "release" / "examples" / "fleet"
    numbers = [f"--{name}={getattr(options, name)}" for name in ("workers", "connections", "ranks")]
    numbers += [f"--seconds={options.seconds}", f"--rounds={options.rounds}"]
    run = subprocess.run(
        [program, url, *numbers, *more], check=True, stdout=subprocess.PIPE, text=True
    )
    figures: Figures = {}
    for line in run.stdout.splitlines():
        name, count, median, late, worst = line.split("\t")
        figures[name] = (int(count), float(median), float(late), float(worst))
    return figures


def measure_coordinator(scratch: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Return the coordinator's figures, its memory, and its processor time."""
    port = free_port()
    program = shutil.which("coordinator")
    if program is None:
        raise SystemExit("error: `coordinator` is not on PATH\nhint: run `make fleet`")
    command: list[str | Path] = [
        program,
        f"127.0.0.1:{port}",
        "--metrics-address=off",
        f"--state-path={scratch / 'journal.redb'}",
        # The jobs that use barriers and save send no heartbeats.
        "--set=coordinator.heartbeat_timeout_ms=600000",
    ]
    with running(command, port, scratch / "coordinator.log") as process:
        figures = fleet(f"http://127.0.0.1:{port}", options)
        memory = memory_mb(process.pid)
        return {"figures": figures, "memory_mb": memory, "cpu_seconds": cpu_seconds(process.pid)}


def measure_etcd(scratch: Path, options: argparse.Namespace) -> dict[str, Any] | None:
    """Return the same of etcd, as far as it does the same; None where it is not installed."""
    program = shutil.which("etcd")
    if program is None:
        say("etcd is not installed: its row is left out (Debian: apt install etcd-server)")
        return None
    port, peers = free_port(), free_port()
    client_url, peer_url = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{peers}"
    command: list[str | Path] = [
        program,
        f"--data-dir={scratch / 'etcd'}",
        f"--listen-client-urls={client_url}",
        f"--advertise-client-urls={client_url}",
        f"--listen-peer-urls={peer_url}",
        f"--initial-advertise-peer-urls={peer_url}",
        f"--initial-cluster=default={peer_url}",
    ]
    version = subprocess.run([program, "--version"], check=True, capture_output=True, text=True)
    with running(command, port, scratch / "etcd.log") as process:
        figures = fleet(client_url, options, "--etcd")
        return {
            "figures": figures,
            "memory_mb": memory_mb(process.pid),
            "version": version.stdout.split()[2],
        }


def measure_store(options: argparse.Namespace) -> list[float]:
    """Return the milliseconds of each barrier in torch's store."""
    command = [sys.executable, HERE / "store_barrier.py", options.ranks, options.rounds]
    run = subprocess.run([str(part) for part in command], check=True, stdout=subprocess.PIPE)
    return [float(line) for line in run.stdout.split()]


def table(found: dict[str, Any], options: argparse.Namespace) -> str:
    """Make the table, with what each figure must be and how it compares."""
    ours, etcd, store = found["coordinator"], found["etcd"], found["store_ms"]
    figures: Figures = ours["figures"]

    def row(name: str, what: str, must: str, beside: str) -> str:
        count, median, late, worst = figures[name]
        return (
            f"| {what} | {count:,} | {median:.1f} | {late:.1f} | {worst:.1f} | {must} | {beside} |"
        )

    leases = "not run"
    if etcd is not None:
        _, median, late, _ = etcd["figures"]["heartbeat"]
        ratio = late / figures["heartbeat"][2]
        leases = (
            f"etcd {etcd['version']}, keep-alives: {median:.1f}, {late:.1f} "
            f"(p99 {ratio:.2f} times this), {etcd['memory_mb']:.0f} MB"
        )
    median = statistics.median(store)
    ratio = median / figures["barrier of the ranks"][1]
    barrier = (
        f"torch {found['torch']} `TCPStore`: {median:.1f}, max {max(store):.1f} "
        f"(median {ratio:.2f} times this)"
    )
    memory = f"| peak memory of the coordinator | | | | {ours['memory_mb']:.0f} MB "
    n = f"{options.workers:,}"
    ranks = f"{options.ranks:,}"
    return "\n".join(
        [
            "| ms | samples | median | p99 | max | target | baseline |",
            "|---|---|---|---|---|---|---|",
            row(
                "heartbeat",
                f"heartbeats, {n} workers, one per second each",
                MUST["heartbeat"],
                leases,
            ),
            row("barrier", f"a barrier of {n}, after the last arrival", MUST["barrier"], ""),
            row("barrier of the ranks", f"a barrier of {ranks}", "", barrier),
            row("commit", f"a commit of {ranks} ranks, after the last report", MUST["commit"], ""),
            row("commit in own stores", "the same, with per-rank stores", "", ""),
            memory + f"| {MUST['memory']} | |",
        ]
    )


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description="The coordinator under load, and others beside it")
    for name, default in [
        ("workers", 10_000),
        ("connections", 1_000),
        ("ranks", 1_024),
        ("seconds", 30),
        ("rounds", 10),
    ]:
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--readme", type=Path, help="also put the table there, between its marks")
    parser.add_argument("--json", type=Path, help="also write every figure there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="dtr-fleet-") as folder:
        scratch = Path(folder)
        say("the coordinator")
        found: dict[str, Any] = {"coordinator": measure_coordinator(scratch, options)}
        say("etcd")
        found["etcd"] = measure_etcd(scratch, options)
        say("torch's store")
        found["store_ms"] = measure_store(options)
        found["torch"] = torch.__version__
        machine = describe(scratch)
    text = f"{table(found, options)}\n\nOn {machine}; {options.connections:,} connections."
    print(text)
    if options.readme is not None:
        tables.rewrite(options.readme, "fleet", text)
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
