"""Damaged checkpoints: detecting them, and falling back to older ones."""

from __future__ import annotations

import logging
import os

import numpy as np
import pytest
import torch
from support import assert_same, flip_byte, shard_of, state_of

from dtruntime import Corrupt

DAMAGE = {
    "a shard is cut": lambda store: os.truncate(shard_of(store, 10), 5000),
    "a shard is gone": lambda store: shard_of(store, 10).unlink(),
    "the manifest is changed": lambda store: flip_byte(manifest_of(store), 60),
}


def manifest_of(store):
    [manifest] = store.glob("step-*/manifest.json")
    return manifest


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_store_with_only_damaged_checkpoints_is_not_empty(damage, open_manager, store):
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
    # Starting over on purpose is allowed.
    manager.save(state_of(20), step=20)
    assert manager.latest_step() == 20


def test_loading_falls_back_and_reports_it(manager, store, caplog):
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


def test_verification_names_what_is_damaged(open_manager, store):
    manager = open_manager(compression="none")  # chunks are stored in their order
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


def test_verification_can_be_disabled(open_manager, store):
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


def test_several_loads_read_the_same_checkpoint(open_manager, store, caplog):
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
