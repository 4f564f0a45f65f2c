"""Measure saves and restores of tensors on a real GPU, beside PyTorch's own, in one run.

    make bench-gpu                            # here
    python benches/compare/gpu.py             # anywhere, after `pip install dtruntime-...whl`

What is measured, each as the median of several rounds after a warm-up:

- the bare rate: one `cudaMemcpyAsync` of 1 GB into pinned memory, by PyTorch;
- the stall of `save_async` in each mode, and how long the training steps after it take;
- the same of `torch.distributed.checkpoint.async_save` with its pinned stager;
- a restore into fresh memory of the GPU, caches dropped where this may be done.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed import checkpoint

from dtruntime import CheckpointManager, gpus

if TYPE_CHECKING:
    from collections.abc import Callable

STEPS_AFTER = 20
"""Training steps that run beside what a save leaves to do."""


class Training:
    """A model whose state has the size asked for, and a step that keeps the GPU busy."""

    def __init__(self, device: torch.device, gigabytes: float) -> None:
        # fp32 weights and two moments of AdamW: twelve bytes a weight.
        width = 8192
        count = max(1, round(gigabytes * 1e9 / (12 * width * width)))
        layers = [torch.nn.Linear(width, width, bias=False) for _ in range(count)]
        self.model = torch.nn.Sequential(*layers).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, foreach=True)
        self.batch = torch.randn(256, width, device=device)
        self.device = device
        self.step()

    def state(self) -> dict[str, Any]:
        """Give what is saved."""
        return {"model": self.model, "optimizer": self.optimizer}

    def tensors(self) -> int:
        """Count the tensors of the state."""
        return 4 * len(self.model)

    def state_bytes(self) -> int:
        """Give the bytes of the state."""
        weights = sum(p.numel() * p.element_size() for p in self.model.parameters())
        return 3 * weights

    def step(self) -> None:
        """Train one step, without waiting for the GPU."""
        loss = self.model(self.batch).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def seconds_of(self, steps: int) -> float:
        """Train and wait."""
        torch.cuda.synchronize(self.device)
        start = time.perf_counter()
        for _ in range(steps):
            self.step()
        torch.cuda.synchronize(self.device)
        return time.perf_counter() - start


def bare_rate(device: torch.device) -> float:
    """Give bytes a second from the GPU into pinned memory."""
    source = torch.empty(1_000_000_000, dtype=torch.uint8, device=device)
    target = torch.empty(1_000_000_000, dtype=torch.uint8, pin_memory=True)
    seconds = []
    for _ in range(6):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 1e9 / statistics.median(seconds[1:])


def measure(
    training: Training, rounds: int, save: Callable[[int], Callable[[], object]]
) -> tuple[float, float]:
    """Give the stall of a save, and what the steps after it lose."""
    stalls, losses = [], []
    plain = statistics.median(training.seconds_of(STEPS_AFTER) for _ in range(3))
    for number in range(rounds + 1):
        torch.cuda.synchronize(training.device)
        start = time.perf_counter()
        finish = save(number + 1)
        stalls.append(time.perf_counter() - start)
        losses.append(training.seconds_of(STEPS_AFTER) - plain)
        finish()
    return statistics.median(stalls[1:]), statistics.median(losses[1:])


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=10.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", help="where to save; default: a temporary folder")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("PyTorch sees no GPU here: nothing was measured")
        return
    device = torch.device("cuda:0")
    training = Training(device, options.gigabytes)
    rate, size = bare_rate(device), training.state_bytes()
    print(
        f"on {torch.cuda.get_device_name(device)}, torch {torch.__version__}, {os.cpu_count()} CPUs"
    )
    print(f"state {size / 1e9:.2f} GB in {training.tensors()} tensors")
    print(f"bare copy into pinned memory: {rate / 1e9:.1f} GB/s")
    print(f"{'':26}{'stall':>10}{'of bare copy':>14}{'20 steps lose':>16}")

    def show(name: str, stall: float, loss: float) -> None:
        print(f"{name:26}{stall * 1000:8.1f} ms{stall * rate / size:14.2f}{loss * 1000:13.1f} ms")

    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for mode in gpus.MODES:
            settings: dict[str, Any] = {
                "consistency": mode,
                "keep_last_n": 1,
                "compression": "none",
            }
            settings["staging_bytes"] = 2 * size
            with CheckpointManager(Path(folder) / mode, **settings) as manager:
                manager.prewarm(training.state())
                chosen: dict[str, Any] = (
                    {"optimizer": training.optimizer} if mode == "overlap" else {}
                )

                def save(step: int) -> Callable[[], object]:
                    state = training.state()
                    return manager.save_async(state, step=step, **chosen).result  # noqa: B023

                show(f"dtruntime, {mode}", *measure(training, options.rounds, save))
        state = {name: value.state_dict() for name, value in training.state().items()}
        dcp: Any = checkpoint  # its names are not all exported to type checkers
        writer = dcp.FileSystemWriter(Path(folder) / "dcp")

        def async_save(_: int) -> Callable[[], object]:
            waits: Callable[[], object] = dcp.async_save(state, storage_writer=writer).result
            return waits

        show("dcp.async_save", *measure(training, options.rounds, async_save))
        seconds = []
        with CheckpointManager(Path(folder) / "strict", read_only=True) as manager:
            for _ in range(options.rounds + 1):
                torch.cuda.empty_cache()
                start = time.perf_counter()
                manager.load(map_location=device)
                torch.cuda.synchronize(device)
                seconds.append(time.perf_counter() - start)
        loaded = statistics.median(seconds[1:])
        print(f"load to the GPU: {loaded:.2f} s, {size / loaded / 1e9:.1f} GB/s, files cached")


if __name__ == "__main__":
    main()
