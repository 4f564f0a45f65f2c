"""Run tests of the engine under a checker of memory or threads, as a row of `make torture`.

    .ci/env python tests/torture/checked.py loom | miri | address | thread

loom      runs the tests named `models` in every order of their threads' steps: buffers, the inbox,
          what is in flight, the early sync, failing and ending of a save
miri      interprets the unsafe code that it knows: buffers and their parts, byte planes in plain
          code and AVX2
address   AddressSanitizer on the engine's own tests, on those of its public interface, and those of
          copies between GPUs and the host
thread    ThreadSanitizer on the same

All but loom need a nightly toolchain, thread and miri also its `rust-src`, and miri itself. What is
built stays in the cache.
Code in C, and std under address, is not instrumented: only what crosses its border is checked.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HOST = "x86_64-unknown-linux-gnu"
CACHE = Path(
    os.environ.get("DTRUNTIME_CACHE")
    or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dtruntime"
)
NIGHTLY = ("cargo", "+nightly")
# Dependencies are built once for each checker: a fast build matters more than fast code.
QUICKLY = ("--config", 'profile.dev.package."*".opt-level=1')
# What takes long under a checker, or measures how fast encoding is.
SLOW = ("--skip", "flat::", "--skip", "thousands_of", "--skip", "slow_device::")
# This test leaves memory to the kernel forever, which is the promise that it checks.
LEAKS = ("--skip", "an_abandoned_buffer_is_empty_and_never_returns")
# The tests whose code Miri can run: no system call but `mmap`, no streaming stores, no C.
MIRI_TESTS = ("io::buffer::", "io::lent::", "codec::planes::", "format::checksum::")


def command(checker: str) -> tuple[list[str], dict[str, str]]:
    """Return what to run, and in which environment."""
    target = {"CARGO_TARGET_DIR": str(CACHE / "checked" / checker)}
    if checker == "loom":
        words = ["cargo", "test", "--locked", "-p", "dtr-engine", "--lib", "--", "models::"]
        # More preemptions take hours, and are known to find next to nothing.
        return words, target | {"RUSTFLAGS": "--cfg loom", "LOOM_MAX_PREEMPTIONS": "3"}
    if checker == "miri":
        words = [*NIGHTLY, "miri", "test", "--locked", "-p", "dtr-engine", "--lib", "--"]
        flags = {
            "MIRIFLAGS": "-Zmiri-disable-isolation",
            "RUSTFLAGS": "--cfg rustix_use_libc -C target-feature=+avx2",
            "PROPTEST_CASES": "4",
        }
        return [*words, *MIRI_TESTS, *LEAKS], target | flags
    packages = ["-p", "dtr-engine", "-p", "dtr-cuda", "-p", "integration-tests"]
    tests = [*packages, "--lib", "--test", "engine", "--test", "stand_in"]
    # The checker has to see what std does with threads; what it does with memory is sound.
    std = ["-Zbuild-std"] if checker == "thread" else []
    words = [*NIGHTLY, "test", "--locked", *std, *QUICKLY, "--target", HOST, *tests]
    # A system call that is made past libc unmaps memory unseen: the next owner of the address then
    # seems to race with the previous one.
    libc = " --cfg rustix_use_libc" if checker == "thread" else ""
    flags = {
        "RUSTFLAGS": f"-Zsanitizer={checker}{libc}",
        "ASAN_OPTIONS": "detect_leaks=1",
        "TSAN_OPTIONS": "halt_on_error=1",
        "PROPTEST_CASES": "32",
    }
    return [*words, "--", *SLOW, *LEAKS], target | flags


def has_nightly(*, with_source: bool) -> bool:
    """Return whether there is a toolchain, and one that can rebuild std."""
    sysroot = subprocess.run(
        ("rustc", "+nightly", "--print", "sysroot"), check=False, capture_output=True, text=True
    )
    source = Path(sysroot.stdout.strip()) / "lib/rustlib/src/rust/library"
    return sysroot.returncode == 0 and (source.exists() or not with_source)


def main() -> None:
    """Run one checker."""
    (checker,) = sys.argv[1:]
    if checker != "loom" and not has_nightly(with_source=checker != "address"):
        more = "" if checker == "address" else " with `rust-src` and `miri`"
        print(f"torture: skipped: needs a nightly toolchain{more}")
        return
    words, environment = command(checker)
    print(" ".join(words), flush=True)
    ran = subprocess.run(words, cwd=ROOT, env=os.environ | environment, check=False)
    if ran.returncode != 0:
        raise SystemExit(f"error: {checker} found what is shown above")
    first = int(os.environ.get("DTR_TORTURE_FIRST", "0"))
    print(f"torture: tried 1, next {first + 1}, end 1")


if __name__ == "__main__":
    main()
