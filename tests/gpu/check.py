"""Try the package on a real GPU, in one command that needs only PyTorch and the package.

    make test-gpu                             # here
    python tests/gpu/check.py                 # anywhere, after `pip install dtruntime-...whl`
    python tests/gpu/check.py --device cpu    # the same script where there is no GPU

Every check says what it tried and how often; the first one that fails ends the script with 1. What
cannot be tried says why, and is counted.

Always holds: where order counts, the GPU is given work that keeps it busy for a tenth of a second
first. So a copy that does not wait for earlier work, or an update that does not wait for a copy,
shows as wrong bytes. A check in which the package fell back to less (strict saves, memory that is
not pinned) fails: it has not tried what it says.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dtruntime import CheckpointManager, InvalidArgument
from dtruntime.state import gpus

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

DTYPES = [
    "bool", "uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64",
    "complex64", "complex128", "float8_e4m3fn", "float8_e5m2", "uint16", "uint32", "uint64",
    "complex32", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu", "float4_e2m1fn_x2",
]  # fmt: skip
"""By name: older PyTorch has not all of them."""

BUSY_CYCLES = 200_000_000
SANITIZER_SECONDS = 240
UNCACHED = "PYTORCH_NO_CUDA_MEMORY_CACHING"


class Warnings(logging.Handler):
    """Collects what the package warns of: each time it did less than it was asked for.

    Python's part logs to `logging`, the engine to standard error, which is passed on.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(logging.WARNING)
        self._seen: list[str] = []
        self._stderr = os.dup(2)
        with (folder / "stderr").open("ab") as written:
            os.dup2(written.fileno(), 2)
        self._log = (folder / "stderr").open("rb")

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the text."""
        self._seen.append(record.getMessage())

    def take(self) -> list[str]:
        """Give what was collected since the last time."""
        seen, self._seen = self._seen, []
        text = self._log.read()
        os.write(self._stderr, text)
        return seen + [line for line in text.decode().splitlines() if "WARN" in line]

    def close(self) -> None:
        """Let standard error be what it was."""
        os.dup2(self._stderr, 2)
        self._log.close()
        super().close()


class Checks:
    """What was tried, and what could not be."""

    def __init__(self, device: torch.device, folder: Path, scale: int) -> None:
        self.device = device
        self.folder = folder
        self.scale = scale
        self.skipped: list[str] = []

    @property
    def is_timely(self) -> bool:
        """Whether this is a GPU that computes while the host goes on, at its usual speed."""
        return self.device.type == "cuda" and UNCACHED not in os.environ

    def manager(self, name: str, **settings: Any) -> CheckpointManager:
        """Open a separate store."""
        return CheckpointManager(self.folder / name, keep_last_n=2, **settings)

    def skip(self, what: str, why: str) -> None:
        """Record something that cannot be tried."""
        self.skipped.append(what)
        print(f"skipped  {what}: {why}")

    def noise(self, seed: int, count: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return random bits, the same for the same seed."""
        generator = torch.Generator().manual_seed(seed)
        raw = torch.randint(0, 256, (count * dtype.itemsize,), generator=generator)
        if dtype is torch.bool:
            raw %= 2
        # Moved as plain bytes: not every dtype has a kernel that copies it.
        return raw.to(torch.uint8).to(self.device).view(dtype)

    def keep_busy(self) -> None:
        """Give the current stream work for a tenth of a second."""
        if self.device.type == "cuda":
            torch.cuda._sleep(BUSY_CYCLES)  # noqa: SLF001  (there is no other way to wait there)

    def settle(self) -> None:
        """Wait until the GPU has done everything."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def in_streams(self) -> Iterator[str]:
        """Yield the default stream and another one, each as the current one."""
        yield "the default stream"
        if self.device.type == "cuda":
            stream = torch.cuda.Stream(self.device)
            with torch.cuda.stream(stream):
                yield "a side stream"


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether two tensors are the same bit by bit, wherever they are."""
    first, second = (
        tensor.detach().contiguous().view(-1).view(torch.uint8).cpu() for tensor in (one, other)
    )
    return one.dtype == other.dtype and torch.equal(first, second)


def scrambled_like(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor of the same dtype and strides with other values."""
    made = torch.empty_strided(
        tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device
    )
    memory = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    memory.set_(made.untyped_storage()).fill_(0x5A)
    return made


def chosen_for(mode: str, optimizer: object) -> dict[str, Any]:
    """Return what `save_async` takes for a mode."""
    return {"consistency": mode} | ({"optimizer": optimizer} if mode == "overlap" else {})


def every_dtype_comes_back(checks: Checks) -> str:
    """Save tensors of every dtype, views and tied ones; load them to the host and to the device."""
    count = 0
    state: dict[str, torch.Tensor] = {}
    names = [name for name in DTYPES if hasattr(torch, name)]
    for seed, name in enumerate(names):
        for size in (0, 1, 1_000, 1_000_003 // checks.scale):
            state[f"{name}-{size}"] = checks.noise(seed, size, getattr(torch, name))
    matrix = checks.noise(99, 60_000).view(200, 300)
    state |= {"matrix": matrix, "view": matrix[3:50, ::7], "transposed": matrix.t()}
    for mode in ("strict", "device-snapshot"):
        with checks.manager(f"dtypes-{mode}", consistency=mode) as manager:
            manager.save(state, step=1)
            for place in (None, checks.device):
                loaded = manager.load(map_location=place)
                for name, tensor in state.items():
                    assert same_bits(loaded[name], tensor), (mode, name)
                    assert place is None or loaded[name].device.type == checks.device.type
                    count += 1
                tied = {loaded[n].untyped_storage().data_ptr() for n in ("matrix", "transposed")}
                assert len(tied) == 1, "tensors that shared memory share it"
            for direct in (False, True):
                live = {name: scrambled_like(tensor) for name, tensor in state.items()}
                manager.restore(live, direct=direct)
                for name, tensor in state.items():
                    assert same_bits(live[name], tensor), (mode, name, direct)
                count += len(state)
    lacking = ", ".join(name for name in DTYPES if name not in names)
    return f"{count} tensors" + (f"; this PyTorch has no {lacking}" if lacking else "")


def later_changes_are_not_saved(checks: Checks) -> str:
    """Change every tensor right after the save has returned, in each mode."""
    count = 0
    for mode in gpus.MODES:
        with checks.manager(f"next-{mode}") as manager:
            for step in range(1, 21):
                weight = (
                    checks.noise(step, 8_000_000 // checks.scale).nan_to_num(0).requires_grad_()
                )
                buffer = checks.noise(step + 100, 2_000_000 // checks.scale)
                optimizer = torch.optim.SGD([weight], lr=1.0)
                weight.grad = torch.ones_like(weight)
                expected = weight.detach().clone(), buffer.clone()
                state = {"w": weight, "b": buffer}
                checks.keep_busy()
                handle = manager.save_async(state, step, **chosen_for(mode, optimizer))
                # The first save pins memory, which takes longer than the GPU is busy.
                if mode != "strict" and step > 1 and checks.is_timely:
                    assert not handle.staged.done(), f"a save in mode {mode} waited for its copies"
                optimizer.step()
                buffer.fill_(0)
                handle.result()
                loaded = manager.load()
                assert same_bits(loaded["w"], expected[0]), (mode, step)
                assert same_bits(loaded["b"], expected[1]), (mode, step)
                count += 1
    return f"{count} saves"


def earlier_changes_are_saved(checks: Checks) -> str:
    """Save while the GPU has not yet done what it was given; change it again right after."""
    count = 0
    for mode in gpus.MODES:
        weight = torch.zeros(8_000_000 // checks.scale, device=checks.device, requires_grad=True)
        optimizer = torch.optim.SGD([weight], lr=1.0)
        with checks.manager(f"before-{mode}") as manager, torch.no_grad():
            weight.add_(1).zero_()  # a kernel's first launch may wait for everything before it
            manager.save({"w": weight}, step=1)  # pinning memory now would wait for the GPU
            for step, where in enumerate(checks.in_streams(), 2):
                weight.zero_()
                checks.settle()
                checks.keep_busy()
                weight.add_(1)
                handle = manager.save_async({"w": weight}, step, **chosen_for(mode, optimizer))
                handle.before_update()
                weight.add_(1)
                handle.result()
                loaded = manager.load()["w"]
                assert torch.equal(loaded, torch.ones_like(loaded)), (mode, where, loaded)
                checks.settle()
                assert torch.equal(weight - 1, torch.ones_like(weight)), (mode, where)
                count += 1
    return f"{count} saves"


def every_optimizer_waits(checks: Checks) -> str:
    """Step with optimizers of each kind right after an overlapped save."""
    kinds: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
        "sgd": lambda tensors: torch.optim.SGD(tensors, lr=1.0),
        "foreach": lambda tensors: torch.optim.AdamW(tensors, lr=1.0, foreach=True),
        "fused": lambda tensors: torch.optim.AdamW(tensors, lr=1.0, fused=True),
    }
    for name, make in kinds.items():
        weight = checks.noise(1, 8_000_000 // checks.scale).nan_to_num(0).requires_grad_()
        weight.grad = torch.ones_like(weight)
        optimizer = make([weight])
        with checks.manager(f"optimizer-{name}") as manager:
            for step in range(1, 6):
                optimizer.step()
                moments = optimizer.state[weight]
                held = {key: value for key, value in moments.items() if torch.is_tensor(value)}
                expected = {key: value.clone() for key, value in held.items()}
                expected["w"] = weight.detach().clone()
                checks.keep_busy()
                state = {"w": weight} | held
                handle = manager.save_async(state, step, **chosen_for("overlap", optimizer))
                optimizer.step()
                handle.result()
                loaded = manager.load()
                for key, value in expected.items():
                    assert same_bits(loaded[key], value), (name, step, key)
    return f"5 saves with each of {', '.join(kinds)}"


def a_frozen_average_may_change(checks: Checks) -> str:
    """Change a parameter that an optimizer lists and does not update, as a key encoder is."""
    query = checks.noise(1, 1_000).nan_to_num(0).requires_grad_()
    key = checks.noise(2, 8_000_000 // checks.scale)
    optimizer = torch.optim.SGD([query, key], lr=0.1)
    with checks.manager("frozen") as manager:
        for step in range(1, 6):
            expected, after = key.clone(), checks.noise(2 + step, key.numel())
            checks.keep_busy()
            state = {"q": query, "k": key}
            handle = manager.save_async(state, step, **chosen_for("overlap", optimizer))
            key.copy_(after)
            handle.result()
            assert same_bits(manager.load()["k"], expected), step
    return "5 saves"


def a_state_larger_than_the_staging_memory_is_saved(checks: Checks) -> str:
    """Save through staging memory of an eighth of the state, and change it right after."""
    chunk = 1 << 16
    for mode in gpus.MODES:
        weight = checks.noise(1, 8_000_000 // checks.scale).nan_to_num(0).requires_grad_()
        weight.grad = torch.ones_like(weight)
        optimizer = torch.optim.SGD([weight], lr=1.0)
        size = weight.nbytes // 8 // chunk * chunk
        settings: dict[str, Any] = {"staging_bytes": max(size, 4 * chunk), "chunk_bytes": chunk}
        with checks.manager(f"small-{mode}", **settings) as manager:
            for step in range(1, 4):
                expected = weight.detach().clone()
                checks.keep_busy()
                handle = manager.save_async({"w": weight}, step, **chosen_for(mode, optimizer))
                optimizer.step()
                assert handle.result().stats.streamed
                assert same_bits(manager.load()["w"], expected), (mode, step)
    return f"3 saves in each of {len(gpus.MODES)} modes"


def two_gpus_are_saved(checks: Checks) -> str:
    """Save a state on two GPUs, and load it to either."""
    found = torch.cuda.device_count() if checks.device.type == "cuda" else 0
    if found <= 1:
        checks.skip("two_gpus_are_saved", "there is one GPU" if found else "there is no GPU")
        return ""
    places = {"a": torch.device("cuda:0"), "b": torch.device("cuda:1")}
    for mode in gpus.MODES:
        values = {
            name: checks.noise(seed, 8_000_000 // checks.scale).nan_to_num(0)
            for seed, name in enumerate(places)
        }
        live = {n: values[n].to(place, copy=True) for n, place in places.items()}
        optimizer = torch.optim.SGD([one.requires_grad_() for one in live.values()], lr=1.0)
        for weight in live.values():
            weight.grad = torch.ones_like(weight)
        with checks.manager(f"two-{mode}") as manager:
            for place in places.values():
                with torch.cuda.device(place):
                    checks.keep_busy()
            handle = manager.save_async(live, 1, **chosen_for(mode, optimizer))
            optimizer.step()
            handle.result()
            for target in (None, *places.values()):
                loaded = manager.load(map_location=target)
                assert all(same_bits(loaded[n], values[n]) for n in places), (mode, target)
    return f"{len(gpus.MODES)} saves"


def train(
    checks: Checks, steps: int, save: Callable[[int, dict[str, Any], Any], object]
) -> list[float]:
    """Train a small net; return the losses."""
    torch.manual_seed(1)
    width = 512 // min(checks.scale, 4)
    layers = [torch.nn.Linear(width, width), torch.nn.BatchNorm1d(width), torch.nn.ReLU()]
    model = torch.nn.Sequential(*layers, torch.nn.Linear(width, 1)).to(checks.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    state = {"model": model, "optimizer": optimizer}
    losses = []
    for step in range(1, steps + 1):
        generator = torch.Generator().manual_seed(step)
        batch = torch.randn(64, width, generator=generator).to(checks.device)
        loss = model(batch).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())  # asked for at the end: that would leave the GPU idle
        save(step, state, optimizer)
    return [loss.item() for loss in losses]


def training_is_unaffected(checks: Checks) -> str:
    """Train with a save after each step, in each mode; the losses are those of a run without."""
    steps = 100 // min(checks.scale, 10)
    expected = train(checks, steps, lambda *_: None)
    for mode in gpus.MODES:
        with checks.manager(f"train-{mode}", consistency=mode) as manager:

            def save(step: int, state: dict[str, Any], optimizer: object) -> None:
                manager.save_async(state, step, **chosen_for(mode, optimizer))  # noqa: B023

            assert train(checks, steps, save) == expected, mode
            manager.wait_until_finished()
            assert manager.latest_step() == steps
            assert manager.verify().ok
    return f"{steps} saves in each of {len(gpus.MODES)} modes"


def a_training_is_restored(checks: Checks) -> str:
    """Restore weights and optimizer in place; training then continues as it did the first time."""
    weight = checks.noise(1, 8_000_000 // checks.scale).nan_to_num(0).requires_grad_()
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    state = {"w": weight, "optimizer": optimizer}

    def go_on() -> list[torch.Tensor]:
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        moments = optimizer.state[weight]
        return [weight.detach().clone(), *(moments[name].clone() for name in sorted(moments))]

    with checks.manager("back") as manager:
        go_on()
        manager.save(state, step=1)
        expected = go_on()
        for _ in range(3):
            go_on()
            manager.restore(state, step=1)
            places = {name: one.device.type for name, one in optimizer.state[weight].items()}
            kind = checks.device.type
            assert places == {"step": "cpu", "exp_avg": kind, "exp_avg_sq": kind}, places
            assert all(same_bits(*pair) for pair in zip(go_on(), expected, strict=True))
    return "3 restores"


def memory_stays_flat(checks: Checks) -> str:
    """Save and load again and again; nothing is kept on the device."""
    if checks.device.type != "cuda":
        checks.skip("memory_stays_flat", "there is no GPU")
        return ""
    state = {"w": checks.noise(1, 8_000_000 // checks.scale)}
    used = []
    with checks.manager("flat", consistency="device-snapshot") as manager:
        for step in range(1, 51):
            manager.save_async(state, step=step).result()
            del manager.load(map_location=checks.device)["w"]
            gc.collect()
            torch.cuda.empty_cache()
            checks.settle()  # the driver keeps memory that was freed until then
            free, total = torch.cuda.mem_get_info(checks.device)
            used.append(total - free)
    # Forty times the state, 32 MB, if each save or load kept it.
    assert max(used[10:]) <= max(used[:10]) + (64 << 20), used
    return f"50 saves and loads, {used[-1] >> 20} MiB used at the end"


def graphs_are_refused(checks: Checks) -> str:
    """Save while a CUDA graph is captured: refused, and the capture continues."""
    if checks.device.type != "cuda":
        checks.skip("graphs_are_refused", "there is no GPU")
        return ""
    weight = checks.noise(1, 1000)
    with checks.manager("graph") as manager:
        manager.save({"w": weight}, step=1)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            weight.add_(1)
            try:
                manager.save({"w": weight}, step=2)
            except Exception as error:  # noqa: BLE001  (whatever it is, its text is looked at)
                assert "graph" in str(error), error
            else:
                raise AssertionError("a save inside a capture was let through")
        graph.replay()
        manager.save({"w": weight}, step=2)
        assert manager.all_steps() == [1, 2]
    return "1 capture"


def a_captured_step_is_handled(checks: Checks) -> str:
    """Capture a step while a save copies, and replay it: no hook runs then."""
    if checks.device.type != "cuda":
        checks.skip("a_captured_step_is_handled", "there is no GPU")
        return ""
    weight = checks.noise(1, 8_000_000 // checks.scale).nan_to_num(0).requires_grad_()
    optimizer = torch.optim.SGD([weight], lr=1.0)
    weight.grad = torch.ones_like(weight)
    with checks.manager("captured") as manager:
        optimizer.step()
        for step in range(1, 4):
            expected = weight.detach().clone()
            handle = manager.save_async({"w": weight}, step, **chosen_for("overlap", optimizer))
            assert handle.staged.done() or step == 1, "once it was captured, saves are strict"
            if step == 1:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    optimizer.step()
            graph.replay()
            handle.result()
            assert same_bits(manager.load()["w"], expected), step
            checks.settle()
            assert same_bits(weight, expected - 1), step
    return "3 replays"


def bad_calls_are_explained(checks: Checks) -> str:
    """Request what is impossible."""
    weight = checks.noise(1, 10).requires_grad_()
    with checks.manager("calls") as manager:
        calls: list[dict[str, Any]] = [{"consistency": "lazy"}, {"consistency": "overlap"}]
        for wrong in calls:
            try:
                manager.save({"w": weight}, step=1, **wrong)
            except InvalidArgument as error:
                assert error.hint
            else:
                raise AssertionError(f"{wrong} was let through")
    return "2 calls"


def the_sanitizer_finds_no_error(checks: Checks) -> str:
    """Run a small part of this again under NVIDIA's compute-sanitizer."""
    tool = shutil.which("compute-sanitizer")
    if checks.device.type != "cuda" or tool is None:
        why = "there is no GPU" if checks.device.type != "cuda" else "it is not installed"
        checks.skip("the_sanitizer_finds_no_error", why)
        return ""
    only = "later_changes_are_not_saved"
    script = [sys.executable, __file__, "--quick", "--device", str(checks.device), "--only", only]
    # Calls of PyTorch that fail and are handled are no finding. Without PyTorch's
    # cache every tensor is an allocation that the tool knows the bounds of.
    try:
        ran = subprocess.run(
            [tool, "--error-exitcode", "9", "--report-api-errors", "no", *script],
            env=os.environ | {UNCACHED: "1"},
            capture_output=True,
            text=True,
            check=False,
            timeout=SANITIZER_SECONDS,
        )
    except subprocess.TimeoutExpired as late:
        raise AssertionError(f"after {SANITIZER_SECONDS} s: {late.stdout!r}") from late
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert f"passed   {only}" in ran.stdout, ran.stdout
    return "memcheck of one check"


CHECKS = [
    every_dtype_comes_back,
    later_changes_are_not_saved,
    earlier_changes_are_saved,
    every_optimizer_waits,
    a_frozen_average_may_change,
    a_state_larger_than_the_staging_memory_is_saved,
    two_gpus_are_saved,
    training_is_unaffected,
    a_training_is_restored,
    memory_stays_flat,
    graphs_are_refused,
    a_captured_step_is_handled,
    bad_calls_are_explained,
    the_sanitizer_finds_no_error,
]

EXPECTED_WARNINGS: dict[Callable[[Checks], str], str] = {
    a_captured_step_is_handled: "saves are strict"
}
"""What a check provokes; any other warning means that it tried something else than it says."""


def run(check: Callable[[Checks], str], checks: Checks, seen: Warnings) -> None:
    """Carry out one check, which may not have fallen back to less than it says."""
    tried = check(checks)
    expected = EXPECTED_WARNINGS.get(check)
    unexpected = [text for text in seen.take() if expected is None or expected not in text]
    assert not unexpected, f"{check.__name__} did less than it says: {unexpected}"
    if tried:
        print(f"passed   {check.__name__}: {tried}")


def main() -> None:
    """Run all checks, or those that are named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--quick", action="store_true", help="smaller tensors, fewer saves")
    parser.add_argument("--only", help="the one check to run")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("skipped  everything: PyTorch sees no GPU here (`--device cpu` runs the script)")
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
        print(f"on {torch.cuda.get_device_name(device)}, torch {torch.__version__}")
        assert gpus.are_usable(), "the package cannot reach the driver that PyTorch uses"
    warnings.filterwarnings("ignore", message="ComplexHalf")
    with tempfile.TemporaryDirectory() as folder:
        seen = Warnings(Path(folder))
        logging.getLogger("dtruntime").addHandler(seen)
        try:
            checks = Checks(device, Path(folder), 20 if options.quick else 1)
            for check in CHECKS:
                if options.only in (None, check.__name__):
                    run(check, checks, seen)
        finally:
            seen.take()
            seen.close()
    print(f"done, {len(checks.skipped)} skipped")


if __name__ == "__main__":
    main()
