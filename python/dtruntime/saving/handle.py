"""What a caller holds while its save goes on.

Always holds: a handle that says success stands for a checkpoint that is durable and published;
completion is decided in the engine; futures are resolved and callbacks run once, by the manager's
watcher.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import threading
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dtruntime.errors import CheckpointError
from dtruntime.reports import SaveInfo, SaveProgress, SaveStats, UploadInfo
from dtruntime.saving.watcher import log_error
from dtruntime.state import gpus

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from dtruntime import _native
    from dtruntime.saving.watcher import Watcher

_LOOK_SECONDS = 0.1
"""How long one upload's end is waited for before that of another is."""


_behind: weakref.WeakValueDictionary[int, SaveHandle] = weakref.WeakValueDictionary()
"""Saves of this process, of whichever manager, that may still copy from GPUs."""


def end_copies() -> None:
    """Let what the current streams are given from now on wait for every save's copies."""
    for reference in _behind.valuerefs():  # a list: other threads begin and end saves meanwhile
        handle = reference()
        if handle is not None:
            handle.before_update()


os.register_at_fork(after_in_child=_behind.clear)  # a child has no copies under way


@dataclass
class Copied:
    """What is copied behind a save: from which GPUs, and what keeps the tensors alive meanwhile."""

    ordinals: list[int]
    table: object


class SaveHandle:
    """A save in flight, or ended. Made by ``CheckpointManager.save_async``.

    Await it, wait for it with ``result``, or leave it: an error that nobody looked at is raised by
    the manager's next ``save_async``, ``wait_until_finished`` or ``close``. Cancelling an
    ``await`` cancels the wait, never the save.

    Attributes:
        staged: A future that is done once the snapshot is taken: the state may change from then on.
            Only a save with another ``consistency`` than ``strict`` returns before.
        uploaded: A future that is done once the checkpoint is in the remote store, with an
            ``UploadInfo``, or with the error of the upload; the local checkpoint stands. Without a
            remote store it is done, with None. Where several ranks save, it means all of them. One
            that has not ended when the process does is done by the next manager that writes.

    """

    def __init__(
        self, native: _native.SaveHandle, watcher: Watcher, copied_behind: Copied | None = None
    ) -> None:
        self._native = native
        self._copied_behind = copied_behind
        self._watcher = watcher
        self._lock = threading.RLock()  # a signal handler may add a callback in between
        self._callbacks: list[Callable[[SaveHandle], object]] = []
        self._is_announced = False
        self._ended: concurrent.futures.Future[None] = concurrent.futures.Future()
        # A running future cannot be cancelled, so neither can the save, through any await of it.
        self._ended.set_running_or_notify_cancel()
        self.staged: concurrent.futures.Future[None] = concurrent.futures.Future()
        self.staged.set_running_or_notify_cancel()
        if copied_behind is None:
            self.staged.set_result(None)
        else:
            _behind[id(self)] = self
        self.uploaded: concurrent.futures.Future[UploadInfo | None] = concurrent.futures.Future()
        self.uploaded.set_running_or_notify_cancel()

    @property
    def step(self) -> int:
        """The step being saved."""
        return self._native.step

    def done(self) -> bool:
        """Tell whether the save has ended, well or not."""
        return self._native.done()

    def result(self, timeout: float | None = None) -> SaveInfo:
        """Wait until the checkpoint is durable and published, at most ``timeout`` seconds.

        Raises:
            TimeoutError: It has not ended yet; it goes on.
            CheckpointError: It failed; earlier checkpoints are untouched.

        >>> manager.save_async({"epoch": 1}, step=10).result().step
        10

        """
        self._native.wait(timeout)
        outcome = self._native.outcome()
        if outcome is None:
            raise TimeoutError(
                f"saving step {self.step}: it has not ended within {timeout} s\n"
                "hint: it goes on; wait again, or look at `handle.progress()`"
            )
        stats = SaveStats(**outcome.pop("stats"))
        removed_steps = tuple(outcome.pop("removed_steps"))
        return SaveInfo(**outcome, removed_steps=removed_steps, stats=stats)

    def exception(self, timeout: float | None = None) -> CheckpointError | None:
        """Wait like ``result`` and give the error of a failed save; None for one that succeeded.

        Raises:
            TimeoutError: It has not ended within ``timeout`` seconds; it goes on.

        """
        try:
            self.result(timeout)
        except CheckpointError as error:
            return error
        return None

    def progress(self) -> SaveProgress:
        """Give the bytes captured, encoded and written so far."""
        return SaveProgress(**self._native.progress())

    def stats(self) -> SaveStats:
        """Give seconds and bytes per phase, so far; complete once the save has ended."""
        return SaveStats(**self._native.stats())

    def before_update(self) -> None:
        """Let what the current streams are given from now on wait until the state was copied.

        On GPUs, after a save with ``consistency="overlap"``: call it before anything else than the
        next step of the optimizers that were named changes the state. It does not wait itself,
        unless the state is larger than the staging memory: then until the rest fits. Does nothing
        where everything was copied already.
        """
        behind = self._copied_behind
        if behind is not None:
            self._native.precede(gpus.current_streams(behind.ordinals))

    def add_done_callback(self, callback: Callable[[SaveHandle], object]) -> None:
        """Call ``callback(handle)`` once the save has ended, on the manager's callback thread.

        What it raises is logged, ``SystemExit`` too: from this thread it ends no process. One added
        after the end is called soon; after the manager was closed, at once and here.
        """
        with self._lock:
            if not self._is_announced:
                self._callbacks.append(callback)
                return
        if not self._watcher.submit(lambda: self._run(callback)):
            self._run(callback)

    async def wait(self) -> SaveInfo:
        """Wait without blocking the event loop; ``await handle`` does the same."""
        if not self.done():
            await asyncio.wrap_future(self._ended)
        return self.result(0)

    def __await__(self) -> Generator[Any, None, SaveInfo]:
        return self.wait().__await__()

    def __repr__(self) -> str:
        state = "ended" if self._ended.done() else "in flight"
        return f"<SaveHandle step={self.step} {state}>"

    def _watch_upload(self, uploads: Watcher | None, manager: _native.Manager) -> None:
        """Resolve ``uploaded`` when the upload has ended, on a thread of its own."""
        if uploads is None or not uploads.submit(lambda: self._follow_upload(uploads, manager)):
            self.uploaded.set_result(None)

    def _follow_upload(self, uploads: Watcher, manager: _native.Manager) -> None:
        """Look for the end of the upload. The thread looks for those of other steps in between.

        A step whose upload fails may be tried for hours, and later ones arrive meanwhile.
        """
        try:
            info = None
            has_ended = self._native.wait(_LOOK_SECONDS)
            if has_ended:
                info = manager.uploaded(self.step, _LOOK_SECONDS)
            if info is None:
                if uploads.submit(lambda: self._follow_upload(uploads, manager)):
                    return
                self._native.wait()
                info = manager.uploaded(self.step)
        except BaseException as error:  # noqa: BLE001  (raised where it is awaited)
            self.uploaded.set_exception(error)
        else:
            self.uploaded.set_result(None if info is None else UploadInfo(**info))

    def _stage(self) -> None:
        """Resolve ``staged`` when nothing reads the state any more; called once, by the watcher."""
        if self._copied_behind is None:
            return
        try:
            self._native.wait_captured()
        except BaseException as error:  # noqa: BLE001  (raised where it is awaited)
            # The tensors stay alive: nobody knows what reads them.
            self.staged.set_exception(error)
        else:
            self._copied_behind.table = None
            _behind.pop(id(self), None)
            self.staged.set_result(None)

    def _announce(self) -> None:
        """Resolve the future and run the callbacks; called once, by the watcher."""
        with self._lock:
            self._is_announced = True
            callbacks, self._callbacks = self._callbacks, []
        self._ended.set_result(None)
        for callback in callbacks:
            self._run(callback)

    def _run(self, callback: Callable[[SaveHandle], object]) -> None:
        try:
            callback(self)
        except KeyboardInterrupt:  # where the callback runs at once, in the main thread
            raise
        except BaseException as error:  # noqa: BLE001  (it must not silence other callbacks)
            log_error(error, "a done callback of the save of step %d failed", self.step)
