"""Files are prefetched by a thread that ends with its reader."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from samples import Dealer, expected, open_dataset, take
from support import start_script

from dtruntime import (
    InvalidArgument,
    ShardedDataset,
    ShardedLoader,
    StorageError,
)
from dtruntime.datasets.prefetch import ReadAhead, Ready

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


def threads_ahead():
    return [thread for thread in threading.enumerate() if thread.name == "dtruntime-ahead"]


def test_only_the_next_files_are_prefetched():
    asked, given_up = [], []

    class Tracked(Ready):
        def close(self):
            given_up.append(self.path)

    def fetch(path, _is_cancelled):
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
    assert sorted(given_up, key=int) == asked  # what was prefetched in vain was released, too
    assert threads_ahead() == []


def test_an_error_in_the_thread_is_raised_at_its_file():
    def fetch(path, _is_cancelled):
        if path == "2":
            raise StorageError("reading", "it broke", "mend it")
        return Ready(path)

    ahead = ReadAhead(["0", "1", "2"], fetch, 5)
    assert [ahead.get(number).path for number in range(2)] == ["0", "1"]
    with pytest.raises(StorageError, match="it broke"):
        ahead.get(2)
    ahead.close()


def test_closing_cancels_a_copy_in_progress():
    begun = threading.Event()

    def fetch(path, is_cancelled):
        if path == "1":
            begun.set()
            while not is_cancelled():
                time.sleep(0.001)
        return Ready(path)

    ahead = ReadAhead(["0", "1"], fetch, 1)
    ahead.get(0)
    assert begun.wait(20)
    ahead.close()
    assert threads_ahead() == []


@pytest.mark.parametrize("workers", [0, 2])
def test_no_thread_is_left_behind(library, workers, tmp_path):
    before = {
        *multiprocessing.active_children()
    }  # for example what a failed test's traceback holds
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


def test_a_forked_process_does_not_wait_for_the_parents_thread(library):
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


def test_a_reader_gets_the_original_path_of_a_copied_file(library, tmp_path):
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
import signal, sys, threading
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell starts with `&`
sys.path.insert(0, sys.argv[2])
import pathlib
from samples import Dealer
from dtruntime import ShardedDataset, ShardedLoader
from dtruntime.datasets.prefetch import Ready

def fetch(path, is_cancelled):
    print("waiting", flush=True)
    while not is_cancelled():
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
    """Threads are frozen by then: here one that never gets its file."""
    goes_on, is_begun = threading.Event(), threading.Event()

    def fetch(path, _is_cancelled):
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


def test_the_coordinators_settings_are_used(library, tmp_path):
    folder, names, _ = library
    told = {"dataset.prefetch_shards": "5", "dataset.cache_size_gb": "3"}
    dataset = ShardedDataset(Dealer(folder, names, told=told), "train", cache_dir=tmp_path)
    assert (dataset._prefetch, dataset._cache_bytes) == (5, 3 * 10**9)
    dataset = ShardedDataset(
        Dealer(folder, names, told=told), "train", prefetch=1, cache_dir=tmp_path, cache_bytes="1GB"
    )
    assert (dataset._prefetch, dataset._cache_bytes) == (1, 10**9)
    with pytest.raises(
        InvalidArgument, match=r"no limit of the bytes stored there is set\nhint: pass `cache_b"
    ):
        open_dataset(library, cache_dir=tmp_path)
