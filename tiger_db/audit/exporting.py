"""Writes the audit trail out, of any size: for other programs, for spreadsheets, as evidence."""

import csv
import io
import json
import re
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Literal, Unpack

from sqlalchemy import ColumnElement, Select, Text, literal_column, select
from sqlmodel import col

from tiger_db.audit.seal_format import Seal, from_json, to_json
from tiger_db.audit.storage import (
    CONTENT,
    CONTENT_COLUMNS,
    HOLD,
    Event,
    connected,
    last_seal,
    trail,
)
from tiger_db.crud.audit_logs import Criteria, conditions
from tiger_db.database import Database
from tiger_db.errors import InvalidValue, NotFound
from tiger_db.models import AuditLog

_PLACE = re.compile(r'\{"position":(-?\d{1,19}),')
_BATCH = 1000  # events fetched at a time
_FORMULA = ("=", "+", "-", "@", "\t", "\r")
_JSON = json.JSONDecoder()
HEADINGS = ("position", *CONTENT_COLUMNS)


async def export(
    database: Database,
    *,
    form: Literal["jsonl", "csv"] = "jsonl",
    advance: Callable[[int], None] = lambda events: None,  # noqa: ARG005  # told how many came
    **wanted: Unpack[Criteria],
) -> AsyncGenerator[str, None]:
    """The events that `crud.audit_logs.search` finds by the same criteria, as lines of text.

    As JSON Lines, an event is an object with its place and the fields that it has. Without criteria
    they come in the order of their places, each seal (`{"seal": …}`) before the events that it
    covers: that is all that `verify_export` needs. With criteria, they come oldest first.

    As CSV, the first line names the columns, JSON stands as text, and text that a spreadsheet would
    take for a formula has an apostrophe before it. Memory is the same for any number of events.

    Raises:
        InvalidValue: as `search`.
    """
    found = conditions(**wanted)
    lines = _filtered(database, found) if found else _all(database)
    if form == "csv":
        yield _csv_line(HEADINGS)
    count = 0
    async with aclosing(lines):  # and its transaction, also when the caller has seen enough
        async for line in lines:
            if isinstance(line, Seal):
                if form == "jsonl":
                    yield json.dumps({"seal": to_json(line)}) + "\n"
                continue
            place, content = line
            yield _csv_event(place, content) if form == "csv" else _json_event(place, content)
            count += 1
            if count % _BATCH == 0:
                advance(_BATCH)
    advance(count % _BATCH)


async def _all(database: Database) -> AsyncGenerator[Seal | Event, None]:
    async with (
        connected(database) as connection,
        connection.transaction(isolation="repeatable_read", readonly=True),
    ):
        await connection.execute(HOLD)
        async for item in trail(connection):
            yield item


async def _filtered(
    database: Database, found: list[ColumnElement[bool]]
) -> AsyncGenerator[Seal | Event, None]:
    statement: Select[int | None, str] = (
        select(col(AuditLog.position), literal_column(CONTENT, type_=Text()))
        .where(*found)
        .order_by(col(AuditLog.id))
        .execution_options(yield_per=_BATCH)
    )
    async with database.session() as session:
        async for place, content in await session.stream(statement):
            yield place or 0, content  # never NULL


def _json_event(place: int, content: str) -> str:
    return f'{{"position":{place},{content[1:]}\n'


def _csv_event(place: int, content: str) -> str:
    return _csv_line([place, *_cells(content)])


def _cells(content: str) -> Iterator[str | None]:
    """What is no text stays as the database wrote it: no digit of a number is lost."""
    at = 0
    for name in CONTENT_COLUMNS:
        member = f'{"{" if name == "id" else ","}"{name}":'
        if not content.startswith(member, at):
            yield None
            continue
        start = at + len(member)
        value, at = _JSON.raw_decode(content, start)
        text = value if isinstance(value, str) else content[start:at]
        yield f"'{text}" if text.startswith(_FORMULA) else text


def _csv_line(cells: Iterable[object]) -> str:
    line = io.StringIO()
    csv.writer(line).writerow(cells)
    return line.getvalue()


async def export_checkpoint(database: Database) -> str:
    """The newest seal's statement and signature, as JSON, to be kept where nobody can change it.

    It stands for everything that is sealed until now: see `verify`.

    Raises:
        NotFound: nothing is sealed yet.
    """
    async with connected(database) as connection:
        head = await last_seal(connection)
    if head is None:
        raise NotFound("nothing is sealed yet: run `tiger-db seal-audit`")
    fields = to_json(head)
    del fields["digests"]
    return json.dumps(fields, indent=2) + "\n"


def read_checkpoint(text: str) -> Seal:
    """A checkpoint as `export_checkpoint` made it.

    Raises:
        InvalidValue: it is not one.
    """
    try:
        return from_json(json.loads(text))
    except (ValueError, RecursionError, InvalidValue):
        raise InvalidValue("not a checkpoint of an audit trail") from None


def read_lines(path: Path) -> Iterator[tuple[Seal | Event, int]]:
    """The seals and events of an export as JSON Lines, with the bytes that each takes.

    Raises:
        InvalidValue: a line is neither; it says which.
    """
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                text = line.decode().rstrip("\r\n")
                if text.startswith('{"seal":'):
                    yield from_json(json.loads(text)["seal"]), len(line)
                    continue
                place = _PLACE.match(text)
            except (ValueError, RecursionError, InvalidValue):
                place = None
            if place is None:
                raise InvalidValue(f"line {number} is neither an event nor a seal")
            yield (int(place[1]), "{" + text[place.end() :]), len(line)
