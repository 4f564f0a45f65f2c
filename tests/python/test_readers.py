"""The samples of files, format by format, and the errors for damaged ones."""

from __future__ import annotations

import errno
import gzip
import io
import json
import os
import sys
import tarfile
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
from samples import Dealer, make_files, open_dataset, take

from dtruntime import (
    DatasetNotFound,
    InvalidArgument,
    ShardedDataset,
    ShardedLoader,
    StorageError,
    UnreadableSample,
)
from dtruntime.datasets import readers

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


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
    tabs = write(tmp_path / "a.TSV.gz", b"a\tb\n1,5\t2\n")
    assert list(readers.read_csv(tabs)) == [{"a": "1,5", "b": "2"}]
    commas = write(tmp_path / "a.tsv.csv", b"a,b\n1\t5,2\n")
    assert list(readers.read_csv(commas)) == [{"a": "1\t5", "b": "2"}]
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
    """Return a tar of files of these sizes."""
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
def test_a_damaged_tar_is_not_read_as_a_shorter_one(tmp_path, case, name):
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
def test_a_file_with_the_wrong_suffix(case, tmp_path):
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
        assert caught.value.hint.startswith("fix the file")


def test_formats_that_need_something(tmp_path):
    (tmp_path / "a").touch()
    for format_name, text in (
        ("jsonlines", "did you mean `jsonl`"),
        ("tfrecord", "pass `read=`: a function that takes a path"),
    ):
        with pytest.raises(InvalidArgument, match=text):
            ShardedDataset(Dealer(tmp_path, ["a"], format=format_name), "train")
    dataset = ShardedDataset(Dealer(tmp_path, ["a"], format="tfrecord"), "train", read="text")
    assert list(dataset) == []


def test_a_missing_package_is_named(tmp_path, monkeypatch):
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


def test_errors_of_a_users_reader_are_unchanged(library):
    def read(path):
        yield 1
        raise ZeroDivisionError(path)

    with pytest.raises(ZeroDivisionError):
        list(open_dataset(library, read=read))
    with pytest.raises(ZeroDivisionError):
        list(ShardedLoader(open_dataset(library, read=read), num_workers=1))


def test_missing_files(tmp_path):
    names = make_files(tmp_path / "d", [5, 5, 5])
    dealer = Dealer(tmp_path / "d", names)
    dataset = ShardedDataset(dealer, "train", prefetch=0)
    (tmp_path / "d" / dataset._start.files.paths[1]).unlink()
    reading = iter(dataset)
    assert len(take(reading, 5)) == 5
    with pytest.raises(DatasetNotFound, match=r"missing on this worker\nhint: mount"):
        next(reading)
    assert dataset.state_dict()["samples"] == 5
    with pytest.raises(DatasetNotFound, match="missing on this worker"):
        list(ShardedLoader(dataset, num_workers=2))
    with pytest.raises(DatasetNotFound, match="missing on this worker"):
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
