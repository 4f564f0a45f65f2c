"""The peers' packages, at the versions that `requirements.txt` pins.

They are kept outside the clone, in a folder named after that file's hash and this Python's version,
and found through PYTHONPATH. What the environment has at the pinned version is not fetched again.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

REQUIREMENTS = Path(__file__).with_name("requirements.txt")


def cache_folder() -> Path:
    """Return the folder outside the clone where this project keeps what it made."""
    given = os.environ.get("DTRUNTIME_CACHE")
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return (Path(given) if given else Path(home) / "dtruntime") / "compare"


def folder(file: Path = REQUIREMENTS) -> Path:
    """Return the folder of the peers, which may not exist yet."""
    key = hashlib.sha256(file.read_bytes() + sys.version.encode()).hexdigest()[:16]
    return cache_folder() / f"peers-{key}"


def ensure(file: Path = REQUIREMENTS) -> Path:
    """Return the folder of the peers, installing them first if need be."""
    target = folder(file)
    if target.exists():
        return target
    wanted = [text for text, requirement in requirements(file) if not is_here(requirement)]
    print(f"installing {', '.join(wanted)} into {target}", file=sys.stderr)
    partial = target.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    if wanted:
        subprocess.run([*pip, "--no-deps", "--target", str(partial), *wanted], check=True)
    partial.rename(target)
    return target


def requirements(file: Path = REQUIREMENTS) -> list[tuple[str, Requirement]]:
    """Read the requirements that hold for this Python."""
    lines = (line.split("#")[0].strip() for line in file.read_text().splitlines())
    parsed = ((line, Requirement(line)) for line in lines if line)
    return [(t, r) for t, r in parsed if r.marker is None or r.marker.evaluate()]


def is_here(requirement: Requirement) -> bool:
    """Return whether this environment has a package at the pinned version."""
    version = version_of(requirement.name)
    return version is not None and requirement.specifier.contains(version)


def version_of(name: str) -> str | None:
    """Return the installed version of a package, without its local part."""
    try:
        return metadata.version(name).split("+")[0]
    except metadata.PackageNotFoundError:
        return None
