"""The content of an event: one line of JSON, whose digest is sealed. This module uses no database.

The content is rendered from the row of the event in the text format of COPY, which has the output
of each column's type. Casts, functions and operators that somebody has created in the database do
not change this output. The form of the content is specified in docs/audit-format.md.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from json.encoder import encode_basestring
from typing import TypeAlias

from sqlalchemy import BigInteger
from sqlalchemy.dialects.postgresql import JSONB

from tiger_db.errors import InvalidState
from tiger_db.models import metadata

Event: TypeAlias = tuple[int, str]  # Pair of an event's position and the event's content.

# The content of an event has the columns in CONTENT_COLUMNS, in the same order. New columns must be
# appended at the end, so that the digests of older events, whose new columns are NULL, stay the
# same.
CONTENT_COLUMNS = (
    "id", "created_at", "action", "result", "severity", "resource_type", "resource_id", "user_id",
    "user_type", "session_id", "ip_address", "user_agent", "request_method", "request_path",
    "request_id", "tiger_account_id", "api_key_id", "details", "old_values", "new_values",
    "error_code", "error_message", "duration_ms", "tags",
)  # fmt: skip
_COLUMNS = metadata.tables["audit_logs"].columns
assert set(CONTENT_COLUMNS) == {*_COLUMNS.keys()} - {"position"}
_ID = re.compile(r'{"id":"([^"]+)"')
_NULL = r"\N"
_ESCAPE = re.compile(r"\\(.)")
_ESCAPED_CHARACTERS = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v"}


def _render_time(text: str) -> str:
    """Render the output of `timestamptz` in ISO 8601. The session's time zone must be UTC."""
    time, offset, era = text.partition("+00")
    if text in ("infinity", "-infinity"):
        era = ""
    elif not offset or era not in ("", " BC"):
        raise InvalidState("the session does not print times in UTC: something has changed it")
    return f'"{time.replace(" ", "T", 1)}{era}Z"'


def _unescape(text: str) -> str:
    if "\\" not in text:
        return text
    return _ESCAPE.sub(lambda found: _ESCAPED_CHARACTERS.get(found[1], found[1]), text)


def _renderer(name: str) -> Callable[[str], str]:
    if name == "created_at":
        return _render_time
    # The output of the types jsonb and bigint is JSON already, and is never parsed.
    return str if isinstance(_COLUMNS[name].type, JSONB | BigInteger) else encode_basestring


_MEMBERS = [(f',"{name}":', _renderer(name)) for name in CONTENT_COLUMNS]


def render_events(lines: Iterable[str]) -> list[Event]:
    """Return the events in lines of COPY, each of which has `position` and then CONTENT_COLUMNS.

    Raises:
        InvalidState: The time zone or the date style of the session is another one.
    """
    positions, *columns = zip(*(line.split("\t") for line in lines), strict=True)
    form, members = "", list[Sequence[str]]()
    for (name, render), column in zip(_MEMBERS, columns, strict=True):
        text = " ".join(column)
        if (
            render is encode_basestring
            and text.isprintable()
            and '"' not in text
            and "\\" not in text
        ):
            # Most columns of texts have only values that are the same in JSON.
            form += f'{name}"%s"'
            members.append(column)
        elif {*column} != {_NULL}:
            form += "%s"
            members.append(["" if v == _NULL else name + render(_unescape(v)) for v in column])
    contents = [f"{{{(form % event)[1:]}}}" for event in zip(*members, strict=True)]
    return [*zip(map(int, positions), contents, strict=True)]


def event_id_in(content: str) -> str | None:
    """Return the event id in the content of an event, or None if the content has no id."""
    found = _ID.match(content)
    return found[1] if found else None
