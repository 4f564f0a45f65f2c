"""Arguments of a manager, checked one by one: what each accepts and how it reaches the engine.

Always holds: a wrong argument is an ``InvalidArgument`` that shows the value given, what is
accepted, and the nearest accepted spelling. Ranges that the engine checks are left to it.
"""

from __future__ import annotations

import difflib
import json
import math
import operator
import os
import re
from typing import TYPE_CHECKING, Any

from dtruntime.errors import InvalidArgument

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
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")

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
    """Give a number of bytes from an integer or from text such as ``2GiB``.

    >>> parse_bytes("staging_bytes", "1.5 KiB")
    1536
    """
    if not isinstance(value, str):
        return integer(name, value)
    match = _SIZE.fullmatch(value)
    unit = next((u for u in _UNITS if match and u.lower() == match[2].lower()), None)
    if match is None or unit is None:
        raise InvalidArgument(
            f"setting `{name}` = {value!r}",
            "a number of bytes is expected",
            'use an integer, or text such as "512MiB" or "2GiB"',
        )
    return int(float(match[1]) * _UNITS[unit])


def integer(name: str, value: Any) -> int:
    """Give a whole number that is not negative; numpy's integers count, booleans do not."""
    try:
        number = -1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = -1
    if not 0 <= number < 1 << 63:
        raise InvalidArgument(
            f"`{name}` = {value!r}",
            f"a whole number from 0 to 2**63-1 is expected, got `{type(value).__name__}`",
            "pass an int that is not negative",
        )
    return number


def step_of(value: Any, verb: str) -> int:
    """Give the step of a call of ``verb``."""
    try:
        return integer("step", value)
    except InvalidArgument as error:
        raise InvalidArgument(
            error.what, error.why, f"call `{verb}` with the training step, a whole number"
        ) from None


def choice(name: str, value: Any, accepted: Sequence[str], *, has_default: bool = True) -> str:
    """Give ``value`` if it is one of ``accepted``; the first is the default, if there is one."""
    if isinstance(value, str) and value in accepted:
        return value
    near = difflib.get_close_matches(str(value), accepted, n=1)
    otherwise = f"leave it at its default, `{accepted[0]}`" if has_default else "leave it unset"
    raise InvalidArgument(
        f"setting `{name}` = {value!r}",
        "expected one of " + ", ".join(f"`{text}`" for text in accepted),
        f"did you mean `{near[0]}`?" if near else otherwise,
    )


def seconds(name: str, value: Any) -> float:
    """Give a number of seconds that is not negative."""
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
    """Refuse a name that is none of ``accepted``; hint at the nearest, or say ``otherwise``."""
    if name in accepted:
        return
    near = difflib.get_close_matches(str(name), accepted, n=1)
    raise InvalidArgument(
        what,
        "expected some of " + ", ".join(f"`{text}`" for text in accepted),
        f"did you mean `{near[0]}`?" if near else otherwise,
    )


def engine_settings(
    *,
    compression: Any,
    direct_io: bool | str,
    io_backend: Any,
    verify_on_load: bool,
    sizes: Mapping[str, int | str | None],
    counts: Mapping[str, Any],
    best: tuple[str | None, str],
    remote: tuple[str | None, int | str | None, bool],
    s3: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Give the engine's settings from a manager's arguments; what is not set is left out.

    Args:
        compression: As the manager takes it, and so are the others, but for these.
        direct_io: The same.
        io_backend: The same.
        verify_on_load: The same.
        sizes: Those in bytes, by name; None where one is not set.
        counts: Whole numbers, by name; None where one is not set.
        best: ``best_metric`` and ``best_mode``.
        remote: ``remote``, ``remote_bytes_per_second`` and ``remove_before_upload``.
        s3: How a store in S3 is reached.

    Raises:
        InvalidArgument: One is not what is accepted.

    """
    address, bytes_per_second, remove_before_upload = remote
    given = {
        "direct_io": _direct_io(direct_io),
        "io_backend": choice("io_backend", io_backend, IO_BACKENDS),
        "verify_on_load": bool(verify_on_load),
        "s3": _s3_settings(s3),
    } | _remote_settings(address, bytes_per_second, remove_before_upload=remove_before_upload)
    if compression is not None:
        given["compression"] = choice("compression", compression, COMPRESSIONS)
    for numbers, parse in ((sizes, parse_bytes), (counts, integer)):
        given |= {name: parse(name, n) for name, n in numbers.items() if n is not None}
    return given | _best(*best)


def completed(given: Mapping[str, Any], told: JobSettings) -> dict[str, Any]:
    """Give the engine's settings with what the coordinator says of those that are not set."""
    said = {"compression": told.compression, "keep_last_n": told.keep_last_n}
    set_by_it = {name: value for name, value in said.items() if value is not None}
    return set_by_it | dict(given) | {"s3": {**told.s3, **given["s3"]}}


def _best(best_metric: str | None, best_mode: str) -> dict[str, str]:
    """Give the engine's settings of which checkpoints are the best."""
    named = {} if best_metric is None else {"best_metric": metric("best_metric", best_metric)}
    return named | {"best_mode": choice("best_mode", best_mode, BEST_MODES)}


def metric(name: str, value: Any) -> str:
    """Give the name of a number in checkpoints' metadata."""
    if isinstance(value, str):
        return value
    raise InvalidArgument(
        f"`{name}` = {value!r}",
        f"a str is expected, got `{type(value).__name__}`",
        "give the key of a number in the checkpoints' `metadata`, such as `val_loss`",
    )


def interval(name: str, value: Any) -> int | None:
    """Give a number of steps, at least 1; None if it is not set."""
    if value is None:
        return None
    number = integer(name, value)
    if number == 0:
        raise InvalidArgument(
            f"setting `{name}` = 0", "at least 1 is expected", "leave it unset to save every step"
        )
    return number


def _direct_io(value: bool | str) -> str:
    """Give the engine's word for the setting ``direct_io``."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return choice("direct_io", value, ("auto", "on", "off"))


def _remote_settings(
    remote: str | None, bytes_per_second: int | str | None, *, remove_before_upload: bool
) -> dict[str, Any]:
    """Give the engine's settings of a second store. What it accepts is the engine's to check."""
    settings: dict[str, Any] = {"remove_before_upload": bool(remove_before_upload)}
    if remote is not None:
        settings["remote"] = str(remote)
    if bytes_per_second is not None:
        name = "remote_bytes_per_second"
        settings[name] = parse_bytes(name, bytes_per_second)
    return settings


def _s3_settings(given: Mapping[str, Any] | None) -> dict[str, Any]:
    """Give the engine's settings of a store in S3. Ranges are the engine's to check."""
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
    """Tell whether a metric is a number that others can be larger than."""
    return isinstance(value, (int, float)) and type(value) is not bool and math.isfinite(value)


_DEPTH_MAX = 100
"""Of containers in what is attached to a checkpoint: readers of JSON have such bounds, too."""


def _as_json(value: Any, depth: int = 0) -> Any:
    """Give a value with ``nan``, ``inf`` and ``-inf`` as text: JSON has no such numbers.

    Raises:
        TypeError: It would not come back as it is.

    """
    if depth > _DEPTH_MAX:
        raise TypeError(f"containers in it are nested deeper than {_DEPTH_MAX}")
    if isinstance(value, int) and not -(1 << 63) <= value < 1 << 64:
        raise TypeError("a whole number of more than 64 bits would lose digits")
    if isinstance(value, float):
        return value if math.isfinite(value) else str(float(value))
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise TypeError("a key in it is no str, and would come back as one")
        return {key: _as_json(item, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_json(item, depth + 1) for item in value]
    return value


def json_object(name: str, value: Mapping[str, Any] | None) -> str:
    """Give what the user attaches to a checkpoint as JSON.

    A loss that is not a number must not end the training that is to be saved: it becomes text.
    """
    if value is None:
        return "{}"
    try:
        if not isinstance(value, dict):
            raise TypeError(f"a dict with str keys is expected, got `{type(value).__name__}`")  # noqa: TRY301
        text = json.dumps(_as_json(value), allow_nan=False, ensure_ascii=False)
        text.encode()  # no half of a character
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidArgument(
            f"`{name}`",
            f"it is stored as JSON, and {error}",
            "use str keys and plain values, `loss.item()` of a tensor; put anything else into the "
            "state",
        ) from None
    return text
