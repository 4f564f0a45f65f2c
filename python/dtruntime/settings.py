"""Arguments of a manager, checked one by one: what each accepts and how it reaches the engine.

Always holds: a wrong argument is an ``InvalidArgument`` that shows the value given, what is
accepted, and the nearest accepted spelling. Ranges that the engine checks are left to it.
"""

from __future__ import annotations

import json
import math
import operator
import os
import re
from typing import TYPE_CHECKING, Any

import numpy as np

from dtruntime.errors import InvalidArgument
from dtruntime.messages import quoted, suggestion

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dtruntime.ranks.job_settings import JobSettings

COMPRESSIONS = ("auto", "none", "float", "zstd", "gzip")
IO_BACKENDS = ("auto", "uring", "threads")
BEST_MODES = ("min", "max")

_UNITS = {"": 1, "B": 1} | {
    f"{prefix}{suffix}": (1024 if suffix == "iB" else 1000) ** power
    for power, prefix in enumerate("KMGT", start=1)
    for suffix in ("B", "iB")
}
_SIZE = re.compile(r"\s*(\d{1,30})(?:\.(\d{1,30}))?\s*([A-Za-z]*)\s*")
_INTEGER_END = 1 << 63
"""The engine takes signed integers of 64 bits."""

S3_SETTINGS = (
    "region",
    "endpoint_url",
    "profile",
    "path_style",
    "ca_bundle",
    "connect_timeout_ms",
    "request_timeout_ms",
    "attempts",
    "part_bytes",
    "in_flight_bytes",
)


def parse_bytes(name: str, value: int | str) -> int:
    """Return a number of bytes from an integer or from text such as ``2GiB``.

    Raises:
        InvalidArgument: It is neither, or more than 2**63-1 bytes.

    >>> parse_bytes("staging_bytes", "1.5 KiB")
    1536

    """
    if not isinstance(value, str):
        return integer(name, value)
    match = _SIZE.fullmatch(value)
    unit = next((u for u in _UNITS if match and u.lower() == match[3].lower()), None)
    number = -1
    if match is not None and unit is not None:
        fraction = match[2] or ""
        number = int(match[1] + fraction) * _UNITS[unit] // 10 ** len(fraction)
    if not 0 <= number < _INTEGER_END:
        raise InvalidArgument(
            f"setting `{name}` = {value!r}",
            "a number of bytes from 0 to 2**63-1 is expected",
            'use an integer, or text such as "512MiB" or "2GiB"',
        )
    return number


def integer(name: str, value: Any) -> int:
    """Return a non-negative whole number; numpy's integers count, booleans do not."""
    try:
        number = -1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = -1
    if not 0 <= number < _INTEGER_END:
        raise InvalidArgument(
            f"`{name}` = {value!r}",
            f"a whole number from 0 to 2**63-1 is expected, got `{type(value).__name__}`",
            "pass a non-negative int",
        )
    return number


def step_of(value: Any, verb: str) -> int:
    """Return the step passed to ``verb``, which the error message names."""
    try:
        return integer("step", value)
    except InvalidArgument as error:
        raise InvalidArgument(
            error.what, error.why, f"call `{verb}` with the training step, a whole number"
        ) from None


def choice(name: str, value: Any, accepted: Sequence[str], *, has_default: bool = True) -> str:
    """Return ``value`` if it is one of ``accepted``; the first is the default, if there is one."""
    if isinstance(value, str) and value in accepted:
        return value
    otherwise = f"leave it at its default, `{accepted[0]}`" if has_default else "leave it unset"
    raise InvalidArgument(
        f"setting `{name}` = {value!r}",
        "expected one of " + ", ".join(quoted(accepted)),
        suggestion(value, accepted, otherwise),
    )


def seconds(name: str, value: Any) -> float:
    """Return a non-negative number of seconds."""
    try:
        number = -1.0 if isinstance(value, (bool, str)) else float(value)
    except (TypeError, ValueError):
        number = -1.0
    if not 0 <= number < math.inf:
        raise InvalidArgument(
            f"setting `{name}` = {value!r}", "a number of seconds is expected", "use 0 or more"
        )
    return number


def check_name(what: str, name: str, accepted: Sequence[str], otherwise: str) -> None:
    """Refuse a name that is not in ``accepted``; the hint is the nearest, or ``otherwise``."""
    if name not in accepted:
        why = "expected some of " + ", ".join(quoted(accepted))
        raise InvalidArgument(what, why, suggestion(name, accepted, otherwise))


def engine_settings(
    *,
    compression: Any,
    direct_io: bool | str,
    io_backend: Any,
    sizes: Mapping[str, int | str | None],
    counts: Mapping[str, Any],
    best: tuple[str | None, str],
    remote: tuple[str | None, int | str | None, bool],
    s3: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Return the engine's settings from a manager's arguments; what is not set is left out.

    Args:
        compression: As for the manager.
        direct_io: As for the manager.
        io_backend: As for the manager.
        sizes: Numbers of bytes, by name; None where one is not set.
        counts: Whole numbers, by name; None where one is not set.
        best: ``best_metric`` and ``best_mode``.
        remote: ``remote``, ``remote_bytes_per_second`` and ``remove_before_upload``.
        s3: As for the manager.

    Raises:
        InvalidArgument: A value is not accepted.

    """
    address, bytes_per_second, remove_before_upload = remote
    given = {
        "direct_io": _direct_io(direct_io),
        "io_backend": choice("io_backend", io_backend, IO_BACKENDS),
        "s3": _s3_settings(s3),
    } | _remote_settings(address, bytes_per_second, remove_before_upload=remove_before_upload)
    if compression is not None:
        given["compression"] = choice("compression", compression, COMPRESSIONS)
    for numbers, parse in ((sizes, parse_bytes), (counts, integer)):
        given |= {name: parse(name, n) for name, n in numbers.items() if n is not None}
    return given | _best(*best)


def completed(given: Mapping[str, Any], job: JobSettings) -> dict[str, Any]:
    """Return the engine's settings, with the coordinator's values for those that are not set."""
    defaults = {"compression": job.compression, "keep_last_n": job.keep_last_n}
    defaults = {name: value for name, value in defaults.items() if value is not None}
    return defaults | dict(given) | {"s3": {**job.s3, **given["s3"]}}


def _best(best_metric: str | None, best_mode: str) -> dict[str, str]:
    """Return the engine's settings that say which checkpoints are best."""
    named = {} if best_metric is None else {"best_metric": metric("best_metric", best_metric)}
    return named | {"best_mode": choice("best_mode", best_mode, BEST_MODES)}


def metric(name: str, value: Any) -> str:
    """Return the key of a number in checkpoints' metadata."""
    if isinstance(value, str):
        return value
    raise InvalidArgument(
        f"`{name}` = {value!r}",
        f"a str is expected, got `{type(value).__name__}`",
        "pass the key of a number in the checkpoints' `metadata`, such as `val_loss`",
    )


def interval(name: str, value: Any) -> int | None:
    """Return a number of steps, at least 1; None if it is not set."""
    if value is None:
        return None
    number = integer(name, value)
    if number == 0:
        raise InvalidArgument(
            f"setting `{name}` = 0", "at least 1 is expected", "leave it unset to save every step"
        )
    return number


def _direct_io(value: bool | str) -> str:
    """Return the engine's value of the setting ``direct_io``."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return choice("direct_io", value, ("auto", "on", "off"))


def _remote_settings(
    remote: str | None, bytes_per_second: int | str | None, *, remove_before_upload: bool
) -> dict[str, Any]:
    """Return the engine's settings of the remote store. The engine checks what it accepts."""
    settings: dict[str, Any] = {"remove_before_upload": bool(remove_before_upload)}
    if remote is not None:
        settings["remote"] = str(remote)
    if bytes_per_second is not None:
        name = "remote_bytes_per_second"
        settings[name] = parse_bytes(name, bytes_per_second)
    return settings


def _s3_settings(given: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the engine's settings of a store in S3. The engine checks the ranges."""
    settings = {}
    for name, value in (given or {}).items():
        check_name(
            f"setting `s3` has the key {name!r}",
            name,
            S3_SETTINGS,
            "credentials come from the usual chain: environment, profile, role",
        )
        if value is not None:
            settings[name] = _s3_setting(name, value)
    return settings


def _s3_setting(name: str, value: Any) -> Any:
    if name.endswith("_bytes"):
        return parse_bytes(f"s3.{name}", value)
    if name.endswith("_ms") or name == "attempts":
        return integer(f"s3.{name}", value)
    if name == "path_style":
        return bool(value)
    return os.fspath(value)


def is_comparable(value: Any) -> bool:
    """Return whether a metric is a finite number, so that checkpoints can be ranked by it."""
    return isinstance(value, (int, float)) and type(value) is not bool and math.isfinite(value)


_DEPTH_MAX = 64
"""Nesting of containers in each entry of the metadata: the engine's ``METADATA_DEPTH_MAX``."""


def _as_json(value: Any, where: str, depth: int = 0) -> Any:
    """Return a value as JSON can hold it.

    ``nan``, ``inf`` and ``-inf`` become text, because JSON has no such numbers; NumPy scalars
    become Python's.

    Raises:
        TypeError: It would not load as the same value; ``where`` it is, for the message.

    """
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, (dict, list, tuple)) and depth > _DEPTH_MAX:
        raise TypeError(f"containers in it are nested deeper than {_DEPTH_MAX}")
    if isinstance(value, int) and not -(1 << 63) <= value < 1 << 64:
        raise TypeError(f"{where} is a whole number of more than 64 bits, which would lose digits")
    if isinstance(value, float):
        return value if math.isfinite(value) else str(float(value))
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise TypeError(f"a key of {where} is not a str, and would load as one")
        return {
            key: _as_json(item, f"`{key}`" if depth == 0 else where, depth + 1)
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [_as_json(item, where, depth + 1) for item in value]
    if value is None or isinstance(value, (str, int)):
        return value
    within = "" if depth == 1 else " holds a value that"
    raise TypeError(f"{where}{within} is of type `{type(value).__name__}`")


def json_object(name: str, value: Mapping[str, Any] | None) -> str:
    """Return what the user attaches to a checkpoint as JSON.

    A loss that is not a number must not stop the training being saved: it becomes text.
    """
    if value is None:
        return "{}"
    try:
        if not isinstance(value, dict):
            raise TypeError(f"a dict with str keys is expected, got `{type(value).__name__}`")  # noqa: TRY301
        text = json.dumps(_as_json(value, "it"), allow_nan=False, ensure_ascii=False)
        text.encode()  # refuses lone surrogates
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidArgument(
            f"`{name}`",
            f"it is stored as JSON, and {error}",
            "use str keys and plain values, such as `loss.item()` for a tensor; put anything else "
            "in the state",
        ) from None
    return text
