"""Checkpoints for PyTorch training: asynchronous, compressed, every byte checked.

>>> from dtruntime import CheckpointManager
>>> manager = CheckpointManager("runs/gpt", keep_last_n=5)
>>> handle = manager.save_async({"model": model, "optimizer": optimizer, "epoch": 3}, step=1000)
>>> handle.result()  # durable, or raises; `await handle` does the same
>>> state = manager.load()
>>> manager.restore({"model": model, "optimizer": optimizer})

The packages:

- ``checkpoint``: the manager, which checks arguments and delegates each call to the packages below
- ``opened``: what it opens, and how that is closed; ``lifecycle``: fork, exit and SIGTERM
- ``state``: flattening a training state into nodes and memory, and rebuilding it
- ``saving``: one save at a time, from the call to the end of its handle
- ``loading``: which checkpoint is read, whose shards, and into which memory
- ``restoring``: a plan of what fits where in a live state, and its execution
- ``ranks``: how the ranks of a job find each other, and the settings that the coordinator provides
- ``datasets``: which rank reads which files; ``orchestrator``: a worker's membership in its job
- ``dcp``, ``lightning``, ``transformers``: adapters for the checkpoint interfaces of other packages
"""

from typing import TYPE_CHECKING, Any

from dtruntime._native import __version__
from dtruntime.checkpoint import CheckpointManager
from dtruntime.datasets.registry import DatasetInfo, DatasetRegistry
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
from dtruntime.orchestrator import MembershipChange, TrainingOrchestrator, WorkerInfo
from dtruntime.ranks.connecting import Security
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
from dtruntime.saving.handle import SaveHandle

if TYPE_CHECKING:
    from dtruntime.datasets.sharded_dataset import ShardedDataset
    from dtruntime.datasets.sharded_loader import ShardedLoader

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
    """Import the subclasses of torch classes on first access: the rest works without torch."""
    if name not in ("ShardedDataset", "ShardedLoader"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from dtruntime.state.tensors import import_torch  # noqa: PLC0415

    import_torch(f"using `{name}`")
    from dtruntime.datasets import sharded_dataset, sharded_loader  # noqa: PLC0415

    return getattr(sharded_dataset if name == "ShardedDataset" else sharded_loader, name)
