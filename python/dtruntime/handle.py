"""What a caller holds while its save goes on, and the thread that tells it of the end.

Always holds: a handle that says success stands for a checkpoint that is durable and published;
completion is decided in the engine, whose threads never call Python: one Python thread per manager
waits for it, resolves futures and runs callbacks, in the order of the saves; whatever a callback,
or a stream that a bar is written to, raises there, the thread goes on, and every save is announced.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import os
import queue
import threading
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from dtruntime import gpus
from dtruntime.errors import CheckpointError
from dtruntime.progress import ProgressBar

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from dtruntime import _native

_logger = logging.getLogger("dtruntime")
_LOOK_SECONDS = 0.1
"""How long one upload's end is waited for before that of another is."""


@dataclass(frozen=True)
class SaveProgress:
    """How far a save is, in bytes. All but ``written_bytes`` grow to ``raw_bytes``.

    Attributes:
        raw_bytes: Bytes of the state.
        captured_bytes: Bytes copied into the staging arena.
        encoded_bytes: Bytes checksummed and encoded.
        written_bytes: Stored bytes handed to the device; fewer where compression helps.

    """

    raw_bytes: int
    captured_bytes: int
    encoded_bytes: int
    written_bytes: int


@dataclass(frozen=True)
class SaveStats:
    """Where the time and the bytes of a save went.

    Attributes:
        stall_seconds: What the training loop lost: from the call to its return.
        prepare_seconds: Of these, taking the state apart, and copies from a device.
        wait_seconds: Of these, waiting for the previous save.
        capture_seconds: Of these, copying into the staging arena.
        durable_seconds: From the call until everything was durable and published.
        encode_seconds: Core-seconds of checksums and encoding, over all workers.
        write_seconds: From the first chunk at the writer until the shard was durable.
        publish_seconds: Making the manifest visible, with its syncs.
        raw_bytes: Bytes of the state.
        stored_bytes: Bytes of the shard file.
        chunks: Chunks in all.
        chunks_encoded: Chunks that compression shrank.
        staging_bytes: Bytes of the staging arena.
        streamed: Whether the state was larger than the arena and streamed through it.
        parts: Parts that the shard was uploaded in; 0 where the store is a directory.
        retries: Requests to the store's service that had to be repeated.
        io_backend: ``uring``, ``threads`` or ``s3``.

    """

    stall_seconds: float
    prepare_seconds: float
    wait_seconds: float
    capture_seconds: float
    durable_seconds: float
    encode_seconds: float
    write_seconds: float
    publish_seconds: float
    raw_bytes: int
    stored_bytes: int
    chunks: int
    chunks_encoded: int
    staging_bytes: int
    streamed: bool
    parts: int
    retries: int
    io_backend: str


@dataclass(frozen=True)
class SaveInfo:
    """A durable, complete, published checkpoint.

    Attributes:
        step: Its step.
        attempt: The attempt that wrote it: 32 hex digits.
        location: The store.
        raw_bytes: Bytes of the state.
        stored_bytes: Bytes of the shard file.
        removed_steps: Steps that retention, or a rewind, removed after the commit.
        stats: Where the time went.

    """

    step: int
    attempt: str
    location: str
    raw_bytes: int
    stored_bytes: int
    removed_steps: tuple[int, ...]
    stats: SaveStats


@dataclass(frozen=True)
class UploadInfo:
    """A checkpoint that was brought to the remote store.

    Attributes:
        step: Its step.
        was_there: Whether the remote store had it already.
        bytes: Bytes of its shards.
        parts: Parts that they were uploaded in.
        resumed_parts: Of these, parts that an earlier process had brought there.
        retries: Requests that had to be repeated.
        seconds: Seconds it took.

    """

    step: int
    was_there: bool
    bytes: int
    parts: int
    resumed_parts: int
    retries: int
    seconds: float


class PendingUpload(NamedTuple):
    """A checkpoint that is not in the remote store yet.

    Attributes:
        step: Its step.
        uploaded_bytes: Bytes that have gone so far in this try, or were there already.
        total_bytes: Bytes of the shards that this process brings.

    """

    step: int
    uploaded_bytes: int
    total_bytes: int


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
            _log(error, "a done callback of the save of step %d failed", self.step)


def _log(error: BaseException, message: str, *arguments: object) -> None:
    """Log an error; a logger's own failure must not end the thread."""
    with contextlib.suppress(Exception):
        _logger.error(message, *arguments, exc_info=error)


def _do(work: Callable[[], object]) -> None:
    """Do one piece of work; whatever it raises, later ones are done all the same."""
    try:
        work()
    except BaseException as error:  # noqa: BLE001  (an exit, too)
        _log(error, "following a save failed")


class Watcher:
    """The one Python thread of a manager that waits for the ends of saves.

    It keeps what it watches alive, so a save ends well even if manager and handle were dropped.
    """

    def __init__(self, *, shows_progress: bool) -> None:
        self._queue: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._lock = threading.RLock()  # a signal handler may close the manager in between
        self._is_stopping = False
        self._bar = ProgressBar() if shows_progress else None
        self._thread = threading.Thread(target=self._work, name="dtruntime-watcher", daemon=True)

    def start(self) -> None:
        """Start the thread, with its manager: a Python that is shutting down starts none."""
        self._thread.start()

    def watch(self, handle: SaveHandle, manager: _native.Manager) -> None:
        """Announce the end of ``handle`` when it comes. ``manager`` is kept alive until then."""
        self._queue.put(lambda: self._follow(handle, manager))

    def submit(self, work: Callable[[], object]) -> bool:
        """Run ``work`` on the thread; tell whether the thread is there to do so."""
        with self._lock:
            if not self._is_stopping:
                self._queue.put(work)
            return not self._is_stopping

    def stop(self, timeout: float | None = None) -> bool:
        """End the thread after everything submitted; tell whether it has ended in time."""
        self.request_stop()
        is_another = threading.current_thread() is not self._thread
        if is_another and self._thread.ident is not None:
            self._thread.join(timeout)
        return not self._thread.is_alive()

    def request_stop(self) -> None:
        """End the thread after everything submitted, without waiting."""
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
        """Show a bar until the save has ended; without one where it cannot be written."""
        with contextlib.suppress(Exception):
            while not handle._native.wait(0.1):  # noqa: SLF001
                bar.show(handle.step, handle.progress())
            bar.finish(handle.step, handle.progress())
