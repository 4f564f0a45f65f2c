"""Show that the campaign can fail: every mutant of the engine is caught by its test.

    .ci/env python tests/mutants/mutants.py                  all of them
    .ci/env python tests/mutants/mutants.py sync-retried     only this one

A mutant is a patch beside this file. It removes one thing that a promise depends on, and opens
with what that is and with the test that must catch it, of the tests of a promise (`crash`,
`readers`, `ranks`, `s3`, `stand_in` for GPUs, `machine` for the coordinator) or of the engine's own
(`engine` beside the code, `engine_tests` in `tests/engine`). Each is applied by itself to a copy of
the tree, which is built in a directory of its own; a mutant is caught if it builds and its test
fails, and each of those tests passes without a mutant. The copy and what was built stay in the
cache for the next run.

`make torture` runs this as one of its rows, mutants by their number in the order of their names.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
HEAD = re.compile(r"Mutant: (?P<what>.+)\nCaught by: (?P<binary>[a-z0-9_]+) (?P<test>\S+)\n")
# As `make test` builds them.
CARGO = ("cargo", "test", "--locked", "--release", "--workspace", "--quiet")
TARGETS = {
    "crash": ("--test", "crash"),
    "engine": ("--lib",),
    "engine_tests": ("--test", "engine"),
    "machine": ("--test", "machine"),
    "ranks": ("--test", "ranks"),
    "readers": ("--test", "readers"),
    "s3": ("--test", "s3"),
    "stand_in": ("--test", "stand_in"),
}
LIMIT_SECONDS = 1800


@dataclass(frozen=True)
class Mutant:
    """One patch."""

    patch: Path
    what: str
    binary: str
    test: str

    @classmethod
    def read(cls, patch: Path) -> Mutant:
        """Read the head of a patch."""
        head = HEAD.match(patch.read_text())
        if head is None or head["binary"] not in TARGETS:
            raise SystemExit(
                f"error: `{patch}` does not open with `Mutant: ...` and `Caught by: ...`\n"
                "hint: see the other patches"
            )
        return cls(patch, head["what"], head["binary"], head["test"])


class Copy:
    """A copy of the tree, with a target directory of its own."""

    def __init__(self, directory: Path) -> None:
        self.tree = directory / "tree"
        dropped = ("DTR_TORTURE_FIRST", "DTR_TORTURE_STATES", "GIT_DIR", "GIT_WORK_TREE")
        self.environment = {k: v for k, v in os.environ.items() if k not in dropped}
        self.environment["CARGO_TARGET_DIR"] = str(directory / "target")
        # A cache that happens to be inside a repository does not belong to it.
        self.environment["GIT_CEILING_DIRECTORIES"] = str(directory)

    def renew(self) -> None:
        """Make the copy equal to the tree, without touching files that are."""
        words = ("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard")
        listed = subprocess.run(words, cwd=ROOT, check=True, capture_output=True, text=True)
        names = {name for name in listed.stdout.split("\0") if (ROOT / name).is_file()}
        for name in names:
            source, target = ROOT / name, self.tree / name
            if not target.exists() or target.read_bytes() != source.read_bytes():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)
                target.chmod(source.stat().st_mode)
        for path in self.tree.rglob("*"):
            if path.is_file() and str(path.relative_to(self.tree)) not in names:
                path.unlink()

    def apply(self, patch: Path) -> None:
        """Apply a patch, in whole or not at all."""
        self.call(("git", "apply", str(patch)), f"`{patch.name}` does not apply")

    def build(self, mutant: Mutant) -> None:
        """Build the tests of a mutant."""
        command = (*CARGO, *TARGETS[mutant.binary], "--no-run")
        self.call(command, f"with `{mutant.patch.name}` the tests do not build")

    def test(self, mutant: Mutant) -> tuple[bool, str]:
        """Run the test of a mutant; return whether it passed, and what it printed."""
        command = (*CARGO, *TARGETS[mutant.binary])
        command = (*command, "--", mutant.test, "--exact", "--nocapture")
        done = self.run(command)
        if done.returncode == 0 and "1 passed" in done.stdout:
            return True, done.stdout
        if "test result: FAILED. 0 passed; 1 failed" in done.stdout:
            return False, done.stdout
        raise SystemExit(f"{done.stdout}\nerror: `{mutant.test}` neither passed nor failed")

    def call(self, command: tuple[str, ...], complaint: str) -> None:
        """Run a command that must succeed."""
        done = self.run(command)
        if done.returncode != 0:
            raise SystemExit(f"{done.stdout}\nerror: {complaint}\nhint: mend the patch")

    def run(self, command: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
        """Run a command in the copy."""
        return subprocess.run(
            command,
            cwd=self.tree,
            env=self.environment,
            check=False,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=LIMIT_SECONDS,
        )


def check_tests(copy: Copy, mutants: list[Mutant]) -> set[str]:
    """Check that every test passes as long as nothing is taken out; return those that can run."""
    copy.renew()
    tests = {mutant.test: mutant for mutant in mutants}
    running = set(tests)
    for test, mutant in sorted(tests.items()):
        copy.build(mutant)
        passed, output = copy.test(mutant)
        if not passed:
            raise SystemExit(f"{output}\nerror: `{test}` fails without any mutant")
        skipped = re.search(r"torture: skipped: (.+)", output)
        if skipped:
            say(f"left out: the mutants of `{test}`, which is skipped here: {skipped[1]}")
            running.remove(test)
    return running


def is_caught(copy: Copy, mutant: Mutant) -> bool:
    """Apply a mutant, and run its test."""
    copy.renew()
    copy.apply(mutant.patch)
    copy.build(mutant)
    passed, _ = copy.test(mutant)
    verdict = "NOT CAUGHT" if passed else "caught"
    say(f"{verdict}: {mutant.patch.stem} ({mutant.what}), by `{mutant.test}`")
    return not passed


def say(text: str) -> None:
    """Print at once: a mutant takes a minute."""
    print(text, flush=True)


def main() -> int:
    """Catch those that were named, or those of the numbers in the environment."""
    everything = [Mutant.read(patch) for patch in sorted(HERE.glob("*.patch"))]
    first = int(os.environ.get("DTR_TORTURE_FIRST", "0"))
    count = int(os.environ.get("DTR_TORTURE_STATES", str(len(everything))))
    mutants = everything[first : first + count]
    if len(sys.argv) > 1:
        mutants = [mutant for mutant in everything if mutant.patch.stem in sys.argv[1:]]
    cache = os.environ.get("DTRUNTIME_CACHE")
    home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    copy = Copy((Path(cache) if cache else home / "dtruntime") / "torture" / "mutants")
    running = check_tests(copy, mutants)
    caught = [is_caught(copy, mutant) for mutant in mutants if mutant.test in running]
    copy.renew()
    say(f"{sum(caught)} of {len(caught)} caught")
    following = min(first + count, len(everything))
    say(f"torture: tried {len(caught)}, next {following}, end {len(everything)}")
    return int(not all(caught))


if __name__ == "__main__":
    sys.exit(main())
