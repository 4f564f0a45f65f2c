"""A loader that knows how much of a dataset was consumed, and makes ranks end together.

Samples come from the workers with the position after them; the position after the last sample of a
batch takes effect once that batch is yielded.

Always holds: the dataset's position is that of the batch yielded last, whatever was read ahead;
ranks that end together agree before each batch, so all of them yield the same number.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, IterableDataset, default_collate, get_worker_info
from torch.utils.data._utils.collate import default_convert

from dtruntime import settings
from dtruntime.datasets import positions
from dtruntime.errors import CheckpointError, Conflict, InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from dtruntime.datasets.positions import Cursor, WorkerStream
    from dtruntime.datasets.sharded_dataset import Files, ShardedDataset, Start

_ENDS = ("exact", "drop", "pad")


class _Mark(NamedTuple):
    """The progress of a stream after a sample."""

    stream: int
    entry: int
    within: int
    given: int


class _Batch(NamedTuple):
    """A batch from a worker, with the position after it."""

    mark: _Mark
    data: Any


class _Failure:
    """An error from a worker, which a DataLoader would turn into text."""

    def __init__(self, error: CheckpointError) -> None:
        self.error = error


class _Marked(IterableDataset[Any]):
    """A dataset whose samples come with their positions; wrapped by a ``ShardedLoader``.

    Attributes:
        dataset: The dataset.
        plan: The files, the streams, and the stream of the first worker. Set before each iteration.

    """

    def __init__(self, dataset: ShardedDataset) -> None:
        super().__init__()
        self.dataset = dataset
        self.plan: tuple[Files, list[WorkerStream], int] | None = None

    def __iter__(self) -> Iterator[Any]:
        assert self.plan is not None  # noqa: S101  (the loader sets it)
        files, streams, first = self.plan
        worker = get_worker_info()
        number = (first + (0 if worker is None else worker.id)) % len(streams)
        return self._marked(files, number, streams[number])

    def _marked(self, files: Files, number: int, stream: WorkerStream) -> Iterator[Any]:
        try:
            for sample in self.dataset.walk(files, stream):
                yield _Mark(number, stream.entry, stream.within, stream.given), sample
        except CheckpointError as error:
            yield _Failure(error)


class _Collate:
    """Wraps a collate function, so that a batch keeps the position after its last sample."""

    def __init__(self, collate: Callable[[Any], Any], *, is_batched: bool) -> None:
        self._collate = collate
        self._is_batched = is_batched

    def __call__(self, items: Any) -> _Batch | _Failure:
        listed = items if self._is_batched else [items]
        failed = [item for item in listed if isinstance(item, _Failure)]
        if failed:
            return failed[0]
        samples = [sample for _, sample in listed]
        data = self._collate(samples if self._is_batched else samples[0])
        return _Batch(listed[-1][0], data)


class ShardedLoader(DataLoader[Any]):
    """A ``DataLoader`` that knows how much of a dataset was consumed, and makes ranks end together.

    A batch counts as consumed once it is yielded, wherever it was read: ``state_dict`` of the
    dataset, or of this loader, is exact with any number of workers. With the same number of workers
    and the same batch size, the batches after a restore are exactly those that would have followed;
    otherwise they are the same samples in different batches.

    Args:
        dataset: The dataset. Each iteration goes once through its epoch.
        end: What to do if ranks have different numbers of batches. ``drop``: all end when the first
            of them runs out, and the rest of the epoch is skipped. ``pad``: all continue until the
            last of them runs out; the others repeat their epoch from its beginning meanwhile.
            ``exact``: each ends with its own files; a rank that waits for another one, as in
            DistributedDataParallel, then hangs. Default: ``drop``; ``exact`` for one rank.
        group: The process group of the ranks that end together: a small all-reduce over it precedes
            each batch. Default: all ranks, over gloo, which does not synchronize with GPUs.
        options: As for ``DataLoader``: ``batch_size``, ``num_workers``, ``collate_fn``,
            ``drop_last``, ``pin_memory``, ``multiprocessing_context``, ...

    Raises:
        InvalidArgument: Ranks should end together but cannot communicate; or an option is not
            accepted.

    """

    def __init__(
        self,
        dataset: ShardedDataset,
        *,
        end: str | None = None,
        group: Any = None,
        **options: Any,
    ) -> None:
        if options.get("persistent_workers"):
            raise InvalidArgument(
                "setting `persistent_workers` = True",
                "persistent workers do not see `set_epoch`",
                "leave it out: workers are started for each epoch",
            )
        is_batched = options.get("batch_size", 1) is not None
        collate = options.pop("collate_fn", None)
        collate = collate or (default_collate if is_batched else default_convert)
        self._source = dataset
        self._marked = _Marked(dataset)
        self._end, self._group = _end_of(dataset, end, group)
        super().__init__(
            self._marked, collate_fn=_Collate(collate, is_batched=is_batched), **options
        )
        self._streams = max(self.num_workers, 1)
        dataset.check_workers(self._streams)

    @property
    def epoch(self) -> int:
        """The epoch of the data."""
        return self._source.epoch

    def set_epoch(self, epoch: int) -> None:
        """Move the dataset to the beginning of an epoch; see ``ShardedDataset.set_epoch``."""
        self._source.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """Return the dataset's position."""
        return self._source.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume the dataset from a position; see ``ShardedDataset.load_state_dict``."""
        self._source.load_state_dict(state)

    def check_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raise what ``load_state_dict`` would raise, without changing anything."""
        self._source.check_state_dict(state)

    def __iter__(self) -> Any:  # an iterator; torch annotates a private class
        source = self._source
        start = source.take_start()
        self._check_enough_files(start)
        cursor = positions.cursor_at(start.position, start.files.file_count, self._streams)
        source.follow(cursor, start.files)
        return self._hand_out(self._batches(start), cursor)

    def _batches(self, start: Start) -> Iterator[Any]:
        """Start to read. The streams are copies, because reading ahead advances them."""
        cursor = positions.cursor_at(start.position, start.files.file_count, self._streams)
        self._marked.plan = (start.files, cursor.streams, cursor.next_stream)
        return super().__iter__()

    def _hand_out(self, batches: Iterator[Any], cursor: Cursor) -> Iterator[Any]:
        repeats = self._repeats()
        while True:
            batch = self._next(batches)
            continues, is_padded = self._agree(has_batch=batch is not None)
            if not continues:
                break
            is_repeat = batch is None
            batch = batch or self._next(repeats)
            if is_padded:  # before any rank trains on it: one may have nothing to repeat
                self._agree(has_batch=True)
            if not is_repeat:
                mark = batch.mark
                stream = cursor.streams[mark.stream]
                stream.entry, stream.within, stream.given = mark.entry, mark.within, mark.given
                cursor.next_stream = (mark.stream + 1) % self._streams
            yield batch.data
        # With `exact`, a rank does not know whether the others have ended.
        cursor.finish(is_agreed=self._end != "exact" or self._source.world_size == 1)

    def _next(self, batches: Iterator[Any]) -> Any:
        try:
            batch = next(batches, None)
        except Exception:
            self._agree(has_batch=False, is_ok=False)
            raise
        if isinstance(batch, _Failure):
            self._agree(has_batch=False, is_ok=False)
            raise batch.error
        return batch

    def _repeats(self) -> Iterator[Any]:
        """Yield the batches of this rank's epoch repeatedly, while other ranks have more."""
        source = self._source
        found = True
        while found:
            found = False
            for batch in self._batches(source.beginning):
                found = True
                yield batch
        raise InvalidArgument(
            f"padding dataset `{source.name}`",
            f"rank {source.rank} has no batch to repeat",
            'write the dataset as more files, or use `end="drop"`',
        )

    def _agree(self, *, has_batch: bool, is_ok: bool = True) -> tuple[bool, bool]:
        """Return whether to continue, and whether some ranks repeat: the same on every rank."""
        if self._end == "exact":
            return has_batch, False
        minima = torch.tensor([int(has_batch), -int(has_batch), int(is_ok)])
        dist.all_reduce(minima, op=dist.ReduceOp.MIN, group=self._group)
        all_have_batch, any_has_batch, all_are_ok = minima.tolist()
        if is_ok and not all_are_ok:
            raise Conflict(
                f"reading dataset `{self._source.name}`",
                "another rank could not read its files",
                "see that rank's error; this rank's position is the one before this batch",
            )
        if self._end == "drop":
            return bool(all_have_batch), False
        return bool(any_has_batch), bool(any_has_batch and not all_have_batch)

    def _check_enough_files(self, start: Start) -> None:
        files, ranks = start.files.file_count, self._source.world_size
        if self._end != "exact" and files < ranks:
            raise InvalidArgument(
                f"reading dataset `{self._source.name}` on {ranks} ranks that end together",
                f"it has {files} files, so some ranks have none",
                'write it as more files, or pass `end="exact"`',
            )


def _on_the_host(group: Any) -> Any:
    """Return a process group of the same ranks whose messages need no GPU."""
    if "gloo" in str(dist.get_backend_config(group)):
        return group
    if group is None:
        return dist.new_group(backend="gloo")
    ranks = dist.get_process_group_ranks(group)
    return dist.new_group(ranks, backend="gloo", use_local_synchronization=True)


def _end_of(dataset: ShardedDataset, end: str | None, group: Any) -> tuple[str, Any]:
    """Return how ranks end, and the process group over which they agree."""
    size = dataset.world_size
    if end is not None:
        settings.choice("end", end, _ENDS)
    if end == "exact" or size == 1:
        return "exact", None
    what = f"loading dataset `{dataset.name}` on {size} ranks that end together"
    if not (dist.is_available() and dist.is_initialized()):
        raise InvalidArgument(
            what,
            "they communicate through `torch.distributed`, which is not initialized",
            'call `init_process_group` first; or pass `end="exact"` if no rank waits for another '
            "one in its steps",
        )
    group = _on_the_host(group)
    found = dist.get_world_size(group)
    if found != size:
        raise InvalidArgument(
            what,
            f"the process group has {found}",
            "pass `group=` with the ranks among which the dataset is divided",
        )
    return end or "drop", group
