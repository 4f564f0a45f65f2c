"""Save and restore with several ranks on one machine, beside PyTorch's distributed checkpoint.

    make compare-ranks    about ten minutes; best as root

All ranks map the same copy of the state that `compare.py` saves. It is laid out as two kinds of
training have it: whole on every rank (DDP), and cut along the first dimension (FSDP2, `DTensor`).
Engines take turns, each time in new processes that save once to warm up, then save and restore
once, timed. A time begins at a barrier and ends when the last rank is done. Every tensor that comes
back is compared, bit by bit.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

import engines
import peers
import state
import tables
from machine import describe, drop_caches, is_root
from make_state import SIZES, say
from state import Index, bits_of, flatten, map_state, unflatten
from worker import cpu_seconds, is_same

if TYPE_CHECKING:
    from collections.abc import Callable

    from make_state import State

DDP, FSDP = "ddp", "fsdp"
REPLICATED = ("*", "!progress.random")  # a rank's random numbers are its own
TITLES = {DDP: "The whole state on every rank (DDP)", FSDP: "A part of it on each (FSDP2)"}


class TorchSave(engines.TorchSave):
    """One rank writes and the others wait, as scripts often do."""

    def save(self, step: int, state: State) -> None:
        """Write and sync in the call."""
        if dist.get_rank() == 0:
            super().save(step, state)
        dist.barrier()


class DcpSave(engines.DcpSave):
    """All ranks together."""

    no_dist = False


class DcpAsync(engines.DcpAsync):
    """All ranks together."""

    no_dist = False


class DcpAsyncTuned(engines.DcpAsyncTuned):
    """All ranks together."""

    no_dist = False


@dataclass(frozen=True)
class Entrant:
    """An engine, and the layouts of state that it saves without gathering them first."""

    title: str
    make: Callable[[Path], engines.Engine]
    layouts: tuple[str, ...] = (DDP, FSDP)


ENTRANTS = (
    Entrant("dtruntime", lambda folder: engines.Dtruntime(folder, replicated=REPLICATED)),
    Entrant("torch.save on rank 0", TorchSave, (DDP,)),
    Entrant("dcp.save", DcpSave),
    Entrant("dcp.async_save", DcpAsync),
    Entrant("dcp.async_save, tuned", DcpAsyncTuned),
)


def sharded(whole: State, mesh: DeviceMesh) -> State:
    """Cut every tensor along its first dimension, as `fully_shard` does; each rank has its part."""
    return unflatten({path: part_of(value, mesh) for path, value in flatten(whole).items()})


def part_of(value: Any, mesh: DeviceMesh) -> Any:
    """Make a sharded tensor of a whole one; numbers and scalars stay as they are."""
    if not isinstance(value, torch.Tensor) or value.dim() == 0:
        return value
    parts = value.chunk(mesh.size())
    rank = mesh.get_local_rank()
    part = parts[rank] if rank < len(parts) else value[:0]
    part = part.clone()  # an allocation of the rank's own, as it would have
    return DTensor.from_local(
        part, mesh, [Shard(0)], run_check=False, shape=value.shape, stride=value.stride()
    )


def local(of: State) -> State:
    """Return this rank's state in memory."""
    flat = flatten(of).items()
    return unflatten({p: v.to_local() if isinstance(v, DTensor) else v for p, v in flat})


def over_ranks(value: float, operation: dist.ReduceOp.RedOpType) -> float:
    """Combine the figures of all ranks."""
    tensor = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(tensor, operation)
    return float(tensor)


def save(engine: engines.Engine, step: int, of: State) -> dict[str, float]:
    """Save once, and return what it took."""
    dist.barrier()
    cpu_before, began = cpu_seconds(), time.perf_counter()
    engine.save(step, of)
    stall = time.perf_counter() - began
    engine.finish()
    durable = time.perf_counter() - began
    return {
        "stall": over_ranks(stall, dist.ReduceOp.MAX),
        "durable": over_ranks(durable, dist.ReduceOp.MAX),
        "cpu": over_ranks(cpu_seconds() - cpu_before, dist.ReduceOp.SUM),
    }


def restore(engine: engines.Engine, step: int, of: State, *, as_root: bool) -> dict[str, float]:
    """Restore tensors that a training would hold, with cold caches, and compare every bit."""
    live = engines.emptied(of)
    for value in flatten(local(live)).values():
        if isinstance(value, torch.Tensor):
            bits_of(value).zero_()
    if dist.get_rank() == 0:
        drop_caches(engine.folder, as_root=as_root)
    dist.barrier()
    began = time.perf_counter()
    engine.restore(step, live)
    seconds = over_ranks(time.perf_counter() - began, dist.ReduceOp.MAX)
    if not is_same(local(live), local(of)):
        sys.exit("error: what came back is not what was saved\nhint: no figure of this run counts")
    return {"restore": seconds}


def run_rank(options: argparse.Namespace) -> None:
    """Run as one rank: save twice and restore; the first rank prints what it took."""
    dist.init_process_group(
        "gloo",
        init_method=f"file://{options.folder}/rendezvous",
        rank=options.rank,
        world_size=options.ranks,
    )
    of = map_state(options.descriptor, Index.read(options.state))
    if options.layout == FSDP:
        of = sharded(of, init_device_mesh("cpu", (options.ranks,)))
    engine = next(e for e in ENTRANTS if e.title == options.entrant).make(options.folder / "store")
    save(engine, 1, of)
    before = engines.disk_bytes(engine.folder)
    found = save(engine, 2, of)
    found["disk"] = engines.disk_bytes(engine.folder) - before
    found |= restore(engine, 2, of, as_root=is_root() and not options.gentle)
    engine.close()
    if options.rank == 0:
        print(json.dumps(found), flush=True)
    dist.destroy_process_group()


def one_turn(
    entrant: Entrant, layout: str, shared: state.Shared, options: argparse.Namespace
) -> dict[str, float]:
    """Run one engine in new processes, on an empty store."""
    with tempfile.TemporaryDirectory(prefix="dtr-ranks-", dir=options.folder) as root:
        command = [sys.executable, "-W", "ignore", __file__, "--entrant", entrant.title]
        command += ["--layout", layout, "--folder", root, "--state", str(shared.folder)]
        command += ["--descriptor", str(shared.descriptor), "--ranks", str(options.ranks)]
        command += ["--gentle"] if options.gentle else []
        ranks = [
            subprocess.Popen(
                [*command, "--rank", str(rank)],
                stdout=subprocess.PIPE if rank == 0 else None,
                text=True,
                pass_fds=[shared.descriptor],
                env=os.environ | {"MASTER_ADDR": "127.0.0.1", "TORCH_CPP_LOG_LEVEL": "ERROR"},
            )
            for rank in range(options.ranks)
        ]
        printed, _ = ranks[0].communicate()
        if any([rank.wait() for rank in ranks]):  # noqa: C419  (all of them are waited for)
            sys.exit(
                f"error: a rank of `{entrant.title}` failed\nhint: its own message is above, and "
                "no figure of this run counts"
            )
    os.sync()  # the device discards what was deleted before the next engine's turn
    found: dict[str, float] = json.loads(printed.splitlines()[-1])
    return found


def table(layout: str, found: dict[str, list[dict[str, float]]], raw_bytes: int) -> list[str]:
    """Return the medians of one layout, one row for each engine."""
    rows = [
        f"| {TITLES[layout]} | stall | durable | restore | on disk | CPU of the save |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for title, turns in found.items():
        of = {key: statistics.median(turn[key] for turn in turns) for key in turns[0]}
        cells = [f"{1e3 * of['stall']:,.0f} ms", f"{of['durable']:.2f} s", f"{of['restore']:.2f} s"]
        cells += [f"{of['disk'] / raw_bytes:.3f}", f"{of['cpu']:.2f} s"]
        rows.append(f"| {title} | {' | '.join(cells)} |")
    return rows


def compare(options: argparse.Namespace) -> None:
    """Let all engines take turns with each layout, and print the tables."""
    options.folder = options.folder or peers.cache_folder() / "runs"
    options.folder.mkdir(parents=True, exist_ok=True)
    shared = state.Shared(state.ensure(peers.cache_folder(), options.size))
    found: dict[str, dict[str, list[dict[str, float]]]] = {DDP: {}, FSDP: {}}
    for number in range(options.rounds):
        for layout, of_layout in found.items():
            for entrant in (e for e in ENTRANTS if layout in e.layouts):
                say(f"round {number + 1}, {layout}: {entrant.title}")
                turn = one_turn(entrant, layout, shared, options)
                of_layout.setdefault(entrant.title, []).append(turn)
    raw_bytes = shared.index.raw_bytes
    lines = [line for layout in found for line in (*table(layout, found[layout], raw_bytes), "")]
    text = "\n".join(lines) + (
        f"\n{raw_bytes / 1e9:.2f} GB of training state, {options.ranks} ranks, medians of "
        f"{options.rounds}. On {describe(options.folder)}."
    )
    print(text)
    if options.readme is not None:
        tables.rewrite(options.readme, "ranks", text)
    shared.close()


def main() -> None:
    """Compare, or run as one of the ranks."""
    parser = argparse.ArgumentParser(description="Saves and restores by several ranks")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", choices=SIZES, default="full", help="the size of the state")
    parser.add_argument("--folder", type=Path, help="where checkpoints go; a disk, not tmpfs")
    parser.add_argument("--readme", type=Path, help="also put the tables there, between its marks")
    parser.add_argument(
        "--gentle", action="store_true", help="change nothing of the machine, as if not root"
    )
    for hidden in ("--entrant", "--layout"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    for hidden in ("--rank", "--descriptor"):
        parser.add_argument(hidden, type=int, help=argparse.SUPPRESS)
    parser.add_argument("--state", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank is None:
        compare(options)
    else:
        run_rank(options)


if __name__ == "__main__":
    main()
