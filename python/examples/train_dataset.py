"""Train on a dataset that the ranks share, lose one, and continue with exactly what was left of it.

    torchrun --nproc-per-node 2 --max-restarts 1 python/examples/train_dataset.py runs/dataset

The position in the data is an entry of the state, so model and data never disagree: whatever was
trained on after the checkpoint is trained on again, and nothing else is. Files are read by workers,
ahead of the training; ranks end each epoch together. Rank 0 hosts the coordinator.
``--lose RANK:STEP`` makes a rank kill itself after that step, once.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from dtruntime import (
    CheckpointManager,
    CheckpointNotFound,
    DatasetRegistry,
    ShardedDataset,
    ShardedLoader,
)

EPOCHS = 2
SAVE_EVERY = 5
WIDTH = 16
FILES = 9


def join() -> None:
    """Create the process group, separate from that of the processes that a restart replaced."""
    environment = os.environ
    store = dist.TCPStore(  # type: ignore[attr-defined]
        environment["MASTER_ADDR"], int(environment["MASTER_PORT"]), is_master=False
    )
    name = f"restart-{environment['TORCHELASTIC_RESTART_COUNT']}"
    corner = dist.PrefixStore(name, store)  # type: ignore[attr-defined]
    rank, world_size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    dist.init_process_group("gloo", store=corner, rank=rank, world_size=world_size)


def write_data(folder: Path) -> None:
    """Write files of JSON lines, of different lengths: numbers, and what to learn from them."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)  # noqa: S311  (nothing here is secret)
    for number in range(FILES):
        rows = []
        for _ in range(draw.randrange(20, 60)):
            inputs = [draw.gauss(0, 1) for _ in range(WIDTH)]
            rows.append(json.dumps({"inputs": inputs, "target": sum(inputs)}) + "\n")
        (folder / f"part-{number}.jsonl").write_text("".join(rows))


def collate(rows: list[dict[str, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Make a batch of rows: ``(rows, WIDTH)`` and ``(rows, 1)``."""
    inputs = torch.tensor([row["inputs"] for row in rows])
    return inputs, torch.tensor([[row["target"]] for row in rows])


def say(text: str) -> None:
    """Print, on rank 0: lines of several ranks would tangle."""
    if dist.get_rank() == 0:
        print(text, flush=True)


def train(folder: Path, lose: tuple[int, int] | None) -> None:
    """Run the training loop of one rank."""
    join()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = nn.Linear(WIDTH, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    is_first_run = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    replicated = ["model.*", "optimizer.*", "step"]
    with CheckpointManager(folder / "store", keep_last_n=2, replicated=replicated) as manager:
        registry = DatasetRegistry()
        if rank == 0:
            if is_first_run:
                write_data(folder / "data")
            registry.register("train", folder / "data", "jsonl", total_samples=FILES * 40)
        dist.barrier()
        dataset = ShardedDataset(registry, "train")
        loader = ShardedLoader(dataset, batch_size=8, num_workers=1, collate_fn=collate)
        state: dict[str, Any] = {
            "model": model,
            "optimizer": optimizer,
            "data": dataset,
            "step": 0,
        }
        with contextlib.suppress(CheckpointNotFound):
            manager.restore(state)
        step = int(state["step"])
        say(f"{world_size} ranks begin after step {step}, epoch {dataset.epoch}")
        for epoch in range(dataset.epoch, EPOCHS):
            dataset.set_epoch(epoch)
            for inputs, targets in loader:
                step += 1
                loss = nn.functional.mse_loss(model(inputs), targets)
                model.zero_grad()
                loss.backward()
                for parameter in model.parameters():
                    assert parameter.grad is not None  # noqa: S101  (each has one)
                    dist.all_reduce(parameter.grad)
                    parameter.grad.div_(world_size)
                optimizer.step()
                if step % SAVE_EVERY == 0:
                    manager.save_async(state | {"step": step}, step=step)
                if is_first_run and lose == (rank, step):
                    manager.wait_until_finished()
                    os.kill(os.getpid(), signal.SIGKILL)
            if step % SAVE_EVERY:  # else it is saved; restoring this continues with the next epoch
                manager.save_async(state | {"step": step}, step=step)
        manager.wait_until_finished()
    say(f"done: {step} steps, sum of weights {model.weight.sum().item():.9f}")
    dist.destroy_process_group()


def main() -> None:
    """Read the arguments and train."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--lose", metavar="RANK:STEP")
    arguments = parser.parse_args()
    lose = None
    if arguments.lose:
        rank, step = arguments.lose.split(":")
        lose = (int(rank), int(step))
    train(arguments.folder, lose)


if __name__ == "__main__":
    main()
