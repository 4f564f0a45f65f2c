"""How to reach the coordinator: arguments first, then the environment.

Always holds: a token is never shown in messages; a wrong argument is an ``InvalidArgument`` that
says what is accepted.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NamedTuple

from dtruntime import _native
from dtruntime.errors import InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Mapping

DEFAULT_URL = "http://localhost:50051"
DEFAULT_JOB = "default"
PATIENCE_SECONDS = 30.0
"""How long to retry while the coordinator does not answer."""


class Security(NamedTuple):
    """Credentials for the coordinator.

    Attributes:
        token: The bearer token. Default: the environment's ``COORDINATOR_TOKEN``.
        ca_file: PEM file of the CA that signed the coordinator's certificate. Default: the
            system's CAs.
        cert_file: PEM file of this worker's own certificate, for mutual TLS.
        key_file: PEM file of its key.

    """

    token: str | None = None
    ca_file: str | os.PathLike[str] | None = None
    cert_file: str | os.PathLike[str] | None = None
    key_file: str | os.PathLike[str] | None = None


def url_of(url: str | None, environment: Mapping[str, str] = os.environ) -> str:
    """Return the coordinator's URL: the argument, ``COORDINATOR_URL``, or this machine's."""
    return url or environment.get("COORDINATOR_URL") or DEFAULT_URL


def job_of(job: str | None, environment: Mapping[str, str] = os.environ) -> str:
    """Return the job's name: the argument, ``DTRUNTIME_JOB``, or ``default``."""
    return job or environment.get("DTRUNTIME_JOB") or DEFAULT_JOB


def connect(
    url: str,
    security: Security,
    patience_seconds: float,
    environment: Mapping[str, str] = os.environ,
) -> _native.Coordinator:
    """Create a connection with its native thread; nothing is sent to the coordinator yet."""
    if (security.cert_file is None) != (security.key_file is None):
        raise InvalidArgument(
            "the worker's certificate",
            "`cert_file` and `key_file` belong together, and one is missing",
            "pass both, or neither",
        )
    return _native.Coordinator(
        url,
        security.token or environment.get("COORDINATOR_TOKEN") or None,
        (security.ca_file, security.cert_file, security.key_file),
        patience_seconds,
    )
