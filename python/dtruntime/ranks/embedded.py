"""A coordinator that rank 0 hosts in its own process, for runs that are given none.

The ranks rendezvous through an existing key-value store: that of ``torchrun``'s agent, else that of
the script's process group. Rank 0 starts the coordinator on a free port and publishes its URL and
token there, with an agent under the run's id. The entry of an earlier rank 0 stays until the next
one replaces it, since agents neither agree on a restart number nor clear the store: the other ranks
skip a coordinator that cannot be reached, and wait until another one is published.

Always holds: one coordinator per process and run; it ends with the process; if all ranks are on one
machine, it listens on loopback only; a wait for rank 0 can be interrupted by signals.
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
from dtruntime.errors import CoordinatorUnavailable, InvalidArgument
from dtruntime.ranks import launch
from dtruntime.ranks.connecting import Security

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch.distributed import Store  # type: ignore[attr-defined]

_CONNECT_SECONDS = 60.0
"""How long the agent's store, which exists before the ranks do, may take to answer."""
_POLL_SECONDS = 0.1
"""How often a rank checks whether rank 0 has published its coordinator."""
_PROBE_SECONDS = 2.0
"""How long a TCP connection to the coordinator may take."""
_LOOPBACK = "127.0.0.1"
_EVERYWHERE = {
    socket.AF_INET: "0.0.0.0",  # noqa: S104  (a token is required)
    socket.AF_INET6: "[::]",
}

_hosted: dict[str, _native.EmbeddedCoordinator] = {}
_lock = threading.Lock()


class NotOpened(Exception):  # noqa: N818
    """Rank 0 has not published its coordinator in time."""


def _not_answering(url: str) -> CoordinatorUnavailable:
    return CoordinatorUnavailable(
        "looking for the coordinator that rank 0 hosts",
        f"nothing answers at `{url}`, which rank 0 of this run, or of an earlier one, published",
        "open the manager on rank 0, and make its machine's ports reachable; or start a "
        "coordinator, and pass `coordinator_url=`",
    )


def find(
    rank: int, timeout: float, environment: Mapping[str, str] = os.environ
) -> tuple[str, Security] | None:
    """Return URL and token of the coordinator that rank 0 hosts; None without a shared store.

    Raises:
        NotOpened: Rank 0 did not publish it within ``timeout`` seconds.
        CoordinatorUnavailable: The store that it is published in, or the coordinator itself, does
            not answer.
        InvalidArgument: The process group does not say where rank 0 is, nor does MASTER_ADDR.

    """
    rendezvous = _rendezvous(environment)
    if rendezvous is None:
        return None
    if rank == 0:
        url, token = _announce(rendezvous)
    else:
        url, token = _await(rendezvous, timeout)
    return url, Security(token=token)


class _Rendezvous(NamedTuple):
    """The store through which ranks find each other.

    Attributes:
        store: The shared key-value store.
        key: The key under which the coordinator is published.
        master: The machine that serves the store.
        is_one_machine: Whether all ranks are known to be on this machine.

    """

    store: Store
    key: str
    master: str
    is_one_machine: bool


def _rendezvous(environment: Mapping[str, str]) -> _Rendezvous | None:
    key = "dtruntime/coordinator"
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        master = environment["MASTER_ADDR"]
        store = _store_of_agent(master, int(environment["MASTER_PORT"]))
        is_one_machine = environment.get("LOCAL_WORLD_SIZE") == environment.get("WORLD_SIZE")
        key = f"{key}/{environment.get('TORCHELASTIC_RUN_ID', '')}"
        return _Rendezvous(store, key, master, is_one_machine)
    group = launch.process_group(environment)
    if group is None or group.store is None:
        return None
    if not group.master:
        if group.world_size == 1:
            return None
        raise InvalidArgument(
            "looking for the coordinator that rank 0 hosts",
            "the process group's store, such as a file, does not say on which machine the other "
            "ranks can reach rank 0",
            "set the environment's MASTER_ADDR to rank 0's machine (127.0.0.1 if all ranks are on "
            "one), or start a coordinator and pass `coordinator_url=`",
        )
    return _Rendezvous(group.store, key, group.master, launch.is_loopback(group.master))


@contextlib.contextmanager
def _store_errors(master: str) -> Iterator[None]:
    """Turn errors of the shared store into a ``CoordinatorUnavailable``."""
    from torch.distributed import DistError  # noqa: PLC0415

    try:
        yield
    except DistError as error:
        raise CoordinatorUnavailable(
            "looking for the coordinator that rank 0 hosts",
            f"the store of the ranks at `{master}` no longer answers: {error}",
            "check the log of rank 0; or start a coordinator, and pass `coordinator_url=`",
        ) from error


def _announce(rendezvous: _Rendezvous) -> tuple[str, str]:
    """Host the coordinator, and publish its URL and token."""
    if rendezvous.is_one_machine:
        family, host = socket.AF_INET, _LOOPBACK
    else:
        family, host = _own_address(rendezvous.master)
    ip = _LOOPBACK if rendezvous.is_one_machine else _EVERYWHERE[family]
    coordinator = _host(rendezvous.key, ip)
    named = f"[{host}]" if ":" in host else host
    url, token = f"http://{named}:{coordinator.port}", coordinator.token
    with _store_errors(rendezvous.master):
        rendezvous.store.set(rendezvous.key, f"{url} {token}")
    return url, token


def _store_of_agent(master: str, port: int) -> Store:
    # Imported here: a process that does not run under torchrun needs no torch.
    from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]  # noqa: PLC0415

    limit = dt.timedelta(seconds=_CONNECT_SECONDS)
    try:
        return TCPStore(master, port, is_master=False, timeout=limit)
    except DistError as error:
        raise CoordinatorUnavailable(
            "looking for the coordinator that rank 0 hosts",
            f"the store of torchrun's agent at `{master}:{port}` does not answer: {error}",
            "check the agent's log; or start a coordinator, and pass `coordinator_url=`",
        ) from error


def _await(rendezvous: _Rendezvous, timeout: float) -> tuple[str, str]:
    """Return URL and token once the coordinator listens.

    Polls: torch's own wait cannot be interrupted by signals, and logs a lot.
    """
    deadline = time.monotonic() + timeout
    url = ""
    while True:
        with _store_errors(rendezvous.master):
            is_named = rendezvous.store.check([rendezvous.key])
            named = rendezvous.store.get(rendezvous.key).decode() if is_named else ""
        if named:
            url, token = named.split()
            if _is_listening(url):
                return url, token
        if time.monotonic() >= deadline:
            raise _not_answering(url) if url else NotOpened
        time.sleep(_POLL_SECONDS)


def _is_listening(url: str) -> bool:
    place = urllib.parse.urlsplit(url)
    try:
        with socket.create_connection((str(place.hostname), place.port or 0), _PROBE_SECONDS):
            return True
    except OSError:
        return False


def _own_address(master: str) -> tuple[socket.AddressFamily, str]:
    """Return this machine's address on the network that connects it to the run's master."""
    try:
        found = socket.getaddrinfo(master, 9, type=socket.SOCK_DGRAM)
    except OSError as error:
        raise _unreachable(master, str(error)) from error
    # A name with addresses of both families is reachable by IPv4 everywhere. A link-local address,
    # which has a scope, would mean another machine elsewhere.
    usable = [place for place in found if not (len(place[4]) > 3 and place[4][3])]  # noqa: PLR2004
    usable.sort(key=lambda place: place[0] != socket.AF_INET)
    for family, kind, protocol, _, address in usable:
        own = _reached_from((family, kind, protocol), address)
        if own is not None:
            # A name may resolve to loopback here, and to this machine's address elsewhere.
            return family, master if ipaddress.ip_address(own).is_loopback else own
    raise _unreachable(master, "none of its addresses can be reached")


def _reached_from(kind: tuple[int, int, int], address: tuple[Any, ...]) -> str | None:
    """Return the local address of a route to another machine; None if there is none."""
    try:
        with socket.socket(*kind) as probe:
            probe.connect(address)  # nothing is sent
            return str(probe.getsockname()[0])
    except OSError:
        return None


def _unreachable(master: str, why: str) -> CoordinatorUnavailable:
    return CoordinatorUnavailable(
        "hosting the coordinator for all ranks",
        f"this machine has no route to `{master}`, which serves the ranks' store: {why}",
        "check `MASTER_ADDR`; or start a coordinator, and pass `coordinator_url=`",
    )


def _host(key: str, ip: str) -> _native.EmbeddedCoordinator:
    with _lock:
        if key not in _hosted:
            _hosted[key] = _native.EmbeddedCoordinator(ip)
        return _hosted[key]
