"""How a manager saves: one save at a time, from the call to the handle that stands for it.

    declining   what fails before the snapshot is told to the other ranks
    turns       one thread begins a save at a time, and a signal handler never in another one's
    snapshot    the state taken apart, its memory made ready, the native half told to copy it

Always holds: a call that raises has begun no save, and one that was begun all the same is given up;
while a save is being begun, SIGTERM waits until there is a handle to finish or to drop.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from dtruntime import lifecycle, settings
from dtruntime.errors import AcceleratorError, CheckpointError, InvalidArgument, SaveInFlight
from dtruntime.saving.handle import Copied, SaveHandle
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
    """What holds for every save of a manager.

    Attributes:
        world_size: How many ranks save.
        declines: Whether the other ranks are told when this one does not come to save.
        replication: What all of them hold alike; None if nothing is.
        best_metric: Key of the number in the metadata that checkpoints are compared by.

    """

    world_size: int
    declines: bool
    replication: Replication | None
    best_metric: str | None


class Saver:
    """Begins the saves of one manager.

    Attributes:
        last: The handle of the save that was begun last; None before the first.
        is_capturing: Whether a save is being begun.
        is_closing: Whether the manager is being closed: nobody is told of a save that fails now.
        is_advised: Whether it was said what a restore by other ranks would find missing.

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
        # Threads take turns; the second lock is held in a turn, to know one in another.
        self._turns = threading.RLock()
        self._in_turn = threading.Lock()
        self._told_of_metric = False
        self.last: SaveHandle | None = None
        self.is_capturing = False
        self.is_closing = False
        self.is_advised = False

    def save(
        self,
        state: Any,
        call: tuple[int, bool],
        annotations: tuple[str, str],
        chosen: gpus.Consistency,
    ) -> SaveHandle:
        """Wait for the save before, take a snapshot, and write it in the background.

        Args:
            state: What is saved.
            call: The step, and whether the training went back to before it.
            annotations: The metadata and the positions in datasets, as they are stored.
            chosen: What keeps tensors on GPUs from changing before they were copied.

        """
        with self._turns:
            self._check_turn(call[0])
            with self._in_turn:
                return self._begin(state, call, annotations, chosen)

    def in_flight(self) -> SaveHandle | None:
        """Give the save that goes on, if one does."""
        last = self.last
        return None if last is None or last.done() else last

    @contextlib.contextmanager
    def declining(self, step: int) -> Iterator[None]:
        """Tell the other ranks if this one does not come to save ``step``."""
        try:
            yield
        except BaseException as error:
            if self.rules.declines and not self.is_closing:
                with contextlib.suppress(CheckpointError):
                    self._decline(step, error)
            raise

    def annotated(self, step: int, metadata: Mapping[str, Any] | None) -> str:
        """Give the metadata as it is stored, and say once if ``best_metric`` is not in it."""
        text = settings.json_object("metadata", metadata)
        name = self.rules.best_metric
        value = None if name is None else (metadata or {}).get(name)
        if name is not None and not settings.is_comparable(value):
            if not self._told_of_metric:
                _logger.warning(
                    "step %d is not compared with others: its `metadata` has no number `%s`, which "
                    "`best_metric` names (said once)",
                    step,
                    name,
                )
            self._told_of_metric = True
        return text

    def check_busy(self, step: int, if_busy: str) -> None:
        """Refuse to wait for a save in flight, or that another thread begins, if it says so."""
        if settings.choice("if_busy", if_busy, ("wait", "raise")) == "wait":
            return
        if self.rules.world_size > 1:
            raise InvalidArgument(
                f"saving with `if_busy` = {if_busy!r} on {self.rules.world_size} ranks",
                "a save may still be in flight on one rank, and be over on another",
                "decide on one rank, by `handle.done()`, and tell the others, before any of them "
                "saves",
            )
        is_free = self._turns.acquire(blocking=False)
        if is_free:
            self._turns.release()
        if is_free and self._native.wait_until_finished(0):
            return
        before = "another one" if self.last is None else f"step {self.last.step}"
        raise SaveInFlight(
            f"saving step {step}",
            f"{before} is not durable yet",
            'go on, and save a later step; or let it wait: `if_busy="wait"`',
        )

    def _decline(self, step: int, error: BaseException) -> None:
        last = self.last
        try:
            # Who speaks of a later step gives up the one that is in flight.
            if isinstance(error, Exception) and last is not None:
                last._native.wait()  # noqa: SLF001
        finally:
            self._native.decline(step, f"{type(error).__name__}: {error}")

    def _check_turn(self, step: int) -> None:
        """Refuse a save in the middle of another one of the same thread, which could never end."""
        if not self._in_turn.locked():
            return
        raise InvalidArgument(
            f"saving step {step}",
            "this thread is in the middle of a save: a signal handler has interrupted it, or code "
            "that it runs, such as a `state_dict()`, saves",
            "save when that call has returned: set a flag in a handler; or let "
            '`sigterm="finish"` finish what is being saved',
        )

    def _begin(
        self,
        state: Any,
        call: tuple[int, bool],
        annotations: tuple[str, str],
        chosen: gpus.Consistency,
    ) -> SaveHandle:
        step, rewind = call
        # First, so that copies of tensors outside the host's memory are not made beside it.
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
            # It may have been begun although it did not return: a signal can be in between.
            # Nobody would keep the tensors as they are, so what is saved of them is not to be.
            self.last = last
            if sources.begun is not None:
                sources.begun.abandon("the call that began it was interrupted")
                sources.begun.wait_captured()
            chosen.disarm()
            raise
        finally:
            self.is_capturing = False
            lifecycle.resume_termination()

    def _prepare(
        self, state: Any, chosen: gpus.Consistency
    ) -> tuple[FlatState, _native.Sources, gpus.Consistency]:
        """Take a state apart and make its memory ready, strictly if a GPU refuses more."""
        while True:
            flat = flatten(state, self.rules.replication, chosen, self.rules.world_size)
            streams = list(chosen.streams.items())
            try:
                sources = self._native.prepare(flat.storages, streams, chosen.goes_on_behind)
            except AcceleratorError as error:
                chosen = gpus.fall_back(chosen, error)
            else:
                return flat, sources, chosen

    def _advise(self, flat: FlatState) -> None:
        """Say once, at the first save, what would be found out at a restore by other ranks."""
        if self.rules.world_size > 1 and not self.is_advised:
            for text in advice(flat):
                _logger.warning("%s (said once)", text)
        self.is_advised = True

    def _hand_out(
        self, native: _native.SaveHandle, flat: FlatState, chosen: gpus.Consistency
    ) -> SaveHandle:
        """Give the handle of a save, with whatever waits for its copies told of it."""
        assert self._watcher is not None  # noqa: S101  (a manager that can save has one)
        behind = Copied([*chosen.streams], flat.table) if chosen.goes_on_behind else None
        chosen.guard(native)
        handle = self.last = SaveHandle(native, self._watcher, behind)
        self._watcher.watch(handle, self._native)
        handle._watch_upload(self._uploads, self._native)  # noqa: SLF001
        return handle
