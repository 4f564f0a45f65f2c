"""The samples of a file, for formats that are safe to read: nothing here is unpickled.

>>> for row in open_samples("jsonl")("train/part-0.jsonl.gz"): ...

Files that end in ``.gz`` or ``.zst`` are decompressed while they are read; text is UTF-8. Memory
holds one sample, or one batch of rows of a parquet file.

Always holds: the samples of a file come in a fixed order; what a format does not allow raises an
``Unreadable`` that says where, and is never skipped.
"""

from __future__ import annotations

import csv
import gzip
import importlib
import io
import json
import tarfile
import zlib
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from dtruntime.errors import InvalidArgument
from dtruntime.messages import quoted, suggestion

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import Self

_BLOCK_BYTES = 1 << 20
_COMPRESSED_BYTES = 16 << 10
"""Small: well compressed data expands a lot."""


class Unreadable(Exception):  # noqa: N818  (the caller adds the file's name, and raises its own)
    """What is wrong with a file, and where."""


_DAMAGED = (
    EOFError,
    UnicodeDecodeError,
    csv.Error,
    gzip.BadGzipFile,
    tarfile.TarError,
    zlib.error,
)


def open_samples(format_name: str) -> Callable[[str], Iterable[Any]]:
    """Return the function that yields the samples of a file of a format.

    Raises:
        InvalidArgument: The format is not supported.

    """
    found = _READERS.get(format_name.lower())
    if found is not None:
        return found
    raise InvalidArgument(
        f"reading files of format `{format_name}`",
        "supported formats are " + ", ".join(quoted(sorted(_READERS))),
        suggestion(
            format_name,
            _READERS,
            "pass `read=`: a function that takes a path and yields the samples of that file",
        ),
    )


def read_text(path: str) -> Iterator[str]:
    """Yield the lines of a text file, without line endings."""
    with _decompressed(path) as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise Unreadable(f"line {number}: {error}") from None
            yield text.removesuffix("\n").removesuffix("\r")


def read_json_lines(path: str) -> Iterator[Any]:
    """Yield the value of each line that is not blank."""
    for number, line in enumerate(read_text(path), 1):
        if not line or line.isspace():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            why = "one JSON value a line is expected"
            raise Unreadable(f"line {number}: {why}, and {error}") from None
        yield value


def read_csv(path: str) -> Iterator[dict[str, str]]:
    """Yield each row as a dict, keyed by the first row. ``.tsv`` files are tab-separated."""
    name = path.lower().removesuffix(".gz").removesuffix(".zst")
    delimiter = "\t" if name.endswith(".tsv") else ","
    with _decompressed(path) as raw:
        file = io.TextIOWrapper(raw, encoding="utf-8-sig", newline="")
        rows = csv.reader(file, delimiter=delimiter, strict=True)
        try:
            names = next(rows, [])
            for row in rows:
                if len(row) == len(names):
                    yield dict(zip(names, row, strict=True))
                elif row:  # not a blank line
                    why = f"{len(row)} fields, where the first row names {len(names)}"
                    raise Unreadable(f"line {rows.line_num}: {why}")
        except csv.Error as error:
            raise Unreadable(f"line {rows.line_num}: {error}") from None
        except UnicodeDecodeError as error:
            raise Unreadable(f"after line {rows.line_num}: {error}") from None


def read_parquet(path: str) -> Iterator[dict[str, Any]]:
    """Yield each row as a dict, read by pyarrow."""
    arrow = _optional("pyarrow.parquet", "parquet", "pip install pyarrow")
    errors = _optional("pyarrow", "parquet", "pip install pyarrow")
    try:
        with arrow.ParquetFile(path) as file:
            for batch in file.iter_batches():
                yield from batch.to_pylist()
    except errors.ArrowInvalid as error:
        raise Unreadable(str(error)) from None


def read_webdataset(path: str) -> Iterator[dict[str, Any]]:
    """Yield each sample of a tar: the bytes of the files with the same stem, keyed by suffix.

    A sample's files are adjacent; its ``__key__`` is their path up to the first dot of the file
    name.
    """
    last = ""
    try:
        with _decompressed(path) as raw:
            sample: dict[str, Any] = {}
            for last, data in _members(raw):
                folder, slash, name = last.rpartition("/")
                stem, dot, suffix = name.partition(".")
                if not stem or not dot:
                    continue
                key = folder + slash + stem
                if sample and sample["__key__"] != key:
                    yield sample
                    sample = {}
                sample |= {"__key__": key, suffix: data}
            if sample:
                yield sample
    except Unreadable as error:
        raise Unreadable(f"after member `{last}`: {error}" if last else str(error)) from None


class _Header(tarfile.TarInfo):
    """A header that refuses damage: `tarfile` takes a damaged or missing one for the end."""

    @classmethod
    def fromtarfile(cls, tarfile: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(tarfile)
        except _EndOfArchive:
            raise
        except _BadHeader as error:
            raise _BadArchive(str(error)) from None


_EndOfArchive: type[Exception] = tarfile.EOFHeaderError  # type: ignore[attr-defined]
_BadHeader, _BadArchive = tarfile.HeaderError, tarfile.ReadError


def _members(raw: BinaryIO) -> Iterator[tuple[str, bytes]]:
    """Yield the files of a tar, and check its end: a block of zeros, then only zeros."""
    with tarfile.open(fileobj=raw, mode="r|", tarinfo=_Header) as tar:
        for member in tar:
            file = tar.extractfile(member) if member.isfile() else None
            if file is not None:
                yield member.name, file.read()
        stream = tar.fileobj
        assert stream is not None  # noqa: S101  (it is open)
        while block := stream.read(_BLOCK_BYTES):
            if block.count(0) != len(block):
                raise tarfile.ReadError("the archive ends, and more than zeros follow")


@contextmanager
def _decompressed(path: str) -> Iterator[BinaryIO]:
    """Open a file for reading its decompressed bytes; damage is an ``Unreadable``."""
    try:
        with _opener(path)(path, "rb") as file:
            yield file
    except Exception as error:
        # Two packages define a `ZstdError`, and neither needs to be installed.
        if isinstance(error, _DAMAGED) or type(error).__name__ == "ZstdError":
            raise Unreadable(str(error) or type(error).__name__) from None
        raise


def _opener(path: str) -> Callable[[str, str], Any]:
    if path.endswith(".gz"):
        return gzip.open
    if not path.endswith(".zst"):
        return open
    try:
        opener = importlib.import_module("compression.zstd").open
    except ImportError:  # before Python 3.14
        return _open_zstandard
    return cast("Callable[[str, str], Any]", opener)


def _open_zstandard(path: str, _mode: str) -> io.BufferedReader:
    package = _optional("zstandard", ".zst", "pip install 'zstandard>=0.19'")
    return io.BufferedReader(_Zstandard(path, package))


class _Zstandard(io.RawIOBase):
    """The decompressed bytes of a ``.zst`` file.

    The package's own reader cannot iterate over lines, and ends silently where a frame is
    truncated, or where another one follows.
    """

    def __init__(self, path: str, package: Any) -> None:
        super().__init__()
        self._new_frame = package.ZstdDecompressor().decompressobj
        self._frame: Any = None
        self._ready = memoryview(b"")
        self._rest = b""
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115, PTH123  (`close` closes it)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            data = self._rest or self._file.read(_COMPRESSED_BYTES)
            if not data and self._frame is not None:
                raise EOFError("the compressed file ended within a frame")
            if not data:
                return 0
            self._decompress(data)
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _decompress(self, data: bytes) -> None:
        """Take a piece of the file; what follows a frame is the next one."""
        if self._frame is None:
            self._frame = self._new_frame()
        self._ready = memoryview(self._frame.decompress(data))
        self._rest = b""
        if self._frame.eof:
            self._rest, self._frame = self._frame.unused_data, None

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def _optional(module: str, purpose: str, command: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InvalidArgument(
            f"reading {purpose} files",
            f"`{module}` is needed, and cannot be imported: {error}",
            f"`{command}`, or pass `read=`: a function that takes a path and yields the samples of "
            "that file",
        ) from None


_READERS: dict[str, Callable[[str], Iterable[Any]]] = {
    "csv": read_csv,
    "json": read_json_lines,
    "jsonl": read_json_lines,
    "parquet": read_parquet,
    "text": read_text,
    "webdataset": read_webdataset,
}
