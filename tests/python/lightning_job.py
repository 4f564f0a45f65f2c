"""A small job of PyTorch Lightning: imported by tests, and text for scripts of their own."""

from __future__ import annotations

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, TensorDataset


class Net(pl.LightningModule):
    """A model whose every step depends on all before it."""

    def __init__(self, width=32, name="net") -> None:  # noqa: ARG002  (saved)
        super().__init__()
        torch.manual_seed(0)
        self.save_hyperparameters()
        self.layers = torch.nn.Sequential(torch.nn.Linear(4, width), torch.nn.Linear(width, 1))

    def training_step(self, batch, _):
        loss = torch.nn.functional.mse_loss(self.layers(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), 1e-2)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


def batches() -> DataLoader:
    """Return eight batches, always the same."""
    samples = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(samples, samples.sum(1, keepdim=True)), batch_size=8)


def trainer(plugin, epochs, *callbacks, **settings) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        plugins=[plugin],
        callbacks=[*callbacks],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        **{"devices": 1, **settings},
    )
