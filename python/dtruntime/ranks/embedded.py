"""A coordinator that rank 0 hosts in its own process, for runs that are given none.

The ranks find each other through a store that is there already: that of ``torchrun``'s agent, else
that of the script's process group. Rank 0 starts the coordinator on a free port and leaves there
where it listens and what token it asks for, with an agent under the run's id. What a rank 0 of
before has left there stays until the next one comes, since agents neither agree on the number of a
restart nor empty the store: a coordinator that nobody reaches is passed over until another one is
named.

Always holds: one coordinator a process and run; it ends with the process; where all ranks are on
one machine it does not listen beyond it; a wait for rank 0 hears signals.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import ipaddress
import os
import socket
import threading
import time
import urllib.parse
from typing import TYPE_CHECKING, Any, NamedTuple

from dtruntime import _native
from dtruntime.errors import CoordinatorUnavailable
from dtruntime.ranks import launch
from dtruntime.ranks.connecting import Security

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch.distributed import Store  # type: ignore[attr-defined]

_CONNECT_SECONDS = 60.0
"""How long the agent's store, which is there before the ranks are, may take to answer."""
_LOOK_SECONDS = 0.1
"""How often a rank looks whether rank 0 has come."""
_PROBE_SECONDS = 2.0
"""How long a machine may take to say whether somebody listens there."""
_LOOPBACK = "127.0.0.1"
_EVERYWHERE = {
    socket.AF_INET: "0.0.0.0",  # noqa: S104  (a token is asked for)
    socket.AF_INET6: "[::]",
}

_hosted: dict[str, _native.EmbeddedCoordinator] = {}
_lock = threading.Lock()


class NotOpened(Exception):  # noqa: N818
    """Rank 0 has not said in time where its coordinator listens."""


def _nobody_at(url: str) -> CoordinatorUnavailable:
    return CoordinatorUnavailable(
        "looking for the coordinator that rank 0 hosts",
        f"nobody answers at `{url}`, which rank 0, or one of before, has named",
        "open the manager on rank 0, and let its machine's ports be reached; or start a "
        "coordinator, and name it: `coordinator_url=`",
    )


def find(
    rank: int, timeout: float, environment: Mapping[str, str] = os.environ
) -> tuple[str, Security] | None:
    """Give URL and token of the coordinator that rank 0 hosts; None if ranks cannot meet.

    Raises:
        NotOpened: Rank 0 did not come to host it within ``timeout`` seconds.
        CoordinatorUnavailable: The agent's store, where it would say so, does not answer.

    """
    meeting = _meeting(environment)
    if meeting is None:
        return None
    if rank == 0:
        url, token = _announce(meeting)
    else:
        url, token = _await(meeting, timeout)
    return url, Security(token=token)


class _Meeting(NamedTuple):
    """Where ranks leave word for each other.

    Attributes:
        store: What they share.
        key: The entry that names the coordinator.
        master: The machine that serves the store.
        is_one_machine: Whether all ranks are known to be on this machine.

    """

    store: Store
    key: str
    master: str
    is_one_machine: bool


def _meeting(environment: Mapping[str, str]) -> _Meeting | None:
    key = "dtruntime/coordinator"
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        master = environment["MASTER_ADDR"]
        store = _store_of_agent(master, int(environment["MASTER_PORT"]))
        is_one_machine = environment.get("LOCAL_WORLD_SIZE") == environment.get("WORLD_SIZE")
        key = f"{key}/{environment.get('TORCHELASTIC_RUN_ID', '')}"
        return _Meeting(store, key, master, is_one_machine)
    group = launch.process_group(environment)
    if group is None or group.store is None or not group.master:
        return None
    return _Meeting(group.store, key, group.master, launch.is_loopback(group.master))


@contextlib.contextmanager
def _asking_store(master: str) -> Iterator[None]:
    """Turn the end of the store that ranks meet by into an error that says so."""
    from torch.distributed import DistError  # noqa: PLC0415

    try:
        yield
    except DistError as error:
        raise CoordinatorUnavailable(
            "looking for the coordinator that rank 0 hosts",
            f"the store of the ranks at `{master}` does not answer any more: {error}",
            "look at the log of rank 0; or start a coordinator, and name it: `coordinator_url=`",
        ) from error


def _announce(meeting: _Meeting) -> tuple[str, str]:
    """Host the coordinator, and leave word of it."""
    if meeting.is_one_machine:
        family, host = socket.AF_INET, _LOOPBACK
    else:
        family, host = _own_address(meeting.master)
    ip = _LOOPBACK if meeting.is_one_machine else _EVERYWHERE[family]
    coordinator = _host(meeting.key, ip)
    named = f"[{host}]" if ":" in host else host
    url, token = f"http://{named}:{coordinator.port}", coordinator.token
    with _asking_store(meeting.master):
        meeting.store.set(meeting.key, f"{url} {token}")
    return url, token


def _store_of_agent(master: str, port: int) -> Store:
    # Here, because a process that does not run under torchrun needs no torch.
    from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]  # noqa: PLC0415

    limit = dt.timedelta(seconds=_CONNECT_SECONDS)
    try:
        return TCPStore(master, port, is_master=False, timeout=limit)
    except DistError as error:
        raise CoordinatorUnavailable(
            "looking for the coordinator that rank 0 hosts",
            f"the store of torchrun's agent at `{master}:{port}` does not answer: {error}",
            "look at the agent's log; or start a coordinator, and name it: `coordinator_url=`",
        ) from error


def _await(meeting: _Meeting, timeout: float) -> tuple[str, str]:
    """Give URL and token once somebody listens there.

    Looks again and again: torch's own wait hears no signal, and logs a lot.
    """
    deadline = time.monotonic() + timeout
    url = ""
    while True:
        with _asking_store(meeting.master):
            is_named = meeting.store.check([meeting.key])
            named = meeting.store.get(meeting.key).decode() if is_named else ""
        if named:
            url, token = named.split()
            if _is_listening(url):
                return url, token
        if time.monotonic() >= deadline:
            raise _nobody_at(url) if url else NotOpened
        time.sleep(_LOOK_SECONDS)


def _is_listening(url: str) -> bool:
    place = urllib.parse.urlsplit(url)
    try:
        with socket.create_connection((str(place.hostname), place.port or 0), _PROBE_SECONDS):
            return True
    except OSError:
        return False


def _own_address(master: str) -> tuple[socket.AddressFamily, str]:
    """Give the address by which this machine reaches, and is reached from, the run's master."""
    try:
        found = socket.getaddrinfo(master, 9, type=socket.SOCK_DGRAM)
    except OSError as error:
        raise _no_way(master, str(error)) from error
    # A name with addresses of both kinds is reached by the older one everywhere. What is
    # link-local, with a scope, is another machine's from there.
    usable = [place for place in found if not (len(place[4]) > 3 and place[4][3])]  # noqa: PLR2004
    usable.sort(key=lambda place: place[0] != socket.AF_INET)
    for family, kind, protocol, _, address in usable:
        own = _reached_from((family, kind, protocol), address)
        if own is not None:
            # A name may mean this machine's loopback here, and its address elsewhere.
            return family, master if ipaddress.ip_address(own).is_loopback else own
    raise _no_way(master, "none of its addresses can be reached")


def _reached_from(kind: tuple[int, int, int], address: tuple[Any, ...]) -> str | None:
    """Give this machine's address on the way to another one."""
    try:
        with socket.socket(*kind) as probe:
            probe.connect(address)  # nothing is sent
            return str(probe.getsockname()[0])
    except OSError:
        return None


def _no_way(master: str, why: str) -> CoordinatorUnavailable:
    return CoordinatorUnavailable(
        "hosting the coordinator for all ranks",
        f"this machine has no way to `{master}`, where the ranks' store is: {why}",
        "look at `MASTER_ADDR`; or start a coordinator, and name it: `coordinator_url=`",
    )


def _host(key: str, ip: str) -> _native.EmbeddedCoordinator:
    with _lock:
        if key not in _hosted:
            _hosted[key] = _native.EmbeddedCoordinator(ip)
        return _hosted[key]
