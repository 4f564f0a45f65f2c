"""Samples of a registered dataset: none is lost or read twice when ranks stop, resume or change.

The tests themselves assign files, as a coordinator does.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, note, settings
from hypothesis import strategies as st
from samples import Dealer, expected, flat, make_files, open_dataset, run_file, samples_of, take
from torch.utils.data import DataLoader

from dtruntime import (
    CheckpointNotFound,
    DatasetChanged,
    InvalidArgument,
    ShardedDataset,
    ShardedLoader,
    UnsupportedFormat,
)
from dtruntime.datasets import positions
from dtruntime.datasets.positions import Position
from dtruntime.reports import LoadReport

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


# Assignment.


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
        cursor = positions.cursor_at(position, file_count, workers)
        assigned = [number for stream in cursor.streams for number in stream.files]
        assert sorted(assigned) == list(range(len(share)))
        counts = [len(stream.files) for stream in cursor.streams]
        assert max(counts) - min(counts) <= 1
        seen += share
    assert sorted(seen) == list(range(file_count))


@given(st.sets(st.integers(0, 60)), st.integers(0, 60))
def test_spans_represent_sets(numbers, count):
    spans = positions.spans_of(sorted(numbers))
    assert positions.numbers_in(spans) == numbers
    assert positions.outside(spans, count) == sorted(set(range(count)) - numbers)
    assert all(begin < end for begin, end in spans)
    assert all(one[1] < other[0] for one, other in pairwise(spans))


@given(data=st.data(), file_count=st.integers(0, 40), epoch=st.integers(0, 2))
@settings(max_examples=60, deadline=None)
def test_stops_and_resizes_lose_or_repeat_nothing(library, data, file_count, epoch):
    """Ranks read, stop together or not, and continue in another number, repeatedly."""
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
    """Read as a DataLoader's workers do, without processes: return the batches and the position."""
    start = dataset.take_start()
    cursor = positions.cursor_at(start.position, start.files.file_count, workers)
    other = positions.cursor_at(start.position, start.files.file_count, workers)
    first = cursor.next_stream
    order = [(first + number) % workers for number in range(workers)]
    reading = {number: dataset.walk(start.files, other.streams[number]) for number in order}
    batches = []
    while reading and len(batches) < stop:
        for number in [n for n in order if n in reading]:
            if len(batches) == stop:
                break
            batch = take(reading[number], batch_size)
            if not batch:
                del reading[number]
                continue
            stream, ahead = cursor.streams[number], other.streams[number]
            stream.entry, stream.within, stream.given = ahead.entry, ahead.within, ahead.given
            cursor.next_stream = (number + 1) % workers
            batches.append(batch)
    return batches, positions.encode(cursor.position(), start.files.record)


@given(
    place=st.sampled_from([(0, 1), (0, 2), (1, 2), (2, 3)]),
    counts=st.tuples(st.integers(0, 40), st.integers(1, 5), st.integers(1, 8)),
    stops=st.lists(st.integers(0, 30), max_size=4),
)
@settings(max_examples=100, deadline=None)
def test_a_resumed_iteration_equals_an_uninterrupted_one(library, place, counts, stops):
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


def test_single_samples_pinned_and_dropped_batches(library):
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


def test_a_plain_dataloader_reads_all_but_has_no_position(library):
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


def test_persistent_workers_are_refused(library):
    dataset = open_dataset(library)
    with pytest.raises(InvalidArgument, match="persistent workers do not see"):
        ShardedLoader(dataset, num_workers=1, persistent_workers=True)
    loader = DataLoader(dataset, num_workers=1, persistent_workers=True)
    list(loader)
    dataset.set_epoch(1)
    with pytest.raises((InvalidArgument, RuntimeError), match="started before the epoch"):
        list(loader)


def test_a_worker_does_not_contact_the_coordinator(library):
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

    with pytest.raises(
        (InvalidArgument, RuntimeError), match="in the process that created the dataset"
    ):
        list(DataLoader(Turning(dealer, "train"), num_workers=1))


SPAWNED = """
import sys
from dtruntime import ShardedDataset, ShardedLoader

if __name__ == "__main__":
    from pathlib import Path
    sys.path.insert(0, sys.argv[2])
    from samples import Dealer

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
    dataset.set_epoch(0)  # where it already is
    assert dataset.state_dict()["samples"] == 5
    dataset.set_epoch(1)
    assert dataset.state_dict() == open_dataset(library, epoch=1).state_dict()
    other = list(dataset)
    assert Counter(other) == expected(library)
    assert other[:5] != first


@pytest.mark.parametrize("workers", [None, 0, 2])
def test_a_checkpoint_at_the_end_of_an_epoch_continues_with_the_next(
    library, open_manager, workers
):
    """The usual loop: it saves a step after each epoch, and no step twice."""
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


def test_an_epoch_ends_when_it_has_on_all_ranks(library):
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
    again.load_state_dict(whole[2])  # it may have to wait for the others
    assert (again.epoch, list(again)) == (0, [])
    old = {key: value for key, value in whole[2].items() if key != "ended"}
    again.load_state_dict(old)
    assert again.epoch == 0


def test_the_position_is_that_of_the_newest_iteration(library):
    dataset = open_dataset(library)
    old, new = iter(dataset), iter(dataset)
    take(old, 9)
    take(new, 2)
    take(old, 9)
    assert dataset.state_dict()["samples"] == 2


def test_a_position_is_saved_in_a_checkpoint(library, open_manager):
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
def test_a_changed_dataset_is_refused(case, tmp_path, open_manager):
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
    assert "start an epoch again" in caught.value.hint
    assert weight.tolist() == [0, 0, 0]  # it was found before anything was changed
    assert again.state_dict()["samples"] == 0
    saved = [dataset.state_dict()]
    other = ShardedDataset(Dealer(folder, names, (0, 2), **spec), "train")
    with pytest.raises(DatasetChanged):
        other.load_state_dicts(saved)


def test_a_file_with_fewer_samples_than_were_consumed(tmp_path):
    names = make_files(tmp_path / "d", [9])
    dataset = ShardedDataset(Dealer(tmp_path / "d", names), "train")
    take(iter(dataset), 7)
    state = dataset.state_dict()
    path = tmp_path / "d" / names[0]
    path.write_bytes(b"\n" * 2 + b"x" * (path.stat().st_size - 2))
    dataset = ShardedDataset(Dealer(tmp_path / "d", names), "train")
    dataset.load_state_dict(state)
    with pytest.raises(
        DatasetChanged, match="7 samples of it were consumed before, and now it has only 3"
    ):
        list(dataset)


class TensorParallel:
    """A manager whose checkpoint is of two ranks for each share of the data."""

    def __init__(self, states):
        self.states = states
        self.last_load = LoadReport(step=1, world_size=len(states))
        self.read = []

    def load(self, step, keys, from_rank):
        assert (step, keys) == (1, ["data.*"])
        self.read.append(from_rank)
        return {"data": self.states[from_rank]}


def test_ranks_that_read_the_same_share_know_one_position(library):
    readers = [open_dataset(library, place=(rank, 2)) for rank in range(2)]
    taken = [take(iter(reader), 5) for reader in readers]
    manager = TensorParallel([reader.state_dict() for reader in readers for _ in range(2)])
    rest = []
    for rank in range(3):
        dataset = open_dataset(library, place=(rank, 3))
        dataset.restore_from(manager, step=1)
        rest += list(dataset)
    assert manager.read == [0, 1, 2] * 3
    assert Counter([*taken[0], *taken[1], *rest]) == expected(library)


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


def test_invalid_positions_are_refused(library):
    dataset = open_dataset(library)
    state = dataset.state_dict()
    for wrong in (None, [], {}, {"version": 1}, state | {"read": 5}, state | {"lanes": "x"}):
        with pytest.raises(
            InvalidArgument, match=r"hint: pass what the dataset.s `state_dict\(\)`"
        ):
            dataset.load_state_dict(wrong)
    with pytest.raises(UnsupportedFormat, match="version 2, this package supports 1"):
        dataset.load_state_dict(state | {"version": 2})
    with pytest.raises(DatasetChanged, match="its name was 'other'"):
        dataset.load_state_dict(state | {"dataset": state["dataset"] | {"name": "other"}})


def test_positions_of_a_stateful_loaders_workers(library, monkeypatch):
    """As torchdata's StatefulDataLoader does: each worker's copy saves and loads its own state."""

    def in_worker(number, dataset):
        info = type("Info", (), {"id": number, "num_workers": 3})()
        monkeypatch.setattr("dtruntime.datasets.sharded_dataset.get_worker_info", lambda: info)
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
