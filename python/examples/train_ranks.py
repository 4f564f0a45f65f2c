"""Train on several ranks (DDP), lose one, and continue from the checkpoint that all of them have.

    torchrun --nproc-per-node 4 --max-restarts 1 python/examples/train_ranks.py runs/ranks

Model and optimizer are the same on all ranks, so each writes a part of them under the same step,
and any number of ranks can continue from there: the checkpoint exists when all parts are durable.
Rank 0 hosts the coordinator, unless COORDINATOR_URL names one. It runs on GPUs if there are
any, else on the processor. ``--lose RANK:STEP`` makes a rank kill itself while it saves that step,
once.

Where ranks do not share a disk, ``--remote s3://bucket/run`` gives each its own directory
below the store, and complete checkpoints are uploaded to S3.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dtruntime import CheckpointError, CheckpointManager, CheckpointNotFound

STEPS = 40
SAVE_EVERY = 10
WIDTH = 256


def join(device: torch.device) -> None:
    """Create the process group, under a prefix of torchrun's store that a restart does not share.

    Without it, gloo finds the addresses of the processes that the restart replaced.
    """
    environment = os.environ
    store = dist.TCPStore(  # type: ignore[attr-defined]
        environment["MASTER_ADDR"], int(environment["MASTER_PORT"]), is_master=False
    )
    name = f"restart-{environment['TORCHELASTIC_RESTART_COUNT']}"
    corner = dist.PrefixStore(name, store)  # type: ignore[attr-defined]
    rank, world_size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=corner, rank=rank, world_size=world_size)


def batch(step: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the data of one step and this rank: the same after a restart."""
    generator = torch.Generator().manual_seed(step * 1000 + dist.get_rank())
    inputs = torch.randn(64, WIDTH, generator=generator).to(device)
    return inputs, inputs.roll(1, dims=1)


def open_manager(store: Path, remote: str | None) -> CheckpointManager:
    """Open the store; a save in flight is finished before SIGTERM ends the rank."""
    own = store if remote is None else store / f"rank-{dist.get_rank()}"
    replicated = ["model.*", "optimizer.*", "step"]
    # torchrun kills a rank 30 s after it has sent SIGTERM.
    return CheckpointManager(
        own,
        keep_last_n=2,
        replicated=replicated,
        remote=remote,
        sigterm="finish",
        sigterm_deadline_seconds=25,
    )


def train(store: Path, remote: str | None, lose: tuple[int, int] | None) -> None:
    """Run the training loop of one rank."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    join(device)
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    averaging = DistributedDataParallel(model)
    is_first_run = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    with open_manager(store, remote) as manager:
        # The model without its wrapper, so that an evaluation needs none.
        state: dict[str, Any] = {"model": model, "optimizer": optimizer, "step": 0}
        with contextlib.suppress(CheckpointNotFound):
            manager.restore(state)
        begin = int(state["step"])
        if rank == 0:
            print(f"{dist.get_world_size()} ranks begin after step {begin}", flush=True)
        loss = torch.zeros(())
        for step in range(begin + 1, STEPS + 1):
            inputs, targets = batch(step, device)
            loss = nn.functional.mse_loss(averaging(inputs), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % SAVE_EVERY == 0:
                save(manager, state | {"step": step}, rank)
                if is_first_run and lose == (rank, step):
                    os.kill(os.getpid(), signal.SIGKILL)
        manager.wait_until_finished()
        if rank == 0:
            print(f"done: step {manager.latest_step()}, loss {loss.item():.6f}", flush=True)
    dist.destroy_process_group()


def save(manager: CheckpointManager, state: dict[str, Any], rank: int) -> None:
    """Save in the background; a save that fails does not end the training."""
    try:
        manager.save_async(state, step=state["step"])
    except CheckpointError as error:
        print(f"rank {rank} continues without a checkpoint: {error}", flush=True)


def main() -> None:
    """Read the arguments and train."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("store", type=Path)
    parser.add_argument("--remote", metavar="s3://BUCKET/PREFIX")
    parser.add_argument("--lose", metavar="RANK:STEP")
    arguments = parser.parse_args()
    lose = None
    if arguments.lose:
        rank, step = arguments.lose.split(":")
        lose = (int(rank), int(step))
    train(arguments.store, arguments.remote, lose)


if __name__ == "__main__":
    main()
