"""Adapter for ``torch.distributed.checkpoint``: its ``save`` and ``load`` on a manager's store.

>>> import torch.distributed.checkpoint as dcp
>>> from dtruntime.dcp import StorageReader, StorageWriter
>>> with CheckpointManager("runs/gpt", keep_last_n=5) as manager:
...     dcp.save(state, storage_writer=StorageWriter(manager, step=1000))
...     dcp.load(state, storage_reader=StorageReader(manager))

Always holds: ``write_data`` returns once the checkpoint is durable on every rank, and raises if it
is not; a rank that fails in it tells the others. (One whose planner's ``finish_plan`` raises never
reaches it, and torch leaves the others waiting.)
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import threading
from typing import TYPE_CHECKING, Any, NoReturn

from torch.distributed.checkpoint import storage
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import LoadItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from dtruntime import settings
from dtruntime.dcp import planned
from dtruntime.errors import InvalidArgument, RestoreIncomplete, reason_of
from dtruntime.opened import opened_by
from dtruntime.saving.handle import order_after_copies
from dtruntime.state.sharded_tensors import Box
from dtruntime.state.state_tree import collector_paused

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch.distributed.checkpoint.planner import (
        LoadPlan,
        LoadPlanner,
        ReadItem,
        SavePlan,
        SavePlanner,
        WriteItem,
    )

    from dtruntime import _native
    from dtruntime.checkpoint import CheckpointManager
    from dtruntime.opened import Options
    from dtruntime.saving.saver import Saver

__all__ = ["StorageReader", "StorageWriter"]

_STEP = re.compile(r"(?:.*[^0-9])?([0-9]{1,20})", re.DOTALL)


class StorageWriter(storage.StorageWriter):
    """The destination of ``dcp.save`` and ``dcp.async_save``: a checkpoint of a manager.

    Every rank creates one, with a manager that is open on every rank. What the planner assigns to a
    rank is its part of the checkpoint; the manager compresses, checks and commits it, applies its
    retention, and uploads it.

    ``manager.load(from_rank=0)`` can also read it: plain values and tensors without dimensions that
    rank 0 held, and the other tensors of all ranks (if a custom planner changes values, only what
    rank 0 saved). Keys are strings there, as in planners, and parameters are plain tensors; a list
    of tensors or dicts is a dict by position, and a dict or tuple that a planner treats as one
    value is wrapped in a tuple.

    Args:
        manager: The manager. The planner deduplicates what is identical on all ranks, so it is
            opened without ``replicated``.
        step: The training step. Default: the number at the end of ``checkpoint_id``, as in
            ``dcp.save(..., checkpoint_id="step-1000")``; the rest of that is ignored.
        rewind: As for ``manager.save_async``.
        metadata: As for ``manager.save_async``.

    Raises:
        InvalidArgument: An argument is out of its range.

    >>> dcp.save({"model": model.state_dict()}, storage_writer=StorageWriter(manager, step=1000))

    """

    def __init__(
        self,
        manager: CheckpointManager,
        step: int | None = None,
        *,
        rewind: bool = False,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        settings.json_object("metadata", metadata)
        self._manager = manager
        self._step = _Step(step, "StorageWriter")
        self._rewind = bool(rewind)
        self._metadata = metadata
        self._call = _Call()
        if opened_by(manager).saver.rules.replication is not None:
            raise InvalidArgument(
                "a StorageWriter on a manager with `replicated`",
                "the planner decides which rank saves what is identical on all of them",
                "open the manager without `replicated`",
            )

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Return whether ``checkpoint_id`` names a step."""
        return _step_in(checkpoint_id) is not None

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Take the step of the next save from ``checkpoint_id``, if there is one."""
        self._step.name(checkpoint_id)

    def storage_meta(self) -> StorageMeta:
        """Return the checkpoint's name, for torch's log."""
        return StorageMeta(checkpoint_id=f"{os.fspath(self._manager.path)}: {self._step}")

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Check that this rank and the manager's rank are the same."""
        self._call.step, self._call.plans = self._step.take(), None
        if self._call.step is None:
            raise InvalidArgument(
                "`dcp.save` without a step",
                "every checkpoint belongs to a training step",
                "pass `StorageWriter(manager, step=1000)`, or `checkpoint_id='step-1000'`",
            )
        options = opened_by(self._manager).options
        _check_rank(options, kwargs.get("rank"), "dcp.save", is_coordinator=is_coordinator)
        if options.world_size > 1 and not kwargs.get("use_collectives", True):
            raise InvalidArgument(
                "`dcp.save` with `use_collectives=False`",
                "ranks that plan separately do not know which of them saves shared values",
                "leave it out, or save with `manager.save_async`",
            )

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Return the plan unchanged."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Record what the other ranks save: this is the planning rank."""
        ranks = opened_by(self._manager).options.world_size
        if len(plans) != ranks:
            raise InvalidArgument(
                f"`dcp.save` of {len(plans)} ranks",
                f"the manager was opened for {ranks}",
                "save with the process group of all ranks that opened the manager; for fewer, or "
                "for `no_dist=True`, open it with their `rank=` and `world_size=`, on a separate "
                "store",
            )
        self._call.plans = plans
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Save what the plan assigns to this rank, and wait until the checkpoint is durable."""
        opened, call = opened_by(self._manager), self._call
        assert call.step is not None  # noqa: S101  (`set_up_storage_writer` checks it)
        with opened.saver.declining(call.step):
            is_alone = opened.options.world_size == 1
            state = planned.state_of(plan, planner, is_alone=is_alone)
            if call.plans is not None:
                # With cached plans torch passes only the changes, and the planner has them all.
                plans = getattr(planner, "global_plan", call.plans)
                planned.add_known(state, plan, planner, plans)
        with _without_advice(opened.saver):
            self._manager.save(
                state,
                call.step,
                rewind=self._rewind,
                metadata=self._metadata,
                consistency="strict",
            )
        done: Future[list[WriteResult]] = Future()
        done.set_result([WriteResult(item.index, _bytes_of(item), None) for item in plan.items])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Do nothing: the ranks have already committed the checkpoint together."""

    def __reduce__(self) -> NoReturn:
        raise InvalidArgument(
            "passing a StorageWriter to another process",
            "its manager holds the store and memory of this process",
            "use `async_checkpointer_type=AsyncCheckpointerType.THREAD`: the engine's threads do "
            "not block Python",
        )


class StorageReader(storage.StorageReader):
    """The source of ``dcp.load``: a checkpoint of a manager, saved through DCP or not.

    Any number of ranks can read what any other number saved. Data is read straight into the tensors
    of the state, and checked on the way: after an error they are a mixture, as always with
    ``dcp.load``, and the manager refuses to save until a load has succeeded.

    Args:
        manager: The manager; it may be ``read_only``.
        step: The checkpoint. Default: the number at the end of ``checkpoint_id``, else the newest
            whose manifest and indexes verify on every rank.
        from_rank: Whose values are read where each rank saved its own, as ``manager.save_async``
            allows. Default: this rank's, if the manager was opened for as many ranks.

    >>> dcp.load(state, storage_reader=StorageReader(manager))

    """

    def __init__(
        self,
        manager: CheckpointManager,
        step: int | None = None,
        *,
        from_rank: int | None = None,
    ) -> None:
        self._manager = manager
        self._step = _Step(step, "StorageReader")
        rank = None if from_rank is None else settings.integer("from_rank", from_rank)
        self._from_rank = rank
        self._saved: planned.Saved | None = None
        self._error: Exception | None = None
        self._is_named = False

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Return whether ``checkpoint_id`` names a step."""
        return _step_in(checkpoint_id) is not None

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Take the step of the next load from ``checkpoint_id``, if there is one."""
        self._step.name(checkpoint_id)

    # Without `**kwargs`: with it, torch would call again for per-rank metadata.
    def read_metadata(self, *args: Any) -> Metadata:  # noqa: ARG002
        """Open what all ranks saved of the checkpoint."""
        self._saved = self._error = None
        try:
            with collector_paused():
                # Rank 0's shard exists however many ranks saved.
                step, source = self._step.take(), opened_by(self._manager).source
                self._is_named = step is not None
                saved, _ = source.read(step, 0, self._open)
                metadata = saved.metadata()
        except Exception as raised:  # noqa: BLE001  (torch would turn it into an `AssertionError`)
            error = self._error = raised
            return Metadata(planned.Described(lambda _: error), planner_data={})
        self._saved = saved
        return metadata

    def set_up_storage_reader(
        self,
        metadata: Metadata,  # noqa: ARG002
        is_coordinator: bool,
        *args: Any,  # noqa: ARG002
        **kwargs: Any,
    ) -> None:
        """Raise the error with which opening the checkpoint failed, if it did."""
        if self._error is not None:
            raise self._error
        options = opened_by(self._manager).options
        if not options.read_only:
            _check_rank(options, kwargs.get("rank"), "dcp.load", is_coordinator=is_coordinator)

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Add to the plan which checkpoint this rank reads."""
        saved = self._checkpoint()
        return dataclasses.replace(plan, storage_data=(saved.step, saved.attempt))

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Check that all ranks read the same checkpoint."""
        seen = sorted({plan.storage_data for plan in plans if plan.storage_data is not None})
        if len(seen) > 1:
            found = ", ".join(f"step {step} ({attempt})" for step, attempt in seen)
            raise InvalidArgument(
                "`dcp.load` of the newest checkpoint",
                f"the ranks found different ones: {found}",
                "pass its step: `StorageReader(manager, step=...)`; managers that are not "
                "`read_only` agree on one",
            )
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read what the plan requests into the tensors that the planner provides."""
        opened, saved = opened_by(self._manager), self._checkpoint()
        self._saved = None  # its files are closed when this ends
        order_after_copies()  # what is loaded may be what a save still copies
        try:
            tensors: list[tuple[ReadItem, Any]] = []
            for item in plan.items:
                if item.type == LoadItemType.BYTE_IO:
                    planner.load_bytes(item, saved.pickled(item.storage_index.fqn))
                else:
                    tensors.append((item, planner.resolve_tensor(item).detach()))
            saved.read_into(
                ((item.storage_index, _box_of(item), target) for item, target in tensors),
                verify=opened.options.verify_on_load,
            )
            for item, target in tensors:
                planner.commit_tensor(item, target)
        except BaseException as error:
            opened.incomplete = RestoreIncomplete(
                f"`dcp.load` of step {saved.step}", reason_of(error), "load again"
            )
            raise
        opened.incomplete = None
        opened.lineage.note_restored(saved.step, is_named=self._is_named)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _open(self, first: _native.Checkpoint) -> planned.Saved:
        opened = opened_by(self._manager)
        readers = planned.readers_of(first, opened.source)
        rank = self._from_rank
        if rank is not None and rank >= len(readers):
            raise InvalidArgument(
                f"`StorageReader(from_rank={rank})` on step {first.step}",
                f"{len(readers)} ranks saved it",
                f"pass a rank up to {len(readers) - 1}",
            )
        if rank is None and len(readers) == opened.options.world_size:
            rank = opened.options.rank
        return planned.Saved(first, readers, rank)

    def _checkpoint(self) -> planned.Saved:
        assert self._saved is not None  # noqa: S101  (torch reads the metadata first)
        return self._saved


class _Call(threading.local):
    """The state of one call of ``dcp.save``, per thread: ``dcp.async_save`` runs concurrently."""

    step: int | None = None
    plans: list[SavePlan] | None = None


class _Step(threading.local):
    """The step of a call: from the constructor, or from its ``checkpoint_id``."""

    def __init__(self, step: int | None, owner: str) -> None:
        self._given = None if step is None else settings.step_of(step, f"{owner}(step=...)")
        self._named: int | None = None

    def name(self, checkpoint_id: object) -> None:
        """Set it from the ``checkpoint_id`` of the next call."""
        named = None if checkpoint_id is None else _step_named(checkpoint_id)
        if None not in (named, self._given) and named != self._given:
            raise InvalidArgument(
                f"`checkpoint_id` = {checkpoint_id!r} with `step` = {self._given}",
                "they name two different steps",
                "pass only one of them",
            )
        self._named = named

    def current(self) -> int | None:
        """Return the step; None if none was given."""
        return self._given if self._named is None else self._named

    def take(self) -> int | None:
        """Return the step, and forget the one from ``checkpoint_id``."""
        step, self._named = self.current(), None
        return step

    def __str__(self) -> str:
        return f"step {self.current()}"


@contextlib.contextmanager
def _without_advice(saver: Saver) -> Iterator[None]:
    """Suppress advice that does not apply to states that a planner split."""
    was_advised, saver.has_advised = saver.has_advised, True
    try:
        yield
    finally:
        saver.has_advised = was_advised


def _check_rank(options: Options, rank: int | None, what: str, *, is_coordinator: bool) -> None:
    own = options.rank
    if rank == own or (rank is None and is_coordinator == (own == 0)):
        return
    raise InvalidArgument(
        f"`{what}` as {'another rank' if rank is None else f'rank {rank}'}",
        f"the manager was opened as rank {own} of {options.world_size}",
        "use the process group of all ranks that opened the manager; for one that has fewer, or "
        "for `no_dist=True`, open it with that `rank=` and `world_size=`, on a separate store",
    )


def _step_in(checkpoint_id: object) -> int | None:
    if isinstance(checkpoint_id, int) and not isinstance(checkpoint_id, bool):
        return checkpoint_id
    if not isinstance(checkpoint_id, (str, os.PathLike)):
        return None
    match = _STEP.fullmatch(os.path.basename(os.fspath(checkpoint_id).rstrip("/")))  # noqa: PTH119
    return None if match is None else int(match[1])


def _step_named(checkpoint_id: object) -> int:
    step = _step_in(checkpoint_id)
    if step is None:
        raise InvalidArgument(
            f"`checkpoint_id` = {checkpoint_id!r}",
            "it should end in a number, the training step",
            "pass for example `checkpoint_id='step-1000'`, or `step=1000` to the writer or reader",
        )
    return settings.step_of(step, "checkpoint_id")


def _bytes_of(item: WriteItem) -> int:
    return item.tensor_storage_size() or 0


def _box_of(item: ReadItem) -> Box:
    offset = item.storage_index.offset or (0,) * len(item.lengths)
    at = (start + skipped for start, skipped in zip(offset, item.storage_offsets, strict=True))
    return Box(tuple(at), tuple(item.lengths))
