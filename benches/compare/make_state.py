"""Makes the state that every engine saves: really trains a GPT for some steps.

Mixed precision as it is usual: bf16 weights that the forward pass uses, an fp32 master copy that
AdamW updates, and both moments: 14 bytes a parameter. The text is Python's standard library, so it
is on every machine; seeds and the number of threads are fixed. A state is kept under this file's
hash: whatever changes here makes a new one.
"""

from __future__ import annotations

import sys
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Iterator

VOCABULARY = 256  # bytes: every row of the embedding is seen often, unlike rare words' rows
LEARNING_RATE = 3e-4
THREADS = 2  # sums depend on it, and so does the hash
CORPUS_BYTES_MAX = 4 << 20

State = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """How large a model is trained, and for how long."""

    width: int
    heads: int
    layers: int
    context: int
    batch: int
    steps: int


SIZES = {
    "full": Size(width=1024, heads=16, layers=9, context=64, batch=2, steps=40),
    "quick": Size(width=768, heads=12, layers=4, context=64, batch=2, steps=20),
    "tiny": Size(width=64, heads=2, layers=2, context=16, batch=2, steps=3),
}


class Block(nn.Module):
    """Attention, then a feed-forward layer, each around a residual connection."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        width = size.width
        self.heads = size.heads
        self.attention_norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.project = nn.Linear(width, width, bias=False)
        self.norm = nn.LayerNorm(width)
        self.widen = nn.Linear(width, 4 * width)
        self.narrow = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Mix each position with those before it."""
        batch, length, width = x.shape
        heads = self.query_key_value(self.attention_norm(x))
        heads = heads.view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.project(mixed.transpose(1, 2).reshape(batch, length, width))
        out: torch.Tensor = x + self.narrow(functional.gelu(self.widen(self.norm(x))))
        return out


class GPT(nn.Module):
    """A decoder over bytes."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, size.width)
        self.position = nn.Parameter(torch.empty(size.context, size.width))
        self.blocks = nn.Sequential(*(Block(size) for _ in range(size.layers)))
        self.norm = nn.LayerNorm(size.width)
        self.output = nn.Linear(size.width, VOCABULARY, bias=False)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        """Score every next byte."""
        scores: torch.Tensor = self.output(
            self.norm(self.blocks(self.embedding(text) + self.position))
        )
        return scores


def read_corpus() -> torch.Tensor:
    """Read the standard library's top-level modules, in order of name, up to a limit."""
    folder = Path(sysconfig.get_path("stdlib"))
    text = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
    return torch.frombuffer(bytearray(text[:CORPUS_BYTES_MAX]), dtype=torch.uint8)


def batches(size: Size) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Give text at random places, and the byte that follows each of its bytes."""
    corpus = read_corpus()
    generator = torch.Generator().manual_seed(size.steps)
    for _ in range(size.steps):
        last = len(corpus) - size.context - 1
        starts = torch.randint(last, (size.batch, 1), generator=generator)
        windows = corpus[starts + torch.arange(size.context + 1)].long()
        yield windows[:, :-1], windows[:, 1:]


def train(size: Size) -> State:
    """Train, and give the state as a training script would save it."""
    torch.manual_seed(1234)
    torch.use_deterministic_algorithms(mode=True)
    torch.set_num_threads(THREADS)
    model = GPT(size)
    masters = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(masters.values(), lr=LEARNING_RATE, betas=(0.9, 0.95))
    began = time.monotonic()
    for step, (text, following) in enumerate(batches(size), start=1):
        round_weights(model, masters)
        scores = model(text)
        loss = functional.cross_entropy(scores.view(-1, VOCABULARY), following.reshape(-1))
        loss.backward()
        for name, parameter in model.named_parameters():
            masters[name].grad, parameter.grad = parameter.grad, None
        optimizer.step()
        if step % 5 == 0 or step == size.steps:
            seconds = time.monotonic() - began
            say(f"  step {step} of {size.steps}: loss {loss.item():.3f}, {seconds:.0f} s")
    return state_of(size, masters, optimizer)


def round_weights(model: nn.Module, masters: dict[str, torch.Tensor]) -> None:
    """Give the model what bf16 keeps of the master copy."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(masters[name].bfloat16())


def state_of(
    size: Size, masters: dict[str, torch.Tensor], optimizer: torch.optim.Optimizer
) -> State:
    """Put together what a resumed training needs."""
    return {
        "model": {name: master.detach().bfloat16() for name, master in masters.items()},
        "optimizer": {
            name: {"master": master.detach(), **optimizer.state[master]}
            for name, master in masters.items()
        },
        "progress": {
            "step": size.steps,
            "samples": size.steps * size.batch,
            "random": torch.get_rng_state(),
        },
    }


def say(text: str) -> None:
    """Tell the person who waits."""
    print(text, file=sys.stderr, flush=True)
