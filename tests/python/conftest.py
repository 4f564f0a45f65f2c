"""Fixtures of all tests: a store for each, managers on it, and devices."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from coordinators import coordinator  # noqa: F401  (a fixture for all)
from samples import library  # noqa: F401  (a fixture for all)
from stand_in import device  # noqa: F401  (a fixture for all)

from dtruntime import CheckpointManager

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Return the path of a store that does not exist yet."""
    return tmp_path / "store"


@pytest.fixture
def open_manager(store: Path) -> Iterator[Callable[..., CheckpointManager]]:
    """Open managers, on ``store`` unless told otherwise, and close them at the end."""
    managers = []

    def open_one(path: Path | None = None, **settings) -> CheckpointManager:
        settings.setdefault("chunk_bytes", "64KiB")  # several chunks even in small tests
        manager = CheckpointManager(path or store, **settings)
        managers.append(manager)
        return manager

    yield open_one
    for manager in managers:
        manager.close()


@pytest.fixture
def manager(open_manager: Callable[..., CheckpointManager]) -> CheckpointManager:
    """Return a writing manager on ``store``."""
    return open_manager()
