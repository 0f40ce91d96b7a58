"""The members of the content of an event, as the JSON text in which they are sealed."""

import json
import re
from collections.abc import Iterator

from tiger_db.audit.event_content import CONTENT_COLUMNS

# A string, a bracket, or a number, boolean or null, in JSON.
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}]|[^\s"\[\]{},:]+')
_decode = json.JSONDecoder().raw_decode
_MEMBERS = [f'{"," if at else "{"}"{name}":' for at, name in enumerate(CONTENT_COLUMNS)]


def split_members(content: str) -> Iterator[str | None]:
    """Yield the JSON text of each member, in the order of CONTENT_COLUMNS. None is a missing one.

    Numbers have all digits that the database printed.
    """
    at = 0
    for member in _MEMBERS:
        if not content.startswith(member, at):
            yield None
            continue
        start = at + len(member)
        at = _end_of_value(content, start)
        yield content[start:at]


def text_of(value: str | None) -> str | None:
    """Return the text in a JSON string, and other JSON unchanged."""
    if value is None or not value.startswith('"'):
        return value
    if "\\" in value:
        text: str = json.loads(value)
        return text
    return value[1:-1]


def _end_of_value(content: str, start: int) -> int:
    """Return the end of the JSON value at `start`."""
    try:
        return _decode(content, start)[1]
    except (ValueError, RecursionError):
        pass  # Python's parser fails for deeply nested JSON, and for integers of many digits.
    depth = 0
    for token in _TOKEN.finditer(content, start):
        depth += (token[0] in "[{") - (token[0] in "]}")
        if depth == 0:
            return token.end()
    return len(content)
