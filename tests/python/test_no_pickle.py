"""No byte of a checkpoint is ever unpickled: pickles run code, so reading one trusts its writer.

Each script runs in a separate process that counts: the interpreter's audit event for every class
that an unpickler looks up, and every call of `pickle` and of torch's own functions built on
it, by any code. `ckpt-tool` has no Python in it (a house rule bars it).
"""

from __future__ import annotations

import json
from pathlib import Path

from support import run_script

EXAMPLE = Path(__file__).parents[2] / "python" / "examples" / "train_gpt.py"

# Installed before anything of ours is imported. `marshal`, with which Python reads its own modules,
# is not watched: what it reads does not run by being read.
WATCH = """
import _pickle, json, pickle, sys
events = []
sys.addaudithook(lambda name, given: name == "pickle.find_class" and events.append([name, *given]))
import torch

def watch(module, name):
    original = getattr(module, name)
    class Watched(original if isinstance(original, type) else object):
        def __new__(cls, *given, **named):
            events.append(f"{module.__name__}.{name}")
            if isinstance(original, type):
                return super().__new__(cls, *given, **named)
            return original(*given, **named)
    setattr(module, name, Watched)

for module in (pickle, _pickle):
    for name in ("load", "loads", "dump", "dumps", "Pickler", "Unpickler"):
        watch(module, name)
for name in ("load", "save"):
    watch(torch, name)
events.clear()

def report():
    found = list(events)
    events.clear()
    # The watch would have noticed: a look-up, and each way to call.
    pickle.loads(pickle.dumps(report))
    noticed = list(events)
    print(json.dumps({"found": found, "noticed": noticed}))
"""


def run_watched(source: str, *arguments: object) -> None:
    ran = run_script(f"{WATCH}\n{source}\nreport()\n", *arguments, timeout=240)
    assert ran.returncode == 0, ran.stderr
    result = json.loads(ran.stdout.splitlines()[-1])
    assert "pickle.loads" in result["noticed"], result
    assert ["pickle.find_class", "__main__", "report"] in result["noticed"], result
    assert result["found"] == []


def test_saving_loading_and_restoring_unpickles_nothing(store):
    run_watched(
        """
from collections import OrderedDict
import numpy as np
from dtruntime import CheckpointManager

def state():
    model = torch.nn.Sequential(torch.nn.Linear(50, 50), torch.nn.BatchNorm1d(50))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 50)).sum().backward()
    optimizer.step()
    plain = {
        1: [None, True, 2**80, 1.5, 2j, "text", b"bytes", (1, (2,))],
        "numpy": [np.float32(1), np.arange(3), np.dtype("<f4")],
        "torch": [torch.float16, torch.device("cpu"), torch.Size([1, 2]), torch.get_rng_state()],
        "ordered": OrderedDict(a=1),
    }
    return {"model": model, "optimizer": optimizer, "plain": plain}

store = sys.argv[1]
for codec in ("none", "float", "zstd", "gzip"):
    with CheckpointManager(f"{store}-{codec}", compression=codec, chunk_bytes="64KiB") as manager:
        saved = state()
        manager.save_async(saved, step=1, metadata={"loss": 1.5}).result()
        manager.save(saved, step=2)
        manager.load()
        manager.load(step=1, keys=["model.*"])
        manager.restore(state())
        manager.verify(2)
        manager.all_steps()
        manager.delete(1)
    with CheckpointManager(f"{store}-{codec}", read_only=True) as reader:
        reader.load()
""",
        store,
    )
    for codec in ("none", "float", "zstd", "gzip"):
        for path in Path(f"{store}-{codec}").rglob("*"):
            assert not path.is_file() or not is_pickle(path.read_bytes()), path


def is_pickle(content: bytes) -> bool:
    """Return whether a file begins as pickles and torch's archives of them do."""
    return content[:1] == b"\x80" or content[:2] == b"PK"


def test_damage_unpickles_nothing(store):
    run_watched(
        """
from pathlib import Path
from dtruntime import CheckpointError, CheckpointManager

store = Path(sys.argv[1])
with CheckpointManager(store, chunk_bytes="64KiB") as manager:
    manager.save({"a": torch.arange(9), "b": [1, "x"]}, step=1)
for path in sorted(store.glob("step-*/*")):
    content = path.read_bytes()
    # A pickle that would call, in the file's place and at its start.
    for attack in (b"cposix\\nsystem\\n(S'true'\\ntR.", b"\\x80\\x04cbuiltins\\nprint\\n."):
        for bad in (attack, attack + content[len(attack):]):
            path.write_bytes(bad)
            with CheckpointManager(store, read_only=True) as reader:
                try:
                    reader.load(step=1)
                except CheckpointError:
                    pass
                else:
                    raise AssertionError(path)
    path.write_bytes(content)
""",
        store,
    )


def test_resuming_the_training_example_unpickles_nothing(store):
    source = """
import runpy
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    assert not end.code, end.code
"""
    arguments = [EXAMPLE, "--store", store, "--save-every", "2"]
    run_watched(source, *arguments, "--steps", "4")
    run_watched(source, *arguments, "--steps", "6", "--resume")
