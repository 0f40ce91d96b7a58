"""Functions that convert the values of audit events to storable values and mask secrets.

An audit event must be stored even if PostgreSQL cannot store its values unchanged.
`pydantic_core.to_jsonable_python` is not used, because that function fails for unknown objects,
masks no secrets and has no size limits.
"""

import base64
import json
import numbers
import operator
import re
from collections import UserString
from collections.abc import Callable, Collection, Iterable, Mapping, MappingView, Sequence
from collections.abc import Set as AbstractSet
from contextlib import suppress
from dataclasses import fields, is_dataclass
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from fractions import Fraction
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from itertools import islice
from math import isfinite
from pathlib import PurePath
from typing import Any, TypeGuard, cast
from uuid import UUID

import pydantic
from pydantic import BaseModel, SecretBytes, SecretStr

from tiger_db.models.api_keys import parse_address
from tiger_db.redaction import (
    MASK,
    is_plain_name,
    is_secret_name,
    redact_aggressively,
    redact_known,
)

NOTES = "_made_safe"  # name of the field of `details` that lists converted values
_ELLIPSIS = "…"
# Limits of one JSON field: nesting depth, number of values, and number of characters
_MAX_DEPTH = 32
_MAX_VALUES = 10_000
_MAX_CHARACTERS = 1_000_000
# A text that is cut before it is masked can end inside a secret, which masking does not recognize.
# Therefore, the last characters of the masked text are not stored.
_MAX_SECRET = 2_000
# Limits of one value: length of a text in characters, and size of an integer in bits
_MAX_TEXT = 100_000
_MAX_BITS = 1000
_MAX_NAME = 100  # maximum length of a name that `is_plain_name` keeps in its cache
# Limits of the notes on one event: number of notes, and length of one note in characters
_MAX_NOTES = 50
_MAX_NOTE = 300
_MAX_SHOWN = 200  # maximum length of a converted value that `details` quotes
_INT64_LIMIT = 2**63
_UNSTORABLE = re.compile("[\0\ud800-\udfff]")
_WITH_PORT = re.compile(r"\[([^]]*)\](?::\d*)?|([\d.]+):\d*")
_KEY_PREFIX = re.compile(r"tdb_(?:live|test)_[0-9A-Za-z]{12}")
_MORE = re.compile(r"and (\d{1,9}) more")

Path = tuple["Path", str] | None  # linked list of the names from a nested value up to its field


def bounded_json(value: object, name: str, characters: int) -> dict[str, object]:
    """Return `details` with a value of at most about `characters` characters under a name.

    Secrets are masked. Notes in `details` name the values that were cut. The function looks only at
    the characters that it returns, so that a large value does not occupy the processor.
    """
    sanitizer = _Sanitizer(characters)
    details: dict[str, object] = {name: sanitizer.json(value, ((None, "details"), name), 1)}
    return details | ({NOTES: sanitizer.merged_notes({})} if sanitizer.notes else {})


def sanitize_event(
    values: Mapping[str, object], limits: Mapping[str, int], severities: Collection[str]
) -> dict[str, object]:
    """Return the storable values of an event, with notes on converted values in `details`.

    `limits` maps names of text fields to maximum lengths in characters. A field without a
    conversion, such as `action`, is returned unchanged, even if the value of the field is invalid.
    """
    sanitizer = _Sanitizer()
    result = dict(values)
    for name, value in values.items():
        if value is None:
            continue
        try:
            if name in limits:
                result[name] = sanitizer.text_field(value, (None, name), limits[name])
            elif name in _FIELDS:
                result[name] = _FIELDS[name](sanitizer, value, (None, name))
        except Exception:  # noqa: BLE001  # methods of an unknown object can raise any exception
            result[name] = None
            sanitizer.note((None, name), type(value).__name__)
    severity = result.get("severity")
    if "severity" in result and not (issubclass(type(severity), str) and severity in severities):
        del result["severity"]
        sanitizer.note((None, "severity"), f"not a severity: {_shown(severity)}")
    if sanitizer.notes:
        details = result.get("details")
        details = details if isinstance(details, dict) else {}
        earlier = details.get(NOTES)
        notes = sanitizer.merged_notes(earlier if isinstance(earlier, dict) else {})
        result["details"] = {**details, NOTES: notes}
    return result


class _Sanitizer:
    """A converter for the values of one audit event, which collects notes on the conversions."""

    def __init__(self, characters: int = _MAX_CHARACTERS) -> None:
        self.notes: dict[str, str] = {}
        self.notes_left_out = 0
        self.values_left = _MAX_VALUES
        self.characters = self.characters_left = characters

    # Converters of fields that do not contain JSON

    def text_field(
        self, value: object, path: Path, limit: int, mask: Callable[[str], str] = redact_known
    ) -> str:
        if type(value) is str:
            return self.fit(value, path, limit, mask)
        text = _as_text(value)
        if not isinstance(value, str):
            self.note(path, type(value).__name__)
        return self.fit(text, path, limit, mask)

    def error_message(self, value: object, path: Path) -> str:
        return self.text_field(value, path, _MAX_TEXT, redact_aggressively)

    def uuid(self, value: object, path: Path) -> UUID | None:
        if isinstance(value, UUID):
            return value
        try:
            return UUID(_as_text(value))
        except ValueError:
            self.note(path, f"not a UUID: {_shown(value)}")
            return None

    def milliseconds(self, value: object, path: Path) -> int | None:
        if type(value) is int and 0 <= value < _INT64_LIMIT:
            return value
        try:
            number = _number(value)
            if number is not None and 0 <= number < _INT64_LIMIT and round(number) < _INT64_LIMIT:
                if isinstance(value, str | Decimal):
                    self.note(path, type(value).__name__)
                return round(number)
        except (ArithmeticError, ValueError):
            pass
        self.note(path, f"not a duration: {_shown(value)}")
        return None

    def address(self, value: object, path: Path) -> IPv4Address | IPv6Address | None:
        """Return the first IP address in a text, without its port and IPv6 zone, or None."""
        if type(value) is IPv4Address or (type(value) is IPv6Address and value.scope_id is None):
            return value
        text = _as_text(value)[:_MAX_TEXT]
        for part in (text, *text.split(",")):
            port = _WITH_PORT.fullmatch(part.strip())
            bare = (port[1] or port[2] or "") if port else part.strip()
            try:
                # PostgreSQL cannot store an IPv6 zone, such as eth0 in fe80::1%eth0.
                address = parse_address(bare.split("%")[0])
            except ValueError:
                continue
            if part != text or bare != text or "%" in text:
                self.note(path, f"taken from: {_shown(value)}")
            return address
        self.note(path, f"not an IP address: {_shown(value)}")
        return None

    # Converters of JSON fields

    def json_field(self, value: object, path: Path) -> dict[str, object]:
        self.values_left, self.characters_left = _MAX_VALUES, _MAX_CHARACTERS
        if isinstance(value, dict):
            items = dict(dict.items(value))
            earlier = items.pop(NOTES, None) if isinstance(items.get(NOTES), dict) else None
            result = self.mapping(items.items(), path, 0)
            if earlier is not None:
                result[NOTES] = _Sanitizer().merged_notes(earlier)
            return result
        converted = self.json(value, path, 0)
        if isinstance(converted, dict):
            return converted
        # self.json() adds no note about the type of a text, a number, a list or a tuple.
        if isinstance(value, str | int | float | list | tuple):
            self.note(path, type(value).__name__)
        return {"value": converted}

    def json(self, value: object, path: Path, depth: int) -> object:
        """Return a value as JSON that PostgreSQL can store."""
        self.values_left -= 1
        kind = type(value)
        if kind is str:
            return self.text(cast("str", value), path)
        if value is None or kind is bool:
            return value
        if kind is int and -_INT64_LIMIT < cast("int", value) < _INT64_LIMIT:
            return value
        try:
            return self.converted(value, path, depth)
        except Exception:  # noqa: BLE001  # methods of an unknown object can raise any exception
            self.note(path, kind.__name__)
            return self.text(kind.__name__, path)

    def converted(self, value: object, path: Path, depth: int) -> object:  # noqa: PLR0911  # one return for each type
        match value:
            case Enum() if not isinstance(value, str):
                self.note(path, type(value).__name__)
                return self.json(value.value, path, depth)
            case int() | float():
                return self.number(value, path)
            case str():
                return self.text(str.__str__(value), path)
            case SecretStr() | SecretBytes() | pydantic.Secret():
                return self.text(MASK, path)
            case dict() | list() | tuple() | Mapping() | AbstractSet():
                return self.container(value, path, depth)
            case UserString():
                return self.text(str(value), path)
        if (scalar := _builtin_scalar(value)) is not None:
            return self.scalar(scalar, value, path)
        if _is_list_like(value):
            return self.container(value, path, depth)
        return self.unknown(value, path, depth)

    def scalar(self, scalar: bool | float | str, value: object, path: Path) -> object:  # noqa: FBT001  # a value
        """Return a scalar of a library, such as NumPy's `int64`, as JSON."""
        if isinstance(scalar, bool):
            return scalar
        if isinstance(scalar, str) or (isfinite(scalar) and scalar != value):
            self.note(path, type(value).__name__)
        return self.text(scalar, path) if isinstance(scalar, str) else self.number(scalar, path)

    def unknown(self, value: object, path: Path, depth: int) -> object:
        """Return a pydantic model, a dataclass or an unknown object as JSON, and add a note."""
        self.note(path, type(value).__name__)
        if isinstance(value, BaseModel):
            value = value.model_dump(mode="json", warnings=False)
        elif is_dataclass(value) and not isinstance(value, type):
            value = {each.name: getattr(value, each.name) for each in fields(value)}
        else:
            return self.text(_scalar_text(value), path)
        return self.json(value, path, depth)

    def number(self, value: float, path: Path) -> float | str:
        if isinstance(value, float):
            if isfinite(value):
                return float.__float__(value)
            self.note(path, "float")
            names = {float("inf"): "Infinity", float("-inf"): "-Infinity"}
            return self.text(names.get(value, "NaN"), path)
        number = int.__int__(value)
        if number.bit_length() <= _MAX_BITS:
            return number
        self.note(path, f"int of {number.bit_length()} bits")
        return self.text(hex(number), path)

    def container(
        self, value: Mapping[object, object] | Collection[object], path: Path, depth: int
    ) -> object:
        if depth >= _MAX_DEPTH:
            self.note(path, f"deeper than {_MAX_DEPTH} levels")
            return self.text(_ELLIPSIS, path)
        if isinstance(value, Mapping):
            return self.mapping(value.items(), path, depth)
        if isinstance(value, tuple) and hasattr(value, "_fields"):  # a named tuple
            return self.mapping(zip(value._fields, value, strict=True), path, depth)
        if isinstance(value, AbstractSet) and not isinstance(value, MappingView):
            self.note(path, type(value).__name__)
        result: list[object] = []
        for index, item in enumerate(value):
            if self.is_full(path):
                break
            # The pattern calls methods of an unknown object. For example, an array of NumPy without
            # dimensions has no length.
            with suppress(Exception):
                match item:
                    # In a pair such as `('password', 'abc')`, the second item is masked, because
                    # the pair can come from `dict.items()`.
                    case [str(name), secret] if is_secret_name(name) and not _is_harmless(
                        name, secret
                    ):
                        item = [name, MASK]  # noqa: PLW2901  # the secret must not be converted
            result.append(self.json(item, (path, str(index)), depth + 1))
        return result

    def mapping(
        self, items: Iterable[tuple[object, object]], path: Path, depth: int
    ) -> dict[str, object]:
        """Return a dict of the given keys and values, as JSON that PostgreSQL can store.

        If a key of the dict equals an earlier key of the dict, append a number to the key.
        """
        result: dict[str, object] = {}
        next_numbers: dict[str, int] = {}
        for key, value in items:
            if self.is_full(path):
                break
            if (  # most names, which need no conversion
                type(key) is str
                and len(key) <= min(_MAX_NAME, self.characters_left)
                and key not in result
                and is_plain_name(key)
            ):
                self.characters_left -= len(key)
                result[key] = self.json(value, (path, key), depth + 1)
                continue
            name = key if type(key) is str else _as_text(key)
            stored = self.text(name, (path, name))
            if stored in result:
                first, number = stored, next_numbers.get(stored, 2)
                while (stored := f"{first} ({number})") in result:
                    number += 1
                next_numbers[first] = number + 1
            if not isinstance(key, str):
                self.note((path, stored), f"key: {type(key).__name__}")
            if (is_secret_name(name) or is_secret_name(stored)) and not _is_harmless(stored, value):
                self.values_left -= 1
                result[stored] = MASK
            else:
                result[stored] = self.json(value, (path, stored), depth + 1)
        return result

    def is_full(self, path: Path) -> bool:
        """Return whether the JSON field has reached a size limit.

        If the JSON field has reached a size limit, add a note about the size limit.
        """
        if self.values_left > 0 and self.characters_left > 0:
            return False
        while path is not None and path[0] is not None:
            path = path[0]
        limit = (
            f"{_MAX_VALUES} values" if self.values_left <= 0 else f"{self.characters} characters"
        )
        if limit not in self.notes.get(path[1] if path else "", ""):
            # If there are `_MAX_NOTES` notes, the note on the size limit replaces the last note.
            while len(self.notes) >= _MAX_NOTES:
                self.notes.popitem()
                self.notes_left_out += 1
            self.note(path, f"cut to {limit}")
        return True

    # Converters of texts

    def text(self, text: str, path: Path) -> str:
        result = self.fit(text, path, max(min(_MAX_TEXT, self.characters_left), 1))
        self.characters_left -= len(result)
        return result

    def fit(
        self, text: str, path: Path, limit: int, mask: Callable[[str], str] = redact_known
    ) -> str:
        """Replace unstorable characters, mask secrets, and cut the text to `limit` characters.

        Masking takes a second for a million characters, so only the start of a long text is masked.
        """
        result = text[: limit + 2 * _MAX_SECRET]
        is_whole = len(result) == len(text)
        if not result.isascii() or "\0" in result:
            stored = _UNSTORABLE.sub("\ufffd", result)
            if stored != result:
                result = stored
                self.note(path, "unstorable characters")
        result = mask(result)
        if not is_whole:
            result = result[:-_MAX_SECRET]
        if len(result) <= limit and is_whole:
            return result
        self.note(path, f"cut from {len(text)} characters")
        # Cut the text at a place that is not inside a mask.
        size, back = limit - 1, 16
        while (cut := result[: max(size, 0)] + _ELLIPSIS) != mask(cut) and size > 0:
            size, back = limit - 1 - back, back * 2
        return cut

    # Notes on conversions

    def note(self, path: Path, text: str) -> None:
        if len(self.notes) >= _MAX_NOTES:
            self.notes_left_out += 1
            return
        names: list[str] = []
        while path is not None:
            path, name = path
            names.append(name)
        key = _note_text(".".join(reversed(names)))
        earlier = self.notes.get(key)
        self.notes[key] = _note_text(text if earlier in {None, text} else f"{earlier}; {text}")

    def merged_notes(self, earlier: Mapping[object, object]) -> dict[str, object]:
        """Return the notes in `earlier` and the notes of this sanitizer, at most `_MAX_NOTES`."""
        notes: dict[str, object] = {}
        left_out = self.notes_left_out
        for key, value in earlier.items():
            if key == _ELLIPSIS and isinstance(value, str) and (more := _MORE.fullmatch(value)):
                left_out += int(more[1])
            else:
                notes[_note_text(_as_text(key))] = (
                    _note_text(value)
                    if isinstance(value, str)
                    else _Sanitizer().json(value, None, 0)
                )
        notes |= self.notes
        left_out += max(len(notes) - _MAX_NOTES, 0)
        notes = dict(islice(notes.items(), _MAX_NOTES))
        return {**notes, _ELLIPSIS: f"and {left_out} more"} if left_out else notes


_FIELDS: dict[str, Callable[[_Sanitizer, object, Path], object]] = {
    "tiger_account_id": _Sanitizer.uuid,
    "api_key_id": _Sanitizer.uuid,
    "ip_address": _Sanitizer.address,
    "duration_ms": _Sanitizer.milliseconds,
    "error_message": _Sanitizer.error_message,
    "details": _Sanitizer.json_field,
    "old_values": _Sanitizer.json_field,
    "new_values": _Sanitizer.json_field,
    "tags": _Sanitizer.json_field,
}


def _number(value: object) -> Decimal | Fraction | float | None:
    match value:
        case bool():
            return None
        case int() | float() | Decimal() | Fraction():
            return value
        case timedelta():
            return value / timedelta(milliseconds=1)
        case str() if len(value) <= _MAX_SHOWN:
            return Decimal(value)
    scalar = _builtin_scalar(value)
    return None if isinstance(scalar, bool | str) else scalar


def _builtin_scalar(value: Any) -> bool | float | str | None:  # noqa: ANN401  # any object
    """Convert a scalar, such as NumPy's `int64`, to a built-in value.

    Return None if the value cannot be converted. NumPy need not be installed, because the
    attributes `dtype` and `ndim` show whether an object is a scalar of NumPy. A `Fraction` becomes
    a text, because a float would be inexact.
    """
    with suppress(Exception):  # methods of an unknown object can raise any exception
        kind = getattr(getattr(value, "dtype", None), "kind", None)
        if kind is not None and value.ndim == 0:
            value = value[()]  # the index () selects the only value of a NumPy array
        if kind == "b" and value.ndim == 0:
            return bool(value)
        if isinstance(value, numbers.Rational) and kind != "m":  # Rational includes integers
            return operator.index(value) if isinstance(value, numbers.Integral) else str(value)
        if isinstance(value, numbers.Real) and kind != "m":
            return float(value)
        if kind in {"m", "M"} and value.ndim == 0:  # timedelta64 or datetime64 of NumPy
            return str(value)
    return None


def _is_list_like(value: Any) -> TypeGuard[Collection[object]]:  # noqa: ANN401  # any object
    """Return whether an object is a sequence, a dict view or an array, but not bytes."""
    if isinstance(value, bytes | bytearray | memoryview):
        return False
    is_array = hasattr(value, "dtype") and getattr(value, "ndim", 0) > 0
    return is_array or isinstance(value, Sequence | MappingView)


def _as_text(value: object) -> str:
    """Convert a value to a text, without `repr`, because a `repr` can contain a secret."""
    # isinstance() is not used, because isinstance() reads `__class__`, which a class can override.
    if issubclass(type(value), str):
        return str.__str__(value)  # str() of an enum member can return the member's name
    if type(value) is bytes or type(value) is bytearray:
        return value[:_MAX_CHARACTERS].decode(errors="replace")
    converted = _Sanitizer().json(value, None, 0)
    return json.dumps(converted) if isinstance(converted, dict | list) else str(converted)


def _scalar_text(value: object) -> str:
    """Convert a scalar to a text, or return the name of the type if the type is unknown."""
    match value:
        case bytes() | bytearray() | memoryview():
            data = bytes(value)[:_MAX_CHARACTERS]
            text = data.decode(errors="replace")
            return MASK if redact_known(text) != text else base64.b64encode(data).decode()
        case datetime() | date() | time():
            return value.isoformat()
        case (
            Decimal() | timedelta() | UUID() | PurePath()
            | IPv4Address() | IPv6Address() | IPv4Network() | IPv6Network()
        ):  # fmt: skip
            return str(value)
        case BaseException():
            return redact_aggressively(f"{type(value).__name__}: {value}"[:_MAX_CHARACTERS])
    return type(value).__name__


def _is_harmless(name: str, value: object) -> bool:
    """Return whether a value is harmless, although the value's name suggests a secret.

    Harmless values are null, booleans, token counts such as `max_tokens`, and API key prefixes.
    """
    if value is None or value is True or value is False:
        return True
    scalar = _builtin_scalar(value)
    if isinstance(scalar, bool):
        return True
    if isinstance(scalar, int) and scalar.bit_length() <= _MAX_BITS:
        return name.rstrip(" ()0123456789").lower().endswith("tokens")
    items: Iterable[object] = (value,)
    if issubclass(type(value), list | tuple):  # TrackedList is a subclass of list
        items = cast("Iterable[object]", value)
    return all(type(item) is str and _KEY_PREFIX.fullmatch(item) for item in items)


def _shown(value: object) -> str:
    return _Sanitizer().fit(_as_text(value), None, _MAX_SHOWN)


def _note_text(text: str) -> str:
    return _Sanitizer().fit(text, None, _MAX_NOTE)
