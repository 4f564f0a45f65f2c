"""Images are built from existing files; a container is a node of torchrun, or says why not."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from coordinators import free_port
from deployed import DEPLOY, DOCKERFILES, RENDEZVOUS_PORT, ROOT, USER, run
from support import script_environment

# Images


def context() -> list[str]:
    """Return the files that `docker build` gets, by the rules of `.dockerignore`."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    written = [line for line in lines if line and not line.startswith("#")]
    rules = [(line.startswith("!"), line.lstrip("!")) for line in written]
    tracked = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).stdout

    def is_sent(path: str) -> bool:
        parts = path.split("/")
        prefixes = ["/".join(parts[: index + 1]) for index in range(len(parts))]
        sent = True
        for includes, pattern in rules:
            if pattern.startswith("**/"):
                matches = any(fnmatch.fnmatch(part, pattern[3:]) for part in parts)
            else:
                matches = pattern == "*" or pattern in prefixes
            sent = includes if matches else sent
        return sent

    return [path for path in tracked.splitlines() if is_sent(path) and (ROOT / path).exists()]


def test_the_build_context_is_small_and_complete(tmp_path):
    files = context()
    sizes = sum((ROOT / path).stat().st_size for path in files)
    assert sizes < 8 << 20, f"{sizes} bytes"
    assert not [path for path in files if path.startswith((".git/", "deploy/aws", "tests/python"))]
    for path in files:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / path, tmp_path / path)
    # Fails if the file of some crate or target is missing.
    result = run("cargo", "metadata", "--offline", "--no-deps", "--format-version=1", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    for name in ("README.md", "LICENSE"):
        assert name in files, f"pyproject.toml names {name}"


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_images_are_built_from_existing_files(path):
    text = path.read_text().replace("\\\n", " ")
    files = context()
    copied = re.findall(r"^COPY (?!--from)(.*)$", text, flags=re.MULTILINE)
    for source in [word for line in copied for word in line.split()[:-1]]:
        assert source == "." or source in files, f"COPY {source}"
    stages = re.findall(r"^FROM (\S+)(?: AS (\S+))?$", text, flags=re.MULTILINE)
    arguments = dict(re.findall(r"^ARG (\w+)=(\S*)$", text, flags=re.MULTILINE))
    for image, _ in stages:
        assert image.strip("${}") in arguments
    assert set(re.findall(r"--from=(\S+)", text)) <= {stage for _, stage in stages}
    # Runs as the user nobody, ends at SIGTERM, needs no BuildKit.
    assert re.search(rf"^USER {USER}:{USER}$", text, flags=re.MULTILINE)
    assert "\nSTOPSIGNAL SIGTERM\n" in text
    assert not re.search(r"# syntax|--mount|<<|--link", text)
    assert text.count("--locked") == text.count("cargo build") + text.count("maturin build")
    assert "\nHEALTHCHECK " in text


def test_images_have_the_versions_of_the_project():
    cargo = (ROOT / "Cargo.toml").read_text()
    [minimum] = re.findall(r'^rust-version = "([\d.]+)"', cargo, flags=re.MULTILINE)
    [version] = re.findall(r'^version = "([\d.]+)"', cargo, flags=re.MULTILINE)
    lock = (ROOT / "requirements-dev.lock").read_text()
    for path in DOCKERFILES:
        text = path.read_text()
        [rust] = re.findall(r"^ARG RUST_IMAGE=\S+/rust:([\d.]+)-", text, flags=re.MULTILINE)
        assert numbers(rust) >= numbers(minimum), f"{path.name}: Rust {rust}, {minimum} is needed"
        assert f"\nARG VERSION={version}\n" in text
    worker = DOCKERFILES[1].read_text()
    [torch] = re.findall(r"^ARG TORCH_VERSION=(\S+)$", worker, flags=re.MULTILINE)
    assert f"\ntorch=={torch} ; python_version >=" in lock
    [maturin] = re.findall(r"maturin==(\S+)", worker)
    assert f"\nmaturin=={maturin}\n" in lock
    [python] = re.findall(r"^ARG PYTHON_IMAGE=\S+/python:([\d.]+)-", worker, flags=re.MULTILINE)
    assert numbers(python) >= (3, 11), "what the lock file's torch is for"


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def test_the_health_check_of_the_image_answers(coordinator):
    text = DOCKERFILES[0].read_text()
    [command] = re.findall(r"HEALTHCHECK[^\[]*(\[.*\])", text)
    assert json.loads(command) == ["coordinator", "health"]
    environment = os.environ | {"DTRUNTIME_COORDINATOR_ADDRESS": f"0.0.0.0:{coordinator.port}"}
    result = run(*json.loads(command), env=environment, cwd=coordinator.folder)
    assert result.stdout == f"the coordinator at `127.0.0.1:{coordinator.port}` serves\n"
    coordinator.end()
    result = run(*json.loads(command), env=environment, cwd=coordinator.folder)
    assert result.returncode == 1
    assert "\nhint: name where it listens" in result.stderr


# dt-launch


@pytest.fixture
def torchrun(tmp_path):
    """Return an environment whose torchrun only prints its arguments."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "torchrun").write_text('#!/bin/sh\necho "$@"\necho "${RANK-unset}"\n')
    (folder / "nvidia-smi").write_text('#!/bin/sh\n[ -n "$GPUS" ] && printf "$GPUS"\n')
    for file in folder.iterdir():
        file.chmod(0o755)
    return {"PATH": f"{folder}:/usr/bin:/bin"}


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({}, "--nnodes 1 --node-rank 0 --nproc-per-node 1 --master-addr 127.0.0.1"),
        (
            {"RANK": "worker-3", "WORLD_SIZE": "4", "GPUS": r"GPU 0: A\nGPU 1: A\n"},
            "--nnodes 4 --node-rank 3 --nproc-per-node 2 --master-addr worker-0",
        ),
        (
            {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "m", "NPROC_PER_NODE": "8"},
            "--nnodes 2 --node-rank 1 --nproc-per-node 8 --master-addr m",
        ),
    ],
)
def test_a_container_is_a_node_of_torchrun(torchrun, environment, told):
    result = run(DEPLOY / "dt-launch", "train.py", "a b", env=torchrun | environment)
    rest = f" --master-port {RENDEZVOUS_PORT} --max-restarts 0 train.py a b\nunset\n"
    assert (result.stdout, result.stderr) == (told + rest, "")


@pytest.mark.parametrize(
    ("environment", "arguments", "said"),
    [
        ({}, [], "no script is given"),
        ({"RANK": "worker"}, ["t.py"], "RANK=worker has no number"),
        ({"WORLD_SIZE": "many"}, ["t.py"], "WORLD_SIZE=many is no number"),
        ({"RANK": "4", "WORLD_SIZE": "4"}, ["t.py"], "RANK=4 is not below WORLD_SIZE=4"),
        ({"PATH": "/nowhere"}, ["t.py"], "there is no torchrun"),
    ],
)
def test_a_container_that_cannot_join_says_why(torchrun, environment, arguments, said):
    result = run("/bin/sh", DEPLOY / "dt-launch", *arguments, env=torchrun | environment)
    assert result.returncode == 2
    assert f"error: dt-launch: {said}" in result.stderr
    assert "\nhint: " in result.stderr


def test_two_containers_train_and_save_through_the_coordinator(coordinator, tmp_path):
    example = ROOT / "python" / "examples" / "train_ranks.py"
    shared = {
        "COORDINATOR_URL": coordinator.url,
        "DTRUNTIME_JOB": "deployed",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "WORLD_SIZE": "2",
    }
    containers = [
        subprocess.Popen(
            [DEPLOY / "dt-launch", example, tmp_path / "store"],
            env=script_environment() | shared | {"RANK": f"worker-{number}"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    ended = [container.communicate(timeout=300) for container in containers]
    assert [container.returncode for container in containers] == [0, 0], ended
    assert "2 ranks begin after step 0" in ended[0][0]
    assert "done: step 40" in ended[0][0]
    assert coordinator.metric('coordinator_checkpoints_total{job="deployed"}') == 4
