"""Every way a checkpoint operation can fail, as classes chosen by what the caller does next.

A message says what was being done and to what, why it failed (expected and actual), and, on a
separate line that begins with ``hint: ``, how to fix it. The three parts are also attributes.
"""

from __future__ import annotations

from typing import ClassVar


class CheckpointError(Exception):
    """Base of every error that this package raises on purpose.

    Attributes:
        what: The operation and its object.
        why: Why it failed: what was expected, and what was found.
        hint: How to fix it.

    """

    is_retryable: ClassVar[bool] = False
    """Whether the same call may succeed later without a change."""

    def __init__(self, what: str, why: str, hint: str) -> None:
        super().__init__(what, why, hint)
        self.what = what
        self.why = why
        self.hint = hint

    @property
    def summary(self) -> str:
        """The message without the hint."""
        return f"{self.what}: {self.why}"

    def __str__(self) -> str:
        return f"{self.summary}\nhint: {self.hint}"


class InvalidArgument(CheckpointError, ValueError):  # noqa: N818  (named as the engine names it)
    """Fix the call: an argument or a setting is not accepted."""


class UnsupportedValue(CheckpointError, TypeError):  # noqa: N818
    """Fix the state: values in it cannot be saved. The message names the first few key paths."""


class CheckpointNotFound(CheckpointError, LookupError):  # noqa: N818
    """Fix the call: there is no such checkpoint."""


class StepConflict(CheckpointError):  # noqa: N818
    """Fix the call, or pass ``rewind=True``: the step is not after the newest committed one."""


class SaveInFlight(CheckpointError):  # noqa: N818
    """Save later: the previous save is not durable yet, and the call asked not to wait for it."""

    is_retryable = True


class StoreBusy(CheckpointError):  # noqa: N818
    """Wait, or open with ``read_only=True``: another writer holds the store."""

    is_retryable = True


class Corrupt(CheckpointError):  # noqa: N818
    """Restore another checkpoint: stored bytes are not what was written."""


class UnsupportedFormat(CheckpointError):  # noqa: N818
    """Upgrade: the checkpoint was written by a newer version, of this package or of torch."""


class NoSpace(CheckpointError):  # noqa: N818
    """Free space, then save again; the previous checkpoints are untouched."""

    is_retryable = True


class StorageError(CheckpointError):
    """Retry, or check the device: the operating system refused an operation.

    Attributes:
        errno: The operating system's error number; None if there is none.

    """

    is_retryable = True

    def __init__(self, what: str, why: str, hint: str, errno: int | None = None) -> None:
        super().__init__(what, why, hint)
        self.args = (what, why, hint, errno)
        self.errno = errno


class Unavailable(CheckpointError):  # noqa: N818
    """Retry, or fix the access: the store's service did not carry out a request.

    Nothing is known about the checkpoints themselves.
    """

    is_retryable = True


class RestoreIncomplete(CheckpointError):  # noqa: N818
    """Restore again before saving: a restore failed after changing part of the live state."""


class AcceleratorError(CheckpointError):
    """Check the GPU, or keep the tensors on the CPU: the driver refused an operation."""


class Closed(CheckpointError):  # noqa: N818
    """Open a new manager: this one was closed, or belongs to the parent of a forked process."""


class CoordinatorError(CheckpointError):
    """Base of the errors that only occur with a coordinator."""


class CoordinatorUnavailable(CoordinatorError, ConnectionError):  # noqa: N818
    """Start the coordinator, or correct its address; what it had acknowledged is kept."""

    is_retryable = True


class Unauthenticated(CoordinatorError, PermissionError):  # noqa: N818
    """Present the right token or certificate."""


class Conflict(CoordinatorError):  # noqa: N818
    """Wait, or end what conflicts: another worker, run or registration."""

    is_retryable = True


class WorkerFenced(CoordinatorError):  # noqa: N818
    """Register again: this process is no longer a member of its job."""


class MembershipChanged(CoordinatorError):  # noqa: N818
    """Decide whether to continue: the job lost a worker. The next call proceeds without it."""

    is_retryable = True


class JobAborted(CoordinatorError):  # noqa: N818
    """End this process: the job is aborted, for the reason in the message."""


class BarrierTimeout(CoordinatorError, TimeoutError):  # noqa: N818
    """Check the workers that the message names: they did not reach a barrier in time."""

    is_retryable = True


class SaveAborted(CoordinatorError):  # noqa: N818
    """Save again; training may continue: a rank failed, so the save failed on all of them."""

    is_retryable = True


class LoadAborted(CoordinatorError):  # noqa: N818
    """Load again, on every rank: one of them gave up."""

    is_retryable = True


class DatasetNotFound(CoordinatorError, LookupError):  # noqa: N818
    """Fix the name or the path: there is no such dataset, or one of its files is missing."""


class DatasetChanged(CheckpointError):  # noqa: N818
    """Bring the dataset or the ranks back as they were, or start an epoch again.

    The position belongs to something else, so samples would be lost or read twice.
    """


class UnreadableSample(CheckpointError, ValueError):  # noqa: N818
    """Fix the file, or leave it out: a sample in it is not valid in its format."""


class Internal(CheckpointError):  # noqa: N818
    """Report a bug: the engine violated one of its invariants and refuses further work."""


def reason_of(error: BaseException) -> str:
    """Return an error's class and message, as part of another error or for another rank.

    The hint is left out: what quotes this has one of its own.
    """
    text = error.summary if isinstance(error, CheckpointError) else str(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
