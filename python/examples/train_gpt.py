"""Train a small GPT on the text of Python's standard library, saving meanwhile.

An ordinary training script: the lines that concern checkpoints are the import, the manager,
`manager.save_async(...)` in the loop and `manager.restore(...)` before it.

    python train_gpt.py --store runs/gpt
    python train_gpt.py --store runs/gpt --resume

Everything that decides the next loss is part of the state: weights, both Adam moments, learning
rate schedule, random number generator (dropout draws from it) and position in the text. So a run
that was killed and resumed continues with exactly the losses of one that was not.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import sys
import sysconfig
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from dtruntime import CheckpointManager, SaveHandle

VOCABULARY = 256  # bytes
CONTEXT = 64
BATCH = 16
WIDTH = 256
HEADS = 4
LAYERS = 4
DROPOUT = 0.1
LEARNING_RATE = 1e-3
WARMUP_STEPS = 10
CORPUS_BYTES_MAX = 4 << 20


class Block(nn.Module):
    """Attention, then a feed-forward layer, each around a residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(WIDTH)
        self.query_key_value = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.project = nn.Linear(WIDTH, WIDTH, bias=False)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(WIDTH),
            nn.Linear(WIDTH, 4 * WIDTH),
            nn.GELU(),
            nn.Linear(4 * WIDTH, WIDTH),
            nn.Dropout(DROPOUT),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Mix each position with those before it."""
        batch, length, _ = x.shape
        heads = self.query_key_value(self.attention_norm(x))
        heads = heads.view(batch, length, 3, HEADS, WIDTH // HEADS)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.project(mixed.transpose(1, 2).reshape(batch, length, WIDTH))
        out: torch.Tensor = x + self.feed_forward(x)
        return out


class GPT(nn.Module):
    """A decoder over bytes whose output layer is its embedding (one storage, two names)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.position = nn.Parameter(0.02 * torch.randn(CONTEXT, WIDTH))
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(WIDTH)
        self.output = nn.Linear(WIDTH, VOCABULARY, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.output.weight = self.embedding.weight

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        """Score every next byte."""
        x = self.blocks(self.embedding(text) + self.position)
        scores: torch.Tensor = self.output(self.norm(x))
        return scores


class Progress:
    """The progress of the run: what no module or optimizer knows."""

    def __init__(self, corpus: torch.Tensor) -> None:
        self.corpus = corpus
        self.corpus_sha256 = hashlib.sha256(corpus.numpy().tobytes()).hexdigest()
        self.offset = 0
        self.losses: list[float] = []

    @property
    def step(self) -> int:
        """Steps taken so far."""
        return len(self.losses)

    def next_batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the next bytes at places spread over the text, and the byte after each."""
        spread = (len(self.corpus) - CONTEXT - 1) // BATCH
        starts = self.offset % spread + spread * torch.arange(BATCH)
        windows = self.corpus[starts[:, None] + torch.arange(CONTEXT + 1)].long()
        self.offset += CONTEXT
        return windows[:, :-1], windows[:, 1:]

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run must know."""
        return {
            "corpus_sha256": self.corpus_sha256,
            "offset": self.offset,
            "losses": list(self.losses),
            "random": torch.get_rng_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken, on the same text."""
        if state["corpus_sha256"] != self.corpus_sha256:
            sys.exit("error: the text differs from the one this run began with")
        self.offset = state["offset"]
        self.losses = list(state["losses"])
        torch.set_rng_state(state["random"])


def read_corpus() -> torch.Tensor:
    """Read the standard library's top-level modules, in order of name, up to a limit."""
    folder = Path(sysconfig.get_path("stdlib"))
    text = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
    return torch.frombuffer(bytearray(text[:CORPUS_BYTES_MAX]), dtype=torch.uint8)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
    """Take one step and note its loss."""
    text, following = progress.next_batch()
    scores = model(text)
    loss = functional.cross_entropy(scores.view(-1, VOCABULARY), following.reshape(-1))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    progress.losses.append(loss.item())


def train(options: argparse.Namespace) -> dict[str, Any]:
    """Run the whole training, or what is left of it; returns what happened."""
    torch.manual_seed(1234)
    torch.use_deterministic_algorithms(mode=True)
    torch.set_num_threads(1)  # sums in one order everywhere; and a busy machine stalls no barrier
    model = GPT()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / WARMUP_STEPS)
    )
    progress = Progress(read_corpus())
    state = {
        "model": model,
        "optimizer": optimizer,
        "scheduler": scheduler,
        "progress": progress,
    }
    saves: list[SaveHandle] = []
    with CheckpointManager(
        options.store, keep_last_n=options.keep_last_n, remote=options.remote
    ) as manager:
        if options.resume:
            manager.restore(state)
            print(f"resumed at step {progress.step}", flush=True)
        resumed_at = progress.step
        while progress.step < options.steps:
            train_step(model, optimizer, progress)
            scheduler.step()
            if progress.step % options.save_every == 0:
                handle = manager.save_async(state, step=progress.step)
                if progress.step == options.kill_during_save:
                    kill_in_mid_save(handle)
                saves.append(handle)
        return {
            "resumed_at": resumed_at,
            "losses": progress.losses,
            "weights_sha256": digest(model),
            "saves": [{"step": handle.step, **asdict(handle.result().stats)} for handle in saves],
        }


def kill_in_mid_save(handle: SaveHandle) -> None:
    """End this process as a power cut would: no handler and no flush."""
    while not handle.done():
        if handle.progress().written_bytes > 0:
            os.kill(os.getpid(), signal.SIGKILL)
    sys.exit("error: the save was faster than the kill: nothing was interrupted")


def digest(model: nn.Module) -> str:
    """Hash the bits of all weights."""
    sha256 = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        sha256.update(name.encode())
        sha256.update(tensor.numpy().tobytes())
    return sha256.hexdigest()


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--store", type=Path, required=True, help="where checkpoints live")
    parser.add_argument("--remote", metavar="S3", help="where they are brought to, s3://...")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--save-every", type=int, default=10, metavar="STEPS")
    parser.add_argument("--keep-last-n", type=int, default=10, metavar="N")
    parser.add_argument("--resume", action="store_true", help="continue from the newest step")
    parser.add_argument("--kill-during-save", type=int, metavar="STEP", help="for the demo")
    parser.add_argument("--losses-out", type=Path, metavar="FILE", help="write what happened")
    options = parser.parse_args()
    began = time.monotonic()
    report = train(options)
    seconds = time.monotonic() - began
    print(f"step {options.steps}: loss {report['losses'][-1]:.3f} after {seconds:.0f} s")
    if options.losses_out:
        options.losses_out.write_text(json.dumps(report))


if __name__ == "__main__":
    main()
