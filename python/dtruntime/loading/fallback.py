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
    LoadAborted,
    StorageError,
)

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator, Sequence

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
    ) -> None:
        """Refer to the shards of a store; parts of other ranks may still be on their way there."""
        self.native = native
        self.failed: dict[int, str] = {}
        """Steps that do not verify, with reasons."""
        self._rank = from_rank
        self._awaits_upload = awaits_upload

    def open(self, step: int) -> _native.Checkpoint:
        """Open that of one step."""
        return self._once_arrived(step, lambda: self.open_now(step))

    def open_now(self, step: int) -> _native.Checkpoint:
        """Open it without waiting for what is on its way."""
        return self.native.checkpoint(step, self._rank)

    def open_beside(self, own: _native.Checkpoint, rank: int) -> _native.Checkpoint:
        """Open what a rank saved of the same checkpoint, for what lies in its shard alone."""
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
    *,
    has_own_store: bool,
) -> tuple[_native.Checkpoint, _T, dict[int, str]]:
    """Read the newest checkpoint that verifies on every rank.

    Every rank offers what it can load, all read the newest common one, and offer again: if one
    could not, all of them go on to an older one. Where nothing is left, or a rank gives up, every
    rank hears the same.

    Args:
        shards: What this rank reads of each step.
        store: The store, for messages.
        read: Reads a checkpoint.
        timeout: How long to wait for the other ranks, in seconds.
        has_own_store: Whether other ranks may have a directory of their own.

    """
    native = shards.native
    failed = shards.failed
    done: tuple[_native.Checkpoint, _T] | None = None
    patience = timeout
    while True:
        with _farewell(native, patience):
            candidates = native.candidates()
            _ask_again(shards, candidates)
        if done is None:
            failed.update((step, why) for step, why, _ in candidates if why is not None)
        offered = [s for s, why, _ in candidates if why is None and s not in failed]
        damage = "; ".join(f"step {number}: {failed[number]}" for number in sorted(failed)[-3:])
        step, hindrance, offering = native.agree(offered[-_OFFERED_MAX:], patience, damage)
        # From now on others may take long over their loads; one that is lost ends the wait.
        patience = _LOADING_SECONDS
        if hindrance is not None:
            rank, why, gave_up = hindrance
            raise _hindered(store, rank, why, gave_up=gave_up)
        if step is None:
            raise _nothing_common(store, offered, failed, offering, has_own_store=has_own_store)
        if done is not None and done[0].step == step:
            newer = {number: why for number, why in failed.items() if number > step}
            return *done, newer
        done = None
        with _farewell(native, patience):
            try:
                done = read_step(shards, step, read)
            except (Corrupt, StorageError, CheckpointNotFound) as error:
                if isinstance(error, StorageError) and not _is_damage(error):
                    raise
                failed[step] = f"{error.what}: {error.why}"
                _logger.warning("step %d does not verify on this rank: %s", step, error)


def _ask_again(shards: Shards, candidates: Sequence[tuple[int, str | None, str | None]]) -> None:
    """Look once more at newer steps that look damaged: a far store that is away is no damage.

    Raises:
        Unavailable: It may have one of them whole.

    """
    newest = max((step for step, why, _ in candidates if why is None), default=-1)
    for step, why, _ in candidates:
        if why is not None and step > newest and step not in shards.failed:
            # At once: the other ranks wait for what this one offers.
            with contextlib.suppress(Corrupt, StorageError, CheckpointNotFound):
                shards.open_now(step)


@contextlib.contextmanager
def _farewell(native: _native.Manager, patience: float) -> Iterator[None]:
    """Tell the other ranks if this one gives up: they hear why, instead of waiting for it."""
    try:
        yield
    except BaseException as error:  # Ctrl-C, too: the process may live on
        if isinstance(error, CheckpointError):
            why = f"{error.what}: {error.why}"
        else:
            why = f"{type(error).__name__}: {error}"
        # They hear it when they have loaded. Who was interrupted does not wait for that.
        _logger.warning("giving up, and telling the other ranks: %s", why)
        is_asked_to_end = not isinstance(error, Exception)
        with contextlib.suppress(CheckpointError):
            native.agree([], _FAREWELL_SECONDS if is_asked_to_end else patience, gives_up=why)
        raise


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


_SHOWN_MAX = 5
"""Steps that a message names."""
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


def _hindered(
    store: str | os.PathLike[str], rank: int, why: str, *, gave_up: bool
) -> CheckpointError:
    what = f"looking for a checkpoint in `{store}` that every rank can load"
    if gave_up:
        hint = "mend what that rank says, then load on every rank again"
        return LoadAborted(what, f"rank {rank} gave up: {why}", hint)
    hint = "run `ckpt-tool verify --all` to see what is damaged, and look at the device"
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
    have = f"this one has {_shown(offered)}" if offered else "this one has none"
    if not offering:
        return Corrupt(
            what,
            f"there is none: {have}; the coordinator, of an older version, does not say why",
            "run `ckpt-tool verify --all`; check that every rank was given the same store",
        )
    if has_own_store:
        return LoadAborted(
            what,
            f"there is none: {have}, ranks that have some: {offering}",
            "bring back the directory that is missing, or mount it; what is on its way to the "
            "remote store may arrive. To begin without, end all ranks and delete what the "
            "directories hold",
        )
    return InvalidArgument(
        what,
        f"the ranks see different ones: {have}, and {offering} ranks have some",
        "check that every rank was given the same store, and that it is mounted everywhere",
    )


def _shown(steps: list[int]) -> str:
    few = ", ".join(map(str, steps[-_SHOWN_MAX:]))
    more = len(steps) - _SHOWN_MAX
    return f"steps {few}" if more <= 0 else f"{more} steps and {few}"


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
