"""Every value that can be saved comes back equal, by type and by bits."""

from __future__ import annotations

import random
import warnings
from collections import OrderedDict

import numpy as np
import pytest
import torch
from support import assert_same, bits_of

from dtruntime import InvalidArgument

ALL_DTYPES = sorted(
    {
        dtype
        for name in dir(torch)
        if isinstance(dtype := getattr(torch, name), torch.dtype) and not name.startswith("q")
    },
    key=str,
)


def random_tensor(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Make a tensor of random bits: also NaNs, infinities, denormals and padding bits."""
    raw = torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8)
    if dtype == torch.bool:
        raw %= 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # complex32 is experimental
        tensor = torch.empty(0, dtype=dtype)
    count = int(np.prod(shape, dtype=np.int64))
    strides = torch.empty(shape, dtype=torch.uint8).stride()
    assert raw.numel() == count * dtype.itemsize
    return tensor.set_(raw.untyped_storage(), 0, shape, strides)


def save_and_load(manager, state, **options):
    step = (manager.latest_step() or 0) + 1
    manager.save(state, step=step)
    return manager.load(**options)


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_every_dtype(manager, dtype):
    state = {
        "matrix": random_tensor(dtype, 37, 5),
        "scalar": random_tensor(dtype),
        "empty": random_tensor(dtype, 0, 3),
        "large": random_tensor(dtype, 100_001),
        "dtype": dtype,
    }
    assert_same(save_and_load(manager, state), state)


@pytest.mark.parametrize("compression", ["auto", "none", "float", "zstd", "gzip"])
def test_every_codec(open_manager, compression):
    manager = open_manager(compression=compression)
    state = {
        "weights": torch.randn(300_000),
        "half": torch.randn(70_000).bfloat16(),
        "zeros": torch.zeros(100_000, dtype=torch.int64),
        "noise": torch.randint(0, 256, (200_000,), dtype=torch.uint8),
        "array": np.random.default_rng(1).normal(size=(300, 400)),
    }
    assert_same(save_and_load(manager, state), state)
    assert manager.verify().ok


@pytest.mark.parametrize("io_backend", ["uring", "threads"])
@pytest.mark.parametrize("direct_io", [True, False])
def test_every_way_to_the_device(open_manager, io_backend, direct_io):
    manager = open_manager(io_backend=io_backend, direct_io=direct_io)
    assert manager.io_backend == io_backend
    state = {"weights": torch.randn(1_000_003)}
    assert_same(save_and_load(manager, state), state)


def test_state_larger_than_the_arena_streams(open_manager):
    manager = open_manager(staging_bytes="256KiB")
    state = {f"layer{number}": torch.randn(100_000) for number in range(8)}
    handle = manager.save_async(state, step=1)
    handle.result()
    assert handle.stats().streamed
    assert_same(manager.load(), state)


def test_plain_values(manager):
    state = {
        "none": None,
        "flags": [True, False],
        "ints": [
            0,
            -1,
            2**63 - 1,
            -(2**63),
            2**63,
            -(2**63) - 1,
            10**40,
            -(10**40),
            255,
            256,
            -128,
        ],
        "big": [
            sign * 2**bits + delta
            for bits in (64, 71, 72, 79, 80)
            for sign in (1, -1)
            for delta in (-1, 0, 1)
        ],
        "floats": [
            0.0,
            -0.0,
            float("inf"),
            float("-inf"),
            1e-320,
            float.fromhex("0x1.fffffffffffffp1023"),
        ],
        "nan": float("nan"),
        "complex": [1 + 2j, complex(-0.0, float("inf"))],
        "text": ["", "ascii", "naïve ☃ 𝄞", "nul\0inside"],
        "bytes": [b"", b"\0\xff"],
        "nested": {"tuple": (1, (2, [3, {}]), ()), "empty": [[], {}, ()]},
        "torch": [
            torch.float32,
            torch.device("cpu"),
            torch.device("cuda:1"),
            torch.Size([2, 3]),
            torch.Size([]),
        ],
        "numpy dtypes": [np.dtype("<f4"), np.dtype(">i8"), np.dtype("M8[ns]"), np.dtype("U7")],
    }
    assert_same(save_and_load(manager, state), state)


def test_keys_of_every_type_stay_apart(manager):
    state = {
        0: "int",
        "0": "str",
        b"0": "bytes",
        None: "none",
        1.5: "float",
        True: "bool",
        2**70: "big",
        -(2**70): "negative big",
        -3: {"state": {7: {"exp_avg": torch.ones(3)}}},
        float("inf"): 1,
        "": "empty",
        "with.dot": 2,
    }
    assert_same(save_and_load(manager, state), state)


@pytest.mark.parametrize("root", [torch.arange(5), 7, None, [1, torch.zeros(2)], (), {}])
def test_any_value_may_be_the_root(manager, root):
    assert_same(save_and_load(manager, root), root)


def test_ordered_dicts_keep_their_metadata(manager):
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    loaded = save_and_load(manager, {"model": module})
    assert_same(loaded["model"], module.state_dict())
    assert loaded["model"]._metadata == module.state_dict()._metadata
    plain = OrderedDict([("b", 1), ("a", 2)])
    assert_same(save_and_load(manager, plain), plain)


NUMPY_ARRAYS = {
    "scalar array": np.array(3.5),
    "bool": np.array([True, False]),
    "big endian": np.arange(5, dtype=">i4"),
    "fortran": np.asfortranarray(np.arange(12.0).reshape(3, 4)),
    "strided": np.arange(20)[::3],
    "reversed": np.arange(20)[::-1],
    "one item reversed": np.arange(1.0)[::-1],
    "one row reversed": np.arange(6.0).reshape(2, 3)[:1][::-1],
    "transposed view": np.arange(24).reshape(2, 3, 4).transpose(2, 0, 1),
    "broadcast": np.broadcast_to(np.arange(3), (4, 3)),
    "empty": np.empty((0, 4), np.float32),
    "half": np.arange(7, dtype=np.float16),
    "longdouble": np.arange(5, dtype=np.longdouble),
    "complex": np.arange(5, dtype=np.complex64),
    "text": np.array(["a", "naïve"]),
    "bytes": np.array([b"a", b"bcd"]),
    "dates": np.array(["2026-01-01", "NaT"], "M8[D]"),
    "spans": np.array([1, 2], "m8[us]"),
    "void": np.array([b"abc", b"def"], "V3"),
    "read-only": np.arange(3),
}
NUMPY_ARRAYS["read-only"].flags.writeable = False


@pytest.mark.parametrize("name", NUMPY_ARRAYS)
def test_numpy_arrays(manager, name):
    array = NUMPY_ARRAYS[name]
    loaded = save_and_load(manager, {"array": array})["array"]
    assert_same(loaded, array)
    assert loaded.flags.writeable


NUMPY_SCALARS = [
    np.float32(1.5),
    np.float64("nan"),
    np.int8(-3),
    np.uint64(2**64 - 1),
    np.bool_(True),
    np.complex128(1 - 2j),
    np.str_("naïve"),
    np.str_(""),
    np.bytes_(b"xy"),
    np.bytes_(b""),
    np.datetime64("2026-01-01T00:00:01"),
    np.timedelta64(5, "h"),
    np.longdouble("1.25"),
    np.void(b"abc"),
]


@pytest.mark.parametrize("scalar", NUMPY_SCALARS, ids=repr)
def test_numpy_scalars(manager, scalar):
    assert_same(save_and_load(manager, {"scalar": scalar}), {"scalar": scalar})


VIEWS = {
    "transposed": lambda: torch.randn(7, 5).t(),
    "expanded": lambda: torch.randn(1, 5).expand(400, 5),
    "expanded scalar": lambda: torch.tensor(2.5).expand(3, 4),
    "sliced rows": lambda: torch.randn(1000, 8)[10:20],
    "sliced columns": lambda: torch.randn(100, 80)[:, 3:5],
    "every hundredth": lambda: torch.randn(100_000)[::100],
    "every hundredth byte": lambda: random_tensor(torch.uint4, 1000)[::100],
    "offset": lambda: torch.arange(1000, dtype=torch.uint8)[13:],
    "permuted": lambda: torch.randn(3, 4, 5).permute(2, 0, 1),
    "channels last": lambda: torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
    "unfold": lambda: torch.arange(10.0).unfold(0, 4, 2),
    "conjugated": lambda: torch.randn(6, dtype=torch.complex64).conj(),
    "negative": lambda: torch.randn(6, dtype=torch.complex64).conj().imag,
    "conjugated view": lambda: torch.randn(6, 6, dtype=torch.complex128)[::2, 1].conj(),  # noqa: PLW0108
    "from numpy": lambda: torch.from_numpy(np.arange(12.0).reshape(3, 4))[1:],
    "not a leaf": lambda: torch.randn(3, requires_grad=True) * 2,
    "shared memory": lambda: torch.randn(50).share_memory_(),
}


@pytest.mark.parametrize("name", VIEWS)
def test_views(manager, name):
    tensor = VIEWS[name]()
    assert_same(save_and_load(manager, {"tensor": tensor}), {"tensor": tensor})


def test_parameters_and_gradients(manager):
    state = {
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "frozen": torch.nn.Parameter(torch.randn(3), requires_grad=False),
        "integer parameter": torch.nn.Parameter(torch.arange(3), requires_grad=False),
        "leaf": torch.randn(3, requires_grad=True),
        "buffer": torch.nn.Buffer(torch.zeros(2)),
    }
    loaded = save_and_load(manager, state)
    assert_same(loaded, state)
    assert loaded["parameter"].is_leaf
    (loaded["parameter"] * 2).sum().backward()
    assert loaded["parameter"].grad is not None


def test_tied_tensors_share_memory_again(manager):
    weight = torch.nn.Parameter(torch.randn(10, 4))
    base = torch.arange(100.0)
    state = {
        "embedding": weight,
        "head": weight,
        "head transposed": weight.t(),
        "base": base,
        "low": base[:50],
        "high": base[50:],
        "as int": base.view(torch.int32),
    }
    info = manager.save(state, step=1)
    assert info.raw_bytes < 2 * (10 * 4 * 4 + 100 * 4), "a storage is written once"
    loaded = manager.load()
    assert_same(loaded, state)
    assert loaded["embedding"] is loaded["head"]
    with torch.no_grad():
        loaded["embedding"][2, 1] = 99
        loaded["base"][75] = -1
    assert loaded["head transposed"][1, 2] == 99
    assert loaded["high"][25] == -1
    assert loaded["low"].untyped_storage().data_ptr() == loaded["base"].untyped_storage().data_ptr()


def test_shared_arrays_come_back_as_one_object(manager):
    array = np.arange(5)
    loaded = save_and_load(manager, [array, {"again": array}])
    assert loaded[0] is loaded[1]["again"]


def test_only_spans_that_saved_tensors_touch_are_written(manager):
    big = torch.randn(1_000_000)
    state = {"start": big[:10], "middle": big[500_000:500_010], "overlap": big[500_005:500_100]}
    info = manager.save(state, step=1)
    assert info.raw_bytes <= 1024
    loaded = manager.load()
    assert_same(loaded, state)
    loaded["middle"][5] = 7.0
    assert loaded["overlap"][0] == 7.0, "views of one storage are that again"


def test_lone_strided_tensor_is_packed(manager):
    info = manager.save({"column": torch.randn(1000, 1000)[:, 0]}, step=1)
    assert info.raw_bytes <= 4096


def test_objects_are_saved_as_their_state_dict(manager):
    class Loader:
        def state_dict(self):
            return {"position": 7, "inner": Inner()}

    class Inner:
        def state_dict(self):
            return [torch.ones(2)]

    loaded = save_and_load(manager, {"loader": Loader()})
    assert_same(loaded, {"loader": {"position": 7, "inner": [torch.ones(2)]}})


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, lr=1e-3),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.Adam(p, amsgrad=True, lr=torch.tensor(0.1)),
        torch.optim.Adagrad,
    ],
    ids=["AdamW", "SGD", "Adam", "Adagrad"],
)
def test_optimizer_states(manager, make):
    model = torch.nn.Linear(5, 3)
    optimizer = make(model.parameters())
    model(torch.randn(2, 5)).sum().backward()
    optimizer.step()
    loaded = save_and_load(manager, {"optimizer": optimizer})["optimizer"]
    assert_same(loaded, optimizer.state_dict())
    assert all(type(key) is int for key in loaded["state"])


def test_random_number_generators_resume(manager):
    generator = np.random.default_rng(5)
    state = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "generator": generator.bit_generator.state,
    }
    manager.save(state, step=1)
    expected = (torch.rand(3), random.random(), np.random.rand(), generator.random())
    loaded = manager.load()
    torch.set_rng_state(loaded["torch"])
    random.setstate(loaded["python"])
    np.random.set_state(loaded["numpy"])
    generator.bit_generator.state = loaded["generator"]
    actual = (torch.rand(3), random.random(), np.random.rand(), generator.random())
    assert torch.equal(actual[0], expected[0])
    assert actual[1:] == expected[1:]


def test_many_small_tensors(manager):
    state = {
        f"tensor{number}": torch.full((number % 5, 3), float(number)) for number in range(3000)
    }
    assert_same(save_and_load(manager, state), state)


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_mapped_loads_are_private_and_outlive_their_manager(open_manager, compression):
    manager = open_manager(compression=compression)
    base = torch.randn(50_000)
    state = {
        "base": base,
        "view": base[100:200],
        "array": np.arange(30_000),
        "empty": torch.empty(0),
    }
    manager.save(state, step=1)
    loaded = manager.load(mmap=True)
    assert_same(loaded, state)
    loaded["base"][150] = 5.0
    loaded["array"][3] = -3
    assert loaded["view"][50] == 5.0
    assert_same(manager.load(), state), "changes stay private"
    manager.close()
    assert bits_of(loaded["view"][51:]) == bits_of(base[151:200])


def test_map_location(manager):
    loaded = save_and_load(
        manager, {"weight": torch.nn.Parameter(torch.ones(2))}, map_location="meta"
    )
    assert loaded["weight"].device.type == "meta"
    assert type(loaded["weight"]) is torch.nn.Parameter
    assert manager.load(map_location="cpu")["weight"].device.type == "cpu"


def test_a_missing_device(manager):
    manager.save({"a": torch.ones(2)}, step=1)
    with pytest.raises(InvalidArgument, match="torch cannot use that device") as caught:
        manager.load(map_location="cuda:99")
    assert "host memory" in caught.value.hint


def test_a_single_value_that_is_not_requested(manager):
    for step, state in enumerate([torch.ones(2), 7]):
        manager.save(state, step=step)
        assert manager.load(keys="nothing", strict=False) is None
