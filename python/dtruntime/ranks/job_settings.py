"""The settings that the coordinator provides to workers, as settings of a manager.

Always holds: they only apply to what neither an argument nor the environment sets.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any, NamedTuple

from dtruntime.errors import InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Mapping

_USED = (
    "checkpoint.keep_last_n",
    "checkpoint.compression",
    "checkpoint.async_write",
    "checkpoint.interval_steps",
    "storage.backend",
    "storage.bucket",
    "storage.path",
    "storage.region",
    "storage.endpoint",
)
_S3_ENVIRONMENT = {
    "region": ("AWS_REGION", "AWS_DEFAULT_REGION"),
    "endpoint_url": ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"),
}


class JobSettings(NamedTuple):
    """The sections ``[checkpoint]`` and ``[storage]`` of ``coordinator.toml``.

    Attributes:
        keep_last_n: As for the manager; None if not set.
        compression: As for the manager; None if not set.
        async_write: As for the manager; True if not set.
        save_interval_steps: As for the manager; None if not set.
        path: The store: a directory, or ``s3://bucket/prefix``.
        s3: How the store at ``path`` is accessed, without what the environment sets.

    """

    keep_last_n: int | None = None
    compression: str | None = None
    async_write: bool = True
    save_interval_steps: int | None = None
    path: str | None = None
    s3: Mapping[str, Any] = {}


def job_settings_from(
    values: Mapping[str, str], environment: Mapping[str, str] = os.environ
) -> JobSettings:
    """Parse the settings that a worker got when it registered: TOML values by ``section.key``.

    >>> job_settings_from({"checkpoint.keep_last_n": "5", "storage.bucket": '"b"'}, {})
    JobSettings(keep_last_n=5, compression=None, async_write=True, save_interval_steps=None, \
path='s3://b', s3={})
    """
    known = {name: _plain(name, values[name]) for name in _USED if name in values}
    bucket, path = known.get("storage.bucket"), known.get("storage.path")
    if bucket is not None and known.get("storage.backend") != "local":
        path = f"s3://{bucket}/{path.strip('/')}" if path else f"s3://{bucket}"
    places = {
        "region": known.get("storage.region"),
        "endpoint_url": known.get("storage.endpoint"),
    }
    return JobSettings(
        known.get("checkpoint.keep_last_n"),
        known.get("checkpoint.compression"),
        known.get("checkpoint.async_write", True),
        known.get("checkpoint.interval_steps"),
        path,
        {
            name: value
            for name, value in places.items()
            if value is not None and not any(map(environment.get, _S3_ENVIRONMENT[name]))
        },
    )


def _plain(name: str, text: str) -> Any:
    """Return a number, a bool or a string that is written as in TOML.

    Raises:
        InvalidArgument: It is a multi-line string.

    """
    if text.startswith("'") and not text.startswith("'''"):  # JSON has no literal strings
        return text.strip("'")
    try:
        return json.loads(text)
    except ValueError as error:
        raise InvalidArgument(
            f"setting `{name}` of the coordinator",
            f"it cannot be parsed: {text}",
            "write it as a single-line string in the coordinator's configuration",
        ) from error
