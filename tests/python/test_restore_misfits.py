"""What a restore refuses, converts or warns of, where it could otherwise seem to succeed."""

from __future__ import annotations

import copy
import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from ranks import run_ranks
from support import assert_same, flip_byte, shard_of

from dtruntime import InvalidArgument, RestoreIncomplete

# Optimizers of another class


class Halving(torch.optim.Optimizer):
    """An optimizer that is not torch's, but loads like torch's."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1, "half_life": 3})

    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                rate = group["lr"] * 0.5 ** (1 / group["half_life"])
                parameter.data.sub_(rate * parameter.grad)


class Filling(Halving):
    """Fills in missing keys."""

    def __setstate__(self, state):
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("half_life", 3)


class Adapting(Halving):
    """Has its own way of loading."""

    def load_state_dict(self, state_dict):
        groups = [{"half_life": 3} | group for group in state_dict["param_groups"]]
        super().load_state_dict(state_dict | {"param_groups": groups})


MAKERS = {
    name: getattr(torch.optim, name)
    for name in dir(torch.optim)
    if isinstance(getattr(torch.optim, name), type)
    and name not in ("Optimizer", "SparseAdam")  # it only accepts sparse gradients
} | {
    "SGD with momentum": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "RMSprop, centered": lambda params: torch.optim.RMSprop(params, momentum=0.9, centered=True),
    "Adam with amsgrad": lambda params: torch.optim.Adam(params, amsgrad=True),
    "Halving": Halving,
}


def made(name, start=1.0):
    maker = MAKERS[name] if isinstance(name, str) else name
    return maker([torch.nn.Parameter(torch.full((2, 2), start)) for _ in range(2)])


def stepped(optimizer, times=2):
    def closure():
        loss = 0.0
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.linspace(0.1, 0.4, 4).view(2, 2) * parameter.detach()
                loss += float(parameter.detach().square().sum())
        return torch.tensor(loss)

    for _ in range(times):
        closure()
        optimizer.step(closure) if isinstance(optimizer, torch.optim.LBFGS) else optimizer.step()
    return optimizer


def test_an_optimizer_restores_into_any_class_or_is_refused(manager):
    found = Counter()
    for step, (saved, times) in enumerate(itertools.product(MAKERS, (0, 2))):
        manager.save({"w": torch.ones(2), "o": stepped(made(saved), times)}, step=step)
        for name in MAKERS:
            live = {"w": torch.zeros(2), "o": stepped(made(name), 1)}
            before = copy.deepcopy(live["o"].state_dict())
            try:
                manager.restore(live, step=step)
            except InvalidArgument:
                assert name != saved
                assert not live["w"].any(), (saved, name)
                assert_same(live["o"].state_dict(), before)
                found["refused"] += 1
            else:
                stepped(live["o"])
                found["restored"] += 1
    assert found["refused"] > 2 * found["restored"], found


@pytest.mark.parametrize(
    ("saved", "live", "expected"),
    [
        ("SGD with momentum", "AdamW", "the live `AdamW` needs `betas`, `eps`"),
        ("SGD with momentum", "RMSprop", "the live `RMSprop` needs `alpha`, `eps`"),
        ("AdamW", "SGD with momentum", "the live `SGD` needs `dampening`, `momentum`"),
        ("Adam", "Adamax", "the live `Adamax` needs `exp_inf` for each parameter, and the saved"),
        ("SGD", "Halving", "the live `Halving` needs `half_life`, and the saved group 0"),
    ],
)
def test_another_class_of_optimizer_is_named(manager, saved, live, expected):
    manager.save({"o": stepped(made(saved))}, step=1)
    with pytest.raises(InvalidArgument) as caught:
        manager.restore({"o": made(live)})
    assert f"`o`: {expected}" in caught.value.why
    assert "of the class that was saved" in caught.value.hint


FILLED_IN = {
    "foreach", "fused", "capturable", "differentiable", "maximize", "amsgrad", "nesterov",
    "centered", "decoupled_weight_decay",
}  # fmt: skip
"""What older versions of torch did not save."""
ALWAYS_SAVED = {
    "Adafactor": {"maximize"},
    "Muon": {"nesterov"},
    "Adam with amsgrad": {"amsgrad"},
    "RMSprop, centered": {"centered"},
}


@pytest.mark.parametrize("name", MAKERS)
def test_what_an_older_torch_saved_restores(manager, name):
    optimizer = stepped(made(name))
    older = optimizer.state_dict()
    unfilled = ALWAYS_SAVED.get(name, set())
    older["param_groups"] = [
        {key: value for key, value in group.items() if key not in FILLED_IN - unfilled}
        for group in older["param_groups"]
    ]
    manager.save({"o": older}, step=1)
    live = made(name)
    for mine, theirs in zip(
        live.param_groups[0]["params"], optimizer.param_groups[0]["params"], strict=True
    ):
        mine.data.copy_(theirs.data)
    for _ in range(2):  # the second time some keys are those that the first one added
        manager.restore({"o": live})
    assert_same(stepped(live).state_dict()["state"], stepped(optimizer).state_dict()["state"])


def test_keys_that_schedulers_and_users_add_are_accepted(manager):
    schedulers = torch.optim.lr_scheduler
    for step, (saved, live) in enumerate(itertools.product(range(3), repeat=2)):
        pair = []
        for kind in (saved, live):
            optimizer = stepped(made("SGD with momentum"))
            if kind == 1:
                schedulers.OneCycleLR(optimizer, 0.1, total_steps=20)
            elif kind == 2:
                schedulers.CyclicLR(optimizer, 0.01, 0.1)
                optimizer.param_groups[0]["my own"] = 7
            pair.append(optimizer)
        manager.save({"o": pair[0]}, step=step)
        manager.restore({"o": pair[1]})
        assert_same(pair[1].state_dict(), pair[0].state_dict())


@pytest.mark.parametrize("kind", [Filling, Adapting])
def test_optimizers_with_their_own_loading_are_not_checked(manager, kind):
    manager.save({"o": stepped(made("SGD"))}, step=1)
    live = made(kind)
    manager.restore({"o": live})
    assert live.param_groups[0]["half_life"] == 3


def test_hooks_may_fill_in_keys(manager):
    manager.save({"o": stepped(made("SGD"))}, step=1)
    live = made("Halving")

    def fill(_, state_dict):
        groups = [{"half_life": 3} | group for group in state_dict["param_groups"]]
        return state_dict | {"param_groups": groups}

    live.register_load_state_dict_pre_hook(fill)
    manager.restore({"o": live})
    assert live.param_groups[0]["half_life"] == 3


def test_finding_torchs_defaults_changes_no_class(manager):
    manager.save({"o": made("Halving")}, step=1)
    step = torch.optim.Optimizer.step
    manager.restore({"o": made("Halving")})
    assert torch.optim.Optimizer.step is step


# Failures half-way


class Failing:
    """Fails when its state is loaded."""

    def __init__(self, error):
        self.error = error

    def state_dict(self):
        return {"a": 1}

    def load_state_dict(self, _):
        raise self.error


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (KeyError("step"), "entry `o.deep` (Failing): KeyError: 'step'"),
        (MemoryError(), "entry `o.deep` (Failing): MemoryError"),
        (InvalidArgument("a", "b", "c"), "entry `o.deep` (Failing): InvalidArgument: a: b"),
    ],
)
def test_a_failure_half_way_names_the_entry_and_the_error(manager, error, told):
    manager.save({"w": torch.ones(3), "o": {"deep": Failing(None)}}, step=1)
    with pytest.raises(RestoreIncomplete) as caught:
        manager.restore({"w": torch.zeros(3), "o": {"deep": Failing(error)}})
    assert caught.value.why == f"the live state was changed in part when this failed: {told}"


# Where nothing fits


def trained(start=1.0):
    net = torch.nn.Linear(2, 2)
    torch.nn.init.constant_(net.weight, start)
    net.weight.grad, net.bias.grad = torch.ones(2, 2), torch.ones(2)
    optimizer = torch.optim.AdamW(net.parameters())
    optimizer.step()
    return net, optimizer


def save_renamed(manager):
    model, optimizer = trained()
    manager.save({"model": model, "optim": optimizer, "step": 5}, step=5)


TOP = "the checkpoint's top-level entries are `model`, `optim`, `step`"


def test_entries_of_which_nothing_was_restored_are_warned_of_once(manager, caplog):
    save_renamed(manager)
    net, optimizer = trained(0.0)
    live = {"net": net, "optimizer": optimizer, "step": 0}
    manager.restore(live, strict=False)
    assert caplog.messages == [
        f"restoring step 5: nothing was restored into `net`, `optimizer`; {TOP}"
    ]
    assert live["step"] == 5


def test_a_bare_module_of_which_nothing_was_restored_is_warned_of(manager, caplog):
    save_renamed(manager)
    manager.restore(trained()[0], strict=False)
    assert caplog.messages == [f"restoring step 5: nothing was restored into `the Linear`; {TOP}"]


def test_what_is_deeper_and_what_does_not_fit_is_warned_of(manager, caplog):
    model, optimizer = trained()
    manager.save({"all": {"m": model, "o": optimizer}, "w": torch.ones(2), "n": 1}, step=1)
    live = {
        "all": {"m": torch.nn.Linear(3, 3), "o": made("SGD"), "x": {"y": [model]}, "z": 1},
        "w": torch.zeros(3),
        "n": 0,
        "new": None,
    }
    manager.restore(live, strict=False)
    [told] = caplog.messages
    assert "nothing was restored into `all.m`, `all.o`, `all.x`, `w`, `new`;" in told


def test_a_restore_of_something_from_every_entry_warns_of_nothing(manager, caplog):
    model, optimizer = trained()
    saved = {"m": model, "o": optimizer, "relu": torch.nn.ReLU(), "d": {"x": {}, "t": (1, model)}}
    manager.save(saved, step=1)
    net, other = trained(0.0)
    net.register_buffer("extra", torch.zeros(1))
    live = {"m": net, "o": other, "relu": torch.nn.ReLU(), "d": {"x": {}, "t": (0, net)}}
    manager.restore(live, strict=False)
    assert caplog.messages == []


@pytest.mark.parametrize(
    "live", [lambda: {"net": trained()[0], "step": 0}, lambda: trained()[0], lambda: trained()[1]]
)
def test_a_renamed_entry_and_a_bare_object_name_the_top_level(manager, live):
    save_renamed(manager)
    with pytest.raises(InvalidArgument) as caught:
        manager.restore(live())
    assert TOP in caught.value.hint


def test_a_long_top_level_is_named_in_part(manager):
    manager.save({f"k{number}": number for number in range(30)}, step=1)
    with pytest.raises(InvalidArgument) as caught:
        manager.restore({"other": torch.zeros(1)})
    assert "`k9` and 20 more" in caught.value.hint
    assert "`k10`" not in caught.value.hint


# Another dtype


def test_a_half_precision_model_restores_full_precision_with_cast(manager):
    model, optimizer = trained(1 / 3)
    manager.save({"m": model, "o": optimizer, "w": torch.tensor([1e30, 0.1])}, step=1)
    net = torch.nn.Linear(2, 2).bfloat16()
    net.weight.grad, net.bias.grad = torch.ones(2, 2).bfloat16(), torch.ones(2).bfloat16()
    other = torch.optim.AdamW(net.parameters())
    live = {"m": net, "o": other, "w": torch.zeros(2).half()}
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(InvalidArgument) as caught:
        manager.restore(live)
    assert "`m.weight`: the live dtype is torch.bfloat16, the saved one torch.float32" in str(
        caught.value
    )
    assert "`o`: `exp_avg` of the live parameter 0: the live dtype" in caught.value.why
    assert "pass `cast=True`" in caught.value.hint
    assert_same(net.state_dict(), before)

    report = manager.restore(live, cast=True)
    assert (report.missing, report.skipped) == ((), {})
    assert torch.equal(net.weight, model.weight.bfloat16())
    state = optimizer.state[model.weight]
    assert torch.equal(other.state[net.weight]["exp_avg"], state["exp_avg"].bfloat16())
    assert_same(other.state[net.weight]["step"], state["step"])
    assert_same(live["w"], torch.tensor([float("inf"), 0.1]).half())
    other.step()


DTYPES = [
    (torch.float32, torch.float64),
    (torch.float64, torch.float16),
    (torch.bfloat16, torch.float32),
    (torch.float32, torch.float8_e4m3fn),
    (torch.float8_e5m2, torch.bfloat16),
    (torch.float8_e4m3fn, torch.float8_e5m2),
    (torch.complex64, torch.complex128),
    (torch.complex128, torch.complex64),
]


@pytest.mark.parametrize("pair", DTYPES, ids=str)
def test_tensors_are_converted_as_torch_does(manager, pair):
    saved, live = pair
    full = torch.linspace(-3, 3, 12).view(3, 4)
    kind = torch.complex128 if saved.is_complex else torch.float64
    values = torch.complex(full, full + 1).to(kind) if saved.is_complex else full.to(kind)
    manager.save({"w": values.to(saved), "t": values.to(saved)}, step=1)
    target = {"w": torch.zeros(3, 4).to(live), "t": torch.zeros(4, 3).to(live).t()}
    with pytest.raises(InvalidArgument, match="cast=True"):
        manager.restore(target)
    manager.restore(target, cast=True)
    expected = values.to(saved).to(live)
    for tensor in target.values():
        assert_same(tensor.contiguous(), expected)


@pytest.mark.parametrize(
    "pair",
    [
        (torch.int64, torch.float32),
        (torch.float32, torch.int64),
        (torch.float32, torch.complex64),
        (torch.complex64, torch.float32),
        (torch.bool, torch.float32),
        (torch.int32, torch.int64),
    ],
    ids=str,
)
def test_numbers_of_another_kind_are_not_converted(manager, pair):
    saved, live = pair
    manager.save({"w": torch.ones(3).to(saved)}, step=1)
    for how in ({}, {"cast": True}):
        with pytest.raises(InvalidArgument, match="the live dtype is") as caught:
            manager.restore({"w": torch.zeros(3).to(live)}, **how)
        assert "cast" not in caught.value.hint


def test_a_cast_requires_the_same_shape(manager):
    manager.save({"w": torch.ones(3)}, step=1)
    with pytest.raises(InvalidArgument, match="the live shape"):
        manager.restore({"w": torch.zeros(4).half()}, cast=True)


def test_arrays_are_converted_too(manager):
    manager.save({"a": np.array([1e300, 0.1]), "z": np.array([1 + 2j]), "i": np.arange(3)}, step=1)
    live = {"a": np.zeros(2, np.float32), "z": np.zeros(1, np.complex64)}
    with pytest.raises(InvalidArgument, match="cast=True"):
        manager.restore(live)
    manager.restore(live, cast=True)
    assert live["a"].tolist() == [np.inf, float(np.float32(0.1))]
    assert live["z"].tolist() == [1 + 2j]
    with pytest.raises(InvalidArgument, match="the live dtype is int8"):
        manager.restore({"i": np.zeros(3, np.int8)}, cast=True)


def test_tied_live_tensors_are_compared_as_they_will_be(manager):
    manager.save({"a": torch.ones(2), "b": torch.ones(2) + 1e-6, "c": torch.ones(2) + 1}, step=1)
    live = torch.zeros(2).bfloat16()
    manager.restore({"a": live, "b": live}, cast=True)
    assert live.eq(1).all()
    with pytest.raises(InvalidArgument, match="share memory"):
        manager.restore({"a": live, "c": live}, cast=True)


def test_a_model_without_memory_gets_a_hint(manager):
    model = torch.nn.Linear(2, 2)
    manager.save({"m": model}, step=1)
    live = torch.nn.Linear(2, 2, device="meta")
    with pytest.raises(InvalidArgument, match="on `meta`") as caught:
        manager.restore({"m": live})
    assert "`module.to_empty(device=...)`, tie weights" in caught.value.hint
    live = live.to_empty(device="cpu")
    manager.restore({"m": live})
    assert_same(live.state_dict(), model.state_dict())


SHARDED = """
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

dist.init_process_group("fake", rank=rank, world_size=2, store=FakeStore())
mesh = init_device_mesh("cpu", (2,))

def sharded(full, dim=0):
    local = full.chunk(2, dim)[rank].clone()
    from torch.distributed.tensor import DTensor
    return DTensor.from_local(local, mesh, [Shard(dim)], run_check=False)

def local_of(full, dim=0):
    return full.chunk(2, dim)[rank]

def model_of(one, other, dim=0):
    module = torch.nn.Module()
    module.one = torch.nn.Parameter(sharded(one, dim))
    module.other = module.one if other is None else torch.nn.Parameter(sharded(other, dim))
    return module

full = torch.arange(24.0).view(4, 6) / 7
"""


def test_sharded_tensors_are_compared_and_converted_too(coordinator, tmp_path):
    outputs = run_ranks(
        SHARDED
        + """
with CheckpointManager(store, replicated="*") as manager:
    manager.save({"m": model_of(full, None)}, step=1)
    manager.save({"m": model_of(full, full.clone())}, step=2)
    differs = full.clone(); differs[0, 0] = differs[3, 5] = 99
    manager.save({"m": model_of(full, differs)}, step=3)
    for dim in (0, 1):
        for step in (1, 2):
            live = model_of(torch.zeros(4, 6), None, dim)
            manager.restore({"m": live}, step=step)
            assert torch.equal(live.one.to_local(), local_of(full, dim))
            live = model_of(torch.zeros(4, 6), torch.zeros(4, 6), dim)
            manager.restore({"m": live}, step=step)
            assert torch.equal(live.other.to_local(), local_of(full, dim))
        live = model_of(torch.zeros(4, 6), None, dim)
        try:
            manager.restore({"m": live}, step=3)
        except InvalidArgument as error:
            assert "live `m.one` and `m.other` share memory" in error.why
            assert not live.one.to_local().any()
        else:
            raise AssertionError("it fits")

    model = model_of(full, full + 1)
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = sharded(torch.ones(4, 6))
    optimizer.step()
    saved = {"m": model, "o": optimizer, "w": sharded(full), "plain": full.double()}
    manager.save(saved, step=4)
    for dim in (0, 1):
        zeros = torch.zeros(4, 6).bfloat16()
        net = model_of(zeros, zeros, dim)
        other = torch.optim.AdamW(net.parameters())
        for parameter in net.parameters():
            parameter.grad = sharded(zeros + 1, dim)
        live = {"m": net, "o": other, "w": sharded(zeros, dim), "plain": sharded(zeros, dim)}
        try:
            manager.restore(live)
        except InvalidArgument as error:
            assert "cast=True" in error.hint
            assert not net.one.to_local().any()
        else:
            raise AssertionError("it was converted unasked")
        manager.restore(live, cast=True)
        part = local_of(full.bfloat16(), dim)
        for tensor in (live["w"], live["plain"]):
            assert torch.equal(tensor.to_local(), part), (dim, tensor)
        expected = manager.load()
        for name in ("one", "other"):
            parameter = getattr(net, name)
            wanted = local_of(expected["m"][name].bfloat16(), dim)
            assert torch.equal(parameter.to_local(), wanted)
        moments = expected["o"]["state"]
        for at, parameter in enumerate(net.parameters()):
            state = other.state[parameter]["exp_avg"]
            assert state.dtype == state.to_local().dtype == torch.bfloat16
            assert torch.equal(state.to_local(), local_of(moments[at]["exp_avg"].bfloat16(), dim))
        other.step()
    print("restored")
""",
        tmp_path / "store",
        coordinator.url,
        world_size=2,
    )
    assert outputs == ["restored\n"] * 2


@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype")
def test_what_cannot_be_restored_into_is_found_first(manager):
    manager.save({"first": torch.ones(2), "x": torch.eye(3)}, step=1)
    freed = torch.zeros(3, 3)
    freed.untyped_storage().resize_(0)
    places = {
        "sparse_coo tensor": torch.eye(3).to_sparse(),
        "nested tensor": torch.nested.nested_tensor([torch.zeros(3)] * 3),
        "memory was freed": freed,
        "`meta`": torch.zeros(3, 3, device="meta"),
    }
    for why, place in places.items():
        for direct in (False, True):
            live = {"first": torch.zeros(2), "x": place}
            with pytest.raises(InvalidArgument, match=why):
                manager.restore(live, direct=direct)
            assert live["first"].sum() == 0
            report = manager.restore(live, strict=False, direct=direct)
            assert why in report.skipped["x"]
            assert live["first"].sum() == 2


def test_a_module_created_in_inference_mode_gets_a_hint(manager):
    manager.save({"first": torch.ones(2), "m": torch.nn.Linear(2, 2)}, step=1)
    with torch.inference_mode():
        module = torch.nn.Linear(2, 2)
    live = {"first": torch.zeros(2), "m": module}
    with pytest.raises(InvalidArgument, match=r"torch\.inference_mode\(\)"):
        manager.restore(live)
    assert live["first"].sum() == 0
    with torch.inference_mode():
        manager.restore(live)
    assert torch.equal(module.weight, manager.load(keys="m.weight")["m"]["weight"])


@pytest.mark.parametrize(
    "kind",
    [
        torch.optim.Adagrad,
        torch.optim.Adadelta,
        torch.optim.Adamax,
        torch.optim.ASGD,
        torch.optim.Rprop,
        torch.optim.Adafactor,
        lambda parameters: torch.optim.RMSprop(parameters, centered=True),
    ],
)
def test_no_moment_of_another_shape_is_created(manager, kind):
    def stepped(size: int) -> torch.optim.Optimizer:
        parameter = torch.nn.Parameter(torch.ones(size))
        optimizer = kind([parameter])
        parameter.sum().backward()
        optimizer.step()
        return optimizer

    manager.save({"o": stepped(4)}, step=1)
    with pytest.raises(InvalidArgument, match=r"parameter 0 has shape \(3,\), its saved"):
        manager.restore({"o": stepped(3)})
    manager.restore({"o": stepped(4)})


def test_an_error_after_falling_back_names_the_newer_step(open_manager, store):
    with open_manager(compression="none") as first:
        first.save({"old": torch.ones(9_000)}, step=1)
        first.save({"old": torch.ones(9_000), "new": torch.ones(9_000)}, step=2)
    flip_byte(shard_of(store, 2), 10_000)
    manager = open_manager()
    with pytest.raises(InvalidArgument, match="step 2 does not verify"):
        manager.load(keys="new")
    with pytest.raises(InvalidArgument, match="step 2 does not verify"):
        manager.restore({"old": torch.zeros(9_000), "new": torch.zeros(9_000)})
