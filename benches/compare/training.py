"""A training loop that runs beside a save: a small GPT on the processor, at a fixed thread count.

It has its own tensors: the state that is being saved stays as it is, so that what is loaded can be
compared with it.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from make_state import GPT, VOCABULARY, Size

SIZE = Size(width=128, heads=4, layers=3, context=64, batch=8, steps=0)


class Training:
    """Takes steps."""

    def __init__(self, threads: int) -> None:
        torch.set_num_threads(threads)
        torch.manual_seed(7)
        self.model = GPT(SIZE)
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.text = torch.randint(VOCABULARY, (SIZE.batch, SIZE.context))
        for _ in range(5):
            self.step()

    def step(self) -> None:
        """Take a step."""
        self.backward()
        self.update()

    def backward(self) -> None:
        """Do the part of a step that reads the weights."""
        scores = self.model(self.text)
        loss = functional.cross_entropy(scores.view(-1, VOCABULARY), self.text.reshape(-1))
        loss.backward()

    def update(self) -> None:
        """Do the part of a step that changes the weights."""
        self.optimizer.step()
        self.optimizer.zero_grad()
