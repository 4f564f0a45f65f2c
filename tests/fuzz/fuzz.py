"""Fuzz one target for a while, as a row of `make torture`.

    .ci/env python tests/fuzz/fuzz.py index

`DTR_TORTURE_STATES` is the number of seconds, and `DTR_TORTURE_FIRST`, the seconds before, seeds
the fuzzer. The corpus that it grows, and the programs, stay in the cache; the committed one comes
with every run. An input takes at most 256 MiB and 5 s.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
EXECUTED = re.compile(r"stat::number_of_executed_units: (\d+)")
CACHE = Path(
    os.environ.get("DTRUNTIME_CACHE")
    or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dtruntime"
)


def is_installed() -> bool:
    """Return whether there is a fuzzer."""
    words = ("cargo", "+nightly", "fuzz", "--version")
    return subprocess.run(words, check=False, capture_output=True).returncode == 0


def fuzz(target: str, seconds: int, seed: int) -> int:
    """Fuzz, show what the fuzzer says, and return how many inputs it tried."""
    grown = CACHE / "fuzz" / target
    grown.mkdir(parents=True, exist_ok=True)
    artifacts = CACHE / "fuzz" / "failed"
    artifacts.mkdir(parents=True, exist_ok=True)
    limits = ("-rss_limit_mb=256", "-malloc_limit_mb=256", "-timeout=5")
    words = ("cargo", "+nightly", "fuzz", "run", "--fuzz-dir", str(HERE), target)
    corpora = (str(grown), str(HERE / "corpus" / target))
    how = (f"-max_total_time={seconds}", f"-seed={seed + 1}", "-print_final_stats=1")
    environment = os.environ | {
        "CARGO_TARGET_DIR": str(CACHE / "fuzz" / "target"),
        # Freed memory that is kept to find its use would count as taken.
        "ASAN_OPTIONS": "quarantine_size_mb=16",
    }
    ran = subprocess.run(
        (*words, *corpora, "--", *how, *limits, f"-artifact_prefix={artifacts}/{target}-"),
        cwd=ROOT,
        env=environment,
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    executed = EXECUTED.search(ran.stdout)
    if ran.returncode != 0 or executed is None:
        print(ran.stdout[-20_000:])
        raise SystemExit(f"error: {target} failed, with what is in `{artifacts}`")
    return int(executed.group(1))


def main() -> None:
    """Fuzz as the environment specifies."""
    (target,) = sys.argv[1:]
    seconds = int(os.environ.get("DTR_TORTURE_STATES", "10"))
    first = int(os.environ.get("DTR_TORTURE_FIRST", "0"))
    if not is_installed():
        print("torture: skipped: needs a nightly toolchain and `cargo install cargo-fuzz --locked`")
        return
    executed = fuzz(target, seconds, first)
    print(f"{executed} inputs for {target} in {seconds} s")
    print(f"torture: tried {seconds}, next {first + seconds}")


if __name__ == "__main__":
    main()
