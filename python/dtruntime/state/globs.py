"""Globs over the paths of a state: ``*`` is any text, ``?`` one character, all else is itself.

As `ckpt-tool` has them. Square brackets mean nothing: keys and paths of list items have them.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from dtruntime.errors import InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Sequence

_WILD = {"*": ".*", "?": "."}


def globs_of(name: str, given: Any) -> list[str]:
    """Check an argument: a glob or several.

    Raises:
        InvalidArgument: It is something else, or one is empty.

    """
    several = isinstance(given, (list, tuple, set, frozenset))
    globs = list(given) if several else [given]
    for wrong in (glob for glob in globs if not isinstance(glob, str) or not glob):
        raise InvalidArgument(
            f"`{name}` = {given!r}",
            f"a glob is text that is not empty, got {wrong!r}",
            f'pass for example `{name}=["model.*", "optimizer.*"]`',
        )
    return globs


def compiled(globs: Sequence[str]) -> list[re.Pattern[str]]:
    """Give a pattern for each, which matches whole paths."""
    texts = ("".join(_WILD.get(char) or re.escape(char) for char in glob) for glob in globs)
    return [re.compile(rf"(?s:{text})\Z") for text in texts]
