"""The adapter for Hugging Face's trainer: what it saves and resumes from."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
import transformers_job
from ranks import torchrun
from support import assert_same, flip_byte, run_script, shard_of
from transformers_job import EachStep, EndedError, Net, end_at, trainer

from dtruntime import (
    CheckpointManager,
    CheckpointNotFound,
    Corrupt,
    InvalidArgument,
    StepConflict,
    UnsupportedFormat,
)
from dtruntime.transformers import StoredCheckpoints, Trainer

pytestmark = pytest.mark.filterwarnings("ignore")

JOB = Path(transformers_job.__file__).read_text()


def run_until(step: int, manager: CheckpointManager, directory: Path, **arguments) -> None:
    """Train, and end after a step."""
    with pytest.raises(EndedError):
        trainer(manager, directory, end_at(step), **arguments).train()
    manager.wait_until_finished()


@pytest.fixture
def straight(tmp_path):
    """Train without a stop, and without checkpoints."""
    job = trainer(None, tmp_path / "straight", kind=transformers.Trainer, save_strategy="no")
    job.train()
    return job


def assert_equals_uninterrupted(job: Trainer, straight: transformers.Trainer) -> None:
    """Check that a run ended like one without a stop."""
    assert_same(job.model.state_dict(), straight.model.state_dict())
    assert_same(job.lr_scheduler.state_dict(), straight.lr_scheduler.state_dict())
    losses = [
        [(entry["step"], entry["loss"]) for entry in run.state.log_history if "loss" in entry]
        for run in (job, straight)
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 24


@pytest.mark.parametrize("step", [7, 12, 23])  # after a save in the first, second, third epoch
def test_a_resumed_training_equals_an_uninterrupted_run(open_manager, tmp_path, straight, step):
    manager = open_manager()
    run_until(step, manager, tmp_path / "a")
    job = trainer(manager, tmp_path / "a")
    job.train(resume_from_checkpoint=True)
    assert manager.last_load.step == step // 5 * 5
    assert_equals_uninterrupted(job, straight)
    manager.wait_until_finished()
    assert manager.all_steps() == [5, 10, 15, 20, 24]
    assert not list((tmp_path / "a").glob("checkpoint-*")), "nothing is written beside it"


def test_a_training_that_goes_back_replaces_later_checkpoints(
    open_manager, tmp_path, straight, caplog
):
    manager = open_manager()
    run_until(22, manager, tmp_path / "a")
    run_again = trainer(manager, tmp_path / "a", end_at(16))
    with pytest.raises(EndedError):
        run_again.train(resume_from_checkpoint=10)
    manager.wait_until_finished()
    assert manager.all_steps() == [5, 10, 15]
    job = trainer(manager, tmp_path / "a")
    job.train(resume_from_checkpoint=15)
    assert_equals_uninterrupted(job, straight)
    assert "rewind=True" not in caplog.text, "the trainer sees to it"


def test_a_damaged_checkpoint_is_skipped_and_replaced(
    open_manager, store, tmp_path, straight, caplog
):
    manager = open_manager()
    model = Net(width=3_000)
    run_until(12, manager, tmp_path / "a", model=model)
    flip_byte(shard_of(store, 10), 70_000)
    with pytest.raises(Corrupt):
        trainer(manager, tmp_path / "a", model=Net(width=3_000)).train(resume_from_checkpoint=10)
    job = trainer(manager, tmp_path / "a", model=Net(width=3_000))
    job.train(resume_from_checkpoint=True)
    assert "step 10 is damaged, trying step 5" in caplog.text
    manager.wait_until_finished()
    assert manager.all_steps() == [5, 10, 15, 20, 24]
    assert all(manager.verify(step).ok for step in manager.all_steps())
    assert len(straight.state.log_history) == len(job.state.log_history)


def test_where_two_are_damaged_the_third_is_resumed_from(open_manager, store, tmp_path):
    manager = open_manager()
    run_until(17, manager, tmp_path, model=Net(width=3_000))
    flip_byte(shard_of(store, 15), 70_000)
    shard = shard_of(store, 10)
    shard.write_bytes(shard.read_bytes()[:-1_000])
    job = trainer(manager, tmp_path, end_at(6), model=Net(width=3_000))
    with pytest.raises(EndedError):
        job.train(resume_from_checkpoint=True)
    assert job.state.global_step == 6


def test_noise_is_added_once_after_skipping_checkpoints(open_manager, store, tmp_path):
    class Noisy(Net):
        def __init__(self) -> None:
            super().__init__(width=3_000)
            self.embeddings = torch.nn.Embedding(2, 2)

        def get_input_embeddings(self):
            return self.embeddings

    manager, own = open_manager(), {"neftune_noise_alpha": 0.1}
    run_until(12, manager, tmp_path, model=Noisy(), **own)
    flip_byte(shard_of(store, 10), 70_000)
    hooks = []
    look = EachStep(lambda _, model: hooks.append(len(model.embeddings._forward_hooks)))
    model = Noisy()
    trainer(manager, tmp_path, look, model=model, **own).train(resume_from_checkpoint=True)
    assert hooks == [1] * 19
    assert not model.embeddings._forward_hooks


def test_a_training_from_the_beginning_overwrites_nothing(open_manager, tmp_path):
    manager = open_manager()
    run_until(12, manager, tmp_path / "a")
    job = trainer(manager, tmp_path / "a")
    with pytest.raises(StepConflict, match="already has checkpoints, up to step 10"):
        job.train()
    assert job.state.global_step == 0, "it is told before anything is trained"
    assert manager.all_steps() == [5, 10]


def test_a_step_may_be_saved_again(open_manager, tmp_path, straight):
    manager = open_manager()

    class AtEpochEnd(transformers.TrainerCallback):
        def on_epoch_end(self, _arguments, _state, control, **_others) -> None:
            control.should_save = True

    job = trainer(manager, tmp_path, AtEpochEnd(), save_steps=8)
    job.train()
    assert_equals_uninterrupted(job, straight)
    manager.wait_until_finished()
    assert manager.all_steps() == [8, 16, 24]


def test_a_training_restarted_with_smaller_batches_saves_again(open_manager, tmp_path):
    manager = open_manager()
    failed = []

    def fail_once(step, _model) -> None:
        if step == 7 and not failed:
            failed.append(step)
            raise RuntimeError("CUDA out of memory. (It is not, but is told so.)")

    job = trainer(manager, tmp_path, EachStep(fail_once), auto_find_batch_size=True)
    job.train()
    assert failed
    assert job.state.global_step > 24
    manager.wait_until_finished()
    assert manager.all_steps() == [*range(5, job.state.global_step, 5), job.state.global_step]


@pytest.mark.parametrize("given", [10, "10", np.int64(10), True, "True", np.bool_(True)])
def test_what_to_resume_from_may_come_from_a_command_line(open_manager, tmp_path, given):
    manager = open_manager()
    run_until(12, manager, tmp_path)
    job = trainer(manager, tmp_path, end_at(11))
    with pytest.raises(EndedError):
        job.train(resume_from_checkpoint=given)
    assert manager.last_load.step == 10


@pytest.mark.parametrize("given", [None, False, "False"])
def test_starting_over_may_come_from_a_command_line(open_manager, tmp_path, given):
    job = trainer(open_manager(), tmp_path, end_at(1))
    with pytest.raises(EndedError):
        job.train(resume_from_checkpoint=given)


def test_tensors_on_no_gpu_may_be_saved_with_overlap(open_manager, tmp_path, straight):
    manager = open_manager(consistency="overlap")
    run_until(12, manager, tmp_path)
    job = trainer(manager, tmp_path)
    job.train(resume_from_checkpoint=True)
    assert_equals_uninterrupted(job, straight)


def test_missing_and_foreign_checkpoints_are_not_resumed_from(open_manager, tmp_path):
    manager = open_manager()
    with pytest.raises(CheckpointNotFound):
        trainer(manager, tmp_path).train(resume_from_checkpoint=True)
    manager.save({"model": Net()}, step=1)
    with pytest.raises(InvalidArgument, match="it was not saved by a Trainer"):
        trainer(manager, tmp_path).train(resume_from_checkpoint=True)
    with pytest.raises(CheckpointNotFound):
        trainer(manager, tmp_path).train(resume_from_checkpoint=7)


def test_the_best_model_is_loaded_at_the_end(open_manager, tmp_path):
    # It gets better, then worse.
    arguments = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
    arguments |= {"learning_rate": 0.02, "lr_scheduler_type": "constant"}
    manager = open_manager(keep_last_n=1, keep_best_n=1, best_metric="eval_loss")
    seen = {}

    def spoil(step, model):
        if step == 10:
            seen.update(copy.deepcopy(model.state_dict()))
        if step > 10:
            with torch.no_grad():
                model.last.weight.mul_(2)

    job = trainer(manager, tmp_path / "a", EachStep(spoil), **arguments)
    job.train()
    assert job.state.best_global_step == manager.best_step() == 10
    assert_same(dict(job.model.state_dict()), seen)
    assert manager.metadata(10)["eval_loss"] == job.state.best_metric

    again = trainer(manager, tmp_path / "a", **arguments)  # nothing is left to train
    again.train(resume_from_checkpoint=True)
    assert_same(dict(again.model.state_dict()), seen)


BEST = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}


def test_of_equal_models_the_one_that_was_kept_is_loaded(open_manager, tmp_path):
    manager = open_manager(keep_last_n=1, keep_best_n=1, best_metric="eval_loss")
    job = trainer(manager, tmp_path, **BEST, learning_rate=0.0)
    job.train()
    assert job.state.best_global_step == 5
    assert manager.last_load.step == 24


def test_the_best_model_is_one_that_was_saved(open_manager, tmp_path):
    manager = open_manager(keep_last_n=1, keep_best_n=1, best_metric="eval_score", best_mode="max")
    scores = iter([1.0, 2.0, 3.0, 0.0, 0.0])  # after 5, 10, 15, 20 and 24 steps
    job = trainer(
        manager,
        tmp_path,
        own={"compute_metrics": lambda _: {"score": next(scores)}},
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=True,
        save_steps=10,
    )
    job.train()
    assert job.state.best_global_step == 15
    assert manager.last_load.step == 10


def test_a_manager_that_may_lose_the_best_model_is_refused(open_manager, tmp_path):
    for kept in (
        {},
        {"keep_best_n": 1, "best_metric": "eval_loss", "best_mode": "max"},
        {"keep_best_n": 1, "best_metric": "loss"},
    ):
        manager = open_manager(tmp_path / str(len(kept)), keep_last_n=1, **kept)
        with pytest.raises(InvalidArgument, match="may be removed before the end") as raised:
            trainer(manager, tmp_path, **BEST)
        assert 'best_metric="eval_loss", best_mode="min"' in raised.value.hint


def test_an_invalid_manager_is_refused(open_manager, manager, tmp_path):
    manager.save({}, step=1)
    for other, why in (("runs/a", "`str`"), (open_manager(read_only=True), "read-only")):
        with pytest.raises(InvalidArgument, match=why):
            trainer(other, tmp_path)


def test_tied_parameters_that_are_frozen_are_left_out_under_all_their_names(open_manager, tmp_path):
    manager = open_manager()
    model = Net()
    model.first[0].requires_grad_(requires_grad=False)
    model.again = model.first[0]
    run_until(7, manager, tmp_path, model=model, own={"trainable_only": True})
    assert list(manager.load(5)["model"]) == ["last.weight", "last.bias"]


def test_frozen_parameters_can_be_left_out(open_manager, tmp_path):
    manager = open_manager()

    def frozen() -> Net:
        model = Net()
        model.first.requires_grad_(requires_grad=False)
        return model

    own = {"trainable_only": True}
    run_until(12, manager, tmp_path, model=frozen(), own=own)
    assert list(manager.load(10)["model"]) == ["last.weight", "last.bias"]
    with pytest.raises(InvalidArgument, match="model") as raised:
        trainer(manager, tmp_path, model=frozen()).train(resume_from_checkpoint=True)
    assert "`trainable_only` as when it was saved" in raised.value.hint
    job = trainer(manager, tmp_path, model=frozen(), own=own)
    job.train(resume_from_checkpoint=True)
    straight = trainer(
        None, tmp_path, model=frozen(), kind=transformers.Trainer, save_strategy="no"
    )
    straight.train()
    assert_equals_uninterrupted(job, straight)


def test_a_checkpoint_of_transformers_is_resumed_from(open_manager, tmp_path, straight):
    own = trainer(None, tmp_path / "own", end_at(12), kind=transformers.Trainer)
    with pytest.raises(EndedError):
        own.train()
    manager = open_manager()
    job = trainer(manager, tmp_path / "a")
    job.train(resume_from_checkpoint=str(tmp_path / "own" / "checkpoint-10"))
    assert_equals_uninterrupted(job, straight)
    manager.wait_until_finished()
    assert manager.all_steps() == [15, 20, 24]


def test_arguments_that_the_manager_replaces_are_refused(open_manager, tmp_path):
    manager = open_manager()
    for arguments, hint in (
        ({"save_total_limit": 2}, "keep_last_n"),
        ({"save_only_model": True}, "leave it out"),
        ({"push_to_hub": True, "hub_strategy": "checkpoint"}, "end"),
    ):
        with pytest.raises(InvalidArgument, match=f"{list(arguments)[-1]}=") as raised:
            trainer(manager, tmp_path, **arguments)
        assert hint in raised.value.hint


def test_an_unknown_trainer_is_refused(manager):
    class Other:
        """Lacks what the adapter depends on."""

    class Stored(StoredCheckpoints, Other):
        """Not supported."""

    with pytest.raises(UnsupportedFormat, match="_load_best_model"):
        Stored(manager=manager)


KILLED = (
    JOB
    + """
import os, signal, sys
from dtruntime import CheckpointManager

class Kill(TrainerCallback):
    def on_save(self, args, state, control, **kwargs):
        if state.global_step == 10:
            os.kill(os.getpid(), signal.SIGKILL)  # while it is written

with CheckpointManager(sys.argv[1]) as manager:
    job = trainer(manager, sys.argv[2], Kill(), model=Net(width=500_000), eval_strategy="no")
    job.train()
"""
)


def test_a_kill_during_a_save_leaves_a_complete_checkpoint(store, open_manager, tmp_path):
    killed = run_script(KILLED, store, tmp_path, timeout=240)
    assert killed.returncode == -9, killed.stderr
    manager = open_manager()
    assert manager.latest_step() in {5, 10}
    job = trainer(manager, tmp_path, end_at(11), model=Net(width=500_000), eval_strategy="no")
    with pytest.raises(EndedError):
        job.train(resume_from_checkpoint=True)
    assert manager.last_load.step in {5, 10}


RANKS = (
    JOB
    + """
import os, sys
from pathlib import Path
from dtruntime import CheckpointManager

def run(store, resume, *callbacks):
    shared = ["model.*", "optimizer.*", "scheduler.*"]
    with CheckpointManager(store, replicated=shared) as manager:
        job = trainer(manager, store / "own", *callbacks)
        try:
            job.train(resume_from_checkpoint=resume)
        except EndedError:
            manager.wait_until_finished()
        return job

store = Path(sys.argv[1])
straight = run(store / "a", None)
run(store / "b", None, end_at(7))
resumed = run(store / "b", True)
assert resumed.state.global_step == 12
for name, value in straight.model.state_dict().items():
    assert torch.equal(value, resumed.model.state_dict()[name]), name
print("same")
"""
)


def test_ranks_resume_together_and_one_resumes_alone(tmp_path, open_manager, caplog):
    script = tmp_path / "script.py"
    script.write_text(RANKS)
    ended = torchrun("--nproc-per-node", 2, script, tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("same") == 2
    manager = open_manager(tmp_path / "b")
    job = trainer(manager, tmp_path, per_device_train_batch_size=16)
    job.train(resume_from_checkpoint=5)
    assert job.state.global_step == 12
    assert "random number generators are not restored" in caplog.text


DAMAGED = (
    RANKS[: RANKS.index("store = Path")].replace("replicated=shared", "replicated=()")
    + """
store = Path(sys.argv[1])
run(store, None, end_at(12))
if os.environ["RANK"] == "1":
    (shard,) = store.glob("step-000000000010/rank-00001.*.shard")
    damaged = bytearray(shard.read_bytes())
    damaged[5_000] ^= 1
    shard.write_bytes(damaged)
torch.distributed.barrier()
print("from", run(store, True, end_at(6)).state.global_step)
"""
)


def test_ranks_fall_back_together_if_one_finds_damage(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(DAMAGED)
    ended = torchrun("--nproc-per-node", 2, script, tmp_path / "store")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("from 6") == 2
