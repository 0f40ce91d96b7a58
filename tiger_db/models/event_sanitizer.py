"""What an event is told, made safe: it is recorded whatever its details are, without secrets."""

import base64
import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from itertools import islice
from math import isfinite
from pathlib import PurePath
from typing import cast
from uuid import UUID

import pydantic
from pydantic import BaseModel, SecretBytes, SecretStr

from tiger_db.models.api_keys import parse_address
from tiger_db.redaction import MASK, is_secret_name, redact_aggressively, redact_known

NOTES = "_made_safe"  # the key in details under which it says what was changed
_CUT = "…"
_DEEPEST = 32
_VALUES = 10_000  # of a field, in all
_CHARACTERS = 1_000_000  # of a field, in all
_LONGEST = 100_000  # characters of a text
_NOTED = 50
_LONGEST_NOTE = 300
_SHOWN = 200  # characters of a value that a note shows
_BITS = 1000
_64_BITS = 2**63
_UNSTORABLE = re.compile("[\0\ud800-\udfff]")
_WITH_PORT = re.compile(r"\[([^]]*)\](?::\d*)?|([\d.]+):\d*")
_KEY_PREFIX = re.compile(r"tdb_(?:live|test)_[0-9A-Za-z]{12}")
_MORE = re.compile(r"and (\d{1,9}) more")

Path = tuple["Path", str] | None  # to a value, from the end
Mask = Callable[[str], str]


@dataclass(slots=True)
class _State:
    """What was changed, and how much more a field may hold."""

    notes: dict[str, str] = field(default_factory=dict)
    more: int = 0
    values: int = _VALUES
    characters: int = _CHARACTERS


def sanitize_event(
    values: Mapping[str, object], limits: Mapping[str, int], severities: Collection[str]
) -> dict[str, object]:
    """What an event is constructed of, as it can be stored; `details` say what was changed.

    `limits` are the lengths of the text fields. What makes no event, such as an unknown action,
    stays as it is.
    """
    state = _State()
    made = dict(values)
    for name, value in values.items():
        path = (None, name)
        if value is None:
            continue
        try:
            if name in limits:
                made[name] = _text_field(value, limits[name], path, state)
            elif name in _FIELDS:
                made[name] = _FIELDS[name](value, path, state)
        except Exception:  # noqa: BLE001  # an object may raise whatever is done with it
            made[name] = None
            _note(state, path, type(value).__name__)
    severity = made.get("severity")
    if "severity" in made and not (issubclass(type(severity), str) and severity in severities):
        del made["severity"]
        _note(state, (None, "severity"), f"no severity: {_shown(severity)}")
    if state.notes:
        details = made.get("details")
        details = details if isinstance(details, dict) else {}
        before = details.get(NOTES)
        noted = _merged(before if isinstance(before, dict) else {}, state)
        made["details"] = {**details, NOTES: noted}
    return made


# What is no JSON


def _text_field(
    value: object, limit: int, path: Path, state: _State, mask: Mask = redact_known
) -> str:
    text = _as_text(value)
    if not isinstance(value, str):
        _note(state, path, type(value).__name__)
    return _fitting(text, limit, path, state, mask)


def _uuid(value: object, path: Path, state: _State) -> UUID | None:
    if isinstance(value, UUID):
        return value
    try:
        return UUID(_as_text(value))
    except ValueError:
        _note(state, path, f"no UUID: {_shown(value)}")
        return None


def _milliseconds(value: object, path: Path, state: _State) -> int | None:
    if type(value) is int and 0 <= value < _64_BITS:
        return value
    try:
        number = _number(value)
        if number is not None and 0 <= number < _64_BITS and round(number) < _64_BITS:
            _note(state, path, type(value).__name__)
            return round(number)
    except (ArithmeticError, ValueError):
        pass
    _note(state, path, f"no duration: {_shown(value)}")
    return None


def _number(value: object) -> Decimal | float | None:
    match value:
        case bool():
            return None
        case int() | float() | Decimal():
            return value
        case timedelta():
            return value / timedelta(milliseconds=1)
        case str() if len(value) <= _SHOWN:
            return Decimal(value)
    return None


def _address(value: object, path: Path, state: _State) -> IPv4Address | IPv6Address | None:
    if type(value) is IPv4Address or (type(value) is IPv6Address and value.scope_id is None):
        return value
    text = _as_text(value)[:_LONGEST]
    for part in (text, *text.split(",")):
        port = _WITH_PORT.fullmatch(part.strip())
        bare = (port[1] or port[2] or "") if port else part.strip()
        try:
            # PostgreSQL knows no zones, as in fe80::1%eth0.
            address = parse_address(bare.split("%")[0])
        except ValueError:
            continue
        if part != text or bare != text or "%" in text:
            _note(state, path, f"taken from: {_shown(value)}")
        return address
    _note(state, path, f"no address: {_shown(value)}")
    return None


def _as_text(value: object) -> str:
    """A value where text is wanted; never the `repr` of anything, which may hold a secret."""
    # Not `isinstance`, which asks an object for its class.
    if issubclass(type(value), str):
        return str.__str__(value)  # of an enum's member too
    if type(value) is bytes or type(value) is bytearray:
        return value[:_CHARACTERS].decode(errors="replace")
    made = _json(value, None, 0, _State())
    return json.dumps(made) if isinstance(made, dict | list) else str(made)


def _shown(value: object) -> str:
    return _fitting(_as_text(value), _SHOWN, None, _State())


# JSON


def _json_field(value: object, path: Path, state: _State) -> dict[str, object]:
    state.values, state.characters = _VALUES, _CHARACTERS
    if type(value) is dict and NOTES not in value:
        return _mapping(value.items(), path, 0, state)
    if isinstance(value, dict):
        items = dict(dict.items(value))
        before = items.pop(NOTES, None) if isinstance(items.get(NOTES), dict) else None
        made = _mapping(items.items(), path, 0, state)
        return made if before is None else {**made, NOTES: _merged(before, _State())}
    converted = _json(value, path, 0, state)
    if isinstance(converted, dict):
        return converted
    if isinstance(value, str | int | float | list | tuple):  # else it is noted already
        _note(state, path, type(value).__name__)
    return {"value": converted}


def _json(value: object, path: Path, depth: int, state: _State) -> object:
    """The value as JSON that PostgreSQL stores."""
    state.values -= 1
    kind = type(value)
    if kind is str:
        return _text(value, path, state)  # type: ignore[arg-type]  # which it is
    if value is None or kind is bool or (kind is int and -_64_BITS < value < _64_BITS):  # type: ignore[operator]  # the same
        return value
    try:
        return _converted(value, path, depth, state)
    except Exception:  # noqa: BLE001  # whatever the methods of an unknown object raise
        _note(state, path, kind.__name__)
        return _text(kind.__name__, path, state)


def _converted(value: object, path: Path, depth: int, state: _State) -> object:  # noqa: PLR0911  # one for each kind
    match value:
        case Enum() if not isinstance(value, str):
            _note(state, path, type(value).__name__)
            return _json(value.value, path, depth, state)
        case int() | float():
            return _number_or_text(value, path, state)
        case str():
            return _text(str.__str__(value), path, state)
        case SecretStr() | SecretBytes() | pydantic.Secret():
            return _text(MASK, path, state)
        case dict() | list() | tuple() | Mapping() | set() | frozenset():
            return _container(value, path, depth, state)
    _note(state, path, type(value).__name__)
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json", warnings=False)
    elif is_dataclass(value) and not isinstance(value, type):
        value = {each.name: getattr(value, each.name) for each in fields(value)}
    else:
        return _text(_spelled(value), path, state)
    return _json(value, path, depth, state)


def _number_or_text(value: float, path: Path, state: _State) -> float | str:
    if isinstance(value, float):
        if isfinite(value):
            return float.__float__(value)
        _note(state, path, "float")
        names = {float("inf"): "Infinity", float("-inf"): "-Infinity"}
        return _text(names.get(value, "NaN"), path, state)
    number = int.__int__(value)
    if number.bit_length() <= _BITS:
        return number
    _note(state, path, f"int of {number.bit_length()} bits")
    return _text(hex(number), path, state)


def _container(
    value: Mapping[object, object] | Collection[object], path: Path, depth: int, state: _State
) -> object:
    if depth >= _DEEPEST:
        _note(state, path, f"deeper than {_DEEPEST} levels")
        return _text(_CUT, path, state)
    if isinstance(value, Mapping):
        return _mapping(value.items(), path, depth, state)
    if isinstance(value, set | frozenset):
        _note(state, path, type(value).__name__)
    made: list[object] = []
    for index, item in enumerate(value):
        if _is_full(path, state):
            break
        made.append(_json(item, (path, str(index)), depth + 1, state))
    return made


def _mapping(
    items: Iterable[tuple[object, object]], path: Path, depth: int, state: _State
) -> dict[str, object]:
    made: dict[str, object] = {}
    same: dict[str, int] = {}
    for key, value in items:
        if _is_full(path, state):
            break
        name = key if type(key) is str else _as_text(key)
        stored = _text(name, (path, name), state)
        if stored in made:
            first, number = stored, same.get(stored, 2)
            while (stored := f"{first} ({number})") in made:
                number += 1
            same[first] = number + 1
        if not isinstance(key, str):
            _note(state, (path, stored), f"key: {type(key).__name__}")
        if (is_secret_name(name) or is_secret_name(stored)) and not _tells_nothing(stored, value):
            state.values -= 1
            made[stored] = MASK
        else:
            made[stored] = _json(value, (path, stored), depth + 1, state)
    return made


def _tells_nothing(name: str, value: object) -> bool:
    """Whether it is no secret in spite of its name.

    Such are numbers of tokens, as `max_tokens`, and prefixes of keys, as in `revoked_api_keys`.
    """
    if value is None or value is True or value is False:
        return True
    if type(value) is int and value.bit_length() <= _BITS:
        return name.rstrip(" ()0123456789").lower().endswith("tokens")
    items: Iterable[object] = (value,)
    if issubclass(type(value), list | tuple):  # also one that reports its changes
        items = cast("Iterable[object]", value)
    return all(type(item) is str and _KEY_PREFIX.fullmatch(item) for item in items)


def _is_full(path: Path, state: _State) -> bool:
    if state.values > 0 and state.characters > 0:
        return False
    while path is not None and path[0] is not None:
        path = path[0]
    name = path[1] if path else ""
    limit = f"{_VALUES} values" if state.values <= 0 else f"{_CHARACTERS} characters"
    if limit not in state.notes.get(name, ""):
        while len(state.notes) >= _NOTED:  # it says more than the last one
            state.notes.popitem()
            state.more += 1
        _note(state, path, f"cut to {limit}")
    return True


def _spelled(value: object) -> str:
    """What has a text of its own; of anything else only the kind shows."""
    match value:
        case bytes() | bytearray() | memoryview():
            data = bytes(value)[:_CHARACTERS]
            told = data.decode(errors="replace")
            return MASK if redact_known(told) != told else base64.b64encode(data).decode()
        case datetime() | date() | time():
            return value.isoformat()
        case (
            Decimal() | timedelta() | UUID() | PurePath()
            | IPv4Address() | IPv6Address() | IPv4Network() | IPv6Network()
        ):  # fmt: skip
            return str(value)
        case BaseException():
            return _redacted(f"{type(value).__name__}: {value}"[:_CHARACTERS])
    return type(value).__name__


# Texts


def _text(text: str, path: Path, state: _State) -> str:
    made = _fitting(text, max(min(_LONGEST, state.characters), 1), path, state)
    state.characters -= len(made)
    return made


def _fitting(text: str, limit: int, path: Path, state: _State, mask: Mask = redact_known) -> str:
    """The text as it is stored: masked, then cut."""
    made = text if len(text) <= _CHARACTERS else text[:_CHARACTERS]
    if not made.isascii() or "\0" in made:
        stored = _UNSTORABLE.sub("\ufffd", made)
        if stored != made:
            made = stored
            _note(state, path, "unstorable characters")
    made = mask(made)
    if len(made) <= limit and len(text) <= _CHARACTERS:
        return made
    _note(state, path, f"cut from {len(text)} characters")
    # Not within a mask, or what is left of it would be masked again.
    size, back = limit - 1, 16
    while (cut := made[: max(size, 0)] + _CUT) != mask(cut) and size > 0:
        size, back = limit - 1 - back, back * 2
    return cut


def _redacted(text: str) -> str:
    return redact_aggressively(redact_known(text))


# Notes


def _note(state: _State, path: Path, text: str) -> None:
    if len(state.notes) >= _NOTED:
        state.more += 1
        return
    names: list[str] = []
    while path is not None:
        path, name = path
        names.append(name)
    place = _note_text(".".join(reversed(names)))
    before = state.notes.get(place)
    state.notes[place] = _note_text(text if before in {None, text} else f"{before}; {text}")


def _note_text(text: str) -> str:
    return _fitting(text, _LONGEST_NOTE, None, _State())


def _merged(before: Mapping[object, object], state: _State) -> dict[str, object]:
    """All notes: those of before and the new ones."""
    notes: dict[str, object] = {}
    more = state.more
    for key, value in before.items():
        if key == _CUT and isinstance(value, str) and (told := _MORE.fullmatch(value)):
            more += int(told[1])
        else:
            made = _note_text(value) if isinstance(value, str) else _json(value, None, 0, _State())
            notes[_note_text(_as_text(key))] = made
    notes |= state.notes
    more += max(len(notes) - _NOTED, 0)
    notes = dict(islice(notes.items(), _NOTED))
    return {**notes, _CUT: f"and {more} more"} if more else notes


def _message(value: object, path: Path, state: _State) -> str:
    return _text_field(value, _LONGEST, path, state, _redacted)


_FIELDS: dict[str, Callable[[object, Path, _State], object]] = {
    "tiger_account_id": _uuid,
    "api_key_id": _uuid,
    "ip_address": _address,
    "duration_ms": _milliseconds,
    "error_message": _message,
    "details": _json_field,
    "old_values": _json_field,
    "new_values": _json_field,
    "tags": _json_field,
}
