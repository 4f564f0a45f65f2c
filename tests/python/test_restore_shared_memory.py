"""Restores into live tensors that share memory: different values are refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support import assert_same

from dtruntime import InvalidArgument
from dtruntime.loading.reader import Reader


class Tied(torch.nn.Module):
    def __init__(self, is_tied, start):
        super().__init__()
        self.emb = torch.nn.Embedding(4, 3)
        self.head = torch.nn.Linear(3, 4, bias=False)
        if is_tied:
            self.head.weight = self.emb.weight
        with torch.no_grad():
            self.emb.weight.copy_(torch.arange(12.0).view(4, 3) + start)
            if not is_tied:
                self.head.weight.copy_(torch.arange(12.0).view(4, 3) + 2 * start)


def reads_of(monkeypatch):
    """Record how many tensors each read covers."""
    reads, tensors = [], Reader.tensors

    def note(reader, numbers, *arguments):
        numbers = list(numbers)
        reads.append(len(numbers))
        return tensors(reader, numbers, *arguments)

    monkeypatch.setattr(Reader, "tensors", note)
    return reads


def test_an_untied_checkpoint_does_not_fit_a_tied_model(manager):
    manager.save({"first": torch.ones(2), "m": Tied(False, 5)}, step=1)
    live = {"first": torch.zeros(2), "m": Tied(True, 0)}
    with pytest.raises(InvalidArgument) as caught:
        manager.restore(live)
    told = "live `m.emb.weight` and `m.head.weight` share memory, and the saved ones differ"
    assert told in caught.value.why
    assert "tie live tensors exactly where" in caught.value.hint
    assert not live["first"].any()
    assert torch.equal(live["m"].emb.weight, Tied(True, 0).emb.weight)

    report = manager.restore(live, strict=False)
    assert report.skipped == {"m.head.weight": told}
    assert torch.equal(live["m"].emb.weight, Tied(False, 5).emb.weight)


@pytest.mark.parametrize("saved", [True, False])
@pytest.mark.parametrize("live", [True, False])
def test_tied_and_untied_models_that_are_the_same_restore(manager, monkeypatch, saved, live):
    model = Tied(saved, 7)
    if not saved:
        model.head.weight.data.copy_(model.emb.weight.data)
    manager.save({"m": model}, step=1)
    reads = reads_of(monkeypatch)
    target = Tied(live, 0)
    manager.restore({"m": target})
    assert_same(target.state_dict(), model.state_dict())
    # What was saved separately is read for comparison, one tensor at a time; nothing else is.
    assert reads == ([1, 1] if live and not saved else []) + [2]


def test_two_saved_tensors_do_not_fit_one_live_tensor(manager):
    one, other = torch.ones(3), torch.full((3,), 2.0)
    nan = torch.tensor([float("nan"), -0.0, 1.0])
    manager.save({"a": one, "b": other, "c": one.clone(), "d": nan, "e": nan.clone()}, step=1)
    live = torch.zeros(3)
    with pytest.raises(InvalidArgument, match="live `a` and `b` share memory"):
        manager.restore({"a": live, "b": live})
    with pytest.raises(InvalidArgument, match="live `a` and `b` share memory"):
        manager.restore({"a": live, "b": torch.from_numpy(live.numpy())})
    assert not live.any()
    manager.restore({"a": live, "c": live})
    assert_same(live, one)
    manager.restore({"d": live, "e": live})
    assert_same(live, nan)
    report = manager.restore({"b": live, "a": live}, strict=False)
    assert_same(live, other)
    assert [*report.skipped][:1] == ["a"]


def test_different_arrays_do_not_fit_arrays_that_share_memory(manager):
    manager.save({"a": np.arange(6.0), "b": np.arange(5.0, -1, -1), "c": np.ones(6)}, step=1)
    live = np.zeros(6)
    with pytest.raises(InvalidArgument, match="live `a` and `c` share memory"):
        manager.restore({"a": live, "c": live})
    assert not live.any()
    manager.restore({"a": live, "b": live[::-1]})
    assert live.tolist() == [0, 1, 2, 3, 4, 5]


SELF_OVERLAPS = {
    "expanded": lambda memory: memory[:3].expand(2, 3),
    "strided": lambda memory: memory[:4].as_strided((2, 3), (1, 1)),
}


@pytest.mark.parametrize("name", SELF_OVERLAPS)
def test_a_tensor_whose_items_share_memory_restores_what_fits(manager, name):
    live = SELF_OVERLAPS[name](torch.zeros(4))
    shifted = live + 3
    manager.save({"w": torch.arange(6.0).view(2, 3), "shifted": shifted, "first": shifted}, step=1)
    first = torch.zeros(2, 3)
    with pytest.raises(InvalidArgument, match="`w`: items of the live one share memory"):
        manager.restore({"first": first, "w": live})
    assert not first.any()
    assert not live.any()
    manager.restore({"shifted": live})
    assert torch.equal(live, shifted)


@pytest.mark.parametrize("name", SELF_OVERLAPS)
def test_what_shares_memory_in_the_same_way_is_not_read_twice(manager, monkeypatch, name):
    saved = SELF_OVERLAPS[name](torch.arange(4.0))
    base = torch.arange(12.0)
    views = {
        "flat": base,
        "rows": base.view(4, 3),
        "part": base[2:8],
        "turned": base.view(4, 3).t(),
    }
    manager.save({"w": saved, "views": views}, step=1)
    reads = reads_of(monkeypatch)
    memory = torch.zeros(20)[3:15]
    live = {
        "flat": memory,
        "rows": memory.view(4, 3),
        "part": memory[2:8],
        "turned": memory.view(4, 3).t(),
    }
    target = SELF_OVERLAPS[name](torch.zeros(4))
    manager.restore({"w": target, "views": live})
    assert torch.equal(target, saved)
    assert torch.equal(memory, base)
    assert reads == [5]


def test_views_that_overlap_in_part(manager):
    base = torch.arange(12.0)
    manager.save(
        {"a": base[:8].clone(), "b": base[4:].clone(), "even": base[::2].clone(),
         "odd": base[1::2].clone(), "c": torch.zeros(8)},
        step=1,
    )  # fmt: skip
    memory = torch.zeros(12)
    manager.restore({"a": memory[:8], "b": memory[4:]})
    assert torch.equal(memory, base)
    memory.zero_()
    manager.restore({"even": memory[::2], "odd": memory[1::2]})
    assert torch.equal(memory, base)
    memory.fill_(9)
    with pytest.raises(InvalidArgument, match="live `a` and `c` share memory"):
        manager.restore({"a": memory[:8], "c": memory[4:]})
    assert memory.eq(9).all()


def test_a_module_with_an_expanded_buffer(manager):
    def model(start):
        module = torch.nn.Linear(2, 2)
        module.register_buffer("scale", torch.full((1,), start).expand(4))
        return module

    manager.save({"m": model(3.0)}, step=1)
    live = model(0.0)
    manager.restore({"m": live})
    assert live.scale.tolist() == [3.0] * 4

    other = model(0.0)
    other.scale = torch.arange(4.0)
    manager.save({"m": other}, step=2)
    with pytest.raises(InvalidArgument, match=r"`m\.scale`: items of the live one share memory"):
        manager.restore({"m": live})


def test_adjacent_tensors_are_not_compared(manager, monkeypatch):
    """Like parameters of a flattened recurrent network."""
    memory = torch.zeros(1000)
    saved = {str(at): torch.full((10,), float(at)) for at in range(100)}
    manager.save(saved, step=1)
    reads = reads_of(monkeypatch)
    manager.restore({str(at): memory[10 * at : 10 * at + 10] for at in range(100)})
    assert reads == [100]
    assert torch.equal(memory, torch.cat([*saved.values()]))


def test_a_conjugate_and_a_negative_that_share_memory_are_compared(manager):
    manager.save({"a": torch.tensor([1 + 2j]), "b": torch.tensor([5 + 5j])}, step=1)
    manager.save({"a": torch.tensor([1 + 2j]), "b": torch.tensor([1 - 2j])}, step=2)
    manager.save({"a": torch.tensor([2.0]), "b": torch.tensor([-2.0])}, step=3)
    live = torch.zeros(1, dtype=torch.complex64)
    with pytest.raises(InvalidArgument, match="share memory, and the saved ones differ"):
        manager.restore({"a": live, "b": live.conj()}, step=1)
    manager.restore({"a": live, "b": live.conj()}, step=2)
    assert live.item() == 1 + 2j
    negative = live.conj().imag  # minus what is there
    assert negative.is_neg()
    manager.restore({"a": live.imag, "b": negative}, step=3)
    assert live.item() == 1 + 2j
