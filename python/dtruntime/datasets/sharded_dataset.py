"""The samples of a registered dataset, for one rank: an iterable torch dataset.

>>> dataset = ShardedDataset(registry, "train")
>>> loader = ShardedLoader(dataset, batch_size=32, num_workers=4)
>>> state = {"model": model, "optimizer": optimizer, "data": dataset}
>>> manager.restore(state)  # the position is part of the checkpoint
>>> for epoch in range(dataset.epoch, 10):
...     dataset.set_epoch(epoch)
...     for batch in loader: ...  # continues within the epoch after a restore
...     manager.save(state, step)  # a restore from here continues with the next epoch

A rank reads its files in the order of the epoch, and the samples of a file in the file's own order
(shuffle them when writing the files). ``positions`` describes how files are assigned.

Always holds: ranks and workers together yield every sample of an epoch exactly once; a position
counts what was handed to the training, not what was read ahead; only the process that created the
dataset contacts the coordinator, never a DataLoader's worker.
"""

from __future__ import annotations

import inspect
import logging
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from hashlib import sha256
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.utils.data import IterableDataset, get_worker_info

from dtruntime import settings
from dtruntime.datasets import positions, readers
from dtruntime.datasets.cache import Cache, unreadable
from dtruntime.datasets.positions import Cursor, Position, WorkerStream
from dtruntime.datasets.prefetch import READ_AHEAD_BYTES, ReadAhead, advise
from dtruntime.errors import (
    DatasetChanged,
    InvalidArgument,
    UnreadableSample,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from dtruntime.checkpoint import CheckpointManager
    from dtruntime.datasets.prefetch import Ready
    from dtruntime.datasets.registry import DatasetRegistry, Share

_logger = logging.getLogger("dtruntime")

_PREFETCH = 2
_GIGABYTE = 10**9
_STATS_AT_ONCE = 16
_FEW_FILES = 256
"""Up to this many are examined sequentially."""
_NOTHING = object()


class Files(NamedTuple):
    """A rank's files: their paths, and the record that identifies the dataset."""

    paths: list[str]
    file_count: int
    format: str
    largest: int
    record: dict[str, Any]


class Start(NamedTuple):
    """Where an iteration starts."""

    files: Files
    position: Position


class ShardedDataset(IterableDataset[Any]):
    """The samples of this rank's files, in the order of the epoch.

    An iterable torch dataset: use it alone, in a ``DataLoader`` with any number of workers, or in a
    ``ShardedLoader``, which also knows the position with workers. It ends with its files, and ranks
    may have different numbers of samples: ``ShardedLoader`` makes ranks end together.

    An iteration starts once where ``load_state_dict`` set it, and otherwise at the beginning of the
    epoch. Resuming within a file reads and skips the samples before. A position that was saved
    after the end of an epoch is the beginning of the next: ``epoch`` reflects that once it is
    loaded. With ``end="exact"``, ranks only know from ``restore_from`` that all have ended.

    Args:
        registry: The job's datasets.
        name: The dataset.
        epoch: The epoch of the data, counted from 0; ``set_epoch`` changes it.
        read: Returns a file's samples, always in the same order: a function that takes the file's
            path (importable, if workers are spawned), or two paths: the one to open, which with
            ``cache_dir`` is a copy, and the file's own; or ``text``, ``jsonl`` or ``json`` (one
            value per line), ``csv``, ``parquet``, ``webdataset``. Default: the format that the
            dataset was registered with.
        rank: Default: as this process registered, else the environment's ``RANK``, else 0.
        world_size: Likewise, ``WORLD_SIZE``, else 1. If several ranks should see the same samples
            (tensor or pipeline parallelism), pass rank and number of the data parallel groups.
        prefetch: How many files to fetch ahead of the one being read, in each process that reads.
            Default: the coordinator's ``[dataset] prefetch_shards``, else 2.
        cache_dir: A directory on a local disk to copy files to before they are read. Can be shared
            by ranks and jobs. Default: none; the system is asked to read ahead, at most 256 MiB.
        cache_bytes: Most bytes of copies there, as an integer or text such as ``100GB``; files that
            do not fit are read from their source. Default: the coordinator's ``[dataset]
            cache_size_gb``.

    Raises:
        DatasetNotFound: There is no such dataset, or one of its files is missing.
        InvalidArgument: An argument is not accepted, or the cache is too small for the files.

    """

    def __init__(
        self,
        registry: DatasetRegistry,
        name: str,
        *,
        epoch: int = 0,
        read: str | Callable[..., Iterable[Any]] | None = None,
        rank: int | str | None = None,
        world_size: int | str | None = None,
        prefetch: int | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        cache_bytes: int | str | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        self._registry: DatasetRegistry | None = registry
        self.rank, self.world_size, job_settings = registry.place(rank, world_size)
        self._read = read
        if cache_dir is not None and callable(read) and not _needs_two(read):
            raise InvalidArgument(
                f"caching dataset `{name}` in `{cache_dir}`",
                "`read` takes only a path, which would be that of a copy, with another folder and "
                "name",
                "let it take two, `read(path, source)`: `path` is the file to open, and `source` "
                "its original path",
            )
        self._prefetch = _prefetch_of(prefetch, job_settings)
        self._cache_dir = cache_dir
        self._cache_bytes = _cache_bytes_of(cache_dir, cache_bytes, job_settings)
        if self._cache_dir is not None:
            Cache(self._cache_dir, self._cache_bytes)  # refuses a folder that is not a cache
        # Shared with workers: how often the start was set, and whether one of them is reading.
        self._shared = torch.zeros(2, dtype=torch.int64).share_memory_()
        self._version = 0
        self._cursor: Cursor | None = None
        self._fresh = self._at_beginning(settings.integer("epoch", epoch))
        self._check_cache_for_all(self._fresh.position.epoch)
        self._start = self._fresh
        self._cursor_files = self._fresh.files

    @property
    def epoch(self) -> int:
        """The epoch of the data."""
        return self._fresh.position.epoch

    def set_epoch(self, epoch: int) -> None:
        """Move to the beginning of an epoch; does nothing if it is the current one."""
        number = settings.integer("epoch", epoch)
        if number != self.epoch:
            self._fresh = self._at_beginning(number)
            self._set_start(self._fresh)

    def state_dict(self) -> dict[str, Any]:
        """Return the position, as plain values, to be saved in the training state.

        In a DataLoader's worker it is that worker's own, as ``StatefulDataLoader`` needs it.

        Raises:
            InvalidArgument: A plain ``DataLoader``'s workers read, so this process does not know
                what was consumed.

        """
        if self._cursor is None and self._shared[1].item() and get_worker_info() is None:
            raise InvalidArgument(
                f"the position of dataset `{self.name}`",
                "a DataLoader's workers read its samples, and this process does not see how many "
                "were consumed",
                "iterate over a `ShardedLoader` instead: it takes the same arguments; or use "
                "`num_workers=0`",
            )
        if self._cursor is None:
            return positions.encode(self._start.position, self._start.files.record)
        return positions.encode(self._cursor.position(), self._cursor_files.record)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from a position that this rank saved; the next iteration starts there.

        Raises:
            DatasetChanged: The dataset or the number of ranks has changed; the message says what.
            InvalidArgument: It is not a dataset position.

        """
        start, fresh = self._resumed(state)
        self._fresh = fresh
        self._set_start(start)

    def check_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raise what ``load_state_dict`` would raise, without changing anything."""
        self._resumed(state)

    def load_state_dicts(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Resume from the positions of all ranks, whose number may differ from the current one.

        What none of them had read is assigned to the current ranks: nothing is lost, and nothing
        is read twice. All ranks call it, with the same positions.

        Args:
            states: What ``state_dict`` returned on each rank, from one checkpoint.

        Raises:
            DatasetChanged: The dataset has changed.
            InvalidArgument: They are not the positions of all ranks from one checkpoint.

        """
        decoded = [positions.decode(self.name, state) for state in states]
        found = [position for position, _ in decoded]
        positions.check_complete(self.name, found)
        is_over = all(position.ended for position in found)
        if found[0].world_size == self.world_size:
            own = next(n for n, position in enumerate(found) if position.rank == self.rank)
            self.load_state_dict({**states[own], "ended": "all" if is_over else ""})
            return
        epoch = found[0].epoch
        whole = self._ask((0, 1), epoch)
        for position, saved in decoded:
            files = _pick(whole, positions.share_of(position, whole.file_count))
            positions.check_same(self.name, saved, self._examine(files).record)
        if is_over:
            self._fresh = self._at_beginning(epoch + 1)
            self._set_start(self._fresh)
            return
        before = positions.merge(found, whole.file_count)
        position = Position(epoch, self.rank, self.world_size, before)
        left = self._examine(_pick(whole, positions.share_of(position, whole.file_count)))
        self._fresh = self._at_beginning(epoch)
        self._set_start(Start(left, position))

    def restore_from(
        self, manager: CheckpointManager, key: str = "data", step: int | None = None
    ) -> None:
        """Resume from the position in a checkpoint, whatever number of ranks saved it.

        All ranks call it.

        Args:
            manager: A manager whose store has every rank's part.
            key: The top-level key of the position in the saved state.
            step: The checkpoint. Default: the newest that verifies.

        Raises:
            CheckpointError: As ``load`` and ``load_state_dicts`` do.

        """

        def saved_by(rank: int, step: int | None) -> Any:
            return manager.load(step, keys=[f"{key}.*"], from_rank=rank)[key]

        first = saved_by(0, step)
        position, _ = positions.decode(self.name, first)
        ranks = position.world_size
        if manager.last_load is not None:
            step, ranks = manager.last_load.step, manager.last_load.world_size
        # With tensor or pipeline parallelism several ranks read the same share, and any of them
        # knows its position.
        found = {position.rank: first}
        for rank in range(1, ranks):
            if len(found) == position.world_size:
                break
            saved = saved_by(rank, step)
            found.setdefault(positions.decode(self.name, saved)[0].rank, saved)
        self.load_state_dicts([*found.values()])

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        if self._is_outdated():
            return self._refuse()
        start = self.take_start()
        count, number = (1, 0) if worker is None else (worker.num_workers, worker.id)
        cursor = positions.cursor_at(start.position, start.files.file_count, count)
        stream = cursor.streams[(number + cursor.next_stream) % count]
        cursor.streams, cursor.next_stream = [stream], 0
        self.follow(cursor, start.files)
        if worker is not None:
            self._shared[1] = 1
            return self.walk(start.files, stream)
        return self._alone(start.files, cursor)

    def _alone(self, files: Files, cursor: Cursor) -> Iterator[Any]:
        """Read a share in this process, and record its end."""
        yield from self.walk(files, cursor.streams[0])
        cursor.finish(is_agreed=self.world_size == 1)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for a spawned worker: everything but the connection."""
        return self.__dict__ | {"_registry": None, "_cursor": None}

    @property
    def beginning(self) -> Start:
        """The beginning of the epoch."""
        return self._fresh

    def follow(self, cursor: Cursor, files: Files) -> None:
        """Make the dataset's position follow this iteration."""
        self._cursor, self._cursor_files = cursor, files

    def take_start(self) -> Start:
        """Return where the next iteration starts; the one after it starts at the epoch's start."""
        start, self._start = self._start, self._fresh
        return start

    def _set_start(self, start: Start) -> None:
        self._start, self._cursor_files = start, start.files
        self._cursor = None
        self._version += 1
        if get_worker_info() is None:
            self._shared[0], self._shared[1] = self._version, 0

    def _is_outdated(self) -> bool:
        """Return whether this is a worker that was started before the position was set."""
        return get_worker_info() is not None and self._shared[0].item() > self._version

    def _refuse(self) -> Iterator[Any]:
        """Raise at the first sample: an earlier error would end the worker silently."""
        error = InvalidArgument(
            f"reading dataset `{self.name}`",
            "this worker process was started before the epoch or the position was set",
            "pass `persistent_workers=False` to the DataLoader",
        )
        return map(_raise, [error])

    def _at_beginning(self, epoch: int) -> Start:
        share = self._ask((self.rank, self.world_size), epoch)
        return Start(self._examine(share), Position(epoch, self.rank, self.world_size))

    def _resumed(self, state: Mapping[str, Any]) -> tuple[Start, Start]:
        """Return where to resume from a position, and the beginning of its epoch."""
        position, saved = positions.decode(self.name, state)
        self._check_place(position)
        is_current = position.epoch == self.epoch
        fresh = self._fresh if is_current else self._at_beginning(position.epoch)
        files = fresh.files
        if is_current and position.before == self._start.position.before:
            files = self._start.files
        elif position.before != fresh.position.before:
            whole = self._ask((0, 1), position.epoch)
            files = self._examine(_pick(whole, positions.share_of(position, whole.file_count)))
        positions.check_same(self.name, saved, files.record)
        if position.ended == "all":
            fresh = self._at_beginning(position.epoch + 1)
            return fresh, fresh
        return Start(files, replace(position, ended="")), fresh

    def _check_place(self, position: Position) -> None:
        was, now = (position.rank, position.world_size), (self.rank, self.world_size)
        if was != now:
            raise DatasetChanged(
                f"resuming within an epoch of dataset `{self.name}`",
                f"the position is that of rank {was[0]} of {was[1]}, and this is rank {now[0]} of "
                f"{now[1]}",
                "leave it out of the state to restore, and call `restore_from(manager)` on every "
                "rank: what is left is assigned to the current ranks",
            )

    def _ask(self, place: tuple[int, int], epoch: int) -> Share:
        if self._registry is None or get_worker_info() is not None:
            raise InvalidArgument(
                f"looking up the files of dataset `{self.name}`, epoch {epoch}",
                "this process is a DataLoader worker, or has a copy of the dataset",
                "call `set_epoch` and `load_state_dict` in the process that created the dataset, "
                "before iterating",
            )
        return self._registry.share(self.name, place, epoch)

    def _examine(self, share: Share) -> Files:
        """Check that every file exists, and record its size."""
        self._reader(share.format)  # refuses an unknown format before training begins
        paths = [os.path.join(share.folder, file) for file in share.files]  # noqa: PTH118
        sizes = _sizes_of(paths)
        names = "\n".join(share.files)
        record = {
            "name": self.name,
            "format": share.format,
            "seed": share.seed,
            "shuffle": share.shuffle,
            "total_samples": share.total_samples,
            "file_count": share.file_count,
            "bytes": sum(sizes),
            "names": sha256(os.fsencode(names)).hexdigest(),
            "sizes": sha256("\n".join(map(str, sizes)).encode()).hexdigest(),
        }
        return Files(paths, share.file_count, share.format, max(sizes, default=0), record)

    def check_workers(self, count: int) -> None:
        """Warn if the cache is too small for what this many workers read at a time."""
        self._check_cache(self._start.files.largest, count)

    def _check_cache_for_all(self, epoch: int) -> None:
        """Refuse a cache that is too small for any file, on every rank and before training."""
        if self._cache_dir is not None:
            whole = self._ask((0, 1), epoch)
            paths = [os.path.join(whole.folder, file) for file in whole.files]  # noqa: PTH118
            self._check_cache(max(_sizes_of(paths), default=0), 1)

    def _check_cache(self, largest: int, readers_count: int) -> None:
        needed = largest * (self._prefetch + 1) * readers_count
        if self._cache_dir is None or needed <= self._cache_bytes:
            return
        what = f"caching dataset `{self.name}` in `{self._cache_dir}`"
        each = f"the largest file has {largest} bytes, and {self._prefetch + 1} are kept at a time"
        if readers_count == 1:
            raise InvalidArgument(
                what,
                f"{each}, but `cache_bytes` is {self._cache_bytes}",
                f"allow at least {needed} bytes, or pass a smaller `prefetch`",
            )
        _logger.warning(
            "%s: %s by each of %d workers, but `cache_bytes` is %d; some are not cached",
            what,
            each,
            readers_count,
            self._cache_bytes,
        )

    def _reader(self, format_name: str) -> Callable[[str, str], Iterable[Any]]:
        """Return the function that reads a file, given the path to open and its own path."""
        if not callable(self._read):
            samples = readers.open_samples(self._read or format_name)
            return lambda path, _: samples(path)
        own: Callable[..., Iterable[Any]] = self._read
        return own if _needs_two(own) else lambda path, _: own(path)

    def _fetcher(self) -> Callable[[str, Callable[[], bool]], Ready]:
        if self._cache_dir is None:
            return advise(READ_AHEAD_BYTES // self._prefetch if self._prefetch else 0)
        return Cache(self._cache_dir, self._cache_bytes).fetch

    def walk(self, files: Files, stream: WorkerStream) -> Iterator[Any]:
        """Yield a stream's samples, and keep its progress up to date."""
        sources = [files.paths[number] for number in stream.files]
        if not sources:
            return
        read = self._reader(files.format)
        ahead = ReadAhead(sources, self._fetcher(), self._prefetch)
        try:
            for entry, source in enumerate(sources):
                stream.entry, stream.within = entry, stream.skip_of(entry)
                ready = ahead.get(entry)
                try:
                    yield from self._samples(source, read(ready.path, source), stream)
                finally:
                    ready.close()
            stream.finish()
        finally:
            ahead.close()

    def _samples(self, source: str, opened: Iterable[Any], stream: WorkerStream) -> Iterator[Any]:
        """Yield the samples of one file that were not consumed before, and count each."""
        samples = iter(opened)
        try:
            self._skip(source, samples, stream.within)
            for stream.within, sample in enumerate(samples, stream.within + 1):  # noqa: B020
                stream.given += 1
                yield sample
        except readers.Unreadable as error:
            raise UnreadableSample(
                f"reading `{source}` of dataset `{self.name}`",
                str(error),
                "fix the file; or register the dataset without it, and start an epoch again",
            ) from None
        except OSError as error:
            if callable(self._read):  # the user's function may raise it for its own reasons
                raise
            raise unreadable(source, error) from None
        finally:
            close = getattr(samples, "close", None)
            if close is not None:
                close()

    def _skip(self, source: str, samples: Iterator[Any], count: int) -> None:
        for taken in range(count):
            if next(samples, _NOTHING) is _NOTHING:
                raise DatasetChanged(
                    f"resuming within `{source}` of dataset `{self.name}`",
                    f"{count} samples of it were consumed before, and now it has only {taken}",
                    "restore the file as it was; `read` must return the same samples each time",
                )


def _needs_two(read: Callable[..., Any]) -> bool:
    """Return whether a reader requires a second argument."""
    try:
        signature = inspect.signature(read)
    except ValueError:  # some built-in functions have no signature
        return False
    try:
        signature.bind(None)
    except TypeError:
        return True
    return False


def _raise(error: Exception) -> None:
    raise error


def _prefetch_of(given: int | None, job_settings: Mapping[str, str]) -> int:
    if given is not None:
        return settings.integer("prefetch", given)
    return int(job_settings.get("dataset.prefetch_shards", _PREFETCH))


def _cache_bytes_of(
    folder: str | os.PathLike[str] | None, given: int | str | None, job_settings: Mapping[str, str]
) -> int:
    if given is not None:
        return settings.parse_bytes("cache_bytes", given)
    gigabytes = job_settings.get("dataset.cache_size_gb")
    if gigabytes is None and folder is not None:
        raise InvalidArgument(
            f"setting `cache_dir` = {os.fspath(folder)!r}",
            "no limit of the bytes stored there is set",
            'pass `cache_bytes="100GB"`, or set the coordinator\'s `[dataset] cache_size_gb`',
        )
    return int(gigabytes or 0) * _GIGABYTE


def _pick(whole: Share, places: Sequence[int]) -> Share:
    return whole._replace(files=[whole.files[place] for place in places])


def _sizes_of(paths: Sequence[str]) -> list[int]:
    """Return the sizes of files, several concurrently: on network storage each takes a while."""
    if len(paths) <= _FEW_FILES:
        return [_size_of(path) for path in paths]
    with ThreadPoolExecutor(_STATS_AT_ONCE) as pool:
        return list(pool.map(_size_of, paths))


def _size_of(path: str) -> int:
    try:
        about = os.stat(path)  # noqa: PTH116  (takes half as long as `Path.stat`)
    except OSError as error:
        raise unreadable(path, error) from None
    return about.st_size if stat.S_ISREG(about.st_mode) else 0
