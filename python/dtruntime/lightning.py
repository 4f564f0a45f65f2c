"""Adapter for PyTorch Lightning: its checkpoints, on this engine's stores.

>>> from dtruntime.lightning import CheckpointIO
>>> checkpoints = CheckpointIO()
>>> trainer = Trainer(plugins=[checkpoints], callbacks=[ModelCheckpoint("runs", save_last=True)])
>>> trainer.fit(model, ckpt_path=checkpoints.newest("runs"))

Lightning names checkpoints and decides which to keep; each of its paths is a store with one
checkpoint.

Always holds: a checkpoint that Lightning removes or overwrites is deleted only once the one saved
after it is durable; an error in the background is raised by the next call; nothing is deleted
except what this plugin created, and what Lightning told it to remove.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import shutil
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import distributed

from dtruntime import _native, settings
from dtruntime.checkpoint import CheckpointManager
from dtruntime.errors import CheckpointNotFound, InvalidArgument, UnsupportedValue
from dtruntime.opened import opened_by
from dtruntime.ranks import launch

if TYPE_CHECKING:
    from types import ModuleType

    from dtruntime.saving.handle import SaveHandle

__all__ = ["CheckpointIO"]

_logger = logging.getLogger("dtruntime")

# The same code is distributed under two package names.
_PLUGINS = ("lightning.fabric.plugins", "lightning_fabric.plugins")
# Lightning saves what is identical on all ranks on one of them.
_ALONE: dict[str, Any] = {"rank": 0, "world_size": 1}
_STEP = "global_step"  # Lightning's, in its checkpoints and in their metadata
_IGNORE = 'leave it out: `self.save_hyperparameters(ignore=["..."])`'
_SETTINGS = (
    "compression",
    "staging_bytes",
    "chunk_bytes",
    "direct_io",
    "io_backend",
    "in_flight_bytes",
    "workers",
    "progress",
    "s3",
    "sigterm",
    "sigterm_deadline_seconds",
)


class CheckpointIO:
    """Saves in the background, and loads what was saved, for a ``Trainer`` or a ``Fabric``.

    A save returns once the state is copied. The next save, a load, or the end of the training waits
    until it is durable, and raises if it failed. An existing path is overwritten atomically: until
    the new checkpoint is durable, the old one is in place. If that is a link, or one of Lightning's
    own files, the save blocks until it is replaced; so does a save before SLURM ends the process.

    With FSDP, keep ``state_dict_type="sharded"``: Lightning writes that itself. It would not resume
    from what it lets this plugin save otherwise.

    Args:
        options: As for ``CheckpointManager``, any of: ``compression``, ``staging_bytes``,
            ``chunk_bytes``, ``direct_io``, ``io_backend``, ``in_flight_bytes``, ``workers``,
            ``progress``, ``s3``, ``sigterm``, ``sigterm_deadline_seconds``. Lightning decides which
            checkpoints are kept.

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
        self._may_remove = True  # unless the last save failed
        self._made: str | None = None  # the path, if the save in flight created it
        self._to_remove: list[str] = []
        self._removal: _Removal | None = None  # in the background: a large file takes a while

    def save_checkpoint(
        self,
        checkpoint: dict[str, Any],
        path: str | os.PathLike[str],
        storage_options: Any = None,
    ) -> None:
        """Save a state at ``path``, in the background.

        Raises:
            UnsupportedValue: Something in the state cannot be stored. Nothing was written.
            CheckpointError: The previous save failed, or this one cannot start.

        >>> checkpoints.save_checkpoint({"state_dict": model.state_dict(), "global_step": 10}, path)

        """
        if storage_options is not None:
            raise InvalidArgument(
                f"saving `{os.fspath(path)}` with `storage_options`",
                "this plugin accepts none",
                "pass the settings of a `CheckpointManager` to `CheckpointIO`",
            )
        _check_hyperparameters(checkpoint)
        place = _normal(path)
        self._settle()
        if _is_link_or_file(place):
            self._replace(checkpoint, place)
            return
        self._begin(checkpoint, place)
        # Training does not continue after this save, or SLURM is about to stop it.
        if _STEP not in checkpoint or Path(place).name.startswith("hpc_ckpt_"):
            self._settle()

    def load_checkpoint(
        self,
        path: str | os.PathLike[str],
        map_location: Any = None,
        weights_only: bool | None = None,
    ) -> Any:
        """Load what is at ``path``: a checkpoint of this plugin, or one of Lightning's own files.

        With several ranks, all of them call it.

        Args:
            path: The path.
            map_location: Device for tensors. Default: host memory.
            weights_only: For Lightning's own files. A checkpoint of this plugin contains no code.

        Raises:
            CheckpointNotFound: There is none: its save did not finish.
            Corrupt: It is damaged.

        >>> checkpoints.load_checkpoint("runs/last.ckpt")["global_step"]
        10

        """
        self._settle_ranks()
        if Path(path).is_file():
            plugin: Any = _lightning()[0].TorchCheckpointIO()
            given = {} if weights_only is None else {"weights_only": weights_only}
            where = "cpu" if map_location is None else map_location
            return plugin.load_checkpoint(path, map_location=where, **given)
        with CheckpointManager(path, **self._settings, read_only=True) as manager:
            try:
                return manager.load(map_location=map_location)
            except CheckpointNotFound as error:
                raise CheckpointNotFound(
                    error.what,
                    f"{error.why}; its save may have been interrupted",
                    f"`CheckpointIO().newest({os.path.dirname(path)!r})` finds the newest complete "  # noqa: PTH120
                    "one",
                ) from None

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Remove what is at ``path``, once the save in flight, or else the next one, is durable.

        >>> checkpoints.remove_checkpoint("runs/epoch=0-step=10.ckpt")
        """
        self._to_remove.append(_normal(path))
        if self._handle is None or self._handle.done():
            self._settle()

    def teardown(self) -> None:
        """Wait until everything is durable. The plugin can be used again.

        Raises:
            CheckpointError: The last save failed.

        """
        try:
            self._settle()
            self._end_removal()
        finally:
            self._close()

    def newest(self, directory: str | os.PathLike[str], *, verify: bool = True) -> str | None:
        """Find the newest complete checkpoint in ``directory``; None if there is none.

        With several ranks, all of them call it. The newest is the one with the latest step; of
        equal ones, the one saved last. If there are only Lightning's own files, it is the newest
        file. Pass it to ``trainer.fit(ckpt_path=...)``, where ``"last"`` might be one whose save
        was interrupted.

        Args:
            directory: A directory that ``ModelCheckpoint`` saves to.
            verify: Whether every rank reads and checks every byte. If not, damage is only found
                when loading.

        Raises:
            InvalidArgument: It is not a local directory.

        >>> checkpoints.newest("runs")
        'runs/epoch=3-step=400.ckpt'

        """
        if "://" in os.fspath(directory):
            raise InvalidArgument(
                f"looking for the newest checkpoint in `{directory}`",
                "only local directories can be listed",
                "pass the path of the checkpoint",
            )
        self._settle_ranks()
        paths = [path for path in Path(directory).glob("[!.]*") if not path.is_symlink()]
        stores = [path for path in paths if _is_store(path)]
        known = sorted(filter(None, map(self._latest, stores)), reverse=True)
        for _, _, path in known:
            if not verify or self._is_whole(path):
                return path
        if known:
            return None
        files = [path for path in paths if path.suffix == ".ckpt" and path.is_file()]
        return str(max(files, key=lambda path: path.stat().st_mtime_ns)) if files else None

    def _latest(self, path: Path) -> tuple[int, int, str] | None:
        """Return a store's training step, the time of the save, and its path; None if empty."""
        with CheckpointManager(path, **self._settings, read_only=True) as manager:
            number = max(manager.all_steps(), default=None)
            if number is None:
                return None
            step = manager.metadata(number).get(_STEP, number)
        saved = [part.stat().st_mtime_ns for part in path.glob("step-*")]
        return step, max(saved), str(path)

    def _is_whole(self, path: str) -> bool:
        with CheckpointManager(path, **self._settings, read_only=True) as manager:
            report = manager.verify()
        if not report.ok:
            _logger.warning("`%s` is damaged, and skipped: %s", path, report.damage[0])
        return report.ok

    def _begin(self, checkpoint: dict[str, Any], place: str) -> None:
        """Start to save at a path that is a store or does not exist; leave nothing on failure."""
        if self._removal is not None and place in self._removal.places:
            self._end_removal()
        is_new = "://" not in place and not os.path.lexists(place)
        if not is_new and "://" not in place and not _is_store(Path(place)):
            raise InvalidArgument(
                f"saving `{place}`",
                "a directory exists there, and it is not a checkpoint",
                "move it away, or save elsewhere",
            )
        self._made = place if is_new else None
        try:
            if self._manager is None or os.fspath(self._manager.path) != place:
                if not is_new and "://" not in place:
                    _discard(_aside(place))  # the replaced file, left by a process that was killed
                self._open(place)
            assert self._manager is not None  # noqa: S101
            step = _step_of(checkpoint)
            # A step that is saved again, or after going back, still gets a later number in its
            # store: files of a replaced step would stay for a day.
            number = max(step, max(self._manager.all_steps(), default=-1) + 1)
            self._handle = self._manager.save_async(
                checkpoint,
                number,
                rewind=True,  # replaces damaged ones, which `all_steps` does not list
                metadata={_STEP: step},
            )
        except UnsupportedValue as error:
            self._take_back()
            if "hyper_parameters" not in error.what:
                raise
            raise UnsupportedValue(error.what, error.why, _IGNORE) from None
        except BaseException:
            self._take_back()
            raise

    def _open(self, place: str) -> None:
        """Open a store, and reuse the staging memory of the previous one."""
        former = self._manager
        self._manager = CheckpointManager(place, **self._settings, keep_last_n=1)
        if former is not None:
            with former:
                opened_by(self._manager).native.take_staging_of(opened_by(former).native)

    def _replace(self, checkpoint: dict[str, Any], place: str) -> None:
        """Replace a link or a file, which stays until the checkpoint is durable."""
        aside = _aside(place)
        _discard(aside)  # left by a process that was killed
        self._begin(checkpoint, aside)
        self._settle()
        self._close()
        if not _native.swap(aside, place):  # not supported by the filesystem, such as NFS
            os.remove(place)  # noqa: PTH107
            os.rename(aside, place)  # noqa: PTH104
        descriptor = os.open(Path(place).parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        _discard(aside)

    def _take_back(self) -> None:
        """Remove the empty store that a failed save created."""
        self._may_remove = False
        made, self._made = self._made, None
        if made is None:
            return
        self._close()
        if Path(made).is_dir() and self._latest(Path(made)) is None:
            shutil.rmtree(made)

    def _close(self) -> None:
        manager, self._manager = self._manager, None
        if manager is not None:
            manager.close()

    def _settle(self) -> None:
        """Wait for the save in flight, then start removing what may be removed."""
        handle, self._handle = self._handle, None
        if handle is not None:
            try:
                handle.result()
            except BaseException:
                self._take_back()
                raise
            self._made, self._may_remove = None, True
        if self._may_remove and self._to_remove:
            self._end_removal()
            self._begin_removal()

    def _settle_ranks(self) -> None:
        """Do so on every rank, even if one fails: the others would wait forever."""
        try:
            self._settle()
            self._end_removal()
        finally:
            group = launch.process_group()
            if group is not None and group.world_size > 1:
                distributed.barrier()

    def _begin_removal(self) -> None:
        for place in filter(_is_link_or_file, [*self._to_remove]):
            self._to_remove.remove(place)
            os.remove(place)  # noqa: PTH107
        places, self._to_remove = self._to_remove, []
        if self._manager is not None and os.fspath(self._manager.path) in places:
            self._close()
        self._removal = _Removal(places, self._settings)

    def _end_removal(self) -> None:
        """Wait until everything is removed. After an error, the next removal takes the rest."""
        removal, self._removal = self._removal, None
        if removal is None:
            return
        try:
            removal.end()
        except BaseException:
            self._to_remove = removal.places + self._to_remove
            raise

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for another process, after all saves have finished."""
        self.teardown()
        return vars(self).copy()


class _Removal:
    """Removes checkpoints one after the other, on a thread that the interpreter waits for."""

    def __init__(self, places: list[str], options: dict[str, Any]) -> None:
        self.places = places
        """What is not removed yet; the first one may be in progress."""
        self._settings = options
        executor = ThreadPoolExecutor(1, thread_name_prefix="dtruntime-removal")
        self._end = executor.submit(self._remove_all)
        executor.shutdown(wait=False)

    def end(self) -> None:
        """Wait until all are removed, or raise the error of one that could not be removed."""
        self._end.result()

    def _remove_all(self) -> None:
        while self.places:
            try:
                self._remove(self.places[0])
            finally:
                del self.places[0]

    def _remove(self, place: str) -> None:
        is_local = "://" not in place
        if is_local and not _is_store(Path(place)):
            return  # already removed, or not ours
        with CheckpointManager(place, **self._settings) as manager:
            for step in manager.all_steps():
                manager.delete(step)
        if is_local:
            shutil.rmtree(place)


def _check(given: dict[str, Any]) -> None:
    """Refuse a setting now, not at the first save."""
    for name in given:
        settings.check_name(
            f"`CheckpointIO({name}=...)`",
            name,
            _SETTINGS,
            "which checkpoints are kept, and where, is set by Lightning's `ModelCheckpoint`",
        )
    with tempfile.TemporaryDirectory() as empty:
        CheckpointManager(empty, **given, **_ALONE, read_only=True).close()


def _lightning() -> list[ModuleType]:
    """Return Lightning's plugin modules: all that are imported, else one that is installed."""
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


def _normal(path: str | os.PathLike[str]) -> str:
    """Return a normalized path: otherwise one store could be taken for two."""
    text = os.fspath(path)
    return text if "://" in text else os.path.abspath(text)  # noqa: PTH100


def _aside(place: str) -> str:
    """Return the temporary path for a save that will replace a link or a file."""
    return str(Path(place).with_name(f".{Path(place).name}.saving"))


def _discard(aside: str) -> None:
    """Remove what a replacing save has left at its temporary path, or what it has replaced."""
    if _is_link_or_file(aside):
        os.remove(aside)  # noqa: PTH107
    elif _is_store(Path(aside)):
        shutil.rmtree(aside)


def _is_link_or_file(place: str) -> bool:
    return os.path.islink(place) or os.path.isfile(place)  # noqa: PTH113, PTH114


def _is_store(path: Path) -> bool:
    """Return whether a directory is empty, or a store without other files in it."""
    if not path.is_dir():
        return False
    names = {entry.name for entry in path.iterdir()}
    rest = {name for name in names if not name.startswith("step-")}
    return not names or rest == {"writer.lock"}


def _check_hyperparameters(checkpoint: dict[str, Any]) -> None:
    """Refuse hyperparameters that would be loaded as something else."""
    for name, value in dict(checkpoint.get("hyper_parameters") or {}).items():
        if hasattr(value, "state_dict"):
            raise UnsupportedValue(
                f'saving `state["hyper_parameters"]["{name}"]`',
                f"only the `state_dict()` of a `{type(value).__name__}` would be loaded",
                _IGNORE,
            )


def _step_of(checkpoint: dict[str, Any]) -> int:
    """Return the training step of a state; 0 if it has none."""
    step = checkpoint.get(_STEP, 0)
    return step if isinstance(step, int) and step >= 0 else 0
