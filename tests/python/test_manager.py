"""The manager's verbs: committing, keeping, falling back, verifying, and refusing."""

from __future__ import annotations

import asyncio
import builtins
import contextlib
import errno
import logging
import os
import resource
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from support import assert_same, flip_byte, run_script, shard_of

import dtruntime
from dtruntime import (
    CheckpointManager,
    CheckpointNotFound,
    Closed,
    Corrupt,
    InvalidArgument,
    StepConflict,
    StorageError,
    StoreBusy,
)


def state_of(step: int) -> dict[str, object]:
    return {"weights": torch.full((30_000,), float(step)), "step": step}


def test_verbs_on_an_empty_store(manager):
    assert manager.latest_step() is None
    assert manager.all_steps() == []
    assert manager.wait_until_finished()
    with pytest.raises(CheckpointNotFound, match="there is none"):
        manager.load()
    with pytest.raises(CheckpointNotFound):
        manager.verify()
    with pytest.raises(LookupError):
        manager.delete(3)


def test_saving_listing_and_deleting(manager, store):
    info = manager.save(
        state_of(10), step=10, metadata={"loss": 0.5}, dataset_positions={"train": {"epoch": 1}}
    )
    assert (info.step, info.removed_steps) == (10, ())
    assert info.raw_bytes == 120_000
    assert info.stored_bytes == shard_of(store, 10).stat().st_size
    assert len(info.attempt) == 32
    manager.save(state_of(20), step=np.int64(20))
    assert manager.all_steps() == [10, 20]
    assert_same(manager.load(step=10), state_of(10))
    assert manager.last_load.metadata == {"loss": 0.5}
    assert manager.last_load.dataset_positions == {"train": {"epoch": 1}}
    report = manager.verify(step=20)
    assert report.ok
    assert (report.step, report.shards, report.chunks) == (20, 1, 2)
    assert manager.delete(10) > 0
    assert manager.all_steps() == [20]
    with pytest.raises(CheckpointNotFound, match="opening step 10"):
        manager.load(step=10)


def test_what_changes_right_after_save_async_is_not_saved(manager):
    weights, array = torch.ones(3_000_000), np.ones(1_000_000)
    counters = {"seen": [1]}
    handle = manager.save_async({"w": weights, "a": array, "c": counters}, step=1)
    weights.zero_()
    array[:] = 0
    counters["seen"].append(2)
    handle.result()
    loaded = manager.load()
    assert torch.equal(loaded["w"], torch.ones(3_000_000))
    assert np.array_equal(loaded["a"], np.ones(1_000_000))
    assert loaded["c"] == {"seen": [1]}


def test_documented_ways_to_call(store, open_manager, monkeypatch, tmp_path):
    manager = open_manager(storage_path=None)
    manager.save_async(step=1, state={"a": 1}).result()
    manager.close()
    assert CheckpointManager(storage_path=store, backend="local", read_only=True).latest_step() == 1
    monkeypatch.setenv("CHECKPOINT_DIR", str(tmp_path / "from environment"))
    with CheckpointManager() as other:
        other.save({"b": 2}, 7)
        assert "from environment" in repr(other)
    assert (tmp_path / "from environment").is_dir()


def test_saving_synchronously(open_manager):
    manager = open_manager(async_write=False)
    assert manager.save_async({"a": 1}, step=1).done()


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


def test_a_metric_that_is_no_number_ends_no_training(open_manager, caplog):
    manager = open_manager(keep_last_n=9, keep_best_n=1, best_metric="loss")
    for step, loss in enumerate([2.0, float("nan"), float("-inf"), 1.0]):
        manager.save(state_of(step), step=step, metadata={"loss": loss, "all": [[loss], {"x": 1}]})
    assert manager.best_step() == 3
    assert manager.metadata(1) == {"loss": "nan", "all": [["nan"], {"x": 1}]}
    assert manager.metadata(2)["loss"] == "-inf"
    assert "step 1 is never among the best" in caplog.text
    with pytest.raises(InvalidArgument, match="it is stored as JSON"):
        manager.save(state_of(9), step=9, metadata={"loss": float("nan"), "set": {1}})


def test_what_is_damaged_is_not_the_best_and_that_is_said(manager, store, caplog):
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


def test_brackets_in_keys_are_themselves(manager):
    state = {"w[0]": 1, "w0": 2, "w.x": 3, "list": [4, 5]}
    manager.save(state, step=1)
    assert manager.load(keys="w[0]") == {"w[0]": 1}
    assert manager.load(keys="w?") == {"w0": 2}
    assert manager.load(keys="*[*") == {"w[0]": 1}
    assert manager.load(keys="list.1") == {"list": [None, 5]}


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
    # To the newest: nothing is newer.
    caplog.clear()
    manager.restore(live, step=30)
    assert not caplog.messages
    assert not manager.should_save(30)


def test_what_was_fallen_back_from_is_due_though_training_went_back_before(manager, store):
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


def test_a_rewind_that_failed_went_back_nowhere(open_manager):
    manager = open_manager(compression="zstd")
    for step in (10, 20):
        manager.save({"weights": torch.zeros(2_000_000)}, step=step)
    with short_files():
        handle = manager.save_async({"weights": torch.randn(2_000_000)}, step=5, rewind=True)
        assert manager.should_save(10) or handle.done(), "later steps are about to go"
        handle._native.wait()
    assert [step for step in (6, 10, 20, 30) if manager.should_save(step)] == [30]
    with pytest.raises(StorageError, match="ulimit -f"):
        handle.result()
    assert manager.all_steps() == [10, 20]


DAMAGE = {
    "a shard is cut": lambda store: os.truncate(shard_of(store, 10), 5000),
    "a shard is gone": lambda store: shard_of(store, 10).unlink(),
    "the manifest is changed": lambda store: flip_byte(manifest_of(store), 60),
}


def manifest_of(store):
    [manifest] = store.glob("step-*/manifest.json")
    return manifest


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_store_of_which_all_is_damaged_is_not_an_empty_one(damage, open_manager, store):
    manager = open_manager()
    manager.save(state_of(10), step=10)
    manager.close()
    DAMAGE[damage](store)
    manager = open_manager()
    for act in (
        manager.latest_step,
        manager.load,
        lambda: manager.restore(state_of(0)),
        lambda: manager.best_step("loss"),
    ):
        with pytest.raises(Corrupt, match="all 1 are damaged; step 10: "):
            act()
    with pytest.raises(Corrupt):
        manager.load(step=10)
    assert not manager.verify().ok
    # What begins anew on purpose may.
    manager.save(state_of(20), step=20)
    assert manager.latest_step() == 20


def test_prewarm(manager):
    state = state_of(1)
    manager.prewarm(state)
    manager.save(state, step=1)
    assert manager.save_async(state, step=2).result().stats.staging_bytes >= 120_000


def test_loading_falls_back_and_says_so(manager, store, caplog):
    for step in (1, 2, 3):
        manager.save(state_of(step), step=step)
    flip_byte(shard_of(store, 3), 5000)
    (store / "step-000000000002" / "manifest.json").write_text("{}")
    with caplog.at_level(logging.WARNING, logger="dtruntime"):
        assert_same(manager.load(), state_of(1))
    assert "fell back to step 1 from 2, 3" in caplog.text
    (third, why_third), (second, _) = manager.last_load.fell_back_from
    assert (third, second) == (3, 2)
    assert "crc32c" in why_third or "checksum" in why_third
    with pytest.raises(Corrupt) as caught:
        manager.load(step=3)
    assert "rank-00000" in str(caught.value)
    live = {"weights": torch.zeros(30_000), "step": 0}
    report = manager.restore(live)
    assert report.step == 1
    assert [step for step, _ in report.fell_back_from] == [3, 2]
    assert_same(live, state_of(1))


def test_every_checkpoint_damaged(manager, store):
    manager.save(state_of(1), step=1)
    flip_byte(shard_of(store, 1), 5000)
    with pytest.raises(Corrupt, match="all 1 are damaged; step 1: "):
        manager.load()


def test_verification_names_what_is_hit(open_manager, store):
    manager = open_manager(compression="none")  # chunks lie in their order
    manager.save({"a": torch.randn(40_000), "b": {"c": torch.randn(40_000)}}, step=1)
    shard = shard_of(store, 1)
    flip_byte(shard, 4096 + 10)
    report = manager.verify(step=1)
    assert not report.ok
    (damage,) = report.damage
    assert damage.shard.endswith(shard.name)
    assert damage.chunk == 0
    assert set(damage.tensors) <= {"a", "b.c"}
    assert damage.tensors


def test_damage_may_be_let_through_on_request(open_manager, store):
    open_manager(compression="none").save({"a": torch.zeros(40_000)}, step=1)
    flip_byte(shard_of(store, 1), 4096)
    reader = open_manager(read_only=True, verify_on_load=False)
    assert int((reader.load()["a"].view(torch.uint8) != 0).sum()) == 1


def test_any_flipped_byte_is_noticed(manager, store):
    state = {"a": torch.arange(20_000.0), "list": [1, "two"]}
    manager.save(state, step=1)
    shard = shard_of(store, 1)
    for offset in np.linspace(0, shard.stat().st_size - 1, 40).astype(int):
        flip_byte(shard, int(offset))
        assert not manager.verify().ok, f"offset {offset}"
        flip_byte(shard, int(offset))
    assert manager.verify().ok


def test_loading_a_part(manager):
    model = torch.nn.Sequential(torch.nn.Linear(200, 300), torch.nn.Linear(300, 10))
    optimizer = torch.optim.AdamW(model.parameters())
    state = {
        "model": model,
        "optimizer": optimizer,
        "history": [torch.ones(3), torch.zeros(2)],
        "epoch": 3,
    }
    manager.save(state, step=1)
    expected = model.state_dict()
    part = manager.load(keys=["model.0.*"])
    assert list(part) == ["model"]
    assert list(part["model"]) == ["0.weight", "0.bias"]
    assert part["model"]._metadata == expected._metadata
    assert torch.equal(part["model"]["0.weight"], expected["0.weight"])
    assert_same(manager.load(keys="model"), {"model": expected}), "a container stands for all in it"
    assert_same(
        manager.load(keys=["history.1", "epoch"]), {"history": [None, torch.zeros(2)], "epoch": 3}
    )
    with pytest.raises(InvalidArgument, match="nothing matches 'modle"):
        manager.load(keys=["modle.*"])
    assert manager.load(keys=["modle.*"], strict=False) == {}
    for wrong in (1, [b"model"], "", [""]):
        with pytest.raises(InvalidArgument, match="a glob is a non-empty string"):
            manager.load(keys=wrong)


def test_one_slice_of_a_storage_is_read_alone(manager):
    base = torch.randn(1_000_000)
    manager.save({"whole": base, "part": base[500_000:500_010]}, step=1)
    part = manager.load(keys=["part"])["part"]
    assert torch.equal(part, base[500_000:500_010])
    assert part.untyped_storage().nbytes() <= 192


def test_second_writer_is_refused(manager, store, open_manager):
    with pytest.raises(StoreBusy):
        open_manager()
    other = run_script(
        "import sys, dtruntime\n"
        "try: dtruntime.CheckpointManager(sys.argv[1])\n"
        "except dtruntime.StoreBusy as error: print(error)",
        store,
    )
    assert "hint: " in other.stdout, other.stderr
    manager.close()
    open_manager().save(state_of(1), step=1)


def test_evaluator_opens_in_the_middle_of_a_save(open_manager, store):
    writer = open_manager()
    writer.save(state_of(1), step=1)
    before = {path: path.read_bytes() for path in store.rglob("*") if path.is_file()}
    handle = writer.save_async({"weights": torch.randn(8_000_000)}, step=2)
    evaluator = open_manager(read_only=True)
    assert evaluator.latest_step() in (1, 2)
    assert_same(evaluator.load(step=1), state_of(1))
    with pytest.raises(InvalidArgument, match="read-only"):
        evaluator.save_async({}, step=5)
    with pytest.raises(InvalidArgument, match="read-only"):
        evaluator.delete(1)
    evaluator.close()
    handle.result()
    assert all(path.read_bytes() == data for path, data in before.items() if "step-" in str(path))
    assert open_manager(read_only=True).latest_step() == 2


def test_readers_keep_up_with_a_writer_that_deletes(open_manager):
    writer = open_manager(keep_last_n=1)
    writer.save(state_of(1), step=1)
    reader = open_manager(read_only=True)
    errors, stop = [], threading.Event()

    def read() -> None:
        while not stop.is_set():
            try:
                state = reader.load()
                assert torch.all(state["weights"] == state["step"])
            except BaseException as error:  # noqa: BLE001
                errors.append(error)
                return

    thread = threading.Thread(target=read)
    thread.start()
    for step in range(2, 30):
        writer.save(state_of(step), step=step)
    stop.set()
    thread.join()
    assert not errors, errors[0]


@contextlib.contextmanager
def short_files():
    """Let no file grow beyond 4 MiB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4 << 20, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def save_one_that_fails(manager, step: int = 2) -> dtruntime.SaveHandle:
    """Start a save whose snapshot succeeds and whose file then grows beyond what is allowed."""
    manager.save({"weights": torch.zeros(2_000_000)}, step=1)  # so that little room is reserved
    with short_files():
        handle = manager.save_async({"weights": torch.randn(2_000_000)}, step=step)
        handle._native.wait()  # does not count as looking at the outcome
    return handle


def test_unseen_error_surfaces_once(open_manager, store):
    manager = open_manager(compression="zstd")
    handle = save_one_that_fails(manager)
    with pytest.raises(StorageError) as caught:
        manager.wait_until_finished()
    assert caught.value.errno == errno.EFBIG
    assert manager.wait_until_finished()
    assert isinstance(handle.exception(), StorageError)
    assert manager.all_steps() == [1]
    assert not list((store / "step-000000000002").glob("*.shard")), "the attempt's file is gone"


def test_unseen_error_is_raised_by_the_next_save(open_manager):
    manager = open_manager(compression="zstd")
    save_one_that_fails(manager)
    with pytest.raises(StorageError):
        manager.save_async(state_of(3), step=3)
    manager.save(state_of(3), step=3)
    assert manager.all_steps() == [1, 3]


def test_a_step_whose_save_failed_is_due_again(open_manager):
    manager = open_manager(compression="zstd", save_interval_steps=1)
    handle = save_one_that_fails(manager)
    assert not manager.should_save(1)
    assert manager.should_save(2)
    assert isinstance(handle.exception(), StorageError)
    manager.save(state_of(2), step=2)
    assert not manager.should_save(2)


def test_unseen_error_is_raised_by_close(open_manager):
    manager = open_manager(compression="zstd")
    save_one_that_fails(manager)
    with pytest.raises(StorageError):
        manager.close()
    manager.close()
    with pytest.raises(Closed):
        manager.save_async(state_of(3), step=3)


def test_seen_error_is_not_raised_again(open_manager):
    manager = open_manager(compression="zstd")
    handle = save_one_that_fails(manager)
    with pytest.raises(StorageError):
        handle.result()
    assert handle.done()
    manager.close()


def test_unseen_error_of_a_dropped_manager_is_logged(store, caplog):
    manager = CheckpointManager(store, compression="zstd", chunk_bytes="64KiB")
    save_one_that_fails(manager)
    watcher = manager._opened.watcher
    del manager
    assert watcher.stop(30)
    assert "its error was not retrieved" in caplog.text


def test_context_manager_does_not_mask_the_block_s_exception(store, caplog):
    with (
        pytest.raises(ZeroDivisionError),
        CheckpointManager(store, compression="zstd", chunk_bytes="64KiB") as manager,
    ):
        save_one_that_fails(manager)
        _ = 1 / 0
    assert "closing" in caplog.text
    assert "closed" in repr(manager)


def test_closing_ends_everything(open_manager):
    manager = open_manager()
    manager.close()
    manager.close()
    for verb in (manager.latest_step, manager.load, manager.verify, manager.wait_until_finished):
        with pytest.raises(Closed, match="closed"):
            verb()


def threads() -> int:
    """Count the process's own threads: the kernel starts and ends some for its rings."""
    names = []
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
            names.append((task / "comm").read_text())
    return sum(not name.startswith("iou-") for name in names)


def test_threads_and_descriptors_stay_flat(manager):
    def count() -> tuple[int, int]:
        return len(list(Path("/proc/self/fd").iterdir())), threads()

    manager.save(state_of(1), step=1)
    manager.load()
    before = count()
    for step in range(2, 32):
        manager.save(state_of(step), step=step)
        manager.load()
    assert count() == before


def test_dropped_managers_leave_nothing(store):
    before = threads()
    handles = []
    for step in range(1, 6):
        manager = CheckpointManager(store.with_name(f"store{step}"))
        handles.append(manager.save_async(state_of(step), step=step))
        del manager
    for handle in handles:
        assert handle.result().step
    del handles, handle
    for _ in range(200):
        if threads() == before:
            break
        threading.Event().wait(0.05)
    assert threads() == before


def test_no_pickle_anywhere(manager):
    events = []

    def hook(event: str, _arguments: object) -> None:
        if event in ("pickle.find_class", "marshal.loads", "exec", "compile"):
            events.append(event)

    manager.save({"warm": torch.ones(2)}, step=1)
    manager.load()
    sys.addaudithook(lambda event, arguments: hook(event, arguments) if armed else None)
    armed = True
    model = torch.nn.Linear(3, 3)
    manager.save({"model": model, "rng": torch.get_rng_state(), "array": np.arange(3)}, step=2)
    manager.load()
    manager.restore({"model": model})
    armed = False
    assert "pickle.find_class" not in events


def test_training_goes_on_from_an_older_step_over_the_damaged_one(open_manager, store, caplog):
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


def test_a_fallback_lets_nothing_be_replaced_that_verifies(open_manager, store):
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
    with pytest.raises(StepConflict):  # nobody fell back: step 20 was asked for
        manager.save(state_of(25), step=25)


def test_progress_bar(open_manager, capsys):
    manager = open_manager(progress=True)
    manager.save(state_of(1), step=1)
    manager.close()
    error = capsys.readouterr().err
    assert "step 1 [##############################]" in error
    assert "100 %" in error


def test_every_class_is_exported_and_has_a_docstring():
    for name in dtruntime.__all__:
        assert getattr(dtruntime, name).__doc__, name
    assert issubclass(dtruntime.InvalidArgument, ValueError)
    assert issubclass(dtruntime.UnsupportedValue, TypeError)
    assert not issubclass(dtruntime.CheckpointError, builtins.OSError)


def test_what_is_read_in_several_calls_is_of_one_checkpoint(open_manager, store, caplog):
    def state_of(step: float) -> dict[str, torch.Tensor]:
        return {"model": torch.full((200_000,), step), "random": torch.full((200_000,), step)}

    with open_manager(compression="none", chunk_bytes=65536) as manager:
        for step in (1, 2):
            manager.save(state_of(step), step=step)
    flip_byte(shard_of(store, 2), 200_000)
    manager = open_manager(compression="none", chunk_bytes=65536)
    live = state_of(0)
    assert manager.restore(live).step == 1
    for key in live:
        assert manager.load(keys=key)[key][0] == 1
        assert manager.last_load.step == 1
        assert [step for step, _ in manager.last_load.fell_back_from] == [2]
    assert "fell back to step 1 from 2" in caplog.text
    assert manager.should_save(2)
    manager.save(state_of(2), step=2)
    assert manager.load(keys="random")["random"][0] == 2, "another attempt has taken its place"


def test_async_with(open_manager):
    async def main() -> CheckpointManager:
        async with open_manager() as manager:
            manager.save_async({"x": 1}, step=1)
        return manager

    manager = asyncio.run(main())
    with pytest.raises(Closed):
        manager.latest_step()
    assert open_manager().load() == {"x": 1}
