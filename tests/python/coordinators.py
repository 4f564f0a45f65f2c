"""A real coordinator for tests: a process on loopback, on ports that were free."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

START_SECONDS = 30


def free_port() -> int:
    """Return a port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class CoordinatorProcess:
    """A coordinator that can be killed and started again on the same port and journal."""

    def __init__(self, folder: Path, **settings: object) -> None:
        program = shutil.which("coordinator")
        assert program, (
            "`coordinator` is not on PATH\nhint: run `make native`, then `.ci/env pytest`"
        )
        self.program = program
        self.folder = folder
        self.port = free_port()
        self.metrics_port = free_port()
        self.settings = {"heartbeat_interval_ms": 100, "heartbeat_timeout_ms": 2_000} | settings
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        return (self.folder / "coordinator.log").read_text()

    def start(self) -> None:
        named = (
            (key if "." in key else f"coordinator.{key}", self.settings[key])
            for key in self.settings
        )
        sets = [f"--set={key}={value}" for key, value in named]
        with (self.folder / "coordinator.log").open("ab") as log:
            self.process = subprocess.Popen(
                [
                    self.program,
                    f"127.0.0.1:{self.port}",
                    f"--metrics-address=127.0.0.1:{self.metrics_port}",
                    f"--state-path={self.folder / 'coordinator.redb'}",
                    *sets,
                ],
                cwd=self.folder,
                stderr=log,
                env={k: v for k, v in os.environ.items() if not k.startswith("COORDINATOR")},
            )
        self._await_ready()

    def _await_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while True:
            assert self.process is not None
            assert self.process.poll() is None, self.log
            try:
                self.page("readyz")
            except OSError:
                assert time.monotonic() < deadline, self.log
                time.sleep(0.02)
            else:
                return

    def page(self, path: str) -> str:
        url = f"http://127.0.0.1:{self.metrics_port}/{path}"
        with urllib.request.urlopen(url, timeout=5) as reply:
            return reply.read().decode()

    def metric(self, line: str) -> float:
        """Return the value of the metric whose line starts with this."""
        for text in self.page("metrics").splitlines():
            if text.startswith(line + " "):
                return float(text.rsplit(" ", 1)[1])
        raise AssertionError(f"no metric {line!r}")

    def end(self, number: int = signal.SIGTERM) -> int:
        process, self.process = self.process, None
        if process is None:
            return 0
        process.send_signal(number)
        return process.wait(timeout=30)


@pytest.fixture
def coordinator(tmp_path: Path) -> Iterator[CoordinatorProcess]:
    """Return a coordinator with its defaults, which ends with the test."""
    process = CoordinatorProcess(tmp_path)
    process.start()
    yield process
    process.end()
