"""One trace for each attempt, from the training processes and the coordinator together."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, NamedTuple

import pytest
from coordinators import CoordinatorProcess
from ranks import run
from support import run_script

if TYPE_CHECKING:
    from collections.abc import Iterator


class Span(NamedTuple):
    """A span as a collector receives it. Times are nanoseconds since 1970."""

    trace: str
    id: bytes
    parent: bytes
    name: str
    start: int
    end: int
    failed: bool


def fields(message: bytes) -> Iterator[tuple[int, bytes | int]]:
    """Decode a protobuf message: numbers of fields, and bytes or integers."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(message):
        key = varint()
        kind = key & 7
        if kind == 0:
            yield key >> 3, varint()
            continue
        length = {1: 8, 5: 4}.get(kind) or varint()
        part = message[at : at + length]
        at += length
        yield key >> 3, part if kind == 2 else int.from_bytes(part, "little")


def parts(message: bytes, number: int) -> list[bytes]:
    return [part for found, part in fields(message) if found == number]


def spans_of(request: bytes) -> Iterator[Span]:
    """Return the spans of an OTLP request: resources hold scopes, which hold spans."""
    for resource in parts(request, 1):
        for scope in parts(resource, 2):
            for span in parts(scope, 2):
                found = dict(fields(span))
                status = dict(fields(found.get(15, b"")))
                yield Span(
                    found[1].hex(),
                    found[2],
                    found.get(4, b""),
                    found[5].decode(),
                    found[7],
                    found[8],
                    status.get(3) == 2,
                )


class Collector:
    """An endpoint that accepts OTLP over HTTP."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.paths: set[str] = set()
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                collector.paths.add(self.path)
                body = self.rfile.read(int(self.headers["content-length"]))
                collector.spans += spans_of(body)
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def collector(monkeypatch) -> Iterator[Collector]:
    collector = Collector()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
    yield collector
    collector.server.shutdown()
    collector.server.server_close()


def test_an_attempt_of_several_ranks_is_one_trace(collector, tmp_path):
    coordinator = CoordinatorProcess(tmp_path)
    coordinator.start()
    outputs = run(
        """
        with CheckpointManager(store) as manager:
            print(manager.save(state_of(1), step=1).attempt)
        """,
        tmp_path / "store",
        coordinator.url,
        world_size=2,
    )
    coordinator.end()
    assert collector.paths == {"/v1/traces"}
    [attempt] = {output.strip() for output in outputs}
    assert {span.trace for span in collector.spans} == {attempt}
    by_name: dict[str, list[Span]] = {}
    for span in collector.spans:
        by_name.setdefault(span.name, []).append(span)
        assert span.start <= span.end
        assert not span.failed
    [checkpoint] = by_name["checkpoint"]
    assert checkpoint.parent == b""
    saves = by_name["save"]
    assert len(saves) == 2
    assert all(save.parent == checkpoint.id for save in saves)
    below = {save.id: save for save in saves}
    for name in ("prepare", "wait", "capture", "write", "publish"):
        assert {span.parent for span in by_name[name]} == set(below), name
        for span in by_name[name]:
            assert below[span.parent].start <= span.start
            assert span.end <= below[span.parent].end
    for name in ("all ranks write", "one rank publishes"):
        assert [span.parent for span in by_name[name]] == [checkpoint.id]
    assert len({span.id for span in collector.spans}) == len(collector.spans)


def test_a_failed_save_has_its_reason_in_the_trace(collector, tmp_path):
    ended = run_script(
        """
        import sys, torch
        from dtruntime import *
        manager = CheckpointManager(sys.argv[1])
        manager.save({"w": torch.zeros(1000)}, step=1)
        handle = manager.save_async({"w": torch.zeros(30_000_000)}, step=2)
        handle._native.cancel("the test says so")
        try:
            handle.result()
        except Closed:
            pass
        manager.close()
        """,
        tmp_path / "store",
    )
    assert ended.returncode == 0, ended.stderr
    saves = [span for span in collector.spans if span.name == "save"]
    assert [(save.parent, save.failed) for save in saves] == [(b"", False), (b"", True)]


def test_an_absent_collector_costs_only_spans(tmp_path, monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    ended = run_script(
        """
        import sys, torch
        from dtruntime import *
        with CheckpointManager(sys.argv[1]) as manager:
            manager.save({"w": torch.zeros(1000)}, step=1)
            print(manager.all_steps())
        """,
        tmp_path / "store",
    )
    assert (ended.returncode, ended.stdout) == (0, "[1]\n"), ended.stderr


def test_an_agents_variables_are_used_and_its_port_is_reported(tmp_path, monkeypatch):
    monkeypatch.setenv("JAEGER_AGENT_HOST", "127.0.0.1")
    monkeypatch.setenv("JAEGER_AGENT_PORT", "6831")
    script = "import sys; from dtruntime import CheckpointManager; CheckpointManager(sys.argv[1])"
    ended = run_script(script, tmp_path / "store")
    assert ended.returncode == 0
    assert "by OTLP to port 4318 of that host" in ended.stderr
    assert "publish port 4318" in ended.stderr
