"""Phrases that error messages and warnings share.

Always holds: a list in a message is bounded, and says how many entries it leaves out.
"""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


def quoted(names: Iterable[Any]) -> list[str]:
    """Return names in backquotes, as messages show them."""
    return [f"`{name}`" for name in names]


def listed(items: Sequence[str], most: int, separator: str = ", ") -> str:
    """Return the first ``most`` items as one string, with the number of those left out.

    >>> listed(["a", "b", "c", "d"], 2)
    'a, b and 2 more'
    """
    more = len(items) - most
    return separator.join(items[:most]) + (f" and {more} more" if more > 0 else "")


def suggestion(name: object, accepted: Iterable[str], otherwise: str) -> str:
    """Return a hint that names the accepted spelling nearest to ``name``; else ``otherwise``.

    >>> suggestion("gzipp", ("none", "gzip"), "leave it unset")
    'did you mean `gzip`?'
    """
    near = difflib.get_close_matches(str(name), list(accepted), n=1)
    return f"did you mean `{near[0]}`?" if near else otherwise
