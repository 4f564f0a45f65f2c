"""Globs over the paths of a state: ``*`` matches any text, ``?`` one character.

The same as in `ckpt-tool`. Square brackets are literal: keys and paths of list items contain them.

Always holds: a pattern matches whole paths only.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from dtruntime.errors import InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Sequence

_WILD = {"*": ".*", "?": "."}


def globs_of(name: str, given: Any) -> list[str]:
    """Return an argument, a glob or several, as a list.

    Raises:
        InvalidArgument: It is something else, or a glob is empty.

    """
    several = isinstance(given, (list, tuple, set, frozenset))
    globs = list(given) if several else [given]
    for wrong in (glob for glob in globs if not isinstance(glob, str) or not glob):
        raise InvalidArgument(
            f"`{name}` = {given!r}",
            f"a glob is a non-empty string, got {wrong!r}",
            f'pass for example `{name}=["model.*", "optimizer.*"]`',
        )
    return globs


def compiled(globs: Sequence[str]) -> list[re.Pattern[str]]:
    """Return a pattern for each glob, which matches whole paths."""
    texts = ("".join(_WILD.get(char) or re.escape(char) for char in glob) for glob in globs)
    return [re.compile(rf"(?s:{text})\Z") for text in texts]
