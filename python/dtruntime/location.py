"""The location of a store: a directory or an S3 prefix, from arguments, environment or coordinator.

Always holds: a directory is a ``Path``; a store in S3 is a string that begins with ``s3://``;
anything else is an ``InvalidArgument`` that shows what was given.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from dtruntime.errors import InvalidArgument
from dtruntime.settings import choice

if TYPE_CHECKING:
    from collections.abc import Mapping

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_S3 = "s3://"
_COLLAPSED = re.compile(r"[sS]3:/[^/]")


class Store(NamedTuple):
    """What a manager opens.

    Attributes:
        path: Its path on this rank.
        common: A description that is the same on all ranks of the store: a directory may be
            mounted at a different path on each.

    """

    path: str | Path
    common: str


class StoreArguments(NamedTuple):
    """A manager's arguments that name its store.

    Attributes:
        path: The store.
        storage_path: Another name for it.
        backend: ``local`` or ``s3``; None for what the path says.
        remote: The store in S3 that a directory is uploaded to.

    """

    path: str | os.PathLike[str] | None
    storage_path: str | os.PathLike[str] | None
    backend: str | None
    remote: str | None

    def is_given(self, environment: Mapping[str, str] = os.environ) -> bool:
        """Return whether an argument or ``CHECKPOINT_DIR`` names the store."""
        given = (self.path, self.storage_path, environment.get("CHECKPOINT_DIR") or None)
        return any(path is not None for path in given)

    def check(self, environment: Mapping[str, str] = os.environ) -> None:
        """Refuse arguments that do not name a store; giving none is not an error yet."""
        if self.is_given(environment):
            self.resolve(None, environment)

    def resolve(
        self, default: str | None = None, environment: Mapping[str, str] = os.environ
    ) -> Store:
        """Return the store: the arguments', else ``CHECKPOINT_DIR``, else ``default``.

        Raises:
            InvalidArgument: None is given, or what is given is not a store.

        """
        path = self._resolved(default, environment)
        return Store(path, common_name(path, self.remote))

    def _resolved(self, default: str | None, environment: Mapping[str, str]) -> str | Path:
        if self.path is not None and self.storage_path is not None:
            raise InvalidArgument(
                f"settings `path` = {os.fspath(self.path)!r}, "
                f"`storage_path` = {os.fspath(self.storage_path)!r}",
                "both name the store",
                "pass only one of them",
            )
        if self.backend is not None:
            choice("backend", self.backend, ("local", "s3"), has_default=False)
        chosen = self.path if self.path is not None else self.storage_path
        if chosen is None:
            chosen = environment.get("CHECKPOINT_DIR") or None
        if chosen is None:
            chosen = default
        if chosen is None:
            raise InvalidArgument(
                "setting `path`",
                "it is not given, and neither CHECKPOINT_DIR nor a coordinator provides it",
                'name the store: `CheckpointManager("runs/gpt")`, or "s3://bucket/runs/gpt"',
            )
        try:
            text = os.fspath(chosen)
        except TypeError:
            text = b""  # type: ignore[assignment]
        if not isinstance(text, str):
            raise InvalidArgument(
                f"setting `path` = {chosen!r}",
                "a str or a path is expected",
                "pass `str` or `Path`",
            )
        return _located(text, self.backend)


def _located(text: str, backend: str | None) -> str | Path:
    """Return a directory or a store in S3; ``backend``, if it is given, must agree."""
    scheme = _SCHEME.match(text)
    if _COLLAPSED.match(text):
        raise InvalidArgument(
            f"setting `path` = {text!r}",
            "`pathlib` collapses the two slashes of a URL, and what is left is a directory",
            f'pass a `str`: "{_S3}{text.partition("/")[2]}"; or, for a directory of that name, '
            f'"./{text}"',
        )
    if scheme is None and backend == "s3":
        if text.startswith("/"):
            raise InvalidArgument(
                f"settings `path` = {text!r}, `backend` = 's3'",
                "it is a directory",
                'name a bucket and a prefix: "s3://bucket/runs/gpt"',
            )
        return _S3 + text
    if scheme is None:
        return _directory(text)
    if scheme[0].lower() != _S3 or backend == "local":
        raise InvalidArgument(
            f"setting `path` = {text!r}" + (f", `backend` = {backend!r}" if backend else ""),
            "a directory, or a store in S3, is expected",
            'name a directory on this machine, or "s3://bucket/runs/gpt"',
        )
    return _S3 + text[len(_S3) :]


def _directory(text: str) -> Path:
    """Return a directory; ``~`` is expanded as by a shell."""
    refused = f"setting `path` = {text!r}"
    if not text:
        raise InvalidArgument(refused, "it is empty", 'name a directory, "." for this one')
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        hint = "write the directory in full, or prefix `./` if `~` is part of its name"
        raise InvalidArgument(refused, str(error), hint) from error


def common_name(path: str | os.PathLike[str], remote: str | None) -> str:
    """Describe a store in words that are the same on all of its ranks.

    A shared directory may be mounted anywhere, so its path is left out.

    >>> common_name("s3://bucket/run/", None), common_name("/mnt/run", None)
    ('`s3://bucket/run`', 'a directory that all ranks reach')
    """
    if remote is not None:
        return f"a directory in front of `{_s3_name(str(remote))}`"
    text = os.fspath(path)
    return f"`{_s3_name(text)}`" if _SCHEME.match(text) else "a directory that all ranks reach"


def _s3_name(text: str) -> str:
    scheme = _SCHEME.match(text)
    return (_S3 + text[scheme.end() :] if scheme else text).rstrip("/")
