"""What a run has measured: for each subject and figure, the values, one per repetition."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field


@dataclass
class Results:
    """All values, and their medians."""

    raw_bytes: int
    values: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    def add(self, subject: str, figure: str, value: float) -> None:
        """Record a value."""
        self.values.setdefault(subject, {}).setdefault(figure, []).append(value)

    def all(self, subject: str, figure: str) -> list[float]:
        """Return every value of a figure."""
        return self.values[subject][figure]

    def median(self, subject: str, figure: str) -> float:
        """Return the middle value of a figure."""
        return statistics.median(self.all(subject, figure))

    def has(self, subject: str, figure: str) -> bool:
        """Return whether a figure was measured."""
        return bool(self.values.get(subject, {}).get(figure))

    def ratio(self, over: tuple[str, str], under: tuple[str, str]) -> float:
        """Return the median of the quotients of two figures that were measured in pairs."""
        pairs = zip(self.all(*over), self.all(*under), strict=True)
        return statistics.median(a / b for a, b in pairs)
