"""The handle of a save in progress.

Always holds: if a handle reports success, its checkpoint is durable and published; completion is
decided in the engine; futures are resolved and callbacks run once, by the manager's watcher.
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

_POLL_SECONDS = 0.1
"""How long to wait for one upload before polling the next."""


_copying: weakref.WeakValueDictionary[int, SaveHandle] = weakref.WeakValueDictionary()
"""Saves of this process, of any manager, that may still copy from GPUs."""


def order_after_copies() -> None:
    """Make later work of the current streams wait for the copies of every save."""
    for reference in _copying.valuerefs():  # a list: other threads start and end saves meanwhile
        handle = reference()
        if handle is not None:
            handle.before_update()


os.register_at_fork(after_in_child=_copying.clear)  # a child has no copies in progress


@dataclass
class BackgroundCopy:
    """A copy that continues after the call: its GPUs, and what keeps the tensors alive."""

    ordinals: list[int]
    table: object


class SaveHandle:
    """A save in flight, or ended. Made by ``CheckpointManager.save_async``.

    Await it, wait for it with ``result``, or ignore it: an error that was not retrieved is raised
    by the manager's next ``save_async``, ``wait_until_finished`` or ``close``. Cancelling an
    ``await`` cancels the wait, never the save.

    Attributes:
        staged: A future that is done once the snapshot is taken: the state may change from then on.
            Only a save whose ``consistency`` is not ``strict`` returns before that.
        uploaded: A future that is done once the checkpoint is in the remote store, with an
            ``UploadInfo``, or with the error of the upload; the local checkpoint is kept. Without a
            remote store it is done, with None. If several ranks save, it is for all of them. An
            upload that has not ended when the process does is finished by the next manager that
            writes.

    """

    def __init__(
        self,
        native: _native.SaveHandle,
        watcher: Watcher,
        background_copy: BackgroundCopy | None = None,
    ) -> None:
        self._native = native
        self._background_copy = background_copy
        self._watcher = watcher
        self._lock = threading.RLock()  # a signal handler may add a callback at any point
        self._callbacks: list[Callable[[SaveHandle], object]] = []
        self._is_announced = False
        self._ended: concurrent.futures.Future[None] = concurrent.futures.Future()
        # A running future cannot be cancelled, so no await of it can cancel the save.
        self._ended.set_running_or_notify_cancel()
        self.staged: concurrent.futures.Future[None] = concurrent.futures.Future()
        self.staged.set_running_or_notify_cancel()
        if background_copy is None:
            self.staged.set_result(None)
        else:
            _copying[id(self)] = self
        self.uploaded: concurrent.futures.Future[UploadInfo | None] = concurrent.futures.Future()
        self.uploaded.set_running_or_notify_cancel()

    @property
    def step(self) -> int:
        """The step being saved."""
        return self._native.step

    def done(self) -> bool:
        """Return whether the save has ended, successfully or not."""
        return self._native.done()

    def result(self, timeout: float | None = None) -> SaveInfo:
        """Wait until the checkpoint is durable and published, at most ``timeout`` seconds.

        Raises:
            TimeoutError: It has not ended yet, and continues.
            CheckpointError: It failed; earlier checkpoints are untouched.

        >>> manager.save_async({"epoch": 1}, step=10).result().step
        10

        """
        self._native.wait(timeout)
        outcome = self._native.outcome()
        if outcome is None:
            raise TimeoutError(
                f"saving step {self.step}: it has not ended within {timeout} s\n"
                "hint: it continues; wait again, or check `handle.progress()`"
            )
        stats = SaveStats(**outcome.pop("stats"))
        removed_steps = tuple(outcome.pop("removed_steps"))
        return SaveInfo(**outcome, removed_steps=removed_steps, stats=stats)

    def exception(self, timeout: float | None = None) -> CheckpointError | None:
        """Wait like ``result``, and return the error of a failed save; None if it succeeded.

        Raises:
            TimeoutError: It has not ended within ``timeout`` seconds, and continues.

        """
        try:
            self.result(timeout)
        except CheckpointError as error:
            return error
        return None

    def progress(self) -> SaveProgress:
        """Return the bytes captured, encoded and written so far."""
        return SaveProgress(**self._native.progress())

    def stats(self) -> SaveStats:
        """Return seconds and bytes per phase so far; complete once the save has ended."""
        return SaveStats(**self._native.stats())

    def before_update(self) -> None:
        """Make later work of the current streams wait until the state has been copied.

        On GPUs, after a save with ``consistency="overlap"``: call it before anything other than the
        next step of the given optimizers changes the state. The call itself does not block, unless
        the state is larger than the staging memory: then until the rest fits. Does nothing if
        everything has been copied already.
        """
        copy = self._background_copy
        if copy is not None:
            self._native.precede(gpus.current_streams(copy.ordinals))

    def add_done_callback(self, callback: Callable[[SaveHandle], object]) -> None:
        """Call ``callback(handle)`` once the save has ended, on the manager's callback thread.

        What it raises is logged, even ``SystemExit``, which does not end the process. If added
        after the end, it is called soon; after the manager was closed, at once in this thread.
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
        """Resolve ``uploaded`` when the upload has ended, on the thread for uploads."""
        if uploads is None or not uploads.submit(lambda: self._follow_upload(uploads, manager)):
            self.uploaded.set_result(None)

    def _follow_upload(self, uploads: Watcher, manager: _native.Manager) -> None:
        """Poll for the end of the upload, in turn with those of other steps.

        A step whose upload fails may be retried for hours while later ones finish.
        """
        try:
            info = None
            has_ended = self._native.wait(_POLL_SECONDS)
            if has_ended:
                info = manager.uploaded(self.step, _POLL_SECONDS)
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
        """Resolve ``staged`` once nothing reads the state; called once, by the watcher."""
        if self._background_copy is None:
            return
        try:
            self._native.wait_captured()
        except BaseException as error:  # noqa: BLE001  (raised where it is awaited)
            # The tensors stay alive: copies may still be reading them.
            self.staged.set_exception(error)
        else:
            self._background_copy.table = None
            _copying.pop(id(self), None)
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
        except KeyboardInterrupt:  # if the callback runs at once, in the main thread
            raise
        except BaseException as error:  # noqa: BLE001  (it must not stop other callbacks)
            log_error(error, "a done callback of the save of step %d failed", self.step)
