"""A worker of a job: registration, heartbeats, barriers, membership changes and leaving.

>>> orchestrator = TrainingOrchestrator("worker-0", "http://coordinator:50051", 4, rank=0)
>>> await orchestrator.register_worker(ip="10.0.0.5", port=8080)
>>> await orchestrator.wait_barrier("data ready", timeout=600)

Always holds: heartbeats are sent by a native thread, so neither a long step nor the GIL makes a
worker look dead; a registered worker stays registered until it leaves or the process ends, even if
the object is dropped.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import threading
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from dtruntime import settings
from dtruntime.errors import CheckpointError, Closed, InvalidArgument, JobAborted
from dtruntime.ranks import connecting, launch, membership
from dtruntime.ranks.connecting import PATIENCE_SECONDS, Security
from dtruntime.ranks.membership import Membership, WorkerIdentity, failure_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from typing_extensions import Self

    from dtruntime import _native

_T = TypeVar("_T")
_logger = logging.getLogger("dtruntime")

_PORT_MAX = 65_535
_NOTICE_SECONDS = 1.0
"""How often the callback thread checks whether it should end."""


class WorkerInfo(NamedTuple):
    """A worker as the coordinator knows it.

    Attributes:
        worker_id: Its name.
        rank: Its rank.
        ip: Address of its own service.
        port: The port of that service.
        advertise_address: The address that others should use, if it differs; else empty.
        state: ``alive``, ``suspect``, ``stalled``, ``dead`` or ``left``.
        silent_seconds: Time since its last heartbeat.
        progress: The progress it last reported.

    """

    worker_id: str
    rank: int
    ip: str
    port: int
    advertise_address: str
    state: str
    silent_seconds: float
    progress: int


class MembershipChange(NamedTuple):
    """A worker joined or left.

    Attributes:
        kind: ``joined``, ``left``, ``failed``, ``died``, ``replaced``; ``missed``: there were
            changes that the coordinator does not remember, because it was restarted or there were
            hundreds at once, and ``workers()`` lists the current members; ``rejoined``: this worker
            itself had been considered dead and is a member again; or ``fenced``: it is no longer a
            member, since another process has replaced it.
        worker_id: The worker; for the last three kinds, this one.
        rank: Its rank.
        epoch: The membership number after the change; 0 if ``fenced``.
        reason: The reason, for humans.

    """

    kind: str
    worker_id: str
    rank: int
    epoch: int
    reason: str


class TrainingOrchestrator:
    """One worker of a training run.

    A context manager: leaving the block leaves the job, as failed if an exception ends it.

    Args:
        worker_id: The worker's name; a process that replaces it uses the same one. Default: the
            environment's ``WORKER_ID``, else ``worker-<rank>``.
        coordinator_url: Default: the environment's ``COORDINATOR_URL``, else
            ``http://localhost:50051``. ``https://`` uses TLS.
        world_size: Default: as for a ``CheckpointManager``: that of the process group, else the
            environment's ``WORLD_SIZE``, else 1.
        rank: Default: likewise, ``RANK``, else 0; a pod name such as ``worker-3`` is 3.
        job: Name of the training run. Default: the environment's ``DTRUNTIME_JOB``, else
            ``default``. Runs that share a coordinator at the same time need different names.
        advertise_address: The address that other workers should use, if it is not ``ip``.
        security: Token and certificates.
        on_abort: Called with the reason when the job is aborted.
        on_membership_change: Called with each ``MembershipChange``. Both callbacks run on a
            separate thread, one at a time; what they raise, even ``SystemExit``, is logged.
        patience: How long to retry while the coordinator does not answer, in seconds.

    """

    def __init__(
        self,
        worker_id: str | None = None,
        coordinator_url: str | None = None,
        world_size: int | str | None = None,
        rank: int | str | None = None,
        *,
        job: str | None = None,
        advertise_address: str = "",
        security: Security | None = None,
        on_abort: Callable[[str], Any] | None = None,
        on_membership_change: Callable[[MembershipChange], Any] | None = None,
        patience: float = PATIENCE_SECONDS,
    ) -> None:
        self.rank, self.world_size = launch.rank_and_world_size(rank, world_size)
        self.worker_id = worker_id or os.environ.get("WORKER_ID") or f"worker-{self.rank}"
        self.job = connecting.job_of(job)
        url = connecting.url_of(coordinator_url)
        self._coordinator = connecting.connect(url, security or Security(), patience)
        self._url = self._coordinator.url  # kept: a forked child must not use the connection
        self._advertise_address = advertise_address
        self._on_abort = on_abort
        self._on_membership_change = on_membership_change
        self._membership: Membership | None = None

    @property
    def coordinator_url(self) -> str:
        """The coordinator's address."""
        return self._url

    @property
    def is_registered(self) -> bool:
        """Whether this worker is a member of its job, as of the last heartbeat."""
        return self._worker is not None and not self._worker.is_ended

    @property
    def epoch(self) -> int:
        """The membership number, as of the last heartbeat."""
        return self._registered("reading the epoch").epoch

    @property
    def abort_reason(self) -> str | None:
        """Why the job is aborted; None while it runs."""
        return None if self._worker is None else self._worker.abort_reason

    @property
    def coordinator_settings(self) -> dict[str, str]:
        """The settings that the coordinator provides to workers: TOML values by ``section.key``."""
        return self._registered("reading the coordinator's settings").settings

    async def register_worker(self, ip: str | None = None, port: int = 0) -> None:
        """Join the job, and send heartbeats from now on.

        If an earlier process of this worker, or of its rank, is still registered, this waits until
        the coordinator considers it dead, for at most a minute.

        Args:
            ip: Address of this worker's own service. Default: this machine's address.
            port: The port of that service; 0 if it has none.

        """
        port = settings.integer("port", port)
        if port > _PORT_MAX:
            raise InvalidArgument(
                f"`port` = {port}", f"0 to {_PORT_MAX} is allowed", "pass the service's TCP port"
            )
        address = (ip if ip is not None else _own_address(), port, self._advertise_address)
        if self._membership is not None:
            await _in_thread(self.leave)
        identity = WorkerIdentity(self._url, self.job, self.worker_id, self.rank, self.world_size)
        self._membership = await _in_thread(
            lambda: membership.register(identity, self._coordinator, address)
        )
        if self._on_abort is not None or self._on_membership_change is not None:
            watched = (self._membership.worker,)
            threading.Thread(
                target=self._deliver_notices, args=watched, name="dtr-notices", daemon=True
            ).start()

    async def wait_barrier(self, name: str, timeout: float = 600.0) -> int:
        """Wait until every rank has called this with the same name.

        Returns:
            How many times the barrier was released before.

        Raises:
            BarrierTimeout: Not all arrived within ``timeout`` seconds; the message names those that
                did not.
            MembershipChanged: The job lost a worker; the next call proceeds without it.
            JobAborted: The job is aborted.

        """
        worker = self._registered(f"waiting at barrier `{name}`")
        call = worker.arrive(name, float(timeout))
        try:
            return await _in_thread(call.join)
        except asyncio.CancelledError:
            with contextlib.suppress(CheckpointError):
                await _in_thread(lambda: worker.withdraw(call))
            raise

    def report_progress(self, step: int) -> None:
        """Report that training reached a step: the coordinator notices when progress stops."""
        self._registered("reporting progress").set_progress(settings.integer("step", step))

    def check(self) -> None:
        """Raise ``JobAborted`` if the job is aborted; cheap enough to call in every step."""
        reason = self.abort_reason
        if reason is not None:
            raise JobAborted(
                f"training in job `{self.job}`",
                f"the job is aborted: {reason}",
                "end this process; the job can start again once all of its workers have ended",
            )

    async def workers(self) -> list[WorkerInfo]:
        """Return all workers that the job knows, by rank."""
        worker = self._registered("listing workers")
        return [WorkerInfo(**record) for record in await _in_thread(worker.workers)]

    def leave(self, failure: str = "") -> None:
        """Leave the job; without ``failure``, the worker counts as finished.

        Args:
            failure: Why this worker failed.

        """
        left, self._membership = self._membership, None
        if left is not None:
            left.leave(failure)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.leave(failure_of(error))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await _in_thread(lambda: self.leave(failure_of(error)))

    @property
    def _worker(self) -> _native.Worker | None:
        return None if self._membership is None else self._membership.worker

    def _registered(self, what: str) -> _native.Worker:
        if self._worker is None:
            raise Closed(
                what,
                f"worker `{self.worker_id}` is not registered",
                "call `await orchestrator.register_worker(ip, port)` first",
            )
        return self._worker

    def _deliver_notices(self, worker: _native.Worker) -> None:
        while True:
            has_ended = worker.is_ended  # read first: what ends it also leaves a notice
            notice = worker.next_notice(_NOTICE_SECONDS)
            if notice is not None:
                self._deliver(notice)
            elif has_ended:
                return

    def _deliver(self, notice: dict[str, Any]) -> None:
        try:
            if notice["kind"] == "aborted":
                if self._on_abort is not None:
                    self._on_abort(notice["reason"])
            elif self._on_membership_change is not None:
                own: dict[str, Any] = {"worker_id": self.worker_id, "rank": self.rank, "epoch": 0}
                self._on_membership_change(MembershipChange(**(own | notice)))
        except BaseException:  # an error or exit in a callback must not stop later notices
            with contextlib.suppress(Exception):
                _logger.exception("a callback for `%s` failed", notice["kind"])


async def _in_thread(function: Callable[[], _T]) -> _T:
    """Run a blocking call on a daemon thread, which nothing waits for at exit."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[_T] = loop.create_future()

    def settle(result: _T | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]

    def run() -> None:
        try:
            outcome: tuple[_T | None, BaseException | None] = (function(), None)
        except BaseException as error:  # noqa: BLE001  (raised where it is awaited)
            outcome = (None, error)
        with contextlib.suppress(RuntimeError):  # the loop was closed in the meantime
            loop.call_soon_threadsafe(settle, *outcome)

    threading.Thread(target=run, name="dtr-call", daemon=True).start()
    return await future


def _own_address() -> str:
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return "127.0.0.1"
