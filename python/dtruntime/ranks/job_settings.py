"""What the coordinator was configured to tell workers, as settings of a manager.

Always holds: it only fills in what neither an argument nor the environment says.
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
        keep_last_n: As the manager takes it; None if it is not said.
        compression: The same.
        async_write: The same; True if it is not said.
        save_interval_steps: The same; None if it is not said.
        path: The store: a directory, or ``s3://bucket/prefix``.
        s3: How the store at ``path`` is reached, less what the environment says.

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
    """Read what a worker was told when it registered: TOML values by ``section.key``.

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
    """Give a number, a truth value or a text that is written as in TOML.

    Raises:
        InvalidArgument: It is a text of several lines.

    """
    if text.startswith("'") and not text.startswith("'''"):  # JSON has no literal strings
        return text.strip("'")
    try:
        return json.loads(text)
    except ValueError as error:
        raise InvalidArgument(
            f"setting `{name}` of the coordinator",
            f"it is not understood: {text}",
            "write it as text of one line in the coordinator's configuration",
        ) from error
