"""`ckpt-tool` as the package installs it."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import flip_byte, script_environment, shard_of

ROOT = Path(__file__).parents[2]


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "dtruntime.tool", *map(str, arguments)]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments),
        env=script_environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_its_status_and_output_are_those_of_the_program(open_manager, store):
    with open_manager(compression="none") as manager:
        for step in (1, 2):
            manager.save({"w": torch.full((9_000,), float(step))}, step=step)
    flip_byte(shard_of(store, 2), 10_000)
    program = shutil.which("ckpt-tool")
    assert program
    for arguments, status in [
        (("--version",), 0),
        (("ls", store, "--json"), 0),
        (("verify", store, "--step", 1, "--json"), 0),
        (("verify", store, "--all"), 1),
        (("ls",), 2),
        (("restore", store, "-o", store), 1),
        (("ls", store / "nowhere"), 2),
    ]:
        ours = run(*arguments)
        theirs = subprocess.run(
            [program, *map(str, arguments)], capture_output=True, text=True, check=False
        )
        assert ours.returncode == theirs.returncode == status, ours.stderr
        seconds = re.compile(r"[\d.]+ (s|ms|[kMGTPE]?B/s)|\"seconds\": [\d.e-]+")
        for one, other in [(ours.stdout, theirs.stdout), (ours.stderr, theirs.stderr)]:
            assert seconds.sub("T", one) == seconds.sub("T", other)
    assert json.loads(run("verify", store, "--step", 1, "--json").stdout)


def test_ctrl_c_ends_it_while_it_waits_for_a_service():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(60)
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
        with subprocess.Popen(
            command("ls", "s3://bucket/run", "--endpoint-url", url),
            env=script_environment() | keys,
        ) as process:
            asking, _ = silent.accept()
            with asking:
                process.send_signal(signal.SIGINT)
                assert process.wait(30) == -signal.SIGINT


def test_the_script_is_what_the_package_says():
    if sys.version_info < (3, 11):
        pytest.skip("tomllib came with Python 3.11")
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, _, name = project["scripts"]["ckpt-tool"].partition(":")
    assert callable(getattr(importlib.import_module(module), name))
