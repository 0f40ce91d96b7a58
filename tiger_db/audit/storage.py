"""Queries for the audit events and seals in the database."""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from datetime import UTC, datetime, timedelta
from typing import TypeAlias
from uuid import UUID

import asyncpg

from tiger_db.audit.event_content import CONTENT_COLUMNS, Event, render_events
from tiger_db.audit.seal_format import Seal
from tiger_db.connections import maintenance_engine
from tiger_db.database import Database
from tiger_db.errors import DatabaseUnavailable, InvalidValue, SchemaMismatch
from tiger_db.migrations.comparison import SELECT_CHANGED_SEQUENCE, find_differences
from tiger_db.migrations.grants import find_definers
from tiger_db.migrations.locks import DESCRIBE_SESSION, lock_key
from tiger_db.out_of_band import asyncpg_connection

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"
DEFAULT_PATIENCE = timedelta(seconds=10)
_EVENTS_PER_QUERY = 10_000  # Approximate number of events that PostgreSQL sorts at once.
_PREFETCHED_SEALS = 50
_EVENT_COLUMNS = ", ".join(("position", *CONTENT_COLUMNS))
_MIN_POSITION, _MAX_POSITION = -(2**63), 2**63 - 1  # range of PostgreSQL's type bigint

# The session prints times in UTC and in ISO 8601, and reads no rows that row security filters.
SESSION_SETTINGS = (
    "TimeZone = 'UTC'",
    "DateStyle = 'ISO'",
    "row_security = off",
    # Defaults of columns are printed without quotes, as `find_changed_sequence` expects them.
    "quote_all_identifiers = off",
    # Each query sorts about 10,000 events: in memory, and without parallel workers.
    "work_mem = '16MB'",
    "max_parallel_workers_per_gather = 0",
)
# The sealing lock is an advisory lock. A transaction holds the sealing lock while it seals events,
# retires months, or moves events between partitions, so that only one transaction does so at a
# time.
_SEALING_LOCK_ID = lock_key(0x7469676572_01)
TAKE_SEALING_LOCK = f"SELECT pg_advisory_xact_lock({_SEALING_LOCK_ID})"
SELECT_SEALS = "SELECT statement, signature, digests, number FROM audit_seals ORDER BY number"
SELECT_LAST_SEAL = f"{SELECT_SEALS} DESC LIMIT 1"
# A transaction that inserts an event takes a RowExclusiveLock before the event gets a position, and
# holds the lock until the event is visible.
_SELECT_WRITERS = """
SELECT DISTINCT virtualtransaction AS id, pid FROM pg_locks
WHERE locktype = 'relation' AND mode = 'RowExclusiveLock' AND pid IS DISTINCT FROM pg_backend_pid()
    AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
    AND (relation = 'audit_logs'::regclass::oid OR relation IN (
        SELECT inhrelid FROM pg_inherits WHERE inhparent = 'audit_logs'::regclass::oid))
"""
# The sessions that hold the sealing lock or locks on the audit trail, except this session.
_SELECT_LOCK_HOLDERS = f"""
SELECT {DESCRIBE_SESSION} FROM (
    SELECT DISTINCT coalesce(pid, 0) AS pid FROM pg_locks
    WHERE granted AND pid IS DISTINCT FROM pg_backend_pid()
        AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
        AND ((locktype = 'advisory' AND objsubid = 1
            AND (classid::bigint << 32) + objid::bigint = {_SEALING_LOCK_ID})
        OR (locktype = 'relation' AND relation IN (SELECT 'audit_logs'::regclass::oid
            UNION SELECT 'audit_seals'::regclass::oid
            UNION SELECT inhrelid FROM pg_inherits
            WHERE inhparent = 'audit_logs'::regclass::oid)))
) AS holders LEFT JOIN pg_stat_activity USING (pid) ORDER BY pid
"""  # noqa: S608  # constants
_SELECT_LAST_POSITION = (
    "SELECT CASE WHEN is_called THEN last_value ELSE 0 END FROM audit_logs_position_seq"
)


# The relations that take the place of the tables of the audit trail, such as views.
_SELECT_REPLACED_TABLES = """
WITH expected AS (
    SELECT 'audit_logs' AS name, to_regclass('audit_logs')::oid AS id, 'p'::text AS kind
    UNION ALL SELECT 'audit_seals', to_regclass('audit_seals')::oid, 'r'
    UNION ALL SELECT inhrelid::regclass::text, inhrelid, 'r' FROM pg_inherits
    WHERE inhparent = to_regclass('audit_logs')::oid
    UNION ALL SELECT inhrelid::regclass::text, inhrelid, 'no child table' FROM pg_inherits
    WHERE inhparent = to_regclass('audit_seals')::oid
)
SELECT name FROM expected LEFT JOIN pg_class ON pg_class.oid = id
WHERE relkind::text IS DISTINCT FROM kind ORDER BY name
"""
# Columns of other types than those from which contents are rendered without quotes, and a column of
# positions that can be NULL. The text of another type could have the members of other columns.
_SELECT_CHANGED_COLUMNS = """
SELECT attname::text FROM pg_attribute JOIN (VALUES
    ('position', 'int8'), ('created_at', 'timestamptz'), ('duration_ms', 'int8'),
    ('details', 'jsonb'), ('old_values', 'jsonb'), ('new_values', 'jsonb'), ('tags', 'jsonb')
) AS expected (name, type) ON attname = name
WHERE attrelid = to_regclass('audit_logs')::oid
    AND (atttypid <> ('pg_catalog.' || type)::regtype OR name = 'position' AND (NOT attnotnull
        OR EXISTS (SELECT FROM pg_constraint WHERE conrelid = attrelid AND contype = 'n'
            AND attnum = ANY (conkey) AND NOT convalidated)))
ORDER BY attnum
"""


@contextlib.asynccontextmanager
async def open_connection(
    database: Database, *, patience: timedelta = DEFAULT_PATIENCE
) -> AsyncIterator[Connection]:
    """Open a database connection without a statement timeout.

    The connection waits for each lock at most for the duration `patience`. If row security would
    hide rows of the audit trail, queries on this connection fail.

    Raises:
        DatabaseUnavailable: The database cannot be reached, or the connection was lost, or another
            session held a lock for longer than `patience`.
        SchemaMismatch: The database schema does not match this tiger_db release. See
            `Database.check`. A view or another relation takes the place of a table of the audit
            trail.
    """
    await database.check()
    async with (
        maintenance_engine(database.settings) as engine,
        asyncpg_connection(engine) as connection,
    ):
        await connection.execute("".join(f"SET {setting};" for setting in SESSION_SETTINGS))
        milliseconds = max(1, round(patience.total_seconds() * 1000))
        await connection.execute(f"SET lock_timeout = {min(milliseconds, 2**31 - 1)}")
        await check_tables(connection)
        try:
            yield connection
        except asyncpg.LockNotAvailableError:
            holders = await describe_lock_holders(connection)
            raise DatabaseUnavailable(
                f"waited for {patience.total_seconds():g} s for a lock that {holders} holds"
            ) from None


async def check_tables(connection: Connection) -> None:
    """Raise SchemaMismatch if another relation takes the place of a table of the audit trail.

    Raise SchemaMismatch, too, if a column has a type whose values can be mistaken for other values.
    """
    for (name,) in await connection.fetch(_SELECT_REPLACED_TABLES):
        raise SchemaMismatch(
            f"{name} is not a table of tiger_db, but another relation: run `tiger-db check`"
        )
    for (name,) in await connection.fetch(_SELECT_CHANGED_COLUMNS):
        raise SchemaMismatch(
            f"the column {name} of audit_logs was changed to another type, or to allow NULL:"
            " run `tiger-db check`"
        )


@contextlib.asynccontextmanager
async def open_snapshot(database: Database) -> AsyncIterator[Connection]:
    """Open a database connection whose queries all use the same snapshot."""
    async with (
        open_connection(database) as connection,
        connection.transaction(isolation="repeatable_read", readonly=True),
    ):
        # The table `audit_logs` is locked before the snapshot is taken. Without the lock, an event
        # that `maintain` moves to another partition could be invisible in both partitions. While
        # the tables are locked, no other relation can take their place.
        await connection.execute("LOCK TABLE audit_logs, audit_seals IN ACCESS SHARE MODE")
        await check_tables(connection)
        yield connection


async def fetch_last_seal(connection: Connection) -> Seal | None:
    row = await connection.fetchrow(SELECT_LAST_SEAL)
    return Seal(*row) if row is not None else None


def select_events(
    first: int, last: int, *, table: str = "audit_logs", limit: int | None = None
) -> str:
    """Return a query for `read_events`: the events at the positions from `first` to `last`."""
    return (
        f"SELECT {_EVENT_COLUMNS} FROM {table}"  # noqa: S608  # names and integers
        f" WHERE position BETWEEN '{first}'::pg_catalog.int8 AND '{last}'::pg_catalog.int8"
        f" ORDER BY position, id LIMIT {limit or 'ALL'}"
    )


def select_events_of(ids: Iterable[UUID]) -> str:
    """Return a query for `read_events`: the events with the given ids, in the order of ids."""
    array = ",".join(map(str, ids))
    return (
        f"SELECT {_EVENT_COLUMNS} FROM audit_logs"  # noqa: S608  # names and UUIDs
        f" WHERE id = ANY ('{{{array}}}'::pg_catalog.uuid[]) ORDER BY id"
    )


async def read_events(connection: Connection, query: str) -> AsyncGenerator[list[Event], None]:
    """Yield the events of a query, in lists.

    COPY prints each value with the output function of the type. No function, cast or operator that
    somebody has created in the database takes part.
    """
    rest = b""
    async with contextlib.aclosing(_copy(connection, query)) as chunks:
        async for chunk in chunks:
            lines, newline, rest = (rest + chunk).rpartition(b"\n")
            if newline:
                yield render_events(lines.decode().split("\n"))


async def _copy(connection: Connection, query: str) -> AsyncGenerator[bytes, None]:
    """Yield the output of COPY in chunks. The server sends the next chunk in the meantime."""
    chunks = asyncio.Queue[bytes | Exception | None](1)

    async def copy() -> None:
        try:
            await connection.copy_from_query(query, output=chunks.put, encoding="UTF8")
        except Exception as error:  # noqa: BLE001  # the reader of the chunks raises this error
            await chunks.put(error)
        else:
            await chunks.put(None)

    task = asyncio.create_task(copy())
    try:
        while (chunk := await chunks.get()) is not None:
            if isinstance(chunk, Exception):
                raise chunk
            yield chunk
    finally:
        task.cancel()
        await asyncio.wait([task])


async def read_trail(connection: Connection) -> AsyncGenerator[list[Seal | Event], None]:
    """Yield all events in order of position, and each seal before the events that it covers.

    The seals and events are yielded in lists.
    """
    after, seals, count = _MIN_POSITION - 1, deque[tuple[Seal, int]](), 0
    async for row in connection.cursor(SELECT_SEALS, prefetch=_PREFETCHED_SEALS):
        seal = Seal(*row)
        upto, covered = extent_of(seal)
        seals.append((seal, upto))
        count += covered
        if count >= _EVENTS_PER_QUERY:
            upto = max(after, *(upto for _, upto in seals))
            async with contextlib.aclosing(_merge(connection, seals, after, upto)) as batches:
                async for items in batches:
                    yield items
            after, count = upto, 0
    async with contextlib.aclosing(_merge(connection, seals, after, _MAX_POSITION)) as batches:
        async for items in batches:
            yield items


async def _merge(
    connection: Connection, seals: deque[tuple[Seal, int]], after: int, upto: int
) -> AsyncGenerator[list[Seal | Event], None]:
    """Yield the seals, and the events at positions above `after` and up to `upto`.

    Each seal is yielded before the events that the seal covers, and is removed from `seals`.
    """
    covered = after
    query = select_events(after + 1, upto)
    async with contextlib.aclosing(read_events(connection, query)) as batches:
        async for events in batches:
            items: list[Seal | Event] = []
            for event in events:
                while seals and event[0] > covered:
                    seal, seal_upto = seals.popleft()
                    covered = max(covered, seal_upto)
                    items.append(seal)
                items.append(event)
            yield items
    yield [seal for seal, _ in seals]
    seals.clear()


def extent_of(seal: Seal) -> tuple[int, int]:
    """Return a seal's last position and number of events, or zeros if the seal covers no event."""
    try:
        payload = seal.payload()
    except InvalidValue:
        return 0, 0
    return (0, 0) if payload.retired else (payload.upto, payload.event_count)


async def fetch_writers(connection: Connection) -> tuple[int, dict[str, int | None]]:
    """Return the last assigned position, and the open transactions that have written events.

    The returned dict maps virtual transaction ids to process ids, which are None for prepared
    transactions. When all returned transactions have ended, no transaction can add an event at a
    position up to the returned position.
    """
    position = await connection.fetchval(_SELECT_LAST_POSITION)
    return position, {row["id"]: row["pid"] for row in await connection.fetch(_SELECT_WRITERS)}


async def find_changed_sequence(connection: Connection) -> str | None:
    """Return a description of a changed sequence of positions, with its repair, or None.

    The default of the column `position` belongs to the sequence.
    """
    query = SELECT_CHANGED_SEQUENCE.format(
        sequence="'audit_logs_position_seq'", table="'audit_logs'"
    )
    row = await connection.fetchrow(query)
    return None if row is None else f"{row['description']}: {row['repair']}"


async def describe_lock_holders(connection: Connection) -> str:
    """Describe the sessions that can block a sealer, as far as the role may see them."""
    rows = await connection.fetch(_SELECT_LOCK_HOLDERS)
    return ", ".join(str(description) for (description,) in rows) or "another session"


async def find_weakened_protection(database: Database) -> tuple[list[str], list[str]]:
    """Describe what differs in the protection of the audit trail from the declared schema.

    These are triggers, functions of triggers, row security, rules, the sequence of positions, and a
    setting that turns triggers off. The second list has functions, views and rules that run with
    the privileges of the owner, and possibly do not change the audit trail.
    """
    async with maintenance_engine(database.settings) as engine, engine.connect() as connection:
        definers = [found.description for found in await find_definers(connection)]
        return [
            difference.description
            for difference in await find_differences(connection)
            if {*difference.tables} <= {"audit_logs", "audit_seals"}
            or difference.description.startswith("session_replication_role")
        ], definers


async def fetch_clock(connection: Connection) -> datetime:
    now: datetime = await connection.fetchval("SELECT clock_timestamp()")
    return now


async def database_time(connection: Connection) -> str:
    """Return the time of the database's clock in UTC, to the microsecond, in ISO 8601."""
    now = await fetch_clock(connection)
    return now.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
