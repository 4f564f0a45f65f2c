"""The exact text of every kind of error, so that a change of one is seen.

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

from dtruntime import CheckpointError, CheckpointManager, tensors
from dtruntime.state_tree import flatten

EXPECTED = Path(__file__).with_name("messages.txt")


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
    return {name: anonymous(text, store) for name, text in found.items()}


def anonymous(text: str, store: Path) -> str:
    for pattern, name in (
        (re.escape(str(store)), "STORE"),
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
    messages = collect(store)
    for name, text in messages.items():
        assert "\nhint: " in text, name
    actual = "".join(f"== {name}\n{text}\n" for name, text in messages.items())
    if os.environ.get("UPDATE_MESSAGES"):
        EXPECTED.write_text(actual)
    assert actual == EXPECTED.read_text()
