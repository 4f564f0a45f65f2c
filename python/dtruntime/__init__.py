"""Checkpoints for PyTorch training: asynchronous, compressed, every byte checked.

>>> from dtruntime import CheckpointManager
>>> manager = CheckpointManager("runs/gpt", keep_last_n=5)
>>> handle = manager.save_async({"model": model, "optimizer": optimizer, "epoch": 3}, step=1000)
>>> handle.result()  # durable, or raises; `await handle` does the same
>>> state = manager.load()
>>> manager.restore({"model": model, "optimizer": optimizer})
"""

from dtruntime.checkpoint import CheckpointManager
from dtruntime.datasets import DatasetInfo, DatasetRegistry
from dtruntime.errors import (
    AcceleratorError,
    BarrierTimeout,
    CheckpointError,
    CheckpointNotFound,
    Closed,
    Conflict,
    CoordinatorError,
    CoordinatorUnavailable,
    Corrupt,
    DatasetNotFound,
    Internal,
    InvalidArgument,
    JobAborted,
    MembershipChanged,
    NoSpace,
    RestoreIncomplete,
    SaveAborted,
    StepConflict,
    StorageError,
    StoreBusy,
    Unauthenticated,
    Unavailable,
    UnsupportedFormat,
    UnsupportedValue,
    WorkerFenced,
)
from dtruntime.handle import SaveHandle, SaveInfo, SaveProgress, SaveStats, UploadInfo
from dtruntime.orchestrator import MembershipChange, TrainingOrchestrator, WorkerInfo
from dtruntime.reports import Damage, LoadReport, VerifyReport
from dtruntime.restore import RestoreReport

__all__ = [
    "AcceleratorError",
    "BarrierTimeout",
    "CheckpointError",
    "CheckpointManager",
    "CheckpointNotFound",
    "Closed",
    "Conflict",
    "CoordinatorError",
    "CoordinatorUnavailable",
    "Corrupt",
    "Damage",
    "DatasetInfo",
    "DatasetNotFound",
    "DatasetRegistry",
    "Internal",
    "InvalidArgument",
    "JobAborted",
    "LoadReport",
    "MembershipChange",
    "MembershipChanged",
    "NoSpace",
    "RestoreIncomplete",
    "RestoreReport",
    "SaveAborted",
    "SaveHandle",
    "SaveInfo",
    "SaveProgress",
    "SaveStats",
    "StepConflict",
    "StorageError",
    "StoreBusy",
    "TrainingOrchestrator",
    "Unauthenticated",
    "Unavailable",
    "UnsupportedFormat",
    "UnsupportedValue",
    "UploadInfo",
    "VerifyReport",
    "WorkerFenced",
    "WorkerInfo",
]
