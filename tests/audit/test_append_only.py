"""Events and seals cannot be changed or deleted, with any privilege in the database."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import UTC, datetime
from uuid import uuid4

import asyncpg
import pytest
from pydantic import SecretStr

from tests.support import factories
from tiger_db import AuditLog, Database, audit, crud
from tiger_db.audit.storage import Connection
from tiger_db.connections import connect
from tiger_db.errors import StatementRefused
from tiger_db.migrations import MONTHS_AHEAD
from tiger_db.signing import generate_signing_key

HINT = "An audit trail that can be changed proves nothing. Whole months leave it by tiger-db"
PUT = """
INSERT INTO {table} (id, action, result, severity)
VALUES (uuid7_floor({time} + make_interval(secs => $1)), 'data:query', 'success', 'low')
RETURNING position
"""
# Of an event in every kind of partition.
TIMES = {
    "month": "date_trunc('month', now(), 'UTC')",
    "later": f"date_trunc('month', now(), 'UTC') + make_interval(months => {MONTHS_AHEAD + 3})",
    "default": "timestamptz '2001-01-01Z'",
}
CHANGES = [
    "UPDATE {table} SET user_id = 'mallory'",
    "UPDATE {table} SET user_id = user_id",
    "UPDATE {table} SET id = gen_random_uuid()",
    "DELETE FROM {table}",
    "TRUNCATE {table}",
    "TRUNCATE {table} CASCADE",
    "WITH gone AS (DELETE FROM {table} RETURNING id) SELECT count(*) FROM gone",
    "WITH changed AS (UPDATE {table} SET user_id = 'mallory' RETURNING *) TABLE changed",
    (
        "INSERT INTO {table} (id, action, result, severity)"
        " SELECT id, action, result, severity FROM {table}"
        " ON CONFLICT (id) DO UPDATE SET user_id = 'mallory'"
    ),
    (
        "MERGE INTO {table} AS t USING {table} AS s ON t.id = s.id"
        " WHEN MATCHED THEN UPDATE SET user_id = 'mallory'"
    ),
    "MERGE INTO {table} AS t USING {table} AS s ON t.id = s.id WHEN MATCHED THEN DELETE",
]
CHANGES_OF_SEALS = [
    "UPDATE audit_seals SET statement = ''",
    "UPDATE audit_seals SET number = number + 1 WHERE false",
    "DELETE FROM audit_seals",
    "TRUNCATE audit_seals",
    "WITH gone AS (DELETE FROM audit_seals RETURNING number) SELECT count(*) FROM gone",
    (
        "INSERT INTO audit_seals SELECT * FROM audit_seals"
        " ON CONFLICT (number) DO UPDATE SET statement = ''"
    ),
    (
        "MERGE INTO audit_seals AS t USING audit_seals AS s ON t.number = s.number"
        " WHEN MATCHED THEN DELETE"
    ),
]


@pytest.fixture
async def sealed(clone: Database) -> AsyncIterator[Database]:
    """With a key that signs, an event in every kind of partition, and a seal of them."""
    key = SecretStr(generate_signing_key())
    settings = clone.settings.model_copy(update={"audit_signing_key": key})
    async with Database(settings) as database, owner(database) as connection:
        await connection.execute(f"SELECT make_audit_months({MONTHS_AHEAD + 3})")
        for time in TIMES.values():
            await connection.execute(PUT.format(table="audit_logs", time=time), 0)
        await audit.seal(database)
        yield database


@asynccontextmanager
async def owner(database: Database) -> AsyncIterator[Connection]:
    connection = await connect(database.settings)
    try:
        yield connection
    finally:
        await connection.close()


@asynccontextmanager
async def everything_granted(database: Database) -> AsyncIterator[Connection]:
    """A connection of a role that owns nothing and has all privileges."""
    role = f"tiger_db_test_{uuid4().hex}"
    async with owner(database) as connection:
        await connection.execute(f"CREATE ROLE {role}")
        try:
            for what in ("TABLES", "SEQUENCES", "FUNCTIONS"):
                await connection.execute(
                    f"GRANT ALL ON ALL {what} IN SCHEMA public TO {role} WITH GRANT OPTION"
                )
            await connection.execute(f"SET ROLE {role}")
            yield connection
        finally:
            await connection.execute("RESET ROLE")
            await connection.execute(f"DROP OWNED BY {role}")
            await connection.execute(f"DROP ROLE {role}")


async def tables(connection: Connection) -> dict[str, str]:
    """The whole trail, and one partition of each kind."""
    names = await connection.fetch(
        "SELECT tableoid::regclass::text FROM audit_logs ORDER BY position"
    )
    found = {"whole": "audit_logs"}
    found |= {kind: name for kind, (name,) in zip(TIMES, names, strict=True)}
    assert found["default"] == "audit_logs_default"
    assert found["month"] == f"audit_logs_{datetime.now(UTC):%Y_%m}"
    assert found["later"] not in {found["month"], found["default"]}
    return found


async def stored(connection: Connection) -> list[str]:
    rows = await connection.fetch(
        "SELECT t::text FROM audit_logs t UNION ALL SELECT t::text FROM audit_seals t ORDER BY 1"
    )
    return [row for (row,) in rows]


async def assert_refused(connection: Connection, sql: str) -> None:
    operation = next(word for word in ("UPDATE", "DELETE", "TRUNCATE") if word in sql)
    with pytest.raises(asyncpg.InsufficientPrivilegeError) as refused:
        await connection.execute(sql)
    told = refused.value.as_dict()
    assert told["sqlstate"] == "42501"
    assert told["hint"].startswith(HINT)
    # Of the table, or of its partition.
    assert told["message"].startswith("audit_"), sql
    assert told["message"].endswith(f"is append-only: {operation} is refused"), sql


@pytest.mark.parametrize("who", [owner, everything_granted])
async def test_statements_that_change_events_are_refused(
    sealed: Database, who: Callable[[Database], AbstractAsyncContextManager[Connection]]
) -> None:
    async with who(sealed) as connection:
        before = await stored(connection)
        for table in (await tables(connection)).values():
            for sql in CHANGES:
                await assert_refused(connection, sql.format(table=table))
        for sql in CHANGES_OF_SEALS:
            await assert_refused(connection, sql)
        assert await stored(connection) == before
    found = await audit.verify(sealed)
    assert (found.findings, found.rows) == ([], len(TIMES))


async def test_no_partition_can_be_truncated(sealed: Database) -> None:
    async with owner(sealed) as connection:
        partitions = await connection.fetch(
            "SELECT inhrelid::regclass::text FROM pg_inherits"
            " WHERE inhparent = 'audit_logs'::regclass"
        )
        assert len(partitions) == MONTHS_AHEAD + 3 + 2
        for (partition,) in partitions:
            await assert_refused(connection, f"TRUNCATE {partition}")


async def changes_its_event(database: Database) -> None:
    async with database.session() as session:
        (event, *_) = await factories.events(session)
        event.user_id = "mallory"


async def deletes_its_event(database: Database) -> None:
    async with database.session() as session:
        (event, *_) = await factories.events(session)
        await session.delete(event)


async def merges_an_event(database: Database) -> None:
    async with database.session() as session:
        (event, *_) = await factories.events(session)
        session.expunge(event)
        await session.merge(AuditLog(id=event.id, action=event.action, user_id="mallory"))


async def changes_what_it_just_wrote(database: Database) -> None:
    async with database.session() as session:
        event = await crud.audit_logs.log_event(session, action=factories.new_event().action)
        event.user_id = "mallory"


@pytest.mark.parametrize(
    "change",
    [changes_its_event, deletes_its_event, merges_an_event, changes_what_it_just_wrote],
)
async def test_sessions_change_no_event(
    sealed: Database, change: Callable[[Database], Awaitable[None]]
) -> None:
    async with owner(sealed) as connection:
        before = await stored(connection)
        with pytest.raises(StatementRefused, match=r"is append-only: (UPDATE|DELETE) is refused"):
            await change(sealed)
        assert await stored(connection) == before


@pytest.mark.slow
@pytest.mark.parametrize("kind", TIMES)
async def test_an_event_inserted_into_a_partition_has_a_position(
    sealed: Database, kind: str
) -> None:
    async with owner(sealed) as connection:
        partition = (await tables(connection))[kind]
        before = datetime.now(UTC)
        sql = PUT.format(table=partition, time=TIMES[kind])
        assert await connection.fetchval(sql, 60) == len(TIMES) + 1
        created_at = await connection.fetchval("SELECT max(created_at) FROM audit_logs")
    assert abs((created_at - before).total_seconds()) < 60
    assert (await audit.seal(sealed)).rows == 1
    found = await audit.verify(sealed)
    assert (found.findings, found.rows) == ([], len(TIMES) + 1)
