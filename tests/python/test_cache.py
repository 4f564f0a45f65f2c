"""Copies of files on a local disk: never more than allowed, never a wrong one."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import threading
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import Dealer, expected, make_files, open_dataset, samples_of
from support import start_script

from dtruntime import (
    InvalidArgument,
    ShardedDataset,
    ShardedLoader,
)
from dtruntime.datasets.cache import Cache

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


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
        for other, path in held:  # what is being read is not evicted
            assert Path(other.path).read_bytes() == path.read_bytes()
    for ready, _ in held:
        ready.close()


def test_copies_are_reused_and_the_least_recently_used_is_evicted(tmp_path):
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
    other_files = ["precious.txt", f"{'0' * 32}-12345678", f"{'0' * 31}-{'0' * 8}-x", "x.partial"]
    for name in other_files:
        (cache.folder / name).write_bytes(bytes(5_000))
    (cache.folder / f"{'1' * 32}-{'0' * 8}-link").symlink_to(source)
    (cache.folder / f"{'2' * 32}-{'0' * 8}-folder").mkdir()
    for number in range(5):
        source.write_bytes(os.urandom(1_000 + number))
        cache.fetch(str(source), always).close()
    assert all((cache.folder / name).exists() for name in other_files)
    assert (cache.folder / f"{'1' * 32}-{'0' * 8}-link").is_symlink()
    assert source.exists()
    assert used(cache) <= 1_500


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "dtruntime-datasets").mkdir()
    (tmp_path / "dtruntime-datasets" / "thesis.tex").write_text("years of work")
    with pytest.raises(InvalidArgument, match=r"contains `thesis\.tex` and not our tag"):
        Cache(tmp_path, 100)
    (tmp_path / "dtruntime-datasets" / "CACHEDIR.TAG").write_text("Signature: another")
    with pytest.raises(InvalidArgument, match=r"`CACHEDIR\.TAG` is not ours"):
        Cache(tmp_path, 100)


def test_processes_that_create_a_cache_concurrently_share_it(tmp_path, caplog):
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
def test_a_folder_whose_creation_was_interrupted_is_completed(tmp_path, left):
    folder = tmp_path / "dtruntime-datasets"
    folder.mkdir()
    (folder / "lock").touch()
    for name, text in left.items():
        (folder / name).write_text(text)
    Cache(tmp_path, 100)
    assert (folder / "CACHEDIR.TAG").read_text().startswith("Signature: 8a477f597d28d172789f0688")
    (folder / f"{'0' * 32}-{'0' * 8}-copy").touch()
    Cache(tmp_path, 100)


def test_a_tag_that_another_process_writes_meanwhile_is_accepted(tmp_path, monkeypatch):
    Cache(tmp_path / "other", 100)
    tag = (tmp_path / "other" / "dtruntime-datasets" / "CACHEDIR.TAG").read_text()

    def list_late(folder):
        (Path(folder) / "CACHEDIR.TAG").write_text(tag)
        return ["CACHEDIR.TAG", f"{'0' * 32}.{'0' * 16}.partial"]

    monkeypatch.setattr(os, "listdir", list_late)
    Cache(tmp_path, 100)


def test_a_copy_that_disappears_meanwhile_does_not_break_the_cache(tmp_path, monkeypatch, caplog):
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


def test_only_what_a_crash_left_is_removed_at_the_start(tmp_path):
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
    """Have a forked process do something, and keep it alive with all files that it inherited."""
    reader, writer = os.pipe()
    waits, ends = os.pipe()
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            does()
            os.write(writer, b".")
            os.close(ends)
            os.read(waits, 1)
        os._exit(0)
    os.close(writer)
    try:
        assert os.read(reader, 1) == b"."
        yield
    finally:
        os.close(ends)
        os.waitpid(child, 0)
        os.close(reader)
        os.close(waits)


def test_a_forked_process_keeps_no_lock_and_releases_none(tmp_path, monkeypatch):
    for number in range(2):
        (tmp_path / f"s{number}").write_bytes(os.urandom(1_000))
    cache = Cache(tmp_path, 1_500)
    ready = cache.fetch(str(tmp_path / "s0"), always)
    name = Path(ready.path).name
    with forked(ready.close):
        assert not cache._remove(name)  # it is read in place
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
def test_a_damaged_copy_is_replaced(tmp_path, damage, caplog):
    source = tmp_path / "s"
    source.write_bytes(os.urandom(10_000))
    ready = Cache(tmp_path, 100_000).fetch(str(source), always)
    copy = Path(ready.path)
    ready.close()
    data = bytearray(copy.read_bytes())
    data[5_000] ^= 1
    copy.write_bytes({"flipped": data, "cut": data[:9_999], "emptied": b""}[damage])
    cache = Cache(tmp_path, 100_000)
    for _ in range(2):  # if the broken copy cannot be replaced, the file itself is read
        ready = cache.fetch(str(source), always)
        assert Path(ready.path).read_bytes() == source.read_bytes()
        ready.close()
    assert ("is damaged; it is made again" in caplog.text) == (damage == "flipped")


def test_a_changed_source_is_copied_again(tmp_path):
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
def test_a_cache_that_cannot_be_written_is_logged_once(request, call, number):
    names = ("library", "tmp_path", "monkeypatch", "caplog")
    library, tmp_path, monkeypatch, caplog = map(request.getfixturevalue, names)

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    dataset = open_dataset(library, cache_dir=tmp_path, cache_bytes="1MB")
    monkeypatch.setattr(os, call, refuse)
    assert Counter(dataset) == expected(library)
    warnings = [record for record in caplog.records if "is no longer used" in record.message]
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
    assert "some are not cached" in caplog.text
    assert Counter(loader) == samples_of(names, [100, 10])


CROWD = """
import os, sys
from pathlib import Path
from dtruntime.datasets.cache import Cache
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


def test_processes_that_share_a_cache_respect_its_limit(tmp_path):
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
