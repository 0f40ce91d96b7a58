"""The pytest plugin. Fixtures import what they need when a test uses them."""

import os
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, cast
from uuid import uuid4

import pytest

if TYPE_CHECKING:
    from anyio.from_thread import BlockingPortal

    from tiger_db.database import AsyncSession, Database
    from tiger_db.settings import Settings
    from tiger_db.testing.broker import FakeBroker
    from tiger_db.testing.databases import DatabasePool, PooledDatabase

# The folder of the run in which its processes share one server. It is made when it is needed.
_FOLDER = pytest.StashKey[Path]()
_DESCRIPTION = pytest.StashKey[str]()
_WORKER_INPUT = "tiger_db_folder"


def pytest_configure(config: pytest.Config) -> None:
    given = getattr(config, "workerinput", {}).get(_WORKER_INPUT)  # of pytest-xdist
    config.stash[_FOLDER] = Path(given or f"{tempfile.gettempdir()}/tiger-db-{uuid4().hex}")
    if config.pluginmanager.has_plugin("asyncio"):
        import pytest_asyncio  # noqa: PLC0415  # it is imported already

        if int(pytest_asyncio.__version__.split(".")[0]) >= 1:
            from tiger_db.testing import asyncio_fixtures  # noqa: PLC0415

            config.pluginmanager.register(asyncio_fixtures, "tiger_db_asyncio")


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: object) -> None:
    """Hand the folder to a worker of pytest-xdist."""
    config: pytest.Config = node.config  # type: ignore[attr-defined]  # xdist has no types
    node.workerinput[_WORKER_INPUT] = str(config.stash[_FOLDER])  # type: ignore[attr-defined]


def _stop_server(config: pytest.Config) -> None:
    folder = config.stash.get(_FOLDER, None)
    if folder is not None and folder.exists() and not hasattr(config, "workerinput"):
        from tiger_db.testing.servers import stop_shared  # noqa: PLC0415

        if description := stop_shared(folder):
            config.stash[_DESCRIPTION] = description


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    _stop_server(config)
    if description := config.stash.get(_DESCRIPTION, None):
        terminalreporter.write_line(f"tiger_db: {description}")


def pytest_unconfigure(config: pytest.Config) -> None:
    _stop_server(config)  # also if there is no summary


@pytest.fixture(scope="session")
def tiger_options() -> dict[str, object]:
    """Fields of `Settings` for all test databases. Override this fixture to set some."""
    return {}


@pytest.fixture(scope="session")
def tiger_server_url(pytestconfig: pytest.Config) -> str:
    """The URL of the server of the run, without a database, or with one to connect to."""
    from tiger_db.errors import TigerDBError  # noqa: PLC0415
    from tiger_db.testing.servers import GIVEN, shared  # noqa: PLC0415

    try:
        return shared(pytestconfig.stash[_FOLDER]).url
    except TigerDBError as error:
        reason = str(error)
    advice = (
        f"the server of {GIVEN} cannot be used"
        if os.environ.get(GIVEN)
        else f"there is no PostgreSQL for tests: set {GIVEN}=postgresql://user@host, or start"
        " Docker and install testcontainers, or install tiger_db with the extra `testing`"
    )
    pytest.fail(f"{advice} ({reason})", pytrace=False)


@pytest.fixture(scope="session")
def _tiger_portal() -> Iterator["BlockingPortal"]:
    """A background event loop that creates, empties and drops databases."""
    from anyio.from_thread import start_blocking_portal  # noqa: PLC0415

    with start_blocking_portal() as portal:
        yield portal


@pytest.fixture(scope="session")
def _tiger_values(tiger_options: dict[str, object]) -> dict[str, object]:
    from tiger_db.encryption import generate_encryption_key, generate_key  # noqa: PLC0415

    keys = {"encryption_keys": generate_encryption_key(), "api_key_peppers": generate_key()}
    return {**keys, **tiger_options}


@pytest.fixture(scope="session")
def tiger_template(
    tiger_server_url: str, _tiger_values: dict[str, object], _tiger_portal: "BlockingPortal"
) -> Iterator["Settings"]:
    """Settings of the migrated database of which test databases are copies.

    Override this fixture to add tables of an application.
    """
    from tiger_db.errors import TigerDBError  # noqa: PLC0415
    from tiger_db.testing.databases import create_migrated, drop  # noqa: PLC0415

    settings, reason = None, ""
    try:
        settings = _tiger_portal.call(create_migrated, tiger_server_url, _tiger_values)
    except TigerDBError as error:
        reason = str(error)
    if settings is None:
        pytest.fail(f"no test database can be created: {reason}", pytrace=False)
    yield settings
    _tiger_portal.call(drop, tiger_server_url, settings.database)


@pytest.fixture(scope="session")
def _tiger_pool(
    tiger_server_url: str,
    tiger_template: "Settings",
    _tiger_values: dict[str, object],
    _tiger_portal: "BlockingPortal",
) -> Iterator["DatabasePool"]:
    from tiger_db.testing.databases import DatabasePool  # noqa: PLC0415

    pool = DatabasePool(_tiger_portal, tiger_server_url, tiger_template.database, _tiger_values)
    yield pool
    pool.close()


@pytest.fixture
def _tiger_pooled(
    request: pytest.FixtureRequest, _tiger_pool: "DatabasePool"
) -> Iterator["PooledDatabase"]:
    connected = not {"tiger_database", "tiger_session"}.isdisjoint(request.fixturenames)
    pooled = _tiger_pool.take(connected=connected)
    yield pooled
    _tiger_pool.give_back(pooled, connected=connected)


@pytest.fixture
def tiger_settings(_tiger_pooled: "PooledDatabase") -> Iterator["Settings"]:
    """Settings of a migrated, empty database, which is emptied again after the test.

    During the test, the environment variables of tiger_db name this database, so that `Settings()`,
    `Database()`, `get_session()` and `tiger-db` use it, and no other database.
    """
    from tiger_db.settings import Settings  # noqa: PLC0415
    from tiger_db.testing.servers import environment_of  # noqa: PLC0415

    settings = _tiger_pooled.settings
    with pytest.MonkeyPatch.context() as patch:
        for name in [*os.environ]:  # `Settings` reads variables in any case
            if name.lower() in Settings.model_fields:
                patch.delenv(name)
        for name, value in environment_of(settings).items():
            patch.setenv(name, value)
        yield settings


@pytest.fixture
def tiger_database(request: pytest.FixtureRequest) -> "Database":
    """A `Database` on the database of `tiger_settings`, in the event loop of the test."""
    return cast("Database", _in_loop_of_test(request, "database"))


@pytest.fixture
def tiger_session(request: pytest.FixtureRequest) -> "AsyncSession":
    """A session of `tiger_database` whose changes are undone after the test, also after commits."""
    return cast("AsyncSession", _in_loop_of_test(request, "session"))


@pytest.fixture
def tiger_broker() -> "FakeBroker":
    """A broker that refreshes tokens as the test plans."""
    from tiger_db.testing.broker import FakeBroker  # noqa: PLC0415

    return FakeBroker()


def _in_loop_of_test(request: pytest.FixtureRequest, name: str) -> object:
    """Return the value of the asynchronous fixture that runs in the event loop of the test."""
    config = request.config
    if "anyio_backend" in request.fixturenames:
        backend = request.getfixturevalue("anyio_backend")
        if (backend if isinstance(backend, str) else backend[0]) != "asyncio":
            pytest.skip("tiger_db works with asyncio only")
        return request.getfixturevalue(f"_tiger_{name}_anyio")
    if not config.pluginmanager.has_plugin("tiger_db_asyncio"):
        pytest.fail(
            f"tiger_{name} needs a test that pytest-asyncio 1.0 or later, or anyio, runs."
            " A synchronous test can use tiger_settings",
            pytrace=False,
        )
    if marker := request.node.get_closest_marker("asyncio"):
        scope = marker.kwargs.get("loop_scope") or config.getini("asyncio_default_test_loop_scope")
    else:  # a synchronous test with asynchronous fixtures
        scope = config.getini("asyncio_default_fixture_loop_scope")
    if scope not in ("function", "class", "module", "package", "session"):
        scope = "function"
    return request.getfixturevalue(f"_tiger_{name}_{scope}")


@pytest.fixture
async def _tiger_database_anyio(tiger_settings: "Settings") -> AsyncIterator["Database"]:
    from tiger_db.database import Database  # noqa: PLC0415

    async with Database(tiger_settings) as database:
        yield database


@pytest.fixture
async def _tiger_session_anyio(tiger_database: "Database") -> AsyncIterator["AsyncSession"]:
    from tiger_db.testing.databases import rolled_back_session  # noqa: PLC0415

    async with rolled_back_session(tiger_database) as session:
        yield session
