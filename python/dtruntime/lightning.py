"""The door for PyTorch Lightning: what its trainer saves and resumes from, on this engine's stores.

>>> from dtruntime.lightning import CheckpointIO
>>> checkpoints = CheckpointIO()
>>> trainer = Trainer(plugins=[checkpoints], callbacks=[ModelCheckpoint("runs", save_last=True)])
>>> trainer.fit(model, ckpt_path=checkpoints.newest("runs"))

Lightning names checkpoints and decides which stay; each of its paths is a store with one
checkpoint.

Always holds: a checkpoint that Lightning has removed, or has overwritten, is gone only once the one
that was saved after it is durable; what failed in the background is raised by the next call;
nothing is deleted but what this plugin made, and what Lightning told it to remove.
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
from dtruntime.ranks import launch

if TYPE_CHECKING:
    from types import ModuleType

    from dtruntime.saving.handle import SaveHandle

__all__ = ["CheckpointIO"]

_logger = logging.getLogger("dtruntime")

# One package ships the same code under two names.
_PLUGINS = ("lightning.fabric.plugins", "lightning_fabric.plugins")
# Lightning saves on one rank what all of them hold.
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
    until it is durable, and raises if it is not. A path that exists is overwritten all or not at
    all: until the new checkpoint is durable, the old one is what is there. Where that is a link, or
    a file of Lightning's own, the save that takes its place is waited for; so is what SLURM ends.

    With FSDP, leave ``state_dict_type="sharded"``: Lightning writes that by itself. What it lets
    this plugin save otherwise, it would not resume from.

    Args:
        options: As for ``CheckpointManager``, some of: ``compression``, ``staging_bytes``,
            ``chunk_bytes``, ``direct_io``, ``io_backend``, ``in_flight_bytes``, ``workers``,
            ``progress``, ``s3``, ``sigterm``, ``sigterm_deadline_seconds``. Which checkpoints stay
            is Lightning's to say.

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
        self._made: str | None = None  # the path, if it is the save in flight that made it
        self._to_remove: list[str] = []
        self._removal: _Removal | None = None  # in the background: a large file takes its time

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
        _check_hyperparameters(checkpoint)
        place = _normal(path)
        self._settle()
        if _is_link_or_file(place):
            self._replace(checkpoint, place)
            return
        self._begin(checkpoint, place)
        # Not of a training that goes on, or of one that SLURM stops now: it is read next.
        if _STEP not in checkpoint or Path(place).name.startswith("hpc_ckpt_"):
            self._settle()

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
            given = {} if weights_only is None else {"weights_only": weights_only}
            where = "cpu" if map_location is None else map_location
            return plugin.load_checkpoint(path, map_location=where, **given)
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
        """Remove what is at ``path``, once the save in flight, or else the next, is durable.

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
        """Find the newest checkpoint in ``directory`` that is whole; None if there is none.

        With several ranks, all of them call it. The newest is the one of the latest step; of equal
        ones, that which was saved last. Where there are only files of Lightning's own, it is the
        newest file. Give it to ``trainer.fit(ckpt_path=...)``, where ``"last"`` might be one whose
        save was cut short.

        Args:
            directory: A directory that ``ModelCheckpoint`` saves to.
            verify: Whether every byte is read and checked, by every rank. If not, loading finds
                damage.

        Raises:
            InvalidArgument: It is not a local directory.

        >>> checkpoints.newest("runs")
        'runs/epoch=3-step=400.ckpt'

        """
        if "://" in os.fspath(directory):
            raise InvalidArgument(
                f"looking for the newest checkpoint in `{directory}`",
                "only local directories are listed",
                "name the checkpoint",
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
        """Give the training step of a store, when it was saved, and its path; None if empty."""
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
            _logger.warning("`%s` is damaged, and passed over: %s", path, report.damage[0])
        return report.ok

    def _begin(self, checkpoint: dict[str, Any], place: str) -> None:
        """Begin to save at a path that is a store, or not there; leave nothing if it is refused."""
        if self._removal is not None and place in self._removal.places:
            self._end_removal()
        is_new = "://" not in place and not os.path.lexists(place)
        if not is_new and "://" not in place and not _is_store(Path(place)):
            raise InvalidArgument(
                f"saving `{place}`",
                "a directory is there, and it is no checkpoint",
                "move it away, or save elsewhere",
            )
        self._made = place if is_new else None
        try:
            if self._manager is None or os.fspath(self._manager.path) != place:
                if not is_new and "://" not in place:
                    _discard(_aside(place))  # what a kill left of what this one has replaced
                self._open(place)
            assert self._manager is not None  # noqa: S101
            step = _step_of(checkpoint)
            # What goes back, or is saved again, has a later number in its store all the same: files
            # of a step that is replaced would stay for a day.
            number = max(step, max(self._manager.all_steps(), default=-1) + 1)
            self._handle = self._manager.save_async(
                checkpoint,
                number,
                rewind=True,  # damaged ones, which are none of those, make way
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
        """Open a store, with the memory for copies that the one before had."""
        former = self._manager
        self._manager = CheckpointManager(place, **self._settings, keep_last_n=1)
        if former is not None:
            with former:
                self._manager._native.take_staging_of(former._native)  # noqa: SLF001

    def _replace(self, checkpoint: dict[str, Any], place: str) -> None:
        """Save in the place of a link or a file, which stays until the checkpoint is durable."""
        aside = _aside(place)
        _discard(aside)  # of a save that a kill cut short
        self._begin(checkpoint, aside)
        self._settle()
        self._close()
        if not _native.swap(aside, place):  # a filesystem that cannot, such as NFS
            os.remove(place)  # noqa: PTH107
            os.rename(aside, place)  # noqa: PTH104
        descriptor = os.open(Path(place).parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        _discard(aside)

    def _take_back(self) -> None:
        """Leave no empty store where a save failed and nothing was before."""
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
        """Wait for the save in flight, then have removed what may go."""
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
        """Do so on every rank, also where one fails: the others would wait for ever."""
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
        """Wait until everything is removed. After an error, the next one goes on with the rest."""
        removal, self._removal = self._removal, None
        if removal is None:
            return
        try:
            removal.end()
        except BaseException:
            self._to_remove = removal.places + self._to_remove
            raise

    def __getstate__(self) -> dict[str, Any]:
        """Give what another process needs: nothing is in flight there."""
        self.teardown()
        return vars(self).copy()


class _Removal:
    """Removes checkpoints, one after the other, on a thread that the interpreter waits for."""

    def __init__(self, places: list[str], options: dict[str, Any]) -> None:
        self.places = places
        """What is not removed yet; the first one may be about to be."""
        self._settings = options
        executor = ThreadPoolExecutor(1, thread_name_prefix="dtruntime-removal")
        self._end = executor.submit(self._remove_all)
        executor.shutdown(wait=False)

    def end(self) -> None:
        """Wait until all are removed, or raise what one could not be removed for."""
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
            return  # gone, or not ours
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
            "which checkpoints stay, and where, is told to Lightning's `ModelCheckpoint`",
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


def _normal(path: str | os.PathLike[str]) -> str:
    """Give the one name of a path: without this, a store would be taken for two."""
    text = os.fspath(path)
    return text if "://" in text else os.path.abspath(text)  # noqa: PTH100


def _aside(place: str) -> str:
    """Name what is saved beside a link or a file until it takes its place."""
    return str(Path(place).with_name(f".{Path(place).name}.saving"))


def _discard(aside: str) -> None:
    """Remove what a save beside a link or a file has left, or what it has replaced."""
    if _is_link_or_file(aside):
        os.remove(aside)  # noqa: PTH107
    elif _is_store(Path(aside)):
        shutil.rmtree(aside)


def _is_link_or_file(place: str) -> bool:
    return os.path.islink(place) or os.path.isfile(place)  # noqa: PTH113, PTH114


def _is_store(path: Path) -> bool:
    """Tell whether a directory is empty, or a store with nothing of others in it."""
    if not path.is_dir():
        return False
    names = {entry.name for entry in path.iterdir()}
    rest = {name for name in names if not name.startswith("step-")}
    return not names or rest == {"writer.lock"}


def _check_hyperparameters(checkpoint: dict[str, Any]) -> None:
    """Refuse hyperparameters that would come back as something else."""
    for name, value in dict(checkpoint.get("hyper_parameters") or {}).items():
        if hasattr(value, "state_dict"):
            raise UnsupportedValue(
                f'saving `state["hyper_parameters"]["{name}"]`',
                f"of a `{type(value).__name__}` only its `state_dict()` would come back",
                _IGNORE,
            )


def _step_of(checkpoint: dict[str, Any]) -> int:
    """Give the training step that a state is of; 0 if it does not say."""
    step = checkpoint.get(_STEP, 0)
    return step if isinstance(step, int) and step >= 0 else 0
