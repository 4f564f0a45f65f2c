"""How a manager saves: one save at a time, from the call to its handle.

    declining   the other ranks are told of a failure before the snapshot
    locking     one thread starts a save at a time, and a signal handler never inside another save
    snapshot    the state is flattened, its memory prepared, and the native half copies it

Always holds: a call that raises leaves no save running: one that was already started is abandoned;
while a save is being started, SIGTERM waits until there is a handle to finish or to drop.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from dtruntime import lifecycle, settings
from dtruntime.errors import (
    AcceleratorError,
    CheckpointError,
    InvalidArgument,
    SaveInFlight,
    reason_of,
)
from dtruntime.saving.handle import BackgroundCopy, SaveHandle
from dtruntime.saving.replication import advice
from dtruntime.state import gpus
from dtruntime.state.state_tree import FlatState, flatten

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from dtruntime import _native
    from dtruntime.lineage import Lineage
    from dtruntime.saving.replication import Replication
    from dtruntime.saving.watcher import Watcher

_logger = logging.getLogger("dtruntime")


class Rules(NamedTuple):
    """What applies to every save of a manager.

    Attributes:
        world_size: How many ranks save.
        declines: Whether the other ranks are told if this one fails before it saves.
        replication: What is identical on all ranks; None if nothing is.
        best_metric: Key of the number in the metadata that checkpoints are ranked by.

    """

    world_size: int
    declines: bool
    replication: Replication | None
    best_metric: str | None


class Saver:
    """Starts the saves of one manager.

    Attributes:
        last: The handle of the save that was started last; None before the first.
        is_capturing: Whether a save is being started.
        is_closing: Whether the manager is being closed: other ranks are not told of a failure then.
        has_advised: Whether warnings about restoring on other ranks were logged.

    """

    def __init__(
        self,
        native: _native.Manager,
        lineage: Lineage,
        watchers: tuple[Watcher | None, Watcher | None],
        rules: Rules,
    ) -> None:
        self._native = native
        self._lineage = lineage
        self._watcher, self._uploads = watchers
        self.rules = rules
        # Threads take turns. The second lock is held during a save, to detect a nested one: the
        # first is reentrant.
        self._save_lock = threading.RLock()
        self._in_save = threading.Lock()
        self._has_warned_of_metric = False
        self.last: SaveHandle | None = None
        self.is_capturing = False
        self.is_closing = False
        self.has_advised = False

    def save(
        self,
        state: Any,
        call: tuple[int, bool],
        annotations: tuple[str, str],
        chosen: gpus.Consistency,
    ) -> SaveHandle:
        """Wait for the previous save, take a snapshot, and write it in the background.

        Args:
            state: The state to save.
            call: The step, and whether it is a rewind.
            annotations: The metadata and the dataset positions, as they are stored.
            chosen: What keeps tensors on GPUs from changing before they have been copied.

        """
        with self._save_lock:
            self._check_not_nested(call[0])
            with self._in_save:
                return self._begin(state, call, annotations, chosen)

    def in_flight(self) -> SaveHandle | None:
        """Return the save in flight, if there is one."""
        last = self.last
        return None if last is None or last.done() else last

    @contextlib.contextmanager
    def declining(self, step: int) -> Iterator[None]:
        """Tell the other ranks if this one fails before it saves ``step``."""
        try:
            yield
        except BaseException as error:
            if self.rules.declines and not self.is_closing:
                with contextlib.suppress(CheckpointError):
                    self._decline(step, error)
            raise

    def annotated(self, step: int, metadata: Mapping[str, Any] | None) -> str:
        """Return the metadata as it is stored, and warn once if ``best_metric`` is not in it."""
        text = settings.json_object("metadata", metadata)
        name = self.rules.best_metric
        value = None if name is None else (metadata or {}).get(name)
        if name is not None and not settings.is_comparable(value):
            if not self._has_warned_of_metric:
                _logger.warning(
                    "step %d is never among the best: its `metadata` has no number `%s`, which "
                    "`best_metric` names (logged once)",
                    step,
                    name,
                )
            self._has_warned_of_metric = True
        return text

    def check_busy(self, step: int, if_busy: str) -> None:
        """Raise if ``if_busy`` is ``raise`` and a save is in flight, or is being started."""
        if settings.choice("if_busy", if_busy, ("wait", "raise")) == "wait":
            return
        if self.rules.world_size > 1:
            raise InvalidArgument(
                f"saving with `if_busy` = {if_busy!r} on {self.rules.world_size} ranks",
                "a save may still be in flight on one rank, and have ended on another",
                "decide on one rank, by `handle.done()`, and broadcast the decision before any "
                "rank saves",
            )
        is_free = self._save_lock.acquire(blocking=False)
        if is_free:
            self._save_lock.release()
        if is_free and self._native.wait_until_finished(0):
            return
        before = "another one" if self.last is None else f"step {self.last.step}"
        raise SaveInFlight(
            f"saving step {step}",
            f"{before} is not durable yet",
            'continue, and save a later step; or wait: `if_busy="wait"`',
        )

    def _decline(self, step: int, error: BaseException) -> None:
        last = self.last
        try:
            # Declining a later step would give up the save in flight.
            if isinstance(error, Exception) and last is not None:
                last._native.wait()  # noqa: SLF001
        finally:
            self._native.decline(step, reason_of(error))

    def _check_not_nested(self, step: int) -> None:
        """Refuse a save inside another one of the same thread, which would deadlock."""
        if not self._in_save.locked():
            return
        raise InvalidArgument(
            f"saving step {step}",
            "this thread is already saving: this call comes from a signal handler, or from code "
            "that the save runs, such as a `state_dict()`",
            "save after that call has returned: set a flag in the handler; or use "
            '`sigterm="finish"` to finish the save in progress',
        )

    def _begin(
        self,
        state: Any,
        call: tuple[int, bool],
        annotations: tuple[str, str],
        chosen: gpus.Consistency,
    ) -> SaveHandle:
        step, rewind = call
        # Wait before the state is prepared: its copies of tensors outside host memory would add
        # to those of the previous save.
        with self.declining(step):
            called = time.monotonic()
            self._native.wait_until_finished()
            begun = time.monotonic()
            rewind = rewind or self._lineage.replaces_unsound(step)
            flat, sources, chosen = self._prepare(state, chosen)
            self._advise(flat)
            chosen.arm()
        last = self.last
        self.is_capturing = True
        try:
            spent = (begun - called, time.monotonic() - begun)
            parts = (flat.nodes, flat.tensors, flat.replicated)
            native = self._native.save((step, rewind, spent), parts, sources, annotations)
            self._lineage.note_begun(native, is_rewind=rewind)
            return self._hand_out(native, flat, chosen)
        except BaseException:
            # It may have started although it did not return: a signal can interrupt in between.
            # Nothing keeps the tensors unchanged then, so that save must not be committed.
            self.last = last
            if sources.begun is not None:
                sources.begun.abandon("the call that started it was interrupted")
                sources.begun.wait_captured()
            chosen.disarm()
            raise
        finally:
            self.is_capturing = False
            lifecycle.resume_termination()

    def _prepare(
        self, state: Any, chosen: gpus.Consistency
    ) -> tuple[FlatState, _native.Sources, gpus.Consistency]:
        """Flatten a state and prepare its memory, with ``strict`` if a GPU cannot do more."""
        while True:
            flat = flatten(state, self.rules.replication, chosen, self.rules.world_size)
            streams = list(chosen.streams.items())
            try:
                sources = self._native.prepare(flat.storages, streams, chosen.copies_in_background)
            except AcceleratorError as error:
                chosen = gpus.fall_back(chosen, error)
            else:
                return flat, sources, chosen

    def _advise(self, flat: FlatState) -> None:
        """Warn at the first save about what other ranks would not restore as expected."""
        if self.rules.world_size > 1 and not self.has_advised:
            for text in advice(flat):
                _logger.warning("%s (logged once)", text)
        self.has_advised = True

    def _hand_out(
        self, native: _native.SaveHandle, flat: FlatState, chosen: gpus.Consistency
    ) -> SaveHandle:
        """Return the handle of a save, and connect it to what waits for its copies."""
        assert self._watcher is not None  # noqa: S101  (a manager that can save has one)
        background = (
            BackgroundCopy([*chosen.streams], flat.table) if chosen.copies_in_background else None
        )
        chosen.guard(native)
        handle = self.last = SaveHandle(native, self._watcher, background)
        self._watcher.watch(handle, self._native)
        handle._watch_upload(self._uploads, self._native)  # noqa: SLF001
        return handle
