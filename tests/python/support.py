"""Helpers of the tests: equality by type and bits, scripts in processes, waits that time out."""

from __future__ import annotations

import contextlib
import os
import resource
import struct
import subprocess
import sys
import textwrap
import time
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

PACKAGE_ROOT = Path(__file__).parents[2] / "python"


@contextlib.contextmanager
def short_files():
    """Let no file grow beyond 4 MiB: a save of more than was reserved for it fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4 << 20, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def bits_of(tensor: torch.Tensor) -> bytes:
    """Return a tensor's items as bytes, in order of indices, for any dtype and strides."""
    plain = tensor.detach().resolve_conj().resolve_neg()
    size = plain.dtype.itemsize
    storage = plain.untyped_storage()
    raw = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
    items = np.lib.stride_tricks.as_strided(
        raw[plain.storage_offset() * size :],
        (*plain.shape, size),
        (*(stride * size for stride in plain.stride()), 1),
    )
    return items.tobytes()


def assert_same(actual: Any, expected: Any, where: str = "state") -> None:
    """Compare by type and bits, recursively."""
    assert type(actual) is type(expected), f"{where}: {type(actual)} != {type(expected)}"
    if isinstance(expected, (dict, OrderedDict)):
        pairs = list(zip(actual, expected, strict=True))
        for ours, theirs in pairs:
            assert_same(ours, theirs, f"{where} key")
        for (_, key), value in zip(pairs, actual.values(), strict=True):
            assert_same(value, expected[key], f"{where}[{key!r}]")
        assert vars_of(actual) == vars_of(expected), where
    elif isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected), where
        for index, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
            assert_same(ours, theirs, f"{where}[{index}]")
    elif isinstance(expected, torch.Tensor):
        assert actual.dtype == expected.dtype, where
        assert actual.shape == expected.shape, where
        assert actual.requires_grad == expected.requires_grad, where
        assert bits_of(actual) == bits_of(expected), where
    elif isinstance(expected, np.ndarray):
        assert actual.dtype == expected.dtype, where
        assert actual.shape == expected.shape, where
        assert actual.tobytes() == expected.tobytes(), where
    elif isinstance(expected, np.generic):
        assert actual.dtype == expected.dtype, where
        assert actual.tobytes() == expected.tobytes(), where
    elif isinstance(expected, float):
        assert struct.pack("<d", actual) == struct.pack("<d", expected), where
    elif isinstance(expected, complex):
        assert struct.pack("<dd", actual.real, actual.imag) == struct.pack(
            "<dd", expected.real, expected.imag
        ), where
    else:
        assert actual == expected, where


def vars_of(value: Any) -> dict[str, Any]:
    """Return the attributes of an OrderedDict; a dict has none."""
    return vars(value) if isinstance(value, OrderedDict) else {}


def script_environment() -> dict[str, str]:
    """Return the environment in which a script finds the package under test."""
    return os.environ | {"PYTHONPATH": str(PACKAGE_ROOT), "PYTHONUNBUFFERED": "1"}


def run_script(
    source: str, *arguments: object, timeout: float = 60
) -> subprocess.CompletedProcess[str]:
    """Run Python source in a separate process."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(source), *map(str, arguments)],
        env=script_environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def start_script(
    source: str, *arguments: object, environment: Mapping[str, str] | None = None
) -> subprocess.Popen[str]:
    """Start Python source in a separate process; its output is read through pipes."""
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(source), *map(str, arguments)],
        env=script_environment() | dict(environment or {}),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_until(holds: Callable[[], object], seconds: float = 30) -> None:
    """Wait until a condition holds; fail if it does not in time."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "the condition did not hold in time"
        time.sleep(0.01)


def shard_of(store: Path, step: int) -> Path:
    """Return the one shard of a step."""
    (shard,) = (store / f"step-{step:012}").glob("*.shard")
    return shard


def flip_byte(path: Path, offset: int) -> None:
    """Damage one byte of a file."""
    with path.open("r+b") as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ 0x55]))


def state_of(step: int) -> dict[str, object]:
    """Return a small state that differs from step to step."""
    return {"weights": torch.full((30_000,), float(step)), "step": step}
