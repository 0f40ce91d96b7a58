"""Exports of the audit trail as JSON Lines or CSV, and checkpoints (exports of the newest seal)."""

import csv
import io
import json
import re
from collections.abc import AsyncGenerator, Iterable, Iterator
from contextlib import AsyncExitStack, aclosing
from pathlib import Path
from typing import Literal, Unpack
from uuid import UUID

from sqlalchemy import ARRAY, BigInteger, ColumnElement, Select, Text, bindparam, select, text
from sqlalchemy.exc import SQLAlchemyError
from sqlmodel import col

from tiger_db.audit import storage
from tiger_db.audit.archive_reading import merge_archived_events, read_archived_events
from tiger_db.audit.archiving import open_configured
from tiger_db.audit.checkpoints import checkpoint_text
from tiger_db.audit.event_content import CONTENT_COLUMNS, Event
from tiger_db.audit.event_members import split_members, text_of
from tiger_db.audit.seal_format import Seal, seal_from_json, seal_to_json
from tiger_db.crud.audit_logs.queries import EventFilters, event_conditions
from tiger_db.database import Database
from tiger_db.errors import InvalidState, InvalidValue, NotFound
from tiger_db.models import AuditLog, metadata
from tiger_db.public import Progress, no_progress, public
from tiger_db.sqlstates import raw_errors, typed

_TABLE = metadata.tables["audit_logs"]
CSV_COLUMNS = ("position", *CONTENT_COLUMNS)
_POSITION = re.compile(r'\{"position":(0|-?[1-9][0-9]{0,18}),')
_BATCH_EVENTS = 1000  # number of events in each batch of an export
_BYTE_ORDER_MARK = "\ufeff"
_FORMULA_PREFIXES = ("=", "+", "-", "@", "\t", "\r")


@public
def export(
    database: Database,
    *,
    form: Literal["jsonl", "csv"] = "jsonl",
    byte_order_mark: bool = False,
    archive: bool = False,
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

    If `archive` is true, the export includes the retired events in `AUDIT_ARCHIVE`. An export
    without filters has them at their positions. An export with filters starts with them, in the
    order of positions. PostgreSQL applies the filters to these events, too.

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
    if conditions:
        items = _matching_events(database, conditions, archive=archive)
    else:
        items = _whole_trail(database, archive=archive)
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


async def _whole_trail(database: Database, *, archive: bool) -> AsyncGenerator[Seal | Event, None]:
    files = await open_configured(database) if archive else None
    async with (
        storage.open_snapshot(database) as connection,
        aclosing(storage.read_trail(connection)) as trail,
    ):
        items = sealed = (item async for batch in trail for item in batch)
        if files is not None:
            items = merge_archived_events(sealed, read_archived_events(connection, files))
        async with aclosing(sealed), aclosing(items):
            async for item in items:
                yield item


async def _matching_events(
    database: Database, conditions: list[ColumnElement[bool]], *, archive: bool
) -> AsyncGenerator[Seal | Event, None]:
    statement: Select[UUID] = (
        select(col(AuditLog.id))
        .where(*conditions)
        .order_by(col(AuditLog.id))
        .execution_options(yield_per=_BATCH_EVENTS)
    )
    async with AsyncExitStack() as stack:
        if archive:
            files = await open_configured(database)
            # No month can be retired before the end of this snapshot, which locks `audit_logs`.
            connection = await stack.enter_async_context(storage.open_snapshot(database))
            async for batch in read_archived_events(connection, files):
                for event in await _filter_archived(database, batch, conditions):
                    yield event
        session = await stack.enter_async_context(database.session())
        try:
            for setting in storage.SESSION_SETTINGS:
                await session.execute(text(f"SET LOCAL {setting}"))
            connection = await (await session.connection()).get_raw_connection()
            assert connection.driver_connection is not None
            await storage.check_tables(connection.driver_connection)
            async for ids in (await session.stream_scalars(statement)).partitions():
                query = storage.select_events_of(ids)
                with raw_errors():
                    async for events in storage.read_events(connection.driver_connection, query):
                        for event in events:
                            yield event
        except SQLAlchemyError as error:
            raise typed(error) from None


# A common table expression that takes the place of the table `audit_logs` in a statement. The
# member `created_at` is left out: no filter reads it, and its form is not always that of a time.
_ARCHIVED_ROWS = """
SELECT (jsonb_populate_record(NULL::audit_logs,
    content::jsonb - 'created_at' || jsonb_build_object('position', position))).*
FROM unnest(CAST(:positions AS bigint[]), CAST(:contents AS text[])) AS archived (position, content)
"""


async def _filter_archived(
    database: Database, events: list[Event], conditions: list[ColumnElement[bool]]
) -> list[Event]:
    """Return the archived events that match the conditions, which PostgreSQL evaluates."""
    positions, contents = zip(*events, strict=True)
    rows = text(_ARCHIVED_ROWS).bindparams(
        bindparam("positions", [*positions], ARRAY(BigInteger)),
        bindparam("contents", [*contents], ARRAY(Text)),
    )
    shadow = rows.columns(*_TABLE.columns).cte(_TABLE.name)
    async with database.session() as session:
        statement = select(col(AuditLog.position)).where(*conditions).add_cte(shadow)
        found = {*await session.scalars(statement)}
    return [event for event in events if event[0] in found]


def _cells(content: str) -> Iterator[str | None]:
    """Yield the CSV cells of an event. Each number has all digits that the database printed."""
    for member in split_members(content):
        text = text_of(member)
        yield f"'{text}" if text is not None and text.startswith(_FORMULA_PREFIXES) else text


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
        InvalidState: The payload of the newest seal is invalid.
    """
    async with storage.open_connection(database) as connection:
        seal = await storage.fetch_last_seal(connection)
    if seal is None:
        raise NotFound("the audit trail has no seal yet: run `tiger-db seal-audit`")
    try:
        seal.payload()
    except InvalidValue as error:
        reason = f"the newest seal has the number {seal.row_number}: {error}"
        raise InvalidState(f"{reason}: run `tiger-db verify-audit`") from None
    return checkpoint_text(seal)
