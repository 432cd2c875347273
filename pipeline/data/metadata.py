"""The metadata of a prompt, for the reward function: the other columns of its row as a JSON object.

Numbers, text, lists and objects are kept. A date or time becomes ISO 8601 text, a duration its seconds, a decimal its
digits as text, bytes base64, NaN and infinity null. Any other value, and one longer than `data.max_characters`, is left
out with a remark.
"""

from __future__ import annotations

import base64
import datetime
import json
import math
from collections.abc import Collection, Mapping
from decimal import Decimal
from typing import Any


class Unreadable:
    """A value of a file that Python cannot hold, such as a date in the year 20,000."""


def metadata_of(values: Mapping[str, Any], asked: Collection[str], explicit: str, limit: int) -> tuple[str, bool]:
    """The metadata of a row as a JSON object, and whether it is complete.

    asked: the columns that the prompt is read from, which are left out. explicit: a column whose entries, if it holds
    an object, stand beside the other columns. limit: longest value, in characters of JSON.
    """
    own = values.get(explicit)
    if isinstance(own, str):  # as CSV has it
        try:
            own = json.loads(own)
        except (ValueError, RecursionError):
            own = values[explicit]
    others = {
        name: value
        for name, value in values.items()
        if name not in asked and not (name == explicit and isinstance(own, dict))
    }
    if isinstance(own, dict):
        others |= own
    parts = {str(name): _written(value, limit) for name, value in others.items()}
    kept = [f"{json.dumps(name)}: {text}" for name, text in sorted(parts.items()) if text is not None]
    return f"{{{', '.join(kept)}}}", len(kept) == len(parts)


def _written(value: Any, limit: int) -> str | None:
    """A value as JSON, or None if it is left out."""
    try:
        text = json.dumps(_plain(value), allow_nan=False)
    except (TypeError, ValueError, OverflowError, RecursionError):
        return None
    return text if len(text) <= limit else None


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): _plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, datetime.date | datetime.time):  # a datetime is a date
        return value.isoformat()
    if isinstance(value, datetime.timedelta):
        return value.total_seconds()
    if isinstance(value, Decimal):
        return str(value)
    if isinstance(value, bytes | bytearray | memoryview):
        return base64.b64encode(bytes(value)).decode("ascii")
    raise TypeError(type(value).__name__)
