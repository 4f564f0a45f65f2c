"""A state of over 1 GB survives a save, SIGKILL in the middle of the next, and a resume."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import torch

from dtruntime import CheckpointManager

STATE_BYTES_MIN = 1_000_000_000


def make_training() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """Make a transformer whose weights and moments take 1.2 GB; the same on every call."""
    torch.manual_seed(17)
    layer = torch.nn.TransformerEncoderLayer(768, 12, 3072, dropout=0.0, batch_first=True)
    model = torch.nn.Sequential(
        torch.nn.Embedding(20_000, 768),
        torch.nn.TransformerEncoder(layer, 12, enable_nested_tensor=False),
    )
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3)


def train_step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    tokens = torch.randint(0, 20_000, (1, 8), generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    model(tokens).square().mean().backward()
    optimizer.step()


def digests(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, str]:
    """Digest the bytes of every tensor, by name."""
    tensors = dict(model.state_dict())
    for number, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"{number}.{name}": tensor for name, tensor in moments.items()}
    assert sum(tensor.nbytes for tensor in tensors.values()) > STATE_BYTES_MIN
    return {
        name: hashlib.blake2b(tensor.reshape(-1).view(torch.uint8).numpy()).hexdigest()
        for name, tensor in tensors.items()
    }


def train_until_killed(store: Path) -> None:
    """Save step 1, record its digests, and die in the middle of saving step 2."""
    model, optimizer = make_training()
    manager = CheckpointManager(store)
    train_step(model, optimizer, seed=1)
    manager.save({"model": model, "optimizer": optimizer}, step=1)
    (store / "expected.json").write_text(json.dumps(digests(model, optimizer)))
    train_step(model, optimizer, seed=2)
    handle = manager.save_async({"model": model, "optimizer": optimizer}, step=2)
    while not handle.progress().written_bytes:
        assert not handle.done()
    os.kill(os.getpid(), signal.SIGKILL)


def test_over_a_gigabyte_survives_a_kill_in_the_middle_of_a_save(tmp_path):
    store = tmp_path / "store"
    child = subprocess.run([sys.executable, __file__, store], check=False)
    assert child.returncode == -signal.SIGKILL
    expected = json.loads((store / "expected.json").read_text())

    with CheckpointManager(store) as manager:
        assert manager.all_steps() == [1]
        assert manager.verify().ok
        assert len(list((store / "step-000000000002").iterdir())) == 1  # the attempt that died
        model, optimizer = make_training()
        train_step(model, optimizer, seed=3)  # other values, with moments to restore into
        report = manager.restore({"model": model, "optimizer": optimizer})
        assert report.step == 1
        assert digests(model, optimizer) == expected
        train_step(model, optimizer, seed=2)
        manager.save({"model": model, "optimizer": optimizer}, step=2)
        assert manager.all_steps() == [1, 2]


if __name__ == "__main__":
    train_until_killed(Path(sys.argv[1]))
