"""The checkpoint manager: one store as a training loop sees it.

``opened`` opens and closes the store; this checks arguments and delegates each call.

Always holds: a checkpoint exists exactly if its save reported success; loaded data was verified;
nothing is written unless the whole state can be stored. A signal may arrive at any moment: a save
that its handler interrupts leaves no checkpoint, a save that the handler starts inside another is
refused, and an interrupted opening is undone; an interrupted ``close`` resumes with the next one.
"""

from __future__ import annotations

import asyncio
import logging
import os
from typing import TYPE_CHECKING, Any

from dtruntime import lifecycle, settings
from dtruntime.errors import CheckpointError
from dtruntime.loading import fallback
from dtruntime.loading.reader import device_of
from dtruntime.location import StoreArguments
from dtruntime.opened import OpenedStore, Options
from dtruntime.ranks import connecting, launch, membership
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
from dtruntime.saving.handle import SaveHandle, order_after_copies
from dtruntime.state import gpus, wrappers
from dtruntime.state.globs import globs_of
from dtruntime.state.state_tree import needs_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import TracebackType

    from typing_extensions import Self

    from dtruntime import _native
    from dtruntime.ranks.connecting import Security
    from dtruntime.restoring.plan import RestorePlan

_logger = logging.getLogger("dtruntime")


class CheckpointManager:
    """Saves and loads training states in one store.

    A context manager: leaving the block waits for the save in flight and closes the store.

    If this process is registered with a coordinator, the store, ``keep_last_n``, ``compression``,
    ``async_write`` and ``save_interval_steps`` default to the coordinator's ``[storage]`` and
    ``[checkpoint]`` sections. The defaults below apply to what it does not set.

    Args:
        path: The store: a directory, created with its parents if needed, or
            ``s3://bucket/prefix``. Default: the environment's ``CHECKPOINT_DIR``.
        keep_last_n: How many of the newest checkpoints to keep. Default: all. (``keep_every=1``
            also keeps all, whatever a coordinator sets.)
        keep_every: Also keep every checkpoint whose step is a multiple of this.
        keep_best_n: Also keep this many of the best by ``best_metric``; of equal ones, the newer.
        best_metric: Key of the number in ``metadata`` that ranks checkpoints, such as
            ``val_loss``; a checkpoint without it is never among the best.
        best_mode: ``min`` if small values are better, as for a loss, or ``max``.
        compression: ``auto`` (the default), ``none``, ``float`` (made for weights), ``zstd`` or
            ``gzip``.
        staging_bytes: Memory that snapshots are copied into: bytes, or text such as ``"2GiB"``.
            Default: the state's size, at most a quarter of the machine's memory, divided among the
            ranks of the machine if ``LOCAL_WORLD_SIZE`` gives their number. A larger state is
            streamed through it, and the training loop waits longer.
        chunk_bytes: Unit of encoding, checksums and I/O: a power of two from 64 KiB to 64 MiB.
            Default 4 MiB.
        direct_io: Whether the page cache is bypassed; ``auto``: if the filesystem supports it.
        io_backend: ``auto``, ``uring`` or ``threads``.
        in_flight_bytes: Most bytes being written to the device at a time: bytes, or text. Default
            32 MiB, or two chunks if that is more.
        workers: Threads that checksum and compress, 1 to 256. Default: one per core, divided among
            the ranks of the machine, at most 16. Fewer leave more cores to training, but saves
            take longer.
        gc_grace_seconds: Age below which files of unfinished saves are not deleted. Default: one
            day.
        verify_on_load: Whether every chunk is checked on loading. Manifests and indexes always are.
        progress: Whether saves show a progress bar on standard error.
        read_only: For evaluators: writes, locks and deletes nothing.
        async_write: False makes ``save_async`` wait until the checkpoint is durable.
        save_interval_steps: The interval that ``should_save`` uses. Default: every step.
        rank: This process's rank. Default: the one in the process group of ``torch.distributed``,
            if the script has initialized it, else the environment's ``RANK``, else 0.
        world_size: Default: likewise, ``WORLD_SIZE``, else 1. If it is more, every rank saves its
            own state under the same step, and the checkpoint exists once all of them are durable,
            or not at all: this needs a store that all ranks can reach, and a coordinator.
        replicated: What is identical on all ranks, as globs over dotted paths: with data parallel
            training ``["model.*", "optimizer.*", "step"]``; a glob after ``!`` excludes what it
            matches, as in ``["*", "!random"]``. Its bytes are written once, each rank writing a
            part, and any number of ranks can load it. What ``replicated`` names must be the same
            on every rank: keys, plain values, shapes and memory layouts are compared before a
            checkpoint is created, the contents of tensors are not. Sharded tensors (``DTensor``)
            may be included: each rank writes its part, and any number of ranks can assemble other
            parts from them.
        consistency: What keeps tensors on GPUs from changing before they have been copied, unless
            a save overrides it: ``strict`` copies them before ``save_async`` returns, ``overlap``
            copies during forward and backward (it needs ``optimizer=``), ``device-snapshot`` copies
            from clones on the GPU.
        job: Name of the training run, written into manifests. Default: the environment's
            ``DTRUNTIME_JOB``, else ``default``. If several ranks save, the coordinator
            distinguishes the saves of a job by their step only: a process that has two stores open
            at a time, for example for a model and its moving average, uses a different job for
            each.
        coordinator_url: Where ranks find each other. Default: the environment's
            ``COORDINATOR_URL``. Under ``torchrun``, or with a process group, neither is needed:
            rank 0 then hosts a coordinator in its own process.
        security: Token and certificates for the coordinator.
        agreement_timeout: How long opening, ``load`` and ``restore`` wait for the other ranks, in
            seconds; also for rank 0 to host the coordinator, if none is named.
        sigterm: What SIGTERM does to a save in flight: ``finish`` it by the deadline, or ``drop``
            it. Default None: no handler is installed.
        sigterm_deadline_seconds: How long ``finish`` may take.
        storage_path: Another name for ``path``.
        backend: ``local`` or ``s3``. Default: determined by ``path``. With ``s3``, the scheme of
            ``path`` may be left out.
        remote: A store in S3, ``s3://bucket/prefix``, that checkpoints are uploaded to in the
            background once they are committed in the directory ``path``; ``load`` reads what is not
            in the directory from there. What is not uploaded when the process ends is uploaded by
            the next manager that writes; parts that arrived are not sent again. If several ranks
            save, each machine may have its own ``path``: every rank commits there and uploads its
            own part, and the checkpoint is in ``remote`` once all have.
        remote_bytes_per_second: Limit of the upload rate: bytes, or text such as ``"200MB"``.
        remove_before_upload: Whether retention may remove what is not in ``remote`` yet.
        s3: How a store in S3 is accessed, any of: ``region``, ``endpoint_url``, ``profile``,
            ``path_style`` (default: true with an endpoint), ``ca_bundle`` (a PEM file, trusted in
            addition to the system's), ``connect_timeout_ms`` (5,000), ``request_timeout_ms`` of one
            attempt (60,000), ``attempts`` per request (10), ``part_bytes`` of an upload
            (``"16MiB"``), ``in_flight_bytes`` of parts (``"128MiB"``). Default: as for the AWS
            tools. Credentials come from environment, profile, web identity, container or instance.

    Raises:
        InvalidArgument: A setting is out of its range; ranks of one job open different stores, or
            this process has another store of the job open.
        StoreBusy: Another writer holds the store.
        BarrierTimeout: Not all ranks opened the store; the message names those that did not.
        Unavailable: The service of a store in S3 cannot be reached, or refuses the request.

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
        deadline = settings.seconds("sigterm_deadline_seconds", sigterm_deadline_seconds)
        if sigterm is not None:
            settings.choice("sigterm", sigterm, ("finish", "drop"), has_default=False)
            lifecycle.check_can_handle_termination(sigterm)
        self._opened = OpenedStore(
            Options(
                store=StoreArguments(path, storage_path, backend, remote),
                engine=engine_settings,
                job=job_name,
                rank=rank_number,
                world_size=ranks,
                read_only=bool(read_only),
                coordinator=(coordinator_url, security),
                agreement_timeout=settings.seconds("agreement_timeout", agreement_timeout),
                replicated=globs,
                keep_last_n=keep_last_n,
                keep_best_n=keep_best_n,
                best_metric=best_metric,
                best_mode=best_mode,
                consistency=settings.choice("consistency", consistency, gpus.MODES),
                verify_on_load=bool(verify_on_load),
                save_interval_steps=settings.interval("save_interval_steps", save_interval_steps),
                async_write=async_write,
                shows_progress=progress,
                termination=None if sigterm is None else (sigterm, deadline),
            )
        )

    @property
    def path(self) -> str | os.PathLike[str]:
        """The store: its directory, or ``s3://bucket/prefix``."""
        return self._opened.path

    @property
    def io_backend(self) -> str:
        """The I/O backend in use: ``uring``, ``threads``, or ``s3``."""
        return self._opened.native.io_backend

    @property
    def last_load(self) -> LoadReport | None:
        """What the last ``load`` or ``restore`` read; None before the first."""
        return self._opened.source.last_load

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

        Returns once the snapshot is taken: the state may change from then on. First waits for a
        save in flight, unless ``if_busy`` says otherwise. Until it returns, other threads must not
        change the state.

        Args:
            state: Tensors, arrays and plain values in nested dicts, lists and tuples; an object
                with ``state_dict()`` is saved as what that returns. Each rank writes its own part
                of a sharded tensor (``DTensor``).
            step: The training step: later than every committed one, unless ``rewind`` is set.
            rewind: Training went back to before ``step``: checkpoints of later steps are discarded
                when this one is committed, and one of the same step is replaced.
            metadata: Attached to the checkpoint as JSON; ``nan`` and ``inf`` become text. If
                several ranks save, pass the same on all of them: only one rank's is kept, rank 0's
                if each machine has its own ``path``.
            dataset_positions: Likewise.
            consistency: What keeps tensors on GPUs from changing before they have been copied:
                ``strict``, ``overlap`` or ``device-snapshot``. Default: the manager's. Tensors in
                host memory are always copied before this returns.
            optimizer: With ``overlap``: the optimizer, or all of them, whose steps change the
                state. Their next step waits on the GPU; other code that changes the state calls
                ``handle.before_update()`` first.
            if_busy: What to do while the previous save is in flight: ``wait`` for it, or ``raise``,
                so that training continues at once without this checkpoint. Several ranks have to
                decide this together, so with several ranks only ``wait`` is accepted.

        Returns:
            A handle: await it, or call its ``result()``.

        Raises:
            UnsupportedValue: Something in the state cannot be stored. Nothing was written.
            StepConflict: The step is not after the newest committed one. Steps that ``load`` or
                ``restore`` fell back from do not count: what does not verify is replaced, as by a
                ``rewind``.
            InvalidArgument: It was called from a signal handler that interrupted a save of the same
                thread.
            NoSpace: The store has no room. Nothing was written.
            SaveInFlight: A save is in flight, and ``if_busy`` is ``raise``. Nothing was written.
            CheckpointError: The previous save failed, and its error has not been retrieved.

        If several ranks save, the handle's result is for all of them. If one cannot save, the save
        fails on every rank with an error that names it, and training may continue.

        >>> handle = manager.save_async({"model": model, "epoch": 3}, step=1000)
        >>> handle.result().step
        1000

        """
        opened = self._opened
        number = settings.step_of(step, "save_async(state, step=...)")
        with opened.saver.declining(number):
            annotations = (
                opened.saver.annotated(number, metadata),
                settings.json_object("dataset_positions", dataset_positions),
            )
            opened.check_can_save(number)
            chosen = gpus.choose(consistency or opened.options.consistency, optimizer)
            opened.saver.check_busy(number, if_busy)
        handle = opened.saver.save(state, (number, bool(rewind)), annotations, chosen)
        if not opened.async_write:
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
                logged, and reported by ``last_load``. If a step is given, no other is loaded.
            keys: Globs over dotted paths, such as ``model.layers.*``, where ``*`` matches any
                text and ``?`` one character: only what matches, or is inside a matching container,
                is read and returned, in its enclosing containers. Lists and tuples keep their
                length, with None for what is left out.
            map_location: Device for torch tensors. Default: host memory.
            strict: Whether a glob that matches nothing is an error.
            mmap: Map uncompressed tensors instead of reading them; they are writable, and changes
                stay private. The rest is read.
            from_rank: Load what this rank saved, whatever the world size was then and is now.
                Default: this process's own rank; what is not ``replicated`` then needs as many
                ranks as saved it.

        Returns:
            What was saved, with its types. Tensors that shared memory share memory again. Sharded
            tensors are returned whole, as plain tensors; ``restore`` reads only each rank's part.

        Raises:
            CheckpointNotFound: There is none, or none of this step.
            InvalidArgument: Another number of ranks saved it, not all of the requested entries are
                ``replicated``, and ``from_rank`` is not given.
            Corrupt: The given step is damaged, or all steps are.

        >>> state = manager.load()
        >>> weights = manager.load(step=1000, keys=["model.*"])["model"]

        """
        device = device_of(map_location)
        globs = None if keys is None else globs_of("keys", keys)

        source = self._opened.source

        def read(checkpoint: _native.Checkpoint) -> Any:
            reader = source.reader(checkpoint, mmap=mmap, device=device)
            keep = None if globs is None else reader.select(globs, strict=strict)
            return reader.load(keep)

        state, _ = source.read(step, from_rank, read)
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

        Tensors and arrays are filled in place; objects get ``load_state_dict``; plain values are
        replaced in their dict or list. A live sharded tensor (``DTensor``) gets its part, however
        the saved one was sharded, if at all. Where memory allows, everything is read and checked
        before anything is changed; data that is only copied into live tensors is read into the
        staging memory of saves, if that is large enough.

        Args:
            state: Live objects under the keys that they were saved under. Other top-level entries
                of the checkpoint are not read; the report lists them as skipped.
            step: The checkpoint. Default: the newest that verifies, as for ``load``.
            strict: Whether everything must fit: nothing missing, unexpected, of another shape or
                type, of another class of optimizer, or saved with different values for live tensors
                that share memory. If False, what fits is restored, and the report says what did
                not; objects and top-level entries of which nothing fits are logged.
            cast: Whether floating-point and complex tensors and arrays of another dtype fit: they
                are converted to the live dtype, one after the other; a value that it cannot hold
                becomes infinite, or its largest number if it has no infinity. Until then they
                take the memory that they had when saved.
            direct: Whether tensors are read straight into live ones with the same memory layout,
                which is faster and needs no memory for a copy. Damage is then found when the live
                state is already changed in part. Restoring an older checkpoint instead makes up for
                that; if there is none, or it does not cover all of it, this raises
                ``RestoreIncomplete``. From the first entry whose loading runs user code, such as a
                module's hook, tensors are copied anyway: that code may change what is loaded.
            from_rank: As for ``load``: with ``from_rank=0`` a job whose ranks train replicas
                continues at another world size.

        Raises:
            InvalidArgument: The state does not fit, or another number of ranks saved it. Nothing
                was changed.
            CheckpointNotFound: There is no checkpoint.
            Corrupt: The checkpoint is damaged. Nothing was changed.
            RestoreIncomplete: It failed part-way, in ``direct`` mode, or on another rank: the live
                state is a mixture, and this manager refuses to save until a restore succeeds.

        >>> manager.restore({"model": model, "optimizer": optimizer}).step
        1000

        """
        opened = self._opened
        attempts = Attempts()

        def read(checkpoint: _native.Checkpoint) -> RestorePlan:
            reader = opened.source.reader(checkpoint, lend=opened.native.lend_staging)
            plan = plan_restore(state, reader, strict=strict, cast=cast, direct=direct)
            if strict:
                plan.check()
            return attempts.carry_out(plan, reader, order_after_copies)

        try:
            plan, report = opened.source.read(step, from_rank, read)
            attempts.check_nothing_left(plan)
        except BaseException as error:
            opened.incomplete = attempts.mixture(error) or opened.incomplete
            if opened.incomplete is not None:
                # What was changed is known only to attempts at the same steps: none is left out.
                opened.lineage.forget_unsound()
            if isinstance(error, CheckpointError) and attempts.incomplete not in (None, error):
                raise attempts.incomplete from error  # no other checkpoint was restored instead
            raise
        wrappers.warn_of_untouched(plan)
        opened.incomplete = None
        opened.lineage.note_restored(report.step, is_named=step is not None)
        return plan.report(report.fell_back_from)

    def latest_step(self) -> int | None:
        """Return the newest committed step; None if nothing was ever saved.

        Raises:
            Corrupt: There are checkpoints, but all are damaged: a training that took this for an
                empty store would start over, and overwrite them.

        >>> manager.latest_step()
        2000

        """
        known = self._opened.native.candidates()
        sound = [step for step, why, _ in known if why is None]
        if known and not sound:
            damaged = {step: why for step, why, _ in known if why is not None}
            raise fallback.nothing_readable(self.path, damaged)
        return max(sound, default=None)

    def all_steps(self) -> list[int]:
        """Return the committed steps, ascending.

        >>> manager.all_steps()
        [1000, 2000]
        """
        return self._opened.native.steps()

    def metadata(self, step: int) -> dict[str, Any]:
        """Return the ``metadata`` attached to a checkpoint, without reading its state.

        Raises:
            CheckpointNotFound: There is no such checkpoint.

        >>> manager.metadata(2000)
        {'val_loss': 3.21}

        """
        return self._opened.native.metadata(settings.step_of(step, "metadata(step)"))

    def best_step(self, metric: str | None = None, mode: str | None = None) -> int:
        """Return the step of the best checkpoint; of equal ones, the newest.

        Args:
            metric: Key of the number in ``metadata`` to compare. Default: ``best_metric``.
            mode: ``min`` or ``max``. Default: ``best_mode``.

        Raises:
            CheckpointNotFound: No checkpoint has that number.
            InvalidArgument: Neither this call nor the manager names a metric.
            Corrupt: There are checkpoints, but all are damaged.

        Damaged checkpoints are left out, which is logged.

        >>> weights = manager.load(step=manager.best_step(), keys=["model"])["model"]

        """
        native, options = self._opened.native, self._opened.options
        name = settings.metric("metric", options.best_metric if metric is None else metric)
        mode = options.best_mode if mode is None else mode
        is_max = settings.choice("mode", mode, settings.BEST_MODES) == "max"
        best = native.best_steps(name, is_max)
        known = native.candidates()
        damaged = {step: why for step, why, _ in known if why is not None}
        if damaged:
            steps = ", ".join(map(str, damaged))
            _logger.warning("left out of the search for the best, since damaged: step %s", steps)
        if not best:
            sound = [step for step, why, _ in known if why is None]
            if damaged and not sound:
                raise fallback.nothing_readable(self.path, damaged)
            raise fallback.no_metric(self.path, name, sound)
        return best[0]

    def should_save(self, step: int) -> bool:
        """Return whether ``step`` is due: a multiple of ``save_interval_steps`` not yet saved.

        Steps that ``load`` or ``restore`` fell back from count as not saved, and so do those after
        a step passed to ``restore``: saving them takes ``rewind=True``.

        >>> manager.should_save(2000)
        False
        """
        number = settings.step_of(step, "should_save(step)")
        opened = self._opened
        if opened.options.read_only or number % opened.save_interval_steps:
            return False
        saving = opened.saver.in_flight()
        return opened.lineage.is_ahead(number, -1 if saving is None else saving.step)

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
        report = self._opened.native.verify(number)
        damage = [Damage(**d | {"tensors": tuple(d["tensors"])}) for d in report.pop("damage")]
        return VerifyReport(**report, damage=tuple(damage))

    def delete(self, step: int) -> int:
        """Delete a checkpoint and return the bytes freed. Waits for the save in flight.

        Raises:
            CheckpointNotFound: There is no such checkpoint.

        >>> manager.delete(1000) > 0
        True

        """
        return self._opened.native.delete(settings.step_of(step, "delete(step)"))

    def prewarm(self, state: Any) -> None:
        """Allocate the staging memory that saving ``state`` needs, ahead of the first save.

        >>> manager.prewarm({"model": model, "optimizer": optimizer})
        """
        rules = self._opened.saver.rules
        raw_bytes, ordinals = needs_of(state, rules.replication, rules.world_size)
        usable = ordinals if ordinals and gpus.are_usable() else []
        self._opened.native.prewarm(raw_bytes, gpus.current_streams(usable))

    def pending_uploads(self) -> list[PendingUpload]:
        """Return the checkpoints that are not in the remote store yet, by ascending step.

        Includes those of earlier processes. Empty without a remote store.

        >>> manager.pending_uploads()
        [PendingUpload(step=2000, uploaded_bytes=25165824, total_bytes=104861696)]
        """
        return [PendingUpload(*upload) for upload in self._opened.native.pending_uploads()]

    def wait_until_finished(self, timeout: float | None = None) -> bool:
        """Wait for the save in flight, at most ``timeout`` seconds; return whether none is left.

        Raises:
            CheckpointError: A save failed, and its error has not been retrieved.

        >>> manager.wait_until_finished()
        True

        """
        return self._opened.native.wait_until_finished(timeout)

    def close(self) -> None:
        """Finish the save in flight, then release threads, memory and the store's lock.

        With a remote store, pending uploads are finished, and failed ones are tried once more.
        Closing twice is allowed, also after Ctrl-C interrupted this: it then resumes. A process
        that exits after such an interrupt waits for no upload: the next one resumes them.

        Raises:
            CheckpointError: A save failed, and its error has not been retrieved; or an upload
                failed, and that checkpoint is not in the remote store. The store is closed anyway.

        >>> manager.close()

        """
        self._opened.close()

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
        self._opened.failure = membership.failure_of(error)
        try:
            self.close()
        except CheckpointError as unseen:
            # The block's own exception propagates; this one must neither replace it nor be lost.
            _logger.error("closing `%s`: %s", self.path, unseen)  # noqa: TRY400

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close in another thread: the event loop continues."""
        await asyncio.to_thread(self.__exit__, kind, error, traceback)

    def __repr__(self) -> str:
        opened = self._opened
        mode = "read-only" if opened.options.read_only else "writing"
        state = "closed" if opened.is_closed else mode
        return f"<CheckpointManager {os.fspath(opened.path)!r} {state}>"

    def _newest(self) -> int:
        known = self._opened.native.candidates()
        if not known:
            raise fallback.no_checkpoint(self.path)
        return known[-1][0]
