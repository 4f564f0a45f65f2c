"""The Python thread that waits for the end of a manager's saves, and announces it.

Always holds: the engine's threads never call Python; saves are announced in order; whatever a
callback, or writing the progress bar, raises, the thread continues and announces every save.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from typing import TYPE_CHECKING

from dtruntime.progress import ProgressBar

if TYPE_CHECKING:
    from collections.abc import Callable

    from dtruntime import _native
    from dtruntime.saving.handle import SaveHandle

_logger = logging.getLogger("dtruntime")


def log_error(error: BaseException, message: str, *arguments: object) -> None:
    """Log an error; a logger's own failure must not end the thread."""
    with contextlib.suppress(Exception):
        _logger.error(message, *arguments, exc_info=error)


def _do(work: Callable[[], object]) -> None:
    """Run one task; whatever it raises, later ones still run."""
    try:
        work()
    except BaseException as error:  # noqa: BLE001  (even an exit)
        log_error(error, "following a save failed")


class Watcher:
    """The thread that waits for the end of saves.

    It keeps what it watches alive, so a save is finished even if manager and handle were dropped.
    """

    def __init__(self, *, shows_progress: bool) -> None:
        self._queue: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._lock = threading.RLock()  # a signal handler may close the manager at any point
        self._is_stopping = False
        self._bar = ProgressBar() if shows_progress else None
        self._thread = threading.Thread(target=self._work, name="dtruntime-watcher", daemon=True)

    def start(self) -> None:
        """Start the thread, when the manager is opened: during shutdown Python starts none."""
        self._thread.start()

    def watch(self, handle: SaveHandle, manager: _native.Manager) -> None:
        """Announce the end of ``handle`` once it has ended. Keeps ``manager`` alive until then."""
        self._queue.put(lambda: self._follow(handle, manager))

    def submit(self, work: Callable[[], object]) -> bool:
        """Run ``work`` on the thread; return whether the thread accepts it."""
        with self._lock:
            if not self._is_stopping:
                self._queue.put(work)
            return not self._is_stopping

    def stop(self, timeout: float | None = None) -> bool:
        """End the thread after all submitted work; return whether it has ended in time."""
        self.request_stop()
        is_another = threading.current_thread() is not self._thread
        if is_another and self._thread.ident is not None:
            self._thread.join(timeout)
        return not self._thread.is_alive()

    def request_stop(self) -> None:
        """End the thread after all submitted work, without waiting."""
        with self._lock:
            self._is_stopping = True
            self._queue.put(None)

    def _work(self) -> None:
        while (work := self._queue.get()) is not None:
            _do(work)

    def _follow(self, handle: SaveHandle, manager: _native.Manager) -> None:
        del manager  # the closure of `watch` keeps it alive
        try:
            handle._stage()  # noqa: SLF001  (the two halves of one mechanism)
            if self._bar is not None:
                self._draw(self._bar, handle)
            handle._native.wait()  # noqa: SLF001
        finally:
            handle._announce()  # noqa: SLF001

    def _draw(self, bar: ProgressBar, handle: SaveHandle) -> None:
        """Show a bar until the save has ended; give up if it cannot be written."""
        with contextlib.suppress(Exception):
            while not handle._native.wait(0.1):  # noqa: SLF001
                bar.show(handle.step, handle.progress())
            bar.finish(handle.step, handle.progress())
