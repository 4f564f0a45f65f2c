"""What a manager reads from: which checkpoint, whose shards, and what is recorded about the load.

Always holds: what was read is protected from retention, and known to the training's lineage; if
several ranks write, all of them read the same step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from dtruntime import settings
from dtruntime.loading import fallback
from dtruntime.loading.reader import Reader
from dtruntime.reports import LoadReport

if TYPE_CHECKING:
    import os
    from collections.abc import Callable

    from dtruntime import _native
    from dtruntime.lineage import Lineage

_T = TypeVar("_T")

_RANK_MAX = 2**32 - 1


class ReadOptions(NamedTuple):
    """How a manager reads.

    Attributes:
        verify: Whether chunks are checked against their checksums.
        agreement_timeout: How long to wait for the other ranks, in seconds; None if this rank
            loads alone.
        has_uploads: Whether checkpoints are uploaded to a remote store.

    """

    verify: bool
    agreement_timeout: float | None
    has_uploads: bool


class Source:
    """The checkpoints of one store, for reading."""

    def __init__(
        self,
        native: _native.Manager,
        path: str | os.PathLike[str],
        lineage: Lineage,
        options: ReadOptions,
    ) -> None:
        self._native = native
        self._path = path
        self._lineage = lineage
        self._options = options
        self.last_load: LoadReport | None = None

    def reader(self, checkpoint: _native.Checkpoint, **how: Any) -> Reader:
        """Return a reader of an open checkpoint."""
        return Reader(
            checkpoint,
            verify=self._options.verify,
            open_rank=lambda rank: self.open_beside(checkpoint, rank),
            **how,
        )

    def open_beside(self, own: _native.Checkpoint, rank: int) -> _native.Checkpoint:
        """Open another rank's shard of the same checkpoint, once it has arrived."""
        return self._shards(rank).open_beside(own, rank)

    def read(
        self,
        step: int | None,
        from_rank: int | None,
        read: Callable[[_native.Checkpoint], _T],
    ) -> tuple[_T, LoadReport]:
        """Read the given step, or the newest that verifies, and protect it from retention."""
        # Ranks have 32 bits in the format: a larger one does not exist in any checkpoint.
        rank = None if from_rank is None else settings.integer("from_rank", from_rank)
        shards = self._shards(None if rank is None else min(rank, _RANK_MAX))
        timeout = self._options.agreement_timeout
        if step is None:
            shards.failed.update(self._lineage.passed_over())
        if step is not None:
            number = settings.step_of(step, "load(step=...)")
            checkpoint, result = fallback.read_step(shards, number, read)
            failed: dict[int, str] = {}
        elif timeout is not None:
            checkpoint, result, failed = fallback.read_agreed(
                shards, self._path, read, timeout, has_own_store=self._options.has_uploads
            )
        else:
            checkpoint, result, failed = fallback.read_newest(shards, self._path, read)
        manifest = checkpoint.manifest()
        fell_back_from = tuple(sorted(failed.items(), reverse=True))
        report = LoadReport(
            checkpoint.step,
            fell_back_from,
            manifest["metadata"],
            manifest["dataset_positions"],
            manifest["world_size"],
        )
        self._native.protect(checkpoint.step)
        if step is None:
            # With several ranks, it may be another one that could not load the later steps.
            fell_back = bool(failed) or timeout is not None
            self._lineage.note_loaded(checkpoint.step, failed, later_are_unsound=fell_back)
        self.last_load = report
        return result, report

    def _shards(self, rank: int | None) -> fallback.Shards:
        agrees = self._options.agreement_timeout is not None
        return fallback.Shards(
            self._native, rank, awaits_upload=self._options.has_uploads and agrees
        )
