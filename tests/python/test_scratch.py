"""Restores that read into the staging arena: what is kept of it, and when it is not used."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import assert_same

from dtruntime import CheckpointManager, Corrupt
from dtruntime.loading import reader

ITEMS = 400_000


@pytest.fixture
def staged(monkeypatch) -> list[set[int]]:
    """Record the tensors of each read that were read into the arena."""
    noted: list[set[int]] = []
    tensors = reader.Reader.tensors

    def noting(self: reader.Reader, numbers: Any, *rest: Any) -> dict[int, Any]:
        scratch = rest[3]
        noted.append(set() if scratch is None else set(scratch.numbers))
        return tensors(self, numbers, *rest)

    monkeypatch.setattr(reader.Reader, "tensors", noting)
    return noted


def state_of(seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(300, 700), torch.nn.BatchNorm1d(700))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3 * seed)
    model(torch.randn(8, 300)).square().mean().backward()
    optimizer.step()
    shared = torch.randn(ITEMS)
    plain = {"a": shared, "b": shared[: ITEMS // 2], "t": torch.randn(40, 30).t(), "n": seed}
    return {"model": model, "optimizer": optimizer, "plain": plain}


def values_of(state: dict[str, Any]) -> dict[str, Any]:
    """Return all that is restored, without the objects around it."""
    return {
        "model": dict(state["model"].state_dict()),
        "optimizer": state["optimizer"].state_dict(),
        "plain": state["plain"],
    }


def has_whole_arena(manager: CheckpointManager) -> bool:
    """Return whether nothing views the arena: it is lent whole, or not at all."""
    return manager._opened.native.lend_staging(1) is not None


def test_a_restore_reads_into_the_arena_and_keeps_none_of_it(tmp_path, staged):
    saved = state_of(1)
    with CheckpointManager(tmp_path) as manager:
        manager.save(saved, step=1)
    live = state_of(2)
    with CheckpointManager(tmp_path) as manager:
        assert not has_whole_arena(manager), "there is none before it is needed"
        manager.restore(live)
        assert_same(values_of(live), values_of(saved))
        [numbers] = staged
        # Parameters, buffers, and "a" with "b" in it; not what an optimizer keeps, nor what lies
        # otherwise.
        assert len(numbers) == len(saved["model"].state_dict()) + 2
        assert has_whole_arena(manager)
        # The next save does not change what was restored, nor the other way round.
        manager.save(state_of(3), step=2)
        assert_same(values_of(live), values_of(saved))
        manager.restore(live, step=2)
        assert_same(values_of(live), values_of(state_of(3)))
        manager.restore(live, step=1)
        assert_same(values_of(live), values_of(saved))
        assert has_whole_arena(manager)


def test_damage_is_found_in_the_arena_and_changes_nothing(tmp_path, staged):
    with CheckpointManager(tmp_path, compression="none") as manager:
        manager.save({"w": torch.arange(ITEMS)}, step=1)
        [shard] = tmp_path.glob("step-*/*.shard")
        content = bytearray(shard.read_bytes())
        content[600_000] ^= 1
        shard.write_bytes(content)
        live = {"w": torch.zeros(ITEMS, dtype=torch.int64)}
        with pytest.raises(Corrupt) as caught:
            manager.restore(live, step=1)
        assert staged == [{0}]
        assert not live["w"].any()
        assert not has_whole_arena(manager), "what failed still holds it"
        manager.save(live, step=2)
        del caught
        manager.restore(live, step=2)
        assert has_whole_arena(manager)


@pytest.mark.parametrize(
    "settings", [{"read_only": True}, {"staging_bytes": "8MiB", "chunk_bytes": "1MiB"}]
)
def test_an_arena_that_is_too_small_is_not_used(tmp_path, staged, settings):
    saved = {"w": torch.randn(3_000_000)}
    with CheckpointManager(tmp_path) as manager:
        manager.save(saved, step=1)
    with CheckpointManager(tmp_path, **settings) as manager:
        live = {"w": torch.zeros(3_000_000)}
        manager.restore(live)
        assert_same(live, saved)
        assert staged == [set()]
        assert not has_whole_arena(manager)


def test_storages_with_other_contents_are_not_in_the_arena(tmp_path, staged):
    def state(scale: float) -> dict[str, Any]:
        base = torch.arange(2.0 * ITEMS) * scale
        return {"flat": base[:ITEMS], "turned": base[ITEMS:].view(-1, 2).t()}

    with CheckpointManager(tmp_path) as manager:
        manager.save(state(1), step=1)
    live = state(0)
    with CheckpointManager(tmp_path) as manager:
        manager.restore(live)
        assert_same(live, state(1))
        assert staged == [set()]
        assert not has_whole_arena(manager), "none was made"


def test_an_arena_that_is_already_lent_is_not_used(tmp_path, staged):
    saved = {"w": torch.randn(3_000_000)}
    with CheckpointManager(tmp_path) as manager:
        manager.save(saved, step=1)
        borrowed = manager._opened.native.lend_staging(1)
        borrowed[:] = 7
        live = {"w": torch.zeros(3_000_000)}
        manager.restore(live, step=1)
        assert_same(live, saved)
        manager.save(live, step=2)
        assert staged == [set()]
        assert (borrowed == 7).all()
        del borrowed
        manager.restore(live, step=2)
        assert staged[1] == {0}


def test_user_code_may_keep_what_it_loads(tmp_path, staged):
    class Keeping(torch.nn.Linear):
        def _load_from_state_dict(self, state: dict[str, Any], *rest: Any) -> None:
            self.kept = dict(state)
            super()._load_from_state_dict(state, *rest)

    with CheckpointManager(tmp_path) as manager:
        saved = {"plain": torch.randn(ITEMS), "model": Keeping(300, 300)}
        manager.save(saved, step=1)
        live = {"plain": torch.zeros(ITEMS), "model": Keeping(300, 300)}
        manager.restore(live)
        [numbers] = staged
        assert len(numbers) == 1
        kept = {key: value.clone() for key, value in live["model"].kept.items()}
        manager.save({"other": torch.randn(2 * ITEMS)}, step=2)
        assert_same(live["model"].kept, kept)
        assert has_whole_arena(manager)
