"""The harness's side of its workers: one process for each engine, all mapping the same state."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from processes import PeakMemory

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

    from state import Shared

SCRIPT = Path(__file__).with_name("worker.py")


class Worker:
    """A worker process; its methods send a command and wait for the answer."""

    def __init__(self, shared: Shared, root: Path) -> None:
        arguments = ["--state", shared.folder, "--descriptor", shared.descriptor, "--root", root]
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", str(SCRIPT), *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            pass_fds=[shared.descriptor],
            env=os.environ | {"TORCH_CPP_LOG_LEVEL": "ERROR"},
        )

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    def wait_until_ready(self) -> None:
        """Wait until it has mapped the state."""
        self._answer("starting")

    def ask(self, do: str, **arguments: Any) -> Any:
        """Execute a command."""
        assert self._process.stdin is not None  # noqa: S101  (opened as a pipe)
        with contextlib.suppress(BrokenPipeError):  # the missing answer means that it has ended
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
        return self._answer(do)

    def request_with_memory(self, do: str, **arguments: Any) -> Any:
        """Execute a command, and add to its answer how much memory it took."""
        with PeakMemory(self.pid) as peak:
            answer = self.ask(do, **arguments)
        return {**answer, "extra_bytes": peak.extra_bytes}

    def _answer(self, what: str) -> Any:
        assert self._process.stdout is not None  # noqa: S101  (opened as a pipe)
        line = self._process.stdout.readline()
        if not line:
            sys.exit(
                f"error: the worker ended, with exit status {self._process.wait()}, while it was "
                f"`{what}`\nhint: its own message is above"
            )
        return json.loads(line)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._process.stdin is not None  # noqa: S101  (opened as a pipe)
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
