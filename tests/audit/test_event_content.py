"""The content of events, as it is sealed."""

import json
import random
from collections.abc import Callable
from typing import Any

import pytest

from tests.support.content_in_sql import CONTENT
from tests.support.trail import DROP_CHECKS, stored_events
from tiger_db.audit.event_content import CONTENT_COLUMNS, render_events
from tiger_db.audit.storage import Connection
from tiger_db.errors import InvalidState

ROWS = 3000
LABEL = 'lo"w\\\n\té'
JSON_COLUMNS = ("details", "old_values", "new_values", "tags")
INSERT = f"""
INSERT INTO audit_logs ({", ".join(CONTENT_COLUMNS)})
SELECT {", ".join(f"{name}::jsonb" if name in JSON_COLUMNS else name for name in CONTENT_COLUMNS)}
FROM json_populate_record(NULL::event_texts, $1::json)
"""  # names of columns
TABLE = f"""
CREATE TABLE event_texts AS SELECT {", ".join(CONTENT_COLUMNS)} FROM audit_logs WHERE false;
{"".join(f"ALTER TABLE event_texts ALTER {name} TYPE text;" for name in JSON_COLUMNS)}
"""  # names of columns
TIMES = [
    "2026-02-03 04:05:06+00", "2026-02-03 04:05:06.1+05:45", "2026-02-03 04:05:06.12+00",
    "2026-02-03 04:05:06.123+00", "2026-02-03 04:05:06.0001+00", "2026-02-03 04:05:06.000020+00",
    "2026-02-03 04:05:06.999999+00", "1969-12-31 23:59:59.5+00", "0001-01-01 00:00:00+00",
    "0044-03-15 12:00:00.5+00 BC", "4714-11-24 00:00:00+00 BC", "9999-12-31 23:59:59.999999+00",
    "10000-01-01 00:00:00+00", "294276-12-31 23:59:59.999999+00", "infinity", "-infinity",
    "1700-07-01 12:00:00+00", "2026-07-01 00:00:00+00",
]  # fmt: skip
ADDRESSES = [
    "192.0.2.7", "192.0.2.7/32", "10.0.0.0/8", "10.1.2.3/8", "0.0.0.0/0", "::", "::1",
    "2001:db8::7", "2001:db8::/32", "2001:db8::1/128", "::ffff:192.0.2.7", "fe80::1/64",
]  # fmt: skip
JSON_TEXTS = [
    "null", "true", '""', "[]", "{}", "0", "-0", "-0.0", "1.10", "1e400", "-1E-400", "1e-7",
    "12345678901234567890.1234567890", '{"a":1,"a":2}', '{ "b" : [1 , 2], "a":null }',
    r'{"q\"\\\n\t\u0001/": "\b\f\r \u00e9 \ud83d\ude00"}', '"\\\\N"', r'"\\n"',
    '[[[[{"x": [{}]}]]]]', '{"": {"" : ""}}', '{"z": 1, "aa": 2, "b": 3}', '"\u2028\u2029\x7f"',
]  # fmt: skip
TEXTS = [
    "", " ", "\\", r"\N", r"\\N", r"\n", '"', '"\\"', "\t", "\n", "\r\n", "\b\f\v",
    "\x01\x1f\x7f",
    "\x80\x9f\xa0\u2028\u2029\ufeff\ufffd\uffff", "Zoë 王伟 😀", "a\tb\nc\\d", "null", "{}",
    ",", "'",
    "\x1c\x1d\x1e\x85", "e\u0301", "\U0010ffff",
]  # fmt: skip


def text(chance: random.Random) -> str:
    if chance.random() < 0.6:
        return chance.choice(TEXTS)
    characters = (chance.choice(["\\", '"', "N", chr(chance.randrange(1, 0x20)), "t", "\x7f", "é",
        chr(chance.randrange(0x20, 0xD800)), chr(chance.randrange(0xE000, 0x110000))])
        for _ in range(chance.randrange(12)))  # fmt: skip
    return "".join(characters)


def json_text(chance: random.Random) -> str:
    if chance.random() < 0.5:
        return chance.choice(JSON_TEXTS)
    return json.dumps(some_json(chance), ensure_ascii=chance.random() < 0.5)


def some_json(chance: random.Random, depth: int = 0) -> object:
    makers: list[Callable[[], object]] = [
        lambda: text(chance),
        lambda: chance.uniform(-1, 1) * 10 ** chance.randrange(-300, 300),
        lambda: chance.randrange(-(2**80), 2**80),
        lambda: chance.choice([None, True, False]),
    ]
    if depth < 3:
        makers += [
            lambda: [some_json(chance, depth + 1) for _ in range(chance.randrange(4))],
            lambda: {
                text(chance): some_json(chance, depth + 1) for _ in range(chance.randrange(4))
            },
        ]
    return chance.choice(makers)()


def row(chance: random.Random) -> dict[str, Any]:
    values: dict[str, Any] = {name: text(chance) for name in CONTENT_COLUMNS}
    for name in ("id", "tiger_account_id", "api_key_id"):
        values[name] = f"{chance.getrandbits(128):032x}"
    for name in JSON_COLUMNS:
        values[name] = json_text(chance)
    values["created_at"] = chance.choice(TIMES)
    values["ip_address"] = chance.choice(ADDRESSES)
    values["result"] = chance.choice(["success", "failure", "pending"])
    values["severity"] = chance.choice([LABEL, "high"])
    values["duration_ms"] = chance.choice([0, 42, 2**63 - 1, -(2**63)])
    required = {"id", "created_at", "action", "result", "severity"}
    return {n: v for n, v in values.items() if n in required or chance.random() < 0.7}


@pytest.mark.slow
async def test_contents_are_those_that_earlier_releases_sealed(
    superuser: Connection, chance: random.Random
) -> None:
    await superuser.execute(DROP_CHECKS + TABLE)
    await superuser.execute(f"ALTER TYPE audit_severity RENAME VALUE 'low' TO '{LABEL}'")
    insert = await superuser.prepare(INSERT)
    await insert.executemany([(json.dumps(row(chance)),) for _ in range(ROWS)])
    expected = await superuser.fetch(f"SELECT position, {CONTENT} FROM audit_logs ORDER BY 1")
    found = await stored_events(superuser)
    assert len(found) == ROWS
    for event, wanted in zip(found, expected, strict=True):
        assert event == tuple(wanted)
        assert "\n" not in event[1]
    # An event that is rendered alone has more columns without special characters.
    for event in found[:500]:
        assert await stored_events(superuser, event[0], event[0]) == [event]


@pytest.mark.parametrize(
    "setting",
    ["TimeZone = 'Asia/Kathmandu'", "TimeZone = 'America/Bogota'", "DateStyle = 'SQL'",
     "DateStyle = 'German'", "DateStyle = 'Postgres'", "TimeZone = '-00:30'"],
)  # fmt: skip
async def test_another_form_of_times_is_refused(superuser: Connection, setting: str) -> None:
    """A trigger, for example, could have changed the session."""
    await superuser.execute(
        "INSERT INTO audit_logs (id, action, result, severity)"
        " VALUES (gen_random_uuid(), 'data:query', 'success', 'low')"
    )
    await superuser.execute(f"SET {setting}")
    with pytest.raises(InvalidState, match="does not print times in UTC"):
        assert await stored_events(superuser)


def test_a_line_with_other_columns_is_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        render_events(["1\tx"])
