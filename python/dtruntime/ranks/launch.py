"""How this process was launched: its rank, the world size, and the store shared by the ranks.

Always holds: arguments take precedence over the default process group of ``torch.distributed``, and
that over the environment; torch is used only if the script has imported it.
"""

from __future__ import annotations

import ipaddress
import os
import re
import sys
from typing import TYPE_CHECKING, NamedTuple

from dtruntime.errors import InvalidArgument
from dtruntime.settings import integer

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch.distributed import Store  # type: ignore[attr-defined]

_ORDINAL = re.compile(r"(?:.*\w-)?(\d+)")


class ProcessGroup(NamedTuple):
    """The default process group of ``torch.distributed``.

    Attributes:
        rank: This process's rank in it.
        world_size: How many ranks it has.
        store: The store through which its ranks found each other; None if torch does not expose it.
        master: The machine that serves the store; empty if none does, as for a file store.

    """

    rank: int
    world_size: int
    store: Store | None
    master: str


def process_group(environment: Mapping[str, str] = os.environ) -> ProcessGroup | None:
    """Return the default process group; None if the script has initialised none."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return None
    # Torch has no public name for it; its own device meshes and elastic agents use this one.
    store_of = getattr(distributed.distributed_c10d, "_get_default_store", None)
    store = None if store_of is None else store_of()
    return ProcessGroup(
        distributed.get_rank(), distributed.get_world_size(), store, _master(store, environment)
    )


def _master(store: Store | None, environment: Mapping[str, str]) -> str:
    while (below := getattr(store, "underlying_store", None)) is not None:
        store = below
    return getattr(store, "host", None) or environment.get("MASTER_ADDR", "")


def rank_and_world_size(
    rank: int | str | None,
    world_size: int | str | None,
    environment: Mapping[str, str] = os.environ,
) -> tuple[int, int]:
    """Return both: the arguments, else those of the process group, else of the environment.

    >>> rank_and_world_size(None, None, {"RANK": "worker-3", "WORLD_SIZE": "8"})
    (3, 8)
    """
    group = process_group()
    if rank is None:
        rank = environment.get("RANK", 0) if group is None else group.rank
    if world_size is None:
        world_size = environment.get("WORLD_SIZE", 1) if group is None else group.world_size
    return _ordinal("rank", rank), _ordinal("world_size", world_size)


def is_launched(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether a launcher or a process group says how many ranks there are.

    >>> is_launched({"WORLD_SIZE": "1"}), is_launched({})
    (True, False)
    """
    return "WORLD_SIZE" in environment or process_group(environment) is not None


def local_world_size(world_size: int, environment: Mapping[str, str] = os.environ) -> int:
    """Return how many of the saving ranks are on this machine, according to the launcher.

    >>> local_world_size(16, {"LOCAL_WORLD_SIZE": "8"}), local_world_size(1, {})
    (8, 1)
    """
    said = environment.get("LOCAL_WORLD_SIZE", "")
    if said.isdecimal():
        return max(1, min(int(said), world_size))
    group = process_group(environment)
    return 1 if group is None or not is_loopback(group.master) else world_size


def is_loopback(host: str) -> bool:
    """Return whether a host is certainly this machine: a name may mean another one elsewhere."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _ordinal(name: str, value: int | str) -> int:
    if not isinstance(value, str):
        return integer(name, value)
    match = _ORDINAL.fullmatch(value.strip())
    if match is None:
        raise InvalidArgument(
            f"setting `{name}` = {value!r}",
            "expected a whole number, or a name that ends in one",
            f"pass `{name}=`, or set {name.upper()} to a number or a pod name such as `worker-3`",
        )
    return int(match[1])
