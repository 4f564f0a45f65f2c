"""Show that a run killed in the middle of a save loses nothing that a checkpoint had promised.

Trains the small GPT of `train_gpt.py` three times: without interruption; until SIGKILL strikes
while a save is in flight; and from there, resumed. Then compares the two loss curves bit by bit,
looks at the store with `ckpt-tool`, and prints what the saves cost. Ends with exit status 1 when
any claim fails. With `--remote s3://bucket/prefix` the checkpoints are also uploaded, below a
prefix of this run, and verified there.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TRAINER = Path(__file__).with_name("train_gpt.py")
STEPS = 60
SAVE_EVERY = 10
KILLED_AT = 40
BARS = "▁▂▃▄▅▆▇█"


class Claims:
    """The claims of this demonstration, each with whether it turned out true."""

    def __init__(self) -> None:
        self.failed = 0

    def check(self, claim: str, *, holds: bool) -> None:
        """Print one claim with its outcome."""
        print(f"  {'✓' if holds else '✗ NOT TRUE:'} {claim}")
        self.failed += not holds


def main() -> int:
    """Run the demonstration in a folder of its own."""
    if shutil.which("ckpt-tool") is None:
        sys.exit("error: `ckpt-tool` is not on PATH\nhint: run `make demo`")
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--remote", metavar="S3", help="bring checkpoints there too, s3://...")
    remote = parser.parse_args().remote
    if remote:
        remote = f"{remote.rstrip('/')}/demo-{int(time.time())}"
    with tempfile.TemporaryDirectory(prefix="dtruntime-demo-") as folder:
        return demonstrate(Path(folder), remote)


def demonstrate(folder: Path, remote: str | None) -> int:
    """Train three times, compare, inspect; returns the exit status."""
    claims = Claims()
    calm, rough = folder / "uninterrupted", folder / "interrupted"

    heading(f"1. {STEPS} steps without interruption, a checkpoint every {SAVE_EVERY}")
    _, expected = run_trainer(calm, remote)

    heading(f"2. the same run, killed by SIGKILL while it saves step {KILLED_AT}")
    status, _ = run_trainer(rough, remote, "--kill-during-save", str(KILLED_AT))
    claims.check("the process was killed", holds=status == -signal.SIGKILL)
    attempt = rough / f"step-{KILLED_AT:012}"
    files = sorted(attempt.iterdir()) if attempt.is_dir() else []
    for file in files:
        print(f"    {file.relative_to(rough)}  {file.stat().st_size:,} bytes")
    claims.check(
        "its half-written files are no checkpoint: there is no manifest",
        holds=bool(files) and not (attempt / "manifest.json").exists(),
    )

    heading("3. the same run again, resumed")
    _, resumed = run_trainer(rough, remote, "--resume")
    compare(claims, expected, resumed)

    heading("4. what ckpt-tool says")
    before, last = STEPS - SAVE_EVERY, STEPS
    claims.check("the store can be listed", holds=tool("ls", rough))
    claims.check("every byte verifies", holds=tool("verify", rough, "--all"))
    claims.check(
        f"steps {before} and {last} can be compared",
        holds=tool("diff", rough, before, last, "--limit", 6),
    )

    heading("5. what a save cost (uninterrupted run)")
    print_costs(expected["saves"])
    if remote:
        heading("6. what arrived in S3")
        there = f"{remote}/{rough.name}"
        claims.check("every byte verifies there", holds=tool("verify", there, "--all"))
    print("\nEvery claim held." if not claims.failed else f"\n{claims.failed} claims failed.")
    return 1 if claims.failed else 0


def run_trainer(store: Path, remote: str | None, *arguments: str) -> tuple[int, dict[str, Any]]:
    """Train in a process of its own; returns its exit status and its report."""
    report = store.with_suffix(".json")
    report.unlink(missing_ok=True)
    command = [sys.executable, str(TRAINER), "--store", str(store), "--losses-out", str(report)]
    command += ["--steps", str(STEPS), "--save-every", str(SAVE_EVERY), *arguments]
    command += ["--remote", f"{remote}/{store.name}"] if remote else []
    status = subprocess.run(command, check=False).returncode
    if status not in (0, -signal.SIGKILL):
        sys.exit(f"error: the trainer ended with exit status {status}")
    return status, json.loads(report.read_text()) if report.exists() else {}


def compare(claims: Claims, expected: dict[str, Any], resumed: dict[str, Any]) -> None:
    """Draw both loss curves and compare them."""
    resumed_at = resumed["resumed_at"]
    print(f"    uninterrupted  {sparkline(expected['losses'])}")
    print(f"    resumed        {sparkline(resumed['losses'])}")
    print(f"                   {' ' * (resumed_at - 1)}↑ resumed here, after step {resumed_at}\n")
    print("    step   uninterrupted         resumed")
    for step in range(resumed_at, STEPS + 1, SAVE_EVERY // 2):
        left, right = expected["losses"][step - 1], resumed["losses"][step - 1]
        print(f"    {step:4}   {left:<20}  {right:<20}  {'same' if left == right else 'DIFFERS'}")
    claims.check(
        f"it resumed from the newest committed step, {KILLED_AT - SAVE_EVERY}",
        holds=resumed_at == KILLED_AT - SAVE_EVERY,
    )
    claims.check(
        f"all {STEPS} losses are equal, to the last bit",
        holds=expected["losses"] == resumed["losses"],
    )
    claims.check(
        "the final weights are equal, to the last bit",
        holds=expected["weights_sha256"] == resumed["weights_sha256"],
    )


def sparkline(values: list[float]) -> str:
    """Draw values as bars, one character each."""
    low, high = min(values), max(values)
    scale = (len(BARS) - 1) / (high - low)
    return "".join(BARS[round((value - low) * scale)] for value in values)


def tool(verb: str, store: Path | str, *arguments: object) -> bool:
    """Run `ckpt-tool` with its output shown; return whether it succeeded."""
    words = [verb, str(store), *map(str, arguments)]
    shown = store.name if isinstance(store, Path) else store
    print(f"\n  $ ckpt-tool {' '.join([verb, shown, *words[2:]])}", flush=True)
    return subprocess.run(["ckpt-tool", *words], check=False).returncode == 0  # noqa: S607


def print_costs(saves: list[dict[str, Any]]) -> None:
    """Print stall, time to durable, speed and size of each save."""
    print("    step   stall ms   durable ms    GB/s   MB in memory   MB on disk    ratio")
    for save in saves:
        raw, stored = save["raw_bytes"], save["stored_bytes"]
        durable = save["durable_seconds"]
        print(
            f"    {save['step']:4}   {save['stall_seconds'] * 1e3:8.1f}   {durable * 1e3:10.1f}"
            f"   {raw / durable / 1e9:5.2f}   {raw / 1e6:12.1f}   {stored / 1e6:10.1f}"
            f"   {stored / raw:5.1%}"
        )


def heading(text: str) -> None:
    """Print what comes next."""
    print(f"\n{text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
