"""Conversions of stored values that Python cannot represent, so that no row makes a query fail.

Plain SQL can store times outside of the years 1 to 9999, JSON that Python cannot parse, and lists
with null or with lists. The CHECK constraints of the models refuse most of these values, but do not
apply to rows that are older than the constraints. The values that replace them are marked, so that
the function that makes an entity of the row can name the row in the log.
"""

import json
import logging
import operator
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
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
# Number of rows that the log of a process names, so that bad rows cannot fill the log.
_MAX_NAMED_ROWS = 1000
_named: set[tuple[str, object]] = set()  # tables and ids of the rows that the log has named
_raw_decode = json.JSONDecoder().raw_decode
_logger = logging.getLogger("tiger_db")


class Unreadable:
    """Mark of a value that replaces a stored value that Python cannot read."""

    exists = False  # whether this process has read such a value


class UnreadableTime(Unreadable, datetime):
    """A time that replaces a time outside of the years 1 to 9999."""


class UnreadableObject(Unreadable, dict[str, Any]):
    """An object that replaces JSON that is no object, or that is nested too deeply."""


class UnreadableList(Unreadable, list[Any]):
    """A list that replaces JSON that is no array of objects, or a list with unreadable items."""


def report_unreadable(table: str, row: Mapping[str, Any]) -> None:
    """Name a row in the log if it contains marked values, once per process and row.

    `row` maps column names to values.
    """
    if not Unreadable.exists:  # usually, no process ever reads such a value
        return
    names = [name for name, value in row.items() if isinstance(value, Unreadable)]
    key = (table, row.get("id"))
    if not names or key in _named or len(_named) > _MAX_NAMED_ROWS:
        return
    _named.add(key)
    if len(_named) > _MAX_NAMED_ROWS:
        _logger.warning("more rows have values that Python cannot read: run `tiger-db doctor`")
        return
    _logger.warning(
        "Python cannot read %s in the row %s of %s: see `tiger-db doctor`",
        " and ".join(sorted(names)),
        row.get("id"),
        table,
    )


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
        nearest = _LAST if value[0] > 0 else _FIRST
        if value[0] in (_INFINITY, -_INFINITY - 1):
            return nearest
        Unreadable.exists = True
        return UnreadableTime.combine(nearest, nearest.time())


def decode_json(text: str | bytes) -> Any:  # noqa: ANN401  # any JSON value
    """Parse JSON. A number that Python cannot represent is read as the text of its digits."""
    if len(text) <= _HARMLESS_CHARACTERS and isinstance(text, str):
        try:
            # Unlike json.loads(), raw_decode() does not search for spaces, which `jsonb` lacks.
            return _raw_decode(text)[0]
        except ValueError:  # the type `json` keeps spaces
            return json.loads(text)
    try:
        value = json.loads(text, parse_int=_integer, parse_float=_float)
        if not _is_too_deep(value):
            return value
    except RecursionError:
        pass
    return _unreadable_object(f"the JSON has more than {_MAX_DEPTH} levels")


def as_object(value: object) -> object:
    """Return a JSON object or None unchanged. Wrap other JSON in an object."""
    return value if value is None or isinstance(value, dict) else _unreadable_object(value)


def as_objects(value: object) -> object:
    """Return a JSON array of objects, or None, unchanged. Wrap other JSON, or other items."""
    if value is None:
        return None
    items = value if isinstance(value, list) else [value]
    objects = [as_object(item) if item is not None else _unreadable_object(None) for item in items]
    if items is value and all(map(operator.is_, items, objects)):
        return value
    return unreadable_list(objects)


def unreadable_list(items: Iterable[object]) -> UnreadableList:
    """Return a marked list."""
    Unreadable.exists = True
    return UnreadableList(items)


def _unreadable_object(value: object) -> UnreadableObject:
    Unreadable.exists = True
    return UnreadableObject({UNREADABLE: value})


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
