"""A CUDA driver without a device, in this process: `cuda/stand_in/cuda.c`, built and loaded here.

Its devices' memory is memory of the host, so torch's CPU tensors can be in it: to the package
they are on `cuda:0` then, while torch sees tensors that it can compute with.
"""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dtruntime.state import gpus, tensors

SOURCE = Path(__file__).parents[2] / "cuda" / "stand_in" / "cuda.c"
LEGACY_STREAM = 0


class StandIn:
    """The driver, and the tensors in its first device's memory."""

    def __init__(self, library: Path) -> None:
        self.driver = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        self.driver.stand_in_allocate.restype = ctypes.c_uint64
        self.driver.stand_in_legacy_stream.restype = ctypes.c_void_p
        self.driver.stand_in_calls.restype = ctypes.c_uint64
        self.driver.stand_in_pages_fetched.restype = ctypes.c_uint64
        # CUDA 12.4, two devices.
        self.driver.stand_in_set_up(12040, 2)
        self.owned: dict[int, Any] = {}

    def tensor(self, values: torch.Tensor) -> torch.Tensor:
        """Return a copy of `values` in the device's memory."""
        count = values.numel() * values.itemsize
        address = self.driver.stand_in_allocate(0, ctypes.c_size_t(max(count, 1)))
        memory = (ctypes.c_uint8 * count).from_address(address)
        made = torch.from_numpy(np.ctypeslib.as_array(memory)).view(values.dtype)
        made = made.reshape(values.shape)
        made.copy_(values)
        self.owned[made.untyped_storage().data_ptr()] = made
        return made

    def write(self, tensor: torch.Tensor, values: torch.Tensor) -> None:
        """Change a tensor as training does: when the current stream gets to it."""
        stream = ctypes.c_void_p(self.driver.stand_in_legacy_stream(0))
        count = ctypes.c_size_t(values.numel() * values.itemsize)
        to, source = ctypes.c_uint64(tensor.data_ptr()), ctypes.c_void_p(values.data_ptr())
        self.driver.stand_in_write(stream, to, source, count)

    def hold_copies(self, are_held: bool) -> None:
        """Hold the copies of all streams, or let them continue."""
        self.driver.stand_in_hold_copies(ctypes.c_bool(are_held))

    def settle(self) -> None:
        """Wait until all streams are idle."""
        self.driver.stand_in_settle()

    def fail(self, name: str, times: int, code: int) -> None:
        """Let the next calls of a function of the driver fail."""
        arguments = (ctypes.c_uint64(1), ctypes.c_uint64(times), ctypes.c_uint(code))
        self.driver.stand_in_fail(_name(name), *arguments)

    def lose(self, code: int) -> None:
        """Lose the device."""
        self.driver.stand_in_lose(0, ctypes.c_uint(code))

    def calls(self, name: str) -> int:
        """Count the calls of a function of the driver."""
        return int(self.driver.stand_in_calls(_name(name)))

    def pages_fetched(self) -> int:
        """Count pages that were untouched when they were pinned."""
        return int(self.driver.stand_in_pages_fetched())

    def owns(self, storage: Any) -> bool:
        """Return whether a storage is in the device's memory."""
        return storage.data_ptr() in self.owned


@functools.cache
def _name(text: str) -> ctypes.c_char_p:
    """Return a name that lives as long as the driver, which keeps the pointer."""
    return ctypes.c_char_p(text.encode())


@functools.cache
def _load() -> StandIn:
    options = ["-shared", "-fPIC", "-O1", "-pthread", "-Wl,-soname,libcuda.so"]
    compiler = shutil.which("cc")
    with tempfile.TemporaryDirectory(prefix="dtr-stand-in-") as folder:
        library = Path(folder, "libcuda.so")
        subprocess.run([compiler, *options, "-o", library, SOURCE], check=True)
        return StandIn(library)  # it stays loaded, under its name, when its file is gone


@pytest.fixture
def device(monkeypatch):
    """Return the stand-in, with its tensors taken for those of `cuda:0`."""
    if shutil.which("cc") is None:
        pytest.skip("the stand-in for the CUDA driver needs a C compiler")
    stand_in = _load()
    place_of, owner_of = gpus.Consistency.place, tensors._TorchStorage

    def place(self: gpus.Consistency, storage: Any) -> gpus.GpuPlacement | None:
        seen = SimpleNamespace(device=torch.device("cuda:0"), _cdata=storage._cdata)
        return place_of(self, seen)

    def owner(storage: Any, count: int, is_cpu: bool, element: int) -> Any:
        return owner_of(storage, count, is_cpu and not stand_in.owns(storage), element)

    monkeypatch.setattr(gpus.Consistency, "place", place)
    monkeypatch.setattr(gpus, "current_stream", lambda _: LEGACY_STREAM)
    monkeypatch.setattr(tensors, "_TorchStorage", owner)
    yield stand_in
    stand_in.hold_copies(False)
    stand_in.settle()
