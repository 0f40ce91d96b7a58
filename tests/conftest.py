"""Fixtures of all tests. The server and the databases are those of `tiger_db.testing`."""

import gc
import os
import signal
from collections.abc import AsyncIterator, Iterator
from uuid import uuid4

import hypothesis
import pytest
from anyio.from_thread import BlockingPortal

from tests.support import known_types
from tests.support.servers import OPTIONS, settings_for
from tiger_db import Database, redaction
from tiger_db.database import AsyncSession
from tiger_db.settings import Settings
from tiger_db.testing import databases
from tiger_db.testing.databases import PooledDatabase, rolled_back_session

# How long an example takes depends on the machine.
hypothesis.settings.register_profile(
    "tiger_db", deadline=None, max_examples=1000 if os.environ.get("TIGER_DB_SOAK") else 25
)
hypothesis.settings.load_profile("tiger_db")
known_types.remember()


def pytest_configure(config: pytest.Config) -> None:
    # A run in the background ignores Ctrl-C, and so would the programs that it starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in (
        "ACCOUNT_FAILING_AFTER", "ACCOUNT_FAILING_FOR", "ACCOUNT_SUSPEND_AFTER",
        "API_KEY_PEPPERS", "AUDIT_RETENTION_MONTHS", "AUDIT_SIGNING_KEY", "DATABASE_URL",
        "ENCRYPTION_KEYS", "ENVIRONMENT", "TIGER_DB_HOME",
    ):  # fmt: skip
        os.environ.pop(name, None)
    for name in [name for name in os.environ if name.startswith("DB_")]:
        del os.environ[name]


def pytest_collection_finish() -> None:
    # Thousands of collected tests stay to the end: no collection needs to look at them again.
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiger_options() -> dict[str, object]:
    return OPTIONS


@pytest.fixture
def tiger_settings(_tiger_pooled: PooledDatabase) -> Settings:
    """Settings of a database for this test alone, without environment variables."""
    return _tiger_pooled.settings


@pytest.fixture(autouse=True)
def _no_known_secrets() -> None:
    """Forget the secrets of earlier tests, so that this test's texts are not masked by chance."""
    redaction._known_secrets.clear()


@pytest.fixture(scope="session")
def server_url(tiger_server_url: str) -> str:
    """The server the run is on, as a URL without a database."""
    return tiger_server_url


@pytest.fixture(scope="session")
def template(tiger_template: Settings) -> str:
    """The name of a migrated database that nobody is connected to."""
    return tiger_template.database


@pytest.fixture(scope="session")
def settings(server_url: str, template: str, _tiger_portal: BlockingPortal) -> Iterator[Settings]:
    """A migrated database that no test commits to."""
    name = f"tiger_db_test_{uuid4().hex[:12]}"
    _tiger_portal.call(databases.create, server_url, name, template)
    yield settings_for(server_url, name)
    _tiger_portal.call(databases.drop, server_url, name)


@pytest.fixture(scope="session")
async def database(settings: Settings) -> AsyncIterator[Database]:
    """The Database of this process that no test commits to."""
    async with Database(settings) as database:
        await database.check()
        yield database


@pytest.fixture
async def session(database: Database) -> AsyncIterator[AsyncSession]:
    """A session whose commits are undone after the test."""
    async with rolled_back_session(database) as session:
        yield session


@pytest.fixture
def empty_database(server_url: str, _tiger_portal: BlockingPortal) -> Iterator[Settings]:
    """A database without a schema, for this test alone."""
    name = f"tiger_db_empty_{uuid4().hex[:12]}"
    _tiger_portal.call(databases.create, server_url, name)
    yield settings_for(server_url, name)
    _tiger_portal.call(databases.drop, server_url, name)


@pytest.fixture
def clone_settings(tiger_settings: Settings) -> Settings:
    """A migrated database for this test alone, which nobody is connected to yet."""
    return tiger_settings


@pytest.fixture
async def clone(tiger_database: Database) -> Database:
    """A database for this test alone: for commits, several connections, several processes."""
    await tiger_database.check()
    return tiger_database
