"""Exports of the audit trail as JSON Lines or CSV, and checkpoints (exports of the newest seal)."""

import csv
import io
import json
import re
from collections.abc import AsyncGenerator, Iterable, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Literal, Unpack
from uuid import UUID

from sqlalchemy import ColumnElement, Select, select, text
from sqlalchemy.exc import SQLAlchemyError
from sqlmodel import col

from tiger_db.audit import storage
from tiger_db.audit.checkpoints import checkpoint_text
from tiger_db.audit.event_content import CONTENT_COLUMNS, Event
from tiger_db.audit.seal_format import Seal, seal_from_json, seal_to_json
from tiger_db.crud.audit_logs.queries import EventFilters, event_conditions
from tiger_db.database import Database
from tiger_db.errors import InvalidValue, NotFound
from tiger_db.models import AuditLog
from tiger_db.public import Progress, no_progress, public
from tiger_db.sqlstates import raw_errors, typed

CSV_COLUMNS = ("position", *CONTENT_COLUMNS)
_POSITION = re.compile(r'\{"position":(-?\d{1,19}),')
_BATCH_EVENTS = 1000  # number of events in each batch of an export
_BYTE_ORDER_MARK = "\ufeff"
_FORMULA_PREFIXES = ("=", "+", "-", "@", "\t", "\r")
# A string, a bracket, or a number, boolean or null, in JSON.
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}]|[^\s"\[\]{},:]+')


@public
def export(
    database: Database,
    *,
    form: Literal["jsonl", "csv"] = "jsonl",
    byte_order_mark: bool = False,
    progress: Progress = no_progress,
    **filters: Unpack[EventFilters],
) -> AsyncGenerator[str, None]:
    """Return a generator of lines of text, one for each event that matches the filters.

    In JSON Lines, each event is a JSON object with the event's position and the event's fields that
    are not NULL. Without filters, the export has all events in the order of positions, and
    a seal (`{"seal": …}`) precedes the events that the seal covers. `verify_export` can verify only
    an export without filters. An export with filters has no seals, and starts with
    the oldest event.

    In CSV, the first line has the names of the columns. A cell that a spreadsheet would evaluate as
    a formula gets a leading apostrophe. If `byte_order_mark` is true, the first line begins with
    U+FEFF. Without this character, Excel reads a UTF-8 file in another encoding.

    The memory use of `export` does not depend on the number of events. After each batch of events,
    `export` calls `progress` with two arguments: the number of events that `export` has yielded so
    far, and None.

    Raises:
        InvalidValue: an argument is not valid (see `crud.audit_logs.search`), or `byte_order_mark`
            is true and `form` is not csv. The call of `export` raises InvalidValue, before the
            generator yields the first line.
    """
    if byte_order_mark and form != "csv":
        raise InvalidValue("byte_order_mark requires the form csv: JSON must not begin with U+FEFF")
    conditions = event_conditions(**filters)
    items = _matching_events(database, conditions) if conditions else _whole_trail(database)
    header = _csv_line(CSV_COLUMNS) if form == "csv" else ""
    return _lines(items, form, _BYTE_ORDER_MARK + header if byte_order_mark else header, progress)


async def _lines(
    items: AsyncGenerator[Seal | Event, None], form: str, header: str, progress: Progress
) -> AsyncGenerator[str, None]:
    if header:
        yield header
    count = 0
    # If the caller stops before the last line, aclosing() ends the database transaction.
    async with aclosing(items):
        async for item in items:
            if isinstance(item, Seal):
                if form == "jsonl":
                    yield json.dumps({"seal": seal_to_json(item)}) + "\n"
                continue
            position, content = item
            if form == "csv":
                yield _csv_line([position, *_cells(content)])
            else:
                yield f'{{"position":{position},{content[1:]}\n'
            count += 1
            if count % _BATCH_EVENTS == 0:
                progress(count, None)
    progress(count, None)


async def _whole_trail(database: Database) -> AsyncGenerator[Seal | Event, None]:
    async with storage.open_snapshot(database) as connection:
        async for item in storage.read_trail(connection):
            yield item


async def _matching_events(
    database: Database, conditions: list[ColumnElement[bool]]
) -> AsyncGenerator[Seal | Event, None]:
    statement: Select[UUID] = (
        select(col(AuditLog.id))
        .where(*conditions)
        .order_by(col(AuditLog.id))
        .execution_options(yield_per=_BATCH_EVENTS)
    )
    async with database.session() as session:
        try:
            for setting in storage.SESSION_SETTINGS:
                await session.execute(text(f"SET LOCAL {setting}"))
            connection = await (await session.connection()).get_raw_connection()
            assert connection.driver_connection is not None
            async for ids in (await session.stream_scalars(statement)).partitions():
                query = storage.select_events_of(ids)
                with raw_errors():
                    async for event in storage.read_events(connection.driver_connection, query):
                        yield event
        except SQLAlchemyError as error:
            raise typed(error) from None


def _cells(content: str) -> Iterator[str | None]:
    """Yield the CSV cells of an event. Each number has all digits that the database printed."""
    at = 0
    for name in CONTENT_COLUMNS:
        member = f'{"{" if name == "id" else ","}"{name}":'
        if not content.startswith(member, at):
            yield None
            continue
        start = at + len(member)
        at = _end_of_value(content, start)
        text = content[start:at]
        if text.startswith('"'):
            text = json.loads(text)
        yield f"'{text}" if text.startswith(_FORMULA_PREFIXES) else text


def _end_of_value(content: str, start: int) -> int:
    """Return the end of the JSON value at `start`. Python's parser fails for deeply nested JSON."""
    depth = 0
    for token in _TOKEN.finditer(content, start):
        depth += (token[0] in "[{") - (token[0] in "]}")
        if depth == 0:
            return token.end()
    return len(content)


def _csv_line(cells: Iterable[object]) -> str:
    line = io.StringIO()
    csv.writer(line).writerow(cells)
    return line.getvalue()


def read_export(path: Path) -> Iterator[tuple[Seal | Event, int]]:
    """Yield the seals and events of an export in JSON Lines, with the size of each line in bytes.

    Raises:
        InvalidValue: A line of the file is neither a seal nor an event. The message of InvalidValue
            contains the number of the invalid line.
    """
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                text = line.decode().rstrip("\r\n")
                if text.startswith('{"seal":'):
                    yield seal_from_json(json.loads(text)["seal"]), len(line)
                    continue
                position = _POSITION.match(text)
            except (ValueError, RecursionError, InvalidValue):
                position = None
            if position is None:
                raise InvalidValue(
                    f"line {number} of the export is neither an event nor a seal:"
                    " the file is damaged, or is not an export in JSON Lines"
                )
            yield (int(position[1]), "{" + text[position.end() :]), len(line)


@public
async def export_checkpoint(database: Database) -> str:
    """Return a checkpoint, which is the payload and the signature of the newest seal, as JSON.

    Raises:
        NotFound: The audit trail has no seal yet.
    """
    async with storage.open_connection(database) as connection:
        seal = await storage.fetch_last_seal(connection)
    if seal is None:
        raise NotFound("the audit trail has no seal yet: run `tiger-db seal-audit`")
    return checkpoint_text(seal)
