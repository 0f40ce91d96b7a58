"""Queries for the audit events and seals in the database."""

import contextlib
import re
from collections import deque
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import TypeAlias

import asyncpg

from tiger_db.audit.seal_format import Seal
from tiger_db.connections import maintenance_engine
from tiger_db.database import Database
from tiger_db.errors import InvalidValue, SchemaMismatch
from tiger_db.migrations.comparison import find_differences
from tiger_db.migrations.locks import DESCRIBE_SESSION, lock_key
from tiger_db.models import metadata
from tiger_db.models.columns import is_native_enum
from tiger_db.out_of_band import asyncpg_connection

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"
Event: TypeAlias = tuple[int, str]  # Pair of an event's position and the event's content.
_EVENTS_PER_QUERY = 20_000  # Approximate number of events that PostgreSQL sorts at once.
_PREFETCHED_SEALS, _PREFETCHED_EVENTS = 50, 1000
_MIN_POSITION, _MAX_POSITION = -(2**63), 2**63 - 1  # range of PostgreSQL's type bigint
_ID = re.compile(r'{"id":"([^"]+)"')

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


def _member(name: str) -> str:
    """Return the SQL expression for one member of an event's JSON object.

    PostgreSQL converts each value to JSON text, which Python does not parse, so that numbers keep
    all digits. The expression never calls functions or operators that other roles created in the
    schema, because functions are qualified with pg_catalog, and the types of operands match
    operators of pg_catalog exactly. An enum is converted to text first: to_json() of an enum would
    use a cast that somebody has created from the enum to json.
    """
    value = f"pg_catalog.to_json({name})::text"
    if name == "created_at":  # the time is printed in UTC, not in the session's time zone
        utc = f"pg_catalog.to_json({name} AT TIME ZONE 'UTC')"
        value = f"""'"' || ({utc} #>> '{{}}'::text[]) || 'Z"'"""
    elif is_native_enum(_COLUMNS[name].type):
        value = f"pg_catalog.to_json(pg_catalog.concat({name}))::text"
    return f"""'{"{" if name == "id" else ","}"{name}":' || {value}"""


# `CONTENT` is an SQL expression that returns the content of an event. The SQL function concat()
# ignores NULL arguments, so the content omits fields that are NULL.
CONTENT = f"pg_catalog.concat({', '.join(map(_member, CONTENT_COLUMNS))}, '}}')"
SELECT_EVENTS = f"""
SELECT position, {CONTENT} AS content FROM audit_logs
WHERE position BETWEEN $1 AND $2 ORDER BY position, id
"""  # noqa: S608  # names of columns
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
)
SELECT name FROM expected LEFT JOIN pg_class ON pg_class.oid = id
WHERE relkind::text IS DISTINCT FROM kind ORDER BY name
"""


@contextlib.asynccontextmanager
async def open_connection(database: Database) -> AsyncIterator[Connection]:
    """Open a database connection without a statement timeout.

    If row security would hide rows of the audit trail, queries on this connection fail.

    Raises:
        DatabaseUnavailable: The database cannot be reached, or the connection was lost.
        SchemaMismatch: The database schema does not match this tiger_db release. See
            `Database.check`. A view or another relation takes the place of a table of the audit
            trail.
    """
    await database.check()
    async with (
        maintenance_engine(database.settings) as engine,
        asyncpg_connection(engine) as connection,
    ):
        await connection.execute("SET row_security = off")
        for (name,) in await connection.fetch(_SELECT_REPLACED_TABLES):
            raise SchemaMismatch(
                f"{name} is not a table of tiger_db, but another relation: run `tiger-db check`"
            )
        yield connection


@contextlib.asynccontextmanager
async def open_snapshot(database: Database) -> AsyncIterator[Connection]:
    """Open a database connection whose queries all use the same snapshot."""
    async with (
        open_connection(database) as connection,
        connection.transaction(isolation="repeatable_read", readonly=True),
    ):
        # The table `audit_logs` is locked before the snapshot is taken. Without the lock, an event
        # that `maintain` moves to another partition could be invisible in both partitions.
        await connection.execute("LOCK TABLE audit_logs IN ACCESS SHARE MODE")
        yield connection


async def fetch_last_seal(connection: Connection) -> Seal | None:
    row = await connection.fetchrow(SELECT_LAST_SEAL)
    return Seal(*row) if row is not None else None


async def read_trail(connection: Connection) -> AsyncIterator[Seal | Event]:
    """Yield all events in order of position, and each seal before the events that it covers."""
    after, seals, count = _MIN_POSITION - 1, deque[tuple[Seal, int]](), 0
    async for row in connection.cursor(SELECT_SEALS, prefetch=_PREFETCHED_SEALS):
        seal = Seal(*row)
        upto, covered = _extent(seal)
        seals.append((seal, upto))
        count += covered
        if count >= _EVENTS_PER_QUERY:
            upto = max(after, *(upto for _, upto in seals))
            async for item in _merge(connection, seals, after, upto):
                yield item
            after, count = upto, 0
    async for item in _merge(connection, seals, after, _MAX_POSITION):
        yield item


async def _merge(
    connection: Connection, seals: deque[tuple[Seal, int]], after: int, upto: int
) -> AsyncIterator[Seal | Event]:
    """Yield the seals, and the events at positions above `after` and up to `upto`.

    Each seal is yielded before the events that the seal covers, and is removed from `seals`.
    """
    covered = after
    events = connection.cursor(SELECT_EVENTS, after + 1, upto, prefetch=_PREFETCHED_EVENTS)
    async for position, content in events:
        while seals and position > covered:
            seal, seal_upto = seals.popleft()
            covered = max(covered, seal_upto)
            yield seal
        yield position, content
    while seals:
        yield seals.popleft()[0]


def _extent(seal: Seal) -> tuple[int, int]:
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


async def describe_lock_holders(connection: Connection) -> str:
    """Describe the sessions that can block a sealer, as far as the role may see them."""
    rows = await connection.fetch(_SELECT_LOCK_HOLDERS)
    return ", ".join(str(description) for (description,) in rows) or "another session"


async def find_weakened_protection(database: Database) -> list[str]:
    """Describe what differs in the protection of the audit trail from the declared schema.

    These are triggers, functions of triggers, row security, rules, and a setting that turns
    triggers off.
    """
    async with maintenance_engine(database.settings) as engine, engine.connect() as connection:
        return [
            difference.description
            for difference in await find_differences(connection)
            if {*difference.tables} <= {"audit_logs", "audit_seals"}
            or difference.description.startswith("session_replication_role")
        ]


def event_id_in(content: str) -> str | None:
    """Return the event id in the content of an event, or None if the content has no id."""
    found = _ID.match(content)
    return found[1] if found else None


async def fetch_clock(connection: Connection) -> datetime:
    now: datetime = await connection.fetchval("SELECT clock_timestamp()")
    return now


async def database_time(connection: Connection) -> str:
    """Return the time of the database's clock in UTC, to the microsecond, in ISO 8601."""
    now = await fetch_clock(connection)
    return now.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
