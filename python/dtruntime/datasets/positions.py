"""Where a rank is in an epoch of a dataset: values, and pure functions of them.

The files of an epoch stand in one order for all ranks; a file's number in it is its *place*. What
nobody has read yet is dealt to the ranks like cards, place by place: a rank's *share*. A share is
dealt to *lanes* in the same way, one for each DataLoader worker; a lane is read from its front.

>>> position = Position(epoch=0, rank=1, world_size=2)
>>> share_of(position, 5)
[1, 3]

Always holds: the shares of all ranks are everything that was not read when they were dealt, none
twice, and so are the lanes of a share; how far a lane is says exactly which samples were taken.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from dtruntime.errors import DatasetChanged, InvalidArgument, UnsupportedFormat

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

_VERSION = 1

Spans = tuple[tuple[int, int], ...]
"""Numbers as ranges ``[begin, end)``: ascending, apart from one another."""


class Cut(NamedTuple):
    """What was read of numbered files.

    Attributes:
        done: The files that were read whole.
        within: Samples that were taken of files that were read in part.

    """

    done: Spans = ()
    within: Mapping[int, int] = {}


class Deal(NamedTuple):
    """How a share was dealt to lanes.

    Attributes:
        lanes: To how many; 0 before it was dealt at all.
        done: Files of the share, by their number in it, that had been read by then.
        next_lane: The lane whose turn it is.

    """

    lanes: int = 0
    done: Spans = ()
    next_lane: int = 0


_NOTHING_READ = Cut()
_NOT_DEALT = Deal()


@dataclass(frozen=True)
class Position:
    """Where one rank is.

    Attributes:
        epoch: The epoch of the data, counted from 0.
        rank: The rank.
        world_size: Among how many ranks the files were dealt.
        before: What had been read when they were dealt, by place. Empty unless the number of ranks
            changed within the epoch.
        read: What this rank has read since, by number in its share; samples count from the file's
            first.
        deal: How the share is dealt to lanes.
        samples: How many samples this rank was given in this epoch, with this number of ranks.
        ended: ``all`` once the epoch is over for all ranks, as they agreed; ``rank`` once it is for
            this one, and nothing is known of the others; else empty.

    """

    epoch: int
    rank: int
    world_size: int
    before: Cut = _NOTHING_READ
    read: Cut = _NOTHING_READ
    deal: Deal = _NOT_DEALT
    samples: int = 0
    ended: str = ""


def spans_of(numbers: Iterable[int]) -> Spans:
    """Give ascending numbers as spans.

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
    """Give the numbers that spans hold."""
    return {number for begin, end in spans for number in range(begin, end)}


def outside(spans: Spans, count: int) -> list[int]:
    """Give the numbers below ``count`` that spans do not hold, ascending."""
    found: list[int] = []
    begin = 0
    for first, last in spans:
        found.extend(range(begin, min(first, count)))
        begin = last
    found.extend(range(begin, count))
    return found


def share_of(position: Position, file_count: int) -> list[int]:
    """Give the places of a rank's files, in the order of the epoch."""
    return outside(position.before.done, file_count)[position.rank :: position.world_size]


@dataclass
class Lane:
    """A part of a share, and how far it was read.

    Attributes:
        files: Numbers of files in the share, in the order to read them.
        skips: Samples that were taken of them before, by number.
        cursor: The entry of ``files`` that is being read; their count once all were.
        within: Samples that were taken of that file, from its first on.
        given: Samples that this lane gave in all.

    """

    files: Sequence[int]
    skips: Mapping[int, int]
    cursor: int = 0
    within: int = 0
    given: int = 0

    def __post_init__(self) -> None:
        self.within = self.skip_of(0)

    def skip_of(self, entry: int) -> int:
        """Give how many samples of this entry were taken before."""
        return self.skips.get(self.files[entry], 0) if entry < len(self.files) else 0

    def finish(self) -> None:
        """Say that all was read."""
        self.cursor, self.within = len(self.files), 0


@dataclass
class Track:
    """The reading of a share from one position on: its lanes, in the order of the workers."""

    start: Position
    lanes: list[Lane]
    next_lane: int = field(default=0)
    ended: str = ""

    def finish(self, *, is_agreed: bool) -> None:
        """Say that the epoch is over: for all ranks, or for this one."""
        self.ended = "all" if is_agreed else "rank"
        for lane in self.lanes:
            lane.finish()

    def position(self) -> Position:
        """Give where the reading is now."""
        done = numbers_in(self.start.read.done)
        within = dict(self.start.read.within)
        for lane in self.lanes:
            done.update(lane.files[: lane.cursor])
            if lane.cursor < len(lane.files) and lane.within:
                within[lane.files[lane.cursor]] = lane.within
        read = Cut(spans_of(sorted(done)), {n: k for n, k in within.items() if n not in done})
        given = sum(lane.given for lane in self.lanes)
        return replace(
            self.start,
            read=read,
            deal=self.start.deal._replace(next_lane=self.next_lane),
            samples=self.start.samples + given,
            ended=self.ended,
        )


def track(start: Position, file_count: int, workers: int) -> Track:
    """Deal a share to workers.

    As many workers as before go on with the lanes that they had, and the one whose turn it is
    comes first: then the samples that follow come in the same order, too. Any other number gets
    what is left, dealt anew.

    Args:
        start: Where to begin.
        file_count: Files of the whole epoch.
        workers: DataLoader workers, at least 1.

    """
    deal = start.deal
    if deal.lanes != workers:
        deal = Deal(workers, start.read.done)
    places = share_of(start, file_count)
    skips = {n: start.before.within[p] for n, p in enumerate(places) if p in start.before.within}
    skips.update(start.read.within)
    dealt = outside(deal.done, len(places))
    done = numbers_in(start.read.done)
    lanes = [
        Lane([number for number in dealt[lane::workers] if number not in done], skips)
        for lane in range(workers)
    ]
    return Track(replace(start, deal=deal), lanes, deal.next_lane)


def merge(positions: Sequence[Position], file_count: int) -> Cut:
    """Give what all ranks together had read, by place: the cut to deal the rest from."""
    done = numbers_in(positions[0].before.done)
    within = dict(positions[0].before.within)
    for position in positions:
        places = share_of(position, file_count)
        done.update(places[number] for number in numbers_in(position.read.done))
        within.update({places[number]: k for number, k in position.read.within.items()})
    return Cut(spans_of(sorted(done)), {p: k for p, k in within.items() if p not in done})


def check_complete(name: str, positions: Sequence[Position]) -> None:
    """Refuse positions that are not those of all ranks at one moment.

    Raises:
        InvalidArgument: One is missing, is there twice, or belongs to another epoch or deal.

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
    """Give a position, and what dataset it is of, as plain values that JSON can hold, too."""
    return {
        "version": _VERSION,
        "dataset": dict(dataset),
        "epoch": position.epoch,
        "rank": position.rank,
        "world_size": position.world_size,
        "before": _encode_cut(position.before),
        "read": _encode_cut(position.read),
        "lanes": position.deal.lanes,
        "lanes_done": [list(span) for span in position.deal.done],
        "next_lane": position.deal.next_lane,
        "samples": position.samples,
        "ended": position.ended,
    }


def _encode_cut(cut: Cut) -> dict[str, Any]:
    return {
        "done": [list(span) for span in cut.done],
        "within": [list(pair) for pair in sorted(cut.within.items())],
    }


def decode(name: str, state: Any) -> tuple[Position, dict[str, Any]]:
    """Give the position and the dataset of what ``encode`` gave.

    Raises:
        UnsupportedFormat: A newer version of this package made it.
        InvalidArgument: It is something else.

    """
    what = f"the position of dataset `{name}`"
    hint = "pass what `state_dict()` of the dataset gave"
    if not isinstance(state, dict) or "version" not in state:
        kind = type(state).__name__
        raise InvalidArgument(what, f"a state of a dataset is expected, got `{kind}`", hint)
    if state["version"] != _VERSION:
        raise UnsupportedFormat(
            what,
            f"it is of version {state['version']!r}, this package knows {_VERSION}",
            "use the version of dtruntime that saved it, or a newer one",
        )
    try:
        deal = Deal(
            int(state["lanes"]), _decode_spans(state["lanes_done"]), int(state["next_lane"])
        )
        position = Position(
            epoch=int(state["epoch"]),
            rank=int(state["rank"]),
            world_size=int(state["world_size"]),
            before=_decode_cut(state["before"]),
            read=_decode_cut(state["read"]),
            deal=deal,
            samples=int(state["samples"]),
            ended=str(state.get("ended", "")),
        )
        return position, dict(state["dataset"])
    except (KeyError, TypeError, ValueError) as error:
        why = f"it is incomplete: {type(error).__name__} {error}"
        raise InvalidArgument(what, why, hint) from None


def _decode_spans(spans: Any) -> Spans:
    return tuple((int(begin), int(end)) for begin, end in spans)


def _decode_cut(cut: Any) -> Cut:
    return Cut(
        _decode_spans(cut["done"]), {int(number): int(count) for number, count in cut["within"]}
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
        DatasetChanged: Naming what differs.

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
            f"going on within an epoch of dataset `{name}`",
            "it is not what it was when the position was saved: " + "; ".join(changes),
            "bring the dataset back as it was, or leave its position out and begin an epoch anew "
            "with `set_epoch`",
        )
