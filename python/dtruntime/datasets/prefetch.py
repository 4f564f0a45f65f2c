"""Files prefetched by one thread.

Always holds: at most the file that is being read and the next ``depth`` ones are ready or being
fetched; an error in the thread is raised where the file is requested; after ``close`` the thread
has ended, and what it fetched is released.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sys
import threading
from typing import TYPE_CHECKING

from dtruntime.errors import Closed

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

READ_AHEAD_BYTES = 256 << 20
"""Most bytes of upcoming files that the system is asked to read into its page cache."""


def release(descriptor: int) -> None:
    """Unlock and close a file.

    Closing alone would not release the lock where a process was forked in the meantime, such as a
    DataLoader's worker: it has the file open, too.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    finally:
        os.close(descriptor)


class Ready:
    """A file that can be read now.

    Attributes:
        path: What to open.

    """

    def __init__(self, path: str, descriptor: int | None = None) -> None:
        self.path = path
        self._descriptor = descriptor
        self._pid = os.getpid()

    def close(self) -> None:
        """Release it after reading: a copy in a cache may be evicted then."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is None:
            return
        if os.getpid() == self._pid:
            release(descriptor)
        else:  # a forked copy: the lock belongs to the parent, which reads the file
            os.close(descriptor)


def advise(bytes_max: int) -> Callable[[str, Callable[[], bool]], Ready]:
    """Return a fetch function that has the system read a file's beginning into its page cache."""

    def fetch(path: str, _is_cancelled: Callable[[], bool]) -> Ready:
        if bytes_max:
            with contextlib.suppress(OSError):  # reading the file will raise it
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    os.posix_fadvise(descriptor, 0, bytes_max, os.POSIX_FADV_WILLNEED)
                finally:
                    os.close(descriptor)
        return Ready(path)

    return fetch


class ReadAhead:
    """A list of files, prefetched in order.

    Args:
        paths: The files.
        fetch: Makes one ready, and may stop early once its second argument returns True. Called on
            the prefetch thread, or on the caller's if ``depth`` is 0.
        depth: How many to fetch ahead of the one that is being read.

    """

    def __init__(
        self,
        paths: Sequence[str],
        fetch: Callable[[str, Callable[[], bool]], Ready],
        depth: int,
    ) -> None:
        self._paths = paths
        self._fetch = fetch
        self._depth = depth
        self._pid = os.getpid()
        # Held by its own name: `Condition.__enter__` is Python code, in which Ctrl-C could leave it
        # locked for good.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._current = 0
        self._is_closed = False
        self._ready: dict[int, Ready | BaseException] = {}
        self._thread: threading.Thread | None = None

    def get(self, number: int) -> Ready:
        """Return file ``number``, once it is ready; each call asks for the next number.

        Raises:
            CheckpointError: It could not be fetched.

        """
        if self._depth == 0:
            return self._fetch(self._paths[number], lambda: False)
        if os.getpid() != self._pid:
            raise Closed(
                "continuing the iteration over a dataset",
                "it was started in the parent of this forked process",
                "start a new iteration in this process",
            )
        if self._thread is None:  # not in the constructor: on Ctrl-C here, the caller closes this
            self._thread = threading.Thread(target=self._run, name="dtruntime-ahead", daemon=True)
            self._thread.start()
        with self._lock:
            self._current = number
            self._changed.notify_all()
            while number not in self._ready:
                self._changed.wait()
            found = self._ready.pop(number)
        if isinstance(found, BaseException):
            raise found
        return found

    def close(self) -> None:
        """End the thread and release what it fetched."""
        if self._thread is None or os.getpid() != self._pid:
            return
        if not sys.is_finalizing():  # else the thread is frozen, and may hold the lock
            self._end(self._thread)
        self._thread = None
        for found in self._ready.values():
            if isinstance(found, Ready):
                found.close()
        self._ready.clear()

    def _end(self, thread: threading.Thread) -> None:
        with self._lock:
            self._is_closed = True
            self._changed.notify_all()
        if thread.is_alive():  # Ctrl-C may have interrupted its start
            thread.join()

    def _run(self) -> None:
        for number, path in enumerate(self._paths):
            with self._lock:
                while number > self._current + self._depth and not self._is_closed:
                    self._changed.wait()
                if self._is_closed:
                    return
            found: Ready | BaseException
            try:
                found = self._fetch(path, lambda: self._is_closed)
            except BaseException as error:  # noqa: BLE001  (raised where the file is requested)
                found = error
            with self._lock:
                self._ready[number] = found
                self._changed.notify_all()
