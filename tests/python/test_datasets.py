"""Samples of a registered dataset: none lost, none twice, whoever reads, stops, dies or resumes.

A sample here is ``name:number``, so a list of samples says which file each came from. Most tests
deal files out by themselves, as a coordinator does; those of several processes ask a real one.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import gzip
import io
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections import Counter
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, note, settings
from hypothesis import strategies as st
from ranks import place_of, torchrun
from support import run_script, script_environment, start_script
from torch.utils.data import DataLoader

from dtruntime import (
    CheckpointManager,
    CheckpointNotFound,
    DatasetChanged,
    DatasetNotFound,
    DatasetRegistry,
    InvalidArgument,
    ShardedDataset,
    ShardedLoader,
    StorageError,
    TrainingOrchestrator,
    UnreadableSample,
    UnsupportedFormat,
    positions,
    readers,
)
from dtruntime.ahead import ReadAhead, Ready
from dtruntime.cache import Cache
from dtruntime.datasets import Share
from dtruntime.positions import Position

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")

EXAMPLES = Path(__file__).parents[2] / "python" / "examples"


class Dealer:
    """Deals out the files of a folder, as a coordinator would."""

    def __init__(self, folder, files, place=(0, 1), told=(), **changes):
        self.folder, self.files, self.own = folder, sorted(files), place
        self.told, self.changes = dict(told), changes
        self.asked = 0

    def place(self, rank, world_size):
        own_rank, own_size = self.own
        return (
            own_rank if rank is None else rank,
            own_size if world_size is None else world_size,
            self.told,
        )

    def share(self, name, place, epoch):
        if name != "train":
            raise DatasetNotFound(f"dataset `{name}`", "it is not registered", "register it")
        self.asked += 1
        rank, world_size = place
        order = sorted(self.files, key=lambda file: sha256(f"{epoch} {file}".encode()).digest())
        share = Share(
            str(self.folder), order[rank::world_size], len(order), "text", 100, 0, shuffle=True
        )
        return share._replace(**self.changes)


def lines_of(name: str, count: int) -> list[str]:
    return [f"{name}:{number}" for number in range(count)]


def make_files(folder: Path, counts: list[int]) -> list[str]:
    """Write a text file for each count, of so many samples."""
    folder.mkdir(exist_ok=True)
    names = [f"f{index:02}.txt" for index in range(len(counts))]
    for name, count in zip(names, counts, strict=True):
        (folder / name).write_text("".join(line + "\n" for line in lines_of(name, count)))
    return names


def samples_of(names: list[str], counts: list[int]) -> Counter[str]:
    pairs = zip(names, counts, strict=True)
    return Counter(line for name, count in pairs for line in lines_of(name, count))


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """Forty files; file ``k`` has ``k % 7`` samples: some none, most a few."""
    counts = [number % 7 for number in range(40)]
    folder = tmp_path_factory.mktemp("library")
    return folder, make_files(folder, counts), counts


def open_dataset(library, file_count=40, place=(0, 1), **options):
    folder, names, _ = library
    return ShardedDataset(Dealer(folder, names[:file_count], place), "train", **options)


def expected(library, file_count=40) -> Counter[str]:
    _, names, counts = library
    return samples_of(names[:file_count], counts[:file_count])


def take(iterator, count):
    """Give the next items, at most so many."""
    return [item for _, item in zip(range(count), iterator, strict=False)]


def flat(batches):
    return [sample for batch in batches for sample in batch]


# What is dealt.


@given(
    file_count=st.integers(0, 40),
    world_size=st.integers(1, 9),
    workers=st.integers(1, 6),
    epoch=st.integers(0, 3),
)
@settings(max_examples=300, deadline=None)
def test_ranks_and_workers_share_all_files(file_count, world_size, workers, epoch):
    seen = []
    for rank in range(world_size):
        position = Position(epoch, rank, world_size)
        share = positions.share_of(position, file_count)
        track = positions.track(position, file_count, workers)
        dealt = [number for lane in track.lanes for number in lane.files]
        assert sorted(dealt) == list(range(len(share)))
        counts = [len(lane.files) for lane in track.lanes]
        assert max(counts) - min(counts) <= 1
        seen += share
    assert sorted(seen) == list(range(file_count))


@given(st.sets(st.integers(0, 60)), st.integers(0, 60))
def test_spans_are_sets(numbers, count):
    spans = positions.spans_of(sorted(numbers))
    assert positions.numbers_in(spans) == numbers
    assert positions.outside(spans, count) == sorted(set(range(count)) - numbers)
    assert all(begin < end for begin, end in spans)
    assert all(one[1] < other[0] for one, other in pairwise(spans))


@given(data=st.data(), file_count=st.integers(0, 40), epoch=st.integers(0, 2))
@settings(max_examples=60, deadline=None)
def test_whatever_stops_and_resizes_nothing_is_lost_or_twice(library, data, file_count, epoch):
    """Ranks read, stop together or not, and go on in another number, again and again."""
    seen: Counter[str] = Counter()
    states = None
    for _ in range(data.draw(st.integers(1, 4))):
        world_size = data.draw(st.integers(1, 5), label="world size")
        limit = data.draw(st.integers(0, 40), label="samples")
        saved = []
        for rank in range(world_size):
            dataset = open_dataset(library, file_count, (rank, world_size), epoch=epoch)
            if states is not None:
                dataset.load_state_dicts(states)
            seen.update(take(iter(dataset), limit + data.draw(st.integers(0, 3))))
            saved.append(json.loads(json.dumps(dataset.state_dict())))
        states = saved
        if all(state["ended"] for state in states):
            break
    for rank in range(3):
        dataset = open_dataset(library, file_count, (rank, 3), epoch=epoch)
        dataset.load_state_dicts(states)
        is_over = all(state["ended"] for state in states)
        assert dataset.epoch == epoch + is_over
        seen.update([] if is_over else dataset)
    assert seen == expected(library, file_count)


def simulate(dataset, workers, batch_size, stop):
    """Read as a DataLoader's workers do, without processes: give the batches, and the position."""
    start = dataset.take_start()
    track = positions.track(start.position, start.files.file_count, workers)
    other = positions.track(start.position, start.files.file_count, workers)
    first = track.next_lane
    order = [(first + number) % workers for number in range(workers)]
    reading = {number: dataset.walk(start.files, other.lanes[number]) for number in order}
    batches = []
    while reading and len(batches) < stop:
        for number in [n for n in order if n in reading]:
            if len(batches) == stop:
                break
            batch = take(reading[number], batch_size)
            if not batch:
                del reading[number]
                continue
            lane, ahead = track.lanes[number], other.lanes[number]
            lane.cursor, lane.within, lane.given = ahead.cursor, ahead.within, ahead.given
            track.next_lane = (number + 1) % workers
            batches.append(batch)
    return batches, positions.encode(track.position(), start.files.record)


@given(
    place=st.sampled_from([(0, 1), (0, 2), (1, 2), (2, 3)]),
    counts=st.tuples(st.integers(0, 40), st.integers(1, 5), st.integers(1, 8)),
    stops=st.lists(st.integers(0, 30), max_size=4),
)
@settings(max_examples=100, deadline=None)
def test_what_follows_a_resume_is_what_would_have_followed(library, place, counts, stops):
    file_count, workers, batch_size = counts
    options = (library, file_count, place)
    whole, _ = simulate(open_dataset(*options), workers, batch_size, 1_000)
    pieces, state = [], open_dataset(*options).state_dict()
    for stop in [*stops, 1_000]:
        dataset = open_dataset(*options)
        dataset.load_state_dict(state)
        batches, state = simulate(dataset, workers, batch_size, stop)
        pieces += batches
    assert pieces == whole
    assert state["samples"] == len(flat(whole))


@given(
    workers=st.lists(st.integers(1, 5), min_size=2, max_size=5),
    batch_size=st.integers(1, 8),
    stop=st.integers(0, 20),
)
@settings(max_examples=50, deadline=None)
def test_another_number_of_workers_gives_the_same_samples(library, workers, batch_size, stop):
    seen, state = Counter(), open_dataset(library).state_dict()
    for count in workers:
        dataset = open_dataset(library)
        dataset.load_state_dict(state)
        is_last = count is workers[-1]
        batches, state = simulate(dataset, count, batch_size, stop)
        seen.update(flat(batches))
        note(f"{count} workers, last {is_last}")
    dataset.load_state_dict(state)
    seen.update(dataset)
    assert seen == expected(library)


# DataLoaders.


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_a_loader_is_exact_at_every_batch(library, workers):
    counts = {"batch_size": 7, "num_workers": workers}
    whole = list(ShardedLoader(open_dataset(library), **counts))
    assert Counter(flat(whole)) == expected(library)
    for stop in range(0, len(whole) + 1, 1 if workers == 0 else 4):
        dataset = open_dataset(library)
        loader = ShardedLoader(dataset, **counts)
        head = take(iter(loader), stop)
        state = loader.state_dict()
        assert state == dataset.state_dict()
        assert state["samples"] == len(flat(head))
        again = open_dataset(library)
        loader = ShardedLoader(again, **counts)
        loader.load_state_dict(state)
        assert head + list(loader) == whole
        assert list(loader) == whole  # the next iteration is the epoch's, from its beginning


def test_batches_may_be_single_samples_pinned_or_dropped(library):
    dataset = open_dataset(library)
    assert list(ShardedLoader(dataset, batch_size=None)) == list(dataset)
    whole = list(ShardedLoader(dataset, batch_size=16, num_workers=2, drop_last=True))
    assert {len(batch) for batch in whole} == {16}
    assert list(dataset) == list(dataset)
    tensors = ShardedLoader(
        dataset, batch_size=4, num_workers=2, collate_fn=lambda lines: torch.zeros(len(lines))
    )
    assert sum(len(batch) for batch in tensors) == sum(expected(library).values())
    # After an epoch whose rest was dropped nothing is left of it.
    again = open_dataset(library)
    again.load_state_dict(ShardedLoader(dataset, drop_last=True, batch_size=16).state_dict())


def test_a_plain_dataloader_reads_all_and_does_not_guess_the_position(library):
    dataset = open_dataset(library)
    alone = DataLoader(dataset, batch_size=5)
    head = take(iter(alone), 3)
    again = open_dataset(library)
    again.load_state_dict(dataset.state_dict())
    assert Counter(flat(head) + list(again)) == expected(library)
    dataset = open_dataset(library)
    assert Counter(flat(DataLoader(dataset, batch_size=5, num_workers=2))) == expected(library)
    with pytest.raises(InvalidArgument, match=r"does not see how many .*\nhint: iterate over a"):
        dataset.state_dict()
    dataset.set_epoch(1)  # from here on it is known again
    assert dataset.state_dict()["samples"] == 0


def test_workers_that_live_on_are_refused(library):
    dataset = open_dataset(library)
    with pytest.raises(InvalidArgument, match="workers that live on"):
        ShardedLoader(dataset, num_workers=1, persistent_workers=True)
    loader = DataLoader(dataset, num_workers=1, persistent_workers=True)
    list(loader)
    dataset.set_epoch(1)
    with pytest.raises((InvalidArgument, RuntimeError), match="started before the epoch"):
        list(loader)


def test_a_worker_asks_nobody(library):
    dealer = Dealer(library[0], library[1])
    dataset = ShardedDataset(dealer, "train")
    assert dealer.asked == 1
    list(ShardedLoader(dataset, num_workers=2))
    list(dataset)
    assert dealer.asked == 1

    class Turning(ShardedDataset):
        def __iter__(self):
            self.set_epoch(5)
            return super().__iter__()

    with pytest.raises((InvalidArgument, RuntimeError), match="where the dataset was made"):
        list(DataLoader(Turning(dealer, "train"), num_workers=1))


SPAWNED = """
import sys
from dtruntime import ShardedDataset, ShardedLoader

if __name__ == "__main__":
    from pathlib import Path
    sys.path.insert(0, sys.argv[2])
    from test_datasets import Dealer

    names = [path.name for path in Path(sys.argv[1]).iterdir()]
    dataset = ShardedDataset(Dealer(sys.argv[1], names), "train")
    loader = ShardedLoader(dataset, num_workers=2, batch_size=8, multiprocessing_context="spawn")
    seen = []
    for batch in loader:
        seen += batch
        assert dataset.state_dict()["samples"] == len(seen)
    print(sorted(seen))
"""


def test_spawned_workers(library, tmp_path):
    script = tmp_path / "spawned.py"
    script.write_text(SPAWNED)
    done = run_file(script, library[0], Path(__file__).parent)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [str(sorted(expected(library).elements()))]


def run_file(script, *arguments):
    return subprocess.run(
        [sys.executable, "-W", "ignore", str(script), *map(str, arguments)],
        env=script_environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_more_workers_or_ranks_than_files(tmp_path):
    names = make_files(tmp_path / "d", [3, 4])
    dealer = Dealer(tmp_path / "d", names)
    loader = ShardedLoader(ShardedDataset(dealer, "train"), batch_size=2, num_workers=4)
    assert Counter(flat(loader)) == samples_of(names, [3, 4])
    ranks = [ShardedDataset(dealer, "train", rank=rank, world_size=5) for rank in range(5)]
    assert Counter(line for dataset in ranks for line in dataset) == samples_of(names, [3, 4])
    assert [len(list(dataset)) for dataset in ranks[2:]] == [0, 0, 0]


def test_an_empty_dataset_has_no_samples(tmp_path):
    dataset = ShardedDataset(Dealer(tmp_path, []), "train", prefetch=0)
    assert list(dataset) == []
    assert list(ShardedLoader(dataset, num_workers=2)) == []
    state = dataset.state_dict()
    dataset.load_state_dict(state)
    assert list(dataset) == []


# Positions.


def test_epochs(library):
    dataset = open_dataset(library)
    assert dataset.epoch == 0
    first = take(iter(dataset), 5)
    dataset.set_epoch(0)  # where it is already
    assert dataset.state_dict()["samples"] == 5
    dataset.set_epoch(1)
    assert dataset.state_dict() == open_dataset(library, epoch=1).state_dict()
    other = list(dataset)
    assert Counter(other) == expected(library)
    assert other[:5] != first


@pytest.mark.parametrize("workers", [None, 0, 2])
def test_a_checkpoint_at_the_end_of_an_epoch_goes_on_with_the_next_one(
    library, open_manager, workers
):
    """The usual loop: it saves a step after each epoch, and the same step never twice."""
    manager = open_manager()
    seen = []
    for number in range(3):
        dataset = open_dataset(library)
        loader = dataset
        if workers is not None:
            loader = ShardedLoader(dataset, batch_size=5, num_workers=workers)
        state = {"data": dataset, "step": 0}
        with contextlib.suppress(CheckpointNotFound):
            manager.restore(state)
        assert dataset.epoch == number
        for epoch in range(dataset.epoch, number + 1):  # one epoch, then it is stopped
            dataset.set_epoch(epoch)
            seen.append(list(loader))
            assert dataset.epoch == epoch
            manager.save({"data": dataset, "step": state["step"] + 1}, step=state["step"] + 1)
    if workers is not None:
        seen = list(map(flat, seen))
    assert [Counter(samples) for samples in seen] == [expected(library)] * 3
    assert len({tuple(samples) for samples in seen}) == 3


def test_the_end_of_an_epoch_is_what_all_ranks_say(library):
    """A rank that ends alone, or has no files, does not know of the others."""
    ranks = [open_dataset(library, 2, (rank, 3)) for rank in range(3)]
    assert list(ShardedLoader(ranks[2], end="exact")) == []
    part = [dataset.state_dict() for dataset in ranks]
    list(ranks[0])
    list(ranks[1])
    whole = [dataset.state_dict() for dataset in ranks]
    for states, epoch in ((part, 0), (whole, 1)):
        for world_size in (2, 3):
            again = [open_dataset(library, 2, (rank, world_size)) for rank in range(world_size)]
            for dataset in again:
                dataset.load_state_dicts(states)
            assert [dataset.epoch for dataset in again] == [epoch] * world_size
            assert Counter(flat(again)) == expected(library, 2)
    again = open_dataset(library, 2, (2, 3))
    again.load_state_dict(whole[2])  # alone, it may have to wait for the others
    assert (again.epoch, list(again)) == (0, [])
    old = {key: value for key, value in whole[2].items() if key != "ended"}
    again.load_state_dict(old)
    assert again.epoch == 0


def test_the_newest_iteration_has_the_position(library):
    dataset = open_dataset(library)
    old, new = iter(dataset), iter(dataset)
    take(old, 9)
    take(new, 2)
    take(old, 9)
    assert dataset.state_dict()["samples"] == 2


def test_a_position_is_an_entry_of_a_checkpoint(library, open_manager):
    manager = open_manager()
    dataset = open_dataset(library)
    loader = ShardedLoader(dataset, batch_size=4, num_workers=2)
    batches = iter(loader)
    head = take(batches, 5)
    manager.save({"data": dataset, "step": 5}, step=5)
    take(batches, 3)  # after the checkpoint: read again
    again = open_dataset(library)
    state = {"data": ShardedLoader(again, batch_size=4, num_workers=2), "step": 0}
    manager.restore(state)
    whole = list(ShardedLoader(open_dataset(library), batch_size=4, num_workers=2))
    assert head + list(state["data"]) == whole
    assert json.dumps(manager.load()["data"])  # plain values


CHANGES = {
    "a file more": (
        lambda _folder, names: [*names, "more.txt"],
        {},
        "number of files was 4 and is",
    ),
    "a file renamed": (lambda _folder, names: ["more.txt", *names[1:]], {}, "names of files"),
    "a file longer": (
        lambda folder, names: (folder / names[0]).write_text("x" * 500) and names,
        {},
        "size of this rank's files, in bytes,",
    ),
    "another seed": (lambda _folder, names: names, {"seed": 3}, "its seed was 0 and is 3"),
    "no shuffling": (lambda _folder, names: names, {"shuffle": False}, "`shuffle` was True"),
    "another format": (lambda _folder, names: names, {"format": "jsonl"}, "format was 'text'"),
    "more samples": (
        lambda _folder, names: names,
        {"total_samples": 9},
        "samples was 100 and is 9",
    ),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_changed_dataset_is_refused_and_named(case, tmp_path, open_manager):
    change, spec, text = CHANGES[case]
    folder = tmp_path / "d"
    names = make_files(folder, [3, 3, 3, 3])
    (folder / "more.txt").write_bytes((folder / names[0]).read_bytes())
    dataset = ShardedDataset(Dealer(folder, names), "train")
    take(iter(dataset), 4)
    manager = open_manager()
    weight = torch.ones(3)
    manager.save({"model": weight, "data": dataset}, step=1)
    names = change(folder, names)
    again = ShardedDataset(Dealer(folder, names, **spec), "train")
    weight.zero_()
    with pytest.raises(DatasetChanged, match=text) as caught:
        manager.restore({"model": weight, "data": again})
    assert "begin an epoch anew" in caught.value.hint
    assert weight.tolist() == [0, 0, 0]  # it was found before anything was changed
    assert again.state_dict()["samples"] == 0
    saved = [dataset.state_dict()]
    other = ShardedDataset(Dealer(folder, names, (0, 2), **spec), "train")
    with pytest.raises(DatasetChanged):
        other.load_state_dicts(saved)


def test_a_file_that_has_fewer_samples_than_were_taken(tmp_path):
    names = make_files(tmp_path / "d", [9])
    dataset = ShardedDataset(Dealer(tmp_path / "d", names), "train")
    take(iter(dataset), 7)
    state = dataset.state_dict()
    path = tmp_path / "d" / names[0]
    path.write_bytes(b"\n" * 2 + b"x" * (path.stat().st_size - 2))
    dataset = ShardedDataset(Dealer(tmp_path / "d", names), "train")
    dataset.load_state_dict(state)
    with pytest.raises(DatasetChanged, match="7 samples of it were taken before, and now it has 3"):
        list(dataset)


def test_other_ranks_positions_are_refused(library):
    state = open_dataset(library, place=(1, 2)).state_dict()
    with pytest.raises(DatasetChanged, match=r"rank 1 of 2, and this is rank 0 of 3") as caught:
        open_dataset(library, place=(0, 3)).load_state_dict(state)
    assert "restore_from(manager)" in caught.value.hint
    with pytest.raises(DatasetChanged, match="rank 1 of 2, and this is rank 0 of 2"):
        open_dataset(library, place=(0, 2)).load_state_dict(state)
    dataset = open_dataset(library, place=(0, 3))
    with pytest.raises(InvalidArgument, match=r"ranks 0 to 1 are needed, got \[1\]"):
        dataset.load_state_dicts([state])
    with pytest.raises(InvalidArgument, match=r"got \[1, 1\]"):
        dataset.load_state_dicts([state, state])
    other = open_dataset(library, place=(0, 2), epoch=1).state_dict()
    with pytest.raises(InvalidArgument, match="different epochs"):
        dataset.load_state_dicts([other, state])
    with pytest.raises(InvalidArgument, match="none is given"):
        dataset.load_state_dicts([])


def test_what_is_no_position_is_refused(library):
    dataset = open_dataset(library)
    state = dataset.state_dict()
    for wrong in (None, [], {}, {"version": 1}, state | {"read": 5}, state | {"lanes": "x"}):
        with pytest.raises(InvalidArgument, match=r"hint: pass what `state_dict\(\)`"):
            dataset.load_state_dict(wrong)
    with pytest.raises(UnsupportedFormat, match="version 2, this package knows 1"):
        dataset.load_state_dict(state | {"version": 2})
    with pytest.raises(DatasetChanged, match="its name was 'other'"):
        dataset.load_state_dict(state | {"dataset": state["dataset"] | {"name": "other"}})


def test_a_position_with_workers_of_a_stateful_loader(library, monkeypatch):
    """As torchdata's StatefulDataLoader does: each worker's copy saves and loads its own state."""

    def in_worker(number, dataset):
        info = type("Info", (), {"id": number, "num_workers": 3})()
        monkeypatch.setattr("dtruntime.sharded_dataset.get_worker_info", lambda: info)
        return dataset

    states, seen = [], []
    for number in range(3):
        monkeypatch.undo()
        copy = in_worker(number, open_dataset(library))
        seen += take(iter(copy), 11)
        states.append(copy.state_dict())
    for number, state in enumerate(states):
        monkeypatch.undo()
        copy = in_worker(number, open_dataset(library))
        copy.load_state_dict(state)
        seen += iter(copy)
    assert Counter(seen) == expected(library)


# Formats.


def write(path: Path, data: bytes) -> str:
    path.write_bytes(gzip.compress(data) if path.name.endswith(".gz") else data)
    return str(path)


TEXT = "first\r\nzweite ä 𝄞\n\nü\u2028still\n  last"
LINES = ["first", "zweite ä 𝄞", "", "ü\u2028still", "  last"]


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_text(tmp_path, name):
    assert list(readers.open_samples("text")(write(tmp_path / name, TEXT.encode()))) == LINES
    bom = write(tmp_path / name, b"\xef\xbb\xbf" + TEXT.encode())
    assert list(readers.read_text(bom)) == LINES
    assert list(readers.read_text(write(tmp_path / name, b""))) == []


def test_huge_lines(tmp_path):
    lines = ["ä" * (16 << 20), "b", "c" * (8 << 20)]
    assert list(readers.read_text(write(tmp_path / "a.txt", "\n".join(lines).encode()))) == lines
    values = "\n".join(map(json.dumps, lines))
    path = write(tmp_path / "a.jsonl.gz", values.encode())
    assert list(readers.read_json_lines(path)) == lines


def test_json_lines(tmp_path):
    values = [{"a": [1, None, "ß"]}, 5, "x", [], {"u": "\u2028"}]
    text = "\n\n".join(json.dumps(value, ensure_ascii=False) for value in values) + "\n  \n"
    for name in ("a.jsonl", "a.jsonl.gz"):
        path = write(tmp_path / name, text.encode())
        assert list(readers.open_samples("jsonl")(path)) == values


def test_csv(tmp_path):
    text = 'name,text\n"Zoë","two\nlines, ""quoted"""\n\nx,y\n'
    expected_rows = [
        {"name": "Zoë", "text": 'two\nlines, "quoted"'},
        {"name": "x", "text": "y"},
    ]
    for name in ("a.csv", "a.csv.gz"):
        path = write(tmp_path / name, text.encode())
        assert list(readers.open_samples("CSV")(path)) == expected_rows
    tabs = write(tmp_path / "a.tsv", b"a\tb\n1,5\t2\n")
    assert list(readers.read_csv(tabs)) == [{"a": "1,5", "b": "2"}]
    assert list(readers.read_csv(write(tmp_path / "e.csv", b""))) == []


def test_webdataset(tmp_path):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for name, data in [
            ("a/0001.jpg", b"picture"),
            ("a/0001.seg.png", b"mask"),
            ("a/0002.jpg", b"other"),
            ("b/0002.txt", b""),
            ("README", b"no sample"),
        ]:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        link = tarfile.TarInfo("b/0003.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    for name in ("a.tar", "a.tar.gz"):
        path = write(tmp_path / name, packed.getvalue())
        assert list(readers.open_samples("webdataset")(path)) == [
            {"__key__": "a/0001", "jpg": b"picture", "seg.png": b"mask"},
            {"__key__": "a/0002", "jpg": b"other"},
            {"__key__": "b/0002", "txt": b""},
        ]


def pack(counts: dict[str, int]) -> bytes:
    """Give a tar of files of so many bytes."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for name, size in counts.items():
            member = tarfile.TarInfo(name)
            member.size = size
            tar.addfile(member, io.BytesIO(bytes(size)))
    return packed.getvalue()


DAMAGED_TARS = {
    "a header is damaged": (lambda tar: tar[:1_024] + b"x" + tar[1_025:], "bad checksum"),
    "a header is overwritten": (lambda tar: tar[:1_024] + b"x" * 512 + tar[1_536:], "header"),
    "a header is zeros": (
        lambda tar: tar[:1_024] + bytes(512) + tar[1_536:],
        "the archive ends, and more than zeros follow",
    ),
    "cut before a header": (lambda tar: tar[:1_024], "empty header"),
    "cut within a header": (lambda tar: tar[:1_200], "truncated header"),
    "cut within a file": (lambda tar: tar[:700], "unexpected end of data"),
    "two in one": (lambda tar: tar + tar, "the archive ends, and more than zeros follow"),
}


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz"])
@pytest.mark.parametrize("case", DAMAGED_TARS)
def test_a_damaged_tar_is_no_shorter_one(tmp_path, case, name):
    damage, text = DAMAGED_TARS[case]
    path = write(tmp_path / name, damage(pack({"1.txt": 400, "2.txt": 400, "3.txt": 400})))
    with pytest.raises(readers.Unreadable, match=text) as caught:
        list(readers.read_webdataset(path))
    assert ("after member" in str(caught.value)) == (case != "cut within a file")


def test_a_tar_without_samples_and_one_with_a_short_end(tmp_path):
    assert list(readers.read_webdataset(write(tmp_path / "a.tar", pack({})))) == []
    short = pack({"1.txt": 400})[: 1_024 + 512]  # one block of zeros only
    assert len(list(readers.read_webdataset(write(tmp_path / "b.tar", short)))) == 1


class FakeZstdError(Exception):
    pass


FakeZstdError.__name__ = "ZstdError"


class FakeFrame:
    """A frame of the fake `zstandard`: its length in a byte, and so many bytes."""

    def __init__(self):
        self.eof, self.unused_data, self.data = False, b"", b""

    def decompress(self, data):
        if data == b"broken":
            raise FakeZstdError("data corruption detected")
        given, self.data = len(self.data[1:]), self.data + data
        end = 1 + self.data[0]
        self.eof, self.unused_data = len(self.data) >= end, self.data[end:]
        return self.data[1 + given : end]


def test_zstandard_before_python_3_14(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "compression.zstd", None)
    fake = SimpleNamespace(ZstdDecompressor=lambda: SimpleNamespace(decompressobj=FakeFrame))
    monkeypatch.setitem(sys.modules, "zstandard", fake)
    monkeypatch.setattr(readers, "_COMPRESSED_BYTES", 7)
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(b"\x0c[1, 2, 3]\n4\n" + b"\x00" + b"\x035\n6")
    assert list(readers.read_json_lines(str(path))) == [[1, 2, 3], 4, 5, 6]
    path.write_bytes(b"\x0c[1, 2, 3]\n")
    with pytest.raises(readers.Unreadable, match="ended within a frame"):
        list(readers.read_json_lines(str(path)))
    path.write_bytes(b"broken")
    with pytest.raises(readers.Unreadable, match="data corruption detected"):
        list(readers.read_json_lines(str(path)))
    frames = b"".join(b"\xff" + pack({"1.txt": 9})[at : at + 255] for at in range(0, 10_200, 255))
    (tmp_path / "a.tar.zst").write_bytes(frames + b"\x28" + bytes(40))
    assert len(list(readers.read_webdataset(str(tmp_path / "a.tar.zst")))) == 1


BROKEN = {
    "json": ("jsonl", "a.jsonl", b'{"a": 1}\n{"a": \n', "line 2: one JSON value a line"),
    "nested": ("jsonl", "a.jsonl", b"[" * 200_000 + b"\n", "line 1: one JSON value a line"),
    "array": ("json", "a.json", b'[\n  {"a": 1}\n]', "line 1: one JSON value a line"),
    "no text": ("text", "a.txt", b"good\n\xff\xfe\n", "line 2: .utf-8. codec"),
    "ragged": ("csv", "a.csv", b"a,b\n1,2\n3\n", "line 3: 1 fields, where the first row names 2"),
    "quote": ("csv", "a.csv", b'a,b\n"1,2\n', "line 2: unexpected end of data"),
    "huge field": ("csv", "a.csv", b"a\n" + b"x" * 200_000, "line 2: field larger than"),
    "csv text": ("csv", "a.csv", b"a,b\n1,\xff\n", "after line"),
    "cut gzip": ("text", "a.txt.gz", None, "ended before the end-of-stream"),
    "no gzip": ("text", "b.txt.gz", None, "Not a gzipped file"),
    "tar": ("webdataset", "a.tar", b"x" * 5_000, "invalid header|bad checksum|truncated"),
    "cut tar": ("webdataset", "b.tar", None, "unexpected end of data"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_file_that_is_not_what_it_says(case, tmp_path):
    format_name, name, data, text = BROKEN[case]
    path = tmp_path / name
    if case == "cut gzip":
        path.write_bytes(gzip.compress(os.urandom(5_000))[:2_000])
        format_name = "text"
        path.write_bytes(gzip.compress(b"line\n" * 50_000)[:-20])
    elif case == "no gzip":
        path.write_bytes(b"plain text\n")
    elif case == "cut tar":
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as tar:
            member = tarfile.TarInfo("a.bin")
            member.size = 4_000
            tar.addfile(member, io.BytesIO(bytes(4_000)))
        path.write_bytes(packed.getvalue()[:3_000])
    else:
        path.write_bytes(data)
    dataset = ShardedDataset(Dealer(tmp_path, [name], format=format_name), "train")
    loader = ShardedLoader(dataset, num_workers=int(case == "json"), batch_size=None)
    for iterable in (dataset, loader):
        with pytest.raises(UnreadableSample, match=text) as caught:
            list(iterable)
        assert str(path) in caught.value.what
        assert caught.value.hint.startswith("mend the file")


def test_formats_that_need_something(tmp_path):
    (tmp_path / "a").touch()
    for format_name, text in (
        ("jsonlines", "did you mean `jsonl`"),
        ("tfrecord", "pass `read=`: a function of a path"),
    ):
        with pytest.raises(InvalidArgument, match=text):
            ShardedDataset(Dealer(tmp_path, ["a"], format=format_name), "train")
    dataset = ShardedDataset(Dealer(tmp_path, ["a"], format="tfrecord"), "train", read="text")
    assert list(dataset) == []


def test_what_is_not_installed_is_named(tmp_path, monkeypatch):
    for module in ("pyarrow", "pyarrow.parquet", "zstandard", "compression.zstd"):
        monkeypatch.setitem(sys.modules, module, None)
    for format_name, name, text in (
        ("parquet", "a.parquet", "pip install pyarrow"),
        ("text", "a.txt.zst", "pip install .zstandard"),
    ):
        (tmp_path / name).touch()
        dataset = ShardedDataset(Dealer(tmp_path, [name], format=format_name), "train")
        with pytest.raises(InvalidArgument, match=text):
            list(dataset)


def test_parquet(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    arrow = pytest.importorskip("pyarrow")
    rows = [{"a": number, "b": str(number)} for number in range(10)]
    path = tmp_path / "a.parquet"
    parquet.write_table(arrow.Table.from_pylist(rows), path, row_group_size=3)
    assert list(readers.open_samples("parquet")(str(path))) == rows
    path.write_bytes(b"PAR1 no parquet")
    with pytest.raises(readers.Unreadable):
        list(readers.read_parquet(str(path)))


def test_errors_of_a_function_that_reads_stay_what_they_are(library):
    def read(path):
        yield 1
        raise ZeroDivisionError(path)

    with pytest.raises(ZeroDivisionError):
        list(open_dataset(library, read=read))
    with pytest.raises(ZeroDivisionError):
        list(ShardedLoader(open_dataset(library, read=read), num_workers=1))


def test_files_that_are_not_there(tmp_path):
    names = make_files(tmp_path / "d", [5, 5, 5])
    dealer = Dealer(tmp_path / "d", names)
    dataset = ShardedDataset(dealer, "train", prefetch=0)
    (tmp_path / "d" / dataset._start.files.paths[1]).unlink()
    reading = iter(dataset)
    assert len(take(reading, 5)) == 5
    with pytest.raises(DatasetNotFound, match=r"not there on this worker\nhint: mount"):
        next(reading)
    assert dataset.state_dict()["samples"] == 5
    with pytest.raises(DatasetNotFound, match="not there on this worker"):
        list(ShardedLoader(dataset, num_workers=2))
    with pytest.raises(DatasetNotFound, match="not there on this worker"):
        ShardedDataset(dealer, "train")
    with pytest.raises(DatasetNotFound, match="is not registered"):
        ShardedDataset(dealer, "other")


def test_a_read_error_is_typed(library, monkeypatch):
    def refuse(path):
        raise OSError(errno.EIO, os.strerror(errno.EIO), path)
        yield

    monkeypatch.setitem(readers._READERS, "text", refuse)
    with pytest.raises(StorageError, match="Input/output error") as caught:
        list(open_dataset(library))
    assert caught.value.errno == errno.EIO


# Reading ahead.


def threads_ahead():
    return [thread for thread in threading.enumerate() if thread.name == "dtruntime-ahead"]


def test_no_more_than_the_next_files_are_made_ready():
    asked, given_up = [], []

    class Tracked(Ready):
        def close(self):
            given_up.append(self.path)

    def fetch(path, _is_unwanted):
        asked.append(path)
        return Tracked(path)

    paths = [str(number) for number in range(20)]
    ahead = ReadAhead(paths, fetch, 3)
    for number in range(10):
        ready = ahead.get(number)
        assert ready.path == paths[number]
        assert len(asked) <= number + 4
        ready.close()
    ahead.close()
    assert sorted(given_up, key=int) == asked  # what was made ready for nothing was given up, too
    assert threads_ahead() == []


def test_an_error_of_the_thread_comes_where_its_file_does():
    def fetch(path, _is_unwanted):
        if path == "2":
            raise StorageError("reading", "it broke", "mend it")
        return Ready(path)

    ahead = ReadAhead(["0", "1", "2"], fetch, 5)
    assert [ahead.get(number).path for number in range(2)] == ["0", "1"]
    with pytest.raises(StorageError, match="it broke"):
        ahead.get(2)
    ahead.close()


def test_a_close_ends_a_copy_that_is_being_made():
    begun = threading.Event()

    def fetch(path, is_unwanted):
        if path == "1":
            begun.set()
            while not is_unwanted():
                time.sleep(0.001)
        return Ready(path)

    ahead = ReadAhead(["0", "1"], fetch, 1)
    ahead.get(0)
    assert begun.wait(20)
    ahead.close()
    assert threads_ahead() == []


@pytest.mark.parametrize("workers", [0, 2])
def test_no_thread_is_left_behind(library, workers, tmp_path):
    before = {*multiprocessing.active_children()}  # what a failed test's traceback holds, say
    for options in ({}, {"cache_dir": tmp_path, "cache_bytes": "1MB"}):
        dataset = open_dataset(library, **options)
        loader = ShardedLoader(dataset, num_workers=workers)
        for _ in range(2):
            reading = iter(loader)
            take(reading, 3)
            del reading  # as a `break` does
        list(loader)
    assert threads_ahead() == []
    assert {*multiprocessing.active_children()} <= before


def test_a_forked_process_does_not_wait_for_a_thread_that_it_has_not(library):
    reading = iter(open_dataset(library))
    take(reading, 1)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            list(reading)
        except Exception as error:  # noqa: BLE001
            code = 0 if type(error).__name__ == "Closed" else 2
        os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert Counter([*take(reading, 10_000)]).total() == expected(library).total() - 1


def test_a_cache_that_is_too_small_for_any_file_is_refused_by_every_rank(tmp_path):
    folder = tmp_path / "d"
    folder.mkdir()
    names = [f"{number}.txt" for number in range(8)]
    for name in names:
        (folder / name).write_text("a line\n" * (1000 if name == "3.txt" else 10))
    options = {"cache_dir": tmp_path / "cache", "prefetch": 0}
    for rank in range(4):
        dealer = Dealer(folder, names, (rank, 4))
        with pytest.raises(InvalidArgument, match="allow at least 7000 bytes"):
            ShardedDataset(dealer, "train", cache_bytes=6999, **options)
        dataset = ShardedDataset(dealer, "train", cache_bytes=7000, **options)
        for epoch in range(6):
            dataset.set_epoch(epoch)


def test_a_reader_is_told_where_a_copied_file_belongs(library, tmp_path):
    def read(path, source):
        return [(Path(path).read_bytes() == Path(source).read_bytes(), Path(source).parent.name)]

    plain = {*open_dataset(library, read=lambda path: [(True, Path(path).parent.name)])}
    cache = {"cache_dir": tmp_path / "cache", "cache_bytes": "1MB"}
    assert {*open_dataset(library, read=read)} == plain
    assert {*open_dataset(library, read=read, **cache)} == plain
    with pytest.raises(InvalidArgument, match="which would be that of a copy") as caught:
        open_dataset(library, read=lambda path: [path], **cache)
    assert "read(path, source)" in caught.value.hint


INTERRUPTED = """
import sys, threading
sys.path.insert(0, sys.argv[2])
import pathlib
from test_datasets import Dealer
from dtruntime import ShardedDataset, ShardedLoader
from dtruntime.ahead import Ready

def fetch(path, is_unwanted):
    print("waiting", flush=True)
    while not is_unwanted():
        threading.Event().wait(0.01)
    return Ready(path)

names = [path.name for path in pathlib.Path(sys.argv[1]).iterdir()]
dataset = ShardedDataset(Dealer(sys.argv[1], names), "train")
dataset._fetcher = lambda: fetch
try:
    list(dataset)
except KeyboardInterrupt:
    print([t.name for t in threading.enumerate()], flush=True)
"""


def test_ctrl_c_ends_the_waiting_for_a_file(library):
    process = start_script(INTERRUPTED, library[0], Path(__file__).parent)
    assert process.stdout.readline() == "waiting\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert out == "['MainThread']\n", out + err


def test_the_end_of_the_interpreter_waits_for_no_thread(monkeypatch):
    """Threads stand still by then: here one that never gets its file."""
    goes_on, is_begun = threading.Event(), threading.Event()

    def fetch(path, _is_unwanted):
        if path == "1":
            is_begun.set()
            goes_on.wait(30)
        return Ready(path)

    ahead = ReadAhead(["0", "1"], fetch, 1)
    ahead.get(0)
    assert is_begun.wait(20)
    thread = ahead._thread
    monkeypatch.setattr(sys, "is_finalizing", lambda: True)
    closing = threading.Thread(target=ahead.close)
    closing.start()
    closing.join(5)
    is_closed = not closing.is_alive()
    goes_on.set()
    closing.join()
    thread.join()
    assert is_closed


def test_what_the_coordinator_says_is_used(library, tmp_path):
    folder, names, _ = library
    told = {"dataset.prefetch_shards": "5", "dataset.cache_size_gb": "3"}
    dataset = ShardedDataset(Dealer(folder, names, told=told), "train", cache_dir=tmp_path)
    assert (dataset._prefetch, dataset._cache_bytes) == (5, 3 * 10**9)
    dataset = ShardedDataset(
        Dealer(folder, names, told=told), "train", prefetch=1, cache_dir=tmp_path, cache_bytes="1GB"
    )
    assert (dataset._prefetch, dataset._cache_bytes) == (1, 10**9)
    with pytest.raises(InvalidArgument, match=r"how much may be stored there\nhint: pass `cache_b"):
        open_dataset(library, cache_dir=tmp_path)


# The cache.


def used(cache: Cache) -> int:
    return sum(entry.size for entry in cache._entries())


def always() -> bool:
    return False


@given(
    sizes=st.lists(st.integers(0, 5_000), min_size=1, max_size=12),
    limit=st.integers(0, 12_000),
    order=st.lists(st.tuples(st.integers(0, 11), st.booleans()), max_size=40),
)
@settings(max_examples=100, deadline=None)
def test_a_cache_never_exceeds_its_limit(tmp_path_factory, sizes, limit, order):
    folder = tmp_path_factory.mktemp("cache")
    for number, size in enumerate(sizes):
        (folder / f"s{number}").write_bytes(os.urandom(size))
    cache = Cache(folder / "cache", limit)
    held = []
    for number, keeps in order:
        source = folder / f"s{number % len(sizes)}"
        ready = cache.fetch(str(source), always)
        assert Path(ready.path).read_bytes() == source.read_bytes()
        assert used(cache) <= limit
        if keeps:
            held.append((ready, source))
        else:
            ready.close()
        for other, path in held:  # what is being read stays
            assert Path(other.path).read_bytes() == path.read_bytes()
    for ready, _ in held:
        ready.close()


def test_copies_are_used_again_and_the_longest_unused_goes(tmp_path):
    sources = []
    for number in range(4):
        sources.append(tmp_path / f"s{number}.txt.gz")
        sources[-1].write_bytes(os.urandom(1_000))
    cache = Cache(tmp_path / "cache", 3_000)
    paths = []
    for number in (0, 1, 2, 0, 3):
        ready = cache.fetch(str(sources[number]), always)
        paths.append(ready.path)
        ready.close()
    assert paths[3] == paths[0]
    assert all(path.endswith(".txt.gz") for path in paths)
    left = {path.name for path in cache.folder.iterdir() if "-" in path.name}
    assert left == {Path(path).name for path in (paths[0], paths[2], paths[4])}


def test_only_our_own_files_are_removed(tmp_path):
    source = tmp_path / "s"
    source.write_bytes(os.urandom(1_000))
    cache = Cache(tmp_path / "cache", 1_500)
    strangers = ["precious.txt", f"{'0' * 32}-12345678", f"{'0' * 31}-{'0' * 8}-x", "x.partial"]
    for name in strangers:
        (cache.folder / name).write_bytes(bytes(5_000))
    (cache.folder / f"{'1' * 32}-{'0' * 8}-link").symlink_to(source)
    (cache.folder / f"{'2' * 32}-{'0' * 8}-folder").mkdir()
    for number in range(5):
        source.write_bytes(os.urandom(1_000 + number))
        cache.fetch(str(source), always).close()
    assert all((cache.folder / name).exists() for name in strangers)
    assert (cache.folder / f"{'1' * 32}-{'0' * 8}-link").is_symlink()
    assert source.exists()
    assert used(cache) <= 1_500


def test_a_folder_of_somebody_else_is_refused(tmp_path):
    (tmp_path / "dtruntime-datasets").mkdir()
    (tmp_path / "dtruntime-datasets" / "thesis.tex").write_text("years of work")
    with pytest.raises(InvalidArgument, match=r"holds `thesis\.tex` and has no tag of ours"):
        Cache(tmp_path, 100)
    (tmp_path / "dtruntime-datasets" / "CACHEDIR.TAG").write_text("Signature: another")
    with pytest.raises(InvalidArgument, match=r"`CACHEDIR\.TAG` is not ours"):
        Cache(tmp_path, 100)


def test_processes_that_make_a_cache_at_once_all_get_it(tmp_path, caplog):
    meeting = threading.Barrier(4)
    failed = []

    def make(folder):
        meeting.wait()
        try:
            Cache(folder, 100)
        except InvalidArgument as error:
            failed.append(error)

    for number in range(100):
        threads = [
            threading.Thread(target=make, args=[tmp_path / str(number)])
            for _ in range(meeting.parties)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failed == []
    assert caplog.text == ""


@pytest.mark.parametrize("left", [{}, {"CACHEDIR.TAG": ""}, {"CACHEDIR.TAG.new": "Sig"}])
def test_a_folder_that_was_left_half_made_is_made(tmp_path, left):
    folder = tmp_path / "dtruntime-datasets"
    folder.mkdir()
    (folder / "lock").touch()
    for name, text in left.items():
        (folder / name).write_text(text)
    Cache(tmp_path, 100)
    assert (folder / "CACHEDIR.TAG").read_text().startswith("Signature: 8a477f597d28d172789f0688")
    (folder / f"{'0' * 32}-{'0' * 8}-copy").touch()
    Cache(tmp_path, 100)


def test_a_tag_that_appears_meanwhile_is_no_stranger(tmp_path, monkeypatch):
    Cache(tmp_path / "other", 100)
    tag = (tmp_path / "other" / "dtruntime-datasets" / "CACHEDIR.TAG").read_text()

    def list_late(folder):
        (Path(folder) / "CACHEDIR.TAG").write_text(tag)
        return ["CACHEDIR.TAG", f"{'0' * 32}.{'0' * 16}.partial"]

    monkeypatch.setattr(os, "listdir", list_late)
    Cache(tmp_path, 100)


def test_a_copy_that_goes_meanwhile_does_not_end_the_cache(tmp_path, monkeypatch, caplog):
    source = tmp_path / "s"
    source.write_bytes(os.urandom(1_000))
    cache = Cache(tmp_path, 10_000)
    cache.fetch(str(source), always).close()
    scandir, open_file = os.scandir, os.open
    folder = os.fspath(cache.folder)

    def drop():
        for name in os.listdir(folder):  # noqa: PTH208  (`scandir` is another here)
            if name.endswith("-s"):
                os.unlink(f"{folder}/{name}")  # noqa: PTH108

    @contextlib.contextmanager
    def scan_late(folder):
        with scandir(folder) as entries:
            found = list(entries)
        drop()
        yield found

    def open_late(path, *options):
        if str(path).endswith("-s"):
            drop()
        return open_file(path, *options)

    for name, late in (("scandir", scan_late), ("open", open_late)):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, late)
            cache.fetch(str(source), always).close()
        ready = cache.fetch(str(source), always)
        assert Path(ready.path).parent == cache.folder
        ready.close()
    assert caplog.text == ""


def test_what_a_crash_left_is_dropped_at_the_start_and_nothing_else(tmp_path):
    cache = Cache(tmp_path, 10_000)
    left, being_made = (cache.folder / f"{digit * 32}.{'0' * 16}.partial" for digit in "ab")
    left.write_bytes(bytes(500))
    with being_made.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        Cache(tmp_path, 10_000)
        assert (left.exists(), being_made.exists()) == (False, True)
    Cache(tmp_path, 10_000)
    assert not being_made.exists()


@contextlib.contextmanager
def forked(does):
    """Have a forked process do something, and then live on, with all files that it inherited."""
    hears, told = os.pipe()
    waits, ends = os.pipe()
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            does()
            os.write(told, b".")
            os.close(ends)
            os.read(waits, 1)
        os._exit(0)
    os.close(told)
    try:
        assert os.read(hears, 1) == b"."
        yield
    finally:
        os.close(ends)
        os.waitpid(child, 0)
        os.close(hears)
        os.close(waits)


def test_a_forked_process_keeps_no_lock_and_gives_none_up(tmp_path, monkeypatch):
    for number in range(2):
        (tmp_path / f"s{number}").write_bytes(os.urandom(1_000))
    cache = Cache(tmp_path, 1_500)
    ready = cache.fetch(str(tmp_path / "s0"), always)
    name = Path(ready.path).name
    with forked(ready.close):
        assert not cache._remove(name)  # it is read here
        ready.close()
        assert cache._remove(name)
    with cache._locked(), forked(lambda: None):
        pass
    fsync = os.fsync
    with contextlib.ExitStack() as stack:

        def fork_meanwhile(descriptor):
            stack.enter_context(forked(lambda: None))
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", fork_meanwhile)
        ready = cache.fetch(str(tmp_path / "s1"), always)
        ready.close()
        assert cache._remove(Path(ready.path).name)
        flags = fcntl.LOCK_EX | fcntl.LOCK_NB
        with cache._locked():
            stack.enter_context(forked(lambda: None))
        with (cache.folder / "lock").open() as file:
            fcntl.flock(file, flags)


@pytest.mark.parametrize("damage", ["flipped", "cut", "emptied"])
def test_a_damaged_copy_is_made_anew(tmp_path, damage, caplog):
    source = tmp_path / "s"
    source.write_bytes(os.urandom(10_000))
    ready = Cache(tmp_path, 100_000).fetch(str(source), always)
    copy = Path(ready.path)
    ready.close()
    data = bytearray(copy.read_bytes())
    data[5_000] ^= 1
    copy.write_bytes({"flipped": data, "cut": data[:9_999], "emptied": b""}[damage])
    cache = Cache(tmp_path, 100_000)
    for _ in range(2):  # where the name of the broken copy is in the way, the file itself is read
        ready = cache.fetch(str(source), always)
        assert Path(ready.path).read_bytes() == source.read_bytes()
        ready.close()
    assert ("is damaged; it is made anew" in caplog.text) == (damage == "flipped")


def test_a_source_that_changed_is_copied_anew(tmp_path):
    source = tmp_path / "s"
    source.write_bytes(b"old")
    cache = Cache(tmp_path, 100)
    cache.fetch(str(source), always).close()
    source.write_bytes(b"new")
    os.utime(source, ns=(1, 1))
    ready = cache.fetch(str(source), always)
    assert Path(ready.path).read_bytes() == b"new"


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "fsync", "rename"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_a_cache_that_cannot_be_written_is_said_once(request, call, number):
    names = ("library", "tmp_path", "monkeypatch", "caplog")
    library, tmp_path, monkeypatch, caplog = map(request.getfixturevalue, names)

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    dataset = open_dataset(library, cache_dir=tmp_path, cache_bytes="1MB")
    monkeypatch.setattr(os, call, refuse)
    assert Counter(dataset) == expected(library)
    warnings = [record for record in caplog.records if "is not used from now on" in record.message]
    assert len(warnings) == 1
    assert ("it is full" in warnings[0].message) == (number == errno.ENOSPC)
    assert [path for path in Cache(tmp_path, 1).folder.iterdir() if "partial" in path.name] == []


def test_a_cache_smaller_than_its_files_is_refused_at_the_start(tmp_path, caplog):
    names = make_files(tmp_path / "d", [100, 10])
    largest = (tmp_path / "d" / names[0]).stat().st_size
    dealer = Dealer(tmp_path / "d", names)
    options = {"prefetch": 2, "cache_dir": tmp_path / "cache"}
    with pytest.raises(InvalidArgument, match=rf"allow at least {3 * largest} bytes"):
        ShardedDataset(dealer, "train", cache_bytes=3 * largest - 1, **options)
    dataset = ShardedDataset(dealer, "train", cache_bytes=3 * largest, **options)
    assert Counter(dataset) == samples_of(names, [100, 10])
    loader = ShardedLoader(dataset, num_workers=2, batch_size=None)
    assert "some are read where they are" in caplog.text
    assert Counter(loader) == samples_of(names, [100, 10])


CROWD = """
import os, sys
from pathlib import Path
from dtruntime.cache import Cache
import random
folder, number = Path(sys.argv[1]), int(sys.argv[2])
draw = random.Random(number)
cache = Cache(folder / "cache", 60_000)
for turn in range(150):
    source = folder / f"s{draw.randrange(12)}"
    ready = cache.fetch(str(source), lambda: False)
    assert Path(ready.path).read_bytes() == source.read_bytes(), (turn, source)
    ready.close()
"""


def test_processes_that_share_a_cache_keep_its_limit_together(tmp_path):
    for number in range(12):
        (tmp_path / f"s{number}").write_bytes(os.urandom(9_000 + number))
    crowd = [start_script(CROWD, tmp_path, number) for number in range(3)]
    folder = tmp_path / "cache" / "dtruntime-datasets"
    most = 0
    while any(process.poll() is None for process in crowd):
        found = 0
        if folder.exists():
            for path in folder.iterdir():
                with contextlib.suppress(FileNotFoundError):
                    found += path.stat().st_size if path.name[:1] in "0123456789abcdef" else 0
        most = max(most, found)
    for process in crowd:
        out, err = process.communicate()
        assert process.returncode == 0, out + err
    # A file may be renamed, or go and another come, while they are listed: one each at most.
    assert 0 < most <= 60_000 + 3 * 9_012


# Processes.


def train(library, store, log, told):
    """Train to the end, from the newest checkpoint on; log each step, and tell of it."""
    dataset = open_dataset(library)
    loader = ShardedLoader(dataset, batch_size=3, num_workers=2)
    with CheckpointManager(store, keep_last_n=3) as manager, log.open("a") as file:
        state = {"data": dataset, "step": 0}
        with contextlib.suppress(CheckpointNotFound):
            manager.restore(state)
        step = state["step"]
        for epoch in range(dataset.epoch, 3):
            dataset.set_epoch(epoch)
            for batch in loader:
                step += 1
                file.write(f"{step} {' '.join(batch)}\n")
                file.flush()
                os.write(told, b".")
                if step % 3 == 0:
                    manager.save_async(state | {"step": step}, step=step)


def train_in_child(library, store, log, steps):
    """Train in a process that is killed after so many steps; tell whether it came to its end."""
    hears, told = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(hears)
            train(library, store, log, told)
            code = 0
        finally:
            os._exit(code)
    os.close(told)
    left = steps
    while left and (heard := os.read(hears, left)):
        left -= len(heard)
    os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.close(hears)
    assert code in (0, -signal.SIGKILL)
    return code == 0


def test_killed_anywhere_and_resumed_every_sample_is_trained_on_once(library, tmp_path):
    """What counts is what the restored checkpoint says; later steps are made again, alike."""
    seed = random.SystemRandom().randrange(1 << 32)
    draw = random.Random(seed)
    log = tmp_path / "log"
    kills = 0
    while not train_in_child(library, tmp_path / "store", log, draw.randrange(2, 40)):
        kills += 1
        assert kills < 200, f"seed {seed}"
    assert kills >= 2, f"seed {seed}"
    steps = {}
    for line in log.read_text().splitlines(keepends=True):
        step, *batch = line.split()
        if line.endswith("\n"):  # the last line of a killed process may be cut
            assert steps.setdefault(int(step), batch) == batch, f"seed {seed}, step {step}"
    trained = flat(steps[step] for step in sorted(steps))
    count = expected(library).total()
    for epoch in range(3):
        part = trained[epoch * count : (epoch + 1) * count]
        assert Counter(part) == expected(library), f"seed {seed}"
    assert len(trained) == 3 * count


RANK = """
import asyncio, os, sys
from dtruntime import CheckpointManager, DatasetRegistry, ShardedDataset, ShardedLoader
folder, store, step, limit, resume, first = sys.argv[1:7]
with CheckpointManager(store) as manager:
    registry = DatasetRegistry()
    registry.register("train", folder, "text", 1000)
    dataset = ShardedDataset(registry, "train")
    assert (dataset.rank, dataset.world_size) == (int(os.environ["RANK"]),
                                                  int(os.environ["WORLD_SIZE"]))
    if resume == "yes":
        dataset.restore_from(manager)
    loader = ShardedLoader(dataset, batch_size=2, num_workers=1, end="exact")
    seen = []
    for batch in loader:
        seen += batch
        if len(seen) >= int(limit):
            break
    manager.save({"data": dataset, "rank": dataset.rank}, step=int(step))
    print(*seen, flush=True)
"""


def test_ranks_that_become_more_and_fewer_share_what_is_left(library, coordinator, tmp_path):
    seen: Counter[str] = Counter()
    for turn, world_size in enumerate((2, 3, 1, 2, 2)):
        resume = "yes" if turn else "no"
        limit = 10_000 if turn == 4 else 12
        arguments = (library[0], tmp_path / "store", turn, limit, resume, "")
        ranks = [
            start_script(RANK, *arguments, environment=place_of(rank, world_size, coordinator.url))
            for rank in range(world_size)
        ]
        for process in ranks:
            out, err = process.communicate(timeout=120)
            assert process.returncode == 0, err
            seen.update(out.split())
    assert seen == expected(library)


TOGETHER = """
import datetime, os, sys
import torch.distributed as dist
from dtruntime import CheckpointError, DatasetRegistry, ShardedDataset, ShardedLoader
folder, meeting, end, workers = sys.argv[1:5]
rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank,
                        world_size=world_size, timeout=datetime.timedelta(seconds=60))
registry = DatasetRegistry()
registry.register("train", folder, "text", 1000)
dataset = ShardedDataset(registry, "train")
loader = ShardedLoader(dataset, batch_size=2, num_workers=int(workers), end=end or None)
try:
    for epoch in range(2):
        dataset.set_epoch(epoch)
        seen = [line for batch in loader for line in batch]
        steps = sum(1 for _ in loader)
        print(steps, *seen, flush=True)
except CheckpointError as error:
    print(type(error).__name__, error.why, flush=True)
dist.destroy_process_group()
"""


def run_together(coordinator, folder, meeting, end, workers):
    arguments = (folder, meeting, end, workers)
    ranks = [
        start_script(TOGETHER, *arguments, environment=place_of(rank, 3, coordinator.url))
        for rank in range(3)
    ]
    outputs = []
    for process in ranks:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        outputs.append([line.split() for line in out.splitlines()])
    return outputs


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("end", ["", "pad"])
def test_ranks_end_together(coordinator, tmp_path, end, workers):
    counts = [9, 1, 4, 0, 7, 3, 2]
    names = make_files(tmp_path / "d", counts)
    outputs = run_together(coordinator, tmp_path / "d", tmp_path / "meeting", end, workers)
    for epoch in range(2):
        lines = [output[epoch] for output in outputs]
        assert len({line[0] for line in lines}) == 1, lines  # equal steps
        seen = Counter(sample for line in lines for sample in line[1:])
        if end == "pad":  # everything is there, and what is there twice is a rank's own
            assert seen.keys() == samples_of(names, counts).keys()
            shares = [{sample.split(":")[0] for sample in line[1:]} for line in lines]
            assert sum(map(len, shares)) == len(set.union(*shares))
        else:
            assert set(seen.values()) <= {1}
        assert int(lines[0][0]) > 0


def test_a_rank_that_cannot_read_ends_all(coordinator, tmp_path):
    names = make_files(tmp_path / "d", [9, 9, 9, 9, 9, 9])
    (tmp_path / "d" / names[0]).write_bytes(b"\xff" * 40)
    outputs = run_together(coordinator, tmp_path / "d", tmp_path / "meeting", "pad", 1)
    kinds = sorted(output[-1][0] for output in outputs)
    assert kinds == ["Conflict", "Conflict", "UnreadableSample"]


def test_a_rank_that_has_nothing_to_repeat_ends_all(coordinator, tmp_path):
    make_files(tmp_path / "d", [9, 0, 0])
    outputs = run_together(coordinator, tmp_path / "d", tmp_path / "meeting", "pad", 0)
    kinds = sorted(output[-1][0] for output in outputs)
    # The two without samples meet it at once: one of them may hear of the other's.
    assert "InvalidArgument" in kinds
    assert {*kinds} <= {"Conflict", "InvalidArgument"}


def test_ranks_that_should_end_together_and_cannot(library, tmp_path):
    dataset = open_dataset(library, place=(0, 2))
    with pytest.raises(InvalidArgument, match=r"is not initialized\nhint: call `init_process_gr"):
        ShardedLoader(dataset)
    with pytest.raises(InvalidArgument, match="did you mean `exact`"):
        ShardedLoader(dataset, end="exactly")
    assert len(list(ShardedLoader(dataset, end="exact", batch_size=None))) == len(list(dataset))
    dist = torch.distributed
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/m", rank=0, world_size=1)
    try:
        with pytest.raises(InvalidArgument, match="the process group has 1"):
            ShardedLoader(dataset)
    finally:
        dist.destroy_process_group()


def test_a_registry_in_a_job_knows_its_place(coordinator, tmp_path):
    names = make_files(tmp_path / "d", [2, 2, 2])
    orchestrator = TrainingOrchestrator("w", coordinator.url, 3, 1)
    asyncio.run(orchestrator.register_worker("127.0.0.1", 1))
    registry = DatasetRegistry(coordinator.url)
    registry.register("train", tmp_path / "d", "text", 6)
    dataset = ShardedDataset(registry, "train")
    assert (dataset.rank, dataset.world_size) == (1, 3)
    assert len(list(dataset)) == 2
    everything = ShardedDataset(registry, "train", rank=0, world_size=1)
    assert Counter(everything) == samples_of(names, [2, 2, 2])
    child = os.fork()
    if child == 0:
        code = 1
        try:
            dataset.set_epoch(1)
        except Exception as error:  # noqa: BLE001
            code = 0 if type(error).__name__ == "Closed" else 2
        os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    dataset.set_epoch(1)
    orchestrator.leave()


def test_the_package_needs_torch_for_this_only():
    done = run_script(
        """
        import sys
        sys.modules["torch"] = None
        import dtruntime
        assert "ShardedDataset" in dtruntime.__all__
        try:
            dtruntime.ShardedDataset
        except dtruntime.UnsupportedFormat as error:
            print(error)
        """
    )
    assert done.stdout.startswith("using `ShardedDataset`: torch is not installed"), done.stderr


def test_the_example_goes_on_with_what_was_left(tmp_path):
    results = []
    for name, more in (("calm", []), ("lossy", ["--lose", "1:13"])):
        several = ("--standalone", "--nproc-per-node", 2, "--max-restarts", 1)
        done = torchrun(*several, EXAMPLES / "train_dataset.py", tmp_path / name, *more)
        assert done.returncode == 0, done.stderr
        results.append(done.stdout.splitlines())
    assert results[0][-1].startswith("done: ")
    assert results[0][-1] == results[1][-1], "the same steps and weights"
    begins = [line for line in results[1] if "begin after step" in line]
    assert begins == [f"2 ranks begin after step {step}, epoch 0" for step in (0, 10)]
