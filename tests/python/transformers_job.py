"""A small job of `transformers`: imported by tests, and text for scripts of their own."""

from __future__ import annotations

import torch
from transformers import TrainerCallback, TrainingArguments

from dtruntime.transformers import Trainer


class Samples(torch.utils.data.Dataset):
    """64 samples, which each epoch reads in 8 batches of 8, in another order."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index):
        sample = torch.randn(4, generator=torch.Generator().manual_seed(index))
        return {"sample": sample, "labels": sample.sum()}


class Net(torch.nn.Module):
    """A model with dropout: a run that resumes needs the same random numbers."""

    def __init__(self, width=32) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first = torch.nn.Sequential(torch.nn.Linear(4, width), torch.nn.Dropout(0.2))
        self.last = torch.nn.Linear(width, 1)

    def forward(self, sample, labels):
        output = self.last(self.first(sample))[:, 0]
        return {"loss": torch.nn.functional.mse_loss(output, labels), "logits": output}


class EachStep(TrainerCallback):
    """Does something after each step, given its number and the model."""

    def __init__(self, do) -> None:
        self.do = do

    def on_step_end(self, _arguments, state, _control, model=None, **_others) -> None:
        self.do(state.global_step, model)


class EndedError(Exception):
    """Ends a run in the middle."""


def end_at(step) -> TrainerCallback:
    """End a run after a step: what follows the last save is lost."""

    def end(number, _model) -> None:
        if number == step:
            raise EndedError

    return EachStep(end)


def trainer(manager, directory, *callbacks, model=None, own=None, kind=Trainer, **arguments):
    """Make a trainer that saves and evaluates every fifth of 24 steps."""
    defaults = {
        "use_cpu": True,
        "per_device_train_batch_size": 8,
        "num_train_epochs": 3,
        "save_steps": 5,
        "eval_strategy": "steps",
        "eval_steps": 5,
        "logging_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
    }
    return kind(
        model or Net(),
        TrainingArguments(str(directory), **defaults | arguments),
        train_dataset=Samples(),
        eval_dataset=Samples(),
        callbacks=[*callbacks],
        **({} if manager is None else {"manager": manager}),
        **(own or {}),
    )
