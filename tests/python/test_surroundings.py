"""Stores in awkward places: read-only, forbidden, too deep, on filesystems with less, beside files.

What needs another user or another mount runs in a process of its own, which gives up its rights, or
gets a private mount, after it has imported all that it needs. The tests need root for
that, and say so where they are skipped.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from typing import TYPE_CHECKING

import pytest
import torch
from support import script_environment, shard_of

from dtruntime import CheckpointError, CheckpointManager, InvalidArgument

if TYPE_CHECKING:
    from pathlib import Path

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="root may change users and mounts")

PREAMBLE = """
import os, sys
import torch
from dtruntime import CheckpointError, CheckpointManager

def as_nobody():
    torch.zeros(1)
    os.setgid(65534)
    os.setuid(65534)

def refused(act):
    try:
        act()
    except CheckpointError as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError("it was not refused")

store = sys.argv[1]
def open_reader():
    return CheckpointManager(store, read_only=True)
"""


def run_there(source: str, store: Path, mount: str | None = None) -> str:
    """Run a script on a store, after a private mount if one is given; return what it printed."""
    command = [sys.executable, "-c", PREAMBLE + textwrap.dedent(source), str(store)]
    if mount is not None:
        command = ["unshare", "--mount", "sh", "-ec", f'{mount}\nexec "$@"', str(store), *command]
    ran = subprocess.run(
        command,
        env=script_environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def save_one(store: Path) -> None:
    with CheckpointManager(store, chunk_bytes="64KiB") as manager:
        manager.save({"a": torch.arange(5)}, step=1)


LOAD = """
assert open_reader().load()["a"].tolist() == [0, 1, 2, 3, 4]
"""
REFUSED = """
print(refused(lambda: CheckpointManager(store)))
"""


def reachable(tmp_path: Path) -> Path:
    """Return a store that every user can reach."""
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    return tmp_path / "store"


@needs_root
def test_an_unwritable_directory_is_read(tmp_path):
    store = reachable(tmp_path)
    save_one(store)
    # The lock's file is the writer's own.
    printed = run_there("as_nobody()" + LOAD + REFUSED, store)
    assert f"taking the writer lock `{store}/writer.lock`" in printed
    assert "hint: " in printed
    shutil.rmtree(store)
    tmp_path.chmod(0o555)
    printed = run_there("as_nobody()" + REFUSED, store)
    assert f"creating directory `{store}`" in printed
    assert not store.exists()


@needs_root
def test_a_read_only_filesystem_is_read(tmp_path):
    store = tmp_path / "store"
    save_one(store)
    mount = 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0"'
    printed = run_there(LOAD + REFUSED, store, mount)
    assert "read-only" in printed.lower()
    assert "hint: " in printed


@needs_root
def test_unreadable_files_are_named(tmp_path):
    store = reachable(tmp_path)
    save_one(store)
    shard = shard_of(store, 1)
    shard.chmod(0)
    printed = run_there("as_nobody()\nprint(refused(lambda: open_reader().load(step=1)))", store)
    assert str(shard) in printed
    assert "ermission" in printed
    shard.chmod(0o644)
    manifest = shard.with_name("manifest.json")
    manifest.chmod(0)
    printed = run_there("as_nobody()\nprint(refused(lambda: open_reader().load(step=1)))", store)
    assert str(manifest) in printed
    manifest.chmod(0o644)
    store.chmod(0)
    printed = run_there("as_nobody()\nprint(refused(lambda: open_reader().load()))", store)
    assert str(store) in printed
    store.chmod(0o755)


@needs_root
def test_a_filesystem_without_direct_io_works(tmp_path):
    store = tmp_path / "mount" / "store"
    store.parent.mkdir()
    source = """
state = {"a": torch.arange(100_000)}
for codec in ("none", "zstd"):
    with CheckpointManager(f"{store}-{codec}", compression=codec, chunk_bytes="64KiB") as manager:
        manager.save(state, step=1)
        assert torch.equal(manager.load()["a"], state["a"])
        assert not manager.verify(1).damage
def demand():
    with CheckpointManager(store, direct_io="on") as manager:
        manager.save(state, step=1)
print(refused(demand))
"""
    printed = run_there(source, store, 'mount -t ramfs none "$(dirname "$0")"')
    assert "`direct_io` is `on`" in printed
    assert "set it to `auto`" in printed


def test_a_file_at_the_stores_path_or_above_is_named(tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    for read_only in (False, True):
        with pytest.raises(InvalidArgument, match="it is a file, but a store is a directory"):
            CheckpointManager(file, read_only=read_only)
        with pytest.raises(CheckpointError, match="a parent of the path is a file"):
            CheckpointManager(file / "below", read_only=read_only)
    assert file.read_text() == "mine"


def deep(start: Path, length: int) -> Path:
    """Return a path of exactly this many bytes, in names of at most 200."""
    path = str(start)
    while length - len(path) > 201:
        path += "/" + "d" * min(200, length - len(path) - 2)
    return type(start)(path + "/" + "e" * (length - len(path) - 1))


def test_a_path_of_any_length_works_or_is_refused_entirely(tmp_path):
    # The kernel takes 4095 bytes; a shard's name and its directory's take 72 of them.
    for length in (1000, 4000):
        store = deep(tmp_path, length)
        with CheckpointManager(store, chunk_bytes="64KiB") as manager:
            manager.save({"a": torch.arange(5)}, step=1)
            assert manager.load()["a"].tolist() == [0, 1, 2, 3, 4]
            manager.delete(1)
    for length in (4050, 4095, 4096, 10_000):
        store = deep(tmp_path, length)
        with (
            pytest.raises(CheckpointError, match="too long"),
            CheckpointManager(store, chunk_bytes="64KiB") as manager,
        ):
            manager.save({"a": torch.arange(5)}, step=1)


def test_names_of_any_text_are_kept_and_create_no_files(store, tmp_path):
    names = ["../../escape", "/etc/passwd", "nul\0", "", "..", "\u202egnp.exe", "a" * 100_000, "\n"]
    state = {name: torch.full((3,), float(number)) for number, name in enumerate(names)}
    with CheckpointManager(store, chunk_bytes="64KiB") as manager:
        manager.save(state, step=1)
        loaded = manager.load()
    assert list(loaded) == names
    assert all(torch.equal(loaded[name], state[name]) for name in names)
    assert [path.name for path in tmp_path.iterdir()] == ["store"]
