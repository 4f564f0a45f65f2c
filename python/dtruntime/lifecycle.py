"""Fork, interpreter exit and SIGTERM, for all open stores of the process.

Always holds: a forked child keeps none of the parent's locks alive; the interpreter does not exit
before a save in flight has ended, and logs what it waits for; SIGTERM is handled only for stores
whose manager asked for it, and the previously installed handler still runs.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import signal
import threading
import time
import weakref
from typing import TYPE_CHECKING, Any, NamedTuple

from dtruntime.errors import CheckpointError, InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

    from dtruntime import _native
    from dtruntime.opened import OpenedStore
    from dtruntime.ranks.membership import StoreMembership
    from dtruntime.saving.handle import SaveHandle
    from dtruntime.saving.watcher import Watcher

_logger = logging.getLogger("dtruntime")

_QUIET_SECONDS = 1.0
"""A wait at exit that takes longer logs what it waits for."""

_stores: weakref.WeakSet[OpenedStore] = weakref.WeakSet()
_watchers: set[Watcher] = set()


def register(store: OpenedStore) -> None:
    """Track a store until it is closed or dropped."""
    _stores.add(store)
    if store.watcher is not None:
        _watchers.add(store.watcher)
        left = (store.native, store.watcher, store.uploads, store.ranks)
        weakref.finalize(store, _close_dropped, *left).atexit = False


def unregister(store: OpenedStore) -> None:
    """Stop tracking a store that was closed."""
    _stores.discard(store)
    if store.watcher is not None:
        _watchers.discard(store.watcher)
    _terminations.forget(store)


def _close_dropped(
    native: _native.Manager,
    watcher: Watcher,
    uploads: Watcher | None,
    ranks: StoreMembership | None,
) -> None:
    """Close what a dropped store left, on its own thread and once its saves have ended."""

    def close() -> None:
        try:
            if uploads is not None:
                wait_for_uploads(native)
                uploads.stop()
            native.close()
        except CheckpointError as error:
            _log_unseen(error)
        if ranks is not None:
            ranks.leave()
        _watchers.discard(watcher)

    watcher.submit(close)
    watcher.request_stop()


def wait_for_uploads(native: _native.Manager) -> None:
    """Wait until everything committed is uploaded, and log it if that takes a while."""
    if native.drain(_QUIET_SECONDS):
        return
    pending = native.pending_uploads()
    if pending:
        total = sum(total for _, _, total in pending)
        left = total - sum(uploaded for _, uploaded, _ in pending)
        _logger.warning(
            "closing waits for the upload of step %s: %.1f of %.1f MiB are left; if interrupted, "
            "the next process uploads the rest",
            ", ".join(str(step) for step, _, _ in pending),
            left / (1 << 20),
            total / (1 << 20),
        )
    native.drain()


def _log_unseen(error: CheckpointError) -> None:
    _logger.error("a save or an upload failed, and its error was not retrieved: %s", error)


def _close_locks_in_child() -> None:
    for store in list(_stores):
        store.native.close_after_fork()
    _watchers.clear()  # their threads stayed in the parent


def _finish_saves() -> None:
    """Wait for every save, then end the watchers. Runs before the interpreter stops threads."""
    for watcher in list(_watchers):
        if not watcher.stop(_QUIET_SECONDS):
            steps = sorted(handle.step for handle in _in_flight())
            _logger.warning("exit is waiting for the save of step %s", ", ".join(map(str, steps)))
            watcher.stop()
    _watchers.clear()


def _close_stores() -> None:
    """Finish what exit handlers started, and log errors not retrieved. Runs last."""
    for store in list(_stores):
        with contextlib.suppress(Exception):  # each is closed, even if another fails
            _close(store)


def _close(store: OpenedStore) -> None:
    try:
        if store.leaves_uploads:  # an interrupt already ended the wait for them
            store.native.leave_uploads()
        store.close()
    except CheckpointError as error:
        _log_unseen(error)


def _in_flight() -> list[SaveHandle]:
    handles = [store.saver.in_flight() for store in list(_stores)]
    return [handle for handle in handles if handle is not None]


class _Policy(NamedTuple):
    finishes: bool
    deadline_seconds: float


class _Terminations:
    """The process's SIGTERM handler and the stores whose managers asked for it."""

    def __init__(self) -> None:
        self._policies: weakref.WeakKeyDictionary[OpenedStore, _Policy] = (
            weakref.WeakKeyDictionary()
        )
        self._previous: Callable[[int, FrameType | None], Any] | int | None = None
        self._is_installed = False
        self._is_handling = False
        self._is_deferred = False

    def check(self, mode: str) -> None:
        is_main = threading.current_thread() is threading.main_thread()
        if not self._is_installed and not is_main:
            raise InvalidArgument(
                f"setting `sigterm` = {mode!r}",
                "Python installs signal handlers only from the main thread",
                "create the manager in the main thread, or leave `sigterm` unset",
            )

    def add(self, store: OpenedStore, policy: _Policy) -> None:
        self.check("finish" if policy.finishes else "drop")
        if not self._is_installed:
            self._previous = signal.signal(signal.SIGTERM, self._handle)
            self._is_installed = True
        self._policies[store] = policy

    def forget(self, store: OpenedStore) -> None:
        self._policies.pop(store, None)
        is_ours = self._is_installed and signal.getsignal(signal.SIGTERM) == self._handle
        if not self._policies and is_ours and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._previous or signal.SIG_DFL)
            self._is_installed = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._is_handling:  # a second SIGTERM: stop waiting
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        if any(store.saver.is_capturing for store in list(self._policies)):
            self._is_deferred = True
            return
        self._is_handling = True
        try:
            for store, policy in list(self._policies.items()):
                handle = store.saver.in_flight()
                if store.pid == os.getpid() and handle is not None:
                    _end(handle, policy)
        finally:
            self._is_handling = False
        self._call_previous(number, frame)

    def resume(self) -> None:
        """Handle the signal that arrived during a snapshot, if one did."""
        if self._is_deferred:
            self._is_deferred = False
            os.kill(os.getpid(), signal.SIGTERM)  # handlers run in the main thread only

    def _call_previous(self, number: int, frame: FrameType | None) -> None:
        if callable(self._previous):
            self._previous(number, frame)
        elif self._previous != signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


def _end(handle: SaveHandle, policy: _Policy) -> None:
    """Finish or drop the save of a process that received SIGTERM."""
    native = handle._native  # noqa: SLF001
    if policy.finishes:
        _logger.warning(
            "SIGTERM: finishing the save of step %d, for at most %g s",
            handle.step,
            policy.deadline_seconds,
        )
        started = time.monotonic()
        if native.wait(policy.deadline_seconds):
            seconds = time.monotonic() - started
            try:
                native.outcome()
            except CheckpointError as error:
                _logger.error("SIGTERM: the save of step %d failed: %s", handle.step, error)  # noqa: TRY400
            else:
                _logger.warning("SIGTERM: step %d is durable, after %.1f s", handle.step, seconds)
            return
    _logger.warning("SIGTERM: dropped the save of step %d", handle.step)
    native.cancel("the process received SIGTERM")
    native.wait(_QUIET_SECONDS)  # so that the attempt's file is removed


_terminations = _Terminations()


def check_can_handle_termination(mode: str) -> None:
    """Refuse to handle SIGTERM where ``handle_termination`` could not install its handler.

    Raises:
        InvalidArgument: This is not the main thread.

    """
    _terminations.check(mode)


def handle_termination(store: OpenedStore, mode: str, deadline_seconds: float) -> None:
    """Finish or drop this store's save in flight when the process receives SIGTERM."""
    _terminations.add(store, _Policy(mode == "finish", deadline_seconds))


def resume_termination() -> None:
    """Handle a SIGTERM that arrived during a snapshot, now that it has ended."""
    _terminations.resume()


os.register_at_fork(after_in_child=_close_locks_in_child)
# Before Python joins its threads; `atexit` alone runs after that, when nothing can be started.
threading._register_atexit(_finish_saves)  # type: ignore[attr-defined]  # noqa: SLF001
atexit.register(_close_stores)
