"""Whether one saved tensor or array fits the live one that it is for.

Always holds: nothing is read and nothing changed to tell.
"""

from __future__ import annotations

import functools
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

from dtruntime.loading.assembling import whole_shape
from dtruntime.state import gpus
from dtruntime.state.sharded_tensors import box_of, contiguous_strides, is_sharded, local_of
from dtruntime.state.tensors import NUMPY, numpy_dtype, torch_dtype
from dtruntime.state.tree import TAG_DICT, TAG_TENSOR

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy as np

    from dtruntime.loading.reader import Reader
    from dtruntime.state.tensors import TensorRecord
    from dtruntime.state.tree import Tree

_CAST = "pass `cast=True` to convert what was saved to the live dtypes"
_TO_EMPTY = (
    "give the live ones memory, `module.to_empty(device=...)`, tie weights and set what is not "
    "saved, such as buffers that are not persistent, then restore"
)
_GATHER = "give it memory again, or gather the full parameters, before restoring"
_IN_INFERENCE = (
    "restore under `torch.inference_mode()`, or make the module outside of it: `torch.no_grad()` "
    "does for evaluation"
)


class Misfit(NamedTuple):
    """Why something saved is not for something live, and what to do about it if that is known."""

    why: str
    hint: str | None = None


def tensor_misfit(live: Any, index: int, reader: Reader, *, cast: bool) -> Misfit | None:
    """Tell in what the node ``index`` differs from a live tensor that takes it."""
    misfit = _place_misfit(live)
    if misfit is not None:
        return misfit
    record = _record_at(index, reader)
    if record is None or record.kind == NUMPY:
        return Misfit("a tensor is live, and the checkpoint has another kind of value")
    shape = whole_shape(record)
    if tuple(live.shape) != shape:
        return Misfit(f"the live shape is {tuple(live.shape)}, the saved one {shape}")
    return dtype_misfit(live.dtype, record, cast=cast)


def _place_misfit(live: Any) -> Misfit | None:
    """Tell why a live tensor takes nothing, whatever it is."""
    torch = sys.modules["torch"]
    if live.is_nested or live.layout is not torch.strided:
        kind = "nested" if live.is_nested else str(live.layout).removeprefix("torch.")
        return Misfit(f"the live one is a {kind} tensor, which cannot be restored in place")
    if is_sharded(live) and box_of(live) is None:
        return Misfit("what this rank holds of the live tensor is not one piece of it")
    if live.is_meta:
        return Misfit("the live one is on `meta`, without values", _TO_EMPTY)
    if has_no_memory(local_of(live)):
        return Misfit("the live one's memory was freed (sharded wrappers resize it to 0)", _GATHER)
    return None


def inference_misfit(live: Any) -> Misfit | None:
    """Tell whether a module's tensor may not be changed here: torch finds out half-way."""
    torch = sys.modules["torch"]
    if not live.is_inference() or torch.is_inference_mode_enabled():
        return None
    return Misfit("the live one was made in inference mode and is loaded outside", _IN_INFERENCE)


def dtype_misfit(live: Any, record: TensorRecord, *, cast: bool) -> Misfit | None:
    """Tell whether a saved tensor is of another dtype than a live one, and cannot be converted."""
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
    """Tell in what the node ``index`` differs from a live array that takes it."""
    record = _record_at(index, reader)
    if record is None or record.kind != NUMPY:
        return Misfit("an array is live, and the checkpoint has another kind of value")
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
    """Tell whether the bytes that were saved, one after the other, are those that a tensor has."""
    if record.kind == NUMPY or record.slice is not None:
        return False
    torch = sys.modules["torch"]
    if type(live) not in (torch.Tensor, torch.nn.Parameter) or live.layout is not torch.strided:
        return False
    if live.is_conj() or live.is_neg() or live.is_quantized or not live.numel():
        return False
    is_reachable = live.is_cpu or (live.is_cuda and gpus.are_usable())
    if not (is_reachable and live.is_contiguous()):
        return False
    pairs = zip(record.strides, contiguous_strides(record.shape), record.shape, strict=True)
    lies_in_order = all(stride == expected for stride, expected, size in pairs if size > 1)
    return lies_in_order and live.dtype == torch_dtype(record.dtype, record.item_bytes)


def entries(tree: Tree, index: int | None) -> Iterable[tuple[Any, int]]:
    """Give keys and nodes of a dict; nothing where there is none."""
    if index is None or tree.nodes[index][0] != TAG_DICT:
        return ()
    return tree.children(index)


def _record_at(index: int, reader: Reader) -> TensorRecord | None:
    tag, number = reader.tree.nodes[index][:2]
    return reader.records[number] if tag == TAG_TENSOR else None


def has_no_memory(local: Any) -> bool:
    """Tell whether a tensor's items lie outside its storage, as when that was freed."""
    if not local.numel():
        return False
    reach = sum(
        (size - 1) * stride for size, stride in zip(local.shape, local.stride(), strict=True)
    )
    needed = (local.storage_offset() + reach + 1) * local.element_size()
    return bool(local._is_zerotensor() or local.untyped_storage().nbytes() < needed)  # noqa: SLF001


@functools.cache
def _can_convert(saved: Any, live: Any) -> bool:
    """Tell whether values survive but for their precision, and torch knows how."""
    torch = sys.modules["torch"]
    are_floating = saved.is_floating_point and live.is_floating_point
    if not are_floating and not (saved.is_complex and live.is_complex):
        return False
    try:
        torch.empty(1, dtype=saved).to(live)
    except (RuntimeError, NotImplementedError):  # packed formats, say
        return False
    return True
