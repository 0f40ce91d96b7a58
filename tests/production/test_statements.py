"""Who sent a statement, and which were slow."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import unquote
from uuid import uuid4

import pytest
from sqlalchemy import text

from tests.support import factories
from tiger_db import AuditAction, AuditLog, Database, Settings, crud
from tiger_db.connections.sql_logging import commented
from tiger_db.database import AsyncSession
from tiger_db.errors import QueryTimeout

SECRET = "hunter2-never-shown"


@asynccontextmanager
async def opened(settings: Settings, **changes: object) -> AsyncIterator[Database]:
    async with Database(settings.model_copy(update=changes)) as database:
        await database.check()
        yield database


# Comments


@pytest.fixture
async def telling(clone_settings: Settings) -> AsyncIterator[Database]:
    async with opened(clone_settings, db_sql_comments=True) as database:
        yield database


async def sent(session: AsyncSession) -> set[str]:
    """What the connections of the database have sent last, as the server has it."""
    statement = "SELECT query FROM pg_stat_activity WHERE datname = current_database()"
    return set(await session.scalars(text(statement)))


async def comment_of(observer: Database, pid: int) -> str:
    async with observer.session() as session:
        query = await session.scalar(
            text("SELECT query FROM pg_stat_activity WHERE pid = :pid"), {"pid": pid}
        )
    return str(query)[str(query).rindex("/*") :]


async def test_the_server_sees_who_sends_a_statement(telling: Database, clone: Database) -> None:
    async def seen(session: AsyncSession) -> str:
        connection = await (await session.connection()).get_raw_connection()
        assert connection.driver_connection is not None
        return await comment_of(clone, connection.driver_connection.get_server_pid())

    def by(function: str) -> str:
        return f"/*application='tiger_db',function='{function}'*/"

    async with telling.session() as session:
        await crud.accounts.get(session, uuid4())
        assert await seen(session) == by("crud.accounts.reading.get")
        await crud.token_status.get_latest_status(session, uuid4())
        assert await seen(session) == by("crud.token_status.reading.get_latest_status")
        await crud.token_status.claim_due(session, worker="w")  # too long for pg_stat_activity
        prepared = await session.scalars(text("SELECT statement FROM pg_prepared_statements"))
        named = by("crud.token_status.claims.claim_due")
        assert any(statement.endswith(named) for statement in prepared)
        await session.execute(text("SELECT 1"))
        here = f"{__name__}.test_the_server_sees_who_sends_a_statement"
        assert await seen(session) == by(here)

        async def nested() -> None:
            await session.execute(text("SELECT 2"))

        await nested()
        assert await seen(session) == by(f"{here}.%3Clocals%3E.nested")
    async with telling.out_of_band.connection() as plain:
        await plain.fetchval("SELECT $1::int", 1)
        assert await comment_of(clone, plain.get_server_pid()) == by(here)


async def test_comments_are_off_unless_wanted(clone: Database) -> None:
    async with clone.session() as session:
        assert not any("/*" in query for query in await sent(session))


async def test_what_callers_pass_is_in_no_comment(telling: Database, clone: Database) -> None:
    async with telling.session() as session:
        await crud.accounts.get_by_account_number(session, "*/ DROP TABLE x; --'")
        async with clone.session() as other:
            assert not any("DROP TABLE" in query for query in await sent(other))
    code = "def f(commented): return commented('SELECT 1')"
    scope: dict[str, object] = {"__name__": "a'b*/c"}
    exec(code, scope)  # a module of an unheard-of name
    made = scope["f"](commented)  # type: ignore[operator]  # it is a function
    assert made == "SELECT 1/*application='tiger_db',function='a%27b%2A%2Fc.f'*/"
    assert unquote(made).count("a'b*/c.f") == 1
    assert commented(made) == made, "one is enough"


async def test_everything_works_with_comments(telling: Database) -> None:
    async with telling.session() as session:
        account = await factories.account(session)
        key, raw_key = await factories.api_key(session, tiger_account_id=account.id)
        events = [AuditLog(action=AuditAction.DATA_QUERY) for _ in range(3)]
        await crud.audit_logs.log_events(session, events)
    async with telling.session() as session:
        found = await crud.api_keys.authorize_api_key(session, raw_key)
        assert found.id == key.id
        assert len(await crud.audit_logs.search(session)) >= 5
    async with telling.session() as session:  # many at once
        await session.execute(
            text("INSERT INTO api_key_limits VALUES (:id, now(), 1, now(), 1)"),
            [{"id": key.id}],
        )
    counted = "SELECT count(*) FROM pg_prepared_statements"
    async with telling.session() as session:
        await crud.accounts.get(session, account.id)
        before = await session.scalar(text(counted))
        for _ in range(20):
            await crud.accounts.get(session, account.id)
        assert await session.scalar(text(counted)) == before, "one a function, however often"


# Slow statements


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "tiger_db"]


@pytest.mark.slow
async def test_a_slow_statement_is_logged_without_its_parameters(
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
    here = f"{__name__}.test_a_slow_statement_is_logged_without_its_parameters"
    lines = told(caplog)
    assert [line.partition(" s, ")[2] for line in lines] == [
        f"from {here}: SELECT pg_sleep($1), $2",
        f"from {here}: SELECT pg_sleep($1), $2::text",
        f"from {here}: SELECT pg_sleep(0.2), CAST($1 AS text)",
    ]
    assert all(0.2 <= float(line.split()[2]) < 10 for line in lines)
    assert SECRET not in caplog.text


async def test_what_runs_into_the_time_limit_is_slow_too(
    clone_settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    async with opened(clone_settings, db_slow_query_seconds=0.1, db_query_timeout=0.2) as database:
        with pytest.raises(QueryTimeout):
            async with database.session() as session:
                await session.execute(text("SELECT pg_sleep(60) /* " + "x" * 1000 + " */"))
    (line,) = told(caplog)
    assert "SELECT pg_sleep(60)" in line
    assert line.endswith("xxx...")
    assert len(line) < 700


async def test_nothing_is_slow_where_nothing_is_to_be(
    clone_settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    async with (
        opened(clone_settings, db_slow_query_seconds=0) as database,
        database.session() as session,
    ):
        await session.execute(text("SELECT pg_sleep(0.1)"))
    assert told(caplog) == []
