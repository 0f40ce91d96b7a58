"""Slow queries are logged without their parameters."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from sqlalchemy import text

from tiger_db import Database, Settings
from tiger_db.errors import QueryTimeout

SECRET = "hunter2-never-shown"


@asynccontextmanager
async def opened(settings: Settings, **changes: object) -> AsyncIterator[Database]:
    async with Database(settings.model_copy(update=changes)) as database:
        await database.check()
        yield database


def logged(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "tiger_db"]


@pytest.mark.slow
async def test_a_slow_query_is_logged_without_its_parameters(
    clone_settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    async with opened(clone_settings, db_slow_query_seconds=0.1) as database:
        async with database.session() as session:
            await session.execute(
                text("SELECT pg_sleep(:seconds),\n :secret"), {"seconds": 0.2, "secret": SECRET}
            )
            await session.execute(text("SELECT 1"))
        async with database.out_of_band.connection() as plain:
            await plain.fetchval("SELECT pg_sleep($1), $2::text", 0.2, SECRET)
        many = text("SELECT pg_sleep(0.2), CAST(:secret AS text)")
        async with database.session() as session:
            await session.execute(many, [{"secret": SECRET}, {"secret": SECRET}])
    lines = logged(caplog)
    assert [line.partition(" s: ")[2] for line in lines] == [
        "SELECT pg_sleep($1), $2",
        "SELECT pg_sleep($1), $2::text",
        "SELECT pg_sleep(0.2), CAST($1 AS text)",
    ]
    assert all(0.2 <= float(line.split()[2]) < 10 for line in lines)
    assert SECRET not in caplog.text


async def test_each_method_of_a_raw_connection_logs_its_slow_query(
    clone_settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    async with opened(clone_settings) as database, database.out_of_band.connection() as plain:
        plain.slow_query_seconds = 0
        caplog.clear()
        await plain.execute("SELECT 1")
        await plain.execute("SELECT $1::text", SECRET)
        await plain.executemany("SELECT 1, $1::text", [(SECRET,)])
        await plain.fetch("SELECT 2, $1::text", SECRET)
        await plain.fetchmany("SELECT 3, $1::text", [(SECRET,)])
        await plain.fetchrow("SELECT 4, $1::text", SECRET)
        await plain.fetchval("SELECT 5, $1::text", SECRET)
        lines = logged(caplog)
    assert [line.partition(" s: ")[2] for line in lines] == [
        "SELECT 1",
        "SELECT $1::text",
        *(f"SELECT {n}, $1::text" for n in range(1, 6)),
    ]
    assert SECRET not in caplog.text


async def test_a_query_that_reaches_the_time_limit_is_logged(
    clone_settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    async with opened(clone_settings, db_slow_query_seconds=0.1, db_query_timeout=0.2) as database:
        with pytest.raises(QueryTimeout):
            async with database.session() as session:
                await session.execute(text("SELECT pg_sleep(60) /* " + "x" * 1000 + " */"))
    (line,) = logged(caplog)
    assert "SELECT pg_sleep(60)" in line
    assert line.endswith("xxx...")
    assert len(line) < 700


async def test_no_query_is_logged_when_the_threshold_is_zero(
    clone_settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    async with (
        opened(clone_settings, db_slow_query_seconds=0) as database,
        database.session() as session,
    ):
        await session.execute(text("SELECT pg_sleep(0.1)"))
    assert logged(caplog) == []
