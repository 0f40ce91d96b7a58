"""A migrated database per xdist worker; a rollback per test, or a clone where commits matter."""

import json
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from uuid import uuid4

import pytest
import pytest_asyncio
from sqlalchemy import event

from tests import servers
from tiger_db import Database
from tiger_db.database import AsyncSession, connect, migration_engine
from tiger_db.migrations import upgrade
from tiger_db.settings import Settings

_server: servers.Server | None = None


def pytest_configure(config: pytest.Config) -> None:
    # A run in the background ignores Ctrl-C, and so would the programs that it starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    global _server  # noqa: PLW0603  # one server a run, of which pytest hands nothing around
    for name in (
        "API_KEY_PEPPERS", "AUDIT_RETENTION_MONTHS", "AUDIT_SIGNING_KEY", "DATABASE_URL",
        "ENCRYPTION_KEYS", "ENVIRONMENT", "TIGER_DB_HOME",
    ):  # fmt: skip
        os.environ.pop(name, None)
    for name in [name for name in os.environ if name.startswith("DB_")]:
        del os.environ[name]
    if servers.CHOSEN not in os.environ:  # else a worker of xdist
        _server = servers.choose()
        if _server.kind != servers.GIVEN:
            servers.forget_crashes(_server)
        os.environ[servers.CHOSEN] = json.dumps(
            {"url": _server.url, "what": f"{_server.kind}, PostgreSQL {servers.version(_server)}"}
        )


def pytest_unconfigure(config: pytest.Config) -> None:
    if _server is not None:
        _server.stop()
        del os.environ[servers.CHOSEN]


def pytest_report_header(config: pytest.Config) -> str:
    return f"server: {json.loads(os.environ[servers.CHOSEN])['what']}"


@pytest.fixture(scope="session")
def server_url() -> str:
    """The server the run is on, as a URL without a database."""
    return str(json.loads(os.environ[servers.CHOSEN])["url"])


async def create_database(server_url: str, name: str, template: str | None = None) -> Settings:
    connection = await connect(servers.settings_for(server_url, "postgres"))
    try:
        await connection.execute(
            f'CREATE DATABASE "{name}"' + (f' TEMPLATE "{template}"' if template else "")
        )
    finally:
        await connection.close()
    return servers.settings_for(server_url, name)


async def drop_database(server_url: str, name: str) -> None:
    connection = await connect(servers.settings_for(server_url, "postgres"))
    try:
        await connection.execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')
    finally:
        await connection.close()


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def template(server_url: str) -> AsyncIterator[str]:
    """The name of a migrated database that nobody is connected to."""
    name = f"tiger_db_template_{uuid4().hex[:12]}"
    settings = await create_database(server_url, name)
    async with migration_engine(settings) as engine:
        await upgrade(engine)
    yield name
    await drop_database(server_url, name)


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def settings(server_url: str, template: str) -> AsyncIterator[Settings]:
    """A migrated database that no test commits to."""
    name = f"tiger_db_test_{uuid4().hex[:12]}"
    yield await create_database(server_url, name, template)
    await drop_database(server_url, name)


@pytest.fixture
async def database(settings: Settings) -> AsyncIterator[Database]:
    async with Database(settings) as database:
        await database.check()
        yield database


@pytest.fixture
async def session(database: Database) -> AsyncIterator[AsyncSession]:
    """A session whose commits are undone after the test."""
    async with database.engine.connect() as connection:
        transaction = await connection.begin()
        async with database.sessions(
            bind=connection,
            join_transaction_mode="create_savepoint",
            info={"write_behind": None},  # which would not see what this one makes
        ) as session:
            yield session
        await transaction.rollback()


@pytest.fixture
async def empty_database(server_url: str) -> AsyncIterator[Settings]:
    """A database without a schema, for this test alone."""
    name = f"tiger_db_empty_{uuid4().hex[:12]}"
    yield await create_database(server_url, name)
    await drop_database(server_url, name)


@pytest.fixture
async def clone_settings(server_url: str, template: str) -> AsyncIterator[Settings]:
    """A migrated database for this test alone."""
    name = f"tiger_db_clone_{uuid4().hex[:12]}"
    yield await create_database(server_url, name, template)
    await drop_database(server_url, name)


@pytest.fixture
async def clone(clone_settings: Settings) -> AsyncIterator[Database]:
    """A database for this test alone: for commits, several connections, several processes."""
    async with Database(clone_settings) as database:
        await database.check()
        yield database


@contextmanager
def recorded(database: Database) -> Iterator[list[str]]:
    """The statements that are sent meanwhile, transaction control left out."""
    statements: list[str] = []

    def record(connection: object, cursor: object, statement: str, *rest: object) -> None:
        statements.append(statement)

    engine = database.engine.sync_engine
    event.listen(engine, "before_cursor_execute", record)
    try:
        yield statements
    finally:
        event.remove(engine, "before_cursor_execute", record)
