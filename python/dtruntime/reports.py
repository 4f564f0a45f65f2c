"""What reading and verifying tell their caller. Plain records, without behaviour."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True)
class LoadReport:
    """What the last ``load`` or ``restore`` read.

    Attributes:
        step: The checkpoint's step.
        fell_back_from: Newer steps that could not be read, each with the reason.
        metadata: What was attached to the checkpoint.
        dataset_positions: Positions of datasets that were attached to it.

    """

    step: int
    fell_back_from: tuple[tuple[int, str], ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)
    dataset_positions: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RestoreReport:
    """What a restore did. Paths are written with dots: ``model.layers.0.weight``.

    Attributes:
        step: The checkpoint's step.
        missing: Live entries that the checkpoint does not have; they are unchanged.
        unexpected: Entries of the checkpoint that the live object beside them does not have.
        skipped: Entries that were left alone, each with the reason.
        values: Plain values that were restored.
        fell_back_from: Newer steps that could not be read, each with the reason.

    """

    step: int
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    skipped: Mapping[str, str] = field(default_factory=dict)
    values: Mapping[str, Any] = field(default_factory=dict, repr=False)
    fell_back_from: tuple[tuple[int, str], ...] = ()


@dataclass(frozen=True)
class Damage:
    """One damaged place of a checkpoint.

    Attributes:
        shard: The file.
        chunk: The chunk; None where the manifest, header, footer or index is hit.
        why: Expected against actual.
        tensors: Paths of the tensors whose bytes the chunk holds.

    """

    shard: str
    chunk: int | None
    why: str
    tensors: tuple[str, ...]


@dataclass(frozen=True)
class VerifyReport:
    """What verification found: every chunk of every shard was read.

    Attributes:
        step: The step.
        shards: Shards that were read.
        chunks: Chunks that were read.
        raw_bytes: Their bytes as the state has them.
        stored_bytes: Their bytes as stored.
        seconds: How long it took.
        damage: Everything that is not as it was written.

    """

    step: int
    shards: int
    chunks: int
    raw_bytes: int
    stored_bytes: int
    seconds: float
    damage: tuple[Damage, ...]

    @property
    def ok(self) -> bool:
        """Whether every byte is as it was written."""
        return not self.damage
