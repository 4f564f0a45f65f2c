"""Run the tests of S3 against Garage, an independent service.

    make test-s3                     Garage on this machine; the first time it is built, ten minutes
    make test-s3 ARGS="round_trip"   only the tests whose names contain this

Another service is used if the environment names one: see `place.rs`. Garage is one
node with its metadata in SQLite, on loopback, in a directory that is removed after the tests.
It ignores conditions on writes, which the engine has to notice and guard against.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[2]
VERSION = "2.5.0"
BUCKET = "checkpoints"
REGION = "us-east-1"
START_SECONDS = 60.0
CACHE = Path(os.environ.get("DTRUNTIME_CACHE") or Path.home() / ".cache" / "dtruntime")

CONFIG = """
metadata_dir = "{directory}/meta"
data_dir = "{directory}/data"
db_engine = "sqlite"
replication_factor = 1
rpc_bind_addr = "127.0.0.1:{rpc}"
rpc_public_addr = "127.0.0.1:{rpc}"
rpc_secret = "{secret}"

[s3_api]
s3_region = "{region}"
api_bind_addr = "127.0.0.1:{s3}"

[admin]
api_bind_addr = "127.0.0.1:{admin}"
"""


def binary() -> Path:
    """Find Garage, or build it."""
    home = CACHE / "garage" / VERSION
    program = home / "bin" / "garage"
    if program.exists():
        return program
    print(f"building Garage {VERSION} into {home}, once", flush=True)
    target = home / "target"
    command = ["cargo", "install", "garage", "--version", VERSION, "--locked", "--quiet"]
    # Outside the clone, whose own settings are not for it.
    home.mkdir(parents=True, exist_ok=True)
    subprocess.run(
        [*command, "--root", home, "--target-dir", target],
        cwd=home,
        env={name: value for name, value in os.environ.items() if name != "CARGO_TARGET_DIR"},
        check=True,
    )
    shutil.rmtree(target, ignore_errors=True)
    return program


def free_ports(count: int) -> list[int]:
    """Find free ports."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [listener.getsockname()[1] for listener in sockets]
    for listener in sockets:
        listener.close()
    return ports


@contextmanager
def garage() -> Iterator[dict[str, str]]:
    """Start one with an empty bucket; return the environment that names it."""
    program = binary()
    with tempfile.TemporaryDirectory(prefix="garage-") as directory:
        rpc, s3, admin = free_ports(3)
        config = Path(directory) / "garage.toml"
        config.write_text(
            CONFIG.format(
                directory=directory,
                rpc=rpc,
                s3=s3,
                admin=admin,
                region=REGION,
                secret=secrets.token_hex(32),
            )
        )
        key, secret = f"GK{secrets.token_hex(12)}", secrets.token_hex(32)
        defaults = {
            "GARAGE_DEFAULT_ACCESS_KEY": key,
            "GARAGE_DEFAULT_SECRET_KEY": secret,
            "GARAGE_DEFAULT_BUCKET": BUCKET,
            "RUST_LOG": "garage=warn",
        }
        log = Path(directory) / "log"
        with log.open("w") as output:
            command = [program, "-c", config, "server", "--single-node", "--default-bucket"]
            server = subprocess.Popen(
                command, env=os.environ | defaults, stdout=output, stderr=subprocess.STDOUT
            )
            try:
                wait_for(s3, server, log)
                yield {
                    "DTR_S3_ENDPOINT": f"http://127.0.0.1:{s3}",
                    "DTR_S3_BUCKET": BUCKET,
                    "AWS_ACCESS_KEY_ID": key,
                    "AWS_SECRET_ACCESS_KEY": secret,
                    "AWS_REGION": REGION,
                }
            finally:
                server.terminate()
                try:
                    server.wait(20)
                except subprocess.TimeoutExpired:
                    server.kill()


def wait_for(port: int, server: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until it listens."""
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and server.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.1)
        else:
            return
    sys.exit(f"error: Garage does not listen at port {port}\n{log.read_text()}")


def run(environment: dict[str, str], names: list[str]) -> int:
    """Run the tests; print how many were skipped, and why."""
    command = ["cargo", "test", "--locked", "--release", "--workspace", "--test", "s3"]
    with subprocess.Popen(
        [*command, "--", "--show-output", *names],
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        output = []
        for line in process.stdout or ():
            output.append(line)
            if re.match(r"test |error", line):
                print(line, end="", flush=True)
    if process.returncode:
        print("".join(output))
    skipped = sorted(line[9:].rstrip() for line in output if line.startswith("skipped: "))
    print(f"{len(skipped)} of them were skipped:", *skipped, sep="\n  ")
    return process.returncode


def main() -> int:
    """Run against what the environment names, or against Garage."""
    if os.environ.get("DTR_S3_ENDPOINT"):
        return run({}, sys.argv[1:])
    with garage() as environment:
        print(f"Garage {VERSION} at {environment['DTR_S3_ENDPOINT']}", flush=True)
        return run(environment, sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
