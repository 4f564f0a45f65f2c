"""The checkpoint manager: one store as a training loop sees it.

Always holds: a checkpoint exists exactly when its save said so; what is loaded was checked; nothing
is written before a state was found to be storable as a whole; a signal may come at any moment: a
save that its handler interrupts is none, one that it begins in another save is refused, and what it
interrupts of opening or closing is taken back, or goes on with the next ``close``.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from typing import TYPE_CHECKING, Any

from dtruntime import _native, lifecycle, settings
from dtruntime.errors import (
    CheckpointError,
    Closed,
    InvalidArgument,
    RestoreIncomplete,
)
from dtruntime.lineage import Lineage
from dtruntime.loading import fallback
from dtruntime.loading.reader import device_of
from dtruntime.loading.source import Habits, Source
from dtruntime.location import Named
from dtruntime.ranks import connecting, launch, membership
from dtruntime.ranks.job_settings import JobSettings, job_settings_from
from dtruntime.reports import (
    Damage,
    LoadReport,
    PendingUpload,
    RestoreReport,
    SaveInfo,
    VerifyReport,
)
from dtruntime.restoring.applying import Attempts
from dtruntime.restoring.restore import plan_restore
from dtruntime.saving.handle import SaveHandle, end_copies
from dtruntime.saving.replication import Replication
from dtruntime.saving.saver import Rules, Saver
from dtruntime.saving.watcher import Watcher
from dtruntime.state import gpus, wrappers
from dtruntime.state.globs import globs_of
from dtruntime.state.state_tree import needs_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import TracebackType

    from typing_extensions import Self

    from dtruntime.ranks.connecting import Security
    from dtruntime.restoring.plan import RestorePlan

_logger = logging.getLogger("dtruntime")


class CheckpointManager:
    """Saves and loads training states in one store.

    A context manager: leaving the block waits for the save in flight and closes the store.

    If this process is registered with a coordinator, the store, ``keep_last_n``, ``compression``,
    ``async_write`` and ``save_interval_steps`` default to what the coordinator's ``[storage]`` and
    ``[checkpoint]`` say. The defaults below are those where it says nothing.

    Args:
        path: The store: a directory, made with its parents if it is not there, or
            ``s3://bucket/prefix``. Default: the environment's ``CHECKPOINT_DIR``.
        keep_last_n: Newest checkpoints to keep. Default: all. (``keep_every=1`` keeps all, too,
            whatever a coordinator says.)
        keep_every: Keep every checkpoint whose step is a multiple of this, besides.
        keep_best_n: Keep this many besides: the best by ``best_metric``, of equal ones the newer.
        best_metric: Key of the number in ``metadata`` that tells which checkpoints are best, such
            as ``val_loss``; those without it are never among them.
        best_mode: ``min`` where small values of it are the better ones, as of a loss, or ``max``.
        compression: ``auto`` (the default), ``none``, ``float`` (made for weights), ``zstd`` or
            ``gzip``.
        staging_bytes: Memory that snapshots are copied into: bytes, or text such as ``"2GiB"``.
            Default: the state's size, at most a quarter of the machine's memory, which the ranks of
            a machine share where ``LOCAL_WORLD_SIZE`` says how many they are. A larger state
            streams through it, and the training loop waits longer.
        chunk_bytes: Unit of encoding, checksums and I/O: a power of two from 64 KiB to 64 MiB.
            Default 4 MiB.
        direct_io: Whether the page cache is bypassed; ``auto`` where the filesystem takes it.
        io_backend: ``auto``, ``uring`` or ``threads``.
        in_flight_bytes: Bytes on their way to the device at a time: bytes, or text. Default 32 MiB,
            or two chunks where that is more.
        workers: Threads that check and compress, 1 to 256. Default: one per core, which the ranks
            of a machine share, at most 16. Fewer leave more of the cores to training, and take
            longer.
        gc_grace_seconds: Age below which nothing is deleted that a save left unfinished. Default: a
            day.
        verify_on_load: Whether every chunk is checked on loading. Manifests and indexes always are.
        progress: Whether saves show a bar on standard error.
        read_only: For evaluators: writes, locks and deletes nothing.
        async_write: False makes ``save_async`` wait until the checkpoint is durable.
        save_interval_steps: What ``should_save`` goes by. Default: every step.
        rank: This process's rank. Default: that in the process group of ``torch.distributed``, if
            the script has initialised it, else the environment's ``RANK``, else 0.
        world_size: Default: likewise, ``WORLD_SIZE``, else 1. Where it is more, every rank saves
            its own state under the same step, and the checkpoint exists when all of them are
            durable, or not at all: this needs a store that all ranks reach, and a coordinator.
        replicated: What all ranks hold alike, as globs over paths written with dots: with data
            parallel training ``["model.*", "optimizer.*", "step"]``; ``!`` takes away what a glob
            after it matches, as in ``["*", "!random"]``. Its bytes are written once, each rank a
            part, and any number of ranks can load it. What ``replicated`` names must be the same
            on every rank: keys, plain values, shapes and the way tensors lie in memory are
            compared before a checkpoint comes to be, what the tensors hold is not. Sharded tensors
            (``DTensor``) may be among them: each rank writes its part, and any number of ranks puts
            other parts together from these.
        consistency: What keeps tensors on GPUs from changing before they were copied, if a save
            does not say: ``strict`` copies them before ``save_async`` returns, ``overlap`` beside
            forward and backward (it needs ``optimizer=``), ``device-snapshot`` from clones on the
            GPU.
        job: Name of the training run, written into manifests. Default: the environment's
            ``DTRUNTIME_JOB``, else ``default``. Where several ranks save, the coordinator tells the
            saves of a job apart by their step: a process that has two stores open at a time, of a
            model and of its moving average say, gives each a job of its own.
        coordinator_url: Where ranks find each other. Default: the environment's
            ``COORDINATOR_URL``. Under ``torchrun``, or with a process group, neither is needed:
            rank 0 then hosts a coordinator in its own process.
        security: Token and certificates for the coordinator.
        agreement_timeout: How long opening, ``load`` and ``restore`` wait for the other ranks, in
            seconds; also for rank 0 to host the coordinator, where none is named.
        sigterm: What SIGTERM does to a save in flight: ``finish`` it by the deadline, or ``drop``
            it. Default None: no handler is installed.
        sigterm_deadline_seconds: How long ``finish`` may take.
        storage_path: Another name for ``path``.
        backend: ``local`` or ``s3``. Default: what ``path`` says. With ``s3``, the scheme of
            ``path`` may be left out.
        remote: A store in S3, ``s3://bucket/prefix``, that checkpoints are brought to behind the
            training once they are committed in the directory ``path``; ``load`` takes what is not
            in the directory from there. What is not uploaded when the process ends is uploaded by
            the next manager that writes; parts that arrived are not sent again. Where several ranks
            save, each machine may have a ``path`` of its own: every rank commits there and brings
            its own part, and the checkpoint is in ``remote`` once all have.
        remote_bytes_per_second: What uploads take at most: bytes, or text such as ``"200MB"``.
        remove_before_upload: Whether retention may take what is not in ``remote`` yet.
        s3: How a store in S3 is reached, some of: ``region``, ``endpoint_url``, ``profile``,
            ``path_style`` (default: true with an endpoint), ``ca_bundle`` (a PEM file, trusted
            besides the system's), ``connect_timeout_ms`` (5,000), ``request_timeout_ms`` of one
            attempt (60,000), ``attempts`` at a request (6), ``part_bytes`` of an upload
            (``"16MiB"``), ``in_flight_bytes`` of parts (``"128MiB"``). Default: what the AWS tools
            take. Credentials come from environment, profile, web identity, container or instance.

    Raises:
        InvalidArgument: A setting is out of its range; ranks of one job open different stores, or
            this one has another store of the job open.
        StoreBusy: Another writer holds the store.
        BarrierTimeout: Not all ranks opened the store; the message names who did not.
        Unavailable: The service of a store in S3 cannot be reached, or refuses.

    >>> with CheckpointManager("runs/gpt", keep_last_n=5) as manager:
    ...     for step in range(1000):
    ...         train(step)
    ...         if manager.should_save(step):
    ...             manager.save_async({"model": model, "optimizer": optimizer}, step=step)

    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        keep_last_n: int | None = None,
        keep_every: int | None = None,
        keep_best_n: int | None = None,
        best_metric: str | None = None,
        best_mode: str = "min",
        compression: str | None = None,
        staging_bytes: int | str | None = None,
        chunk_bytes: int | str | None = None,
        direct_io: bool | str = "auto",
        io_backend: str = "auto",
        in_flight_bytes: int | str | None = None,
        workers: int | None = None,
        gc_grace_seconds: int | None = None,
        verify_on_load: bool = True,
        progress: bool = False,
        read_only: bool = False,
        async_write: bool | None = None,
        save_interval_steps: int | None = None,
        rank: int | str | None = None,
        world_size: int | str | None = None,
        replicated: Sequence[str] | str = (),
        consistency: str = "strict",
        job: str | None = None,
        coordinator_url: str | None = None,
        security: Security | None = None,
        agreement_timeout: float = 300.0,
        sigterm: str | None = None,
        sigterm_deadline_seconds: float = 30.0,
        storage_path: str | os.PathLike[str] | None = None,
        backend: str | None = None,
        remote: str | None = None,
        remote_bytes_per_second: int | str | None = None,
        remove_before_upload: bool = False,
        s3: Mapping[str, Any] | None = None,
    ) -> None:
        rank_number, ranks = launch.rank_and_world_size(rank, world_size)
        job_name = connecting.job_of(None) if job is None else job
        globs = globs_of("replicated", replicated)
        engine_settings = {
            "job": job_name,
            "rank": rank_number,
            "world_size": ranks,
            "local_world_size": launch.local_world_size(ranks),
            "read_only": bool(read_only),
        } | settings.engine_settings(
            compression=compression,
            direct_io=direct_io,
            io_backend=io_backend,
            verify_on_load=verify_on_load,
            sizes={
                "staging_bytes": staging_bytes,
                "chunk_bytes": chunk_bytes,
                "in_flight_bytes": in_flight_bytes,
            },
            counts={
                "keep_last_n": keep_last_n,
                "keep_every": keep_every,
                "keep_best_n": keep_best_n,
                "workers": workers,
                "gc_grace_seconds": gc_grace_seconds,
            },
            best=(best_metric, best_mode),
            remote=(remote, remote_bytes_per_second, remove_before_upload),
            s3=s3,
        )
        interval = settings.interval("save_interval_steps", save_interval_steps)
        self._best = (best_metric, best_mode)
        self._keeps = (keep_last_n, keep_best_n)
        self._consistency = settings.choice("consistency", consistency, gpus.MODES)
        gpus.watch_captures()  # before the first save: graphs are captured early
        self._rank, self._world_size = rank_number, ranks
        if sigterm is not None:
            settings.choice("sigterm", sigterm, ("finish", "drop"), has_default=False)
        self._verify_on_load = bool(verify_on_load)
        self._read_only = bool(read_only)
        self._pid = os.getpid()
        self._incomplete: RestoreIncomplete | None = None
        self._is_shut = False
        self._leaves_uploads = False
        self._is_closed = False
        self._failure = ""
        self._agreement_timeout = settings.seconds("agreement_timeout", agreement_timeout)

        named = Named(path, storage_path, backend, remote)
        named.check()  # what is wrong with it is told before anybody is asked
        self._ranks: membership.Seat | None = None
        if ranks > 1 and not self._read_only:
            self._ranks = membership.enter(
                lambda values: named.store(job_settings_from(values).path),
                job_name,
                (rank_number, ranks),
                (coordinator_url, security),
                self._agreement_timeout,
            )
        self._watcher = None if self._read_only else Watcher(shows_progress=progress)
        self._has_uploads = remote is not None and not self._read_only
        self._uploads = Watcher(shows_progress=False) if self._has_uploads else None
        try:
            told = self._told(job_name, named, keep_last_n)
            self._path = named.store(told.path).path
            self._interval = interval or told.save_interval_steps or 1
            self._async_write = bool(told.async_write if async_write is None else async_write)
            self._open(json.dumps(settings.completed(engine_settings, told)), globs)
        except BaseException:
            self._give_back()
            raise
        if sigterm is not None:
            lifecycle.handle_termination(self, sigterm, sigterm_deadline_seconds)

    @property
    def path(self) -> str | os.PathLike[str]:
        """The store: its directory, or ``s3://bucket/prefix``."""
        return self._path

    @property
    def io_backend(self) -> str:
        """The way to the device that was chosen: ``uring``, ``threads``, or ``s3``."""
        return self._native.io_backend

    @property
    def last_load(self) -> LoadReport | None:
        """What the last ``load`` or ``restore`` read; None before the first."""
        return self._source.last_load

    def save_async(
        self,
        state: Any,
        step: int,
        *,
        rewind: bool = False,
        metadata: Mapping[str, Any] | None = None,
        dataset_positions: Mapping[str, Any] | None = None,
        consistency: str | None = None,
        optimizer: Any = None,
        if_busy: str = "wait",
    ) -> SaveHandle:
        """Take a snapshot of ``state`` and write it as checkpoint ``step`` in the background.

        Returns once the snapshot is taken: the state may change from then on. Waits for a save in
        flight first, if ``if_busy`` says nothing else. Until it returns, other threads must not
        change the state.

        Args:
            state: Tensors, arrays and plain values in nested dicts, lists and tuples; objects with
                ``state_dict()`` stand for what that returns. Of a sharded tensor (``DTensor``) each
                rank writes its part.
            step: The training step: later than every committed one, or see ``rewind``.
            rewind: The training went back to before ``step``: checkpoints of later steps cease to
                exist when this one is committed, and one of the same step is replaced.
            metadata: Attached to the checkpoint, as JSON; ``nan`` and ``inf`` as text. Where
                several ranks save, pass the same on all of them: one rank's is kept, with a
                ``path`` on each machine rank 0's.
            dataset_positions: The same.
            consistency: What keeps tensors on GPUs from changing before they were copied:
                ``strict``, ``overlap`` or ``device-snapshot``. Default: the manager's. Tensors in
                the host's memory are always copied before this returns.
            optimizer: With ``overlap``: the optimizer, or all of them, whose steps change the
                state. Their next step waits on the GPU; whatever else changes the state calls
                ``handle.before_update()`` first.
            if_busy: What to do while the save before is in flight: ``wait`` for it, or ``raise``,
                so that training goes on at once without this checkpoint. Several ranks have to wait
                or not as one, so there it is always ``wait``.

        Returns:
            A handle: await it, or ask for its ``result()``.

        Raises:
            UnsupportedValue: Something in the state cannot be stored. Nothing was written.
            StepConflict: The step is not after the newest committed one. Steps that ``load`` or
                ``restore`` fell back from are not in the way: what does not verify is replaced, as
                by a ``rewind``.
            InvalidArgument: A signal handler saves, and has interrupted a save of its own thread.
            NoSpace: The store has no room. Nothing was written.
            SaveInFlight: A save is in flight, and ``if_busy`` is ``raise``. Nothing was written.
            CheckpointError: The previous save failed, and nobody has looked at its error.

        Where several ranks save, the handle's result means all of them. If one cannot save, the
        save fails on every rank, naming it, and training goes on.

        >>> handle = manager.save_async({"model": model, "epoch": 3}, step=1000)
        >>> handle.result().step
        1000

        """
        number = settings.step_of(step, "save_async(state, step=...)")
        with self._saver.declining(number):
            annotations = (
                self._saver.annotated(number, metadata),
                settings.json_object("dataset_positions", dataset_positions),
            )
            self._check_can_save(number)
            chosen = gpus.choose(consistency or self._consistency, optimizer)
            self._saver.check_busy(number, if_busy)
        handle = self._saver.save(state, (number, bool(rewind)), annotations, chosen)
        if not self._async_write:
            handle.result()
        return handle

    def save(
        self,
        state: Any,
        step: int,
        *,
        rewind: bool = False,
        metadata: Mapping[str, Any] | None = None,
        dataset_positions: Mapping[str, Any] | None = None,
        consistency: str | None = None,
        optimizer: Any = None,
    ) -> SaveInfo:
        """Save like ``save_async`` and wait until the checkpoint is durable.

        Raises:
            CheckpointError: As ``save_async`` does, or the save failed.

        >>> manager.save({"model": model}, step=2000).step
        2000

        """
        handle = self.save_async(
            state,
            step,
            rewind=rewind,
            metadata=metadata,
            dataset_positions=dataset_positions,
            consistency=consistency,
            optimizer=optimizer,
        )
        return handle.result()

    def load(
        self,
        step: int | None = None,
        keys: Sequence[str] | str | None = None,
        map_location: Any = None,
        *,
        strict: bool = True,
        mmap: bool = False,
        from_rank: int | None = None,
    ) -> Any:
        """Load a state into fresh memory.

        Args:
            step: The checkpoint. Default: the newest that verifies; if newer ones do not, that is
                logged, and told by ``last_load``. A step that is named is loaded or fails.
            keys: Globs over paths written with dots, such as ``model.layers.*``, where ``*`` is any
                text and ``?`` one character: only what matches, or lies in a container that does,
                is read and returned, in the containers around it. Lists and tuples keep their
                length, with None in the other places.
            map_location: Device for torch tensors. Default: the host's memory.
            strict: Whether a glob that matches nothing is an error.
            mmap: Map uncompressed tensors instead of reading them; they are writable, and changes
                stay private. The rest is read.
            from_rank: Load what this rank saved, whatever the world size was then and is now.
                Default: this process's own rank; what is not ``replicated`` then needs as many
                ranks as saved it.

        Returns:
            What was saved, with its types. Tensors that shared memory share memory. Sharded tensors
            come whole, as plain tensors; ``restore`` reads each rank's part only.

        Raises:
            CheckpointNotFound: There is none, or not of this step.
            InvalidArgument: Another number of ranks saved it, what is asked for is not all
                ``replicated``, and ``from_rank`` is not given.
            Corrupt: The step that was named, or every one there is, is damaged.

        >>> state = manager.load()
        >>> weights = manager.load(step=1000, keys=["model.*"])["model"]

        """
        device = device_of(map_location)
        globs = None if keys is None else globs_of("keys", keys)

        def read(checkpoint: _native.Checkpoint) -> Any:
            reader = self._source.reader(checkpoint, mmap=mmap, device=device)
            keep = None if globs is None else reader.select(globs, strict=strict)
            return reader.load(keep)

        state, _ = self._source.read(step, from_rank, read)
        return state

    def restore(
        self,
        state: Any,
        step: int | None = None,
        *,
        strict: bool = True,
        cast: bool = False,
        direct: bool = False,
        from_rank: int | None = None,
    ) -> RestoreReport:
        """Load a checkpoint into the live objects of ``state``.

        Tensors and arrays are copied into; objects get ``load_state_dict``; plain values are
        replaced in their dict or list. A live sharded tensor (``DTensor``) gets its part, however
        the saved one was sharded, or was not. Where memory allows, everything is read and checked
        before anything is changed; for what live tensors take, the staging memory serves that
        saves use, where it is large enough.

        Args:
            state: Live objects under the keys that they were saved under. Other top-level entries
                of the checkpoint are not read; the report lists them as skipped.
            step: The checkpoint. Default: the newest that verifies, as for ``load``.
            strict: Whether everything must fit: nothing missing, unexpected, of another shape or
                type, of another class of optimizer, or saved apart for live tensors that share
                memory. If not, what fits is restored, and the report says what did not; objects and
                top-level entries of which nothing fits are logged.
            cast: Whether floating tensors and arrays of another dtype fit, and complex ones: they
                are converted to the live dtype, one after the other, and what that cannot hold
                becomes infinite, or its largest number where it has no infinity. Until then they
                take the memory that they had when saved.
            direct: Whether tensors are read straight into live ones that lie as they were saved,
                which is faster and takes no memory for a copy. Damage is then found when the live
                state is changed in part. An older checkpoint that is restored instead makes up for
                that; where there is none, or it has not all of it, it is ``RestoreIncomplete``.
                From the first entry on whose loading runs code of yours, such as a hook of a
                module, tensors are copied all the same: that code may change what is loaded.
            from_rank: As for ``load``: with ``from_rank=0`` a job whose ranks train replicas goes
                on at another world size.

        Raises:
            InvalidArgument: The state does not fit, or another number of ranks saved it. Nothing
                was changed.
            CheckpointNotFound: There is no checkpoint.
            Corrupt: The checkpoint is damaged. Nothing was changed.
            RestoreIncomplete: It failed half-way, while it was ``direct``, or on another rank: the
                live state is a mixture, and this manager refuses to save until a restore succeeds.

        >>> manager.restore({"model": model, "optimizer": optimizer}).step
        1000

        """
        attempts = Attempts()

        def read(checkpoint: _native.Checkpoint) -> RestorePlan:
            reader = self._source.reader(checkpoint, lend=self._native.lend_staging)
            plan = plan_restore(state, reader, strict=strict, cast=cast, direct=direct)
            if strict:
                plan.check()
            return attempts.carry_out(plan, reader, end_copies)

        try:
            plan, report = self._source.read(step, from_rank, read)
            attempts.check_made_up(plan)
        except BaseException as error:
            self._incomplete = attempts.mixture(error) or self._incomplete
            if isinstance(error, CheckpointError) and attempts.incomplete not in (None, error):
                raise attempts.incomplete from error  # nothing made up for it
            raise
        wrappers.warn_of_untouched(plan)
        self._incomplete = None
        self._lineage.note_restored(report.step, is_named=step is not None)
        return plan.report(report.fell_back_from)

    def latest_step(self) -> int | None:
        """Give the newest committed step; None if nothing was ever saved.

        Raises:
            Corrupt: There are checkpoints, and none of them is whole: a training that took this for
                an empty store would begin anew, and overwrite them.

        >>> manager.latest_step()
        2000

        """
        known = self._native.candidates()
        sound = [step for step, why, _ in known if why is None]
        if known and not sound:
            damaged = {step: why for step, why, _ in known if why is not None}
            raise fallback.nothing_readable(self._path, damaged)
        return max(sound, default=None)

    def all_steps(self) -> list[int]:
        """Give the committed steps, ascending.

        >>> manager.all_steps()
        [1000, 2000]
        """
        return self._native.steps()

    def metadata(self, step: int) -> dict[str, Any]:
        """Give what was attached to a checkpoint as ``metadata``. Nothing of its state is read.

        Raises:
            CheckpointNotFound: There is no such checkpoint.

        >>> manager.metadata(2000)
        {'val_loss': 3.21}

        """
        return self._native.metadata(settings.step_of(step, "metadata(step)"))

    def best_step(self, metric: str | None = None, mode: str | None = None) -> int:
        """Give the step of the best checkpoint there is; of equal ones, the newest.

        Args:
            metric: Key of the number in ``metadata`` to compare. Default: ``best_metric``.
            mode: ``min`` or ``max``. Default: ``best_mode``.

        Raises:
            CheckpointNotFound: No checkpoint has that number.
            InvalidArgument: Neither this call nor the manager names a metric.
            Corrupt: There are checkpoints, and none of them is whole.

        Damaged checkpoints are not compared, which is logged.

        >>> weights = manager.load(step=manager.best_step(), keys=["model"])["model"]

        """
        known_metric, known_mode = self._best
        name = settings.metric("metric", known_metric if metric is None else metric)
        mode = settings.choice("mode", known_mode if mode is None else mode, settings.BEST_MODES)
        best = self._native.best_steps(name, mode == "max")
        damaged = {step: why for step, why, _ in self._native.candidates() if why is not None}
        if damaged:
            steps = ", ".join(map(str, damaged))
            _logger.warning("not compared with the best, since damaged: step %s", steps)
        if not best:
            sound = self.all_steps()
            if damaged and not sound:
                raise fallback.nothing_readable(self._path, damaged)
            raise fallback.no_metric(self._path, name, sound)
        return best[0]

    def should_save(self, step: int) -> bool:
        """Tell whether ``step`` is due: a multiple of ``save_interval_steps`` not yet saved.

        Steps that ``load`` or ``restore`` fell back from count as not saved, and so do those after
        a step that was named to ``restore``: saving them takes ``rewind=True``.

        >>> manager.should_save(2000)
        False
        """
        number = settings.step_of(step, "should_save(step)")
        if self._read_only or number % self._interval:
            return False
        saving = self._saver.in_flight()
        return self._lineage.is_ahead(number, -1 if saving is None else saving.step)

    def verify(self, step: int | None = None) -> VerifyReport:
        """Read and check every byte of a checkpoint. Damage is reported, not raised.

        Args:
            step: The checkpoint. Default: the newest.

        Raises:
            CheckpointNotFound: There is no such checkpoint.

        >>> manager.verify(step=1000).ok
        True

        """
        number = self._newest() if step is None else settings.step_of(step, "verify(step=...)")
        report = self._native.verify(number)
        damage = [Damage(**d | {"tensors": tuple(d["tensors"])}) for d in report.pop("damage")]
        return VerifyReport(**report, damage=tuple(damage))

    def delete(self, step: int) -> int:
        """Delete a checkpoint and give the bytes freed. Waits for the save in flight.

        Raises:
            CheckpointNotFound: There is no such checkpoint.

        >>> manager.delete(1000) > 0
        True

        """
        return self._native.delete(settings.step_of(step, "delete(step)"))

    def prewarm(self, state: Any) -> None:
        """Allocate the staging memory that saving ``state`` needs, ahead of the first save.

        >>> manager.prewarm({"model": model, "optimizer": optimizer})
        """
        raw_bytes, ordinals = needs_of(state, self._saver.rules.replication, self._world_size)
        usable = ordinals if ordinals and gpus.are_usable() else []
        self._native.prewarm(raw_bytes, gpus.current_streams(usable))

    def pending_uploads(self) -> list[PendingUpload]:
        """Give the checkpoints that are not in the remote store yet, by ascending step.

        Those of earlier processes, too. Empty without a remote store.

        >>> manager.pending_uploads()
        [PendingUpload(step=2000, uploaded_bytes=25165824, total_bytes=104861696)]
        """
        return [PendingUpload(*upload) for upload in self._native.pending_uploads()]

    def wait_until_finished(self, timeout: float | None = None) -> bool:
        """Wait for the save in flight, at most ``timeout`` seconds; tell whether none is left.

        Raises:
            CheckpointError: A save failed, and nobody has looked at its error.

        >>> manager.wait_until_finished()
        True

        """
        return self._native.wait_until_finished(timeout)

    def close(self) -> None:
        """Finish the save in flight, then give back threads, memory and the store's lock.

        With a remote store, what is not uploaded yet is, or is tried once more. Closing twice is
        fine; so is closing again after Ctrl-C ended this: it goes on from there. A process that
        ends after that waits for no upload: the next one goes on with them.

        Raises:
            CheckpointError: A save failed, and nobody has looked at its error; or an upload did,
                and that checkpoint is not in the remote store. The store is closed all the same.

        >>> manager.close()

        """
        if self._is_closed:
            return
        if os.getpid() != self._pid:
            self._is_closed = True
            return
        try:
            if not self._is_shut:
                self._native.wait_until_finished()
        except BaseException:
            self._saver.is_closing = True
            try:
                self._shut()
            except CheckpointError as later:
                # The first one goes on; this one must not take its place, nor be lost.
                _logger.error("closing `%s`: %s", self._path, later)  # noqa: TRY400
            raise
        self._saver.is_closing = True
        self._shut()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
            return
        self._failure = membership.failure_of(error)
        try:
            self.close()
        except CheckpointError as unseen:
            # The block's own exception goes on; this one must not take its place, nor be lost.
            _logger.error("closing `%s`: %s", self._path, unseen)  # noqa: TRY400

    def __repr__(self) -> str:
        mode = "closed" if self._is_closed else "read-only" if self._read_only else "writing"
        return f"<CheckpointManager {os.fspath(self._path)!r} {mode}>"

    def _told(self, job: str, named: Named, keep_last_n: int | None) -> JobSettings:
        """Give what the coordinator says of what is not set here, and log it."""
        seat = self._ranks
        told = job_settings_from(membership.told_in(job) if seat is None else seat.worker.settings)
        if named.is_given():  # region and endpoint are those of the store that it names
            told = told._replace(path=None, s3={})
        if told.keep_last_n is not None and keep_last_n is None and not self._read_only:
            _logger.warning(
                "the coordinator's `checkpoint.keep_last_n` is %d: older checkpoints are removed",
                told.keep_last_n,
            )
        if told != JobSettings():
            _logger.info("the coordinator says, of what is not set here: %s", told)
        return told

    def _open(self, engine_settings: str, replicated: list[str]) -> None:
        """Open the store, start the threads, and have them looked after."""
        worker = None if self._ranks is None else self._ranks.worker
        self._native = _native.Manager(self._path, engine_settings, worker)
        self._lineage = Lineage(self._native, is_read_only=self._read_only)
        timeout = None if self._ranks is None else self._agreement_timeout
        habits = Habits(self._verify_on_load, timeout, self._has_uploads)
        self._source = Source(self._native, self._path, self._lineage, habits)
        replication = Replication(replicated, self._native.share) if replicated else None
        rules = Rules(self._world_size, self._ranks is not None, replication, self._best[0])
        watchers = (self._watcher, self._uploads)
        self._saver = Saver(self._native, self._lineage, watchers, rules)
        for watcher in watchers:
            if watcher is not None:
                watcher.start()
        lifecycle.register(self, self._native, self._watcher, self._uploads, self._ranks)

    def _shut(self) -> None:
        """Give everything back. What a signal interrupts here, the next ``close`` goes on with."""
        if not self._is_shut:
            if self._watcher is not None:
                self._watcher.stop()
            if self._uploads is not None:
                try:
                    lifecycle.wait_for_uploads(self._native)
                except BaseException:
                    self._leaves_uploads = True
                    raise
                self._uploads.stop()
            self._is_shut = True  # from here on nobody is waited for
        try:
            self._native.close()
        finally:
            lifecycle.unregister(self, self._watcher)
            if self._ranks is not None:
                self._ranks.leave(self._failure)
            self._is_closed = True

    def _give_back(self) -> None:
        """Take an opening back that failed, or that a signal interrupted."""
        for watcher in (self._watcher, self._uploads):
            if watcher is not None:
                watcher.request_stop()
        if hasattr(self, "_native"):
            with contextlib.suppress(CheckpointError):
                self._native.close()
        if self._ranks is not None:
            self._ranks.leave()

    def _check_can_save(self, step: int) -> None:
        what = f"saving step {step}"
        if self._saver.is_closing:
            raise Closed(what, "the manager was closed", "make a new CheckpointManager")
        if self._read_only:
            raise InvalidArgument(
                f"{what} in `{self._path}`",
                "the store was opened read-only",
                "open it without `read_only=True`",
            )
        if self._incomplete is not None:
            raise RestoreIncomplete(
                what,
                f"the live state is a mixture, since {self._incomplete.what} failed",
                "restore again, from this step or another, before saving",
            ) from self._incomplete

    def _newest(self) -> int:
        known = self._native.candidates()
        if not known:
            raise fallback.no_checkpoint(self._path)
        return known[-1][0]
