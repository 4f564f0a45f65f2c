"""Train a model that is sharded over all ranks (FSDP2), and continue with another number of them.

    torchrun --nproc-per-node 4 python/examples/train_fsdp.py runs/fsdp --steps 20
    torchrun --nproc-per-node 2 python/examples/train_fsdp.py runs/fsdp --steps 40

Every rank saves its parts of the parameters and of the optimizer's moments; everything
else (the optimizer's settings, the step) is the same on all ranks, which ``replicated="*"``
declares: any number of ranks can assemble its own parts from that. It runs on GPUs if there are
any, else on the processor.
"""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from dtruntime import CheckpointManager, CheckpointNotFound

SAVE_EVERY = 10
WIDTH = 256
LAYERS = 4
GLOBAL_BATCH = 64


def make_model(device: str) -> nn.Module:
    """Make the same model on every rank, and shard it."""
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU()) for _ in range(LAYERS)]
    model = nn.Sequential(*layers, nn.Linear(WIDTH, WIDTH)).to(device)
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    for layer in model[:-1]:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def batch(step: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return this rank's share of the data of one step: all shares together are always the same."""
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(GLOBAL_BATCH, WIDTH, generator=generator)
    share = inputs.chunk(dist.get_world_size())[dist.get_rank()].to(device)
    return share, share.roll(1, dims=1)


def train(store: Path, steps: int, device: str) -> None:
    """Run the training loop of one rank."""
    model = make_model(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    state: dict[str, Any] = {"model": model, "optimizer": optimizer, "step": 0}
    with CheckpointManager(store, keep_last_n=2, replicated="*") as manager:
        with contextlib.suppress(CheckpointNotFound):
            manager.restore(state)
        begin = int(state["step"])
        if dist.get_rank() == 0:
            print(f"{dist.get_world_size()} ranks begin after step {begin}", flush=True)
        for step in range(begin + 1, steps + 1):
            inputs, targets = batch(step, device)
            loss = nn.functional.mse_loss(model(inputs), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % SAVE_EVERY == 0:
                state["step"] = step
                manager.save_async(state, step=step)
                mean = loss.detach()
                dist.all_reduce(mean)
                if dist.get_rank() == 0:
                    print(f"step {step}: loss {mean / dist.get_world_size():.6f}", flush=True)


def main() -> None:
    """Parse the command line, and train."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("store", type=Path, help="where checkpoints go")
    parser.add_argument("--steps", type=int, default=20, help="train up to this step")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(torch.distributed.get_node_local_rank(0)))
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
    try:
        train(options.store, options.steps, device)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
