"""The workers of this process: one per job and rank, shared by its users.

An orchestrator and the checkpoint manager of one rank are one worker to the coordinator: the first
to need it registers it, and the last to finish makes it leave.

Always holds: a registered worker stays registered until its last user has finished or the process
ends; a process that ends leaves automatically, as failed if an exception ended it; a forked child
is not a worker; a worker has one store open at a time, because the coordinator distinguishes the
saves of a job only by their step.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from dtruntime import _native
from dtruntime.errors import (
    BarrierTimeout,
    CheckpointError,
    Conflict,
    CoordinatorUnavailable,
    InvalidArgument,
    JobAborted,
    MembershipChanged,
    Unauthenticated,
    WorkerFenced,
    reason_of,
)
from dtruntime.ranks import connecting, embedded
from dtruntime.ranks.connecting import Security

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dtruntime.location import Store

_logger = logging.getLogger("dtruntime")

_OPENING_BARRIER = _native.OPENING_BARRIER
_WARNING_SECONDS = 10.0
_RETRY_SECONDS = 1.0
"""Delay before looking for another coordinator, if the one found was not usable."""


class WorkerIdentity(NamedTuple):
    """What identifies a worker.

    Attributes:
        url: The coordinator's address.
        job: The training run.
        worker_id: The worker's name; None for any that this process has, else the environment's
            ``WORKER_ID``, else ``worker-<rank>``.
        rank: Its rank.
        world_size: The number of ranks.

    """

    url: str
    job: str
    worker_id: str | None
    rank: int
    world_size: int

    @property
    def name(self) -> str:
        """The worker's name."""
        return self.worker_id or os.environ.get("WORKER_ID") or f"worker-{self.rank}"

    @property
    def others(self) -> str:
        """The ranks it works with, for messages."""
        return f"the {self.world_size} ranks of job `{self.job}`"

    def can_share(self, other: WorkerIdentity) -> bool:
        """Return whether the worker ``other`` can be shared."""
        return self in (other, other._replace(worker_id=None))


class Membership:
    """A registered worker and the number of its users."""

    def __init__(self, identity: WorkerIdentity, worker: _native.Worker) -> None:
        self.identity = identity
        self.worker = worker
        self.stores: list[StoreMembership] = []
        """Those of open managers."""
        self._users = 1
        self._pid = os.getpid()

    def leave(self, failure: str = "") -> None:
        """Release the worker; with a failure, or as the last user, the process leaves the job."""
        with _lock:
            self._users -= 1
            if self._users > 0 and not failure:
                return
            if self in _live:
                _live.remove(self)
        if os.getpid() != self._pid:
            return
        try:
            self.worker.leave(failure)
        except CheckpointError as error:
            _logger.warning("%s", error)


class StoreMembership:
    """A manager's use of a membership, for as long as its store is open."""

    def __init__(self, membership: Membership, store_of: StoreOf) -> None:
        try:
            store = store_of(membership.worker.settings)
        except BaseException:
            membership.leave()
            raise
        self.worker = membership.worker
        self._membership = membership
        self.store = store
        with _lock:
            other = next((member for member in membership.stores if member.store != store), None)
            if other is None:
                membership.stores.append(self)
        if other is not None:
            membership.leave()
            raise InvalidArgument(
                f"opening `{store.path}` with {membership.identity.others}",
                f"this process has `{other.store.path}` open in the same job, and the coordinator "
                "distinguishes the saves of a job by their step",
                'open one of the two with a different job, on every rank: `job="ema"`; or close '
                "the other one first",
            )

    def leave(self, failure: str = "") -> None:
        """Release the store and the membership, once."""
        with _lock:
            is_taken = self in self._membership.stores
            if is_taken:
                self._membership.stores.remove(self)
        if is_taken:
            self._membership.leave(failure)


StoreOf = Callable[[Mapping[str, str]], "Store"]
"""Returns the store that a rank opens, from the settings that the coordinator provides."""

_live: list[Membership] = []
_lock = threading.Lock()
_registering = threading.Lock()
"""Held while a worker registers: concurrent registrations would fence each other."""


def register(
    identity: WorkerIdentity, coordinator: _native.Coordinator, address: tuple[str, int, str]
) -> Membership:
    """Register a worker, or share the one that this process already has in the job.

    Sharing keeps the address that it was registered with, and a manager registers none: an
    orchestrator that others should reach registers first.
    """
    with _registering:
        with _lock:
            for membership in _live:
                if identity.can_share(membership.identity) and not membership.worker.is_ended:
                    membership._users += 1  # noqa: SLF001
                    return membership
        ranks = (identity.rank, identity.world_size)
        worker = coordinator.register_worker(identity.job, identity.name, ranks, address)
        membership = Membership(identity._replace(worker_id=identity.name), worker)
        with _lock:
            _live.append(membership)
        return membership


def join(
    store_of: StoreOf,
    job: str,
    ranks: tuple[int, int],
    connection: tuple[str | None, Security | None],
    timeout: float,
) -> StoreMembership | None:
    """Join a job of several ranks, and wait until all of them open the store.

    Args:
        store_of: Returns the store that this rank opens.
        job: The training run.
        ranks: This process's rank, and the world size.
        connection: The coordinator's URL and credentials. Default: the environment's
            ``COORDINATOR_URL``, else the one that rank 0 hosts, under ``torchrun`` or with a
            process group.
        timeout: How long to wait for the other ranks, in seconds.

    Returns:
        None if no coordinator is known.

    """
    url, security = connection
    rank, world_size = ranks
    identity = WorkerIdentity(
        url or os.environ.get("COORDINATOR_URL") or "", job, None, rank, world_size
    )
    deadline = time.monotonic() + timeout
    with _warning_if_slow(identity):
        if identity.url:
            return _join_at(identity, store_of, security or Security(), deadline)
        refused: tuple[str, CheckpointError] | None = None
        while True:
            left = max(deadline - time.monotonic(), 0.0)
            found = _hosted_by_rank_0(identity, left, timeout)
            if found is None:
                return None
            url, security = found
            if refused is not None and refused[0] == url:
                raise refused[1]
            try:
                return _join_at(identity._replace(url=url), store_of, security, deadline)
            except _STALE_COORDINATOR as error:
                # It may belong to a rank 0 that is just ending, if torchrun restarts processes one
                # by one.
                if rank == 0 or time.monotonic() >= deadline:
                    raise
                if not isinstance(error, (CoordinatorUnavailable, Unauthenticated)):
                    refused = (url, error)  # final, unless another coordinator is published by then
                _logger.info("looking for the coordinator again: %s", error)
                time.sleep(_RETRY_SECONDS)


def _join_at(
    identity: WorkerIdentity, store_of: StoreOf, security: Security, deadline: float
) -> StoreMembership:
    """Register, and wait for the other ranks."""
    coordinator = connecting.connect(identity.url, security, connecting.PATIENCE_SECONDS)
    identity = identity._replace(url=coordinator.url)
    member = StoreMembership(register(identity, coordinator, ("", 0, "")), store_of)
    try:
        _await_ranks(member, identity, member.store.common, deadline)
    except BaseException:
        member.leave()
        raise
    return member


_STALE_COORDINATOR = (CoordinatorUnavailable, Unauthenticated, Conflict, JobAborted, WorkerFenced)
"""Errors that the coordinator of a run that is just ending may cause."""
_HINT = "open the manager on every rank; where one rank saves, pass `rank=0, world_size=1`"


@contextlib.contextmanager
def _warning_if_slow(identity: WorkerIdentity) -> Iterator[None]:
    """Log what is waited for if it takes long."""
    text = f"waiting for {identity.others} to open their manager; {_HINT}"
    timer = threading.Timer(_WARNING_SECONDS, _logger.warning, (text,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _hosted_by_rank_0(
    identity: WorkerIdentity, left: float, timeout: float
) -> tuple[str, Security] | None:
    try:
        return embedded.find(identity.rank, left)
    except embedded.NotOpened:
        what = f"opening a store with {identity.others}"
        why = f"rank 0, which hosts the coordinator, has not opened its manager within {timeout} s"
        raise BarrierTimeout(what, why, _HINT) from None


def _await_ranks(
    member: StoreMembership, identity: WorkerIdentity, common: str, deadline: float
) -> None:
    """Wait until every rank opens its checkpoint manager, on the same store.

    Otherwise a rank whose peers do not save would only find out at the first save, by a timeout.
    """
    what = f"opening a store with {identity.others}"
    while True:
        left = max(deadline - time.monotonic(), 0.001)
        try:
            member.worker.arrive(_OPENING_BARRIER, left, common).join()
        except MembershipChanged:  # a worker of an earlier run is being removed
            if time.monotonic() >= deadline:
                raise
        except BarrierTimeout as error:
            raise BarrierTimeout(what, error.why, _HINT) from None
        except InvalidArgument as error:
            raise InvalidArgument(what, error.why, error.hint) from None
        else:
            return


def settings_of_job(job: str) -> Mapping[str, str]:
    """Return the settings of this process's worker in the job; none if it has no worker."""
    with _lock:
        found = [membership for membership in _live if membership.identity.job == job]
    return next((m.worker.settings for m in found if not m.worker.is_ended), {})


def membership_at(url: str, job: str) -> Membership | None:
    """Return this process's membership in the job, if it has a worker registered there."""
    with _lock:
        found = [m for m in _live if (m.identity.url, m.identity.job) == (url, job)]
    return next((membership for membership in found if not membership.worker.is_ended), None)


def worker_at(url: str, job: str) -> _native.Worker | None:
    """Return a registered worker of this process in the job, if there is one."""
    found = membership_at(url, job)
    return None if found is None else found.worker


def failure_of(error: BaseException | None) -> str:
    """Return the failure that an exception means for a worker; empty if it left on purpose."""
    if not isinstance(error, Exception) or isinstance(error, JobAborted):
        return ""
    return reason_of(error)


def _leave_all() -> None:
    """Leave all jobs when the process ends, normally or by an exception."""
    failure = failure_of(getattr(sys, "last_value", None))
    with _lock:
        left = list(_live)
    for membership in left:
        membership._users = 1  # noqa: SLF001
        membership.leave(failure)


def _forget_in_child() -> None:
    global _lock, _registering  # a thread of the parent may have held them
    _lock, _registering = threading.Lock(), threading.Lock()
    _live.clear()  # the members are the parent's


atexit.register(_leave_all)
os.register_at_fork(after_in_child=_forget_in_child)
