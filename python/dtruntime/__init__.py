"""Checkpoints for PyTorch training: asynchronous, compressed, every byte checked.

>>> from dtruntime import CheckpointManager
>>> manager = CheckpointManager("runs/gpt", keep_last_n=5)
>>> handle = manager.save_async({"model": model, "optimizer": optimizer, "epoch": 3}, step=1000)
>>> handle.result()  # durable, or raises; `await handle` does the same
>>> state = manager.load()
>>> manager.restore({"model": model, "optimizer": optimizer})

The modules, by what goes through them:

- save: ``checkpoint`` (the manager) -> ``saving`` (one at a time) -> ``state_tree`` (a state, taken
  apart) -> ``tensors``, ``gpus`` (its memory) -> the engine -> ``handle``, ``watcher`` (its end)
- load: ``source`` -> ``fallback`` (which step) -> ``loading`` -> ``tree`` (a state, put together)
- restore: ``restore`` (what fits where) -> ``plan``, ``fitting`` -> ``applying``; ``modules``,
  ``optimizers``, ``scratch`` for what is special there
- doors: ``dcp`` (the writer and reader of ``torch.distributed.checkpoint``) -> ``planned`` (what
  its planners cut up); ``lightning`` (PyTorch Lightning), ``transformers`` (Hugging Face's trainer)
- ranks: ``launch``, ``membership``, ``embedded`` (how they meet) -> ``replication`` (what is
  alike), ``sharded_tensors``, ``assembling`` (what each has in part)
- datasets: ``datasets`` -> ``sharded_dataset``, ``sharded_loader`` -> ``readers``, ``ahead``,
  ``cache``; ``positions`` (where each rank is)
"""

from typing import TYPE_CHECKING, Any

from dtruntime._native import __version__
from dtruntime.checkpoint import CheckpointManager
from dtruntime.connecting import Security
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
    DatasetChanged,
    DatasetNotFound,
    Internal,
    InvalidArgument,
    JobAborted,
    LoadAborted,
    MembershipChanged,
    NoSpace,
    RestoreIncomplete,
    SaveAborted,
    SaveInFlight,
    StepConflict,
    StorageError,
    StoreBusy,
    Unauthenticated,
    Unavailable,
    UnreadableSample,
    UnsupportedFormat,
    UnsupportedValue,
    WorkerFenced,
)
from dtruntime.handle import SaveHandle
from dtruntime.orchestrator import MembershipChange, TrainingOrchestrator, WorkerInfo
from dtruntime.reports import (
    Damage,
    LoadReport,
    PendingUpload,
    RestoreReport,
    SaveInfo,
    SaveProgress,
    SaveStats,
    UploadInfo,
    VerifyReport,
)

if TYPE_CHECKING:
    from dtruntime.sharded_dataset import ShardedDataset
    from dtruntime.sharded_loader import ShardedLoader

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
    "DatasetChanged",
    "DatasetInfo",
    "DatasetNotFound",
    "DatasetRegistry",
    "Internal",
    "InvalidArgument",
    "JobAborted",
    "LoadAborted",
    "LoadReport",
    "MembershipChange",
    "MembershipChanged",
    "NoSpace",
    "PendingUpload",
    "RestoreIncomplete",
    "RestoreReport",
    "SaveAborted",
    "SaveHandle",
    "SaveInFlight",
    "SaveInfo",
    "SaveProgress",
    "SaveStats",
    "Security",
    "ShardedDataset",
    "ShardedLoader",
    "StepConflict",
    "StorageError",
    "StoreBusy",
    "TrainingOrchestrator",
    "Unauthenticated",
    "Unavailable",
    "UnreadableSample",
    "UnsupportedFormat",
    "UnsupportedValue",
    "UploadInfo",
    "VerifyReport",
    "WorkerFenced",
    "WorkerInfo",
    "__version__",
]


def __getattr__(name: str) -> Any:
    """Give what is a part of torch's class tree once it is asked for: the rest needs no torch."""
    if name not in ("ShardedDataset", "ShardedLoader"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from dtruntime.tensors import import_torch  # noqa: PLC0415

    import_torch(f"using `{name}`")
    from dtruntime import sharded_dataset, sharded_loader  # noqa: PLC0415

    return getattr(sharded_dataset if name == "ShardedDataset" else sharded_loader, name)
