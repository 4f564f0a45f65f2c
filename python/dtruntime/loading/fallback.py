"""Which checkpoint is read if no step is given, and what happens if it cannot be read.

Always holds: the newest checkpoint that verifies is read; falling back is logged and reported; a
checkpoint that its writer replaced or deleted in the meantime is looked up again, not reported as
damaged.
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
    LoadAborted,
    StorageError,
)
from dtruntime.messages import listed

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator, Sequence

    from dtruntime import _native

_T = TypeVar("_T")
_logger = logging.getLogger("dtruntime")


class Shards:
    """What this rank reads of each step: its own shard, or that of a given rank."""

    def __init__(
        self,
        native: _native.Manager,
        from_rank: int | None,
        *,
        awaits_upload: bool = False,
    ) -> None:
        """Refer to the shards of a store; other ranks may still be uploading theirs."""
        self.native = native
        self.failed: dict[int, str] = {}
        """Steps that do not verify, with reasons."""
        self._rank = from_rank
        self._awaits_upload = awaits_upload

    def open(self, step: int) -> _native.Checkpoint:
        """Open the shard of one step."""
        return self._once_arrived(step, lambda: self.open_now(step))

    def open_now(self, step: int) -> _native.Checkpoint:
        """Open it without waiting for uploads."""
        return self.native.checkpoint(step, self._rank)

    def open_beside(self, own: _native.Checkpoint, rank: int) -> _native.Checkpoint:
        """Open another rank's shard of the same checkpoint, for what only that shard has."""
        return self._once_arrived(own.step, lambda: self.native.shard_beside(own, rank))

    def _once_arrived(
        self, step: int, opened: Callable[[], _native.Checkpoint]
    ) -> _native.Checkpoint:
        try:
            return opened()
        except CheckpointNotFound:
            if not self._awaits_upload or not self._arrives(step):
                raise
        return opened()

    def explained(self, error: InvalidArgument) -> InvalidArgument:
        """Return an error with the reason why newer steps were not read."""
        newer = "; ".join(f"step {n} does not verify: {why}" for n, why in self.failed.items())
        return InvalidArgument(error.what, f"{error.why}; {newer}", error.hint)

    def _arrives(self, step: int) -> bool:
        """Wait until every rank has uploaded its part; False if it is not being uploaded."""
        _logger.info("step %d: waiting until every rank has uploaded its part", step)
        try:
            return self.native.uploaded(step, _ARRIVAL_SECONDS) is not None
        except CheckpointError as error:
            _logger.info("step %d was not uploaded: %s", step, error)
            return False


def read_step(
    shards: Shards, step: int, read: Callable[[_native.Checkpoint], _T]
) -> tuple[_native.Checkpoint, _T]:
    """Read one step; once more if its writer replaced it while it was being read."""
    try:
        return _read_once(shards, step, read)
    except InvalidArgument as error:
        if not shards.failed:
            raise
        raise shards.explained(error) from error


def _read_once(
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
    """Read the newest checkpoint that verifies; also return the newer ones, with reasons."""
    failed = shards.failed
    vanished: set[int] = set()
    first_error: CheckpointError | None = None
    while True:
        # Listed again each time: the writer may have replaced what vanished by something newer.
        candidates = {step: why for step, why, _ in shards.native.candidates()}
        left = [s for s in candidates if s not in failed and s not in vanished]
        if not left:
            raise nothing_readable(store, failed) from first_error
        step = left[-1]
        try:
            checkpoint, result = read_step(shards, step, read)
        except (Corrupt, StorageError, CheckpointNotFound) as error:
            if isinstance(error, CheckpointNotFound) and candidates[step] is None:
                vanished.add(step)  # its writer deleted it in the meantime
                continue
            if isinstance(error, StorageError) and not _is_damage(error):
                raise
            failed[step] = error.summary
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
    *,
    has_own_store: bool,
) -> tuple[_native.Checkpoint, _T, dict[int, str]]:
    """Read the newest checkpoint that verifies on every rank.

    Every rank offers the steps that it can load, all read the newest common one, and offer again:
    if one could not read it, all of them continue with an older one. If nothing is left, or a rank
    gives up, every rank raises the same error.

    Args:
        shards: What this rank reads of each step.
        store: The store, for messages.
        read: Reads a checkpoint.
        timeout: How long to wait for the other ranks, in seconds.
        has_own_store: Whether ranks may have per-rank directories.

    """
    native = shards.native
    failed = shards.failed
    done: tuple[_native.Checkpoint, _T] | None = None
    patience = timeout
    while True:
        with _announcing_failure(native, patience):
            candidates = native.candidates()
            _recheck_newer(shards, candidates)
        if done is None:
            failed.update((step, why) for step, why, _ in candidates if why is not None)
        offered = [s for s, why, _ in candidates if why is None and s not in failed]
        damage = "; ".join(f"step {number}: {failed[number]}" for number in sorted(failed)[-3:])
        step, failure, offering = native.agree(offered[-_OFFERED_MAX:], patience, damage)
        # From now on other ranks may take long to load; the loss of one ends the wait.
        patience = _LOADING_SECONDS
        if failure is not None:
            rank, why, gave_up = failure
            raise _failed_on_rank(store, rank, why, gave_up=gave_up)
        if step is None:
            raise _nothing_common(store, offered, failed, offering, has_own_store=has_own_store)
        if done is not None and done[0].step == step:
            newer = {number: why for number, why in failed.items() if number > step}
            return *done, newer
        done = None
        with _announcing_failure(native, patience):
            try:
                done = read_step(shards, step, read)
            except (Corrupt, StorageError, CheckpointNotFound) as error:
                if isinstance(error, StorageError) and not _is_damage(error):
                    raise
                failed[step] = error.summary
                _logger.warning("step %d does not verify on this rank: %s", step, error)


def _recheck_newer(
    shards: Shards, candidates: Sequence[tuple[int, str | None, str | None]]
) -> None:
    """Check newer steps that seem damaged once more: an unreachable remote store is not damage.

    Raises:
        Unavailable: The remote store, which may have one of them undamaged, cannot be reached.

    """
    newest = max((step for step, why, _ in candidates if why is None), default=-1)
    for step, why, _ in candidates:
        if why is not None and step > newest and step not in shards.failed:
            # At once: the other ranks wait for what this one offers.
            with contextlib.suppress(Corrupt, StorageError, CheckpointNotFound):
                shards.open_now(step)


@contextlib.contextmanager
def _announcing_failure(native: _native.Manager, patience: float) -> Iterator[None]:
    """Tell the other ranks if this one gives up: they get the reason, instead of waiting for it."""
    try:
        yield
    except BaseException as error:  # Ctrl-C, too: the process may continue
        if isinstance(error, CheckpointError):
            why = error.summary
        else:
            why = f"{type(error).__name__}: {error}"
        # They receive it once they have loaded. After an interrupt, do not wait for that.
        _logger.warning("giving up, and telling the other ranks: %s", why)
        is_interrupted = not isinstance(error, Exception)
        with contextlib.suppress(CheckpointError):
            native.agree([], _ANNOUNCEMENT_SECONDS if is_interrupted else patience, gives_up=why)
        raise


def no_checkpoint(store: str | os.PathLike[str]) -> CheckpointNotFound:
    """Return the error for an empty store."""
    return CheckpointNotFound(
        f"looking for the newest checkpoint in `{store}`",
        "there is none",
        "save one first, or check the path",
    )


def no_metric(store: str | os.PathLike[str], metric: str, steps: Sequence[int]) -> CheckpointError:
    """Return the error for a store in which no checkpoint has the metric."""
    if not steps:
        return no_checkpoint(store)
    return CheckpointNotFound(
        f"looking for the best checkpoint in `{store}`",
        f"none of {len(steps)} has a number `{metric}` in its metadata",
        f"save with `metadata={{{metric!r}: ...}}`; `metadata(step)` shows what a checkpoint has",
    )


_SHOWN_MAX = 5
"""Steps that a message names."""
_OFFERED_MAX = 1000
"""Newest steps that a rank offers to load."""
_LOADING_SECONDS = 6 * 3600.0
"""How much longer than this rank the others may take to load a step."""
_ARRIVAL_SECONDS = 3600.0
"""How long other ranks may take to upload their parts of a step to the remote store."""
_ANNOUNCEMENT_SECONDS = 10.0

_MEDIUM_ERRORS = frozenset(
    (
        errno.EIO,
        errno.ENOENT,
        errno.ENODATA,  # an unreadable sector
        errno.EILSEQ,  # a sector whose protection data does not match
        errno.EUCLEAN,  # a corrupt structure of the filesystem
        errno.EBADMSG,
        errno.EREMOTEIO,
    )
)
"""Errors of the medium that concern one file, and not the whole store."""


def _is_damage(error: StorageError) -> bool:
    """Return whether an error concerns this checkpoint only, and not every one in the store."""
    return error.errno in _MEDIUM_ERRORS


def _failed_on_rank(
    store: str | os.PathLike[str], rank: int, why: str, *, gave_up: bool
) -> CheckpointError:
    what = f"looking for a checkpoint in `{store}` that every rank can load"
    if gave_up:
        hint = "fix what that rank reports, then load again on every rank"
        return LoadAborted(what, f"rank {rank} gave up: {why}", hint)
    hint = "run `ckpt-tool verify --all` to see what is damaged, and check the device"
    return Corrupt(what, f"no step is left; rank {rank} cannot read {why}", hint)


def _nothing_common(
    store: str | os.PathLike[str],
    offered: list[int],
    failed: dict[int, str],
    offering: int,
    *,
    has_own_store: bool,
) -> CheckpointError:
    if not (offering or offered or failed):
        return no_checkpoint(store)
    what = f"looking for a checkpoint in `{store}` that every rank has"
    newest_first = list(map(str, reversed(offered)))
    have = f"this rank has {'steps ' + listed(newest_first, _SHOWN_MAX) if offered else 'none'}"
    if not offering:
        return Corrupt(
            what,
            f"there is none: {have}; the coordinator is an older version that does not say why",
            "run `ckpt-tool verify --all`; check that every rank was given the same store",
        )
    if has_own_store:
        return LoadAborted(
            what,
            f"there is none: {have}, ranks that have some: {offering}",
            "restore the missing directory, or mount it; uploads to the remote store may still "
            "finish. To start over, end all ranks and delete the contents of the directories",
        )
    return InvalidArgument(
        what,
        f"the ranks see different ones: {have}, and {offering} ranks have some",
        "check that every rank was given the same store, and that it is mounted everywhere",
    )


def nothing_readable(store: str | os.PathLike[str], failed: dict[int, str]) -> CheckpointError:
    """Return the error for a store in which no checkpoint can be read, with the reasons."""
    if not failed:
        return no_checkpoint(store)
    return Corrupt(
        f"looking for a checkpoint that verifies in `{store}`",
        f"all {len(failed)} are damaged; "
        + "; ".join(f"step {step}: {why}" for step, why in sorted(failed.items())),
        "run `ckpt-tool verify --all` to see what is damaged, and check the device",
    )
