"""The events and seals as the database has them."""

import contextlib
import re
from collections.abc import AsyncIterator
from typing import TypeAlias

import asyncpg
from sqlalchemy import Enum

from tiger_db.audit.seal_format import FIRST, Seal
from tiger_db.connections import maintenance_engine
from tiger_db.database import Database
from tiger_db.errors import InvalidValue
from tiger_db.migrations.locks import lock_key
from tiger_db.models import AuditLog
from tiger_db.out_of_band import asyncpg_connection

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"
Event: TypeAlias = tuple[int, str]  # its place and its content
# One at a time seals, retires or moves, in each schema.
TAKE_TURN = f"SELECT pg_advisory_xact_lock({lock_key(0x7469676572_01)})"
_SEALS = 50  # read at a time, with their digests
_ROWS = 20_000  # events looked for at a time
_FETCHED = 1000  # events fetched at a time
_ID = re.compile(r'{"id":"([^"]+)"')
_FIRST, _LAST_PLACE = -(2**63), 2**63 - 1  # that a column can hold

# What an event's content is made of, in this order. New columns go to the end: where they are
# empty, the content stays what it was.
CONTENT_COLUMNS = (
    "id", "created_at", "action", "result", "severity", "resource_type", "resource_id", "user_id",
    "user_type", "session_id", "ip_address", "user_agent", "request_method", "request_path",
    "request_id", "tiger_account_id", "api_key_id", "details", "old_values", "new_values",
    "error_code", "error_message", "duration_ms", "tags",
)  # fmt: skip


def _member(name: str) -> str:
    # As JSON text of the database's own making: what it stores is never parsed and printed again,
    # so that no digit of a number is lost. Whoever may create objects in the schema must not be
    # able to capture a call: functions that are polymorphic or variadic are qualified, and
    # operators have operands of exactly their types. to_json() would use a cast of an enum to json.
    value = f"pg_catalog.to_json({name})::text"
    if name == "created_at":  # in UTC, whatever the session's time zone is
        utc = f"pg_catalog.to_json({name} AT TIME ZONE 'UTC')"
        value = f"""'"' || ({utc} #>> '{{}}'::text[]) || 'Z"'"""
    elif isinstance(AuditLog.__table__.c[name].type, Enum):  # type: ignore[attr-defined]  # SQLAlchemy's
        value = f"pg_catalog.to_json(pg_catalog.concat({name}))::text"
    return f"""'{"{" if name == "id" else ","}"{name}":' || {value}"""


# concat() leaves out what is NULL, and so what has no value.
CONTENT = f"pg_catalog.concat({', '.join(map(_member, CONTENT_COLUMNS))}, '}}')"
EVENTS = f"""
SELECT position, {CONTENT} AS content FROM audit_logs
WHERE position BETWEEN $1 AND $2 ORDER BY position, id
"""  # noqa: S608  # names of columns
# Before a transaction sees anything: else it would find what moves meanwhile in neither place.
HOLD = "LOCK TABLE audit_logs IN ACCESS SHARE MODE"
LAST_SEAL = "SELECT statement, signature, digests FROM audit_seals ORDER BY number DESC LIMIT 1"
_NUMBERED = """
SELECT number, statement, signature, digests FROM audit_seals WHERE number > $1
ORDER BY number LIMIT $2
"""
# A transaction that has taken a place holds this lock until what it wrote can be seen.
_WRITERS = """
SELECT DISTINCT virtualtransaction AS id, pid FROM pg_locks
WHERE locktype = 'relation' AND mode = 'RowExclusiveLock' AND pid IS DISTINCT FROM pg_backend_pid()
    AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
    AND (relation = 'audit_logs'::regclass::oid OR relation IN (
        SELECT inhrelid FROM pg_inherits WHERE inhparent = 'audit_logs'::regclass::oid))
"""
_TAKEN = "SELECT CASE WHEN is_called THEN last_value ELSE 0 END FROM audit_logs_position_seq"
assert set(CONTENT_COLUMNS) == {c.name for c in AuditLog.__table__.columns} - {"position"}  # type: ignore[attr-defined]  # SQLAlchemy's


@contextlib.asynccontextmanager
async def connected(database: Database) -> AsyncIterator[Connection]:
    """A connection of its own, without a limit on how long a statement takes.

    Raises:
        DatabaseUnavailable: there is none, or it was lost.
        SchemaMismatch: see `Database.check`.
    """
    await database.check()
    async with (
        maintenance_engine(database.settings) as engine,
        asyncpg_connection(engine) as connection,
    ):
        yield connection


async def last_seal(connection: Connection) -> Seal | None:
    row = await connection.fetchrow(LAST_SEAL)
    return Seal(*row) if row is not None else None


async def seals_after(connection: Connection, number: int, limit: int) -> list[tuple[int, Seal]]:
    return [(row[0], Seal(*row[1:])) for row in await connection.fetch(_NUMBERED, number, limit)]


def extent(seal: Seal) -> tuple[int, int]:
    """The last place that a seal covers, and of how many events; zeros if it is broken."""
    try:
        statement = seal.statement()
    except InvalidValue:
        return 0, 0
    return statement.upto, 0 if statement.retired else statement.rows


async def trail(connection: Connection) -> AsyncIterator[Seal | Event]:
    """All there is, in the order of places: each seal, after it the events that it covers."""
    number, after = 0, _FIRST - 1
    while numbered := await seals_after(connection, number, _SEALS):
        number = numbered[-1][0]
        for seals in _windows([seal for _, seal in numbered]):
            upto = max(after, *(extent(seal)[0] for seal in seals))
            waiting = seals[::-1]
            covered = after
            events = connection.cursor(EVENTS, after + 1, upto, prefetch=_FETCHED)
            async for place, content in events:
                while waiting and place > covered:
                    covered = max(covered, extent(waiting[-1])[0])
                    yield waiting.pop()
                yield place, content
            while waiting:
                yield waiting.pop()
            after = upto
    events = connection.cursor(EVENTS, after + 1, _LAST_PLACE, prefetch=_FETCHED)
    async for place, content in events:
        yield place, content


def _windows(seals: list[Seal]) -> list[list[Seal]]:
    """Seals of about 20,000 events, whose events are asked for at once."""
    windows: list[list[Seal]] = []
    room = 0
    for seal in seals:
        rows = extent(seal)[1]
        if room < rows or not windows:
            windows.append([])
            room = _ROWS
        room -= rows
        windows[-1].append(seal)
    return windows


async def settled(connection: Connection) -> tuple[int, dict[str, int | None]]:
    """The last place that was taken, and who may still write in it or before.

    Those are transactions with their process ids. When all of them have ended, nothing up to the
    place can change any more.
    """
    taken = await connection.fetchval(_TAKEN)
    return taken, {row["id"]: row["pid"] for row in await connection.fetch(_WRITERS)}


def next_number(seal: Seal | None) -> tuple[int, str, int]:
    """The number, the previous digest, and the place after which a new seal starts."""
    if seal is None:
        return 1, FIRST, 0
    statement = seal.statement()
    return statement.number + 1, seal.digest, statement.upto


def event_id(content: str) -> str | None:
    """The id in an event's content; None: there is none."""
    found = _ID.match(content)
    return found[1] if found else None


async def clock(connection: Connection) -> str:
    """The database's time in UTC, to the microsecond."""
    now = await connection.fetchval(
        "SELECT pg_catalog.to_char(clock_timestamp() AT TIME ZONE 'UTC',"
        ' \'YYYY-MM-DD"T"HH24:MI:SS.US"Z"\')'
    )
    return str(now)
