"""Saves that fail in the background: when the error is raised, and what exists afterwards."""

from __future__ import annotations

import errno

import pytest
import torch
from support import short_files, state_of

import dtruntime
from dtruntime import CheckpointManager, Closed, StorageError


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


def test_a_failed_rewind_changes_nothing(open_manager):
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
