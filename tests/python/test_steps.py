"""Which steps are kept, are the best, conflict with a save, and are due."""

from __future__ import annotations

import pytest
from support import flip_byte, shard_of, state_of

from dtruntime import CheckpointNotFound, InvalidArgument, StepConflict


def test_retention(open_manager):
    manager = open_manager(keep_last_n=2, keep_every=10)
    for step in range(5, 45, 5):
        manager.save(state_of(step), step=step)
    assert manager.all_steps() == [10, 20, 30, 35, 40]


def test_retention_spares_the_step_restored_from(open_manager):
    with open_manager() as first:
        first.save(state_of(1), step=1)
    manager = open_manager(keep_last_n=1)
    manager.load()
    manager.save(state_of(2), step=2)
    manager.save(state_of(3), step=3)
    assert manager.all_steps() == [1, 3]


def test_retention_keeps_the_best(open_manager, caplog):
    manager = open_manager(keep_last_n=1, keep_best_n=2, best_metric="top1", best_mode="max")
    for step, top1 in enumerate([0.1, 0.7, 0.3, 0.7, 0.2]):
        manager.save(state_of(step), step=step, metadata={"top1": top1, "epoch": step})
    assert manager.all_steps() == [1, 3, 4]
    assert manager.best_step() == 3, "of equal ones, the newer"
    assert manager.best_step("epoch") == 4
    assert manager.best_step("epoch", "min") == 1
    assert manager.metadata(1) == {"top1": 0.7, "epoch": 1}
    with pytest.raises(CheckpointNotFound, match="no checkpoint of this step"):
        manager.metadata(0)
    with pytest.raises(CheckpointNotFound, match="none of 3 has a number `loss`"):
        manager.best_step("loss")
    assert not caplog.records
    for step, metadata in enumerate([None, {"top1": True}, {"top1": "0.9"}], start=5):
        manager.save(state_of(step), step=step, metadata=metadata)
    assert manager.all_steps() == [1, 3, 7]
    assert len(caplog.records) == 1, "logged once"
    assert "step 5 is never among the best" in caplog.text
    assert "has no number `top1`" in caplog.text
    reader = open_manager(read_only=True)
    assert reader.best_step("top1", "max") == 3
    with pytest.raises(InvalidArgument, match="a str is expected"):
        reader.best_step()


def test_a_metric_that_is_not_a_number_does_not_end_training(open_manager, caplog):
    manager = open_manager(keep_last_n=9, keep_best_n=1, best_metric="loss")
    for step, loss in enumerate([2.0, float("nan"), float("-inf"), 1.0]):
        manager.save(state_of(step), step=step, metadata={"loss": loss, "all": [[loss], {"x": 1}]})
    assert manager.best_step() == 3
    assert manager.metadata(1) == {"loss": "nan", "all": [["nan"], {"x": 1}]}
    assert manager.metadata(2)["loss"] == "-inf"
    assert "step 1 is never among the best" in caplog.text
    with pytest.raises(InvalidArgument, match="it is stored as JSON"):
        manager.save(state_of(9), step=9, metadata={"loss": float("nan"), "set": {1}})


def test_a_damaged_checkpoint_is_not_the_best_and_is_logged(manager, store, caplog):
    for step, loss in ((1, 3.0), (2, 2.0), (3, 1.0)):
        manager.save(state_of(step), step=step, metadata={"loss": loss})
    (store / "step-000000000003" / "manifest.json").write_text("{}")
    assert manager.best_step("loss", "min") == 2
    assert "left out of the search for the best, since damaged: step 3" in caplog.text


def test_nothing_is_best_in_an_empty_store(manager):
    with pytest.raises(CheckpointNotFound, match="there is none"):
        manager.best_step("loss")


def test_steps_only_grow_unless_rewound(manager):
    for step in (10, 20, 30):
        manager.save(state_of(step), step=step)
    for step in (30, 15):
        with pytest.raises(StepConflict, match="step 30 is committed"):
            manager.save_async(state_of(step), step=step)
    manager.save({"again": 1}, step=20, rewind=True)
    assert manager.all_steps() == [10, 20]
    assert manager.load() == {"again": 1}
    manager.save(state_of(21), step=21)
    assert manager.all_steps() == [10, 20, 21]


def test_should_save(open_manager):
    manager = open_manager(save_interval_steps=5)
    assert [step for step in range(12) if manager.should_save(step)] == [0, 5, 10]
    manager.save_async(state_of(5), step=5)
    assert [step for step in range(12) if manager.should_save(step)] == [10]
    assert not open_manager(read_only=True).should_save(10)


def test_going_back_to_a_step_is_due_again_after_it(open_manager, caplog):
    manager = open_manager(save_interval_steps=10)
    for step in (10, 20, 30):
        manager.save(state_of(step), step=step)
    live = state_of(0)
    manager.restore(live)
    assert not caplog.messages
    assert not manager.should_save(30)
    manager.restore(live, step=10)
    assert "step 10 is restored, and later ones exist (20, 30): " in caplog.text
    assert [step for step in range(41) if manager.should_save(step)] == [20, 30, 40]
    with pytest.raises(StepConflict, match="step 30 is committed"):
        manager.save_async(live, step=20)
    manager.save_async(live, step=20, rewind=True)
    assert [step for step in range(41) if manager.should_save(step)] == [30, 40]
    manager.save(live, step=30)
    assert [step for step in range(41) if manager.should_save(step)] == [40]
    # Restoring the newest: nothing is newer.
    caplog.clear()
    manager.restore(live, step=30)
    assert not caplog.messages
    assert not manager.should_save(30)


def test_damaged_steps_are_due_again_after_a_rewind(manager, store):
    live = state_of(0)
    for step, rewinds in ((10, False), (20, False), (10, True), (20, False)):
        manager.save(state_of(step), step=step, rewind=rewinds)
    assert not manager.should_save(20)
    flip_byte(shard_of(store, 20), 5000)
    manager.load()
    assert manager.should_save(20)
    assert not manager.should_save(10)
    manager.restore(live)
    manager.save(live, step=20)
    assert manager.verify(20).ok


def test_training_from_an_older_step_replaces_damaged_ones(open_manager, store, caplog):
    manager = open_manager(save_interval_steps=10)
    for step in (10, 20, 30, 40):
        manager.save(state_of(step), step=step)
    manager.close()
    for step in (30, 40):
        flip_byte(shard_of(store, step), 5000)
    manager = open_manager(save_interval_steps=10)
    assert manager.should_save(40) is False
    assert manager.load()["step"] == 20
    assert [step for step in range(10, 60) if manager.should_save(step)] == [30, 40, 50]
    caplog.clear()
    for step in (25, 30, 40):
        manager.save(state_of(step), step=step)
    replaced = [text for text in caplog.messages if "did not verify" in text]
    assert replaced == ["saving step 25 replaces step 30, 40, which did not verify"]
    assert manager.all_steps() == [10, 20, 25, 30, 40]
    assert not manager.should_save(40)
    assert manager.verify(30).ok
    assert manager.load()["step"] == 40
    with pytest.raises(StepConflict):
        manager.save(state_of(40), step=40)


def test_a_fallback_does_not_replace_what_verifies(open_manager, store):
    manager = open_manager()
    for step in (10, 20, 30):
        manager.save(state_of(step), step=step)
    flip_byte(shard_of(store, 30), 5000)
    assert manager.load()["step"] == 20
    for step in (10, 20):
        with pytest.raises(StepConflict):
            manager.save(state_of(step), step=step)
    manager.save(state_of(30), step=30, rewind=True)
    with pytest.raises(StepConflict):  # it is another attempt now, and sound
        manager.save(state_of(25), step=25)
    for shard in (store / "step-000000000030").glob("*.shard"):  # the replaced one is still there
        flip_byte(shard, 5000)
    assert manager.load(step=20)["step"] == 20
    with pytest.raises(StepConflict):  # not fallen back to: step 20 was requested
        manager.save(state_of(25), step=25)
