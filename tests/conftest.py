"""The server of the run; a session that is rolled back, and databases where commits matter."""

import gc
import json
import os
import signal
from collections.abc import AsyncIterator
from uuid import uuid4

import hypothesis
import pytest

from tests.support import databases, known_types, servers
from tests.support.contexts import context_without_out_of_band
from tests.support.databases import DatabasePool
from tiger_db import Database, redaction
from tiger_db.database import AsyncSession
from tiger_db.settings import Settings

_server: servers.Server | None = None
# How long an example takes depends on the machine.
hypothesis.settings.register_profile(
    "tiger_db", deadline=None, max_examples=1000 if os.environ.get("TIGER_DB_SOAK") else 25
)
hypothesis.settings.load_profile("tiger_db")
known_types.remember()


def pytest_configure(config: pytest.Config) -> None:
    # A run in the background ignores Ctrl-C, and so would the programs that it starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    global _server  # noqa: PLW0603  # one server a run, of which pytest hands nothing around
    for name in (
        "ACCOUNT_FAILING_AFTER", "ACCOUNT_FAILING_FOR", "ACCOUNT_SUSPEND_AFTER",
        "API_KEY_PEPPERS", "AUDIT_RETENTION_MONTHS", "AUDIT_SIGNING_KEY", "DATABASE_URL",
        "ENCRYPTION_KEYS", "ENVIRONMENT", "TIGER_DB_HOME",
    ):  # fmt: skip
        os.environ.pop(name, None)
    for name in [name for name in os.environ if name.startswith("DB_")]:
        del os.environ[name]
    if servers.CHOSEN not in os.environ:  # else a worker of xdist
        _server = servers.choose()
        if _server.kind != servers.GIVEN:
            servers.make_fast(_server)
        os.environ[servers.CHOSEN] = json.dumps(
            {"url": _server.url, "what": f"{_server.kind}, PostgreSQL {servers.version(_server)}"}
        )


def pytest_collection_finish() -> None:
    # Thousands of collected tests stay to the end: no collection needs to look at them again.
    gc.collect()
    gc.freeze()


def pytest_unconfigure(config: pytest.Config) -> None:
    if _server is not None:
        _server.stop()
        del os.environ[servers.CHOSEN]


def pytest_report_header(config: pytest.Config) -> str:
    return f"server: {json.loads(os.environ[servers.CHOSEN])['what']}"


@pytest.fixture(autouse=True)
def _no_known_secrets() -> None:
    """Forget the secrets of earlier tests, so that this test's texts are not masked by chance."""
    redaction._known_secrets.clear()


@pytest.fixture(scope="session")
def server_url() -> str:
    """The server the run is on, as a URL without a database."""
    return str(json.loads(os.environ[servers.CHOSEN])["url"])


@pytest.fixture(scope="session")
async def template(server_url: str) -> AsyncIterator[str]:
    """The name of a migrated database that nobody is connected to."""
    async with databases.migrated(server_url) as name:
        yield name


@pytest.fixture(scope="session")
async def settings(server_url: str, template: str) -> AsyncIterator[Settings]:
    """A migrated database that no test commits to."""
    name = f"tiger_db_test_{uuid4().hex[:12]}"
    yield await databases.create(server_url, name, template)
    await databases.drop(server_url, name)


@pytest.fixture(scope="session")
async def database(settings: Settings) -> AsyncIterator[Database]:
    """The Database of this process that no test commits to."""
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
            info=context_without_out_of_band(database.info),  # it would not see what this one makes
        ) as session:
            yield session
        await transaction.rollback()


@pytest.fixture
async def empty_database(server_url: str) -> AsyncIterator[Settings]:
    """A database without a schema, for this test alone."""
    name = f"tiger_db_empty_{uuid4().hex[:12]}"
    yield await databases.create(server_url, name)
    await databases.drop(server_url, name)


@pytest.fixture(scope="session")
async def database_pool(server_url: str, template: str) -> AsyncIterator[DatabasePool]:
    pool = DatabasePool(server_url, template)
    yield pool
    await pool.close()


@pytest.fixture
async def _pooled(
    request: pytest.FixtureRequest, database_pool: DatabasePool
) -> AsyncIterator[Database]:
    async with database_pool.database(
        connected="clone" in request.fixturenames,
        schema_changes=request.node.get_closest_marker("schema_changes") is not None,
    ) as database:
        yield database


@pytest.fixture
def clone_settings(_pooled: Database) -> Settings:
    """A migrated database for this test alone, which nobody is connected to yet."""
    return _pooled.settings


@pytest.fixture
async def clone(_pooled: Database) -> Database:
    """A database for this test alone: for commits, several connections, several processes."""
    await _pooled.check()
    return _pooled
