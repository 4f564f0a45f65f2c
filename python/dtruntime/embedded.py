"""A coordinator that rank 0 hosts in its own process, for runs that are given none.

Under ``torchrun`` the ranks find each other through the store that its agent serves: rank 0 starts
the coordinator on a free port and leaves there where it listens and what token it asks for, under
the run's id and its restart count, so that the processes of a restarted run never meet the
coordinator of the run before.

Always holds: one coordinator a process and run; it ends with the process; where all ranks are on
one machine it does not listen beyond it.
"""

from __future__ import annotations

import datetime as dt
import os
import socket
import threading
from typing import TYPE_CHECKING

from dtruntime import _native
from dtruntime.connecting import Security

if TYPE_CHECKING:
    from collections.abc import Mapping

_SECONDS = 60.0
"""How long a rank waits for rank 0 to say where its coordinator listens."""
_LOOPBACK = "127.0.0.1"
_EVERYWHERE = "0.0.0.0"  # noqa: S104  (a token is asked for)

_hosted: dict[str, _native.EmbeddedCoordinator] = {}
_lock = threading.Lock()


def find(rank: int, environment: Mapping[str, str] = os.environ) -> tuple[str, Security] | None:
    """Give URL and token of this ``torchrun`` run's coordinator; None if this is no such run."""
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    master = environment["MASTER_ADDR"]
    run = environment.get("TORCHELASTIC_RUN_ID", "")
    restarts = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
    key = f"dtruntime/coordinator/{run}/{restarts}"
    # Here, because a process that does not run under it needs no torch.
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # noqa: PLC0415

    store = TCPStore(
        master,
        int(environment["MASTER_PORT"]),
        is_master=False,
        timeout=dt.timedelta(seconds=_SECONDS),
    )
    if rank == 0:
        is_one_machine = environment.get("LOCAL_WORLD_SIZE") == environment.get("WORLD_SIZE")
        coordinator = _host(key, _LOOPBACK if is_one_machine else _EVERYWHERE)
        host = _LOOPBACK if is_one_machine else _own_address(master)
        store.set(key, f"http://{host}:{coordinator.port} {coordinator.token}")
    url, token = store.get(key).decode().split()
    return url, Security(token=token)


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
