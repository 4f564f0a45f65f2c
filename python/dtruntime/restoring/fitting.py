"""Whether a saved tensor or array fits the live one that takes it.

Always holds: nothing is read and nothing is changed.
"""

from __future__ import annotations

import functools
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

from dtruntime.loading.assembling import whole_shape
from dtruntime.state import gpus
from dtruntime.state.sharded_tensors import box_of, is_contiguous, is_sharded, local_of
from dtruntime.state.tensors import NUMPY, TORCH, TORCH_PARAMETER, numpy_dtype, torch_dtype
from dtruntime.state.tree import DICTS, TAG_DICT, TAG_TENSOR, TAG_TYPES

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy as np

    from dtruntime.loading.reader import Reader
    from dtruntime.state.tensors import TensorRecord
    from dtruntime.state.tree import Tree

_CAST = "pass `cast=True` to convert saved values to the live dtypes"
_TO_EMPTY = (
    "allocate memory for the live ones, `module.to_empty(device=...)`, tie weights and set what is "
    "not saved, such as non-persistent buffers, then restore"
)
_GATHER = "allocate its memory again, or gather the full parameters, before restoring"
_IN_INFERENCE = (
    "restore under `torch.inference_mode()`, or create the module outside of it: `torch.no_grad()` "
    "is sufficient for evaluation"
)


class Misfit(NamedTuple):
    """Why a saved entry does not fit a live one, and how to fix it, if known."""

    why: str
    hint: str | None = None


_TENSOR_TYPES = {TORCH: "Tensor", TORCH_PARAMETER: "Parameter", NUMPY: "ndarray"}


def kind_misfit(live: Any, index: int, reader: Reader) -> Misfit:
    """Return that the node ``index`` is of another type than a live value, and of which."""
    tag, payload = reader.tree.nodes[index][:2]
    if tag == TAG_TENSOR:
        saved = _TENSOR_TYPES[reader.records[payload].kind]
    else:
        saved = DICTS[payload[1]].__name__ if tag == TAG_DICT else TAG_TYPES[tag]
    live_type = type(live).__name__
    return Misfit(f"the live value is of type `{live_type}`, the saved one of type `{saved}`")


def tensor_misfit(live: Any, index: int, reader: Reader, *, cast: bool) -> Misfit | None:
    """Return why the node ``index`` does not fit a live tensor; None if it does."""
    misfit = _place_misfit(live)
    if misfit is not None:
        return misfit
    record = _record_at(index, reader)
    if record is None or record.kind == NUMPY:
        return kind_misfit(live, index, reader)
    shape = whole_shape(record)
    if tuple(live.shape) != shape:
        return Misfit(f"the live shape is {tuple(live.shape)}, the saved one {shape}")
    return dtype_misfit(live.dtype, record, cast=cast)


def _place_misfit(live: Any) -> Misfit | None:
    """Return why nothing can be restored into a live tensor; None if something can."""
    torch = sys.modules["torch"]
    if live.is_nested or live.layout is not torch.strided:
        kind = "nested" if live.is_nested else str(live.layout).removeprefix("torch.")
        return Misfit(f"the live one is a {kind} tensor, which cannot be restored in place")
    if is_sharded(live) and box_of(live) is None:
        return Misfit("this rank's part of the live tensor is not contiguous in it")
    if live.is_meta:
        return Misfit("the live one is on `meta`, without values", _TO_EMPTY)
    if has_no_memory(local_of(live)):
        return Misfit("the live one's memory was freed (sharded wrappers resize it to 0)", _GATHER)
    return None


def inference_misfit(live: Any) -> Misfit | None:
    """Return why a module's tensor cannot be changed here: torch only notices part-way."""
    torch = sys.modules["torch"]
    if not live.is_inference() or torch.is_inference_mode_enabled():
        return None
    return Misfit("the live one was created in inference mode and is loaded outside", _IN_INFERENCE)


def dtype_misfit(live: Any, record: TensorRecord, *, cast: bool) -> Misfit | None:
    """Return why a saved tensor does not fit a live dtype; None if it does or can be converted."""
    saved = torch_dtype(record.dtype, record.item_bytes)
    if live == saved:
        return None
    can_convert = _can_convert(saved, live)
    if cast and can_convert:
        return None
    why = f"the live dtype is {live}, the saved one {saved}"
    return Misfit(why, _CAST if can_convert else None)


def array_misfit(
    live: np.ndarray[Any, Any], index: int, reader: Reader, *, cast: bool
) -> Misfit | None:
    """Return why the node ``index`` does not fit a live array; None if it does."""
    record = _record_at(index, reader)
    if record is None or record.kind != NUMPY:
        return kind_misfit(live, index, reader)
    if live.shape != record.shape:
        return Misfit(f"the live shape is {live.shape}, the saved one {record.shape}")
    if not live.flags.writeable:
        return Misfit("the live array is read-only")
    saved = numpy_dtype(record.dtype)
    if live.dtype == saved:
        return None
    can_convert = live.dtype.kind == saved.kind and saved.kind in "fc"
    if cast and can_convert:
        return None
    why = f"the live dtype is {live.dtype}, the saved one {saved}"
    return Misfit(why, _CAST if can_convert else None)


def can_be_filled(live: Any, record: TensorRecord) -> bool:
    """Return whether a saved tensor can be read straight into a live one, both contiguous."""
    if record.kind == NUMPY or record.slice is not None or not is_writable(live):
        return False
    if not live.numel() or not live.is_contiguous():
        return False
    is_same_dtype = bool(live.dtype == torch_dtype(record.dtype, record.item_bytes))
    return is_same_dtype and is_contiguous(record.shape, record.strides)


def is_writable(live: Any) -> bool:
    """Return whether the engine can write a tensor's values to its memory, as they are."""
    torch = sys.modules["torch"]
    if type(live) not in (torch.Tensor, torch.nn.Parameter) or live.layout is not torch.strided:
        return False
    if live.is_conj() or live.is_neg() or live.is_quantized:
        return False
    return bool(live.is_cpu or (live.is_cuda and gpus.are_usable()))


def entries(tree: Tree, index: int | None) -> Iterable[tuple[Any, int]]:
    """Return keys and nodes of a dict; nothing if the node is not a dict."""
    if index is None or tree.nodes[index][0] != TAG_DICT:
        return ()
    return tree.children(index)


def _record_at(index: int, reader: Reader) -> TensorRecord | None:
    tag, number = reader.tree.nodes[index][:2]
    return reader.records[number] if tag == TAG_TENSOR else None


def has_no_memory(local: Any) -> bool:
    """Return whether a tensor's items are outside its storage, for example because it was freed."""
    if not local.numel():
        return False
    reach = sum(
        (size - 1) * stride for size, stride in zip(local.shape, local.stride(), strict=True)
    )
    needed = (local.storage_offset() + reach + 1) * local.element_size()
    return bool(local._is_zerotensor() or local.untyped_storage().nbytes() < needed)  # noqa: SLF001


@functools.cache
def _can_convert(saved: Any, live: Any) -> bool:
    """Return whether conversion only loses precision, and torch supports it."""
    torch = sys.modules["torch"]
    are_floating = saved.is_floating_point and live.is_floating_point
    if not are_floating and not (saved.is_complex and live.is_complex):
        return False
    try:
        torch.empty(1, dtype=saved).to(live)
    except (RuntimeError, NotImplementedError):  # for example packed formats
        return False
    return True
