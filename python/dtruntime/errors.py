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


class Closed(CheckpointError):  # noqa: N818
    """Open a new manager: this one was closed, or belongs to the parent of a forked process."""


class Internal(CheckpointError):  # noqa: N818
    """Report a bug: the engine broke one of its own rules and refuses further work."""
