"""The door for PyTorch Lightning: what its trainer saves and resumes from, on this engine's stores.

>>> from dtruntime.lightning import CheckpointIO
>>> checkpoints = CheckpointIO()
>>> trainer = Trainer(plugins=[checkpoints], callbacks=[ModelCheckpoint("runs", save_last=True)])
>>> trainer.fit(model, ckpt_path=checkpoints.newest("runs"))

Lightning names checkpoints and decides which stay; each of its paths is a store with one
checkpoint.

Always holds: a checkpoint that Lightning has removed, or has overwritten, is gone only once the one
that was saved after it is durable; what failed in the background is raised by the next call.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import distributed

from dtruntime import launch
from dtruntime.checkpoint import CheckpointManager
from dtruntime.errors import CheckpointNotFound, InvalidArgument

if TYPE_CHECKING:
    from types import ModuleType

    from dtruntime.handle import SaveHandle

__all__ = ["CheckpointIO"]

# One package ships the same code under two names.
_PLUGINS = ("lightning.fabric.plugins", "lightning_fabric.plugins")
_ALONE: dict[str, Any] = {
    "rank": 0,
    "world_size": 1,
}  # Lightning saves on one rank what all of them hold
_SETTINGS = (
    "compression",
    "staging_bytes",
    "chunk_bytes",
    "direct_io",
    "io_backend",
    "progress",
    "s3",
    "sigterm",
    "sigterm_deadline_seconds",
)


class CheckpointIO:
    """Saves in the background, and loads what was saved, for a ``Trainer`` or a ``Fabric``.

    A save returns once the state is copied. The next save, a load, or the end of the training waits
    until it is durable, and raises if it is not. A path that exists is overwritten all or not at
    all: until the new checkpoint is durable, the old one is what is there. (A file of Lightning's
    own is renamed to ``.replaced`` until then.)

    What Lightning's strategies for FSDP and DeepSpeed save in parts does not come by here.

    Args:
        options: As for ``CheckpointManager``, some of: ``compression``, ``staging_bytes``,
            ``chunk_bytes``, ``direct_io``, ``io_backend``, ``progress``, ``s3``, ``sigterm``,
            ``sigterm_deadline_seconds``. Which checkpoints stay is Lightning's to say.

    Raises:
        InvalidArgument: A setting is not accepted, or Lightning is not installed.

    >>> trainer = Trainer(plugins=[CheckpointIO(compression="float")])

    """

    def __init__(self, **options: Any) -> None:
        for module in _lightning():
            module.CheckpointIO.register(type(self))  # for its `isinstance`
        _check(options)
        self._settings = options | _ALONE
        self._manager: CheckpointManager | None = None
        self._handle: SaveHandle | None = None
        self._to_remove: list[str] = []

    def save_checkpoint(
        self,
        checkpoint: dict[str, Any],
        path: str | os.PathLike[str],
        storage_options: Any = None,
    ) -> None:
        """Save a state at ``path``, in the background.

        Raises:
            UnsupportedValue: Something in the state cannot be stored. Nothing was written.
            CheckpointError: The save before failed, or this one cannot begin.

        >>> checkpoints.save_checkpoint({"state_dict": model.state_dict(), "global_step": 10}, path)

        """
        if storage_options is not None:
            raise InvalidArgument(
                f"saving `{os.fspath(path)}` with `storage_options`",
                "this plugin takes none",
                "give `CheckpointIO` the settings of a `CheckpointManager`",
            )
        self._settle()
        # Where it goes back, or saves the same step again, this one takes the place of the other.
        manager = self._writer(os.fspath(path))
        self._handle = manager.save_async(checkpoint, _step_of(checkpoint), rewind=True)
        if "global_step" not in checkpoint:
            self._settle()  # not of a training that goes on: whoever asked reads it next

    def load_checkpoint(
        self,
        path: str | os.PathLike[str],
        map_location: Any = None,
        weights_only: bool | None = None,
    ) -> Any:
        """Load what is at ``path``: a checkpoint of this plugin, or a file of Lightning's own.

        With several ranks, all of them call it.

        Args:
            path: The path.
            map_location: Device for tensors. Default: the host's memory.
            weights_only: Of Lightning's own files. A checkpoint of this plugin holds no code.

        Raises:
            CheckpointNotFound: There is none: its save did not end.
            Corrupt: It is damaged.

        >>> checkpoints.load_checkpoint("runs/last.ckpt")["global_step"]
        10

        """
        self._settle_ranks()
        if Path(path).is_file():
            plugin: Any = _lightning()[0].TorchCheckpointIO()
            return plugin.load_checkpoint(path, map_location, weights_only=weights_only)
        with CheckpointManager(path, **self._settings, read_only=True) as manager:
            try:
                return manager.load(map_location=map_location)
            except CheckpointNotFound as error:
                raise CheckpointNotFound(
                    error.what,
                    f"{error.why}; a save of it may have been cut short",
                    f"`CheckpointIO().newest({os.path.dirname(path)!r})` finds the newest that is "  # noqa: PTH120
                    "whole",
                ) from None

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Remove what is at ``path``, once the save in flight is durable.

        >>> checkpoints.remove_checkpoint("runs/epoch=0-step=10.ckpt")
        """
        self._to_remove.append(os.fspath(path))
        if self._handle is None or self._handle.done():
            self._settle()

    def teardown(self) -> None:
        """Wait until everything is durable. The plugin can be used again.

        Raises:
            CheckpointError: The last save failed.

        """
        try:
            self._settle()
        finally:
            self._close()

    def newest(self, directory: str | os.PathLike[str]) -> str | None:
        """Find the newest checkpoint in ``directory`` that is whole; None if there is none.

        With several ranks, all of them call it. The newest is the one of the latest step; of equal
        ones, that which was saved last. Give it to ``trainer.fit(ckpt_path=...)`` where ``"last"``
        might be one whose save was cut short.

        >>> checkpoints.newest("runs")
        'runs/epoch=3-step=400.ckpt'

        """
        self._settle_ranks()
        known = []
        for path in Path(directory).glob("*"):
            if path.is_dir() and not path.is_symlink():
                with CheckpointManager(path, **self._settings, read_only=True) as manager:
                    steps = manager.all_steps()
                    if steps and manager.latest_step() is not None:
                        known.append((steps[-1], path.stat().st_mtime_ns, str(path)))
        return max(known)[2] if known else None

    def _writer(self, path: str) -> CheckpointManager:
        """Give the manager of a path; the one of the path before is closed."""
        if self._manager is None or os.fspath(self._manager.path) != path:
            self._close()
            if os.path.isfile(path):  # noqa: PTH113
                aside = f"{path}.replaced"
                os.replace(path, aside)  # noqa: PTH105
                self._to_remove.append(aside)
            self._manager = CheckpointManager(path, **self._settings, keep_last_n=1)
        return self._manager

    def _close(self) -> None:
        manager, self._manager = self._manager, None
        if manager is not None:
            manager.close()

    def _settle(self) -> None:
        """Wait for the save in flight, then remove what may go."""
        handle, self._handle = self._handle, None
        removals, self._to_remove = self._to_remove, []
        if handle is not None:
            handle.result()
        for path in removals:
            self._remove(path)

    def _settle_ranks(self) -> None:
        """Do so on every rank, also where one fails: the others would wait for ever."""
        try:
            self._settle()
        finally:
            group = launch.process_group()
            if group is not None and group.world_size > 1:
                distributed.barrier()

    def _remove(self, path: str) -> None:
        if self._manager is not None and os.fspath(self._manager.path) == path:
            self._close()
        if os.path.islink(path) or os.path.isfile(path):  # noqa: PTH113, PTH114
            os.remove(path)  # noqa: PTH107
            return
        with CheckpointManager(path, **self._settings) as manager:
            for step in manager.all_steps():
                manager.delete(step)
        if "://" not in path:
            shutil.rmtree(path)


def _check(given: dict[str, Any]) -> None:
    """Refuse a setting now, not at the first save."""
    for name in given:
        if name not in _SETTINGS:
            near = difflib.get_close_matches(name, _SETTINGS, n=1)
            raise InvalidArgument(
                f"`CheckpointIO({name}=...)`",
                "expected some of " + ", ".join(f"`{text}`" for text in _SETTINGS),
                f"did you mean `{near[0]}`?"
                if near
                else "which checkpoints stay, and where, is told to Lightning's `ModelCheckpoint`",
            )
    with tempfile.TemporaryDirectory() as empty:
        CheckpointManager(empty, **given, **_ALONE, read_only=True).close()


def _lightning() -> list[ModuleType]:
    """Give Lightning's plugins: of every package of it that is imported, or else is installed."""
    imported = [sys.modules[name] for name in _PLUGINS if name in sys.modules]
    if imported:
        return imported
    for name in _PLUGINS:
        if importlib.util.find_spec(name.partition(".")[0]) is not None:
            return [importlib.import_module(name)]
    raise InvalidArgument(
        "`dtruntime.lightning`",
        "Lightning is not installed",
        "install it: `pip install lightning`, or `pytorch-lightning`",
    )


def _step_of(checkpoint: dict[str, Any]) -> int:
    """Give the training step that a state is of; 0 if it does not say."""
    step = checkpoint.get("global_step", 0)
    return step if isinstance(step, int) and step >= 0 else 0
