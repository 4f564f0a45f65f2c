"""Copies of a dataset's files on a local disk, shared by the processes of this machine.

They are in a subfolder of the given one, with a tag file that identifies it. A file there is

    <key>-<crc32>-<name>      a copy: the key hashes the source's path, size and modification time
    <key>.<random>.partial    a copy in progress; the process that writes it holds its lock

Always holds: the files there never take more bytes than the limit, including copies in progress;
only files with names of these two forms, in a folder with the tag, are ever removed, and never one
that is being read (its reader holds its lock). A copy is used only once it is complete, synced and
renamed; a process that did not write it checks its bytes before the first use. If there can be no
copy, the source is read: the cache makes reading faster, never impossible.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import re
import secrets
import stat
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from dtruntime.datasets.prefetch import Ready, release
from dtruntime.errors import DatasetNotFound, InvalidArgument, StorageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_logger = logging.getLogger("dtruntime")

_FOLDER = "dtruntime-datasets"
_TAG = "CACHEDIR.TAG"
_TAG_TEXT = (
    "Signature: 8a477f597d28d172789f06886806bc55\n"
    "# Copies of training data, made by dtruntime. They may be deleted at any time.\n"
)
_NEW_TAG = "CACHEDIR.TAG.new"
_LOCK = "lock"
_OWN_NAMES = {_TAG, _NEW_TAG, _LOCK}
_COPY = re.compile(r"[0-9a-f]{32}-[0-9a-f]{8}-.*", re.DOTALL)
_PARTIAL = re.compile(r"[0-9a-f]{32}\.[0-9a-f]{16}\.partial")
_BLOCK_BYTES = 4 << 20
_NAME_BYTES = 120
_FULL = (errno.ENOSPC, errno.EDQUOT)


class _Entry(NamedTuple):
    name: str
    size: int
    used_ns: int


class _Source(NamedTuple):
    path: str
    size: int
    key: str


class Cache:
    """A bounded folder of copies.

    Args:
        folder: A directory on a local disk.
        limit_bytes: Most bytes that the copies take, including those of other processes.

    Raises:
        InvalidArgument: The subfolder for the copies contains something else.

    """

    def __init__(self, folder: str | os.PathLike[str], limit_bytes: int) -> None:
        self.folder = Path(folder).absolute() / _FOLDER
        self.limit_bytes = limit_bytes
        self._is_off = False
        self._verified: set[str] = set()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._refuse_foreign_folder()
            with self._locked():
                self._write_tag()
                for entry in self._entries():
                    if _PARTIAL.fullmatch(entry.name):
                        self._remove(entry.name)  # unless a process is writing it
        except OSError as error:
            self._turn_off(error)

    def fetch(self, path: str, is_cancelled: Callable[[], bool]) -> Ready:
        """Return a copy of a file, creating it if needed; or the file itself.

        Raises:
            DatasetNotFound: The file is missing.
            StorageError: It cannot be read.

        """
        source = _source_of(path)
        if self._is_off or source.size > self.limit_bytes:
            return Ready(path)
        try:
            found = self._find(source) or self._make(source, is_cancelled)
        except OSError as error:
            self._turn_off(error)
            found = None
        return found or Ready(path)

    def _turn_off(self, error: OSError) -> None:
        if not self._is_off:
            full = "it is full" if error.errno in _FULL else str(error)
            _logger.warning(
                "the cache of datasets in `%s` is no longer used: %s; files are read from their "
                "source",
                self.folder,
                full,
            )
        self._is_off = True

    def _refuse_foreign_folder(self) -> None:
        """Refuse a folder with files but without our tag, before anything is written there.

        The tag is read last: another process that creates the folder writes it before any file.
        """
        others = {*os.listdir(self.folder)} - _OWN_NAMES  # noqa: PTH208
        tag = self._tag()
        if tag is None and others:
            raise InvalidArgument(
                f"caching datasets in `{self.folder}`",
                f"it contains `{min(others)}` and not our tag, so nothing there may be deleted",
                "pass another `cache_dir`, or remove that folder",
            )
        # A process that was killed while writing the tag may have left its beginning.
        if tag is not None and not _TAG_TEXT.startswith(tag):
            raise InvalidArgument(
                f"caching datasets in `{self.folder}`",
                f"its `{_TAG}` is not ours",
                "pass another `cache_dir`, or remove that folder",
            )

    def _tag(self) -> str | None:
        try:
            return (self.folder / _TAG).read_text(errors="replace")
        except FileNotFoundError:
            return None

    def _write_tag(self) -> None:
        """Write our tag, unless it exists. The caller holds the lock, so one process does it."""
        if self._tag() != _TAG_TEXT:
            (self.folder / _NEW_TAG).write_text(_TAG_TEXT)
            os.rename(self.folder / _NEW_TAG, self.folder / _TAG)  # noqa: PTH104

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the folder's lock, which serializes changes by all processes that use it."""
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        descriptor = os.open(self.folder / _LOCK, flags, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            release(descriptor)

    def _entries(self) -> list[_Entry]:
        found = []
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if not (_COPY.fullmatch(entry.name) or _PARTIAL.fullmatch(entry.name)):
                    continue
                try:
                    about = entry.stat(follow_symlinks=False)
                except FileNotFoundError:  # removed in the meantime
                    continue
                if stat.S_ISREG(about.st_mode):
                    found.append(_Entry(entry.name, about.st_size, about.st_mtime_ns))
        return found

    def _remove(self, name: str) -> bool:
        """Remove one of our files, unless it is locked; return whether it is gone."""
        try:
            descriptor = os.open(self.folder / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(self.folder / name)  # noqa: PTH108
        except FileNotFoundError:  # removed by hand
            return True
        except BlockingIOError:
            return False
        finally:
            release(descriptor)
        return True

    def _find(self, source: _Source) -> Ready | None:
        """Return the existing copy, checked; None if there is none."""
        with self._locked():
            names = [entry.name for entry in self._entries() if _is_of(entry, source)]
            if not names:
                return None
            path = self.folder / names[0]
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            except FileNotFoundError:
                return None
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        ready = Ready(str(path), descriptor)
        if names[0] in self._verified or _checksum(descriptor) == int(names[0][33:41], 16):
            self._verified.add(names[0])
            os.utime(descriptor)
            return ready
        ready.close()
        _logger.warning("a copy of `%s` in the cache is damaged; it is made again", source.path)
        with self._locked():
            self._remove(names[0])
        return None

    def _make(self, source: _Source, is_cancelled: Callable[[], bool]) -> Ready | None:
        """Copy the file; return None if there is no room, or it was cancelled."""
        descriptor, partial = self._reserve(source)
        if descriptor is None:
            return None
        try:
            checksum = _copy(source, descriptor, is_cancelled)
            if checksum is None:
                return None
            os.fsync(descriptor)
            name = f"{source.key}-{checksum:08x}-{_short(source.path)}"
            with self._locked():
                if (self.folder / name).exists():  # another process was faster
                    return None
                os.rename(self.folder / partial, self.folder / name)  # noqa: PTH104
                partial = ""
                fcntl.flock(descriptor, fcntl.LOCK_SH)
            self._verified.add(name)
            ready, descriptor = Ready(str(self.folder / name), descriptor), None
            return ready
        finally:
            if partial:  # under the lock: no process counts a file that is about to be removed
                with contextlib.suppress(OSError), self._locked():
                    os.unlink(self.folder / partial)  # noqa: PTH108
            if descriptor is not None:
                release(descriptor)

    def _reserve(self, source: _Source) -> tuple[int | None, str]:
        """Make room, and allocate it in a file at once, so that other processes count it."""
        with self._locked():
            is_made = any(entry.name.startswith(source.key) for entry in self._entries())
            if is_made or not self._make_room(source.size):
                return None, ""
            name = f"{source.key}.{secrets.token_hex(8)}.partial"
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            descriptor = os.open(self.folder / name, flags, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                if source.size:
                    os.posix_fallocate(descriptor, 0, source.size)
            except BaseException:
                release(descriptor)
                with contextlib.suppress(OSError):
                    os.unlink(self.folder / name)  # noqa: PTH108
                raise
            return descriptor, name

    def _make_room(self, size: int) -> bool:
        """Remove the least recently used files until ``size`` more bytes are within the limit."""
        entries = sorted(self._entries(), key=lambda entry: entry.used_ns)
        taken = sum(entry.size for entry in entries)
        for entry in entries:
            if taken + size <= self.limit_bytes:
                break
            if self._remove(entry.name):
                taken -= entry.size
        return taken + size <= self.limit_bytes


def _source_of(path: str) -> _Source:
    try:
        about = os.stat(path)  # noqa: PTH116
    except OSError as error:
        raise unreadable(path, error) from None
    text = f"{path}\0{about.st_size}\0{about.st_mtime_ns}"
    key = hashlib.sha256(os.fsencode(text)).hexdigest()[:32]
    return _Source(path, about.st_size, key)


def _is_of(entry: _Entry, source: _Source) -> bool:
    return (
        entry.name.startswith(source.key + "-")
        and _COPY.fullmatch(entry.name) is not None
        and entry.size == source.size
    )


def _short(path: str) -> str:
    """Return the end of a file's name, including the suffix, which readers depend on."""
    name = os.fsencode(os.path.basename(path))[-_NAME_BYTES:]  # noqa: PTH119
    return os.fsdecode(name)


def _checksum(descriptor: int) -> int:
    checksum = offset = 0
    while block := os.pread(descriptor, _BLOCK_BYTES, offset):
        checksum = zlib.crc32(block, checksum)
        offset += len(block)
    return checksum


def _copy(source: _Source, target: int, is_cancelled: Callable[[], bool]) -> int | None:
    """Copy all bytes and return their checksum; None if the source changed, or if cancelled."""
    checksum = copied = 0
    for block in _blocks(source.path):
        if is_cancelled() or copied + len(block) > source.size:
            return None
        checksum = zlib.crc32(block, checksum)
        rest = memoryview(block)
        while rest:
            written = os.pwrite(target, rest, copied)
            copied += written
            rest = rest[written:]
    return checksum if copied == source.size else None


def _blocks(path: str) -> Iterator[bytes]:
    """Yield a source's bytes; if it cannot be read, the error is not one of the cache."""
    try:
        with open(path, "rb", buffering=0) as file:  # noqa: PTH123
            while block := file.read(_BLOCK_BYTES):
                yield block
    except OSError as error:
        raise unreadable(path, error) from None


def unreadable(path: str, error: OSError) -> DatasetNotFound | StorageError:
    """Return the error for a dataset file that the system refused to read."""
    what = f"reading `{path}` of a dataset"
    if isinstance(error, FileNotFoundError):
        return DatasetNotFound(
            what,
            "it is registered, but missing on this worker",
            "mount the shared storage at the same path on every worker; if the dataset's files "
            "changed, register it again in the next run",
        )
    why = error.strerror or str(error)
    return StorageError(what, why, "check the storage, then resume from a checkpoint", error.errno)
