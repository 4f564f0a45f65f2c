"""What a manager opens: the engine on one store, and everything that works on it.

``CheckpointManager`` is the public interface of an ``OpenedStore``; the adapters and ``lifecycle``
use the ``OpenedStore`` itself. Nothing here is public.

Always holds: an opening that fails, or that a signal interrupts, is undone; a ``close`` that a
signal interrupts resumes with the next one; a forked child closes nothing of its parent's. Nothing
refers back to an ``OpenedStore``: dropping the manager closes the store at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
from typing import TYPE_CHECKING, Any

from dtruntime import _native, lifecycle, settings
from dtruntime.errors import CheckpointError, Closed, InvalidArgument, RestoreIncomplete
from dtruntime.lineage import Lineage
from dtruntime.loading.source import ReadOptions, Source
from dtruntime.ranks import membership
from dtruntime.ranks.job_settings import JobSettings, job_settings_from
from dtruntime.saving.replication import Replication
from dtruntime.saving.saver import Rules, Saver
from dtruntime.saving.watcher import Watcher
from dtruntime.state import gpus

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dtruntime.checkpoint import CheckpointManager
    from dtruntime.location import StoreArguments
    from dtruntime.ranks.connecting import Security

_logger = logging.getLogger("dtruntime")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """The arguments of a manager, checked.

    Attributes:
        store: Those that name the store.
        engine: The engine's settings, without the coordinator's values.
        job: The training run.
        rank: This process's rank.
        world_size: The number of ranks.
        read_only: Whether nothing is written.
        coordinator: Its URL and credentials, if they are given.
        agreement_timeout: How long to wait for other ranks, in seconds.
        replicated: Globs that match what is identical on all ranks.
        keep_last_n: How many of the newest checkpoints to keep; None if that is not given.
        keep_best_n: Likewise of the best.
        best_metric: Key of the number in the metadata that ranks checkpoints; None if not given.
        best_mode: ``min`` or ``max``.
        consistency: What keeps tensors on GPUs from changing before they have been copied.
        verify_on_load: Whether chunks are checked against their checksums.
        save_interval_steps: None if it is not given.
        async_write: None if it is not given.
        shows_progress: Whether saves show a progress bar.
        termination: What SIGTERM does to a save in flight, and how many seconds that may take; None
            if it is not handled.

    """

    store: StoreArguments
    engine: Mapping[str, Any]
    job: str
    rank: int
    world_size: int
    read_only: bool
    coordinator: tuple[str | None, Security | None] = dataclasses.field(repr=False)
    agreement_timeout: float
    replicated: list[str]
    keep_last_n: int | None
    keep_best_n: int | None
    best_metric: str | None
    best_mode: str
    consistency: str
    verify_on_load: bool
    save_interval_steps: int | None
    async_write: bool | None
    shows_progress: bool
    termination: tuple[str, float] | None


class OpenedStore:
    """One open store.

    Attributes:
        options: How it was opened.
        path: The directory, or ``s3://bucket/prefix``.
        save_interval_steps: The interval of saves.
        async_write: Whether ``save_async`` returns before the checkpoint is durable.
        native: The engine.
        lineage: Which checkpoints count as saved.
        source: Reads checkpoints.
        saver: Starts saves.
        watcher: The thread that announces saves; None if it is read-only.
        uploads: The thread that announces uploads; None without a remote store.
        ranks: This process's membership in the job; None if it saves alone.
        pid: The process that opened it.
        incomplete: Why the live state is a mixture, so that it must not be saved; None if it is
            not.
        failure: What the other ranks are told when it is closed; empty if nothing failed.
        leaves_uploads: Whether the wait for pending uploads was interrupted.
        is_closed: Whether everything was released.

    Raises:
        CheckpointError: As ``CheckpointManager`` documents.

    """

    native: _native.Manager

    def __init__(self, options: Options) -> None:
        gpus.watch_captures()  # before the first save: graphs are captured early
        options.store.check()  # errors in it are raised before the coordinator is contacted
        self.options = options
        self.pid = os.getpid()
        self.ranks: membership.StoreMembership | None = None
        self.incomplete: RestoreIncomplete | None = None
        self.failure = ""
        self.leaves_uploads = False
        self.is_closed = False
        self._is_shut = False
        self._has_uploads = options.store.remote is not None and not options.read_only
        self.watcher = None if options.read_only else Watcher(shows_progress=options.shows_progress)
        self.uploads = Watcher(shows_progress=False) if self._has_uploads else None
        try:
            self._open()
        except BaseException:
            self._undo_open()
            raise

    def close(self) -> None:
        """Finish the save in flight and release everything, or resume doing so.

        Raises:
            CheckpointError: A save or an upload failed, and its error has not been retrieved. The
                store is closed anyway.

        """
        if self.is_closed:
            return
        if os.getpid() != self.pid:
            self.is_closed = True
            return
        try:
            if not self._is_shut:
                self.native.wait_until_finished()
        except BaseException:
            self.saver.is_closing = True
            try:
                self._shut()
            except CheckpointError as later:
                # The first error propagates; this one must neither replace it nor be lost.
                _logger.error("closing `%s`: %s", self.path, later)  # noqa: TRY400
            raise
        self.saver.is_closing = True
        self._shut()

    def check_can_save(self, step: int) -> None:
        """Refuse a save into a store that is closed or read-only, or of a mixture."""
        what = f"saving step {step}"
        if self.saver.is_closing:
            raise Closed(what, "the manager was closed", "create a new CheckpointManager")
        if self.options.read_only:
            raise InvalidArgument(
                f"{what} in `{self.path}`",
                "the store was opened read-only",
                "open it without `read_only=True`",
            )
        if self.incomplete is not None:
            raise RestoreIncomplete(
                what,
                f"the live state is a mixture, since {self.incomplete.what} failed",
                "restore again, from this step or another, before saving",
            ) from self.incomplete

    def _open(self) -> None:
        """Join the other ranks, open the store, and start the threads."""
        options = self.options
        if options.world_size > 1 and not options.read_only:
            self.ranks = membership.join(
                lambda values: options.store.resolve(job_settings_from(values).path),
                options.job,
                (options.rank, options.world_size),
                options.coordinator,
                options.agreement_timeout,
            )
        job = self._job_settings()
        self.path = options.store.resolve(job.path).path
        self.save_interval_steps = options.save_interval_steps or job.save_interval_steps or 1
        is_async = job.async_write if options.async_write is None else options.async_write
        self.async_write = bool(is_async)
        self._assemble(json.dumps(settings.completed(options.engine, job)))
        for watcher in (self.watcher, self.uploads):
            if watcher is not None:
                watcher.start()
        lifecycle.register(self)
        if options.termination is not None:
            lifecycle.handle_termination(self, *options.termination)

    def _job_settings(self) -> JobSettings:
        """Return the coordinator's values for what is not set here, and log them."""
        options = self.options
        values = (
            membership.settings_of_job(options.job)
            if self.ranks is None
            else self.ranks.worker.settings
        )
        found = job_settings_from(values)
        if options.store.is_given():  # region and endpoint belong to the coordinator's own store
            found = found._replace(path=None, s3={})
        if found.keep_last_n is not None and options.keep_last_n is None and not options.read_only:
            _logger.warning(
                "the coordinator's `checkpoint.keep_last_n` is %d: older checkpoints are removed",
                found.keep_last_n,
            )
        if found != JobSettings():
            _logger.info("the coordinator's values for what is not set here: %s", found)
        return found

    def _assemble(self, engine_settings: str) -> None:
        """Open the engine, and create what works on it."""
        options = self.options
        is_alone = self.ranks is None
        worker = None if self.ranks is None else self.ranks.worker
        self.native = _native.Manager(self.path, engine_settings, worker)
        self.lineage = Lineage(self.native, is_read_only=options.read_only)
        timeout = None if is_alone else options.agreement_timeout
        reading = ReadOptions(options.verify_on_load, timeout, self._has_uploads)
        self.source = Source(self.native, self.path, self.lineage, reading)
        globs = options.replicated
        replication = Replication(globs, self.native.share) if globs else None
        rules = Rules(options.world_size, not is_alone, replication, options.best_metric)
        self.saver = Saver(self.native, self.lineage, (self.watcher, self.uploads), rules)

    def _shut(self) -> None:
        """Release everything. If a signal interrupts this, the next ``close`` resumes it."""
        if not self._is_shut:
            if self.watcher is not None:
                self.watcher.stop()
            if self.uploads is not None:
                try:
                    lifecycle.wait_for_uploads(self.native)
                except BaseException:
                    self.leaves_uploads = True
                    raise
                self.uploads.stop()
            self._is_shut = True  # from here on nothing is waited for
        try:
            self.native.close()
        finally:
            lifecycle.unregister(self)
            if self.ranks is not None:
                self.ranks.leave(self.failure)
            self.is_closed = True

    def _undo_open(self) -> None:
        """Undo an opening that failed, or that a signal interrupted."""
        self.is_closed = True
        lifecycle.unregister(self)
        for watcher in (self.watcher, self.uploads):
            if watcher is not None:
                watcher.request_stop()
        if hasattr(self, "native"):
            with contextlib.suppress(CheckpointError):
                self.native.close()
        if self.ranks is not None:
            self.ranks.leave()


def opened_by(manager: CheckpointManager) -> OpenedStore:
    """Return the store that a manager has open, for the adapters of this package."""
    return manager._opened  # noqa: SLF001
