"""The workers that this process is: one for a job and rank, shared by whoever needs it.

An orchestrator and the checkpoint manager of one rank are one worker to the coordinator: whoever
comes first registers it, whoever goes last leaves.

Always holds: a registered worker stays one until its last user has gone or the process ends; a
process that ends leaves by itself, and says so if an exception ended it; a forked child is no
worker; a worker has one store open at a time, because the coordinator tells the saves of a job
apart by their step alone.
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
)
from dtruntime.ranks import connecting, embedded
from dtruntime.ranks.connecting import Security

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dtruntime.location import Store

_logger = logging.getLogger("dtruntime")

_MEETING = _native.OPENING_BARRIER
_REMINDER_SECONDS = 10.0
_AGAIN_SECONDS = 1.0
"""Between two looks for a coordinator, if the one that was found did not do."""


class Place(NamedTuple):
    """Who a worker is.

    Attributes:
        url: The coordinator's address.
        job: The training run.
        worker_id: The worker's name; None for whichever this process has, else the environment's
            ``WORKER_ID``, else ``worker-<rank>``.
        rank: Its rank.
        world_size: How many there are.

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
        """Whom it meets, for people."""
        return f"the {self.world_size} ranks of job `{self.job}`"

    def is_served_by(self, other: Place) -> bool:
        """Whether the worker at ``other`` will do."""
        anybody = other._replace(worker_id=None)
        return self in (other, anybody)


class Membership:
    """A registered worker and how many use it."""

    def __init__(self, place: Place, worker: _native.Worker) -> None:
        self.place = place
        self.worker = worker
        self.seats: list[Seat] = []
        """Of managers that are open."""
        self._users = 1
        self._pid = os.getpid()

    def leave(self, failure: str = "") -> None:
        """Give the worker up; with a failure, or as the last user, the process leaves the job."""
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


class Seat:
    """A manager's part in a membership, for as long as its store is open."""

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
            other = next((seat for seat in membership.seats if seat.store != store), None)
            if other is None:
                membership.seats.append(self)
        if other is not None:
            membership.leave()
            raise InvalidArgument(
                f"opening `{store.path}` with {membership.place.others}",
                f"this process has `{other.store.path}` open in the same job, and the coordinator "
                "tells the saves of a job apart by their step",
                'give one of the two a job of its own, on every rank: `job="ema"`; or close the '
                "other one first",
            )

    def leave(self, failure: str = "") -> None:
        """Give the store and the membership up, once."""
        with _lock:
            is_taken = self in self._membership.seats
            if is_taken:
                self._membership.seats.remove(self)
        if is_taken:
            self._membership.leave(failure)


StoreOf = Callable[[Mapping[str, str]], "Store"]
"""Gives the store that a rank opens, from what the coordinator told it."""

_live: list[Membership] = []
_lock = threading.Lock()
_registering = threading.Lock()
"""Held while a worker registers: two users at once must not push each other out."""


def join(
    place: Place, coordinator: _native.Coordinator, address: tuple[str, int, str]
) -> Membership:
    """Register a worker, or share the one that this process is there already.

    Who shares one that a manager registered has no address of its own there: an orchestrator that
    others should reach registers first.
    """
    with _registering:
        with _lock:
            for membership in _live:
                if place.is_served_by(membership.place) and not membership.worker.is_ended:
                    membership._users += 1  # noqa: SLF001
                    return membership
        ranks = (place.rank, place.world_size)
        worker = coordinator.register_worker(place.job, place.name, ranks, address)
        membership = Membership(place._replace(worker_id=place.name), worker)
        with _lock:
            _live.append(membership)
        return membership


def enter(
    store_of: StoreOf,
    job: str,
    ranks: tuple[int, int],
    way: tuple[str | None, Security | None],
    timeout: float,
) -> Seat | None:
    """Become a worker of a job of several ranks, and wait until all of them open the store.

    Args:
        store_of: Gives what this rank opens.
        job: The training run.
        ranks: This process's rank, and how many there are.
        way: The coordinator's URL and how to get in. Default: the environment's
            ``COORDINATOR_URL``, else the one that rank 0 hosts, where ranks can meet: under
            ``torchrun``, or in a process group of theirs.
        timeout: How long to wait for the other ranks, in seconds.

    Returns:
        None if no coordinator is known.

    """
    url, security = way
    rank, world_size = ranks
    place = Place(url or os.environ.get("COORDINATOR_URL") or "", job, None, rank, world_size)
    deadline = time.monotonic() + timeout
    with _reminding(place):
        if place.url:
            return _take_seat(place, store_of, security or Security(), deadline)
        refused: tuple[str, CheckpointError] | None = None
        while True:
            left = max(deadline - time.monotonic(), 0.0)
            found = _hosted_by_rank_0(place, left, timeout)
            if found is None:
                return None
            url, security = found
            if refused is not None and refused[0] == url:
                raise refused[1]
            try:
                return _take_seat(place._replace(url=url), store_of, security, deadline)
            except _OF_A_RUN_BEFORE as error:
                # Of a rank 0 that ends just now, if torchrun restarts its processes one by one.
                if rank == 0 or time.monotonic() >= deadline:
                    raise
                if not isinstance(error, (CoordinatorUnavailable, Unauthenticated)):
                    refused = (url, error)  # meant, unless another coordinator is named by then
                _logger.info("looking for the coordinator again: %s", error)
                time.sleep(_AGAIN_SECONDS)


def _take_seat(place: Place, store_of: StoreOf, security: Security, deadline: float) -> Seat:
    """Register, and meet the others."""
    coordinator = connecting.connect(place.url, security, connecting.PATIENCE_SECONDS)
    place = place._replace(url=coordinator.url)
    seat = Seat(join(place, coordinator, ("", 0, "")), store_of)
    try:
        _meet(seat, place, seat.store.common, deadline)
    except BaseException:
        seat.leave()
        raise
    return seat


_OF_A_RUN_BEFORE = (CoordinatorUnavailable, Unauthenticated, Conflict, JobAborted, WorkerFenced)
"""What a rank may hear from the coordinator of processes that are just being ended."""
_HINT = "open the manager on every rank; where one rank saves, pass `rank=0, world_size=1`"


@contextlib.contextmanager
def _reminding(place: Place) -> Iterator[None]:
    """Say what is waited for if it takes long."""
    text = f"waiting for {place.others} to open their manager; {_HINT}"
    reminder = threading.Timer(_REMINDER_SECONDS, _logger.warning, (text,))
    reminder.daemon = True
    reminder.start()
    try:
        yield
    finally:
        reminder.cancel()


def _hosted_by_rank_0(place: Place, left: float, timeout: float) -> tuple[str, Security] | None:
    try:
        return embedded.find(place.rank, left)
    except embedded.NotOpened:
        what = f"opening a store with {place.others}"
        why = f"rank 0, which hosts the coordinator, has not opened its manager within {timeout} s"
        raise BarrierTimeout(what, why, _HINT) from None


def _meet(seat: Seat, place: Place, common: str, deadline: float) -> None:
    """Wait until every rank has come to open its checkpoint manager, on the same store.

    Without it, a rank that saves alone would find out at the first save, by waiting.
    """
    what = f"opening a store with {place.others}"
    while True:
        left = max(deadline - time.monotonic(), 0.001)
        try:
            seat.worker.arrive(_MEETING, left, common).join()
        except MembershipChanged:  # somebody of an earlier run is being cleared away
            if time.monotonic() >= deadline:
                raise
        except BarrierTimeout as error:
            raise BarrierTimeout(what, error.why, _HINT) from None
        except InvalidArgument as error:
            raise InvalidArgument(what, error.why, error.hint) from None
        else:
            return


def told_in(job: str) -> Mapping[str, str]:
    """Give what this process's worker in the job was told; nothing if it has none."""
    with _lock:
        found = [membership for membership in _live if membership.place.job == job]
    return next((m.worker.settings for m in found if not m.worker.is_ended), {})


def membership_at(url: str, job: str) -> Membership | None:
    """Give this process's membership in the job, if it has a worker registered there."""
    with _lock:
        found = [m for m in _live if (m.place.url, m.place.job) == (url, job)]
    return next((membership for membership in found if not membership.worker.is_ended), None)


def worker_at(url: str, job: str) -> _native.Worker | None:
    """Give a registered worker of this process in the job, if there is one."""
    found = membership_at(url, job)
    return None if found is None else found.worker


def failure_of(error: BaseException | None) -> str:
    """Say what an exception means for a worker; leaving on purpose is no failure."""
    if not isinstance(error, Exception) or isinstance(error, JobAborted):
        return ""
    return f"{type(error).__name__}: {error}"


def _leave_all() -> None:
    """Run when the process ends: by the script's last line, or by an exception."""
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
