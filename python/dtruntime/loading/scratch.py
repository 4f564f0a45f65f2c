"""Memory of the engine's staging arena, lent for data that is only copied from.

A restore briefly holds a whole checkpoint, to check it before anything is changed. Fresh memory for
that would cost more than reading: the kernel allocates and clears it page by page, only to have it
freed again. The arena exists already, or the next save needs it anyway.

Always holds: each byte is allocated once; the arena is returned when nothing views it any more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dtruntime.state.tensors import import_torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import numpy as np
    from numpy.typing import NDArray

_ALIGNMENT_BYTES = 64


class Scratch:
    """Lent memory, allocated piece by piece.

    Attributes:
        numbers: The tensors that it was lent for.

    """

    def __init__(self, memory: NDArray[np.uint8], numbers: Iterable[int]) -> None:
        self.numbers = frozenset(numbers)
        self._memory = memory
        self._taken = 0

    def take(self, count: int) -> Any:
        """Return a torch storage of ``count`` bytes; None if there are not that many left."""
        start, self._taken = self._taken, self._taken + _aligned(count)
        if not count or start + count > len(self._memory):
            return None
        torch = import_torch("restoring a tensor")
        return torch.from_numpy(self._memory[start : start + count]).untyped_storage()


def needed_bytes(counts: Sequence[int]) -> int:
    """Return the bytes of memory that pieces of these sizes need, with their alignment."""
    return sum(map(_aligned, counts))


def _aligned(count: int) -> int:
    return -(-count // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
