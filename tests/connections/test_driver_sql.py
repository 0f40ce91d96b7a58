"""Statements on the driver's cursor behave like those that SQLAlchemy executes."""

import asyncio
import logging
from collections.abc import AsyncIterator

import pytest
from sqlalchemy import event, text

from tests.support.recording import recorded
from tests.support.sql import sql
from tiger_db import Database
from tiger_db.crud.common import fetch_rows
from tiger_db.database import AsyncSession
from tiger_db.errors import AlreadyExists, Conflict, DatabaseUnavailable, InvalidValue, QueryTimeout

_ADD = "INSERT INTO things (id, name) VALUES ($1, $2) RETURNING name"
_NAMES = "SELECT * FROM things ORDER BY id"


@pytest.fixture
async def database(clone: Database) -> AsyncIterator[Database]:
    """A Database with one connection, and a table `things`."""
    await sql(clone.settings, "CREATE TABLE things (id int PRIMARY KEY, name text NOT NULL)")
    settings = clone.settings.model_copy(
        update={"db_pool_size": 1, "db_max_overflow": 0, "db_pool_timeout": 3}
    )
    async with Database(settings) as database:
        yield database


async def names(session: AsyncSession) -> list[str]:
    return [name for _, name, *_ in await fetch_rows(session, _NAMES)]


async def pid(session: AsyncSession) -> int:
    ((number,),) = await fetch_rows(session, "SELECT pg_backend_pid()")
    return int(number)


async def test_the_statement_is_a_part_of_the_transaction(database: Database) -> None:
    with pytest.raises(ZeroDivisionError):
        async with database.session() as session:
            await fetch_rows(session, _ADD, 1, "lost")
            _ = 1 / 0
    async with database.session() as session:
        assert [tuple(row) for row in await fetch_rows(session, _ADD, 1, "a")] == [("a",)]
        savepoint = await session.begin_nested()
        await fetch_rows(session, _ADD, 2, "lost")
        await savepoint.rollback()
        assert await fetch_rows(session, "DELETE FROM things WHERE id = 3") == []
    async with database.session() as session:
        assert await names(session) == ["a"]


async def test_a_readonly_session_writes_nothing(database: Database) -> None:
    with pytest.raises(Exception, match="a readonly session cannot write"):
        async with database.session(readonly=True) as session:
            await fetch_rows(session, _ADD, 1, "lost")


async def test_a_refused_value_has_a_typed_error_and_a_savepoint_survives(
    database: Database,
) -> None:
    async with database.session() as session:
        await fetch_rows(session, _ADD, 1, "a")
        for values, error in (((1, "b"), AlreadyExists), ((2, None), InvalidValue)):
            savepoint = await session.begin_nested()
            with pytest.raises(error):
                await fetch_rows(session, _ADD, *values)
            await savepoint.rollback()
    async with database.session() as session:
        assert await names(session) == ["a"]


async def test_a_lost_connection_is_replaced(database: Database) -> None:
    with pytest.raises(DatabaseUnavailable, match=r"the connection to .* was lost"):
        async with database.session() as session:
            await fetch_rows(session, "SELECT pg_terminate_backend(pg_backend_pid())")
    async with database.session() as session:
        assert await names(session) == []


async def test_a_cancelled_statement_ends_its_connection(database: Database) -> None:
    started = asyncio.Event()
    pids = []

    async def sleep() -> None:
        async with database.session() as session:
            pids.append(await pid(session))
            started.set()
            await fetch_rows(session, "SELECT pg_sleep(60)")

    task = asyncio.create_task(sleep())
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    async with database.session() as session:
        assert await pid(session) not in pids


async def test_a_statement_is_prepared_again_after_a_change_of_the_schema(
    database: Database,
) -> None:
    async with database.session() as session:
        await fetch_rows(session, _ADD, 1, "a")
        assert await names(session) == ["a"]
    await sql(database.settings, "ALTER TABLE things ADD color text, ALTER name TYPE varchar(9)")
    with pytest.raises(Conflict, match="the schema of the database was changed"):
        async with database.session() as session:
            await names(session)
    async with database.session() as session:
        assert await names(session) == ["a"]


async def test_a_statement_after_the_end_of_an_outer_transaction_begins_another(
    database: Database,
) -> None:
    async with database.engine.connect() as connection:
        outer = await connection.begin()
        session = AsyncSession(connection, info=database.info)
        await session.connection()
        await outer.rollback()  # the session does not know
        await fetch_rows(session, _ADD, 1, "a")
        await connection.commit()
    async with database.session() as session:
        assert await names(session) == ["a"]


@pytest.mark.slow
async def test_a_slow_statement_is_logged_once(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    changes = {"db_slow_query_seconds": 0.1, "db_query_timeout": 0.3}
    async with Database(database.settings.model_copy(update=changes)) as slow:
        async with slow.session() as session:
            await fetch_rows(session, "SELECT pg_sleep(0.2), $1::text", "hunter2")
        with pytest.raises(QueryTimeout):
            async with slow.session() as session:
                await fetch_rows(session, "SELECT pg_sleep(60)")
    lines = [each.getMessage() for each in caplog.records if each.name == "tiger_db"]
    assert [line.partition(" s: ")[2] for line in lines] == [
        "SELECT pg_sleep(0.2), $1::text",
        "SELECT pg_sleep(60)",
    ]
    assert "hunter2" not in caplog.text


async def test_a_traced_statement_is_seen_by_the_listeners_of_sqlalchemy(
    database: Database,
) -> None:
    async with database.session() as session:
        with recorded(database) as statements:
            await fetch_rows(session, _ADD, 1, "a")
        await fetch_rows(session, _ADD, 2, "b")
        connection = (await session.connection()).sync_connection
        event.listen(connection, "after_cursor_execute", lambda *given: statements.append(given[2]))
        assert await names(session) == ["a", "b"]
    assert statements == [_ADD, _NAMES]


async def test_a_log_of_all_statements_shows_it_without_its_values(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "sqlalchemy.engine"):
        async with database.session() as session:
            await session.execute(text("SELECT 1"))
            await fetch_rows(session, _ADD, 1, "hunter2")
    assert _ADD in caplog.text
    assert "hunter2" not in caplog.text
