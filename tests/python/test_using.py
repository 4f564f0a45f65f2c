"""The code that documents show, run as it is."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
import subprocess
from collections import Counter, OrderedDict
from pathlib import Path

import lightning_job
import numpy as np
import pytest
import torch
import transformers_job
from support import assert_same

from dtruntime import UnsupportedValue

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^`(ckpt-tool [^`]*)`", re.MULTILINE)


def blocks_of(document: str) -> list[str]:
    """Return the Python code of a document, padded so that tracebacks show its lines."""
    text = (ROOT / document).read_text()
    found = BLOCK.finditer(text)
    return ["\n" * text.count("\n", 0, block.start(1)) + block[1] for block in found]


def run(document: str, names: dict[str, object]) -> dict[str, object]:
    """Run the blocks of a document in order, in one namespace."""
    blocks = blocks_of(document)
    assert blocks
    for block in blocks:
        exec(compile(block, document, "exec"), names)  # noqa: S102
    return names


@pytest.fixture
def own_handlers():
    """Undo what a script does to signals."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.usefixtures("own_handlers")
@pytest.mark.filterwarnings("ignore")  # of trainers, and of torch: here it is one process
def test_what_is_shown_of_the_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    to_train = {"module": lightning_job.Net(), "batches": lightning_job.batches()}
    to_train |= {"network": transformers_job.Net(), "samples": transformers_job.Samples()}
    names = run("python/docs/using.md", to_train)
    (tool,) = COMMAND.findall((ROOT / "python/docs/using.md").read_text())
    program, *arguments = shlex.split(tool)
    found = shutil.which(program)
    assert found
    subprocess.run([found, *arguments], check=True, timeout=60)
    written = (tmp_path / "model.safetensors").read_bytes()
    header = json.loads(written[8 : 8 + int.from_bytes(written[:8], "little")])
    assert header.keys() - {"__metadata__"} == names["model"].state_dict().keys()


def test_what_can_be_saved_is_what_is_listed(manager):
    text = (ROOT / "python/docs/using.md").read_text()
    assert "| keys | `str`, `int`, `bool`, `float`, `bytes`, `None` |" in text
    keys = ["a", 1, True, 2.5, b"k", None]
    values = [None, True, 2**200, 0.5, 2j, "s", b"b", torch.float32, torch.Size([1])]
    values += [torch.device("cpu"), np.float32(1), np.array(["a"]), np.array([True])]
    values += [OrderedDict(a=1), Counter("aab"), [1, (2,)], {"b": {}}]
    for step, state in enumerate([{key: 1} for key in keys] + [{"x": value} for value in values]):
        manager.save(state, step=step)
        assert_same(manager.load(), state)
    for key in (2j, (1,), torch.float32):
        with pytest.raises(UnsupportedValue, match="a key of type"):
            manager.save({key: 1}, step=99)
    for array in (np.array([object()]), np.zeros(2, dtype=[("a", "i4")])):
        with pytest.raises(UnsupportedValue):
            manager.save({"x": array}, step=99)


class Training:
    """Names that the README's script assumes, and the steps that it took."""

    def __init__(self) -> None:
        model = torch.nn.Linear(1, 1)
        torch.nn.init.zeros_(model.bias)  # counts the steps that the weights have seen
        self.names = {"model": model, "optimizer": torch.optim.SGD(model.parameters())}
        self.steps: list[int] = []

    def run(self, *, stopped_at: int | None = None) -> None:
        def train_step(model: torch.nn.Linear, _optimizer: object) -> None:
            self.steps.append(int(model.bias) + 1)
            if self.steps[-1] == stopped_at:
                raise KeyboardInterrupt
            with torch.no_grad():
                model.bias.add_(1)

        run("README.md", self.names | {"train_step": train_step})


def test_what_the_readme_shows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, second = Training(), Training()
    with pytest.raises(KeyboardInterrupt):
        first.run(stopped_at=3456)
    second.run()
    assert first.steps == [*range(1, 3457)]
    assert second.steps == [*range(3001, 10_001)]
    kept = [int(path.name.removeprefix("step-")) for path in Path("runs/gpt").glob("step-*")]
    assert sorted(kept) == [3000, *range(6000, 10_001, 1000)]
