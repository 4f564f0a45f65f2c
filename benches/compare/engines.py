"""What is compared, each engine behind the same verbs.

Always holds: a save is over only when its files, and the directories that name them, were fsynced,
whoever does it; a load is over only when every byte is in memory. Peers are set as their own
documentation has it, or faster; `settings` says how, and every report prints it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import subprocess
import time
from abc import ABC, abstractmethod
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from limits import fio_command
from state import bits_of, flatten, unflatten

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from make_state import State


START_SECONDS_MAX = 300
"""How long a peer's helper process may take to start; a busy machine is no reason to fail."""


class Engine(ABC):
    """A way to save the state into a folder, and to get it back."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    @abstractmethod
    def save(self, step: int, state: State) -> None:
        """Return as the engine returns to a training loop."""

    @abstractmethod
    def finish(self) -> None:
        """Return when the last save is durable."""

    @abstractmethod
    def load(self, step: int, state: State) -> State:
        """Read a checkpoint into fresh memory; `state` is only looked at for its structure."""

    def restore(self, step: int, live: State) -> None:
        """Read a checkpoint into the tensors that a training holds already.

        Here as `load_state_dict` does it: load, then copy.
        """
        copy_into(live, self.load(step, live))

    def is_durable(self) -> bool:
        """Tell whether `finish` would return at once."""
        return True

    def may_change(self) -> contextlib.AbstractContextManager[None]:
        """Wait until the state may change after a save."""
        return contextlib.nullcontext()

    def remove(self, step: int) -> None:
        """Delete a checkpoint."""
        path = self.path(step)
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()

    def prewarm(self, state: State) -> None:  # noqa: B027  (most engines have nothing to do)
        """Do ahead what the first save would do once."""

    def close(self) -> None:  # noqa: B027  (the same)
        """Give everything back."""

    def path(self, step: int) -> Path:
        """Where a checkpoint lies."""
        return self.folder / f"step-{step}"


class Dtruntime(Engine):
    """This engine."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        super().__init__(folder)
        from dtruntime import CheckpointManager

        self.manager = CheckpointManager(folder, **settings)
        self.handle: Any = None

    def save(self, step: int, state: State) -> None:
        """Return once the snapshot is taken."""
        self.handle = self.manager.save_async(state, step=step)

    def is_durable(self) -> bool:
        """Tell whether the handle has resolved."""
        return bool(self.handle.done())

    def finish(self) -> None:
        """Return when the handle resolves."""
        self.handle.result()

    def load(self, step: int, state: State) -> State:
        """Read everything, checking every byte."""
        del state
        loaded: State = self.manager.load(step)
        return loaded

    def restore(self, step: int, live: State) -> None:
        """Read and check everything, then copy it to where it belongs."""
        self.manager.restore(live, step)

    def restore_directly(self, step: int, live: State) -> None:
        """Read everything to where it belongs, checking every byte on the way."""
        self.manager.restore(live, step, direct=True)

    def remove(self, step: int) -> None:
        """Delete through the manager, which keeps count."""
        self.manager.delete(step)

    def prewarm(self, state: State) -> None:
        """Allocate the staging memory."""
        self.manager.prewarm(state)

    def close(self) -> None:
        """Close the store."""
        self.manager.close()


class TorchSave(Engine):
    """One pickled zip file."""

    def save(self, step: int, state: State) -> None:
        """Write and sync in the call."""
        with self.path(step).open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        sync_directory(self.folder)

    def finish(self) -> None:
        """Nothing is left to do."""

    def load(self, step: int, state: State) -> State:
        """Map the file and read it all."""
        del state
        return touched(self.mapped(step))

    def restore(self, step: int, live: State) -> None:
        """Copy out of the mapped file."""
        copy_into(live, self.mapped(step))

    def mapped(self, step: int) -> State:
        """Map the file."""
        loaded: State = torch.load(self.path(step), mmap=True, weights_only=True)
        return loaded


class Safetensors(Engine):
    """One flat file; plain values go into its header."""

    def save(self, step: int, state: State) -> None:
        """Write and sync in the call."""
        from safetensors.torch import save_file

        flat = flatten(state)
        tensors = {path: v for path, v in flat.items() if isinstance(v, torch.Tensor)}
        values = {path: v for path, v in flat.items() if not isinstance(v, torch.Tensor)}
        save_file(tensors, self.path(step), metadata={"values": json.dumps(values)})
        sync(self.path(step))
        sync_directory(self.folder)

    def finish(self) -> None:
        """Nothing is left to do."""

    def load(self, step: int, state: State) -> State:
        """Map the file and read it all."""
        del state
        return touched(self.mapped(step))

    def restore(self, step: int, live: State) -> None:
        """Copy out of the mapped file."""
        copy_into(live, self.mapped(step))

    def mapped(self, step: int) -> State:
        """Map the file."""
        from safetensors import safe_open
        from safetensors.torch import load_file

        flat: dict[str, Any] = dict(load_file(self.path(step)))
        with safe_open(self.path(step), framework="pt") as file:
            flat |= json.loads(file.metadata()["values"])
        return unflatten(flat)


class DcpSave(Engine):
    """`torch.distributed.checkpoint`, waiting."""

    threads = 1
    no_dist = True
    """One process saves alone; `multi_rank.py` has all of them save together."""

    def save(self, step: int, state: State) -> None:
        """Write and sync in the call."""
        from torch.distributed.checkpoint.state_dict_saver import save

        save(state, storage_writer=self.writer(step), no_dist=self.no_dist)
        self.sync(step)

    def finish(self) -> None:
        """Nothing is left to do."""

    def writer(self, step: int) -> Any:
        """Make what writes one checkpoint; it syncs its files."""
        from torch.distributed.checkpoint.filesystem import FileSystemWriter

        return FileSystemWriter(self.path(step), sync_files=True, thread_count=self.threads)

    def sync(self, step: int) -> None:
        """Sync the directories, which it does not."""
        sync_directory(self.path(step))
        sync_directory(self.folder)

    def load(self, step: int, state: State) -> State:
        """Read into fresh tensors of the same shapes."""
        fresh = emptied(state)
        self.restore(step, fresh)
        return fresh

    def restore(self, step: int, live: State) -> None:
        """Read into the tensors, which is how it loads."""
        from torch.distributed.checkpoint.filesystem import FileSystemReader
        from torch.distributed.checkpoint.state_dict_loader import load

        load(live, storage_reader=FileSystemReader(self.path(step)), no_dist=self.no_dist)


class DcpAsync(DcpSave):
    """The same, in a thread of its own after a copy of the state."""

    stager: Any = None

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.future: Any = None
        self.step = 0

    def save(self, step: int, state: State) -> None:
        """Return once the state is copied."""
        from torch.distributed.checkpoint.state_dict_saver import async_save

        self.step = step
        self.future = async_save(
            state,
            storage_writer=self.writer(step),
            async_stager=self.stager,
            no_dist=self.no_dist,
        )

    def is_durable(self) -> bool:
        """Tell whether its files are written; the directories take no time."""
        return bool(self.future.done())

    def finish(self) -> None:
        """Wait for its thread, then sync the directories."""
        self.future.result()
        self.sync(self.step)


class DcpAsyncTuned(DcpAsync):
    """The same, keeping the memory that it copies into, and writing with two threads."""

    threads = 2

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        options = StagingOptions(
            use_pinned_memory=False,
            use_shared_memory=False,
            use_async_staging=False,
            use_non_blocking_copy=False,
        )
        self.stager = DefaultStager(options)

    def close(self) -> None:
        """Give the copy back."""
        self.stager.close()


class DcpOnDtruntime(DcpSave):
    """`torch.distributed.checkpoint`, waiting, on a store of this engine."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        from dtruntime import CheckpointManager

        # Torch waits for the end anyway: no memory for a whole copy is needed.
        self.manager = CheckpointManager(folder, staging_bytes="256MiB")

    def writer(self, step: int) -> Any:
        """Make what writes one checkpoint."""
        from dtruntime.dcp import StorageWriter

        return StorageWriter(self.manager, step)

    def sync(self, step: int) -> None:
        """Everything is durable."""

    def restore(self, step: int, live: State) -> None:
        """Read into the tensors, checking every byte on the way."""
        from torch.distributed.checkpoint.state_dict_loader import load

        from dtruntime.dcp import StorageReader

        load(live, storage_reader=StorageReader(self.manager, step), no_dist=self.no_dist)

    def remove(self, step: int) -> None:
        """Delete through the manager, which keeps count."""
        self.manager.delete(step)

    def close(self) -> None:
        """Close the store."""
        self.manager.close()


class TorchCheckpointing(Engine):
    """Meta's `torch_checkpointing`: copies in a thread, writes in a process."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.manager: Any = None
        self.durable: Future[None] = Future()
        # A training loop would not wait for the syncs either.
        self.pool = ThreadPoolExecutor(max_workers=1)

    def save(self, step: int, state: State) -> None:
        """Return at once; the state may change only a little later."""
        if self.manager is None:
            self.manager = self.make_manager(state)
        written = self.manager.save(str(self.path(step)), state)
        self.durable = self.pool.submit(self.make_durable, written, self.path(step))

    @staticmethod
    def make_manager(state: State) -> Any:
        """Make its manager, which is told of the state's top-level keys."""
        from torch_checkpointing import CheckpointManager, ItemSpec
        from torch_checkpointing.checkpoint_process import CheckpointProcessConfig
        from torch_checkpointing.config import AsyncCheckpointSaverConfig
        from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

        patient = CheckpointProcessConfig(subprocess_init_timeout_secs=START_SECONDS_MAX)
        config = CheckpointManager.Config(
            items={key: ItemSpec() for key in state},
            save=AsyncCheckpointSaverConfig(process_config=patient),
            storage_config=LocalFileSystemStorageConfig(use_direct_io=False),
        )
        return CheckpointManager(config)

    def prewarm(self, state: State) -> None:
        """Start its process and allocate the memory that it copies into."""
        self.manager = self.make_manager(state)
        self.manager.prewarm_staging(state)

    @contextlib.contextmanager
    def may_change(self) -> Iterator[None]:
        """Wait for its copying thread."""
        with self.manager.lock():
            yield

    @staticmethod
    def make_durable(written: Future[None], path: Path) -> None:
        """Wait for its process, then sync what it wrote, which it does not."""
        written.result()
        for file in path.rglob("*"):
            if file.is_file():
                sync(file)
        sync_directory(path)
        sync_directory(path.parent)

    def is_durable(self) -> bool:
        """Tell whether its files are written and synced."""
        return self.durable.done()

    def finish(self) -> None:
        """Wait for that."""
        self.durable.result()

    def load(self, step: int, state: State) -> State:
        """Read everything into memory that it maps."""
        del state
        return dict(self.manager.load(str(self.path(step))))

    def restore(self, step: int, live: State) -> None:
        """Have it fill the tensors."""
        self.manager.load(str(self.path(step)), into=live)

    def close(self) -> None:
        """End its process."""
        self.pool.shutdown()
        if self.manager is not None:
            self.manager.close()


class FioWrite(Engine):
    """No engine: fio writes as many bytes, so that what the device itself costs can be seen."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.process: subprocess.Popen[bytes] | None = None

    def save(self, step: int, state: State) -> None:
        """Start it."""
        tensors = (v for v in flatten(state).values() if isinstance(v, torch.Tensor))
        size_bytes = sum(tensor.nbytes for tensor in tensors)
        command, environment = fio_command("write", self.path(step), size_bytes, "transparent")
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)

    def is_durable(self) -> bool:
        """Tell whether it has ended."""
        assert self.process is not None, "nothing was saved"  # noqa: S101
        return self.process.poll() is not None

    def finish(self) -> None:
        """Wait for its end."""
        assert self.process is not None, "nothing was saved"  # noqa: S101
        if self.process.wait() != 0:
            raise subprocess.CalledProcessError(self.process.returncode, self.process.args)

    def load(self, step: int, state: State) -> State:
        """Fail: it keeps no state."""
        raise NotImplementedError


@dataclass(frozen=True)
class Entrant:
    """An engine with its settings, as it appears in the tables."""

    key: str
    title: str
    settings: str
    make: Callable[[Path], Engine]
    modules: tuple[str, ...]
    """What it needs; imported before anything is timed."""

    @property
    def is_ours(self) -> bool:
        """Whether it is this project's engine."""
        return self.key.startswith("dtruntime")

    def missing(self) -> str | None:
        """Name the package that it needs and that is not here."""
        packages = (module.split(".")[0] for module in self.modules)
        return next((p for p in packages if importlib.util.find_spec(p) is None), None)


ENTRANTS = (
    Entrant(
        "dtruntime_auto",
        "dtruntime",
        "`CheckpointManager(path)`, `save_async`; `load()`, `restore(state)`",
        Dtruntime,
        modules=("dtruntime",),
    ),
    Entrant(
        "dtruntime_none",
        "dtruntime, `none`",
        '`CheckpointManager(path, compression="none")`; the same',
        lambda folder: Dtruntime(folder, compression="none"),
        modules=("dtruntime",),
    ),
    Entrant(
        "dtruntime_float",
        "dtruntime, `float`",
        '`CheckpointManager(path, compression="float")`; the same',
        lambda folder: Dtruntime(folder, compression="float"),
        modules=("dtruntime",),
    ),
    Entrant(
        "dtruntime_dcp",
        "dtruntime, `dcp.save`",
        '`CheckpointManager(path, staging_bytes="256MiB")`, `StorageWriter` and `StorageReader` on '
        "it; `dcp.load` as below",
        DcpOnDtruntime,
        modules=("dtruntime.dcp", "torch.distributed.checkpoint"),
    ),
    Entrant(
        "torch_save",
        "torch.save",
        "`torch.save` into a file, fsync of file and directory by the harness; "
        "`torch.load(mmap=True)`, a byte of each page read within the time, or copied",
        TorchSave,
        modules=("torch",),
    ),
    Entrant(
        "safetensors",
        "safetensors",
        "`save_file` of the flattened state, fsync of file and directory by the harness; "
        "`load_file` (maps the file), a byte of each page read within the time, or copied",
        Safetensors,
        modules=("safetensors.torch",),
    ),
    Entrant(
        "dcp_save",
        "dcp.save",
        "`FileSystemWriter(sync_files=True)`, fsync of the directory by the harness; "
        "`dcp.load` into fresh tensors, or into those that are there",
        DcpSave,
        modules=("torch.distributed.checkpoint",),
    ),
    Entrant(
        "dcp_async",
        "dcp.async_save",
        "the same writer, the default stager; the same load",
        DcpAsync,
        modules=("torch.distributed.checkpoint",),
    ),
    Entrant(
        "dcp_async_tuned",
        "dcp.async_save, tuned",
        "`thread_count=2`, one `DefaultStager` kept for all saves, so that its memory is reused "
        "(pinned and asynchronous staging need an accelerator); the same load",
        DcpAsyncTuned,
        modules=("torch.distributed.checkpoint",),
    ),
    Entrant(
        "torch_checkpointing",
        "torch_checkpointing",
        "defaults, but `use_direct_io=False` (its direct writes are not aligned, and ext4 refuses "
        "them); fsync of files and directories by the harness; the stall ends when its "
        "`lock()` can be had; `load()` into memory that it maps, `load(into=state)`",
        TorchCheckpointing,
        modules=("torch_checkpointing",),
    ),
)


FIO = Entrant("fio_huge", "*fio, huge pages*", "", FioWrite, modules=())


def entrant(key: str) -> Entrant:
    """Find an entrant by its key."""
    return next(e for e in (*ENTRANTS, FIO) if e.key == key)


def emptied(state: State) -> State:
    """Give the same structure with fresh memory for the tensors."""
    fresh: State = {}
    for key, value in state.items():
        if isinstance(value, dict):
            fresh[key] = emptied(value)
        elif isinstance(value, torch.Tensor):
            fresh[key] = torch.empty_like(value)
        else:
            fresh[key] = value
    return fresh


def copy_into(live: State, loaded: State) -> None:
    """Copy what was loaded into tensors that are there, path by path."""
    found = flatten(loaded)
    for path, value in flatten(live).items():
        if isinstance(value, torch.Tensor):
            value.copy_(found[path])


def touched(state: State) -> State:
    """Read a byte of each page, so that everything a mapped file holds is in memory."""
    for value in flatten(state).values():
        if isinstance(value, torch.Tensor):
            bits_of(value)[::4096].sum()
    return state


def sync(path: Path) -> None:
    """Make a file durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


sync_directory = sync


def disk_bytes(folder: Path) -> int:
    """Give the bytes that a folder's files occupy."""
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


def seconds_of(act: Callable[[], object]) -> float:
    """Time an act."""
    began = time.perf_counter()
    act()
    return time.perf_counter() - began
