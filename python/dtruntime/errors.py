"""Every way a checkpoint operation can fail, as classes chosen by what the caller does next.

A message says what was being done and to what, why it failed (expected against actual), and, on a
line of its own that begins with ``hint: ``, how to go on. The three parts are attributes too.
"""

from __future__ import annotations

from typing import ClassVar


class CheckpointError(Exception):
    """Base of every error that this package raises on purpose.

    Attributes:
        what: The operation, and what it was done to.
        why: Why it failed: expected against actual.
        hint: How to go on.

    """

    is_retryable: ClassVar[bool] = False
    """Whether the same call may succeed later without a change."""

    def __init__(self, what: str, why: str, hint: str) -> None:
        super().__init__(what, why, hint)
        self.what = what
        self.why = why
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.what}: {self.why}\nhint: {self.hint}"


class InvalidArgument(CheckpointError, ValueError):  # noqa: N818  (named as the engine names it)
    """Fix the call: an argument or a setting is out of its range."""


class UnsupportedValue(CheckpointError, TypeError):  # noqa: N818
    """Fix the state: a value in it cannot be saved. The message names its key path."""


class CheckpointNotFound(CheckpointError, LookupError):  # noqa: N818
    """Fix the call: there is no such checkpoint."""


class StepConflict(CheckpointError):  # noqa: N818
    """Fix the call, or say ``rewind=True``: the step is not after the newest committed one."""


class SaveInFlight(CheckpointError):  # noqa: N818
    """Save later: the save before is not durable yet, and the call said not to wait for it."""

    is_retryable = True


class StoreBusy(CheckpointError):  # noqa: N818
    """Wait, or open with ``read_only=True``: another writer holds the store."""

    is_retryable = True


class Corrupt(CheckpointError):  # noqa: N818
    """Restore another checkpoint: bytes on the medium are not what was written."""


class UnsupportedFormat(CheckpointError):  # noqa: N818
    """Upgrade: the checkpoint was written by a newer version, of this package or of torch."""


class NoSpace(CheckpointError):  # noqa: N818
    """Free space, then save again; the previous checkpoints are untouched."""

    is_retryable = True


class StorageError(CheckpointError):
    """Retry, or look at the device: the operating system refused an operation.

    Attributes:
        errno: The operating system's error number; None where it gave none.

    """

    is_retryable = True

    def __init__(self, what: str, why: str, hint: str, errno: int | None = None) -> None:
        super().__init__(what, why, hint)
        self.args = (what, why, hint, errno)
        self.errno = errno


class Unavailable(CheckpointError):  # noqa: N818
    """Retry, or mend the access: the store's service did not do what it was asked.

    Nothing is known of the checkpoints themselves.
    """

    is_retryable = True


class RestoreIncomplete(CheckpointError):  # noqa: N818
    """Restore again before saving: live memory was changed in part when a restore failed."""


class AcceleratorError(CheckpointError):
    """Look at the GPU, or keep the tensors on the CPU: its driver refused an operation."""


class Closed(CheckpointError):  # noqa: N818
    """Open a new manager: this one was closed, or belongs to the parent of a forked process."""


class CoordinatorError(CheckpointError):
    """Base of what only working with a coordinator can raise."""


class CoordinatorUnavailable(CoordinatorError, ConnectionError):  # noqa: N818
    """Start the coordinator, or correct its address; what it had promised is kept."""

    is_retryable = True


class Unauthenticated(CoordinatorError, PermissionError):  # noqa: N818
    """Present the right token or certificate."""


class Conflict(CoordinatorError):  # noqa: N818
    """Wait, or end what stands in the way: another worker, run or registration."""

    is_retryable = True


class WorkerFenced(CoordinatorError):  # noqa: N818
    """Register again: this process is no member of its job any more."""


class MembershipChanged(CoordinatorError):  # noqa: N818
    """Decide whether to go on: the job lost a worker. The next call goes on without it."""

    is_retryable = True


class JobAborted(CoordinatorError):  # noqa: N818
    """End this process: the job is aborted, for the reason in the message."""


class BarrierTimeout(CoordinatorError, TimeoutError):  # noqa: N818
    """Look at the workers that the message names: they did not come to a barrier in time."""

    is_retryable = True


class SaveAborted(CoordinatorError):  # noqa: N818
    """Save again; training may go on: a rank failed, and so the save did on all of them."""

    is_retryable = True


class LoadAborted(CoordinatorError):  # noqa: N818
    """Load again, on every rank: one gave up, and the others do not go on without it."""

    is_retryable = True


class DatasetNotFound(CoordinatorError, LookupError):  # noqa: N818
    """Fix the name or the path: there is no such dataset, or a file of it is not there."""


class DatasetChanged(CheckpointError):  # noqa: N818
    """Decide: bring the dataset or the ranks back as they were, or begin an epoch anew.

    The position belongs to something else, so samples would be lost or read twice.
    """


class UnreadableSample(CheckpointError, ValueError):  # noqa: N818
    """Mend the file, or leave it out: a sample in it is not what its format says."""


class Internal(CheckpointError):  # noqa: N818
    """Report a bug: the engine broke one of its own rules and refuses further work."""
