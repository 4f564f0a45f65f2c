"""A barrier of many ranks in torch's own store, to compare the fleet's figures with.

    python store_barrier.py 1024 10

The store's server is a separate process, and so is every quarter of the ranks, each rank a thread
with a connection. A barrier works as in `torch.distributed`: every rank adds one to a counter, the
one that completes it sets a key, and all wait for that key. Prints, for each round, the
milliseconds from the last arrival until the last rank has continued.
"""

from __future__ import annotations

import multiprocessing
import sys
import threading
import time
from datetime import timedelta
from typing import TYPE_CHECKING

from torch.distributed import TCPStore  # type: ignore[attr-defined]

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

PROCESSES = 4
SETTLE_SECONDS = 2.0
"""How long the last one waits, so that all others have certainly arrived."""
TIMEOUT = timedelta(seconds=120)


def client(port: int) -> TCPStore:
    """Open another connection."""
    return TCPStore("127.0.0.1", port, is_master=False, timeout=TIMEOUT)


def arrive(store: TCPStore, ranks: int, round_number: int) -> None:
    """Wait for all others."""
    done = f"done-{round_number}"
    if store.add(f"count-{round_number}", 1) == ranks:
        store.set(done, "1")
    store.wait([done], TIMEOUT)


def serve(pipe: Connection) -> None:
    """Run the store until told to end."""
    store = TCPStore("127.0.0.1", 0, is_master=True, timeout=TIMEOUT)
    pipe.send(store.port)
    pipe.recv()


def run_ranks(pipe: Connection, port: int, own: int, ranks: int, rounds: int) -> None:
    """Run some of the ranks; report for each round when the last of them continued."""
    stores = [client(port) for _ in range(own)]
    for number in range(rounds):
        went_on = [0.0] * own

        def take_part(place: int, number: int = number, went_on: list[float] = went_on) -> None:
            arrive(stores[place], ranks, number)
            went_on[place] = time.monotonic()

        pipe.send("ready")
        pipe.recv()
        threads = [threading.Thread(target=take_part, args=(place,)) for place in range(own)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        pipe.send(max(went_on))


def main(ranks: int, rounds: int) -> None:
    """Pass so many barriers."""
    context = multiprocessing.get_context("spawn")
    server, server_side = context.Pipe()
    processes = [context.Process(target=serve, args=(server_side,))]
    processes[0].start()
    port = server.recv()
    last = client(port)
    shares = [(ranks - 1 + place) // PROCESSES for place in range(PROCESSES)]
    pipes = []
    for own in shares:
        pipe, other_side = context.Pipe()
        pipes.append(pipe)
        arguments = (other_side, port, own, ranks, rounds)
        processes.append(context.Process(target=run_ranks, args=arguments))
        processes[-1].start()
    for number in range(rounds):
        for pipe in pipes:
            pipe.recv()
        for pipe in pipes:
            pipe.send("go")
        time.sleep(SETTLE_SECONDS)
        start = time.monotonic()
        arrive(last, ranks, number)
        went_on = [time.monotonic(), *(pipe.recv() for pipe in pipes)]
        print(f"{1e3 * (max(went_on) - start):.2f}", flush=True)
    server.send("end")
    for process in processes:
        process.join()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
