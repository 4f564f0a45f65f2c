"""Tensors on GPUs, against a stand-in for the driver: what each consistency mode guarantees."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support import script_environment

from dtruntime import AcceleratorError, CheckpointManager, InvalidArgument
from dtruntime.loading.reader import Reader
from dtruntime.restoring.restore import plan_restore
from dtruntime.saving.handle import _copying
from dtruntime.state import gpus
from dtruntime.state.tensors import StorageRecord


@pytest.fixture
def manager(tmp_path):
    with CheckpointManager(tmp_path / "store", chunk_bytes="64KiB") as manager:
        yield manager


def noise(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int32, torch.bool]


@pytest.mark.parametrize("mode", gpus.MODES[::2])
def test_tensors_of_gpu_and_host_are_saved_bit_by_bit(device, manager, mode):
    values = {str(dtype): noise(n, 300, 257, dtype=dtype) for n, dtype in enumerate(DTYPES)}
    state = {
        "gpu": {name: device.tensor(value) for name, value in values.items()},
        "host": {name: value.clone() for name, value in values.items()},
        "array": np.arange(10),
        "step": 7,
    }
    state["view"] = state["gpu"]["torch.float32"][10:20].t()
    copies = device.calls("cuMemcpyDtoHAsync_v2")
    handle = manager.save_async(state, step=1, consistency=mode)
    handle.result()
    assert device.calls("cuMemcpyDtoHAsync_v2") > copies, "the driver copied, not torch"
    assert handle.staged.result(10) is None
    loaded = manager.load()
    for name, value in values.items():
        assert torch.equal(loaded["gpu"][name], value)
        assert torch.equal(loaded["host"][name], value)
    assert torch.equal(loaded["view"], values["torch.float32"][10:20].t())
    assert loaded["view"].untyped_storage()._cdata == (
        loaded["gpu"]["torch.float32"].untyped_storage()._cdata
    )


@pytest.mark.parametrize("mode", ["strict", "device-snapshot"])
def test_what_the_stream_does_next_is_not_saved(device, manager, mode):
    before, after = noise(1, 100_000), noise(2, 100_000)
    weight = device.tensor(torch.zeros(100_000))
    device.write(weight, before)
    handle = manager.save_async({"w": weight}, step=1, consistency=mode)
    device.write(weight, after)
    handle.result()
    device.settle()
    assert torch.equal(weight, after)
    assert torch.equal(manager.load()["w"], before)


def test_an_overlapped_save_returns_before_the_copies_and_the_step_waits(device, manager):
    weight = device.tensor(noise(1, 100_000)).requires_grad_()
    average = device.tensor(noise(2, 100_000))
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    moment = device.tensor(optimizer.state[weight]["exp_avg"])
    optimizer.state[weight]["exp_avg"] = moment
    state = {"w": weight, "optimizer": optimizer, "average": average}
    expected = weight.detach().clone(), moment.clone(), average.clone()
    device.hold_copies(True)
    handle = manager.save_async(state, step=1, consistency="overlap", optimizer=optimizer)
    assert not handle.staged.done()
    assert manager._opened.native.wait_until_finished(0.05) is False
    # What the optimizer does not update was cloned, in the order of the stream.
    device.write(average, torch.zeros(100_000))
    # On a GPU the step's kernels would wait; on the host the step itself has to.
    held = []
    precede = gpus.current_streams

    def wait(ordinals):
        held.append(list(ordinals))
        device.hold_copies(False)
        assert handle._native.wait_captured(30)
        return precede(ordinals)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpus, "current_streams", wait)
        optimizer.step()
        optimizer.step()
    assert held == [[0]], "the first step waits, and no other"
    handle.result()
    assert handle.staged.done()
    device.settle()
    assert not torch.equal(weight, expected[0])
    assert torch.equal(average, torch.zeros(100_000))
    loaded = manager.load()
    assert torch.equal(loaded["w"], expected[0])
    assert torch.equal(loaded["optimizer"]["state"][0]["exp_avg"], expected[1])
    assert torch.equal(loaded["average"], expected[2])


def test_before_update_holds_updates_back(device, manager):
    before, after = noise(1, 100_000), noise(2, 100_000)
    weight = device.tensor(before).requires_grad_()
    optimizer = torch.optim.SGD([weight], lr=0.1)
    handle = manager.save_async({"w": weight}, step=1, consistency="overlap", optimizer=optimizer)
    handle.before_update()
    device.write(weight, after)
    handle.result()
    device.settle()
    assert torch.equal(manager.load()["w"], before)
    # A save that has ended leaves nothing to wait for.
    handle.before_update()


def test_two_saves_before_one_step_both_hold_it(device, manager, tmp_path):
    before = noise(1, 100_000)
    weight = device.tensor(before).requires_grad_()
    optimizer = torch.optim.SGD([weight], lr=0.1)
    weight.grad = torch.ones_like(weight)
    held = []
    with CheckpointManager(tmp_path / "best") as best:
        device.hold_copies(True)
        for store in (manager, best):
            state = {"w": weight, "lr": 1}
            store.save_async(state, step=1, consistency="overlap", optimizer=optimizer)
        optimizer.register_step_pre_hook(lambda *_: held.append("another hook"))

        def wait(ordinals):
            held.append(list(ordinals))
            device.hold_copies(False)
            for store in (manager, best):
                assert store._opened.saver.last._native.wait_captured(30)
            return [(0, 0)]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gpus, "current_streams", wait)
            optimizer.step()
        assert held == [[0], [0], "another hook"]
        for store in (manager, best):
            store.wait_until_finished()
            assert torch.equal(store.load()["w"], before)


def test_a_step_that_could_not_wait_waits_when_retried(device, manager):
    weight = device.tensor(noise(1, 1_000)).requires_grad_()
    optimizer = torch.optim.SGD([weight], lr=0.1)
    weight.grad = torch.ones_like(weight)
    manager.save_async({"w": weight}, step=1, consistency="overlap", optimizer=optimizer)
    asked = []

    def interrupted(ordinals):
        asked.append(list(ordinals))
        if len(asked) == 1:
            raise KeyboardInterrupt
        return [(0, 0)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpus, "current_streams", interrupted)
        with pytest.raises(KeyboardInterrupt):
            optimizer.step()
        optimizer.step()
        optimizer.step()
    assert asked == [[0], [0]]


def test_an_optimizer_that_never_steps_keeps_no_saves(device, manager):
    weight = device.tensor(noise(1, 1_000)).requires_grad_()
    optimizer = torch.optim.SGD([weight], lr=0.1)
    for step in range(1, 6):
        manager.save({"w": weight}, step=step, consistency="overlap", optimizer=optimizer)
    assert len(gpus._gate_of(optimizer).pending) == 1


class Interrupted:
    """A native manager whose `save` succeeds, but a signal interrupts its return."""

    def __init__(self, native) -> None:
        self._native = native

    def __getattr__(self, name: str):
        return getattr(self._native, name)

    def save(self, *arguments):
        self._native.save(*arguments)
        raise KeyboardInterrupt


@pytest.mark.parametrize("where", ["save", "watch"])
def test_an_interrupted_save_leaves_no_checkpoint(device, manager, monkeypatch, where):
    weight = device.tensor(noise(1, 100_000)).requires_grad_()
    optimizer = torch.optim.SGD([weight], lr=0.1)

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if where == "watch":
            patch.setattr(manager._opened.watcher, "watch", interrupted)
        else:
            patch.setattr(manager._opened.saver, "_native", Interrupted(manager._opened.native))
        with pytest.raises(KeyboardInterrupt):
            manager.save_async({"w": weight}, step=1, consistency="overlap", optimizer=optimizer)
    # Its caller knows: no error is left to report, and the step can be saved.
    assert manager.should_save(1)
    assert manager.wait_until_finished()
    assert manager.all_steps() == []
    manager.save({"w": weight}, step=1)


@pytest.mark.parametrize("which", ["the same manager", "another manager"])
def test_a_restore_waits_for_saves_that_still_copy(device, manager, tmp_path, which):
    old, new = noise(1, 100_000), noise(2, 100_000)
    weight = device.tensor(old).requires_grad_()
    optimizer = torch.optim.SGD([weight], lr=0.1)
    with CheckpointManager(tmp_path / "other") as other:
        restoring = manager if which == "the same manager" else other
        restoring.save({"w": weight}, step=1)
        with torch.no_grad():
            weight.copy_(new)
        device.hold_copies(True)
        handle = manager.save_async({"w": weight}, 2, consistency="overlap", optimizer=optimizer)
        waited = []

        def wait(ordinals):
            waited.append(list(ordinals))
            device.hold_copies(False)
            assert handle._native.wait_captured(30)
            return [(ordinal, 0) for ordinal in ordinals]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gpus, "current_streams", lambda some: wait(some) if some else [])
            restoring.restore({"w": weight}, step=1)
        device.hold_copies(False)
        assert waited == [[0]]
    assert torch.equal(weight, old)
    handle.result()
    assert torch.equal(manager.load(step=2)["w"], new)
    handle.staged.result(10)
    assert not _copying, "a save that has copied is forgotten"


def test_memory_that_an_optimizer_fills_in_part_is_cloned(device, manager):
    flat = device.tensor(noise(1, 1_000))
    weight, buffer = flat[:600].requires_grad_(), flat[600:]
    optimizer = torch.optim.SGD([weight], lr=0.1)
    clones = device.calls("cuMemAllocAsync")
    state = {"w": weight, "b": buffer}
    manager.save(state, step=1, consistency="overlap", optimizer=optimizer)
    assert device.calls("cuMemAllocAsync") == clones + 1
    other = torch.optim.SGD([weight, buffer.requires_grad_()], lr=0.1)
    manager.save(state, step=2, consistency="overlap", optimizer=other)
    assert device.calls("cuMemAllocAsync") == clones + 1, "the optimizer fills all of it"


def test_a_frozen_parameter_is_cloned_though_an_optimizer_lists_it(device, manager):
    # Like the key encoder of a momentum contrast: forward itself updates it, as an average.
    before, after = noise(1, 100_000), noise(2, 100_000)
    query = device.tensor(noise(3, 1_000)).requires_grad_()
    key = device.tensor(before)
    optimizer = torch.optim.SGD([query, key], lr=0.1)
    device.hold_copies(True)
    state = {"query": query, "key": key}
    handle = manager.save_async(state, step=1, consistency="overlap", optimizer=optimizer)
    device.write(key, after)
    device.settle()  # what may run during the copies has run
    device.hold_copies(False)
    handle.result()
    device.settle()
    assert torch.equal(key, after)
    assert torch.equal(manager.load()["key"], before)


def test_an_embedding_that_forward_renormalizes_is_cloned(device, manager):
    before, after = noise(1, 100, 100), noise(2, 100, 100)
    model = torch.nn.ModuleDict(
        {
            name: torch.nn.Embedding(100, 100, max_norm=norm)
            for name, norm in (("a", 1), ("b", None))
        }
    )
    for part in model.values():
        part.weight = torch.nn.Parameter(device.tensor(before))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    clones = device.calls("cuMemAllocAsync")
    device.hold_copies(True)
    handle = manager.save_async(
        {"model": model}, step=1, consistency="overlap", optimizer=optimizer
    )
    assert device.calls("cuMemAllocAsync") == clones + 1, "of the two, only that one"
    device.write(model["a"].weight.data, after)
    device.settle()  # what may run beside the copies has run
    device.hold_copies(False)
    handle.result()
    device.settle()
    loaded = manager.load()["model"]
    assert torch.equal(loaded["a.weight"], before)
    assert torch.equal(loaded["b.weight"], before)


def test_a_parameter_in_another_order_of_dimensions_is_not_cloned(device, manager):
    memory = device.tensor(noise(1, 2, 5, 7, 3))
    weight = memory.permute(0, 3, 1, 2)
    assert weight.is_contiguous(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD([weight.requires_grad_()], lr=0.1)
    clones = device.calls("cuMemAllocAsync")
    manager.save({"w": weight}, step=1, consistency="overlap", optimizer=optimizer)
    assert device.calls("cuMemAllocAsync") == clones
    assert torch.equal(manager.load()["w"], weight)


@pytest.mark.parametrize(
    ("shape", "strides", "is_dense"),
    [
        ((), (), True),
        ((2, 3), (3, 1), True),
        ((2, 3), (1, 2), True),
        ((2, 1, 3), (3, 77, 1), True),
        ((2, 3), (4, 1), False),
        ((2, 3), (0, 1), False),
        ((3, 3), (1, 1), False),
    ],
)
def test_contiguous_parts_are_recognized(shape, strides, is_dense):
    assert gpus._is_dense(torch.zeros(99).as_strided(shape, strides)) == is_dense


def test_a_save_does_not_wait_for_the_copies_of_another_manager(device, manager, tmp_path):
    first, second = (device.tensor(noise(n, 100_000)).requires_grad_() for n in (1, 2))
    optimizers = [torch.optim.SGD([one], lr=0.1) for one in (first, second)]
    elsewhere, after = device.tensor(noise(3, 100)), noise(4, 100)
    with CheckpointManager(tmp_path / "other") as other:
        device.hold_copies(True)
        manager.save_async({"w": first}, 1, consistency="overlap", optimizer=optimizers[0])
        other.save_async({"w": second}, 1, consistency="overlap", optimizer=optimizers[1])
        device.write(elsewhere, after)  # what the training does next
        device.settle()
        went_on = torch.equal(elsewhere, after)
        device.hold_copies(False)
    assert went_on, "nothing was cloned, so nothing is to be waited for"


def test_clones_leave_memory_to_training(device, manager, caplog):
    gpus._warn_once.cache_clear()
    small, large = device.tensor(noise(1, 1_000)), device.tensor(torch.ones(125 << 20))
    with caplog.at_level(logging.WARNING, "dtruntime"):
        handle = manager.save_async({"w": small}, step=1, consistency="device-snapshot")
        handle.result()
        assert not caplog.text
        # Another 500 of the 1,024 MiB would fit, and leave less than the 32 MiB that stay free.
        handle = manager.save_async({"w": large}, step=2, consistency="device-snapshot")
        assert "saves are strict: cloning tensors on `cuda:0`" in caplog.text
        assert handle.staged.done()
        handle.result()
        # 24 MiB are free by now, and what takes a few kilobytes of them harms nobody.
        device.tensor(torch.ones(125 << 20))
        caplog.clear()
        device.hold_copies(True)
        handle = manager.save_async({"w": small}, step=3, consistency="device-snapshot")
        assert not handle.staged.done()
        device.hold_copies(False)
        handle.result()
        assert not caplog.text


def test_a_gpu_without_room_for_clones_saves_strictly(device, manager, caplog):
    gpus._warn_once.cache_clear()
    before = noise(1, 100_000)
    weight = device.tensor(before)
    device.fail("cuMemAllocAsync", 1, 2)
    with caplog.at_level(logging.WARNING, "dtruntime"):
        handle = manager.save_async({"w": weight}, step=1, consistency="device-snapshot")
    assert handle.staged.done()
    assert "saves are strict: cloning a tensor on the GPU" in caplog.text
    handle.result()
    assert torch.equal(manager.load()["w"], before)


def test_prewarmed_memory_is_pinned(device, manager):
    state = {"w": device.tensor(noise(1, 1_000_000))}
    registered, fetched = device.calls("cuMemHostRegister_v2"), device.pages_fetched()
    manager._opened.native.prewarm(4_000_000, [(0, 0)])
    assert device.calls("cuMemHostRegister_v2") == registered + 1
    assert device.pages_fetched() == fetched, "all workers had fetched them before"
    manager.save(state, step=1)
    assert device.calls("cuMemHostRegister_v2") == registered + 1, "once for the arena"


def test_memory_of_a_gpu_is_filled(device, manager):
    values = noise(3, 400_000)
    manager.save({"w": values, "v": values[:7]}, step=1)
    checkpoint = manager._opened.native.checkpoint(1)
    target = device.tensor(torch.zeros(400_000))
    place = (0, target.data_ptr(), 1_600_000)
    device.write(target, torch.ones(400_000))  # earlier work of the stream comes first
    checkpoint.read([(0, 0, place)], True, [(0, 0)])
    device.settle()
    assert torch.equal(target, values)


def test_an_object_that_only_resembles_an_optimizer_is_refused(device, manager):
    class Wrapper(torch.optim.SGD):
        def __init__(self, inner):
            self.state, self.param_groups = inner.state, inner.param_groups

    weight = device.tensor(noise(1, 100_000)).requires_grad_()
    wrapper = Wrapper(torch.optim.SGD([weight], lr=0.1))
    with pytest.raises(InvalidArgument, match="cannot be made to wait"):
        manager.save_async({"w": weight}, step=1, consistency="overlap", optimizer=wrapper)
    assert manager.all_steps() == []


class OnGpu(torch.nn.Parameter):
    """A parameter that claims to be on the second GPU."""

    is_cuda = property(lambda _: True)
    device = property(lambda _: torch.device("cuda:1"))


def test_an_optimizer_s_tensors_are_read_to_where_its_parameters_are(manager):
    model = torch.nn.Linear(8, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 8)).sum().backward()
    optimizer.step()
    manager.save({"optimizer": optimizer}, step=1)
    live = torch.optim.AdamW([torch.nn.Parameter(torch.ones(4, 8)), OnGpu(torch.ones(4))])
    reader = Reader(manager._opened.native.checkpoint(1))
    (action,) = plan_restore({"optimizer": live}, reader, strict=True).actions
    paths = reader.checkpoint.paths()
    named = {paths[n]: reader.tree.nodes[n][1] for n in range(len(paths)) if "exp_avg" in paths[n]}
    expected = {f"optimizer.state.1.{name}" for name in ("exp_avg", "exp_avg_sq")}
    assert action.devices == {named[path]: torch.device("cuda:1") for path in expected}


@pytest.mark.usefixtures("device")
def test_a_record_of_a_gpu_is_checked(manager):
    for pieces in ([(1, 5, 0)], [(1, 5, 0), (6, 5, 4)]):
        storages = [StorageRecord(0, 10, (0, pieces, False))]
        with pytest.raises(Exception, match="its pieces"):
            manager._opened.native.prepare(storages, [(0, 0)], False)


@pytest.mark.usefixtures("device")
def test_a_missing_gpu_is_named(manager):
    storages = [StorageRecord(0, 10, (5, [(1, 10, 0)], False))]
    with pytest.raises(AcceleratorError, match="opening `cuda:5`") as caught:
        manager._opened.native.prepare(storages, [], False)
    assert "CUDA_VISIBLE_DEVICES" in caught.value.hint


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"consistency": "lazy"}, "expected one of"),
        ({"consistency": "overlap"}, "the next step of every optimizer"),
        ({"consistency": "overlap", "optimizer": []}, "the next step of every optimizer"),
    ],
)
def test_an_impossible_mode_is_refused(manager, arguments, why):
    with pytest.raises(InvalidArgument, match=why):
        manager.save_async({"epoch": 1}, step=1, **arguments)
    assert manager.all_steps() == []


def test_a_captured_optimizer_is_saved_strictly(manager, caplog):
    gpus._warn_once.cache_clear()
    optimizer = torch.optim.AdamW([torch.ones(3, requires_grad=True)], capturable=True)
    with caplog.at_level(logging.WARNING, "dtruntime"):
        manager.save({"o": optimizer}, step=1, consistency="overlap", optimizer=optimizer)
    assert "`capturable`" in caplog.text


@pytest.mark.usefixtures("manager")
def test_every_step_is_watched_from_the_first_manager_on(monkeypatch):
    optimizer = torch.optim.SGD([torch.ones(3, requires_grad=True)], lr=0.1)
    optimizer.step()
    assert optimizer not in gpus._captured
    monkeypatch.setattr(gpus, "is_capturing", lambda: True)
    optimizer.step()
    assert optimizer in gpus._captured


def test_an_optimizer_whose_step_was_captured_is_saved_strictly(
    device, manager, monkeypatch, caplog
):
    gpus._warn_once.cache_clear()
    weight = device.tensor(noise(1, 1_000)).requires_grad_()
    other = device.tensor(noise(2, 1_000)).requires_grad_()
    captured, eager = (torch.optim.SGD([one], lr=0.1) for one in (weight, other))
    with monkeypatch.context() as patch:
        patch.setattr(gpus, "is_capturing", lambda: True)
        captured.step()
    state = {"w": weight, "o": other}
    for step, optimizer in enumerate((eager, [eager, captured], captured), 1):
        with caplog.at_level(logging.WARNING, "dtruntime"):
            handle = manager.save_async(state, step, consistency="overlap", optimizer=optimizer)
        assert (handle._background_copy is None) == (optimizer is not eager)
    assert caplog.text.count("captured into a CUDA graph") == 1


def test_a_step_that_is_captured_waits_here_for_a_save_before_it(device, manager, monkeypatch):
    before = noise(1, 100_000)
    weight = device.tensor(before).requires_grad_()
    optimizer = torch.optim.SGD([weight], lr=0.1)
    device.hold_copies(True)
    handle = manager.save_async({"w": weight}, step=1, consistency="overlap", optimizer=optimizer)

    def wait() -> bool:
        device.hold_copies(False)
        return handle._native.wait_captured()

    (hold,) = gpus._gate_of(optimizer).pending
    hold.native = SimpleNamespace(wait_captured=wait)  # and nothing that was scheduled on a stream
    monkeypatch.setattr(gpus, "is_capturing", lambda: True)
    optimizer.step()
    assert handle._native.wait_captured(0), "everything was copied when the step is captured"
    device.write(weight, noise(2, 100_000))  # like a replay, without a hook
    handle.result()
    device.settle()
    assert torch.equal(manager.load()["w"], before)


def test_without_a_driver_torch_copies():
    script = """
import logging
logging.basicConfig()
from dtruntime.state import gpus
print(gpus.are_usable())
"""
    ran = subprocess.run(
        [sys.executable, "-c", script],
        env=script_environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    if ran.stdout == "True\n":
        pytest.skip("this machine has a GPU")
    assert ran.stdout == "False\n"
    assert "tensors on GPUs are copied by torch" in ran.stderr
    assert "looking for GPUs: starting the CUDA driver" in ran.stderr


def test_amd_gpus_are_not_of_nvidias_driver(device, monkeypatch, caplog):
    assert device.calls("cuInit") >= 0, "there is a driver"
    gpus.are_usable.cache_clear()
    monkeypatch.setattr(torch.version, "hip", "6.4")
    with caplog.at_level(logging.WARNING, "dtruntime"):
        assert not gpus.are_usable()
    assert "built for AMD's GPUs" in caplog.text
    gpus.are_usable.cache_clear()


class FullGpu:
    """A stand-in for torch: a GPU without memory, and the host."""

    def __init__(self) -> None:
        self.asked: list[object] = []

    def UntypedStorage(self, count: int, device: object = None):  # noqa: N802  (torch's name)
        self.asked.append(device)
        if device is not None:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return torch.UntypedStorage(count)

    def __getattr__(self, name: str):
        return getattr(torch, name)


@pytest.mark.parametrize("is_usable", [True, False])
def test_a_load_to_a_gpu_without_room_is_refused(manager, monkeypatch, is_usable):
    manager.save({"w": noise(1, 1_000)}, step=1)
    full, place = FullGpu(), torch.device("cuda:0")
    monkeypatch.setattr("dtruntime.loading.reader.import_torch", lambda _: full)
    monkeypatch.setattr(gpus, "are_usable", lambda: is_usable)
    reader = Reader(manager._opened.native.checkpoint(1), device=place)
    with pytest.raises(AcceleratorError, match=r"cuda:0.*no memory for 4000 more bytes") as caught:
        reader.load()
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)
    assert full.asked == ([place] if is_usable else [None, place])


def test_a_restore_for_a_gpu_without_room_goes_through_the_host(manager, monkeypatch):
    manager.save({"w": noise(1, 1_000)}, step=1)
    full, place = FullGpu(), torch.device("cuda:0")
    monkeypatch.setattr("dtruntime.loading.reader.import_torch", lambda _: full)
    monkeypatch.setattr(gpus, "are_usable", lambda: True)
    loaded = Reader(manager._opened.native.checkpoint(1)).tensors([0], {0: place})
    assert full.asked == [place, None]
    assert torch.equal(loaded[0], noise(1, 1_000))


LOST = "DTR_TEST_LOSES_THE_GPU"


def test_a_lost_gpu_fails_the_save_and_the_host_continues(device, manager):
    if LOST not in os.environ:  # nothing on the device succeeds any more in a process that lost it
        name = "test_a_lost_gpu_fails_the_save_and_the_host_continues"
        ran = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-k", name, __file__],
            env=script_environment() | {LOST: "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert ran.returncode == 0, ran.stdout
        return
    state = {"w": device.tensor(noise(1, 1_000_000)), "host": noise(2, 10)}
    manager.save(state, step=1)
    device.lose(700)
    for mode in ("strict", "device-snapshot"):
        with pytest.raises(AcceleratorError, match="dmesg"):
            manager.save(state, step=2, consistency=mode)
    manager.save({"host": noise(2, 10)}, step=2)
    assert manager.all_steps() == [1, 2]
    assert torch.equal(manager.load(step=1)["w"], noise(1, 1_000_000))


def test_the_figures_for_a_real_gpu_are_measured_without_one():
    script = Path(__file__).parents[2] / "benches/compare/gpu.py"
    ran = subprocess.run(
        [sys.executable, script, "--device", "cpu", "--gigabytes", "0.002", "--rounds", "1"],
        env=script_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    bounds = [line for line in ran.stdout.splitlines() if line.endswith(("  met", "  NOT MET"))]
    assert len(bounds) in (7, 8), "one has none where dcp happened to slow nothing: " + ran.stdout


def test_the_script_for_a_real_gpu_runs_without_one():
    script = Path(__file__).parents[1] / "gpu" / "check.py"
    ran = subprocess.run(
        [sys.executable, script, "--device", "cpu", "--quick"],
        env=script_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.count("passed") == 9, ran.stdout
    assert ran.stdout.endswith("done, 5 skipped\n"), ran.stdout
