"""Memory of the engine's staging arena, lent to what is read only to be copied on.

A restore holds a whole checkpoint for a moment, to check it before anything is changed. Fresh
memory for that would cost more than the reading: page by page the kernel finds and clears it, and
then it is given back. The arena is there already, or the next save needs it anyway.

Always holds: each byte is given out once; the arena goes back when nothing views it any more.
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
    """Lent memory, given out piece by piece.

    Attributes:
        numbers: The tensors that it was lent for.

    """

    def __init__(self, memory: NDArray[np.uint8], numbers: Iterable[int]) -> None:
        self.numbers = frozenset(numbers)
        self._memory = memory
        self._taken = 0

    def take(self, count: int) -> Any:
        """Give a torch storage of so many bytes; None where there are not so many left."""
        start, self._taken = self._taken, self._taken + _aligned(count)
        if not count or start + count > len(self._memory):
            return None
        torch = import_torch("restoring a tensor")
        return torch.from_numpy(self._memory[start : start + count]).untyped_storage()


def needed_bytes(counts: Sequence[int]) -> int:
    """Give the memory that takes pieces of so many bytes each."""
    return sum(map(_aligned, counts))


def _aligned(count: int) -> int:
    return -(-count // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
