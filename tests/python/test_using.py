"""The code that documents show, run as it stands there."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^`(ckpt-tool [^`]*)`", re.MULTILINE)


def blocks_of(document: str) -> list[str]:
    """Give the Python code of a document, padded so that tracebacks say its lines."""
    text = (ROOT / document).read_text()
    found = BLOCK.finditer(text)
    return ["\n" * text.count("\n", 0, block.start(1)) + block[1] for block in found]


def run(document: str, names: dict[str, object]) -> dict[str, object]:
    """Run the blocks of a document in its order, with what they left before."""
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
def test_what_is_shown_of_the_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run("python/docs/using.md", {})
    (tool,) = COMMAND.findall((ROOT / "python/docs/using.md").read_text())
    program, *arguments = shlex.split(tool)
    found = shutil.which(program)
    assert found
    subprocess.run([found, *arguments], check=True, timeout=60)
    written = (tmp_path / "model.safetensors").read_bytes()
    header = json.loads(written[8 : 8 + int.from_bytes(written[:8], "little")])
    assert header.keys() - {"__metadata__"} == names["model"].state_dict().keys()


class Training:
    """Names that the README's script takes for granted, and the steps that it took."""

    def __init__(self) -> None:
        model = torch.nn.Linear(1, 1)
        optimizer = torch.optim.SGD(model.parameters())
        self.scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
        self.names = {"model": model, "optimizer": optimizer, "scheduler": self.scheduler}
        self.steps: list[int] = []

    def run(self, *, stopped_at: int | None = None) -> None:
        def train_step(
            _model: object, optimizer: torch.optim.Optimizer, _scheduler: object
        ) -> None:
            self.steps.append(self.scheduler.last_epoch + 1)
            if self.steps[-1] == stopped_at:
                raise KeyboardInterrupt
            optimizer.step()
            self.scheduler.step()

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
