"""What tests of deploy/ share: where its files are, its ports and user, and how programs run."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
DOCKERFILES = (DEPLOY / "Dockerfile.coordinator", DEPLOY / "Dockerfile.worker")
GRPC_PORT, METRICS_PORT, RENDEZVOUS_PORT = 50051, 9090, 29500
USER = 10001
"""Of both images; volumes and pods depend on it."""


def run(*command: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=False, **options
    )
