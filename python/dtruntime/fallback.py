"""Which checkpoint is read when none is named, and what happens when it cannot be.

Always holds: the newest checkpoint that verifies is taken; falling back is logged and reported; a
checkpoint that its writer replaced or deleted meanwhile is looked up anew, not called damaged.
"""

from __future__ import annotations

import contextlib
import errno
import logging
from typing import TYPE_CHECKING, TypeVar

from dtruntime.errors import (
    CheckpointError,
    CheckpointNotFound,
    Corrupt,
    InvalidArgument,
    StorageError,
)

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Sequence

    from dtruntime import _native

_T = TypeVar("_T")
_logger = logging.getLogger("dtruntime")


class Shards:
    """What this rank reads of each step: its own shard, or that of a rank that was named."""

    def __init__(
        self,
        native: _native.Manager,
        from_rank: int | None,
        *,
        awaits_upload: bool = False,
        alone: bool = False,
    ) -> None:
        """Refer to the shards of a store; parts of other ranks may still be on their way there.

        With ``alone``, the shard of a rank is opened for what lies in it and in no other.
        """
        self.native = native
        self.failed: dict[int, str] = {}
        """Steps that do not verify, with reasons."""
        self._rank = from_rank
        self._awaits_upload = awaits_upload
        self._alone = alone

    def open(self, step: int) -> _native.Checkpoint:
        """Open that of one step."""
        try:
            return self.native.checkpoint(step, self._rank, self._alone)
        except CheckpointNotFound:
            if not self._awaits_upload or not self._arrives(step):
                raise
        return self.native.checkpoint(step, self._rank, self._alone)

    def explained(self, error: InvalidArgument) -> InvalidArgument:
        """Say how it came to a step that is not the one that the caller meant."""
        newer = "; ".join(f"step {n} does not verify: {why}" for n, why in self.failed.items())
        return InvalidArgument(error.what, f"{error.why}; {newer}", error.hint)

    def _arrives(self, step: int) -> bool:
        """Wait until every rank has brought its part; False if it is not on its way."""
        _logger.info("step %d: waiting until every rank has brought its part", step)
        try:
            return self.native.uploaded(step, _ARRIVAL_SECONDS) is not None
        except CheckpointError as error:
            _logger.info("step %d does not arrive: %s", step, error)
            return False


def read_step(
    shards: Shards, step: int, read: Callable[[_native.Checkpoint], _T]
) -> tuple[_native.Checkpoint, _T]:
    """Read one step; once more if its writer replaced it under our feet."""
    try:
        return _read_as_it_stands(shards, step, read)
    except InvalidArgument as error:
        if not shards.failed:
            raise
        raise shards.explained(error) from error


def _read_as_it_stands(
    shards: Shards, step: int, read: Callable[[_native.Checkpoint], _T]
) -> tuple[_native.Checkpoint, _T]:
    checkpoint = shards.open(step)
    try:
        return checkpoint, read(checkpoint)
    except (Corrupt, CheckpointNotFound, StorageError):
        again = shards.open(step)
        if again.attempt == checkpoint.attempt:
            raise
    return again, read(again)


def read_newest(
    shards: Shards,
    store: str | os.PathLike[str],
    read: Callable[[_native.Checkpoint], _T],
) -> tuple[_native.Checkpoint, _T, dict[int, str]]:
    """Read the newest checkpoint that verifies; give the newer ones that do not, with reasons."""
    failed = shards.failed
    vanished: set[int] = set()
    first_error: CheckpointError | None = None
    while True:
        # Listed anew each time: the writer may have replaced what vanished by something newer.
        candidates = {step: why for step, why, _ in shards.native.candidates()}
        left = [s for s in candidates if s not in failed and s not in vanished]
        if not left:
            raise nothing_readable(store, failed) from first_error
        step = left[-1]
        try:
            checkpoint, result = read_step(shards, step, read)
        except (Corrupt, StorageError, CheckpointNotFound) as error:
            if isinstance(error, CheckpointNotFound) and candidates[step] is None:
                vanished.add(step)  # its writer deleted it meanwhile
                continue
            if isinstance(error, StorageError) and not _is_damage(error):
                raise
            failed[step] = f"{error.what}: {error.why}"
            first_error = first_error or error
            _logger.warning("step %d does not verify, trying an older one: %s", step, error)
        else:
            if failed:
                newer = ", ".join(map(str, sorted(failed)))
                _logger.warning("fell back to step %d from %s", step, newer)
            return checkpoint, result, failed


def read_agreed(
    shards: Shards,
    store: str | os.PathLike[str],
    read: Callable[[_native.Checkpoint], _T],
    timeout: float,
) -> tuple[_native.Checkpoint, _T, dict[int, str]]:
    """Read the newest checkpoint that verifies on every rank.

    Every rank offers what it can load, all read the newest common one, and offer again: if one
    could not, all of them go on to an older one.
    """
    native = shards.native
    failed = shards.failed
    failed.update((step, why) for step, why, _ in native.candidates() if why is not None)
    done: tuple[_native.Checkpoint, _T] | None = None
    while True:
        offered = [s for s, why, _ in native.candidates() if why is None and s not in failed]
        # Once loaded, others may take long over theirs; one that is lost ends the wait.
        patience = timeout if done is None else _LOADING_SECONDS
        step = native.agree(offered[-_OFFERED_MAX:], patience)
        if step is None:
            raise _nothing_common(store, offered, failed)
        if done is not None and done[0].step == step:
            newer = {number: why for number, why in failed.items() if number > step}
            return *done, newer
        try:
            done = read_step(shards, step, read)
        except (Corrupt, StorageError, CheckpointNotFound) as error:
            if isinstance(error, StorageError) and not _is_damage(error):
                _leave_agreement(native)
                raise
            done = None
            failed[step] = f"{error.what}: {error.why}"
            _logger.warning("step %d does not verify on this rank: %s", step, error)
        except BaseException:  # Ctrl-C, too: the process may live on
            _leave_agreement(native)
            raise


def _leave_agreement(native: _native.Manager) -> None:
    """Offer nothing, so that the others do not wait for a rank that gave up."""
    with contextlib.suppress(CheckpointError):
        native.agree([], _FAREWELL_SECONDS)


def no_checkpoint(store: str | os.PathLike[str]) -> CheckpointNotFound:
    """Give the error of an empty store."""
    return CheckpointNotFound(
        f"looking for the newest checkpoint in `{store}`",
        "there is none",
        "save one first, or check the path",
    )


def no_metric(store: str | os.PathLike[str], metric: str, steps: Sequence[int]) -> CheckpointError:
    """Give the error of a store where nothing tells which checkpoint is best."""
    if not steps:
        return no_checkpoint(store)
    return CheckpointNotFound(
        f"looking for the best checkpoint in `{store}`",
        f"none of {len(steps)} has a number `{metric}` in its metadata",
        f"save with `metadata={{{metric!r}: ...}}`; `metadata(step)` gives what one has",
    )


_OFFERED_MAX = 1000
"""Newest steps that a rank offers to load."""
_LOADING_SECONDS = 6 * 3600.0
"""How long ranks may differ in loading the same step."""
_ARRIVAL_SECONDS = 3600.0
"""How long what other ranks hold of a step may take to arrive in the remote store."""
_FAREWELL_SECONDS = 10.0

_MEDIUM_ERRORS = frozenset(
    (
        errno.EIO,
        errno.ENOENT,
        errno.ENODATA,  # an unreadable sector
        errno.EILSEQ,  # a sector whose protection data do not fit
        errno.EUCLEAN,  # a filesystem's own structures
        errno.EBADMSG,
        errno.EREMOTEIO,
    )
)
"""What the medium says of one file, and not of the store."""


def _is_damage(error: StorageError) -> bool:
    """Tell what this checkpoint has from what any other would have, too."""
    return error.errno in _MEDIUM_ERRORS


def _nothing_common(
    store: str | os.PathLike[str], offered: list[int], failed: dict[int, str]
) -> CheckpointError:
    if not offered and not failed:
        return no_checkpoint(store)
    damaged = "; ".join(f"step {step}: {why}" for step, why in sorted(failed.items()))
    return Corrupt(
        f"looking for a checkpoint in `{store}` that every rank can load",
        f"this rank can load {offered or 'none'}, and others none of these"
        + (f"; {damaged}" if damaged else ""),
        "run `ckpt-tool verify --all`; check that every rank was given the same store",
    )


def nothing_readable(store: str | os.PathLike[str], failed: dict[int, str]) -> CheckpointError:
    """Give the error of a store of which no checkpoint can be read, for these reasons."""
    if not failed:
        return no_checkpoint(store)
    return Corrupt(
        f"looking for a checkpoint that verifies in `{store}`",
        f"all {len(failed)} are damaged; "
        + "; ".join(f"step {step}: {why}" for step, why in sorted(failed.items())),
        "run `ckpt-tool verify --all` to see what is damaged, and look at the device",
    )
