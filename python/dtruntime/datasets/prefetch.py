"""Files made ready before they are read, by one thread.

Always holds: at most the file that is being read and the next ``depth`` ones are ready or being
made ready; what goes wrong in the thread is raised where the file is asked for; after ``close`` the
thread is gone, and so is whatever was made ready.
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
"""Most bytes of coming files that the system is asked to read into its page cache."""


def release(descriptor: int) -> None:
    """Unlock and close a file.

    A lock is gone once nobody has the file open: to close it is not enough where a process was
    forked meanwhile, such as a DataLoader's worker, which has it open, too.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    finally:
        os.close(descriptor)


class Ready:
    """A file that can be read now.

    Attributes:
        path: Where.

    """

    def __init__(self, path: str, descriptor: int | None = None) -> None:
        self.path = path
        self._descriptor = descriptor
        self._pid = os.getpid()

    def close(self) -> None:
        """Say that it was read: a copy in a cache may go then."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is None:
            return
        if os.getpid() == self._pid:
            release(descriptor)
        else:  # a forked copy of this: the lock is that of the process which reads
            os.close(descriptor)


Fetch = "Callable[[str, Callable[[], bool]], Ready]"
"""Makes a file ready; gives up early once the function says that nobody wants it any more."""


def advise(bytes_max: int) -> Callable[[str, Callable[[], bool]], Ready]:
    """Give a fetch that has the system read the beginning of a file into its page cache."""

    def fetch(path: str, _is_unwanted: Callable[[], bool]) -> Ready:
        if bytes_max:
            with contextlib.suppress(OSError):  # who reads the file will hear of it
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    os.posix_fadvise(descriptor, 0, bytes_max, os.POSIX_FADV_WILLNEED)
                finally:
                    os.close(descriptor)
        return Ready(path)

    return fetch


class ReadAhead:
    """A list of files, made ready in its order.

    Args:
        paths: The files.
        fetch: Makes one ready; called on the thread, or on the caller's if ``depth`` is 0.
        depth: How many to make ready beside the one that is read.

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
        self._changed = threading.Condition()
        self._current = 0
        self._is_closed = False
        self._ready: dict[int, Ready | BaseException] = {}
        self._thread: threading.Thread | None = None

    def get(self, number: int) -> Ready:
        """Give file ``number``; files before it were read. Numbers ascend by one a call.

        Raises:
            CheckpointError: It could not be made ready.

        """
        if self._depth == 0:
            return self._fetch(self._paths[number], lambda: False)
        if os.getpid() != self._pid:
            raise Closed(
                "going on with a dataset",
                "its reading was begun in the parent of this forked process",
                "begin a new iteration in this process",
            )
        if self._thread is None:  # here, where a Ctrl-C already finds somebody who closes
            self._thread = threading.Thread(target=self._run, name="dtruntime-ahead", daemon=True)
            self._thread.start()
        with self._changed:
            self._current = number
            self._changed.notify_all()
            while number not in self._ready:
                self._changed.wait()
            found = self._ready.pop(number)
        if isinstance(found, BaseException):
            raise found
        return found

    def close(self) -> None:
        """End the thread and give up what it made ready."""
        if self._thread is None or os.getpid() != self._pid:
            return
        if not sys.is_finalizing():  # else the thread stands still for ever, maybe with the lock
            self._end(self._thread)
        self._thread = None
        for found in self._ready.values():
            if isinstance(found, Ready):
                found.close()
        self._ready.clear()

    def _end(self, thread: threading.Thread) -> None:
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        if thread.is_alive():  # a Ctrl-C may have come while it was being started
            thread.join()

    def _run(self) -> None:
        for number, path in enumerate(self._paths):
            with self._changed:
                while number > self._current + self._depth and not self._is_closed:
                    self._changed.wait()
                if self._is_closed:
                    return
            found: Ready | BaseException
            try:
                found = self._fetch(path, lambda: self._is_closed)
            except BaseException as error:  # noqa: BLE001  (it is raised where the file is wanted)
                found = error
            with self._changed:
                self._ready[number] = found
                self._changed.notify_all()
