"""A coordinator that rank 0 hosts in its own process, for runs that are given none.

Under ``torchrun`` the ranks find each other through the store that its agent serves: rank 0 starts
the coordinator on a free port and leaves there where it listens and what token it asks for, under
the run's id and its restart count, so that the processes of a restarted run never meet the
coordinator of the run before.

Always holds: one coordinator a process and run; it ends with the process; where all ranks are on
one machine it does not listen beyond it; a wait for rank 0 hears signals.
"""

from __future__ import annotations

import datetime as dt
import os
import socket
import threading
import time
from typing import TYPE_CHECKING

from dtruntime import _native
from dtruntime.connecting import Security
from dtruntime.errors import CoordinatorUnavailable

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch.distributed import TCPStore  # type: ignore[attr-defined]

_CONNECT_SECONDS = 60.0
"""How long the agent's store, which is there before the ranks are, may take to answer."""
_LOOK_SECONDS = 0.1
"""How often a rank looks whether rank 0 has come."""
_LOOPBACK = "127.0.0.1"
_EVERYWHERE = "0.0.0.0"  # noqa: S104  (a token is asked for)

_hosted: dict[str, _native.EmbeddedCoordinator] = {}
_lock = threading.Lock()


class NotOpened(Exception):  # noqa: N818
    """Rank 0 has not said in time where its coordinator listens."""


def find(
    rank: int, timeout: float, environment: Mapping[str, str] = os.environ
) -> tuple[str, Security] | None:
    """Give URL and token of this ``torchrun`` run's coordinator; None if this is no such run.

    Raises:
        NotOpened: Rank 0 did not come to host it within ``timeout`` seconds.
        CoordinatorUnavailable: The agent's store, where it would say so, does not answer.

    """
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    master = environment["MASTER_ADDR"]
    run = environment.get("TORCHELASTIC_RUN_ID", "")
    restarts = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
    key = f"dtruntime/coordinator/{run}/{restarts}"
    store = _store_of_agent(master, int(environment["MASTER_PORT"]))
    if rank == 0:
        is_one_machine = environment.get("LOCAL_WORLD_SIZE") == environment.get("WORLD_SIZE")
        coordinator = _host(key, _LOOPBACK if is_one_machine else _EVERYWHERE)
        host = _LOOPBACK if is_one_machine else _own_address(master)
        store.set(key, f"http://{host}:{coordinator.port} {coordinator.token}")
    _await(store, key, timeout)
    url, token = store.get(key).decode().split()
    return url, Security(token=token)


def _store_of_agent(master: str, port: int) -> TCPStore:
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


def _await(store: TCPStore, key: str, timeout: float) -> None:
    """Look for a key until it is there: torch's own wait hears no signal, and logs a lot."""
    deadline = time.monotonic() + timeout
    while not store.check([key]):
        if time.monotonic() >= deadline:
            raise NotOpened
        time.sleep(_LOOK_SECONDS)


def _own_address(master: str) -> str:
    """Give the address by which this machine reaches, and is reached from, the run's master."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((master, 9))  # nothing is sent
        address = str(probe.getsockname()[0])
    return master if address.startswith("127.") else address


def _host(key: str, ip: str) -> _native.EmbeddedCoordinator:
    with _lock:
        if key not in _hosted:
            _hosted[key] = _native.EmbeddedCoordinator(ip)
        return _hosted[key]
