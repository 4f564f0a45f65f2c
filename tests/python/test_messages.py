"""The exact text of every kind of error, so that a change of one is noticed.

Paths, attempt ids and versions are replaced by names. To accept new texts, run with
`UPDATE_MESSAGES=1` and read the difference.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import torch
from support import flip_byte, shard_of
from test_state_tree import UNSUPPORTED
from test_surroundings import deep, needs_root, reachable, run_there, save_one

from dtruntime import CheckpointError, CheckpointManager
from dtruntime.state import tensors
from dtruntime.state.state_tree import flatten

EXPECTED = Path(__file__).with_name("messages.txt")
EXPECTED_AS_ROOT = Path(__file__).with_name("messages_as_root.txt")


def message_of(act) -> str:
    try:
        act()
    except (CheckpointError, TimeoutError) as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError("no error was raised")


def collect(store: Path) -> dict[str, str]:
    found = {}
    for name, value in UNSUPPORTED.items():
        found[f"unsupported {name}"] = message_of(lambda value=value: flatten({"x": [value]}))
    found["unsupported key"] = message_of(lambda: flatten({"x": {(1, 2): 3}}))
    found["several unsupported"] = message_of(lambda: flatten({"x": [{1}, len], "y": {(1, 2): 3}}))
    found["many unsupported"] = message_of(lambda: flatten([{n} for n in range(10)]))
    found["torch dtype of another version"] = message_of(lambda: tensors.torch_dtype("float3_e1m1"))
    found["numpy dtype of another version"] = message_of(lambda: tensors.numpy_dtype("O"))
    found["no path"] = message_of(CheckpointManager)
    manager = CheckpointManager(store, compression="none", chunk_bytes="64KiB")
    found["no checkpoint"] = message_of(manager.load)
    found["no such step"] = message_of(lambda: manager.load(step=7))
    found["second writer"] = message_of(lambda: CheckpointManager(store))
    manager.save({"a": torch.zeros(20_000), "b": np.zeros(3), "n": 1}, step=10)
    found["step conflict"] = message_of(lambda: manager.save_async({}, step=10))
    found["nothing matches"] = message_of(lambda: manager.load(keys=["c.*"]))
    live = {"a": torch.zeros(3), "b": np.zeros(3), "c": torch.zeros(1)}
    found["misfits"] = message_of(lambda: manager.restore(live))
    other = {"a": [torch.zeros(3)], "b": torch.zeros(3), "n": np.zeros(3)}
    found["other types"] = message_of(lambda: manager.restore(other))
    found["nothing to restore into"] = message_of(lambda: manager.restore(5))
    found["bad step"] = message_of(lambda: manager.save_async({}, step=-1))
    found["bad metadata"] = message_of(lambda: manager.save_async({}, step=11, metadata={1: 2}))
    reader = CheckpointManager(store, read_only=True)
    found["read-only save"] = message_of(lambda: reader.save_async({}, step=11))
    found["read-only delete"] = message_of(lambda: reader.delete(10))
    found["read-only of nothing"] = message_of(
        lambda: CheckpointManager(store / "nowhere", read_only=True).load()
    )
    flip_byte(shard_of(store, 10), 5000)
    found["damaged chunk"] = message_of(lambda: manager.load(step=10))
    found["all damaged"] = message_of(manager.load)
    manifest = store / "step-000000000010" / "manifest.json"
    manifest.write_bytes(manifest.read_bytes().replace(b'"job"', b'"jop"'))
    found["damaged manifest"] = message_of(lambda: manager.load(step=10))
    manager.close()
    found["closed"] = message_of(manager.latest_step)
    found["closed save"] = message_of(lambda: manager.save_async({}, step=12))
    reader.close()
    file = store.with_name("file")
    file.write_text("mine")
    found["store is a file"] = message_of(lambda: CheckpointManager(file))
    found["read-only store is a file"] = message_of(
        lambda: CheckpointManager(file, read_only=True).load()
    )
    found["store below a file"] = message_of(lambda: CheckpointManager(file / "below"))
    long = deep(store.parent, 4090)
    found["path too long"] = message_of(
        lambda: CheckpointManager(long).save({"a": torch.zeros(3)}, step=1)
    ).replace(str(long), "LONG")
    return {name: anonymous(text, store) for name, text in found.items()}


def collect_as_root(store: Path) -> dict[str, str]:
    found = {}
    refused = "print(refused(lambda: {}))"
    save_one(store)
    shard = shard_of(store, 1)
    found["no right to write"] = run_there(
        "as_nobody()\n" + refused.format("CheckpointManager(store)"), store
    )
    for name, path in {"shard": shard, "manifest": shard.with_name("manifest.json")}.items():
        path.chmod(0)
        found[f"no right to read the {name}"] = run_there(
            "as_nobody()\n" + refused.format("open_reader().load(step=1)"), store
        )
        path.chmod(0o644)
    found["read-only filesystem"] = run_there(
        refused.format("CheckpointManager(store)"),
        store,
        'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0"',
    )
    found["no direct I/O"] = run_there(
        """
manager = CheckpointManager(store, direct_io="on")
print(refused(lambda: manager.save({"a": torch.zeros(3)}, step=1)))
""",
        store,
        'mount -t ramfs none "$0"',
    )
    return {name: anonymous(text.rstrip(), store) for name, text in found.items()}


def anonymous(text: str, store: Path) -> str:
    for pattern, name in (
        (re.escape(str(store)), "STORE"),
        (re.escape(str(store.parent)), "SCRATCH"),
        (r"\b[0-9a-f]{32}\b", "ATTEMPT"),
        (r"\b[0-9a-f]{8}\b", "CRC"),
        (re.escape(torch.__version__), "TORCH"),
        (re.escape(np.__version__), "NUMPY"),
        (r"process \d+", "process PID"),
    ):
        text = re.sub(pattern, name, text)
    return text


def test_every_message(store, monkeypatch):
    monkeypatch.delenv("CHECKPOINT_DIR", raising=False)
    compare(collect(store), EXPECTED)


@needs_root
def test_every_message_of_other_users_and_mounts(tmp_path):
    compare(collect_as_root(reachable(tmp_path)), EXPECTED_AS_ROOT)


def compare(messages: dict[str, str], expected: Path) -> None:
    for name, text in messages.items():
        assert "\nhint: " in text, name
    actual = "".join(f"== {name}\n{text}\n" for name, text in messages.items())
    if os.environ.get("UPDATE_MESSAGES"):
        expected.write_text(actual)
    assert actual == expected.read_text()
