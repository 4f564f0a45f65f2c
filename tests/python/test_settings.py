"""Arguments: what is accepted, and the errors for wrong ones."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from support import run_script

from dtruntime import CheckpointManager, InvalidArgument, settings
from dtruntime.ranks import launch
from dtruntime.ranks.job_settings import JobSettings, job_settings_from

WRONG = {
    "no path": ({"path": None}, "setting `path`: it is not given"),
    "two paths": ({"storage_path": "b"}, "both name the store"),
    "backend": ({"backend": "s4"}, "expected one of `local`, `s3`"),
    "s3 backend of a directory": ({"backend": "s3"}, "it is a directory"),
    "local backend of s3": ({"path": "s3://bucket/run", "backend": "local"}, "a directory, or"),
    "other scheme": ({"path": "gs://bucket/run"}, "a directory, or a store in S3, is expected"),
    "s3 bucket": ({"path": "s3://x/run"}, "`x` is no bucket's name"),
    "s3 prefix": ({"path": "s3://bucket/a/../b"}, "its prefix has the segment"),
    "s3 key": ({"s3": {"endpoint": "x"}}, "hint: did you mean `endpoint_url`?"),
    "s3 secret": ({"s3": {"aws_secret": "x"}}, "credentials come from the usual chain"),
    "s3 part": ({"s3": {"part_bytes": "1MiB"}}, "setting `s3.part_bytes` = 1048576"),
    "s3 endpoint": ({"s3": {"endpoint_url": "localhost:9000"}}, "a URL that begins with"),
    "remote directory": ({"remote": "other/run"}, "a store in S3 is expected"),
    "remote of s3": (
        {"path": "s3://bucket/a", "remote": "s3://bucket/b"},
        "only checkpoints in a directory are uploaded to `remote`",
    ),
    "remote rate": (
        {"remote": "s3://bucket/b", "remote_bytes_per_second": 0},
        "no upload would ever finish",
    ),
    "bytes path": ({"path": b"abc"}, "a str or a path is expected"),
    "number path": ({"path": 5}, "a str or a path is expected"),
    "compression": ({"compression": "gzipp"}, "hint: did you mean `gzip`?"),
    "io backend": ({"io_backend": "aio"}, "expected one of `auto`, `uring`, `threads`"),
    "direct io": ({"direct_io": "yes"}, "expected one of `auto`, `on`, `off`"),
    "keep none": ({"keep_last_n": 0}, "at least the newest checkpoint is kept"),
    "keep negative": ({"keep_last_n": -1}, "a whole number from 0"),
    "keep bool": ({"keep_last_n": True}, "a whole number from 0"),
    "keep every": ({"keep_every": 0}, "steps cannot be multiples of 0"),
    "keep float": ({"keep_every": 1.5}, "got `float`"),
    "keep best alone": ({"keep_best_n": 2}, "there is no metric to rank checkpoints by"),
    "keep no best": ({"keep_best_n": 0, "best_metric": "loss"}, "no checkpoint would be kept"),
    "keep best of all": ({"keep_best_n": 2, "best_metric": "loss"}, "without `keep_last_n`, all"),
    "metric": ({"best_metric": 1}, "a str is expected, got `int`"),
    "metric without name": ({"best_metric": ""}, "a metric needs a name"),
    "mode": ({"best_mode": "minimum"}, "did you mean `min`?"),
    "staging text": ({"staging_bytes": "2 GiBi"}, 'such as "512MiB" or "2GiB"'),
    "staging huge": (
        {"staging_bytes": "100000000TiB"},
        "setting `staging_bytes` = '100000000TiB': a number of bytes from 0 to 2**63-1",
    ),
    "staging digits": ({"staging_bytes": "9" * 5000}, "a number of bytes from 0 to 2**63-1"),
    "staging small": ({"staging_bytes": 1}, "at least 4 chunks"),
    "chunk odd": ({"chunk_bytes": 100_000}, "a power of two from 65536 to 67108864"),
    "in flight": (
        {"in_flight_bytes": "1MiB"},
        "setting `in_flight_bytes` = 1048576: from one chunk, 4194304,",
    ),
    "no workers": ({"workers": 0}, "from 1 to 256 threads"),
    "workers": ({"workers": "4"}, "a whole number from 0"),
    "grace": ({"gc_grace_seconds": -1}, "a whole number from 0"),
    "interval": ({"save_interval_steps": 0}, "at least 1 is expected"),
    "sigterm": ({"sigterm": "finnish"}, "did you mean `finish`?"),
    "no sigterm": ({"sigterm": "x"}, "hint: leave it unset"),
    "sigterm deadline": (
        {"sigterm_deadline_seconds": "30"},
        "setting `sigterm_deadline_seconds` = '30': a number of seconds is expected",
    ),
    "patience": ({"agreement_timeout": "x"}, "a number of seconds is expected"),
    "negative patience": ({"agreement_timeout": -1}, "a number of seconds is expected"),
    "rank": ({"rank": 3}, "a rank is less than the world size"),
    "rank text": ({"rank": "worker"}, "or a name that ends in one"),
    "world size": ({"rank": 0, "world_size": 2}, "need a coordinator"),
    "empty path": ({"path": ""}, "it is empty"),
    "home of nobody": ({"path": "~nobody-of-this-name/x"}, "home directory"),
    "job": ({"job": ""}, "a job name has 1 to 255 bytes"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_settings_are_refused(tmp_path, monkeypatch, name):
    monkeypatch.delenv("CHECKPOINT_DIR", raising=False)
    arguments, message = WRONG[name]
    path = arguments.get("path", tmp_path / "store")
    with pytest.raises(InvalidArgument) as caught:
        CheckpointManager(**{"path": path} | arguments)
    text = str(caught.value)
    assert message in text
    assert "\nhint: " in text
    assert text[0].islower() or text[0] == "`"
    assert not (tmp_path / "store").exists(), "nothing is made before all settings are checked"


def test_a_tilde_is_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with CheckpointManager("~/runs/gpt") as manager:
        assert manager.path == tmp_path / "runs/gpt"
    monkeypatch.setenv("CHECKPOINT_DIR", "~/runs/other")
    with CheckpointManager() as manager:
        assert manager.path == tmp_path / "runs/other"


@pytest.mark.parametrize("step", [None, "7", -1, 1.5, True, 2**63])
def test_wrong_steps_are_refused(manager, step):
    for verb in (
        lambda: manager.save_async({}, step=step),
        lambda: manager.delete(step),
        lambda: manager.should_save(step),
    ):
        with pytest.raises(InvalidArgument, match="a whole number from 0"):
            verb()
    with pytest.raises(InvalidArgument, match="call `save_async"):
        manager.save_async(1000, {"model": 1})


def nested(depth: int) -> dict:
    return {"a": nested(depth - 1)} if depth else {}


@pytest.mark.parametrize(
    "value",
    [
        {1: 2},
        {"a": {1, 2}},
        [1],
        "text",
        {"a": [{"b": 2**64}]},
        {"accuracy": {1: 0.5, "1": 0.7}},
        {"a": "\ud800"},
        nested(65),
        nested(200),
    ],
)
def test_annotations_are_json(manager, value):
    with pytest.raises(InvalidArgument, match="it is stored as JSON"):
        manager.save_async({}, step=1, metadata=value)
    with pytest.raises(InvalidArgument, match="`dataset_positions`"):
        manager.save_async({}, step=1, dataset_positions=value)
    assert manager.all_steps() == []


def test_metadata_nests_as_deep_as_the_engine_reads(manager):
    value = nested(64)  # its entry has 64 containers, the innermost of them empty
    manager.save({}, step=1, metadata=value, dataset_positions=value)
    assert manager.metadata(1) == value


def test_a_bad_device_is_named(manager):
    manager.save({"a": 1}, step=1)
    for device in ("nonsense", {"cuda:0": "cpu"}, len):
        with pytest.raises(InvalidArgument, match="a device is expected"):
            manager.load(map_location=device)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("0", 0),
        ("5B", 5),
        ("2 KiB", 2048),
        ("1kB", 1000),
        ("1.5MiB", 3 << 19),
        ("2gib", 2 << 30),
        ("9007199254740993", 2**53 + 1),
        ("8388607.999999TiB", (8388607999999 << 40) // 10**6),
    ],
)
def test_sizes_as_text(text, count):
    assert settings.parse_bytes("staging_bytes", text) == count


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (0, 1)),
        ({"RANK": "2", "WORLD_SIZE": "4"}, (2, 4)),
        ({"RANK": "worker-3", "WORLD_SIZE": "8"}, (3, 8)),
        ({"RANK": "train-job-0-worker-12", "WORLD_SIZE": "16"}, (12, 16)),
    ],
)
def test_rank_from_the_environment(environment, expected):
    assert launch.rank_and_world_size(None, None, environment) == expected
    assert launch.rank_and_world_size(5, "9", environment) == (5, 9)


@pytest.mark.parametrize("text", ["-1", "--1", "worker", "3rd", ""])
def test_invalid_ranks_are_refused(text):
    with pytest.raises(InvalidArgument, match="expected a whole number"):
        launch.rank_and_world_size(None, None, {"RANK": text, "WORLD_SIZE": "4"})


def test_a_coordinators_settings_are_defaults_only():
    values = {
        "checkpoint.keep_last_n": "5",
        "checkpoint.compression": '"zstd"',
        "checkpoint.async_write": "false",
        "checkpoint.interval_steps": "1000",
        "storage.backend": '"s3"',
        "storage.bucket": "'my-bucket'",
        "storage.path": '"/runs/gpt"',
        "storage.region": '"us-west-2"',
        "storage.endpoint": '"http://127.0.0.1:9000"',
        "dataset.prefetch_shards": "2",
    }
    s3 = {"region": "us-west-2", "endpoint_url": "http://127.0.0.1:9000"}
    told = job_settings_from(values, {})
    assert told == JobSettings(5, "zstd", False, 1000, "s3://my-bucket/runs/gpt", s3)
    environment = {"AWS_DEFAULT_REGION": "eu-west-1", "AWS_ENDPOINT_URL_S3": "https://s3.eu"}
    assert job_settings_from(values, environment).s3 == {}
    assert job_settings_from(values | {"storage.backend": '"local"'}, {}).path == "/runs/gpt"
    assert job_settings_from({}, {}) == JobSettings()
    given = {"keep_last_n": 2, "s3": {"region": "eu-north-1"}}
    assert settings.completed(given, told) == {
        "keep_last_n": 2,
        "compression": "zstd",
        "s3": s3 | {"region": "eu-north-1"},
    }


@pytest.mark.parametrize(
    ("world_size", "said", "expected"), [(16, "8", 8), (1, "8", 1), (4, "0", 1), (4, "many", 1)]
)
def test_how_many_ranks_share_a_machine(world_size, said, expected):
    assert launch.local_world_size(world_size, {"LOCAL_WORLD_SIZE": said}) == expected


def test_the_engine_logs_to_standard_error(store):
    done = run_script(
        """
import os, sys
os.environ.update(RUST_LOG="debug", LOG_FORMAT="json")
import dtruntime
dtruntime.CheckpointManager(sys.argv[1]).save({"a": 1}, step=1)
""",
        store,
    )
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in done.stderr.splitlines()]
    assert any(record["target"].startswith("dtr_engine") for record in records)


def test_the_largest_chunks_need_no_other_setting(open_manager):
    state = {"weights": torch.arange(20 << 20, dtype=torch.int64)}  # 160 MiB
    manager = open_manager(chunk_bytes="64MiB")
    manager.save(state, step=1)
    assert torch.equal(manager.load()["weights"], state["weights"])


def test_workers_sets_the_number_of_encoding_threads(open_manager):
    tasks = Path("/proc/self/task")
    before = set(tasks.iterdir())  # of earlier managers
    open_manager(workers=3).save({"weights": torch.zeros(1000)}, step=1)
    names = [(task / "comm").read_text() for task in set(tasks.iterdir()) - before]
    assert sum(name.startswith("dtr-encode") for name in names) == 3


@pytest.mark.parametrize(("settings", "stays"), [({}, True), ({"gc_grace_seconds": 0}, False)])
def test_leftovers_of_a_killed_save_are_removed_by_the_next(open_manager, settings, stays):
    manager = open_manager(**settings)
    manager.save({"n": 1}, step=1)
    [shard] = manager.path.glob("step-*/*.shard")
    left = shard.with_name(shard.name.replace(shard.suffixes[0], "." + 32 * "0"))
    left.write_bytes(b"half")
    manager.save({"n": 2}, step=2)
    assert left.exists() == stays
    assert manager.load(step=1) == {"n": 1}


def test_metadata_takes_numpy_scalars_and_names_what_it_does_not_take(manager):
    metadata = {"n": np.int64(3), "acc": np.float32(0.5), "ok": np.True_, "many": [np.int8(1)]}
    manager.save({}, step=1, metadata=metadata)
    assert manager.metadata(1) == {"n": 3, "acc": 0.5, "ok": True, "many": [1]}
    for value, text in [
        ({"loss": torch.ones(1)}, "`loss` is of type `Tensor`"),
        ({"a": {"b": [1, {2}]}}, "`a` holds a value that is of type `set`"),
        ({"big": 1 << 70}, "`big` is a whole number"),
    ]:
        with pytest.raises(InvalidArgument, match=text):
            manager.save({}, step=2, metadata=value)
