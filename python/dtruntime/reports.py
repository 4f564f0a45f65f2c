"""The results of saving, reading and verifying. Plain records, without behavior."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True)
class SaveProgress:
    """Progress of a save, in bytes. All but ``written_bytes`` grow to ``raw_bytes``.

    Attributes:
        raw_bytes: Bytes of the state.
        captured_bytes: Bytes copied into the staging arena.
        encoded_bytes: Bytes checksummed and encoded.
        written_bytes: Stored bytes passed to the device; fewer if compression helps.

    """

    raw_bytes: int
    captured_bytes: int
    encoded_bytes: int
    written_bytes: int


@dataclass(frozen=True)
class SaveStats:
    """Where the time and the bytes of a save went.

    Attributes:
        stall_seconds: Time the training loop lost: from the call to its return.
        prepare_seconds: Of these, flattening the state and copying from devices.
        wait_seconds: Of these, waiting for the previous save.
        capture_seconds: Of these, copying into the staging arena.
        durable_seconds: From the call until everything was durable and published.
        encode_seconds: CPU time of checksums and encoding, over all workers.
        write_seconds: From the first chunk at the writer until the shard was durable.
        publish_seconds: Making the manifest visible, with its syncs.
        raw_bytes: Bytes of the state.
        stored_bytes: Bytes of the shard file.
        chunks: Total chunks.
        chunks_encoded: Chunks that compression made smaller.
        staging_bytes: Bytes of the staging arena.
        streamed: Whether the state was larger than the arena and was streamed through it.
        parts: Parts that the shard was uploaded in; 0 if the store is a directory.
        retries: Requests to the store's service that had to be repeated.
        io_backend: ``uring``, ``threads`` or ``s3``.

    """

    stall_seconds: float
    prepare_seconds: float
    wait_seconds: float
    capture_seconds: float
    durable_seconds: float
    encode_seconds: float
    write_seconds: float
    publish_seconds: float
    raw_bytes: int
    stored_bytes: int
    chunks: int
    chunks_encoded: int
    staging_bytes: int
    streamed: bool
    parts: int
    retries: int
    io_backend: str


@dataclass(frozen=True)
class SaveInfo:
    """A durable, complete, published checkpoint.

    Attributes:
        step: Its step.
        attempt: The attempt that wrote it: 32 hex digits.
        location: The store.
        raw_bytes: Bytes of the state.
        stored_bytes: Bytes of the shard file.
        removed_steps: Steps that retention, or a rewind, removed after the commit. In a directory,
            their space is freed soon after, and before the next checkpoint is written.
        stats: Where the time went.

    """

    step: int
    attempt: str
    location: str
    raw_bytes: int
    stored_bytes: int
    removed_steps: tuple[int, ...]
    stats: SaveStats


@dataclass(frozen=True)
class UploadInfo:
    """A checkpoint that was uploaded to the remote store.

    Attributes:
        step: Its step.
        was_there: Whether the remote store had it already.
        bytes: Bytes of its shards.
        parts: Parts that they were uploaded in.
        resumed_parts: Of these, parts that an earlier process had uploaded.
        retries: Requests that had to be repeated.
        seconds: Duration of the upload.

    """

    step: int
    was_there: bool
    bytes: int
    parts: int
    resumed_parts: int
    retries: int
    seconds: float


class PendingUpload(NamedTuple):
    """A checkpoint that is not in the remote store yet.

    Attributes:
        step: Its step.
        uploaded_bytes: Bytes sent in this attempt so far, or already there.
        total_bytes: Bytes of the shards that this process uploads.

    """

    step: int
    uploaded_bytes: int
    total_bytes: int


@dataclass(frozen=True)
class LoadReport:
    """What the last ``load`` or ``restore`` read.

    Attributes:
        step: The checkpoint's step.
        fell_back_from: Newer steps that could not be read, each with the reason.
        metadata: What was attached to the checkpoint.
        dataset_positions: Dataset positions that were attached to it.
        world_size: How many ranks saved it.

    """

    step: int
    fell_back_from: tuple[tuple[int, str], ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)
    dataset_positions: Mapping[str, Any] = field(default_factory=dict)
    world_size: int = 1


@dataclass(frozen=True)
class RestoreReport:
    """What a restore did. Paths are dotted: ``model.layers.0.weight``.

    Attributes:
        step: The checkpoint's step.
        missing: Live entries that the checkpoint does not have; they are unchanged.
        unexpected: Entries of the checkpoint that the live object in their place does not have.
        skipped: Entries that were not restored, each with the reason.
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
    """One damaged part of a checkpoint.

    Attributes:
        shard: The file.
        chunk: The chunk; None if the manifest, header, footer or index is damaged.
        why: What was expected, and what was found.
        tensors: Paths of the tensors that have bytes in the chunk.

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
        raw_bytes: Their size in the state.
        stored_bytes: Their size as stored.
        seconds: How long it took.
        damage: Everything that differs from what was written.

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
