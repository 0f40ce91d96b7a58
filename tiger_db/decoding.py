"""Conversions of stored values that Python cannot represent, so that no row makes a query fail.

Plain SQL can store times outside of the years 1 to 9999, and JSON that Python cannot parse. The
CHECK constraints of the models refuse most of these values, but do not apply to rows that are older
than the constraints.
"""

import json
import logging
from datetime import UTC, datetime, timedelta
from functools import cache
from math import isinf
from typing import Any

# An object with this name replaces JSON that is no object, or that is nested too deeply.
UNREADABLE = "_unreadable"
_EPOCH = datetime(2000, 1, 1, tzinfo=UTC)  # the time 0 of PostgreSQL
_MICROSECOND = timedelta(microseconds=1)
_INFINITY = 2**63 - 1
# asyncpg reads the times infinity and -infinity as these datetimes without a time zone.
_LAST, _FIRST = datetime.max, datetime.min  # noqa: DTZ901
# A JSON text of this length has no number that Python cannot read, and is not nested too deeply.
_HARMLESS_CHARACTERS = 300
_MAX_DEPTH = 100
_MAX_DIGITS = 4300  # Python converts no longer text to an integer.
_logger = logging.getLogger("tiger_db")


def encode_time(value: object) -> tuple[int]:
    """Return the microseconds since 2000 of a datetime, as asyncpg's own codec does."""
    if not isinstance(value, datetime):
        raise TypeError(f"expected a datetime.datetime instance, got {type(value).__name__!r}")
    if value == _LAST:
        return (_INFINITY,)
    if value == _FIRST:
        return (-_INFINITY - 1,)
    return ((value.astimezone(UTC) - _EPOCH) // _MICROSECOND,)


def decode_time(value: tuple[int]) -> datetime:
    """Return the datetime of microseconds since 2000.

    A time after the year 9999 is read as infinity is, and a time before the year 1 as -infinity.
    """
    try:
        return _EPOCH + timedelta(microseconds=value[0])
    except OverflowError:
        if value[0] not in (_INFINITY, -_INFINITY - 1):
            _warn("a time outside of the years 1 to 9999")
        return _LAST if value[0] > 0 else _FIRST


def decode_json(text: str | bytes) -> Any:  # noqa: ANN401  # any JSON value
    """Parse JSON. A number that Python cannot represent is read as the text of its digits."""
    if len(text) <= _HARMLESS_CHARACTERS:
        return json.loads(text)
    try:
        value = json.loads(text, parse_int=_integer, parse_float=_float)
        if not _is_too_deep(value):
            return value
    except RecursionError:
        pass
    _warn("JSON that is nested too deeply")
    return {UNREADABLE: f"the JSON has more than {_MAX_DEPTH} levels"}


def as_object(value: object) -> object:
    """Return a JSON object or None unchanged. Wrap other JSON in an object."""
    if value is None or isinstance(value, dict):
        return value
    _warn("JSON that is no object")
    return {UNREADABLE: value}


def as_array(value: object) -> object:
    """Return a JSON array or None unchanged. Wrap other JSON in an array."""
    if value is None or isinstance(value, list):
        return value
    _warn("JSON that is no array")
    return [{UNREADABLE: value}]


def _integer(digits: str) -> int | str:
    return int(digits) if len(digits) <= _MAX_DIGITS else digits


def _float(digits: str) -> float | str:
    number = float(digits)
    return digits if isinf(number) else number


def _is_too_deep(value: object) -> bool:
    level = [value]
    for _ in range(_MAX_DEPTH):
        level = [
            part
            for item in level
            if isinstance(item, dict | list)
            for part in (item.values() if isinstance(item, dict) else item)
        ]
        if not level:
            return False
    return True


@cache  # one warning per process and kind
def _warn(what: str) -> None:
    _logger.warning("the database contains %s: `tiger-db doctor` names the rows", what)
