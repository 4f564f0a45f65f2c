"""Restoring in place: what changes, what is reported, and what is refused beforehand."""

from __future__ import annotations

import copy
import random
import weakref

import numpy as np
import pytest
import torch
from support import assert_same, flip_byte, shard_of
from torch.optim.swa_utils import AveragedModel

from dtruntime import (
    CheckpointManager,
    Corrupt,
    InvalidArgument,
    RestoreIncomplete,
)
from dtruntime.loading.reader import Reader
from dtruntime.restoring import applying


def train(model, optimizer, scheduler, generator, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        inputs = torch.randn(16, 8, generator=generator)
        loss = (model(inputs) - inputs.sum(1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    return losses


def fresh_training(seed: int):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(
        torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.BatchNorm1d(32), torch.nn.Linear(32, 1)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    return model, optimizer, scheduler, torch.Generator().manual_seed(seed)


def state_of(model, optimizer, scheduler, generator):
    return {
        "model": model,
        "optimizer": optimizer,
        "scheduler": scheduler,
        "generator": generator.get_state(),
        "epoch": 3,
    }


def test_a_resumed_training_equals_an_uninterrupted_one(manager):
    parts = fresh_training(1)
    train(*parts, steps=5)
    manager.save(state_of(*parts), step=5)
    expected = train(*parts, steps=5)

    resumed = fresh_training(2)
    live = state_of(*resumed) | {"epoch": 0}
    report = manager.restore(live)
    resumed[3].set_state(live["generator"])
    assert live["epoch"] == 3
    assert report.values["epoch"] == 3
    assert (report.step, report.missing, report.unexpected, report.skipped) == (5, (), (), {})
    assert train(*resumed, steps=5) == expected
    assert_same(resumed[0].state_dict(), parts[0].state_dict())


def test_live_objects_keep_their_identity(manager):
    saved = {
        "tensor": torch.randn(4, 5),
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "array": np.arange(5.0),
        "nested": {"list": [torch.ones(2), 7], "tuple": (torch.zeros(2), "kept")},
        "plain": {"history": [1, 2, 3]},
        "losses": [0.5, 0.25],
        "bits": torch.empty(3, dtype=torch.uint4),
        "placeholder": {"any": torch.ones(1)},
    }
    manager.save(saved, step=1)
    live = {
        "tensor": torch.zeros(5, 4).t(),
        "parameter": torch.nn.Parameter(torch.zeros(3)),
        "array": np.zeros(5),
        "nested": {"list": [torch.zeros(2), 0], "tuple": (torch.ones(2), "kept")},
        "plain": {"other": 1},
        "losses": [],
        "bits": torch.empty(3, dtype=torch.uint4),
        "placeholder": None,
    }
    before = {key: id(value) for key, value in live.items() if value is not None}
    parts = live["nested"]["list"][0], live["nested"]["tuple"][0]
    report = manager.restore(live)
    assert_same(live, saved)
    assert before == {key: id(value) for key, value in live.items() if key in before}
    assert live["nested"]["list"][0] is parts[0]
    assert live["nested"]["tuple"][0] is parts[1]
    assert report.values["nested.tuple.1"] == "kept"


def test_only_what_is_requested_is_touched(manager):
    model = torch.nn.Linear(3, 2)
    manager.save({"model": model, "optimizer": {"lr": 1}, "epoch": 3}, step=1)
    other = torch.nn.Linear(3, 2)
    report = manager.restore({"model": other})
    assert report.skipped == {"optimizer": "not asked for", "epoch": "not asked for"}
    assert_same(other.state_dict(), model.state_dict())


def other_type(live: str, saved: str) -> str:
    return f"the live value is of type `{live}`, the saved one of type `{saved}`"


MISFITS = {
    "shape": ({"w": torch.zeros(3)}, r"`w`: the live shape is \(3,\), the saved one \(4, 2\)"),
    "dtype": (
        {"w": torch.zeros(4, 2).half()},
        "dtype is torch.float16, the saved one torch.float32",
    ),
    "kind": ({"w": np.zeros((4, 2), np.float32)}, other_type("ndarray", "Tensor")),
    "plain": ({"w": 5}, other_type("int", "Tensor")),
    "tensor for plain": ({"n": torch.zeros(1)}, other_type("Tensor", "int")),
    "missing": (
        {"w": torch.zeros(4, 2), "new": torch.zeros(1)},
        "missing in the checkpoint: `first`, `new`",
    ),
    "list length": ({"l": [torch.zeros(1)]}, "the live length is 1, the saved one 2"),
    "list kind": ({"l": (torch.zeros(1),)}, other_type("tuple", "list")),
    "dict kind": ({"w": {"x": torch.zeros(1)}}, other_type("dict", "Tensor")),
    "contents": ({"w": []}, other_type("list", "Tensor")),
    "module": ({"m": torch.nn.Linear(5, 1)}, r"`m.weight`: the live shape is \(1, 5\)"),
    "module missing": ({"m": torch.nn.Linear(2, 1, bias=False)}, "unexpected.*`m.bias`"),
    "no module": ({"w": torch.nn.Linear(2, 1)}, other_type("Linear", "Tensor")),
    "array shape": ({"a": np.zeros(4)}, r"`a`: the live shape is \(4,\)"),
    "array dtype": ({"a": np.zeros(3, np.int8)}, "live dtype is int8"),
    "meta": ({"w": torch.zeros(4, 2, device="meta")}, "without values"),
    "nested": (
        {"d": {"x": torch.zeros(1), "z": torch.zeros(1)}},
        "missing.*`d.z`; unexpected.*`d.y`",
    ),
}


def misfit_state():
    return {
        "w": torch.ones(4, 2),
        "n": 3,
        "l": [torch.ones(1), 2],
        "m": torch.nn.Linear(2, 1),
        "a": np.ones(3),
        "d": {"x": torch.ones(1), "y": torch.ones(1)},
    }


@pytest.mark.parametrize("name", MISFITS)
def test_what_does_not_fit_is_refused_before_anything_changes(manager, name):
    manager.save(misfit_state(), step=1)
    live, message = MISFITS[name]
    live = {"first": torch.zeros(1)} | live if name == "missing" else live
    before = copy.deepcopy(live)
    with pytest.raises(InvalidArgument, match=message):
        manager.restore(live)
    for key, value in live.items():
        if isinstance(value, torch.Tensor) and not value.is_meta:
            assert torch.equal(value, before[key])
    manager.save({"still": "saves"}, step=2)


def test_lenient_restores_restore_what_fits(manager):
    manager.save(misfit_state(), step=1)
    live = {
        "w": torch.zeros(9),
        "n": 0,
        "new": torch.zeros(1),
        "m": torch.nn.Linear(2, 3),
        "d": {"x": torch.zeros(1)},
    }
    report = manager.restore(live, strict=False)
    assert report.missing == ("new",)
    assert report.unexpected == ("d.y",)
    assert set(report.skipped) == {"w", "m.weight", "m.bias", "l", "a"}
    assert live["n"] == 3
    assert torch.equal(live["d"]["x"], torch.ones(1))


def test_nothing_to_restore_into(manager):
    manager.save({"a": 1}, step=1)
    with pytest.raises(InvalidArgument, match="cannot be changed in place"):
        manager.restore(7)


def test_expanded_and_tied_tensors(manager):
    manager.save({"a": torch.ones(1).expand(5), "b": torch.arange(3.0)}, step=1)
    live = {"a": torch.zeros(1).expand(5), "b": torch.zeros(3)}
    manager.restore(live)
    assert torch.equal(live["a"], torch.ones(5))


def test_damage_is_found_before_anything_changes(manager, store):
    manager.save({"a": torch.ones(50_000), "b": torch.ones(50_000)}, step=1)
    shard = shard_of(store, 1)
    flip_byte(shard, 4096 + 70_000 if shard.stat().st_size > 200_000 else 4096 + 10)
    live = {"a": torch.zeros(50_000), "b": torch.zeros(50_000)}
    with pytest.raises(Corrupt):
        manager.restore(live, step=1)
    assert not live["a"].any()
    assert not live["b"].any()
    manager.save(live, step=2)


class Refusing:
    """Refuses every state."""

    def state_dict(self):
        return {"a": 1}

    def load_state_dict(self, _state):
        raise RuntimeError("I will not")


def test_a_restore_that_fails_half_way_locks_saving(manager):
    manager.save({"w": torch.ones(3), "s": Refusing()}, step=1)
    live = {"w": torch.zeros(3), "s": Refusing()}
    with pytest.raises(RestoreIncomplete, match="I will not") as caught:
        manager.restore(live)
    assert isinstance(caught.value.__cause__, RuntimeError)
    with pytest.raises(RestoreIncomplete, match="mixture"):
        manager.save_async(live, step=2)
    manager.restore({"w": live["w"]})
    manager.save(live, step=2)


def test_without_memory_items_are_restored_one_by_one(open_manager, store, monkeypatch):
    manager = open_manager(compression="none")
    manager.save({"a": torch.ones(60_000), "b": torch.ones(60_000)}, step=1)
    monkeypatch.setattr(applying, "available_memory_bytes", lambda: 1)
    read, earlier = Reader.tensors, []

    def tensors(reader, *arguments):
        assert not any(tensor() is not None for tensor in earlier), "still in memory"
        made = read(reader, *arguments)
        earlier.extend(weakref.ref(tensor) for tensor in made.values())
        return made

    monkeypatch.setattr(Reader, "tensors", tensors)
    live = {"a": torch.zeros(60_000), "b": torch.zeros(60_000)}
    manager.restore(live)
    assert len(earlier) == 2
    assert live["a"].all()
    assert live["b"].all()

    flip_byte(shard_of(store, 1), 4096 + 2 * 60_000 * 4 - 100)
    live["a"].zero_()
    with pytest.raises(RestoreIncomplete):
        manager.restore(live, step=1)
    assert live["a"].all(), "the first item had been restored"
    with pytest.raises(RestoreIncomplete):
        manager.save(live, step=2)


def test_available_memory_is_plausible():
    assert 1 << 26 < applying.available_memory_bytes() < 1 << 62


def test_every_scheduler_of_torch_is_resumed(store):
    schedulers = torch.optim.lr_scheduler
    makers = {
        "lambda": lambda o: schedulers.LambdaLR(o, lambda step: 0.9**step),
        "multiplicative": lambda o: schedulers.MultiplicativeLR(o, lambda _: 0.9),
        "step": lambda o: schedulers.StepLR(o, 2),
        "multi step": lambda o: schedulers.MultiStepLR(o, [2, 4, 4]),
        "constant": schedulers.ConstantLR,
        "linear": schedulers.LinearLR,
        "exponential": lambda o: schedulers.ExponentialLR(o, 0.9),
        "polynomial": lambda o: schedulers.PolynomialLR(o, 9),
        "cosine": lambda o: schedulers.CosineAnnealingLR(o, 9),
        "restarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 3),
        "cyclic": lambda o: schedulers.CyclicLR(o, 0.01, 0.1, cycle_momentum=False),
        "one cycle": lambda o: schedulers.OneCycleLR(o, 0.1, total_steps=20),
        "plateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=1),
        "chained": lambda o: schedulers.ChainedScheduler(
            [schedulers.MultiStepLR(o, [3]), schedulers.ExponentialLR(o, 0.9)]
        ),
        "sequential": lambda o: schedulers.SequentialLR(
            o, [schedulers.ConstantLR(o), schedulers.MultiStepLR(o, [3, 5])], [4]
        ),
    }

    def make(name):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1, momentum=0.9)
        return optimizer, makers[name](optimizer)

    def rates(name, optimizer, scheduler, steps):
        taken = []
        for _ in range(steps):
            optimizer.step()
            scheduler.step(*[1.0] if name == "plateau" else [])
            taken.append(optimizer.param_groups[0]["lr"])
        return taken

    known = {name for name in dir(schedulers) if name.endswith("LR") and name != "SWALR"}
    tried = {type(make(name)[1]).__name__ for name in makers}
    assert known - {"LRScheduler", "_LRScheduler"} <= tried
    with CheckpointManager(store) as manager:
        for step, name in enumerate(makers):
            optimizer, scheduler = make(name)
            rates(name, optimizer, scheduler, 3)
            manager.save({"optimizer": optimizer, "scheduler": scheduler}, step=step)
            expected = rates(name, optimizer, scheduler, 6)
            optimizer, scheduler = make(name)
            manager.restore({"optimizer": optimizer, "scheduler": scheduler}, step=step)
            assert rates(name, optimizer, scheduler, 6) == expected, name


def test_random_states_are_resumed(store):
    saved = {"numpy": np.random.get_state(), "python": random.getstate()}
    with CheckpointManager(store) as manager:
        manager.save(saved, step=1)
        expected = np.random.normal(size=5), random.random()
        np.random.normal(size=3)
        random.gauss(0, 1)
        live = {"numpy": np.random.get_state(), "python": random.getstate()}
        array = live["numpy"][1]
        manager.restore(live)
    assert live["numpy"][1] is array, "what is live stays itself"
    np.random.set_state(live["numpy"])
    random.setstate(live["python"])
    assert np.array_equal(np.random.normal(size=5), expected[0])
    assert random.random() == expected[1]


def test_a_tuple_with_plain_and_live_values_is_replaced(store):
    tensor = torch.zeros(2)
    live = {"pair": (tensor, 4, ("inner", torch.zeros(1)))}
    with CheckpointManager(store) as manager:
        manager.save({"pair": (torch.ones(2), 3, ("saved", torch.ones(1)))}, step=1)
        report = manager.restore(live)
        assert_same(live, manager.load())
    assert live["pair"][0] is tensor
    assert (report.values["pair.1"], report.values["pair.2.0"]) == (3, "saved")


def _adam(*shapes):
    return torch.optim.AdamW([torch.nn.Parameter(torch.ones(shape)) for shape in shapes])


def _stepped(optimizer):
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer


def _on_meta():
    with torch.device("meta"):
        return torch.nn.Linear(3, 3)


OBJECTS = {
    "another parameter": (_adam(3, 4), _adam(3), r"the live groups have \[1\] parameters"),
    "moments": (_adam((3, 3)), _adam((4, 4)), r"shape \(4, 4\), its saved `exp_avg` \(3, 3\)"),
    "no optimizer": (torch.nn.Linear(2, 2), _adam(3), "the checkpoint has none"),
    "without values": (torch.nn.Linear(3, 3), _on_meta(), r"module.to_empty\(device"),
    "a scaler that was off": (
        torch.amp.GradScaler("cpu", enabled=False),
        torch.amp.GradScaler("cpu"),
        "the saved state is empty",
    ),
}


@pytest.mark.parametrize("name", OBJECTS)
def test_what_does_not_fit_is_found_before_anything_is_changed(store, name):
    saved, live, expected = OBJECTS[name]
    saved = _stepped(saved) if isinstance(saved, torch.optim.Optimizer) else saved
    before = torch.zeros(2)
    with CheckpointManager(store) as manager:
        manager.save({"first": torch.ones(2), "x": saved}, step=1)
        with pytest.raises(InvalidArgument, match=expected):
            manager.restore({"first": before, "x": live})
        assert torch.equal(before, torch.zeros(2))
        manager.save({"still": "possible"}, step=2)


def test_what_was_wrapped_is_restored_without_the_wrapper(manager):
    model = torch.nn.Linear(3, 2)
    wrapped = {"m": torch.nn.DataParallel(model), "ema": AveragedModel(model)}
    manager.save(wrapped, step=1)
    live = {key: torch.nn.Linear(3, 2) for key in wrapped}
    for key, plain in live.items():
        with pytest.raises(
            InvalidArgument, match=r"ModuleDict\(\{\"module\": \.\.\.\}\)"
        ) as caught:
            manager.restore({key: plain})
        assert f"restore into the wrapped `{key}`" in caught.value.hint
    manager.restore({"m": torch.nn.ModuleDict({"module": live["m"]})})
    report = manager.restore({"ema": torch.nn.ModuleDict({"module": live["ema"]})}, strict=False)
    assert report.unexpected == ("ema.n_averaged",)
    for plain in live.values():
        assert torch.equal(plain.weight, model.weight)


@pytest.mark.parametrize(
    ("saved", "live", "hint"),
    [
        (torch.compile, lambda model: model, "restore into the wrapped `model`"),
        (lambda model: model, torch.compile, "restore into `model._orig_mod`"),
        (lambda model: model, torch.nn.DataParallel, "restore into `model.module`"),
    ],
    ids=["saved compiled", "live compiled", "live parallel"],
)
def test_a_wrapper_that_is_the_only_difference_is_named(manager, caplog, saved, live, hint):
    models = [torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 2)) for _ in range(2)]
    manager.save({"model": saved(models[0]), "n": 1}, step=1)
    with pytest.raises(InvalidArgument) as caught:
        manager.restore({"model": live(models[1]), "n": 2})
    assert hint in caught.value.hint
    with pytest.raises(InvalidArgument) as caught:
        manager.restore({"model": live(models[1][:1]), "n": 2})
    assert "strict=False" in caught.value.hint
    assert not caplog.messages
    manager.restore({"model": live(models[1])}, strict=False)
    [warning] = caplog.messages
    assert "nothing was restored into `model`;" in warning
    assert hint in warning
    manager.restore({"model": saved(models[1])}, strict=False)
    assert len(caplog.messages) == 1


def test_a_copy_of_an_optimizers_state_is_not_the_optimizer(manager, caplog):
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    state = {"model": model, "optimizer": optimizer.state_dict(), "lr": scheduler.state_dict()}
    manager.save(state, step=1)
    manager.restore(state)
    assert "`optimizer`, `lr` is a copy that `state_dict()` made" in caplog.text
    caplog.clear()
    manager.save({"optimizer": optimizer, "lr": scheduler}, step=2)
    manager.restore({"optimizer": optimizer, "lr": scheduler})
    assert "copy" not in caplog.text


def test_modules_that_convert_old_entries_get_a_hint(manager):
    model = torch.nn.Linear(2, 2)
    manager.save({"model": {"old": model.weight, "bias": model.bias}}, step=1)

    def convert(_module: object, entries: dict[str, object], *_: object) -> None:
        entries["weight"] = entries.pop("old")

    with pytest.raises(InvalidArgument) as caught:
        manager.restore({"model": model})
    assert "load_state_dict(" not in caught.value.hint
    model.register_load_state_dict_pre_hook(convert)
    with pytest.raises(InvalidArgument) as caught:
        manager.restore({"model": model})
    assert "module.load_state_dict(manager.load(keys=" in caught.value.hint
    model.load_state_dict(manager.load(keys="model")["model"])
