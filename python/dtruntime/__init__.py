"""Checkpoints for PyTorch training: asynchronous, compressed, every byte checked.

>>> from dtruntime import CheckpointManager
>>> manager = CheckpointManager("runs/gpt", keep_last_n=5)
>>> handle = manager.save_async({"model": model, "optimizer": optimizer, "epoch": 3}, step=1000)
>>> handle.result()  # durable, or raises; `await handle` does the same
>>> state = manager.load()
>>> manager.restore({"model": model, "optimizer": optimizer})
"""

from dtruntime.checkpoint import CheckpointManager
from dtruntime.errors import (
    CheckpointError,
    CheckpointNotFound,
    Closed,
    Corrupt,
    Internal,
    InvalidArgument,
    NoSpace,
    RestoreIncomplete,
    StepConflict,
    StorageError,
    StoreBusy,
    Unavailable,
    UnsupportedFormat,
    UnsupportedValue,
)
from dtruntime.handle import SaveHandle, SaveInfo, SaveProgress, SaveStats, UploadInfo
from dtruntime.reports import Damage, LoadReport, VerifyReport
from dtruntime.restore import RestoreReport

__all__ = [
    "CheckpointError",
    "CheckpointManager",
    "CheckpointNotFound",
    "Closed",
    "Corrupt",
    "Damage",
    "Internal",
    "InvalidArgument",
    "LoadReport",
    "NoSpace",
    "RestoreIncomplete",
    "RestoreReport",
    "SaveHandle",
    "SaveInfo",
    "SaveProgress",
    "SaveStats",
    "StepConflict",
    "StorageError",
    "StoreBusy",
    "Unavailable",
    "UnsupportedFormat",
    "UnsupportedValue",
    "UploadInfo",
    "VerifyReport",
]
