"""Upload to and restore from one S3 service, beside `aws s3 cp` and `s3torchconnector`.

    make compare-s3    about four minutes; the row of `aws` needs root, for port 80

The service is that of the tests, a separate process that keeps its objects in memory, on the same
cores as the clients. All clients save the same tensors, seeded; they take turns, each in a new
process that saves once to warm up, then saves and restores once, timed. Every tensor that comes
back is compared.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import peers
import tables
from machine import describe
from make_state import say
from tables import Verdict

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

REQUIREMENTS = Path(__file__).with_name("requirements-s3.txt")
MEMORY = Path("/dev/shm")  # noqa: S108  (the service's objects belong in memory)
PART_BYTES = 16 << 20
TENSOR_BYTES = 32 << 20
REGION = "us-east-1"
CPU_MAX, RESTORE_MIN, STALL_MAX = 0.5, 1.3, 1.15
"""What is considered good enough, beside s3torchconnector and a save into a directory."""


def state_of(size: int) -> dict[str, torch.Tensor]:
    """Make tensors of so many bytes, in the mix of a training state; nothing repeats."""
    generator = torch.Generator().manual_seed(7)
    weights: dict[str, torch.Tensor] = {}
    for number in range(size // TENSOR_BYTES):
        values = torch.randn(TENSOR_BYTES // 4, generator=generator)
        if number % 7 == 0:  # two of fourteen bytes a parameter are bf16
            values = torch.cat([values, values.flip(0)]).to(torch.bfloat16)
        weights[f"layer{number}"] = values
    return weights


def processor_seconds() -> float:
    """Return the processor time of this process and its ended children."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def timed(act: Callable[[], Any]) -> dict[str, float]:
    """Return the seconds that something takes, of the clock and of the processor."""
    cpu, start = processor_seconds(), time.monotonic()
    act()
    return {"seconds": time.monotonic() - start, "cpu": processor_seconds() - cpu}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """Stop unless every tensor is the same, bit by bit."""
    for name, tensor in one.items():
        if not torch.equal(tensor.view(torch.int16), other[name].view(torch.int16)):
            raise SystemExit(
                f"error: `{name}` came back changed\nhint: no figure of this run counts"
            )


def run_dtruntime(store: str, state: dict[str, torch.Tensor], compression: str) -> dict[str, Any]:
    """Save and load with the engine."""
    from dtruntime import CheckpointManager

    found: dict[str, Any] = {}
    with CheckpointManager(store, compression=compression, keep_last_n=1) as manager:
        manager.save_async(state, step=1).result()

        def save() -> None:
            handle = manager.save_async(state, step=2)
            found["stall"] = handle.result().stats.stall_seconds

        found["save"] = timed(save)
        found["load"] = timed(lambda: found.update(state=manager.load()))
    same(state, found.pop("state"))
    return found


def run_connector(store: str, state: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Save and load with torch's distributed checkpoint and the connector."""
    from s3torchconnector import S3ClientConfig
    from s3torchconnector.dcp import S3StorageReader, S3StorageWriter
    from torch.distributed import checkpoint as dcp

    config = S3ClientConfig(force_path_style=True, part_size=PART_BYTES)
    options = {"region": REGION, "s3client_config": config}

    def save(number: int) -> None:
        writer = S3StorageWriter(path=f"{store}/{number}", **options)
        dcp.state_dict_saver.save(state, storage_writer=writer, no_dist=True)

    save(1)
    loaded = {name: torch.empty_like(tensor) for name, tensor in state.items()}

    def load() -> None:
        reader = S3StorageReader(path=f"{store}/2", **options)
        dcp.state_dict_loader.load(loaded, storage_reader=reader, no_dist=True)

    found = {"save": timed(lambda: save(2)), "load": timed(load)}
    same(state, loaded)
    return found


def run_aws(store: str, state: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Upload and download a file of the same bytes."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        source, copy, config = (Path(folder) / name for name in ("state", "copy", "config"))
        with source.open("wb") as file:
            for tensor in state.values():
                file.write(tensor.view(torch.uint8).numpy().data)
        config.write_text(
            f"[default]\nregion = {REGION}\ns3 =\n  preferred_transfer_client = crt\n"
            f"  addressing_style = path\n  multipart_chunksize = {PART_BYTES}\n"
        )
        environment = os.environ | {"AWS_CONFIG_FILE": str(config)}
        endpoint = os.environ["AWS_ENDPOINT_URL_S3"]

        def aws(*arguments: str) -> None:
            command = ["/usr/bin/aws", *arguments]
            subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)

        def transfer(one: str, other: str) -> None:
            aws("--endpoint-url", endpoint, "s3", "cp", "--only-show-errors", one, other)

        transfer(str(source), f"{store}/1")
        found = {
            "start": timed(lambda: aws("--version")),
            "save": timed(lambda: transfer(str(source), f"{store}/2")),
            "load": timed(lambda: transfer(f"{store}/2", str(copy))),
        }
        if copy.read_bytes() != source.read_bytes():
            raise SystemExit(
                "error: the file came back changed\nhint: no figure of this run counts"
            )
    return found


CLIENTS: dict[str, Callable[[str, dict[str, torch.Tensor]], dict[str, Any]]] = {
    "dtruntime, `none`": lambda store, state: run_dtruntime(store, state, "none"),
    "dtruntime": lambda store, state: run_dtruntime(store, state, "auto"),
    "s3torchconnector, DCP": run_connector,
    "aws s3 cp, CRT": run_aws,
}


def can_serve(port: int) -> bool:
    """Return whether this process may listen on the port."""
    with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
        return True
    return False


@contextlib.contextmanager
def service(root: Path) -> Iterator[bool]:
    """Run the service, and point the usual chain at it; tells whether `aws` finds it there."""
    program = Path(os.environ["CARGO_TARGET_DIR"]) / "release" / "examples" / "s3-server"
    # The version of `aws` that Debian has does not send its CRT client to other ports.
    ports = ["80"] if can_serve(80) else []
    with subprocess.Popen(
        [program, root, *ports], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None  # noqa: S101
        assert process.stdout is not None  # noqa: S101
        url, _, key, secret = process.stdout.readline().split()
        os.environ.update(
            AWS_ACCESS_KEY_ID=key,
            AWS_SECRET_ACCESS_KEY=secret,
            AWS_ENDPOINT_URL=url,
            AWS_ENDPOINT_URL_S3=url,
            AWS_REGION=REGION,
            AWS_CONFIG_FILE=os.devnull,
            AWS_SHARED_CREDENTIALS_FILE=os.devnull,
        )
        yield bool(ports)
        process.stdin.close()


def one_turn(client: str, size: int, root: Path) -> dict[str, Any]:
    """Run one client in a process of its own, on an empty bucket."""
    arguments = ["--client", client, "--mib", str(size >> 20)]
    run = subprocess.run(
        [sys.executable, __file__, *arguments], check=True, stdout=subprocess.PIPE, text=True
    )
    for path in (root / "checkpoints").iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return found


def local_stall(size: int) -> float:
    """Return the stall of a warm save into a directory."""
    from dtruntime import CheckpointManager

    state = state_of(size)
    with (
        tempfile.TemporaryDirectory(prefix="dtr-s3-") as folder,
        CheckpointManager(folder, compression="none", keep_last_n=1) as manager,
    ):
        stalls = [
            manager.save_async(state, step=step).result().stats.stall_seconds
            for step in range(1, 7)
        ]
    return statistics.median(stalls[1:])


def median(turns: list[dict[str, Any]], what: str, figure: str) -> float:
    """Return the median of one figure."""
    return float(statistics.median(turn[what][figure] for turn in turns))


def table(found: dict[str, list[dict[str, Any]]], size: int, stall: float) -> str:
    """Return the tables: what was measured, and what it must be."""
    judged = tables.verdict_table(verdicts(found, stall), "figure of `none`, the same bytes")
    return "\n".join([*figures(found, size), "", *judged])


def figures(found: dict[str, list[dict[str, Any]]], size: int) -> list[str]:
    """Return what was measured, one row for each client."""
    rows = [
        "| | upload | restore | CPU of the upload | CPU of the restore |",
        "|---|--:|--:|--:|--:|",
    ]
    for client, turns in found.items():
        times = [median(turns, what, "seconds") for what in ("save", "load")]
        cells = [f"{seconds:.2f} s, {size / seconds / 1e6:.0f} MB/s" for seconds in times]
        cells += [f"{median(turns, what, 'cpu'):.2f} s" for what in ("save", "load")]
        rows.append(f"| {client} | {' | '.join(cells)} |")
    return rows


def verdicts(found: dict[str, list[dict[str, Any]]], stall: float) -> list[Verdict]:
    """Judge every figure; `stall` is that of a save into a directory."""
    ours, connector = found["dtruntime, `none`"], found["s3torchconnector, DCP"]
    upload = median(ours, "save", "seconds") / median(connector, "save", "seconds")
    cpu = median(ours, "save", "cpu") / median(connector, "save", "cpu")
    restore = median(connector, "load", "seconds") / median(ours, "load", "seconds")
    own_stall = statistics.median(turn["stall"] for turn in ours)
    return [
        aws_verdict(ours, found.get("aws s3 cp, CRT")),
        Verdict(
            "upload, compared with s3torchconnector",
            "not slower",
            f"{upload:.2f} of its time",
            upload <= 1.0,
        ),
        Verdict(
            "CPU of the upload",
            f"at most {CPU_MAX} of s3torchconnector's",
            f"{cpu:.2f}",
            cpu <= CPU_MAX,
        ),
        Verdict(
            "restore",
            f"at least {RESTORE_MIN} of s3torchconnector's speed",
            f"{restore:.2f}",
            restore >= RESTORE_MIN,
        ),
        Verdict(
            "stall",
            f"at most {STALL_MAX} times that of a save into a directory, {1e3 * stall:.0f} ms",
            f"{1e3 * own_stall:.0f} ms",
            own_stall <= STALL_MAX * stall,
        ),
    ]


def aws_verdict(ours: list[dict[str, Any]], aws: list[dict[str, Any]] | None) -> Verdict:
    """Judge the upload beside that of `aws`, which starts a process for each."""
    figure, must = "upload, compared with `aws s3 cp`", "not slower"
    if aws is None:
        return Verdict(figure, must, "not run", None)
    upload, start = median(ours, "save", "seconds"), median(aws, "start", "seconds")
    alone = median(aws, "save", "seconds") - start
    was = f"{upload / alone:.2f} of its time, excluding its startup of {start:.2f} s"
    return Verdict(figure, must, was, upload <= alone)


def compare(options: argparse.Namespace) -> None:
    """Let all clients take turns, and print the tables."""
    size = options.mib << 20
    os.environ["PYTHONPATH"] = f"{peers.ensure(REQUIREMENTS)}:{os.environ.get('PYTHONPATH', '')}"
    stall = local_stall(size)
    found: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder, service(Path(folder)) as has_aws:
        clients = list(CLIENTS)
        if not (has_aws and Path("/usr/bin/aws").exists()):
            say("`aws` is left out: it needs port 80, and Debian's awscli 2 with python3-awscrt")
            clients.remove("aws s3 cp, CRT")
        for number in range(options.rounds):
            for client in clients:
                say(f"round {number + 1}: {client}")
                found.setdefault(client, []).append(one_turn(client, size, Path(folder)))
        machine = describe(Path(folder))
    text = (
        f"{table(found, size, stall)}\n\n{size / 1e9:.2f} GB in {size // TENSOR_BYTES} tensors, "
        f"parts of {PART_BYTES >> 20} MiB, medians of {options.rounds}. On {machine}."
    )
    print(text)
    if options.readme is not None:
        tables.rewrite(options.readme, "s3", text)


def main() -> None:
    """Compare, or run as one of the clients."""
    parser = argparse.ArgumentParser(description="Uploads to one S3 service, and restores from it")
    parser.add_argument("--mib", type=int, default=896, help="the size of the state")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--readme", type=Path, help="also put the tables there, between its marks")
    parser.add_argument("--client", choices=CLIENTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.client is None:
        compare(options)
        return
    found = CLIENTS[options.client]("s3://checkpoints/run", state_of(options.mib << 20))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
