"""The adapter for PyTorch Lightning: what its trainer saves, removes and resumes from."""

from __future__ import annotations

import copy
import os
import pickle
import textwrap
import threading
from pathlib import Path

import lightning_job
import pytest
import pytorch_lightning as pl
import torch
from lightning_fabric import Fabric
from lightning_job import Net, batches, trainer
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from ranks import torchrun
from support import assert_same, flip_byte, run_script, shard_of, short_files

from dtruntime import (
    CheckpointManager,
    CheckpointNotFound,
    Corrupt,
    InvalidArgument,
    StorageError,
    UnsupportedValue,
    _native,
)
from dtruntime.lightning import CheckpointIO

# Lightning warns of much that is intended here: no workers, few steps, no validation.
pytestmark = pytest.mark.filterwarnings("ignore")

JOB = Path(lightning_job.__file__).read_text()


def every_fifth(directory, **settings) -> ModelCheckpoint:
    """Save every fifth of the eight steps of an epoch."""
    names = {"filename": "{step}", "monitor": "step", "mode": "max"}
    return ModelCheckpoint(directory, every_n_train_steps=5, **names | settings)


def paths_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def a_checkpoint(step: int = 1, fill: float = 1.0) -> dict:
    return {"global_step": step, "state_dict": {"weight": torch.full((300_000,), fill)}}


class Kept(CheckpointIO):
    """Keeps what it was given, by path."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.given: dict = {}

    def save_checkpoint(self, checkpoint, path, storage_options=None) -> None:
        self.given[str(path)] = copy.deepcopy(checkpoint)
        super().save_checkpoint(checkpoint, path, storage_options)


def test_a_resumed_training_equals_an_uninterrupted_run(tmp_path):
    def fit(directory, epochs, path=None):
        net, plugin = Net(), CheckpointIO()
        callback = ModelCheckpoint(directory, save_last=True)  # after each epoch
        trainer(plugin, epochs, callback).fit(net, batches(), ckpt_path=path)
        return net, plugin

    straight, _ = fit(tmp_path / "a", 4)
    _, plugin = fit(tmp_path / "b", 2)
    newest = plugin.newest(tmp_path / "b")
    assert newest == str(tmp_path / "b" / "last.ckpt")
    for epochs, path in ((3, "last"), (4, newest)):
        resumed, _ = fit(tmp_path / "b", epochs, path)
    assert_same(resumed.state_dict(), straight.state_dict())


def test_everything_that_lightning_saves_is_loaded(tmp_path):
    plugin = Kept()
    stopping = EarlyStopping("loss", patience=100)
    trainer(plugin, 2, every_fifth(tmp_path, save_last=True), stopping).fit(Net(), batches())
    assert len(plugin.given) == 4
    for path in tmp_path.iterdir():
        loaded = plugin.load_checkpoint(path)
        assert_same(loaded, plugin.given[str(path)])
        assert loaded["hyper_parameters"] == {"width": 32, "name": "net"}


def test_only_what_lightning_keeps_remains(tmp_path):
    plugin = CheckpointIO()
    trainer(plugin, 4, every_fifth(tmp_path, save_top_k=2, save_last="link")).fit(Net(), batches())
    assert paths_in(tmp_path) == ["last.ckpt", "step=25.ckpt", "step=30.ckpt"]
    assert plugin.load_checkpoint(tmp_path / "last.ckpt")["global_step"] == 30
    for path in tmp_path.iterdir():
        with CheckpointManager(path, read_only=True) as manager:
            assert manager.verify().ok


def test_a_path_that_is_saved_again_has_the_last_checkpoint(tmp_path):
    plugin = CheckpointIO()
    for step, fill in ((5, 1.0), (9, 2.0), (9, 3.0), (4, 4.0)):  # on, again, and back
        plugin.save_checkpoint(a_checkpoint(step, fill), tmp_path / "last.ckpt")
        assert_same(plugin.load_checkpoint(tmp_path / "last.ckpt"), a_checkpoint(step, fill))
    plugin.teardown()
    assert len(list((tmp_path / "last.ckpt").rglob("*.shard"))) == 1, "nothing stays behind"


def growing_state(step: int) -> dict:
    return {"global_step": step, "state_dict": {"weight": torch.randn(2_000_000)}}


def shrinking_state(step: int) -> dict:
    return {"global_step": step, "state_dict": {"weight": torch.zeros(2_000_000)}}


def test_nothing_is_removed_before_its_replacement_is_durable(tmp_path):
    plugin = CheckpointIO(compression="zstd")
    old, new = tmp_path / "old.ckpt", tmp_path / "new.ckpt"
    plugin.save_checkpoint(a_checkpoint(), old)
    plugin.save_checkpoint(shrinking_state(2), new)
    plugin.teardown()
    with short_files():
        plugin.save_checkpoint(growing_state(3), new)
        plugin.remove_checkpoint(old)  # as `ModelCheckpoint` does at once
        with pytest.raises(StorageError):
            plugin.teardown()
    assert_same(plugin.load_checkpoint(old), a_checkpoint())
    assert_same(plugin.load_checkpoint(new), shrinking_state(2))  # all or not at all
    plugin.save_checkpoint(a_checkpoint(3), new)
    plugin.remove_checkpoint(old)
    plugin.teardown()
    assert paths_in(tmp_path) == ["new.ckpt"]


def test_a_failed_save_is_raised_by_the_next_and_is_not_the_newest(tmp_path):
    plugin = CheckpointIO(compression="zstd")
    for name in ("a", "b"):
        plugin.save_checkpoint(shrinking_state(1), tmp_path / name)
    plugin.teardown()
    with short_files():
        plugin.save_checkpoint(growing_state(2), tmp_path / "b")
        with pytest.raises(StorageError):
            plugin.save_checkpoint(a_checkpoint(3), tmp_path / "a")
    plugin.save_checkpoint(a_checkpoint(3), tmp_path / "a")
    assert plugin.newest(tmp_path) == str(tmp_path / "a")
    plugin.teardown()


def test_a_path_whose_only_save_was_interrupted_says_what_to_do(tmp_path):
    with CheckpointManager(tmp_path / "a"):
        pass  # opened, and nothing saved
    with pytest.raises(CheckpointNotFound, match="may have been interrupted") as raised:
        CheckpointIO().load_checkpoint(tmp_path / "a")
    assert f"newest({str(tmp_path)!r})" in raised.value.hint
    assert CheckpointIO().newest(tmp_path) is None


def test_the_newest_is_the_last_one_saved_that_can_be_read(tmp_path, caplog):
    plugin = CheckpointIO(chunk_bytes="64KiB")
    for step, name in ((1, "a"), (2, "b"), (2, "c"), (2, "b")):
        plugin.save_checkpoint(a_checkpoint(step), tmp_path / name)
    plugin.teardown()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "log.txt").write_text("not a checkpoint")
    (tmp_path / "readme.ckpt").write_text("not a checkpoint")
    assert plugin.newest(tmp_path) == str(tmp_path / "b")
    flip_byte(shard_of(tmp_path / "b", 3), 70_000)
    assert plugin.newest(tmp_path, verify=False) == str(tmp_path / "b")
    assert plugin.newest(tmp_path) == str(tmp_path / "c")
    assert f"`{tmp_path / 'b'}` is damaged, and skipped" in caplog.text
    with pytest.raises(Corrupt):
        plugin.load_checkpoint(tmp_path / "b")
    next((tmp_path / "c").rglob("manifest*")).write_bytes(b"nonsense")
    assert plugin.newest(tmp_path) == str(tmp_path / "a")
    for name in ("b", "c"):
        plugin.save_checkpoint(a_checkpoint(2), tmp_path / name)
        assert_same(plugin.load_checkpoint(tmp_path / name), a_checkpoint(2))
    assert plugin.newest(tmp_path) == str(tmp_path / "c")
    assert plugin.newest(tmp_path / "notes") is None
    assert plugin.newest(tmp_path / "nowhere") is None
    with pytest.raises(InvalidArgument, match="only local directories"):
        plugin.newest("s3://bucket/runs")


def test_a_file_of_lightnings_own_is_resumed_from_and_replaced(tmp_path):
    own, path = pl.plugins.io.TorchCheckpointIO(), tmp_path / "last.ckpt"
    own.save_checkpoint(a_checkpoint(), path)
    plugin = CheckpointIO()
    assert plugin.newest(tmp_path) == str(path)
    assert_same(plugin.load_checkpoint(path), a_checkpoint())
    with pytest.raises(UnsupportedValue):
        plugin.save_checkpoint({"global_step": 2, "code": torch.nn.MSELoss}, path)
    plugin.teardown()
    assert paths_in(tmp_path) == ["last.ckpt"]
    assert_same(plugin.load_checkpoint(path), a_checkpoint())
    plugin.save_checkpoint(a_checkpoint(2), path)
    assert_same(plugin.load_checkpoint(path), a_checkpoint(2))
    assert paths_in(tmp_path) == ["last.ckpt"]


@pytest.mark.parametrize("is_link", [False, True])
def test_what_is_replaced_exists_until_the_new_one_does(tmp_path, monkeypatch, is_link):
    plugin, path = CheckpointIO(), tmp_path / "last.ckpt"
    if is_link:
        plugin.save_checkpoint(a_checkpoint(), tmp_path / "best.ckpt")
        path.symlink_to("best.ckpt")
    else:
        pl.plugins.io.TorchCheckpointIO().save_checkpoint(a_checkpoint(), path)
    before = paths_in(tmp_path)

    def interrupt(removed):  # as a kill would, just after the old one was removed
        assert Path(removed).name == ".last.ckpt.saving"
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "remove", interrupt)
        with pytest.raises(KeyboardInterrupt):
            plugin.save_checkpoint(a_checkpoint(2), path)
    after = CheckpointIO()
    assert after.newest(tmp_path) == str(path)
    assert_same(after.load_checkpoint(path), a_checkpoint(2))
    after.save_checkpoint(a_checkpoint(3), path)
    after.teardown()
    assert paths_in(tmp_path) == before
    assert_same(after.load_checkpoint(path), a_checkpoint(3))


def test_a_filesystem_that_cannot_swap_names_is_supported(tmp_path, monkeypatch):
    monkeypatch.setattr(_native, "swap", lambda *_: False)
    path = tmp_path / "last.ckpt"
    pl.plugins.io.TorchCheckpointIO().save_checkpoint(a_checkpoint(), path)
    plugin = CheckpointIO()
    plugin.save_checkpoint(a_checkpoint(2), path)
    assert_same(plugin.load_checkpoint(path), a_checkpoint(2))
    assert paths_in(tmp_path) == ["last.ckpt"]


def test_two_names_are_swapped_at_once_or_not_at_all(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").write_text("b")
    assert _native.swap(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a").read_text() == "b"
    assert (tmp_path / "b").is_dir()
    with pytest.raises(FileNotFoundError):
        _native.swap(tmp_path / "a", tmp_path / "c")


def test_the_target_of_a_link_is_not_written_to(tmp_path):
    plugin = CheckpointIO()
    plugin.save_checkpoint(a_checkpoint(), tmp_path / "best.ckpt")
    (tmp_path / "last.ckpt").symlink_to("best.ckpt")
    plugin.save_checkpoint(a_checkpoint(2), tmp_path / "last.ckpt")
    assert_same(plugin.load_checkpoint(tmp_path / "best.ckpt"), a_checkpoint())
    assert_same(plugin.load_checkpoint(tmp_path / "last.ckpt"), a_checkpoint(2))
    plugin.remove_checkpoint(tmp_path / "last.ckpt")
    plugin.teardown()
    assert paths_in(tmp_path) == ["best.ckpt"]


def test_saves_do_not_wait_for_what_is_being_removed(tmp_path, monkeypatch):
    plugin, may_go = CheckpointIO(), threading.Event()
    delete = CheckpointManager.delete

    def delayed(manager, step):
        assert may_go.wait(60)
        return delete(manager, step)

    monkeypatch.setattr(CheckpointManager, "delete", delayed)
    plugin.save_checkpoint(a_checkpoint(1), tmp_path / "a")
    plugin.remove_checkpoint(tmp_path / "a")
    plugin.save_checkpoint(a_checkpoint(2), tmp_path / "b")
    plugin.save_checkpoint(a_checkpoint(3), tmp_path / "c")
    assert paths_in(tmp_path) == ["a", "b", "c"]
    threading.Timer(0.1, may_go.set).start()
    plugin.save_checkpoint(a_checkpoint(4), tmp_path / "a")  # waits for that, to be a new one
    plugin.teardown()
    with CheckpointManager(tmp_path / "a", read_only=True) as manager:
        assert manager.all_steps() == [4]


def test_a_failed_removal_is_raised_by_the_next_call(tmp_path, monkeypatch):
    plugin = CheckpointIO()
    delete = CheckpointManager.delete

    def fail_once(manager, _step):
        monkeypatch.setattr(CheckpointManager, "delete", delete)
        raise StorageError(f"deleting from {manager.path}", "the device is gone", "look at it")

    monkeypatch.setattr(CheckpointManager, "delete", fail_once)
    for step, name in ((1, "a"), (2, "b")):
        plugin.save_checkpoint(a_checkpoint(step), tmp_path / name)
    plugin.remove_checkpoint(tmp_path / "a")
    with pytest.raises(StorageError, match="the device is gone"):
        plugin.teardown()
    plugin.save_checkpoint(a_checkpoint(3), tmp_path / "c")
    plugin.remove_checkpoint(tmp_path / "b")
    plugin.teardown()
    assert paths_in(tmp_path) == ["a", "c"]


def test_spellings_of_one_path_share_a_store(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plugin = CheckpointIO()
    for step, name in enumerate(("a.ckpt", tmp_path / "a.ckpt", "./a.ckpt/")):
        plugin.save_checkpoint(a_checkpoint(step), name)
    plugin.remove_checkpoint(f"{tmp_path}/./a.ckpt")
    plugin.teardown()
    assert paths_in(tmp_path) == []


def test_what_is_not_a_checkpoint_is_neither_written_to_nor_removed(tmp_path):
    plugin = CheckpointIO()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(InvalidArgument, match="it is not a checkpoint"):
        plugin.save_checkpoint(a_checkpoint(), tmp_path / "mine")
    plugin.remove_checkpoint(tmp_path / "mine")
    plugin.remove_checkpoint(tmp_path / "not" / "there")
    plugin.save_checkpoint(a_checkpoint(), tmp_path / "a.ckpt")
    plugin.teardown()
    (tmp_path / "a.ckpt" / "notes.txt").write_text("mine")
    plugin.remove_checkpoint(tmp_path / "a.ckpt")
    assert paths_in(tmp_path) == ["a.ckpt", "mine"]
    assert (tmp_path / "a.ckpt" / "notes.txt").exists()


def test_a_save_before_slurm_stops_is_durable_at_once(tmp_path):
    plugin = CheckpointIO()
    plugin.save_checkpoint(a_checkpoint(), tmp_path / "hpc_ckpt_1.ckpt")  # and requeues the job
    with CheckpointManager(tmp_path / "hpc_ckpt_1.ckpt", read_only=True) as manager:
        assert manager.all_steps() == [1]
    plugin.teardown()


def test_pickling_a_plugin_waits_for_its_saves(tmp_path):
    plugin = CheckpointIO(compression="none")
    plugin.save_checkpoint(a_checkpoint(), tmp_path / "a")
    other = pickle.loads(pickle.dumps(plugin))  # noqa: S301  (what it was just now)
    assert_same(other.load_checkpoint(tmp_path / "a"), a_checkpoint())


def test_what_cannot_be_saved_is_refused_by_its_path_and_leaves_nothing(tmp_path):
    plugin = CheckpointIO()
    for value in (torch.nn.MSELoss, torch.nn.Linear(1, 1), Path("a"), object()):
        checkpoint = {"global_step": 1, "hyper_parameters": {"loss": value}}
        with pytest.raises(UnsupportedValue, match=r"hyper_parameters.*loss") as raised:
            plugin.save_checkpoint(checkpoint, tmp_path / "a")
        assert "save_hyperparameters(ignore" in raised.value.hint
    plugin.teardown()
    assert paths_in(tmp_path) == []


def test_wrong_settings_are_refused_at_once():
    for options, hint in (
        ({"compresion": "none"}, "did you mean `compression`"),
        ({"keep_last_n": 3}, "ModelCheckpoint"),
        ({"compression": "gzp"}, "did you mean `gzip`"),
        ({"chunk_bytes": 7}, "default, 4194304"),
    ):
        with pytest.raises(InvalidArgument) as raised:
            CheckpointIO(**options)
        assert hint in raised.value.hint
    with pytest.raises(InvalidArgument, match="storage_options"):
        CheckpointIO().save_checkpoint({}, "a", storage_options={"a": 1})


def test_fabric_saves_and_loads(tmp_path):
    fabric = Fabric(accelerator="cpu", devices=1, plugins=[CheckpointIO()])
    model = torch.nn.Linear(4, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model, optimizer = fabric.setup(model, optimizer)
    fabric.backward(model(torch.ones(3, 4)).sum())
    optimizer.step()
    before = copy.deepcopy(model.state_dict())
    fabric.save(tmp_path / "a", {"model": model, "optimizer": optimizer, "step": 3})
    with torch.no_grad():
        model.weight.zero_()
    rest = fabric.load(tmp_path / "a", {"model": model, "optimizer": optimizer})
    assert_same(dict(model.state_dict()), dict(before))
    assert rest == {"step": 3}


KILLED = (
    JOB
    + """
import os, signal, sys
from pytorch_lightning.callbacks import ModelCheckpoint
from dtruntime.lightning import CheckpointIO

class Killed(CheckpointIO):
    def save_checkpoint(self, checkpoint, path, storage_options=None):
        super().save_checkpoint(checkpoint, path, storage_options)
        if checkpoint["global_step"] == 10:
            os.kill(os.getpid(), signal.SIGKILL)  # while it is written

callback = ModelCheckpoint(sys.argv[1], every_n_train_steps=5, save_top_k=0, save_last=True)
trainer(Killed(), 4, callback).fit(Net(width=500_000), batches())
"""
)


def test_a_kill_during_a_save_leaves_a_complete_checkpoint(tmp_path):
    killed = run_script(KILLED, tmp_path, timeout=240)
    assert killed.returncode == -9, killed.stderr
    assert paths_in(tmp_path) == ["last.ckpt"]
    plugin = CheckpointIO()
    found = plugin.newest(tmp_path)
    assert found == str(tmp_path / "last.ckpt")
    assert plugin.load_checkpoint(found)["global_step"] in {5, 10}


RANKS = (
    JOB
    + """
import sys
from pathlib import Path
from pytorch_lightning.callbacks import ModelCheckpoint
from dtruntime.lightning import CheckpointIO

def fit(directory, epochs, path=None):
    net = Net()
    plugin = CheckpointIO()
    callback = ModelCheckpoint(directory, save_last=True)
    job = trainer(plugin, epochs, callback, strategy="ddp", devices=2)
    job.fit(net, batches(), ckpt_path=path)
    return net

store = Path(sys.argv[1])
straight = fit(store / "a", 2)
fit(store / "b", 1)
resumed = fit(store / "b", 2, CheckpointIO().newest(store / "b"))
for name, value in straight.state_dict().items():
    assert torch.equal(value, resumed.state_dict()[name]), name
print("same")
"""
)


def test_ranks_resume_from_what_rank_0_saved(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(RANKS))
    ended = torchrun("--nproc-per-node", 2, script, tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("same") == 2
