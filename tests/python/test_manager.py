"""The manager's methods: saving, listing, loading a part, closing, and refusing."""

from __future__ import annotations

import asyncio
import builtins
import contextlib
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from support import assert_same, run_script, shard_of, state_of

import dtruntime
from dtruntime import CheckpointManager, CheckpointNotFound, Closed, InvalidArgument, StoreBusy


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


def test_brackets_in_keys_are_themselves(manager):
    state = {"w[0]": 1, "w0": 2, "w.x": 3, "list": [4, 5]}
    manager.save(state, step=1)
    assert manager.load(keys="w[0]") == {"w[0]": 1}
    assert manager.load(keys="w?") == {"w0": 2}
    assert manager.load(keys="*[*") == {"w[0]": 1}
    assert manager.load(keys="list.1") == {"list": [None, 5]}


def test_prewarm(manager):
    state = state_of(1)
    manager.prewarm(state)
    manager.save(state, step=1)
    assert manager.save_async(state, step=2).result().stats.staging_bytes >= 120_000


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


def test_async_with(open_manager):
    async def main() -> CheckpointManager:
        async with open_manager() as manager:
            manager.save_async({"x": 1}, step=1)
        return manager

    manager = asyncio.run(main())
    with pytest.raises(Closed):
        manager.latest_step()
    assert open_manager().load() == {"x": 1}
