"""The pool of databases: what a test leaves, the next one does not find."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from typing import TypeAlias

import pytest
from anyio.from_thread import BlockingPortal

from tests.support import factories
from tests.support.servers import OPTIONS, settings_for
from tiger_db import Database, Settings
from tiger_db.connections import connect
from tiger_db.testing import databases
from tiger_db.testing.databases import Connection, DatabasePool

Work: TypeAlias = Callable[[Connection], Awaitable[object]]
After: TypeAlias = Callable[[Work], tuple[bool, Settings]]


@pytest.fixture(scope="module")
def own_pool(
    server_url: str, template: str, _tiger_portal: BlockingPortal
) -> Iterator[DatabasePool]:
    """A pool whose template has tables of an application."""
    name = f"tiger_db_own_{template[-12:]}"

    async def create() -> None:
        await databases.create(server_url, name, template)
        connection = await connect(settings_for(server_url, name))
        await connection.execute("""
            CREATE TABLE notes (
                id bigserial PRIMARY KEY, account uuid REFERENCES tiger_accounts, text text
            );
            CREATE SCHEMA shop;
            CREATE TABLE shop.currencies (id serial PRIMARY KEY, code text);
            INSERT INTO shop.currencies (code) VALUES ('USD'), ('SGD');
        """)
        await connection.close()

    _tiger_portal.call(create)
    pool = DatabasePool(_tiger_portal, server_url, name, OPTIONS)
    yield pool
    pool.close()
    _tiger_portal.call(databases.drop, server_url, name)


@pytest.fixture
def portal(_tiger_portal: BlockingPortal) -> BlockingPortal:
    return _tiger_portal


@pytest.fixture
def after(own_pool: DatabasePool, _tiger_portal: BlockingPortal) -> After:
    """Return whether a database is used again after some work, and the next database."""

    async def connected(settings: Settings, work: Work) -> None:
        connection = await connect(settings)
        try:
            await work(connection)
        finally:
            await connection.close()

    def after(work: Work) -> tuple[bool, Settings]:
        pooled = own_pool.take(connected=False)
        _tiger_portal.call(connected, pooled.settings, work)
        own_pool.give_back(pooled)
        following = own_pool.take(connected=False)
        own_pool.give_back(following)
        return following is pooled, following.settings

    return after


async def value(settings: Settings, query: str) -> object:
    connection = await connect(settings)
    try:
        return await connection.fetchval(query)
    finally:
        await connection.close()


@pytest.mark.slow
async def test_rows_and_sequences_are_as_in_the_template(after: After) -> None:
    async def work(connection: Connection) -> None:
        for _ in range(2):
            await connection.execute("INSERT INTO notes (text) VALUES ('x')")
        await connection.fetchval("SELECT nextval('shop.currencies_id_seq')")
        await connection.execute("SELECT pg_notify('x', '')")
        await connection.execute(
            "INSERT INTO audit_logs (id, action, result, severity)"
            " VALUES (uuid7_floor(now()), 'system:startup', 'success', 'low')"
        )

    reused, settings = await asyncio.to_thread(after, work)
    assert reused
    assert await value(settings, "SELECT count(*) FROM notes") == 0
    assert await value(settings, "SELECT count(*) FROM audit_logs") == 0
    assert await value(settings, "SELECT nextval('notes_id_seq')") == 1
    assert await value(settings, "SELECT nextval('shop.currencies_id_seq')") == 3
    assert await value(settings, "SELECT count(*) FROM shop.currencies") == 2
    assert await value(settings, "SELECT count(*) FROM tiger_db_alembic_version") == 1


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE shop.currencies SET code = 'EUR' WHERE id = 1",
        "DELETE FROM shop.currencies WHERE id = 1",
        "DROP TABLE notes",
        "DROP TABLE shop.currencies",
        "CREATE INDEX ON notes (text)",
        "ALTER TABLE notes DISABLE TRIGGER ALL",
        "CREATE TABLE new ()",
    ],
)
async def test_a_changed_schema_or_a_changed_row_of_the_template_is_dropped(
    after: After, change: str
) -> None:
    reused, settings = await asyncio.to_thread(after, lambda c: c.execute(change))
    assert not reused
    assert await value(settings, "SELECT string_agg(code, ',') FROM shop.currencies") == "USD,SGD"
    assert await value(settings, "SELECT count(*) FROM notes") == 0
    assert await value(settings, "SELECT to_regclass('new') IS NULL")


async def test_a_database_that_a_test_drops_is_replaced(
    own_pool: DatabasePool, server_url: str
) -> None:
    pooled = await asyncio.to_thread(own_pool.take, connected=False)
    await databases.drop(server_url, pooled.settings.database)
    await asyncio.to_thread(own_pool.give_back, pooled)
    following = await asyncio.to_thread(own_pool.take, connected=False)
    assert await value(following.settings, "SELECT count(*) FROM notes") == 0
    await asyncio.to_thread(own_pool.give_back, following)


async def test_a_connection_that_a_test_leaves_is_ended(own_pool: DatabasePool) -> None:
    pooled = await asyncio.to_thread(own_pool.take, connected=False)
    left = await connect(pooled.settings)
    await left.execute("BEGIN")
    await left.execute("INSERT INTO notes (text) VALUES ('locks the table')")
    await asyncio.to_thread(own_pool.give_back, pooled)
    assert left.is_closed()
    assert await value(pooled.settings, "SELECT count(*) FROM notes") == 0


async def test_a_session_that_a_test_leaves_open_does_not_stop_the_next(
    own_pool: DatabasePool,
) -> None:
    pooled = await asyncio.to_thread(own_pool.take, connected=False)
    async with Database(pooled.settings) as database:
        session = database.sessions()
        await factories.account(session)
        await asyncio.to_thread(own_pool.give_back, pooled)
        following = await asyncio.to_thread(own_pool.take, connected=False)
        assert await value(following.settings, "SELECT count(*) FROM tiger_accounts") == 0
        await asyncio.to_thread(own_pool.give_back, following)
        await session.invalidate()


async def test_databases_of_a_role_that_cannot_turn_off_triggers_are_not_used_again(
    server_url: str, template: str, portal: BlockingPortal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(databases, "_MAY_EMPTY", "SELECT false")
    pool = DatabasePool(portal, server_url, template, OPTIONS)
    first = await asyncio.to_thread(pool.take, connected=False)
    await asyncio.to_thread(pool.give_back, first)
    second = await asyncio.to_thread(pool.take, connected=False)
    assert second.settings.database != first.settings.database
    await asyncio.to_thread(pool.give_back, second)
    missing = f"SELECT count(*) FROM pg_database WHERE datname = '{second.settings.database}'"
    assert await value(settings_for(server_url, "postgres"), missing) == 0
