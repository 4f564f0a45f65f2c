"""A progress bar on standard error.

Always holds: what is shown is a pure function of a ``SaveProgress``; a terminal shows a moving bar,
anything else gets one line per save.
"""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dtruntime.reports import SaveProgress

_WIDTH = 30
_MIB = 1 << 20


def line_of(step: int, progress: SaveProgress, seconds: float) -> str:
    """Return one line that shows the progress of a save.

    >>> from dtruntime.reports import SaveProgress
    >>> line_of(7, SaveProgress(2 << 20, 2 << 20, 1 << 20, 1 << 19), 2.0)
    'step 7 [###############...............]  50 %  1 of 2 MiB, 0.5 MiB/s'
    """
    total = max(progress.raw_bytes, 1)
    share = min(progress.encoded_bytes / total, 1.0)
    filled = int(share * _WIDTH)
    rate = progress.encoded_bytes / _MIB / max(seconds, 1e-3)
    return (
        f"step {step} [{'#' * filled}{'.' * (_WIDTH - filled)}] {share:4.0%}".replace("%", " %")
        + f"  {progress.encoded_bytes // _MIB} of {progress.raw_bytes // _MIB} MiB"
        + f", {rate:.1f} MiB/s"
    )


class ProgressBar:
    """Shows one save after another on standard error."""

    def __init__(self) -> None:
        self._started: float | None = None

    def show(self, step: int, progress: SaveProgress) -> None:
        """Draw the line over the previous one."""
        if self._started is None:
            self._started = time.monotonic()
        if sys.stderr is not None and sys.stderr.isatty():
            line = line_of(step, progress, time.monotonic() - self._started)
            _write(f"\r{line}\x1b[K")

    def finish(self, step: int, progress: SaveProgress) -> None:
        """Leave the last line on the screen."""
        seconds = 0.0 if self._started is None else time.monotonic() - self._started
        self._started = None
        if sys.stderr is not None:
            is_terminal = sys.stderr.isatty()
            line = line_of(step, progress, seconds)
            _write(f"\r{line}\x1b[K\n" if is_terminal else f"{line}\n")


def _write(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()
