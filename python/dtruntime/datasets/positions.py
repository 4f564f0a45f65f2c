"""The position of a rank in an epoch of a dataset: values, and pure functions of them.

The files of an epoch have the same order on all ranks; a file's index in it is its *place*. Files
that have not been read are assigned to the ranks round-robin, by place: a rank's *share*. A share
is assigned to *streams* in the same way, one per DataLoader worker, each read in order.

>>> position = Position(epoch=0, rank=1, world_size=2)
>>> share_of(position, 5)
[1, 3]

Always holds: the shares of all ranks partition what was not read when they were assigned, and the
streams of a share partition it likewise; a stream's progress determines exactly which samples were
consumed.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from dtruntime.errors import DatasetChanged, InvalidArgument, UnsupportedFormat

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

_VERSION = 1

Spans = tuple[tuple[int, int], ...]
"""Numbers as ranges ``[begin, end)``: ascending and not adjacent."""


class Progress(NamedTuple):
    """What was read of numbered files.

    Attributes:
        done: The files that were read completely.
        within: By file: samples consumed of those that were read in part.

    """

    done: Spans = ()
    within: Mapping[int, int] = {}


class Assignment(NamedTuple):
    """How a share was assigned to streams.

    Attributes:
        streams: The number of streams; 0 before the first assignment.
        done: Files of the share, by their index in it, that had been read by then.
        next_stream: The stream whose turn it is.

    """

    streams: int = 0
    done: Spans = ()
    next_stream: int = 0


_NOTHING_READ = Progress()
_NOT_ASSIGNED = Assignment()


@dataclass(frozen=True)
class Position:
    """The position of one rank.

    Attributes:
        epoch: The epoch of the data, counted from 0.
        rank: The rank.
        world_size: The number of ranks that the files were assigned to.
        before: What had been read when they were assigned, by place. Empty unless the number of
            ranks changed within the epoch.
        read: What this rank has read since, by index in its share; samples count from the start of
            the file.
        assignment: How the share is assigned to streams.
        samples: How many samples this rank consumed in this epoch, with this number of ranks.
        ended: ``all`` once all ranks have agreed that the epoch is over; ``rank`` once it is over
            for this one, and unknown for the others; else empty.

    """

    epoch: int
    rank: int
    world_size: int
    before: Progress = _NOTHING_READ
    read: Progress = _NOTHING_READ
    assignment: Assignment = _NOT_ASSIGNED
    samples: int = 0
    ended: str = ""


def spans_of(numbers: Iterable[int]) -> Spans:
    """Return ascending numbers as spans.

    >>> spans_of([0, 1, 2, 5])
    ((0, 3), (5, 6))
    """
    spans: list[tuple[int, int]] = []
    for number in numbers:
        if spans and spans[-1][1] == number:
            spans[-1] = (spans[-1][0], number + 1)
        else:
            spans.append((number, number + 1))
    return tuple(spans)


def numbers_in(spans: Spans) -> set[int]:
    """Return the numbers in spans."""
    return {number for begin, end in spans for number in range(begin, end)}


def outside(spans: Spans, count: int) -> list[int]:
    """Return the numbers below ``count`` that are not in spans, ascending."""
    found: list[int] = []
    begin = 0
    for first, last in spans:
        found.extend(range(begin, min(first, count)))
        begin = last
    found.extend(range(begin, count))
    return found


def share_of(position: Position, file_count: int) -> list[int]:
    """Return the places of a rank's files, in the order of the epoch."""
    return outside(position.before.done, file_count)[position.rank :: position.world_size]


@dataclass
class WorkerStream:
    """The part of a share that one worker reads, and its progress.

    Attributes:
        files: Indices of files in the share, in reading order.
        skips: By index: samples that were consumed of them before.
        entry: The entry of ``files`` that is being read; their count once all were.
        within: Samples that were consumed of that file, from its start.
        given: Total samples that this stream yielded.

    """

    files: Sequence[int]
    skips: Mapping[int, int]
    entry: int = 0
    within: int = 0
    given: int = 0

    def __post_init__(self) -> None:
        self.within = self.skip_of(0)

    def skip_of(self, entry: int) -> int:
        """Return how many samples of this entry were consumed before."""
        return self.skips.get(self.files[entry], 0) if entry < len(self.files) else 0

    def finish(self) -> None:
        """Mark everything as read."""
        self.entry, self.within = len(self.files), 0


@dataclass
class Cursor:
    """An iteration over a share from a position on: its streams, in the order of the workers."""

    start: Position
    streams: list[WorkerStream]
    next_stream: int = field(default=0)
    ended: str = ""

    def finish(self, *, is_agreed: bool) -> None:
        """Mark the epoch as over: for all ranks, or for this one."""
        self.ended = "all" if is_agreed else "rank"
        for stream in self.streams:
            stream.finish()

    def position(self) -> Position:
        """Return the current position."""
        done = numbers_in(self.start.read.done)
        within = dict(self.start.read.within)
        for stream in self.streams:
            done.update(stream.files[: stream.entry])
            if stream.entry < len(stream.files) and stream.within:
                within[stream.files[stream.entry]] = stream.within
        read = Progress(spans_of(sorted(done)), {n: k for n, k in within.items() if n not in done})
        given = sum(stream.given for stream in self.streams)
        return replace(
            self.start,
            read=read,
            assignment=self.start.assignment._replace(next_stream=self.next_stream),
            samples=self.start.samples + given,
            ended=self.ended,
        )


def cursor_at(start: Position, file_count: int, workers: int) -> Cursor:
    """Return the iteration from a position on, with its share assigned to workers.

    The same number of workers as before continues with the same streams, starting with the one
    whose turn it is: then the following samples also have the same order. For any other number,
    what is left is assigned again.

    Args:
        start: Where to start.
        file_count: Files of the whole epoch.
        workers: DataLoader workers, at least 1.

    """
    assignment = start.assignment
    if assignment.streams != workers:
        assignment = Assignment(workers, start.read.done)
    places = share_of(start, file_count)
    skips = {n: start.before.within[p] for n, p in enumerate(places) if p in start.before.within}
    skips.update(start.read.within)
    assigned = outside(assignment.done, len(places))
    done = numbers_in(start.read.done)
    streams = [
        WorkerStream([number for number in assigned[stream::workers] if number not in done], skips)
        for stream in range(workers)
    ]
    return Cursor(replace(start, assignment=assignment), streams, assignment.next_stream)


def merge(positions: Sequence[Position], file_count: int) -> Progress:
    """Return what all ranks together had read, by place: what is left is assigned again."""
    done = numbers_in(positions[0].before.done)
    within = dict(positions[0].before.within)
    for position in positions:
        places = share_of(position, file_count)
        done.update(places[number] for number in numbers_in(position.read.done))
        within.update({places[number]: k for number, k in position.read.within.items()})
    return Progress(spans_of(sorted(done)), {p: k for p, k in within.items() if p not in done})


def check_complete(name: str, positions: Sequence[Position]) -> None:
    """Refuse positions that are not those of all ranks from one checkpoint.

    Raises:
        InvalidArgument: One is missing, duplicated, or of another epoch or number of ranks.

    """
    what = f"the positions of dataset `{name}`"
    hint = "pass what each rank saved in one checkpoint: `manager.load(step, from_rank=rank)`"
    if not positions:
        raise InvalidArgument(what, "none is given", hint)
    size = positions[0].world_size
    found = sorted(position.rank for position in positions)
    if found != list(range(size)):
        raise InvalidArgument(what, f"those of ranks 0 to {size - 1} are needed, got {found}", hint)
    if len({(p.epoch, p.world_size, repr(p.before)) for p in positions}) > 1:
        raise InvalidArgument(what, "they are of different epochs or numbers of ranks", hint)


def encode(position: Position, dataset: Mapping[str, Any]) -> dict[str, Any]:
    """Return a position and its dataset's record as plain, JSON-compatible values."""
    return {
        "version": _VERSION,
        "dataset": dict(dataset),
        "epoch": position.epoch,
        "rank": position.rank,
        "world_size": position.world_size,
        "before": _encode_progress(position.before),
        "read": _encode_progress(position.read),
        "lanes": position.assignment.streams,
        "lanes_done": [list(span) for span in position.assignment.done],
        "next_lane": position.assignment.next_stream,
        "samples": position.samples,
        "ended": position.ended,
    }


def _encode_progress(progress: Progress) -> dict[str, Any]:
    return {
        "done": [list(span) for span in progress.done],
        "within": [list(pair) for pair in sorted(progress.within.items())],
    }


def decode(name: str, state: Any) -> tuple[Position, dict[str, Any]]:
    """Return the position and the dataset's record that ``encode`` encoded.

    Raises:
        UnsupportedFormat: A newer version of this package encoded it.
        InvalidArgument: It is something else.

    """
    what = f"the position of dataset `{name}`"
    hint = "pass what the dataset's `state_dict()` returned"
    if not isinstance(state, dict) or "version" not in state:
        kind = type(state).__name__
        raise InvalidArgument(what, f"a state of a dataset is expected, got `{kind}`", hint)
    if state["version"] != _VERSION:
        raise UnsupportedFormat(
            what,
            f"it has version {state['version']!r}, this package supports {_VERSION}",
            "use the version of dtruntime that saved it, or a newer one",
        )
    try:
        assignment = Assignment(
            int(state["lanes"]), _decode_spans(state["lanes_done"]), int(state["next_lane"])
        )
        position = Position(
            epoch=int(state["epoch"]),
            rank=int(state["rank"]),
            world_size=int(state["world_size"]),
            before=_decode_progress(state["before"]),
            read=_decode_progress(state["read"]),
            assignment=assignment,
            samples=int(state["samples"]),
            ended=str(state.get("ended", "")),
        )
        return position, dict(state["dataset"])
    except (KeyError, TypeError, ValueError) as error:
        why = f"it is incomplete: {type(error).__name__} {error}"
        raise InvalidArgument(what, why, hint) from None


def _decode_spans(spans: Any) -> Spans:
    return tuple((int(begin), int(end)) for begin, end in spans)


def _decode_progress(progress: Any) -> Progress:
    return Progress(
        _decode_spans(progress["done"]),
        {int(number): int(count) for number, count in progress["within"]},
    )


_NAMES = {
    "name": "name",
    "format": "format",
    "seed": "seed",
    "shuffle": "`shuffle`",
    "total_samples": "number of samples",
    "file_count": "number of files",
    "bytes": "size of this rank's files, in bytes,",
}
_DIGESTS = {
    "names": "names of files, or their order, differ",
    "sizes": "sizes of single files differ",
}


def check_same(name: str, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse a position of another dataset.

    Raises:
        DatasetChanged: The dataset differs; the message says how.

    """
    changes = [
        f"its {word} was {saved.get(key)!r} and is {now[key]!r}"
        for key, word in _NAMES.items()
        if saved.get(key) != now[key]
    ]
    if not changes:
        changes = [text for key, text in _DIGESTS.items() if saved.get(key) != now[key]]
    if changes:
        raise DatasetChanged(
            f"resuming within an epoch of dataset `{name}`",
            "it has changed since the position was saved: " + "; ".join(changes),
            "restore the dataset as it was, or leave its position out and start an epoch again "
            "with `set_epoch`",
        )
